"""Frequencies of rotary positions, as they are or scaled so that contexts may be longer than in pretraining.

The numbers are those of transformers' `modeling_rope_utils.py`; `families/rope.py` reads its names. h: half of a head's
rotated part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moextend_jax.config import DecoderConfig, LinearRopeConfig, Llama3RopeConfig, YarnConfig


def frequencies(config: DecoderConfig) -> tuple[jax.Array, float]:
    """Angles per position, `[h]`, and what queries and keys are each multiplied by."""
    size, theta, scaling = config.rotary_size, config.rope_theta, config.rope_scaling
    frequency_h = theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return (frequency_h, 1.0) if scaling is None else ROPE_SCALINGS[scaling.kind](scaling, size, theta, frequency_h)


def _yarn(yarn: YarnConfig, size: int, theta: float, frequency_h: jax.Array) -> tuple[jax.Array, float]:
    def angle_that_turns(times: float) -> float:
        return size * math.log(yarn.length / (times * 2 * math.pi)) / (2 * math.log(theta))

    def grown(times: float = 1.0) -> float:
        return 0.1 * times * math.log(max(yarn.factor, 1)) + 1

    low, high = angle_that_turns(yarn.fast), angle_that_turns(yarn.slow)
    if yarn.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp_h = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - low) / ((high - low) or 1e-3), 0, 1)
    growth = yarn.growth
    if growth is None:
        growth = grown(yarn.mscale) / grown(yarn.mscale_all) if yarn.mscale and yarn.mscale_all else grown()
    return frequency_h * (1 - ramp_h + ramp_h / yarn.factor), growth


def _llama3(scaling: Llama3RopeConfig, size: int, theta: float, frequency_h: jax.Array) -> tuple[jax.Array, float]:
    turns_h = scaling.length * frequency_h / (2 * math.pi)
    kept_h = jnp.clip((turns_h - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequency_h * (kept_h + (1 - kept_h) / scaling.factor), 1.0


def _linear(scaling: LinearRopeConfig, size: int, theta: float, frequency_h: jax.Array) -> tuple[jax.Array, float]:
    return frequency_h / scaling.factor, 1.0


ROPE_SCALINGS: dict[str, Callable[[Any, int, float, jax.Array], tuple[jax.Array, float]]] = {
    "yarn": _yarn, "llama3": _llama3, "linear": _linear,
}  # fmt: skip
"""TABLE of scalings, by the `kind` of `DecoderConfig.rope_scaling`: that, the size of a head's rotated part, the base
and the frequencies -> what `frequencies` returns."""
