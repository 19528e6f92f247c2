"""The extender chooses what the released code chose; growing copies the source and touches nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moextend_jax.config import RECIPES, MoextendError, Named, with_extension
from moextend_jax.extension import routing
from moextend_jax.extension.grow import grow
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.settings import GrowSettings

PAPER, RELEASED = RECIPES["paper"], RECIPES["released"]


def counts(total_ZE) -> routing.Counts:
    total_ZE = np.asarray(total_ZE)
    text_ZE = total_ZE // 3
    return routing.Counts(text_ZE, total_ZE - text_ZE, 1, 1)


BEFORE = counts([[50, 30, 20], [10, 10, 80], [40, 30, 30], [20, 60, 20]])
AFTER = counts([[50, 30, 20], [70, 20, 10], [10, 30, 60], [200, 590, 210]])


def test_the_shift_is_a_sample_deviation_of_shares():
    """Layer 3 is counted on ten times the tokens after the probe: shares, not counts, are compared."""
    chosen = routing.select(BEFORE, AFTER, share=0.5, recipe=PAPER)
    deltas = np.array([[0, 0, 0], [-0.6, -0.1, 0.7], [0.3, 0, -0.3], [0, 0.01, -0.01]])
    np.testing.assert_allclose(chosen.shift_Z, np.sqrt((deltas**2).sum(axis=1) / 2), atol=1e-9)
    assert chosen.layers == (1, 2)


def test_the_source_is_the_favourite_before_the_probe_or_after_it():
    assert routing.select(BEFORE, AFTER, share=0.5, recipe=PAPER).sources == (2, 0)
    assert routing.select(BEFORE, AFTER, share=0.5, recipe=RELEASED).sources == (0, 2)


def test_a_share_that_is_a_whole_number_of_layers_is_that_number():
    assert len(routing.chosen_layers("interval", np.zeros(50), share=0.58)) == 29  # 0.58 * 50 is 28.999999999999996


@pytest.mark.parametrize(("share", "layers"), [(0.25, (1,)), (0.74, (1, 2)), (1.0, (0, 1, 2, 3))])
def test_the_share_is_rounded_down_and_layers_ascend(share: float, layers: tuple[int, ...]):
    assert routing.select(BEFORE, AFTER, share=share, recipe=PAPER).layers == layers


EIGHT = counts([[n, 10 - n, 5] for n in range(8)])
MOVED = counts([[n, 10 - n, 5 + 3 * (n in (2, 5, 7))] for n in range(8)])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("extender", (2, 5, 7)), ("interval", (1, 4, 7)), ("all", tuple(range(8))), ("first_half", (0, 1, 2, 3)),
        ("second_half", (4, 5, 6, 7)), ("first_quarter", (0, 1)), ("first_interval", (1, 3)),
        ("every_second", (0, 2, 4, 6)),
    ],
)  # fmt: skip
def test_the_layers_of_the_papers_ablations(layers: Any, chosen: tuple[int, ...]):
    got = routing.select(EIGHT, MOVED, share=0.4, recipe=PAPER, layers=layers, first=1)
    assert got.layers == tuple(1 + layer for layer in chosen) and len(got.sources) == len(chosen)


def test_random_layers_are_those_of_the_seed_and_as_many_as_the_share_says():
    drawn = {
        routing.select(EIGHT, MOVED, share=0.4, recipe=PAPER, layers="random", seed=seed).layers for seed in range(9)
    }
    again = routing.select(EIGHT, MOVED, share=0.4, recipe=PAPER, layers="random", seed=0).layers
    assert len(drawn) > 4 and {len(layers) for layers in drawn} == {3} and again in drawn
    assert all(list(layers) == sorted({*layers}) for layers in drawn)


def test_what_decides_the_source():
    def sources(**how: Any) -> tuple[int, ...]:
        return routing.select(BEFORE, AFTER, share=0.5, recipe=PAPER, **how).sources

    assert sources(source="before") == sources(source="recipe") == (2, 0) and sources(source="after") == (0, 2)
    assert sources(source="fixed", expert=1) == (1, 1)
    assert sources(source="fixed", expert=1, new_experts=2) == (1, 2, 1, 0)  # then the most picked
    with pytest.raises(MoextendError, match="select.expert = 3: a layer has experts 0 to 2"):
        sources(source="fixed", expert=3)
    with pytest.raises(MoextendError, match="select.layers = first_quarter of 3 layers chooses none"):
        routing.select(counts([[3, 3, 4]] * 3), counts([[3, 3, 4]] * 3), share=1, recipe=PAPER, layers="first_quarter")


@pytest.mark.parametrize("column", ["zero", "mean", "random"])
@pytest.mark.parametrize("expert", ["zero_down", "random"])
def test_columns_and_experts_that_do_not_start_as_copies(column: Any, expert: Any):
    """A router's bias goes with its column."""
    biased = dataclasses.replace(tiny.EXTENDED, decoder=dataclasses.replace(tiny.DECODER, router_bias=True))
    arrays = tiny.arrays(dataclasses.replace(biased, extensions=Named()))
    copies = grow(arrays, config=biased, recipe=PAPER, seed=0)
    leaves = grow(arrays, config=biased, recipe=PAPER, seed=0, column=column, expert=expert)
    bias_ZE = np.asarray(arrays["decoder/layers/moe/gate_bias"])[list(tiny.EXTENSION.layers)]
    expected_Z1 = bias_ZE.mean(axis=1, keepdims=True) * (column == "mean")
    np.testing.assert_allclose(leaves["extensions/image/router/new_gate_bias"], expected_Z1, atol=1e-7)
    new_YDX = np.asarray(leaves["extensions/image/router/new_gate"])
    gate_YDE = np.asarray(arrays["decoder/layers/moe/gate"])[list(tiny.EXTENSION.layers)]
    if column == "random":
        assert 0.01 < new_YDX.std() < 1 and np.abs(new_YDX[..., None] - gate_YDE[:, :, None]).min() > 0
    else:
        expected_YD1 = gate_YDE.mean(axis=-1, keepdims=True) * (column == "mean")
        np.testing.assert_allclose(new_YDX, np.broadcast_to(expected_YD1, new_YDX.shape), atol=1e-7)
    for name in ("w_gate", "w_up", "w_down"):
        leaf, copy = (np.asarray(of[f"extensions/image/new_experts/{name}"]) for of in (leaves, copies))
        if expert == "random":
            assert leaf.std() > 0.001 and np.abs(leaf - copy).max() > 0.001
        else:
            np.testing.assert_array_equal(leaf, copy * (name != "w_down"))


