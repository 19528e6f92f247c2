"""Losses: cross-entropy over labelled positions, and the load-balancing loss in the paper's and the released form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from moextend_jax.config import IGNORE, ModelConfig, Recipe
from moextend_jax.models.router import Routing


class Losses(NamedTuple):
    """Scalars: total = ce + coefficient * aux; ce in nats per labelled token; tokens = labelled tokens."""

    total: jax.Array
    ce: jax.Array
    aux: jax.Array
    tokens: jax.Array


class Load(NamedTuple):
    """Per layer: picks_ZO = share of tokens that chose the expert (sums to k), probs_ZO = mean probability."""

    picks_ZO: jax.Array
    probs_ZO: jax.Array


def cross_entropy(
    logits_of: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array, labels_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of next-token losses over labelled positions, and their number.

    Every row's labelled positions are brought to its front, then `chunk` positions per row at a time go through the
    head; chunks without a label are skipped, and a chunk's gradient is taken while its logits are there, so that no
    [B, L, V] and no product of the head over unlabelled positions ever exists.
    """
    B, L = labels_BL.shape
    targets_BL = jnp.concatenate([labels_BL[:, 1:], jnp.full((B, 1), IGNORE, labels_BL.dtype)], axis=1)
    order_BL = jnp.argsort(targets_BL == IGNORE, axis=1, stable=True)
    targets_BL = jnp.take_along_axis(targets_BL, order_BL, axis=1)
    hidden_BLD = jnp.take_along_axis(hidden_BLD, order_BL[..., None], axis=1)
    rest = -L % chunk
    targets_nBc = _chunks(jnp.pad(targets_BL, ((0, 0), (0, rest)), constant_values=IGNORE), chunk)
    hidden_nBcD = _chunks(jnp.pad(hidden_BLD, ((0, 0), (0, rest), (0, 0))), chunk)

    logits_of, constants = jax.closure_convert(logits_of, hidden_nBcD[0])
    with jax.named_scope("cross_entropy"):
        total = cast(jax.Array, _sum_of_nats(logits_of, hidden_nBcD, targets_nBc, constants))
    return total, (targets_BL != IGNORE).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_nats(logits_of, hidden_nBcD, targets_nBc, constants):
    def one_chunk(hidden_BcD, targets_Bc):
        return _nats(logits_of(hidden_BcD, *constants), targets_Bc)[0]

    def body(total, piece):
        labelled = (piece[1] != IGNORE).any()
        return total + jax.lax.cond(labelled, one_chunk, lambda *_: jnp.float32(0), *piece), None

    return jax.lax.scan(body, jnp.float32(0), (hidden_nBcD, targets_nBc))[0]


def _nats(logits_BcV, targets_Bc):
    """The sum of the losses of a chunk, and its gradient with respect to the logits."""
    is_target_BcV = jnp.arange(logits_BcV.shape[-1])[None, None, :] == targets_Bc[..., None]
    picked_Bc = jnp.where(is_target_BcV, logits_BcV, 0).sum(axis=-1)
    norm_Bc = jax.nn.logsumexp(logits_BcV, axis=-1)
    labelled_Bc = targets_Bc != IGNORE
    d_logits_BcV = jnp.where(labelled_Bc[..., None], jnp.exp(logits_BcV - norm_Bc[..., None]) - is_target_BcV, 0)
    return jnp.where(labelled_Bc, norm_Bc - picked_Bc, 0).sum(), d_logits_BcV


