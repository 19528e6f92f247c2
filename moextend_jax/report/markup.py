"""What pages are made of: the file around them, a section, a picture, the sentence that says how to read it.

In: markup of the parts, or functions that draw on an Axes. Out: HTML; texts are markup already, so escape what comes
from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.axes import Axes

from moextend_jax.report.canvas import canvas
from moextend_jax.report.style import CSS
from moextend_jax.report.svg import inline_svg


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
