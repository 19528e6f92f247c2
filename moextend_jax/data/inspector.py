"""What is wrong with rows and with items' files: the work of one process of `moextend data check`.

Goes in: a chunk of entries, or of items. Comes out: what was found, small enough to send back. Nothing here
raises, whatever the data, and nothing imports the training libraries: a worker process starts in a moment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from PIL import Image

from moextend_jax.config import IMAGE, Medium, MoextendError, Named, Recipe
from moextend_jax.data.conversations import encode_prompt, encode_row, shown_first, talk_of
from moextend_jax.data.entries import Content, Entry, ItemName
from moextend_jax.data.item_files import read_span
from moextend_jax.data.shards import Span
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.faults import Fault, unknown_medium
from moextend_jax.media import KINDS
from moextend_jax.media.image import check_scaled, tower_of
from moextend_jax.settings import Parts, StageSettings

UNLIMITED = 1 << 30
"""A length that everything fits."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How stages of a run read a data set; what several read alike is looked at once. `parts` is `prompt` for questions
    that are only asked. A length or a number of images that is 0 is found in the data, so that all fit."""

    stages: tuple[str, ...] = ()
    data: str
    split: str
    length: int
    images_per_row: int = 1
    items_per_row: tuple[tuple[str, int], ...] = ()
    too_long: Literal["error", "drop_turns"] = "error"
    parts: Parts | Literal["prompt"] = "conversation"

    @classmethod
    def of(cls, stage: StageSettings, data: StageSettings, *, parts: Parts) -> Reading:
        """Of a stage that reads the data of a stage, perhaps another one."""
        return cls(
            data=data.data,
            split=data.split,
            length=min(stage.length or UNLIMITED, stage.conversation_length or UNLIMITED) % UNLIMITED,
            images_per_row=stage.images_per_row,
            items_per_row=tuple(sorted(stage.items_per_row.items())),
            too_long=stage.too_long,
            parts=parts,
        )


class ItemFile(NamedTuple):
    """An item to look at, of the medium whose mark is `mark`. content: where its row holds it; None where it is one of
    the data set's files."""

    mark: str
    name: str
    content: Content | None = None

    def read(self, files: Any, noun: str) -> bytes:
        """files: of `Work`. noun: what messages call the item."""
        if isinstance(self.content, Span):
            return read_span(self.content, noun)
        return files.read(self.name, noun) if self.content is None else self.content


class RowsOf(NamedTuple):
    """Whose rows they are: the number of the reading, and the name of the set of its items' files."""

    reading: int
    files: str


