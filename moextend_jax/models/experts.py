"""Experts compute: `x_TD` and a routing go in, the weighted sum of gated experts `y_TD` comes out, dropless.

Rows are sorted by expert, so that each expert sees one run of rows; pretrained and new experts are separate
parts of the weights. The combine weight enters before the down projection: the same sum, and the backward pass of a
frozen expert then needs neither its output nor a third product again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moextend_jax.config import Quantised
from moextend_jax.models.adapters import Update, low_rank
from moextend_jax.models.blocked_swiglu import Weights, blocked_swiglu
from moextend_jax.models.glu import SILU, Glu
from moextend_jax.models.grouped_matmul import grouped_matmul, without_rest
from moextend_jax.models.quantised import STORAGES
from moextend_jax.models.weights import FewBits, OfStack, Stacked, Weight, weight_of
from moextend_jax.parameters import constant, weight
from moextend_jax.sharding import platform


class Experts(nnx.Module):
    """Gated experts of stacked layers; `axes` are those of the gate: "ZEDF", or "YXDf" for new experts.

    quantised: the matrices are integers, zeros until a checkpoint is read, and each has scales beside it.
    """

    def __init__(
        self, axes: str, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str, bias: bool = False,
        quantised: Quantised | None = None,
    ):  # fmt: skip
        stack, hidden = axes[:2], axes[3]

        def matrix(contracted: str, out: str) -> tuple[nnx.Param, nnx.Param | None]:
            if quantised is None:
                return weight(stack + contracted + out, sizes, rngs=rngs, dtype=dtype), None
            groups = {"D": "a", "F": "v"}[contracted]
            in_groups = {**sizes, groups: sizes[contracted] // quantised.group}
            storage = STORAGES[quantised.kind]
            return (
                constant(stack + contracted + out, sizes, dtype=storage.dtype.name, value=0),
                constant(stack + groups + out, in_groups, dtype=storage.scale_dtype.name, value=0.0),
            )

        self.w_gate, self.w_gate_scale = matrix("D", hidden)
        self.w_up, self.w_up_scale = matrix("D", hidden)
        self.w_down, self.w_down_scale = matrix(hidden, "D")

        def made(axis: str) -> nnx.Param | None:
            return constant(stack + axis, sizes, dtype=dtype, value=0.0) if bias else None

        self.b_gate, self.b_up, self.b_down = made(hidden), made(hidden), made("D")

    def weights(self, dtype: Any, stacked: Stacked | None = None) -> Weights:
        """One layer's arrays in `dtype`, without the output bias (`bias_behind`). With `stacked`, the experts of all
        layers, matrices are not copied out of these stacks."""

        def matrix(name: str) -> Weight:
            def of(module: Experts) -> jax.Array | FewBits:
                leaf, scale = getattr(module, name), getattr(module, f"{name}_scale")
                return weight_of(leaf[...], None if scale is None else scale[...], dtype)

            return of(self) if stacked is None else OfStack(of(stacked.module), stacked.layer)

        matrices = map(matrix, ("w_gate", "w_up", "w_down"))
        biases = (param[...].astype(dtype) for param in (self.b_gate, self.b_up) if param is not None)
        return *matrices, *biases


class Sorting(NamedTuple):
    """order_R: row r of the sorted buffer is pick `order_R[r]` (token * k + slot); inverse_R undoes it.
    sizes_O: rows of each expert; those of ids past the last expert come last and belong to nobody."""

    order_R: jax.Array
    inverse_R: jax.Array
    sizes_O: jax.Array


def sort_by_expert(ids_Tk: jax.Array, *, experts: int) -> Sorting:
    ids_R = ids_Tk.reshape(-1)
    order_R = jnp.argsort(ids_R, stable=True)
    inverse_R = jnp.argsort(order_R)
    sizes_O = jnp.bincount(ids_R, length=experts + 1)[:experts]
    return Sorting(order_R, inverse_R, sizes_O.astype(jnp.int32))


def apply_experts(
    x_TD: jax.Array, ids_Tk: jax.Array, weights_Tk: jax.Array, parts: Sequence[Weights], glu: Glu = SILU,
    update: Update | None = None,
) -> jax.Array:  # fmt: skip
    """Sums each token's chosen experts by weight.

    Args:
      ids_Tk: experts are numbered 0, 1, ... through all `parts`; a larger id adds nothing (another device's expert).
      update: what adapters add to the three maps, by token; with a single part only.
    """
    top_k, experts = ids_Tk.shape[-1], sum(part[0].shape[0] for part in parts)
    with jax.named_scope("dispatch"):
        sorting = sort_by_expert(ids_Tk, experts=experts)
        x_RD = dispatch(top_k, x_TD, sorting)
        weights_R1 = weights_Tk.reshape(-1)[sorting.order_R][:, None].astype(x_TD.dtype)
    with jax.named_scope("experts"):
        if update is not None:
            update = update._replace(rank_weights_Tr=dispatch(top_k, update.rank_weights_Tr, sorting))
        y_RD = swiglu(x_RD, weights_R1, tuple(parts), sorting.sizes_O, glu, update)
    with jax.named_scope("combine"):
        return combine(top_k, y_RD, sorting)


def swiglu(
    x_RD: jax.Array, weights_R1: jax.Array, parts: tuple[Weights, ...], sizes_O: jax.Array, glu: Glu = SILU,
    update: Update | None = None,
) -> jax.Array:  # fmt: skip
    """Each sorted row through its own expert, times its combine weight; `update` is of rows."""
    assert update is None or len(parts) == 1
    if platform() == "cpu":
        return blocked_swiglu(x_RD, weights_R1, parts, sizes_O, glu, update)
    if update is not None:  # factors that all experts share would also update rows of no expert
        update = update._replace(rank_weights_Tr=without_rest(update.rank_weights_Tr, sizes_O))

    def product(rows_RD: jax.Array, weights: tuple[Weight, ...], name: str) -> jax.Array:
        """The grouped product plus the update of adapters; factors that all experts share need plain products only."""
        y_RF = grouped_matmul(rows_RD, weights, sizes_O)
        if update is None:
            return y_RF
        a, b = (getattr(update.factors, f"{factor}_{name}") for factor in "ab")
        if a.ndim == 2:
            return y_RF + low_rank(rows_RD, a, b, update.rank_weights_Tr)
        z_Rr = grouped_matmul(rows_RD, (a,), sizes_O) * update.rank_weights_Tr
        return y_RF + grouped_matmul(z_Rr, (b,), sizes_O)

    w_gate, w_up, w_down, *biases = zip(*parts, strict=True)
    gate_RF = checkpoint_name(product(x_RD, w_gate, "gate"), "gate")
    up_RF = checkpoint_name(product(x_RD, w_up, "up"), "up")
    if biases:
        expert_R = jnp.repeat(jnp.arange(len(sizes_O)), sizes_O, total_repeat_length=len(x_RD))
        gate_RF, up_RF = (
            made_RF + rows_of(jnp.concatenate(bias), expert_R)
            for made_RF, bias in zip((gate_RF, up_RF), biases, strict=True)
        )
    return product(glu(gate_RF, up_RF) * weights_R1, w_down, "down")


def bias_behind(ids_Tk: jax.Array, weights_Tk: jax.Array, b_OD: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts' output biases, [T, D]. Ids past the last expert add nothing."""
    weights_TO = (jax.nn.one_hot(ids_Tk, len(b_OD), dtype=weights_Tk.dtype) * weights_Tk[..., None]).sum(axis=1)
    return weights_TO.astype(b_OD.dtype) @ b_OD


@jax.custom_vjp
def rows_of(b_OF: jax.Array, expert_R: jax.Array) -> jax.Array:
    """`b_OF[expert_R]`, whose backward pass is a product: on GPUs thousands of rows would be added one by one to the
    same few (docs/benchmarks.md)."""
    return b_OF[expert_R]


def _rows_of_backward(saved: tuple[jax.Array, jax.Array], dy_RF: jax.Array) -> tuple[jax.Array, None]:
    expert_R, b_OF = saved
    one_hot_RO = jax.nn.one_hot(expert_R, len(b_OF), dtype=dy_RF.dtype)
    db_OF = jnp.einsum("RO,RF->OF", one_hot_RO, dy_RF, preferred_element_type=jnp.float32)
    return db_OF.astype(b_OF.dtype), None


rows_of.defvjp(lambda b_OF, expert_R: (b_OF[expert_R], (expert_R, b_OF)), _rows_of_backward)


# Dispatch and combine are transposes of each other. With custom gradients that use this, the backward pass gathers
# instead of scattering, which both CPU and TPU do many times faster.


def _dispatch(top_k: int, x_TD: jax.Array, sorting: Sorting) -> jax.Array:
    return x_TD[sorting.order_R // top_k]


def _combine(top_k: int, y_RD: jax.Array, sorting: Sorting) -> jax.Array:
    y_TkD = y_RD[sorting.inverse_R].reshape(-1, top_k, y_RD.shape[-1])
    return y_TkD.sum(axis=1)


dispatch = jax.custom_vjp(_dispatch, nondiff_argnums=(0,))
combine = jax.custom_vjp(_combine, nondiff_argnums=(0,))
dispatch.defvjp(
    lambda top_k, x_TD, sorting: (_dispatch(top_k, x_TD, sorting), sorting),
    lambda top_k, sorting, dx_RD: (_combine(top_k, dx_RD, sorting), None),
)
combine.defvjp(
    lambda top_k, y_RD, sorting: (_combine(top_k, y_RD, sorting), sorting),
    lambda top_k, sorting, dy_TD: (_dispatch(top_k, dy_TD, sorting), None),
)
