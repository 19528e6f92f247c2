"""Loss of rows that nothing trains on: batches in, mean nats per labelled token out.

On text, this loss minus the base's shows what a model forgot. While a stage trains, it is the validation loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from moextend_jax.config import Batch
from moextend_jax.mesh import Program, one_device
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import cross_entropy


@functools.lru_cache(maxsize=4)
def loss_step(model: MoExtend, *, chunk: int, mesh: Mesh | None = None) -> Program:
    """Jitted `(arrays, batch) -> (nats summed over labelled tokens, number of these)`; one structure, one program.

    Args:
      chunk: labelled positions whose logits exist at a time.
      mesh: where arrays and batch are; None: on one device.
    """

    def step(arrays: dict[str, jax.Array], batch: Batch):
        loaded = with_arrays(model, arrays)
        hidden_BLD = loaded.decoder.to_head(loaded(batch, skip_padding=True).hidden_BLD)
        return cross_entropy(hidden_BLD, loaded.decoder.head_DV, batch.labels_BL, chunk=chunk)

    return Program(step, mesh=mesh or one_device())


def mean_loss(step: Callable, arrays: dict[str, jax.Array], batches: Iterable[Batch]) -> float:
    """Mean nats per labelled token over all batches, by a `loss_step`."""
    total, tokens = 0.0, 0
    for batch in batches:
        nats, count = step(arrays, batch)
        total, tokens = total + float(nats), tokens + int(count)
    return total / tokens
