"""The experts' gated units on CPU, in blocks of sorted rows: `x_RD, weights_R1, parts, sizes_O -> y_RD`.

XLA has no grouped product on CPU (`ragged_dot` is dense over the experts), so each expert's rows go through its three
matrices block by block, in loops whose lengths are the real numbers of rows. One loop does the whole unit of a block
while it is in cache, and its hand-written backward pass keeps only the gate and up products of the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moextend_jax.models.adapters import Factors, Update, low_rank
from moextend_jax.models.glu import SILU, Glu
from moextend_jax.models.weights import Weight, is_frozen, one_of

LARGE, BLOCK, LEAST = 256, 64, 4
"""Rows per matrix product. An expert's rows go in blocks of `LARGE` while those last, which cores share best, then in
blocks of about the average number of rows per expert, between `LEAST` and `BLOCK`: on average half a block per expert
is wasted, which would be most of the work with many small experts (docs/benchmarks.md). Block sizes depend on shapes
alone, never on the data, so that a row's result does not depend on the other rows. Products of fewer than `BLOCK` rows
round differently, so `LARGE` blocks are used only together with blocks of `BLOCK`."""

Weights = tuple[Weight, ...]
"""w_GDF of the gate, w_GDF up, w_GFD down of one part, and where experts have them the biases b_GF of gate and up;
group numbers run on from one part to the next."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_swiglu(
    x_RD: jax.Array, weights_R1: jax.Array, parts: tuple[Weights, ...], sizes_O: jax.Array, glu: Glu = SILU,
    update: Update | None = None,
) -> jax.Array:  # fmt: skip
    """Each sorted row through the expert of its group, times its combine weight; rows past the last group give zeros.

    Args:
      x_RD: rows, those of group 0 first, then group 1, ...; what stands past `sum(sizes_O)` has no effect.
      sizes_O: int32, rows of each group over all parts.
      update: what adapters add to the three maps, by row; with a single part only.
    """
    return _forward(x_RD, weights_R1, parts, sizes_O, glu, update)[0]


def _forward(x_RD, weights_R1, parts, sizes_O, glu, update):
    (R, D), F = x_RD.shape, parts[0][0].shape[-1]
    rows = _Rows(sizes_O, R, x_RD.dtype)
    x_RD, padded_R1, update = rows.pad(x_RD), rows.pad(weights_R1), rows.pad_weights(update)

    def one_block(carry, block, weights, low):
        y_RD, gate_RF, up_RF = carry
        w_gate_DF, w_up_DF, w_down_FD, *biases = weights
        x_bD = rows.read(x_RD, block)
        gate_bF, up_bF = x_bD @ w_gate_DF, x_bD @ w_up_DF
        if update is not None and low is not None:
            m_br = rows.read(update.rank_weights_Tr, block)
            gate_bF += low_rank(x_bD, low.a_gate, low.b_gate, m_br)
            up_bF += low_rank(x_bD, low.a_up, low.b_up, m_br)
        if biases:
            gate_bF, up_bF = gate_bF + biases[0][None], up_bF + biases[1][None]
        hidden_bF = glu(gate_bF, up_bF) * rows.read(padded_R1, block)
        y_bD = hidden_bF @ w_down_FD
        if update is not None and low is not None:
            m_br = rows.read(update.rank_weights_Tr, block)
            y_bD += low_rank(hidden_bF, low.a_down, low.b_down, m_br)
        return rows.write(y_RD, y_bD, block), rows.write(gate_RF, gate_bF, block), rows.write(up_RF, up_bF, block)

    start = (rows.zeros(D, x_RD), *[rows.zeros(F, x_RD)] * 2)
    y_RD, gate_RF, up_RF = rows.for_each_block(one_block, start, parts, update)
    return rows.cut(y_RD), (x_RD, padded_R1, gate_RF, up_RF, parts, sizes_O, update)


