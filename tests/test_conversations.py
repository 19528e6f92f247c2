from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moextend_jax.config import IGNORE, RECIPES, MoextendError
from moextend_jax.data.conversations import encode_conversation, encode_prompt
from moextend_jax.data.tokenizer import load_tokenizer

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
PAPER, RELEASED = RECIPES["paper"], RECIPES["released"]
INST, END_INST = [733, 16289, 28793], [733, 28748, 16289, 28793]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


def talk(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def encode(turns, tokenizer, *, images=0, recipe=PAPER, patches=4, **more):
    return encode_conversation(
        turns, example_id="ex7", items={"image": [patches] * images}, tokenizer=tokenizer, recipe=recipe, **more
    )


def test_mixtral_template_is_the_official_one(tokenizer):
    got = encode(talk("hello", "hi there", "what is this?", "a cat"), tokenizer)
    pieces = [1, *INST, 6312, 28709, *END_INST, 12014, 736, 2]
    pieces += [*INST, 767, 349, 456, 28804, *END_INST, 264, 5255, 2]
    assert got.ids_L.tolist() == pieces
    answers = [12014, 736, 2], [264, 5255, 2]
    assert [id for id in got.labels_L.tolist() if id != IGNORE] == answers[0] + answers[1]
    assert got.labels_L[-3:].tolist() == answers[1]
    assert (got.labels_L[:9] == IGNORE).all() and got.segments_L.all()


def test_prompt_is_the_beginning_of_the_conversation(tokenizer):
    for recipe in (PAPER, RELEASED):
        whole = encode(talk("<image>\nwhat?", "a cat"), tokenizer, images=1, recipe=recipe)
        prompt = encode_prompt("what?", items={"image": [4]}, tokenizer=tokenizer, recipe=recipe)
        kept = len(prompt.ids_L)
        np.testing.assert_array_equal(whole.ids_L[:kept], prompt.ids_L)
        np.testing.assert_array_equal(whole.places_L[:kept], prompt.places_L)
        assert (whole.labels_L[1:kept] == IGNORE).all() and whole.labels_L[kept] != IGNORE
        assert prompt.ids_L[-4:].tolist() == END_INST


def test_image_spans(tokenizer):
    got = encode(talk("see <image> and <image>\nwhich?", "both"), tokenizer, images=2, patches=3)
    tags = tokenizer.tags
    start = np.flatnonzero(got.ids_L == tags.start)
    assert got.items == {"image": 2} and len(start) == 2
    for m, s in enumerate(start):
        assert got.ids_L[s : s + 5].tolist() == [tags.start, tags.pad, tags.pad, tags.pad, tags.end]
        assert got.places_L[s : s + 5].tolist() == [-1, 3 * m, 3 * m + 1, 3 * m + 2, -1]
    assert (got.places_L >= 0).sum() == 6
    assert 28705 not in got.ids_L.tolist()  # no token for a lone space


def test_control_sequences_in_text_stay_text(tokenizer):
    assert encode(talk("</s><s>", "a"), tokenizer).ids_L.tolist().count(2) == 1
    with pytest.raises(MoextendError, match="ex7.*control character"):
        encode(talk("a\0b", "a"), tokenizer)


def test_turns(tokenizer):
    turns = talk("<image> one?", "1", "two?", "2", "three?", "3")
    whole, first = encode(turns, tokenizer, images=1), encode(turns[:2], tokenizer, images=1)
    kept = encode(turns, tokenizer, images=1, recipe=replace(PAPER, turns="first"))
    np.testing.assert_array_equal(kept.ids_L, first.ids_L)
    cut = encode(turns, tokenizer, images=1, length=len(whole.ids_L) - 1, too_long="drop_turns")
    np.testing.assert_array_equal(cut.ids_L, encode(turns[:4], tokenizer, images=1).ids_L)
    with pytest.raises(MoextendError, match="ex7.*do not fit a row of 20"):
        encode(turns, tokenizer, images=1, length=20)
    with pytest.raises(MoextendError, match="ex7.*do not fit a row of 10"):
        encode(turns, tokenizer, images=1, length=10, too_long="drop_turns")


def test_a_system_turn_goes_before_the_first_question(tokenizer):
    system = [{"from": "system", "value": "be brief"}]
    for recipe in (PAPER, RELEASED):
        folded = encode(talk("be brief\n\n<image>\nwhat?", "a cat", "and?", "no"), tokenizer, images=1, recipe=recipe)
        got = encode(system + talk("<image>\nwhat?", "a cat", "and?", "no"), tokenizer, images=1, recipe=recipe)
        np.testing.assert_array_equal(got.ids_L, folded.ids_L)
        np.testing.assert_array_equal(got.labels_L, folded.labels_L)
        prompt = encode_prompt("what?", items={"image": [4]}, system="be brief", tokenizer=tokenizer, recipe=recipe)
        np.testing.assert_array_equal(got.ids_L[: len(prompt.ids_L)], prompt.ids_L)


SYSTEM = {"from": "system", "value": "be brief"}


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([SYSTEM], 0, "roles must alternate"),
        ([SYSTEM, SYSTEM, *talk("a?", "b")], 0, "roles must alternate"),
        ([*talk("a?", "b"), SYSTEM], 0, "roles must alternate"),
        ([{"from": "system", "value": "<image>"}, *talk("a?", "b")], 0, "system turn holds an <image>"),
        ([{"from": "function", "value": "x"}, *talk("a?", "b")], 0, "there are system, human and gpt"),
        (talk("<image> a?", "b"), 0, "1 <image> marks.*0 images"),
        (talk("a?", "b"), 1, "0 <image> marks.*1 images"),
        (talk("a?"), 0, "roles must alternate"),
        ([], 0, "roles must alternate"),
        ([{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}], 0, "roles must alternate"),
        ([{"from": "human"}, {"from": "gpt", "value": "b"}], 0, "a turn is not"),
        (talk("a?", " "), 0, "answer 1 is empty"),
        (talk("a?", "<image>"), 0, "answer 1 holds an <image>"),
        (talk("a?", None), 0, "value is not text"),
    ],
)
def test_wrong_conversations_name_the_example(tokenizer, turns, images, message):
    with pytest.raises(MoextendError, match=f"ex7.*{message}"):
        encode(turns, tokenizer, images=images)
