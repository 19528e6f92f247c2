"""What pages are made of: the file around them, a section, a picture, the sentence that says how to read it.

In: markup of the parts, or functions that draw on an Axes. Out: HTML; texts are markup already, so escape what comes
from outside.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moextend_jax.report.canvas import COLOURS, canvas
from moextend_jax.report.style import CSS


def write_page(path: Path, parts: Sequence[str], *, title: str, head: str = "") -> None:
    """One file that needs nothing else; `title` is plain text, `head` further markup of the page's head."""
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n{head}</head>\n"
        "<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def picture(draw: Callable[[Axes], None], *, name: str, label: str, width: float, height: float) -> str:
    """A figure of so many inches; `name` and `label` as in `inline_svg`."""
    with canvas(width=width, height=height) as figure:
        draw(figure.add_subplot())
        return f"<figure>{inline_svg(figure, name=name, label=label)}</figure>"


def inline_svg(figure: Figure, *, name: str, label: str) -> str:
    """A figure in the light colours of `COLOURS` as SVG that lives inside a page, without XML header, fonts or
    identifiers that could clash. Its text has the page's font, its named colours the page's light or dark scheme.

    Args:
      name: unique in the page; prefixes identifiers. label: is read out instead of the picture.
    """
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


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, ours: str | None = None) -> str:
    """A line per row; the one whose first cell is `ours` stands out."""
    lines = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
    for cells in rows:
        marked = ' class="ours"' if cells[0] == ours else ""
        lines.append(f"<tr{marked}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, ours: str | None = None) -> str:
    """The same of cells that are text, not markup."""
    return table([*map(escape, heads)], ([*map(escape, cells)] for cells in rows), ours=ours)


def how(text: str) -> str:
    """The sentence beneath a picture that says how to read it."""
    return f'<p class="how">{text}</p>'


def beside(drawn: str, text: str) -> str:
    """A picture and its sentence, side by side where there is room."""
    return f'<div class="beside">{drawn}{how(text)}</div>'


def pictures(drawn: Sequence[str], text: str, *, columns: str = "pictures") -> str:
    """Several pictures above their sentence, in rows as wide as the page allows; `columns` is their class."""
    return f'<div class="{columns}">{"".join(drawn)}</div>{how(text)}'
