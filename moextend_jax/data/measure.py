"""What conversations come to as tokens: a source and how a stage reads it in; lengths, items and faults out.

No picture is opened and no array is made for a batch: this is what a run looks at before its first step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import NamedTuple

import numpy as np

from moextend_jax.config import IMAGE, Medium, Named, Recipe
from moextend_jax.data.batches import WINDOW, encode_example
from moextend_jax.data.conversations import Encoded
from moextend_jax.data.datasets import CHUNK, Source
from moextend_jax.data.inspector import UNLIMITED
from moextend_jax.data.packing import Sample, Shape, pack
from moextend_jax.data.readers import Inputs
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.faults import Fault
from moextend_jax.settings import FaultSettings, Parts, StageSettings

ROUNDED = 16
"""Lengths that are not set are multiples of it."""


class Measured(NamedTuple):
    """Sizes of conversations. tokens_n: tokens of each one without a fault; items_n: its items of each medium. refused:
    the first faults whose policy is `error`, by kind; counts: how many of each; skipped: how many other faults."""

    tokens_n: np.ndarray
    items_n: dict[str, np.ndarray]
    refused: dict[str, Fault]
    counts: Counter[str]
    skipped: int

    @property
    def read(self) -> int:
        """How many were looked at."""
        return len(self.tokens_n) + self.skipped + self.counts.total()

    @property
    def length(self) -> int:
        """Tokens of the longest, rounded up."""
        return -(-int(self.tokens_n.max(initial=1)) // ROUNDED) * ROUNDED

    def filled(self, stage: StageSettings) -> StageSettings:
        """The stage's settings with the length and the numbers of items that it leaves to be found."""
        items = {name: stage.items_per_row.get(name) or self.most(name) for name in self.items_n if name != IMAGE}
        return dataclasses.replace(
            stage,
            length=stage.length or self.length,
            images_per_row=stage.images_per_row or self.most(IMAGE),
            items_per_row={name: count for name, count in items.items() if count},
        )

    def most(self, medium: str) -> int:
        """Items of the conversation with the most of a medium; 0 where none has any: then batches hold none of it."""
        return int(self.items_n[medium].max(initial=0)) if medium in self.items_n else 0


def measure(
    source: Source,
    *,
    stage: StageSettings,
    tokenizer: Tokenizer,
    recipe: Recipe,
    media: Named[Medium],
    faults: FaultSettings,
    parts: Parts = "conversation",
    most: int | None = None,
) -> Measured:
    """Encodes conversations as `batches.batches` does; a length or a number of items that is 0 limits nothing.

    Args:
      most: look at only so many, evenly spaced; None: at all.
    """
    rows = (
        np.arange(len(source)) if most is None else np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    )
    tokens, skipped = [], 0
    items: dict[str, list[int]] = {name: [] for name in media}
    refused: dict[str, Fault] = {}
    counts: Counter[str] = Counter()

    encode = functools.partial(
        encode_example,
        stage=dataclasses.replace(
            stage,
            length=stage.length or UNLIMITED,
            images_per_row=stage.images_per_row or UNLIMITED,
            items_per_row={name: stage.room(name) or UNLIMITED for name in media if name != IMAGE},
        ),
        tokenizer=tokenizer,
        recipe=recipe,
        readers={
            name: Inputs(items=source.items[name], medium=medium, preparation=recipe.image_preparation)
            for name, medium in media.items()
        },
        faults=faults,
        parts=parts,
    )
    for first in range(0, len(rows), CHUNK):
        for example in source.read(rows[first : first + CHUNK]):
            try:
                row = encode(example).encoded
                tokens.append(len(row.ids_L))
                for name, counts_n in items.items():
                    counts_n.append(row.items.get(name, 0))
            except Fault as fault:
                if faults.skips(fault):
                    skipped += 1
                else:
                    refused.setdefault(fault.kind, fault)
                    counts[fault.kind] += 1
    return Measured(
        np.array(tokens, int), {name: np.array(of, int) for name, of in items.items()}, refused, counts, skipped
    )


def rows_per_conversation(measured: Measured, *, stage: StageSettings, media: Named[Medium]) -> float:
    """How many rows of a stage a conversation takes: 1 where each has a row of its own, else what packing comes to."""
    if stage.conversations_per_row == 1 or not len(measured.tokens_n):
        return 1.0
    order = np.random.default_rng(0).permutation(len(measured.tokens_n))
    items = [
        _blank(int(measured.tokens_n[n]), {name: int(items_n[n]) for name, items_n in measured.items_n.items()})
        for n in order
    ]
    rooms = {name: medium.room(stage.room(name)) for name, medium in media.items()}
    shape = Shape(stage.length, {name: room for name, room in rooms.items() if room.items}, tuple(media))
    rows = sum(
        len(pack(items[first : first + WINDOW], shape=shape, conversations_per_row=stage.conversations_per_row))
        for first in range(0, len(items), WINDOW)
    )
    return rows / len(items)


def _blank(tokens: int, items: dict[str, int]) -> Sample:
    ids_L = np.zeros(tokens, np.int32)
    nowhere_L = np.full_like(ids_L, -1)
    return Sample(Encoded(ids_L, ids_L, nowhere_L, ids_L, items), {name: [0] * count for name, count in items.items()})
