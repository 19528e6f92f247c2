"""A console that tables fit into, whether or not there is a terminal."""

from __future__ import annotations

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; a log or a pipe has no width, and rich would cut tables to 80 columns."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)
