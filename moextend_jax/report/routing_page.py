"""Draws routing statistics: heatmaps of picks and mean probabilities, entropy and load balance, as PNG and HTML.

In: one or two `Stats` with their names. Out: PREFIX.png, and PREFIX.html, one file that needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moextend_jax.report.canvas import IMAGE, MUTED, TEXT, canvas
from moextend_jax.report.markup import picture, pictures, section, write_page
from moextend_jax.report.routing_pictures import heatmap_height, routing_panel, share_panel
from moextend_jax.report.workdir import NewExperts
from moextend_jax.routing.compare import is_extension_of, taken
from moextend_jax.routing.stats import KINDS, Kind, Load, Stats, load_of, on_first_columns

Panel = tuple[str, Callable[[Axes], None]]
"""What the picture is called when it is read out, and the function that draws it."""
NAME = 18
"""Characters of a name that titles and legends have room for."""
_LINES = {"text": TEXT, "image": IMAGE}
_CELLS = (
    "A cell is in per cent: the share of a layer’s picks that went to an expert, or the mean probability that its "
    "router gave it; rows add up to 100. A difference is the second less the first."
)
_NEW = (
    "Of a layer’s picks, what went to its new experts; and of the experts that tokens with a new one picked before and "
    "no longer pick, the share of each (where both files hold the picks of the same tokens)."
)
_EVENNESS = (
    "Balance is O times the sum over a layer’s O experts of share of picks times mean probability: 1 (dotted) where "
    "all are used alike. The entropy of the mean probability is high where a layer spreads its tokens, that of single "
    "tokens where its router is unsure; the dotted line is the logarithm of O."
)


def write_routing_page(named: Sequence[tuple[str, Stats]], prefix: Path) -> tuple[Path, Path]:
    """Writes both files and returns their paths. Of two statistics, the second less the first is drawn too; of a model
    before and after its extension, that of the experts that both have, and what the new ones get by themselves."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    named = [(name if len(name) <= NAME else f"…{name[1 - NAME :]}", stats) for name, stats in named]
    grown = len(named) == 2 and is_extension_of(named[0][1], named[1][1])
    shared = [(name, on_first_columns(stats, named[0][1].columns)) for name, stats in named] if grown else named
    heatmaps, lines = _heatmaps(shared), _lines(named)
    new = _new_panels(named[0][1], named[1][1]) if grown else []
    layers = len(named[0][1].has_ZO)
    png, page = (prefix.with_name(f"{prefix.name}.{ending}") for ending in ("png", "html"))
    _png(png, heatmaps, [*new, *lines], layers=layers)
    title = f"Routing: {' and '.join(name for name, _ in named)}"
    about = " · ".join(
        f"{name}: {stats.tokens['text']} text and {stats.tokens['image']} image tokens, {stats.experts} experts, "
        f"top-{stats.top_k}, from {stats.source}"
        for name, stats in named
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(about)}</p>']

    def add(title: str, name: str, panels: Sequence[Panel], note: str, columns: str, **size: float) -> None:
        drawn = [picture(draw, name=f"{name}-{n}", label=label, **size) for n, (label, draw) in enumerate(panels)]
        parts.append(section(title, pictures(drawn, note, columns=columns)))

    for kind, rows in heatmaps.items():
        panels, size = sum(rows, []), {"width": 3.3, "height": heatmap_height(layers)}
        add(f"{kind.capitalize()} tokens", kind, panels, _CELLS, "pictures", **size)
    if new:
        add("New experts", "new", new, _NEW, "pictures two", width=4.9, height=2.9)
    add("Evenness", "line", lines, _EVENNESS, "pictures two", width=4.9, height=2.9)
    write_page(page, parts, title=title)
    return png, page


def _new_panels(before: Stats, after: Stats) -> list[Panel]:
    """What the new experts get, and where tokens can be compared, whose picks they took, by kind of token."""
    first = before.columns
    extended = np.flatnonzero(after.has_ZO[:, first:].any(axis=1))
    layers = [after.layers[z] for z in extended]
    has_YX = after.has_ZO[extended, first:]
    share_YX = {kind: load_of(after, kind).share_ZO[extended, first:] for kind in KINDS}
    new = NewExperts(tuple(layers), has_YX, share_YX, 1 / after.outputs_Z[extended], of_tokens=False)
    panels: list[Panel] = [("share of picks of new experts", partial(share_panel, new=new))]
    for kind in KINDS:
        from_YE = [row.from_E or [0.0] * first for row in taken(before, after) if row.kind == kind]
        if np.any(from_YE):
            draw = partial(_from_panel, from_YE=np.array(from_YE), layers=layers, title=f"whose picks, {kind} tokens")
            panels.append((f"whose picks new experts took, {kind} tokens", draw))
    return panels


