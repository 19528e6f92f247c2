"""What each medium is worth: accuracy without it, its importance, the subsets that were asked.

In: of summary.json `without` {medium: {model: accuracy}} and `importance` {model: what `evaluate/importance.py`
returned}. Out: a panel on an Axes, and HTML; "" where no question was asked without some of its media.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moextend_jax.report.canvas import IMAGE, LINE, MUTED, OURS, PLAIN, RIVAL, TEXT
from moextend_jax.report.markup import beside, how, picture, text_table
from moextend_jax.report.results_pictures import title_of
from moextend_jax.report.workdir import number, value_at

MEDIUM_COLOURS = (IMAGE, OURS, TEXT, RIVAL, PLAIN)
"""Of media in order; a sixth has the first one's again."""


def importance_section(summary: Mapping[str, Any] | None) -> str:
    """Raises MoextendError where a number is none."""
    return _without(summary) + _importance(summary)


def _without(summary: Mapping[str, Any] | None) -> str:
    """A line per medium that was left out, with each model's accuracy on the same questions."""
    media = _names(summary, "without")
    models = list(dict.fromkeys(model for name in media for model in _names(summary, "without", name)))
    if not models:
        return ""
    rows = [["with everything", *(_percent(number(summary, "accuracy", model)) for model in models)]]
    for name in media:
        cells = (_percent(number(summary, "without", name, model)) for model in models)
        rows.append([f"without {name}", *cells])
    return text_table(["", *(title_of(model, summary) for model in models)], rows) + how(
        "Share of right answers when the same questions are asked without one of their media."
    )


def _importance(summary: Mapping[str, Any] | None) -> str:
    models = _names(summary, "importance")
    media = list(dict.fromkeys(name for model in models for name in _names(summary, "importance", model, "media")))
    if not media:
        return ""
    drawn = picture(
        lambda ax: importance_panel(ax, summary, models=models, media=media),
        name="importance", label="Importance of each medium", width=5.4, height=2.9,
    )  # fmt: skip
    return beside(
        drawn,
        "Importance of a medium: the share of right answers when a question is asked with it, less that without it, "
        "over all subsets of the question’s media. Below 0 it misleads.",
    ) + _subsets(summary, models)


def importance_panel(ax: Axes, summary: Mapping[str, Any] | None, *, models: list[str], media: list[str]) -> None:
    """A group of bars per model, a bar per medium."""
    places, width = np.arange(len(models)), 0.8 / len(media)
    for n, name in enumerate(media):
        values = [number(summary, "importance", model, "media", name, "importance") for model in models]
        drawn = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        bars = ax.bar(
            [place + (n + 0.5) * width - 0.4 for place, _ in drawn], [value for _, value in drawn], width=0.92 * width,
            color=MEDIUM_COLOURS[n % len(MEDIUM_COLOURS)], label=name.replace("$", r"\$"),
        )  # fmt: skip
        ax.bar_label(bars, [f"{value:+.2f}" for _, value in drawn], padding=2, fontsize=8.5)
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.grid(axis="y", color=LINE)
    ax.set_xticks(places, [title_of(model, summary).replace("$", r"\$") for model in models])
    ax.set(ylabel="importance")
    ax.margins(y=0.18)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4, fontsize=8.5, handlelength=1.2)


def _subsets(summary: Mapping[str, Any] | None, models: list[str]) -> str:
    """A line per subset that was asked, with each model's accuracy on the same questions."""
    asked = list(dict.fromkeys(some for model in models for some in _names(summary, "importance", model, "subsets")))
    rows = []
    for some in asked:
        of = [
            [number(summary, "importance", model, "subsets", some, key) for model in models]
            for key in ("accuracy", "questions")
        ]
        counts = "/".join(dict.fromkeys(f"{count:,.0f}" for count in of[1] if count is not None))
        rows.append([some.replace("+", " + "), *map(_percent, of[0]), counts])
    return text_table(["asked with", *(title_of(model, summary) for model in models), "questions"], rows) + how(
        "Share of right answers of questions that have these media, asked with these alone; none: the question alone."
    )


def _percent(accuracy: float | None) -> str:
    return "not asked" if accuracy is None else f"{accuracy:.1%}"


def _names(summary: Mapping[str, Any] | None, *path: str) -> list[str]:
    """The keys of the mapping at `path`; none where there is no mapping."""
    content = value_at(summary, *path)
    return [str(name) for name in content] if isinstance(content, Mapping) else []
