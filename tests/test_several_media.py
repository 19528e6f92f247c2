"""Two media in one conversation and in one row: spans, places, rooms, marks, what is left out and what is skipped."""

from __future__ import annotations

import dataclasses
import io
import json
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import media_files as files
import numpy as np
import pytest
import test_conversation_properties as properties
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    FeaturesConfig,
    ImageTags,
    Medium,
    MoextendError,
    Named,
    ProjectorConfig,
    Room,
    first_places,
)
from moextend_jax.data.batches import batches, rooms_of
from moextend_jax.data.conversations import Encoded, encode_conversation, encode_prompt
from moextend_jax.data.datasets import Source, open_dataset
from moextend_jax.data.measure import measure, rows_per_conversation
from moextend_jax.data.packing import Row, Sample, Shape, pack, take_out
from moextend_jax.data.readers import Inputs
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.faults import KINDS, STRICT, Fault
from moextend_jax.settings import FaultSettings, StageSettings

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
PAPER = RECIPES["paper"]
# A picture is 4 tokens; what is touched 2 or 5, whichever covers it.
TOUCHED = Medium(
    kind="features", mark="<features>", tags=ImageTags(start=5, end=6, pad=17),
    tower=FeaturesConfig(width=6, patches=5), spans=(2, 5),
)  # fmt: skip
MEDIA: Named[Medium] = Named({**tiny.seeing(), "features": TOUCHED})
PADS = {name: medium.tags.pad for name, medium in MEDIA.items()}
TOKENIZER = dataclasses.replace(load_tokenizer(BASE), others=MEDIA)
MARKS = {name: medium.mark for name, medium in MEDIA.items()}
SKIP = FaultSettings(policies=cast(Any, dict.fromkeys(KINDS, "skip")), most_skipped=1.0)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def encode(turns: list[dict[str, Any]], *, recipe: Any = PAPER, **more: Any) -> Encoded:
    items = {name: more.pop(name) for name in MEDIA if name in more}
    return encode_conversation(turns, example_id="ex7", items=items, tokenizer=TOKENIZER, recipe=recipe, **more)


BOTH = talk("<features> like <image> and <features>?\n<image>", "no")


# --- a conversation ---------------------------------------------------------------------------------------------------


def spans_of(ids_L: np.ndarray) -> list[tuple[str, list[int]]]:
    """Medium and positions of the pads of each span, in order; what stands around them is checked."""
    spans = []
    for start in np.flatnonzero(ids_L == TOKENIZER.tags.start):
        end = start + int(np.argmax(ids_L[start:] == TOKENIZER.tags.end))
        inside = ids_L[start + 1 : end].tolist()
        (name,) = [name for name, pad in PADS.items() if inside == [pad] * len(inside)]
        spans.append((name, list(range(start + 1, end))))
    return spans


@pytest.mark.parametrize("recipe", RECIPES)
def test_items_of_two_media_stand_where_their_marks_were_each_in_its_own_pads(recipe: str):
    got = encode(BOTH, image=[4, 4], features=[5, 2], recipe=RECIPES[recipe])
    spans = spans_of(got.ids_L)
    assert [(name, len(here)) for name, here in spans] == [("features", 5), ("image", 4), ("features", 2), ("image", 4)]
    assert got.items == {"image": 2, "features": 2}
    assert (got.labels_L[[p for _, here in spans for p in here]] == IGNORE).all()
    assert len(set(PADS.values())) == 2 and (got.places_L >= 0).sum() == 5 + 4 + 2 + 4
    # Without the spans, the text of a conversation about nothing.
    text = [id for id in got.ids_L.tolist() if id not in TOKENIZER.tag_ids]
    assert TOKENIZER.decode(text) == TOKENIZER.decode(got.ids_L)
    assert "like" in TOKENIZER.decode(got.ids_L) and "<" not in TOKENIZER.decode(got.ids_L).replace("<s>", "")


def test_a_prompt_has_the_items_of_both_where_they_are_marked_else_first():
    whole = encode(BOTH, image=[4, 4], features=[5, 2])
    items = {"image": [4, 4], "features": [5, 2]}
    prompt = encode_prompt(BOTH[0]["value"], items=items, tokenizer=TOKENIZER, recipe=PAPER)
    length = len(prompt.ids_L)
    np.testing.assert_array_equal(prompt.ids_L, whole.ids_L[:length])
    np.testing.assert_array_equal(prompt.places_L, whole.places_L[:length])
    assert prompt.items == whole.items and whole.labels_L[length] != IGNORE
    unmarked = encode_prompt("what?", items={"image": [4], "features": [2]}, tokenizer=TOKENIZER, recipe=PAPER)
    marked = encode(talk("<image>\n<features>\nwhat?", "this"), image=[4], features=[2])
    np.testing.assert_array_equal(unmarked.ids_L, marked.ids_L[: len(unmarked.ids_L)])


