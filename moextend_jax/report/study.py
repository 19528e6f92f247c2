"""Draws a study: accuracy of every point against what it forgot of text; study.json in, a PNG out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moextend_jax.evaluate.estimates import estimate
from moextend_jax.report.canvas import MUTED, OURS, PLAIN, canvas


def study_picture(record: Mapping[str, Any], path: Path) -> None:
    """A dot for every point at its means over seeds, with 95 % intervals; the first point has its own colour."""
    with canvas(width=6.4, height=4.2) as figure:
        ax = figure.add_subplot()
        for place, (name, point) in enumerate(record["points"].items()):
            seeds = point["seeds"].values()
            forgotten = estimate([(seed["wordnet"] + seed["kjv"]) / 2 for seed in seeds])
            accuracy = estimate([seed["accuracy"] for seed in seeds])
            ax.errorbar(
                forgotten.mean, accuracy.mean, xerr=forgotten.half, yerr=accuracy.half, fmt="o",
                color=PLAIN if place else OURS, linewidth=1,
            )  # fmt: skip
            at = (forgotten.mean, accuracy.mean)
            ax.annotate(name, at, (5, 4), textcoords="offset points", color=MUTED, fontsize="small")
        ax.set_xlabel("forgotten of held-out text (nats, mean of WordNet and King James)")
        ax.set_ylabel(f"accuracy on {record['data']}")
        figure.savefig(path, dpi=150)
