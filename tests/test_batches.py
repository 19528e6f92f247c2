import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_tokens
from PIL import Image

from moextend_jax.config import IGNORE, RECIPES, MoextendError
from moextend_jax.data.batches import Share, batches, text_batches
from moextend_jax.data.conversations import encode_conversation
from moextend_jax.data.datasets import open_dataset
from moextend_jax.data.features import cache_features
from moextend_jax.data.readers import Features
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.media.image import decode_image, prepare_image
from moextend_jax.settings import StageSettings

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
PATCHES, ROWS = 4, 40
TOKENIZER = load_tokenizer(BASE)


def tower(images_nhwc):
    n = images_nhwc.shape[0]
    return images_nhwc.reshape(n, PATCHES, -1, 3)[:, :, 0]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows with 0, 1 or 2 images; each answer is the row's number, each image a shade of its own."""
    folder = tmp_path_factory.mktemp("llava")
    entries = []
    for n in range(ROWS):
        images = [f"{n}-{m}.png" for m in range(n % 3)]
        for m, name in enumerate(images):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (n, m * 50, 0)).save(file, "PNG")
            (folder / name).write_bytes(file.getvalue())
        question = "<image>" * len(images) + "what is it? " + "word " * (n % 5)
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {n}"}]
        entries.append({"id": f"row{n}", "image": images, "conversations": talk})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(entries))
    return open_dataset("llava_instruct", data_dir=folder / "built", manual_dir=folder)


