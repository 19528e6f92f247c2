"""Data of a run: a row of `results.Data` in, its source, its images and its batches of rows out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax import distributed, preemption
from moextend_jax.config import IMAGE, Batch, ModelConfig, MoextendError
from moextend_jax.data.batches import batches
from moextend_jax.data.datasets import Source, distinct, hold_out, is_packaged, open_dataset, short_name
from moextend_jax.data.features import FeatureStore, JoinedFeatures, cache_features, is_cached
from moextend_jax.data.forms import base_split, files_of, parts_of
from moextend_jax.data.mixing import JoinedItems
from moextend_jax.data.readers import Features, Inputs, Readers
from moextend_jax.data.splitting import hold_out_pictures, rows_of_part, without
from moextend_jax.faults import Fault
from moextend_jax.folders import absolute, cache, folder, is_url, local
from moextend_jax.mesh import Program, on_host, place_rows, place_whole, row_shards
from moextend_jax.models.moextend import abstract, tower_features
from moextend_jax.parameters import with_arrays
from moextend_jax.progress import preparing
from moextend_jax.runs import results
from moextend_jax.runs.results import Data
from moextend_jax.runs.run import Arrays, Run
from moextend_jax.settings import EvaluateSettings, RunSettings, StageSettings


def data_dir_of(settings: RunSettings, workdir: Path) -> Path:
    """Where prepared data sets go. A bucket cannot hold them: those of a run in one are made on each machine."""
    if settings.data_dir:
        return local(folder(settings.data_dir), what="data_dir")
    if is_url(workdir):
        return cache() / "data" / hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:12]
    return workdir / "data"


def open_source(run: Run, name: str, split: str) -> Source:
    """A data set of the run by name."""
    return open_in_step(
        name,
        split=split,
        data_dir=data_dir_of(run.settings, run.workdir),
        manual_dir=run.settings.manual_dir or None,
        images=run.settings.images or None,
        media=run.config.media,
        faults=run.settings.faults,
    )


def open_in_step(name: str, *, split: str, **options: Any) -> Source:
    """`open_dataset` in all processes, after process 0 has prepared the data set where it is not yet.

    Raises:
      MoextendError: as `open_dataset`; or a process has not the same rows as process 0, or cannot read the same items.
        It would skip other conversations, and the processes would no longer agree on the rows of a batch.
    """
    opened: Source | MoextendError
    try:
        with distributed.first_alone(f"open {name} {split}"), preparing(f"preparing data {name} {split}"):
            opened = open_dataset(name, split=split, **options)
    except MoextendError as error:
        opened = error
    if isinstance(opened, Source):
        faults = [(of, row, fault.kind) for of, items in opened.items.items() for row, fault in items.faults.items()]
        unread = hashlib.sha256(json.dumps(faults).encode()).hexdigest()
        found = {"rows": [len(opened), opened.fingerprint], "items that cannot be read": unread}
        here = f"{len(faults)} cannot be read, first: {faults[0][2] if faults else 'none'}"
    else:  # a process that raised this now, alone, would leave the others waiting here
        found, here = {"rows": "refused"}, str(opened)
    distributed.check_same(
        found,
        f"data set {name}: not every process can read the same files (here {here}): give all hosts the same folder",
    )
    if isinstance(opened, MoextendError):
        raise opened
    return opened


Read = Callable[[str, str], Source]
"""A data set by name and split."""


def source_of(run: Run, data: Data, *, read: Read | None = None) -> Source:
    """The rows of the data set that the table names, without the rows held out to evaluate the result's extension or an
    earlier one.

    Args:
      read: replaces `open_source`, for callers that keep data sets open.
    """
    read = functools.cache(read or functools.partial(open_source, run))
    stage = results.stage_of(run.settings, data.of)
    extension = run.table.result(data.of).extension
    source, own = read(stage.data, stage.split), unseen_source(run, extension, read=read)
    names = [link.name for link in run.settings.links]
    earlier = [unseen_source(run, name, read=read) for name in names[: names.index(extension)]]
    if unseen := [held_out for held_out in (*earlier, own) if held_out is not None]:  # or no row need be read
        left = without(source, *unseen)
        # If earlier extensions hold out none of its rows, keep the source as it is: its fingerprint is recorded.
        source = source if own is None and len(left) == len(source) else left
    if data.part == "all":
        return source
    select = run.settings.of_extension(extension).select
    samples = rows_of_part(select.held_out, len(distinct(source)), setting="select.held_out")
    return getattr(hold_out(source, samples=samples, seed=run.settings.seed), data.part)


def unseen_source(run: Run, extension: str, *, read: Read | None = None) -> Source | None:
    """The held-out part of an extension's finetune data (`evaluate.held_out`): no stage trains on its rows or sees its
    pictures. None if `evaluate.data` names other data."""
    settings, evaluate = run.settings, run.settings.of_extension(extension).evaluate
    if evaluate.data:
        return None
    stage = results.stage_of(settings, results.named(settings, extension, "finetune"))
    source = (read or functools.partial(open_source, run))(stage.data, stage.split)
    part, setting = evaluate.held_out, "evaluate.held_out"
    return hold_out_pictures(source, part=part, seed=settings.seed, setting=setting).held_out


def held_out_source(run: Run, extension: str) -> Source | None:
    """The rows that evaluate the extension; None if a stage trains on them."""
    evaluate = run.settings.of_extension(extension).evaluate
    if not evaluate.data:
        return unseen_source(run, extension)
    names, asked = run.table.training(), _parts(run.settings, evaluate)
    if any(not _parts(run.settings, results.stage_of(run.settings, name)).isdisjoint(asked) for name in names):
        return None
    return open_source(run, evaluate.data, evaluate.split)


def _parts(settings: RunSettings, of: StageSettings | EvaluateSettings) -> set[Path | tuple[str, str]]:
    """The files that its rows come from; for data of packages (family, split), since all rows of these are about the
    same pictures."""
    parts = set()
    for name in (part.name for part in parts_of(of.data)):
        if is_packaged(name):
            parts.add((name.partition("/")[0], base_split(of.split)))
        else:
            try:
                files = files_of(name, split=of.split, manual_dir=settings.manual_dir or None)
                parts.update(map(absolute, files.paths))
            except MoextendError:  # files that were trained on may be gone: then the name says which they were
                parts.add((os.path.normpath(name), base_split(of.split)))
    return parts


VALIDATION_BATCHES = 4
"""Batches of held-out rows: enough for a curve; a step's forward pass takes a third of its time."""


