"""The router decides: `x_TD -> Routing(logits, expert ids, weights)`, with or without columns of extensions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.config import CalibratorName, DecoderConfig, ExtensionConfig, Mass
from moextend_jax.models.guidance import exclusivity, may_choose, specialisation
from moextend_jax.models.starts import STARTS, TIE, Columns, Competing
from moextend_jax.parameters import constant, weight


class Routing(NamedTuple):
    """What a layer decided; with a leading Z where layers are stacked.

    logits_TO: float32 router logits before the scores; O = E, or in an extended model E and the X of every extension;
      -inf in columns that the layer lacks or the token may not choose. The load-balancing loss and every statistic come
      from these.
    ids_Tk: chosen experts, the best first; ids from E on are new experts. With start "added" the axis also has a place
      for each of these experts, after the k best. Id O there is no expert: the token does not use that one.
    weights_Tk: float32 combine weights. Those of experts that compete sum to one if the family normalises them (unless
      `bounded` had to limit them).
    selection_TO: float32 scores by which the k best were chosen, -inf for experts that the token could not choose;
      None where their order is that of the logits.
    lora_TI: by adapter that chooses among I LoRA experts (MoLE), their float32 probabilities.
    drift_T2: in a step with drift losses, each token's loss and 1; both 0 if it may not choose the trained extension.
    """

    logits_TO: jax.Array
    ids_Tk: jax.Array
    weights_Tk: jax.Array
    selection_TO: jax.Array | None = None
    lora_TI: Mapping[str, jax.Array] = {}
    drift_T2: jax.Array | None = None

    @property
    def chosen_by_TO(self) -> jax.Array:
        """The experts with the k largest of these were chosen."""
        return self.logits_TO if self.selection_TO is None else self.selection_TO


class TwoLayers(nnx.Module):
    """`q -> q + gelu(q w_in) w_out`; w_out starts at zero, so it starts as the identity (paper section 3.3).

    multiplied: `q -> q gelu(q w_in) w_out`, both at random; in the paper it diverged.
    """

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str, std: float, multiplied: bool = False):
        self.w_in = weight("YOA", sizes, rngs=rngs, dtype=dtype, std=std)
        self.w_out = weight("YAO", sizes, rngs=rngs, dtype=dtype, std=std if multiplied else 0.0)
        self.multiplied = multiplied

    def correction(self, q_TO: jax.Array) -> jax.Array:
        w_OA, w_AO = self.w_in[...].astype(q_TO.dtype), self.w_out[...].astype(q_TO.dtype)
        made_TO = jax.nn.gelu(q_TO @ w_OA, approximate=False) @ w_AO
        return q_TO * made_TO - q_TO if self.multiplied else made_TO


class Vector(nnx.Module):
    """`q -> q + vector`, starting at zero, or if `multiplied` `q -> q vector`, starting at one."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str, std: float, multiplied: bool = False):
        self.vector = constant("YO", sizes, dtype=dtype, value=1.0 if multiplied else 0.0)
        self.multiplied = multiplied

    def correction(self, q_TO: jax.Array) -> jax.Array:
        vector_O = self.vector[...].astype(q_TO.dtype)
        return q_TO * (vector_O - 1)[None] if self.multiplied else jnp.broadcast_to(vector_O, q_TO.shape)


class Uncalibrated(nnx.Module):
    """`q -> q`."""

    def __init__(self, sizes: dict[str, int], **_: Any):
        pass

    def correction(self, q_TO: jax.Array) -> jax.Array:
        return jnp.zeros_like(q_TO)


CALIBRATORS: dict[CalibratorName, Callable[..., Any]] = {
    "two_layers": TwoLayers, "two_layers_multiplied": functools.partial(TwoLayers, multiplied=True),
    "vector": Vector, "vector_multiplied": functools.partial(Vector, multiplied=True), "none": Uncalibrated,
}  # fmt: skip
"""TABLE `ExtensionConfig.calibrator` -> what probabilities q [T, O] are corrected by; the paper's and its ablations."""


