"""Models of a work directory: a `Run` and a row of `results.MODELS` in, structure and arrays on the run's mesh out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from moextend_jax.checkpoints import selection, train_state
from moextend_jax.checkpoints.hashes import content_hash
from moextend_jax.config import ExtensionConfig, ModelConfig, MoextendError
from moextend_jax.mesh import make_leaves, place_leaves
from moextend_jax.models.moextend import MoExtend, abstract, fresh_projector
from moextend_jax.runs import results
from moextend_jax.runs.run import Arrays, Run, not_run
from moextend_jax.sharding import parameter_shardings


class Opened(NamedTuple):
    """A model that can run on the mesh of its run: the structure, and the arrays by path."""

    model: MoExtend
    arrays: Arrays


def open_model(run: Run, name: str) -> Opened:
    """A row of MODELS.

    Raises:
      MoextendError: no such model, or a result that it is made of is not there.
    """
    row = results.model_row(name)
    opened = model_with(run, row.results)
    return opened if row.sees else text_only(opened)


def model_with(run: Run, names: Iterable[str]) -> Opened:
    """The pretrained parts with the leaves of these results over them; a projector that none of them has is fresh."""
    names = tuple(names)
    config = grown_config(run) if results.is_grown(names) else run.config
    arrays = dict(run.pretrained)
    for name in names:
        arrays |= leaves_of(run, name)
    if not any(path.startswith("projector/") for path in arrays):
        arrays |= projector_of_seed(run)
    return Opened(abstract(config), place_leaves(abstract(config), arrays, run.mesh))


def text_only(opened: Opened) -> Opened:
    """The model without its eyes."""
    model = abstract(dataclasses.replace(opened.model.config, vision=None))
    arrays = {path: leaf for path, leaf in opened.arrays.items() if not path.startswith(("vision/", "projector/"))}
    return Opened(model, arrays)


def leaves_of(run: Run, name: str) -> Arrays:
    """Leaves that a result holds; an error that says what to run where it is not there."""
    config = grown_config(run) if results.is_grown([name]) else run.config
    shardings = parameter_shardings(abstract(config), run.mesh)
    leaves = train_state.load_leaves(run.workdir / name / "result", facts=run.facts, shardings=shardings)
    if leaves is None:
        raise not_run(run.workdir, name)
    return leaves


def grown_config(run: Run) -> ModelConfig:
    """Of the extended model that `select` has chosen."""
    chosen = read_selection(run)
    extension = ExtensionConfig(layers=tuple(chosen["chosen_layers"]), sources=tuple(chosen["sources"]))
    return dataclasses.replace(run.config, extension=extension)


def read_selection(run: Run) -> dict[str, Any]:
    """The content of select/routing.json."""
    path = run.workdir / "select" / "routing.json"
    if not path.exists():
        raise not_run(run.workdir, "select")
    record = selection.read_selection(path, decoder=run.config.decoder)
    if record["base"] != run.base_hash:
        raise MoextendError(f"{path} was made with another base model; run `moextend select` again")
    return record


def projector_of_seed(run: Run) -> Arrays:
    """Leaves of a projector that starts from the seed, each made where it will lie."""
    leaves, key = functools.partial(fresh_projector, run.config), jax.random.key(run.settings.seed)
    return make_leaves(abstract(run.config), leaves, key, mesh=run.mesh)


def identity(run: Run, name: str) -> str:
    """Names a model by what it is made of: answers of two identities must not be mixed."""
    stages = {stage: run.result_identity(stage) for stage in results.model_row(name).results}
    digest = hashlib.sha256(json.dumps([run.base_hash, stages, run.settings.dtype]).encode())
    return f"{name}-{digest.hexdigest()[:12]}"


def frozen_unchanged(run: Run) -> bool:
    """Whether the pretrained arrays inside the finished model are bit for bit those of the files.

    The released recipe keeps the probe's routers (`routers_kept`): those are not frozen there, all others are.
    """
    arrays = open_model(run, "moextend").arrays
    frozen = run.pretrained.keys() - leaves_of(run, "grow").keys()
    return content_hash({path: arrays[path] for path in frozen}) == content_hash(
        {path: run.pretrained[path] for path in frozen}
    )
