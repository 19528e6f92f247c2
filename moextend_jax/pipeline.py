"""The commands on a work directory: each stage reads what the ones before it wrote, and writes its own folder.

WORKDIR holds config.json, data/, features/, one folder per stage, summary.json, examples.json and report.html.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.checkpoints import train_state
from moextend_jax.checkpoints.leaves import base_hash, read_sharded
from moextend_jax.checkpoints.loading import open_base
from moextend_jax.config import RECIPES, ExtensionConfig, ModelConfig, MoextendError
from moextend_jax.data.batches import Features, Pixels, Shard, batches
from moextend_jax.data.datasets import HoldOut, Source, hold_out, open_dataset
from moextend_jax.data.features import cache_features
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer
from moextend_jax.extension import routing
from moextend_jax.extension.grow import grow as grow_leaves
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import arrays_of, with_arrays
from moextend_jax.settings import RunSettings, StageSettings
from moextend_jax.sharding import make_mesh, parameter_shardings, put_batch, split_cpu
from moextend_jax.train import stages
from moextend_jax.train.loop import train

EMBEDDED = Path(__file__).parent / "assets" / "base"

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

    @property
    def facts(self) -> dict[str, Any]:
        """What every checkpoint of this run must agree on."""
        return {"base": self.base_hash, "recipe": dataclasses.asdict(self.settings.recipe) | {"global_batch": None}}


def open_run(settings: RunSettings, workdir: Path) -> Run:
    """Reads the pretrained decoder and tower."""
    split_cpu(settings.cpu_devices)
    source = open_base(settings.base, settings.vision, embedded=EMBEDDED, feature_layer=settings.recipe.feature_layer)
    config = ModelConfig(
        decoder=source.config.decoder,
        vision=source.config.vision,
        dtype=settings.dtype,
        train_dtype=settings.train_dtype,
        remat=settings.remat,
    )
    mesh = make_mesh(settings.mesh)
    shardings = parameter_shardings(abstract(config), mesh)
    return Run(
        settings=settings,
        workdir=workdir,
        config=config,
        tokenizer=load_tokenizer(EMBEDDED if settings.base == "embedded" else Path(settings.base)),
        pretrained=read_sharded(source.leaves, shardings, dtype=settings.dtype),
        base_hash=base_hash(source.leaves),
        mesh=mesh,
    )


def remember(run: Run) -> None:
    """Keeps the settings in WORKDIR/config.json, for the report and for `generate`.

    Only what worked is worth remembering: call it after a command, so that a refused one changes nothing.
    """
    write_json(run.workdir / "config.json", _described(run))


def abstract(config: ModelConfig) -> MoExtend:
    """The model's structure without arrays."""
    return nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))


