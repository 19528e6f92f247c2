"""Draws how tokens are routed: shares per layer and expert, which layers were chosen, what the new experts get.

In: what `workdir.py` reads of select/routing.json and finetune/routing.json. Out: panels on an Axes that the page
shows one by one, and the PNG file of `moextend select`. The scales cividis and PuOr suit the colour-blind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moextend_jax.report.canvas import IMAGE, LINE, MUTED, OURS, RIVAL, TEXT, canvas, heatmap
from moextend_jax.report.workdir import KINDS, NewExperts, Selection, kind_title, parse_selection

KIND_COLOUR = {"image": IMAGE, "text": TEXT}
NUMBERED_CELLS = 160
"""Heatmaps of at most this many cells print their numbers."""


def routing_picture(routing: Mapping[str, Any], path: Path, *, medium: str) -> None:
    """Writes the PNG of `moextend select`: shares before, after and shift for the medium's and text tokens, and d_j.

    `routing` is the content of select/routing.json; MoextendError if it is not.
    """
    selection = parse_selection(routing, where="routing", medium=medium)
    top, most = scales(selection)
    layers = len(selection.shift_Z)
    tall = heatmap_height(layers)
    with canvas(width=11, height=2 * tall + 2.4) as figure:
        grid = figure.add_gridspec(3, 3, height_ratios=[tall, tall, 2.4])
        for row, kind in enumerate(KINDS):
            panels = selection_panels(selection, kind=kind, top=top, most=most)
            for column, draw in enumerate(panels.values()):
                draw(figure.add_subplot(grid[row, column]))
        bottom = figure.add_subplot(grid[2, :])
        choice_panel(bottom, selection)
        bottom.set_title("Layers that get new experts, and the expert each one copies")
        with path.open("wb") as file:
            figure.savefig(file, dpi=130, format="png")


def selection_panels(selection: Selection, *, kind: str, top: float, most: float) -> dict[str, Callable[[Axes], None]]:
    """Before, after and shift of one kind of token; copied experts are framed in the routing that named them."""
    copied = selection.copied
    before_ZE, after_ZE = selection.before_ZE[kind], selection.after_ZE[kind]
    frames = {"before": (), "after": (), selection.source_under: copied}  # of "" none is drawn
    name = f"{kind_title(kind, medium=selection.medium).capitalize()} tokens"
    panel = partial(routing_panel, first=selection.first)
    return {
        "before": partial(panel, values_ZE=before_ZE, title=f"{name}: before", top=top, marked=frames["before"]),
        "after": partial(panel, values_ZE=after_ZE, title=f"{name}: after", top=top, marked=frames["after"]),
        "shift": partial(panel, values_ZE=after_ZE - before_ZE, title=f"{name}: shift", top=most, shift=True),
    }


def scales(selection: Selection) -> tuple[float, float]:
    """The largest share and the largest change, so that all heatmaps of a selection share two scales."""
    shares = [share_ZE.max() for part in (selection.before_ZE, selection.after_ZE) for share_ZE in part.values()]
    changes = [np.abs(selection.after_ZE[kind] - selection.before_ZE[kind]).max() for kind in KINDS]
    return max(*shares, 1e-6), max(*changes, 1e-6)


def heatmap_height(layers: int) -> float:
    """Inches of a heatmap with its title, axis and colour scale."""
    return 1.1 + max(1.6, 0.22 * layers)


def routing_panel(
    ax: Axes, values_ZE: np.ndarray, *, title: str, top: float, marked: Sequence[tuple[int, int]] = (), first: int = 0,
    shift: bool = False,
) -> None:  # fmt: skip
    """Shares per layer and expert on a scale from 0 to `top`, or with `shift` changes of shares, from -`top`, where no
    change is white. `marked` (row, expert) cells get a frame. `first` is the layer of row 0."""

    def text(row: int, column: int, value: float) -> str:
        return f"{'+' if shift and round(100 * value) > 0 else ''}{round(100 * value)}"

    numbered = text if values_ZE.size <= NUMBERED_CELLS else None
    colours, low = ("PuOr_r", -top) if shift else ("cividis", 0)
    mesh = heatmap(ax, values_ZE, colours=colours, low=low, high=top, first=first, size=7.5, text=numbered)
    ax.set(title=title, xlabel="expert", ylabel="layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=17))
    percent = PercentFormatter(1, decimals=0)
    bar = ax.figure.colorbar(mesh, ax=ax, location="bottom", aspect=40, pad=0.02, format=percent)
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    bar.ax.tick_params(length=0, labelsize=8)
    for row, expert in marked:
        frame = Rectangle((expert - 0.5, first + row - 0.5), 1, 1, fill=False, edgecolor=RIVAL, linewidth=2.2)
        ax.add_patch(frame)


def choice_panel(ax: Axes, selection: Selection) -> None:
    """d_j per layer; chosen layers are filled and named after the experts that are copied."""
    first, rows = selection.first, range(len(selection.shift_Z))
    chosen = {row: ", ".join(f"{e}" for z, e in selection.copied if z == row) for row in selection.chosen}
    colours = [OURS if row in chosen else LINE for row in rows]
    ax.bar([first + row for row in rows], selection.shift_Z, color=colours, width=0.8)
    for row, experts in chosen.items():
        top = (first + row, selection.shift_Z[row])
        ax.annotate(experts, top, (0, 2), textcoords="offset points", ha="center", color=OURS)
    ax.set(xlabel="layer", ylabel="shift of routing $d_j$")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    ax.margins(x=0.01, y=0.12)


def share_panel(ax: Axes, new: NewExperts) -> None:
    """Two bars per new expert: share of the medium's tokens and of the text tokens that pick it."""
    new_experts, (at, x) = new.has_YX.shape[1], np.nonzero(new.has_YX)
    layers = new.first + np.array(new.layers, int)[at]
    names = [f"{layer}" if new_experts == 1 else f"{layer}.{n}" for layer, n in zip(layers, x, strict=True)]
    places = np.arange(len(names))
    for kind, offset in zip(KINDS, (-0.2, 0.2), strict=True):
        label = f"{kind_title(kind, medium=new.medium)} tokens"
        ax.bar(places + offset, new.share_YX[kind][new.has_YX], width=0.4, color=KIND_COLOUR[kind], label=label)
    dashed: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
    ax.hlines(new.fair_Y[at], places - 0.5, places + 0.5, **dashed, label="if all experts were used alike")
    ax.set_xticks(places, names)
    ax.set(
        xlabel="extended layer" if new_experts == 1 else "extended layer . new expert",
        ylabel="share of tokens" if new.of_tokens else "share of picks",
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3, fontsize=8.5, handlelength=1.2, columnspacing=1)
