"""The router decides: `x_TD -> Routing(logits, expert ids, weights)`, with or without new columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import DecoderConfig, ExtensionConfig
from moextend_jax.parameters import weight


class Routing(NamedTuple):
    """What a layer decided; with a leading Z where layers are stacked.

    logits_TO: float32 router logits before the softmax; O = E, or E+X in an extended model, whose plain layers
      hold -inf in the new columns. The load-balancing loss and every statistic come from these.
    ids_Tk: chosen experts, most likely first; ids from E on are new experts.
    weights_Tk: float32 combine weights, summing to one over k (but where `bounded` had to hold them).
    """

    logits_TO: jax.Array
    ids_Tk: jax.Array
    weights_Tk: jax.Array


class Calibrator(nnx.Module):
    """`q -> q + gelu(q w_in) w_out`; w_out starts at zero, so it starts as the identity (paper section 3.3)."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str, std: float):
        self.w_in = weight("YOA", sizes, rngs=rngs, dtype=dtype, std=std)
        self.w_out = weight("YAO", sizes, rngs=rngs, dtype=dtype, std=0.0)

    def __call__(self, q_TO: jax.Array) -> jax.Array:
        w_OA, w_AO = self.w_in[...].astype(q_TO.dtype), self.w_out[...].astype(q_TO.dtype)
        return q_TO + jax.nn.gelu(q_TO @ w_OA, approximate=False) @ w_AO


class NewColumns(nnx.Module):
    """New router columns and the calibrator of the extended layers."""

    def __init__(self, decoder: DecoderConfig, extension: ExtensionConfig, *, rngs: nnx.Rngs, dtype: str, std: float):
        sizes = {**decoder.sizes(), **extension.sizes(), "O": decoder.experts + extension.new_experts}
        self.new_gate = weight("YDX", sizes, rngs=rngs, dtype=dtype)
        self.calibrator = Calibrator(sizes, rngs=rngs, dtype=dtype, std=std)


def route(x_TD: jax.Array, gate_DE: jax.Array, *, top_k: int) -> Routing:
    """Mixtral's router: softmax over all experts in float32, top-k, renormalised over the chosen."""
    logits_TE = _logits(x_TD, gate_DE)
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_Tk, ids_Tk = jax.lax.top_k(probs_TE, top_k)
    return Routing(logits_TE, ids_Tk, over_their_sum(weights_Tk))


def route_extended(
    x_TD: jax.Array,
    gate_DE: jax.Array,
    new: NewColumns,
    *,
    extended: jax.Array,
    top_k: int,
    normalise: Callable[[jax.Array], jax.Array],
    sighted_T: jax.Array | None = None,
) -> Routing:
    """The router of a layer of an extended model (method of the paper, order of the released code).

    Experts are chosen by the uncalibrated probabilities over E+X, weighted by the calibrated ones.

    Args:
      new: the new columns of this layer; for a plain layer its leaves are zeros, which makes the calibrator
        the identity.
      extended: bool scalar; on a plain layer no token can choose a new expert, and the result is `route`'s.
      normalise: from calibrated probabilities of the chosen to weights, a row of WEIGHT_GUARDS.
      sighted_T: tokens that may choose new experts, None: all. The others get `route`'s choice and weights.
    """
    open_T1 = jnp.broadcast_to(extended, x_TD.shape[:1])[:, None]
    open_T1 = open_T1 if sighted_T is None else open_T1 & sighted_T[:, None]
    new_TX = jnp.where(open_T1, _logits(x_TD, new.new_gate[...]), -jnp.inf)
    logits_TO = jnp.concatenate([_logits(x_TD, gate_DE), new_TX], axis=-1)
    probs_TO = jax.nn.softmax(logits_TO, axis=-1)
    _, ids_Tk = jax.lax.top_k(probs_TO, top_k)
    weights_Tk = normalise(jnp.take_along_axis(new.calibrator(probs_TO), ids_Tk, axis=-1))
    if sighted_T is not None:
        plain = route(x_TD, gate_DE, top_k=top_k)
        ids_Tk, weights_Tk = (
            jnp.where(open_T1, extended_Tk, plain_Tk)
            for extended_Tk, plain_Tk in ((ids_Tk, plain.ids_Tk), (weights_Tk, plain.weights_Tk))
        )
    return Routing(logits_TO, ids_Tk, weights_Tk)


def _logits(x_TD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    return jnp.einsum("TD,DE->TE", x_TD, gate_DE.astype(x_TD.dtype), preferred_element_type=jnp.float32)


def over_their_sum(weights_Tk: jax.Array) -> jax.Array:
    return weights_Tk / weights_Tk.sum(axis=-1, keepdims=True)


LARGEST_WEIGHT = 4.0
"""Of `bounded`. Calibrators that train well were seen to give -0.56 to 1.56."""


def bounded(weights_Tk: jax.Array) -> jax.Array:
    """`over_their_sum`, bit for bit, unless the weights nearly cancel; then by a sum that leaves none above the bound.

    Calibrated probabilities have any sign, so their sum can come near zero: 0.40 and -0.39 would weigh 40 and -39. They
    are divided by 0.79 / 4 instead of 0.01, and weigh 2.03 and -1.97. Weights, and their gradient, stay finite.
    """
    total_T1 = weights_Tk.sum(axis=-1, keepdims=True)
    least_T1 = jnp.abs(weights_Tk).sum(axis=-1, keepdims=True) / LARGEST_WEIGHT
    least_T1 = jnp.maximum(least_T1, 1e-6)  # all of them zero
    return weights_Tk / jnp.where(jnp.abs(total_T1) < least_T1, jnp.copysign(least_T1, total_T1), total_T1)


WEIGHT_GUARDS: dict[str, Callable[[jax.Array], jax.Array]] = {"none": over_their_sum, "bounded": bounded}
"""TABLE `weight_guard` -> how the chosen experts' calibrated probabilities become weights."""
