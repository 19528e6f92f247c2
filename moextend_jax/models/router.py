"""The router decides: `x_TD -> Routing(logits, expert ids, weights)`, with or without columns of extensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.config import DecoderConfig, ExtensionConfig, Mass
from moextend_jax.models.starts import STARTS, Columns
from moextend_jax.parameters import constant, weight


class Routing(NamedTuple):
    """What a layer decided; with a leading Z where layers are stacked.

    logits_TO: float32 router logits before the softmax; O = E, or in an extended model E and the X of every extension;
      -inf in columns that the layer lacks or the token may not choose. The load-balancing loss and every statistic come
      from these.
    ids_Tk: chosen experts, most likely first; ids from E on are new experts. Where extensions start "added", k is
      wider by their experts, which stand behind the k that compete: O, which is nobody, where a token has one not.
    weights_Tk: float32 combine weights, those of competing experts summing to one over k (but where `bounded` had to
      hold them).
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
        return q_TO + self.correction(q_TO)

    def correction(self, q_TO: jax.Array) -> jax.Array:
        w_OA, w_AO = self.w_in[...].astype(q_TO.dtype), self.w_out[...].astype(q_TO.dtype)
        return jax.nn.gelu(q_TO @ w_OA, approximate=False) @ w_AO


class NewColumns(nnx.Module):
    """New router columns and the calibrator of the extended layers; with start "lowered" what is added to their
    logits."""

    def __init__(self, decoder: DecoderConfig, extension: ExtensionConfig, *, rngs: nnx.Rngs, dtype: str, std: float):
        sizes, self.start = extension.sizes(decoder), extension.start
        self.new_gate = weight("YDX", sizes, rngs=rngs, dtype=dtype)
        self.offset = constant("YX", sizes, dtype=dtype, value=0.0) if extension.start == "lowered" else None
        self.calibrator = Calibrator(sizes, rngs=rngs, dtype=dtype, std=std)


def route(x_TD: jax.Array, gate_DE: jax.Array, *, top_k: int, normalised: bool = True) -> Routing:
    """Softmax over all experts in float32, top-k, renormalised over the chosen if `normalised`."""
    logits_TE = _logits(x_TD, gate_DE)
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_Tk, ids_Tk = jax.lax.top_k(probs_TE, top_k)
    return Routing(logits_TE, ids_Tk, over_their_sum(weights_Tk) if normalised else weights_Tk)


def route_extended(
    x_TD: jax.Array,
    gate_DE: jax.Array,
    slots: Sequence[NewColumns],
    *,
    extended: Sequence[jax.Array | bool] | None = None,
    shares: Sequence[jax.Array | None] | None = None,
    sources: Sequence[jax.Array | None] | None = None,
    top_k: int,
    normalise: Callable[..., jax.Array],
    normalised: bool = True,
    mass: Mass = "base",
) -> Routing:
    """The router of a layer of an extended model (method of the paper, order of the released code).

    Experts are chosen by the uncalibrated probabilities over all columns, weighted by the calibrated ones. Beside
    others an extension's calibrator corrects what it was trained on, the probabilities that its own columns alone would
    have, in proportion to what these columns have among all; alone it is the calibrator as trained. Which columns there
    are depends on how extensions start (`starts.STARTS`).

    Args:
      slots: the new columns of every extension in this layer, in the order of their experts' numbers.
      extended: for each, a bool scalar: false on a layer that it does not have, whose columns then are anything.
      shares: for each, the log of its share for every token [T], -inf where a token may not choose it; None: 0 for all.
        A token that may choose none of them gets `route`'s choice and weights. None: no token is kept from any.
      sources: for each, the experts [X] that its own are copies of; twins alone need them.
      normalise: from calibrated probabilities of the chosen to weights, a row of WEIGHT_GUARDS.
      normalised: of the base (`route`). Where its weights do not sum to one, those here sum to what the base's would
        for the token: else a new column would take from every expert's weight, for tokens that never choose it too.
      mass: "literal" lets it: weights are the calibrated probabilities themselves.
    """
    base_TE, E = _logits(x_TD, gate_DE), gate_DE.shape[-1]
    shares, sources = (some or [None] * len(slots) for some in (shares, sources))
    log_shares_T1 = [_log_share(x_TD, shares[n], extended[n] if extended else True) for n in range(len(slots))]
    seats, columns, first = [], Columns(base_TE, np.arange(E)), E
    for slot, share_T, share_T1, sources_X in zip(slots, shares, log_shares_T1, sources, strict=True):
        own_TX = _own_logits(x_TD, gate_DE, slot.new_gate[...])
        own_TX = own_TX if slot.offset is None else own_TX + slot.offset[...].astype(own_TX.dtype)
        # Where nothing has a share nothing is added: it would round.
        own_TX = jnp.where(jnp.isneginf(share_T1), -jnp.inf, own_TX if share_T is None else own_TX + share_T1)
        seats.append(STARTS[slot.start](own_TX, sources_X, first=first, experts=E, columns=columns))
        columns, first = seats[-1].columns, first + own_TX.shape[-1]
    probs_To = jax.nn.softmax(columns.logits_To, axis=-1)
    _, picked_Tk = jax.lax.top_k(probs_To, top_k)
    least_T1 = jnp.take_along_axis(columns.logits_To, picked_Tk[:, -1:], axis=-1)
    calibrated_To, beside = probs_To, []
    for slot, seat, share_T1 in zip(slots, seats, log_shares_T1, strict=True):
        own_TO, mass_T1 = probs_To, jnp.exp(jnp.minimum(share_T1, 0.0))
        if len(slots) > 1 or not seat.competes:
            own_TO = jax.nn.softmax(seat.alone(columns), axis=-1)
            # What the others have not: exactly all where they are closed, as without them.
            mass_T1 *= seat.left(probs_To)
        correction_TO = slot.calibrator.correction(own_TO) * mass_T1
        calibrated_To = calibrated_To + seat.spread(correction_TO, columns)
        beside.append((seat, seat.beside(columns, least_T1, correction_TO)))
    ids_Tk, weights_Tk = columns.experts(picked_Tk), jnp.take_along_axis(calibrated_To, picked_Tk, axis=-1)
    plain = route(x_TD, gate_DE, top_k=top_k, normalised=normalised)
    if normalised:
        weights_Tk = normalise(weights_Tk)
    elif mass == "base":
        weights_Tk = normalise(weights_Tk, plain.weights_Tk.sum(axis=-1, keepdims=True))
    if any(share is not None for share in shares):
        open_T1 = ~jnp.isneginf(jnp.concatenate(log_shares_T1, axis=-1)).all(axis=-1, keepdims=True)
        ids_Tk, weights_Tk = (
            jnp.where(open_T1, extended_Tk, plain_Tk)
            for extended_Tk, plain_Tk in ((ids_Tk, plain.ids_Tk), (weights_Tk, plain.weights_Tk))
        )
    for seat, stands in beside:
        if stands is not None:
            ids_Tk = jnp.concatenate([ids_Tk, jnp.where(stands.chosen_TX, seat.numbers_X, first)], axis=-1)
            weights_Tk = jnp.concatenate([weights_Tk, stands.weights_TX], axis=-1)
    logits_TO = jnp.concatenate([columns.held(E), *(seat.own(columns) for seat in seats)], axis=-1)
    return Routing(logits_TO, ids_Tk, weights_Tk)


