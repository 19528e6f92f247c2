"""What chains of extensions learnt and forgot: the matrix of scores with its numbers, bars of transfer and forgetting.

In: `chains` of summary.json, {name: what `evaluate/chains.py` returned}. Out: panels on an Axes, and HTML; "" where
there is no chain. Transfer and forgetting are computed again from the scores, which are checked thereby.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moextend_jax.evaluate.chains import CHAIN_TITLES, columns, learnt_on, score_matrix
from moextend_jax.report.canvas import LINE, MUTED, OURS, RIVAL, heatmap
from moextend_jax.report.markup import how, picture, pictures
from moextend_jax.report.workdir import malformed


def chains_section(summary: Mapping[str, Any] | None) -> str:
    """Raises MoextendError where summary.json's chains are not what `score_matrix` returned."""
    chains = (summary or {}).get("chains")
    if not chains:
        return ""
    parts = []
    with malformed("summary.json: its chains"):
        chains = {str(name): score_matrix(of["scores"]) for name, of in chains.items()}
    for n, (name, chain) in enumerate(chains.items()):
        title = CHAIN_TITLES.get(name, name)
        rows, tested = len(chain["scores"]), len(columns(chain))
        drawn = [
            picture(
                lambda ax, chain=chain: matrix_panel(ax, chain),
                name=f"chain-{n}-scores", label=f"Scores of {title}: after each extension, on each",
                width=1.6 + 0.95 * tested, height=1.1 + 0.62 * rows,
            ),
            picture(
                lambda ax, chain=chain: bars_panel(ax, chain),
                name=f"chain-{n}-bars", label=f"Transfer and forgetting of {title}",
                width=1.6 + 0.95 * rows, height=2.6,
            ),
        ]  # fmt: skip
        lost = f"Backward transfer {chain['backward_transfer']:+.3f}."
        parts.append(f"<h3>{escape(title)}</h3>" + pictures(drawn, lost, columns="pictures two"))
    return "".join(parts) + how(
        "A row is the model after one more extension was learnt, a column what it was asked; beneath a score is how it "
        "changed since that extension was new. Transfer of an extension is its own score right after it was learnt, "
        "forgetting the mean of what all earlier ones have lost by then, so that 0 is perfect; backward transfer is "
        "what the earlier ones gained by the end. Test sets are averaged first, then extensions; the formulas are ours."
    )


def matrix_panel(ax: Axes, chain: Mapping[str, Any]) -> None:
    """A heat map with its numbers, on a scale from 0 to 1, wider where scores are; untested cells stay empty."""
    rows, tested = list(chain["scores"]), columns(chain)
    values = np.array([[chain["scores"][after].get(on, np.nan) for on in tested] for after in rows])

    def text(row: int, column: int, value: float) -> str:
        extension = learnt_on(tested[column])
        own = chain["scores"].get(extension, {}).get(tested[column])
        later = extension in rows and row > rows.index(extension)
        return f"{value:.3f}" + (f"\n{value - own:+.3f}" if later and own is not None else "")

    low, high = min(0.0, np.nanmin(values)), max(1.0, np.nanmax(values))
    heatmap(ax, values, colours="cividis", low=low, high=high, text=text)
    ax.set(ylabel="after")
    ax.set_xticks(range(len(tested)), [on.replace("/", "\n").replace("$", r"\$") for on in tested])
    ax.set_yticks(range(len(rows)), [after.replace("$", r"\$") for after in rows])


def bars_panel(ax: Axes, chain: Mapping[str, Any]) -> None:
    """Two bars per extension: its transfer, and the forgetting of those before it."""
    names = list(chain["scores"])
    places = np.arange(len(names))
    for key, colour, offset in (("transfer", OURS, -0.2), ("forgetting", RIVAL, 0.2)):
        values = [chain[key][name] for name in names]
        bars = ax.bar(places + offset, values, width=0.38, color=colour, label=key)
        ax.bar_label(bars, [f"{value:.3f}" for value in values], padding=2, fontsize=8.5)
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.grid(axis="y", color=LINE)
    ax.set_xticks(places, [name.replace("$", r"\$") for name in names])
    ax.margins(y=0.16)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, fontsize=8.5, handlelength=1.2)
