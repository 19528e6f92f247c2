"""Models of a work directory: a `Run` and a model of `results.Table` in, structure and arrays on the run's mesh out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moextend_jax.checkpoints import train_state
from moextend_jax.checkpoints.hashes import content_hash
from moextend_jax.config import (
    RIVALS,
    CalibratorName,
    DecoderConfig,
    ExtensionConfig,
    ModelConfig,
    MoextendError,
    Named,
    StartName,
)
from moextend_jax.mesh import Program, leaf_maker, place_leaves
from moextend_jax.models.moextend import MoExtend, abstract, fresh_projector
from moextend_jax.outside import read_object, shown
from moextend_jax.parameters import only_chooses
from moextend_jax.runs import results
from moextend_jax.runs.run import Arrays, Run, as_json, not_run
from moextend_jax.settings import RunSettings
from moextend_jax.sharding import parameter_shardings
from moextend_jax.train.stages import split


class Opened(NamedTuple):
    """A model that can run on the mesh of its run: the structure, and the arrays by path."""

    model: MoExtend
    arrays: Arrays


def open_model(run: Run, name: str) -> Opened:
    """A model by its name in `results.Table`.

    Raises:
      MoextendError: no such model, or a result that it is made of is not there.
    """
    row = run.table.model(name)
    opened = model_with(run, row.results)
    return opened if row.sees else text_only(opened)


def model_with(run: Run, names: Iterable[str], *, trains: Iterable[str] = ()) -> Opened:
    """The pretrained parts overlaid with the leaves of these results; projectors that no result has are fresh.

    Args:
      trains: patterns of the leaves that are to be trained. These are copied, so that no other model shares their
        memory, and cast to `train_dtype`. Frozen leaves of the base, of experts and of blocks are cast to the type that
        they compute in, so that they cost no more memory than the base's.
    """
    names = tuple(names)
    config = grown_config(run, run.table.grown(names))
    arrays = dict(run.pretrained)
    for name in names:
        arrays |= leaves_of(run, name)
    for medium in config.media:
        if not any(path.startswith(f"media/{medium}/projector/") for path in arrays):
            arrays |= _projector_maker(run.config, medium, run.mesh)(jax.random.key(run.settings.seed))
    trainable, _ = split(arrays, trains)
    for path, leaf in arrays.items():
        if path in trainable:
            kind = run.settings.train_dtype
            arrays[path] = leaf.copy() if leaf.dtype == kind else leaf.astype(kind)
        elif path in run.pretrained:
            arrays[path] = leaf.astype(run.pretrained[path].dtype)
        elif "/new_experts/" in path or (path.startswith("blocks/") and not only_chooses(path)):
            arrays[path] = leaf.astype(run.settings.dtype)
    return Opened(abstract(config), place_leaves(abstract(config), arrays, run.mesh))


def text_only(opened: Opened) -> Opened:
    """The model without media (towers, projectors)."""
    model = abstract(dataclasses.replace(opened.model.config, media=Named()))
    arrays = {path: leaf for path, leaf in opened.arrays.items() if not path.startswith("media/")}
    return Opened(model, arrays)


def leaves_of(run: Run, name: str) -> Arrays:
    """Leaves that a result holds; an error that says what to run where it is not there."""
    config = grown_config(run, run.table.grown([*run.table.result(name).parents, name]))
    shardings = parameter_shardings(abstract(config), run.mesh)
    facts = run.facts | facts_of_added(run, name)
    leaves = train_state.load_leaves(run.folder(name) / "result", facts=facts, shardings=shardings)
    if leaves is None:
        raise not_run(run.workdir, name)
    return leaves


def facts_of_added(run: Run, name: str) -> dict[str, Any]:
    """Of a result whose leaves are an extension's: the settings without which these leaves are another model."""
    row = run.table.result(name)
    if not row.grown:
        return {}
    if row.how == "train":
        method = run.settings.of_extension(row.extension).method
        return {"method": {"guidance": method.guidance, "drift": method.drift}}
    link = run.settings.link(row.extension)
    kind = "blocks" if link.kind == "blocks" else "adapter"
    return {kind: as_json(dataclasses.asdict(link.parts[link.name]))} if link.rival else {}


def grown_config(run: Run, names: Iterable[str]) -> ModelConfig:
    """Sizes of the model with these extensions, each as its `select` has chosen, or as its method defines it."""
    rivals = rivals_of(run.settings, names := tuple(names))
    extensions = {
        name: config_of_extension(
            run.settings, name, chosen=selection_of(run, name), **grown_as(run.workdir, run.settings, name)
        )
        for name in names
        if not any(name in of for of in rivals.values())
    }
    return dataclasses.replace(run.config, extensions=Named(extensions), **rivals)


def config_of_extension(
    settings: RunSettings, name: str, *, chosen: Mapping[str, Any], start: StartName, calibrator: CalibratorName
) -> ExtensionConfig:
    """An extension by new experts: `chosen` is what its `select` wrote, `start` and `calibrator` what `grow` made."""
    method = settings.of_extension(name).method
    return ExtensionConfig(
        layers=tuple(chosen["chosen_layers"]),
        sources=tuple(chosen["sources"]),
        new_experts=chosen.get("new_experts", 1),
        wide=chosen.get("wide", 1),
        medium=settings.link(name).medium,
        guidance=method.guidance,
        drift=method.drift,
        start=start,
        calibrator=calibrator,
    )


