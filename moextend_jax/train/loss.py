"""Losses: cross-entropy over labelled positions, and the load-balancing loss in the paper's and the released form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from moextend_jax.config import IGNORE, ModelConfig, Recipe
from moextend_jax.models.decoder import Decoded, logits
from moextend_jax.models.moextend import shares, targets
from moextend_jax.models.router import Routing, probabilities
from moextend_jax.models.weights import used
from moextend_jax.sharding import Shards, map_shards, platform, shards

COLUMNS = 512
"""Columns of the head whose logits are in cache at once on CPU."""


class Losses(NamedTuple):
    """total = ce + aux_coefficient * aux, plus the losses of LoRA experts' balance and of drift. ce: nats per labelled
    token. tokens: the number of labelled tokens. picks_ZO: how many tokens chose each expert, by layer."""

    total: jax.Array
    ce: jax.Array
    aux: jax.Array
    tokens: jax.Array
    picks_ZO: jax.Array


class Load(NamedTuple):
    """By layer and expert, over the tokens that may choose the expert: picks_ZO = the share that did, probs_ZO = its
    mean probability, counts_ZO = how many tokens these are; 0 where the layer lacks the expert."""

    picks_ZO: jax.Array
    probs_ZO: jax.Array
    counts_ZO: jax.Array


def cross_entropy(
    hidden_BLD: jax.Array, head_DV: jax.Array, labels_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of next-token losses over labelled positions (nats), and the number of these positions.

    On every device of a mesh labelled positions are brought to the front, then `chunk` of them at a time go through
    the head, and a chunk's gradient is computed from the same logits. So the logits [B, L, V] never exist, and the head
    is not multiplied with positions that have no label.
    """
    targets_BL = targets(labels_BL)

    tokens = shards("BLd", hidden_BLD.shape)
    head = shards("DV", head_DV.shape)

    def local(hidden_BLD, targets_BL, head_DV):
        hidden_TD, targets_T = hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), targets_BL.reshape(-1)
        order_T = jnp.argsort(targets_T == IGNORE, stable=True)
        rest = -len(order_T) % chunk
        targets_T = jnp.pad(targets_T[order_T], (0, rest), constant_values=IGNORE)
        hidden_TD = jnp.pad(hidden_TD[order_T], ((0, rest), (0, 0)))
        nats = _sum_of_nats(chunk, hidden_TD, used("head", head_DV, head, dtype=hidden_TD.dtype), targets_T)
        return cast(jax.Array, nats)[None]

    ins = (tokens, Shards("BL", tokens.split[:2]), head)
    with jax.named_scope("cross_entropy"):
        by_device = map_shards(local, ins, Shards("T", (tokens.over("BL"),)))(hidden_BLD, targets_BL, head_DV)
        total = by_device.sum()
    return total, labelled_tokens(labels_BL)


def labelled_tokens(labels_BL: jax.Array) -> jax.Array:
    """How many labels are predicted: all but one on a row's first position, which nothing comes before."""
    return (labels_BL[:, 1:] != IGNORE).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_nats(chunk, hidden_TD, head_DV, targets_T):
    def one_chunk(i, total):
        hidden_cD, targets_c = _piece(i, chunk, hidden_TD, targets_T)
        if platform() == "cpu":
            return total + _nats_without_logits(hidden_cD, head_DV, targets_c, gradient=False)[0]
        return total + _nats(logits(hidden_cD, head_DV), targets_c)[0]

    return jax.lax.fori_loop(0, _chunks(targets_T, chunk), one_chunk, jnp.float32(0))


def _nats(logits_cV, targets_c):
    """The sum of the losses of a chunk of c positions, and its gradient with respect to their logits `[c, V]`."""
    is_target_cV = jnp.arange(logits_cV.shape[-1])[None, :] == targets_c[..., None]
    picked_c = jnp.where(is_target_cV, logits_cV, 0).sum(axis=-1)
    norm_c = jax.nn.logsumexp(logits_cV, axis=-1)
    labelled_c = targets_c != IGNORE
    d_logits_cV = jnp.where(labelled_c[..., None], jnp.exp(logits_cV - norm_c[..., None]) - is_target_cV, 0)
    return jnp.where(labelled_c, norm_c - picked_c, 0).sum(), d_logits_cV


