"""Files of images: names in; their facts, their bytes, or a `Fault` of `data/faults.py` out.

A name is a path below a folder, which may be in a bucket; pictures inside an archive are `Span`s of it. A file of data
comes from elsewhere: no name in it, and no link, leads out of the folder, unless the user says so (`anywhere`).
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.faults import Fault
from moextend_jax.data.json_values import unreadable
from moextend_jax.data.shards import Span
from moextend_jax.folders import folder, is_url

MOST_BYTES = 64 * 2**20
"""Of an image file."""


class Facts(NamedTuple):
    """Of a file: bytes, and when it was written (any number that changes with it)."""

    size: int
    time: int | str


class ImageFolder(NamedTuple):
    """Where pictures are that data name by path. anywhere: also outside, by absolute paths, `..` and links."""

    path: Path
    anywhere: bool = False

    def look(self, names: Iterable[str]) -> Iterator[Facts | Fault]:
        if is_url(self.path):
            return look_in_bucket(self.path, names)
        return look(self.path, names, anywhere=self.anywhere)

    def read(self, name: str) -> bytes:
        if is_url(self.path):
            return read_from_bucket(self.path, name)
        return read_image(self.path, name, anywhere=self.anywhere)


def read_span(span: Span) -> bytes:
    """A picture inside an archive."""
    _check_size(span.size, span.name, id=span.name)
    try:
        with folder(span.file).open("rb") as file:
            file.seek(span.at)
            encoded = file.read(span.size)
    except OSError as error:
        raise Fault(f"cannot read image {span.name}: {error}", "unreadable", span.name) from error
    except Exception as error:  # a bucket's
        raise unreadable(Path(span.file), error) from error
    if len(encoded) < span.size:
        raise Fault(f"image {span.name} ends with its archive", "truncated", span.name)
    return encoded


# --- in a file system -------------------------------------------------------------------------------------------------


def find_image(folder: Path, name: str, *, anywhere: bool = False) -> Path:
    """The file of an image named relative to `folder` or to its folder `images`; nothing is read.

    Raises:
      Fault: it is a URL, leaves the folder, is not there, is no file, is empty, or has more than MOST_BYTES.
      MoextendError: this process cannot spell the name, and so no name of its kind.
    """
    _check_name(folder, name, anywhere)
    roots = folder, folder / "images"
    for root in roots:
        try:
            path = (root / name).resolve(strict=True)
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            if encoding == "utf-8":  # half of a pair, which JSON can spell
                raise Fault(f"image {name!a} in {folder}: {error}", "unreadable", ascii(name)) from error
            raise MoextendError(
                f"image {name!a}: names of files are {encoding} here, which cannot spell it; set PYTHONUTF8=1"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:  # no permission; a name no file can have; a loop of links
            raise Fault(f"cannot read image {name} in {folder}: {error}", "unreadable", name) from error
        if not anywhere and not any(path.is_relative_to(root.resolve()) for root in roots):
            raise Fault(
                f"image {name} is a link out of {folder}, to {path}; only the folder images itself may be a link, "
                "unless you laid it: then set faults.policies.outside to keep",
                "outside",
                name,
            )
        if not stat.S_ISREG(facts.st_mode):  # to open a pipe would wait for ever
            raise Fault(f"image {name} in {folder} is not a file", "unreadable", name)
        if not facts.st_size:
            raise Fault(f"image {name} in {folder} is an empty file", "empty_file", name)
        if facts.st_size > MOST_BYTES:
            raise Fault(
                f"image {name} in {folder} has {facts.st_size} bytes, more than {MOST_BYTES}", "oversized", name
            )
        return path
    raise _missing(folder, name, hint=_beside(roots, name))


def _missing(folder: Path, name: str, *, hint: str = "") -> Fault:
    return Fault(f"no image {name} in {folder} or {folder / 'images'}{hint}", "missing", name)


def _check_size(size: int, what: str, *, id: str) -> None:
    if not 0 < size <= MOST_BYTES:
        raise Fault(f"image {what} has {size} bytes", "oversized" if size else "empty_file", id)


def _check_name(folder: Path, name: str, anywhere: bool) -> None:
    if "://" in name or name.startswith("data:"):
        raise Fault(f"image {name[:200]} is a URL; nothing is downloaded: put the file into {folder}", "url", name)
    if not anywhere and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise Fault(
            f"image {name} leaves {folder}; name it by its path below that folder (or set images to the folder that "
            "has it, or faults.policies.outside to keep)",
            "outside",
            name,
        )


def _beside(roots: Iterable[Path], name: str) -> str:
    """A hint, where the picture is there in another format: OCR-VQA's are .gif files that its JSON calls .jpg."""
    for root in roots:
        for suffix in (".jpg", ".jpeg", ".png", ".gif", ".webp", ".JPG", ".JPEG", ".PNG"):
            other = (root / name).with_suffix(suffix)
            if other.is_file():
                return f"; {other.name} is there: convert it, or name it so"
    return ""


