"""Splits a data set so that no picture or other item is on both sides: a `Source` and how much of it in, two views out.

Which rows are held out follows from the seed and from the pictures' own names, not from the order of the rows; of rows
without a picture from their texts and ids, which are numbers of rows where the data give none. Rows that are added
later can change the choice: pictures are taken in the order of their hashes until there are enough.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.data.datasets import AnyItems, HoldOut, Source, distinct, select
from moextend_jax.data.item_files import real_paths
from moextend_jax.data.mixing import JoinedItems
from moextend_jax.folders import absolute, is_url


def rows_of_part(part: float, rows: int, *, setting: str) -> int:
    """How many of `rows` rows a part is. From 1 on, `part` is a number of rows; below 1, a share (at least one row).

    Raises:
      MoextendError: no row would be left; names the setting.
    """
    count = round(part) if part >= 1 else max(1, round(part * rows))
    if count >= rows:
        at_most = f"at most {rows - 1} can be, or a share such as 0.1" if rows > 1 else "there must be two at least"
        raise MoextendError(f"{setting} = {part:g}: cannot hold out {count} of {rows} rows; {at_most}")
    return count


def hold_out_pictures(source: Source, *, part: float, seed: int, setting: str) -> HoldOut:
    """Holds out `part` of the rows or a few less; all rows that share a picture are on one side. Both parts keep the
    source's order. Rows without a picture are on one side if they say the same. If every group has more rows than
    `part`, the smallest group is held out. A row that a mixture repeats counts once and is held out once.

    Args:
      part: a number of rows or a share, see `rows_of_part`.
      setting: what sets it, for messages.

    Raises:
      MoextendError: too few rows, or all of them are tied together by their pictures.
    """
    once = distinct(source)
    wanted = rows_of_part(part, len(once), setting=setting)

    def order(group: tuple[str, list[int]]) -> str:
        return hashlib.sha256(f"{seed} {group[0]}".encode(errors="surrogateescape")).hexdigest()

    groups = sorted(_groups(marks_of(once)), key=order)
    chosen = np.zeros(len(once), bool)
    for _, rows in groups:
        if chosen.sum() + len(rows) <= wanted:
            chosen[rows] = True
    if not chosen.any():  # every group is larger than wanted: the smallest is nearest
        if len(groups) == 1:
            raise all_tied(len(once), setting=setting)
        chosen[min(groups, key=lambda group: len(group[1]))[1]] = True
    held_out = select(once, np.flatnonzero(chosen))
    rest = ~chosen if once is source else ~np.isin(np.asarray(source.picked), np.asarray(held_out.picked))
    return HoldOut(held_out, select(source, np.flatnonzero(rest)))


def all_tied(rows: int, *, setting: str) -> MoextendError:
    tied = f"{setting}: all {rows} rows share pictures or say the same, so none can be held out unseen"
    return MoextendError(f"{tied}; name other rows in evaluate.data")


def without(source: Source, *unseen: Source) -> Source:
    """The rows of a source that show no picture of any of `unseen`, and are none of their rows without pictures."""
    marks = {mark for of in unseen for of_row in marks_of(of) for mark in of_row}
    return select(source, [row for row, of_row in enumerate(marks_of(source)) if marks.isdisjoint(of_row)])


@dataclass(frozen=True, order=True)
class Mark:
    """What must not be on both sides: a picture or another item, or the text of a row without items. place: where the
    item's file lies; for an item inside a row its name, which is a hash. name: decides the side, so that folders may be
    moved."""

    place: str
    name: str = field(compare=False)


def marks_of(source: Source) -> Iterator[tuple[Mark, ...]]:
    """The marks of each row."""
    mark = {name: _mark_of(items) for name, items in source.items.items()}
    for example in source:
        if example.items:
            yield tuple(mark[ref.medium](ref.key) for ref in example.items)
        else:
            said = json.dumps(example.conversations)  # the same in two rows is on one side, whatever ids they have
            name = json.dumps([example.id, example.conversations])
            yield (Mark(*(hashlib.sha256(text.encode()).hexdigest() for text in (said, name))),)


def _mark_of(items: AnyItems) -> Callable[[str], Mark]:
    """A function from the key of an item to its mark; the same item in another data set has the same mark."""
    if isinstance(items, JoinedItems):
        parts = [_mark_of(part) for part in items.parts]

        def of_part(key: str) -> Mark:
            number, _, name = key.partition("/")
            return parts[int(number)](name)

        return of_part
    home = os.fspath(absolute(items.folder.path)) if items.folder else items.fingerprint
    path_of = real_paths(home) if items.folder and not is_url(home) else partial(os.path.join, home)
    return lambda key: Mark(key if key.startswith("bytes ") else _place(path_of(key)), key)


def _place(path: str) -> str:
    """Equal for all names by which `item_files.find_file` finds a file: some leave out a folder `images`."""
    return os.sep.join(part for part in os.path.normpath(path).split(os.sep) if part != "images")


def _groups(marks: Iterable[tuple[Mark, ...]]) -> list[tuple[str, list[int]]]:
    """Rows that are tied together by marks, with the name of the least mark of each group, the first by alphabet where
    it has several."""
    parent: dict[Mark, Mark] = {}
    names: dict[str, str] = {}

    def root(mark: Mark) -> Mark:
        while (above := parent.setdefault(mark, mark)) != mark:
            parent[mark] = parent[above]  # shorter for the next time
            mark = above
        return mark

    first = []
    for of_row in marks:
        for mark in of_row:
            if mark.name <= names.get(mark.place, mark.name):
                names[mark.place] = mark.name
        roots = sorted(map(root, of_row))
        parent.update(dict.fromkeys(roots[1:], roots[0]))
        first.append(of_row[0])
    rows: dict[Mark, list[int]] = defaultdict(list)
    for row, mark in enumerate(first):
        rows[root(mark)].append(row)
    return [(names[mark.place], of_group) for mark, of_group in rows.items()]
