"""Matrix products of rows sorted by group, one weight matrix per group: `x_RD, (w_GDF, ...), sizes -> y_RF`.

Every backend obeys one contract. The groups of all parts of the weights count on from each other, so pretrained
and new experts stay separate arrays; rows past the sum of the sizes give zeros; only the FLOPs of real rows are
spent, never one product per group and row. Backward computes a part's weight gradient only if somebody uses it:
the compiler drops the loop of a frozen part.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256
"""Rows per product on CPU. 256 and 512 were within noise of each other and ahead of 64 and 128 (docs/benchmarks.md)."""


def grouped_matmul(x_RD: jax.Array, w_parts: Sequence[jax.Array], sizes_O: jax.Array) -> jax.Array:
    """Multiplies each row by the matrix of its group.

    Args:
      x_RD: rows, sorted so that group 0 comes first, then group 1, ...
      w_parts: arrays `[groups, D, F]`; group ids run on from one part to the next.
      sizes_O: int32, rows of each group over all parts; their sum is at most R.

    Returns:
      `y_RF` in x's dtype; rows past `sum(sizes_O)` are zero.
    """
    w_parts = tuple(w_GDF.astype(x_RD.dtype) for w_GDF in w_parts)
    if jax.default_backend() == "cpu":
        return _blocked(x_RD, w_parts, sizes_O)
    return _ragged_dot(x_RD, w_parts, sizes_O)


def _ragged_dot(x_RD: jax.Array, w_parts: tuple[jax.Array, ...], sizes_O: jax.Array) -> jax.Array:
    y_RF, first, start = None, 0, jnp.int32(0)
    for w_GDF in w_parts:
        sizes_G = sizes_O[first : first + w_GDF.shape[0]]
        # ragged_dot starts at row 0: bring the part's rows there and back.
        part_RF = jnp.roll(lax.ragged_dot(jnp.roll(x_RD, -start, axis=0), w_GDF, sizes_G), start, axis=0)
        y_RF = part_RF if y_RF is None else y_RF + part_RF
        first, start = first + w_GDF.shape[0], start + sizes_G.sum()
    assert y_RF is not None
    return y_RF


@jax.custom_vjp
def _blocked(x_RD: jax.Array, w_parts: tuple[jax.Array, ...], sizes_O: jax.Array) -> jax.Array:
    return _blocked_products(x_RD, w_parts, sizes_O)


def _blocked_fwd(x_RD, w_parts, sizes_O):
    return _blocked_products(x_RD, w_parts, sizes_O), (x_RD, w_parts, sizes_O)


def _blocked_bwd(saved, dy_RF):
    x_RD, w_parts, sizes_O = saved
    dx_RD = _blocked_products(dy_RF, w_parts, sizes_O, transpose=True)
    dw_parts, first = [], 0
    for w_GDF in w_parts:
        dw_parts.append(_blocked_weight_gradient(x_RD, dy_RF, w_GDF, sizes_O, first))
        first += w_GDF.shape[0]
    return dx_RD, tuple(dw_parts), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _pad_rows(x_RD: jax.Array, block: int) -> jax.Array:
    """A block that starts at the last row may read and write this far."""
    return jnp.pad(x_RD, ((0, block), (0, 0)))


def _blocked_products(x_RD, w_parts, sizes_O, *, transpose: bool = False):
    """Groups in order, each in blocks of rows; what a block writes past its group the next group overwrites."""
    R = x_RD.shape[0]
    block = min(BLOCK, R)
    x_padded_RD = _pad_rows(x_RD, block)
    ends_O = jnp.cumsum(sizes_O)
    starts_O = ends_O - sizes_O
    y_RF = jnp.zeros((R + block, w_parts[0].shape[1 if transpose else 2]), x_RD.dtype)
    first = 0
    for w_GDF in w_parts:

        def one_group(g, y_RF, w_GDF=w_GDF, first=first):
            w_DF = lax.dynamic_index_in_dim(w_GDF, g, keepdims=False)
            start, size = starts_O[first + g], sizes_O[first + g]

            def one_block(i, y_RF):
                row = start + i * block
                x_bD = lax.dynamic_slice_in_dim(x_padded_RD, row, block)
                y_bF = lax.dot_general(x_bD, w_DF, (((1,), (1 if transpose else 0,)), ((), ())))
                return lax.dynamic_update_slice_in_dim(y_RF, y_bF, row, axis=0)

            return lax.fori_loop(0, -(-size // block), one_block, y_RF)

        y_RF = lax.fori_loop(0, w_GDF.shape[0], one_group, y_RF)
        first += w_GDF.shape[0]
    rows_R1 = jnp.arange(R)[:, None]
    return jnp.where(rows_R1 < ends_O[-1], y_RF[:R], 0)


def _blocked_weight_gradient(x_RD, dy_RF, w_GDF, sizes_O, first: int):
    block = min(BLOCK, x_RD.shape[0])
    x_RD, dy_RF = _pad_rows(x_RD, block), _pad_rows(dy_RF, block)
    starts_O = jnp.cumsum(sizes_O) - sizes_O

    def one_group(g):
        start, size = starts_O[first + g], sizes_O[first + g]

        def one_block(i, dw_DF):
            row = start + i * block
            mine_b1 = jnp.arange(block)[:, None] < size - i * block
            x_bD = jnp.where(mine_b1, lax.dynamic_slice_in_dim(x_RD, row, block), 0)
            dy_bF = jnp.where(mine_b1, lax.dynamic_slice_in_dim(dy_RF, row, block), 0)
            return dw_DF + lax.dot_general(x_bD, dy_bF, (((0,), (0,)), ((), ())))

        return lax.fori_loop(0, -(-size // block), one_block, jnp.zeros(w_GDF.shape[1:], w_GDF.dtype))

    return lax.map(one_group, jnp.arange(w_GDF.shape[0]))
