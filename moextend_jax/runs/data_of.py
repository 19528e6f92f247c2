"""Data of a run: a row of `results.Data` in, its source, its images and its batches of rows out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax import distributed
from moextend_jax.config import Batch, ModelConfig, MoextendError
from moextend_jax.data.batches import Features, Pixels, batches
from moextend_jax.data.datasets import Source, distinct, hold_out, is_packaged, open_dataset, short_name
from moextend_jax.data.faults import Fault
from moextend_jax.data.features import cache_features
from moextend_jax.data.forms import base_split, parts_of
from moextend_jax.data.splitting import hold_out_pictures, rows_of_part, without
from moextend_jax.folders import folder, local
from moextend_jax.mesh import Program, on_host, place_whole, row_shards
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays
from moextend_jax.progress import preparing
from moextend_jax.runs import results
from moextend_jax.runs.results import Data
from moextend_jax.runs.run import Arrays, Run
from moextend_jax.settings import EvaluateSettings, StageSettings


def open_source(run: Run, name: str, split: str) -> Source:
    """A data set by name, prepared by process 0 where it is not yet."""
    data_dir = local(folder(run.settings.data_dir) if run.settings.data_dir else run.workdir / "data", what="data_dir")
    with distributed.first_alone(f"open {name} {split}"), preparing(f"preparing data {name} {split}"):
        return open_dataset(
            name,
            split=split,
            data_dir=data_dir,
            manual_dir=run.settings.manual_dir or None,
            images=run.settings.images or None,
            faults=run.settings.faults,
        )


Read = Callable[[str, str], Source]
"""A data set by name and split."""


def source_of(run: Run, data: Data, *, read: Read | None = None) -> Source:
    """The rows of the data set that the table names, without those that are held out for evaluation.

    Args:
      read: in place of `open_source`, for whoever keeps data sets open.
    """
    read = functools.cache(read or functools.partial(open_source, run))
    stage: StageSettings = getattr(run.settings, data.of)
    source, unseen = read(stage.data, stage.split), unseen_source(run, read=read)
    if unseen is not None:
        source = without(source, unseen)
    if data.part == "all":
        return source
    samples = rows_of_part(run.settings.select.held_out, len(distinct(source)), setting="select.held_out")
    return getattr(hold_out(source, samples=samples, seed=run.settings.seed), data.part)


def unseen_source(run: Run, *, read: Read | None = None) -> Source | None:
    """The part of the finetune data that no stage trains on and whose pictures none sees: `evaluate.held_out` of it.
    None where `evaluate.data` names other data."""
    settings, stage = run.settings, run.settings.finetune
    if settings.evaluate.data:
        return None
    source = (read or functools.partial(open_source, run))(stage.data, stage.split)
    part, setting = settings.evaluate.held_out, "evaluate.held_out"
    return hold_out_pictures(source, part=part, seed=settings.seed, setting=setting).held_out


def held_out_source(run: Run) -> Source | None:
    """Rows that no stage trains on, those of the evaluation; None where a stage trains on them."""
    evaluate = run.settings.evaluate
    if not evaluate.data:
        return unseen_source(run)
    stages: list[StageSettings] = [getattr(run.settings, results.result(name).settings) for name in results.training()]
    if any(not _parts(stage).isdisjoint(_parts(evaluate)) for stage in stages):
        return None
    return open_source(run, evaluate.data, evaluate.split)


def _parts(of: StageSettings | EvaluateSettings) -> set[tuple[str, str]]:
    """Name and split of each data set; of those that come with a package all rows are about the same pictures."""
    names = (part.name for part in parts_of(of.data))
    return {(name.partition("/")[0] if is_packaged(name) else os.path.normpath(name), base_split(of.split))
            for name in names}  # fmt: skip


VALIDATION_BATCHES = 4
"""Batches of held-out rows: enough for a curve; a step's forward pass takes a third of its time."""


