"""Questions without some of their media: what is asked, and accuracies and importance worked out by hand."""

from __future__ import annotations

import pytest

from moextend_jax.evaluate.importance import Variant, left_out_summary, right_by_media, variants

pytestmark = pytest.mark.smoke

NONE, IMAGE, SOUND = frozenset(), frozenset({"image"}), frozenset({"sound"})
MEDIA_OF = [("image", "sound"), ("image",), ()]
NAMES = ("image", "sound", "speech")


def test_what_is_asked():
    assert variants(MEDIA_OF, leave_out="none") == []
    each = [Variant(0, IMAGE), Variant(0, SOUND), Variant(1, NONE)]
    assert variants(MEDIA_OF, leave_out="each") == each
    assert variants(MEDIA_OF, leave_out="subsets") == [Variant(0, NONE), *each]


def tables(leave_out, right_then):
    asked = variants(MEDIA_OF, leave_out=leave_out)
    return right_by_media(MEDIA_OF, [True, True, False], asked=asked, right_then=right_then)


def test_accuracy_without_each_medium():
    ours = left_out_summary({"moextend": tables("each", [True, False, False])}, media=NAMES, leave_out="each")
    # without the image: question 0 by sound alone is wrong, 1 without anything is wrong, 2 has none and is wrong
    assert ours == {"without": {"image": {"moextend": 0.0}, "sound": {"moextend": pytest.approx(2 / 3)}}}


def test_every_subset_gives_importance_too():
    of = {"moextend": tables("subsets", [False, True, False, True]), "full": tables("subsets", [True] * 4)}
    ours = left_out_summary(of, media=NAMES, leave_out="subsets")
    assert ours["without"]["image"] == {"moextend": pytest.approx(1 / 3), "full": pytest.approx(2 / 3)}
    # question 0: (1 + 1) / 2 - 0 for the image, (0 + 1) / 2 - 1 for the sound; question 1: 1 - 1
    media = ours["importance"]["moextend"]["media"]
    assert media["image"] == {"importance": 0.5, "questions": 2, "helps": 1, "hurts": 0}
    assert media["sound"] == {"importance": -0.5, "questions": 1, "helps": 0, "hurts": 1}
    assert ours["importance"]["full"]["media"]["image"]["importance"] == 0.0


def test_nothing_asked_nothing_told():
    assert left_out_summary({"moextend": tables("none", [])}, media=NAMES, leave_out="none") == {}
