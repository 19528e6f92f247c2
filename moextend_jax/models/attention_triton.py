"""Causal grouped-query attention on NVIDIA GPUs by Pallas kernels for Triton: `query_BSNH, keys, values -> y_BSNH`.

FlashAttention's arithmetic (Dao et al. 2022): no weights of all pairs exist. Keys before a conversation or a window are
not read, so packed rows cost what their conversations cost. The same on every GPU and where there is none: a program
compiled ahead of time is the one that runs. Logarithms and exponentials are of base 2 inside.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moextend_jax.models.tiles import call, roomy


class Tile(NamedTuple):
    """One program's queries, and how many keys it reads at a time; for gradients of keys the other way round."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD, GRADIENT = Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)
"""The fastest of 8 and of 9 on an H100, heads of 128 in bfloat16 (docs/benchmarks.md)."""
SMALL = Tile(32, 32, 4, 1)
"""For heads of more bytes, or a GPU with less shared memory."""
LARGEST = 256
"""Bytes of a head that the large tiles have room for."""
EVEN = 64
"""Rows are padded to a multiple of it, which all tile sizes divide."""
LOG2_E = math.log2(math.e)
LOWEST = -1e30
"""A logit of what is not seen."""
NOBODY = -(2**30)
"""`reads` of padding; its `read_by` is one less. No conversation has these numbers."""


