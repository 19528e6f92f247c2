"""What the launchers share: `OPTIONS -- MOEXTEND ARGUMENTS` apart, and a command shown or run.

A command is always a list of words, and a shell line is always made of one by `shlex.join`: that is how spaces and
quotes in paths and values survive.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every launcher has; `%(prog)s [OPTIONS] -- run --config NAME --workdir DIR ...`."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [OPTIONS] -- COMMAND --config NAME[:arg] [--config.field=value ...] --workdir DIR",
        allow_abbrev=False,
    )
    made.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str], *, needed: bool = True):
    """(options, the `moextend` command's words). What stands after the first `--` is passed on untouched."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options, moextend = made.parse_args(argv[:cut]), argv[cut + 1 :]
    if needed and not moextend:
        made.error("say what to run after --, e.g. -- run --config demo --workdir work/demo")
    return options, moextend


def run(command: Sequence[str], *, dry_run: bool, stdin: str | None = None) -> int:
    """Runs a command, or prints the line that a shell would run. Standard input is shown as a here-document."""
    if dry_run:
        print(shlex.join(command) + (f" <<'END'\n{stdin}END" if stdin is not None else ""))
        return 0
    try:
        return subprocess.run(command, input=stdin, text=True, check=False).returncode
    except FileNotFoundError:
        print(f"launch: there is no {command[0]!r} on this machine", file=sys.stderr)
        return 2
