"""Folders that may be URLs: the text of an option in, a path to read and write out, or a byte range of a bucket's file.

A gs:// path is an `etils.epath` path, which has pathlib's methods; it needs the extra `gcs`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from etils import epath

from moextend_jax.config import MoextendError

BLOCK = 1 << 25
"""Bytes of one request; the requests of a range go side by side."""


def folder(text: str) -> Path:
    """The folder that a user named."""
    if "://" not in text:
        return Path(os.path.expanduser(text))  # a shell leaves the ~ of --workdir=~/run
    if not text.startswith("gs://"):
        raise MoextendError(
            f"{text}: of URLs only gs:// ones are read; copy it to a folder, or a bucket, and name that"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise MoextendError(f"{text}: a gs:// path needs gcsfs: {extra_hint('gcs')}")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs every failure with a traceback, and raises it too
    return cast(Path, epath.Path(text))


def is_url(path: Any) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    return path if is_url(path) else path.resolve()


def cache() -> Path:
    """This package's folder among those that a user's programs keep for later, on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moextend_jax"


def local(path: Path, *, what: str) -> Path:
    """The path itself; an error where something that must be mapped into memory would be in a bucket."""
    if is_url(path):
        raise MoextendError(f"{what} cannot be in {os.fspath(path)}: give a folder of a file system")
    return path


def local_copy(path: Path, names: Iterable[str]) -> Path:
    """A folder of this machine with those of the named small files that the folder has: the folder itself, or a copy
    from the bucket that goes away with the process."""
    return _copied(os.fspath(path), tuple(names)) if is_url(path) else path


@functools.cache
def _copied(url: str, names: tuple[str, ...]) -> Path:
    here = Path(tempfile.mkdtemp(prefix="moextend-"))
    atexit.register(shutil.rmtree, here, ignore_errors=True)
    with reading(url):
        for name in names:
            if (file := folder(url) / name).is_file():
                (here / name).write_bytes(file.read_bytes())
    return here


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write a file to, which then takes the name `path`: whatever stops the process, all of the file is there
    or the one before it. In a bucket, where an object appears whole, it is `path` itself."""
    if is_url(path):
        yield path
        return
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:  # a full disk, or Ctrl-C
        unfinished.unlink(missing_ok=True)
        raise


# --- files in buckets -------------------------------------------------------------------------------------------------


def size_and_generation(path: Path) -> tuple[int, int]:
    """Bytes of an object, and the number that its bucket gave to this content of it, as no other."""
    facts = _facts(path)
    return int(facts["size"]), int(facts["generation"])


def object_checksum(path: Path) -> str:
    """The CRC-32C that a bucket keeps of an object's content, in base64, without reading it."""
    return _facts(path)["crc32c"]


def _facts(path: Path) -> dict[str, Any]:
    with reading(path):
        files, name = _file_system(path)
        files.invalidate_cache()  # a listing from before may tell of other content
        facts = files.info(name)
        if facts["type"] != "file":
            raise MoextendError(f"{os.fspath(path)} cannot be read: it is no file")
        return facts


def read_range(path: Path, begin: int, end: int) -> bytes:
    """Bytes begin to end (exclusive) of an object, and no others."""
    starts = list(range(begin, end, BLOCK))
    with reading(path):
        files, name = _file_system(path)
        ends = [min(start + BLOCK, end) for start in starts]
        blocks = files.cat_ranges([name] * len(starts), starts, ends, on_error="raise") if starts else []
    if sum(map(len, blocks)) != max(0, end - begin):
        raise MoextendError(f"{os.fspath(path)} has changed since it was opened")
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


@contextlib.contextmanager
def reading(path: Any) -> Iterator[None]:
    """What a bucket's library says of a URL becomes one line: each of its layers has exceptions of its own."""
    try:
        yield
    except MoextendError:
        raise
    except Exception as error:
        if not is_url(path):
            raise
        words = (str(error).strip() or repr(error)).splitlines()[0]
        raise MoextendError(f"{os.fspath(path)} cannot be read: {type(error).__name__}: {words[:200]}") from None


def _file_system(path: Path) -> tuple[Any, str]:
    import fsspec  # it takes a tenth of a second, and only buckets need it

    return fsspec.core.url_to_fs(os.fspath(path))


# --- extras -----------------------------------------------------------------------------------------------------------


def extra_hint(name: str) -> str:
    """What to type to get an extra of this package ("": what it always needs). The package need be on no registry: pip
    takes the installed one, and adds what it lacks."""
    return f'pip install "moextend-jax[{name}]"' if name else "pip install moextend-jax"


def package(name: str, *, of: str, install: str) -> ModuleType:
    """A package that the data set `of` is made from; `install` says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MoextendError(f"data set {of} needs the package {name.replace('_', '-')}; {install}") from error