def _backward(glu, saved, dy_RD):
    x_RD, weights_R1, gate_RF, up_RF, parts, sizes_O, update = saved
    rows = _Rows(sizes_O, dy_RD.shape[0], dy_RD.dtype)
    dy_RD = rows.pad(dy_RD)

    def inner(block, w_down_FD, low):
        """Of one block: the weighted hidden units, and the gradients of gate, up and the combine weight."""
        gate_bF, up_bF, weight_b1 = (rows.read(array, block) for array in (gate_RF, up_RF, weights_R1))
        hidden_bF, pull = glu.with_pull(gate_bF, up_bF)
        dy_bD = rows.read(dy_RD, block)
        d_hidden_bF = _times_transposed(dy_bD, w_down_FD)
        if low is not None:
            d_hidden_bF += low_rank(dy_bD, low.b_down.T, low.a_down.T, rows.read(update.rank_weights_Tr, block))
        d_weight_b1 = (d_hidden_bF * hidden_bF).sum(axis=1, keepdims=True)
        return hidden_bF * weight_b1, *pull(d_hidden_bF * weight_b1), d_weight_b1

    def to_the_rows(carry, block, weights, low):
        dx_RD, d_weights_R1, dm_Rr = carry
        w_gate_DF, w_up_DF, w_down_FD, *_ = weights
        hidden_bF, d_gate_bF, d_up_bF, d_weight_b1 = inner(block, w_down_FD, low)
        dx_bD = _times_transposed(d_gate_bF, w_gate_DF) + _times_transposed(d_up_bF, w_up_DF)
        if low is not None:
            m_br = rows.read(update.rank_weights_Tr, block)
            dx_bD += low_rank(d_gate_bF, low.b_gate.T, low.a_gate.T, m_br)
            dx_bD += low_rank(d_up_bF, low.b_up.T, low.a_up.T, m_br)
            dm_br = jnp.zeros_like(m_br)
            for inputs, outputs, a, b in of_maps(low, block, hidden_bF, d_gate_bF, d_up_bF, rows.read(dy_RD, block)):
                of_map_br = (inputs @ a) * _times_transposed(outputs, b)
                dm_br += of_map_br if m_br.shape[1] > 1 else of_map_br.sum(axis=1, keepdims=True)
            dm_Rr = rows.write(dm_Rr, dm_br, block)
        return rows.write(dx_RD, dx_bD, block), rows.write(d_weights_R1, d_weight_b1, block), dm_Rr

    def of_maps(low, block, hidden_bF, d_gate_bF, d_up_bF, dy_bD):
        """For each of the three maps: its input, the gradient of its output, and its factors."""
        x_bD = rows.read(x_RD, block)
        maps = ((x_bD, d_gate_bF), (x_bD, d_up_bF), (hidden_bF, dy_bD))
        return [(*both, low[2 * n], low[2 * n + 1]) for n, both in enumerate(maps)]

    def to_the_factors(carry, block, weights, low, mine_b1):
        dy_bD, m_br = (jnp.where(mine_b1, rows.read(array, block), 0) for array in (dy_RD, update.rank_weights_Tr))
        hidden_bF, d_gate_bF, d_up_bF, _ = inner(block, weights[2], low)
        gradients = []
        for inputs, outputs, a, b in of_maps(low, block, hidden_bF, d_gate_bF, d_up_bF, dy_bD):
            gradients += [inputs.T @ (_times_transposed(outputs, b) * m_br), ((inputs @ a) * m_br).T @ outputs]
        return jax.tree.map(jnp.add, carry, Factors(*gradients))

    def to_the_weights(carry, block, weights, low, mine_b1):
        x_bD, dy_bD = (jnp.where(mine_b1, rows.read(array, block), 0) for array in (x_RD, dy_RD))
        hidden_bF, d_gate_bF, d_up_bF, _ = (jnp.where(mine_b1, array, 0) for array in inner(block, weights[2], low))
        products = (x_bD.T @ d_gate_bF, x_bD.T @ d_up_bF, hidden_bF.T @ dy_bD)
        if len(weights) > 3:
            products += (d_gate_bF.sum(axis=0), d_up_bF.sum(axis=0))
        return jax.tree.map(jnp.add, carry, products)

    no_update = update is None
    start = (
        rows.zeros(x_RD.shape[1], x_RD),
        rows.zeros(1, x_RD),
        None if no_update else jnp.zeros_like(update.rank_weights_Tr),
    )
    dx_RD, d_weights_R1, dm_Rr = rows.for_each_block(to_the_rows, start, parts, update)
    # A loop of its own: the compiler drops it for frozen parts, whose gradient nobody reads.
    d_parts = rows.sum_by_group(to_the_weights, parts, update)
    d_update = None
    if update is not None:
        (d_factors,) = rows.sum_by_group(to_the_factors, parts, update, like=lambda weights, low: low)
        shared = update.factors.a_gate.ndim == 2
        d_update = Update(
            jax.tree.map(lambda leaf: leaf.sum(axis=0), d_factors) if shared else d_factors, rows.cut(dm_Rr)
        )
    return rows.cut(dx_RD), rows.cut(d_weights_R1), d_parts, None, d_update


blocked_swiglu.defvjp(_forward, _backward)


def _times_transposed(x_bF: jax.Array, w_DF: jax.Array) -> jax.Array:
    return lax.dot_general(x_bF, w_DF, (((1,), (1,)), ((), ())))


