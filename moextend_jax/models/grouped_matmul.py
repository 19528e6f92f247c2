"""Matrix products of rows sorted by group on TPU and GPU: `x_RD, (w_GDF, ...), sizes -> y_RF`.

The groups of all parts of the weights count on from each other, so pretrained and new experts stay separate arrays;
rows past the sum of the sizes give zeros. On CPU, where `ragged_dot` is dense over the groups, experts go through
blocked_swiglu.py instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def grouped_matmul(x_RD: jax.Array, w_parts: Sequence[jax.Array], sizes_O: jax.Array) -> jax.Array:
    """Multiplies each row by the matrix of its group.

    Args:
      x_RD: rows, sorted so that group 0 comes first, then group 1, ...
      w_parts: arrays `[groups, D, F]`; group ids run on from one part to the next.
      sizes_O: int32, rows of each group over all parts; their sum is at most R.

    Returns:
      `y_RF` in x's dtype; rows past `sum(sizes_O)` are zero.
    """
    y_RF, first, start = jnp.zeros((x_RD.shape[0], w_parts[0].shape[-1]), x_RD.dtype), 0, jnp.int32(0)
    for w_GDF in w_parts:
        sizes_G = sizes_O[first : first + w_GDF.shape[0]]
        # ragged_dot starts at row 0: bring the part's rows there and back.
        rolled_RD = jnp.roll(x_RD, -start, axis=0)
        y_RF += jnp.roll(lax.ragged_dot(rolled_RD, w_GDF.astype(x_RD.dtype), sizes_G), start, axis=0)
        first, start = first + w_GDF.shape[0], start + sizes_G.sum()
    return y_RF
