"""Sizes of the model that a stage trains, without its weights: settings in, `ModelConfig` out.

A base or tower whose folder is not there may be named as published: its sizes are in the table.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.loading import folder_of, open_source
from moextend_jax.config import DecoderConfig, ExtensionConfig, ModelConfig, MoextendError, VisionConfig
from moextend_jax.runs.results import result
from moextend_jax.settings import RunSettings

_8X22B = DecoderConfig(width=6144, hidden=16384, layers=56, heads=48)
DECODERS = {
    "Mixtral-8x7B-v0.1": DecoderConfig(),
    "Mixtral-8x7B-Instruct-v0.1": DecoderConfig(),
    "Mixtral-8x22B-v0.1": _8X22B,
    "Mixtral-8x22B-Instruct-v0.1": _8X22B,
}
TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig(),
    "clip-vit-large-patch14": VisionConfig(image_size=224),
}


def model_config(settings: RunSettings, *, stage: str, layers: int | None = None) -> ModelConfig:
    """In finetune the share p of the layers has one new expert, evenly spread; `settings.vision` "" is a text model.

    Args:
      layers: decoder layers to keep of the base; None: all.
    """
    feature_layer = settings.recipe.feature_layer
    decoder = _decoder(settings.base)
    if layers is not None:
        if not 1 <= layers <= decoder.layers:
            raise MoextendError(f"--layers {layers}: {settings.base} has {decoder.layers}")
        decoder = dataclasses.replace(decoder, layers=layers)
    return ModelConfig(
        decoder=decoder,
        vision=_tower(settings.vision, feature_layer=feature_layer) if settings.vision else None,
        extension=extension(decoder, share=settings.select.share) if result(stage).grown else None,
        **settings.model_options,
    )


def extension(decoder: DecoderConfig, *, share: float) -> ExtensionConfig:
    """floor(p * layers) layers, the last of each run of 1/p: which ones the data will choose makes no difference."""
    extended = int(share * decoder.layers)
    if not extended:
        raise MoextendError(f"select.share = {share} extends none of {decoder.layers} layers")
    layers = tuple((n + 1) * decoder.layers // extended - 1 for n in range(extended))
    return ExtensionConfig(layers=layers, sources=(0,) * extended)


def _decoder(base: str) -> DecoderConfig:
    folder = folder_of(base)
    if folder.exists():
        return _sizes(folder) or open_source(folder).config.decoder
    if folder.name not in DECODERS:
        raise MoextendError(f"base {base!r} is no folder, and no published model: {', '.join(DECODERS)}")
    return DECODERS[folder.name]


def _sizes(folder: Path) -> DecoderConfig | None:
    """From config.json alone, so that a folder without weights will do."""
    path = folder / "config.json"
    if not path.exists() or huggingface.read_json(path).get("model_type") != "mixtral":
        return None
    return huggingface.read_decoder_config(folder)


def _tower(vision: str, *, feature_layer: int) -> VisionConfig:
    folder = folder_of(vision, inside="vision")
    if folder.exists():
        return huggingface.read_vision_config(folder, feature_layer=feature_layer)
    if folder.name not in TOWERS:
        raise MoextendError(f"vision {vision!r} is no folder, and no published tower: {', '.join(TOWERS)}")
    return dataclasses.replace(TOWERS[folder.name], feature_layer=feature_layer)
