"""Compares one array of ours with the reference's and says what came of it; rows for a table and for JSON.

In: two arrays and a tolerance. Out: `Row`s. The maximal relative difference is relative to the largest value of the
reference array, because element by element it only shows where that array crosses zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from moextend_jax.config import MoextendError

Verdict = Literal["ok", "differs", "not compared"]


class Tolerances(NamedTuple):
    """Absolute, float32: `simple` for losses, features and gradients, `composed` for what goes through all layers.

    tie: router logits closer than this are equal, up to the noise of their computation.
    """

    simple: float = 1e-5
    composed: float = 1e-4
    tie: float = 1e-5


class Row(NamedTuple):
    """One array. quantity: its name in the file without the batch. agreement: share of tokens with equal top-k."""

    batch: str
    quantity: str
    verdict: Verdict
    max_abs: float | None = None
    max_rel: float | None = None
    agreement: float | None = None
    tolerance: float | None = None
    note: str = ""


def close(batch: str, quantity: str, ours: Any, theirs: Any, *, atol: float, note: str = "", where: Any = None) -> Row:
    """Largest difference of two arrays, of their leading places `where` alone if given (bool, leading axes). `note`
    says why other places are left out; else it says that they have no defined value."""
    mine, other = _numbers(ours), _numbers(theirs)
    if mine.shape != other.shape:
        name = f"{batch}/{quantity}" if batch else quantity
        raise MoextendError(
            f"{name} has shape {other.shape} in the reference and {mine.shape} here: the checkpoint is not the one "
            "that the reference was made with"
        )
    if where is not None:
        where = np.asarray(where, bool)
        if where.sum() < where.size and not note:
            note = f"{where.size - where.sum()} of {where.size} places have no defined value"
        mine, other = mine[where], other[where]
    closed = np.isneginf(mine) & np.isneginf(other)  # experts that a token may not choose
    mine, other = np.where(closed, 0.0, mine), np.where(closed, 0.0, other)
    difference = float(np.abs(mine - other).max(initial=0.0))
    scale = float(np.abs(other).max(initial=0.0))
    relative = difference / scale if scale else (0.0 if difference == 0 else math.inf)
    # Written so that NaN on either side is a difference.
    verdict: Verdict = "ok" if difference <= atol else "differs"
    return Row(batch, quantity, verdict, difference, relative, None, atol, note)


def left_out(batch: str, quantity: str, why: str) -> Row:
    return Row(batch, quantity, "not compared", note=why)


def summarised(rows: Iterable[Row]) -> list[Row]:
    """Rows of numbered arrays (layers) and of parameters brought together: the worst of each, and how many."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        head, _, rest = row.quantity.partition("/")
        groups.setdefault((row.batch, head if rest else row.quantity, row.verdict), []).append(row)
    return [_together(head, members) for (_, head, _), members in groups.items()]


def _together(head: str, members: list[Row]) -> Row:
    if len(members) == 1:
        return members[0]
    worst = max(members, key=lambda row: _badness(row.max_abs))
    agreements = [row.agreement for row in members if row.agreement is not None]
    notes = list(dict.fromkeys(row.note for row in members if row.note))
    at = f"worst {worst.quantity.partition('/')[2]}" if worst.max_abs else ""
    note = "; ".join(filter(None, [at, *notes[:1], f"and {len(notes) - 1} more notes" if len(notes) > 1 else ""]))
    return worst._replace(
        quantity=f"{head}/* ({len(members)})",
        max_rel=max((row.max_rel for row in members if row.max_rel is not None), default=None, key=_badness),
        agreement=min(agreements, default=None),
        note=note,
    )


def _badness(value: float | None) -> float:
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _numbers(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
