"""Opened checkpoints as what programs ask for: a model that runs, its arrays on devices; the base and towers of a run.

In: folders, or the words that settings have for them. Out: `Checkpoint`; `Source` of a base; a tower and its leaves.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from moextend_jax import distributed
from moextend_jax.checkpoints import hashes, huggingface, leaves, names, quantising, store
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.source import (
    SIDE_FILES,
    Source,
    check_routers,
    checked_base,
    open_source,
    part_of,
    with_tower,
    with_what_is_read,
)
from moextend_jax.checkpoints.tensors import name_list
from moextend_jax.checkpoints.whisper import read_whisper
from moextend_jax.config import (
    IMAGE,
    MediumKind,
    ModelConfig,
    MoextendError,
    Quantised,
    TowerConfig,
    VisionConfig,
    WhisperConfig,
    with_vision,
)
from moextend_jax.folders import folder as named_folder
from moextend_jax.folders import local_copy
from moextend_jax.mesh import one_device
from moextend_jax.models.moextend import abstract
from moextend_jax.sharding import parameter_shardings

EMBEDDED = Path(__file__).parents[1] / "assets" / "base"
"""The small base that the package brings, with its tokenizer, and its tower in `vision/`."""

NO_PICTURES = "none"
"""What `vision` says of a run that has no pictures."""


class Checkpoint(NamedTuple):
    """A model that can run. `arrays` are by our path; `source` is what they were read from."""

    config: ModelConfig
    arrays: dict[str, jax.Array]
    source: Source


def open_checkpoint(
    folder: Path,
    *,
    base: Path | None = None,
    vision: Path | None = None,
    feature_layer: int | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    storage: Quantised | None = None,
) -> Checkpoint:
    """Opens and reads a whole model. A tower that no projector reads is left out: that model sees no images.

    Args:
      base: folder of the base, for partial saves and deltas.
      vision: folder of the picture tower: its sizes, and its weights where `folder` has none.
      feature_layer: hidden state that the projector reads; default -1 for the released layout, else -2.
      dtype: element type of parameters and activations; default what is stored.
      mesh: devices to spread the arrays over; default the first device.
      storage: of the pretrained experts, where not as the files have them.
    """
    source = open_source(folder, base=base, vision=vision, feature_layer=feature_layer, dtype=dtype)
    check_routers(source)
    matched, config = source.leaves, source.config
    if "decoder" not in source.parts:
        raise MoextendError(f"{folder} holds no decoder, only {', '.join(sorted(source.parts))}")
    config = with_what_is_read(config, matched)
    matched = {path: leaf for path, leaf in matched.items() if names.row_of(path, config)}
    kind = dtype or str(matched["decoder/embed"].dtype)
    config = dataclasses.replace(config, dtype=kind, train_dtype=dtype or "float32", remat="none")
    storage = storage or quantising.storage_of(matched)
    if storage is not None:
        config = dataclasses.replace(config, expert_storage=cast(Any, storage.kind), expert_group=storage.group)
        quantising.check(config.decoder, storage, mesh or one_device())
        matched = quantising.stored(matched, storage)
    if mesh is None:
        shardings = dict.fromkeys(matched, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = parameter_shardings(abstract(config), mesh)
    arrays = leaves.read_sharded(matched, shardings, dtype=dtype)
    if source.record.base is None:  # else that of a delta and its base was checked as they were opened
        claimed = {path: leaf for path, leaf in source.leaves.items() if leaf.sha256}
        distributed.from_first(lambda: hashes.leaf_hashes(claimed))  # refuses what is not what was imported
    return Checkpoint(config, arrays, source)


def folder_of(name: str, *, inside: str = "") -> Path:
    """The folder that a setting names; "embedded" stands for the embedded base, or for what is `inside` it."""
    return EMBEDDED / inside if name == "embedded" else named_folder(name)


def tower_folder(name: str, kind: MediumKind) -> Path:
    """The folder of the tower of a medium of this kind; "embedded" is the package's own for sounds, or for pictures."""
    return folder_of(name, inside="audio" if kind == "audio" else "vision")


