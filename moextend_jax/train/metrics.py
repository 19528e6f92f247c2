"""The numbers of a training stage on disk: one mapping of names to numbers per logged step in, lines of JSON out.

`DIR/metrics.jsonl` has one object a line with "step" first, exact also after a run that was cut off; what else gets the
numbers is a row of `sinks.py`. docs/watching.md says what each number means.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from moextend_jax.config import MoextendError
from moextend_jax.folders import is_url, written_whole
from moextend_jax.outside import said_by
from moextend_jax.terminal import as_json
from moextend_jax.train.sinks import IDS, SINKS, open_sinks, scalars


class MetricsWriter:
    """Appends the numbers of a step to `directory`, and hands them to sinks; a context manager.

    `resume_step` is the step of the checkpoint the run starts from: later lines, left by a run that was cut off,
    are dropped, so that the file equals an uninterrupted run's. 0 starts afresh. Only process 0 writes. Where the
    directory is a URL, TensorBoard's files arrive at the end. Errors of the disk become a MoextendError.

    Args:
      sinks: rows of `sinks.SINKS`; name, settings: the run's name and its settings there.
    """

    def __init__(
        self, directory: Path, *, resume_step: int = 0, process_index: int = 0, sinks: Iterable[str] = ("tensorboard",),
        name: str = "", settings: dict[str, Any] | None = None,
    ):  # fmt: skip
        self._lines, self._sinks = None, {}
        if process_index != 0:
            return
        # Objects of a bucket cannot be appended to: the file is kept here, and sent whole, while training goes on.
        self._sender, self._sent = ThreadPoolExecutor(1), Future[None]()
        self._sent.set_result(None)
        self._away, here = (directory, Path(tempfile.mkdtemp())) if is_url(directory) else (None, directory)
        self._path = path = here / "metrics.jsonl"
        with contextlib.ExitStack() as failing, self._disk_errors():
            if self._away is not None:
                failing.callback(shutil.rmtree, here)
            here.mkdir(parents=True, exist_ok=True)
            for file in (path, here / IDS):
                if self._away is not None and (self._away / file.name).exists():
                    file.write_text((self._away / file.name).read_text())
            _drop_after(path, step=resume_step)
            self._sinks = open_sinks(sinks, here, name=name, settings=settings or {}, resume_step=resume_step)
            # Whole lines reach the disk even if we are killed.
            self._lines = path.open("a", buffering=1, encoding="utf-8")
            if self._away is not None and (here / IDS).exists():
                (self._away / IDS).write_text((here / IDS).read_text())
            failing.pop_all()

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Writes one line; values are Python numbers, 0-d arrays, or lists by layer (None: not of this layer). JSON has
        no NaN or infinity: they become null."""
        if self._lines is None:
            return
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in numbers.items()}
        with self._disk_errors():
            if self._away is None and not _is_open_here(self._lines, self._path):
                raise OSError("it is gone: somebody has moved or deleted the work directory")
            self._lines.write(json.dumps({"step": int(step), **as_json(plain)}) + "\n")
            # A bucket takes an object about once a second: what comes meanwhile goes with the next line.
            if self._away is not None and self._sent.done():
                self._sent = self._sender.submit(self._copy_away)
            for kind in list(self._sinks):
                with self._sink_errors(kind):
                    self._sinks[kind].log(int(step), scalars(plain))

    def _copy_away(self) -> None:
        """What a bucket's library raises ends no run: the next line, or the end, copies the whole file again."""
        assert self._away is not None
        try:
            (self._away / self._path.name).write_text(self._path.read_text())
        except Exception as error:
            print(f"metrics: {self._away} did not take them now: {said_by(error)}", file=sys.stderr, flush=True)

    def go_back(self, step: int) -> None:
        """Drops the lines of later steps: the run does them again."""
        if self._lines is None:
            return
        with self._disk_errors():
            self._lines.close()
            _drop_after(self._path, step=step)
            self._lines = self._path.open("a", buffering=1, encoding="utf-8")
            for sink in self._sinks.values():
                sink.back(step)

    def close(self) -> None:
        if self._lines is None:
            return
        lines, self._lines = self._lines, None
        with self._disk_errors():
            lines.close()
            for kind in list(self._sinks):
                with self._sink_errors(kind):
                    self._sinks[kind].close()
            self._sender.shutdown()
            if self._away is not None:
                self._copy_away()
                (self._away / "tensorboard").mkdir(parents=True, exist_ok=True)
                for file in (self._path.parent / "tensorboard").glob("*"):
                    (self._away / "tensorboard" / file.name).write_bytes(file.read_bytes())
                shutil.rmtree(self._path.parent)

    @contextlib.contextmanager
    def _sink_errors(self, kind: str) -> Iterator[None]:
        """Reports a tool that fails once, and goes on without it, since metrics.jsonl has everything."""
        try:
            yield
        except Exception as error:
            if not SINKS[kind].elsewhere:
                raise
            del self._sinks[kind]
            print(f"sinks: {kind} failed and gets no more: {said_by(error)}", file=sys.stderr, flush=True)

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
            if kind is None:  # otherwise the exception under way is the better message
                raise


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
    with written_whole(path) as unfinished:
        unfinished.write_text(lines, encoding="utf-8")