@pytest.mark.parametrize(
    ("question", "items", "message"),
    [
        ("<features> what?", {}, "1 <features> marks in the questions but 0 items of features"),
        ("<features> what?", {"features": [2, 2]}, "1 <features> marks in the questions but 2 items of features"),
        ("<features> <image>?", {"features": [2]}, "1 <image> marks in the questions but 0 images"),
        ("<image> what?", {"image": [4], "features": [5]}, "0 <features> marks in the questions but 1 items of feat"),
        ("what?", {"smell": [1]}, "an item of smell, and the media are image, features"),
    ],
)
def test_marks_that_do_not_match_name_the_medium(question: str, items: dict[str, list[int]], message: str):
    with pytest.raises(Fault, match=f"^example ex7: {message}") as caught:
        encode_conversation(talk(question, "a"), example_id="ex7", items=items, tokenizer=TOKENIZER, recipe=PAPER)
    assert caught.value.kind == "marks"


def test_only_questions_hold_marks_of_any_medium():
    for turns, message in [
        ([{"from": "system", "value": "<features>"}, *talk("a?", "b")], "system turn holds an <features>"),
        (talk("a?", "<features>"), "answer 1 holds an <features>"),
    ]:
        with pytest.raises(Fault, match=message):
            encode(turns, features=[2])


def test_no_text_makes_a_pad_of_any_medium():
    for byte in range(256):
        for text in (f"a{chr(byte)}b", f"a<0x{byte:02X}>"):
            try:
                ids = {*TOKENIZER.encode(text), *TOKENIZER.encode_continued(text)}
            except MoextendError as error:
                assert byte == 0 and "reserved for images" in str(error) and "remove NUL, STX and ETX" in str(error)
            else:
                assert ids.isdisjoint(TOKENIZER.tag_ids)
    assert {5, 6, *PADS.values()} <= set(TOKENIZER.unspeakable(32000))
    assert TOKENIZER.decode([5, 17, 17, 6, *TOKENIZER.encode("a")]) == "a"


def test_text_that_stands_for_an_item_names_its_medium():
    """Where a vocabulary has a piece for it; else it is text as before."""
    (pad,) = set(load_tokenizer(BASE).encode("a\x0eb")) - set(load_tokenizer(BASE).encode("ab")) - {264, 28726}
    spoken = dataclasses.replace(TOUCHED, tags=dataclasses.replace(TOUCHED.tags, pad=pad))
    tokenizer = dataclasses.replace(TOKENIZER, others=MEDIA.replacing("features", spoken))
    with pytest.raises(Fault, match="ex7.*control character that is reserved for medium features.*remove it") as caught:
        encode_conversation(talk("a\x0eb", "c"), example_id="ex7", items={}, tokenizer=tokenizer, recipe=PAPER)
    assert caught.value.kind == "reserved"
    with pytest.raises(MoextendError, match="reserved for images"):  # which all media share
        tokenizer.encode("a\0b\x0e")


def test_what_does_not_fit_says_how_much_of_it_is_items():
    with pytest.raises(Fault, match=r"2 images of 6, 2 of features of 7\) do not fit a row of 30"):
        encode(BOTH, image=[4, 4], features=[5, 2], length=30)


# --- spans of several lengths -----------------------------------------------------------------------------------------


def test_an_item_takes_the_shortest_span_that_covers_it():
    assert [TOUCHED.span(positions) for positions in (1, 2, 3, 4, 5, None)] == [2, 2, 5, 5, 5, 5]
    stacked = dataclasses.replace(
        TOUCHED, tower=FeaturesConfig(width=6, patches=100), spans=(5, 12, 25),
        projector=ProjectorConfig(kind="stack", neighbours=4),
    )  # fmt: skip
    assert stacked.tokens == 25
    assert [stacked.span(positions) for positions in (1, 20, 21, 48, 49, 100, None)] == [5, 5, 12, 12, 25, 25, 25]
    assert [dataclasses.replace(stacked, spans=(5,)).span(positions) for positions in (20, 21)] == [5, 25]