def test_twins_start_from_copies():
    with pytest.raises(MoextendError, match="grow.start twin starts from copies"):
        GrowSettings(start="twin", column="zero")


def test_ties_go_to_the_lower_layer():
    same = counts([[3, 3, 4]] * 4)
    assert routing.select(same, same, share=0.5, recipe=PAPER).layers == (0, 1)


def test_a_share_that_chooses_no_layer_is_an_error():
    with pytest.raises(MoextendError, match="select.share = 0.2 of 4 layers"):
        routing.select(BEFORE, AFTER, share=0.2, recipe=PAPER)


def test_counting_nothing_is_an_error():
    with pytest.raises(MoextendError, match="select.held_out or evaluate.questions chooses none"):
        routing.count_all(tiny.structure(tiny.PLAIN), tiny.arrays(tiny.PLAIN), [], recipe=PAPER)


@pytest.mark.parametrize("counted", ["top_k", "least_likely"])
def test_counts_equal_a_loop_over_tokens(counted):
    model, arrays = tiny.structure(tiny.PLAIN), tiny.arrays(tiny.PLAIN)
    batches = [tiny.batch(seed=seed) for seed in (0, 1)]
    recipe = dataclasses.replace(PAPER, counted_picks=counted)
    ours = routing.count_all(model, arrays, batches, recipe=recipe)
    Z, E = tiny.DECODER.layers, tiny.DECODER.experts
    expected = {"text": np.zeros((Z, E), int), "image": np.zeros((Z, E), int)}
    run = jax.jit(lambda batch: with_arrays(model, arrays)(batch).routing.logits_TO)
    for batch in batches:
        logits_ZTE = np.asarray(run(batch))
        for token, (segment, patch) in enumerate(zip(batch.segments_BL.flat, batch.places_BL.flat, strict=True)):
            if segment == 0:
                continue
            for layer in range(Z):
                order = np.argsort(logits_ZTE[layer, token])
                picked = order[-2:] if counted == "top_k" else order[:2]
                expected["image" if patch >= 0 else "text"][layer, picked] += 1
    np.testing.assert_array_equal(ours.text_ZO, expected["text"])
    np.testing.assert_array_equal(ours.image_ZO, expected["image"])
    assert ours.image_tokens == expected["image"][0].sum() / 2 == 2 * 2 * tiny.VISION.patches
    assert ours.text_tokens == expected["text"][0].sum() / 2


