"""A base's experts in few bits as they are read: leaves over files in, leaves of integers and scales out.

Nothing of the files changes, nor their hashes: a piece is quantised when it is asked for, whole groups at a time, so
that every shard has the bits that the whole matrix would have. `moextend import --storage` writes them once instead:
`planned` and `opened` are the two directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moextend_jax.checkpoints.leaves import FewBits, Index, Leaf, Slices
from moextend_jax.checkpoints.tensors import Planned, Stored
from moextend_jax.config import DecoderConfig, MoextendError, Quantised
from moextend_jax.models.quantised import STORAGES, quantise, scales

EXPERTS = "decoder/layers/moe/experts/"
MATRICES = tuple(EXPERTS + name for name in ("w_gate", "w_up", "w_down"))
SCALE = "_scale"
"""How names of scales end."""


def check(decoder: DecoderConfig, how: Quantised | None, mesh: Any) -> None:
    """Raises MoextendError where groups of weights do not divide what a device has of an expert."""
    if how is None:
        return
    for what, size, parts in (("width", decoder.width, 1), ("hidden width", decoder.hidden, mesh.shape["tensor"])):
        if size % (how.group * parts):
            raise MoextendError(
                f"expert_group = {how.group}: it does not divide the experts' {what} of {size}"
                + (f" on a tensor axis of {parts}" if parts > 1 else "")
                + " (`moextend import` calls it --group)"
            )


def stored(leaves: Mapping[str, Leaf], how: Quantised | None) -> dict[str, Leaf]:
    """The leaves, with a leaf of integers and one of scales for each matrix of the pretrained experts.

    Raises:
      MoextendError: files hold them in other bits.
    """
    for leaf in leaves.values():
        if leaf.few_bits and leaf.few_bits.how != how:
            raise _unreadable(leaf.where, leaf.few_bits.how)
    quantised = {} if how is None else {path: leaf for path, leaf in leaves.items() if path in MATRICES}
    result = {path: leaf for path, leaf in leaves.items() if path not in quantised}
    for path, leaf in quantised.items():
        assert how is not None
        few_bits = leaf.few_bits or FewBits(how, _values(leaf, how), _scales(leaf, how), {})
        result |= {path: few_bits.values, f"{path}{SCALE}": few_bits.scales}
    return result


def storage_of(leaves: Mapping[str, Leaf]) -> Quantised | None:
    """How files hold the experts, where they are in few bits there."""
    return next((leaf.few_bits.how for leaf in leaves.values() if leaf.few_bits), None)


def _values(leaf: Leaf, how: Quantised) -> Leaf:
    def part(index: Index, slices: Slices) -> np.ndarray:
        rows, columns = slices
        first, last = rows.start // how.group, -(-rows.stop // how.group)
        whole = leaf.part(index, (slice(first * how.group, last * how.group), columns))
        values, _ = quantise(whole, how.kind, how.group, where=_named(leaf, index))
        return values[rows.start - first * how.group : rows.stop - first * how.group]

    return _leaf(leaf, leaf.path, leaf.shape, STORAGES[how.kind].dtype, part)


def _scales(leaf: Leaf, how: Quantised) -> Leaf:
    def part(index: Index, slices: Slices) -> np.ndarray:
        groups, columns = slices
        rows = slice(groups.start * how.group, groups.stop * how.group)
        return scales(leaf.part(index, (rows, columns)), how.kind, how.group, where=_named(leaf, index))

    *lead, I, O = leaf.shape  # noqa: E741
    return _leaf(leaf, f"{leaf.path}{SCALE}", (*lead, I // how.group, O), STORAGES[how.kind].scale_dtype, part)


# --- written once -----------------------------------------------------------------------------------------------------


def planned(leaf: Leaf, how: Quantised, *, digests: Mapping[str, Any]) -> dict[str, Planned]:
    """The tensors that files get instead of a matrix, by how their names end; `digests` take their bytes. A byte holds
    two 4-bit integers of neighbouring rows, that of the even row in the low half."""
    values, scales_ = _values(leaf, how), _scales(leaf, how)
    halves = 1 if values.dtype == np.int8 else 2
    *lead, I, O = leaf.shape  # noqa: E741

    def pieces(suffix: str) -> Iterator[np.ndarray]:
        for index in leaf.indices():
            piece = values.ours(index).astype(np.int8) if not suffix else scales_.ours(index)
            if not suffix and halves == 2:
                piece = (piece[0::2] & 15) | (piece[1::2] << 4)
            piece = np.ascontiguousarray(piece.view(np.uint8) if not suffix else piece)
            digests[suffix].update(piece.view(np.uint8).data)
            yield piece

    return {
        "": Planned((*lead, I // halves, O), np.dtype(np.uint8), lambda: pieces("")),
        SCALE: Planned(scales_.shape, scales_.dtype, lambda: pieces(SCALE)),
    }


def opened(leaf: Leaf, how: Quantised, stored: Mapping[str, Stored], claims: Mapping[str, str]) -> Leaf:
    """The leaf over what `planned` wrote.

    Args:
      leaf: path, shape, element type and claim of the weights before.
      stored, claims: tensors and their SHA-256 by how their names end.

    Raises:
      MoextendError: a tensor has another shape or element type than these.
    """
    storage, halves = STORAGES[how.kind], 1 if STORAGES[how.kind].dtype == np.int8 else 2
    *lead, I, O = leaf.shape  # noqa: E741
    shapes = {"": (*lead, I // halves, O), SCALE: (*lead, I // how.group, O)}
    dtypes = {"": np.dtype(np.uint8), SCALE: storage.scale_dtype}
    for suffix, tensor in stored.items():
        if (tensor.shape, tensor.dtype) != (shapes[suffix], dtypes[suffix]):
            raise MoextendError(
                f"{tensor.where}: {leaf.path}{suffix} is {tensor.dtype}{list(tensor.shape)}, expected "
                f"{dtypes[suffix]}{list(shapes[suffix])}"
            )

    def of_file(suffix: str) -> Leaf:
        def part(index: Index, slices: Slices) -> np.ndarray:
            return stored[suffix].part(index, slices[0]).read()[(slice(None), *slices[1:])]

        file = stored[suffix].file
        made = _leaf(leaf, leaf.path + suffix, shapes[suffix], dtypes[suffix], part)
        return made._replace(files=(file,) if file else (), sha256=claims[suffix], where=stored[suffix].where)

    parts = {suffix: of_file(suffix) for suffix in stored}

    def values(index: Index, slices: Slices) -> np.ndarray:
        rows, columns = slices
        first, last = rows.start // halves, -(-rows.stop // halves)
        packed = parts[""].part(index, (slice(first, last), columns)).view(np.int8)
        if halves == 2:  # arithmetic shifts keep the sign
            packed = np.stack([packed << 4 >> 4, packed >> 4], axis=1).reshape(-1, packed.shape[-1])
        return packed[rows.start - first * halves : rows.stop - first * halves].astype(storage.dtype)

    def unreadable(*_: Any) -> Any:
        raise _unreadable(leaf.where, how)

    integers = _leaf(leaf, leaf.path, leaf.shape, storage.dtype, values)
    few_bits = FewBits(how, integers, parts[SCALE], parts)
    return leaf._replace(ours=unreadable, theirs=unreadable, part=unreadable, few_bits=few_bits)


def check_readable(leaves: Mapping[str, Leaf]) -> None:
    """Refuses, before anything is written, to write leaves whose values `opened` does not have."""
    for leaf in leaves.values():
        if leaf.few_bits is not None:
            raise MoextendError(
                f"{leaf.where}: the experts are in {leaf.few_bits.how}, as they were imported, and cannot be exported "
                "or imported again: use the folder that they came from; a run over them goes out with --layout delta"
            )


def _unreadable(where: str, how: Quantised) -> MoextendError:
    return MoextendError(
        f"{where}: the experts are in {how.kind} in groups of {how.group}, as they were imported: set "
        f"expert_storage={how.kind} and expert_group={how.group}; what they were before is in the files they came from"
    )


def _named(leaf: Leaf, index: Index) -> str:
    return f"{leaf.where}: {leaf.path}{list(index)}"


def _leaf(leaf: Leaf, path: str, shape: tuple[int, ...], dtype: np.dtype, part: Any) -> Leaf:
    def whole(index: Index) -> np.ndarray:
        return part(index, tuple(slice(0, size) for size in shape[len(leaf.stacked) :]))

    return leaf._replace(
        path=path, shape=shape, dtype=dtype, ours=whole, theirs=whole, part=part, files=(), sha256=None,
        file_shape=shape[len(leaf.stacked) :],
    )  # fmt: skip
