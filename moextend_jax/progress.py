"""What a person sees while it runs: a bar with the time left, and a line for each preparation that takes long.

In: how many things there are, and how many are done. Out: a bar on a terminal, else a line now and then; of several
processes only the first shows it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moextend_jax.distributed import first
from moextend_jax.terminal import console

EVERY_SECONDS = 10.0
"""Between two lines of a bar, where there is no terminal."""
PERIOD = 1800.0
"""Seconds of the past that the time left is estimated from."""
LONG = 1.0
"""Seconds after which a preparation is worth a line."""


class Bar:
    """Takes numbers of the host, so a call never waits for a device.

    The estimate is rich's: things over time since the first were done, so that what those waited for (compiling,
    workers that start) is not in it.
    """

    def __init__(self, name: str, total: int, *, unit: str, done: int, screen: Progress, quick: bool):
        self.name, self.unit, self.screen, self.quick, self.before = name, unit, screen, quick, done
        screen.add_task(name, total=total, completed=done, note="")
        self.task = screen.tasks[-1]
        self.waiting = contextlib.ExitStack()
        if unit:  # the first batch starts workers and compiles
            self.waiting.enter_context(preparing(f"{name}: the first of {total:,} {unit}"))
        self.began = self.printed = monotonic()

    @property
    def per_second(self) -> float:
        """Things done per second since the bar began, compiling included."""
        return (self.task.completed - self.before) / max(monotonic() - self.began, 1e-9)

    def add(self, count: int) -> None:
        self.update(int(self.task.completed) + count)

    def update(self, done: int, *, note: str = "") -> None:
        """`note` stands where otherwise the things per second do."""
        self.waiting.close()
        self.screen.update(self.task.id, completed=done)
        if not note and self.task.speed:
            note = f"{self.task.speed:,.1f} {self.unit}/s"
        self.screen.update(self.task.id, note=note)
        if self.screen.disable and first():
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        now, ended = monotonic(), self.task.finished and (self.quick or monotonic() - self.began > LONG)
        if not ended and now - self.printed < EVERY_SECONDS:
            return
        self.printed = now
        left = self.task.time_remaining
        clock = "" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left"
        words = (f"{self.name} {int(self.task.completed)}/{int(self.task.total or 0)}", note, clock)
        print("  ".join(filter(None, words)), flush=True)


@contextlib.contextmanager
def counting(
    name: str, total: int, *, unit: str = "", done: int = 0, quick: bool = True, out: Console | None = None
) -> Iterator[Bar]:
    """A bar for `total` things, of which `done` were done before (a run that goes on).

    Args:
      quick: without a terminal, also show the end of what took less than a second.
    """
    out = out or console()
    columns = (
        TextColumn("[bold]{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    shows = out.is_terminal and first()
    with Progress(*columns, console=out, speed_estimate_period=PERIOD, disable=not shows, get_time=monotonic) as screen:
        bar = Bar(name, total, unit=unit, done=done, screen=screen, quick=quick)
        with bar.waiting:
            yield bar


@contextlib.contextmanager
def preparing(what: str) -> Iterator[None]:
    """Says on standard error what is waited for: a line after a second, and at the end one with the seconds.

    Not before `distributed.start`, for it asks JAX which process this is.
    """
    if not first():
        yield
        return
    began = monotonic()
    timer = threading.Timer(LONG, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := monotonic() - began) >= LONG:
        print(f"{what}: {seconds:.1f} s", file=sys.stderr, flush=True)