def test_a_video_has_all_of_its_frames_tokens_whatever_spans_there_are():
    """Frames go through the projector one by one: more tokens than as many positions at once."""
    pooled = ProjectorConfig(kind="pool", neighbours=3)
    watched = dataclasses.replace(files.WATCHED, projector=pooled, spans=(2, 6, 8))
    assert (watched.positions, watched.tokens, pooled.tokens(16)) == (16, 8, 6)
    assert watched.span(watched.positions) == watched.span() == 8
    learnt = dataclasses.replace(watched, projector=ProjectorConfig(kind="resampler", queries=2))
    assert learnt.span(learnt.positions) == learnt.tokens == 8
    assert dataclasses.replace(watched, join="mean").span(4) == 2


def test_places_leave_room_for_the_longest_span():
    """Item m of a medium begins at m * P, however short the ones before it are."""
    got = encode(BOTH, image=[4, 4], features=[2, 5])
    (row,) = pack([Sample(got, {"image": [8, 9], "features": [3, 4]})], shape=shape(60), conversations_per_row=0)
    first = first_places(shape(60).rooms)
    assert first == {"image": 0, "features": 3 * 4}
    assert [(name, row.places_L[here].tolist()) for name, here in spans_of(row.ids_L)] == [
        ("features", [12, 13]), ("image", [0, 1, 2, 3]), ("features", [17, 18, 19, 20, 21]), ("image", [4, 5, 6, 7])
    ]  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------------


def shape(length: int, *, images: int = 3, touched: int = 2) -> Shape:
    rooms = {"image": Room(images, 4), "features": Room(touched, 5)}
    return Shape(length, {name: room for name, room in rooms.items() if room.items}, tuple(TOKENIZER.media))


def conversations(counts: list[tuple[int, int]]) -> list[Sample]:
    """With so many images and so much that is touched; each item is a row of its own."""
    rng, items, image_rows, feature_rows = np.random.default_rng(0), [], count(100), count(500)
    for n, (images, touched) in enumerate(counts):
        marks = ["<image>"] * images + ["<features>"] * touched
        question = " and ".join(str(mark) for mark in rng.permutation(marks)) + f" {'word ' * (n % 4)}?"
        spans = rng.choice([2, 5], touched).tolist()
        rows = {"image": list(islice(image_rows, images)), "features": list(islice(feature_rows, touched))}
        items.append(Sample(encode(talk(question, f"a {n}"), image=[4] * images, features=spans), rows, n))
    return items


def check_rows(rows: list[Row], items: list[Sample], of: Shape) -> None:
    """Every conversation once and whole, and each token of an item leads to its own item and place in it."""
    first = first_places(of.rooms)
    assert sorted(place.example for row in rows for place in row.places) == list(range(len(items)))
    for row in rows:
        for place in row.places:
            item = items[place.example]
            np.testing.assert_array_equal(row.ids_L[place.positions], item.encoded.ids_L)
            used = dict.fromkeys(MEDIA, 0)
            for name, here in spans_of(item.encoded.ids_L):
                leads_to = row.places_L[place.positions][here] - first[name]
                slots, within = np.divmod(leads_to, of.rooms[name].tokens)
                assert within.tolist() == list(range(len(here))) and len(set(slots)) == 1
                assert row.item_rows_M[name][slots[0]] == item.rows[name][used[name]]
                used[name] += 1
            assert used == {name: len(item.rows[name]) for name in MEDIA}
            assert ((row.places_L[place.positions] >= 0) == np.isin(item.encoded.ids_L, list(PADS.values()))).all()
        for name, room in of.rooms.items():
            filled = sum(len(items[place.example].rows[name]) for place in row.places)
            assert len(row.item_rows_M[name]) == room.items >= filled == (row.item_rows_M[name] >= 0).sum()


