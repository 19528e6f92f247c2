"""A progress bar of things done: how many, how many a second, how long still; plain lines without a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moextend_jax.distributed import first
from moextend_jax.terminal import console

EVERY_SECONDS = 10.0
"""Between two plain lines, where there is no terminal."""


class Bar:
    """`add` counts; of several processes only the first shows it."""

    def __init__(self, name: str, total: int, *, unit: str, screen: Progress | None, done: int):
        self.name, self.total, self.unit, self.screen, self.done, self.before = name, total, unit, screen, done, done
        self.began = self.printed = time.monotonic()
        self.task = screen.add_task(name, total=total, completed=done, speed="") if screen else None

    @property
    def per_second(self) -> float:
        """Things done per second since the bar began, compiling included."""
        return (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)

    def add(self, count: int) -> None:
        self.done += count
        speed = f"{self.per_second:,.1f} {self.unit}/s"
        now = time.monotonic()
        if self.screen is not None and self.task is not None:
            self.screen.update(self.task, completed=self.done, speed=speed)
        elif first() and (self.done == self.total or now - self.printed >= EVERY_SECONDS):
            self.printed = now
            left = int((self.total - self.done) / max(self.per_second, 1e-9))
            print(f"{self.name} {self.done}/{self.total}  {speed}  {left // 60}:{left % 60:02d} left", flush=True)


@contextlib.contextmanager
def counting(name: str, total: int, *, unit: str, done: int = 0) -> Iterator[Bar]:
    """A bar for `total` things, of which `done` were done before (a run that goes on)."""
    out = console()
    if not (out.is_terminal and first()):
        yield Bar(name, total, unit=unit, screen=None, done=done)
        return
    columns = (
        TextColumn("[bold]{task.description:<8}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out) as screen:
        yield Bar(name, total, unit=unit, screen=screen, done=done)
