"""Our stacked arrays over the tensors of files: matched and checked first, read slice by slice after.

In: `Stored` tensors by file name and a layout of `names.TABLES`. Out: `Leaf` by our path, from which a device's shard,
a piece in either layout, or a hash is read without ever holding the stacked array.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import einops
import jax
import ml_dtypes
import numpy as np

from moextend_jax.checkpoints import names
from moextend_jax.checkpoints.mxfp4 import unpacked
from moextend_jax.checkpoints.tensors import File, Planned, Stored, difference, name_list
from moextend_jax.config import ModelConfig, MoextendError, Quantised
from moextend_jax.families import FAMILIES
from moextend_jax.families.family import parted
from moextend_jax.folders import is_url
from moextend_jax.outside import short
from moextend_jax.parameters import element_type

FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
"""Element types that a model may be stored in; anything else is quantised or not a weight."""

STRIP = 1 << 22
"""Bytes that are copied at a time on the way from file to file."""

CAST = "; --dtype bfloat16 (or another) of `moextend import` stores all of it in one"
"""What to do about several element types, for a message."""

MORE_TENSORS = 2000
"""Where a parameter asks for so many more tensors than there are, the message counts them instead of naming each."""

Index = tuple[int, ...]


class Leaf(NamedTuple):
    """One of our arrays. `stacked` are the sizes of its leading, stacked axes; a piece is what an index of them picks.

    `ours` and `theirs` give a piece in our layout and in the file's, as views where possible.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: tuple[int, ...]
    file_shape: tuple[int, ...]
    """Shape of a piece in the file's layout."""
    ours: Callable[[Index], np.ndarray]
    theirs: Callable[[Index], np.ndarray]
    part: Callable[[Index, tuple[slice, ...]], np.ndarray]
    """Part of a piece in our layout, by a slice of each axis; only the rows of the file that it needs are read."""
    where: str
    files: tuple[File, ...] = ()
    """Every file that its bytes lie in as they are; none where they are computed, or not in files."""
    sha256: str | None = None
    """SHA-256 that an imported folder claims for its bytes; checked whenever all of them are read."""
    few_bits: FewBits | None = None
    """The quantised tensors that files hold instead, with claims of their own; the leaf itself cannot be read."""

    def indices(self) -> Iterator[Index]:
        return itertools.product(*map(range, self.stacked))


class FewBits(NamedTuple):
    """A leaf's matrices in few bits: integers and scales as they are computed with, and `parts`, the tensors of the
    files by the ends of their names."""

    how: Quantised
    values: Leaf
    scales: Leaf
    parts: Mapping[str, Leaf]


# --- matching ---------------------------------------------------------------------------------------------------------


def match(
    stored: Mapping[str, Stored],
    *,
    table: str,
    config: ModelConfig,
    where: Path | str,
    elsewhere: Collection[str] = (),
    hint: str = "",
    dtype: Any = None,
) -> dict[str, Leaf]:
    """Leaves of a model of this configuration in files of layout `table`, with their file names' prefix if any.

    Args:
      elsewhere: paths of whole leaves that other files supply (the base of a partial save): they may be absent here.
      hint: what to do about missing tensors, for the message.
      dtype: element type that the pieces of a leaf are cast to where they have several; None: that is an error.

    Raises:
      MoextendError: tensors are missing or not asked for, or one has another shape or element type; names them.
    """
    prefix = names.PREFIXES.get(table, "")
    ignored = names.beside(table, config)
    tensors = {
        name: tensor
        for name, tensor in stored.items()
        if not names.IGNORED.fullmatch(name) and not (ignored and ignored.fullmatch(name))
    }
    if prefix and all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if table in (config.decoder.family, *names.TEXT):
        tensors = _parted(tensors, config)
    for row in names.rows(table, config):
        asked = names.count(row, config)
        if asked > MORE_TENSORS + len(tensors) and row.path not in elsewhere:
            raise MoextendError(
                f"{where}: the tensors are not those of this model: its sizes ask for {asked:,} like {row.file}, and "
                f"there are {len(tensors):,} tensors in all"
            )
    wanted = list(names.tensors(table, config))
    begun = {tensor.path for tensor in wanted if tensor.file in tensors}
    wanted = [tensor for tensor in wanted if tensor.path in begun or tensor.path not in elsewhere]
    if unequal := difference((tensor.file for tensor in wanted), tensors):
        # A partial save has less than a whole one, and nothing else.
        what_to_do = hint if tensors.keys() <= {tensor.file for tensor in wanted} else ""
        raise MoextendError(f"{where}: the tensors are not those of this model.{unequal}{what_to_do}")
    by_path: dict[str, dict[Index, names.Tensor]] = collections.defaultdict(dict)
    for tensor in wanted:
        by_path[tensor.path][tensor.index] = tensor
    return {
        path: leaf_of(path, pieces, tensors, letters=names.letters(path, config), dtype=dtype)
        for path, pieces in by_path.items()
    }


