"""What every picture shares: its colours, its style, an empty figure.

Colours are Okabe and Ito's, which the colour-blind can tell apart, and lighter ones of the same hue for dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
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