class NewColumns(nnx.Module):
    """New router columns, with the biases that the base's have, and the calibrator of the extended layers.

    new_gate_bias: bias of their logits. new_bias: their selection bias, which has no gradient. offset: with start
    "lowered", what is added to their logits.
    """

    def __init__(self, decoder: DecoderConfig, extension: ExtensionConfig, *, rngs: nnx.Rngs, dtype: str, std: float):
        sizes, self.start = extension.sizes(decoder), extension.start
        self.new_gate = weight("YDX", sizes, rngs=rngs, dtype=dtype)
        self.new_gate_bias = constant("YX", sizes, dtype=dtype, value=0.0) if decoder.router_bias else None
        self.new_bias = constant("YX", sizes, dtype="float32", value=0.0) if decoder.selection_bias else None
        self.offset = constant("YX", sizes, dtype=dtype, value=0.0) if extension.start == "lowered" else None
        self.calibrator = CALIBRATORS[extension.calibrator](sizes, rngs=rngs, dtype=dtype, std=std)
        self.guidance, self.drift = (extension.guidance, extension.drift) if extension.trains else (0.0, 0.0)


class Rule(NamedTuple):
    """How a decoder's router decides: the fields of `DecoderConfig` with these names."""

    top_k: int
    scores: str = "softmax"
    normalised: bool = True
    routed_factor: float = 1.0
    groups: int = 1
    top_groups: int = 1
    router_float32: bool = False

    @classmethod
    def of(cls, config: DecoderConfig) -> Rule:
        return cls(*(getattr(config, name) for name in cls._fields))

    def dtype(self, x_TD: jax.Array) -> Any:
        """What tokens and columns are multiplied in."""
        return jnp.float32 if self.router_float32 else x_TD.dtype


SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
}
"""TABLE `DecoderConfig.scores` -> what logits [..., O] become: experts are chosen and weighed by it. -inf gives 0."""


def probabilities(logits_TO: jax.Array, scores: str) -> jax.Array:
    """Scores divided by their sum, for load balancing and calibrators: these then have one scale in every family. With
    softmax they are the scores."""
    scores_TO = SCORES[scores](logits_TO)
    return scores_TO if scores == "softmax" else scores_TO / scores_TO.sum(axis=-1, keepdims=True)


def selection(logits_TO: jax.Array, rule: Rule, bias_O: jax.Array | None, *, experts: int) -> jax.Array | None:
    """Scores plus bias, -inf for experts that a token may not choose; None where the logits have the same order.

    A softmax is taken over the sum of the first `experts` columns, the pretrained ones: beside scores over a larger sum
    a bias would weigh more, so that a new column changed the order of the others. Only these columns are in groups; a
    group is ranked by the sum of its two best. Later columns may always be chosen, so that a new expert does not decide
    which groups are chosen.
    """
    if bias_O is None and rule.groups == 1:
        return None
    if rule.scores == "softmax":
        powers_TO = jnp.exp(logits_TO - logits_TO[:, :experts].max(axis=-1, keepdims=True))
        scores_TO = powers_TO / powers_TO[:, :experts].sum(axis=-1, keepdims=True)
    else:
        scores_TO = SCORES[rule.scores](logits_TO)
    chosen_by_TO = scores_TO if bias_O is None else scores_TO + bias_O[None]
    if rule.groups > 1:
        grouped_TgE = chosen_by_TO[:, :experts].reshape(len(logits_TO), rule.groups, -1)
        worth_Tg = jax.lax.top_k(grouped_TgE, 2)[0].sum(axis=-1)
        best_Tg = jax.nn.one_hot(jax.lax.top_k(worth_Tg, rule.top_groups)[1], rule.groups, dtype=bool).any(axis=1)
        grouped_TgE = jnp.where(best_Tg[..., None], grouped_TgE, -jnp.inf)
        chosen_by_TO = chosen_by_TO.at[:, :experts].set(grouped_TgE.reshape(len(logits_TO), experts))
    return jnp.where(jnp.isneginf(logits_TO), -jnp.inf, chosen_by_TO)


