"""One training step, a pure function: (state, frozen, batch) -> (state, metrics)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moextend_jax.config import Batch, Recipe
from moextend_jax.mesh import Program, one_device, optimizer_shardings, place
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import by_path, only_chooses, with_arrays
from moextend_jax.settings import RunSettings, StageSettings
from moextend_jax.sharding import constrain, spec, split_rows
from moextend_jax.train.loss import labelled_tokens, losses
from moextend_jax.train.optimizer import in_float32, learning_rate, make_optimizer
from moextend_jax.train.stages import for_training, opening


class TrainState(NamedTuple):
    """All that a stage changes: trainable leaves by path, optimizer state over them, steps done, and how many of these
    were skipped because their loss or gradient was not finite."""

    trainable: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array
    skipped: jax.Array


def init_state(
    trainable: dict[str, jax.Array], optimizer: optax.GradientTransformation, *, shardings: Any = None
) -> TrainState:
    """The state before the first step. Steps donate its arrays, also those of `trainable`.

    Args:
      shardings: a `TrainState` of them; each array is made on its own devices. None: on the first device.
    """
    if shardings is None:
        return TrainState(trainable, optimizer.init(trainable), jnp.int32(0), jnp.int32(0))
    make = Program(optimizer.init, mesh=shardings.step.mesh, out_shardings=shardings.optimizer)
    counts = (place(np.int32(0), sharding) for sharding in (shardings.step, shardings.skipped))
    return TrainState(trainable, make(trainable), *counts)


def abstract_state(
    trainable: Mapping[str, Any], optimizer: optax.GradientTransformation, *, mesh: Mesh, moments: str
) -> TrainState:
    """What `init_state` would make, as shapes with shardings: those of `trainable`, real or abstract leaves, and those
    of the optimizer's state and the counts. `moments` is as in `OptimizerConfig`."""
    state = jax.eval_shape(lambda leaves: init_state(leaves, optimizer), dict(trainable))
    count: Any = NamedSharding(mesh, spec(""))
    own: Any = {path: leaf.sharding for path, leaf in trainable.items()}
    of_optimizer = optimizer_shardings(state.optimizer, trainable, mesh, moments=moments)
    shardings = TrainState(own, of_optimizer, count, count)
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)


def stage_step(
    model: MoExtend, trainable: Mapping[str, Any], *, stage: StageSettings, settings: RunSettings, mesh: Mesh
) -> tuple[Program, optax.GradientTransformationExtraArgs, TrainState]:
    """What trains `trainable`, real or abstract leaves on `mesh`, by these settings, in a run, a plan and a bench: the
    jitted step, its optimizer, and the state that they take, as shapes with shardings."""
    optimizer = make_optimizer(stage.optimizer, paths=trainable)
    step = make_step(
        model,
        optimizer=optimizer,
        schedule=learning_rate(stage.optimizer, steps=max(stage.steps, 1), recipe=settings.recipe),
        recipe=settings.recipe,
        aux_coefficient=settings.aux_coefficient,
        loss_chunk=stage.loss_chunk,
        accumulate=stage.accumulate,
        opens_by={
            path: settings.of_extension(path.split("/")[1]).grow.opens_by for path in trainable if only_chooses(path)
        },
        mesh=mesh,
    )
    return step, optimizer, abstract_state(trainable, optimizer, mesh=mesh, moments=stage.optimizer.moments)


