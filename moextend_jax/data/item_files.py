"""Files of images, sounds and other items: names in; their facts, their bytes, or a `Fault` of `faults.py` out.

A name is a path below a folder, which may be in a bucket; files inside an archive are `Span`s of it, rows of an
ArrayRecord file have names of their own (`data/records.py`). A file of data comes from elsewhere: no name in it, and no
link, leads out of the folder, unless the user says so (`anywhere`). `noun` is what messages call an item
(`media.KINDS`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.forms import DEPTH
from moextend_jax.data.json_values import unreadable
from moextend_jax.data.records import read_row, row_of
from moextend_jax.data.shards import Span
from moextend_jax.faults import MOST_BYTES, Fault, wrong_size
from moextend_jax.folders import folder, is_url

BESIDE = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".JPG", ".JPEG", ".PNG", ".wav", ".flac", ".ogg", ".npz", ".npy")
"""Ends of names that are looked for where a file is missing."""


class Facts(NamedTuple):
    """Of a file: bytes, and when it was written (any number that changes with it)."""

    size: int
    time: int | str


class ItemFolder(NamedTuple):
    """Where items are that data name by path. anywhere: also outside, by absolute paths, `..` and links."""

    path: Path
    anywhere: bool = False

    def look(self, names: Iterable[str], noun: str = "image") -> Iterator[Facts | Fault]:
        """Of every name, in their order."""
        for in_record, some in itertools.groupby(names, key=lambda name: row_of(name) is not None):
            if in_record:
                yield from (self._look_at_row(name, noun) for name in some)
            elif is_url(self.path):
                yield from look_in_bucket(self.path, some, noun=noun)
            else:
                yield from look(self.path, some, anywhere=self.anywhere, noun=noun)

    def _look_at_row(self, name: str, noun: str) -> Facts | Fault:
        try:
            facts = self._file_of_rows(name, noun).stat()
            return Facts(facts.st_size, facts.st_mtime_ns)
        except Fault as fault:
            return fault

    def _file_of_rows(self, name: str, noun: str) -> Path:
        if is_url(self.path):
            raise Fault(f"{noun} {name} is in a bucket; ArrayRecord files are read from a disk", "unreadable", name)
        of = row_of(name)
        assert of is not None
        try:
            return find_file(self.path, of.file, anywhere=self.anywhere, noun=noun, most=sys.maxsize)
        except Fault as fault:
            raise Fault(str(fault), fault.kind, name) from fault  # by the row's name: its features are cached under it

    def read(self, name: str, noun: str = "image") -> bytes:
        if of := row_of(name):
            return read_row(self._file_of_rows(name, noun), of.row, name=name, noun=noun)
        if is_url(self.path):
            return read_from_bucket(self.path, name, noun=noun)
        return read_file(self.path, name, anywhere=self.anywhere, noun=noun)


class StorageError(MoextendError):
    """The file system fails, and not a file. It is no `Fault`, which would be skipped: another host reads the file, and
    holds another batch then; and a cache of features would leave the item out for ever."""


def _refused(error: Exception, what: str, name: str) -> MoextendError:
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_FILES:
        return StorageError(f"cannot read {what}: {error}; if it stays so, take it out of the data")
    return Fault(f"cannot read {what}: {error}", "unreadable", name)


OF_FILES = frozenset({
    errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOENT, errno.ENOTDIR,
    errno.EINVAL, errno.EILSEQ, errno.ENXIO, errno.ENODEV, errno.EOVERFLOW,
})  # fmt: skip
"""What is wrong with a file or its name, for whoever asks."""
PAUSES = (0.2, 2.0, 10.0)
"""Seconds before another try, after a file system has failed."""


def _patiently(read: Callable[[], bytes]) -> bytes:
    for pause in PAUSES:
        with contextlib.suppress(StorageError):
            return read()
        time.sleep(pause)
    return read()


def read_span(span: Span, noun: str = "image") -> bytes:
    """An item inside an archive."""
    _check_size(span.size, f"{noun} {span.name}", id=span.name)

    def read() -> bytes:
        try:
            with folder(span.file).open("rb") as file:
                file.seek(span.at)
                return file.read(span.size)
        except OSError as error:
            raise _refused(error, f"{noun} {span.name}", span.name) from error
        except Exception as error:  # a bucket's
            raise unreadable(Path(span.file), error) from error

    encoded = _patiently(read)
    if len(encoded) < span.size:
        raise Fault(f"{noun} {span.name} ends with its archive", "truncated", span.name)
    return encoded


# --- in a file system -------------------------------------------------------------------------------------------------


def find_file(folder: Path, name: str, *, anywhere: bool = False, noun: str = "image", most: int = MOST_BYTES) -> Path:
    """The file of an item. Its name is relative to `folder` or to `folder/images`; a folder `images` may also stand
    inside the folders that the name begins with. Nothing is read.

    Raises:
      Fault: it is a URL, leaves the folder, is not there, is no file, is empty, or has more bytes than `most`.
      MoextendError: this process's encoding of file names cannot write such names; the file system fails.
    """
    _check_name(folder, name, anywhere, noun)
    roots = folder, folder / "images"
    for place in _places(folder, name):
        try:
            path = place.resolve(strict=True)
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            if encoding == "utf-8":  # half of a pair, which JSON can spell
                raise Fault(f"{noun} {name!a} in {folder}: {error}", "unreadable", ascii(name)) from error
            raise MoextendError(
                f"{noun} {name!a}: names of files are {encoding} here, which cannot spell it; set PYTHONUTF8=1"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:  # no permission; a name no file can have; a loop of links
            raise _refused(error, f"{noun} {name} in {folder}", name) from error
        if not anywhere and not any(path.is_relative_to(root.resolve()) for root in roots):
            raise Fault(
                f"{noun} {name} is a link out of {folder}, to {path}; only the folder images itself may be a link, "
                "unless you laid it: then set faults.policies.outside to keep",
                "outside",
                name,
            )
        if not stat.S_ISREG(facts.st_mode):  # to open a pipe would wait for ever
            raise Fault(f"{noun} {name} in {folder} is not a file", "unreadable", name)
        if not facts.st_size:
            raise Fault(f"{noun} {name} in {folder} is an empty file", "empty_file", name)
        if facts.st_size > most:
            raise Fault(f"{noun} {name} in {folder} has {facts.st_size} bytes, more than {most}", "oversized", name)
        return path
    raise _missing(folder, name, noun, hint=_beside(roots, name))


def _places(folder: Path, name: str) -> list[Path]:
    """Where an item may be: the folder `images` may also stand beside the file that names it, in a folder below."""
    parts = Path(name).parts
    levels = range(min(len(parts), DEPTH))
    return [folder / name, *(folder.joinpath(*parts[:n], "images", *parts[n:]) for n in levels)]


def real_paths(home: str) -> Callable[[str], str]:
    """From the name of an item to the path of its file that all links to it share, or to the one that the name says
    where no file is. A name costs a question or two to the file system."""

    @functools.cache
    def homes(head: str) -> list[str]:
        return [os.path.realpath(place.parent) for place in _places(Path(home), os.path.join(head, "x"))]

    def path_of(name: str) -> str:
        row = row_of(name)
        file = row.file if row else name
        head, tail = os.path.split(file)
        for path in (f"{at}/{tail}" for at in homes(head)):
            with contextlib.suppress(OSError, ValueError):
                linked = not stat.S_ISREG(os.lstat(path).st_mode)
                return (os.path.realpath(path, strict=True) if linked else path) + name[len(file) :]
        return os.path.join(home, name)

    return path_of


def _missing(folder: Path, name: str, noun: str, *, hint: str = "") -> Fault:
    return Fault(f"no {noun} {name} in {folder} or {folder / 'images'}{hint}", "missing", name)


def _check_size(size: int, what: str, *, id: str) -> None:
    if kind := wrong_size(size):
        raise Fault(f"{what} has {size} bytes", kind, id)


def _check_name(folder: Path, name: str, anywhere: bool, noun: str) -> None:
    if "://" in name or name.startswith("data:"):
        raise Fault(f"{noun} {name[:200]} is a URL; nothing is downloaded: put the file into {folder}", "url", name)
    if not anywhere and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise Fault(
            f"{noun} {name} leaves {folder}; name it by its path below that folder (or set images to the folder that "
            "has it, or faults.policies.outside to keep)",
            "outside",
            name,
        )


def _beside(roots: Iterable[Path], name: str) -> str:
    """A hint, where the item is there in another format: OCR-VQA's are .gif files that its JSON calls .jpg."""
    for root in roots:
        for suffix in BESIDE:
            other = (root / name).with_suffix(suffix)
            if other.is_file():
                return f"; {other.name} is there: convert it, or name it so"
    return ""


