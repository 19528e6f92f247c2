"""Questions that are asked again without some of their media: which, and what is left of the accuracy.

In: the media that each question has, in the model's order (all processes ask alike), and of the answers which are
right. Out: the `Variant`s to ask, per question a table subset of its media -> right (`importance.py` measures it), and
accuracies for the rows "without NAME" of summary.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from moextend_jax.evaluate.importance import importance, subsets
from moextend_jax.settings import LeaveOut


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
