"""The command `moextend export`, and the result of a run as a checkpoint: its base as the files hold it, and over that
the leaves that the stages trained.

In: a command line, or a WORKDIR of `moextend run`. Out: PyTorch's files or a delta; a `Source`, of which one trained
leaf at a time is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from moextend_jax.checkpoints import hashes, huggingface, leaves, train_state
from moextend_jax.checkpoints.convert import (
    HF,
    LAYOUTS,
    SHARD,
    default_layout,
    described,
    export_source,
    parts_of,
    size_of,
)
from moextend_jax.checkpoints.loading import open_base
from moextend_jax.checkpoints.source import Source, open_source
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.config import RECIPES, MoextendError, with_extension
from moextend_jax.families import FAMILIES
from moextend_jax.folders import absolute, local
from moextend_jax.options import OneOf
from moextend_jax.parameters import current_path
from moextend_jax.runs import results
from moextend_jax.runs.askable import how_trained
from moextend_jax.runs.media import with_media
from moextend_jax.runs.models_of import config_of_extension, grown_as, read_selection, rivals_of
from moextend_jax.runs.run import facts_of_base, known_settings, not_run, remembered, tokenizer_of_base


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    src: Path
    """folder of a checkpoint, or WORKDIR of a run"""
    dst: Path
    """new folder"""
    _: dataclasses.KW_ONLY
    layout: Annotated[str | None, OneOf((HF, *LAYOUTS))] = None
    """hf is what PyTorch programs of today load, released what the paper's code does, peft is of a LoRA alone; else the
    layout that holds all there is"""
    model: str | None = None
    """which one of a run; else the furthest"""
    recipe: Annotated[str | None, OneOf(tuple(RECIPES))] = None
    """of layout hf, where SRC does not say: how prompts and pictures are made; else that of its layout"""
    extension: tuple[str, ...] = ()
    """of layout delta and peft: only these; else all"""
    base: Path | None = None
    """folder of the base, where SRC is a delta or a partial save"""
    vision: Path | None = None
    """folder of a vision tower"""
    max_shard_size: str = SHARD
    """of one file"""


def export(values: ExportOptions) -> None:
    """An imported folder, or the result of a run, becomes PyTorch's files, or a delta."""
    shard = size_of(values.max_shard_size)
    local(values.dst, what="the new folder")
    if is_workdir(values.src):
        if values.base or values.vision:
            raise MoextendError(f"{values.src} is a run and knows its base; leave --base and --vision out")
        source = open_workdir(values.src, model=values.model)
    else:
        source = open_source(values.src, base=values.base, vision=values.vision)
        if values.model:
            raise MoextendError(f"{values.src} is one model, not a run: leave --model out")
    layout = values.layout or default_layout(source)
    screen = Console(stderr=True)
    if values.recipe and layout != HF:
        raise MoextendError(
            f"--recipe {values.recipe} goes with --layout hf: files of layout {layout} say nothing of it"
        )
    if values.extension and layout not in ("delta", "peft"):
        raise MoextendError(f"--extension {','.join(values.extension)} goes with --layout delta or peft")
    if layout == HF:
        recipe, isolation = how_trained(source, recipe=values.recipe, where=values.src)
        cost = export_transformers(
            source, values.dst, recipe=recipe, text_isolation=isolation, max_shard_bytes=shard, console=screen
        )
    else:
        cost = export_source(
            source,
            values.dst,
            layout=layout,
            extensions=values.extension or None,
            max_shard_bytes=shard,
            console=screen,
        )
    print(f"exported {described(source)} to {values.dst} in layout {layout}: {cost}")
    if left := source.parts - parts_of(layout, source):
        print(f"left out, because layout {layout} has no place for it: {', '.join(sorted(left))}")
    if layout == "peft" and source.record.facts.get("text_isolation") == "strict":
        print("PEFT applies it to all text, also to text that text_isolation strict has kept as the base's")
    if layout == HF:
        print(_how_to_load(values.dst))
    elif layout == "released":
        print("layout released is for the paper's code and for moextend; for PyTorch of today use --layout hf")


