"""Conversations of different lengths into rows of one length: first-fit, longest first, spans never cut.

Goes in: a window of `Encoded` conversations, each with the row numbers of its images. Comes out: `Row`s of L
tokens and M image slots. A window is packed on its own, so the pipeline's place is just a window number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moextend_jax.config import IGNORE
from moextend_jax.data.conversations import Encoded


class Item(NamedTuple):
    encoded: Encoded
    image_rows: Sequence[int]


class Row(NamedTuple):
    """As in `config.Batch`, for one row; `image_rows_M` is -1 on empty slots."""

    ids_L: np.ndarray
    labels_L: np.ndarray
    positions_L: np.ndarray
    segments_L: np.ndarray
    patches_L: np.ndarray
    image_rows_M: np.ndarray


def pack(
    items: Sequence[Item], *, length: int, images_per_row: int, patches: int, conversations_per_row: int | None
) -> list[Row]:
    """Rows that hold every item once; each must fit an empty row.

    With one conversation per row the order is kept.
    """
    most = conversations_per_row or len(items)
    lengths = np.array([len(item.encoded.ids_L) for item in items])
    order = np.arange(len(items)) if most == 1 else np.argsort(-lengths, kind="stable")
    bins: list[list[Item]] = [[] for _ in items]
    free, slots, room = np.full(len(items), length), np.full(len(items), images_per_row), np.full(len(items), most)
    for n in order.tolist():
        item = items[n]
        fits = (free >= lengths[n]) & (slots >= len(item.image_rows)) & (room > 0)
        row = int(np.argmax(fits))
        bins[row].append(item)
        free[row] -= lengths[n]
        slots[row] -= len(item.image_rows)
        room[row] -= 1
    return [_row(some, length, images_per_row, patches) for some in bins if some]


def empty_row(*, length: int, images_per_row: int) -> Row:
    return _row([], length, images_per_row, 0)


def _row(items: Sequence[Item], length: int, images_per_row: int, patches: int) -> Row:
    ids_L, positions_L, segments_L = (np.zeros(length, np.int32) for _ in range(3))
    labels_L, patches_L = np.full(length, IGNORE, np.int32), np.full(length, -1, np.int32)
    image_rows_M = np.full(images_per_row, -1, np.int32)
    start = image = 0
    for segment, (encoded, image_rows) in enumerate(items, 1):
        here = slice(start, start + len(encoded.ids_L))
        ids_L[here] = encoded.ids_L
        labels_L[here] = encoded.labels_L
        labels_L[start] = IGNORE  # nobody predicts a first token, least of all the conversation before it
        positions_L[here] = np.arange(len(encoded.ids_L))
        segments_L[here] = encoded.segments_L * segment
        patches_L[here] = np.where(encoded.patches_L >= 0, encoded.patches_L + image * patches, -1)
        image_rows_M[image : image + len(image_rows)] = image_rows
        start, image = here.stop, image + len(image_rows)
    return Row(ids_L, labels_L, positions_L, segments_L, patches_L, image_rows_M)
