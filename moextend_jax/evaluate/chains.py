"""What a chain of extensions learnt and what it forgot: from scores to transfer, forgetting and backward transfer.

In: scores `{after: {on: score}}`, in the order of learning; `after` is the name of the extension learnt last, `on` that
of the extension whose questions are asked, or `NAME/SET` for one of several test sets ("sound/held_out"). Higher is
better. Out: a plain dict for summary.json, and a table to print. `report/chains.py` draws it.

With S[m, i, s] the score on test set s of i after learning m (each mean over sets first, then over extensions):

    transfer of m           mean_s S[m, m, s]
    forgetting of m         mean_{i<m} mean_s (S[i, i, s] - S[m, i, s]); 0 for the first, before which there is nothing
    backward transfer       mean_{i<n} mean_s (S[n, i, s] - S[i, i, s]) of the last, n

PathWeave (2410.20178) prints T and F under these names; its formulas were not read, so these are ours. Backward
transfer is GEM's (Lopez-Paz and Ranzato, 1706.08840). Scores of unlike units are averaged as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from rich.table import Table

from moextend_jax.config import MoextendError
from moextend_jax.terminal import table_of

ScoreMatrix = Mapping[str, Mapping[str, float]]
"""after -> on -> score."""


CHAIN_TITLES = {
    "strict": "Extensions under strict isolation",
    "open": "Extensions without isolation",
    "full": "Everything tuned on",
}
"""Of chains in tables and pages, where another goes by its own name."""


def score_matrix(scores: ScoreMatrix) -> dict[str, Any]:
    """`{"scores", "transfer", "forgetting", "backward_transfer"}` of a chain, numbers all of them.

    What was scored before it was learnt stays in the matrix and counts nowhere.

    Raises:
      MoextendError: a row lacks test sets of its own extension or of an earlier one, or a score is no finite number.
    """
    learnt = list(scores)
    for after, row in scores.items():
        for on, score in row.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise MoextendError(f"the score on {on} after {after} is {score!r}, not a finite number")
    own = {name: _on(scores, after=name, name=name) for name in learnt}
    lost = {
        after: [
            fmean(before - _on(scores, after=after, name=name)[on] for on, before in own[name].items())
            for name in learnt[:place]
        ]
        for place, after in enumerate(learnt)
    }
    return {
        "scores": {after: {on: float(score) for on, score in row.items()} for after, row in scores.items()},
        "transfer": {name: fmean(of.values()) for name, of in own.items()},
        "forgetting": {after: _mean(of) for after, of in lost.items()},
        "backward_transfer": _mean(-change for change in lost[learnt[-1]]) if learnt else 0.0,
    }


def learnt_on(on: str) -> str:
    """The extension whose questions `on` names: "sound" of "sound/held_out"."""
    return on.partition("/")[0]


def chain_table(name: str, chain: Mapping[str, Any]) -> Table:
    """Prints what `score_matrix` returned: a line per extension learnt, its scores, transfer and forgetting."""
    tested = columns(chain)
    table = table_of(
        ["after", *tested, "transfer", "forgetting"], title=CHAIN_TITLES.get(name, name), title_justify="left"
    )
    for after, row in chain["scores"].items():
        cells = [f"{row[on]:.3f}" if on in row else "" for on in tested]
        table.add_row(after, *cells, f"{chain['transfer'][after]:.3f}", f"{chain['forgetting'][after]:+.3f}")
    table.caption = f"backward transfer {chain['backward_transfer']:+.3f}"
    return table


def columns(chain: Mapping[str, Any]) -> list[str]:
    """Everything a chain was tested on, in the order of learning."""
    learnt = list(chain["scores"])
    tested = dict.fromkeys(on for row in chain["scores"].values() for on in row)
    place = {name: n for n, name in enumerate(learnt)}
    return sorted(tested, key=lambda on: place.get(learnt_on(on), len(learnt)))


def _on(scores: ScoreMatrix, *, after: str, name: str) -> dict[str, float]:
    """The scores after `after` on every test set of `name`, the same sets as right after it was learnt."""
    sets = [on for on in scores[name] if learnt_on(on) == name]
    if not sets:
        raise MoextendError(
            f"no score on {name} right after it was learnt; there are {', '.join(scores[name]) or 'none'}"
        )
    absent = [on for on in sets if on not in scores[after]]
    if absent:
        raise MoextendError(f"no score on {', '.join(absent)} after {after}: what it forgot cannot be said")
    return {on: scores[after][on] for on in sets}


def _mean(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    return fmean(numbers) + 0.0 if numbers else 0.0  # -0.0 is 0.0
