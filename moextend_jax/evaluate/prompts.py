"""Prompts of many lengths to batches of few shapes: `Prompt`s in, a plan of `Work`, the same in every process, out.

A prompt goes through programs that its own two lengths choose, never its neighbours, so that its answer is the same
whatever is asked beside it: its head is padded to a bucket and its tail to another, and each pair of buckets has one
number of rows. Prompts that share a head stand side by side, so that it is read once for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.config import Batch, MoextendError, Rooms, first_places
from moextend_jax.data.conversations import in_row, text_batch
from moextend_jax.data.readers import given
from moextend_jax.generate import ALIGNED_ROWS

SMALLEST = 8
"""Tokens of the smallest bucket."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Token ids `[L]`: first the `head`, which is read once for all prompts that have the same `ids_L[:head]` and
    `items`, then the tail.

    places_L, fused: as in `Encoded`, of these items, all of which lie in the head.
    items: by medium rows of what the asker reads them from; media of which there is none are left out.
    targets_L: for each position of the tail, the id that should come after it (scoring); -100 for none.
    where: names the prompt in messages.
    """

    ids_L: np.ndarray
    places_L: np.ndarray
    head: int = 0
    items: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    targets_L: np.ndarray | None = None
    where: str = "prompt"

    @property
    def tail(self) -> int:
        return len(self.ids_L) - self.head


class Work(NamedTuple):
    """One batch: `rows` rows in each of the parts that the mesh makes of it, heads padded to `head_length` tokens and
    tails to `tail_length`, all with items of the same `media`.

    heads_at_once: heads of a part that are read together, as one batch.
    prompts: for each part, indices of the prompts in its rows.
    heads: for each part, the index of one prompt with each different head.
    head_of: for each part and each of its prompts, which of the part's `heads` it has.
    """

    media: tuple[str, ...]
    head_length: int
    tail_length: int
    rows: int
    heads_at_once: int
    prompts: list[list[int]]
    heads: list[list[int]]
    head_of: list[list[int]]

    @property
    def readings(self) -> int:
        """How many batches of `heads_at_once` heads per part are read."""
        return -(-max(map(len, self.heads)) // self.heads_at_once) if self.head_length else 0


def bucket(length: int, *, per_octave: int = 4) -> int:
    """The smallest of 8, 10, 12, 14, 16, 20, ... that is no less than `length`.

    There are `per_octave` of them from each power of two to the next. Four pad by an eighth on average, and lengths up
    to n need 4 log2(n / 8) programs.
    """
    top = SMALLEST
    while top < length:
        top *= 2
    step = max(top // 2 // per_octave, 1)
    return max(SMALLEST, -(-length // step) * step)


def plan(prompts: Sequence[Prompt], *, parts: int, rows: int, tokens: int, room: int = 0) -> list[Work]:
    """All prompts in batches, those of like lengths and of the same media together.

    Args:
      parts: how many parts the mesh makes of a batch's rows.
      rows: most rows of a part; it gets a multiple of ALIGNED_ROWS, at least ALIGNED_ROWS.
      tokens: most positions of a part, padding and `room` included, unless ALIGNED_ROWS rows have more.
      room: positions that every row keeps for new tokens.

    Raises:
      MoextendError: a prompt's tail has no tokens.
    """
    first_with: dict[object, int] = {}
    order = []
    for n, prompt in enumerate(prompts):
        if prompt.tail < 1:
            raise MoextendError(f"{prompt.where}: a prompt without tokens")
        head = (prompt.ids_L[: prompt.head].tobytes(), tuple(prompt.items.items())) if prompt.head else ()
        order.append(((tuple(prompt.items), *buckets(prompt)), first_with.setdefault(head, n), n))
    order.sort()
    works, start = [], 0
    while start < len(order):
        shape = order[start][0]
        in_part = rows_of(sum(shape[1:]) + room, rows=rows, tokens=tokens)
        items = [entry[1:] for entry in order[start : start + parts * in_part] if entry[0] == shape]
        works.append(_work(shape, items, parts=parts, rows=in_part))
        start += len(items)
    return works


def buckets(prompt: Prompt) -> tuple[int, int]:
    """Lengths of its head and its tail as they are padded. Tails behind a head are short, and tails of two buckets do
    not share one: there buckets are coarse (and padding costs no expert)."""
    if prompt.head:
        return bucket(prompt.head), bucket(prompt.tail, per_octave=1)
    return 0, bucket(prompt.tail, per_octave=2)


def rows_of(length: int, *, rows: int, tokens: int) -> int:
    """Rows of a part for prompts of `length` tokens: a multiple of ALIGNED_ROWS, at least ALIGNED_ROWS."""
    return max(1, min(rows, tokens // length) // ALIGNED_ROWS) * ALIGNED_ROWS


def rooms_of_prompts(prompts: Sequence[Prompt], readers: Mapping[str, Any]) -> Rooms:
    """What rows of these prompts hold of each medium that one of them has."""
    most = {name: max((len(prompt.items.get(name, ())) for prompt in prompts), default=0) for name in readers}
    return {name: reader.medium.room(most[name]) for name, reader in readers.items() if most[name]}


def prompt_batch(
    prompts: Mapping[int, Prompt], *, readers: Mapping[str, Any], rooms: Rooms, media: Sequence[str],
    rows: int, length: int, heads: bool = False,
) -> Batch:  # fmt: skip
    """Prompts by their row, whole or their `heads` alone, padded on the right to `length`, and to `rows` rows with
    empty ones. `rooms` holds all their items, which are read where their medium has a reader; media: by number
    (`conversations.MEDIUM`)."""
    batch = text_batch(*np.zeros((2, rows, length), np.int32))
    first = first_places(rooms)
    fused = {name: np.full_like(batch.places_BL, -1) for name, room in rooms.items() if room.fused}
    rows_BM = {name: np.full((rows, room.items), -1, np.int32) for name, room in rooms.items()}
    for row, prompt in prompts.items():
        count = prompt.head if heads else len(prompt.ids_L)
        batch.ids_BL[row, :count] = prompt.ids_L[:count]
        batch.segments_BL[row, :count] = 1
        batch.places_BL[row, :count] = in_row(prompt.places_L[:count], first=first, media=media)
        for name, of_L in prompt.fused.items():
            fused[name][row, :count] = in_row(of_L[:count], first=first, media=media)
        for name, items in prompt.items.items():
            rows_BM[name][row, : len(items)] = items
    arrays = {name: readers[name].read(of_BM) for name, of_BM in rows_BM.items() if name in readers}
    return given(batch._replace(fused=fused), readers, arrays)


def _work(shape: tuple[tuple[str, ...], int, int], items: list[tuple[int, int]], *, parts: int, rows: int) -> Work:
    """items: for each prompt (index of the first prompt with its head, its own index), equal heads side by side. shape:
    its media, and tokens of heads and of tails as padded."""
    each = -(-len(items) // parts)
    split = [items[part * each : (part + 1) * each] for part in range(parts)]
    heads = [list(dict.fromkeys(head for head, _ in part)) for part in split] if shape[1] else [[] for _ in split]
    return Work(
        media=shape[0],
        head_length=shape[1],
        tail_length=shape[2],
        rows=rows,
        heads_at_once=-(-rows // 8 // ALIGNED_ROWS) * ALIGNED_ROWS,
        prompts=[[n for _, n in part] for part in split],
        heads=heads,
        head_of=[
            [own_heads.index(head) for head, _ in part] if own_heads else []
            for part, own_heads in zip(split, heads, strict=True)
        ],
    )
