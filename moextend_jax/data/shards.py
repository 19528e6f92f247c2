"""WebDataset shards: tar files whose members of one base name are one row.

Goes in: a tar file. Comes out: `Row`s: a member `.json` gives the keys, `.txt` a caption, `NAME.txt` the key NAME;
pictures are not read, they are `Span`s of the tar file. Nothing is unpacked.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from moextend_jax.config import MoextendError
from moextend_jax.data.json_values import MOST_ENTRY, Row, one_line, open_file, unreadable
from moextend_jax.folders import absolute

PICTURES = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm", "jp2", "ico", "avif", "heic")
OTHER_MEDIA = ("mp4", "avi", "mov", "webm", "mkv", "wav", "mp3", "flac", "ogg", "m4a")


class Span(NamedTuple):
    """A picture inside an archive: `size` bytes of `file` from byte `at` on."""

    file: str
    at: int
    size: int
    member: str

    @property
    def name(self) -> str:
        """Two members of one name are two pictures."""
        return f"{Path(self.file).name}/{self.member}@{self.at}"


class _Member(NamedTuple):
    key: str
    kind: str
    info: tarfile.TarInfo


def read_tar(path: Path) -> Iterator[Row]:
    """Raises MoextendError where it is no tar file, compressed, or ends too early."""
    with open_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = (_member(info) for info in _infos(tar) if info.isreg())
                for key, group in itertools.groupby(members, key=lambda member: member.key):
                    yield _row(path, tar, key, list(group))
                # tarfile takes anything after a first member for its end; a whole one ends in zeros.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it is cut off or damaged at byte {tar.offset}")
        except MoextendError:
            raise
        except tarfile.ReadError as error:
            raise MoextendError(
                f"{path} is no tar file that can be read: {one_line(error)}; it must be whole and not compressed"
            ) from error
        except Exception as error:
            raise unreadable(path, error) from error


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        cast(Any, tar).members.clear()  # it would keep all of them
        yield info


def _member(info: tarfile.TarInfo) -> _Member:
    """`a/0001.left.jpg` is `left.jpg` of row `a/0001`."""
    folder, _, file = info.name.rpartition("/")
    base, _, kind = file.partition(".")
    return _Member(f"{folder}/{base}" if folder else base, kind.lower(), info)


def _row(path: Path, tar: tarfile.TarFile, key: str, members: list[_Member]) -> Row:
    value: dict[str, Any] = {}
    pictures: list[Span] = []
    place = f"member {members[0].info.name}"
    for _, kind, info in members:
        stem, _, suffix = kind.rpartition(".")
        if info.sparse is not None:
            return Row(path, place, None, [], f"{info.name} is a sparse file, which is not read")
        if suffix in PICTURES:
            pictures.append(Span(os.fspath(absolute(path)), info.offset_data, info.size, info.name))
        elif suffix in OTHER_MEDIA:
            return Row(path, place, None, [], f"what {info.name} holds is not read; only pictures are")
        elif suffix in ("json", "txt"):
            if info.size > MOST_ENTRY:
                return Row(path, place, None, [], f"{info.name} has more than {MOST_ENTRY} bytes")
            reader = tar.extractfile(info)
            data = b"" if reader is None else reader.read()
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return Row(path, place, None, [info.offset_data + error.start])
            if suffix == "txt":
                value[stem or "text"] = text.strip()
                continue
            try:
                content = json.loads(text)
            except (ValueError, RecursionError) as error:
                return Row(path, place, None, [], f"{info.name} is not JSON: {error}"[:300])
            if stem or not isinstance(content, dict):  # a file of turns alone
                content = {stem or "conversations": content}
            value |= content
    return Row(path, place, {"id": key} | value | _in_order(value, pictures), [])


def _in_order(value: dict[str, Any], pictures: list[Span]) -> dict[str, Any]:
    """The pictures of a row in the order in which its JSON names them, all if it names none of them."""
    if not pictures:
        return {}
    named = value.get("images") or value.get("image") or []
    named = [named] if isinstance(named, str) else named
    members = {Path(span.member).name: span for span in pictures}
    if isinstance(named, list) and named and all(isinstance(n, str) and Path(n).name in members for n in named):
        pictures = [members[Path(name).name] for name in named]
    return {"image": None, "images": pictures}
