"""Encoded features, which another program computed, to what a projector expects.

Goes in: the bytes of a .npz file of exactly one array, or of a .npy file: [p, C] of float16 or float32, C the medium's
width and p at most its patches (P). Comes out: `features_pC`, then `features_PC` float32 with zeros behind; or a
`Fault`. Pickles are never unpacked, and the header's sizes are those of the medium before anything is.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable

import numpy as np

from moextend_jax.config import FeaturesConfig, Medium, MoextendError
from moextend_jax.faults import Fault, wrong_size
from moextend_jax.outside import npy_header

SUFFIXES = ("npz", "npy")
TOWERS = (FeaturesConfig,)
HEADER = 4096
"""Bytes that the header of an array takes at most."""
TYPES = ("float16", "float32")


def decode(
    encoded: bytes, *, name: str = "features", id: str = "", medium: Medium, upright: bool = True, cut: bool = False
) -> np.ndarray:
    """`features_pC`."""
    features_pC = _read(encoded, name=name, id=id, medium=medium, header=False)
    if not np.isfinite(features_pC).all():
        raise Fault(f"cannot read {name} as features: it has NaN or infinite numbers", "not_finite", id or name)
    return features_pC


def prepare(item: np.ndarray, *, medium: Medium, preparation: str = "pad", id: str = "") -> np.ndarray:
    """`features_PC`."""
    features_PC = np.zeros(input_shape(medium), np.float32)
    features_PC[: len(item)] = item
    return features_PC


def positions(item: np.ndarray, medium: Medium) -> int:
    return len(item)


def input_shape(medium: Medium) -> tuple[int, ...]:
    if not isinstance(medium.tower, FeaturesConfig):
        raise MoextendError("a medium of kind features has no tower: set its width and patches, and leave tower out")
    return medium.tower.patches, medium.tower.width


def span_of_file(encoded: bytes, *, name: str = "features", id: str = "", medium: Medium, **_: object) -> int:
    """`positions` by what the header says."""
    return _read(encoded, name=name, id=id, medium=medium, header=True).shape[0]


def _read(encoded: bytes, *, name: str, id: str, medium: Medium, header: bool) -> np.ndarray:
    """The array; with `header` only its header is read, and the array is zeros of that shape, which take no memory."""

    def fault(kind: str, why: object) -> Fault:
        return Fault(f"cannot read {name} as features: {why}", kind, id or name)

    most = math.prod(input_shape(medium)) * 4 + HEADER
    if kind := wrong_size(len(encoded)):
        raise fault(kind, f"it has {len(encoded)} bytes")
    if not encoded.startswith((b"PK", MAGIC)):
        raise fault("not_features", "it is neither a .npz nor a .npy file")
    try:
        if encoded.startswith(MAGIC):
            return _array(io.BytesIO(encoded), len(encoded), medium, fault, header)
        if b"PK\5\6" not in encoded[-(1 << 16) - 22 :]:
            raise fault("truncated", "it ends before the list of its arrays, which is the last in a .npz file")
        with zipfile.ZipFile(io.BytesIO(encoded)) as archive:
            names = archive.namelist()
            if len(names) != 1 or not names[0].endswith(".npy"):
                raise fault("not_features", f"it holds {len(names)} files, not exactly one array")
            size = archive.getinfo(names[0]).file_size
            with archive.open(names[0]) as file:
                # What says to be larger is read as far as its header, for the fault to name its shape.
                return _array(io.BytesIO(file.read(most + 1)), size, medium, fault, header)
    except Fault:
        raise
    except EOFError as error:
        raise fault("truncated", "its data end too early") from error
    except Exception as error:  # zipfile's, zlib's, and those of NumPy's headers (ast, tokenize)
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise fault("unreadable", f"it is damaged: {why}") from error


MAGIC = b"\x93NUMPY"


def _array(file: io.BytesIO, size: int, medium: Medium, fault: Callable[..., Fault], header: bool) -> np.ndarray:
    shape, dtype = npy_header(file, most=HEADER)
    if dtype.name not in TYPES:
        raise fault("not_features", f"its element type is {dtype}, not {' or '.join(TYPES)}"[:200])
    patches, width = input_shape(medium)
    if len(shape) != 2 or shape[1] != width or shape[0] > patches:
        raise fault("wrong_shape", f"{list(shape)[:8]} are not at most {patches} positions of width {width}")
    if not shape[0]:
        raise fault("empty_file", "it has no positions")
    if (present := size - file.tell()) != (wanted := math.prod(shape) * dtype.itemsize):
        raise fault("truncated" if present < wanted else "unreadable", f"it has {present} bytes for {wanted}")
    if header:
        return np.broadcast_to(np.zeros((), dtype), shape)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False, max_header_size=HEADER)
