"""Projectors on the frozen projector of an earlier medium, the trunk: what a later medium adds to it, and nothing else.

`weave` is PathWeave's (arXiv 2410.20178) on the trunk's two linear maps. Beside each map w, medium m has an adapter A^m
of rank r; inside the frozen adapter A^i of every earlier medium i it has a map F_i^m; and a gate G^m over all of them:

    A^i(x)   = scale_i ((x down_i + c_i) up_i + d_i)
    A^i_m(x) = scale_i (((x down_i + c_i) F_i^m + f_i^m) up_i + d_i)
    y        = x w + sum_{i<m} g_i A^i_m(x) + g_m A^m(x),    g = softmax(x G^m);    of the first y = x w + A^0(x)

`crema` is CREMA's (arXiv 2402.05889) on a resampler: queries and an output map of its own, and low-rank updates of
self-attention's queries and values, without alpha. With `fusion`, tokens x^m of assisting media are added to the
trunk's x, and take no positions:

    u = sum_m (x^m w_m + b_m),    x + sigmoid(u) u    (`fused`)

where w and b start at zero, so that nothing is added; released code starts them at random.

Both first bring their tower's width to the trunk's, where they differ. The decoder and the trunk stay as they are, so
that whatever was learnt before is kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import ProjectorConfig
from moextend_jax.models.resampler import Resampler, resample
from moextend_jax.models.vision import gelu
from moextend_jax.models.weights import used
from moextend_jax.parameters import constant, uniform, weight
from moextend_jax.sharding import Shards, map_shards, module_shards, shards

Leaves = Mapping[str, jax.Array]


class Map(nnx.Module):
    """A medium's adapter beside one linear map of the trunk. `up` and the gate start at zero, F at the identity. So the
    first medium starts with the trunk's tokens, later media with tokens between those of all earlier media. With
    `random` F, as released, they start with arbitrary tokens."""

    def __init__(
        self, inputs: str, outputs: str, config: ProjectorConfig, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str
    ):
        self.down = uniform(f"{inputs}r", sizes, rngs=rngs, dtype=dtype, bound=sizes[inputs] ** -0.5)
        self.down_bias = constant("r", sizes, dtype=dtype, value=0.0)
        self.up = constant(f"r{outputs}", sizes, dtype=dtype, value=0.0)
        self.up_bias = constant(outputs, sizes, dtype=dtype, value=0.0)
        self.scale = constant("w", sizes, dtype=dtype, value=1.0)
        before, options = bool(config.past), {"rngs": rngs, "dtype": dtype}
        inner, inner_bias = _identity(sizes, dtype=dtype)
        if config.inner == "random":
            bound = sizes["r"] ** -0.5
            inner, inner_bias = (uniform(axes, sizes, bound=bound, **options) for axes in ("irh", "ih"))
        self.inner, self.inner_bias = (inner, inner_bias) if before else (None, None)
        self.gate = constant(f"{inputs}g", sizes, dtype=dtype, value=0.0) if before else None


def _identity(sizes: dict[str, int], *, dtype: str) -> tuple[nnx.Param, nnx.Param]:
    """F and its bias of every earlier medium."""
    identity_irh = jnp.tile(jnp.eye(sizes["r"], dtype=dtype), (sizes["i"], 1, 1))
    return nnx.Param(identity_irh, axes="irh"), constant("ih", sizes, dtype=dtype, value=0.0)


class Weave(nnx.Module):
    """x_npC -> x_npD through the trunk's two maps and what stands beside them."""

    def __init__(self, config: ProjectorConfig, *, sizes: dict[str, int], rngs: nnx.Rngs, dtype: str):
        self.config, self.input = config, Input(sizes, rngs=rngs, dtype=dtype)
        self.first = Map("c", "d", config, sizes, rngs=rngs, dtype=dtype)
        self.second = Map("d", "D", config, sizes, rngs=rngs, dtype=dtype)

    def __call__(self, x_nPC: jax.Array, trunk: nnx.Module, *past: Weave) -> jax.Array:
        arrays, splits = zip(*map(module_shards, (self, trunk, *past)), strict=True)
        items = Shards("nPc", (shards("n", x_nPC.shape).split[0], (), ()))

        def local(x_npC, arrays):
            own, base, *before = (
                {path: used(path, leaf, split[path]) for path, leaf in of.items()}
                for of, split in zip(arrays, splits, strict=True)
            )
            x_npc = entered(x_npC, own)
            h_npd = gelu(woven("first", x_npc, own, base, before))
            return woven("second", h_npd, own, base, before)

        return map_shards(local, (items, splits), items)(x_nPC, arrays)


