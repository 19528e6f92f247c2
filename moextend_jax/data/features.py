"""Cache on disk of what the frozen vision tower makes of every image, so that later epochs and stages skip it.

Goes in: encoded images and a function `images_nhwc -> features_nPC`. Comes out: `FeatureStore`, memory-mapped
`features_nPC` by image key. The folder holds `features.npy` and `cache.json` (keys and fingerprint).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.data.datasets import EncodedImage, Images
from moextend_jax.data.images import decode_image, prepare_image


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """`features_nPC` read from disk as needed; `store[key]` is `[P, C]`."""

    path: Path
    rows: dict[str, int]
    features_nPC: np.ndarray
    fingerprint: dict[str, Any]

    @staticmethod
    def open(path: Path | str, *, fingerprint: dict[str, Any] | None = None) -> FeatureStore:
        """Opens a cache; with a `fingerprint`, refuses one that was made with other settings."""
        path = Path(path)
        try:
            facts = json.loads((path / "cache.json").read_text())
            features_nPC = np.asarray(np.load(path / "features.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise MoextendError(f"no feature cache in {path}: {error}") from error
        if fingerprint is not None and fingerprint != facts["fingerprint"]:
            raise MoextendError(
                f"feature cache {path} was made with {facts['fingerprint']}, wanted {fingerprint}; make it again"
            )
        rows = {key: row for row, key in enumerate(facts["keys"])}
        return FeatureStore(path=path, rows=rows, features_nPC=features_nPC, fingerprint=facts["fingerprint"])

    def __reduce__(self):
        return FeatureStore.open, (self.path,)  # worker processes map the file again instead of copying it

    def row(self, key: str) -> int:
        try:
            return self.rows[key]
        except KeyError:
            raise MoextendError(f"image {key} is not in feature cache {self.path}; make it again") from None

    def __getitem__(self, key: str) -> np.ndarray:
        return self.features_nPC[self.row(key)]


def cache_features(
    images: Images,
    *,
    path: Path | str,
    compute: Callable[[np.ndarray], Any],
    tower: str,
    feature_layer: int,
    size: int,
    preparation: Literal["pad", "crop"],
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 64,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Runs every image through the tower once and keeps the features; a cache that fits is only opened.

    Args:
      compute: `images_nhwc` (always `batch_size` of them) to `features_nPC`.
      tower: hash of the tower's weights. Together with `feature_layer`, `size`, `preparation`, `dtype` and the
        number of images it is the cache's fingerprint; a cache with another one is made again.
      threads: how many images are decoded at once.
      progress: called with (images done, images in all).
    """
    if not len(images):
        raise MoextendError(f"no images to cache features of in {path}")
    path = Path(path)
    fingerprint = {
        "tower": tower, "feature_layer": feature_layer, "size": size, "preparation": preparation, "dtype": dtype,
        "images": len(images),
    }  # fmt: skip
    found = _find(path, fingerprint)
    if not distributed.any_process(found is None):
        assert found is not None
        return found
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        keys = _write(unfinished, images, compute, size, preparation, dtype, batch_size, threads, progress)
        if distributed.first():
            (unfinished / "cache.json").write_text(json.dumps({"fingerprint": fingerprint, "keys": keys}))
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    distributed.barrier(f"cached {path}")
    return FeatureStore.open(path)


def _find(path: Path, fingerprint: dict[str, Any]) -> FeatureStore | None:
    try:
        return FeatureStore.open(path, fingerprint=fingerprint)
    except MoextendError:
        return None  # not there, stale or broken: to be made


def _write(folder: Path, images, compute, size, preparation, dtype, batch_size, threads, progress) -> list[str]:
    """All processes compute, on one mesh; the first writes."""
    prepare = partial(_prepare, size=size, preparation=preparation)
    keys, out_nPC = [], None
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(images), batch_size):
            some = [images[row] for row in range(first, min(first + batch_size, len(images)))]
            images_nhwc = np.zeros((batch_size, size, size, 3), np.float32)  # one shape, one compilation
            images_nhwc[: len(some)] = list(pool.map(prepare, some))
            features_nPC = np.asarray(compute(images_nhwc))[: len(some)].astype(dtype)
            if out_nPC is None and distributed.first():
                folder.mkdir(parents=True)
                shape = (len(images), *features_nPC.shape[1:])
                out_nPC = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=dtype, shape=shape)
            if out_nPC is not None:
                out_nPC[first : first + len(some)] = features_nPC
            keys += [image.key for image in some]
            if progress:
                progress(len(keys), len(images))
    if out_nPC is not None:
        out_nPC.flush()
    return keys


def _prepare(image: EncodedImage, *, size: int, preparation: Literal["pad", "crop"]) -> np.ndarray:
    return prepare_image(decode_image(image.encoded, name=f"image {image.key}"), size=size, preparation=preparation)
