"""Conversations -> ids -> labels of any text: labels are exactly the answers, image spans whole, text comes back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moextend_jax.config import IGNORE, RECIPES, Room
from moextend_jax.data.conversations import Encoded, encode_conversation, encode_prompt
from moextend_jax.data.packing import Sample, Shape, pack
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.data.writing import MARK
from moextend_jax.faults import Fault

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "moextend_jax" / "assets" / "base")
TAGS = TOKENIZER.tags
PAPER, RELEASED = RECIPES["paper"], dataclasses.replace(RECIPES["released"], turns="all")
LEGACY = [dataclasses.replace(TOKENIZER, legacy=legacy) for legacy in (True, False)]

# The same examples in every run: a failure is the code's, not the draw's.
SAME = settings(derandomize=True, deadline=None, database=None, max_examples=60)

# Reserved for images: NUL, STX, ETX. U+2581 is how SentencePiece writes a space.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\x02\x03\u2581")
WORDS = st.sampled_from(
    ["[INST]", "[/INST]", " ", "\n", "a cat", "<0x41>", "two  spaces", "é漢😀", "</image>", "<imag"]
)
TEXT = st.lists(st.one_of(st.text(CHARACTERS, max_size=8), WORDS), max_size=6).map("".join)
PLAIN = TEXT.filter(lambda text: MARK not in text and not re.search("</?s>|<unk>", text))
"""The released template knows special tokens that are spelled out, the paper's knows none."""
ANSWER = PLAIN.filter(lambda text: bool(text.strip()))


class Talk(NamedTuple):
    questions: list[list[str]]
    """Each the texts between its image marks."""
    answers: list[str]
    patches: int

    @property
    def images(self) -> int:
        return sum(len(parts) - 1 for parts in self.questions)

    def turns(self, first: int | None = None) -> list[dict[str, Any]]:
        texts = [
            text for pair in zip(self.questions, self.answers, strict=True) for text in (MARK.join(pair[0]), pair[1])
        ]
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        return turns if first is None else turns[: 2 * first]


@st.composite
def talks(draw) -> Talk:
    count = draw(st.integers(1, 3))
    questions = [draw(st.lists(PLAIN, min_size=1, max_size=3)) for _ in range(count)]
    assume(all(MARK not in "".join(parts) and MARK.join(parts).count(MARK) == len(parts) - 1 for parts in questions))
    return Talk(questions, [draw(ANSWER) for _ in range(count)], draw(st.integers(1, 3)))


def encoded(talk: Talk, *, recipe=PAPER, tokenizer=TOKENIZER, **more: Any) -> Encoded:
    return encode_conversation(
        talk.turns(),
        example_id="x",
        items={"image": [talk.patches] * talk.images},
        tokenizer=tokenizer,
        recipe=recipe,
        **more,
    )


def runs(mask_L: np.ndarray) -> list[np.ndarray]:
    """Positions of each stretch that is True."""
    where = np.flatnonzero(mask_L)
    return np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if len(where) else []


def decoded(ids) -> str:
    return TOKENIZER.decode(ids)


# --- the paper's template ---------------------------------------------------------------------------------------------


@SAME
@given(talks())
def test_paper_labels_are_exactly_the_answers(talk: Talk):
    got = encoded(talk)
    labelled = runs(got.labels_L != IGNORE)
    assert len(labelled) == len(talk.answers)
    for here, answer in zip(labelled, talk.answers, strict=True):
        np.testing.assert_array_equal(got.labels_L[here], got.ids_L[here])
        assert got.ids_L[here[-1]] == TOKENIZER.eos and TOKENIZER.eos not in got.ids_L[here[:-1]]
        assert decoded(got.ids_L[here]) == answer.strip()
    assert got.segments_L.all() and got.ids_L[0] == TOKENIZER.bos and TOKENIZER.bos not in got.ids_L[1:]


@SAME
@given(talks())
def test_paper_questions_come_back_with_their_images_in_place(talk: Talk):
    got = encoded(talk)
    asked = runs((got.labels_L == IGNORE) & (np.arange(len(got.ids_L)) > 0))
    for here, parts in zip(asked, talk.questions, strict=True):
        ids = got.ids_L[here]
        # A span between two texts is where the mark was; the spaces before it are the template's to drop.
        starts, ends = np.flatnonzero(ids == TAGS.start), np.flatnonzero(ids == TAGS.end)
        assert len(starts) == len(ends) == len(parts) - 1
        inside = re.sub(f" *{MARK}", MARK, f"[INST] {MARK.join(parts).strip()} [/INST]").split(MARK)
        edges = zip([0, *(ends + 1)], [*starts, len(ids)], strict=True)
        assert [decoded_part(ids[a:b], first=n == 0) for n, (a, b) in enumerate(edges)] == inside


def decoded_part(ids, *, first: bool) -> str:
    """Only the first text of a message has the space that SentencePiece puts before a word, and takes away again."""
    return decoded(ids) if first else decoded([*TOKENIZER.encode("a"), *ids])[1:]


@SAME
@given(talks())
def test_a_prompt_is_the_beginning(talk: Talk):
    whole = encoded(talk)
    question = talk.turns()[0]["value"]
    items = {"image": [talk.patches] * (len(talk.questions[0]) - 1)}
    prompt = encode_prompt(question, items=items, tokenizer=TOKENIZER, recipe=PAPER)
    np.testing.assert_array_equal(prompt.ids_L, whole.ids_L[: len(prompt.ids_L)])
    assert (prompt.labels_L == IGNORE).all() and whole.labels_L[len(prompt.ids_L)] != IGNORE


