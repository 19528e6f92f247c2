"""Losses: chunks equal the direct form, aux losses equal the released code and a count by hand, packing is neutral."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    DecoderConfig,
    ExtensionConfig,
    ModelConfig,
    Named,
    of_pictures,
    with_extension,
)
from moextend_jax.models import decoder
from moextend_jax.models.expert_parallel import mixture
from moextend_jax.models.router import Routing
from moextend_jax.parameters import with_arrays
from moextend_jax.train import loss
from moextend_jax.train.loss import Load, aux_per_layer, aux_released, cross_entropy, load, losses, losses_of

B, L, D, V = 3, 11, 5, 17
RNG = np.random.default_rng(0)
HIDDEN_BLD = jnp.asarray(RNG.normal(size=(B, L, D)), jnp.float32)
HEAD_DV = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)


def labels(kind: str) -> jax.Array:
    labels_BL = np.random.default_rng(1).integers(0, V, (B, L)).astype(np.int32)
    if kind == "some":
        labels_BL[np.random.default_rng(2).random((B, L)) < 0.6] = IGNORE
    if kind == "a row without":
        labels_BL[1] = IGNORE
    if kind == "none":
        labels_BL[:] = IGNORE
    return jnp.asarray(labels_BL)


def direct(head_DV, hidden_BLD, labels_BL):
    """Next-token log-softmax over all positions, the labelled ones summed."""
    log_BLV = jax.nn.log_softmax(hidden_BLD[:, :-1] @ head_DV, axis=-1)
    targets_BL = labels_BL[:, 1:]
    picked_BL = jnp.take_along_axis(log_BLV, jnp.maximum(targets_BL, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(targets_BL == IGNORE, 0.0, picked_BL).sum()


@pytest.mark.parametrize("kind", ["all", "some", "a row without", "none"])
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunked_cross_entropy_equals_the_direct_form_with_gradients(kind: str, chunk: int):
    labels_BL = labels(kind)

    def chunked(head_DV, hidden_BLD):
        return cross_entropy(hidden_BLD, head_DV, labels_BL, chunk=chunk)

    (value, count), gradient = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(HEAD_DV, HIDDEN_BLD)
    expected, expected_gradient = jax.value_and_grad(direct, argnums=(0, 1))(HEAD_DV, HIDDEN_BLD, labels_BL)
    assert count == (labels_BL[:, 1:] != IGNORE).sum()
    np.testing.assert_allclose(value, expected, atol=1e-4)
    for mine, theirs in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["all", "some", "none"])
@pytest.mark.parametrize("columns", [4, 17, 512])
def test_a_frozen_head_has_the_same_loss_and_gradient_block_by_block(kind: str, columns: int, monkeypatch):
    monkeypatch.setattr(loss, "COLUMNS", columns)
    labels_BL, large_BLD = labels(kind), 30 * HIDDEN_BLD  # logits of which exp alone would be infinite

    def chunked(hidden_BLD):
        return cross_entropy(hidden_BLD, HEAD_DV, labels_BL, chunk=4)[0]

    value, gradient = jax.jit(jax.value_and_grad(chunked))(large_BLD)
    expected, expected_gradient = jax.value_and_grad(direct, argnums=1)(HEAD_DV, large_BLD, labels_BL)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(large_BLD), expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5, rtol=0)


def test_a_batch_without_labels_has_a_finite_loss():
    batch = tiny.batch()
    batch = batch._replace(labels_BL=np.full_like(batch.labels_BL, IGNORE))
    value = whole(tiny.EXTENDED)(tiny.arrays(tiny.EXTENDED), batch)[0]
    assert value.ce == 0 and value.tokens == 0 and np.isfinite(value.total)


# --- load balancing ---------------------------------------------------------------------------------------------------


MIXED = of_pictures(decoder=DecoderConfig(layers=2), extension=ExtensionConfig(layers=(1,), sources=(0,)))


def balanced() -> Load:
    """Layer 0 spreads its picks over 8 experts, layer 1 over 9."""
    picks = np.stack([[2 / 8] * 8 + [0], [2 / 9] * 9])
    return Load(jnp.asarray(picks, jnp.float32), jnp.asarray(picks / 2, jnp.float32), jnp.asarray(100 * (picks > 0)))


def test_a_balanced_load_costs_top_k_in_every_layer_whatever_its_number_of_experts():
    np.testing.assert_allclose(aux_per_layer(balanced(), config=MIXED), 2.0, rtol=1e-6)
    # The released form counts nine experts in the plain layer too: (9/8 * 2 + 2) / 2.
    np.testing.assert_allclose(aux_released(balanced(), config=MIXED), (2 * 9 / 8 + 2) / 2, rtol=1e-6)


def test_a_load_by_hand():
    logits_ZTO = np.log(
        np.array(
            [
                [[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.9, 0.1, 0.0]],
                [[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.1, 0.1, 0.8]],
            ]
        ),
        where=np.array([[[1, 1, 0]] * 3, [[1, 1, 1]] * 3], bool),
        out=np.full((2, 3, 3), -np.inf),
    ).astype(np.float32)
    ids_ZTk = np.array([[[0], [1], [0]], [[0], [2], [2]]], np.int32)
    routing = Routing(jnp.asarray(logits_ZTO), jnp.asarray(ids_ZTk), jnp.ones((2, 3, 1)))
    counted = load(routing, jnp.array([True, True, False]))  # the third token is padding
    np.testing.assert_allclose(counted.picks_ZO, [[0.5, 0.5, 0], [0.5, 0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(counted.probs_ZO, [[0.375, 0.625, 0], [0.3125, 0.1875, 0.5]], atol=1e-6)
    config = of_pictures(
        decoder=DecoderConfig(layers=2, experts=2, top_k=1), extension=ExtensionConfig(layers=(1,), sources=(0,))
    )
    first, second = 0.5 * 0.375 + 0.5 * 0.625, 0.5 * 0.3125 + 0.5 * 0.5
    np.testing.assert_allclose(aux_per_layer(counted, config=config), (2 * first + 3 * second) / 2, rtol=1e-6)
    np.testing.assert_allclose(aux_released(counted, config=config), (first + second) * 3 / 2, rtol=1e-6)
    plain = with_extension(config, None)
    np.testing.assert_array_equal(counted.counts_ZO, [[2, 2, 0], [2, 2, 2]])
    pooled = Load(*(of_ZO[:, :2] for of_ZO in counted))
    expected = 2 * (0.5 * (0.375 + 0.3125) / 2 + 0.25 * (0.625 + 0.1875) / 2)
    np.testing.assert_allclose(aux_released(pooled, config=plain), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_load_of_an_expert_is_over_the_tokens_that_may_choose_it():
    """Two layers of two pretrained experts and two extensions; the third token may choose neither, nobody the last."""
    shut = -np.inf
    logits_ZTO = np.log([[[0.5, 0.25, 0.25, 1.0], [0.25, 0.25, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]] * 2).astype(np.float32)
    logits_ZTO[..., 3] = logits_ZTO[:, 2, 2] = shut
    routing = Routing(jnp.asarray(logits_ZTO), jnp.array([[[0], [2], [1]]] * 2), jnp.ones((2, 3, 1)))
    counted = load(routing, jnp.ones(3, bool))
    np.testing.assert_array_equal(counted.counts_ZO, [[3, 3, 2, 0]] * 2)
    np.testing.assert_allclose(counted.picks_ZO, [[1 / 3, 1 / 3, 1 / 2, 0]] * 2, atol=1e-6)
    np.testing.assert_allclose(counted.probs_ZO, [[1.25 / 3, 1 / 3, 0.75 / 2, 0]] * 2, atol=1e-6)
    grown = [ExtensionConfig(layers=(0, 1), sources=(0, 0), medium=medium) for medium in ("image", "sound")]
    config = dataclasses.replace(MIXED, extensions=Named(zip(("image", "sound"), grown, strict=True)))
    # Three experts that some token may choose, not four.
    expected = 3 * (1.25 / 9 + 1 / 9 + 0.75 / 4)
    np.testing.assert_allclose(aux_per_layer(counted, config=config), expected, rtol=1e-6)
    # The released code knows no closed columns: shares of all three tokens, and every expert of the model.
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts=2))
    expected = 4 * (1.25 / 9 + 1 / 9 + 0.75 / 9)
    np.testing.assert_allclose(aux_released(counted, config=config), expected, rtol=1e-6)
    gradient = jax.grad(
        lambda logits: aux_per_layer(load(routing._replace(logits_TO=logits), jnp.ones(3, bool)), config=config)
    )
    assert not np.any(gradient(routing.logits_TO)[..., 3]) and np.isfinite(gradient(routing.logits_TO)).all()


def test_no_gradient_of_the_aux_loss_is_nan_where_a_plain_layer_has_no_new_expert():
    arrays = tiny.arrays(tiny.EXTENDED)
    gradient = whole(tiny.EXTENDED)(arrays, tiny.batch())[1]
    for path, leaf in gradient.items():
        assert np.isfinite(leaf).all(), path
        if path != "media/image/tower/post_norm/scale" and not path.startswith("media/image/tower/"):
            assert np.abs(leaf).max() > 0, path


# --- packing ----------------------------------------------------------------------------------------------------------


@functools.cache
def whole(config: ModelConfig):
    """Jitted (arrays, batch) -> losses, gradient of everything, routing, logits."""
    model = tiny.structure(config)

    def total(arrays, batch):
        made = with_arrays(model, arrays)
        value, routing = losses(made, batch, recipe=RECIPES["paper"], aux_coefficient=0.5, chunk=4)
        return value.total, (value, routing)

    def run(arrays, batch):
        gradient, (value, routing) = jax.grad(total, has_aux=True)(arrays, batch)
        return value, gradient, routing

    compiled = jax.jit(run)
    return lambda arrays, batch: jax.tree.map(np.asarray, compiled(arrays, batch))


def packed_and_apart() -> tuple[Batch, Batch, list[tuple[tuple[int, slice], tuple[int, slice]]]]:
    """Two rows of two conversations, and the same four in rows of their own; and where each stands in both."""
    rng = np.random.default_rng(0)
    P, C, M = tiny.VISION.patches, tiny.VISION.width, 2
    lengths = [[9, 6], [7, 7]]

    def empty(rows: int) -> Batch:
        ids_BL, labels_BL, positions_BL, segments_BL, places_BL = (
            np.full((rows, 16), fill, np.int32) for fill in (3, IGNORE, 0, 0, -1)
        )
        return Batch(ids_BL, labels_BL, positions_BL, segments_BL, places_BL)

    apart, packed = empty(4), empty(2)
    features_BMPC = np.zeros((4, M, P, C), np.float32)
    packed_features = np.zeros((2, M, P, C), np.float32)
    places = []
    for row in range(2):
        start = 0
        for n, length in enumerate(lengths[row]):
            one, here, there = 2 * row + n, slice(start, start + length), slice(0, length)
            ids_L = rng.integers(7, 61, length)
            has_image = one != 3
            features_BMPC[one, 0] = packed_features[row, n] = rng.normal(size=(P, C)) * has_image
            for batch, at, place, image in ((apart, one, there, 0), (packed, row, here, n)):
                batch.ids_BL[at, place] = ids_L
                batch.labels_BL[at, place][-3:] = ids_L[-3:]
                batch.positions_BL[at, place] = np.arange(length)
                batch.segments_BL[at, place] = n + 1 if batch is packed else 1
                if has_image:
                    batch.places_BL[at, place][1 : 1 + P] = np.arange(P) + image * P
            places.append(((row, here), (one, there)))
            start += length
    return (
        packed._replace(features={"image": packed_features}),
        apart._replace(features={"image": features_BMPC}),
        places,
    )


@pytest.mark.slow
def test_packed_conversations_neither_see_nor_change_each_other():
    arrays = tiny.arrays(tiny.EXTENDED)
    packed, apart, places = packed_and_apart()
    ours = whole(tiny.EXTENDED)(arrays, packed)
    theirs = whole(tiny.EXTENDED)(arrays, apart)
    assert ours[0].tokens == theirs[0].tokens == 12
    for mine, reference in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)
    for path, reference in theirs[1].items():
        np.testing.assert_allclose(ours[1][path], reference, atol=1e-4, rtol=0, err_msg=path)
    Z = tiny.DECODER.layers
    packed_ids, apart_ids = ours[2].ids_Tk.reshape(Z, 2, 16, -1), theirs[2].ids_Tk.reshape(Z, 4, 16, -1)
    for (row, here), (one, there) in places:
        np.testing.assert_array_equal(packed_ids[:, row, here], apart_ids[:, one, there])


@pytest.mark.slow
def test_padding_that_nobody_reads_is_skipped_and_what_a_label_follows_is_not(monkeypatch: pytest.MonkeyPatch):
    """Holes in a row, as attention masks of other code may have: the token after one is predicted there."""
    model, arrays = tiny.structure(tiny.EXTENDED), tiny.arrays(tiny.EXTENDED)
    batch = tiny.batch()
    batch = batch._replace(
        segments_BL=jnp.asarray(batch.segments_BL).at[:, 5:7].set(0),
        labels_BL=jnp.where(jnp.arange(batch.ids_BL.shape[1])[None] == 7, jnp.asarray(batch.ids_BL), batch.labels_BL),
    )
    options = {"recipe": RECIPES["released"], "aux_coefficient": 0.5, "chunk": 8}

    masked: list[bool] = []

    def noted(*given: Any, **named: Any) -> Any:
        masked.append(named.get("real_BL") is not None)
        return mixture(*given, **named)

    monkeypatch.setattr(decoder, "mixture", noted)

    def skipped(arrays):
        return losses(with_arrays(model, arrays), batch, **options)[0].total

    def everywhere(arrays):
        whole = with_arrays(model, arrays)
        return losses_of(whole(batch), whole, batch, **options).total

    assert (np.asarray(batch.segments_BL)[:, 6] == 0).all() and (np.asarray(batch.labels_BL)[:, 7] != IGNORE).all()
    loss, gradient = jax.jit(jax.value_and_grad(skipped))(arrays)
    assert masked and all(masked)
    masked.clear()
    expected, theirs = jax.jit(jax.value_and_grad(everywhere))(arrays)
    assert masked and not any(masked)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    for path in arrays:
        np.testing.assert_allclose(gradient[path], theirs[path], atol=1e-5, err_msg=path)
