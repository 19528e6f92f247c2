"""What the tools share at the terminal: command lines in, mistakes as one line; a console that tables fit into."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from rich.console import Console

from moextend_jax.config import MoextendError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, whose mistakes are ours: argparse would print its usage and exit."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise MoextendError(f"{self.prog.removeprefix('moextend ')}: {message}; see `{self.prog} --help`")


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; a log or a pipe has no width, and rich would cut tables to 80 columns."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)
