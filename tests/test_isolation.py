"""Strict text isolation: no conversation without an image can choose a new expert, and batches of text come out as
before the extension, bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_asking
import tiny

from moextend_jax.config import IGNORE, RECIPES, Batch, MoextendError, with_vision
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import shares
from moextend_jax.parameters import with_arrays

STRICT = dataclasses.replace(tiny.EXTENDED, text_isolation="strict")
ROWS, LENGTH = 1000, 16


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    """New columns and calibrators with weight: without isolation many tokens choose them."""
    made = tiny.arrays(tiny.EXTENDED, std=0.3)
    assert np.abs(made["extensions/image/router/calibrator/w_out"]).max() > 0
    return made


def text(rows: int, *, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    ids_BL = rng.integers(7, tiny.DECODER.vocab_size, (rows, LENGTH)).astype(np.int32)
    positions_BL = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids_BL.shape)
    segments_BL = (positions_BL < rng.integers(3, LENGTH + 1, (rows, 1))).astype(np.int32)
    nothing = np.full_like(ids_BL, -1)
    return Batch(ids_BL, np.full_like(ids_BL, IGNORE), positions_BL, segments_BL, nothing)


def logits_of(config, arrays, batch: Batch) -> np.ndarray:
    model = tiny.structure(config)
    paths = {path for path in arrays if config.extension or not path.startswith("extensions/image/")}

    @jax.jit
    def compute(some, batch):
        whole = with_arrays(model, some)
        return whole.decoder.logits(whole(batch).hidden_BLD)

    return np.asarray(compute({path: arrays[path] for path in paths}, batch))


def test_a_thousand_text_rows_are_the_base_s(arrays):
    batch = text(ROWS)
    base, strict, free = (logits_of(config, arrays, batch) for config in (tiny.PLAIN, STRICT, tiny.EXTENDED))
    real = batch.segments_BL > 0
    assert strict[real].tobytes() == base[real].tobytes()
    assert (np.abs(free - base).max(axis=-1) > 1e-3)[real].mean() > 0.3  # so there was something to isolate


def test_beside_images_in_the_batch_and_in_the_row(arrays):
    """Rows of text, rows with an image, and rows that hold one conversation of each."""
    mixed = tiny.batch(rows=6, length=LENGTH)
    seen = (mixed.places_BL >= 0).any(axis=1)
    assert seen.any() and not seen.all()
    base, strict, free = (logits_of(config, arrays, mixed) for config in (tiny.PLAIN, STRICT, tiny.EXTENDED))
    real = mixed.segments_BL > 0
    blind = real & np.isneginf(np.asarray(shares(mixed, STRICT)["image"]))
    assert blind.any() and (real & ~blind).any()
    np.testing.assert_allclose(strict[blind], base[blind], rtol=0, atol=1e-5)
    np.testing.assert_allclose(strict[real & ~blind], free[real & ~blind], rtol=0, atol=1e-5)
    assert np.abs(strict - base)[real & ~blind].max() > 1e-3


def test_who_may_choose():
    segments_BL = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0]], np.int32)
    places_BL = np.array([[-1, 0, 1, -1, -1, -1], [-1, -1, -1, 0, 1, -1], [-1] * 6], np.int32)
    batch = Batch(segments_BL, segments_BL, segments_BL, segments_BL, places_BL)
    config = with_vision(STRICT, dataclasses.replace(tiny.VISION, image_size=8, patch_size=8 // 2))
    assert shares(batch, config) == {}
    batch = batch._replace(features={"image": np.zeros((3, 1, 2, 4), np.float32)})
    expected = [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6]
    np.testing.assert_array_equal(np.asarray(shares(batch, config)["image"]) == 0, np.array(expected, bool))
    assert shares(batch, tiny.EXTENDED) == {"image": None}


def test_gradients_of_text_do_not_reach_the_extension(arrays):
    model = tiny.structure(STRICT)

    def loss(new, batch):
        whole = with_arrays(model, {**arrays, **new})
        return jnp.abs(whole(batch).hidden_BLD).sum()

    new = {path: leaf for path, leaf in arrays.items() if path.startswith("extensions/image/")}
    for batch, reaches in ((text(4), False), (tiny.batch(rows=3), True)):
        gradient = jax.jit(jax.grad(loss))(new, batch)
        total = sum(float(jnp.abs(leaf).sum()) for leaf in gradient.values())
        assert np.isfinite(total) and (total > 0) == reaches


def test_trained_routers_cannot_be_isolated():
    with pytest.raises(MoextendError, match="routers_kept"):
        tiny.run_settings(recipe=RECIPES["released"], text_isolation="strict")


@pytest.mark.slow
def test_answers_to_text_are_the_base_s_and_answers_to_images_are_not(arrays):
    """Through batched generation, where a prompt's image may lie in a head that is read apart."""
    lively = arrays | {"decoder/embed": arrays["decoder/embed"] * 2}
    every = [prompt for prompt in test_asking.prompts(48) if prompt.tail <= 8]  # of one length: fewer programs

    def said(config):
        of = {
            path: leaf for path, leaf in lively.items() if config.extension or not path.startswith("extensions/image/")
        }
        who = dataclasses.replace(
            test_asking.asker(), generator=Generator(tiny.structure(config), eos=test_asking.EOS), arrays=of
        )
        return test_asking.said(who, every)

    base, strict, free = said(tiny.PLAIN), said(STRICT), said(tiny.EXTENDED)
    blind = [n for n, prompt in enumerate(every) if not prompt.items]
    seeing = [n for n, prompt in enumerate(every) if prompt.items]
    assert [strict[n] for n in blind] == [base[n] for n in blind] != [free[n] for n in blind]
    assert [strict[n] for n in seeing] == [free[n] for n in seeing] != [base[n] for n in seeing]
