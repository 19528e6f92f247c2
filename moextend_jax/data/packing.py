"""Conversations of different lengths into rows of one length; spans are never cut.

Goes in: a window of `Encoded` conversations, each with the row numbers of its items (images, ...). Comes out: `Row`s of
L tokens and M slots of each medium. A window is packed on its own, so the pipeline's place is just a window number.

A row takes the shortest conversation left and the others that fill it best, found exactly (a subset sum that prefers
short ones). Images make lengths so much alike that first-fit, longest first, leaves gaps that nothing fits: three to
five times the padding in rows of four or five conversations. `benchmarks/packing.py` has the figures, and how full
rows can be at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moextend_jax.config import IGNORE, IMAGE, Rooms, first_places
from moextend_jax.data.conversations import Encoded, in_row


class Sample(NamedTuple):
    """A conversation; of each medium the rows that its items are read from; `example` is its row in the data set."""

    encoded: Encoded
    rows: Mapping[str, Sequence[int]]
    example: int = -1


class Place(NamedTuple):
    """Where a row holds a conversation: its positions and its slots of each medium; and which one it is."""

    positions: slice
    slots: Mapping[str, slice]
    example: int = -1


class Row(NamedTuple):
    """As in `config.Batch`, for one row; `fused_L` and `item_rows_M` are by medium, and `item_rows_M` is -1 on empty
    slots. `places` are the row's conversations, in order; `faults_G` is None where nothing can be skipped."""

    ids_L: np.ndarray
    labels_L: np.ndarray
    positions_L: np.ndarray
    segments_L: np.ndarray
    places_L: np.ndarray
    fused_L: dict[str, np.ndarray]
    item_rows_M: dict[str, np.ndarray]
    places: tuple[Place, ...]
    faults_G: np.ndarray | None = None


class Shape(NamedTuple):
    """Of rows: their length, what they hold of each medium, and the media by number (`conversations.MEDIUM`)."""

    length: int
    rooms: Rooms = {}
    media: Sequence[str] = (IMAGE,)


def pack(samples: Sequence[Sample], *, shape: Shape, conversations_per_row: int) -> list[Row]:
    """Rows that hold every sample once; each must fit an empty row. `conversations_per_row` 0 is as many as fit.

    With one conversation per row the order is kept.
    """
    if conversations_per_row == 1:
        return [row_of([sample], shape) for sample in samples]
    # What a row has of each kind, and what a sample takes of it.
    of_media = [room.items for room in shape.rooms.values()]
    room, limited = np.array([conversations_per_row, *of_media, shape.length]), int(conversations_per_row > 0)
    takes = [
        np.array([limited, *(len(sample.rows.get(name, ())) for name in shape.rooms), len(sample.encoded.ids_L)])
        for sample in samples
    ]
    left = sorted(range(len(samples)), key=lambda n: takes[n][-1])
    rows = []
    while left:
        first, *left = left
        chosen = _best_fill([takes[n] for n in left], room - takes[first])
        rows.append(row_of([samples[n] for n in (first, *(left[k] for k in chosen))], shape))
        left = [n for k, n in enumerate(left) if k not in chosen]
    return rows


def _best_fill(takes: list[np.ndarray], room: np.ndarray) -> list[int]:
    """Which of `takes` to choose so that their sum is within `room` and its last entry, the length, is largest.

    `reached[k]` holds the sums that the first k can make; the search ends at the first k that fills the row.
    """
    room = np.minimum(room, np.sum([*takes, 0 * room], axis=0))  # media of which there are few, or none, take no memory
    reached = [np.zeros(room + 1, bool)]
    reached[0][(0,) * len(room)] = True
    for take in takes:
        if (take > room).any():
            reached.append(reached[-1])
            continue
        with_it = reached[-1].copy()
        with_it[tuple(slice(n, None) for n in take)] |= reached[-1][tuple(slice(0, n) for n in room + 1 - take)]
        reached.append(with_it)
        if with_it[..., -1].any():
            break
    sums = np.argwhere(reached[-1])
    total, chosen = sums[sums[:, -1].argmax()], []
    for k in reversed(range(len(reached) - 1)):
        if not reached[k][tuple(total)]:  # only with item k
            chosen.append(k)
            total = total - takes[k]
    return chosen[::-1]


EMPTY = {"ids_L": 0, "labels_L": IGNORE, "positions_L": 0, "segments_L": 0, "places_L": -1}
"""What arrays of a row hold where no conversation is."""


def row_of(samples: Sequence[Sample], shape: Shape) -> Row:
    """These samples, one after another; of none an empty row."""
    arrays = (np.full(shape.length, empty, np.int32) for empty in EMPTY.values())
    ids_L, labels_L, positions_L, segments_L, places_L = arrays
    fused_L = {name: np.full_like(places_L, -1) for name, room in shape.rooms.items() if room.fused}
    item_rows_M = {name: np.full(room.items, -1, np.int32) for name, room in shape.rooms.items()}
    start, next_slot, first = 0, dict.fromkeys(shape.rooms, 0), first_places(shape.rooms)
    places = []
    for segment, (encoded, rows, example) in enumerate(samples, 1):
        here = slice(start, start + len(encoded.ids_L))
        ids_L[here] = encoded.ids_L
        labels_L[here] = encoded.labels_L
        labels_L[start] = IGNORE  # nobody predicts a first token, least of all the conversation before it
        positions_L[here] = np.arange(len(encoded.ids_L))
        segments_L[here] = encoded.segments_L * segment
        begin = {name: first[name] + next_slot[name] * room.tokens for name, room in shape.rooms.items()}
        places_L[here] = in_row(encoded.places_L, first=begin, media=shape.media)
        for name, of_L in encoded.fused.items():
            fused_L[name][here] = in_row(of_L, first=begin, media=shape.media)
        slots = {}
        for name in shape.rooms:
            of_medium = rows.get(name, ())
            slots[name] = slice(next_slot[name], next_slot[name] + len(of_medium))
            item_rows_M[name][slots[name]] = of_medium
            next_slot[name] = slots[name].stop
        places.append(Place(here, slots, example))
        start = here.stop
    return Row(ids_L, labels_L, positions_L, segments_L, places_L, fused_L, item_rows_M, tuple(places))


def take_out(row: Row, place: Place) -> Row:
    """The row without the conversation at a place, which is empty then."""

    def emptied(array: np.ndarray, at: slice, empty: int = -1) -> np.ndarray:
        array = array.copy()
        array[at] = empty
        return array

    return row._replace(
        **{name: emptied(getattr(row, name), place.positions, empty) for name, empty in EMPTY.items()},
        fused_L={name: emptied(of_L, place.positions) for name, of_L in row.fused_L.items()},
        item_rows_M={name: emptied(rows_M, place.slots[name]) for name, rows_M in row.item_rows_M.items()},
        places=tuple(other for other in row.places if other is not place),
    )
