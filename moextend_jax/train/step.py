"""One training step, a pure function: (state, frozen, batch) -> (state, metrics)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from moextend_jax.config import Batch, Recipe
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays
from moextend_jax.train.loss import losses


class TrainState(NamedTuple):
    """All that a stage changes: trainable leaves by path, optimizer state over them, steps done."""

    trainable: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array


def init_state(trainable: dict[str, jax.Array], optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(trainable, optimizer.init(trainable), jnp.int32(0))


def make_step(
    model: MoExtend,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    recipe: Recipe,
    aux_coefficient: float,
    loss_chunk: int,
):
    """The jitted step. `model` gives the structure only; its arrays come as `state.trainable` and `frozen`.

    The gradient is taken of the trainable dict alone, so no gradient, norm or moment of a frozen leaf exists. The
    state is donated; the frozen leaves are arguments, never constants of the program.
    """

    def loss_of(trainable, frozen, batch: Batch):
        whole = with_arrays(model, {**trainable, **frozen})
        losses_, _ = losses(whole, batch, recipe=recipe, aux_coefficient=aux_coefficient, chunk=loss_chunk)
        return losses_.total, losses_

    def step(state: TrainState, frozen: dict[str, jax.Array], batch: Batch):
        gradient, losses_ = jax.grad(loss_of, has_aux=True)(state.trainable, frozen, batch)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = cast(dict[str, jax.Array], optax.apply_updates(state.trainable, updates))
        metrics = {
            "loss": losses_.total,
            "ce": losses_.ce,
            "aux": losses_.aux,
            "labelled_tokens": losses_.tokens,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
        }
        return TrainState(trainable, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)
