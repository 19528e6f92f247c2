"""CTranslate2's `model.bin`, version 6: a path in, its variables by name out, none read yet.

The file is not believed: every length is held against the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from moextend_jax.checkpoints.tensors import Stored, in_runs, opened, run_at
from moextend_jax.config import MoextendError
from moextend_jax.outside import Bytes, plain_file, said_by, short

VERSION = 6
DTYPES = tuple(map(np.dtype, (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)))
"""Element types, by the format's number."""
MAX_AXES = 8


def open_model(path: Path) -> dict[str, Stored]:
    """Variables of a `model.bin` by their names there, each a byte range of it. Its aliases (second names of variables)
    are not taken.

    Raises:
      MoextendError: no such file, of another version, cut short, or one that contradicts itself.
    """
    size = plain_file(path)
    at = opened(path)
    try:
        with path.open("rb") as file:
            placed = _Bytes(file, size).model()
    except (ValueError, OSError) as error:  # ValueError: also of text that is not UTF-8
        raise MoextendError(f"{path} cannot be read as CTranslate2's model.bin: {said_by(error)}") from None
    return {
        name: in_runs(shape, dtype, run_at(path, dtype, offset), where=str(path), file=at)
        for name, (shape, dtype, offset) in placed.items()
    }


class _Bytes(Bytes):
    def model(self) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
        """Shape, element type and first byte of every variable."""
        if (version := self.number(4)) != VERSION:
            raise ValueError(f"it is of version {version}; only {VERSION} is known")
        _spec, _revision, count = self.string(), self.number(4), self.number(4)
        placed: dict[str, tuple[tuple[int, ...], np.dtype, int]] = {}
        for _ in range(count):
            name = self.string()
            if name in placed:
                raise ValueError(f"variable {short(name)} stands twice")
            placed[name] = self.variable(name)
        for _ in range(self.number(4)):
            alias, name = self.string(), self.string()
            if alias in placed or name not in placed:
                raise ValueError(f"{short(alias)} is no second name of the variable {short(name)}")
        if self.at != self.size:
            raise ValueError(f"{self.size - self.at:,} bytes come after its last name")
        return placed

    def variable(self, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
        axes = self.number(1)
        if axes > MAX_AXES:
            raise ValueError(f"variable {short(name)} has {axes} axes")
        shape = tuple(self.number(4) for _ in range(axes))
        code, nbytes, offset = self.number(1), self.number(4), self.at
        if code >= len(DTYPES):
            raise ValueError(f"variable {short(name)} is of the unknown type {code}")
        if math.prod(shape) * DTYPES[code].itemsize != nbytes:
            raise ValueError(f"variable {short(name)} {DTYPES[code]}{list(shape)} does not fit its {nbytes:,} bytes")
        self.check(nbytes)
        self.at += nbytes
        self.file.seek(self.at)
        return shape, DTYPES[code], offset

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def string(self) -> str:
        """Its length counts the zero byte at its end."""
        text = self.take(self.number(2))
        if not text.endswith(b"\0"):
            raise ValueError("a name has no end")
        return text[:-1].decode()
