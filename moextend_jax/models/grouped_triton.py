"""Matrix products of rows sorted by group on NVIDIA GPUs: two Pallas kernels for Triton, as grouped_matmul.py asks.

In: `x_RD`, parts of the weights `[G, D, F]`, sizes of all groups. Out: `y_RF`. A tile is rows of one group times
columns of its matrix. Weights are read as they lie in both directions, so XLA keeps no transposed copy of a frozen
stack; a part starts at any row, and all parts write into one buffer. JAX says since 0.11 that Pallas will drop Triton
some day for its own Mosaic; 0.10 to 0.12 have it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moextend_jax.models.tiles import below, both, call, load, roomy


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


def usual() -> Tile:
    return LARGE if roomy() else SMALL


def grouped_product(
    x_RK: jax.Array, w_parts: tuple[jax.Array, ...], sizes_O: jax.Array, *, transpose: bool, tile: Tile | None = None
) -> jax.Array:
    """Each row times the matrix of its group, or (`transpose`) times that matrix turned; rows of no group are not
    written."""
    tile, y_RN, first = tile or usual(), None, 0
    for w_GDF in w_parts:
        G, D, F = w_GDF.shape
        K, N = (F, D) if transpose else (D, F)
        schedule = schedule_of(sizes_O, first, G, rows=len(x_RK), tile=tile)
        inputs = (x_RK, w_GDF, *schedule, *(() if y_RN is None else (y_RN,)))
        kernel = functools.partial(_product, transpose=transpose, K=K, N=N, tile=tile)
        grid = (tile.band, pl.cdiv(N, tile.columns), len(schedule.group_T) // tile.band)
        aliases = {} if y_RN is None else {len(inputs) - 1: 0}
        out = jax.ShapeDtypeStruct((len(x_RK), N), x_RK.dtype)
        y_RN = call(
            kernel, inputs, out, grid, warps=tile.warps, stages=tile.stages, name="triton_grouped_product",
            input_output_aliases=aliases,
        )  # fmt: skip
        first += G
    assert y_RN is not None
    return y_RN


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
