"""Matrix products of rows sorted by group on NVIDIA GPUs: Pallas kernels for Triton, as grouped_matmul.py asks.

In: `x_RD`, parts of the weights `[G, D, F]`, sizes of all groups. Out: `y_RF`. A tile is rows of one group times
columns of its matrix. Weights are read as they lie in both directions, so XLA keeps no transposed copy of a frozen
stack; a part starts at any row, and all parts write into one buffer. Where rows are few, as an answer's are, reading
the weights is all that counts, and a part in few bits is read as it is. JAX says since 0.11 that Pallas will drop
Triton some day for its own Mosaic; 0.10 to 0.12 have it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moextend_jax.models.quantised import multiplied_out
from moextend_jax.models.tiles import below, both, call, load, roomy
from moextend_jax.models.weights import FewBits, Weight, alone, in_groups, reading


class Tile(NamedTuple):
    """What one program computes: rows times columns. It reads its operands in pieces of `depth` bytes a row, `stages`
    of them at once. `band`: tiles of rows that share the columns they read, through the L2 cache."""

    rows: int = 128
    columns: int = 256
    depth: int = 128
    warps: int = 8
    stages: int = 3
    band: int = 8


class Schedule(NamedTuple):
    """Tiles of rows, none across two groups: tile t is of group `group_T[t]` of its part, and has the rows from
    `start_T[t]` on, before `end_T[t]`. Tiles that are not needed have no rows."""

    group_T: jax.Array
    start_T: jax.Array
    end_T: jax.Array


LARGE, SMALL = Tile(), Tile(columns=128, stages=2)
FEW_ROWS = 64
"""Average rows per group from which dequantising weights once costs less than doing it in every tile."""
LARGE_SCALES, SMALL_SCALES = 256, 128
"""The largest groups of one scale that fit in shared memory; a program reads such a group at once."""
WRAPS = range(2**31 + 1, 2**32 + 1)
"""Sizes of an array, in bytes of one element each, for which Pallas uses offsets of 32 bits and Triton reads these as
signed: elements past 2**31 would be read 4 GiB too low. Larger arrays get offsets of 64 bits."""


def usual() -> Tile:
    return LARGE if roomy() else SMALL


def few_rows(rows: int, groups: int) -> Tile:
    return Tile(16 if rows < 16 * groups else 64, columns=64, warps=4, band=1, stages=usual().stages)


def multiplies_out(weight: Weight, *, rows: int, transpose: bool) -> bool:
    """Whether `grouped_product` takes this quantised part as it is stored."""
    G, D, F = weight.shape
    matrices = _read(weight)[0]
    assert isinstance(matrices, FewBits)
    group, most = D // matrices.scale.shape[1], LARGE_SCALES if roomy() else SMALL_SCALES
    fits = 16 <= group <= most and group & (group - 1) == 0 and F % 2 == 0
    return not transpose and rows < FEW_ROWS * G and fits and not _wraps(matrices)


def _wraps(weight: FewBits) -> bool:
    return weight.values.size // (1 if weight.values.dtype == jnp.int8 else 2) in WRAPS


def _read(weight: Weight) -> tuple[jax.Array | FewBits, jax.Array | int]:
    """As `in_groups`; of a stack whose size is in WRAPS this layer's matrices are copied out first."""
    matrices, start = in_groups(weight)
    if isinstance(matrices, FewBits) and _wraps(matrices):
        return alone(weight), 0
    return matrices, start