def _from_panel(ax: Axes, *, from_YE: np.ndarray, layers: list[int], title: str) -> None:
    routing_panel(ax, from_YE, title=title, top=float(from_YE.max()))
    ax.set(xlabel="expert that lost them")
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])


def _heatmaps(named: Sequence[tuple[str, Stats]]) -> dict[str, list[list[Panel]]]:
    """Per kind of token that both have, a row of panels for picks and one for mean probabilities."""
    found: dict[str, list[list[Panel]]] = {}
    for kind in KINDS:
        if not all(stats.tokens[kind] for _, stats in named):
            continue
        loads = [load_of(stats, kind) for _, stats in named]
        names = [name for name, _ in named]
        first = named[0][1].layers[0]
        picks = _panels([load.share_ZO for load in loads], names, what="picks", kind=kind, first=first)
        probs = _panels([load.probs_ZO for load in loads], names, what="probability", kind=kind, first=first)
        found[kind] = [picks + probs] if len(named) == 1 else [picks, probs]
    return found


def _panels(values: list[np.ndarray], names: list[str], *, what: str, kind: Kind, first: int) -> list[Panel]:
    top = max(float(value_ZO.max()) for value_ZO in values) or 1e-6
    titles = [f"{name}: {what}, {kind}" for name in names]
    panels: list[Panel] = [
        (f"{title} tokens", partial(routing_panel, values_ZE=value_ZO, title=title, top=top, first=first))
        for title, value_ZO in zip(titles, values, strict=True)
    ]
    if len(values) == 2:
        shift_ZO, title = values[1] - values[0], f"difference of {what}, {kind}"
        most = max(float(np.abs(shift_ZO).max()), 1e-6)
        draw = partial(routing_panel, values_ZE=shift_ZO, title=title, top=most, first=first, shift=True)
        panels.append((f"{title} tokens", draw))
    return panels


def _lines(named: Sequence[tuple[str, Stats]]) -> list[Panel]:
    def draw(ax: Axes, value: Callable[[Load], np.ndarray], title: str, even: float) -> None:
        for (name, stats), style in zip(named, ("-", "--"), strict=False):
            for kind in KINDS:
                if stats.tokens[kind]:
                    label = f"{name}, {kind}" if len(named) > 1 else f"{kind} tokens"
                    ax.plot(
                        stats.layers, value(load_of(stats, kind)), style, marker=".", color=_LINES[kind], label=label
                    )
        ax.axhline(even, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        ax.set(title=title, xlabel="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2)

    most = float(np.log(named[0][1].outputs_Z.max()))
    wanted = (
        ("Load balance", lambda load: load.balance_Z, 1.0),
        ("Busiest expert over the mean", lambda load: load.busiest_Z, 1.0),
        ("Entropy of the mean probability, nats", lambda load: load.entropy_Z, most),
        ("Mean entropy of single tokens, nats", lambda load: load.token_entropy_Z, most),
    )
    return [(title, partial(draw, value=value, title=title, even=even)) for title, value, even in wanted]


def _png(path: Path, heatmaps: dict[str, list[list[Panel]]], lines: list[Panel], *, layers: int) -> None:
    rows = [row for kind in heatmaps.values() for row in kind]
    tall = heatmap_height(layers)
    with canvas(width=11, height=len(rows) * tall + 3.2 * -(-len(lines) // 2)) as figure:
        below = -(-len(lines) // 2)
        grid = figure.add_gridspec(len(rows) + below, 6, height_ratios=[tall] * len(rows) + [3.2] * below)
        for y, row in enumerate(rows):
            wide = 6 // max(2, len(row))
            for x, (_, draw) in enumerate(row):
                draw(figure.add_subplot(grid[y, x * wide : (x + 1) * wide]))
        for n, (_, draw) in enumerate(lines):
            draw(figure.add_subplot(grid[len(rows) + n // 2, 3 * (n % 2) : 3 * (n % 2) + 3]))
        figure.savefig(path, dpi=130)
