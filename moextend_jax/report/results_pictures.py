"""Draws what a run achieved and cost: accuracy, forgetting, loss curves, time.

In: summary.json and the lines of metrics.jsonl as `workdir.py` reads them. Out: panels on an Axes that the page shows
one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moextend_jax.report.canvas import MUTED, OURS, PLAIN, RIVAL
from moextend_jax.report.workdir import number
from moextend_jax.runs import results

MODELS = ("question_only", *results.FIRST.models)
"""The order of models in pictures and tables."""


def title_of(model: str, summary: Mapping[str, Any] | None = None) -> str:
    """A model's title in pictures and tables; of one that is no run's its name."""
    titles = {"question_only": "question only"} | results.titles_of(summary or {})
    return title[:1].upper() + title[1:] if (title := str(titles.get(model, ""))) else model


MODEL_COLOUR = dict.fromkeys(MODELS, PLAIN) | {"moextend": OURS, "full": RIVAL}
CORPORA = {"wordnet": "WordNet", "kjv": "King James Bible"}
CURVE_POINTS = 400
"""Points a loss curve is thinned to."""


def forgetting(summary: Mapping[str, Any] | None, *, model: str) -> list[float]:
    """Nats of held-out text loss that the model gained over the base, for each corpus on which both were evaluated."""
    losses = [[number(summary, "text_loss", corpus, name) for name in (model, "base")] for corpus in CORPORA]
    return [after - base for after, base in losses if after is not None and base is not None]


def trade_panel(ax: Axes, summary: Mapping[str, Any]) -> None:
    """Accuracy against forgetting: a dot at the mean over corpora, a line from the least to the most forgotten."""
    floor = number(summary, "accuracy", "question_only")
    if floor is not None:
        ax.axhline(floor, color=PLAIN, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(
            "question only", (1, floor), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", color=MUTED,
        )  # fmt: skip
    for model in results.ANSWERING:
        accuracy, gained = number(summary, "accuracy", model), forgetting(summary, model=model)
        if results.FIRST.models[model].text_is_bases:
            gained = [0.0]
        if accuracy is None or not gained:
            continue
        colour, mean = MODEL_COLOUR[model], fmean(gained)
        ax.plot([min(gained), max(gained)], [accuracy] * 2, color=colour, linewidth=2, alpha=0.5)
        ax.plot(mean, accuracy, "o", markersize=9, color=colour)
        ax.annotate(title_of(model, summary), (mean, accuracy), (7, 6), textcoords="offset points", color=colour)
    ax.axvline(0, color=MUTED, linewidth=0.8)
    ax.set(xlabel="forgetting: text loss gained (nats)", ylabel="accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.margins(x=0.25, y=0.2)
    ax.grid()


def curve_panel(ax: Axes, rows: Sequence[Mapping[str, Any]], *, stage: str) -> None:
    """Loss over steps: every value pale, a running mean over about a thirtieth of the run on top, and where there is
    one the loss of held-out rows, dotted."""
    points = [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    step_n, loss_n = np.asarray(points, float).T
    width = min(len(points), max(5, len(points) // 30))
    smooth_n = np.convolve(loss_n, np.ones(width) / width, "valid")
    middle_n = step_n[width // 2 :][: len(smooth_n)]  # a mean belongs to the middle of what it covers
    thin = slice(None, None, max(1, len(points) // CURVE_POINTS))
    ax.plot(step_n[thin], loss_n[thin], color=OURS, alpha=0.45, linewidth=0.8)
    ax.plot(middle_n[thin], smooth_n[thin], color=OURS, linewidth=1.8)
    held_out = [(row["step"], row["validation_loss"]) for row in rows if isinstance(row.get("validation_loss"), float)]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o--", color=RIVAL, linewidth=1.2, markersize=3, label="held-out rows")
        ax.legend(loc="upper right")
    # The first steps may tower over the rest: cut them off rather than flatten what follows.
    drawn_n = [*loss_n, *(loss for _, loss in held_out)]
    low, high = float(min(drawn_n)), float(np.quantile(drawn_n, 0.98))
    pad = 0.06 * max(high - low, 1e-3)
    ax.set(title=f"{stage}: last {smooth_n[-1]:.3f}", xlabel="step", ylabel="loss", ylim=(low - pad, high + pad))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.grid(axis="y")


def seconds_panel(ax: Axes, seconds: Mapping[str, float]) -> None:
    bars = ax.barh(list(seconds), list(seconds.values()), color=OURS, height=0.6)
    ax.bar_label(bars, [duration(value) for value in seconds.values()], padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="seconds")
    ax.margins(x=0.18)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