def _how_to_load(folder: Path) -> str:
    attributes = huggingface.read_json(folder / "config.json")
    name, more = {
        **dict.fromkeys(FAMILIES, ("AutoModelForCausalLM", "")),
        "llava": ("AutoModelForImageTextToText", ""),
        "moextend": ("AutoModelForImageTextToText", ", trust_remote_code=True"),
        "moextend_text": ("AutoModelForCausalLM", ", trust_remote_code=True"),
    }[attributes["model_type"]]
    return f"in PyTorch: transformers.{name}.from_pretrained({str(folder)!r}{more})"


def is_workdir(folder: Path) -> bool:
    return bool(remembered(folder))


def open_workdir(workdir: Path, *, model: str | None = None) -> Source:
    """A model of a run; the base is not cast as the run casts it.

    Args:
      model: a model of `results.Table`; None is the furthest: finetuned, else grown, else aligned.

    Raises:
      MoextendError: no stage has been run, or one that the model is made of, or the base is not the one that the run
        was made with.
    """
    settings = known_settings(workdir)
    source = open_base(settings.base, settings.vision, feature_layer=settings.recipe.feature_layer)
    source = with_media(source, settings, tokenizer_of_base(settings, source))
    known = hashes.base_hashes(source.leaves)
    base, expected = known.base, remembered(workdir).get("base_hash")
    if base != expected:
        raise MoextendError(
            f"{workdir} was run on the base with content hash {expected}, but {settings.base} has {base}"
        )
    facts = facts_of_base(base, settings)
    trained: dict[str, Stored] = {}
    stages = []
    table = results.table(settings)
    row = table.model(model or "moextend")
    for stage in row.results:
        result = _open_result(results.folder_of(workdir, stage) / "result", facts=facts)
        if result is None:
            break
        trained |= result
        stages.append(stage)
    if model is not None and len(stages) < len(row.results):
        raise not_run(workdir, row.results[len(stages)])
    if not row.sees:
        seen = {path: leaf for path, leaf in source.leaves.items() if path.startswith("decoder/")}
        return source._replace(leaves=seen)
    if not trained:
        why = f"{row.results[0]} has not been run in" if row.results else f"{model} is the base of"
        raise MoextendError(f"{why} {workdir}: there is nothing to export")
    config = dataclasses.replace(source.config, composition=settings.composition)
    rivals = rivals_of(settings, table.grown(stages))
    config = dataclasses.replace(config, **rivals)
    for name in (name for name in table.grown(stages) if name not in config.added):
        where = results.folder_of(workdir, results.named(settings, name, "select"))
        chosen = read_selection(where / "routing.json", decoder=config.decoder)
        extension = config_of_extension(settings, name, chosen=chosen, **grown_as(workdir, settings, name))
        if w_in := trained.get(f"extensions/{name}/router/calibrator/w_in"):
            extension = dataclasses.replace(extension, calibrator_width=w_in.shape[-1])
        config = with_extension(config, extension, name=name)
    own = {path: leaves.from_ours(path, stored, config=config) for path, stored in trained.items()}
    changed = sorted(own.keys() & source.leaves.keys())
    facts = {"recipe": dataclasses.asdict(settings.recipe), "changed": changed, "stages": stages}
    facts["text_isolation"] = settings.text_isolation
    if settings.quantised:
        facts["expert_storage"] = str(settings.quantised)
    record = source.record._replace(config=config, base=base, facts=facts, parts=known.parts)
    return Source({**source.leaves, **own}, record, source.files)


def _open_result(folder: Path, *, facts: Mapping[str, Any]) -> dict[str, Stored] | None:
    """What `train_state.save_leaves` wrote, to be read leaf by leaf; None where nothing is there."""
    with train_state.open_result(folder, facts=facts) as result:
        if result is None:
            return None
    at = absolute(folder) / str(result.step) / "leaves"
    last: dict[str, np.ndarray] = {}  # the leaf that is being written, of LoRA both factors of a map, and no other

    def reader(path: str, leaf: Any) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if path not in last:
                for other in [other for other in last if other[:-1] != path[:-1]]:  # .../a and .../b, in turn
                    del last[other]
                args = ocp.args.PyTreeRestore(
                    item={path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)},
                    restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)},
                    partial_restore=True,
                )
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    last[path] = checkpointer.restore(at, args=args)[path]
            return last[path]

        return read

    return {
        current_path(path): Stored(tuple(leaf.shape), np.dtype(leaf.dtype), reader(path, leaf), str(folder))
        for path, leaf in result.leaves.items()
    }
