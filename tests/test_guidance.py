"""Rules that hold in training alone: of a step, not of what is used; tokens that may not choose count nowhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moextend_jax.config import RECIPES, AdapterConfig, ModelConfig, MoextendError, Named, with_extension
from moextend_jax.extension.grow import grow
from moextend_jax.families import FAMILIES
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.ready import extension_problems
from moextend_jax.runs.results import FIRST, table
from moextend_jax.settings import GrowSettings, MethodSettings
from moextend_jax.train.loss import losses
from moextend_jax.train.stages import for_training, split
from moextend_jax.train.step import init_state, make_step


def step_of(config: ModelConfig, trains: str) -> tuple[dict[str, jax.Array], Any, Any]:
    """A step's trained leaves before and after it, and its metrics."""
    trainable, frozen = split(tiny.arrays(config), [trains])
    optimizer = optax.with_extra_args_support(optax.chain(optax.scale(-1.0), optax.identity()))
    step = make_step(
        abstract(config), optimizer=optimizer, schedule=lambda _: 1.0, recipe=RECIPES["paper"], aux_coefficient=0.0,
        loss_chunk=8,
    )  # fmt: skip
    state = init_state(jax.tree.map(jnp.copy, trainable), optimizer)
    state, metrics = step(state, frozen, tiny.batch())
    return trainable, state.trainable, metrics


def biased(**options: Any) -> ModelConfig:
    """A tiny model in which a bias chooses experts, as in GLM-4.5, with an extension."""
    fields = {**FAMILIES["glm4_moe"].fields, "dense_layers": 0, "rotary_share": 1.0}
    decoder = dataclasses.replace(tiny.PLAIN.decoder, family="glm4_moe", shared_experts=1, **fields)
    return with_extension(
        dataclasses.replace(tiny.PLAIN, decoder=decoder), dataclasses.replace(tiny.EXTENSION, **options)
    )


def test_a_closed_expert_is_not_there_and_opens_up_to_its_source():
    config, name = biased(), "extensions/image/router/new_bias"
    base = {path: leaf for path, leaf in tiny.arrays(config).items() if not path.startswith("extensions/")}
    grown = {how: base | grow(base, config=config, recipe=RECIPES["paper"], seed=0, closed=how == "closed")
             for how in ("copy", "closed")}  # fmt: skip
    plain = dataclasses.replace(config, extensions=Named())
    logits = {how: with_arrays(abstract(config), leaves)(tiny.batch()) for how, leaves in grown.items()}
    expected = with_arrays(abstract(plain), base)(tiny.batch())
    np.testing.assert_array_equal(logits["closed"].routing.ids_Tk, expected.routing.ids_Tk)
    np.testing.assert_allclose(logits["closed"].hidden_BLD, expected.hidden_BLD, atol=1e-5)
    assert np.abs(logits["copy"].hidden_BLD - expected.hidden_BLD).max() > 1e-3

    trains = ("extensions/image/*", name)
    trainable, frozen = split(grown["closed"], trains)
    optimizer = optax.with_extra_args_support(optax.chain(optax.scale(-1.0), optax.identity()))
    step = make_step(
        abstract(config), optimizer=optimizer, schedule=lambda _: 0.0, recipe=RECIPES["paper"], aux_coefficient=0.0,
        loss_chunk=8, opens_by={name: 0.25},
    )  # fmt: skip
    state, biases = init_state(jax.tree.map(jnp.copy, trainable), optimizer), []
    for _ in range(40):
        state, _ = step(state, frozen, tiny.batch())
        biases.append(np.asarray(state.trainable[name]))
    closed, copied = (np.asarray(grown[how][name]) for how in ("closed", "copy"))
    np.testing.assert_allclose(biases[0], closed + 0.25, atol=1e-6)
    assert (biases[-1] <= copied).all() and (biases[-1] > closed + 0.5).all()
    assert name not in split(grown["closed"], trains[:1])[0]


def test_what_cannot_be_closed_is_refused():
    with pytest.raises(MoextendError, match="a twin stands in its source's column"):
        GrowSettings(start="twin", selection_bias="closed")
    settings = tiny.run_settings(grow=GrowSettings(selection_bias="closed"))
    assert FIRST.patterns("finetune", recipe=RECIPES["paper"]) == ("extensions/image/*",)
    assert table(settings).patterns("finetune", recipe=RECIPES["paper"])[1:] == ("extensions/image/router/new_bias",)
    (problem,) = extension_problems(settings, ["grow"], decoder=tiny.DECODER)
    assert "no bias chooses experts in a mixtral" in problem
    assert not extension_problems(settings, ["grow"], decoder=biased().decoder)