def validation_batches(run: Run, stage: StageSettings, *, extension: str, pixels: bool) -> list[Batch]:
    """This process's rows of the first batches of held-out data, laid out as `stage` lays out its own.

    Raises:
      MoextendError: nothing is held out from training.
    """
    source, evaluate = held_out_source(run, extension), run.settings.of_extension(extension).evaluate
    if source is None:
        raise MoextendError(
            f"validate_every = {run.settings.validate_every}: a stage trains on the rows of evaluate.data = "
            f"{evaluate.data!r}; name others there, or set validate_every = 0"
        )
    alone = dataclasses.replace(run, settings=dataclasses.replace(run.settings, workers=0))
    data = Data(results.named(run.settings, extension, "evaluate" if evaluate.data else "finetune"))
    rows = rows_of(alone, source, stage, data=data, pixels=pixels, seed=None, epochs=1)
    try:
        first = list(itertools.islice(rows, VALIDATION_BATCHES))
    except Fault as fault:
        raise MoextendError(f"validate_every: held-out rows, laid out as the stage's own: {fault}") from fault
    return [batch._replace(faults_BG=None, examples_Bg=None) for batch in first]


def readers_of(run: Run, source: Source, *, data: str, split: str, inputs: bool = False, few: bool = False) -> Readers:
    """What reads a source's items of each medium: the cached features of its frozen tower where the settings want a
    cache, else what goes into the tower.

    Args:
      data, split: the data set that the source is part of; a cache holds all items of a data set.
      inputs: use no cache (a tower trains).
      few: no other rows of the data set will be read. If there is no cache of all its items, one with only the items
        of these rows is made.
    """
    rows = _rows_by_medium(source) if few else {}
    preparation, readers = run.settings.recipe.image_preparation, {}
    for name, medium in run.config.media.items():
        items = source.items[name]
        reader = Inputs(items=items, medium=medium, preparation=preparation)
        cached = run.settings.cache_features and reader.field == "media" and len(items)
        if inputs or not cached:
            readers[name] = reader
            continue
        # A cache for each data set of a mixture, so that other mixtures with it find it.
        of_parts = items.parts if (several := isinstance(items, JoinedItems)) else (items,)
        starts = items.joined.starts if several else [0]
        stores = [
            _cache(
                run, dataclasses.replace(reader, items=own), name=name, data=part.name, split=split,
                rows=[row - first for row in rows[name] if first <= row < first + len(own)] if name in rows else None,
            )
            if len(own)
            else None
            for own, part, first in zip(of_parts, parts_of(data), starts, strict=True)
        ]  # fmt: skip
        if not any(stores):  # none of these rows shows an item of this medium
            readers[name] = reader
            continue
        store = JoinedFeatures(stores=tuple(stores), joined=items.joined) if several else stores[0]
        readers[name] = Features(store=cast(Any, store), medium=medium, items=items)
    return readers


