"""What every picture shares: its colours, its style, an empty figure.

Colours are Okabe and Ito's, which the colour-blind can tell apart, and lighter ones of the same hue for dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#6b7280", "#9aa3af"),
    "line": ("#d9dde3", "#353b44"),
    "ours": ("#0072b2", "#56b4e9"),
    "rival": ("#d55e00", "#ff8a3d"),
    "plain": ("#8a929e", "#7d8694"),
    "image": ("#7b3f9e", "#c08be0"),
    "text": ("#e69f00", "#f0b429"),
}
"""Name -> colour on white, colour on dark; files use the first, the page switches between them."""
INK, MUTED, LINE, OURS, RIVAL, PLAIN, IMAGE, TEXT = (light for light, _ in COLOURS.values())

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moextend",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


@contextmanager
def canvas(*, width: float, height: float) -> Iterator[Figure]:
    """An empty figure (inches) under the house style; save it inside the block."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def heatmap(
    ax: Axes, values: np.ndarray, *, colours: str, low: float, high: float, first: int = 0, size: float = 8.5,
    text: Callable[[int, int, float], str] | None,
) -> Any:  # fmt: skip
    """A cell for each of `values` on a scale from `low` to `high`, empty where it is NaN; the first row is on top, at
    `first`. text: what stands in the cell of a row and column, in letters of this size."""
    rows, columns = values.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5 + first
    # Edges in the colour of the face close the hairlines that SVG viewers leave between cells.
    options: Any = {"cmap": colours, "vmin": low, "vmax": high, "edgecolor": "face", "linewidth": 0.3}
    mesh = ax.pcolormesh(*edges, np.ma.masked_invalid(values), **options)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        if text is not None and not np.isnan(value):
            red, green, blue, _ = mesh.cmap(mesh.norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            inside: Any = {"ha": "center", "va": "center", "in_layout": False}  # laying out text is most of the time
            ax.text(column, first + row, text(row, column, value), fontsize=size, color=ink, **inside)
    return mesh