def test_the_least_likely_experts_of_a_plain_layer_are_among_those_it_has():
    """In an extended model its logits of new experts are -inf, which nothing is less likely than."""
    model, arrays, batch = tiny.structure(tiny.EXTENDED), tiny.arrays(tiny.EXTENDED), tiny.batch()
    recipe = dataclasses.replace(PAPER, counted_picks="least_likely")
    counted = routing.count_all(model, arrays, [batch], recipe=recipe).total_ZO
    run = jax.jit(lambda batch: with_arrays(model, arrays)(batch).routing.logits_TO)
    logits_ZTO = np.asarray(run(batch))[:, batch.segments_BL.reshape(-1) > 0]
    for z, outputs in enumerate((5, 4, 5)):
        least_Tk = np.argsort(logits_ZTO[z, :, :outputs])[:, :2]
        np.testing.assert_array_equal(counted[z], np.bincount(least_Tk.reshape(-1), minlength=5))


# --- growing ----------------------------------------------------------------------------------------------------------


def test_new_leaves_are_copies_of_the_source_expert_and_the_calibrator_is_the_identity():
    arrays = tiny.arrays(tiny.PLAIN)
    sources_YX = ((1, 2), (3, 3))
    extension = dataclasses.replace(tiny.EXTENSION, new_experts=2, sources=(1, 2, 3, 3))
    config = with_extension(tiny.PLAIN, extension)
    leaves = grow(arrays, config=config, recipe=PAPER, seed=0)
    new = {path: leaf.shape for path, leaf in _params(config).items() if path.startswith("extensions/image/")}
    assert {path: leaf.shape for path, leaf in leaves.items()} == new
    experts = "decoder/layers/moe/experts/"
    for y, (layer, sources_X) in enumerate(zip(extension.layers, sources_YX, strict=True)):
        for x, source in enumerate(sources_X):
            for name in ("w_gate", "w_up", "w_down"):
                ours = leaves[f"extensions/image/new_experts/{name}"][y, x]
                np.testing.assert_array_equal(ours, arrays[experts + name][layer, source])
            column = arrays["decoder/layers/moe/gate"][layer, :, source]
            np.testing.assert_array_equal(leaves["extensions/image/router/new_gate"][y, :, x], column)
    assert not leaves["extensions/image/router/calibrator/w_out"].any()


@pytest.mark.parametrize(("recipe", "std"), [(PAPER, 1.0), (RELEASED, 0.02)])
def test_the_calibrator_starts_with_the_recipe_s_deviation(recipe, std: float):
    extension = dataclasses.replace(tiny.EXTENSION, calibrator_width=200)
    config = with_extension(tiny.PLAIN, extension)
    w_in = grow(tiny.arrays(tiny.PLAIN), config=config, recipe=recipe, seed=0)[
        "extensions/image/router/calibrator/w_in"
    ]
    np.testing.assert_allclose(np.std(w_in), std, rtol=0.1)


def test_new_leaves_have_the_training_dtype():
    half = dataclasses.replace(tiny.EXTENDED, dtype="bfloat16")
    arrays = {path: leaf.astype(jnp.bfloat16) for path, leaf in tiny.arrays(tiny.PLAIN).items()}
    leaves = grow(arrays, config=half, recipe=PAPER, seed=0)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        leaves["extensions/image/new_experts/w_up"][0, 0].astype(jnp.bfloat16),
        arrays["decoder/layers/moe/experts/w_up"][0, 1],
    )


def _params(config):
    from flax import nnx

    return by_path(nnx.state(tiny.structure(config)))