def _nats_without_logits(hidden_cD, head_DV, targets_c, *, gradient: bool) -> tuple[jax.Array, Any]:
    """The sum of the losses of a chunk, and with `gradient` its gradient to hidden_cD for a frozen head (else None).

    A position's gradient is the mean of the head's columns under its softmax, minus its target's column. So one pass
    over blocks of columns gives both, with FlashAttention's arithmetic for the softmax (Dao et al. 2022): one exp per
    logit, and logits are not written to memory.
    """
    (D, V), c = head_DV.shape, len(targets_c)
    columns = min(COLUMNS, V)

    def add(head_Dv, sums):
        top_c1, norm_c1, mean_cD = sums
        logits_cv = logits(hidden_cD, head_Dv)
        new_top_c1 = jnp.maximum(top_c1, logits_cv.max(axis=-1, keepdims=True))
        weights_cv, shrink_c1 = jnp.exp(logits_cv - new_top_c1), jnp.exp(top_c1 - new_top_c1)
        norm_c1 = norm_c1 * shrink_c1 + weights_cv.sum(axis=-1, keepdims=True)
        if mean_cD is not None:
            weights_cv = weights_cv.astype(head_DV.dtype)
            added_cD = jnp.einsum("cv,Dv->cD", weights_cv, head_Dv, preferred_element_type=jnp.float32)
            mean_cD = mean_cD * shrink_c1 + added_cD
        return new_top_c1, norm_c1, mean_cD

    def one_block(j, sums):
        return add(jax.lax.dynamic_slice_in_dim(head_DV, j * columns, columns, axis=1), sums)

    rest = V % columns
    sums = (jnp.full((c, 1), -jnp.inf), jnp.zeros((c, 1)), jnp.zeros((c, D)) if gradient else None)
    sums = jax.lax.fori_loop(0, V // columns, one_block, sums)
    top_c1, norm_c1, mean_cD = add(head_DV[:, -rest:], sums) if rest else sums
    target_cD = jnp.take(head_DV, jnp.maximum(targets_c, 0), axis=1).T.astype(jnp.float32)
    target_c1 = (hidden_cD * target_cD).sum(axis=-1, keepdims=True)
    labelled_c1 = (targets_c != IGNORE)[:, None]
    nats = jnp.where(labelled_c1, top_c1 + jnp.log(norm_c1) - target_c1, 0).sum()
    if mean_cD is None:
        return nats, None
    return nats, jnp.where(labelled_c1, mean_cD / norm_c1 - target_cD, 0).astype(hidden_cD.dtype)


def _sum_of_nats_fwd(chunk, hidden, head, targets):
    """Computes gradients together with the loss, so that the backward pass need not compute logits again."""
    hidden_TD, head_DV, targets_T = hidden.value, head.value, targets.value

    def one_chunk(i, carry):
        total, d_hidden_TD, d_head_DV = carry
        hidden_cD, targets_c = _piece(i, chunk, hidden_TD, targets_T)
        if d_head_DV is None and platform() == "cpu":
            nats, d_hidden_cD = _nats_without_logits(hidden_cD, head_DV, targets_c, gradient=True)
        else:
            nats, d_logits_cV = _nats(logits(hidden_cD, head_DV), targets_c)
            d_logits_cV = d_logits_cV.astype(hidden_cD.dtype)
            d_hidden_cD = jnp.einsum("cV,DV->cD", d_logits_cV, head_DV)
            if d_head_DV is not None:
                d_head_DV += jnp.einsum("cD,cV->DV", hidden_cD, d_logits_cV, preferred_element_type=jnp.float32)
        d_hidden_TD = jax.lax.dynamic_update_slice_in_dim(d_hidden_TD, d_hidden_cD, i * chunk, axis=0)
        return total + nats, d_hidden_TD, d_head_DV

    # A frozen head has no gradient.
    d_head_DV = jnp.zeros(head_DV.shape, jnp.float32) if head.perturbed else None
    start = (jnp.float32(0), jnp.zeros_like(hidden_TD), d_head_DV)
    total, *gradients = jax.lax.fori_loop(0, _chunks(targets_T, chunk), one_chunk, start)
    return total, (gradients, jnp.zeros(0, head_DV.dtype))


def _sum_of_nats_bwd(chunk, saved, d_total):
    # One factor, because a chunk's gradient is that of a sum.
    (d_hidden_TD, d_head_DV), like = saved
    d_hidden_TD = (d_hidden_TD * d_total).astype(d_hidden_TD.dtype)
    return d_hidden_TD, None if d_head_DV is None else (d_head_DV * d_total).astype(like.dtype), None


_sum_of_nats.defvjp(_sum_of_nats_fwd, _sum_of_nats_bwd, symbolic_zeros=True)


def _chunks(targets_T: jax.Array, chunk: int) -> jax.Array:
    return -(-(targets_T != IGNORE).sum() // chunk)


def _piece(i: jax.Array, chunk: int, *arrays: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(array, i * chunk, chunk) for array in arrays]


def load(routing: Routing, valid_T: jax.Array, *, scores: str = "softmax") -> Load:
    """Load of every expert over the valid tokens that may choose it (logit not -inf). Arrays of `routing` are stacked
    over layers (Z). scores: a row of `router.SCORES`. valid_T: one mask for all layers, or `[Z, T]`."""
    outputs, valid_ZT1 = routing.logits_TO.shape[-1], jnp.atleast_2d(valid_T)[..., None]
    may_ZTO = ~jnp.isneginf(routing.logits_TO) & valid_ZT1
    counts_ZO = may_ZTO.sum(axis=1)
    least_ZO = jnp.maximum(counts_ZO, 1).astype(jnp.float32)
    valid_ZT1 = valid_ZT1.astype(jnp.float32)
    probs_ZTO = probabilities(routing.logits_TO, scores)
    picks_ZTO = jax.nn.one_hot(routing.ids_Tk, outputs).sum(axis=-2)
    picks_ZO, probs_ZO = ((of_ZTO * valid_ZT1).sum(axis=1) / least_ZO for of_ZTO in (picks_ZTO, probs_ZTO))
    return Load(picks_ZO, probs_ZO, counts_ZO)


def aux_per_layer(load: Load, *, config: ModelConfig) -> jax.Array:
    """Mean over layers of (the layer's own number of experts) * sum_i picks_i probs_i: the paper's form. An extension
    that no token of the batch may choose does not count."""
    experts_Z = (load.counts_ZO > 0).sum(axis=-1).astype(jnp.float32)
    return (experts_Z * (load.picks_ZO * load.probs_ZO).sum(axis=-1)).mean()


def aux_released(load: Load, *, config: ModelConfig) -> jax.Array:
    """The released code's form: tokens of all layers are pooled (Hugging Face). In an extended model it is the sum over
    all layers, plain ones too, times (E+X) / (number of layers). Shares are of all tokens, also of those that may not
    choose the expert."""
    tokens_Z1 = jnp.maximum(load.counts_ZO.max(axis=-1, keepdims=True), 1)
    product_ZO = load.picks_ZO * load.probs_ZO * (load.counts_ZO / tokens_Z1) ** 2
    if config.extensions:
        return product_ZO.sum() * config.outputs / len(config.decoder.routed)
    return (load.picks_ZO.mean(axis=0) * load.probs_ZO.mean(axis=0)).sum() * config.decoder.experts


def balance_per_layer(probs_ZTI: jax.Array, valid_BL: jax.Array) -> jax.Array:
    """Balance of LoRA experts: the mean over layers of sum_i (share of tokens whose likeliest is i) * (mean probability
    of i). It has no factor I, so it is 1/I when balanced."""
    return _of_lora_experts(probs_ZTI, valid_BL.reshape(1, -1)).mean()


def balance_released(probs_ZTI: jax.Array, valid_BL: jax.Array) -> jax.Array:
    """The same sum for each row of the batch, with tokens of all layers pooled; mean over rows (LLaVA-MoLE's code)."""
    probs_BTI = jnp.moveaxis(probs_ZTI.reshape(len(probs_ZTI), *valid_BL.shape, -1), 0, 1)
    probs_BTI = probs_BTI.reshape(len(valid_BL), -1, probs_ZTI.shape[-1])
    return _of_lora_experts(probs_BTI, jnp.tile(valid_BL, (1, len(probs_ZTI)))).mean()


def _of_lora_experts(probs_nTI: jax.Array, valid_nT: jax.Array) -> jax.Array:
    """That sum over valid tokens, `[n]`."""
    valid_nT1 = jnp.broadcast_to(valid_nT, probs_nTI.shape[:2]).astype(jnp.float32)[..., None]
    counts_n1 = jnp.maximum(valid_nT1.sum(axis=1), 1)
    picks_nTI = jax.nn.one_hot(jnp.argmax(probs_nTI, axis=-1), probs_nTI.shape[-1])
    picks_nI, means_nI = ((of * valid_nT1).sum(axis=1) / counts_n1 for of in (picks_nTI, probs_nTI))
    return (picks_nI * means_nI).sum(axis=-1)


def drift_per_layer(drift_ZT2: jax.Array, valid_T: jax.Array) -> jax.Array:
    """The mean over tokens that may choose the trained extension, then over its layers (`Routing.drift_T2`)."""
    sums_Z2 = (drift_ZT2 * valid_T.astype(jnp.float32)[None, :, None]).sum(axis=1)
    means_Z = sums_Z2[:, 0] / jnp.maximum(sums_Z2[:, 1], 1)
    return means_Z.sum() / jnp.maximum((sums_Z2[:, 1] > 0).sum(), 1)


BALANCE: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "per_layer": balance_per_layer, "released": balance_released,
}  # fmt: skip
"""TABLE `Recipe.aux_loss` -> load balancing of LoRA experts."""

AUX: dict[str, Callable[..., jax.Array]] = {"per_layer": aux_per_layer, "released": aux_released}


def _open(valid: jax.Array, share_BL: jax.Array | None) -> jax.Array:
    """The valid tokens, `[B, L]` or `[T]`, that may use an adapter or a block."""
    return valid if share_BL is None else valid & ~jnp.isneginf(share_BL).reshape(valid.shape)


def _of_all(parts: Sequence[Routing]) -> Routing:
    """Routing of layers, then of blocks. With experts of start "added", layers have more picks for each token, so picks
    of blocks are filled up with no expert (id O) and weight 0."""
    most, nobody = max(part.ids_Tk.shape[-1] for part in parts), parts[0].logits_TO.shape[-1]

    def filled(part: Routing) -> Routing:
        more = [(0, 0)] * (part.ids_Tk.ndim - 1) + [(0, most - part.ids_Tk.shape[-1])]
        return part._replace(
            ids_Tk=jnp.pad(part.ids_Tk, more, constant_values=nobody), weights_Tk=jnp.pad(part.weights_Tk, more),
            lora_TI={}, drift_T2=None,
        )  # fmt: skip

    return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *map(filled, parts))


