"""LLaVA-DyMoE's rules against drifting to new experts (arXiv 2603.27481): router logits of a step that trains in.

Out: which tokens may choose the new experts, and per token what is added to the loss. Neither exists at inference, when
the router alone decides. Logits of old experts are those of all columns before the extension that trains.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

EPSILON = 1e-6


def may_choose(old_To: jax.Array, new_TX: jax.Array, *, tau: float) -> jax.Array:
    """Token guidance, `[T, 1]`: the best new logit is above the best old one, by more than tau of the larger of their
    magnitudes. An exact copy of a column is never above its source, so new columns must start differently."""
    old_T1, new_T1 = old_To.max(axis=-1, keepdims=True), new_TX.max(axis=-1, keepdims=True)
    larger_T1 = jnp.maximum(jnp.abs(old_T1), jnp.abs(new_T1))
    return (new_T1 > old_T1) & (jnp.abs(new_T1 - old_T1) / (larger_T1 + EPSILON) > tau)


def exclusivity(old_To: jax.Array, new_TX: jax.Array) -> jax.Array:
    """g_old * g_new `[T]`, the total probabilities of old and of new experts; least where one of them is 1."""
    log_old_T, log_new_T = _log_masses(old_To, new_TX)
    return jnp.exp(log_old_T + log_new_T)


def specialisation(old_To: jax.Array, new_TX: jax.Array) -> jax.Array:
    """Binary cross-entropy `[T]` of g_new with the target 1 - (the likeliest old expert's probability), which has no
    gradient. New experts are for tokens of which no old one is sure."""
    log_old_T, log_new_T = _log_masses(old_To, new_TX)
    all_T = logsumexp(jnp.concatenate([old_To, new_TX], axis=-1), axis=-1)
    target_T = jax.lax.stop_gradient(1 - jnp.exp(old_To.max(axis=-1) - all_T))
    return -(target_T * log_new_T + (1 - target_T) * log_old_T)


def _log_masses(old_To: jax.Array, new_TX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 `[T]` each. Of columns that a token may not choose (-inf) the probability is 0."""
    old_T, new_T = logsumexp(old_To, axis=-1), logsumexp(new_TX, axis=-1)
    all_T = jnp.logaddexp(old_T, new_T)
    return old_T - all_T, new_T - all_T
