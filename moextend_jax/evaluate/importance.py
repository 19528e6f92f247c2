"""How much each medium of a question helps to answer it: the question is asked again without some of its media.

In: the media that each question has, in the model's order (all processes ask alike), and of the answers which are
right. Out: the `Variant`s to ask, accuracies without each medium, and where every subset was asked its importance: a
plain dict for summary.json and a table to print. `report/importance.py` draws it.

The importance of m is the share of right answers over the subsets with m, less that over the non-empty ones without it
(modality importance score, 2408.12763; the formula is second-hand). For a question of a single medium the empty subset
takes their place. The empty one is otherwise a row of its own: the question alone. M media cost 2^M runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table

from moextend_jax.settings import LeaveOut
from moextend_jax.terminal import table_of

Right = Mapping[frozenset[str], float]
"""For one question: subset of its media -> 1 if the answer was right, 0 if not, or a score between."""
ALONE = "none"
"""What tables and summary.json call the empty subset: the question without any of its media."""


class Variant(NamedTuple):
    """A question by its number, and the media that it is asked again with: never all, as the first time."""

    question: int
    media: frozenset[str]


def variants(media_of: Sequence[Sequence[str]], *, leave_out: LeaveOut) -> list[Variant]:
    """What to ask of questions with these media (`EvaluateSettings.leave_out`)."""
    asked: list[Variant] = []
    for question, names in enumerate(media_of):
        fewer = subsets(names)[:-1]
        if leave_out == "each":
            fewer = [some for some in fewer if len(some) == len(names) - 1]
        asked += [Variant(question, some) for some in fewer if leave_out != "none"]
    return asked


def right_by_media(
    media_of: Sequence[Sequence[str]], right: Sequence[bool], *, asked: Sequence[Variant], right_then: Sequence[bool]
) -> list[dict[frozenset[str], bool]]:
    """Per question: the media that it was asked with, all first, to whether the answer was right."""
    tables = [{frozenset(names): answer} for names, answer in zip(media_of, right, strict=True)]
    for variant, answer in zip(asked, right_then, strict=True):
        tables[variant.question][variant.media] = answer
    return tables


def accuracies_without(tables: Sequence[dict[frozenset[str], bool]], *, media: Sequence[str]) -> dict[str, float]:
    """Medium -> share of right answers when all questions are asked without it; a question that never had it counts
    with its own answer. Media that no question has are left out."""
    of_all = [frozenset().union(*table) for table in tables]
    return {
        name: fmean(float(table[names - {name}]) for table, names in zip(tables, of_all, strict=True))
        for name in media
        if any(name in names for names in of_all)
    }


def left_out_summary(
    tables: Mapping[str, Sequence[dict[frozenset[str], bool]]], *, media: Sequence[str], leave_out: LeaveOut
) -> dict[str, Any]:
    """What summary.json gets of every model's tables: `without` {medium: {model: accuracy}}, and where every subset was
    asked `importance` {model: ...}."""
    if leave_out == "none":
        return {}
    without = {model: accuracies_without(of, media=media) for model, of in tables.items()}
    names = [name for name in media if any(name in of for of in without.values())]
    summary: dict[str, Any] = {"without": {name: {model: of[name] for model, of in without.items()} for name in names}}
    if leave_out == "subsets":
        summary["importance"] = {model: importance(of, media=media) for model, of in tables.items()}
    return summary


def subsets(media: Collection[str]) -> list[frozenset[str]]:
    """All subsets of these media, by size: the empty one first, all media last; each in the order of `media`."""
    return [frozenset(some) for count in range(len(media) + 1) for some in combinations(media, count)]


def question_importance(right: Right) -> dict[str, float]:
    """Medium -> importance, -1 to 1, of a question that was asked with all of `subsets`.

    ValueError: it was not; that is the caller's mistake.
    """
    media = frozenset().union(*right)
    if set(right) != set(subsets(media)):
        raise ValueError(f"asked with {list(map(sorted, right))}, which are not all subsets of {sorted(media)}")
    least = min(1, len(media) - 1)  # of media in a subset that stands for "without"
    return {
        name: _mean(right, (some for some in right if name in some))
        - _mean(right, (some for some in right if name not in some and len(some) >= least))
        for name in media
    }


def importance(answered: Sequence[Right], *, media: Sequence[str]) -> dict[str, Any]:
    """What summary.json holds of questions that were asked with every subset of their media.

    Args:
      media: names in the order of tables, all that questions have.

    Returns:
      `questions`: how many. `media`: name -> `importance`, its mean over the `questions` that have the medium, and how
      many of these it `helps` (importance above 0) and `hurts` (below). `subsets`: `image+sound` (none: "none") ->
      `right`, the sum over the `questions` that were asked so, and `accuracy`, their mean.
    """
    each = [question_importance(right) for right in answered]
    of_media = {name: [of[name] for of in each if name in of] for name in media}
    of_subsets = {some: [right[some] for right in answered if some in right] for some in subsets(media)}
    return {
        "questions": len(answered),
        "media": {
            name: {
                "importance": fmean(of),
                "questions": len(of),
                "helps": sum(value > 0 for value in of),
                "hurts": sum(value < 0 for value in of),
            }
            for name, of in of_media.items()
            if of
        },
        "subsets": {
            label(some, media=media): {"right": float(sum(of)), "questions": len(of), "accuracy": fmean(of)}
            for some, of in of_subsets.items()
            if of
        },
    }


def label(some: Collection[str], *, media: Sequence[str]) -> str:
    """`image+sound`, in the order of `media`."""
    return "+".join(name for name in media if name in some) or ALONE


def importance_table(title: str, measured: Mapping[str, Any]) -> Table:
    """Prints what `importance` returned: a line per medium, then one per subset that was asked."""
    headings = ("medium, or media asked with", "importance", "helps", "hurts", "accuracy", "questions")
    table = table_of(headings, title=title, title_justify="left")
    for name, of in measured["media"].items():
        cells = (f"{of['importance']:+.3f}", str(of["helps"]), str(of["hurts"]), "", str(of["questions"]))
        table.add_row(name, *cells)
    table.add_section()
    for name, of in measured["subsets"].items():
        table.add_row(name, "", "", "", f"{of['accuracy']:.3f}", str(of["questions"]))
    return table


def _mean(right: Right, chosen: Iterable[frozenset[str]]) -> float:
    return fmean(float(right[some]) for some in chosen)
