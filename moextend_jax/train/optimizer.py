"""The optimizer of a stage: clip by the norm of what trains, then AdamW per group, for a learning rate of one.

The step multiplies the updates by its learning rate, so the rate is in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from moextend_jax.config import Recipe
from moextend_jax.settings import Group, OptimizerConfig
from moextend_jax.train.stages import group


def learning_rate(config: OptimizerConfig, *, steps: int, recipe: Recipe) -> optax.Schedule:
    """`cosine`: linear warm-up, then half a cosine to zero. `constant`: logarithmic warm-up, then constant
    (the released code's DeepSpeed WarmupLR: lr * log(step + 1) / log(warm-up steps))."""
    warmup = max(1, round(config.warmup_share * steps)) if config.warmup_share > 0 else 0
    if recipe.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else config.learning_rate, config.learning_rate,
                                                  warmup, max(steps, warmup + 1))  # fmt: skip
    if warmup < 2:
        return optax.constant_schedule(config.learning_rate)

    def logarithmic(step):
        risen = jnp.log(jnp.maximum(step, 0) + 1.0) / jnp.log(float(warmup))
        return config.learning_rate * jnp.minimum(risen, 1.0)

    return logarithmic


def make_optimizer(config: OptimizerConfig, *, paths: Mapping[str, object]) -> optax.GradientTransformationExtraArgs:
    """Over a flat dict of the trainable leaves by path: nothing else reaches the clip, the norm or the moments.

    Its updates are for a learning rate of one, times the group's multiplier; decay is a part of them, as in AdamW.
    `update` takes a boolean `finite` besides: where it is false, the state stays as it was.
    """
    labels: dict[str, Group] = {path: group(path) for path in paths}

    def adamw(name: Group) -> optax.GradientTransformation:
        return optax.chain(
            _adam(config),
            optax.add_decayed_weights(config.weight_decays.get(name, 0.0)),
            optax.scale(-config.multipliers.get(name, 1.0)),
        )

    groups: dict[Hashable, optax.GradientTransformation] = {name: adamw(name) for name in sorted(set(labels.values()))}
    return _computed_in_float32(
        optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.partition(groups, labels))
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam, one leaf after another. So where moments are kept in the host's memory, a device never holds more than
    those of one leaf."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.first_moment)

    def put(state: Any, space: Any) -> Any:
        if config.moments == "device":
            return state
        return state._replace(mu=jax.device_put(state.mu, space), nu=jax.device_put(state.nu, space))

    def init(params):
        return put(adam.init(params), jax.memory.Space.Host)

    def update(updates, state, params=None, *, finite=True, **_):
        done, mu, nu, count = dict(updates), dict(state.mu), dict(state.nu), state.count
        for path in (path for path, leaf in updates.items() if not isinstance(leaf, optax.MaskedNode)):
            of_leaf = optax.ScaleByAdamState(state.count, {path: mu[path]}, {path: nu[path]})
            before = put(of_leaf, jax.memory.Space.Device)
            leaf, after = cast(Any, adam.update({path: updates[path]}, before))
            after = put(jax.tree.map(functools.partial(jnp.where, finite), after, before), jax.memory.Space.Host)
            done |= leaf
            count, mu, nu = after.count, mu | after.mu, nu | after.nu
        return done, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _computed_in_float32(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner` with sums, updates and (unless set otherwise) moments in float32, whatever the leaves' dtype: in
    bfloat16's eight bits of mantissa, a second moment times 0.999 would never shrink."""

    def update(updates, state, params=None, **extra):
        return inner.update(in_float32(updates), state, in_float32(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(in_float32(params)), update)