def grouped_product(
    x_RK: jax.Array, w_parts: tuple[Weight, ...], sizes_O: jax.Array, *, transpose: bool, tile: Tile | None = None
) -> jax.Array:
    """Each row times the matrix of its group, or (`transpose`) times that matrix turned; rows of no group are not
    written."""
    y_RN, first = None, 0
    for weight in w_parts:
        (matrices, start), (G, D, F) = _read(weight), weight.shape
        K, N = (F, D) if transpose else (D, F)
        if isinstance(matrices, FewBits):
            size, weights, name = tile or few_rows(len(x_RK), G), _bytes(matrices), "triton_few_bits_product"
            kernel = functools.partial(_product_of_few_bits, K=K, N=N, tile=size)
            places = weights[0].shape[-1]
        else:
            size, weights, places, name = tile or usual(), (matrices,), N, "triton_grouped_product"
            kernel = functools.partial(_product, transpose=transpose, K=K, N=N, tile=size)
        schedule = schedule_of(sizes_O, first, G, rows=len(x_RK), tile=size)
        schedule = schedule._replace(group_T=schedule.group_T + start)
        inputs = (x_RK, *weights, *schedule, *(() if y_RN is None else (y_RN,)))
        grid = (size.band, pl.cdiv(places, size.columns), len(schedule.group_T) // size.band)
        aliases = {} if y_RN is None else {len(inputs) - 1: 0}
        out = jax.ShapeDtypeStruct((len(x_RK), N), x_RK.dtype)
        with reading(weight):
            y_RN = call(
                kernel, inputs, out, grid, warps=size.warps, stages=size.stages, name=name,
                input_output_aliases=aliases,
            )  # fmt: skip
        first += G
    assert y_RN is not None
    return y_RN


def _bytes(weight: FewBits) -> tuple[jax.Array, jax.Array]:
    """Integers of four bits, two in a byte with the first in the lower half, as XLA keeps them; and the scales."""
    values = weight.values
    if values.dtype != jnp.int8:
        values = jax.lax.bitcast_convert_type(values.reshape(*values.shape[:-1], -1, 2), jnp.int8)
    return values, weight.scale


def weight_gradient(
    x_RD: jax.Array, dy_RF: jax.Array, sizes_O: jax.Array, *, first: int, like_GDF: Any, tile: Tile | None = None
) -> jax.Array:
    """`dw_GDF` of the part whose groups count from `first`: each group's rows of x, turned, times those of dy."""
    tile = tile or usual()
    G, D, F = like_GDF.shape
    end_G = jnp.cumsum(sizes_O)[first : first + G]
    start_G = end_G - sizes_O[first : first + G]
    kernel = functools.partial(_weight_gradient, tile=tile)
    grid = (pl.cdiv(D, tile.rows), pl.cdiv(F, tile.columns), G)
    out = jax.ShapeDtypeStruct((G, D, F), like_GDF.dtype)
    inputs = (x_RD, dy_RF, start_G, end_G)
    return call(kernel, inputs, out, grid, warps=tile.warps, stages=tile.stages, name="triton_grouped_gradient")


def schedule_of(sizes_O: jax.Array, first: int, groups: int, *, rows: int, tile: Tile) -> Schedule:
    """Tiles for the part of `groups` groups that counts from `first`: as many as any sizes may need."""
    end_O = jnp.cumsum(sizes_O)
    end_G, sizes_G = end_O[first : first + groups], sizes_O[first : first + groups]
    last_G = jnp.cumsum(pl.cdiv(sizes_G, tile.rows))  # tiles up to and with each group's
    tiles = pl.cdiv(pl.cdiv(rows, tile.rows) + groups, tile.band) * tile.band
    tile_T = jnp.arange(tiles, dtype=jnp.int32)
    group_T = jnp.searchsorted(last_G, tile_T, side="right").astype(jnp.int32)
    needed_T, group_T = group_T < groups, jnp.minimum(group_T, groups - 1)
    within_T = tile_T - (last_G - pl.cdiv(sizes_G, tile.rows))[group_T]
    start_T = (end_G - sizes_G)[group_T] + within_T * tile.rows
    return Schedule(group_T, jnp.where(needed_T, start_T, 0), jnp.where(needed_T, end_G[group_T], 0))


# --- kernels ----------------------------------------------------------------------------------------------------------


def _product(x_ref, w_ref, group_ref, start_ref, end_ref, *refs, transpose: bool, K: int, N: int, tile: Tile):
    y_ref = refs[-1]  # before it, where parts share the buffer, that buffer as an input
    depth = tile.depth // x_ref.dtype.itemsize
    t = pl.program_id(2) * tile.band + pl.program_id(0)
    start, end, group = start_ref[t], end_ref[t], group_ref[t]
    first = pl.program_id(1) * tile.columns

    @pl.when(start < end)
    def _():
        rows, columns = pl.ds(start, tile.rows), pl.ds(first, tile.columns)
        row_mask = below(start, tile.rows, end)
        column_mask = None if N % tile.columns == 0 else below(first, tile.columns, N)

        def add(i, acc):
            inner = pl.ds(i * depth, depth)
            inner_mask = None if K % depth == 0 else below(i * depth, depth, K)
            x = load(x_ref.at[rows, inner], row_mask, inner_mask)
            if transpose:
                return acc + plgpu.dot(x, load(w_ref.at[group, columns, inner], column_mask, inner_mask).T)
            return acc + plgpu.dot(x, load(w_ref.at[group, inner, columns], inner_mask, column_mask))

        acc = jax.lax.fori_loop(0, pl.cdiv(K, depth), add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
        mask = both(row_mask, column_mask)
        plgpu.store(y_ref.at[rows, columns], acc.astype(y_ref.dtype), mask=mask)


def _product_of_few_bits(x_ref, w_ref, scale_ref, group_ref, start_ref, end_ref, *refs, K: int, N: int, tile: Tile):
    """As `_product`, in pieces that share one scale. Bytes that hold two columns give two sums."""
    y_ref, per_byte = refs[-1], N // w_ref.shape[-1]
    depth = K // scale_ref.shape[1]
    t = pl.program_id(2) * tile.band + pl.program_id(0)
    start, end, group = start_ref[t], end_ref[t], group_ref[t]
    first = pl.program_id(1) * tile.columns

    @pl.when(start < end)
    def _():
        rows, places = pl.ds(start, tile.rows), pl.ds(first, tile.columns)
        row_mask = below(start, tile.rows, end)
        place_mask = None if w_ref.shape[-1] % tile.columns == 0 else below(first, tile.columns, w_ref.shape[-1])
        columns = [per_byte * (first + jnp.arange(tile.columns)) + n for n in range(per_byte)]

        def add(i, sums):
            inner = pl.ds(i * depth, depth)
            x = load(x_ref.at[rows, inner], row_mask, None)
            byte = load(w_ref.at[group, inner, places], None, place_mask).astype(jnp.int32)
            halves = (byte,) if per_byte == 1 else ((byte << 28) >> 28, byte >> 4)
            made = []
            for acc, values, own in zip(sums, halves, columns, strict=True):
                scale = plgpu.load(
                    scale_ref.at[group, i, own], mask=place_mask, other=None if place_mask is None else 0
                )
                made.append(acc + plgpu.dot(x, multiplied_out(values, scale[None, :]).astype(x.dtype)))
            return tuple(made)

        none = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        sums = jax.lax.fori_loop(0, K // depth, add, (none,) * per_byte)
        mask = both(row_mask, place_mask)
        for acc, own in zip(sums, columns, strict=True):
            at = y_ref.at[(start + jnp.arange(tile.rows))[:, None], own[None, :]]
            plgpu.store(at, acc.astype(y_ref.dtype), mask=mask)


def _weight_gradient(x_ref, dy_ref, start_ref, end_ref, dw_ref, *, tile: Tile):
    group, depth = pl.program_id(2), tile.depth // x_ref.dtype.itemsize
    start, end = start_ref[group], end_ref[group]
    _, D, F = dw_ref.shape
    first_d, first_f = pl.program_id(0) * tile.rows, pl.program_id(1) * tile.columns
    d, f = pl.ds(first_d, tile.rows), pl.ds(first_f, tile.columns)
    d_mask = None if D % tile.rows == 0 else below(first_d, tile.rows, D)
    f_mask = None if F % tile.columns == 0 else below(first_f, tile.columns, F)

    def add(i, acc):
        row = start + i * depth
        row_mask = below(row, depth, end)
        x = load(x_ref.at[pl.ds(row, depth), d], row_mask, d_mask)
        return acc + plgpu.dot(x.T, load(dy_ref.at[pl.ds(row, depth), f], row_mask, f_mask))

    acc = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    acc = jax.lax.fori_loop(0, pl.cdiv(end - start, depth), add, acc)
    plgpu.store(dw_ref.at[group, d, f], acc.astype(dw_ref.dtype), mask=both(d_mask, f_mask))
