"""Sizes of the model that a stage trains, without its weights: settings in, `ModelConfig` out.

A base or tower whose folder is not there may be named as published: its sizes are in the table.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.loading import NO_PICTURES, folder_of, open_tower, tower_folder
from moextend_jax.checkpoints.source import open_source
from moextend_jax.config import (
    DecoderConfig,
    FeaturesConfig,
    ImageTags,
    ModelConfig,
    MoextendError,
    Named,
    TowerConfig,
    VisionConfig,
    WhisperConfig,
    of_pictures,
)
from moextend_jax.extension.routing import check_sources, chosen_layers
from moextend_jax.families import FAMILIES, towers
from moextend_jax.runs.media import medium_of, projector_of
from moextend_jax.runs.models_of import config_of_extension, rivals_of
from moextend_jax.runs.results import table
from moextend_jax.settings import MediumSettings, RunSettings, SelectSettings

DECODERS = {
    name: DecoderConfig(family=model_type, **{**family.fields, **sizes})
    for model_type, family in FAMILIES.items()
    for name, sizes in family.published.items()
}
TOWERS = {
    name: VisionConfig(family=family, **{**tower.fields, **sizes})
    for family, tower in towers.TOWERS.items()
    for name, sizes in tower.published.items()
}


WHISPERS = {
    name: WhisperConfig(width=width, hidden=4 * width, layers=layers, heads=width // 64, bands=bands)
    for name, width, layers, bands in (
        ("whisper-tiny", 384, 4, 80), ("whisper-base", 512, 6, 80), ("whisper-small", 768, 12, 80),
        ("whisper-medium", 1024, 24, 80), ("whisper-large-v2", 1280, 32, 80), ("whisper-large-v3", 1280, 32, 128),
    )
}  # fmt: skip


def model_config(settings: RunSettings, *, stage: str, layers: int | None = None) -> ModelConfig:
    """Sizes for `stage`. From grow on, a share p of the layers, evenly spread, has X new experts each.

    Args:
      layers: decoder layers to keep of the base; None: all.
    """
    feature_layer = settings.recipe.feature_layer
    decoder = _decoder(settings.base)
    if layers is not None:
        if not decoder.dense_layers < layers <= decoder.layers:
            raise MoextendError(
                f"--layers {layers}: {settings.base} has {decoder.layers}, which route from {decoder.dense_layers} on"
            )
        decoder = dataclasses.replace(decoder, layers=layers, local=decoder.local[:layers])
    vision = _vision(settings)
    config = of_pictures(decoder=decoder, vision=vision, **settings.model_options)
    media = dict(config.media)
    for number, name in enumerate(settings.trunks_first):
        if name in media:
            media[name] = dataclasses.replace(media[name], projector=projector_of(name, settings, media))
        else:
            tower = _tower_of(name, settings.media[name], vision, feature_layer=feature_layer)
            # Any ids will do: a plan reads no text.
            media[name] = medium_of(name, settings, tower, media, tags=ImageTags(pad=7 + number))
    rows, links = table(settings), {link.name: link for link in settings.links}
    extensions = {}
    grown = rows.grown((*rows.result(stage).parents, stage))
    for name in (name for name in grown if not links[name].rival):
        own = settings.of_extension(name)
        extensions[name] = config_of_extension(
            settings, name, chosen=_chosen(decoder, own.select), start=own.grow.start, calibrator=own.grow.calibrator
        )
    return dataclasses.replace(config, media=Named(media), extensions=Named(extensions), **rivals_of(settings, grown))


def _chosen(decoder: DecoderConfig, select: SelectSettings) -> dict[str, Any]:
    """A selection of floor(p * Z) of the Z layers that route, evenly spread where data will choose: which
    ones makes no difference."""
    routed = decoder.routed
    rule = "interval" if select.layers == "extender" else select.layers
    layers = tuple(routed[z] for z in chosen_layers(rule, np.zeros(len(routed)), share=select.share))
    new = select.number(decoder.experts)
    check_sources(new, select.wide, experts=decoder.experts)
    sources = tuple(range(new * select.wide)) * len(layers)
    return {"chosen_layers": layers, "sources": sources, "new_experts": new, "wide": select.wide}


def _tower_of(name: str, of: MediumSettings, vision: VisionConfig | None, *, feature_layer: int) -> TowerConfig:
    if of.kind == "features":
        return FeaturesConfig(width=of.width, patches=of.patches)
    if not of.tower and vision is not None and of.kind != "audio":
        return vision
    folder = tower_folder(of.tower, of.kind)
    if of.tower and folder.exists():
        return open_tower(of.tower, kind=of.kind, medium=name, seconds=of.seconds, feature_layer=feature_layer)[0]
    if folder.name in TOWERS:
        return dataclasses.replace(TOWERS[folder.name], feature_layer=feature_layer)
    if folder.name in WHISPERS:
        return dataclasses.replace(WHISPERS[folder.name], seconds=of.seconds)
    raise MoextendError(
        f"media.{name}.tower {of.tower!r} is no folder, and no published tower: {', '.join((*TOWERS, *WHISPERS))}"
    )


def _decoder(base: str) -> DecoderConfig:
    folder = folder_of(base)
    if folder.exists():
        return _sizes(folder) or open_source(folder).config.decoder
    if folder.name not in DECODERS:
        raise MoextendError(f"base {base!r} is no folder, and no published model: {', '.join(DECODERS)}")
    return DECODERS[folder.name]


def _sizes(folder: Path) -> DecoderConfig | None:
    """Sizes from config.json alone, so that a folder without weights is enough; None: it has to be opened.

    One of the released layout has, since its tower is among its tensors, and config.json need not say its sizes.
    """
    path = folder / "config.json"
    attributes = huggingface.read_json(path) if path.exists() else {}
    if attributes.get("model_type") not in FAMILIES or {"add_layer", "visual"} & attributes.keys():
        return None
    return huggingface.read_decoder_config(folder)


TEXT_ONLY = "left out"
"""What `vision` says where a model that sees is to be planned without its tower, projector and pictures."""


def _vision(settings: RunSettings) -> VisionConfig | None:
    """The tower of pictures that a run with these settings has (`loading.open_base`)."""
    if settings.vision in (NO_PICTURES, TEXT_ONLY):
        return None
    folder, feature_layer = folder_of(settings.base), settings.recipe.feature_layer
    if settings.vision in ("", "embedded") and folder.exists():
        if _sizes(folder) is None:
            source = open_source(folder, feature_layer=feature_layer)
            if "vision" in source.parts:
                return source.config.vision
        elif (folder / "vision" / "config.json").is_file():
            return huggingface.read_vision_config(folder / "vision", feature_layer=feature_layer)
    if not settings.vision:
        raise MoextendError(
            f'{settings.base} has no vision tower of its own, which config.vision = "" asks for: name one with --vision'
        )
    return _tower(settings.vision, feature_layer=feature_layer)


def _tower(vision: str, *, feature_layer: int) -> VisionConfig:
    folder = folder_of(vision, inside="vision")
    if folder.exists():
        return huggingface.read_vision_config(folder, feature_layer=feature_layer)
    if folder.name not in TOWERS:
        raise MoextendError(f"vision {vision!r} is no folder, and no published tower: {', '.join(TOWERS)}")
    return dataclasses.replace(TOWERS[folder.name], feature_layer=feature_layer)
