"""After real steps of every stage frozen leaves are bit-identical, trained ones moved, and nothing was a constant."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moextend_jax.config import RECIPES
from moextend_jax.models.parameters import by_path, with_arrays
from moextend_jax.settings import OptimizerConfig
from moextend_jax.train import stages
from moextend_jax.train.optimizer import make_optimizer
from moextend_jax.train.step import init_state, make_step

pytestmark = pytest.mark.smoke


def hashes(leaves) -> dict[str, str]:
    return {path: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves.items()}


@functools.cache
def compiled(stage: str):
    return built(stage)


def built(stage: str, *, accumulate: int = 1, aux_coefficient: float = 0.01):
    """The stage's jitted step, a fresh state, and the frozen leaves."""
    arrays = tiny.arrays(tiny.EXTENDED)
    trainable, frozen = stages.split(arrays, stages.STAGES[stage])
    optimizer = make_optimizer(OptimizerConfig(), paths=trainable, schedule=schedule)
    step = make_step(
        tiny.structure(tiny.EXTENDED),
        optimizer=optimizer,
        schedule=schedule,
        recipe=RECIPES["paper"],
        aux_coefficient=aux_coefficient,
        loss_chunk=4,
        accumulate=accumulate,
    )
    return step, init_state(jax.tree.map(lambda leaf: leaf.copy(), trainable), optimizer), frozen


def schedule(_):
    return 1e-2


@pytest.mark.parametrize("stage", stages.STAGES)
def test_three_steps_change_what_the_stage_trains_and_not_one_bit_else(stage: str):
    step, state, frozen = compiled(stage)
    before, frozen_before = hashes(state.trainable), hashes(frozen)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    for count in range(3):
        state, metrics = step(state, frozen, tiny.batch(seed=count, pixels=stage == "full"))
        assert all(np.isfinite(float(value)) for value in metrics.values()), metrics
        assert float(metrics["grad_norm"]) > 0 and float(metrics["learning_rate"]) == np.float32(1e-2)
        assert int(metrics["labelled_tokens"]) == (tiny.batch(seed=count).labels_BL[:, 1:] != -100).sum()
    assert int(state.step) == 3
    assert hashes(frozen) == frozen_before
    unmoved = {path for path, digest in hashes(state.trainable).items() if digest == before[path]}
    # Only the contrastive loss of pretraining reads the tower's last norm.
    assert unmoved == ({path for path in before if path.startswith("vision/post_norm")} if stage == "full" else set())


def test_the_loss_falls():
    step, state, frozen = compiled("finetune")
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    seen = []
    for _ in range(12):
        state, metrics = step(state, frozen, tiny.batch())
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] - 0.05


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_no_parameter_is_a_constant_of_the_program(stage: str):
    step, state, frozen = compiled(stage)
    jaxpr = step.trace(state, frozen, tiny.batch()).jaxpr
    assert max((np.size(const) for const in jaxpr.consts), default=0) <= tiny.DECODER.layers
    arguments = {leaf.aval.shape for leaf in jaxpr.jaxpr.invars}
    for path, leaf in frozen.items():
        assert leaf.shape in arguments, path


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts: int):
    """Without load balancing, whose loss is a product of means over each part."""
    batch, updated = tiny.batch(rows=4), []
    for accumulate in (1, parts):
        step, state, frozen = built("finetune", accumulate=accumulate, aux_coefficient=0.0)
        state, metrics = step(state, frozen, batch)
        updated.append((state.trainable, {name: float(value) for name, value in metrics.items() if name != "aux"}))
    (expected, metrics), (got, metrics_of_parts) = updated
    assert metrics_of_parts == pytest.approx(metrics, rel=1e-5)
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path], leaf, atol=1e-5, rtol=0, err_msg=path)


def test_activations_keep_the_dtype_of_the_model():
    """A float32 projector among bfloat16 weights must not lift all that follows to float32."""
    config = dataclasses.replace(tiny.EXTENDED, dtype="bfloat16")
    structure = tiny.structure(config)

    def run(batch):
        return with_arrays(structure, {path: leaf.astype(param.dtype) for (path, leaf), param in params})(batch)

    params = list(zip(tiny.arrays(config).items(), by_path(nnx.state(structure, nnx.Param)).values(), strict=True))
    decoded = jax.eval_shape(run, tiny.batch())
    assert decoded.hidden_BLD.dtype == decoded.keys_values.keys_BSKH.dtype == jnp.bfloat16
    assert decoded.routing.weights_Tk.dtype == jnp.float32
