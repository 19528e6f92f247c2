"""What the tools share at the terminal: command lines in, mistakes as one line; a console that tables fit into."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, get_args

from rich.console import Console

from moextend_jax.config import MoextendError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, whose mistakes are ours: argparse would print its usage and exit."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise MoextendError(f"{self.prog.removeprefix('moextend ')}: {message}; see `{self.prog} --help`")


def option(kind: Any) -> Callable[[str], float]:
    """The `type` of an option that is a number with a range, e.g. `option(config.Count)`."""
    plain, bounds = get_args(kind)

    def parse(text: str) -> float:
        try:
            value = plain(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not of type {plain.__name__}") from None
        if value not in bounds:
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; a log or a pipe has no width, and rich would cut tables to 80 columns."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)
