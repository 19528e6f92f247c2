"""Where a run's numbers go: JSON lines and TensorBoard on disk, a progress bar on screen.

In: one mapping of scalar names to numbers per logged step. Out: `DIR/metrics.jsonl`, one object a line with
"step" first, event files in `DIR/tensorboard/`, and a rich progress bar, or plain lines where there is no terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moextend_jax.config import MoextendError
from moextend_jax.folders import is_url


class MetricsWriter:
    """Appends scalars of a step to `directory`; a context manager.

    `resume_step` is the step of the checkpoint the run starts from: later lines, left by a run that was cut off,
    are dropped, so that the file equals an uninterrupted run's. 0 starts afresh. Only process 0 writes. Where the
    directory is a URL, TensorBoard's files arrive at the end. What the disk refuses is a MoextendError.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0, process_index: int = 0):
        self._lines = self._events = None
        if process_index != 0:
            return
        # A bucket's objects cannot grow: lines are kept here, and sent whole.
        self._away, here = (directory, Path(tempfile.mkdtemp())) if is_url(directory) else (None, directory)
        self._path = path = here / "metrics.jsonl"
        with self._disk_errors():
            here.mkdir(parents=True, exist_ok=True)
            if self._away is not None and (self._away / path.name).exists():
                path.write_text((self._away / path.name).read_text())
            _drop_after(path, step=resume_step)
            # Whole lines reach the disk even if we are killed.
            self._lines = path.open("a", buffering=1, encoding="utf-8")
            self._events = Events(here / "tensorboard")
            self._events.hide_from(resume_step + 1)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line; values are Python numbers or 0-d arrays. JSON has no NaN or infinity: they become null."""
        if self._lines is None or self._events is None:
            return
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self._disk_errors():
            if self._away is None and not _is_open_here(self._lines, self._path):
                raise OSError("it is gone: somebody has moved or deleted the work directory")
            self._lines.write(json.dumps({"step": int(step), **finite}) + "\n")
            if self._away is not None:
                (self._away / self._path.name).write_text(self._path.read_text())
            self._events.scalars(int(step), numbers)

    def go_back(self, step: int) -> None:
        """Drops the lines of later steps: the run does them again."""
        if self._lines is None or self._events is None:
            return
        with self._disk_errors():
            self._lines.close()
            _drop_after(self._path, step=step)
            self._lines = self._path.open("a", buffering=1, encoding="utf-8")
            self._events.hide_from(step + 1)

    def close(self) -> None:
        if self._lines is None or self._events is None:
            return
        lines, events, self._lines, self._events = self._lines, self._events, None, None
        with self._disk_errors():
            lines.close()
            events.close()
            if self._away is not None:
                (self._away / "tensorboard").mkdir(parents=True, exist_ok=True)
                for file in (self._path.parent / "tensorboard").iterdir():
                    (self._away / "tensorboard" / file.name).write_bytes(file.read_bytes())
                shutil.rmtree(self._path.parent)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MoextendError(f"cannot write {self._away or self._path.parent}: {error.strerror or error}") from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except MoextendError:
            if kind is None:  # otherwise what is under way is the better message
                raise


class Events:
    """A TensorBoard file, written in the caller's thread, so that errors are the caller's too."""

    def __init__(self, folder: Path):
        # Imported here: reading metrics, and every other command, should not wait for protobuf.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._scalar, self._proto = summary.scalar, event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))

    def hide_from(self, step: int) -> None:
        """TensorBoard shows nothing that older files, or this one so far, say of this step and later ones."""
        started = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step, session_log=started)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._write(step, summary=self._scalar(name, value))

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **what))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order; a last line without its end (a run killed while writing) is left out."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise MoextendError(f"{path}:{number}: not a line of metrics ({error}); mend or delete the file") from error
    return rows


def _is_open_here(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one at its path: a file that was moved or deleted can be written to."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _drop_after(path: Path, *, step: int) -> None:
    """Drops the lines of later steps from a metrics file; where it is missing there is nothing to drop."""
    if not path.exists():
        return
    lines = "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step)
    partial = path.with_suffix(".partial")
    partial.write_text(lines, encoding="utf-8")
    os.replace(partial, path)  # never a moment in which the older lines exist nowhere


class Bar:
    """Handle that `progress` yields; `update` takes host numbers, so a call never waits for the device."""

    def __init__(self, stage: str, total_steps: int, *, start_step: int, every_seconds: float, screen: Progress | None):
        self.stage, self.total, self.start = stage, total_steps, start_step
        self.every_seconds, self.screen = every_seconds, screen
        self.began = self.printed = time.monotonic()
        self.task: TaskID | None = None
        if screen is not None:
            self.task = screen.add_task(stage, total=total_steps, completed=start_step, loss="", speed="")

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Steps done so far, with the latest loss and speed where they are known."""
        numbers: dict[str, Any] = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        if tokens_per_second is not None:
            numbers["speed"] = f"{tokens_per_second:,.0f} tokens/s"
        if self.screen is not None and self.task is not None:
            self.screen.update(self.task, completed=step, **numbers)
            return
        now = time.monotonic()
        if self.every_seconds < 0 or (step < self.total and now - self.printed < self.every_seconds):
            return
        self.printed = now
        left = (now - self.began) / max(1, step - self.start) * (self.total - step)
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left"
        print("  ".join([f"{self.stage} {step}/{self.total}", *numbers.values(), clock]), flush=True)


@contextlib.contextmanager
def progress(
    stage: str,
    total_steps: int,
    *,
    start_step: int = 0,
    every_seconds: float = 10.0,
    process_index: int = 0,
    console: Console | None = None,
) -> Iterator[Bar]:
    """Shows a stage's step, loss, tokens/s and time left: a bar on a terminal, else a line each `every_seconds`.

    Other processes than 0 show nothing.
    """
    if process_index != 0:
        yield Bar(stage, total_steps, start_step=start_step, every_seconds=-1, screen=None)
        return
    console = console or Console()
    if not console.is_terminal:
        yield Bar(stage, total_steps, start_step=start_step, every_seconds=every_seconds, screen=None)
        return
    columns = (
        TextColumn("[bold]{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as screen:
        yield Bar(stage, total_steps, start_step=start_step, every_seconds=every_seconds, screen=screen)
