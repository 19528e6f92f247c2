"""Modality importance: which subsets are asked, cases worked out by hand, questions of unlike media, the table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moextend_jax.evaluate.importance import importance, importance_table, question_importance, subsets

pytestmark = pytest.mark.smoke

IMAGE, AUDIO = frozenset({"image"}), frozenset({"audio"})
BOTH, NONE = IMAGE | AUDIO, frozenset()


def test_every_subset_is_asked_from_nothing_to_all():
    assert subsets(("image", "audio")) == [NONE, IMAGE, AUDIO, BOTH]
    assert subsets(()) == [NONE]
    assert len(set(subsets("abcd"))) == 16


@pytest.mark.parametrize(
    ("right", "image", "audio"),
    [
        ({NONE: 0, IMAGE: 1, AUDIO: 0, BOTH: 1}, 1.0, -0.5),  # (1 + 1) / 2 - 0; (0 + 1) / 2 - 1
        ({NONE: 1, IMAGE: 1, AUDIO: 1, BOTH: 1}, 0.0, 0.0),
        ({NONE: 0, IMAGE: 0, AUDIO: 0, BOTH: 1}, 0.5, 0.5),
    ],
)
def test_two_media(right, image: float, audio: float):
    assert question_importance(right) == {"image": image, "audio": audio}


def test_the_question_alone_counts_only_for_a_single_medium():
    for alone in (0, 1):
        assert question_importance({NONE: alone, IMAGE: 1, AUDIO: 0, BOTH: 1})["image"] == 1.0
        assert question_importance({NONE: alone, IMAGE: 1}) == {"image": 1.0 - alone}
    assert question_importance({NONE: 1}) == {}


def test_a_question_asked_with_less_is_the_callers_mistake():
    with pytest.raises(ValueError, match="not all subsets of"):
        question_importance({NONE: 0, IMAGE: 1, BOTH: 1})


def test_means_and_counts_are_over_the_questions_that_have_the_medium():
    measured = importance(
        [{NONE: 0, IMAGE: 1, AUDIO: 0, BOTH: 1}, {NONE: 0, IMAGE: 0, AUDIO: 1, BOTH: 1}, {NONE: 1, IMAGE: 0}],
        media=("image", "audio"),
    )
    assert measured == {
        "questions": 3,
        "media": {
            "image": {"importance": pytest.approx((1.0 - 0.5 - 1.0) / 3), "questions": 3, "helps": 1, "hurts": 2},
            "audio": {"importance": 0.25, "questions": 2, "helps": 1, "hurts": 1},
        },
        "subsets": {
            "none": {"right": 1.0, "questions": 3, "accuracy": pytest.approx(1 / 3)},
            "image": {"right": 1.0, "questions": 3, "accuracy": pytest.approx(1 / 3)},
            "audio": {"right": 1.0, "questions": 2, "accuracy": 0.5},
            "image+audio": {"right": 2.0, "questions": 2, "accuracy": 1.0},
        },
    }
    out = io.StringIO()
    Console(file=out, width=120).print(importance_table("importance", measured))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines()]
    assert ["audio", "+0.250", "1", "1", "", "2"] in lines
    assert ["image+audio", "", "", "", "1.000", "2"] in lines
