"""Turns a matplotlib figure into SVG that lives inside a page.

In: a figure in the light colours of `canvas.COLOURS`. Out: markup without XML header, fonts or identifiers of its
own that could clash; its text inherits the page's font and its named colours follow the page's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from html import escape

from matplotlib.figure import Figure

from moextend_jax.report.canvas import COLOURS


def inline_svg(figure: Figure, *, name: str, label: str) -> str:
    """`name` is unique in the page and prefixes identifiers; `label` is read out instead of the picture."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg).replace('href="#', f'href="#{name}-')
    # matplotlib writes the font in short form, `font: bold 10px 'DejaVu Sans', ...`: keep weight and size only
    svg = re.sub(r"font: (?:(\d+|bold) )?([\d.]+px) [^;\"]*", _size, svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{colour})")
    width = figure.get_figwidth() * 96 * 1.2  # may grow a little to fill its column
    opening = f'<svg role="img" aria-label="{escape(label)}" style="max-width:{width:.0f}px" '
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda m: f"{opening}{m[1]}>", svg, count=1)
    return re.sub(r"\n\s*", "\n", svg.replace("xlink:href", "href"))


def _size(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" + (f"; font-weight: {match[1]}" if match[1] else "")