def _log_share(x_TD: jax.Array, share_T: jax.Array | None, extended: jax.Array | bool) -> jax.Array:
    share_T = jnp.zeros(len(x_TD)) if share_T is None else share_T
    return jnp.where(extended, share_T, -jnp.inf)[:, None]


def _logits(x_TD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    return jnp.einsum("TD,DE->TE", x_TD, gate_DE.astype(x_TD.dtype), preferred_element_type=jnp.float32)


def _own_logits(x_TD: jax.Array, gate_DE: jax.Array, new_DX: jax.Array) -> jax.Array:
    """Of the new columns [T, X], which begin as copies of columns of the base. In one product with these a copy's logit
    is its source's; in a product of their own rounding would choose between the two, on every mesh in its own way."""
    gates_DO = jnp.concatenate([gate.astype(x_TD.dtype) for gate in (gate_DE, new_DX)], axis=-1)
    return _logits(x_TD, gates_DO)[:, gate_DE.shape[-1] :]


def over_their_sum(weights_Tk: jax.Array, to_T1: jax.Array | float = 1.0) -> jax.Array:
    """Weights that sum to `to_T1`."""
    return weights_Tk / (weights_Tk.sum(axis=-1, keepdims=True) / to_T1)


LARGEST_WEIGHT = 4.0
"""Of `bounded`. Calibrators that train well were seen to give -0.56 to 1.56."""


def bounded(weights_Tk: jax.Array, to_T1: jax.Array | float = 1.0) -> jax.Array:
    """`over_their_sum`, bit for bit, unless the weights nearly cancel; then by a sum that leaves none above the bound.

    Calibrated probabilities have any sign, so their sum can come near zero: 0.40 and -0.39 would weigh 40 and -39. They
    are divided by 0.79 / 4 instead of 0.01, and weigh 2.03 and -1.97. Weights, and their gradient, stay finite.
    """
    total_T1 = weights_Tk.sum(axis=-1, keepdims=True)
    least_T1 = jnp.abs(weights_Tk).sum(axis=-1, keepdims=True) / LARGEST_WEIGHT
    least_T1 = jnp.maximum(least_T1, 1e-6)  # all of them zero
    total_T1 = jnp.where(jnp.abs(total_T1) < least_T1, jnp.copysign(least_T1, total_T1), total_T1)
    return weights_Tk / (total_T1 / to_T1)


WEIGHT_GUARDS: dict[str, Callable[..., jax.Array]] = {"none": over_their_sum, "bounded": bounded}
"""TABLE `weight_guard` -> how the chosen experts' calibrated probabilities become weights."""
