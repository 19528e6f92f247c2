"""Conversations of files of any form, one at a time: little memory for files of a gigabyte, and nothing that is wrong
ends it.

Goes in: files of a form of `data/forms.py`. Comes out: `Entry`s in order, each with the `Fault` that its own form has;
what the turns say is checked where they are encoded (`data/conversations.py`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.forms import folder_above, form_of
from moextend_jax.data.json_values import Row
from moextend_jax.data.shards import Span
from moextend_jax.data.tables import NOT_UTF8
from moextend_jax.data.talks import Item, normal_turns
from moextend_jax.faults import Fault
from moextend_jax.media import IMAGE_MARK

SHOWN = 20
"""Invalid bytes of an entry whose places its fault names."""
MOST_NAME = 1000
"""Characters of a path."""

Content = bytes | Span
"""An encoded picture, sound, ... that is not a file of its own."""


class ItemName(NamedTuple):
    """name: a path, or a key of `Entry.contents`. mark: what stands for it, which says of which medium it is."""

    mark: str
    name: str


class Entry(NamedTuple):
    """`fault` is None where the entry can be read; one that cannot has no items and no turns. `number` counts from
    0. items: those of one mark in the order of the marks."""

    number: int
    id: str
    items: tuple[ItemName, ...]
    turns: list[Any]
    fault: Fault | None
    contents: Mapping[str, Content] = {}

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.items if item.mark == IMAGE_MARK)


def read_entries(*paths: Path, beside: bool = True) -> Iterator[Entry]:
    """All entries of all files, in order.

    Args:
      beside: what a file names lies beside it: of files in several folders names begin with the folder, for two of
        these may have items of one name.

    Raises:
      MoextendError: a file cannot be read, is not of its form from some place on, or there are no entries.
    """
    seen: dict[str, int] = {}
    number = -1
    above = folder_above(paths)
    for number, row in enumerate(row for path in paths for row in form_of(path)(path)):
        yield _entry(number, row, seen, above, beside)
    if number < 0:
        more = f" and {len(paths) - 1} more files" if paths[1:] else ""
        raise MoextendError(f"{paths[0]}{more} holds no entries; it must be a list of conversations")


def _entry(number: int, row: Row, seen: dict[str, int], above: Path, beside: bool) -> Entry:
    id = row.value.get("id") if isinstance(row.value, dict) else None
    id = str(number if id is None else id)
    broken = not _utf8(id)
    id = id.encode(errors="replace").decode()[:200]
    where = f"{row.path}: entry {number} (id {id}, {row.place})"
    try:
        if row.invalid:
            places = ", ".join(map(str, row.invalid[:SHOWN])) + (", ..." if len(row.invalid) > SHOWN else "")
            raise Fault(f"text that is not UTF-8 at byte {places}", "encoding")
        if row.fault:
            raise Fault(row.fault, "encoding" if row.fault.startswith(NOT_UTF8) else "entry")
        if not isinstance(row.value, dict):
            raise Fault("this is not an object with keys", "entry")
        talk = normal_turns(row.value)
        contents: dict[str, Content] = {}
        below = "" if row.path.parent == above else os.fspath(row.path.parent.relative_to(above))
        items = tuple(ItemName(item.mark, _named(item, contents, below, beside)) for item in talk.items)
        if broken or not _utf8(*(text for item in items for text in item)):
            raise Fault("an id or an image path that is not UTF-8", "encoding")
    except (Fault, RecursionError) as error:
        fault = error if isinstance(error, Fault) else Fault("it is nested too deep", "entry")
        return Entry(number, id, (), [], Fault(f"{where}: {fault}", fault.kind, id))
    first = seen.setdefault(id, number)
    again = Fault(f"{where} has the id of entry {first}", "duplicate_id", id) if first != number else None
    return Entry(number, id, items, talk.turns, again, contents)


def _named(item: Item, contents: dict[str, Content], below: str, beside: bool) -> str:
    """The name of an item's file; where the row holds it, it goes into `contents`. below: the folder of the row."""
    file = item.file
    if isinstance(file, dict):  # Hugging Face's, and OpenAI's, also {"data": base64, "format": "wav"}
        data = f"data:;base64,{file['data']}" if isinstance(file.get("data"), str) else None
        file = next((file[key] for key in ("bytes", "path", "url") if file.get(key)), data)
    if isinstance(file, str) and file.startswith("data:"):
        file = _decoded(file)
    if isinstance(file, Span):
        file = file._replace(below=below)
        contents[file.name] = file
        return file.name
    if isinstance(file, bytes) and file:
        name = f"bytes {hashlib.sha256(file).hexdigest()[:32]}"  # the same file is kept once
        contents[name] = file
        return name
    if not isinstance(file, str) or not file:
        raise Fault(f"{item.kind} must be a path or a list of paths, or bytes, not {file!r:.60}", "entry")
    if len(file) > MOST_NAME:
        raise Fault(f"an {item.kind} path of {len(file)} characters, {file[:40]}...", "entry")
    if len(item.medium) > MOST_NAME:
        raise Fault(f"a medium's name of {len(item.medium)} characters, {item.medium[:40]}...", "entry")
    return os.path.join(below, file) if beside and "://" not in file else file


def _decoded(url: str) -> bytes:
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise Fault(f"a data: URL, {url[:40]}..., that cannot be read: {error}", "entry") from error


def _utf8(*texts: str) -> bool:
    """Whether all texts can be written as UTF-8; not where JSON spells half of a surrogate pair."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True