@pytest.fixture(scope="module")
def features(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "c"
    inputs = tiny.pictures(source.images)
    return Features(store=cache_features(inputs, path=path, compute=tower, tower="t"), medium=inputs.medium)


def make(source, images, *, recipe="paper", epochs: int | None = 1, seed: int | None = 0, **more):
    """`more` are fields of the stage, and `share` and `workers`."""
    rows: dict[str, Any] = {"length": 64, "batch_size": 4, "images_per_row": 3, "conversations_per_row": 0}
    others = {name: more.pop(name) for name in ("share", "workers") if name in more}
    return batches(
        source,
        stage=StageSettings(data="llava_instruct", steps=1, **(rows | more)),
        tokenizer=TOKENIZER,
        recipe=RECIPES[recipe],
        readers={} if images is None else {"image": images},
        seed=seed,
        epochs=epochs,
        **others,
    )


def segments(batch):
    """Every conversation of a batch: (row, slice)."""
    for row, segments_L in enumerate(batch.segments_BL):
        for segment in range(1, segments_L.max() + 1):
            here = np.flatnonzero(segments_L == segment)
            assert (np.diff(here) == 1).all()
            yield row, slice(here[0], here[-1] + 1)


def answers(batch):
    for row, here in segments(batch):
        labels = batch.labels_BL[row, here]
        yield int(TOKENIZER.decode(labels[labels != IGNORE]).split()[1])


def all_answers(batches):
    return [answer for batch in batches for answer in answers(batch)]


def same(one, two):
    ours, theirs = tiny.by_field(one), tiny.by_field(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", ["features", "pixels"])
@pytest.mark.parametrize("conversations_per_row", [1, 0])
def test_each_conversation_comes_once_with_its_own_images(source, features, kind, conversations_per_row):
    images = features if kind == "features" else tiny.pictures(source.images)
    seen = []
    for batch in make(source, images, conversations_per_row=conversations_per_row):
        assert batch.ids_BL.shape == (4, 64) and batch.ids_BL.dtype == np.int32
        for row, here in segments(batch):
            number = next(iter(answers(_only(batch, row, here))))
            example = source[number]
            assert batch.examples_Bg[row, batch.segments_BL[row, here.start] - 1] == number
            wanted = encode_conversation(
                example.conversations,
                example_id=example.id,
                items={"image": [PATCHES] * len(example.images)},
                tokenizer=TOKENIZER,
                recipe=RECIPES["paper"],
            )
            np.testing.assert_array_equal(batch.ids_BL[row, here], wanted.ids_L)
            np.testing.assert_array_equal(batch.labels_BL[row, here], wanted.labels_L)
            np.testing.assert_array_equal(batch.positions_BL[row, here], np.arange(len(wanted.ids_L)))
            _check_images(batch, row, here, source, example, wanted)
            seen.append(example.id)
        padding = batch.segments_BL == 0
        assert (batch.labels_BL[padding] == IGNORE).all() and (batch.places_BL[padding] == -1).all()
    assert sorted(seen) == sorted(f"row{n}" for n in range(ROWS))


def _only(batch, row, here):
    return batch._replace(
        segments_BL=(batch.segments_BL[row : row + 1, here] > 0).astype(int),
        labels_BL=batch.labels_BL[row : row + 1, here],
    )


def _check_images(batch, row, here, source, example, wanted):
    slots = batch.places_BL[row, here]
    assert ((slots >= 0) == (wanted.places_L >= 0)).all()
    given = batch.features["image"] if not batch.media else batch.media["image"]
    for m, ref in enumerate(example.images):
        slot = slots[wanted.places_L == m * PATCHES][0] // PATCHES
        np.testing.assert_array_equal(slots[wanted.places_L // PATCHES == m], slot * PATCHES + np.arange(PATCHES))
        pixels = prepare_image(decode_image(source.images[ref.row].encoded), size=8, preparation="pad")
        np.testing.assert_array_equal(given[row, slot], pixels if not batch.features else tower(pixels[None])[0])


def test_packing_fills_rows(source, features):
    def filled(**how: Any) -> float:
        some = islice(make(source, features, length=128, epochs=9, **how), 8)
        return float(np.mean([batch.segments_BL > 0 for batch in some]))

    assert filled(images_per_row=8) > 0.85 > 0.4 > filled(conversations_per_row=1)


def test_order_seed_and_epochs(source, features):
    kept: dict[str, Any] = {"conversations_per_row": 1}
    assert all_answers(make(source, features, seed=None, **kept)) == list(range(ROWS))
    one, same_again, other = (all_answers(make(source, features, seed=s, **kept)) for s in (1, 1, 2))
    assert one == same_again != other
    two = all_answers(make(source, features, seed=1, epochs=2, **kept))
    assert sorted(two) == sorted([*range(ROWS), *range(ROWS)])
    assert len(list(islice(make(source, features, epochs=None), 60))) == 60


SCATTERED = [((0, 3), (1, 2)), ((2,), (0,), (1,)), ((4, 0), (1, 5), (3, 2))]
"""Parts of a batch by process, as meshes on TPU tori give them, and in an order that they do not."""


@pytest.mark.parametrize("conversations_per_row", [1, 0, 3])
@pytest.mark.parametrize("parts_of", SCATTERED)
def test_shares_at_their_places_are_the_batches_of_one_process(
    source, features, parts_of, conversations_per_row: int, monkeypatch
):
    monkeypatch.setattr("moextend_jax.data.batches.WINDOW", 14)  # several windows, which shares do not divide
    of = sum(map(len, parts_of))
    more: dict[str, Any] = {"batch_size": 2 * of, "conversations_per_row": conversations_per_row, "epochs": 2}
    alone = list(make(source, features, seed=5, **more))
    assert sorted(all_answers(alone)) == sorted([*range(ROWS)] * 2)
    shares = [make(source, features, seed=5, share=Share(parts, of), **more) for parts in parts_of]
    states = []
    for wanted, *batches_of in zip(alone, *resumed(shares, states), strict=True):
        fields = [tiny.by_field(batch) for batch in batches_of]
        assert {tuple(of) for of in fields} == {tuple(tiny.by_field(wanted))}
        for name, column in tiny.by_field(wanted).items():
            columns = [of[name] for of in fields]
            placed = np.full_like(column, 99)
            for parts, rows in zip(parts_of, columns, strict=True):
                assert len(rows) == 2 * len(parts)
                for place, part in enumerate(parts):
                    placed[2 * part : 2 * part + 2] = rows[2 * place : 2 * place + 2]
            np.testing.assert_array_equal(placed, column)
    assert states == [states[0]] * len(shares)  # one place in the data for all, so one checkpoint


def resumed(datasets, states):
    """What each gives, stopped after its second batch and gone on with by a new iterator."""
    for dataset in datasets:
        iterator = iter(dataset)
        first = [next(iterator), next(iterator)]
        states.append(json.loads(json.dumps(iterator.get_state())))
        rest = iter(dataset)
        rest.set_state(states[-1])
        yield [*first, *rest]


def test_a_batch_that_the_mesh_does_not_divide_is_refused(source):
    with pytest.raises(MoextendError, match="batch_size = 4 must be a multiple of 3"):
        make(source, None, share=Share((0,), 3))


@pytest.mark.parametrize("workers", tiny.few([0, 1]))
def test_resumed_equals_uninterrupted(source, features, workers):
    dataset = make(source, features, epochs=None, workers=workers)
    iterator = iter(dataset)
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = [next(iterator) for _ in range(12)]
    again = iter(dataset)
    again.set_state(state)
    for batch in wanted:
        same(batch, next(again))


def test_question_alone_has_no_trace_of_the_image(source):
    for batch in make(source, None):
        assert not batch.features and not batch.media
        assert (batch.places_BL == -1).all() and not np.isin(batch.ids_BL[batch.segments_BL > 0], [3, 5, 6]).any()


def test_what_does_not_fit_is_named(source, features):
    with pytest.raises(MoextendError, match=r"row\d+: .* do not fit a row of 12"):
        list(make(source, features, length=12))
    with pytest.raises(MoextendError, match=r"row\d+: 2 images, but a row holds 1"):
        list(make(source, features, images_per_row=1))


def test_a_conversation_has_a_limit_of_its_own_in_longer_rows(source, features):
    whole = list(make(source, features, length=128, conversation_length=64, images_per_row=6))
    assert sorted(all_answers(whole)) == list(range(ROWS)) and max(batch.segments_BL.max() for batch in whole) > 2
    with pytest.raises(MoextendError, match=r"row\d+: .* do not fit a row of 12"):
        list(make(source, features, length=128, conversation_length=12))


@pytest.mark.slow
def test_an_error_in_a_worker_process_stays_one_clear_line(source, features):
    with pytest.raises(MoextendError, match=r"row\d+: .* do not fit a row of 12"):
        next(iter(make(source, features, length=12, workers=1)))


def test_released_template_hides_its_end_from_attention(source, features):
    for batch in make(source, features, recipe="released"):
        ends = batch.ids_BL == TOKENIZER.eos
        assert ends.any() and (batch.segments_BL[ends] == 0).all() and (batch.labels_BL[ends] == TOKENIZER.eos).all()
        assert (batch.labels_BL[batch.positions_BL == 0] == IGNORE).all()


def test_text_rows():
    passages = ["In the beginning", "a word", "x " * 70, "the end of it"]
    (batch,) = text_batches(passages, tokenizer=TOKENIZER, length=32, batch_size=8, epochs=1)
    pieces = {}
    for row, here in segments(batch):
        ids, labels = batch.ids_BL[row, here], batch.labels_BL[row, here]
        assert ids[0] == TOKENIZER.bos and labels[0] == IGNORE
        np.testing.assert_array_equal(ids[1:], labels[1:])
        pieces.setdefault(TOKENIZER.decode(ids).split()[0], []).append(ids)
    assert {key: len(some) for key, some in pieces.items()} == {"In": 1, "a": 1, "x": 3, "the": 1}
    assert sum(int(piece[-1] == TOKENIZER.eos) for piece in pieces["x"]) == 1
    assert sum(len(piece) - 1 for piece in pieces["x"]) == len(TOKENIZER.encode(passages[2])) + 1
    assert (batch.places_BL == -1).all() and not batch.features


def test_a_row_of_text_is_not_shorter_than_a_label_and_what_it_follows():
    with pytest.raises(MoextendError, match="length = 1: a row of text takes at least 2 tokens"):
        text_batches(["A badger."], tokenizer=TOKENIZER, length=1, batch_size=2)


def test_text_rows_of_a_model_without_bos(tmp_path):
    """Each token but a passage's first is learnt once: a piece goes on from the last token of the one before."""
    tokenizer = load_tokenizer(tiny_tokens.write_byte_level(tmp_path))
    passages = [letter * count for letter, count in zip("abcde", (30, 31, 32, 61, 62), strict=True)]
    (batch,) = text_batches(passages, tokenizer=tokenizer, length=32, batch_size=9, epochs=1)
    rows = [batch.ids_BL[row, here].tolist() for row, here in segments(batch)]
    learnt = [batch.labels_BL[row, here].tolist() for row, here in segments(batch)]
    assert all(labels == [IGNORE, *ids[1:]] and len(ids) > 1 for ids, labels in zip(rows, learnt, strict=True))
    for passage in passages:
        pieces = [ids for ids in rows if tokenizer.decode(ids[:1]) == passage[0]]
        ids = [*tokenizer.encode(passage), tokenizer.eos]
        assert sorted(id for piece in pieces for id in piece[1:]) == sorted(ids[1:])
    assert len(rows) == 1 + 1 + 2 + 2 + 2
