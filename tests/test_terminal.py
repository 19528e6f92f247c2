"""Tables are not cut where there is no terminal."""

from __future__ import annotations

from moextend_jax.terminal import console


def test_a_pipe_has_room_for_a_wide_table(capsys):
    console().print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"
