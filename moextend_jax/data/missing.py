"""Conversations that lack a medium now and then, so that a model learns to answer without it (TRML, 2401.13697).

In: `missing` {medium: probability}, and turns with the items of each medium. Out: which media a conversation lacks, and
the turns and items without them. The draw depends on the seed, the epoch, the conversation and the medium alone: not on
how many processes there are, where a run was resumed, or which other media have a probability.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


def media_left_out(missing: Mapping[str, float], *, seed: int, epoch: int, row: int) -> frozenset[str]:
    """Media that the conversation of a data set's row lacks in an epoch: each with its probability, by itself."""
    return frozenset(
        name
        for name, probability in missing.items()
        if np.random.default_rng([seed, epoch, row, zlib.crc32(name.encode())]).random() < probability
    )


def without_media(
    turns: Sequence[Any], items: Mapping[str, Sequence[Item]], *, marks: Mapping[str, str], out: Collection[str]
) -> tuple[list[Any], dict[str, Sequence[Item]]]:
    """Turns without the marks of the media `out`, and the items of all others.

    Args:
      turns: `{"from", "value"}` each; what is no such turn stays, for encoding to refuse.
      marks: medium to what stands for one of its items in text.
    """
    gone = [mark for name, mark in marks.items() if name in out]
    asked = [
        {**turn, "value": without_marks(turn["value"], gone)}
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        else turn
        for turn in turns
    ]
    return asked, {name: of for name, of in items.items() if name not in out}


def without_marks(text: str, marks: Iterable[str]) -> str:
    """The text without these marks, each with the line break behind it."""
    for mark in marks:
        text = text.replace(f"{mark}\n", "").replace(mark, "")
    return text