def causal_attention(
    query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, reads_BS: jax.Array, read_by_BS: jax.Array, *,
    window: jax.Array | int | None = None, sinks_N: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attention in which a position sees those up to itself, of the last `window`, whose `read_by` equals its `reads`
    (`attention.conversations`). Positions with equal `reads` must be contiguous. sinks_N: for each head, the logit of
    one more key, whose value is zero."""
    S, H = query_BSNH.shape[1], query_BSNH.shape[3]
    rest, room = -S % EVEN, max(16, pl.next_power_of_2(H)) - H
    window_1 = jnp.full(1, S + rest if window is None else window, jnp.int32)
    arrays = (jnp.pad(array, ((0, 0), (0, rest), (0, 0), (0, room))) for array in (query_BSNH, key_BSKH, value_BSKH))
    ids = ((reads_BS, NOBODY), (read_by_BS, NOBODY - 1))
    reads_BS, read_by_BS = (
        jnp.pad(id_BS.astype(jnp.int32), ((0, 0), (0, rest)), constant_values=nobody) for id_BS, nobody in ids
    )
    sight = Sight(reads_BS, read_by_BS, *_runs(reads_BS), window_1)
    return cast(jax.Array, _attention(H, *arrays, sight, sinks_N))[:, :S, :, :H]


class Sight(NamedTuple):
    """reads, read_by: of `conversations`. start, end (exclusive): of the run of equal `reads`. window: in tokens."""

    reads_BS: jax.Array
    read_by_BS: jax.Array
    start_BS: jax.Array
    end_BS: jax.Array
    window_1: jax.Array


def _runs(reads_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each position the start of its run of equal numbers, and its end (exclusive)."""
    position_S, differs = jnp.arange(reads_BS.shape[1], dtype=jnp.int32), reads_BS[:, 1:] != reads_BS[:, :-1]
    first_BS, last_BS = (jnp.pad(differs, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    start_BS = lax.cummax(jnp.where(first_BS, position_S[None], 0), axis=1)
    return start_BS, lax.cummin(jnp.where(last_BS, position_S[None] + 1, len(position_S)), axis=1, reverse=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(size: int, query_BSNH, key_BSKH, value_BSKH, sight: Sight, sinks_N):
    """size: of a head, without its padding."""
    return _forward(size, query_BSNH, key_BSKH, value_BSKH, sight, sinks_N)[0]


def _forward(size, query_BSNH, key_BSKH, value_BSKH, sight: Sight, sinks_N):
    B, S, N, _ = query_BSNH.shape
    inputs = (query_BSNH, key_BSKH, value_BSKH, *sight, sinks_N)
    tile = _fitting(FORWARD, query_BSNH)
    kernel = functools.partial(_forward_kernel, scale=size**-0.5, tile=tile)
    out = (query_BSNH, jax.ShapeDtypeStruct((B, N, S), jnp.float32))
    grid = (S // tile.queries, N, B)
    y_BSNH, norm_BNS = call(kernel, inputs, out, grid, warps=tile.warps, stages=tile.stages,
                            name="triton_attention_forward")  # fmt: skip
    y_BSNH, norm_BNS = (checkpoint_name(array, "attended") for array in (y_BSNH, norm_BNS))
    return y_BSNH, (*inputs, y_BSNH, norm_BNS)


def _backward(size, saved, dy_BSNH):
    *inputs, y_BSNH, norm_BNS = saved
    query_BSNH, key_BSKH, value_BSKH, *_, sinks_N = inputs
    (B, S, N, _), K = query_BSNH.shape, key_BSKH.shape[2]
    mean_BNS = (dy_BSNH.astype(jnp.float32) * y_BSNH.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    tile = _fitting(GRADIENT, query_BSNH)
    inputs = (*inputs, dy_BSNH, norm_BNS, mean_BNS)

    def run(kernel, out, grid, name: str):
        return call(functools.partial(kernel, scale=size**-0.5, tile=tile), inputs, out, grid, warps=tile.warps,
                    stages=tile.stages, name=name)  # fmt: skip

    d_query = run(_query_gradient_kernel, query_BSNH, (S // tile.queries, N, B), "triton_attention_query")
    grid = (S // tile.keys, K, B)
    d_key, d_value = run(_key_gradient_kernel, (key_BSKH, value_BSKH), grid, "triton_attention_key")
    d_sinks = None
    if sinks_N is not None:
        to_sink_BNS = jnp.exp2(sinks_N.astype(jnp.float32)[None, :, None] * LOG2_E - norm_BNS)
        d_sinks = -(to_sink_BNS * mean_BNS).sum(axis=(0, 2)).astype(sinks_N.dtype)
    return d_query, d_key, d_value, None, d_sinks


_attention.defvjp(_forward, _backward)


def _fitting(tile: Tile, query_BSNH: jax.Array) -> Tile:
    return tile if roomy() and query_BSNH.shape[-1] * query_BSNH.dtype.itemsize <= LARGEST else SMALL


# --- kernels ----------------------------------------------------------------------------------------------------------


def _forward_kernel(
    q_ref, k_ref, v_ref, reads_ref, by_ref, start_ref, end_ref, window_ref, *refs, scale: float, tile: Tile
):
    sinks_ref, y_ref, norm_ref = refs
    block, n, b = (pl.program_id(axis) for axis in range(3))
    first, window = block * tile.queries, window_ref[0]
    rows, group, H = pl.ds(first, tile.queries), q_ref.shape[2] // k_ref.shape[2], q_ref.shape[3]
    q = plgpu.load(q_ref.at[b, rows, n, :])
    reads, row = plgpu.load(reads_ref.at[b, rows]), first + jnp.arange(tile.queries)

    def add(j, carry):
        acc, top, total = carry
        keys = pl.ds(j * tile.keys, tile.keys)
        k, v = (plgpu.load(ref.at[b, keys, n // group, :]) for ref in (k_ref, v_ref))
        key = j * tile.keys + jnp.arange(tile.keys)
        seen = _seen(reads[:, None], plgpu.load(by_ref.at[b, keys])[None, :], row[:, None], key[None, :], window)
        logits = jnp.where(seen, plgpu.dot(q, k.T) * (scale * LOG2_E), LOWEST)
        higher = jnp.maximum(top, logits.max(axis=1))
        weights = jnp.where(seen, jnp.exp2(logits - higher[:, None]), 0)
        shrunk = jnp.exp2(top - higher)
        acc = acc * shrunk[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return acc, higher, total * shrunk + weights.sum(axis=1)

    top, total = jnp.full(tile.queries, LOWEST, jnp.float32), jnp.zeros(tile.queries, jnp.float32)
    if sinks_ref is not None:
        top, total = jnp.full(tile.queries, sinks_ref[n].astype(jnp.float32) * LOG2_E), total + 1
    start = jnp.zeros((tile.queries, H), jnp.float32), top, total
    nearest = jnp.maximum(first - window + 1, start_ref[b, first]) // tile.keys
    acc, top, total = lax.fori_loop(nearest, _up(first + tile.queries, tile.keys), add, start)
    total = jnp.where(total == 0, 1, total)  # of padding, which sees nothing
    plgpu.store(y_ref.at[b, rows, n, :], (acc / total[:, None]).astype(y_ref.dtype))
    plgpu.store(norm_ref.at[b, n, rows], top + jnp.log2(total))


def _query_gradient_kernel(
    q_ref, k_ref, v_ref, reads_ref, by_ref, start_ref, end_ref, window_ref, *refs, scale: float, tile: Tile
):  # fmt: skip
    *_, dy_ref, norm_ref, mean_ref, dq_ref = refs
    block, n, b = (pl.program_id(axis) for axis in range(3))
    first, window = block * tile.queries, window_ref[0]
    rows, group, H = pl.ds(first, tile.queries), q_ref.shape[2] // k_ref.shape[2], q_ref.shape[3]
    q, dy = (plgpu.load(ref.at[b, rows, n, :]) for ref in (q_ref, dy_ref))
    norm, mean = (plgpu.load(ref.at[b, n, rows])[:, None] for ref in (norm_ref, mean_ref))
    reads, row = plgpu.load(reads_ref.at[b, rows]), first + jnp.arange(tile.queries)

    def add(j, acc):
        keys = pl.ds(j * tile.keys, tile.keys)
        k, v = (plgpu.load(ref.at[b, keys, n // group, :]) for ref in (k_ref, v_ref))
        key = j * tile.keys + jnp.arange(tile.keys)
        seen = _seen(reads[:, None], plgpu.load(by_ref.at[b, keys])[None, :], row[:, None], key[None, :], window)
        weights = jnp.where(seen, jnp.exp2(plgpu.dot(q, k.T) * (scale * LOG2_E) - norm), 0)
        d_logits = weights * (plgpu.dot(dy, v.T) - mean)
        return acc + plgpu.dot(d_logits.astype(k.dtype), k)

    nearest = jnp.maximum(first - window + 1, start_ref[b, first]) // tile.keys
    start = jnp.zeros((tile.queries, H), jnp.float32)
    acc = lax.fori_loop(nearest, _up(first + tile.queries, tile.keys), add, start) * scale
    plgpu.store(dq_ref.at[b, rows, n, :], acc.astype(dq_ref.dtype))


def _key_gradient_kernel(
    q_ref, k_ref, v_ref, reads_ref, by_ref, start_ref, end_ref, window_ref, *refs, scale: float, tile: Tile
):
    *_, dy_ref, norm_ref, mean_ref, dk_ref, dv_ref = refs
    block, head, b = (pl.program_id(axis) for axis in range(3))
    first, window = block * tile.keys, window_ref[0]
    keys, group, H = pl.ds(first, tile.keys), q_ref.shape[2] // k_ref.shape[2], q_ref.shape[3]
    k, v = (plgpu.load(ref.at[b, keys, head, :]) for ref in (k_ref, v_ref))
    read_by, key = plgpu.load(by_ref.at[b, keys]), first + jnp.arange(tile.keys)
    # Queries from here on see none of these keys.
    last = jnp.minimum(first + tile.keys - 1 + window, end_ref[b, first + tile.keys - 1])

    def of_query_head(g, carry):
        n = head * group + g

        def add(i, carry):
            dk, dv = carry
            rows = pl.ds(i * tile.queries, tile.queries)
            q, dy = (plgpu.load(ref.at[b, rows, n, :]) for ref in (q_ref, dy_ref))
            norm, mean = (plgpu.load(ref.at[b, n, rows])[None, :] for ref in (norm_ref, mean_ref))
            row = i * tile.queries + jnp.arange(tile.queries)
            reads = plgpu.load(reads_ref.at[b, rows])
            seen = _seen(reads[None, :], read_by[:, None], row[None, :], key[:, None], window)
            weights = jnp.where(seen, jnp.exp2(plgpu.dot(k, q.T) * (scale * LOG2_E) - norm), 0)
            d_logits = weights * (plgpu.dot(v, dy.T) - mean)
            return dk + plgpu.dot(d_logits.astype(q.dtype), q), dv + plgpu.dot(weights.astype(dy.dtype), dy)

        return lax.fori_loop(first // tile.queries, _up(last, tile.queries), add, carry)

    zeros = jnp.zeros((tile.keys, H), jnp.float32)
    dk, dv = lax.fori_loop(0, group, of_query_head, (zeros, zeros))
    for ref, value in ((dk_ref, dk * scale), (dv_ref, dv)):
        plgpu.store(ref.at[b, keys, head, :], value.astype(ref.dtype))


def _seen(reads, read_by, row, key, window):
    return (reads == read_by) & (row >= key) & (row - key < window)


def _up(positions, size: int):
    """How many tiles of this size so many positions need."""
    return (positions + size - 1) // size
