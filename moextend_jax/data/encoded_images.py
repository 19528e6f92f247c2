"""Images of a data set by row number: built rows and a folder in, encoded files and pictures out.

Bytes are read only when asked for: out of the row, out of a tar file, or from the image file, which is looked at
whenever the data set is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image

from moextend_jax.data.builders import NO_IMAGE, Built
from moextend_jax.data.faults import Fault
from moextend_jax.data.image_files import ImageFolder, read_span
from moextend_jax.data.images import decode_image
from moextend_jax.data.shards import Span


class EncodedImage(NamedTuple):
    key: str
    encoded: bytes


class DecodedImage(NamedTuple):
    key: str
    picture: Image.Image


@dataclass(frozen=True)
class Images(Sequence[EncodedImage]):
    """Encoded image files by row number; picklable.

    `faults`: what was wrong with some when the data set was opened. `folder` has the files that rows name; None where
    the rows hold them. `fingerprint` changes when any image does: by the bytes of stored ones, by the names, sizes and
    times of files in a folder (and the bytes of `SAMPLED` of them), wherever the folder is; and with `upright`, whether
    pictures are turned as their EXIF orientation says.
    """

    rows: Any
    faults: Mapping[int, Fault] = field(default_factory=dict)
    folder: ImageFolder | None = None
    fingerprint: str = ""
    upright: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, row: int) -> None:
        if row in self.faults:
            raise self.faults[row].again()

    def __getitem__(self, row: Any) -> EncodedImage:
        """Raises a `Fault` whose id is the key where the image cannot be read."""
        self.check(int(row))
        item = self.rows[int(row)]
        key = item["id"].decode()
        if item["span"]:
            return EncodedImage(key, read_span(Span(*json.loads(item["span"]))))
        if item["image"] or self.folder is None:
            return EncodedImage(key, bytes(item["image"]))
        return EncodedImage(key, self.folder.read(key))

    def decoded(self, row: Any) -> DecodedImage:
        """The picture as RGB; raises a `Fault` as above, also where it is none."""
        key, encoded = self[row]
        return DecodedImage(key, decode_image(encoded, name=f"image {key}", id=key, upright=self.upright))


NAMES_AT_ONCE, PICTURES_AT_ONCE = 4096, 16
"""Rows that are read at once, where they hold no pictures and where they do."""
SAMPLED = 64
"""Image files whose bytes are in a folder's fingerprint: where archives set all times to one, a folder with other
pictures of the same names and sizes still has another."""


def look_at_images(built: Built, folder: ImageFolder, upright: bool) -> Images:
    """The images of the rows, as they are now: one question to the file system for each that is a file, few are
    read."""
    rows, digest, faults = built.rows, hashlib.sha256(f"{built.fingerprint} {upright}".encode()), {}
    if built.stored == len(rows):
        return Images(rows, faults, folder, digest.hexdigest(), upright)
    size = PICTURES_AT_ONCE if built.stored else NAMES_AT_ONCE
    chunks = (range(first, min(first + size, len(rows))) for first in range(0, len(rows), size))
    items = [
        (row, item["id"].decode(), item["span"])
        for chunk in chunks
        for row, item in zip(chunk, rows.__getitems__(list(chunk)), strict=True)
        if not item["image"]
    ]
    if [name for _, name, _ in items] == [NO_IMAGE]:
        return Images(())
    files = [(row, name) for row, name, span in items if not span]
    for (row, name), file in zip(files, folder.look(name for _, name in files), strict=True):
        if isinstance(file, Fault):
            faults[row] = file
        state = file.kind if isinstance(file, Fault) else list(file)
        digest.update(json.dumps([name, state]).encode())
    images = Images(rows, faults, folder, "", upright)
    for row, _, _ in items[:: -(-len(items) // SAMPLED)]:
        with contextlib.suppress(Fault):
            digest.update(hashlib.sha256(images[row].encoded).digest())
    return replace(images, fingerprint=digest.hexdigest())
