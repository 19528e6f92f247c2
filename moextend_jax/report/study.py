"""A study as a page: study.json in, WORKDIR/study.html out, with its table and two pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from moextend_jax.report.canvas import MUTED, OURS, PLAIN, canvas
from moextend_jax.report.markup import how, picture, section, text_table, write_page
from moextend_jax.study import estimate, lines_of

Seeds = Mapping[Any, Mapping[str, float]]


class Axis(NamedTuple):
    """What stands beneath accuracy: its label, the number of one seed, and its scale."""

    label: str
    of: Callable[[Mapping[str, float]], float]
    scale: str = "linear"


AGAINST = {
    "forgetting": Axis(
        "forgotten of held-out text (nats, mean of WordNet and King James)",
        lambda seed: (seed["wordnet"] + seed["kjv"]) / 2,
    ),
    "parameters": Axis("trained parameters", lambda seed: seed["trained"], "log"),
}
"""TABLE of the pictures."""

CORNERS = ((5, 4), (5, -10), (-5, -10), (-5, 4))
"""Where a dot's name stands, in points from the dot, if no other name is there; else LINE points further up or down."""
LINE = 9


def write_study(record: Mapping[str, Any], workdir: Path) -> Path:
    """Writes WORKDIR/study.html, and the picture against forgetting as study.png; returns the page's path."""
    points = {name: point["seeds"] for name, point in record["points"].items()}
    seeds = len(next(iter(points.values())))
    with canvas(width=6.4, height=4.2) as figure:
        _panel(figure.add_subplot(), points, AGAINST["forgetting"], data=record["data"])
        with (workdir / "study.png").open("wb") as file:  # perhaps in a bucket
            figure.savefig(file, dpi=150, format="png")
    drawn = {
        name: picture(
            lambda ax, axis=axis: _panel(ax, points, axis, data=record["data"]),
            name=name, label=f"Accuracy against {name} of each point", width=6.4, height=4.2,
        )
        for name, axis in AGAINST.items()
    }  # fmt: skip
    headings, *rows = lines_of(record)
    set_by = "".join(
        f"<li>{escape(name)}: <code>{escape(' '.join(point['settings']) or 'nothing')}</code></li>"
        for name, point in record["points"].items()
    )
    title = f"Study: {record['data']}, {seeds} seeds"
    reading = "Means over seeds ± half of the 95 % interval (Student’s t); differences are taken seed by seed."
    parts = [
        f"<h1>{escape(title)}</h1>",
        section("Points", text_table(headings, rows) + how(reading)),
        *(section(f"Accuracy against {name}", of) for name, of in drawn.items()),
        section("What each point sets", f"<ul>{set_by}</ul>"),
    ]
    path = workdir / "study.html"
    write_page(path, parts, title=title)
    return path


def _panel(ax: Axes, points: Mapping[str, Seeds], axis: Axis, *, data: str) -> None:
    """A dot for every point at its means over seeds, with 95 % intervals; the first point has its own colour."""
    means = {name: [estimate(list(map(of, seeds.values()))) for of in (itemgetter("accuracy"), axis.of)]
             for name, seeds in points.items()}  # fmt: skip
    for name, (accuracy, across) in means.items():
        ax.errorbar(
            across.mean, accuracy.mean, xerr=across.half, yerr=accuracy.half, fmt="o",
            color=OURS if name == next(iter(points)) else PLAIN, linewidth=1,
        )  # fmt: skip
    ax.margins(x=0.12)
    if axis.scale == "log":
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(EngFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(axis.label)
    ax.set_ylabel(f"accuracy on {data}")
    _names(ax, {name: (across.mean, accuracy.mean) for name, (accuracy, across) in means.items()})


def _names(ax: Axes, dots: Mapping[str, tuple[float, float]]) -> None:
    """A name beside every dot, at the first place where no other name is; to one further away a line leads."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    for _ in range(2):  # the second time in the layout that has room for names
        figure.draw_without_rendering()
        for text in [*ax.texts]:
            text.remove()
        taken: list[Bbox] = []
        for name, dot in sorted(dots.items(), key=lambda of: of[1][1]):
            for lines, (x, y) in ((lines, corner) for lines in itertools.count() for corner in CORNERS):
                text = ax.annotate(
                    name, dot, (x, y + lines * math.copysign(LINE, y)), textcoords="offset points", color=MUTED,
                    fontsize="small", horizontalalignment="left" if x > 0 else "right",
                    arrowprops={"arrowstyle": "-", "color": PLAIN, "linewidth": 0.5} if lines else None,
                )  # fmt: skip
                text.get_window_extent()  # that of the line, too; it sets the text's place
                box = Text.get_window_extent(text)
                if not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                text.remove()
