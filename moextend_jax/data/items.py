"""Images, sounds and other items of a data set by row number: built rows and a folder in, encoded files and what is in
them out.

Bytes are read only when asked for: out of the row, out of a tar file, or from the item's file, which is looked at
whenever the data set is opened. A data set has one `Items` for each medium.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from moextend_jax.config import Medium, MediumKind
from moextend_jax.data.builders import NO_ITEM, Built
from moextend_jax.data.item_files import ItemFolder, read_span
from moextend_jax.data.shards import Span
from moextend_jax.faults import Fault
from moextend_jax.media import KINDS, PICTURE


class EncodedItem(NamedTuple):
    key: str
    encoded: bytes


class DecodedItem(NamedTuple):
    """item: what `media.KINDS[kind].decode` gives: a picture, a waveform, ..."""

    key: str
    item: Any


@dataclass(frozen=True)
class Items(Sequence[EncodedItem]):
    """Encoded files of one medium by row number; picklable.

    `faults`: what was wrong with some when the data set was opened. `folder` has the files that rows name. `upright`:
    whether pictures are turned as their EXIF orientation says. `cut`: whether a sound that is too long is cut to its
    beginning. `fingerprint` changes with these two and with any item: with the bytes of items inside rows; with names,
    sizes and times of files in a folder and the bytes of `SAMPLED` of them, but not with the folder's own place.
    """

    rows: Any
    faults: Mapping[int, Fault] = field(default_factory=dict)
    folder: ItemFolder | None = None
    fingerprint: str = ""
    upright: bool = False
    kind: MediumKind = "image"
    cut: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def noun(self) -> str:
        return KINDS[self.kind].noun

    def check(self, row: int) -> None:
        if row in self.faults:
            raise self.faults[row].again()

    def __getitem__(self, row: Any) -> EncodedItem:
        """Raises a `Fault` whose id is the key where the file cannot be read."""
        self.check(int(row))
        item = self.rows[int(row)]
        key = item["id"].decode()
        if item["span"]:
            return EncodedItem(key, read_span(Span(*json.loads(item["span"])), self.noun))
        if item["image"] or self.folder is None:
            return EncodedItem(key, bytes(item["image"]))
        return EncodedItem(key, self.folder.read(key, self.noun))

    def decoded(self, row: Any, medium: Medium = PICTURE) -> DecodedItem:
        """What is in the file, to be prepared for the medium's tower; raises a `Fault` as above, also where it is no
        file of its kind."""
        key, encoded = self[row]
        options: dict[str, Any] = {"medium": medium, "upright": self.upright, "cut": self.cut}
        return DecodedItem(key, KINDS[medium.kind].decode(encoded, name=f"{self.noun} {key}", id=key, **options))

    def span(self, row: Any, medium: Medium) -> int:
        """Tokens of an item. Only if they depend on its file, the file's header is read; then a `Fault` is raised as
        above."""
        if not medium.spans:
            return medium.span()
        key, encoded = self[row]
        options: dict[str, Any] = {"medium": medium, "cut": self.cut}
        return medium.span(KINDS[medium.kind].span_of_file(encoded, name=f"{self.noun} {key}", id=key, **options))


NAMES_AT_ONCE, FILES_AT_ONCE = 4096, 16
"""Rows that are read at once, where they hold no files and where they do."""
SAMPLED = 64
"""Number of files whose bytes are in a folder's fingerprint. Some archives set all times alike: a folder with other
items of the same names and sizes still gets another fingerprint."""


def look_at_items(built: Built, folder: ItemFolder, *, upright: bool, kind: MediumKind, cut: bool = False) -> Items:
    """The items of the rows, as they are now. Each item in a file costs one call of the file system; few files are
    read."""
    rows, faults = built.rows, {}
    digest = hashlib.sha256(f"{built.fingerprint} {upright}{' cut' if cut else ''}".encode())
    if built.stored == len(rows):
        return Items(rows, faults, folder, digest.hexdigest(), upright, kind, cut)
    size = FILES_AT_ONCE if built.stored else NAMES_AT_ONCE
    chunks = (range(first, min(first + size, len(rows))) for first in range(0, len(rows), size))
    items = [
        (row, item["id"].decode(), item["span"])
        for chunk in chunks
        for row, item in zip(chunk, rows.__getitems__(list(chunk)), strict=True)
        if not item["image"]
    ]
    if [name for _, name, _ in items] == [NO_ITEM]:
        return Items((), kind=kind)
    files = [(row, name) for row, name, span in items if not span]
    looked = folder.look((name for _, name in files), KINDS[kind].noun)
    for (row, name), file in zip(files, looked, strict=True):
        if isinstance(file, Fault):
            faults[row] = file
        state = file.kind if isinstance(file, Fault) else list(file)
        digest.update(json.dumps([name, state]).encode())
    opened = Items(rows, faults, folder, "", upright, kind, cut)
    for row, _, _ in items[:: -(-len(items) // SAMPLED)]:
        with contextlib.suppress(Fault):
            digest.update(hashlib.sha256(opened[row].encoded).digest())
    return replace(opened, fingerprint=digest.hexdigest())
