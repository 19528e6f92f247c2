"""Projectors: states x_nPC of a tower in, tokens x_npD of the decoder out (n items of a medium).

TABLE has one for each `ProjectorConfig.kind`. The paper's (LLaVA-1.5's) is two linear maps with a GELU. Its input can
also be the mean of neighbouring positions, or these concatenated. Or learnt queries look at all positions
(`resampler.py`), as Uni-MoE (2405.11273) and CREMA (2402.05889) have it. Or a later medium adds to the frozen projector
of an earlier one (`woven.py`).
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
from moextend_jax.models.resampler import Resampler
from moextend_jax.models.vision import gelu
from moextend_jax.models.weights import used
from moextend_jax.models.woven import Crema, Weave
from moextend_jax.parameters import constant, weight
from moextend_jax.sharding import Shards, map_shards, module_shards, shards


def make_projector(config: ProjectorConfig, *, C: int, P: int, D: int, rngs: nnx.Rngs, dtype: str) -> Any:
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
    if config.kind in ("resampler", "crema") and (width := config.width or C) % config.heads:
        raise MoextendError(f"projector: heads = {config.heads} must divide the tower's width {width}")
    return TABLE[config.kind](config, sizes=sizes(config, C=C, D=D), rngs=rngs, dtype=dtype)


def sizes(config: ProjectorConfig, *, C: int, D: int) -> dict[str, int]:
    """Sizes of the letters of a projector's leaves, behind a tower of width C and before a decoder of width D.

    C is the input width of the first map, for "stack" that of all neighbours together. d is D as an input axis, so
    that no letter stands twice. For a resampler, J is four times C, and u counts the blocks with cross-attention. On a
    trunk, c is the width of the trunk's tower, r and h are the rank, i counts earlier media on it, and g is i + 1.
    """
    letters = {"C": C * config.neighbours if config.kind == "stack" else C, "D": D, "d": D}
    if config.trunk:
        past = len(config.past)
        letters |= {"c": config.width, "r": config.rank, "h": config.rank, "i": past, "g": past + 1, "w": 1}
    if config.kind not in ("resampler", "crema"):
        return letters
    width = config.width or C
    return {
        **letters, "q": config.queries, "U": config.layers, "u": math.ceil(config.layers / config.cross_every),
        "N": config.heads, "H": width // config.heads, "J": 4 * width,
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
    """x_npC; an incomplete last group is averaged over the positions that it has."""
    groups = in_groups(x_nPC, neighbours)
    counts_p = jnp.minimum(neighbours, x_nPC.shape[1] - neighbours * jnp.arange(groups.shape[1]))
    means_npC = jnp.sum(groups, axis=2, dtype=jnp.float32) / counts_p[None, :, None]
    return means_npC.astype(x_nPC.dtype)


def side_by_side(x_nPC: jax.Array, neighbours: int) -> jax.Array:
    """[n, p, neighbours * C]: the first neighbour's C numbers, then the second's, ...; an incomplete last group is
    filled with zeros."""
    return einops.rearrange(in_groups(x_nPC, neighbours), "n p k C -> n p (k C)")


GROUPS = {"linear": lambda x_nPC, neighbours: x_nPC, "pool": mean_of_neighbours, "stack": side_by_side}


TABLE: dict[str, Any] = {
    "linear": Projector, "pool": Projector, "stack": Projector, "resampler": Resampler, "weave": Weave, "crema": Crema,
}  # fmt: skip
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
