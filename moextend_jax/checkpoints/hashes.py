"""Hashes of weights: of those in files, read once and remembered beside them, and of arrays on devices.

In: leaves of checkpoint folders, or arrays by path. Out: SHA-256, or the refusal of bytes that are not what their
folder says they are.

A record stands in NAME in each folder that much was read from. A leaf's line in it counts while all files that the leaf
lies in have the same size, time of writing and time of change. The last of these (ctime, in a bucket the object's
generation) no program can set or copy, so a record that comes along with a copied or downloaded folder says nothing,
and the bytes are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from moextend_jax import machine
from moextend_jax.checkpoints.leaves import Leaf, bytes_of, check_claim, leaf_hash
from moextend_jax.checkpoints.tensors import opened
from moextend_jax.config import IMAGE, MoextendError
from moextend_jax.folders import is_url, reading
from moextend_jax.outside import inside, parse_json, read_small
from moextend_jax.parameters import lasting_path

NAME, FORMAT = ".moextend-hashes.json", 1
WORTH = 1 << 28
"""Bytes from which on a record is written. Reading fewer again costs less than one more file in a user's folder."""
SETTLED = 2 * 10**9
"""Nanoseconds that must have passed since a file's last change. Earlier it could change again within one tick of the
file system's clock, unnoticed."""
THREADS = 8
SAMPLE = 1 << 16
"""Bytes of a sample."""
_PRETRAINED = re.compile(r"decoder/|media/[^/]+/tower/")


def is_pretrained(path: str) -> bool:
    """Whether a leaf is of the decoder or of a tower."""
    return _PRETRAINED.match(path) is not None


# --- of files ---------------------------------------------------------------------------------------------------------


class BaseHashes(NamedTuple):
    """Content hashes of pretrained leaves, equal exactly if what is stored is.

    base: of decoder and picture tower together, as in older files. parts: "decoder" -> its hash, "media/NAME" -> the
    hash of a medium's tower, which does not depend on NAME.
    """

    base: str
    parts: dict[str, str]


def base_hashes(leaves: Mapping[str, Leaf]) -> BaseHashes:
    """Hashes of the pretrained ones among these leaves.

    Reads all of their bytes, or believes the record beside them. One process of a run should call it.

    Raises:
      MoextendError: a leaf (of any part) is not what its folder says it is.
    """
    counted = {path: leaf for path, leaf in leaves.items() if is_pretrained(path) or leaf.sha256}
    hashes = leaf_hashes(counted)
    return combined({p: (leaf.dtype, leaf.shape, hashes[p]) for p, leaf in counted.items() if is_pretrained(p)})


Hashed = Mapping[str, tuple[np.dtype, tuple[int, ...], str]]
"""By path a leaf's element type, shape and `leaf_hash`."""


def combined(hashes: Hashed) -> BaseHashes:
    """As `base_hashes`, from hashes of leaves; all must be pretrained."""
    parts: dict[str, dict[str, tuple[np.dtype, tuple[int, ...], str]]] = {}
    for path, leaf in hashes.items():
        part, _, inside = path.partition("/tower/") if path.startswith("media/") else path.partition("/")
        parts.setdefault(part, {})[inside] = leaf
    pictures = f"media/{IMAGE}/"
    base = {path: leaf for path, leaf in hashes.items() if path.startswith(("decoder/", pictures))}
    return BaseHashes(combine(base), {part: combine(leaves) for part, leaves in parts.items()})


def stored_hash(leaves: Mapping[str, Leaf]) -> str:
    """SHA-256 over path, stored element type, shape and bytes of every leaf: what is in the files, not in a run."""
    hashes = leaf_hashes(leaves)
    return combine({path: (leaf.dtype, leaf.shape, hashes[path]) for path, leaf in leaves.items()})


