"""Several data sets as one: rows after rows, items after items, and which rows an epoch has of each.

Goes in: rows and items of each, and weights. Comes out: rows and items with numbers of their own, and for weights the
rows `picked` of an epoch, in which every row comes at least once.

Example: data sets of 3 and 8 rows, weights 1 and 1. An epoch has 8 and 8: the first is repeated, the two alternate.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moextend_jax.config import Medium, MoextendError
from moextend_jax.faults import Fault
from moextend_jax.media import IMAGE_MARK, PICTURE

MOST_ROWS = 1 << 26
"""Most rows of an epoch."""


@dataclass(frozen=True)
class Joined:
    """Where the items of several sequences stand, one after another."""

    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.sizes)

    @functools.cached_property
    def starts(self) -> list[int]:
        return list(itertools.accumulate(self.sizes[:-1], initial=0))

    def place(self, index: int) -> tuple[int, int]:
        """Which sequence, and the item's index in it."""
        n = bisect.bisect_right(self.starts, index) - 1  # of several that start there the last: the others are empty
        return n, index - self.starts[n]


class JoinedRows:
    """Built rows of several data sets, `datasets.Source` each; rows and keys of items are numbered through, as
    `JoinedItems` are. `items` has by mark those of each data set."""

    def __init__(self, parts: Sequence[Any], items: Mapping[str, Sequence[Sequence[Any]]]):
        self.parts = tuple(parts)
        self.starts = {mark: Joined(tuple(map(len, of_mark))).starts for mark, of_mark in items.items()}
        self.joined = Joined(tuple(map(len, parts)))

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        places = [self.joined.place(index) for index in indices]
        items: dict[int, Any] = {}
        for n, part in enumerate(self.parts):
            mine = [at for at, (which, _) in enumerate(places) if which == n]
            if mine:
                read = part.built([places[at][1] for at in mine])
                items |= {at: self._renumbered(n, item) for at, item in zip(mine, read, strict=True)}
        return [items[at] for at in range(len(places))]

    def _renumbered(self, n: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        keys = [f"{n}/".encode() + key for key in row["images"]]
        talk = row["conversations"]
        if talk[:1] in (b"{", "{") and (items := (read := json.loads(talk)).get("items")):
            moved = [[mark, f"{n}/{key}", at + self._start(n, mark)] for mark, key, at in items]
            talk = json.dumps({**read, "items": moved})
        numbers = np.asarray(row["image_rows"]) + self._start(n, IMAGE_MARK)
        return {**row, "conversations": talk, "images": keys, "image_rows": numbers}

    def _start(self, n: int, mark: str) -> int:
        """0 for a mark that no medium has: its items are never looked up."""
        return self.starts[mark][n] if mark in self.starts else 0


class JoinedItems(Sequence[Any]):
    """Items of one medium of several data sets, `items.Items` each; their keys are `NUMBER/KEY`."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = tuple(parts)
        self.joined = Joined(tuple(map(len, parts)))
        self.fingerprint = fingerprint_of([part.fingerprint for part in parts])

    def __len__(self) -> int:
        return len(self.joined)

    @property
    def faults(self) -> dict[int, Fault]:
        starts = zip(self.joined.starts, self.parts, strict=True)
        return {start + row: fault for start, part in starts for row, fault in part.faults.items()}

    def check(self, row: int) -> None:
        self._of_part(row, lambda items, row: items.check(row))

    def __getitem__(self, row: Any) -> Any:
        return self._renamed(row, self._of_part(row, lambda items, row: items[row]))

    def decoded(self, row: Any, medium: Medium = PICTURE) -> Any:
        return self._renamed(row, self._of_part(row, lambda items, row: items.decoded(row, medium)))

    def span(self, row: Any, medium: Medium) -> int:
        return self._of_part(row, lambda items, row: items.span(row, medium))

    def _of_part(self, row: Any, read: Callable[[Any, int], Any]) -> Any:
        n, row = self.joined.place(int(row))
        try:
            return read(self.parts[n], row)
        except Fault as fault:
            raise Fault(str(fault), fault.kind, f"{n}/{fault.id}") from fault

    def _renamed(self, row: Any, item: Any) -> Any:
        return item._replace(key=f"{self.joined.place(int(row))[0]}/{item.key}")


def fingerprint_of(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def picks(sizes: Sequence[int], weights: Sequence[float], names: Sequence[str]) -> np.ndarray:
    """Rows of an epoch over data sets that stand one after another: shares by weight, every row at least once, evenly
    alternating.

    Raises:
      MoextendError: a weight is so small that an epoch would be longer than MOST_ROWS.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    lengths = np.asarray(sizes) / share
    longest = int(np.argmax(lengths))
    if lengths[longest] > MOST_ROWS:
        raise MoextendError(
            f"data: {names[longest]} has {sizes[longest]} rows and a share of {share[longest]:.2g}: an epoch with all "
            f"its rows would have {lengths[longest]:.3g}; give it a larger weight, or take a slice of it"
        )
    starts = np.cumsum([0, *sizes[:-1]])
    rows, when = [], []
    for size, start, count in zip(sizes, starts, np.rint(lengths[longest] * share).astype(int), strict=True):
        count = max(int(count), size)
        rounds, more = divmod(count, size)
        # All rows as often as they go in, then some from all over the data set.
        order = np.concatenate([np.tile(np.arange(size), rounds), np.arange(more) * size // max(more, 1)])
        rows.append(start + order)
        when.append((np.arange(count) + 0.5) / count)
    return np.concatenate(rows)[np.argsort(np.concatenate(when), kind="stable")].astype("<i8")