def make_step(
    model: MoExtend,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    recipe: Recipe,
    aux_coefficient: float,
    loss_chunk: int,
    accumulate: int = 1,
    opens_by: Mapping[str, float] | None = None,
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
      opens_by: by the path of a trainable selection bias, what a step adds to it (`stages.opening`).
      mesh: where the leaves and the batch are; None: on one device.
    """
    axes = {path: param.axes for path, param in by_path(nnx.state(model, nnx.Param)).items()}

    def placed(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: constrain(leaf, axes[path]) for path, leaf in leaves.items()}

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
        parts = jax.tree.map(lambda leaf: split_rows(leaf, accumulate), batch)
        tokens = None
        if accumulate > 1:  # sums over parts are in float32; of one part there is nothing to add up
            trainable, tokens = in_float32(trainable), jnp.maximum(labelled_tokens(batch.labels_BL), 1) / accumulate
        gradient, losses_ = summed(lambda own, part: loss_of(own, frozen, part, tokens), trainable, parts, placed)
        gradient = in_float32(gradient)
        if accumulate == 1:
            return gradient, losses_
        gradient, mean = jax.tree.map(lambda leaf: leaf / accumulate, (gradient, losses_))
        return gradient, mean._replace(tokens=losses_.tokens, picks_ZO=losses_.picks_ZO)

    def step(state: TrainState, frozen: dict[str, jax.Array], batch: Batch):
        gradient, losses_ = value_and_gradient(state.trainable, frozen, batch)
        gradient = placed(gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(losses_.total) & jnp.isfinite(norm)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable, finite=finite)
        updates = jax.tree.map(lambda leaf: rate * leaf, updates)
        trainable = cast(dict[str, jax.Array], optax.apply_updates(state.trainable, updates))
        trainable |= {
            path: opening(state.trainable[path], path, by, frozen, picks_ZO=losses_.picks_ZO, config=model.config)
            for path, by in (opens_by or {}).items()
        }
        trainable = jax.tree.map(functools.partial(jnp.where, finite), trainable, state.trainable)
        trainable = placed(trainable)  # with their old shardings, so that donated buffers are reused
        metrics = {
            "loss": losses_.total,
            "ce": losses_.ce,
            "aux": losses_.aux,
            "labelled_tokens": losses_.tokens,
            "tokens": (batch.segments_BL > 0).sum(),
            "grad_norm": norm,
            "learning_rate": rate,
            "finite": finite,
            "picks_ZO": losses_.picks_ZO,
        }
        skipped = state.skipped + jnp.where(finite, 0, 1)
        return TrainState(trainable, optimizer_state, state.step + 1, skipped), metrics

    return Program(step, mesh=mesh or one_device(), donate_argnums=0)


Aux = TypeVar("Aux")


def summed(
    loss: Callable[[dict[str, jax.Array], Any], tuple[jax.Array, Aux]],
    leaves: dict[str, jax.Array],
    parts: Any,
    placed: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
) -> tuple[dict[str, jax.Array], Aux]:
    """The gradient of `loss(leaves, part)[0]` and the rest of what it returns, both summed over the first axis of
    `parts`.

    Gradients are added up in place, in one buffer for all parts (`jax.new_ref`, `with_refs`; this function is all that
    uses that young API). An extension's leaves are read layer by layer inside the scan, so that theirs need no second
    buffer. JAX 0.10.2 has no in-place transpose of some operations (slices), so gradients of other leaves are summed
    as values first.

    Args:
      placed: leaves with their shardings.
    """
    zeros = placed({path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()})
    refs = {path: jax.new_ref(leaf) for path, leaf in zeros.items()}

    def of_part(leaves: dict[str, jax.Array], part: Any) -> tuple[jax.Array, Aux]:
        in_place = {path: leaf for path, leaf in leaves.items() if path.startswith("extensions/")}
        return loss(jax.tree.map(_summed_first, leaves) | in_place, part)

    def add(part: Any) -> Aux:
        value, pull, rest = jax.vjp(lambda leaves: of_part(leaves, part), leaves, has_aux=True)
        pull.with_refs(refs)(jnp.ones_like(value))
        return rest

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if len(jax.tree.leaves(parts)[0]) == 1:
        rest = add(first)
    else:
        kinds = jax.eval_shape(lambda leaves, part: loss(leaves, part)[1], leaves, first)
        none = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), kinds)
        rest, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, add(part)), None), none, parts)
    return {path: jax.freeze(ref) for path, ref in refs.items()}, rest


@jax.custom_vjp
def _summed_first(leaf: jax.Array) -> jax.Array:
    """The leaf itself. Its gradient is summed as one value first, not added up in place piece by piece."""
    return leaf


_summed_first.defvjp(lambda leaf: (leaf, None), lambda _, gradient: (gradient,))
