"""The commands on a work directory: each stage reads what the ones before it wrote, and writes its own folder.

WORKDIR holds config.json, data/, features/, one folder per stage, summary.json, examples.json and report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax import distributed, preemption
from moextend_jax.checkpoints import selection, train_state
from moextend_jax.checkpoints.leaves import base_hash, read_sharded
from moextend_jax.checkpoints.loading import EMBEDDED as EMBEDDED  # here too, for whoever runs the stages
from moextend_jax.checkpoints.loading import folder_of, open_base
from moextend_jax.config import RECIPES, ExtensionConfig, ModelConfig, MoextendError
from moextend_jax.data.batches import Features, Pixels, Share, batches
from moextend_jax.data.datasets import HoldOut, Source, hold_out, open_dataset
from moextend_jax.data.features import cache_features
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer
from moextend_jax.extension import routing
from moextend_jax.extension.grow import COPIED
from moextend_jax.extension.grow import grow as grow_leaves
from moextend_jax.folders import folder, is_url, local
from moextend_jax.lock import locked
from moextend_jax.models.moextend import MoExtend, abstract
from moextend_jax.models.parameters import arrays_of, with_arrays
from moextend_jax.settings import RunSettings, StageSettings
from moextend_jax.sharding import make_mesh, parameter_shardings, put_batch, row_shards, spec
from moextend_jax.train import stages
from moextend_jax.train.loop import train

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What all commands share: the pretrained parts, read once, and how to find data."""

    settings: RunSettings
    workdir: Path
    config: ModelConfig
    tokenizer: Tokenizer
    pretrained: Arrays
    base_hash: str
    mesh: jax.sharding.Mesh
    resume_from: Path | None = None
    """A checkpoint of another work directory, for the stage that it is of."""

    @property
    def facts(self) -> dict[str, Any]:
        """What every checkpoint of this run must agree on."""
        return {"base": self.base_hash, "recipe": dataclasses.asdict(self.settings.recipe) | {"global_batch": None}}

    def facts_of(self, stage: str, *, parents: tuple[str, ...], **more: Any) -> dict[str, Any]:
        """What a checkpoint of a stage must agree on beyond that: all that decides what it computes."""
        decisive = ("seed", "aux_coefficient", "dtype", "train_dtype", "text_isolation")
        return self.facts | {
            "stage": stage,
            "run": {name: getattr(self.settings, name) for name in decisive},
            "parents": {parent: self.result_identity(parent) for parent in parents},
            **more,
        }

    def result_identity(self, stage: str) -> str:
        found = train_state.result_facts(self.workdir / stage / "result")
        if found is None:
            raise not_run(self, stage)
        return found["identity"]


def open_run(settings: RunSettings, workdir: Path) -> Run:
    """Joins the other processes, if any, and reads the pretrained decoder and tower."""
    distributed.start(cpu_devices=settings.cpu_devices)
    distributed.check_shared(workdir)
    source = open_base(settings.base, settings.vision, feature_layer=settings.recipe.feature_layer)
    config = ModelConfig(
        decoder=source.config.decoder,
        vision=source.config.vision,
        **settings.model_options,
    )
    mesh = make_mesh(settings.mesh)
    shardings = parameter_shardings(abstract(config), mesh)
    return Run(
        settings=settings,
        workdir=workdir,
        config=config,
        tokenizer=load_tokenizer(folder_of(settings.base)),
        pretrained=read_sharded(source.leaves, shardings, dtype=settings.dtype),
        base_hash=base_hash(source.leaves),
        mesh=mesh,
    )


@contextlib.contextmanager
def working(settings: RunSettings, workdir: Path, *, resume_from: Path | None = None) -> Iterator[Run]:
    """A run that may write: alone in its work directory, and told when its machine is to be taken away.

    Raises:
      MoextendError: another run is there, or `resume_from` holds no checkpoint.
      Preempted: inside, at any place.
    """
    distributed.start(cpu_devices=settings.cpu_devices)
    with locked(workdir):
        if jax.process_count() == 1:
            preemption.listen()
        if resume_from is not None:
            train_state.facts_at(resume_from)
        yield dataclasses.replace(open_run(settings, workdir), resume_from=resume_from)