def losses(
    model, batch, *, recipe: Recipe, aux_coefficient: float, chunk: int, tokens: jax.Array | None = None
) -> tuple[Losses, Routing]:
    """All losses of a `MoExtend` model on a `Batch`, and the routing they came from.

    Args:
      chunk: labelled positions whose logits exist at a time.
      tokens: divisor of the summed cross-entropy, may be below 1; None: the number of labelled tokens, at least 1.
    """
    decoded = model(batch, skip_padding=True)
    options = {"recipe": recipe, "aux_coefficient": aux_coefficient, "chunk": chunk, "tokens": tokens}
    return losses_of(decoded, model, batch, **options), decoded.routing


def losses_of(
    decoded: Decoded, model, batch, *, recipe: Recipe, aux_coefficient: float, chunk: int,
    tokens: jax.Array | None = None,
) -> Losses:  # fmt: skip
    """As `losses`, where `decoded` is what the model returned for the batch."""
    total_ce, labelled = cross_entropy(
        model.decoder.to_head(decoded.hidden_BLD), model.decoder.head_DV, batch.labels_BL, chunk=chunk
    )
    ce = total_ce / (jnp.maximum(labelled, 1) if tokens is None else tokens)
    valid_T = batch.segments_BL.reshape(-1) > 0
    by_layer = load(decoded.routing, valid_T, scores=model.config.decoder.scores)
    counted, balanced, valid = by_layer, decoded.routing, valid_T
    share_of = shares(batch, model.config) if decoded.routing.lora_TI or decoded.of_blocks is not None else {}
    if decoded.of_blocks is not None:
        balanced = _of_all((decoded.routing, decoded.of_blocks))
        sets = [(of.count, share_of[name]) for name, of in model.config.blocks.items() if name in share_of]
        rows = [(len(decoded.routing.ids_Tk), valid_T), *((count, _open(valid_T, share)) for count, share in sets)]
        valid = jnp.concatenate([jnp.broadcast_to(open_T, (count, *open_T.shape)) for count, open_T in rows])
    if recipe.aux_loss == "released" and balanced.selection_TO is not None:
        # As if experts were chosen by their logits; transformers balances this even where they are not.
        by_logits_Tk = jax.lax.top_k(balanced.logits_TO, model.config.decoder.top_k)[1]
        balanced = balanced._replace(ids_Tk=by_logits_Tk)
    if balanced is not decoded.routing:
        counted = load(balanced, valid, scores=model.config.decoder.scores)
    aux = AUX[recipe.aux_loss](counted, config=model.config)
    total = ce + aux_coefficient * aux
    for name, probs_ZTI in decoded.routing.lora_TI.items():
        balance = BALANCE[recipe.aux_loss](probs_ZTI, _open(batch.segments_BL > 0, share_of[name]))
        total += model.config.adapters[name].balance * balance
    if decoded.routing.drift_T2 is not None:
        total += drift_per_layer(decoded.routing.drift_T2, valid_T)
    return Losses(total, ce, aux, labelled, by_layer.picks_ZO * by_layer.counts_ZO)
