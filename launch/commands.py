"""What the launchers share: `OPTIONS -- MOEXTEND ARGUMENTS` apart, and a command shown or run.

A command is always a list of words, and a shell line is always made of one by `shlex.join`: that is how spaces and
quotes in paths and values survive.
"""

from __future__ import annotations

import argparse
import itertools
import re
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
    if moextend and not getattr(options, "script", None):
        check(moextend)
    return options, moextend


def check(moextend: list[str]) -> None:
    """Ends with the message that the command would end with over there, where it may have waited hours for its turn."""
    named = [word.removeprefix("--config=") for before, word in itertools.pairwise(moextend)
             if word.startswith("--config=") or before == "--config" or before == moextend[0]]  # fmt: skip
    if any(re.search(r"[/.]", name) and not Path(re.sub(r":\w*$", "", name)).is_file() for name in named):
        return  # a file of settings that is only there
    sys.path.insert(0, str(ROOT))
    try:
        from moextend_jax import cli
        from moextend_jax.config import MoextendError
    except ImportError:  # a machine that only starts runs
        return
    try:
        cli.check([word.replace("gs://", "/") for word in moextend])  # buckets need a package that is there
    except MoextendError as error:
        print(f"launch: moextend would refuse this: {error}", file=sys.stderr)
        sys.exit(2)


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