def leaf_hashes(leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """`leaf_hash` of each leaf, from the records where they are still valid; then updates the records.

    Raises:
      MoextendError: one is not what its folder says it is.
    """
    if any(leaf.few_bits for leaf in leaves.values()):
        inside = {
            f"{path}{suffix}": part
            for path, leaf in leaves.items()
            for suffix, part in (leaf.few_bits.parts if leaf.few_bits else {"": leaf}).items()
        }
        # The weights before quantising are not in the files: only the claim about them is.
        checked = leaf_hashes(inside)
        return {path: str(leaf.sha256) if leaf.few_bits else checked[path] for path, leaf in leaves.items()}
    started = time.time_ns()
    lines = {path: _line(leaf) for path, leaf in leaves.items()}
    records = {folder: _read_record(folder) for folder in map(_folder, leaves.values())}
    hashes = {}
    for path, leaf in leaves.items():
        if known := _known(records.get(_folder(leaf), {}).get(path), lines[path]):
            hashes[path] = known
    # The largest first: a leaf is one thread's work.
    unknown = sorted(leaves.keys() - hashes.keys(), key=lambda path: -_nbytes(leaves[path]))
    with ThreadPoolExecutor(min(THREADS, machine.cores())) as pool:
        hashes |= zip(unknown, pool.map(lambda path: leaf_hash(leaves[path]), unknown), strict=True)
    for folder, record in records.items():
        fresh = [path for path in unknown if _folder(leaves[path]) == folder and _settled(leaves[path], started)]
        if folder and sum(_nbytes(leaves[path]) for path in fresh) >= WORTH:
            _write_record(folder, record | {path: lines[path] | {"sha256": hashes[path]} for path in fresh})
    for path, leaf in leaves.items():
        check_claim(leaf, hashes[path])
    return hashes


def samples(leaves: Mapping[str, Leaf], files: Iterable[Path] = ()) -> dict[str, list[str]]:
    """By name of the files that leaves lie in, and of others, what tells another content without reading all of it:
    sizes, and hashes of bytes from the middle and the end. Of an object in a bucket, which all hosts see, nothing."""
    held = [part for leaf in leaves.values() for part in (leaf.few_bits.parts.values() if leaf.few_bits else [leaf])]
    paths = {file.path for leaf in held for file in leaf.files} | {*files}
    found: dict[str, list[str]] = {}
    for path in (path for path in paths if not is_url(path)):
        with path.open("rb") as file:
            size, digest = path.stat().st_size, hashlib.sha256()
            for place in (size // 2, size - SAMPLE):
                file.seek(max(0, place))
                digest.update(file.read(SAMPLE))
        found[path.name] = sorted([*found.get(path.name, ()), f"{size} {digest.hexdigest()}"])  # of several folders
    return found


def combine(hashes: Hashed) -> str:
    lasting = {lasting_path(path): of_leaf for path, of_leaf in hashes.items()}
    lines = [f"{path} {dtype} {list(shape)} {sha}\n" for path, (dtype, shape, sha) in sorted(lasting.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _folder(leaf: Leaf) -> Path | None:
    """Where the files lie, of which all are in one folder."""
    return leaf.files[0].path.parent if leaf.files else None


def _nbytes(leaf: Leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _line(leaf: Leaf) -> dict[str, Any]:
    """What a leaf's line in a record says besides its hash."""
    files = {file.path.name: list(file[1:]) for file in leaf.files}
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "files": files}


def _known(line: Any, expected: dict[str, Any]) -> str | None:
    """The hash in a line of a record, where the rest of the line is as it should be."""
    sha256 = line.get("sha256") if isinstance(line, dict) else None
    return sha256 if is_hash(sha256) and line == expected | {"sha256": sha256} else None


def _settled(leaf: Leaf, started: int) -> bool:
    """Whether what was hashed is what was opened, and cannot have changed unseen."""
    return all(opened(file.path) == file and max(file.written, file.changed) + SETTLED < started for file in leaf.files)


def _read_record(folder: Path | None) -> dict[str, Any]:
    """Lines by path; none where there is no record, or one that cannot be read."""
    try:
        value = parse_json(read_small(inside(folder / NAME)), where=NAME) if folder else None
    except MoextendError:
        return {}
    lines = value.get("leaves") if isinstance(value, dict) and value.get("format") == FORMAT else None
    return lines if isinstance(lines, dict) else {}


def _write_record(folder: Path, lines: Mapping[str, Any]) -> None:
    """All of it or nothing; nothing where the folder is not to be written to, which is no fault."""
    text = json.dumps({"format": FORMAT, "leaves": lines}, indent=1)
    if is_url(folder):
        with contextlib.suppress(MoextendError), reading(folder):
            (folder / NAME).write_text(text)  # an object appears whole
        return
    unfinished = folder / f"{NAME}.{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        try:
            unfinished.write_text(text)
            unfinished.replace(folder / NAME)
        finally:
            unfinished.unlink(missing_ok=True)


# --- of arrays --------------------------------------------------------------------------------------------------------


def content_hash(arrays: Mapping[str, jax.Array | np.ndarray]) -> str:
    """SHA-256 over paths, element types, shapes and bytes. For arrays that are sharded alike it is equal exactly if all
    are bit-identical.

    Alike are arrays with one sharding on one mesh, and all unsharded arrays (on one device, replicated, in NumPy).
    Another sharding gives another hash. One shard at a time is on the host, and none stays there.
    All processes must call it, if any array is spread over several.
    """
    digest = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(shard_hashes(array))
    return digest.hexdigest()


def shard_hashes(array: jax.Array | np.ndarray) -> bytes:
    """Where each of an array's shards begins, and its SHA-256, in order of place; each is hashed where it is."""
    if not isinstance(array, jax.Array):
        return _table([(0,) * array.ndim], [_sha256(array)])
    places = sorted({_place(index) for index in array.sharding.devices_indices_map(array.shape).values()})
    hashes = np.zeros((len(places), 32), np.uint8)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            hashes[places.index(_place(shard.index))] = _sha256(_host(shard.data))
    if not array.is_fully_addressable:
        hashes = multihost_utils.process_allgather(hashes).sum(axis=0, dtype=np.uint8)
    return _table(places, list(hashes))


def _host(array: jax.Array) -> np.ndarray:
    """A single device's array, on the host. JAX caches the host copy on the array asked: here a temporary one."""
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array]))


def _sha256(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(bytes_of(np.ascontiguousarray(array))).digest(), np.uint8)


def _place(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(axis.start or 0 for axis in index)


def _table(places: list[tuple[int, ...]], hashes: list[np.ndarray]) -> bytes:
    return b"".join(f"{place} ".encode() + row.tobytes() for place, row in zip(places, hashes, strict=True))
