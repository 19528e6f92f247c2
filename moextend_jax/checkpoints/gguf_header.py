"""What stands before the tensors of a GGUF file: bytes in, keys with their values and the tensors' places out.

The gguf package's own reader believes the file: it makes Python objects of each element of an array (a hundred bytes
for one), recurses into arrays of arrays, and multiplies and adds sizes in 64 bits that run over. Here every length is
held against the bytes that are left before anything is made of it. The package still says what the types are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType as Type

from moextend_jax.config import MoextendError
from moextend_jax.outside import plain_file, said_by, short

VERSIONS = (2, 3)
MAX_BYTES = 128 << 20
"""Most bytes that are read here; a vocabulary of a million words takes a third. As Python objects they take several
times that."""
MAX_AXES = 4

_SCALARS = {
    Type.UINT8: "<u1", Type.INT8: "<i1", Type.UINT16: "<u2", Type.INT16: "<i2", Type.UINT32: "<u4", Type.INT32: "<i4",
    Type.UINT64: "<u8", Type.INT64: "<i8", Type.FLOAT32: "<f4", Type.FLOAT64: "<f8", Type.BOOL: "<u1",
}  # fmt: skip


class Placed(NamedTuple):
    """One tensor. shape: outermost axis first, as in NumPy (files say it the other way round). offset: in the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Placed]]:
    """Numbers, booleans, strings, and lists of them, by key; and the tensors, whose bytes are all there.

    Raises:
      MoextendError: no GGUF file, of another version or byte order, cut short, or one that contradicts itself.
    """
    size = plain_file(path)
    try:
        with path.open("rb") as file:
            return _Bytes(file, size).header()
    except (ValueError, OSError) as error:  # ValueError: also of text that is not UTF-8
        raise MoextendError(f"{path} cannot be read as GGUF: {said_by(error)}") from None


class _Bytes:
    """A place in the bytes of a file, which every read moves on. What is not there is a ValueError."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.at = file, size, 0

    def header(self) -> tuple[dict[str, Any], dict[str, Placed]]:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number(4)
        if version & 0xFFFF == 0:
            raise ValueError("it has the byte order of other machines; convert it with gguf-convert-endian")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}; only {' and '.join(map(str, VERSIONS))} are known")
        tensors, keys = self.number(8), self.number(8)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self.string()
            if name in metadata:
                raise ValueError(f"key {short(name)} stands twice")
            metadata[name] = self.value(self.number(4), name)
        described: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.string()
            if name in described:
                raise ValueError(f"tensor {short(name)} stands twice")
            described[name] = self.tensor(name)
        return metadata, self.places(described, metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))

    def check(self, count: int) -> None:
        """Whether so many bytes can follow."""
        if count > self.size - self.at:
            raise ValueError(f"it is cut short: {self.size:,} bytes are not all")
        if count > MAX_BYTES - self.at:
            raise ValueError(f"what stands before its tensors takes more than {MAX_BYTES:,} bytes")

    def take(self, count: int) -> bytes:
        self.check(count)
        self.at += count
        return self.file.read(count)

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def string(self) -> str:
        return self.take(self.number(8)).decode()

    def value(self, code: int, name: str) -> Any:
        if code == Type.STRING:
            return self.string()
        if code == Type.ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner == Type.STRING:
                self.check(8 * count)  # their lengths alone
                return [self.string() for _ in range(count)]
            return self.scalars(inner, count, name)
        return self.scalars(code, 1, name)[0]

    def scalars(self, code: int, count: int, name: str) -> list[Any]:
        if code not in _SCALARS:
            raise ValueError(f"key {short(name)} is of type {code}, which cannot be read")
        dtype = np.dtype(_SCALARS[Type(code)])
        array = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return (array != 0 if code == Type.BOOL else array).tolist()

    def tensor(self, name: str) -> tuple[Kind, tuple[int, ...], int]:
        axes = self.number(4)
        if axes > MAX_AXES:
            raise ValueError(f"tensor {short(name)} has {axes} axes")
        shape = tuple(self.number(8) for _ in range(axes))[::-1]
        code, offset = self.number(4), self.number(8)
        if code not in {kind.value for kind in GGML_QUANT_SIZES}:
            raise ValueError(f"tensor {short(name)} is of the unknown type {code}")
        return Kind(code), shape, offset

    def places(self, described: dict[str, tuple[Kind, tuple[int, ...], int]], alignment: Any) -> dict[str, Placed]:
        """Tensors stand one after the other from the first aligned byte on, each at the next aligned one."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise ValueError(f"general.alignment is {alignment!r}: no power of two")
        start, expected, placed = _up(self.at, alignment), 0, {}
        for name, (kind, shape, offset) in described.items():
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not shape or not all(shape) or shape[-1] % block:
                raise ValueError(f"tensor {short(name)} of type {kind.name} cannot have shape {list(shape)}")
            if offset != expected:
                raise ValueError(f"tensor {short(name)} stands at {offset:,} where {expected:,} is the next free place")
            nbytes = math.prod(shape) // block * block_bytes
            if start + offset + nbytes > self.size:
                raise ValueError(
                    f"it is cut short: tensor {short(name)} ends at byte {start + offset + nbytes:,} of {self.size:,}"
                )
            placed[name] = Placed(name, kind, shape, start + offset, nbytes)
            expected = _up(offset + nbytes, alignment)
        return placed


def _up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
