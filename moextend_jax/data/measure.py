"""What conversations come to as tokens: a source and how a stage reads it in; lengths, pictures and faults out.

No picture is opened and no array is made for a batch: this is what a run looks at before its first step.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from moextend_jax.config import Recipe
from moextend_jax.data.batches import WINDOW
from moextend_jax.data.conversations import Encoded, encode_row
from moextend_jax.data.datasets import CHUNK, Example, Source
from moextend_jax.data.faults import Fault
from moextend_jax.data.inspector import UNLIMITED
from moextend_jax.data.packing import Item, pack
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.settings import FaultSettings, StageSettings

ROUNDED = 16
"""Lengths that are not set are multiples of it."""


class Measured(NamedTuple):
    """Of the sound ones among some conversations: tokens_n of each and its pictures_n. refused: the first faults whose
    policy is `error`, by kind; counts: of these; skipped: how many of the others."""

    tokens_n: np.ndarray
    pictures_n: np.ndarray
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

    @property
    def pictures(self) -> int:
        """Of the conversation with the most; 1 where none has any."""
        return int(self.pictures_n.max(initial=1))


def measure(
    source: Source,
    *,
    stage: StageSettings,
    tokenizer: Tokenizer,
    recipe: Recipe,
    patches: int,
    faults: FaultSettings,
    parts: Literal["conversation", "bare_question"] = "conversation",
    most: int | None = None,
) -> Measured:
    """Encodes conversations as `batches.batches` does; a length or a number of pictures that is 0 limits nothing.

    Args:
      most: look at so many only, at even distances; None: at all.
    """
    rows = (
        np.arange(len(source)) if most is None else np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    )
    tokens, pictures, skipped = [], [], 0
    refused: dict[str, Fault] = {}
    counts: Counter[str] = Counter()

    def encoded(example: Example) -> Encoded:
        if example.fault is not None and faults.policy(example.fault.kind) != "keep":
            raise example.fault.again()
        for ref in example.images:
            source.images.check(ref.row)
        return encode_row(
            example.conversations,
            example_id=example.id,
            images=len(example.images),
            tokenizer=tokenizer,
            recipe=recipe,
            patches=patches,
            length=min(stage.length or UNLIMITED, stage.conversation_length or UNLIMITED),
            images_per_row=stage.images_per_row or len(example.images),
            too_long=stage.too_long,
            parts=parts,
        )

    for first in range(0, len(rows), CHUNK):
        for example in source.read(rows[first : first + CHUNK]):
            try:
                row = encoded(example)
                tokens.append(len(row.ids_L))
                pictures.append(row.images)
            except Fault as fault:
                if faults.skips(fault):
                    skipped += 1
                else:
                    refused.setdefault(fault.kind, fault)
                    counts[fault.kind] += 1
    return Measured(np.array(tokens, int), np.array(pictures, int), refused, counts, skipped)


def rows_per_conversation(measured: Measured, *, stage: StageSettings, patches: int) -> float:
    """How many rows of a stage a conversation takes: 1 where each has a row of its own, else what packing comes to."""
    if stage.conversations_per_row == 1 or not len(measured.tokens_n):
        return 1.0
    order = np.random.default_rng(0).permutation(len(measured.tokens_n))
    items = [_blank(int(measured.tokens_n[n]), int(measured.pictures_n[n])) for n in order]
    rows = sum(
        len(
            pack(
                items[first : first + WINDOW],
                length=stage.length,
                images_per_row=stage.images_per_row,
                patches=patches,
                conversations_per_row=stage.conversations_per_row,
            )
        )
        for first in range(0, len(items), WINDOW)
    )
    return rows / len(items)


def _blank(tokens: int, pictures: int) -> Item:
    ids_L = np.zeros(tokens, np.int32)
    return Item(Encoded(ids_L, ids_L, ids_L, ids_L, pictures), [0] * pictures)
