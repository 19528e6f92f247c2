import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moextend_jax.config import IGNORE, RECIPES, ImageTags, MoextendError
from moextend_jax.data.conversations import encode_conversation, encode_prompt
from moextend_jax.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
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
        turns, example_id="ex7", images=images, tokenizer=tokenizer, recipe=recipe, patches=patches, **more
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the released code's arrays")
@pytest.mark.parametrize("legacy", [True, False])
def test_released_template_equals_the_released_code(legacy):
    folder = SHARED / "oracle" / "tokenizer"
    facts = json.loads((folder / f"tokenizer_oracle_legacy{legacy}.json").read_text())
    wanted = np.load(folder / f"preprocess_legacy{legacy}.npz")
    start, end, pad = facts["image_ids"]
    tokenizer = load_tokenizer(folder, tags=ImageTags(start=start, end=end, pad=pad))
    tokenizer = replace(tokenizer, legacy=legacy)
    for row, turns in enumerate(facts["conversations"]):
        paths = sum(turn["value"].count("</image>") for turn in turns)
        turns = talk(*[_without_paths(turn["value"]) for turn in turns])
        got = encode(
            turns,
            tokenizer,
            images=paths,
            recipe=replace(RELEASED, turns="all"),
            patches=facts["image_token_span"],
        )
        length = facts["max_len"]
        ids = np.full(length, facts["pad"])
        labels, mask = np.full(length, IGNORE), np.zeros(length, bool)
        kept = min(length, len(got.ids_L))
        ids[:kept], labels[:kept], mask[:kept] = got.ids_L[:kept], got.labels_L[:kept], got.segments_L[:kept]
        np.testing.assert_array_equal(ids, _without_path_bytes(wanted["input_ids"][row], start, end, pad))
        np.testing.assert_array_equal(labels, wanted["labels"][row])
        np.testing.assert_array_equal(mask, wanted["attention_mask"][row])


def _without_paths(text):
    while "</image>" in text:
        before, _, rest = text.partition("<image>")
        text = before + "\0" + rest.partition("</image>")[2]
    return text.replace("\0", "<image>")


def _without_path_bytes(ids, start, end, pad):
    """The released code hides the file name in an image's first pad positions."""
    ids, inside = ids.copy(), False
    for n, id in enumerate(ids):
        inside = (inside or id == start) and id != end
        if inside and id != start:
            ids[n] = pad
    return ids


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
        prompt = encode_prompt("what?", images=1, tokenizer=tokenizer, recipe=recipe, patches=4)
        kept = len(prompt.ids_L)
        np.testing.assert_array_equal(whole.ids_L[:kept], prompt.ids_L)
        np.testing.assert_array_equal(whole.patches_L[:kept], prompt.patches_L)
        assert (whole.labels_L[1:kept] == IGNORE).all() and whole.labels_L[kept] != IGNORE
        assert prompt.ids_L[-4:].tolist() == END_INST


def test_image_spans(tokenizer):
    got = encode(talk("see <image> and <image>\nwhich?", "both"), tokenizer, images=2, patches=3)
    tags = tokenizer.tags
    start = np.flatnonzero(got.ids_L == tags.start)
    assert got.images == 2 and len(start) == 2
    for m, s in enumerate(start):
        assert got.ids_L[s : s + 5].tolist() == [tags.start, tags.pad, tags.pad, tags.pad, tags.end]
        assert got.patches_L[s : s + 5].tolist() == [-1, 3 * m, 3 * m + 1, 3 * m + 2, -1]
    assert (got.patches_L >= 0).sum() == 6
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


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
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
