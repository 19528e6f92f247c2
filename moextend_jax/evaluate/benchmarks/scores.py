"""What a scorer returns: a table, the number that papers print, and the points of each question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Headline(NamedTuple):
    """The number that papers print for the benchmark. name: what it is, e.g. "mean F1"."""

    name: str
    value: float


class Scores(NamedTuple):
    """rows: cells as `columns` names them, shares in per cent. headline None: nothing here can score it (`notes` says
    what can). points: each question's, 0 to 1, in the order of the questions; empty where there are none."""

    headline: Headline | None
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[str | float | int, ...]] = ()
    points: Sequence[float] = ()
    notes: Sequence[str] = ()


def percent(points: Iterable[float]) -> float:
    points = list(points)
    return 100 * sum(points) / len(points) if points else 0.0


def by_group(groups: Sequence[str], points: Sequence[float]) -> list[tuple[str, int, float]]:
    """(group, questions, per cent) in the order in which groups first appear."""
    of: dict[str, list[float]] = {}
    for group, point in zip(groups, points, strict=True):
        of.setdefault(group, []).append(point)
    return [(group, len(some), percent(some)) for group, some in of.items()]


def accuracy_by(what: str, groups: Sequence[str], points: Sequence[float]) -> Scores:
    """The share of points, of each group and of all; `what` heads the column of the groups."""
    overall = percent(points)
    rows = [*by_group(groups, points), ("all", len(points), overall)]
    return Scores(Headline("accuracy", overall), (what, "questions", "accuracy %"), rows, points)


def are_right(right: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Which answers equal the right one but for case, outer spaces and final full stops."""
    return [_plain(a) == _plain(b) for a, b in zip(right, answers, strict=True)]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