def woven(name: str, x_npc: jax.Array, own: Leaves, trunk: Leaves, past: Sequence[Leaves]) -> jax.Array:
    """The trunk's map `name` with everything beside it; leaves of the medium, of the trunk, of earlier media."""
    y_npd = x_npc @ trunk[name] + trunk[f"{name}_bias"][None, None]
    alone_npd = adapter(x_npc, own, name)
    if not past:
        return y_npd + alone_npd
    parts = [
        adapter(x_npc, of, name, through=(own[f"{name}/inner"][i], own[f"{name}/inner_bias"][i]))
        for i, of in enumerate(past)
    ]
    gates_npg = jax.nn.softmax((x_npc @ own[f"{name}/gate"]).astype(jnp.float32), axis=-1).astype(x_npc.dtype)
    for i, part_npd in enumerate((*parts, alone_npd)):
        y_npd += gates_npg[..., i, None] * part_npd
    return y_npd


def adapter(
    x_npc: jax.Array, of: Leaves, name: str, *, through: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
    """A^i(x), or A^i_m(x) if `through` is F_i^m and its bias."""
    down_npr = x_npc @ of[f"{name}/down"] + of[f"{name}/down_bias"][None, None]
    if through is not None:
        down_npr = down_npr @ through[0] + through[1][None, None]
    return of[f"{name}/scale"].reshape(()) * (down_npr @ of[f"{name}/up"] + of[f"{name}/up_bias"][None, None])


class Crema(nnx.Module):
    """x_nPC -> x_nqD through the trunk, with queries, updates and an output map of its own."""

    def __init__(self, config: ProjectorConfig, *, sizes: dict[str, int], rngs: nnx.Rngs, dtype: str):
        self.config, self.input = config, Input(sizes, rngs=rngs, dtype=dtype)
        self.queries = weight("qc", sizes, rngs=rngs, dtype=dtype, std=0.02)
        for name in UPDATED:
            setattr(self, f"{name}_a", uniform("Ucr", sizes, rngs=rngs, dtype=dtype, bound=sizes["c"] ** -0.5))
            setattr(self, f"{name}_b", constant("UrNH", sizes, dtype=dtype, value=0.0))
        self.out = weight("cd", sizes, rngs=rngs, dtype=dtype, std=(3 * sizes["c"]) ** -0.5)
        self.out_bias = constant("d", sizes, dtype=dtype, value=0.0)
        self.fuse = constant("dD", sizes, dtype=dtype, value=0.0) if config.fusion else None
        self.fuse_bias = constant("D", sizes, dtype=dtype, value=0.0) if config.fusion else None

    def __call__(self, x_nPC: jax.Array, trunk: Resampler) -> jax.Array:
        return resample(trunk, x_nPC, self)

    def enter(self, x_nPC: jax.Array, own: Leaves) -> jax.Array:
        return entered(x_nPC, own)

    def leave(self, x_nqd: jax.Array, own: Leaves) -> jax.Array:
        return jnp.einsum("nqd,dD->nqD", x_nqd, own["fuse"]) + own["fuse_bias"][None, None] if "fuse" in own else x_nqd

    def changed(self, path: str, leaf: jax.Array, number: tuple[int, ...], own: Leaves) -> jax.Array:
        """A leaf of the trunk as this medium has it."""
        if path in own:
            return own[path]
        name = path.removeprefix("self_attention/inner/")
        if name not in UPDATED or name == path:
            return leaf
        return leaf + jnp.einsum("Cr,rNH->CNH", own[f"{name}_a"][number], own[f"{name}_b"][number])


UPDATED = ("query", "value")
"""The maps of self-attention that CREMA updates."""


def fused(x_BLD: jax.Array, u_BLD: jax.Array) -> jax.Array:
    """Tokens, and what the sum u of all assisting media's tokens adds to them."""
    return x_BLD + jax.nn.sigmoid(u_BLD) * u_BLD


class Input(nnx.Module):
    """A linear map from a tower's width to that of the trunk's; none where they are equal."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str):
        other = sizes["C"] != sizes["c"]
        std = (3 * sizes["C"]) ** -0.5
        self.weight = weight("Cc", sizes, rngs=rngs, dtype=dtype, std=std) if other else None
        self.bias = constant("c", sizes, dtype=dtype, value=0.0) if other else None


def entered(x_nPC: jax.Array, own: Leaves) -> jax.Array:
    if "input/weight" not in own:
        return x_nPC
    return x_nPC @ own["input/weight"] + own["input/bias"][None, None]
