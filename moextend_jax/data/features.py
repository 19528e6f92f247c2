"""Cache on disk of what a frozen tower makes of every item of its medium, so that later epochs and stages skip it.

Goes in: what prepares the items and a function from their arrays to `features_nPC`. Comes out: `FeatureStore`,
memory-mapped `features_nPC` by image key. The folder holds `features.npy` and `cache.json` (keys, fingerprint, and the
faults of images that could not be read, whose features are zero).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moextend_jax import distributed, machine, preemption
from moextend_jax.config import MoextendError
from moextend_jax.data.mixing import Joined
from moextend_jax.faults import STRICT, Fault, refuse
from moextend_jax.lock import in_turn
from moextend_jax.progress import counting
from moextend_jax.settings import FaultSettings

if TYPE_CHECKING:  # it reads what is cached here
    from moextend_jax.data.readers import Inputs


READERS = 8
"""Threads at most that decode and prepare items while an accelerator computes: one makes about a hundred photographs
a second, and Pillow, NumPy and soxr run side by side."""


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """`features_nPC` read from disk as needed; `store[key]` is `[P, C]`."""

    path: Path
    rows: dict[str, int]
    features_nPC: np.ndarray
    fingerprint: dict[str, Any]
    faults: dict[str, Fault] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> FeatureStore:
        try:
            facts = json.loads((path / "cache.json").read_text())
            features_nPC = np.asarray(np.load(path / "features.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise MoextendError(f"no feature cache in {path}: {error}") from error
        rows = {key: row for row, key in enumerate(facts["keys"])}
        faults = {key: Fault(*fault) for key, fault in facts.get("faults", {}).items()}
        return FeatureStore(
            path=path, rows=rows, features_nPC=features_nPC, fingerprint=facts["fingerprint"], faults=faults
        )

    def __reduce__(self):
        return FeatureStore.open, (self.path,)  # worker processes map the file again instead of copying it

    def row(self, key: str) -> int:
        """Raises the `Fault` of an image that could not be read."""
        if key in self.faults:
            raise self.faults[key].again()
        try:
            return self.rows[key]
        except KeyError:
            raise MoextendError(f"image {key} is not in feature cache {self.path}; make it again") from None

    def __getitem__(self, key: str) -> np.ndarray:
        return self.features_nPC[self.row(key)]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Features `[..., P, C]` of these rows."""
        return self.features_nPC[rows]


@dataclass(frozen=True, kw_only=True)
class JoinedFeatures:
    """Caches of several data sets, one after another, rows and keys as `mixing.JoinedItems` number them. stores: None
    where a data set has no items."""

    stores: tuple[FeatureStore | None, ...]
    joined: Joined

    def row(self, key: str) -> int:
        """Raises the `Fault` of an item that could not be read."""
        number, _, own = key.partition("/")
        store = self.stores[int(number)]
        assert store is not None
        try:
            return self.joined.starts[int(number)] + store.row(own)
        except Fault as fault:
            raise Fault(str(fault), fault.kind, key) from fault

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Features `[..., P, C]` of these rows."""
        shape, dtype = next((s.features_nPC.shape[1:], s.features_nPC.dtype) for s in self.stores if s is not None)
        features = np.empty((*rows.shape, *shape), dtype)
        for store, first, size in zip(self.stores, self.joined.starts, self.joined.sizes, strict=True):
            if store is not None:
                mine = (rows >= first) & (rows < first + size)
                features[mine] = store.features_nPC[rows[mine] - first]
        return features


def cache_features(
    inputs: Inputs,
    *,
    path: Path | str,
    compute: Callable[[np.ndarray], Any],
    tower: str,
    batch_size: int = 64,
    faults: FaultSettings = STRICT,
) -> FeatureStore:
    """Runs every item through the tower once and keeps the features; a cache that fits, in `path` or beside it (of
    another data set with the same items), is only opened.

    Args:
      compute: arrays `[n, ...]` (always `batch_size` of them) to `features_nPC`.
      tower: hash of the tower's weights. Together with the facts of `inputs` and the items' fingerprint it is the
        cache's fingerprint; a cache with another one is made again.
      faults: an item whose fault is skipped is noted in the cache; conversations that show it are then skipped.

    Raises:
      Fault: an item that cannot be read and is not to be skipped, now or when the cache was made.
    """
    if not len(inputs):
        raise MoextendError(f"no items to cache features of in {path}")
    path = Path(path)
    with in_turn(path):  # two chains of `continual` want the same at the same time
        # Remove what killed processes left. No other process is writing, for it is this one's turn.
        for left in path.parent.iterdir() if distributed.first() else ():
            if left.name.startswith(f"{path.name}.unfinished-"):
                shutil.rmtree(left, ignore_errors=True)
        fingerprint = fingerprint_of(inputs, tower=tower)
        # Process 0's look decides: on another host the files may have other times.
        if name := distributed.from_first(lambda: _cached(path, fingerprint, inputs)):
            store = FeatureStore.open(path.with_name(name))
            refuse(store.faults.values(), faults, where=f"feature cache {path}")
            return store
        unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
        try:
            keys, bad = _write(unfinished, inputs, compute, batch_size, faults)
            if distributed.first():
                facts = {"fingerprint": fingerprint, "keys": keys, "faults": bad}
                (unfinished / "cache.json").write_text(json.dumps(facts))
                shutil.rmtree(path, ignore_errors=True)
                unfinished.rename(path)
        finally:
            if distributed.first():  # on another host a process with this id may still write
                shutil.rmtree(unfinished, ignore_errors=True)
        distributed.barrier(f"cached {path}")
        return FeatureStore.open(path)


def fingerprint_of(inputs: Inputs, *, tower: str) -> dict[str, Any]:
    """What a cache of these items must have been made of; the arguments are those of `cache_features`."""
    return {"tower": tower, "dtype": "float32", "images": inputs.fingerprint} | inputs.facts()


def is_cached(inputs: Inputs, *, path: Path, tower: str) -> bool:
    """Whether `cache_features` would find these items' features, in `path` or beside it."""
    fingerprint = fingerprint_of(inputs, tower=tower)
    return bool(distributed.from_first(lambda: _cached(path, fingerprint, inputs)))


