"""A base's experts in few bits as they are read: leaves over files in, leaves of integers and scales out.

Nothing of the files changes, nor their hashes: a piece is quantised when it is asked for, whole groups at a time, so
that every shard has the bits that the whole matrix would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moextend_jax.checkpoints.leaves import Index, Leaf, Slices
from moextend_jax.config import DecoderConfig, MoextendError, Quantised
from moextend_jax.models.quantised import STORAGES, quantise, scales

EXPERTS = "decoder/layers/moe/experts/"
MATRICES = tuple(EXPERTS + name for name in ("w_gate", "w_up", "w_down"))


def check(decoder: DecoderConfig, how: Quantised | None, mesh: Any) -> None:
    """Raises MoextendError where groups of weights do not divide what a device has of an expert."""
    if how is None:
        return
    for what, size, parts in (("width", decoder.width, 1), ("hidden width", decoder.hidden, mesh.shape["tensor"])):
        if size % (how.group * parts):
            raise MoextendError(
                f"expert_group = {how.group}: it does not divide the experts' {what} of {size}"
                + (f" on a tensor axis of {parts}" if parts > 1 else "")
            )


def stored(leaves: Mapping[str, Leaf], how: Quantised | None) -> dict[str, Leaf]:
    """The leaves, each matrix of the pretrained experts as one of integers and one of scales."""
    quantised = {} if how is None else {path: leaf for path, leaf in leaves.items() if path in MATRICES}
    result = {path: leaf for path, leaf in leaves.items() if path not in quantised}
    for path, leaf in quantised.items():
        assert how is not None
        result |= {path: _values(leaf, how), f"{path}_scale": _scales(leaf, how)}
    return result


def _values(leaf: Leaf, how: Quantised) -> Leaf:
    def part(index: Index, slices: Slices) -> np.ndarray:
        rows, columns = slices
        first, last = rows.start // how.group, -(-rows.stop // how.group)
        whole = leaf.part(index, (slice(first * how.group, last * how.group), columns))
        values, _ = quantise(whole, how.kind, how.group)
        return values[rows.start - first * how.group : rows.stop - first * how.group]

    return _leaf(leaf, leaf.path, leaf.shape, STORAGES[how.kind].dtype, part)


def _scales(leaf: Leaf, how: Quantised) -> Leaf:
    def part(index: Index, slices: Slices) -> np.ndarray:
        groups, columns = slices
        rows = slice(groups.start * how.group, groups.stop * how.group)
        return scales(leaf.part(index, (rows, columns)), how.kind, how.group)

    *lead, I, O = leaf.shape  # noqa: E741
    return _leaf(leaf, f"{leaf.path}_scale", (*lead, I // how.group, O), STORAGES[how.kind].scale_dtype, part)


def _leaf(leaf: Leaf, path: str, shape: tuple[int, ...], dtype: np.dtype, part: Any) -> Leaf:
    def whole(index: Index) -> np.ndarray:
        return part(index, tuple(slice(0, size) for size in shape[len(leaf.stacked) :]))

    return leaf._replace(
        path=path, shape=shape, dtype=dtype, ours=whole, theirs=whole, part=part, files=(), sha256=None,
        file_shape=shape[len(leaf.stacked) :],
    )  # fmt: skip