def _rows_by_medium(source: Source) -> dict[str, list[int]]:
    """Rows of the items that it shows, by medium; not of media whose spans vary (`Features.span` needs all rows)."""
    rows: dict[str, set[int]] = {name: set() for name, medium in source.media.items() if not medium.spans}
    for example in source:
        for ref in example.items:
            if ref.medium in rows:
                rows[ref.medium].add(ref.row)
    return {name: sorted(of) for name, of in rows.items()}


def _cache(
    run: Run, reader: Inputs, *, name: str, data: str, split: str, rows: list[int] | None = None
) -> FeatureStore | None:
    """Features of all items of a medium of one data set, or at least of `rows`."""
    prefix = f"media/{name}/tower/"
    tower = {path: leaf for path, leaf in run.pretrained.items() if path.startswith(prefix)}
    # Folders side by side, not nested: making a cache again deletes its whole folder.
    folder = run.workdir / "features" / (short_name(data, split) + ("" if name == IMAGE else f".{name}"))
    path = local(folder, what="cache_features: a cache of features")
    tower_is = f"{run.towers.get(name, run.base_hash)} {run.settings.dtype}"
    if rows is not None and len(rows) < len(reader.items) and not is_cached(reader, path=path, tower=tower_is):
        if not rows:
            return None
        reader = dataclasses.replace(reader, few=tuple(rows))
        path = path.with_name(f"{path.name}-{reader.fingerprint[:8]}")
    return cache_features(
        reader,
        path=path,
        compute=functools.partial(_features, run, name, tower),
        tower=tower_is,
        faults=run.settings.faults,
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
    of: StageSettings | EvaluateSettings = results.group_of(run.settings, data.of)
    return batches(
        source,
        stage=stage,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        readers=readers_of(run, source, data=of.data, split=of.split, inputs=pixels),
        share=run.share,
        seed=seed if seed is None else seed + run.settings.seed,
        epochs=epochs,
        workers=run.settings.workers,
        parts=data.feeds,
        faults=run.settings.faults,
    )


def placed(rows: Iterable[Batch], mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """This process's rows of batches on the mesh, one after another, where nothing trains."""
    for batch in rows:
        preemption.stop_if_told()
        yield place_rows(batch, mesh)


def _features(run: Run, name: str, tower: Arrays, items: np.ndarray) -> np.ndarray:
    """`features_nPC` of items of a medium, which are the same in every process; each device computes some of them."""
    missing = -len(items) % row_shards(run.mesh)
    padded = np.pad(items, ((0, missing), *[(0, 0)] * (items.ndim - 1)))
    features = _tower(run.config, name, run.mesh)(tower, place_whole(padded, run.mesh))
    return on_host(features)[: len(items)]


@functools.cache
def _tower(config: ModelConfig, name: str, mesh: jax.sharding.Mesh) -> Program:
    medium, module = config.media[name], abstract(config).media[name].tower
    assert module is not None  # features of kind features are in the data

    def compute(tower: Arrays, items: Any) -> jax.Array:
        leaves = {path.removeprefix(f"media/{name}/tower/"): leaf for path, leaf in tower.items()}
        return tower_features(with_arrays(module, leaves), medium, items, config.dtype).astype(jnp.float32)

    return Program(compute, mesh=mesh)