def tokenizer_folder(base: str) -> Path:
    """The folder on this machine that has the small files of a base: its own, or copies where it is in a bucket."""
    return local_copy(folder_of(base), SIDE_FILES)


def open_base(base: str, vision: str, *, feature_layer: int) -> Source:
    """The decoder and tower that a run's settings name.

    A base that brings a tower of its own goes before the embedded tower; `vision` "" wants that one. A projector in it
    is not taken: align trains one.
    """
    folder = folder_of(base)
    if vision == NO_PICTURES:
        source = checked_base(open_source(folder), folder)
        own = {path: leaf for path, leaf in source.leaves.items() if path.startswith("decoder/")}
        return source._replace(leaves=own, record=source.record._replace(config=with_vision(source.config, None)))
    tower = None if vision in ("", "embedded") else named_folder(vision)
    source = open_source(folder, vision=tower, feature_layer=feature_layer)
    if "vision" not in source.parts and not vision:
        raise MoextendError(
            f'{folder} has no vision tower of its own, which config.vision = "" asks for: name a tower with --vision'
        )
    if "vision" not in source.parts:
        source = with_tower(source, EMBEDDED / "vision", feature_layer=feature_layer)
    checked_base(source, folder)
    pretrained = {path: leaf for path, leaf in source.leaves.items() if hashes.is_pretrained(path)}
    return source._replace(leaves=pretrained)


def open_tower(
    name: str, *, kind: MediumKind, medium: str, seconds: int, feature_layer: int
) -> tuple[TowerConfig, dict[str, Leaf]]:
    """The frozen tower of a medium, for pictures or Whisper's; its leaves by their path in the model.

    Args:
      name: its folder, or "embedded" (`tower_folder`).
      kind, medium: the medium's kind and name.
      seconds: how long Whisper hears. feature_layer: hidden state that the projector reads; of Whisper always the last.

    Raises:
      MoextendError: the folder holds none.
    """
    folder = tower_folder(name, kind)
    if store.is_imported(folder):
        return _imported_tower(folder, medium=medium, seconds=seconds, feature_layer=feature_layer)
    at = folder / "config.json"
    if (folder / "model.bin").is_file() or (at.is_file() and huggingface.read_json(at).get("model_type") == "whisper"):
        read = read_whisper(folder, seconds=seconds)
        return read.config, {f"media/{medium}/tower/{path}": leaf for path, leaf in read.leaves.items()}
    source = open_source(folder, feature_layer=feature_layer)
    if source.config.vision is None or "vision" not in source.parts:
        raise MoextendError(f"{folder} holds no tower")
    own = {path: leaf for path, leaf in source.leaves.items() if part_of(path) == "vision"}
    return source.config.vision, {path.replace(IMAGE, medium, 1): leaf for path, leaf in own.items()}


def _imported_tower(
    folder: Path, *, medium: str, seconds: int, feature_layer: int
) -> tuple[TowerConfig, dict[str, Leaf]]:
    """The tower in a folder that `moextend import` made; where several are in it, that of this medium's name."""
    record, matched = store.read(folder)
    towers = sorted({path.split("/")[1] for path in matched if path.startswith("media/") and "/tower/" in path})
    name = medium if medium in towers or not towers else towers[0]
    if not towers or (len(towers) > 1 and name != medium):
        raise MoextendError(f"{folder} holds no tower{f' for {medium}, but for {name_list(towers)}' if towers else ''}")
    tower, start = record.config.media[name].tower, f"media/{name}/tower/"
    if isinstance(tower, WhisperConfig) and tower.seconds != seconds:
        raise MoextendError(f"the tower in {folder} hears {tower.seconds} seconds of sound, not {seconds}")
    if isinstance(tower, VisionConfig):
        tower = huggingface.at_layer(tower, feature_layer, where=folder)
    return tower, {
        f"media/{medium}/tower/{path.removeprefix(start)}": leaf
        for path, leaf in matched.items() if path.startswith(start)
    }  # fmt: skip
