"""Gated units of experts: `(gate, up) -> hidden`, element by element, each with its backward pass for kernels that
write theirs by hand. TABLE of formulas, each of one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Pull = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Glu(NamedTuple):
    """A row of GLUS, and the bound that it may have: fields of `DecoderConfig`."""

    kind: str = "silu"
    limit: float = 7.0

    @classmethod
    def of(cls, config: Any) -> Glu:
        return cls(config.glu, config.glu_limit)

    def __call__(self, gate_RF: jax.Array, up_RF: jax.Array) -> jax.Array:
        return GLUS[self.kind](gate_RF, up_RF, self.limit)[0]

    def with_pull(self, gate_RF: jax.Array, up_RF: jax.Array) -> tuple[jax.Array, Pull]:
        """hidden, and a function from its gradient to those of gate and up."""
        return GLUS[self.kind](gate_RF, up_RF, self.limit)


def _silu(gate_RF: jax.Array, up_RF: jax.Array, limit: float) -> tuple[jax.Array, Pull]:
    """SwiGLU: gate * sigmoid(gate) * up."""
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF

    def pull(d_RF: jax.Array) -> tuple[jax.Array, jax.Array]:
        return d_RF * up_RF * sigmoid_RF * (1 + gate_RF - silu_RF), d_RF * silu_RF

    return silu_RF * up_RF, pull


def _clamped(gate_RF: jax.Array, up_RF: jax.Array, limit: float) -> tuple[jax.Array, Pull]:
    """gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), gate at most the limit, up within it."""

    def value(gate_RF: jax.Array, up_RF: jax.Array) -> jax.Array:
        gate_RF, up_RF = jnp.minimum(gate_RF, limit), jnp.clip(up_RF, -limit, limit)
        return (up_RF + 1) * gate_RF * jax.nn.sigmoid(1.702 * gate_RF)

    return jax.vjp(value, gate_RF, up_RF)


SILU = Glu()

GLUS: dict[str, Callable[[jax.Array, jax.Array, float], tuple[jax.Array, Pull]]] = {"silu": _silu, "clamped": _clamped}