def content_hash(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over paths, dtypes and bytes: equal exactly if every array is bit-identical."""
    digest = hashlib.sha256()
    for path in sorted(arrays):
        array = np.asarray(arrays[path])
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


# --- models of the stages ---------------------------------------------------------------------------------------------


def kappa(run: Run) -> Arrays:
    """The aligned model: pretrained parts and the projector of align."""
    return _on_mesh(run, abstract(run.config), {**run.pretrained, **_result(run, "align")})


def moextend_model(run: Run, *, trained: bool = True) -> tuple[MoExtend, Arrays]:
    """The grown model; `trained` False is its start."""
    selection = read_selection(run)
    config = dataclasses.replace(
        run.config,
        extension=ExtensionConfig(layers=tuple(selection["chosen_layers"]), sources=tuple(selection["sources"])),
    )
    model, leaves = abstract(config), {**kappa(run), **_result(run, "grow")}
    return model, _on_mesh(run, model, {**leaves, **_result(run, "finetune")} if trained else leaves)


def full_model(run: Run) -> Arrays:
    """The baseline's arrays; its structure is the plain model's."""
    return _on_mesh(run, abstract(run.config), {**kappa(run), **_result(run, "full")})


def _on_mesh(run: Run, model: MoExtend, arrays: Mapping[str, Any]) -> Arrays:
    shardings = parameter_shardings(model, run.mesh)
    return {path: jax.device_put(leaf, shardings[path]) for path, leaf in arrays.items()}


def _result(run: Run, stage: str) -> Arrays:
    """Leaves that a stage wrote; an error that says what to run where it has not been run."""
    folder = run.workdir / stage / "result"
    leaves = train_state.load_leaves(folder, facts=run.facts)
    if leaves is None:
        raise MoextendError(
            f"{stage} has not been run in {run.workdir}: run `moextend {stage}` with this --workdir first"
        )
    return leaves


def _fresh_projector(run: Run) -> Arrays:
    whole = MoExtend(
        dataclasses.replace(run.config, decoder=dataclasses.replace(run.config.decoder, layers=1, vocab_size=8)),
        rngs=nnx.Rngs(run.settings.seed),
    )
    return {path: leaf for path, leaf in arrays_of(whole).items() if path.startswith("projector/")}


# --- data -------------------------------------------------------------------------------------------------------------


def open_source(run: Run, name: str, split: str) -> Source:
    data_dir = Path(run.settings.data_dir) if run.settings.data_dir else run.workdir / "data"
    return open_dataset(name, split=split, data_dir=data_dir, manual_dir=run.settings.manual_dir or None)


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
            path=run.workdir / "features" / name,
            compute=functools.partial(_tower, run, tower),
            tower=content_hash(tower),
            feature_layer=vision.feature_layer,
            size=vision.image_size,
            preparation=run.settings.recipe.image_preparation,
        )
    )


def _tower(run: Run, tower: Arrays, images_nhwc: np.ndarray) -> jax.Array:
    return _tower_step(run.config)(tower, images_nhwc)


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
    family = stage.data.partition("/")[0]
    return batches(
        source,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        images=images or images_of(run, source, f"{family}-{stage.split.partition('[')[0]}"),
        patches=run.config.vision.patches,
        length=stage.length,
        batch_size=stage.batch_size // jax.process_count(),
        images_per_row=stage.images_per_row,
        conversations_per_row=stage.conversations_per_row or None,
        seed=seed if seed is None else seed + run.settings.seed,
        epochs=epochs,
        shard=Shard(jax.process_index(), jax.process_count()),
        workers=run.settings.workers,
        too_long=stage.too_long,
        parts=parts,
    )


# --- commands ---------------------------------------------------------------------------------------------------------


def align(run: Run) -> None:
    settings = run.settings.align
    arrays = _on_mesh(run, abstract(run.config), {**run.pretrained, **_fresh_projector(run)})
    source = open_source(run, settings.data, settings.split)
    _train(run, "align", abstract(run.config), arrays, source, settings)


def extend(run: Run) -> None:
    settings, recipe = run.settings.extend, run.settings.recipe
    arrays = kappa(run)
    if recipe.probe_data == "captions":
        source = open_source(run, run.settings.align.data, run.settings.align.split)
    else:
        source = instructions(run).rest
    _train(run, "extend", abstract(run.config), arrays, source, settings)


def select(run: Run) -> dict[str, Any]:
    """Counts routing before and after the probe on S_e, and writes select/routing.json and .png."""
    settings, recipe = run.settings.select, run.settings.recipe
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
            return routing.count_all(model, arrays, (put_batch(row, run.mesh) for row in rows), recipe=recipe)

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
    }
    write_json(run.workdir / "select" / "routing.json", record)
    from moextend_jax.report.routing_pictures import routing_picture  # matplotlib takes a second to import

    routing_picture(record, run.workdir / "select" / "routing.png")
    return record


def read_selection(run: Run) -> dict[str, Any]:
    path = run.workdir / "select" / "routing.json"
    if not path.exists():
        raise MoextendError(
            f"select has not been run in {run.workdir}: run `moextend select` with this --workdir first"
        )
    record = json.loads(path.read_text())
    if record["base"] != run.base_hash:
        raise MoextendError(f"{path} was made with another base model; run `moextend select` again")
    return record


def grow(run: Run) -> None:
    """Kappa plus the selection -> leaves of the extended model (and the probe's routers, in the released recipe)."""
    selection = read_selection(run)
    recipe = run.settings.recipe
    config = dataclasses.replace(
        run.config,
        extension=ExtensionConfig(layers=tuple(selection["chosen_layers"]), sources=tuple(selection["sources"])),
    )
    arrays = kappa(run)
    leaves: Arrays = {}
    if recipe.routers_kept == "after":
        leaves = _result(run, "extend")
    arrays = _on_mesh(run, abstract(run.config), {**arrays, **leaves})
    leaves |= grow_leaves(arrays, config=config, recipe=recipe, seed=run.settings.seed)
    train_state.save_leaves(run.workdir / "grow" / "result", leaves, facts=run.facts)


def finetune(run: Run) -> None:
    settings = run.settings.finetune
    model, arrays = moextend_model(run, trained=False)
    source = open_source(run, settings.data, settings.split)
    _train(run, "finetune", model, arrays, source, settings)


def full(run: Run) -> None:
    """The baseline: everything trains, starting from the aligned model."""
    settings = run.settings.full
    arrays = kappa(run)
    source = open_source(run, settings.data, settings.split)
    _train(run, "full", abstract(run.config), arrays, source, settings)


def _train(run: Run, stage: str, model: MoExtend, arrays: Arrays, source: Source, settings: StageSettings) -> None:
    started = time.perf_counter()
    _, frozen = stages.split(arrays, stages.patterns(stage, recipe=run.settings.recipe))
    hash_before = content_hash(frozen)
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
        facts=run.facts | {"stage": stage, "settings": _json(dataclasses.asdict(settings))},
        checkpoint_every=run.settings.checkpoint_every,
        checkpoints_kept=run.settings.checkpoints_kept,
        log_every=run.settings.log_every,
    )
    train_state.save_leaves(run.workdir / stage / "result", trained, facts=run.facts)
    record = {
        "seconds": time.perf_counter() - started,
        "steps": settings.steps,
        "frozen_unchanged": content_hash(frozen) == hash_before,
        "trained": {path: int(leaf.size) for path, leaf in trained.items()},
        "frozen_parameters": sum(int(leaf.size) for leaf in frozen.values()),
    }
    write_json(run.workdir / stage / "stage.json", record)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.rename(path)


def frozen_unchanged(run: Run) -> bool:
    """Whether the pretrained arrays inside the finished model are bit for bit those of the files.

    The released recipe keeps the probe's routers (`routers_kept`): those are not frozen there, all others are.
    """
    _, arrays = moextend_model(run)
    frozen = run.pretrained.keys() - _result(run, "grow").keys()
    return content_hash({path: arrays[path] for path in frozen}) == content_hash(
        {path: run.pretrained[path] for path in frozen}
    )