@pytest.mark.parametrize("conversations_per_row", [0, 1, 2])
def test_packed_rows_keep_the_items_of_both_apart(conversations_per_row: int):
    items = conversations([(n % 3, (n // 3) % 3) for n in range(18)])
    of = shape(80)
    rows = pack(items, shape=of, conversations_per_row=conversations_per_row)
    check_rows(rows, items, of)
    assert (len(rows) < len(items)) is (conversations_per_row != 1)
    if not conversations_per_row:  # rows in which each medium has items of several conversations
        having = {
            name: [sum(bool(items[of.example].rows[name]) for of in row.places) for row in rows] for name in MEDIA
        }
        assert all(max(of) > 1 for of in having.values())


def test_the_rooms_of_either_medium_limit_a_row():
    items = conversations([(1, 0)] * 3 + [(0, 1)] * 3 + [(0, 0)] * 3)
    for rooms, needed in [((3, 3), 1), ((1, 3), 3), ((3, 1), 3), ((2, 1), 3), ((2, 2), 2)]:
        of = shape(512, images=rooms[0], touched=rooms[1])
        rows = pack(items, shape=of, conversations_per_row=0)
        assert len(rows) == needed
        check_rows(rows, items, of)


def test_what_is_taken_out_takes_the_items_of_both_with_it():
    items = conversations([(1, 1), (2, 1)])
    (row,) = pack(items, shape=shape(200), conversations_per_row=0)
    gone, stays = sorted(row.places, key=lambda place: place.example)
    before = row.places_L[stays.positions].copy()
    row = take_out(row, gone)
    assert not row.segments_L[gone.positions].any() and (row.places_L[gone.positions] == -1).all()
    assert {name: sorted(rows_M[rows_M >= 0]) for name, rows_M in row.item_rows_M.items()} == items[1].rows
    np.testing.assert_array_equal(row.places_L[stays.positions], before)


# --- any conversation -------------------------------------------------------------------------------------------------

PLAIN = properties.PLAIN.filter(lambda text: "<features>" not in text and "\x0e" not in text)


@st.composite
def talks(draw) -> tuple[list[dict[str, str]], dict[str, list[int]], list[tuple[str, int]]]:
    """Turns, the spans of each medium, and both in the order of the text."""
    turns, order = [], []
    for _ in range(draw(st.integers(1, 3))):
        parts = [draw(PLAIN)]
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(list(MEDIA)))
            order.append((name, draw(st.sampled_from([4] if name == "image" else [2, 5]))))
            parts += [MARKS[name], draw(PLAIN)]
        question = "".join(parts)
        assume(sum(question.count(mark) for mark in MARKS.values()) == len(parts) // 2)
        turns += talk(question, draw(PLAIN.filter(lambda text: bool(text.strip()))))
    return turns, {name: [span for of, span in order if of == name] for name in MEDIA}, order


@pytest.mark.slow
@settings(properties.SAME, max_examples=40)
@given(st.lists(talks(), min_size=1, max_size=5), st.sampled_from([PAPER, properties.RELEASED]))
def test_any_conversations_of_two_media_are_whole_in_any_row(some, recipe):
    items = []
    for n, (turns, spans, order) in enumerate(some):
        got = encode(turns, **spans, recipe=recipe)
        assert [(name, len(here)) for name, here in spans_of(got.ids_L)] == order
        assert got.items == {name: len(of) for name, of in spans.items() if of}
        answers = properties.runs(got.labels_L != IGNORE)[int(recipe is not PAPER) :]
        assert len(answers) == len(turns) // 2
        items.append(Sample(got, {name: [10 * n + k for k in range(len(of))] for name, of in spans.items()}, n))
    most = [max(len(item.rows[name]) for item in items) for name in MEDIA]
    of = shape(max(len(item.encoded.ids_L) for item in items) + 20, images=most[0] or 1, touched=most[1] or 1)
    check_rows(pack(items, shape=of, conversations_per_row=0), items, of)


@settings(properties.SAME, max_examples=40)
@given(talks(), st.sampled_from([PAPER, properties.RELEASED]), st.integers(5, 80))
def test_dropping_turns_drops_the_items_of_both(some, recipe, length: int):
    turns, spans, order = some
    try:
        got = encode(turns, **spans, recipe=recipe, length=length, too_long="drop_turns")
    except Fault as fault:
        assert fault.kind == "too_long"
        return
    marks = sum(turn["value"].count(mark) for turn in turns[: 2 * answers_in(got, recipe)] for mark in MARKS.values())
    assert len(got.ids_L) <= length and [(name, len(here)) for name, here in spans_of(got.ids_L)] == order[:marks]
    assert got.items == {name: n for name in MEDIA if (n := sum(of == name for of, _ in order[:marks]))}


def answers_in(encoded: Encoded, recipe: Any) -> int:
    return len(properties.runs(encoded.labels_L != IGNORE)) - int(recipe is not PAPER)


# --- batches ----------------------------------------------------------------------------------------------------------

COUNTS = [(1, 1), (2, 0), (0, 2), (0, 0), (1, 2), (2, 1)]
"""Images of a row, and what is touched."""
STAGE = StageSettings(data="x", steps=1, batch_size=2, length=64, images_per_row=2, items_per_row={"features": 2})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is touched is 1, 2, ... 5 rows long."""
    rows = []
    for n, (images, touched) in enumerate(COUNTS):
        named = {"image": [f"{n}-{m}.png" for m in range(images)], "features": [f"{n}-{m}.npy" for m in range(touched)]}
        for m, name in enumerate(named["image"]):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * n, 50 * m, 9)).save(file, "PNG")
            (tmp_path / name).write_bytes(file.getvalue())
        for m, name in enumerate(named["features"]):
            (tmp_path / name).write_bytes(files.npy(files.features(1 + (n + m) % 5, seed=10 * n + m)))
        question = "<features>\n" * touched + "<image>" * images + "what is it?"
        rows.append({"id": f"row{n}", "conversations": talk(question, f"number {n}"), **named})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def source_of(folder: Path, faults: FaultSettings = STRICT) -> Source:
    return open_dataset(str(folder / "a.jsonl"), data_dir=folder / "built", media=MEDIA, faults=faults)


def readers(source: Source, names: tuple[str, ...] = tuple(MEDIA)) -> dict[str, Inputs]:
    return {name: Inputs(items=source.items[name], medium=MEDIA[name], preparation="pad") for name in names}


def make(folder: Path, *, names: tuple[str, ...] = tuple(MEDIA), faults: FaultSettings = STRICT, **more: Any) -> Batch:
    source = source_of(folder, faults)
    rows = dataclasses.replace(STAGE, **more)
    some = batches(
        source, stage=rows, tokenizer=TOKENIZER, recipe=PAPER, readers=readers(source, names), seed=None, epochs=1,
        faults=faults,
    )  # fmt: skip
    return tiny.joined(some)


@pytest.mark.parametrize("packed", [False, True])
def test_each_token_of_a_batch_leads_to_its_own_item(folder: Path, packed: bool):
    rooms = {"images_per_row": 3, "items_per_row": {"features": 3}, "length": 128} if packed else {}
    batch, source = make(folder, conversations_per_row=int(not packed), **rooms), source_of(folder)
    of, first = readers(source), first_places(rooms_of(readers(source), dataclasses.replace(STAGE, **rooms)))
    assert batch.names == set(MEDIA) and batch.media["image"].shape[2:] == (8, 8, 3)
    seen = []
    for row, segments_L in enumerate(batch.segments_BL):
        for segment in range(1, segments_L.max() + 1):
            number = int(batch.examples_Bg[row, segment - 1])
            here = np.flatnonzero(segments_L == segment)
            used = dict.fromkeys(MEDIA, 0)
            for name, span in spans_of(batch.ids_BL[row, here]):
                ref = source[number].of(name)[used[name]]
                used[name] += 1
                slot = int(batch.places_BL[row, here[span[0]]] - first[name]) // MEDIA[name].tokens
                given_MPC = (batch.media if name == "image" else batch.features)[name][row]
                np.testing.assert_array_equal(given_MPC[slot], of[name].prepared(ref.row).array)
                assert len(span) == of[name].span(ref.row)
            assert tuple(used.values()) == COUNTS[number]
            seen.append(number)
    assert sorted(seen) == list(range(len(COUNTS))) and (len(batch.ids_BL) < len(seen)) is packed


def test_spans_by_bucket_save_positions(folder: Path):
    source = source_of(folder)
    refs = [ref for example in source for ref in example.of("features")]
    tokens = {ref.key: readers(source)["features"].span(ref.row) for ref in refs}
    assert tokens == {
        "0-0.npy": 2, "2-0.npy": 5, "2-1.npy": 5, "4-0.npy": 5, "4-1.npy": 2, "5-0.npy": 2
    }  # fmt: skip


@pytest.mark.parametrize("names", [("image",), ("features",), ()])
def test_items_without_a_reader_are_left_out_with_their_marks(folder: Path, names: tuple[str, ...]):
    batch, both = make(folder, names=names), make(folder)
    assert batch.names == set(names)
    for name, pad in PADS.items():
        assert (batch.ids_BL == pad).sum() == (both.ids_BL == pad).sum() * (name in names)
    gone = [MARKS[name] for name in MEDIA if name not in names]
    for row, example in enumerate(source_of(folder)):
        text = example.conversations[0]["value"]
        for mark in gone:
            text = text.replace(f"{mark}\n", "").replace(mark, "")
        spans = {name: [readers(source_of(folder))[name].span(ref.row) for ref in example.of(name)] for name in names}
        wanted = encode(talk(text, example.conversations[1]["value"]), **spans)
        np.testing.assert_array_equal(batch.ids_BL[row][batch.segments_BL[row] > 0], wanted.ids_L)
    if not names:
        assert (batch.places_BL == -1).all() and not batch.media and not batch.features


@pytest.mark.parametrize("bad", ["4-0.png", "4-1.npy"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_item_of_either_medium_takes_out_its_whole_conversation(folder: Path, bad: str, packed: bool):
    """Found when it is decoded: the items of the other medium go too, and every neighbour stays."""
    more: dict[str, Any] = {"faults": SKIP}
    if packed:
        more |= {"conversations_per_row": 0, "images_per_row": 6, "items_per_row": {"features": 6}, "length": 256}
    sound = make(folder, **more)
    path = folder / bad
    nan = files.npy(np.full_like(files.features(1 + 5 % 5), np.nan))
    path.write_bytes(nan if bad.endswith("npy") else path.read_bytes()[:-30])
    batch = make(folder, **more)
    assert batch.faults_BG[:, 1:].sum() == 1 and sound.faults_BG[:, 1:].sum() == 0
    assert sorted(batch.examples_Bg[batch.examples_Bg >= 0]) == [0, 1, 2, 3, 5]
    (row,) = np.flatnonzero((sound.examples_Bg == 4).any(axis=1))
    gone_L = sound.segments_BL[row] != batch.segments_BL[row]
    assert gone_L.any() and (batch.segments_BL[row][gone_L] == 0).all() and (batch.places_BL[row][gone_L] == -1).all()
    assert (batch.labels_BL[row][gone_L] == IGNORE).all()
    for name in ("ids_BL", "labels_BL", "segments_BL", "positions_BL", "places_BL"):
        ours, theirs = getattr(batch, name).copy(), getattr(sound, name).copy()
        ours[row][gone_L] = theirs[row][gone_L] = 0
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for ours_BM, theirs_BM, shown in zip(
        (batch.media["image"], batch.features["features"]), (sound.media["image"], sound.features["features"]),
        COUNTS[4], strict=True,
    ):  # fmt: skip
        changed = (ours_BM != theirs_BM).reshape(*ours_BM.shape[:2], -1).any(axis=-1)
        assert changed.sum() == shown and not ours_BM[changed].any()
    with pytest.raises(MoextendError, match=bad):
        make(folder)


def test_more_items_than_a_row_holds_name_the_setting(folder: Path):
    with pytest.raises(Fault, match="row2: 2 items of features, but a row holds 1; raise items_per_row.features"):
        make(folder, items_per_row={"features": 1})
    with pytest.raises(Fault, match="row1: 2 images, but a row holds 1; raise images_per_row"):
        make(folder, images_per_row=1)


def test_what_is_measured_is_what_is_read(folder: Path):
    """Lengths and items of each medium; and rows that packing takes."""
    source = source_of(folder)
    open_stage = dataclasses.replace(STAGE, length=0, images_per_row=0, items_per_row={})
    measured = measure(
        source, stage=open_stage, tokenizer=TOKENIZER, recipe=PAPER, media=MEDIA, faults=STRICT
    )  # fmt: skip
    batch = make(folder)
    assert measured.tokens_n.tolist() == (batch.segments_BL > 0).sum(axis=1).tolist()
    assert {name: of.tolist() for name, of in measured.items_n.items()} == {
        "image": [images for images, _ in COUNTS], "features": [touched for _, touched in COUNTS]
    }  # fmt: skip
    stage = measured.filled(open_stage)
    assert (stage.images_per_row, stage.items_per_row, stage.length % 16) == (2, {"features": 2}, 0)
    assert stage.length - 16 < measured.tokens_n.max() <= stage.length
    packed = dataclasses.replace(stage, length=96, conversations_per_row=0)
    each = rows_per_conversation(measured, stage=packed, media=MEDIA)
    (rows,) = batches(
        source, stage=dataclasses.replace(packed, batch_size=6), tokenizer=TOKENIZER, recipe=PAPER,
        readers=readers(source), seed=None, epochs=1,
    )  # fmt: skip
    assert 0.3 < each < 1 and round(each * len(COUNTS)) == (rows.segments_BL > 0).any(axis=1).sum()