def _cached(path: Path, fingerprint: dict[str, Any], inputs: Inputs) -> str:
    """The folder beside `path`, or its own name, that has these features; "" where none has."""
    if _fits(path, fingerprint, inputs):
        return path.name
    others = (other.parent for other in path.parent.glob("*/cache.json") if ".unfinished-" not in str(other))
    return next((other.name for other in sorted(others) if _fits(other, fingerprint, inputs)), "")


def _fits(path: Path, fingerprint: dict[str, Any], inputs: Inputs) -> bool:
    """Whether there is a cache of these items, made so, and those noted as faulty in it are still faulty: an item that
    has been mended needs features."""
    try:
        store = FeatureStore.open(path)
    except MoextendError:
        return False  # not there, or broken
    return store.fingerprint == fingerprint and all(
        isinstance(_prepare(inputs, store.rows[key]), Fault) for key in store.faults
    )


def _write(
    folder: Path, inputs: Inputs, compute, batch_size, faults: FaultSettings
) -> tuple[list[str], dict[str, list[str]]]:
    """Writes features.npy; returns the keys of its rows, and by key the faults (for JSON) of items with zero rows. All
    processes compute, on one mesh; the first writes."""
    prepare = partial(_prepare, inputs)
    count = len(inputs)
    keys, bad, out_nPC = [], {}, None
    readers = 1 if machine.only_cpu() else min(READERS, machine.cores())  # on a CPU the tower itself needs the cores
    with ThreadPoolExecutor(readers) as pool, counting("features", count, unit="images", quick=False) as bar:
        coming = pool.map(prepare, range(min(batch_size, count)))
        for first in range(0, count, batch_size):
            preemption.stop_if_told()
            arrays = np.zeros((batch_size, *inputs.shape), np.float32)  # one shape, one compilation
            prepared, after = list(coming), first + batch_size
            coming = pool.map(prepare, range(after, min(after + batch_size, count)))  # while these are computed
            for n, item in enumerate(prepared):
                if isinstance(item, Fault):
                    if not faults.skips(item):
                        raise item
                    bad[item.id] = [str(item), item.kind, item.id]
                    keys.append(item.id)
                else:
                    keys.append(item.key)
                    arrays[n] = item.array
            features_nPC = np.asarray(compute(arrays))[: len(prepared)].astype(np.float32)
            features_nPC[[isinstance(item, Fault) for item in prepared]] = 0
            if out_nPC is None and distributed.first():
                folder.mkdir(parents=True)
                shape = (count, *features_nPC.shape[1:])
                out_nPC = _mapped(folder / "features.npy", shape)
            if out_nPC is not None:
                out_nPC[first : first + len(prepared)] = features_nPC
            bar.update(len(keys))
    if out_nPC is not None:
        out_nPC.flush()
    return keys, bad


def _mapped(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A file as an array of zeros, if the disk has room for all of it: a disk that fills up while the array is written
    ends the process by a bus error. (Reserving the room takes hours on a network file system that cannot do it.)"""
    size, free = math.prod(shape) * np.dtype(np.float32).itemsize, shutil.disk_usage(path.parent).free
    if size > free:
        raise MoextendError(
            f"features take {size:,} bytes, and {path.parent.parent} has room for {free:,}: make room there, or set "
            "cache_features = false"
        )
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _prepare(inputs: Inputs, row: int) -> Any:
    try:
        return inputs.prepared(row)
    except Fault as fault:
        return fault
