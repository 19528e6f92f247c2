"""Frozen matrices in few bits: integers in the matrix's own shape, and a scale for each group of consecutive weights
along the contracted axis, separately for each output column.

In: float `w_..IO` (I: contracted, O: output). Out: `values_..IO` and `scale_..gO`; a weight is the value that its
integer stands for, times its scale. TABLE of storages. XLA packs two int4 into a byte on every backend, which `nbytes`
of an array does not take into account.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moextend_jax.config import MoextendError


class Storage(NamedTuple):
    """Dtypes of integers and scales. On the host, `scale_of` maps a group's weight of largest magnitude to its scale,
    and `code` maps a weight divided by its scale to its integer. extremes: other integers that files may have for the
    weight of largest magnitude."""

    dtype: Any
    scale_dtype: Any
    scale_of: Callable[[np.ndarray], np.ndarray]
    code: Callable[[np.ndarray], np.ndarray]
    extremes: tuple[int, ...] = ()


def _even(least: int, most: int, dtype: Any) -> Storage:
    """Integers stand for their own values. The weight of largest magnitude becomes the lowest integer, whatever its
    sign, so that the whole signed range is used (as in GGUF's Q4_0): 12 % less error in four bits than with the largest
    positive integer. Scales are float16, rounded away from zero, so that no weight lies outside the range."""

    def scale_of(extreme: np.ndarray) -> np.ndarray:
        wanted = extreme / np.float32(least)
        scale = wanted.astype(np.float16)
        further = np.nextafter(scale, np.where(wanted < 0, -np.inf, np.inf).astype(np.float16))
        return np.where(np.abs(scale.astype(np.float32)) < np.abs(wanted), further, scale)

    return Storage(np.dtype(dtype), np.dtype(np.float16), scale_of, lambda ratio: np.clip(np.rint(ratio), least, most))


def _power_of_two(extreme: np.ndarray) -> np.ndarray:
    """The scale of which the largest weight is 4 to 8 times."""
    exponent = np.frexp(extreme)[1] - 3
    return np.where(extreme == 0, 0, np.ldexp(np.float32(1), exponent)).astype(ml_dtypes.bfloat16)


def _e2m1(ratio: np.ndarray) -> np.ndarray:
    """Codes 0 to 7 stand for 0, 1/2, 1, 3/2, 2, 3, 4, 6; codes of negatives are eight less."""
    return ratio.astype(ml_dtypes.float4_e2m1fn).view(np.int8) << 4 >> 4  # the sign is the fourth bit


NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
"""Values of codes -8 to 7 in nf4: quantiles of the normal distribution, scaled to at most 1 (QLoRA, 2305.14314)."""


def _nearest_of_nf4(ratio: np.ndarray) -> np.ndarray:
    return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, ratio) - 8


STORAGES = {
    "int8": _even(-127, 127, np.int8),
    "int4": _even(-8, 7, ml_dtypes.int4)._replace(extremes=(-7,)),  # where llama.cpp weighed errors by an imatrix
    "mxfp4": Storage(np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.bfloat16), _power_of_two, _e2m1),
    "nf4": Storage(np.dtype(ml_dtypes.int4), np.dtype(np.float32), np.abs, _nearest_of_nf4),
}
"""TABLE `ModelConfig.expert_storage` -> how weights are stored; "as_is" is none of these. Weights of files in these
formats are kept exactly if the group size is the file's: 32 in GGUF's Q8_0 (int8) and Q4_0 (int4) and in MXFP4 (Open
Compute Project's Microscaling Formats 1.0)."""


def scales(w_IO: np.ndarray, kind: str, group: int, *, where: str = "weights") -> np.ndarray:
    """`[..., g, O]`.

    Raises:
      MoextendError: a weight is NaN or infinite, or too large for the scales' type; `where` names the weights.
    """
    grouped = _in_groups(w_IO, group)
    low_gO, high_gO = (extreme(grouped, axis=-2) for extreme in (np.min, np.max))
    extreme_gO = np.where(-low_gO > high_gO, low_gO, high_gO)
    with np.errstate(over="ignore", invalid="ignore"):
        scale_gO = STORAGES[kind].scale_of(extreme_gO)
    if not (np.isfinite(extreme_gO) & np.isfinite(scale_gO)).all():
        raise MoextendError(
            f"{where}: weights that are NaN, infinite or too large cannot be stored in {kind}; get the file anew"
        )
    for integer in STORAGES[kind].extremes:
        with np.errstate(over="ignore"):  # where this scale is too large, the other one is not
            other_gO = (extreme_gO / np.float32(integer)).astype(scale_gO.dtype)
        found = np.nonzero(other_gO.astype(np.float32) * integer == extreme_gO)  # few groups of other files
        ratios = np.moveaxis(grouped, -2, -1)[found] / np.where(other_gO == 0, 1, other_gO)[found][:, None]
        exact = (np.rint(ratios) == ratios).all(axis=-1)
        scale_gO[tuple(axis[exact] for axis in found)] = other_gO[found][exact]
    return scale_gO


def quantise(w_IO: np.ndarray, kind: str, group: int, *, where: str = "weights") -> tuple[np.ndarray, np.ndarray]:
    """`(values_IO, scale_gO)`, on the host: the same bits on every machine. Any axes may stand before I. Raises
    MoextendError as `scales`."""
    storage, scale_gO = STORAGES[kind], scales(w_IO, kind, group, where=where)
    divisor_g1O = np.where(scale_gO == 0, 1, scale_gO.astype(np.float32))[..., :, None, :]
    values = storage.code(_in_groups(w_IO, group) / divisor_g1O)
    return values.reshape(w_IO.shape).astype(np.int8).astype(storage.dtype), scale_gO


def taken(arrays: Mapping[str, jax.Array], path: str, at: Any) -> jax.Array:
    """`leaf[at]` of a pretrained leaf, to be copied. A quantised leaf is dequantised, so that the copy computes what
    its source does."""
    leaf = arrays[path][at]
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf
    return dequantise(leaf, arrays[f"{path}_scale"][at], jnp.float32)


def dequantise(values_IO: jax.Array, scale_gO: jax.Array, dtype: Any) -> jax.Array:
    """Weights in `dtype`, multiplied in float32. The type of the scales says how integers are decoded (`STORAGES`)."""
    *lead, I, O = values_IO.shape  # noqa: E741
    g = scale_gO.shape[-2]
    values = values_IO.reshape(*lead, g, I // g, O)
    return multiplied_out(values, scale_gO[..., :, None, :]).astype(dtype).reshape(values_IO.shape)


def multiplied_out(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 weights of integers and scales; kernels use it too. Shapes broadcast."""
    values = values.astype(jnp.float32)
    if scale.dtype == jnp.bfloat16:
        size = values + 8 * (values < 0)
        size = (size + jnp.maximum(size - 4, 0)) / 2 + jnp.maximum(size - 6, 0)
        values = jnp.where(values < 0, -size, size)
    elif scale.dtype == jnp.float32:
        meant = jnp.full_like(values, NF4[0])
        for code in range(-7, 8):  # which fuses with what reads it, as a gather on a TPU does not
            meant = jnp.where(values == code, NF4[code + 8], meant)
        values = meant
    return values * scale.astype(jnp.float32)


def _in_groups(w_IO: np.ndarray, group: int) -> np.ndarray:
    *lead, I, O = w_IO.shape  # noqa: E741
    return np.asarray(w_IO, np.float32).reshape(*lead, I // group, group, O)
