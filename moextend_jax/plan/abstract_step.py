"""The real jitted step and its arguments as shapes with shardings: settings in, what `.lower` takes out.

No array is made. Optimizer leaves are sharded as the leaves that they belong to, as in a run.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moextend_jax.config import Batch, ModelConfig, MoextendError
from moextend_jax.media import KINDS
from moextend_jax.mesh import Rows, check_rows, rows_sharding
from moextend_jax.models.moextend import abstract as structure
from moextend_jax.parameters import by_path
from moextend_jax.plan.sizes import TEXT_ONLY
from moextend_jax.runs import results
from moextend_jax.settings import RunSettings, StageSettings
from moextend_jax.sharding import parameter_shardings
from moextend_jax.train import stages
from moextend_jax.train.step import TrainState, stage_step


class AbstractStep(NamedTuple):
    """`step(state, frozen, batch)`, to be lowered on `mesh`; leaves are ShapeDtypeStructs with shardings.

    moments: where these are kept (`OptimizerConfig`)."""

    step: Any
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: Batch
    mesh: Mesh
    moments: str


def stage_settings(settings: RunSettings, stage: str) -> StageSettings:
    """The settings of `stage`, a result that is trained (`results.table`)."""
    names = results.table(settings).training()
    if stage not in names:
        raise MoextendError(f"stage {stage!r} is unknown; there are {', '.join(names)}")
    return results.stage_of(settings, stage)


def patterns(settings: RunSettings, *, stage: str) -> tuple[str, ...]:
    """Patterns of the paths of the leaves that train. Full training of a model without a tower is of its decoder."""
    return results.table(settings).patterns(stage, recipe=settings.recipe, sees=settings.vision != TEXT_ONLY)


def abstract_step(settings: RunSettings, config: ModelConfig, *, stage: str, mesh: Mesh) -> AbstractStep:
    """The step that trains `stage` of these settings on `mesh`; a MoextendError where rows do not divide over it."""
    run = stage_settings(settings, stage)
    if not run.length or (config.media and not any(run.room(name) for name in config.media)):
        raise MoextendError(
            f"{stage}.length or images_per_row (or items_per_row) is 0: a run finds it in the data, which is not read "
            f"here; set both, as --config.{stage}.length=2048 --config.{stage}.images_per_row=1"
        )
    trains, model = patterns(settings, stage=stage), structure(config)
    model = stages.for_training(model, stages.split(by_path(nnx.state(model, nnx.Param)), trains)[0])
    shardings = parameter_shardings(model, mesh)
    leaves = {
        path: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=shardings[path])
        for path, param in by_path(nnx.state(model, nnx.Param)).items()
    }
    trainable, frozen = stages.split(leaves, trains)
    trainable = {path: leaf.update(dtype=settings.train_dtype) for path, leaf in trainable.items()}
    step, optimizer, state = stage_step(model, trainable, stage=run, settings=settings, mesh=mesh)
    return AbstractStep(step, optimizer, state, frozen, abstract_batch(config, run, mesh), mesh, run.optimizer.moments)


def abstract_batch(config: ModelConfig, run: StageSettings, mesh: Mesh) -> Batch:
    """The batch of a step as data makes it, with pixels: a tower's cached features would be smaller."""
    rows = jax.ShapeDtypeStruct((run.batch_size, run.length), jnp.int32)
    items = {"media": {}, "features": {}}
    for name, medium in config.media.items():
        room = run.room(name)
        if room:
            shape = (run.batch_size, room, *KINDS[medium.kind].input_shape(medium))
            items[medium.field][name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    check_rows([Rows("batch_size", run.batch_size, run.accumulate)], mesh)
    fused = {name: rows for name, medium in config.media.items() if medium.onto and run.room(name)}
    batch = Batch(rows, rows, rows, rows, rows, fused=fused, **items)
    return jax.tree.map(lambda array: array.update(sharding=rows_sharding(mesh)), batch)


def text_only(settings: RunSettings) -> RunSettings:
    """The settings without a tower, hence without projector and images: what compares with a language model."""
    return dataclasses.replace(settings, vision=TEXT_ONLY)
