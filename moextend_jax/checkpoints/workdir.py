"""The result of a run as a checkpoint: its base as the files hold it, and over it the leaves that the stages trained.

In: a WORKDIR of `moextend run`. Out: a `Source`, of which one trained leaf at a time is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moextend_jax.checkpoints import hashes, huggingface, leaves, selection, train_state
from moextend_jax.checkpoints.loading import Source, open_base
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import ExtensionConfig, MoextendError
from moextend_jax.folders import absolute

if TYPE_CHECKING:
    from moextend_jax.settings import RunSettings


def is_workdir(folder: Path) -> bool:
    return bool(_remembered(folder))


def settings_of(folder: Path) -> RunSettings | None:
    """The settings that a work directory's stages were run with; None where the folder is no work directory."""
    from moextend_jax.settings import from_config_dict  # a higher floor

    remembered = _remembered(folder)
    return from_config_dict(remembered["settings"]) if remembered else None


def _remembered(folder: Path) -> dict[str, Any]:
    """What `pipeline.remember` wrote to WORKDIR/config.json; nothing where that file is a model's, or not there."""
    path = folder / "config.json"
    attributes = huggingface.read_json(path) if path.is_file() else {}
    return attributes if "settings" in attributes else {}


def open_workdir(workdir: Path) -> Source:
    """The furthest model of a run: finetuned, else grown, else aligned. The base is not cast as the run casts it.

    Raises:
      MoextendError: no stage has been run, or the base is not the one that the run was made with.
    """
    settings = settings_of(workdir)
    if settings is None:
        raise MoextendError(f"{workdir} is no work directory: no stage has been run in it")
    source = open_base(settings.base, settings.vision, feature_layer=settings.recipe.feature_layer)
    found, expected = hashes.base_hash(source.leaves), _remembered(workdir).get("base_hash")
    if found != expected:
        raise MoextendError(
            f"{workdir} was run on the base with content hash {expected}, but {settings.base} has {found}"
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
        chosen = selection.read_selection(workdir / "select" / "routing.json", decoder=config.decoder)
        extension = ExtensionConfig(
            layers=tuple(chosen["chosen_layers"]),
            sources=tuple(chosen["sources"]),
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
    with train_state.open_result(folder, facts=facts) as result:
        if result is None:
            return None
    at = absolute(folder) / str(result.step) / "leaves"
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
        for path, leaf in result.leaves.items()
    }
