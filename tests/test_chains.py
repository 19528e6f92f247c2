"""Transfer and forgetting of a chain: cases worked out by hand, exact zeros, bad scores, the table."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.chains import chain_table, columns, score_matrix

pytestmark = pytest.mark.smoke

CHAIN = {
    "image": {"image": 0.9},
    "sound": {"image": 0.8, "sound/held_out": 0.6, "sound/other": 0.2},
    "speech": {"image": 0.9, "sound/held_out": 0.5, "sound/other": 0.0, "speech": 0.7},
}


def test_sets_are_averaged_first_then_extensions():
    ours = score_matrix(CHAIN)
    assert ours["transfer"] == pytest.approx({"image": 0.9, "sound": 0.4, "speech": 0.7})
    # speech: nothing of image, and of sound the mean of 0.1 and 0.2
    assert ours["forgetting"] == pytest.approx({"image": 0.0, "sound": 0.1, "speech": 0.075})
    assert ours["backward_transfer"] == pytest.approx(-0.075)
    assert ours["scores"] == CHAIN


def test_nothing_forgotten_is_exactly_nothing():
    third = 1 / 3
    row = {"image": third, "sound/a": 0.1, "sound/b": 0.7}
    ours = score_matrix({"image": {"image": third}, "sound": row, "speech": {**row, "speech": 0.3}})
    for value in (*ours["forgetting"].values(), ours["backward_transfer"]):
        assert value == 0.0 and math.copysign(1, value) == 1


def test_scores_before_learning_count_nowhere():
    ahead = {**CHAIN, "image": {"image": 0.9, "speech": 0.01}}
    without = score_matrix(CHAIN)
    assert {**score_matrix(ahead), "scores": None} == {**without, "scores": None}
    assert columns(score_matrix(ahead)) == ["image", "sound/held_out", "sound/other", "speech"]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"image": {"sound": 0.5}}, "no score on image right after it was learnt; there are sound"),
        ({**CHAIN, "speech": {"image": 0.9, "speech": 0.7}}, "no score on sound/held_out, sound/other after speech"),
        ({"image": {"image": math.nan}}, "score on image after image is nan, not a finite number"),
        ({"image": {"image": True}}, "is True, not a finite number"),
    ],
)
def test_bad_scores_are_refused(scores, message: str):
    with pytest.raises(MoextendError, match=message):
        score_matrix(scores)


def test_the_table_prints_every_number():
    out = io.StringIO()
    Console(file=out, width=120).print(chain_table("open", score_matrix(CHAIN)))
    text = out.getvalue()
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 3}
    assert [cell.strip() for cell in lines["speech"].split("│")[2:-1]] == [
        "0.900", "0.500", "0.000", "0.700", "0.700", "+0.075",
    ]  # fmt: skip
    assert "backward transfer -0.075" in text and text.startswith("Extensions without isolation")
