"""Projectors: states x_nPC of a tower in, tokens x_npD of the decoder out (n items of a medium).

TABLE has one for each `ProjectorConfig.kind`. The paper's (LLaVA-1.5's) is two linear maps with a GELU; of neighbouring
positions their mean, or all of them side by side, can go into it. Or learnt queries look at all positions, in blocks of
BLIP-2's Q-Former (2301.12597), as Uni-MoE (2405.11273) and CREMA (2402.05889) have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import MoextendError, ProjectorConfig
from moextend_jax.models.vision import MLP, Attention, LayerNorm, gelu
from moextend_jax.models.weights import used
from moextend_jax.parameters import constant, weight, with_arrays
from moextend_jax.sharding import Shards, map_shards, module_shards, shards


def make_projector(
    config: ProjectorConfig, *, C: int, P: int, D: int, rngs: nnx.Rngs, dtype: str
) -> Projector | Resampler:
    """The projector behind a tower of width C and P positions, before a decoder of width D.

    A call makes `config.tokens(P)` tokens of P positions, x_npD of x_nPC.

    Raises:
      MoextendError: settings that contradict each other or the tower.
    """
    if config.kind == "linear" and config.neighbours != 1:
        raise MoextendError(
            f'projector: kind "linear" has neighbours = {config.neighbours}; "pool" or "stack" put neighbours together'
        )
    if config.kind in ("pool", "stack") and config.neighbours > P:
        raise MoextendError(f"projector: neighbours = {config.neighbours} are more than the tower's {P} positions")
    if config.kind == "resampler" and C % config.heads:
        raise MoextendError(f"projector: heads = {config.heads} must divide the tower's width {C}")
    return TABLE[config.kind](config, sizes=sizes(config, C=C, D=D), rngs=rngs, dtype=dtype)


def sizes(config: ProjectorConfig, *, C: int, D: int) -> dict[str, int]:
    """Sizes of the letters of a projector's leaves, behind a tower of width C and before a decoder of width D.

    C becomes what the first map reads: of "stack" the widths of all neighbours together. d is D as an input axis, so
    that no letter stands twice. Of a resampler J is four times C, and u counts its blocks that attend to the tower.
    """
    letters = {"C": C * config.neighbours if config.kind == "stack" else C, "D": D, "d": D}
    if config.kind != "resampler":
        return letters
    return {
        **letters, "q": config.queries, "U": config.layers, "u": math.ceil(config.layers / config.cross_every),
        "N": config.heads, "H": C // config.heads, "J": 4 * C,
    }  # fmt: skip


# --- linear maps ------------------------------------------------------------------------------------------------------


class Projector(nnx.Module):
    """Linear(C, D), exact GELU, Linear(D, D), of each position or each group of `neighbours`: a row of GROUPS."""

    def __init__(self, config: ProjectorConfig, *, sizes: Mapping[str, int], rngs: nnx.Rngs, dtype: str):
        self.config = config
        # The spread of PyTorch's Linear, from which LLaVA's and the released projector start.
        self.first = weight("Cd", sizes, rngs=rngs, dtype=dtype, std=(3 * sizes["C"]) ** -0.5)
        self.first_bias = constant("d", sizes, dtype=dtype, value=0.0)
        self.second = weight("dD", sizes, rngs=rngs, dtype=dtype, std=(3 * sizes["D"]) ** -0.5)
        self.second_bias = constant("D", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nPC: jax.Array) -> jax.Array:
        arrays, splits = module_shards(self)
        items = Shards("nPc", (shards("n", x_nPC.shape).split[0], (), ()))

        def local(x_nPC, arrays):
            w = {name: used(name, leaf, splits[name]) for name, leaf in arrays.items()}
            x_npC = GROUPS[self.config.kind](x_nPC, self.config.neighbours)
            h_npd = gelu(jnp.einsum("npC,Cd->npd", x_npC, w["first"]) + w["first_bias"][None, None])
            return jnp.einsum("npd,dD->npD", h_npd, w["second"]) + w["second_bias"][None, None]

        return map_shards(local, (items, splits), items)(x_nPC, arrays)


def in_groups(x_nPC: jax.Array, neighbours: int) -> jax.Array:
    """[n, p, neighbours, C], the last group filled up with zeros."""
    missing = -x_nPC.shape[1] % neighbours
    x_nPC = jnp.pad(x_nPC, ((0, 0), (0, missing), (0, 0)))
    return einops.rearrange(x_nPC, "n (p k) C -> n p k C", k=neighbours)


def mean_of_neighbours(x_nPC: jax.Array, neighbours: int) -> jax.Array:
    """x_npC; in the last group the mean of those that there are."""
    groups = in_groups(x_nPC, neighbours)
    counts_p = jnp.minimum(neighbours, x_nPC.shape[1] - neighbours * jnp.arange(groups.shape[1]))
    means_npC = jnp.sum(groups, axis=2, dtype=jnp.float32) / counts_p[None, :, None]
    return means_npC.astype(x_nPC.dtype)


def side_by_side(x_nPC: jax.Array, neighbours: int) -> jax.Array:
    """[n, p, neighbours * C]: the first neighbour's C numbers, then the second's, ...; what the last group lacks is
    zeros."""
    return einops.rearrange(in_groups(x_nPC, neighbours), "n p k C -> n p (k C)")


GROUPS = {"linear": lambda x_nPC, neighbours: x_nPC, "pool": mean_of_neighbours, "stack": side_by_side}


# --- resampler --------------------------------------------------------------------------------------------------------

EPS = 1e-12
"""Of a Q-Former's norms, as of BERT's."""


class PostNorm(nnx.Module):
    """norm(x + inner(x, ...)), a part of a block; `stack` is the letter over which it is stacked."""

    def __init__(self, stack: str, inner: Any, *, sizes: Mapping[str, int], dtype: str):
        self.inner = inner
        self.norm = LayerNorm(stack, sizes, eps=EPS, dtype=dtype)

    def __call__(self, x_nqC: jax.Array, *seen_nPC: jax.Array) -> jax.Array:
        return self.norm(x_nqC + self.inner(x_nqC, *seen_nPC))


class Resampler(nnx.Module):
    """`queries_qC` go through U blocks, then a linear map to D: q tokens, however many positions there are.

    A block is self-attention of the queries, in every `cross_every`-th one (the first, ...) attention to the tower's
    states, and a GELU MLP. Leaves of blocks are stacked over U, those of attention to the tower over the u blocks that
    have it.
    """

    def __init__(self, config: ProjectorConfig, *, sizes: Mapping[str, int], rngs: nnx.Rngs, dtype: str):
        self.config = config
        # Not zeros, as released code has them: without positions, equal queries stay equal for good.
        self.queries = weight("qC", sizes, rngs=rngs, dtype=dtype, std=0.02)
        self.norm = LayerNorm("", sizes, eps=EPS, dtype=dtype)
        self_attention, cross_attention = (Attention(stack, sizes, rngs=rngs, dtype=dtype) for stack in "Uu")
        mlp = MLP("U", sizes, activation="gelu", rngs=rngs, dtype=dtype)
        self.self_attention = PostNorm("U", self_attention, sizes=sizes, dtype=dtype)
        self.cross_attention = PostNorm("u", cross_attention, sizes=sizes, dtype=dtype)
        self.mlp = PostNorm("U", mlp, sizes=sizes, dtype=dtype)
        self.out = weight("Cd", sizes, rngs=rngs, dtype=dtype, std=(3 * sizes["C"]) ** -0.5)
        self.out_bias = constant("d", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nPC: jax.Array) -> jax.Array:
        arrays, splits = module_shards(self)
        items = Shards("nPc", (shards("n", x_nPC.shape).split[0], (), ()))

        def local(x_nPC, arrays):
            """Every device its own items, with the weights of a part gathered while it runs."""

            def part(name: str, *number: int) -> Any:
                """The part of this name; of a stacked one the layer of this number."""
                own = {path: splits[path].without_first() if number else splits[path]
                       for path in arrays if path.startswith(name + "/")}  # fmt: skip
                leaves = {path.removeprefix(name + "/"): used(path, arrays[path][number], how)
                          for path, how in own.items()}  # fmt: skip
                return with_arrays(getattr(self, name), leaves)

            whole = (used(name, arrays[name], splits[name]) for name in ("queries", "out", "out_bias"))
            queries_qC, out_Cd, bias_d = whole
            x_nqC = part("norm")(jnp.broadcast_to(queries_qC[None], (x_nPC.shape[0], *queries_qC.shape)))
            for number in range(self.config.layers):
                x_nqC = part("self_attention", number)(x_nqC, x_nqC)
                if number % self.config.cross_every == 0:
                    x_nqC = part("cross_attention", number // self.config.cross_every)(x_nqC, x_nPC)
                x_nqC = part("mlp", number)(x_nqC)
            return jnp.einsum("nqC,Cd->nqd", x_nqC, out_Cd) + bias_d[None, None]

        with jax.named_scope("resampler"):
            return map_shards(local, (items, splits), items)(x_nPC, arrays)


TABLE = {"linear": Projector, "pool": Projector, "stack": Projector, "resampler": Resampler}
"""By `ProjectorConfig.kind`."""


# --- frames of a video ------------------------------------------------------------------------------------------------


def join_frames(x_npD: jax.Array, *, frames: int, join: Literal["each", "mean"]) -> jax.Array:
    """Tokens of a video from those of its frames: `[items * frames, p, D]`, frames of an item one after another.

    Gives `[items, frames * p, D]` with "each", one frame's tokens after the other's; `[items, p, D]` with "mean",
    averaged patch by patch (Uni-MoE).
    """
    if join == "mean":
        return einops.reduce(x_npD, "(n t) p D -> n p D", "mean", t=frames)
    return einops.rearrange(x_npD, "(n t) p D -> n (t p) D", t=frames)
