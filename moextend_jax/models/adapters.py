"""Low-rank updates beside frozen maps: leaves of `AdapterConfig` in, what they add to a layer out.

    y = x W + ((x A) * m) B        A [in, r]   B [r, out]   m [T, r] or [T, 1], alpha/rank and the token's share in it

LoRA (arXiv 2106.09685) has m alike everywhere; LLaVA-MoLE (arXiv 2401.16160) has I of them side by side, I * rank = r,
and a router whose weights for the I are m (TABLE GATINGS); in MoRAM (arXiv 2506.21035) m follows from x A itself.
Attention's part is applied where attention computes (attention.py), that of the experts where these do (experts.py, on
CPU blocked_swiglu.py), so this file says what and not where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import AdapterConfig, DecoderConfig, Gating
from moextend_jax.parameters import constant, uniform

ATTENTION = {"query": ("D", "NH"), "key": ("D", "KH"), "value": ("D", "KH"), "out": ("NH", "D")}
EXPERTS = {"gate": ("D", "F"), "up": ("D", "F"), "down": ("F", "D")}
"""TABLE of a block's seven linear maps -> the axes that go in and come out."""


class Pair(nnx.Module):
    """A and B of one map, stacked over the layers that route. B starts at zero, so nothing changes at the start; A as
    torch's linear layers do, uniform within 1/sqrt(inputs)."""

    def __init__(
        self, inputs: str, outputs: str, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str, stack: str = "Z"
    ):
        bound = 1 / math.sqrt(math.prod(sizes[letter] for letter in inputs))
        self.a = uniform(stack + inputs + "r", sizes, rngs=rngs, dtype=dtype, bound=bound)
        self.b = constant(stack + "r" + outputs, sizes, dtype=dtype, value=0.0)

    def cast(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return self.a[...].astype(dtype), self.b[...].astype(dtype)


class LoraRouter(nnx.Module):
    """The router over LoRA experts, `x_TD -> u_TI`; starts as torch's linear layers do."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str):
        bound = 1 / math.sqrt(sizes["D"])
        self.weight = uniform("ZDI", sizes, rngs=rngs, dtype=dtype, bound=bound)
        self.bias = uniform("ZI", sizes, rngs=rngs, dtype=dtype, bound=bound)

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """float32 probabilities."""
        weight_DI = self.weight[...].astype(x_TD.dtype)
        logits_TI = jnp.einsum("TD,DI->TI", x_TD, weight_DI, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits_TI + self.bias[...].astype(jnp.float32)[None], axis=-1)


class BlockAdapter(nnx.Module):
    """What an adapter has for the feed-forward block: pairs of the experts, of the router, and the router over
    LoRA experts."""

    def __init__(self, decoder: DecoderConfig, config: AdapterConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes, options = config.sizes(decoder), {"rngs": rngs, "dtype": dtype}
        stack = "ZE" if config.experts == "per_expert" else "Z"
        for name, (inputs, outputs) in EXPERTS.items():
            setattr(self, name, Pair(inputs, outputs, sizes, stack=stack, **options) if config.of_experts else None)
        self.router = Pair("D", "E", {**sizes, "r": config.rank}, **options) if config.router else None
        self.choice = LoraRouter(sizes, **options) if config.method == "mole" else None


class Adapter(nnx.Module):
    """Everything that one adapter adds."""

    def __init__(self, decoder: DecoderConfig, config: AdapterConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = {**config.sizes(decoder), "r": config.rank}  # attention has one LoRA in every method
        pairs = {name: Pair(*axes, sizes, rngs=rngs, dtype=dtype) for name, axes in ATTENTION.items()}
        self.attention = nnx.Dict(pairs if config.attention else {})
        self.block = BlockAdapter(decoder, config, rngs=rngs, dtype=dtype)


class Adapted(NamedTuple):
    """An adapter in one layer: its name, its config, its leaves there, and the log of each token's share of it `[B, L]`
    (None: share 1)."""

    name: str
    config: AdapterConfig
    module: Adapter
    share_BL: jax.Array | None

    def scale_BL1(self, x_BLD: jax.Array) -> jax.Array:
        """alpha/rank times the share; exactly 0 where the share is 0."""
        ones_BL = jnp.ones(x_BLD.shape[:2]) if self.share_BL is None else jnp.exp(self.share_BL)
        return (self.config.scale * ones_BL).astype(x_BLD.dtype)[..., None]


def self_activated(
    z_BLr: jax.Array, open_BLr: jax.Array, *, top_k: int, tau: float, threshold: float | None
) -> jax.Array:
    """MoRAM's weights of atoms (a column of A and its row of B): a softmax over each token's k largest scores.

        s = z / |z|        m = softmax of s / tau over the k largest, times (s >= threshold) if there is one

    Args:
      open_BLr: atoms that the token may use; the others are as if they were not there.
      threshold: for inference, not for training; the remaining weights are not normalised again.
    """
    z32_BLr = jnp.where(open_BLr, z_BLr, 0).astype(jnp.float32)
    squares_BL1 = (z32_BLr**2).sum(axis=-1, keepdims=True)
    scores_BLr = z32_BLr * jax.lax.rsqrt(jnp.maximum(squares_BL1, 1e-24))
    ranked_BLr = jnp.where(open_BLr, scores_BLr, -jnp.inf)
    least_BL1 = jax.lax.top_k(ranked_BLr, min(top_k, z_BLr.shape[-1]))[0][..., -1:]
    # Where no atom is open, all would be -inf, whose softmax is NaN.
    kept_BLr = jnp.where(open_BLr & (ranked_BLr >= jax.lax.stop_gradient(least_BL1)), scores_BLr / tau, -1e30)
    weights_BLr = jnp.where(open_BLr, jax.nn.softmax(kept_BLr, axis=-1), 0)
    if threshold is not None:
        weights_BLr = jnp.where(scores_BLr >= threshold, weights_BLr, 0)
    return weights_BLr.astype(z_BLr.dtype)


class AttentionUpdate(NamedTuple):
    """What is added to attention's maps: A and B by path ("query/a"), the scale of each token, `[B, L, r]` or
    `[B, L, 1]`, and `weigh(x A, scale)`, which gives what is multiplied with B."""

    leaves: dict[str, jax.Array]
    scale_BLr: jax.Array
    weigh: Callable[[jax.Array, jax.Array], jax.Array]


def on_attention(
    configs: Sequence[AdapterConfig], leaves: Sequence[dict[str, jax.Array]], scales: Sequence[jax.Array]
) -> list[AttentionUpdate]:
    """Adapters as attention computes them. Atoms of all MoRAM adapters are joined, since they compete."""
    those, atoms = [], []
    for config, own, scale_BL1 in zip(configs, leaves, scales, strict=True):
        if config.method == "moram":
            atoms.append((config, own, jnp.repeat(scale_BL1, config.rank, axis=-1)))
        elif own:
            those.append(AttentionUpdate(own, scale_BL1, jnp.multiply))
    if atoms:
        (*_, newest), parts, wide = zip(*atoms, strict=True)
        joined = {
            path: jnp.concatenate([own[path] for own in parts], -1 if path[-1] == "a" else 0) for path in parts[0]
        }
        training = any(config.trains for config, *_ in atoms)

        def weigh(z_BLr: jax.Array, scale_BLr: jax.Array) -> jax.Array:
            return z_BLr * scale_BLr * self_activated(
                z_BLr, scale_BLr != 0, top_k=newest.top_k, tau=newest.tau,
                threshold=None if training else newest.threshold,
            )  # fmt: skip

        those.append(AttentionUpdate(joined, jnp.concatenate(wide, axis=-1), weigh))
    return those


class Factors(NamedTuple):
    """A and B of the experts' three maps as used: `[in, r]` and `[r, out]`, or with an axis of experts first."""

    a_gate: jax.Array
    b_gate: jax.Array
    a_up: jax.Array
    b_up: jax.Array
    a_down: jax.Array
    b_down: jax.Array


class Update(NamedTuple):
    """What adapters add to the experts of some rows or tokens."""

    factors: Factors
    rank_weights_Tr: jax.Array


def low_rank(x_TD: jax.Array, a_Dr: jax.Array, b_rF: jax.Array, rank_weights_Tr: jax.Array) -> jax.Array:
    """`((x A) * m) B`; m has r columns or one."""
    return ((x_TD @ a_Dr) * rank_weights_Tr) @ b_rF


def _top1(probs_TI: jax.Array) -> jax.Array:
    return jax.nn.one_hot(jnp.argmax(probs_TI, axis=-1), probs_TI.shape[-1], dtype=probs_TI.dtype)


GATINGS: dict[Gating, Callable[[jax.Array], jax.Array]] = {
    "top1": _top1,
    "top1_prob": lambda probs_TI: _top1(probs_TI) * probs_TI,
    "dense": lambda probs_TI: probs_TI,
}
"""TABLE from the probabilities of LoRA experts to their weights. top1: the paper's; the router has no gradient of the
task loss, only of the balance loss. top1_prob: the best times its probability, as in Switch, which gives it one. dense:
the probabilities of all experts, as the released checkpoint runs."""


def update_of(
    blocks: Sequence[tuple[AdapterConfig, BlockAdapter, jax.Array]], x_TD: jax.Array
) -> tuple[Update | None, list[jax.Array]]:
    """The updates of several adapters to the experts, joined along the rank into one; and for each adapter that has a
    router over LoRA experts, their probabilities `[T, I]`.

    Args:
      blocks: for each adapter its config, its leaves of one layer as used, and its scale of every token `[T, 1]`.
    """
    parts, weights, chosen = [], [], []
    for config, block, scale_T1 in blocks:
        weights_TI = jnp.ones((len(x_TD), 1), x_TD.dtype)
        if block.choice is not None:
            chosen.append(block.choice(x_TD))
            weights_TI = GATINGS[config.gating](chosen[-1]).astype(x_TD.dtype)
        if config.of_experts:
            leaves = (leaf for name in EXPERTS for leaf in getattr(block, name).cast(x_TD.dtype))
            parts.append(Factors(*leaves))
            weights.append(jnp.repeat(weights_TI * scale_T1, config.columns // weights_TI.shape[-1], axis=-1))
    if not parts:
        return None, chosen
    return Update(_side_by_side(parts), jnp.concatenate(weights, axis=-1)), chosen


def router_update(blocks: Sequence[tuple[AdapterConfig, BlockAdapter, jax.Array]], x_TD: jax.Array) -> jax.Array | None:
    """float32 `[T, E]`: what adapters add to the logits of the pretrained router."""
    update_TE = None
    for _, block, scale_T1 in blocks:
        if block.router is not None:
            own_TE = low_rank(x_TD, *block.router.cast(x_TD.dtype), scale_T1).astype(jnp.float32)
            update_TE = own_TE if update_TE is None else update_TE + own_TE
    return update_TE


def _side_by_side(parts: list[Factors]) -> Factors:
    """Joins factors along the rank; if any have an axis of experts, all get it."""
    if len(parts) == 1:
        return parts[0]
    groups = next((part.a_gate.shape[:1] for part in parts if part.a_gate.ndim == 3), ())
    wide = [Factors(*(jnp.broadcast_to(leaf, (*groups, *leaf.shape[-2:])) for leaf in part)) for part in parts]
    return Factors(*(jnp.concatenate(leaves, axis=-1 - n % 2) for n, leaves in enumerate(zip(*wide, strict=True))))
