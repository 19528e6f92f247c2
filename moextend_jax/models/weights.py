"""From leaves as they are stored to weights as they are used: the one place that casts and gathers.

A plain leaf is cast to the activations' dtype before it is gathered. A quantised matrix and its scales (`quantised.py`)
are gathered as stored, and dequantised by the product that uses them. Either may be frozen and read in place from the
stack of all layers.
"""

from __future__ import annotations

from contextlib import nullcontext
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


class OfStack(NamedTuple):
    """One layer's frozen matrices [G, I, O] in the stack of all layers, [Z, G, I, O]: a kernel or a loop that reads
    them there needs no copy of them."""

    stack: jax.Array | FewBits
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def layers(self) -> int:
        return self.stack.shape[0]


Weight = jax.Array | FewBits | OfStack


class Stacked(NamedTuple):
    """The module of a stack of layers, frozen, and which layer is meant."""

    module: Any
    layer: jax.Array


def used(path: str, leaf: jax.Array, how: Shards, *, dtype: Any = None, keep: tuple[str, ...] = ()) -> jax.Array:
    """Inside `map_shards`: a leaf whole along all mesh axes but `keep`, in `dtype` (None: its own) if it is plain.

    Args:
      path: ends with the leaf's name, by which scales are known.
    """
    kind = element_type(path, dtype, stored=leaf.dtype)
    return gather(leaf if kind is None else leaf.astype(kind), how, keep=keep)


def weight_of(leaf: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array | FewBits:
    """A leaf and, if it has one, the leaf of its scales, as one weight."""
    return leaf.astype(dtype) if scale is None else FewBits(leaf, scale)


def in_groups(weight: Weight) -> tuple[jax.Array | FewBits, jax.Array | int]:
    """Matrices [groups, I, O], for a stack those of all layers, and the index of the weight's first one."""
    if not isinstance(weight, OfStack):
        return weight, 0
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), weight.stack), weight.layer * weight.shape[0]


def alone(weight: Weight) -> jax.Array | FewBits:
    """The weight, out of its stack."""
    return _at(weight.stack, weight.layer) if isinstance(weight, OfStack) else weight


def reading(weight: Weight) -> Any:
    """A name scope around a kernel; `plan/hlo.py` reads in it how much of its operand, a stack, the kernel reads."""
    return jax.named_scope(f"one_of_{weight.layers}_layers") if isinstance(weight, OfStack) else nullcontext()


def plain(weight: Weight, dtype: Any) -> jax.Array:
    """The weight, dequantised."""
    weight = alone(weight)
    return dequantise(*weight, dtype) if isinstance(weight, FewBits) else weight.astype(dtype)


def one_of(weight: Weight, index: jax.Array, dtype: Any) -> jax.Array:
    """The matrix of this index along the first axis, dequantised."""
    matrices, first = in_groups(weight)
    return plain(_at(matrices, first + index), dtype)


def _at(weight: jax.Array | FewBits, index: jax.Array) -> jax.Array | FewBits:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), weight)


def is_frozen(weights: Any) -> bool:
    """Whether these weights have no gradient."""
    return any(isinstance(weight, FewBits | OfStack) for weight in weights)
