"""One training step, a pure function: (state, frozen, batch) -> (state, metrics)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moextend_jax.config import Batch, Recipe
from moextend_jax.mesh import Program, one_device
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.sharding import constrain, split_rows
from moextend_jax.train.loss import labelled_tokens, losses
from moextend_jax.train.optimizer import in_float32
from moextend_jax.train.stages import for_training


class TrainState(NamedTuple):
    """All that a stage changes: trainable leaves by path, optimizer state over them, steps done, and how many of these
    were skipped because their loss or gradient was not finite."""

    trainable: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array
    skipped: jax.Array


def init_state(trainable: dict[str, jax.Array], optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(trainable, optimizer.init(trainable), jnp.int32(0), jnp.int32(0))


def make_step(
    model: MoExtend,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    recipe: Recipe,
    aux_coefficient: float,
    loss_chunk: int,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Program:
    """The jitted step. `model` gives the structure only; its arrays come as `state.trainable` and `frozen`.

    The gradient is taken of the trainable dict alone, so no gradient, norm or moment of a frozen leaf exists. The
    state is donated; the frozen leaves are arguments, never constants of the program. A step whose loss or gradient
    is not finite counts, and so uses up its place in the schedule, and changes nothing else.

    Args:
      optimizer: its updates are for a learning rate of one (`make_optimizer`).
      schedule: the learning rate of a step by its number, from 0 on.
      accumulate: parts the batch's rows are computed in, one after another, with one update at the end. The loss is
        the whole batch's mean over labelled tokens all the same; load balancing is the mean over the parts.
      mesh: where the leaves and the batch are; None: on one device.
    """
    axes = {path: param.axes for path, param in by_path(nnx.state(model, nnx.Param)).items()}

    def loss_of(trainable, frozen, batch: Batch, tokens):
        losses_, _ = losses(
            with_arrays(for_training(model, trainable), {**trainable, **frozen}),
            batch,
            recipe=recipe,
            aux_coefficient=aux_coefficient,
            chunk=loss_chunk,
            tokens=tokens,
        )
        return losses_.total, losses_

    def value_and_gradient(trainable, frozen, batch: Batch):
        def gradient_of(*arguments):
            gradient, losses_ = jax.grad(loss_of, has_aux=True)(*arguments)
            return in_float32(gradient), losses_

        if accumulate == 1:
            return gradient_of(trainable, frozen, batch, None)
        tokens = jnp.maximum(labelled_tokens(batch.labels_BL), 1) / accumulate

        def part(total, batch):
            added = gradient_of(trainable, frozen, batch, tokens)
            return jax.tree.map(jnp.add, total, added), None

        parts = jax.tree.map(lambda leaf: split_rows(leaf, accumulate), batch)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(
            gradient_of, trainable, frozen, jax.tree.map(lambda leaf: leaf[0], parts), tokens))  # fmt: skip
        gradient, losses_ = jax.lax.scan(part, start, parts)[0]
        gradient, mean = jax.tree.map(lambda leaf: leaf / accumulate, (gradient, losses_))
        return gradient, mean._replace(tokens=losses_.tokens, picks_ZO=losses_.picks_ZO)

    def step(state: TrainState, frozen: dict[str, jax.Array], batch: Batch):
        gradient, losses_ = value_and_gradient(state.trainable, frozen, batch)
        gradient = {path: constrain(leaf, axes[path]) for path, leaf in gradient.items()}
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(losses_.total) & jnp.isfinite(norm)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        updates = jax.tree.map(lambda leaf: rate * leaf, updates)
        trainable = cast(dict[str, jax.Array], optax.apply_updates(state.trainable, updates))
        trainable, optimizer_state = jax.tree.map(
            functools.partial(jnp.where, finite), (trainable, optimizer_state), (state.trainable, state.optimizer)
        )
        # As they came, so that the donated buffers take them.
        trainable = {path: constrain(leaf, axes[path]) for path, leaf in trainable.items()}
        metrics = {
            "loss": losses_.total,
            "ce": losses_.ce,
            "aux": losses_.aux,
            "labelled_tokens": losses_.tokens,
            "grad_norm": norm,
            "learning_rate": rate,
            "finite": finite,
            "picks_ZO": losses_.picks_ZO,
        }
        skipped = state.skipped + jnp.where(finite, 0, 1)
        return TrainState(trainable, optimizer_state, state.step + 1, skipped), metrics

    return Program(step, mesh=mesh or one_device(), donate_argnums=0)