def remember(run: Run) -> None:
    """Keeps the settings in WORKDIR/config.json, for the report and for `generate`.

    Only what worked is worth remembering: call it after a command, so that a refused one changes nothing.
    """
    write_json(run.workdir / "config.json", _described(run))


def content_hash(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over paths, dtypes and bytes: equal exactly if every array is bit-identical.

    Of an array that several processes share only shards are hashed: it then compares arrays on one mesh.
    """
    digest = hashlib.sha256()
    for path in sorted(arrays):
        array = arrays[path]
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        if getattr(array, "is_fully_addressable", True):
            digest.update(np.ascontiguousarray(np.asarray(array)).view(np.uint8).data)
        else:
            digest.update(distributed.shard_hashes(array))
    return digest.hexdigest()


# --- models of the stages ---------------------------------------------------------------------------------------------


def kappa(run: Run) -> Arrays:
    """The aligned model: pretrained parts and the projector of align."""
    return _on_mesh(run, abstract(run.config), {**run.pretrained, **_result(run, "align")})


def probed(run: Run) -> Arrays:
    """Kappa': the aligned model with the routers that extend trained."""
    return _on_mesh(run, abstract(run.config), {**kappa(run), **_result(run, "extend")})


def moextend_model(run: Run, *, trained: bool = True) -> tuple[MoExtend, Arrays]:
    """The grown model; `trained` False is its start."""
    model, leaves = abstract(_grown(run)), {**kappa(run), **_result(run, "grow")}
    return model, _on_mesh(run, model, {**leaves, **_result(run, "finetune")} if trained else leaves)


def full_model(run: Run) -> Arrays:
    """The baseline's arrays; its structure is the plain model's."""
    return _on_mesh(run, abstract(run.config), {**kappa(run), **_result(run, "full")})


def _on_mesh(run: Run, model: MoExtend, arrays: Mapping[str, Any]) -> Arrays:
    shardings = parameter_shardings(model, run.mesh)
    return {path: distributed.place(leaf, shardings[path]) for path, leaf in arrays.items()}


def _grown(run: Run) -> ModelConfig:
    chosen = read_selection(run)
    extension = ExtensionConfig(layers=tuple(chosen["chosen_layers"]), sources=tuple(chosen["sources"]))
    return dataclasses.replace(run.config, extension=extension)


def _result(run: Run, stage: str) -> Arrays:
    """Leaves that a stage wrote; an error that says what to run where it has not been run."""
    config = _grown(run) if stage in ("grow", "finetune") else run.config
    shardings = parameter_shardings(abstract(config), run.mesh)
    leaves = train_state.load_leaves(run.workdir / stage / "result", facts=run.facts, shardings=shardings)
    if leaves is None:
        raise not_run(run, stage)
    return leaves


def not_run(run: Run, stage: str) -> MoextendError:
    return MoextendError(f"{stage} has not been run in {run.workdir}: run `moextend {stage}` with this --workdir first")


def _fresh_projector(run: Run) -> Arrays:
    whole = MoExtend(
        dataclasses.replace(run.config, decoder=dataclasses.replace(run.config.decoder, layers=1, vocab_size=8)),
        rngs=nnx.Rngs(run.settings.seed),
    )
    return {path: leaf for path, leaf in arrays_of(whole).items() if path.startswith("projector/")}


# --- data -------------------------------------------------------------------------------------------------------------


def open_source(run: Run, name: str, split: str) -> Source:
    data_dir = local(folder(run.settings.data_dir) if run.settings.data_dir else run.workdir / "data", what="data_dir")
    with distributed.first_alone(f"open {name} {split}"):
        return open_dataset(
            name,
            split=split,
            data_dir=data_dir,
            manual_dir=run.settings.manual_dir or None,
            faults=run.settings.faults,
        )


def instructions(run: Run) -> HoldOut:
    """S_e and the rest of the instruction data (the finetune data)."""
    settings = run.settings
    source = open_source(run, settings.finetune.data, settings.finetune.split)
    return hold_out(source, samples=settings.select.held_out, seed=settings.seed)


def pixels_of(run: Run, source: Source) -> Pixels:
    assert run.config.vision is not None
    preparation = run.settings.recipe.image_preparation
    return Pixels(images=source.images, size=run.config.vision.image_size, preparation=preparation)


def images_of(run: Run, source: Source, name: str) -> Pixels | Features:
    """How a pipeline gets the images of a source: cached features of the frozen tower, or pixels."""
    vision = run.config.vision
    if vision is None or not run.settings.cache_features or not len(source.images):
        return pixels_of(run, source)
    tower = {path: leaf for path, leaf in run.pretrained.items() if path.startswith("vision/")}
    return Features(
        store=cache_features(
            source.images,
            path=local(run.workdir / "features" / name, what="cache_features: a cache of features"),
            compute=functools.partial(_tower, run, tower),
            tower=content_hash({path: distributed.gathered(leaf) for path, leaf in tower.items()}),
            feature_layer=vision.feature_layer,
            size=vision.image_size,
            preparation=run.settings.recipe.image_preparation,
            faults=run.settings.faults,
        )
    )


def _tower(run: Run, tower: Arrays, images_nhwc: np.ndarray) -> np.ndarray:
    rows = jax.sharding.NamedSharding(run.mesh, spec("B", images_nhwc.shape[:1], run.mesh))
    return distributed.gathered(_tower_step(run.config)(tower, distributed.place(images_nhwc, rows)))


@functools.cache
def _tower_step(config: ModelConfig):
    model = abstract(config).vision
    assert model is not None

    def compute(tower: Arrays, images_nhwc):
        vision = with_arrays(model, {path.removeprefix("vision/"): leaf for path, leaf in tower.items()})
        return vision(images_nhwc.astype(config.dtype)).astype(jnp.float32)

    return jax.jit(compute)


def rows_of(
    run: Run,
    source: Source,
    stage: StageSettings,
    *,
    images: Pixels | Features | None = None,
    epochs: int | None = None,
    seed: int | None = 0,
    parts: Literal["conversation", "bare_question"] = "conversation",
):
    """The pipeline of a stage over a source; images come from the feature cache unless given."""
    assert run.config.vision is not None
    family, share = stage.data.partition("/")[0], distributed.share_of_rows(run.mesh)
    _check_rows(run, stage.batch_size)
    return batches(
        source,
        stage=stage,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        images=images or images_of(run, source, f"{family}-{stage.split.partition('[')[0]}"),
        patches=run.config.vision.patches,
        share=Share((share.index,), share.count),
        seed=seed if seed is None else seed + run.settings.seed,
        epochs=epochs,
        workers=run.settings.workers,
        parts=parts,
        faults=run.settings.faults,
    )


def _check_rows(run: Run, rows: int) -> None:
    shards = row_shards(run.mesh)
    if jax.process_count() > 1 and rows % shards:
        raise MoextendError(f"batch_size = {rows} must be a multiple of {shards}, the parts that the mesh makes of it")


# --- commands ---------------------------------------------------------------------------------------------------------


PARENTS = {"align": (), "extend": ("align",), "finetune": ("align", "grow"), "full": ("align",)}
"""Stages that train, and those whose results they start from."""


def align(run: Run) -> None:
    def start() -> Start:
        model = abstract(run.config)
        return Start(model, _on_mesh(run, model, {**run.pretrained, **_fresh_projector(run)}))

    _train(run, "align", start, lambda: open_source(run, run.settings.align.data, run.settings.align.split))


def extend(run: Run) -> None:
    def source() -> Source:
        if run.settings.recipe.probe_data == "captions":
            return open_source(run, run.settings.align.data, run.settings.align.split)
        return instructions(run).rest

    _train(run, "extend", lambda: Start(abstract(run.config), kappa(run)), source)


def select(run: Run) -> dict[str, Any]:
    """Counts routing before and after the probe on S_e, and writes select/routing.json and .png, once."""
    settings, recipe = run.settings.select, run.settings.recipe
    facts = _json(run.facts_of("select", parents=("align", "extend"), settings=dataclasses.asdict(settings)))
    if (run.workdir / "select" / "routing.json").exists() and (done := read_selection(run)).get("facts") == facts:
        return done
    before_arrays = kappa(run)
    after_arrays = _on_mesh(run, abstract(run.config), {**before_arrays, **_result(run, "extend")})
    stage = dataclasses.replace(run.settings.extend, batch_size=settings.batch_size)
    if recipe.probe_data == "captions":
        captions = open_source(run, run.settings.align.data, run.settings.align.split)
        source, parts = hold_out(captions, samples=settings.held_out, seed=run.settings.seed).held_out, "bare_question"
    else:
        source, parts = instructions(run).held_out, "conversation"
    model = abstract(run.config)

    def count(arrays: Arrays) -> routing.Counts:
        rows = rows_of(run, source, stage, epochs=1, seed=None, parts=parts)
        with jax.set_mesh(run.mesh):
            batches = (put_batch(batch, run.mesh) for batch in rows)
            return routing.count_all(model, arrays, batches, recipe=recipe)

    before, after = count(before_arrays), count(after_arrays)
    chosen = routing.select(before, after, share=settings.share, recipe=recipe)
    record = {
        "layers": run.config.decoder.layers,
        "experts": run.config.decoder.experts,
        "samples": len(source),
        "tokens": {"text": int(before.text_tokens), "image": int(before.image_tokens)},
        "before": {"text": before.text_ZO.tolist(), "image": before.image_ZO.tolist()},
        "after": {"text": after.text_ZO.tolist(), "image": after.image_ZO.tolist()},
        "shift": chosen.shift_Z.tolist(),
        "chosen_layers": list(chosen.layers),
        "sources": list(chosen.sources),
        "recipe": dataclasses.asdict(recipe),
        "base": run.base_hash,
        "facts": facts,
    }
    write_json(run.workdir / "select" / "routing.json", record)
    if distributed.first():
        from moextend_jax.report.routing_pictures import routing_picture  # matplotlib takes a second to import

        routing_picture(record, run.workdir / "select" / "routing.png")
    return record


def read_selection(run: Run) -> dict[str, Any]:
    path = run.workdir / "select" / "routing.json"
    if not path.exists():
        raise not_run(run, "select")
    record = selection.read_selection(path, decoder=run.config.decoder)
    if record["base"] != run.base_hash:
        raise MoextendError(f"{path} was made with another base model; run `moextend select` again")
    return record


def grow(run: Run) -> None:
    """Kappa plus the selection -> leaves of the extended model (and the probe's routers, in the released recipe)."""
    config, recipe = _grown(run), run.settings.recipe
    extension = dataclasses.asdict(config)["extension"]
    facts = run.facts_of("grow", parents=("align", "extend"), extension=_json(extension))
    if _done(run, "grow", facts):
        return
    leaves: Arrays = _result(run, "extend") if recipe.routers_kept == "after" else {}
    copied = {path: leaf for path, leaf in {**kappa(run), **leaves}.items() if path in COPIED.values()}
    # Jitted for its shardings: every process makes only its own part of the new leaves.
    shardings = parameter_shardings(abstract(config), run.mesh)
    made = functools.partial(grow_leaves, config=config, recipe=recipe, seed=run.settings.seed)
    leaves |= jax.jit(made, out_shardings={path: shardings[path] for path in jax.eval_shape(made, copied)})(copied)
    train_state.save_leaves(run.workdir / "grow" / "result", leaves, facts=facts)


def finetune(run: Run) -> None:
    settings = run.settings.finetune
    _train(
        run,
        "finetune",
        lambda: Start(*moextend_model(run, trained=False)),
        lambda: open_source(run, settings.data, settings.split),
    )


def full(run: Run) -> None:
    """The baseline: everything trains, starting from the aligned model."""
    settings = run.settings.full
    _train(
        run,
        "full",
        lambda: Start(abstract(run.config), kappa(run)),
        lambda: open_source(run, settings.data, settings.split),
    )


class Start(NamedTuple):
    """What a stage trains: a structure, and the arrays it starts with."""

    model: MoExtend
    arrays: Arrays


def _train(run: Run, stage: str, start: Callable[[], Start], open_data: Callable[[], Source]) -> None:
    settings: StageSettings = getattr(run.settings, stage)
    decisive = {name: value for name, value in dataclasses.asdict(settings).items() if name != "loss_chunk"}
    facts = run.facts_of(stage, parents=PARENTS[stage], settings=_json(decisive))
    facts["run"] |= {"workers": run.settings.workers, "cache_features": run.settings.cache_features}
    if _done(run, stage, facts):
        return
    started = time.perf_counter()
    (model, arrays), source = start(), open_data()
    _, frozen = stages.split(arrays, stages.patterns(stage, recipe=run.settings.recipe))
    hash_before = content_hash(frozen)
    from_elsewhere = run.resume_from is not None and train_state.facts_at(run.resume_from).get("stage") == stage
    trained = train(
        model,
        arrays,
        # A tower that trains has no features to cache.
        rows_of(run, source, settings, images=pixels_of(run, source) if stage == "full" else None),
        stage=stage,
        steps=settings.steps,
        folder=run.workdir / stage,
        mesh=run.mesh,
        optimizer_config=settings.optimizer,
        recipe=run.settings.recipe,
        aux_coefficient=run.settings.aux_coefficient,
        loss_chunk=settings.loss_chunk,
        accumulate=settings.accumulate,
        facts=facts | {"examples": len(source)},
        checkpoint_every=run.settings.checkpoint_every,
        checkpoints_kept=run.settings.checkpoints_kept,
        log_every=run.settings.log_every,
        resume_from=run.resume_from if from_elsewhere else None,
        nonfinite_limit=run.settings.nonfinite_limit,
        rollbacks=run.settings.rollbacks,
        fault_settings=run.settings.faults,
        name_of=lambda row: source[row].id,
    )
    train_state.save_leaves(run.workdir / stage / "result", trained, facts=facts)
    record = {
        "seconds": time.perf_counter() - started,
        "steps": settings.steps,
        "frozen_unchanged": content_hash(frozen) == hash_before,
        "trained": {path: int(leaf.size) for path, leaf in trained.items()},
        "frozen_parameters": sum(int(leaf.size) for leaf in frozen.values()),
        "result": run.result_identity(stage),
    }
    write_json(run.workdir / stage / "stage.json", record)


def _done(run: Run, stage: str, facts: Mapping[str, Any]) -> bool:
    """Whether a stage's result is there already; one of other settings is an error."""
    folder = run.workdir / stage
    found = train_state.result_facts(folder / "result")
    if found is None:
        return False
    train_state.check_facts(found, facts, where=folder)
    # Written last: without it the stage was cut off while it ended.
    return stage == "grow" or (folder / "stage.json").exists()


# --- records ----------------------------------------------------------------------------------------------------------


def _described(run: Run) -> dict[str, Any]:
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets", "numpy")
    return {
        "settings": _json(dataclasses.asdict(run.settings)),
        "recipe": "paper" if run.settings.recipe == RECIPES["paper"] else "other than the paper's",
        "seed": run.settings.seed,
        "model": _json(dataclasses.asdict(run.config)),
        "base_hash": run.base_hash,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def write_json(path: Path, value: Any) -> None:
    """Process 0 writes; when it returns, all processes can read."""
    if distributed.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path if is_url(path) else path.with_suffix(".unfinished")  # a bucket's objects come whole
        unfinished.write_text(json.dumps(value, indent=1) + "\n")
        if unfinished != path:
            unfinished.rename(path)
    distributed.barrier(f"wrote {path}")


def frozen_unchanged(run: Run) -> bool:
    """Whether the pretrained arrays inside the finished model are bit for bit those of the files.

    The released recipe keeps the probe's routers (`routers_kept`): those are not frozen there, all others are.
    """
    _, arrays = moextend_model(run)
    frozen = run.pretrained.keys() - _result(run, "grow").keys()
    return content_hash({path: arrays[path] for path in frozen}) == content_hash(
        {path: run.pretrained[path] for path in frozen}
    )
