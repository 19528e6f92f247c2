"""How results are made: a `Run` and the name of a result of `results.Table` in, WORKDIR/NAME written, once.

TABLE `MAKERS`: train (any stage), select (the extender), grow. A result that is there already is kept if it was made
with these settings; one of other settings is an error, before anything is made or remembered.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moextend_jax import distributed, preemption
from moextend_jax.checkpoints import train_state
from moextend_jax.checkpoints.hashes import content_hash
from moextend_jax.config import IMAGE, ModelConfig, MoextendError, with_extension
from moextend_jax.data.datasets import Source
from moextend_jax.data.shared_memory import no_bus_error
from moextend_jax.extension import routing
from moextend_jax.extension.grow import grow as grow_leaves
from moextend_jax.extension.grow import read_by_grow
from moextend_jax.extension.saliency import SCORES, expert_norms
from moextend_jax.mesh import make_leaves
from moextend_jax.models.blocks import fresh_blocks, read_by_blocks
from moextend_jax.models.moextend import abstract, fresh_adapter
from moextend_jax.outside import read_object
from moextend_jax.progress import preparing
from moextend_jax.runs import results
from moextend_jax.runs.data_of import placed, rows_of, source_of, validation_batches
from moextend_jax.runs.models_of import (
    Opened,
    facts_of_added,
    grown_config,
    leaves_of,
    model_with,
    open_model,
    selection_of,
)
from moextend_jax.runs.ready import Check, ready
from moextend_jax.runs.run import Arrays, Run, as_json, write_json
from moextend_jax.settings import RunSettings, SelectSettings, StageSettings
from moextend_jax.train.loop import Job, train_loop
from moextend_jax.train.metrics import read_metrics
from moextend_jax.train.stages import split


def make(run: Run, name: str) -> None:
    """Makes a result, or goes on with it, unless it is there.

    Raises:
      MoextendError: a parent is missing, the result that is there is of other settings, `resume_from` is of another
        stage, or whatever making it refuses.
    """
    row = run.table.result(name)
    how = row.how
    if how == "train" and run.resume_from is not None and (stage := _stage_at(run.resume_from)) != name:
        raise MoextendError(f"--resume_from {run.resume_from} is a checkpoint of {stage}, not of {name}")
    if row.data is not None:  # data are read only where the rest is there
        run.facts_of(name)
    check_made(run)
    MAKERS[how](ready(run, [name]), name)


def make_all(run: Run, *, checks: Iterable[Check] = ()) -> Iterator[str]:
    """Makes every result in order, and the baselines if the settings want them; yields the name of each when it is
    there. Raises before the first where the data, or one of `checks`, would make any of them fail."""
    rows = run.table.results
    names = [name for name, row in rows.items() if run.settings.baseline or not row.optional]
    if run.resume_from is not None and (stage := _stage_at(run.resume_from)) not in names:
        raise MoextendError(
            f"--resume_from {run.resume_from} is a checkpoint of {stage}, which is no stage of this run"
        )
    run = ready(run, names, checks=checks)
    check_made(run, names)
    for name in names:
        preemption.stop_if_told()
        MAKERS[rows[name].how](run, name)
        yield name


def check_made(run: Run, names: Iterable[str] = ()) -> None:
    """Raises a MoextendError if an existing result was made with another base, or with other run settings that decide
    what it computes: the models of the work directory would then not be those that were trained.

    Args:
      names: results whose own settings must be the same too; their steps must have been counted.
    """
    rows, asked = run.table.results, set(names)
    names = {*asked}
    recorded = {name: train_state.result_facts(run.folder(name) / "result") for name in rows}
    made = {name for name, facts in recorded.items() if facts is not None}  # and not cut off while it was written
    for name, row in rows.items():
        if row.how == "select" and results.named(run.settings, row.extension, "grow") in made:
            names.add(name)  # its choice of layers is used already
            if (run.folder(name) / "routing.json").exists():
                recorded[name] = selection_of(run, row.extension).get("facts")
        if (before := recorded[name]) is not None and made.issuperset(row.parents):
            facts = FACTS[row.how](run, name) if name in names else run.facts_of(name, **facts_of_added(run, name))
            # Rows of what is not asked for are not read again: other stages may have others, but not unnoticed.
            now = {} if name in asked or "rows" not in facts else {"rows": facts.pop("rows")}
            if (wrong := train_state.differing(before, now)) and distributed.first():
                print(f"moextend: {run.folder(name)} was made from other rows: {'; '.join(wrong)}", file=sys.stderr)
            train_state.check_facts(before, facts, where=run.folder(name))


def facts_of_training(run: Run, name: str) -> dict[str, Any]:
    """All that decides what a stage makes."""
    settings, row = results.stage_of(run.settings, name), run.table.result(name)
    undecisive = ("loss_chunk", "epochs", "least_steps")  # steps says it
    decisive = {field: value for field, value in dataclasses.asdict(settings).items() if field not in undecisive}
    del decisive["optimizer"]["moments"]  # the same bits wherever they lie
    facts = run.facts_of(name, settings=as_json(decisive), **_rows_of_another(run, name))
    if row.grown:
        grow = run.settings.of_extension(row.extension).grow
        opens_by = grow.opens_by if grow.selection_bias == "closed" else 0.0
        facts["method"] = facts_of_added(run, name)["method"] | {"opens_by": opens_by}
    facts["run"] |= {"workers": run.settings.workers, "cache_features": run.settings.cache_features}
    return facts


def _rows_of_another(run: Run, name: str) -> dict[str, Any]:
    """Which rows a result reads, where another stage's settings name the data set, as finetune's do for the probe."""
    data = run.table.result(name).data
    assert data is not None
    data = data(run.settings.recipe)
    if data.of == name:
        return {}
    of, extension = results.stage_of(run.settings, data.of), run.table.result(data.of).extension
    held_out = 0 if data.part == "all" else run.settings.of_extension(extension).select.held_out
    return {"rows": {"data": of.data, "split": of.split, "held_out": held_out}}


def seconds_before(run: Run, name: str) -> float:
    """Seconds that earlier starts spent on a training stage; of one that was cut off, until its last logged step."""
    stage, metrics = run.folder(name) / "stage.json", run.folder(name) / "metrics.jsonl"
    if stage.exists():
        return read_object(stage)["seconds"]
    return sum(row["seconds"] for row in read_metrics(metrics)) if metrics.exists() else 0.0


def train(run: Run, name: str) -> None:
    """Trains the leaves of a row from the model of its parents, and writes them as its result."""
    row, settings = run.table.result(name), results.stage_of(run.settings, name)
    facts = facts_of_training(run, name)
    if _is_done(run, name, facts):
        return
    started, before = time.perf_counter(), seconds_before(run, name)
    assert row.data is not None
    trains, data = run.table.patterns(name, recipe=run.settings.recipe), row.data(run.settings.recipe)
    opened, source = model_with(run, row.parents, trains=trains), source_of(run, data)
    _, frozen = split(opened.arrays, trains)
    with preparing("hashing the frozen weights"):
        hash_before = content_hash(frozen)
    # A tower that trains has no features to cache.
    pixels = results.trains_tower(trains)
    trained = train_loop(
        opened.model,
        opened.arrays,
        rows_of(run, source, settings, data=data, pixels=pixels),
        Job(
            name=name,
            trains=trains,
            stage=settings,
            settings=run.settings,
            mesh=run.mesh,
            folder=run.folder(name),
            facts=facts | _of_source(source),
            resume_from=run.resume_from if run.resume_from and _stage_at(run.resume_from) == name else None,
            name_of=lambda row: source[row].id,
            conversations=len(source),
            held_out=validation_batches(run, settings, extension=row.extension, pixels=pixels)
            if run.settings.validate_every
            else (),
        ),
    )
    train_state.save_leaves(run.folder(name) / "result", trained, facts=facts)
    record = {
        "seconds": before + time.perf_counter() - started,
        "steps": settings.steps,
        "data": source.fingerprint,
        "frozen_unchanged": content_hash(frozen) == hash_before,
        "trained": {path: int(leaf.size) for path, leaf in trained.items()},
        "frozen_parameters": sum(int(leaf.size) for leaf in frozen.values()),
        "result": run.result_identity(name),
    }
    write_json(run.folder(name) / "stage.json", record)


def _of_source(source: Source) -> dict[str, Any]:
    """What a resumed stage must find unchanged. Pictures keep the key that they had before other media existed."""
    others = {name: items.fingerprint for name, items in source.items.items() if name != IMAGE and len(items)}
    facts = {"examples": len(source), "data": source.fingerprint, "pictures": source.images.fingerprint}
    return facts | ({"items": others} if others else {})


def facts_of_selecting(run: Run, name: str) -> dict[str, Any]:
    """All that decides which layers and experts are chosen."""
    settings: SelectSettings = results.group_of(run.settings, name)
    asked = dataclasses.asdict(settings) | {"new_experts": settings.number(run.config.decoder.experts)}
    return as_json(run.facts_of(name, settings=asked, **_rows_of_another(run, name)))


def select(run: Run, name: str) -> None:
    """Counts routing before and after the probe on S_e, and writes NAME/routing.json; anew where the settings have
    changed and nothing has grown."""
    row, recipe = run.table.result(name), run.settings.recipe
    settings: SelectSettings = results.group_of(run.settings, name)
    new_experts, facts = settings.number(run.config.decoder.experts), facts_of_selecting(run, name)
    if (run.folder(name) / "routing.json").exists():
        recorded = selection_of(run, row.extension).get("facts")
        if recorded is not None and not train_state.differing(recorded, facts):
            return
    assert row.data is not None
    data = row.data(recipe)
    source = source_of(run, data)
    stage = counting_stage(run.settings, name)

    def count(opened: Opened) -> routing.Counts:
        rows = rows_of(run, source, stage, data=data, epochs=1, seed=None)
        counts = routing.count_all(opened.model, opened.arrays, placed(rows, run.mesh), recipe=recipe, mesh=run.mesh)
        # An earlier extension's experts cannot be sources, and counting them would change the choice.
        experts = run.config.decoder.experts
        return counts._replace(text_ZO=counts.text_ZO[:, :experts], image_ZO=counts.image_ZO[:, :experts])

    with no_bus_error():
        before, after = (count(open_model(run, model)) for model in row.models)
        scores_ZE = None
        if settings.source in SCORES:
            whole = data._replace(feeds="conversation")  # a bare question has no labels, hence no loss
            opened, rows = open_model(run, row.models[0]), rows_of(run, source, stage, data=whole, epochs=1, seed=None)
            norms = expert_norms(
                opened.model, opened.arrays, placed(rows, run.mesh), recipe=recipe,
                aux_coefficient=run.settings.aux_coefficient, chunk=stage.loss_chunk, mesh=run.mesh,
            )  # fmt: skip
            scores_ZE = SCORES[settings.source](norms)
    routed = run.config.decoder.routed
    chosen = routing.select(
        before,
        after,
        share=settings.share,
        recipe=recipe,
        new_experts=new_experts,
        wide=settings.wide,
        first=routed.start,
        layers=settings.layers,
        source=settings.source,
        expert=settings.expert,
        scores_ZE=scores_ZE,
        seed=run.settings.seed,
    )
    record = {
        "layers": len(routed),
        **({"first_layer": routed.start} if routed.start else {}),
        "experts": run.config.decoder.experts,
        "samples": len(source),
        "tokens": {"text": int(before.text_tokens), "image": int(before.image_tokens)},
        "before": {"text": before.text_ZO.tolist(), "image": before.image_ZO.tolist()},
        "after": {"text": after.text_ZO.tolist(), "image": after.image_ZO.tolist()},
        "shift": chosen.shift_Z.tolist(),
        "chosen_layers": list(chosen.layers),
        "sources": list(chosen.sources),
        **({} if scores_ZE is None else {"scores": scores_ZE.tolist()}),
        "new_experts": new_experts,
        "wide": settings.wide,
        "recipe": dataclasses.asdict(recipe),
        "base": run.base_hash,
        "facts": facts,
    }
    write_json(run.folder(name) / "routing.json", record)


def counting_stage(settings: RunSettings, name: str = "select") -> StageSettings:
    """How `select` lays out its rows: as the probe does, but with its own batch size and no micro-batches."""
    probe = results.stage_of(settings, results.laid_out_as(settings, name))
    return dataclasses.replace(probe, batch_size=results.group_of(settings, name).batch_size, accumulate=1)


def config_to_grow(run: Run, extension: str) -> ModelConfig:
    """Sizes of the base with this extension, as the settings define it."""
    config, settings = grown_config(run, [extension]), run.settings.of_extension(extension).grow
    if extension not in config.extensions:  # a rival's
        return config
    added = dataclasses.replace(config.extensions[extension], start=settings.start, calibrator=settings.calibrator)
    return with_extension(config, added, name=extension)


def facts_of_growing(run: Run, name: str) -> dict[str, Any]:
    """All that decides the new leaves."""
    extension = run.table.result(name).extension
    if of_rival := facts_of_added(run, name):
        return run.facts_of(name, **of_rival)
    added, settings = config_to_grow(run, extension).extensions[extension], run.settings.of_extension(extension).grow
    decisive = ("layers", "sources", "new_experts", "calibrator_width", "start", "wide", "calibrator")
    made = {field: getattr(added, field) for field in decisive}
    if settings.start == "lowered":
        made["lowered_by"] = settings.lowered_by
    asked = ("column", "expert", "selection_bias")
    return run.facts_of(name, extension=as_json(made) | {field: getattr(settings, field) for field in asked})


def grow(run: Run, name: str) -> None:
    """Writes the leaves that an extension or a rival adds, and the probe's routers, if the recipe keeps those."""
    facts, extension = facts_of_growing(run, name), run.table.result(name).extension
    if _is_done(run, name, facts):
        return
    config = config_to_grow(run, extension)
    if extension in config.extensions:
        _check_selected(run, extension)
    leaves = (_extension_leaves if extension in config.extensions else _rival_leaves)(run, name, config)
    train_state.save_leaves(run.folder(name) / "result", leaves, facts=facts)


