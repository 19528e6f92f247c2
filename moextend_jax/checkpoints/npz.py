"""npz files: written whole; read from elsewhere, plain arrays by name, none larger than the file can account for.

An npz file is a zip file, of which a thousandth can be enough to fill the memory, and each array in it begins with a
header that may ask for any size. Both are added up before anything is unpacked.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.folders import local, written_whole
from moextend_jax.outside import npy_header, plain_file, said_by, short

FREE, TIMES = 64 << 20, 100
"""A file may unpack to FREE bytes plus TIMES its own size."""

_ENDING = ".npy"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed file, whole or not at all; a name without .npz stays as it is."""
    local(path, what="an npz file").parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **cast(Any, arrays))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file: numbers, booleans and text. Pickles are never unpacked.

    Raises:
      MoextendError: no such file, or anything else in it; names the file and the array.
    """
    size = plain_file(local(path, what="an npz file"))
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":  # a zip file may stand behind something else, which is then another file too
                raise ValueError("it does not begin as a zip file does")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (total := sum(member.file_size for member in members)) > FREE + TIMES * size:
                raise ValueError(f"its {size:,} bytes would unpack to {total:,}")
            if len({member.filename for member in members}) != len(members):
                raise ValueError("two arrays have the same name")
            arrays = [_read(archive, member) for member in members]
    except Exception as error:  # zipfile, zlib, struct, NumPy's headers (ast, tokenize), and what _read says
        raise MoextendError(f"{path} is not a readable npz file of plain arrays: {said_by(error)}") from None
    return {member.filename.removesuffix(_ENDING): array for member, array in zip(members, arrays, strict=True)}


def whole_numbers(array: np.ndarray, *, what: str) -> np.ndarray:
    """The array as int32; an error if that would change its numbers. `what` names it in the message."""
    if array.dtype.kind in "biu" and (not array.size or -(1 << 31) <= array.min() <= array.max() < 1 << 31):
        return array.astype(np.int32)
    raise MoextendError(f"{what} ({array.dtype}{list(array.shape)}) must be whole numbers of 32 bits")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name = short(member.filename)
    if not name.endswith(_ENDING) or member.compress_type not in _METHODS:
        raise ValueError(f"{name} is no array as NumPy writes it")
    with archive.open(member) as file:
        shape, dtype = npy_header(file)
        if dtype.kind not in "biufU":
            raise ValueError(f"{name} has element type {dtype}: neither numbers nor text")
        # Text of no letters takes no bytes, however many there are.
        nbytes, stored_bytes = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if nbytes != stored_bytes or min(shape, default=0) < 0 or math.prod(shape) > max(1, stored_bytes):
            raise ValueError(f"{name} {dtype}{list(shape)} does not fit its {stored_bytes:,} bytes")
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if dtype.kind == "U":
        letters = np.ascontiguousarray(array).reshape(-1).view(dtype.byteorder.replace("|", "=") + "u4")
        if ((letters > 0x10FFFF) | ((letters >= 0xD800) & (letters < 0xE000))).any():
            raise ValueError(f"{name} is no text")
    return array