# --- the released template --------------------------------------------------------------------------------------------


@SAME
@given(talks(), st.sampled_from(LEGACY))
def test_released_labels_are_bos_the_answers_and_the_end(talk: Talk, tokenizer):
    got = encoded(talk, recipe=RELEASED, tokenizer=tokenizer)
    first, *answers = runs(got.labels_L != IGNORE)
    assert first.tolist() == [0] and got.labels_L[0] == TOKENIZER.bos
    assert len(answers) == len(talk.answers) and got.ids_L[-1] == got.labels_L[-1] == TOKENIZER.eos
    np.testing.assert_array_equal(got.segments_L, (got.ids_L != TOKENIZER.eos).astype(int))
    for here, answer in zip(answers, talk.answers, strict=True):
        np.testing.assert_array_equal(got.labels_L[here], got.ids_L[here])
        # One space goes before the text, and SentencePiece's own, which decoding takes away, where it is legacy.
        assert decoded_part(got.ids_L[here], first=tokenizer.legacy) == f" {answer}"


# --- both -------------------------------------------------------------------------------------------------------------


@SAME
@given(talks(), st.sampled_from([PAPER, RELEASED]))
def test_image_spans_are_whole_and_in_order(talk: Talk, recipe):
    check_spans(encoded(talk, recipe=recipe), images=talk.images, patches=talk.patches)


def check_spans(got: Encoded, *, images: int, patches: int) -> None:
    starts = np.flatnonzero(got.ids_L == TAGS.start)
    assert got.items == ({"image": images} if images else {}) and len(starts) == images
    span = [TAGS.start, *[TAGS.pad] * patches, TAGS.end]
    for m, start in enumerate(starts):
        assert got.ids_L[start : start + len(span)].tolist() == span
        assert got.places_L[start : start + len(span)].tolist() == [-1, *range(m * patches, (m + 1) * patches), -1]
    for tag, count in ((TAGS.start, 1), (TAGS.pad, patches), (TAGS.end, 1)):
        assert (got.ids_L == tag).sum() == images * count
    assert (got.places_L >= 0).sum() == images * patches
    assert (got.labels_L[np.isin(got.ids_L, span)] == IGNORE).all()


@SAME
@given(talks(), st.sampled_from([PAPER, RELEASED]), st.integers(1, 80))
def test_dropping_turns_keeps_whole_pairs_and_the_limit(talk: Talk, recipe, length: int):
    try:
        got = encoded(talk, recipe=recipe, length=length, too_long="drop_turns")
    except Fault as fault:
        first = Talk(talk.questions[:1], talk.answers[:1], talk.patches)
        assert fault.kind == "too_long" and len(encoded(first, recipe=recipe).ids_L) > length
        return
    assert len(got.ids_L) <= length
    kept = [Talk(talk.questions[:n], talk.answers[:n], talk.patches) for n in range(1, len(talk.answers) + 1)]
    fitting = [one for one in kept if len(encoded(one, recipe=recipe).ids_L) <= length]
    np.testing.assert_array_equal(got.ids_L, encoded(fitting[-1], recipe=recipe).ids_L)
    check_spans(got, images=fitting[-1].images, patches=talk.patches)


@settings(SAME, max_examples=30)
@given(st.lists(talks(), min_size=1, max_size=6))
def test_packed_rows_hold_each_conversation_whole(some: list[Talk]):
    items = [Sample(encoded(talk._replace(patches=2)), {"image": [7] * talk.images}, n) for n, talk in enumerate(some)]
    length, room = max(len(item.encoded.ids_L) for item in items), max(len(item.rows["image"]) for item in items)
    rows = pack(items, shape=Shape(length, {"image": Room(room, 2)}), conversations_per_row=0)
    placed = [(row, place) for row in rows for place in row.places]
    assert sorted(place.example for _, place in placed) == list(range(len(items)))
    for row, place in placed:
        item = items[place.example]
        np.testing.assert_array_equal(row.ids_L[place.positions], item.encoded.ids_L)
        np.testing.assert_array_equal(row.labels_L[place.positions], item.encoded.labels_L)
        own = row.places_L[place.positions]
        np.testing.assert_array_equal(
            np.where(own >= 0, own - place.slots["image"].start * 2, -1), item.encoded.places_L
        )
        assert place.slots["image"].stop - place.slots["image"].start == len(item.rows["image"])


@SAME
@given(st.text(CHARACTERS))
def test_text_comes_back_from_its_ids(text: str):
    assert decoded(TOKENIZER.encode(text)) == text
    assert decoded_part(TOKENIZER.encode_continued(text), first=False) == text


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.sampled_from(["human", "gpt", "from"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["from", "value"]), inner)),
    max_leaves=8,
)


@SAME
@given(st.lists(JSON_VALUES, max_size=4), st.integers(0, 2), st.sampled_from([PAPER, RELEASED]))
def test_turns_of_any_form_are_encoded_or_a_fault(turns, images: int, recipe):
    try:
        got = encode_conversation(
            turns, example_id="x", items={"image": [2] * images}, tokenizer=TOKENIZER, recipe=recipe, length=40
        )
    except Fault as fault:
        assert fault.id == "x" and str(fault).startswith("example x: ")
    else:
        assert len(got.ids_L) <= 40 and got.items.get("image", 0) == images