class PlacedFault(NamedTuple):
    """A fault of one of the items that an `Inspector` was given; `place` is the item's index among them."""

    place: int
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process needs to know; `check.check` fills in readings and files. media: of the model; cut: whether a
    sound that is too long is cut to its beginning."""

    tokenizer: Tokenizer
    recipe: Recipe
    media: Named[Medium]
    readings: tuple[Reading, ...] = ()
    files: dict[str, Any] = field(default_factory=dict)
    """By the name of a set of items what reads them by their names, `item_files.ItemFolder` or `check.BuiltFiles`."""
    cut: bool = False


class Inspector:
    """Checks rows and items for the readings of one `Work`."""

    def __init__(self, work: Work):
        self.work = work
        self.names = {medium.mark: name for name, medium in work.media.items()}

    def rows(self, entries: Sequence[Entry], what: RowsOf) -> list[PlacedFault]:
        """What a reading would refuse; at most one fault of each entry's turns, besides one of its form."""
        faults, reading = [], self.work.readings[what.reading]
        for place, entry in enumerate(entries):
            if entry.fault is not None:
                faults.append(PlacedFault(place, entry.fault.kind, str(entry.fault)))
                if entry.fault.kind != "duplicate_id":
                    continue
            unknown = unknown_medium(entry.id, (item.mark for item in entry.items), self.work.media)
            if unknown is not None:
                faults.append(PlacedFault(place, unknown.kind, str(unknown)))
                continue
            try:
                self._encode(entry, reading, self.work.files[what.files])
            except Fault as fault:
                faults.append(PlacedFault(place, fault.kind, str(fault)))
            except Exception as error:  # that would be a bug, and still a row to look at
                faults.append(PlacedFault(place, "entry", f"example {entry.id}: {type(error).__name__}: {error}"))
        return faults

    def _encode(self, entry: Entry, reading: Reading, files: Any) -> None:
        prompt_only = reading.parts == "prompt"
        spans: dict[str, list[int]] = {}
        for item in entry.items:
            name = self.names[item.mark]
            spans.setdefault(name, []).append(self._span(item, entry, self.work.media[name], files))
        most = {} if prompt_only else {IMAGE: reading.images_per_row, **dict(reading.items_per_row)}
        encode_row(
            entry.turns,
            example_id=entry.id,
            items=spans,
            tokenizer=self.work.tokenizer,
            recipe=self.work.recipe,
            length=(0 if prompt_only else reading.length) or UNLIMITED,
            rooms={name: self.work.media[name].room(most.get(name) or len(of)) for name, of in spans.items()},
            too_long=reading.too_long,
        )
        if not prompt_only:
            return
        try:
            talk = talk_of(entry.turns, example_id=entry.id, items=spans, tokenizer=self.work.tokenizer)
            question = talk.pairs[0][0]
            prompt = encode_prompt(
                question,
                items=shown_first(question, spans, self.work.tokenizer),
                system=talk.system,
                tokenizer=self.work.tokenizer,
                recipe=self.work.recipe,
            )
        except MoextendError as error:
            raise Fault(f"question {entry.id}: {error}", "marks", entry.id) from error
        if reading.length and len(prompt.ids_L) > reading.length:
            message = f"question {entry.id}: a prompt of {len(prompt.ids_L)} tokens does not fit {reading.length}"
            raise Fault(message, "too_long", entry.id)

    def _span(self, item: ItemName, entry: Entry, medium: Medium, files: Any) -> int:
        """Tokens of an item; the most possible if its file is faulty: that fault is reported for the file."""
        if not medium.spans:
            return medium.tokens
        kind, name, cut = KINDS[medium.kind], item.name, self.work.cut
        try:
            encoded = ItemFile(*item, entry.contents.get(name)).read(files, kind.noun)
            return medium.span(kind.span_of_file(encoded, name=f"{kind.noun} {name}", id=name, medium=medium, cut=cut))
        except Fault:
            return medium.tokens

    def items(self, items: Sequence[ItemFile], files: str) -> list[PlacedFault]:
        """What decoding and preparing items would refuse; `files` names their set in the work's `files`."""
        faults = []
        for place, item in enumerate(items):
            if item.mark not in self.names:  # the conversation has the fault
                continue
            medium = self.work.media[self.names[item.mark]]
            noun = KINDS[medium.kind].noun
            try:
                self._prepare(item.read(self.work.files[files], noun), medium, noun, item.name)
            except Fault as fault:
                faults.append(PlacedFault(place, fault.kind, str(fault)))
            except Exception as error:
                message = f"{noun} {item.name}: {type(error).__name__}: {error}"
                faults.append(PlacedFault(place, "unreadable", message))
        return faults

    def _prepare(self, encoded: bytes, medium: Medium, noun: str, name: str) -> None:
        item = KINDS[medium.kind].decode(encoded, name=f"{noun} {name}", id=name, medium=medium, cut=self.work.cut)
        pictures = (item,) if medium.kind == "image" else item if medium.kind == "video" else ()
        for picture in pictures:
            tower, preparation = tower_of(medium), self.work.recipe.image_preparation
            check_scaled(*picture.size, size=tower.image_size, preparation=preparation, tower=tower, id=name)


# --- in a process of its own ------------------------------------------------------------------------------------------

_inspector: Inspector | None = None


def start(work: Work) -> None:
    global _inspector
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is an error of ours
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C write about damaged files there
    _inspector = Inspector(work)


def do(method: Literal["rows", "items"], items: Sequence[Any], what: Any) -> list[PlacedFault]:
    assert _inspector is not None
    return getattr(_inspector, method)(items, what)