def look(folder: Path, names: Iterable[str], *, anywhere: bool = False, noun: str = "image") -> Iterator[Facts | Fault]:
    """Size and time of each item's file, or the `Fault` that `find_file` raises.

    Folders are resolved once and a sound file costs one question to the file system: there are 665 thousand of them.
    """
    homes: dict[str, list[str]] = {}
    for name in names:
        head, tail = os.path.split(name)
        if head not in homes:
            homes[head] = _homes(folder, head, anywhere)
        file = None if ":" in name else _sound_file(homes[head], tail)  # a URL is none, whatever is there
        try:
            file = file or find_file(folder, name, anywhere=anywhere, noun=noun).stat()
            yield Facts(file.st_size, file.st_mtime_ns)
        except Fault as fault:
            yield fault


def _homes(folder: Path, head: str, anywhere: bool) -> list[str]:
    """Resolved folders where files of `head/` may be; none if only `find_file` can decide."""
    if "\0" in head or (not anywhere and (os.path.isabs(head) or ".." in head)):
        return []
    try:
        roots = [os.path.realpath(root) for root in (folder, folder / "images")]
        homes = [os.path.realpath(place.parent) for place in _places(folder, os.path.join(head, "x"))]
    except (OSError, ValueError):
        return []
    inside = anywhere or all(any(Path(home).is_relative_to(root) for root in roots) for home in homes)
    return homes if inside else []


