"""Matrix products of rows sorted by group on TPU and GPU: `x_RD, (w_GDF, ...), sizes -> y_RF`.

The groups of all parts of the weights count on from each other, so pretrained and new experts stay separate arrays;
rows past the sum of the sizes give zeros. A quantised part is dequantised for one product at a time, or with few rows
inside the kernel. XLA's `ragged_dot` is dense over the groups on TPU v5e and v6e, on GPU and on CPU. So TPUs run
megablox, GPUs the kernels of grouped_triton.py, and on CPU experts go through blocked_swiglu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moextend_jax.models import grouped_triton
from moextend_jax.models.weights import OfStack, Weight, alone, in_groups, plain, reading
from moextend_jax.sharding import platform

ROWS, COLUMNS = (512, 256, 128, 64, 32, 16, 8), 1024
"""Sizes of a megablox tile in bfloat16: rows (the most that divide the buffer), and both contracted and output columns.
The largest tile takes 9 MB of a TPU core's vector memory."""


class Kernels(NamedTuple):
    """`product(x, parts, sizes, transpose=)` writes only rows of groups. `gradient(x, dy, sizes, first=, like_GDF=)` is
    that of the part whose groups count from `first`. `multiplies_out(part, rows=, transpose=)` says whether the product
    takes a quantised part as it is stored."""

    product: Callable[..., jax.Array]
    gradient: Callable[..., jax.Array]
    multiplies_out: Callable[..., bool]


def grouped_matmul(x_RD: jax.Array, w_parts: Sequence[Weight], sizes_O: jax.Array) -> jax.Array:
    """Multiplies each row by the matrix of its group.

    Args:
      x_RD: rows, sorted so that group 0 comes first, then group 1, ...; what stands past the last has no effect.
      w_parts: arrays `[groups, D, F]`; group ids run on from one part to the next.
      sizes_O: int32, rows of each group over all parts; their sum is at most R.

    Returns:
      `y_RF` in x's dtype; rows past `sum(sizes_O)` are zero.
    """
    if platform() == "cpu":
        return ragged_dot(x_RD, tuple(w_parts), sizes_O)
    return by_kernels({"tpu": MEGABLOX, "gpu": TRITON}[platform()], x_RD, tuple(w_parts), sizes_O)


def ragged_dot(x_RD: jax.Array, w_parts: tuple[Weight, ...], sizes_O: jax.Array) -> jax.Array:
    """Part by part through XLA's own, which is right everywhere."""
    y_RF, first, start = jnp.zeros((x_RD.shape[0], w_parts[0].shape[-1]), x_RD.dtype), 0, jnp.int32(0)
    for w_GDF in w_parts:
        sizes_G = sizes_O[first : first + w_GDF.shape[0]]
        # A product starts at row 0: bring the part's rows there and back. It may leave later rows unwritten.
        rolled_RD = jnp.roll(x_RD, -start, axis=0)
        product_RF = lax.ragged_dot(rolled_RD, plain(w_GDF, x_RD.dtype), sizes_G)
        y_RF += jnp.roll(without_rest(product_RF, sizes_G), start, axis=0)
        first, start = first + w_GDF.shape[0], start + sizes_G.sum()
    return y_RF


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_kernels(kernels: Kernels, x_RD: jax.Array, w_parts: tuple[Weight, ...], sizes_O: jax.Array) -> jax.Array:
    """The same by Pallas kernels; the gradient of a part is computed only where it is asked for."""
    return _product(kernels, x_RD, w_parts, sizes_O, transpose=False)


def _product(
    kernels: Kernels, x_RD: jax.Array, w_parts: tuple[Weight, ...], sizes_O: jax.Array, *, transpose: bool
) -> jax.Array:
    """Quantised parts that the kernel does not take are dequantised once the rows are there. Otherwise the compiler
    would dequantise once for forward and backward pass, and keep a layer's three matrices in memory."""

    def one(weight: Weight) -> Weight:
        stored = weight.stack if isinstance(weight, OfStack) else weight
        if isinstance(stored, jax.Array):
            return weight if isinstance(weight, OfStack) else plain(weight, x_RD.dtype)
        if kernels.multiplies_out(weight, rows=len(x_RD), transpose=transpose):
            return weight
        return plain(lax.optimization_barrier((alone(weight), x_RD))[0], x_RD.dtype)

    return without_rest(kernels.product(x_RD, tuple(map(one, w_parts)), sizes_O, transpose=transpose), sizes_O)