class _Block(NamedTuple):
    first: jax.Array
    rows: int


class _Rows:
    """Blocks of the sorted rows. A group's last block may reach into the next group, which overwrites it later."""

    def __init__(self, sizes_O: jax.Array, R: int, dtype: Any):
        average = 1 << (R // len(sizes_O)).bit_length()
        self.R, self.dtype, self.last = R, dtype, min(max(average, LEAST), BLOCK, R)
        self.sizes = (LARGE, BLOCK) if self.last == BLOCK and R >= LARGE else (self.last,)
        self.ends_O = jnp.cumsum(sizes_O)
        self.starts_O = self.ends_O - sizes_O

    def pad(self, x_RD: jax.Array) -> jax.Array:
        """Room for a block that starts at the last row; zeros there and in rows of no group, which may hold NaN."""
        real_R1 = jnp.arange(self.R)[:, None] < self.ends_O[-1]
        return jnp.pad(jnp.where(real_R1, x_RD, 0), ((0, self.last), (0, 0)))

    def pad_weights(self, update: Update | None) -> Update | None:
        return update if update is None else update._replace(rank_weights_Tr=self.pad(update.rank_weights_Tr))

    def zeros(self, width: int, like: jax.Array) -> jax.Array:
        return jnp.zeros((self.R + self.last, width), like.dtype)

    def cut(self, x_RD: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(self.R)[:, None] < self.ends_O[-1], x_RD[: self.R], 0)

    def read(self, x_RD: jax.Array, block: _Block) -> jax.Array:
        return lax.dynamic_slice_in_dim(x_RD, *block)

    def write(self, x_RD: jax.Array, x_bD: jax.Array, block: _Block) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x_RD, x_bD, block.first, axis=0)

    def for_each_block(self, body: Callable, carry: Any, parts: tuple[Weights, ...], update: Update | None) -> Any:
        """`body(carry, block, weights of the block's group, factors of it)` over all blocks of all groups, in order."""
        first = 0
        for part in parts:

            def one_group(group, carry, part=part, first=first):
                own = self.of_group(part, group, update)
                return self.in_blocks(first + group, lambda carry, block: body(carry, block, *own), carry)

            carry = lax.fori_loop(0, part[0].shape[0], one_group, carry)
            first += part[0].shape[0]
        return carry

    def sum_by_group(
        self, body: Callable, parts: tuple[Weights, ...], update: Update | None, *,
        like: Callable[..., Any] | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Sums `body(sum, block, weights, factors, mine_b1)` over each group's blocks; mine_b1 is false past its end.

        Args:
          like: gives the sum's structure from a group's weights and factors; None: that of the weights, and no sum for
            frozen parts.
        """
        sums, first = [], 0
        for part in parts:
            if like is None and is_frozen(part):
                sums.append(None)
                first += part[0].shape[0]
                continue

            def one_group(group, part=part, first=first):
                own, end = self.of_group(part, group, update), self.ends_O[first + group]

                def one_block(carry, block):
                    mine_b1 = block.first + jnp.arange(block.rows)[:, None] < end
                    return body(carry, block, *own, mine_b1)

                kinds = own[0] if like is None else like(*own)
                start_at = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), kinds)  # of many blocks
                total = self.in_blocks(first + group, one_block, start_at)
                return jax.tree.map(lambda leaf, kind: leaf.astype(kind.dtype), total, kinds)

            sums.append(lax.map(one_group, jnp.arange(part[0].shape[0])))
            first += part[0].shape[0]
        return tuple(sums)

    def of_group(
        self, part: Weights, group: jax.Array, update: Update | None
    ) -> tuple[tuple[jax.Array, ...], Factors | None]:
        weights = tuple(one_of(weight, group, self.dtype) for weight in part)
        if update is None or update.factors.a_gate.ndim == 2:
            return weights, update and update.factors
        return weights, Factors(*(one_of(factor, group, self.dtype) for factor in update.factors))

    def in_blocks(self, group: jax.Array, body: Callable[[Any, _Block], Any], carry: Any) -> Any:
        """`body(carry, block)` over a group's blocks: whole large ones, then the rest, of which the last may reach past
        the group."""
        first, end = self.starts_O[group], self.ends_O[group]
        for rows in self.sizes:
            count = (end - first) // rows if rows > self.last else -(-(end - first) // rows)

            def one_block(i, carry, first=first, rows=rows):
                return body(carry, _Block(first + i * rows, rows))

            carry = lax.fori_loop(0, count, one_block, carry)
            first += count * rows
        return carry