def _check_selected(run: Run, extension: str) -> None:
    """Raises a MoextendError where the layers were chosen under other settings, as `moextend grow` alone may find."""
    name, recorded = results.named(run.settings, extension, "select"), selection_of(run, extension).get("facts")
    if recorded is not None and (wrong := train_state.differing(recorded, facts_of_selecting(run, name))):
        raise MoextendError(
            f"{run.folder(name)} was chosen under other settings ({'; '.join(wrong)}). Run `moextend {name}` with "
            "these first, or use the old ones"
        )


def _extension_leaves(run: Run, name: str, config: ModelConfig) -> Arrays:
    """Made of the aligned model and the selection."""
    row, recipe = run.table.result(name), run.settings.recipe
    settings = run.settings.of_extension(row.extension).grow
    leaves: Arrays = leaves_of(run, row.parents[-1]) if recipe.routers_kept == "after" else {}  # the probe's routers
    arrays = {**open_model(run, row.models[0]).arrays, **leaves}
    copied = read_by_grow(arrays)
    new_leaves = functools.partial(
        grow_leaves,
        config=config,
        recipe=recipe,
        seed=seed_of(run.settings, row.extension),
        name=row.extension,
        lowered_by=settings.lowered_by,
        column=settings.column,
        expert=settings.expert,
        closed=settings.selection_bias == "closed",
    )
    return leaves | make_leaves(abstract(config), new_leaves, copied, mesh=run.mesh)


