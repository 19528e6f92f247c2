"""MXFP4, as gpt-oss is published: blocks `[..., G, 16]` of two numbers to a byte, low half first, and one power of two
`[..., G]` for 32 numbers, make an array `[..., 32 G]` (OCP Microscaling Formats, version 1.0)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import MoextendError

VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
"""Value of each four bits."""
BIAS = 127
"""Bias of the exponents that the scales hold."""
NAN = 255
"""The scale of 32 numbers that are none."""


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 `[..., 32 G]`, which holds every MXFP4 number exactly."""
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    numbers = np.ldexp(VALUES[halves], scales[..., None].astype(np.int32) - BIAS)
    return numbers.reshape(*blocks.shape[:-2], -1).astype(ml_dtypes.bfloat16)


def unpacked(stored: Mapping[str, Stored], name: str) -> dict[str, Stored]:
    """The tensors, with NAME_blocks and NAME_scales joined to NAME: `[E, out, in]` in the file, NAME is `[E, in, out]`,
    as in unpacked checkpoints. `name` is a pattern.

    Raises:
      MoextendError: one of the two is not there, or their shapes do not fit.
    """
    tensors = dict(stored)
    for file, blocks in stored.items():
        if not (file.endswith("_blocks") and re.fullmatch(name, whole := file.removesuffix("_blocks"))):
            continue
        del tensors[file]
        scales = tensors.pop(f"{whole}_scales", None)
        E, *rest = blocks.shape
        if scales is None or len(rest) != 3 or rest[2] != 16 or scales.shape != blocks.shape[:-1]:
            found = "is not there" if scales is None else f"has shape {list(scales.shape)}"
            raise MoextendError(f"{blocks.where}: {file} has shape {list(blocks.shape)}, and {whole}_scales {found}")
        tensors[whole] = _stored(blocks, scales, shape=(E, 32 * rest[1], rest[0]), name=whole)
    return tensors


def _stored(blocks: Stored, scales: Stored, *, shape: tuple[int, ...], name: str) -> Stored:
    def read() -> np.ndarray:
        exponents = scales.read()
        if (exponents == NAN).any():
            raise MoextendError(f"{scales.where}: {name}_scales has NaN among its scales; get the file anew")
        return np.swapaxes(unpack(blocks.read(), exponents), -1, -2)

    return Stored(shape, np.dtype(ml_dtypes.bfloat16), read, blocks.where, part_of=lambda index: (
        _stored(blocks.part(index), scales.part(index), shape=shape[len(index) :], name=name)))  # fmt: skip
