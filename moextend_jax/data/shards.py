"""WebDataset shards: tar files whose members of one base name are one row.

Goes in: a tar file. Comes out: `Row`s: a member `.json` gives the keys, `.txt` a caption, `NAME.txt` the key NAME;
pictures, sounds and features are not read, they are `Span`s of the tar file. Nothing is unpacked.
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
from moextend_jax.media import KIND_OF_SUFFIX, KINDS, SOUNDS_UNREAD, plurals
from moextend_jax.outside import Repeated, without_repeats

NAMING = {kind: plurals(kind)[::-1] for kind in reversed(KINDS)}
"""Key of members -> keys of the JSON that may name them. A member that one key has taken is not taken by later
ones."""
UNREAD = {
    **dict.fromkeys(("mp4", "avi", "mov", "webm", "mkv"), "an animation (.webp)"),
    **dict.fromkeys(SOUNDS_UNREAD, ".flac"),
}
"""Suffixes of what is not read, and what to convert it to."""


class Span(NamedTuple):
    """An item's file inside an archive: `size` bytes of `file` from byte `at` on. below: the archive's folder, relative
    to the one above all archives of the data set."""

    file: str
    at: int
    size: int
    member: str
    below: str = ""

    @property
    def name(self) -> str:
        """Two members of one name are two items, and so are those of two archives of one name."""
        return os.path.join(self.below, f"{Path(self.file).name}/{self.member}@{self.at}")


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
    members_of: dict[str, list[Span]] = {}
    place = f"member {members[0].info.name}"
    for _, kind, info in members:
        stem, _, suffix = kind.rpartition(".")
        if info.sparse is not None:
            return Row(path, place, None, [], f"{info.name} is a sparse file, which is not read")
        if suffix in KIND_OF_SUFFIX:  # an animation is a video if the row's JSON says so
            span = Span(os.fspath(absolute(path)), info.offset_data, info.size, info.name)
            members_of.setdefault(KIND_OF_SUFFIX[suffix], []).append(span)
        elif suffix in UNREAD:
            return Row(path, place, None, [], f"what {info.name} holds is not read; convert it to {UNREAD[suffix]}")
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
                content = json.loads(text, object_pairs_hook=without_repeats)
            except Repeated as error:
                return Row(path, place, None, [], f"{info.name}: {error}")
            except (ValueError, RecursionError) as error:
                return Row(path, place, None, [], f"{info.name} is not JSON: {error}"[:300])
            if stem or not isinstance(content, dict):  # a file of turns alone
                content = {stem or "conversations": content}
            value |= content
    return Row(path, place, {"id": key} | value | _items(value, members_of), [])


def _items(value: dict[str, Any], members_of: dict[str, list[Span]]) -> dict[str, Any]:
    """The members of a row by the keys of their kinds, in the order in which its JSON names them; all of a kind if it
    names none of them, or something else."""
    spans = {Path(span.member).name: span for members in members_of.values() for span in members}
    items: dict[str, Any] = {}
    taken: list[Span] = []
    for key, names in NAMING.items():
        named = _resolved(next((value[name] for name in names if value.get(name)), None), spans)
        unnamed = [span for span in members_of.get(key, []) if span not in taken]
        taken += [span for files in named.values() for span in files]
        if named or unnamed:
            items |= {**dict.fromkeys(names), key: named.get("", named) or unnamed}
    return items


def _resolved(named: Any, spans: dict[str, Span]) -> dict[str, list[Span]]:
    """Members by the name of their medium, "" where the row says none; {} where any name is none of a member."""
    by_medium = named if isinstance(named, dict) else {"": named}
    listed = {medium: [files] if isinstance(files, str) else files for medium, files in by_medium.items()}
    for files in listed.values():
        if not isinstance(files, list) or not files:
            return {}
        if not all(isinstance(file, str) and Path(file).name in spans for file in files):
            return {}
    return {medium: [spans[Path(file).name] for file in files] for medium, files in listed.items()}
