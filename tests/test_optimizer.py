"""The optimizer is AdamW by hand per group after a clip over the trainable leaves; schedules at counted points."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.settings import OptimizerConfig
from moextend_jax.train import stages
from moextend_jax.train.optimizer import learning_rate, make_optimizer

PAPER, RELEASED = RECIPES["paper"], RECIPES["released"]


def test_cosine_after_a_linear_warm_up():
    schedule = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_share=0.03), steps=1000, recipe=PAPER)
    for step, share in {0: 0, 15: 0.5, 30: 1, 515: 0.5, 1000: 0}.items():
        np.testing.assert_allclose(schedule(step), 2e-3 * share, atol=1e-9)
    quarter = 30 + 970 / 3  # a third of the way down: cos(60 degrees) = 1/2
    np.testing.assert_allclose(schedule(quarter), 2e-3 * 0.75, atol=1e-8)


def test_constant_after_the_released_logarithmic_warm_up():
    schedule = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_share=0.03), steps=1000, recipe=RELEASED)
    for step, share in {0: 0, 9: math.log(10) / math.log(30), 29: 1, 500: 1, 1000: 1}.items():
        np.testing.assert_allclose(schedule(step), 2e-3 * share, rtol=1e-6)


@pytest.mark.parametrize("recipe", [PAPER, RELEASED])
def test_without_warm_up_the_first_step_has_the_full_rate(recipe):
    schedule = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_share=0.0), steps=10, recipe=recipe)
    np.testing.assert_allclose(schedule(0), 2e-3, rtol=1e-6)


@pytest.mark.parametrize("recipe", [PAPER, RELEASED])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_a_short_run_has_finite_rates_that_are_not_all_zero(recipe, steps: int):
    schedule = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_share=0.03), steps=steps, recipe=recipe)
    rates = [float(np.asarray(schedule(step))) for step in range(steps)]
    assert all(0 <= rate <= 2e-3 * (1 + 1e-6) for rate in rates)
    assert steps == 1 or max(rates) > 1e-3


LEAVES = {
    "media/image/projector/first": (4, 3),
    "extensions/image/new_experts/w_up": (2, 5),
    "extensions/image/router/new_gate": (3,),
    "extensions/image/router/calibrator/w_in": (2, 2),
}
CONFIG = OptimizerConfig(
    clip_norm=1.5,
    b1=0.8,
    b2=0.95,
    eps=1e-6,
    multipliers={"new_experts": 0.5, "router_columns": 3.0},
    weight_decays={"projector": 0.1, "router_columns": 0.2},
)


def by_hand(start, gradients, rate_of) -> dict[str, np.ndarray]:
    """AdamW in float64 with the group's rate and decay, clipped by the norm over all trainable leaves."""
    multiplier = {"extensions/image/new_experts/w_up": 0.5, "extensions/image/router/new_gate": 3.0}
    decay = {"media/image/projector/first": 0.1, "extensions/image/router/new_gate": 0.2}
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in start.items()}
    m, v = ({path: np.zeros_like(leaf) for path, leaf in leaves.items()} for _ in range(2))
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
        for path, leaf in leaves.items():
            g = np.asarray(gradient[path], np.float64) * min(1, 1.5 / norm)
            m[path] = 0.8 * m[path] + 0.2 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            m_hat, v_hat = m[path] / (1 - 0.8 ** (step + 1)), v[path] / (1 - 0.95 ** (step + 1))
            update = m_hat / (np.sqrt(v_hat) + 1e-6) + decay.get(path, 0.0) * leaf
            leaves[path] = leaf - rate_of(step) * multiplier.get(path, 1.0) * update
    return leaves


def test_equals_adamw_by_hand_with_groups_decay_and_clip():
    rng = np.random.default_rng(0)

    def normal(scale: float) -> dict[str, jax.Array]:
        return {path: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for path, shape in LEAVES.items()}

    def rate_of(step):
        return 0.01 * (step + 1)

    leaves, gradients = normal(1.0), [normal(0.05), normal(4.0), normal(0.2)]  # only the second is clipped
    expected = by_hand(leaves, gradients, rate_of)
    optimizer = make_optimizer(CONFIG, paths=leaves)
    state = optimizer.init(leaves)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(gradient, state, leaves)
        updates = {path: rate_of(step) * leaf for path, leaf in cast(dict[str, jax.Array], updates).items()}
        leaves = cast(dict[str, jax.Array], optax.apply_updates(leaves, updates))
    for path, value in expected.items():
        np.testing.assert_allclose(np.asarray(leaves[path]), value, atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_the_state_is_two_moments_of_what_trains_and_counters(stage: str):
    trainable, _ = stages.split(tiny.arrays(tiny.EXTENDED), tiny.STAGES[stage])
    optimizer = make_optimizer(OptimizerConfig(), paths=trainable)
    state = jax.eval_shape(optimizer.init, trainable)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    counters = [leaf for leaf in jax.tree.leaves(state) if not leaf.ndim]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in trainable.values())
    assert len(sizes) == 2 * len(trainable)
    assert 0 < len(counters) <= 2 * len({stages.group(path) for path in trainable})


def test_moments_of_a_bfloat16_leaf_are_float32_and_forget():
    """A bfloat16 second moment times 0.999 rounds back to itself: after one large gradient it would stay for ever."""
    leaves = {"media/image/projector/first": jnp.ones(4, jnp.bfloat16)}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1e9), paths=leaves)
    state = optimizer.init(leaves)
    sizes = []
    for scale in (1.0, *[1e-3] * 20):
        updates, state = optimizer.update(
            {"media/image/projector/first": jnp.full(4, scale, jnp.bfloat16)}, state, leaves
        )
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert {leaf.dtype for leaf in (*moments, *jax.tree.leaves(updates))} == {jnp.dtype("float32")}
        sizes.append(float(moments[1][0]))
    np.testing.assert_allclose(sizes[-1], 1e-3 * 0.999**20 + 1e-9 * (1 - 0.999**20), rtol=1e-2)


def test_an_unknown_group_is_an_error_that_lists_the_groups():
    with pytest.raises(MoextendError, match=r"multipliers\.projektor is no setting; there are .*new_experts"):
        OptimizerConfig(multipliers=cast(Any, {"projektor": 2.0}))
