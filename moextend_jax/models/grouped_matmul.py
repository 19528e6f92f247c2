"""Matrix products of rows sorted by group on TPU and GPU: `x_RD, (w_GDF, ...), sizes -> y_RF`.

The groups of all parts of the weights count on from each other, so pretrained and new experts stay separate arrays;
rows past the sum of the sizes give zeros. XLA's `ragged_dot` is dense over the groups on TPU v5e and v6e, on GPU and on
CPU: TPUs run megablox, GPUs tokamax's Triton kernel, and on CPU experts go through blocked_swiglu.py instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from moextend_jax.config import MoextendError
from moextend_jax.folders import extra_hint
from moextend_jax.sharding import platform

ROWS, COLUMNS = (512, 256, 128, 64, 32, 16, 8), 1024
"""Of a megablox tile: rows, the most that divide the buffer, and contracted and output columns. The largest takes 9 MB
of a TPU core's vector memory in bfloat16."""


def grouped_matmul(x_RD: jax.Array, w_parts: Sequence[jax.Array], sizes_O: jax.Array) -> jax.Array:
    """Multiplies each row by the matrix of its group.

    Args:
      x_RD: rows, sorted so that group 0 comes first, then group 1, ...; what stands past the last has no effect.
      w_parts: arrays `[groups, D, F]`; group ids run on from one part to the next.
      sizes_O: int32, rows of each group over all parts; their sum is at most R.

    Returns:
      `y_RF` in x's dtype; rows past `sum(sizes_O)` are zero.
    """
    kernel = {"tpu": megablox, "gpu": tokamax_triton, "cpu": ragged_dot}[platform()]
    return kernel(x_RD, tuple(w_parts), sizes_O)


def ragged_dot(
    x_RD: jax.Array, w_parts: tuple[jax.Array, ...], sizes_O: jax.Array, *, product: Callable = lax.ragged_dot
) -> jax.Array:
    """Part by part through a `product` like XLA's own, which is right everywhere."""
    y_RF, first, start = jnp.zeros((x_RD.shape[0], w_parts[0].shape[-1]), x_RD.dtype), 0, jnp.int32(0)
    for w_GDF in w_parts:
        sizes_G = sizes_O[first : first + w_GDF.shape[0]]
        # A product starts at row 0: bring the part's rows there and back. It may leave later rows unwritten.
        rolled_RD = jnp.roll(x_RD, -start, axis=0)
        y_RF += jnp.roll(_mask(product(rolled_RD, w_GDF.astype(x_RD.dtype), sizes_G), sizes_G), start, axis=0)
        first, start = first + w_GDF.shape[0], start + sizes_G.sum()
    return y_RF


def tokamax_triton(x_RD: jax.Array, w_parts: tuple[jax.Array, ...], sizes_O: jax.Array) -> jax.Array:
    """tokamax's grouped product for NVIDIA GPUs. Asked for by name: left to itself tokamax may take XLA's dense one."""
    try:
        import tokamax  # pyright: ignore[reportMissingImports]  an extra, for GPUs only
    except ImportError:
        raise MoextendError(f"experts on GPUs need tokamax: {extra_hint('gpu')}") from None
    return ragged_dot(x_RD, w_parts, sizes_O, product=functools.partial(tokamax.ragged_dot, implementation="triton"))


# --- megablox ---------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def megablox(x_RD: jax.Array, w_parts: tuple[jax.Array, ...], sizes_O: jax.Array) -> jax.Array:
    """JAX's Pallas kernels for TPU. It computes a part's groups alone and leaves other rows as they are, so the parts
    share one output; the gradient of a part is computed only where it is asked for."""
    return _mask(_product(x_RD, w_parts, sizes_O, transpose=False), sizes_O)


def _forward(x_RD, w_parts, sizes_O):
    x_RD, sizes_O, values = x_RD.value, sizes_O.value, tuple(w.value for w in w_parts)
    # The rows are kept only for parts that are trained.
    return megablox(x_RD, values, sizes_O), (tuple(x_RD if w.perturbed else None for w in w_parts), values, sizes_O)


def _backward(saved, dy_RF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows_of_parts, w_parts, sizes_O = saved
    if isinstance(dy_RF, jax.custom_derivatives.SymbolicZero):
        return None, tuple(None for _ in w_parts), None
    d_parts, first = [], 0
    for x_RD, w_GDF in zip(rows_of_parts, w_parts, strict=True):
        groups, *sizes = w_GDF.shape
        d_parts.append(
            None
            if x_RD is None
            else tgmm(
                x_RD.T, dy_RF, sizes_O, w_GDF.dtype, _tiles(len(dy_RF), *sizes), jnp.int32(first), groups,
                interpret=platform() != "tpu",
            )
        )  # fmt: skip
        first += groups
    return _mask(_product(dy_RF, w_parts, sizes_O, transpose=True), sizes_O), tuple(d_parts), None


megablox.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(x_RD, w_parts, sizes_O, *, transpose: bool):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    y_RF, first = None, 0
    for w_GDF in w_parts:
        D, F = w_GDF.shape[1:][:: -1 if transpose else 1]
        y_RF = gmm(
            x_RD, w_GDF, sizes_O, x_RD.dtype, _tiles(x_RD.shape[0], D, F), jnp.int32(first),
            y_RF, transpose, platform() != "tpu",
        )  # fmt: skip
        first += w_GDF.shape[0]
    assert y_RF is not None
    return y_RF


def _tiles(R: int, D: int, F: int) -> tuple[int, int, int]:
    rows = next(tile for tile in (*ROWS, R) if R % tile == 0)
    return rows, min(COLUMNS, D), min(COLUMNS, F)


def _mask(y_RF: jax.Array, sizes_O: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(y_RF.shape[0])[:, None] < sizes_O.sum(), y_RF, 0)
