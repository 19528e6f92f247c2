"""What reads the items of a medium by row: encoded files or cached features in, arrays of a batch out.

TABLE of two: `Inputs` decodes and prepares for the tower, `Features` has what came out of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from moextend_jax.config import Batch, FeaturesConfig, Medium, VisionConfig, WhisperConfig
from moextend_jax.data.datasets import AnyItems
from moextend_jax.data.features import FeatureStore, JoinedFeatures
from moextend_jax.faults import Fault
from moextend_jax.media import KINDS

Faults = dict[tuple[int, int], Fault]
"""Of items that cannot be read, by their slots (row B, item M); their arrays stay zero."""


class Prepared(NamedTuple):
    key: str
    array: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Items of a medium decoded and prepared for its tower, in the worker processes. few: rows of the items of a cache
    that has these alone; row n is then the nth of them."""

    items: AnyItems
    medium: Medium
    preparation: Literal["pad", "crop"]
    few: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.items if self.few is None else self.few)

    @property
    def fingerprint(self) -> str:
        """Of the items."""
        own = self.items.fingerprint
        return own if self.few is None else hashlib.sha256(json.dumps([own, self.few]).encode()).hexdigest()

    @property
    def field(self) -> Literal["media", "features"]:
        return self.medium.field

    def row(self, ref) -> int:
        """The row of an item; raises the `Fault` that it had when the data set was opened."""
        self.items.check(ref.row)
        return ref.row

    def span(self, row: int) -> int:
        """Tokens of the item in a row; raises its `Fault` where they depend on its file and that cannot be read."""
        return self.items.span(row, self.medium)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item's array."""
        return KINDS[self.medium.kind].input_shape(self.medium)

    def facts(self) -> dict[str, Any]:
        """What decides the arrays beside the items."""
        tower, preparation = self.medium.tower, {"preparation": self.preparation}
        if isinstance(tower, WhisperConfig):
            return {"feature_layer": tower.feature_layer, "bands": tower.bands, "seconds": tower.seconds}
        if isinstance(tower, FeaturesConfig):
            return {"width": tower.width, "patches": tower.patches}
        more = {"seconds": self.medium.seconds} if self.medium.kind == "audio" else preparation
        more |= {"frames": self.medium.frames} if self.medium.kind == "video" else {}
        # Values equal to CLIP's are left out, so that features cached before there were other towers are found.
        for name in ("levels", "resample", "stretched"):
            more |= {name: value} if (value := getattr(tower, name)) != getattr(VisionConfig(), name) else {}
        return {"feature_layer": tower.feature_layer, "size": tower.image_size, **more}

    def prepared(self, row: int) -> Prepared:
        """An item as its tower takes it; raises a `Fault` where it cannot be read."""
        key, item = self.items.decoded(row if self.few is None else self.few[row], self.medium)
        prepare = KINDS[self.medium.kind].prepare
        return Prepared(key, prepare(item, medium=self.medium, preparation=self.preparation, id=key))

    def read(self, rows_BM: np.ndarray, faults: Faults | None = None) -> np.ndarray:
        """Arrays `[B, M, ...]` (float32) of items by row, zeros for -1. faults: takes those of items, which are raised
        without it."""
        arrays = np.zeros((*rows_BM.shape, *self.shape), np.float32)
        for b, m in zip(*np.nonzero(rows_BM >= 0), strict=True):
            try:
                arrays[b, m] = self.prepared(int(rows_BM[b, m])).array
            except Fault as fault:
                if faults is None:
                    raise
                faults[int(b), int(m)] = fault
        return arrays


@dataclass(frozen=True, kw_only=True)
class Features:
    """Items of a medium as the cached output of its frozen tower. items: where the lengths of their spans depend on
    their files."""

    store: FeatureStore | JoinedFeatures
    medium: Medium
    items: AnyItems | None = None

    field = "features"

    def row(self, ref) -> int:
        """The row of an item in the cache; raises its `Fault` where it could not be read when the cache was made."""
        return self.store.row(ref.key)

    def span(self, row: int) -> int:
        """Tokens of the item in a row, which has the same number in the cache."""
        if not self.medium.spans:
            return self.medium.span()
        assert self.items is not None
        return self.items.span(row, self.medium)

    def read(self, rows_BM: np.ndarray, faults: Faults | None = None) -> np.ndarray:
        """Features `[B, M, P, C]` of items by row, zeros for -1."""
        features_BMPC = self.store.read(np.maximum(rows_BM, 0))
        features_BMPC[rows_BM < 0] = 0
        return features_BMPC


Readers = Mapping[str, Inputs | Features]
"""Medium -> what reads its items, in the order of `ModelConfig.media`. Items and marks of media without a reader are
left out: so a question is asked alone."""


def given(batch: Batch, media: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Batch:
    """The batch with these arrays of items by medium, each in the field of `Batch` that its medium, or its reader,
    names."""
    fields: dict[str, dict[str, np.ndarray]] = {"media": {}, "features": {}}
    for name in media:
        if name in arrays:
            fields[media[name].field][name] = arrays[name]
    return batch._replace(**fields)
