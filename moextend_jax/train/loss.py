"""Losses: cross-entropy over labelled positions, and the load-balancing loss in the paper's and the released form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
    head; chunks without a label are skipped, and logits are recomputed in the backward pass, so that neither
    [B, L, V] nor the head's product over unlabelled positions ever exists.
    """
    B, L = labels_BL.shape
    targets_BL = jnp.concatenate([labels_BL[:, 1:], jnp.full((B, 1), IGNORE, labels_BL.dtype)], axis=1)
    order_BL = jnp.argsort(targets_BL == IGNORE, axis=1, stable=True)
    targets_BL = jnp.take_along_axis(targets_BL, order_BL, axis=1)
    hidden_BLD = jnp.take_along_axis(hidden_BLD, order_BL[..., None], axis=1)
    rest = -L % chunk
    targets_nBc = _chunks(jnp.pad(targets_BL, ((0, 0), (0, rest)), constant_values=IGNORE), chunk)
    hidden_nBcD = _chunks(jnp.pad(hidden_BLD, ((0, 0), (0, rest), (0, 0))), chunk)

    @jax.checkpoint
    def one_chunk(hidden_BcD, targets_Bc):
        logits_BcV = logits_of(hidden_BcD)
        picked_Bc = jnp.take_along_axis(logits_BcV, jnp.maximum(targets_Bc, 0)[..., None], axis=-1)[..., 0]
        nats_Bc = jax.nn.logsumexp(logits_BcV, axis=-1) - picked_Bc
        return jnp.where(targets_Bc == IGNORE, 0.0, nats_Bc).sum()

    def body(total, piece):
        hidden_BcD, targets_Bc = piece
        labelled = (targets_Bc != IGNORE).any()
        return total + jax.lax.cond(labelled, one_chunk, lambda *_: jnp.float32(0), hidden_BcD, targets_Bc), None

    with jax.named_scope("cross_entropy"):
        total, _ = jax.lax.scan(body, jnp.float32(0), (hidden_nBcD, targets_nBc))
    return total, (targets_BL != IGNORE).sum()


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