def rivals_of(settings: RunSettings, names: Iterable[str]) -> dict[str, Named[Any]]:
    """`adapters` and `blocks` of `ModelConfig`: those of these extensions that are low-rank updates or blocks."""
    links = {link.name: link for link in settings.links}
    own = [links[name] for name in names]
    return {
        kind: Named({name: part for link in own if link.kind == kind for name, part in link.parts.items()})
        for kind in RIVALS
    }


def grown_as(workdir: Path, settings: RunSettings, name: str) -> dict[str, Any]:
    """`start` and `calibrator` of an extension, where its `grow` has been run, else as the settings have them."""
    facts = train_state.result_facts(results.folder_of(workdir, results.named(settings, name, "grow")) / "result")
    asked, recorded = settings.of_extension(name).grow, (facts or {}).get("extension", {})
    return {
        field: getattr(asked, field) if facts is None else recorded.get(field, train_state.BEFORE[field])
        for field in ("start", "calibrator")
    }


def selection_of(run: Run, extension: str) -> dict[str, Any]:
    """The content of an extension's select/routing.json."""
    name = results.named(run.settings, extension, "select")
    path = run.folder(name) / "routing.json"
    if not path.exists():
        raise not_run(run.workdir, name)
    record = read_selection(path, decoder=run.config.decoder)
    if record["base"] != run.base_hash:
        raise MoextendError(f"{path} was made with another base model; run `moextend {name}` again")
    return record


def read_selection(path: Path, *, decoder: DecoderConfig) -> dict[str, Any]:
    """What `moextend select` chose, from routing.json, held against the base's sizes before anything is made of it:
    `chosen_layers` ascend and are layers of the decoder, `sources` are experts of it, `wide` for each of `new_experts`,
    all different in a layer; `base` is text.

    Raises:
      MoextendError: they are not, or are not there; names the file.
    """
    record = read_object(path)
    layers: Any = record.get("chosen_layers")
    sources: Any = record.get("sources")
    if not _below(layers, decoder.layers, decoder.dense_layers) or layers != sorted({*layers}) or not layers:
        of = f"layers below {decoder.layers}" + (f" from {decoder.dense_layers} on" if decoder.dense_layers else "")
        raise MoextendError(f"{path}: chosen_layers = {shown(layers)} is no ascending list of {of}")
    new: Any = record.get("new_experts", 1)
    if type(new) is not int or not 1 <= new <= decoder.experts:
        raise MoextendError(f"{path}: new_experts = {shown(new)} is no number of experts up to {decoder.experts}")
    wide: Any = record.get("wide", 1)
    if type(wide) is not int or not 1 <= wide <= decoder.experts:
        raise MoextendError(f"{path}: wide = {shown(wide)} is no number of experts up to {decoder.experts}")
    each = new * wide
    of_layers = [sources[n : n + each] for n in range(0, len(sources), each)] if isinstance(sources, list) else []
    if not _below(sources, decoder.experts) or [len({*some}) for some in of_layers] != [each] * len(layers):
        told = "one per layer" if each == 1 else f"{each} different ones per layer"
        raise MoextendError(
            f"{path}: sources = {shown(sources)} are not {each * len(layers)} experts below {decoder.experts}, {told}"
        )
    if not isinstance(record.get("base"), str):
        raise MoextendError(f"{path}: base = {shown(record.get('base'))} is no content hash")
    return record


def _below(values: Any, most: int, least: int = 0) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < most for value in values)


@functools.lru_cache(maxsize=16)
def _projector_maker(config: ModelConfig, medium: str, mesh: Mesh) -> Program:
    """From a seed to the leaves of a projector, each made where it will lie. Kept, since every model that is opened
    before a medium's projector is trained needs one."""
    leaves = functools.partial(fresh_projector, config, medium=medium)
    return leaf_maker(abstract(config), leaves, jax.random.key(0), mesh=mesh)


def identity(run: Run, name: str) -> str:
    """Names a model by what it is made of: answers of two identities must not be mixed."""
    stages = {stage: run.result_identity(stage) for stage in run.table.model(name).results}
    digest = hashlib.sha256(json.dumps([run.base_hash, stages, run.settings.dtype]).encode())
    return f"{name}-{digest.hexdigest()[:12]}"


def frozen_unchanged(run: Run) -> bool:
    """Whether the pretrained arrays inside the finished model are bit for bit those of the files.

    The released recipe keeps the probe's routers (`routers_kept`): those are not frozen there, all others are.
    """
    arrays = open_model(run, "moextend").arrays
    grown = [name for name in run.table.model("moextend").results if name.startswith("grow")]
    frozen = run.pretrained.keys() - {path for name in grown for path in leaves_of(run, name)}
    return content_hash({path: arrays[path] for path in frozen}) == content_hash(
        {path: run.pretrained[path] for path in frozen}
    )
