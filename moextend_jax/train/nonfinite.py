"""Steps whose loss or gradient was not finite: counted, and their batches kept for replay.

In: each step's batch and its `finite` metric, a device scalar. Out: the batches of bad steps as
FOLDER/step_0000123-process_0.npz (arrays by the names of `config.Batch`: ids_BL, media/image, ...) beside a JSON file
that names the examples in it; after the run has gone back n times, as FOLDER/step_0000123-process_0-back_n.npz.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moextend_jax.config import Batch
from moextend_jax.folders import written_whole


class Seen(NamedTuple):
    """A step that has been started and not been checked yet; `metrics` may still be computed on the devices."""

    step: int
    batch: Batch
    metrics: dict[str, Any]


class Watch:
    """Holds the batches of the last two steps and the bad ones since the last check; writes at most `most` of these."""

    def __init__(self, folder: Path, *, most: int, name_of: Callable[[int], str]):
        """`name_of` gives the id of a row of the data set."""
        self.folder, self.most, self.name_of = folder, most, name_of
        self._seen: list[Seen] = []
        self._written = self._back = 0

    def note(self, step: int, batch: Batch, metrics: dict[str, Any]) -> None:
        """`batch` is this process's part, still in NumPy. Waits for the step before the last."""
        self._seen = [seen for seen in self._seen if seen.step > step - 2 or not bool(seen.metrics["finite"])]
        self._seen.append(Seen(step, batch, metrics))

    def check(self) -> list[int]:
        """Waits for the noted steps and returns those that were skipped; their batches are on disk."""
        bad = [seen for seen in self._seen if not bool(seen.metrics["finite"])]
        self._seen = []
        for seen in bad[: max(0, self.most - self._written)]:
            try:
                self._write(seen)
            except Exception as error:  # a disk's or a bucket's; the run does not need it
                print(f"moextend: the batch of step {seen.step} is not written: {error}", file=sys.stderr)
            self._written += 1
        return [seen.step for seen in bad]

    def go_back(self) -> None:
        """Notes that the run goes back to an earlier step. Its number comes again with another batch, and the count of
        written batches starts again."""
        self._written, self._back = 0, self._back + 1

    def _write(self, seen: Seen) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{seen.step:07d}-process_{jax.process_index()}" + (f"-back_{self._back}" if self._back else "")
        leaves = jax.tree_util.tree_leaves_with_path(seen.batch)
        arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
        with written_whole(self.folder / f"{name}.npz") as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)
        rows = [] if seen.batch.examples_Bg is None else np.unique(seen.batch.examples_Bg)
        record = {
            "step": seen.step,
            "process": jax.process_index(),
            "loss": repr(float(seen.metrics["loss"])),
            "grad_norm": repr(float(seen.metrics["grad_norm"])),
            "examples": [self.name_of(int(row)) for row in rows if row >= 0],
        }
        with written_whole(self.folder / f"{name}.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n")


def read_batch(path: Path) -> Batch:
    """A batch that `Watch` wrote."""
    fields: dict[str, Any] = {"media": {}, "features": {}, "fused": {}}
    with np.load(path, allow_pickle=False) as arrays:
        for path_in_batch in arrays.files:
            field, _, medium = path_in_batch.partition("/")
            (fields[field] if medium else fields)[medium or field] = arrays[path_in_batch]
    return Batch(**fields)
