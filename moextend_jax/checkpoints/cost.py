"""What a conversion costs: bytes, time and peak memory, a progress bar meanwhile, and an early word on a full disk.

In: the tensors that will be written, and where. Out: a callback that hears of every piece, and a `Cost` at the end.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moextend_jax.checkpoints.tensors import Planned
from moextend_jax.config import MoextendError


class Cost(NamedTuple):
    """What a conversion took. `peak` is the most memory above the start (mapped file pages included), or None where the
    system does not tell; `largest` is the biggest tensor written: of an import, a stacked one."""

    nbytes: int
    seconds: float
    peak: int | None
    largest: int

    def __str__(self) -> str:
        peak = "unknown" if self.peak is None else _size(self.peak)
        return (
            f"{_size(self.nbytes)} in {self.seconds:.1f} s, {self.nbytes / 1e6 / self.seconds:.0f} MB/s; peak memory "
            f"{peak} above the start (largest tensor written {_size(self.largest)})"
        )


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


@contextlib.contextmanager
def watched(
    planned: Mapping[str, Planned], dst: Path, console: Console | None
) -> Iterator[tuple[Callable[[], Cost], Callable[[int], None]]]:
    """What tells the cost in the end, and what hears of bytes written, for a progress bar where there is a terminal.

    Raises:
      MoextendError: the disk is too small.
    """
    sizes = [tensor.nbytes for tensor in planned.values()]
    total, started, before = sum(sizes), time.perf_counter(), None
    parent = next(folder for folder in dst.resolve().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < total:
        raise MoextendError(f"{dst} needs {_size(total)}, and its disk has {_size(free)} left")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux tells the peak since a reset
        before = _memory("VmRSS")

    def cost() -> Cost:
        peak = None if before is None else max(0, _memory("VmHWM") - before)
        return Cost(total, time.perf_counter() - started, peak, max(sizes, default=0))

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console is None or not console.is_terminal) as progress:
        task = progress.add_task(dst.name, total=total)
        yield cost, lambda nbytes: progress.advance(task, nbytes)


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:  # what is more becomes 1e+03
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.2f} GB"