def _forward(kernels, x_RD, w_parts, sizes_O):
    # The rows are kept only for parts that are trained.
    kept_parts = tuple(x_RD.value if any(leaf.perturbed for leaf in jax.tree.leaves(w)) else None for w in w_parts)
    x_RD, values, sizes_O = jax.tree.map(lambda leaf: leaf.value, (x_RD, w_parts, sizes_O))
    return by_kernels(kernels, x_RD, values, sizes_O), (kept_parts, values, sizes_O)


def _backward(kernels, saved, dy_RF):
    rows_of_parts, w_parts, sizes_O = saved
    if isinstance(dy_RF, jax.custom_derivatives.SymbolicZero):
        return None, tuple(None for _ in w_parts), None
    d_parts, first = [], 0
    for x_RD, w_GDF in zip(rows_of_parts, w_parts, strict=True):
        gradient = functools.partial(kernels.gradient, first=first, like_GDF=w_GDF)
        d_parts.append(None if x_RD is None else gradient(x_RD, dy_RF, sizes_O))
        first += w_GDF.shape[0]
    return _product(kernels, dy_RF, w_parts, sizes_O, transpose=True), tuple(d_parts), None


by_kernels.defvjp(_forward, _backward, symbolic_zeros=True)


def _megablox(x_RD, w_parts, sizes_O, *, transpose: bool):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    y_RF, first, rows = None, 0, len(x_RD)
    x_RD = _filled(x_RD)
    for weight in w_parts:
        (w_GDF, start), groups = in_groups(weight), weight.shape[0]
        if len(w_GDF) > groups:  # in a stack, where other layers' experts have no rows
            own_G = lax.dynamic_update_slice(
                jnp.zeros(len(w_GDF), jnp.int32), sizes_O[first : first + groups], (start,)
            )
            sizes_S = jnp.concatenate([sizes_O[:first], own_G, sizes_O[first + groups :]])
        else:
            sizes_S = sizes_O
        D, F = w_GDF.shape[1:][:: -1 if transpose else 1]
        with reading(weight):
            y_RF = gmm(
                x_RD, w_GDF, sizes_S, x_RD.dtype, _tiles(x_RD, D, F), jnp.int32(first),
                y_RF, transpose, platform() != "tpu",
            )  # fmt: skip
        first += groups
    assert y_RF is not None
    return y_RF[:rows]


def _megablox_gradient(x_RD, dy_RF, sizes_O, *, first: int, like_GDF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    groups, D, F = like_GDF.shape
    x_RD, dy_RF = _filled(x_RD), _filled(dy_RF)
    return tgmm(
        x_RD.T, dy_RF, sizes_O, like_GDF.dtype, _tiles(dy_RF, D, F), jnp.int32(first), groups,
        interpret=platform() != "tpu",
    )  # fmt: skip


MEGABLOX = Kernels(_megablox, _megablox_gradient, lambda *_, **__: False)
TRITON = Kernels(grouped_triton.grouped_product, grouped_triton.weight_gradient, grouped_triton.multiplies_out)
"""TABLE of Pallas kernels: JAX's own for TPU, ours for GPU."""


def _filled(x_RD: jax.Array) -> jax.Array:
    """Padded with rows of no group to a multiple of a tile's rows: of 128 if there are more, else of 8."""
    more = -len(x_RD) % (128 if len(x_RD) > 128 else 8)
    return jnp.pad(x_RD, ((0, more), (0, 0))) if more else x_RD


def _tiles(x_RD: jax.Array, D: int, F: int) -> tuple[int, int, int]:
    """A tile's sizes. float32 has a quarter of the rows: at highest precision it is split into three bfloat16 parts."""
    wide = x_RD.dtype.itemsize // 2
    rows = next(tile for tile in ROWS if len(x_RD) % tile == 0 and tile <= ROWS[0] // wide**2)
    return rows, min(COLUMNS // wide, D), min(COLUMNS // wide, F)


def without_rest(y_RF: jax.Array, sizes_O: jax.Array) -> jax.Array:
    """Sets the rows past those of all groups to zero."""
    return jnp.where(jnp.arange(y_RF.shape[0])[:, None] < sizes_O.sum(), y_RF, 0)
