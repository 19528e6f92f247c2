"""Standard input and output, whether or not they are a terminal: lines in, tables that fit out."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape


def lines_of_stdin() -> Iterator[str]:
    """Bytes that are no text stay in them, so that the tokenizer names them; else reading would end in a traceback."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    yield from sys.stdin


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; a log or a pipe has no width, and rich would cut tables to 80 columns."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)


def quoted(text: str) -> str:
    """What a file says, for a screen: no markup of rich's is found in it, and no letter moves the cursor."""
    return escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:2000]))
