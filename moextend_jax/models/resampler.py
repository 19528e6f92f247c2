"""Learnt queries that look at all states x_nPC of a tower, in blocks of BLIP-2's Q-Former (2301.12597); x_nqD out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import ProjectorConfig
from moextend_jax.models.vision import MLP, Attention, LayerNorm
from moextend_jax.models.weights import used
from moextend_jax.parameters import constant, weight, with_arrays
from moextend_jax.sharding import Shards, map_shards, module_shards, shards

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

    A block has self-attention of the queries, then in every `cross_every`-th block, beginning with the first,
    cross-attention to the tower's states, then a GELU MLP. Leaves are stacked over U, those of cross-attention over the
    u blocks that have it.
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
        return resample(self, x_nPC)


def resample(module: Resampler, x_nPC: jax.Array, of: Any = None) -> jax.Array:
    """The tokens that a resampler makes.

    Args:
      of: hooks of another medium that uses this resampler as its trunk (CREMA), None: none. With its own leaves `own`,
        `enter(x, own)` is applied to the input, `leave(x, own)` to the output, and `changed(path, leaf, number, own)`
        gives a leaf of the resampler (of a stacked leaf one layer's) as that medium uses it.
    """
    arrays, splits = module_shards(module)
    more, splits_of_more = ({}, {}) if of is None else module_shards(of)
    items = Shards("nPc", (shards("n", x_nPC.shape).split[0], (), ()))

    def local(x_nPC, arrays, more):
        """Each device computes its own items, with the weights of a part gathered while it runs."""
        own = {path: used(path, leaf, splits_of_more[path]) for path, leaf in more.items()}
        x_nPC = x_nPC if of is None else of.enter(x_nPC, own)

        def leaf(path: str, *number: int) -> jax.Array:
            made = used(path, arrays[path][number], splits[path].without_first() if number else splits[path])
            return made if of is None else of.changed(path, made, number, own)

        def part(name: str, *number: int) -> Any:
            """The part of this name; if it is stacked, its layer of this number."""
            paths = [path for path in arrays if path.startswith(name + "/")]
            leaves = {path.removeprefix(name + "/"): leaf(path, *number) for path in paths}
            return with_arrays(getattr(module, name), leaves)

        queries_qC, out_Cd, bias_d = leaf("queries"), leaf("out"), leaf("out_bias")
        # Leaves that train may have a wider dtype than the frozen ones that gave the states.
        x_nPC = x_nPC.astype(jnp.result_type(x_nPC, queries_qC))
        x_nqC = part("norm")(jnp.broadcast_to(queries_qC[None], (x_nPC.shape[0], *queries_qC.shape)))
        for number in range(module.config.layers):
            x_nqC = part("self_attention", number)(x_nqC, x_nqC)
            if number % module.config.cross_every == 0:
                x_nqC = part("cross_attention", number // module.config.cross_every)(x_nqC, x_nPC)
            x_nqC = part("mlp", number)(x_nqC)
        x_nqd = jnp.einsum("nqC,Cd->nqd", x_nqC, out_Cd) + bias_d[None, None]
        return x_nqd if of is None else of.leave(x_nqd, own)

    with jax.named_scope("resampler"):
        return map_shards(local, (items, splits, splits_of_more), items)(x_nPC, arrays, more)
