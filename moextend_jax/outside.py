"""What may come from anybody, and is not believed: a path or text in, a plain file, a JSON value or a header out.

Everything that is wrong is a `MoextendError` of one line, however long or odd what stands in the file is.
"""

from __future__ import annotations

import json
import reprlib
import stat
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.folders import is_url, read_range, size_and_generation

MAX_JSON = 32 << 20
"""Bytes. As Python objects it takes up to thirty times as much; the largest models' files have a few million."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8
_REPR.maxlevel = 3


def shown(value: Any) -> str:
    """`repr` for a message: short, and of values nested as deep as may be."""
    return _REPR.repr(value)


def short(name: str) -> str:
    """A name for a message: as it is, unless it is very long or would move the cursor."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= 160 else f"{name[:80]}...{name[-60:]}"


def said_by(error: BaseException) -> str:
    """First line of what another library's exception says."""
    return short((str(error).strip() or repr(error)).splitlines()[0])


def plain_file(path: Path) -> int:
    """Size of a file of this machine in bytes.

    Raises:
      MoextendError: there is no such file, or it is a folder, a pipe or a device, which would never end.
    """
    try:
        stats = path.stat()
    except FileNotFoundError:
        raise MoextendError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise MoextendError(f"{path} cannot be read: {said_by(error)}") from None
    if not stat.S_ISREG(stats.st_mode):
        raise MoextendError(f"{path} cannot be read: it is no plain file")
    return stats.st_size


def inside(path: Path) -> Path:
    """A file or folder of a folder that came from elsewhere, as it is.

    A folder may be put together of links: to files of the same name, wherever they are (`model.safetensors` of another
    folder), to folders, and to what the Hugging Face cache has downloaded (its `blobs/`).

    Raises:
      MoextendError: it is a link out of its folder to anything else, such as a key: what is read gets copied into
        exports.
    """
    if not is_url(path) and path.is_symlink():
        target = path.resolve()
        inner = target.is_relative_to(path.parent.resolve())
        downloaded = target.parent.name == "blobs" and (target.parents[1] / "snapshots").is_dir()
        if not (inner or downloaded or target.name == path.name or target.is_dir()):
            raise MoextendError(
                f"{path} is a link out of its folder, to {target}, a file of another name: put the file itself there"
            )
    return path


def read_small(path: Path) -> bytes:
    """The bytes of a plain file, or of an object in a bucket, that is no larger than MAX_JSON."""
    size = size_and_generation(path)[0] if is_url(path) else plain_file(path)
    if size > MAX_JSON:
        raise MoextendError(f"{path} cannot be read: {size:,} bytes are too many for a file of its kind ({MAX_JSON:,})")
    if is_url(path):
        return read_range(path, 0, size)
    try:
        return path.read_bytes()
    except OSError as error:
        raise MoextendError(f"{path} cannot be read: {said_by(error)}") from None


def npy_header(file: IO[bytes], *, most: int = 10_000) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and element type of the array that a file begins with, as its header of at most `most` bytes says, even
    below 0. Raises whatever NumPy does."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's, about headers as no program writes them today
        shape, _, dtype = read[np.lib.format.read_magic(file)](file, max_header_size=most)
    return shape, dtype


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      MoextendError: no such file, or something else in it; names the file.
    """
    if not path.exists():
        raise MoextendError(f"{path} does not exist")
    value = parse_json(read_small(inside(path)), where=f"{path} cannot be read")
    if not isinstance(value, dict):
        raise MoextendError(f"{path} holds no JSON object")
    return value


def parse_json(text: bytes, *, where: str, **hooks: Any) -> Any:
    """A JSON value from UTF-8; `hooks` are those of `json.loads`. `where` starts the message of an error."""
    try:
        value = json.loads(text.decode(), **hooks)
        if b"\\ud" in text.lower():  # halves of letters, which no file can be written with and no line printed
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise MoextendError(f"{where}: it is nested too deep") from None
    except ValueError as error:  # JSON, UTF-8, a number of too many digits, and what a hook says
        raise MoextendError(f"{where}: {said_by(error)}") from None


class Repeated(ValueError):
    """A key stands twice in an object of a JSON file."""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json`, which would take the last value of a key that stands twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        again = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Repeated(f"the key {shown(again)} stands twice in an object")
    return fields