def validation_batches(run: Run, stage: StageSettings, *, pixels: bool) -> list[Batch]:
    """This process's rows of the first batches of held-out data, laid out as `stage` lays out its own.

    Raises:
      MoextendError: nothing is held out from training.
    """
    source = held_out_source(run)
    if source is None:
        raise MoextendError(
            f"validate_every = {run.settings.validate_every}: a stage trains on the rows of evaluate.data = "
            f"{run.settings.evaluate.data!r}; name others there, or set validate_every = 0"
        )
    alone = dataclasses.replace(run, settings=dataclasses.replace(run.settings, workers=0))
    data = Data("evaluate" if run.settings.evaluate.data else "finetune")
    rows = rows_of(alone, source, stage, data=data, pixels=pixels, seed=None, epochs=1)
    try:
        first = list(itertools.islice(rows, VALIDATION_BATCHES))
    except Fault as fault:
        raise MoextendError(f"validate_every: held-out rows, laid out as the stage's own: {fault}") from fault
    return [batch._replace(faults_BG=None, examples_Bg=None) for batch in first]


def pixels_of(run: Run, source: Source) -> Pixels:
    """A source's images, decoded and prepared whenever they are read."""
    assert run.config.vision is not None
    preparation = run.settings.recipe.image_preparation
    return Pixels(images=source.images, size=run.config.vision.image_size, preparation=preparation)


def images_of(run: Run, source: Source, *, data: str, split: str) -> Pixels | Features:
    """A source's images as cached features of the frozen tower where the settings want a cache, else as pixels.

    Args:
      data, split: what the source is part of; the cache is of all its images.
    """
    vision = run.config.vision
    if vision is None or not run.settings.cache_features or not len(source.images):
        return pixels_of(run, source)
    tower = {path: leaf for path, leaf in run.pretrained.items() if path.startswith("vision/")}
    name = short_name(data, split)
    return Features(
        store=cache_features(
            source.images,
            path=local(run.workdir / "features" / name, what="cache_features: a cache of features"),
            compute=functools.partial(_features, run, tower),
            tower=f"{run.base_hash} {run.settings.dtype}",
            feature_layer=vision.feature_layer,
            size=vision.image_size,
            preparation=run.settings.recipe.image_preparation,
            faults=run.settings.faults,
        )
    )


def rows_of(
    run: Run,
    source: Source,
    stage: StageSettings,
    *,
    data: Data,
    pixels: bool = False,
    seed: int | None = 0,
    epochs: int | None = None,
) -> grain.IterDataset[Batch]:
    """This process's rows of every batch of a stage over a source.

    Args:
      data: the row of the table that the source belongs to.
      pixels: images as pixels even where features may be cached (the tower trains).
      seed: added to the run's; None keeps the source's order.
    """
    of: StageSettings | EvaluateSettings = getattr(run.settings, data.of)
    return batches(
        source,
        stage=stage,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        images=pixels_of(run, source) if pixels else images_of(run, source, data=of.data, split=of.split),
        patches=run.patches,
        share=run.share,
        seed=seed if seed is None else seed + run.settings.seed,
        epochs=epochs,
        workers=run.settings.workers,
        parts=data.feeds,
        faults=run.settings.faults,
    )


def _features(run: Run, tower: Arrays, images_nhwc: np.ndarray) -> np.ndarray:
    """`features_nPC` of images, which are the same in every process; each device computes some of them."""
    missing = -len(images_nhwc) % row_shards(run.mesh)
    padded_nhwc = np.pad(images_nhwc, ((0, missing), (0, 0), (0, 0), (0, 0)))
    features = _tower(run.config, run.mesh)(tower, place_whole(padded_nhwc, run.mesh))
    return on_host(features)[: len(images_nhwc)]


@functools.cache
def _tower(config: ModelConfig, mesh: jax.sharding.Mesh) -> Program:
    model = abstract(config).vision
    assert model is not None

    def compute(tower: Arrays, images_nhwc: Any) -> jax.Array:
        vision = with_arrays(model, {path.removeprefix("vision/"): leaf for path, leaf in tower.items()})
        return vision(images_nhwc.astype(config.dtype)).astype(jnp.float32)

    return Program(compute, mesh=mesh)