def _sum_of_nats_fwd(logits_of, hidden, targets, constants):
    """The gradient comes with the loss: the backward pass then computes no logits a second time, and has no scatter."""
    hidden_nBcD, targets_nBc = hidden.value, targets.value
    values, trained = [c.value for c in constants], [c.perturbed for c in constants]  # a frozen head has no gradient
    wanted = [value for value, is_trained in zip(values, trained, strict=True) if is_trained]

    def one_chunk(hidden_BcD, targets_Bc):
        logits_BcV, pull = jax.vjp(logits_of, hidden_BcD, *values)
        nats, d_logits_BcV = _nats(logits_BcV, targets_Bc)
        d_hidden_BcD, *d_values = pull(d_logits_BcV)
        return nats, d_hidden_BcD, [d for d, is_trained in zip(d_values, trained, strict=True) if is_trained]

    def nothing(hidden_BcD, _):
        return jnp.float32(0), jnp.zeros_like(hidden_BcD), jax.tree.map(jnp.zeros_like, wanted)

    def body(carry, piece):
        total, d_wanted = carry
        nats, d_hidden_BcD, more = jax.lax.cond((piece[1] != IGNORE).any(), one_chunk, nothing, *piece)
        return (total + nats, jax.tree.map(jnp.add, d_wanted, more)), d_hidden_BcD

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, wanted))
    (total, d_wanted), d_hidden_nBcD = jax.lax.scan(body, start, (hidden_nBcD, targets_nBc))
    d_wanted = iter(d_wanted)
    return total, (d_hidden_nBcD, [next(d_wanted) if is_trained else None for is_trained in trained])


def _sum_of_nats_bwd(logits_of, saved, d_total):
    # One factor, because a chunk's gradient is that of a sum.
    d_hidden_nBcD, d_constants = jax.tree.map(lambda d: (d * d_total).astype(d.dtype), saved)
    return d_hidden_nBcD, None, d_constants


_sum_of_nats.defvjp(_sum_of_nats_fwd, _sum_of_nats_bwd, symbolic_zeros=True)


def _chunks(x_BL: jax.Array, chunk: int) -> jax.Array:
    B, L, *rest = x_BL.shape
    return jnp.moveaxis(x_BL.reshape(B, L // chunk, chunk, *rest), 1, 0)


def load(routing: Routing, valid_T: jax.Array) -> Load:
    """Load of every expert over the valid tokens; `routing` stacked over Z."""
    outputs = routing.logits_TO.shape[-1]
    count = jnp.maximum(valid_T.sum(), 1).astype(jnp.float32)
    valid_1T1 = valid_T.astype(jnp.float32)[None, :, None]
    probs_ZTO = jax.nn.softmax(routing.logits_TO, axis=-1)
    picks_ZTO = jax.nn.one_hot(routing.ids_Tk, outputs).sum(axis=-2)
    return Load((picks_ZTO * valid_1T1).sum(axis=1) / count, (probs_ZTO * valid_1T1).sum(axis=1) / count)


def aux_per_layer(load: Load, *, config: ModelConfig) -> jax.Array:
    """Mean over layers of (the layer's own number of experts) * sum_i picks_i probs_i: the paper's form."""
    experts_Z = jnp.full(config.decoder.layers, config.decoder.experts, jnp.float32)
    if config.extension:
        experts_Z = experts_Z.at[jnp.array(config.extension.layers)].add(config.extension.new_experts)
    return (experts_Z * (load.picks_ZO * load.probs_ZO).sum(axis=-1)).mean()


def aux_released(load: Load, *, config: ModelConfig) -> jax.Array:
    """The released code's form: tokens of all layers pooled (Hugging Face), or, in an extended model, the sum over
    layers times E+X over the number of layers, plain layers included."""
    if config.extension:
        experts = config.decoder.experts + config.extension.new_experts
        return (load.picks_ZO * load.probs_ZO).sum() * experts / config.decoder.layers
    return (load.picks_ZO.mean(axis=0) * load.probs_ZO.mean(axis=0)).sum() * config.decoder.experts


AUX: dict[str, Callable[..., jax.Array]] = {"per_layer": aux_per_layer, "released": aux_released}


def losses(model, batch, *, recipe: Recipe, aux_coefficient: float, chunk: int) -> tuple[Losses, Routing]:
    """All losses of a `MoExtend` model on a `Batch`, and the routing they came from."""
    decoded = model(batch)
    total_ce, tokens = cross_entropy(model.decoder.logits, decoded.hidden_BLD, batch.labels_BL, chunk=chunk)
    ce = total_ce / jnp.maximum(tokens, 1)
    valid_T = batch.segments_BL.reshape(-1) > 0
    aux = AUX[recipe.aux_loss](load(decoded.routing, valid_T), config=model.config)
    return Losses(ce + aux_coefficient * aux, ce, aux, tokens), decoded.routing