class Gate(NamedTuple):
    """The router of a layer: its columns, the bias of its logits, the selection bias, and what an adapter adds to the
    logits of its tokens (`adapters.router_update`)."""

    columns_DE: jax.Array
    bias_E: jax.Array | None = None
    selection_E: jax.Array | None = None
    update_TE: jax.Array | None = None

    @classmethod
    def of(cls, moe: Any) -> Gate:
        bias, chooses = (None if leaf is None else leaf[...] for leaf in (moe.gate_bias, moe.selection_bias))
        return cls(moe.gate[...], bias, chooses)

    def logits(self, x_TD: jax.Array, rule: Rule) -> jax.Array:
        """float32 `[T, E]`."""
        dtype, precision = rule.dtype(x_TD), "highest" if rule.router_float32 else None
        product_TE = jnp.einsum(
            "TD,DE->TE", x_TD.astype(dtype), self.columns_DE.astype(dtype),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        product_TE = product_TE if self.bias_E is None else product_TE + self.bias_E.astype(jnp.float32)[None]
        return product_TE if self.update_TE is None else product_TE + self.update_TE

    def and_columns(self, slot: NewColumns) -> Gate:
        """With the columns of an extension behind its own."""
        bias = None if self.bias_E is None else jnp.concatenate([self.bias_E, _there(slot.new_gate_bias)])
        return Gate(jnp.concatenate([self.columns_DE, slot.new_gate[...].astype(self.columns_DE.dtype)], axis=-1), bias)


def _there(param: nnx.Param | None) -> jax.Array:
    """An extension's bias, which exists where the base has one."""
    assert param is not None
    return param[...]


def route(x_TD: jax.Array, gate: Gate | jax.Array, *, rule: Rule) -> Routing:
    """Scores of all experts in float32, the k best by `selection`, weighed by their scores: over their sum if
    `normalised`."""
    gate = gate if isinstance(gate, Gate) else Gate(gate)
    logits_TE, E = gate.logits(x_TD, rule), gate.columns_DE.shape[-1]
    scores_TE, selection_TE = SCORES[rule.scores](logits_TE), selection(logits_TE, rule, gate.selection_E, experts=E)
    _, ids_Tk = jax.lax.top_k(scores_TE if selection_TE is None else selection_TE, rule.top_k)
    weights_Tk = jnp.take_along_axis(scores_TE, ids_Tk, axis=-1)
    weights_Tk = over_their_sum(weights_Tk) if rule.normalised else weights_Tk
    weights_Tk = weights_Tk if rule.routed_factor == 1 else weights_Tk * rule.routed_factor
    return Routing(logits_TE, ids_Tk, weights_Tk, selection_TE)


def route_extended(
    x_TD: jax.Array,
    gate: Gate | jax.Array,
    slots: Sequence[NewColumns],
    *,
    extended: Sequence[jax.Array | bool] | None = None,
    shares: Sequence[jax.Array | None] | None = None,
    sources: Sequence[jax.Array | None] | None = None,
    rule: Rule,
    normalise: Callable[..., jax.Array],
    mass: Mass = "base",
) -> Routing:
    """The router of a layer of an extended model (method of the paper, order of the released code).

    Experts are chosen by the uncalibrated scores of all columns, weighted by the calibrated probabilities. With several
    extensions, each calibrator gets what it was trained on: the probabilities as if its extension were the only one.
    Its correction is multiplied by the probability that the other extensions' columns leave. With one extension it is
    the calibrator as trained. Which columns there are depends on the extensions' starts (`starts.STARTS`).

    Args:
      slots: the new columns of every extension in this layer, in the order of their experts' numbers.
      extended: for each, a bool scalar: false if the layer lacks it; its columns then hold arbitrary values.
      shares: for each, the log of its share for every token [T], -inf where a token may not choose it; None: 0 for all.
        A token that may choose none of them gets `route`'s choice and weights. `shares` None: all are open to all.
      sources: for each, the experts [X] that its own were copied from; twins alone need them.
      rule: of the base (`route`). Where its weights do not sum to one, those here sum to what the base's would for the
        token. Otherwise a new column would lower every expert's weight, even for tokens that never choose it.
      normalise: from calibrated probabilities of the chosen to weights, a row of WEIGHT_GUARDS.
      mass: "literal" lets new columns lower them: weights are the calibrated probabilities.
    """
    gate = gate if isinstance(gate, Gate) else Gate(gate)
    base_TE, E = gate.logits(x_TD, rule), gate.columns_DE.shape[-1]
    shares, sources = (some or [None] * len(slots) for some in (shares, sources))
    log_shares_T1 = [_log_share(x_TD, shares[n], extended[n] if extended else True) for n in range(len(slots))]
    seats: list[Competing] = []
    drift_T2: jax.Array | None = None
    columns, first = Columns(base_TE, np.arange(E)), E
    for slot, share_T, share_T1, sources_X in zip(slots, shares, log_shares_T1, sources, strict=True):
        own_TX = _own_logits(x_TD, gate, slot, rule)
        own_TX = own_TX if slot.offset is None else own_TX + slot.offset[...].astype(own_TX.dtype)[None]
        if slot.drift:
            drift_T2 = _drift(slot.drift, columns.logits(), own_TX, share_T1)
        if slot.guidance:
            own_TX = jnp.where(may_choose(columns.logits(), own_TX, tau=slot.guidance), own_TX, -jnp.inf)
        # Without shares nothing is added, since a sum would round.
        own_TX = jnp.where(jnp.isneginf(share_T1), -jnp.inf, own_TX if share_T is None else own_TX + share_T1)
        seats.append(STARTS[slot.start](own_TX, sources_X, first=first, columns=columns))
        columns, first = seats[-1].columns, first + own_TX.shape[-1]
    competing = [slot for slot, seat in zip(slots, seats, strict=True) if seat.competes]
    bias_o = _bias(gate.selection_E, competing)
    logits_To = columns.logits()
    probs_To = probabilities(logits_To, rule.scores)
    selection_To = selection(logits_To, rule, bias_o, experts=E)
    _, picked_Tk = jax.lax.top_k(probs_To if selection_To is None else selection_To, rule.top_k)
    calibrated_To, beside = probs_To, {}
    for slot, seat, share_T1 in zip(slots, seats, log_shares_T1, strict=True):
        own_TO, mass_T1 = probs_To, jnp.exp(jnp.minimum(share_T1, 0.0))
        if len(slots) > 1 or not seat.competes:
            own_TO = probabilities(seat.alone(columns), rule.scores)
            # The probability that the others leave: exactly 1 where they are closed, as without them.
            mass_T1 *= seat.left(probs_To)
        correction_TO = slot.calibrator.correction(own_TO) * mass_T1
        calibrated_To = calibrated_To + seat.spread(correction_TO, columns)
        if seat.stands_beside:
            beside[seat] = _beside(seat, logits_To, picked_Tk, correction_TO, _bias(bias_o, [slot]), rule)
    ids_Tk, weights_Tk = columns.experts(picked_Tk), jnp.take_along_axis(calibrated_To, picked_Tk, axis=-1)
    plain = route(x_TD, gate, rule=rule)
    if rule.normalised or mass == "base":
        summed = rule.normalised and rule.routed_factor == 1
        weights_Tk = normalise(weights_Tk, 1.0 if summed else plain.weights_Tk.sum(axis=-1, keepdims=True))
    else:
        scores_To = SCORES[rule.scores](logits_To)
        total_T1 = 1.0 if rule.scores == "softmax" else scores_To.sum(axis=-1, keepdims=True)
        weights_Tk *= rule.routed_factor * total_T1
    if any(share is not None for share in shares):
        open_T1 = ~jnp.isneginf(jnp.concatenate(log_shares_T1, axis=-1)).all(axis=-1, keepdims=True)
        ids_Tk, weights_Tk = (
            jnp.where(open_T1, extended_Tk, plain_Tk)
            for extended_Tk, plain_Tk in ((ids_Tk, plain.ids_Tk), (weights_Tk, plain.weights_Tk))
        )
    for seat, stands in beside.items():
        ids_Tk = jnp.concatenate([ids_Tk, jnp.where(stands.chosen_TX, seat.numbers_X[None], first)], axis=-1)
        weights_Tk = jnp.concatenate([weights_Tk, stands.weights_TX], axis=-1)

    def of_experts(values_To: jax.Array, beside_TX: Callable[[Competing], jax.Array]) -> jax.Array:
        if all(seat.competes for seat in seats):
            return values_To
        own = (beside_TX(seat) if seat.stands_beside else seat.own(values_To, columns) for seat in seats)
        return jnp.concatenate([columns.held(values_To), *own], axis=-1)

    logits_TO = of_experts(logits_To, lambda seat: seat.own_TX)
    selection_TO = None if selection_To is None else of_experts(selection_To, lambda seat: beside[seat].ranks_TX)
    return Routing(logits_TO, ids_Tk, weights_Tk, selection_TO, drift_T2=drift_T2)


def _drift(coefficient: float, old_To: jax.Array, own_TX: jax.Array, share_T1: jax.Array) -> jax.Array:
    """`Routing.drift_T2` of the extension that trains, which stands behind all others."""
    may_T = ~jnp.isneginf(share_T1)[:, 0]
    loss_T = coefficient * (exclusivity(old_To, own_TX) + specialisation(old_To, own_TX))
    return jnp.stack([jnp.where(may_T, loss_T, 0), may_T.astype(loss_T.dtype)], axis=-1)


class Beside(NamedTuple):
    """For experts of start "added": whether a token uses one besides its k picks, its weight, its selection score."""

    chosen_TX: jax.Array
    weights_TX: jax.Array
    ranks_TX: jax.Array


def _beside(
    seat: Competing, logits_To: jax.Array, picked_Tk: jax.Array, correction_TO: jax.Array, bias_O: jax.Array | None,
    rule: Rule,
) -> Beside:  # fmt: skip
    """Experts whose score reaches that of the k-th pick, weighted by their probability among these and the competing
    columns."""
    logits_TO, width = jnp.concatenate([logits_To, seat.own_TX], axis=-1), logits_To.shape[-1]
    ranks_TO = selection(logits_TO, rule, bias_O, experts=seat.experts)
    ranks_TO = logits_TO if ranks_TO is None else ranks_TO
    least_T1 = jnp.take_along_axis(ranks_TO, picked_Tk[:, -1:], axis=-1) - TIE
    chosen_TX = ranks_TO[:, width:] >= least_T1
    weights_TX = probabilities(logits_TO, rule.scores)[:, width:] + correction_TO[:, seat.experts :]
    weights_TX = jnp.where(chosen_TX, weights_TX * rule.routed_factor, 0.0)
    return Beside(chosen_TX, weights_TX, ranks_TO[:, width:])


def _bias(bias_o: jax.Array | None, slots: Sequence[NewColumns]) -> jax.Array | None:
    """The selection bias, with that of the columns of these slots appended."""
    own = [slot.new_bias[...] for slot in slots if slot.new_bias is not None]
    return None if bias_o is None else jnp.concatenate([bias_o, *own])


def _log_share(x_TD: jax.Array, share_T: jax.Array | None, extended: jax.Array | bool) -> jax.Array:
    share_T = jnp.zeros(len(x_TD)) if share_T is None else share_T
    return jnp.where(extended, share_T, -jnp.inf)[:, None]


def _own_logits(x_TD: jax.Array, gate: Gate, slot: NewColumns, rule: Rule) -> jax.Array:
    """Logits of the new columns, [T, X]. They are computed in one matrix product with the base's columns, so that an
    exact copy gets its source's logit; in a product of its own, rounding would decide between the two, differently on
    each mesh. `TIE` covers what the base's own product rounds otherwise."""
    cast = gate._replace(columns_DE=gate.columns_DE.astype(rule.dtype(x_TD)))  # and_columns leaves the update out
    return cast.and_columns(slot).logits(x_TD, rule)[:, gate.columns_DE.shape[-1] :]


def over_their_sum(weights_Tk: jax.Array, to_T1: jax.Array | float = 1.0) -> jax.Array:
    """Weights that sum to `to_T1`."""
    return weights_Tk / (weights_Tk.sum(axis=-1, keepdims=True) / to_T1)


LARGEST_WEIGHT = 4.0
"""The bound of `bounded`. Calibrators that train well were seen to give weights of -0.56 to 1.56."""


def bounded(weights_Tk: jax.Array, to_T1: jax.Array | float = 1.0) -> jax.Array:
    """`over_their_sum`, bit for bit, unless the weights nearly cancel. Then the divisor is larger, so that none exceeds
    `LARGEST_WEIGHT`.

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