def _sound_file(homes: Iterable[str], name: str) -> os.stat_result | None:
    """None also for links, which may lead anywhere."""
    for home in homes:
        try:
            file = os.lstat(f"{home}/{name}")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
        return file if stat.S_ISREG(file.st_mode) and not wrong_size(file.st_size) else None
    return None


def read_file(folder: Path, name: str, *, anywhere: bool = False, noun: str = "image") -> bytes:
    """Its bytes; raises as `find_file`, also where reading fails."""

    def read() -> bytes:
        try:
            with find_file(folder, name, anywhere=anywhere, noun=noun, most=MOST_BYTES).open("rb") as file:
                return file.read(MOST_BYTES + 1)
        except OSError as error:
            raise _refused(error, f"{noun} {name} in {folder}", name) from error

    encoded = _patiently(read)
    if len(encoded) > MOST_BYTES:  # it grew
        raise Fault(f"{noun} {name} in {folder} has more than {MOST_BYTES} bytes", "oversized", name)
    return encoded


# --- in a bucket ------------------------------------------------------------------------------------------------------


def look_in_bucket(folder: Path, names: Iterable[str], *, noun: str = "image") -> Iterator[Facts | Fault]:
    """As `look`, and nothing is outside of a bucket's folder; each folder that names lead into is listed once."""
    import fsspec  # of the extra that gs:// paths need

    files = fsspec.filesystem("gs")
    listed: dict[str, dict[str, Facts]] = {}

    def listing(head: str) -> dict[str, Facts]:
        if head not in listed:
            try:
                items = files.ls(head, detail=True, refresh=True)
            except FileNotFoundError:
                items = []
            except Exception as error:
                raise unreadable(Path(head), error) from error
            listed[head] = {
                item["name"].rpartition("/")[2]: Facts(item["size"], f"{item.get('updated', '')}")
                for item in items
                if item["type"] == "file"
            }
        return listed[head]

    for name in names:
        try:
            _check_name(folder, name, False, noun)
            paths = map(os.fspath, _places(folder, name))
            matches = (listing(head).get(tail) for head, _, tail in (path.rpartition("/") for path in paths))
            facts = next((facts for facts in matches if facts is not None), None)
            if facts is None:
                raise _missing(folder, name, noun)
            _check_size(facts.size, f"{noun} {name} in {folder}", id=name)
            yield facts
        except Fault as fault:
            yield fault


def read_from_bucket(folder: Path, name: str, *, noun: str = "image") -> bytes:
    _check_name(folder, name, False, noun)
    for path in _places(folder, name):
        try:
            with path.open("rb") as file:
                encoded = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            continue
        except Exception as error:  # no item's fault: the network, or no permission
            raise unreadable(path, error) from error
        _check_size(len(encoded), f"{noun} {name} in {folder}", id=name)
        return encoded
    raise _missing(folder, name, noun)