def _parted(stored: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Fused tensors of the decoder's family as the parts that `names` knows: each one run of the file's bytes, or,
    where they are interleaved, every second element of an expert's."""
    tensors, E = dict(stored), config.decoder.experts
    for fused in FAMILIES[config.decoder.family].fused:
        pattern = re.escape(fused.file).replace(r"\{Z\}", r"(0|[1-9]\d{0,8})")
        if fused.packed:
            tensors = unpacked(tensors, pattern)
        for file in [file for file in tensors if re.fullmatch(pattern, file)]:
            whole, number = tensors.pop(file), cast(re.Match[str], re.fullmatch(pattern, file))[1]
            axis, parts = -1 if fused.interleaved else 1, len(fused.parts)
            if len(whole.shape) < 2 or whole.shape[0] != E or whole.shape[axis] % parts:
                raise MoextendError(
                    f"{whole.where}: {file} has shape {list(whole.shape)}, expected {E} experts of "
                    f"{' and '.join(fused.parts)}"
                )
            for expert, (place, part) in itertools.product(range(E), enumerate(fused.parts)):
                name = parted(fused.file, part).format(Z=number, E=expert)
                if parts > 1 and fused.interleaved:
                    tensors[name] = _every(whole.part((expert,)), place, parts)
                else:
                    rows = whole.shape[1] // parts
                    tensors[name] = whole.part((expert,), slice(place * rows, (place + 1) * rows))
    return tensors


def _every(whole: Stored, place: int, parts: int) -> Stored:
    """The elements of one part, which are interleaved with those of the others on the last axis."""
    shape = (*whole.shape[:-1], whole.shape[-1] // parts)
    return Stored(shape, whole.dtype, lambda: whole.read()[..., place::parts], whole.where)


def _fused(planned: dict[str, Planned], config: ModelConfig, *, prefix: str) -> dict[str, Planned]:
    """The inverse of `_parted`: parts are written one after another into the tensor that holds them, or in turn.

    prefix: what stands before the decoder's names."""
    tensors = dict(planned)
    for fused, layer in itertools.product(FAMILIES[config.decoder.family].fused, config.decoder.routed):
        of_experts = [
            [tensors.pop(prefix + parted(fused.file, part).format(Z=layer, E=expert)) for part in fused.parts]
            for expert in range(config.decoder.experts)
        ]
        first, number = of_experts[0][0], len(fused.parts)

        def pieces(of_experts: list[list[Planned]] = of_experts, in_turn: bool = fused.interleaved) -> Iterator[Any]:
            for parts in of_experts:
                if in_turn and len(parts) > 1:
                    yield np.stack([_in_one(part) for part in parts], axis=-1).reshape(*parts[0].shape[:-1], -1)
                else:
                    for part in parts:
                        yield from part.pieces()

        shape = list(first.shape)
        shape[-1 if fused.interleaved else 0] *= number
        tensors[prefix + fused.file.format(Z=layer)] = Planned((len(of_experts), *shape), first.dtype, pieces)
    return tensors


def _in_one(planned: Planned) -> np.ndarray:
    return np.concatenate([piece.reshape(-1) for piece in planned.pieces()]).reshape(planned.shape)


def leaf_of(
    path: str,
    pieces: Mapping[Index, names.Tensor],
    stored: Mapping[str, Stored],
    *,
    letters: Mapping[str, int],
    dtype: Any = None,
) -> Leaf:
    """A leaf over the tensors that are its pieces; `letters` are the sizes of its layout's letters, `dtype` as for
    `match`, whose errors of shape and element type this raises."""
    layout = next(iter(pieces.values())).layout
    file_side, our_side = layout.split(" -> ")
    expected = names.shape(file_side, letters)
    for tensor in pieces.values():
        at = stored[tensor.file]
        if at.shape != expected:
            raise MoextendError(
                f"{at.where}: {tensor.file} has shape {list(at.shape)}, expected {list(expected)} ({file_side})"
            )
        if at.dtype not in FLOATS:
            raise MoextendError(
                f"{at.where}: {tensor.file} has element type {at.dtype}, expected one of {name_list(map(str, FLOATS))}"
            )
    kinds = collections.Counter(stored[tensor.file].dtype for tensor in pieces.values()).most_common()
    usual = kinds[0][0]
    if len(kinds) > 1 and dtype is None:
        odd = [tensor.file for tensor in pieces.values() if stored[tensor.file].dtype != usual]
        at = stored[odd[0]]
        raise MoextendError(
            f"{at.where}: {name_list(odd)} has element type {at.dtype}, where its siblings have {usual}{CAST}"
        )
    kind = np.dtype(dtype) if len(kinds) > 1 else usual
    sizes = names.axis_sizes(layout, letters)
    stacked = tuple(max(axis) + 1 for axis in zip(*pieces, strict=True))

    def theirs(index: Index, rows: slice = slice(None)) -> np.ndarray:
        array = stored[pieces[index].file].part((), rows).read()
        return array if array.dtype == kind else contiguous(array, kind)

    def part(index: Index, slices: tuple[slice, ...]) -> np.ndarray:
        rows, rest, open_sizes = _rows_of(layout, slices, sizes)
        return einops.rearrange(theirs(index, rows), layout, **open_sizes)[rest]

    files = {stored[tensor.file].file for tensor in pieces.values()}
    return Leaf(
        path=path,
        shape=(*stacked, *names.shape(our_side, letters)),
        dtype=kind,
        stacked=stacked,
        file_shape=expected,
        ours=lambda index: einops.rearrange(theirs(index), layout, **sizes),
        theirs=theirs,
        part=part,
        where=stored[next(iter(pieces.values())).file].where,
        files=() if None in files else tuple(sorted(file for file in files if file)),
    )


def _rows_of(
    layout: str, slices: tuple[slice, ...], sizes: Mapping[str, int]
) -> tuple[slice, tuple[slice, ...], dict[str, int]]:
    """For a part of a piece: the rows that it needs of the file's tensor, what to take of the piece that these rows
    make, and the sizes that einops still needs.

    Example: of "(N H) D -> D N H", heads 2 and 3 of 8 channels are rows 16 to 31; of the result all heads are taken.
    """
    file_side, our_side = layout.split(" -> ")
    first = names.groups(file_side)[0]
    ours = names.groups(our_side)
    if (outer := [first[0]]) not in ours:  # it is not an axis of ours by itself, so all rows may be needed
        return slice(None), slices, dict(sizes)
    axis, inner = ours.index(outer), math.prod(sizes[letter] for letter in first[1:])
    rows = slice(slices[axis].start * inner, slices[axis].stop * inner)
    rest = (*slices[:axis], slice(None), *slices[axis + 1 :])
    return rows, rest, {letter: size for letter, size in sizes.items() if letter != first[0]}


def from_ours(path: str, stored: Stored, *, config: ModelConfig, sha256: str | None = None) -> Leaf:
    """A leaf over an array that is already stacked in our layout.

    Raises:
      MoextendError: it has another shape than a model of this configuration, or is not of a floating type.
    """
    row = names.row_of(path, config)
    if row is None:
        raise MoextendError(f"{stored.where}: {short(path)} is no parameter of this model")
    file_side, our_side = row.layout.split(" -> ")
    letters = names.letters(path, config)
    stacked = names.stack(row, config)
    expected = (*stacked, *names.shape(our_side, letters))
    if stored.shape != expected or stored.dtype not in FLOATS:
        raise MoextendError(
            f"{stored.where}: {path} is {stored.dtype}{list(stored.shape)}, expected {list(expected)}, floating point"
        )
    layout = names.inverse(row.layout)
    sizes = names.axis_sizes(layout, letters)
    return Leaf(
        path=path,
        shape=expected,
        dtype=stored.dtype,
        stacked=stacked,
        file_shape=names.shape(file_side, letters),
        ours=lambda index: stored.part(index).read(),
        theirs=lambda index: einops.rearrange(stored.part(index).read(), layout, **sizes),
        part=lambda index, slices: stored.part(index, slices[0]).read()[(slice(None), *slices[1:])],
        where=stored.where,
        files=(stored.file,) if stored.file else (),
        sha256=sha256,
    )


# --- reading ----------------------------------------------------------------------------------------------------------


Slices = tuple[slice, ...]


def read_slice(leaf: Leaf, index: Slices, *, dtype: Any = None) -> np.ndarray:
    """Part of a leaf, in its own or another element type; of the pieces it touches only the rows it needs are read."""
    return _read_slices(leaf, [index], dtype=dtype)[0]


READERS = min(4, os.cpu_count() or 1)
"""Threads that read, transpose and quantise; each has one piece, of Mixtral half a gigabyte while it is quantised."""


def _read_slices(leaf: Leaf, indices: list[Slices], *, dtype: Any) -> list[np.ndarray]:
    """Several parts, for which each piece is read once."""
    depth = len(leaf.stacked)
    parts = [[slice(*axis.indices(size)) for axis, size in zip(i, leaf.shape, strict=True)] for i in indices]
    out = [np.empty([axis.stop - axis.start for axis in part], dtype or leaf.dtype) for part in parts]
    box = [slice(min(a.start for a in axis), max(a.stop for a in axis)) for axis in zip(*parts, strict=True)]

    def fill(place: tuple[int, ...]) -> None:
        piece = leaf.part(place, tuple(box[depth:]))
        for part, array in zip(parts, out, strict=True):
            at = tuple(number - axis.start for number, axis in zip(place, part, strict=False))
            if all(0 <= number < size for number, size in zip(at, array.shape, strict=False)):
                inner = tuple(
                    slice(axis.start - outer.start, axis.stop - outer.start)
                    for axis, outer in zip(part[depth:], box[depth:], strict=True)
                )
                _copy(piece[inner], array[at] if at else array)

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(fill, itertools.product(*(range(axis.start, axis.stop) for axis in box[:depth]))):
            pass  # raises what a thread has raised
    return out


def read_sharded(
    leaves: Mapping[str, Leaf], shardings: Mapping[str, jax.sharding.Sharding], *, dtype: str | None = None
) -> dict[str, jax.Array]:
    """Arrays on devices, leaf by leaf; each process reads only the byte ranges of its own shards.

    A range is whole rows of a tensor as it stands in the file. Of Hugging Face's files that is more than a shard where
    `fsdp` splits the columns; of what `moextend import` wrote it is the shard.

    Args:
      dtype: element type to cast to, shard by shard; None keeps the file's.
    """

    # `jax.make_array_from_callback` would hold all of a process's shards of a leaf in host memory; here it is one.
    def read(leaf: Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        devices: dict[str, list[Any]] = collections.defaultdict(list)
        slices: dict[str, Slices] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            place = index if index is not None else (slice(None),) * len(leaf.shape)
            devices[str(place)].append(device)
            slices[str(place)] = place
        shards: list[jax.Array] = []
        kind = element_type(leaf.path, dtype, stored=leaf.dtype)
        for keys in _together(leaf, slices):
            for key, shard in zip(keys, _read_slices(leaf, [slices[key] for key in keys], dtype=kind), strict=True):
                shards += jax.block_until_ready([jax.device_put(shard, device) for device in devices[key]])
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return {path: read(leaf, shardings[path]) for path, leaf in leaves.items()}


def _together(leaf: Leaf, slices: Mapping[str, Slices]) -> list[list[str]]:
    """Groups of shards that are read at once: from a bucket all, if they make a block, so that no byte is read twice;
    from files one at a time."""
    in_bucket = any(is_url(file.path) for file in leaf.files)
    parts = [[range(*a.indices(size)) for a, size in zip(i, leaf.shape, strict=True)] for i in slices.values()]
    box = math.prod(max(a.stop for a in axis) - min(a.start for a in axis) for axis in zip(*parts, strict=True))
    if in_bucket and box == sum(math.prod(map(len, part)) for part in parts):
        return [list(slices)]
    return [[key] for key in slices]


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copies any view into an array, casting where the types differ.

    A big transposition is done in strips that stay in the processor's cache (four times as fast), and as integers,
    because NumPy copies types that it does not know element by element.
    """
    if source.dtype == out.dtype:
        source, out = _as_integers(source), _as_integers(out)
    if source.strides[-1] == source.itemsize or source.nbytes < 1 << 20:
        out[...] = source
        return
    for start in range(0, source.shape[-1], 64):
        out[..., start : start + 64] = source[..., start : start + 64]


def _as_integers(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


# --- writing and hashing ----------------------------------------------------------------------------------------------


def plan_ours(leaf: Leaf, *, dtype: Any = None, digest: Any = None) -> Planned:
    """The leaf as one tensor in our layout, written piece by piece; `digest` takes the bytes that `leaf_hash` takes,
    cast. What a folder claims of them is checked on the way."""
    kind = np.dtype(element_type(leaf.path, dtype, stored=leaf.dtype) or leaf.dtype)

    def pieces() -> Iterator[np.ndarray]:
        check = checking(leaf)
        for index in leaf.indices():
            yield from _strips(leaf.ours(index), kind)
            for strip in _strips(leaf.theirs(index), leaf.dtype) if digest is not None or leaf.sha256 else ():
                check(strip)
                if digest is not None:
                    digest.update(bytes_of(contiguous(strip, kind)))

    return Planned(leaf.shape, kind, pieces)


def plan_theirs(leaves: Mapping[str, Leaf], *, table: str, config: ModelConfig, prefix: str = "") -> dict[str, Planned]:
    """The tensors of a file of layout `table`, each one piece; leaves that the layout does not have are left out.

    They are named, and so written, in the order in which `leaf_hash` takes a leaf's pieces: claims are checked.
    """
    checks = {path: checking(leaf) for path, leaf in leaves.items()}

    def tensor_of(leaf: Leaf, index: Index) -> Planned:
        def pieces() -> Iterator[np.ndarray]:
            for strip in _strips(leaf.theirs(index), leaf.dtype):
                checks[leaf.path](strip)
                yield strip

        return Planned(leaf.file_shape, leaf.dtype, pieces)

    planned = {
        prefix + tensor.file: tensor_of(leaves[tensor.path], tensor.index) for tensor in names.tensors(table, config)
    }
    if table in (config.decoder.family, *names.TEXT):
        planned = _fused(planned, config, prefix=prefix + names.TEXT.get(table, ""))
    return planned


def _strips(piece: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A piece as contiguous runs of rows, so that no copy is larger than a few megabytes."""
    rows = max(1, STRIP // (dtype.itemsize * max(1, math.prod(piece.shape[1:]))))
    for start in range(0, len(piece), rows):
        yield contiguous(piece[start : start + rows], dtype)


def contiguous(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array itself where it is C-contiguous and of this type, else a copy."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, dtype)
    _copy(array, out)
    return out


def bytes_of(array: np.ndarray) -> memoryview:
    """Of a C-contiguous array, for a hash."""
    return array.reshape(-1).view(np.uint8).data


def leaf_hash(leaf: Leaf) -> str:
    """SHA-256 over a leaf's pieces in the files' layout, so that a file's hash needs no transposition."""
    digest = hashlib.sha256()
    for index in leaf.indices():
        for strip in _strips(leaf.theirs(index), leaf.dtype):
            digest.update(bytes_of(strip))
    return digest.hexdigest()


def checking(leaf: Leaf) -> Callable[[np.ndarray], None]:
    """A function that takes a leaf's bytes strip by strip, in the order of `leaf_hash`, and then checks its claim."""
    digest, left = hashlib.sha256(), math.prod(leaf.shape) * leaf.dtype.itemsize

    def hear(strip: np.ndarray) -> None:
        nonlocal left
        digest.update(bytes_of(strip))
        left -= strip.nbytes
        if not left:
            check_claim(leaf, digest.hexdigest())

    return hear if leaf.sha256 else lambda strip: None


def check_claim(leaf: Leaf, sha256: str) -> None:
    """Raises MoextendError where a leaf's bytes are others than its folder says."""
    if leaf.sha256 not in (None, sha256):
        raise MoextendError(
            f"{leaf.where}: {leaf.path} is not what was imported: its bytes have SHA-256 {sha256[:12]}..., "
            f"moextend.json says {leaf.sha256[:12]}...; the file is damaged or was exchanged, so import it again"
        )
