"""Splits a data set so that no picture is on both sides: a `Source` and how much of it in, two views of it out.

Which rows are held out follows from the seed and from the pictures' own names: rows that are added later, or stand in
another order, move no picture to the other side unless the number that is held out changes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.data.datasets import Example, HoldOut, Source, select


def rows_of_part(part: float, rows: int, *, setting: str) -> int:
    """How many of `rows` rows a part is: from 1 on it is a number of rows, below a share (of at least one row).

    Raises:
      MoextendError: no row would be left; names the setting.
    """
    count = round(part) if part >= 1 else max(1, round(part * rows))
    if count >= rows:
        at_most = f"at most {rows - 1} can be, or a share such as 0.1" if rows > 1 else "there must be two at least"
        raise MoextendError(f"{setting} = {part:g}: cannot hold out {count} of {rows} rows; {at_most}")
    return count


def hold_out_pictures(source: Source, *, part: float, seed: int, setting: str) -> HoldOut:
    """Splits off `part` of the rows or a few less, with all rows that share a picture on one side; both parts keep the
    source's order. Rows without a picture are each by themselves. Where every picture has more rows than that, the rows
    of one are held out.

    Args:
      part: a number of rows or a share, see `rows_of_part`.
      setting: what sets it, for messages.

    Raises:
      MoextendError: too few rows, or all of them are tied together by their pictures.
    """
    wanted = rows_of_part(part, len(source), setting=setting)
    groups = sorted(_groups(marks_of(example) for example in source), key=lambda group: _order(group[0], seed))
    chosen = np.zeros(len(source), bool)
    for _, rows in groups:
        if chosen.sum() + len(rows) <= wanted:
            chosen[rows] = True
    if not chosen.any():  # every group is larger than wanted: the smallest is nearest
        if len(groups) == 1:
            raise MoextendError(f"{setting}: all {len(source)} rows share pictures, so none can be held out unseen")
        chosen[min(groups, key=lambda group: len(group[1]))[1]] = True
    return HoldOut(select(source, np.flatnonzero(chosen)), select(source, np.flatnonzero(~chosen)))


def without(source: Source, unseen: Source) -> Source:
    """The rows of a source that show no picture, and are no row without pictures, of `unseen`."""
    marks = {mark for example in unseen for mark in marks_of(example)}
    return select(source, [row for row, example in enumerate(source) if marks.isdisjoint(marks_of(example))])


def marks_of(example: Example) -> tuple[str, ...]:
    """What must not be on both sides: the keys of its pictures, or its text where it has none."""
    if example.images:
        return tuple(ref.key for ref in example.images)
    text = json.dumps([example.id, example.conversations])
    return (hashlib.sha256(text.encode()).hexdigest(),)


def _groups(marks: Iterable[tuple[str, ...]]) -> list[tuple[str, list[int]]]:
    """Rows that are tied together by marks, with the least mark of each group."""
    parent: dict[str, str] = {}

    def root(mark: str) -> str:
        while (above := parent.setdefault(mark, mark)) != mark:
            parent[mark] = parent[above]  # shorter for the next time
            mark = above
        return mark

    first = []
    for of_row in marks:
        roots = sorted(map(root, of_row))
        parent.update(dict.fromkeys(roots[1:], roots[0]))
        first.append(of_row[0])
    rows: dict[str, list[int]] = defaultdict(list)
    for row, mark in enumerate(first):
        rows[root(mark)].append(row)
    return list(rows.items())


def _order(mark: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {mark}".encode(errors="surrogateescape")).hexdigest()