def guided(**options: Any) -> ModelConfig:
    return with_extension(tiny.EXTENDED, dataclasses.replace(tiny.EXTENSION, **options))


@pytest.mark.slow
def test_atoms_are_trained_without_the_threshold():
    """None reaches it, so that with it nothing would have a gradient."""
    adapter = AdapterConfig(method="moram", rank=4, alpha=8.0, experts="none", top_k=3, tau=0.1, threshold=2.0)
    config = dataclasses.replace(tiny.PLAIN, adapters=Named(own=adapter))
    before, after, _ = step_of(config, "adapters/own/*")
    assert any(not np.array_equal(before[path], leaf) for path, leaf in after.items() if path.endswith("/b"))


def test_a_step_that_trains_several_extensions_is_not_guided():
    both = dataclasses.replace(tiny.BOTH, extensions=tiny.BOTH.extensions.replacing(
        "image", dataclasses.replace(tiny.EXTENSION, guidance=0.2, drift=0.1)))  # fmt: skip
    alone, together = (
        for_training(tiny.structure(both), [f"extensions/{name}/router/new_gate" for name in names]).config.extensions
        for names in (["image"], ["image", "sound"])
    )
    assert (alone["image"].guidance, alone["image"].drift) == (0.2, 0.1) and not alone["sound"].trains
    assert (together["image"].guidance, together["image"].drift) == (0.0, 0.0) and together["sound"].trains


@pytest.mark.slow
def test_guidance_keeps_tokens_from_new_experts_in_the_step_alone():
    plain, _, _ = step_of(guided(), "extensions/image/*")
    before, after, metrics = step_of(guided(guidance=100.0), "extensions/image/*")
    path = "extensions/image/new_experts/w_gate"
    np.testing.assert_array_equal(before[path], after[path])
    assert not metrics["picks_ZO"][:, tiny.DECODER.experts :].any() and plain.keys() == after.keys()
    hidden = [
        np.asarray(tiny.with_arrays_of(config, tiny.arrays(config))(tiny.batch()).hidden_BLD)
        for config in (guided(), guided(guidance=100.0, drift=1.0))
    ]
    np.testing.assert_array_equal(hidden[0], hidden[1])


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["strict", "none"])
def test_the_loss_against_drift_counts_tokens_that_may_choose(isolation: Any):
    """It is there in training alone; with strict isolation a text row moves nothing of it."""

    def drift(batch: Any, *, coefficient: float) -> float:
        config = dataclasses.replace(guided(drift=coefficient), text_isolation=isolation)
        model = for_training(abstract(config), ["extensions/image/router/new_gate"])
        options = {"recipe": RECIPES["paper"], "aux_coefficient": 0.0, "chunk": 8}
        of, _ = losses(tiny.with_arrays_of(model.config, tiny.arrays(config)), batch, **options)
        return float(of.total - of.ce)

    batch = tiny.batch()
    assert drift(batch, coefficient=0.0) == 0.0
    one, two = drift(batch, coefficient=1.0), drift(batch, coefficient=2.0)
    assert one > 0 and two == pytest.approx(2 * one, rel=1e-4)
    other = batch._replace(ids_BL=batch.ids_BL.copy())
    other.ids_BL[1] = 7 + (other.ids_BL[1] + 5) % 50  # row 1 is text
    changed = abs(drift(other, coefficient=1.0) - one)
    assert changed < 1e-6 if isolation == "strict" else changed > 1e-4


def test_a_copied_column_under_guidance_is_refused():
    settings = tiny.run_settings()
    with pytest.raises(MoextendError, match="extension image: method.guidance keeps every token from a copied column"):
        dataclasses.replace(settings, method=MethodSettings(guidance=0.2))
    grow = GrowSettings(column="mean")
    assert dataclasses.replace(settings, method=MethodSettings(guidance=0.2), grow=grow).method.guidance == 0.2
    assert dataclasses.replace(settings, method=MethodSettings(guidance=0.2, drift=0.1)).links[0].rival is None