def look(folder: Path, names: Iterable[str], *, anywhere: bool = False) -> Iterator[Facts | Fault]:
    """Size and time of each image's file, or the `Fault` that `find_image` raises.

    Folders are resolved once and a sound file costs one question to the file system: there are 665 thousand of them.
    """
    homes: dict[str, list[str]] = {}
    for name in names:
        head, tail = os.path.split(name)
        if head not in homes:
            homes[head] = _homes(folder, head, anywhere)
        file = None if ":" in name else _sound_file(homes[head], tail)  # a URL is none, whatever is there
        try:
            file = file or find_image(folder, name, anywhere=anywhere).stat()
            yield Facts(file.st_size, file.st_mtime_ns)
        except Fault as fault:
            yield fault


def _homes(folder: Path, head: str, anywhere: bool) -> list[str]:
    """Where files of `head/` may be, resolved; none where only `find_image` can tell what is right."""
    if "\0" in head or (not anywhere and (os.path.isabs(head) or ".." in head)):
        return []
    try:
        roots = [os.path.realpath(root) for root in (folder, folder / "images")]
        homes = [os.path.realpath(os.path.join(root, head)) for root in roots]
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
        return file if stat.S_ISREG(file.st_mode) and 0 < file.st_size <= MOST_BYTES else None
    return None


def read_image(folder: Path, name: str, *, anywhere: bool = False) -> bytes:
    """Its bytes; raises as `find_image`, also where reading fails."""
    try:
        with find_image(folder, name, anywhere=anywhere).open("rb") as file:
            encoded = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise Fault(f"cannot read image {name} in {folder}: {error}", "unreadable", name) from error
    if len(encoded) > MOST_BYTES:  # it grew
        raise Fault(f"image {name} in {folder} has more than {MOST_BYTES} bytes", "oversized", name)
    return encoded


# --- in a bucket ------------------------------------------------------------------------------------------------------


def look_in_bucket(folder: Path, names: Iterable[str]) -> Iterator[Facts | Fault]:
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
            _check_name(folder, name, False)
            paths = [os.fspath(root / name) for root in (folder, folder / "images")]
            matches = (listing(head).get(tail) for head, _, tail in (path.rpartition("/") for path in paths))
            facts = next((facts for facts in matches if facts is not None), None)
            if facts is None:
                raise _missing(folder, name)
            _check_size(facts.size, f"{name} in {folder}", id=name)
            yield facts
        except Fault as fault:
            yield fault


def read_from_bucket(folder: Path, name: str) -> bytes:
    _check_name(folder, name, False)
    for path in (folder / name, folder / "images" / name):
        try:
            with path.open("rb") as file:
                encoded = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            continue
        except Exception as error:  # no picture's fault: the network, or no permission
            raise unreadable(path, error) from error
        _check_size(len(encoded), f"{name} in {folder}", id=name)
        return encoded
    raise _missing(folder, name)
