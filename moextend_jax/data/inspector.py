"""What is wrong with rows and with images: the work of one process of `moextend data check`.

Goes in: a chunk of entries, or of image names. Comes out: what was found, small enough to send back. Nothing here
raises, whatever the data, and nothing imports the training libraries: a worker process starts in a moment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from moextend_jax.config import MoextendError, Recipe
from moextend_jax.data.conversations import encode_prompt, encode_row, talk_of
from moextend_jax.data.entries import Content, Entry
from moextend_jax.data.faults import Fault
from moextend_jax.data.image_files import read_span
from moextend_jax.data.images import check_scaled, decode_image
from moextend_jax.data.shards import Span
from moextend_jax.data.tokenizer import Tokenizer

UNLIMITED = 1 << 30
"""A length that everything fits."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How stages of a run read a data set. `parts` is `prompt` for questions that are only asked. A length or a number
    of images that is 0 is found in the data, so that all fit."""

    stages: tuple[str, ...]
    data: str
    split: str
    length: int
    images_per_row: int = 1
    too_long: Literal["error", "drop_turns"] = "error"
    parts: Literal["conversation", "prompt"] = "conversation"


class ImageFiles(Protocol):
    """Where a data set's images come from, by name."""

    def read(self, name: str) -> bytes: ...


class Picture(NamedTuple):
    """An image to look at. content: where its row holds it; None where it is one of the data set's image files."""

    name: str
    content: Content | None = None

    def read(self, files: ImageFiles) -> bytes:
        if isinstance(self.content, Span):
            return read_span(self.content)
        return files.read(self.name) if self.content is None else self.content


class PlacedFault(NamedTuple):
    """A fault of one of the items that an `Inspector` was given; `place` is the item's index among them."""

    place: int
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process needs to know. patches: positions that an image takes (P); size: the tower's pixels per side."""

    tokenizer: Tokenizer
    recipe: Recipe
    patches: int
    size: int
    readings: tuple[Reading, ...]
    files: dict[str, Any]
    """`ImageFiles` by the name of an image set."""


class Inspector:
    """Checks rows and images for the readings of one `Work`."""

    def __init__(self, work: Work):
        self.work = work

    def rows(self, entries: Sequence[Entry], which: int) -> list[PlacedFault]:
        """What `readings[which]` would refuse; at most one fault of each entry's turns, besides one of its form."""
        faults = []
        for place, entry in enumerate(entries):
            if entry.fault is not None:
                faults.append(PlacedFault(place, entry.fault.kind, str(entry.fault)))
                if entry.fault.kind != "duplicate_id":
                    continue
            try:
                self._encode(entry, self.work.readings[which])
            except Fault as fault:
                faults.append(PlacedFault(place, fault.kind, str(fault)))
            except Exception as error:  # that would be a bug, and still a row to look at
                faults.append(PlacedFault(place, "entry", f"example {entry.id}: {type(error).__name__}: {error}"))
        return faults

    def _encode(self, entry: Entry, reading: Reading) -> None:
        prompt_only = reading.parts == "prompt"
        encode_row(
            entry.turns,
            example_id=entry.id,
            images=len(entry.images),
            tokenizer=self.work.tokenizer,
            recipe=self.work.recipe,
            patches=self.work.patches,
            length=(0 if prompt_only else reading.length) or UNLIMITED,
            images_per_row=(0 if prompt_only else reading.images_per_row) or len(entry.images),
            too_long=reading.too_long,
        )
        if not prompt_only:
            return
        try:
            talk = talk_of(entry.turns, example_id=entry.id, images=len(entry.images))
            prompt = encode_prompt(
                talk.pairs[0][0],
                images=len(entry.images),
                system=talk.system,
                tokenizer=self.work.tokenizer,
                recipe=self.work.recipe,
                patches=self.work.patches,
            )
        except MoextendError as error:
            raise Fault(f"question {entry.id}: {error}", "marks", entry.id) from error
        if reading.length and len(prompt.ids_L) > reading.length:
            message = f"question {entry.id}: a prompt of {len(prompt.ids_L)} tokens does not fit {reading.length}"
            raise Fault(message, "too_long", entry.id)

    def images(self, pictures: Sequence[Picture], files: str) -> list[PlacedFault]:
        """What decoding and preparing images would refuse; `files` names their set in the work's `files`."""
        faults = []
        for place, item in enumerate(pictures):
            name = item.name
            try:
                picture = decode_image(item.read(self.work.files[files]), name=f"image {name}", id=name)
                check_scaled(
                    *picture.size, size=self.work.size, preparation=self.work.recipe.image_preparation, id=name
                )
            except Fault as fault:
                faults.append(PlacedFault(place, fault.kind, str(fault)))
            except Exception as error:
                faults.append(PlacedFault(place, "unreadable", f"image {name}: {type(error).__name__}: {error}"))
        return faults


# --- in a process of its own ------------------------------------------------------------------------------------------

_inspector: Inspector | None = None


def start(work: Work) -> None:
    global _inspector
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is an error of ours
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C write about damaged files there
    _inspector = Inspector(work)


def do(method: Literal["rows", "images"], items: Sequence[Any], what: Any) -> list[PlacedFault]:
    assert _inspector is not None
    return getattr(_inspector, method)(items, what)
