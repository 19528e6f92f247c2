"""The result of a run as a checkpoint: its base as the files hold it, and over it the leaves that the stages trained.

In: a WORKDIR of `moextend run`. Out: a `Source`, of which one trained leaf at a time is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moextend_jax.checkpoints import huggingface, leaves, train_state
from moextend_jax.checkpoints.loading import Source, open_base
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import ExtensionConfig, MoextendError


def is_workdir(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and "settings" in huggingface.read_json(path)


def open_workdir(workdir: Path) -> Source:
    """The furthest model of a run: finetuned, else grown, else aligned. The base is not cast as the run casts it.

    Raises:
      MoextendError: no stage has been run, or the base is not the one that the run was made with.
    """
    # Higher floors, which only this function needs.
    from moextend_jax import pipeline
    from moextend_jax.settings import from_config_dict

    remembered = huggingface.read_json(workdir / "config.json")
    settings = from_config_dict(remembered["settings"])
    source = open_base(
        settings.base, settings.vision, embedded=pipeline.EMBEDDED, feature_layer=settings.recipe.feature_layer
    )
    found = leaves.base_hash(source.leaves)
    if found != remembered.get("base_hash"):
        raise MoextendError(
            f"{workdir} was run on the base with content hash {remembered.get('base_hash')}, but {settings.base} has "
            f"{found}"
        )
    recipe = dataclasses.asdict(settings.recipe)
    facts = {"base": found, "recipe": recipe | {"global_batch": None}}
    trained: dict[str, Stored] = {}
    stages = []
    for stage in ("align", "grow", "finetune"):
        result = _open_result(workdir / stage / "result", facts=facts)
        if result is None:
            break
        trained |= result
        stages.append(stage)
    if not trained:
        raise MoextendError(f"align has not been run in {workdir}: there is nothing to export")
    config = source.config
    if "grow" in stages:
        selection = huggingface.read_json(workdir / "select" / "routing.json")
        extension = ExtensionConfig(
            layers=tuple(selection["chosen_layers"]),
            sources=tuple(selection["sources"]),
            new_experts=trained["extension/router/new_gate"].shape[-1],
            calibrator_width=trained["extension/router/calibrator/w_in"].shape[-1],
        )
        config = dataclasses.replace(config, extension=extension)
    own = {path: leaves.from_ours(path, stored, config=config) for path, stored in trained.items()}
    changed = sorted(own.keys() & source.leaves.keys())
    facts = {"recipe": recipe, "changed": changed, "stages": stages}
    record = source.record._replace(config=config, base=found, facts=facts)
    return Source({**source.leaves, **own}, record, source.files)


def _open_result(folder: Path, *, facts: Mapping[str, Any]) -> dict[str, Stored] | None:
    """What `train_state.save_leaves` wrote, to be read leaf by leaf; None where nothing is there."""
    if not folder.exists():
        return None
    handlers = {"leaves": ocp.StandardCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder.resolve(), item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        saved = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
        train_state.check_facts(saved, dict(facts), where=folder)
        metadata = dict(manager.item_metadata(step)["leaves"])
    at = folder.resolve() / str(step) / "leaves"
    last: dict[str, np.ndarray] = {}  # the leaf that is being written, and no other

    def reader(path: str, leaf: Any) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if path not in last:
                last.clear()
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
        path: Stored(tuple(leaf.shape), np.dtype(leaf.dtype), reader(path, leaf), str(folder))
        for path, leaf in metadata.items()
    }
