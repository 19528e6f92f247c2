"""Bytes per chip: the step's arguments by kind, exact from their shardings, and the compiler's totals.

In: an `AbstractStep` and what it compiled to. Out: `Memory`, which adds up to what a chip must hold at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moextend_jax.plan.abstract_step import AbstractStep
from moextend_jax.plan.compiling import Compiled


class Memory(NamedTuple):
    """All in bytes of one chip; `host`, not part of the total, is what its host keeps of the optimizer.

    `padding` is what layouts add to the arguments. Arguments that the step does not use (extensions of media that its
    batch lacks) take memory all the same. `outputs` less `aliased` are results that do not take the place of a donated
    argument. The total counts each byte once."""

    frozen: int
    trainable: int
    optimizer: int
    batch: int
    padding: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    total: int
    host: int


def shard_bytes(tree: Any) -> int:
    """Bytes of one chip's parts of these arrays."""
    return sum(
        math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) / 8)
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: Any) -> int:
    """Bits of an element in a chip's memory: XLA packs two int4 in a byte, NumPy one."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else dtype.itemsize * 8


def memory(abstract: AbstractStep, compiled: Compiled) -> Memory:
    state = abstract.state
    # A device that is not here has no kinds of memory to name.
    host = shard_bytes([leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim and abstract.moments == "host"])
    kinds = {
        "frozen": shard_bytes(abstract.frozen),
        "trainable": shard_bytes(state.trainable),
        "optimizer": shard_bytes((state.optimizer, state.step)) - host,
        "batch": shard_bytes(abstract.batch),
    }
    exact, stats = sum(kinds.values()), compiled.memory
    if stats is None:  # too big to compile: only the sum is known
        total = max(compiled.needed or 0, exact)
        return Memory(**kinds, padding=0, outputs=0, aliased=0, temporaries=total - exact, code=0, total=total,
                      host=host)  # fmt: skip
    # The compiler counts the arguments that the step uses.
    arguments, outputs = max(stats.argument_size_in_bytes, exact), stats.output_size_in_bytes
    aliased, temporaries, code = stats.alias_size_in_bytes, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    return Memory(
        **kinds,
        padding=arguments - exact,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        code=code,
        total=arguments + outputs - aliased + temporaries + code,
        host=host,
    )
