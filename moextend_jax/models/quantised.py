"""Frozen matrices in few bits: integers of a matrix's own shape, and a float16 scale for each group of weights that one
output column sums over, one after another along the contracted axis.

In: float `w_..IO` (I: contracted, O: output). Out: `values_..IO` and `scale_..gO`, whose product is the weight as it is
used. TABLE of storages. XLA packs two int4 into a byte on every backend; `nbytes` of an array does not know it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


class Storage(NamedTuple):
    """dtype: of the integers. least: what the weight of largest magnitude in a group becomes, whatever its sign, so
    that the whole range of a signed type is used (as in GGUF's Q4_0): 12 % less error than from the largest positive
    one."""

    dtype: Any
    least: float


STORAGES = {"int8": Storage(np.dtype(np.int8), -128.0), "int4": Storage(np.dtype(ml_dtypes.int4), -8.0)}
"""TABLE `ModelConfig.expert_storage` -> how weights are stored; "as_is" is none of these."""


def scales(w_IO: np.ndarray, kind: str, group: int) -> np.ndarray:
    """float16 `[..., g, O]`, rounded away from zero, so that no weight lies beyond what it can say."""
    low_gO, high_gO = (extreme(_in_groups(w_IO, group), axis=-2) for extreme in (np.min, np.max))
    wanted_gO = np.where(-low_gO > high_gO, low_gO, high_gO) / np.float32(STORAGES[kind].least)
    scale_gO = wanted_gO.astype(np.float16)
    nearer_zero = np.abs(scale_gO.astype(np.float32)) < np.abs(wanted_gO)
    further_gO = np.nextafter(scale_gO, np.where(wanted_gO < 0, -np.inf, np.inf).astype(np.float16))
    return np.where(nearer_zero, further_gO, scale_gO)


def quantise(w_IO: np.ndarray, kind: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """`(values_IO, scale_gO)`, on the host: the same bits on every machine. Any axes may stand before I."""
    storage, scale_gO = STORAGES[kind], scales(w_IO, kind, group)
    divisor_g1O = np.where(scale_gO == 0, 1, scale_gO.astype(np.float32))[..., :, None, :]
    values = np.clip(np.rint(_in_groups(w_IO, group) / divisor_g1O), storage.least, -storage.least - 1)
    return values.reshape(w_IO.shape).astype(np.int8).astype(storage.dtype), scale_gO


def dequantise(values_IO: jax.Array, scale_gO: jax.Array, dtype: Any) -> jax.Array:
    """Weights in `dtype`, multiplied in float32."""
    *lead, I, O = values_IO.shape  # noqa: E741
    g = scale_gO.shape[-2]
    values = values_IO.astype(jnp.float32).reshape(*lead, g, I // g, O)
    return (values * scale_gO.astype(jnp.float32)[..., :, None, :]).astype(dtype).reshape(values_IO.shape)


def _in_groups(w_IO: np.ndarray, group: int) -> np.ndarray:
    *lead, I, O = w_IO.shape  # noqa: E741
    return np.asarray(w_IO, np.float32).reshape(*lead, I // group, group, O)
