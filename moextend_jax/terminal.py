"""Standard input and output, whether or not they are a terminal: lines in, tables that fit and JSON out."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def lines_of_stdin() -> Iterator[str]:
    """Bytes that are no text stay in them, so that the tokenizer names them; else reading would end in a traceback."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    yield from sys.stdin


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; a log or a pipe has no width, and rich would cut tables to 80 columns."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)


def table_of(headings: Sequence[str], rows: Iterable[Sequence[str]] = (), *, left: int = 1, **options: Any) -> Table:
    """A table whose first `left` columns hold words, and the others numbers, at the right. options: rich's."""
    table = Table(**options)
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="left" if n < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def as_json(value: Any) -> Any:
    """What JSON can say of a value: NamedTuples as objects, null for a number that is not finite."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quoted(text: str) -> str:
    """What a file says, for a screen: no markup of rich's is found in it, and no letter moves the cursor."""
    return escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:2000]))
