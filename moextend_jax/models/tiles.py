"""What Pallas kernels for Triton have in common: how they are called, and reads that stop at an array's end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moextend_jax.chips import shared_memory
from moextend_jax.sharding import device_kind, platform

ROOMY = 200 * 1024
"""Bytes of shared memory that large tiles want, as data centres' GPUs have from Hopper on."""


def roomy() -> bool:
    """Whether the GPU that the program is for has room for large tiles."""
    if platform() != "gpu":
        return True
    here = jax.local_devices()[0] if jax.default_backend() == "gpu" else None
    return shared_memory(device_kind(), getattr(here, "compute_capability", None)) >= ROOMY


def call(kernel: Any, inputs: Any, out: Any, grid: tuple[int, ...], *, warps: int, stages: int, **options: Any) -> Any:
    """The kernel on every point of the grid; interpreted where the program is not for a GPU."""
    parameters = plgpu.CompilerParams(num_warps=warps, num_stages=stages)
    interpret = platform() != "gpu"
    return pl.pallas_call(
        kernel, out_shape=out, grid=grid, compiler_params=parameters, interpret=interpret, **options
    )(*inputs)  # fmt: skip


def below(first: Any, count: int, end: Any) -> jax.Array:
    return first + jnp.arange(count) < end


def both(row_mask: jax.Array | None, column_mask: jax.Array | None) -> jax.Array | None:
    """A mask of a tile from those of its rows and its columns, where None hides nothing."""
    if row_mask is None and column_mask is None:
        return None
    if row_mask is None:
        assert column_mask is not None
        return column_mask[None, :]
    return row_mask[:, None] if column_mask is None else row_mask[:, None] & column_mask[None, :]


def load(ref: Any, row_mask: jax.Array | None, column_mask: jax.Array | None) -> jax.Array:
    """A tile, zero where a mask hides it."""
    mask = both(row_mask, column_mask)
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)
