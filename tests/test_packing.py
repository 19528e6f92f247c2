"""Packed rows: every conversation once and whole, well filled, and to the model the same as rows of their own."""

from __future__ import annotations

import functools
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import tiny

from moextend_jax.config import IGNORE, RECIPES, Batch, Room
from moextend_jax.data import batches
from moextend_jax.data.conversations import Encoded
from moextend_jax.data.features import FeatureStore
from moextend_jax.data.packing import Row, Sample, Shape, _best_fill, pack
from moextend_jax.data.readers import Features
from moextend_jax.extension.routing import count_picks
from moextend_jax.faults import STRICT
from moextend_jax.parameters import with_arrays
from moextend_jax.settings import StageSettings
from moextend_jax.train import stages
from moextend_jax.train.loss import Losses, losses

P, L, M = tiny.VISION.patches, 40, 4
MODEL, ARRAYS = tiny.structure(tiny.EXTENDED), tiny.arrays(tiny.EXTENDED)


def conversation(rng: np.random.Generator, *, text: int, images: int, first_image: int, hidden_end: bool) -> Sample:
    """Random text around `images` spans of tag, patches, tag; labels on the last third of the text, and on its end
    even where that is hidden from attention, as in the released template."""
    cuts = np.sort(rng.integers(1, text // 2, images))
    ids, patches = [], []
    for part in np.split(rng.integers(7, 61, text), cuts):
        if ids:
            image = sum(p >= 0 for p in patches) // P
            ids, patches = [*ids, 5, *[3] * P, 6], [*patches, -1, *range(image * P, (image + 1) * P), -1]
        ids, patches = [*ids, *part], [*patches, *[-1] * len(part)]
    ids_L, labels_L, segments_L = np.array(ids, np.int32), np.full(len(ids), IGNORE, np.int32), np.ones(len(ids), int)
    labels_L[-(text // 3) :] = ids_L[-(text // 3) :]
    labels_L[0] = ids_L[0]  # the released template labels it; no packed neighbour may predict it
    if hidden_end:
        segments_L[-1] = 0
    encoded = Encoded(ids_L, labels_L, np.array(patches, np.int32), segments_L, {"image": images})
    return Sample(encoded, {"image": range(first_image, first_image + images)})


def conversations(count: int = 9, *, seed: int = 0, hidden_end: bool = False) -> list[Sample]:
    """With 0, 1 and 2 images in turn."""
    rng = np.random.default_rng(seed)
    made, image = [], 0
    for n in range(count):
        made.append(
            conversation(rng, text=int(rng.integers(5, 12)), images=n % 3, first_image=image, hidden_end=hidden_end)
        )
        image += n % 3
    return made


def lengths(items: list[Sample]) -> np.ndarray:
    return np.array([len(item.encoded.ids_L) for item in items])


def fake(lengths_n, images_n) -> list[Sample]:
    """Conversations of which only the sizes matter."""
    made = []
    for n, m in zip(lengths_n, images_n, strict=True):
        ids_L = np.ones(n, np.int32)
        made.append(Sample(Encoded(ids_L, ids_L, -ids_L, ids_L, {"image": m}), {"image": [0] * m}))
    return made


def shape_of(length: int = L, images_per_row: int = M) -> Shape:
    return Shape(length, {"image": Room(images_per_row, P)})


def rows_of(items: list[Sample], *, alone: bool = False, length: int = L, images_per_row: int = M) -> list[Row]:
    return pack(items, shape=shape_of(length, images_per_row), conversations_per_row=int(alone))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversations_per_row", [0, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_conversation_is_there_once_and_whole(seed: int, conversations_per_row: int):
    items = conversations(25, seed=seed)
    rows = pack(items, shape=shape_of(), conversations_per_row=conversations_per_row)
    left = {item.encoded.ids_L.tobytes(): item for item in items}
    for row in rows:
        used, count = 0, int(row.segments_L.max())
        assert 1 <= count <= (conversations_per_row or L)
        for segment in range(1, count + 1):
            (here,) = np.nonzero(row.segments_L == segment)
            encoded, item_rows, _ = left.pop(row.ids_L[here].tobytes())
            image_rows = item_rows["image"]
            assert (here == here[0] + np.arange(len(encoded.ids_L))).all()
            np.testing.assert_array_equal(row.positions_L[here], np.arange(len(here)))
            np.testing.assert_array_equal(row.labels_L[here][1:], encoded.labels_L[1:])
            assert row.labels_L[here[0]] == IGNORE
            patches_l = np.where(encoded.places_L >= 0, encoded.places_L + used * P, -1)
            np.testing.assert_array_equal(row.places_L[here], patches_l)
            np.testing.assert_array_equal(row.item_rows_M["image"][used : used + len(image_rows)], image_rows)
            used += len(image_rows)
        assert (row.item_rows_M["image"][used:] == -1).all()
        padding = row.segments_L == 0
        assert (row.labels_L[padding] == IGNORE).all() and (row.places_L[padding] == -1).all()
    assert not left


def test_the_same_window_gives_the_same_rows():
    items = conversations(25)
    for one, again in zip(rows_of(items), rows_of(items), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, again)


@pytest.mark.parametrize(
    ("lengths_n", "length", "rows"),
    [
        ([7, 6, 5, 5, 4, 3], 10, 3),
        ([8, 8, 7, 6, 5, 5, 4, 4, 3], 25, 2),  # longest-first needs three
        ([10, 10, 10], 10, 3),
        ([], 10, 0),
    ],
)
def test_rows_are_filled_exactly_where_that_is_easy(lengths_n, length, rows):
    assert len(rows_of(fake(lengths_n, [0] * len(lengths_n)), length=length)) == rows


def test_media_that_hardly_appear_take_no_memory():
    takes = [np.array([1, n % 2, 0, 0, 90 + n]) for n in range(200)]
    tracemalloc.start()
    chosen = _best_fill(takes, np.array([8, 6, 6, 6, 4096]))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(chosen) == 8 and sum(takes[n][1] for n in chosen) <= 6 and most < 100e6  # 2.5 GB with all rooms


def test_image_slots_limit_a_row_as_length_does():
    rows = rows_of(fake([5] * 8, [1, 1, 1, 1, 0, 0, 0, 0]), length=20, images_per_row=1)
    assert len(rows) == 4 and all((row.item_rows_M["image"] >= 0).sum() == 1 for row in rows)


def test_llava_like_lengths_fill_rows_of_two_conversation_limits():
    """An image and log-normal text around 260 tokens, and some long text alone, as in benchmarks/packing.py."""
    rng = np.random.default_rng(0)
    image = 579 + rng.lognormal(5.4, 0.6, 240)
    text = rng.lognormal(6.8, 0.6, 16)
    items = fake(np.minimum([*image, *text], 2048).astype(int), [1] * 240 + [0] * 16)
    total = lengths(items).sum()
    assert total / (len(items) * 2048) < 0.45
    assert total / (len(rows_of(items, length=2048, images_per_row=3)) * 2048) > 0.85
    assert total / (len(rows_of(items, length=4096, images_per_row=6)) * 4096) > 0.97


# --- packed equals unpacked -------------------------------------------------------------------------------------------


class Result(NamedTuple):
    losses: Losses
    gradient: dict[str, jax.Array]


def batch_of(rows: list[Row], *, size: int, pixels: bool = False) -> Batch:
    """Through the pipeline's own last step, which fills up with empty rows."""
    rng = np.random.default_rng(7)
    side = tiny.VISION.image_size
    features_nPC = rng.normal(size=(64, P, tiny.VISION.width)).astype(np.float32)
    images_nhwc = rng.normal(size=(64, side, side, 3)).astype(np.float32)
    store = FeatureStore(path=Path(), rows={}, features_nPC=features_nPC, fingerprint={})
    stage = StageSettings(data="", steps=1, length=L, batch_size=size, images_per_row=M)
    readers = {"image": Features(store=store, medium=tiny.PLAIN.media["image"])}
    batch = batches._batch(
        rows, stage=stage, shape=shape_of(), readers=readers, share=batches.Share(), faults=STRICT,
        check=lambda: None, examples=0,
    )  # fmt: skip
    if not pixels:
        return batch
    images_BMhwc = images_nhwc[np.maximum(np.stack([row.item_rows_M["image"] for row in rows]), 0)]
    images_BMhwc = np.pad(images_BMhwc, [(0, size - len(rows)), *[(0, 0)] * 4])
    return batch._replace(features={}, media={"image": images_BMhwc})


def both(*, hidden_end: bool = False, pixels: bool = False) -> tuple[Batch, Batch]:
    """Nine conversations packed (with empty rows below), and in rows of their own."""
    items = conversations(hidden_end=hidden_end)
    packed, apart = rows_of(items), rows_of(items, alone=True)
    assert len(packed) < 6 and max(row.segments_L.max() for row in packed) > 2
    assert max((row.item_rows_M["image"] >= 0).sum() for row in packed) > 2
    size = len(apart)
    return batch_of(packed, size=size, pixels=pixels), batch_of(apart, size=size, pixels=pixels)


@functools.cache
def compiled(stage: str):
    """Jitted (batch) -> losses and the gradient of what the stage trains, split as a step splits it."""
    trainable, frozen = stages.split(ARRAYS, tiny.STAGES[stage])

    def total(trainable, frozen, batch):
        whole = with_arrays(MODEL, {**trainable, **frozen})
        made, _ = losses(whole, batch, recipe=RECIPES["paper"], aux_coefficient=0.5, chunk=4)
        return made.total, made

    run = jax.jit(jax.grad(total, has_aux=True))

    def result(batch: Batch) -> Result:
        gradient, made = run(trainable, frozen, batch)
        return Result(made, gradient)

    return result


WIDEST = ("align", "extend", "finetune, released", "full")
"""Stages that together train what all of them train."""


@pytest.mark.parametrize("stage", [WIDEST[0], *(pytest.param(stage, marks=pytest.mark.slow) for stage in WIDEST[1:])])
def test_losses_and_the_gradients_of_every_stage_are_those_of_unpacked_rows(stage: str):
    pixels = stage == "full"
    ours, theirs = (compiled(stage)(batch) for batch in both(pixels=pixels))
    assert ours.losses.tokens == theirs.losses.tokens > 20
    for name in ("ce", "aux", "total"):
        np.testing.assert_allclose(getattr(ours.losses, name), getattr(theirs.losses, name), atol=1e-5, err_msg=name)
    assert min(optax.tree.norm(result.gradient) for result in (ours, theirs)) > 1e-2
    for path, reference in theirs.gradient.items():
        np.testing.assert_allclose(ours.gradient[path], reference, atol=1e-4, rtol=0, err_msg=path)


def test_the_widest_stages_cover_all():
    covered = {pattern for stage in WIDEST for pattern in tiny.STAGES[stage]}
    assert covered >= {pattern for some in tiny.STAGES.values() for pattern in some}


@pytest.mark.parametrize("hidden_end", [False, True])
def test_the_sum_of_losses_is_that_of_unpacked_rows(hidden_end: bool):
    ours, theirs = (compiled("align")(batch).losses for batch in both(hidden_end=hidden_end))
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.ce * ours.tokens, theirs.ce * theirs.tokens, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours.aux, theirs.aux, atol=1e-5)


def test_without_segments_the_loss_would_differ():
    packed, apart = both()
    joined = packed._replace(segments_BL=np.minimum(packed.segments_BL, 1))
    assert abs(compiled("align")(joined).losses.ce - compiled("align")(apart).losses.ce) > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hidden_end", [False, True])
def test_routing_counts_of_text_and_of_images_are_those_of_unpacked_rows(recipe: str, hidden_end: bool):
    count = jax.jit(lambda batch: count_picks(with_arrays(MODEL, ARRAYS)(batch).routing, batch, recipe=RECIPES[recipe]))
    ours, theirs = (count(batch) for batch in both(hidden_end=hidden_end))
    items = conversations(hidden_end=hidden_end)
    images = sum(len(item.rows["image"]) for item in items)
    assert ours.image_tokens == theirs.image_tokens == images * P
    hidden = len(items) if hidden_end else 0
    assert ours.text_tokens == theirs.text_tokens == lengths(items).sum() - images * P - hidden
    top_k, layers = tiny.DECODER.top_k, tiny.DECODER.layers
    assert ours.image_ZO.sum() == images * P * top_k * layers
    np.testing.assert_array_equal(ours.text_ZO, theirs.text_ZO)
    np.testing.assert_array_equal(ours.image_ZO, theirs.image_ZO)
