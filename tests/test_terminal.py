"""Mistakes on a tool's command line are one `MoextendError`; tables are not cut where there is no terminal."""

from __future__ import annotations

import pytest

from moextend_jax.config import MoextendError
from moextend_jax.terminal import Parser, console


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lay", "clip"], "unrecognized arguments: --lay clip"),  # no abbreviation of --layout
        (["--layout", "gguf"], "invalid choice: 'gguf'"),
        (["--layout"], "expected one argument"),
    ],
)
def test_a_mistake_names_the_command_and_its_help(arguments: list[str], said: str):
    parser = Parser(prog="moextend export")
    parser.add_argument("--layout", choices=["clip", "llava"])
    assert parser.parse_args(["--layout", "clip"]).layout == "clip"
    with pytest.raises(MoextendError) as error:
        parser.parse_args(arguments)
    assert str(error.value).startswith("export: ") and said in str(error.value)
    assert str(error.value).endswith("; see `moextend export --help`")


def test_a_pipe_has_room_for_a_wide_table(capsys):
    console().print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"
