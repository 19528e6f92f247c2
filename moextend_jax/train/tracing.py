"""A trace of some steps, for xprof: `settings.profiled` in, FOLDER/plugins/profile/DATE/HOST.xplane.pb out.

Process 0 traces its own devices and its own Python. A step is called "train" in the trace, with its number.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from moextend_jax.folders import is_url


class Tracer:
    """Traces `steps`, once; a context manager that ends the trace whatever happens."""

    def __init__(self, folder: Path, steps: range):
        self.folder, self.steps = folder, steps if jax.process_index() == 0 else range(0)
        self._here, self._runs = folder, False

    def announce(self, name: str, *, after: int, last: int) -> None:
        """Prints a line if nothing will be traced; this run does the steps `after` + 1 to `last`."""
        if self.steps and not (self.steps.start <= last and after + 1 < self.steps.stop):
            span = f"{self.steps.start}:{self.steps.stop - 1}"
            print(f"{name}: nothing is traced: profile is {span}, and this goes from step {after + 1} to {last}")

    def step(self, count: int, before: Any) -> jax.profiler.StepTraceAnnotation:
        """A context around a step; `before` is the step's input, for which a trace waits before it starts."""
        if count in self.steps and not self._runs:
            jax.block_until_ready(before)
            if is_url(self.folder):  # JAX needs to seek in the file, so it writes to a disk here
                self._here = Path(tempfile.mkdtemp())
            jax.profiler.start_trace(str(self._here))
            self._runs = True
        return jax.profiler.StepTraceAnnotation("train", step_num=count)

    def after(self, count: int, outputs: Any) -> None:
        """Ends the trace where this was its last step; waits for what the step has made."""
        if self._runs and count + 1 >= self.steps.stop:
            jax.block_until_ready(outputs)
            self._stop()

    def _stop(self) -> None:
        self._runs, self.steps = False, range(0)
        jax.profiler.stop_trace()
        if self._here != self.folder:
            for file in (path for path in self._here.rglob("*") if path.is_file()):
                target = self.folder / file.relative_to(self._here).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            shutil.rmtree(self._here)
        print(f"traced: {self.folder}")

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._runs:
            self._stop()
