"""From leaves as they are stored to weights as they are used: the one place that casts and gathers.

A leaf is plain, and is cast to what the activations are in before it travels between devices; or it is a matrix in few
bits with its scales (`quantised.py`), which travel as they are and are multiplied out by whoever multiplies with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax

from moextend_jax.models.quantised import dequantise
from moextend_jax.parameters import element_type
from moextend_jax.sharding import Shards, gather


class FewBits(NamedTuple):
    """A frozen matrix as it is stored: integers `[..., I, O]`, and the scales of groups along I, `[..., g, O]`."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Weight = jax.Array | FewBits


def used(path: str, leaf: jax.Array, how: Shards, *, dtype: Any = None, keep: tuple[str, ...] = ()) -> jax.Array:
    """Inside `map_shards`: a leaf whole along all mesh axes but `keep`, in `dtype` (None: its own) if it is plain.

    Args:
      path: ends with the leaf's name, by which scales are known.
    """
    kind = element_type(path, dtype, stored=leaf.dtype)
    return gather(leaf if kind is None else leaf.astype(kind), how, keep=keep)


def weight_of(leaf: jax.Array, scale: jax.Array | None, dtype: Any) -> Weight:
    """A leaf and, if it has one, the leaf of its scales, as one weight."""
    return leaf.astype(dtype) if scale is None else FewBits(leaf, scale)


def plain(weight: Weight, dtype: Any) -> jax.Array:
    """Multiplied out."""
    return dequantise(*weight, dtype) if isinstance(weight, FewBits) else weight.astype(dtype)


def one_of(weight: Weight, index: jax.Array, dtype: Any) -> jax.Array:
    """The matrix of this number along the first axis, multiplied out."""
    one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), weight)
    return plain(one, dtype)


def is_frozen(weights: Any) -> bool:
    """Whether these hold integers, of which there is no gradient."""
    return any(isinstance(weight, FewBits) for weight in weights)
