"""Conversations of files of any form, one at a time: little memory for files of a gigabyte, and nothing that is wrong
ends it.

Goes in: files of a form of `data/forms.py`. Comes out: `Entry`s in order, each with the `Fault` that its own form has;
what the turns say is checked where they are encoded (`data/conversations.py`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.faults import Fault
from moextend_jax.data.forms import form_of
from moextend_jax.data.json_values import Row
from moextend_jax.data.shards import Span
from moextend_jax.data.tables import NOT_UTF8
from moextend_jax.data.talks import talk_of

SHOWN = 20
"""Invalid bytes of an entry whose places its fault names."""
MOST_NAME = 1000
"""Characters of a path."""

Content = bytes | Span
"""An encoded picture that is not a file of its own."""


class Entry(NamedTuple):
    """`fault` is None where the entry can be read; one that cannot has no images and no turns. `number` counts from
    0. images: paths, or names of `contents`."""

    number: int
    id: str
    images: tuple[str, ...]
    turns: list[Any]
    fault: Fault | None
    contents: Mapping[str, Content] = {}


def read_entries(*paths: Path) -> Iterator[Entry]:
    """All entries of all files, in order.

    Raises:
      MoextendError: a file cannot be read, is not of its form from some place on, or there are no entries.
    """
    seen: dict[str, int] = {}
    number = -1
    for number, row in enumerate(row for path in paths for row in form_of(path).read(path)):
        yield _entry(number, row, seen)
    if number < 0:
        more = f" and {len(paths) - 1} more files" if paths[1:] else ""
        raise MoextendError(f"{paths[0]}{more} holds no entries; it must be a list of conversations")


def _entry(number: int, row: Row, seen: dict[str, int]) -> Entry:
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
        talk = talk_of(row.value)
        contents: dict[str, Content] = {}
        images = tuple(_named(image, contents) for image in talk.images)
        if broken or not _utf8(*images):
            raise Fault("an id or an image path that is not UTF-8", "encoding")
    except Fault as fault:
        return Entry(number, id, (), [], Fault(f"{where}: {fault}", fault.kind, id))
    first = seen.setdefault(id, number)
    again = Fault(f"{where} has the id of entry {first}", "duplicate_id", id) if first != number else None
    return Entry(number, id, images, talk.turns, again, contents)


def _named(image: Any, contents: dict[str, Content]) -> str:
    """The name of a picture; where the row holds it, it goes into `contents`."""
    if isinstance(image, dict):  # Hugging Face's, and OpenAI's
        image = next((image[key] for key in ("bytes", "path", "url") if image.get(key)), None)
    if isinstance(image, str) and image.startswith("data:"):
        image = _decoded(image)
    if isinstance(image, Span):
        contents[image.name] = image
        return image.name
    if isinstance(image, bytes) and image:
        name = f"bytes {hashlib.sha256(image).hexdigest()[:32]}"  # the same picture is kept once
        contents[name] = image
        return name
    if not isinstance(image, str) or not image:
        raise Fault(f"image must be a path or a list of paths, or bytes, not {image!r:.60}", "entry")
    if len(image) > MOST_NAME:
        raise Fault(f"an image path of {len(image)} characters, {image[:40]}...", "entry")
    return image


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