def _rival_leaves(run: Run, name: str, config: ModelConfig) -> Arrays:
    """Fresh ones of low-rank updates or of blocks, each made where it will lie."""
    row = run.table.result(name)
    for parent in row.parents:
        leaves_of(run, parent)  # not made without them
    leaves: Arrays = {}
    for part in run.settings.link(row.extension).parts:
        make, read = (
            (fresh_blocks, read_by_blocks(run.pretrained))
            if part in config.blocks
            else (fresh_adapter, jax.random.key(seed_of(run.settings, part)))
        )
        fresh = functools.partial(make, config=config, name=part)
        leaves |= make_leaves(abstract(config), fresh, read, mesh=run.mesh)
    return leaves


def seed_of(settings: RunSettings, part: str) -> int:
    """Seed for the new leaves of an extension, or of a part of a rival. The first of a run has the run's seed. No two
    seeds are equal: fresh maps of the same seed would hold the same numbers."""
    parts = [part for link in settings.links for part in link.parts or (link.name,)]
    number = parts.index(part)
    return int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0]) if number else settings.seed


MAKERS: dict[str, Callable[[Run, str], None]] = {"train": train, "select": select, "grow": grow}
FACTS = {"train": facts_of_training, "select": facts_of_selecting, "grow": facts_of_growing}
"""TABLE, keys as in MAKERS -> all that decides what a result is. A result for which it differs is another run's."""


def _stage_at(resume_from: Path) -> str | None:
    return train_state.facts_at(resume_from).get("stage")


def _is_done(run: Run, name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a result is there already; one of other settings is an error."""
    folder = run.folder(name)
    recorded = train_state.result_facts(folder / "result")
    if recorded is None:
        return False
    train_state.check_facts(recorded, facts, where=folder)
    # stage.json is written last: without it the stage was cut off while it ended.
    return run.table.result(name).how != "train" or (folder / "stage.json").exists()
