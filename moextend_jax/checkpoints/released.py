"""What files of the method's released layout say of a model, besides its decoder and tower; and what they must say.

In: config.json and tensors of a released checkpoint, or of a whole LLaVA as `llava` has put it. Out: extensions, tags,
sounds, how a run made it. The other way round the attributes of an export.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from moextend_jax.checkpoints import huggingface, llava, names, spelling, store
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.checkpoints.whisper import check_front_end, whisper_config
from moextend_jax.config import (
    IMAGE,
    DecoderConfig,
    ExtensionConfig,
    ImageTags,
    ModelConfig,
    MoextendError,
    Named,
    Recipe,
    StartName,
    with_extension,
)
from moextend_jax.families.attributes import MOST, fits
from moextend_jax.models.starts import STARTS
from moextend_jax.outside import short, shown
from moextend_jax.settings import build, fields


def is_released(stored: Mapping[str, Stored], attributes: Mapping[str, Any]) -> bool:
    marks = (".gate_vision.", ".weight_scale.", "model.visual.")
    return "add_layer" in attributes or any(mark in name for name in stored for mark in marks)


def facts_of(attributes: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """How a run made the model, where our export has written that into config.json; nothing else does."""
    facts = attributes.get("moextend", {})
    if not isinstance(facts, dict):
        raise MoextendError(f"{where}: moextend = {shown(facts)} is not what an export writes there")
    kinds = {"recipe": Recipe, "text_isolation": fields(ModelConfig)["text_isolation"], "extension": str}
    try:
        read = {
            name: build(kind, facts[name], where=f"moextend.{name}") for name, kind in kinds.items() if name in facts
        }
    except MoextendError as error:  # which may be as long as what stands in the file
        raise MoextendError(f"{where}: {short(str(error))}") from None
    if not store.NAME.fullmatch(read.get("extension", IMAGE)):
        raise MoextendError(f"{where}: moextend.extension = {shown(read['extension'])} is no name")
    return read | ({"recipe": dataclasses.asdict(read["recipe"])} if "recipe" in read else {})


def image_tags(attributes: Mapping[str, Any]) -> ImageTags:
    """The ids of a checkpoint for images: where our export says so by name, or the released layout has added them,
    start, end, pad in a row."""
    named = attributes.get("image_tags")
    if isinstance(named, dict) and named.keys() == {"start", "end", "pad"} and all(map(_is_id, named.values())):
        return ImageTags(**named)
    visual = attributes.get("visual")
    start: Any = visual.get("image_start_id") if isinstance(visual, dict) else None
    return ImageTags(start=start, end=start + 1, pad=start + 2) if _is_id(start) else ImageTags()


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def model_of(
    stored: Mapping[str, Stored], attributes: Mapping[str, Any], *, base: DecoderConfig | None, layout: str, name: str,
    where: Path,
) -> ModelConfig:  # fmt: skip
    """The decoder and its extensions, as config.json says and the tensors show; media it has none yet.

    Args:
      attributes: none for tensors that a stage trained, without a config.json.
      base: decoder of the base that such tensors belong to.
      layout: released, or hf, whose files may list several extensions.
      name: what an extension is called that the files give no name.

    Raises:
      MoextendError: the two contradict each other, or an attribute is not as it should be.
    """
    extension = _extension_in(stored)
    config = ModelConfig(decoder=base or DecoderConfig())
    if attributes or base is None:
        ours = ("moextend", "new_experts", *llava.ADDED, *llava.SOUNDS)
        plain = {attribute: value for attribute, value in attributes.items() if attribute not in ours}
        decoder = huggingface.decoder_config(plain, where=where)
        configured = extension_config(attributes, where=where)
        if configured and layout == "released":  # where new experts are counted among the others
            decoder = dataclasses.replace(decoder, experts=decoder.experts - (extension or configured).new_experts)
            if decoder.experts < decoder.top_k:
                raise MoextendError(f"{where}: num_local_experts leaves {decoder.experts} besides the new experts")
        config = ModelConfig(decoder=decoder)
        if layout == "hf" and attributes.get("extensions") is not None:
            config, extension = _listed(config, attributes, where=where), None
        named_layers, stored_layers = (part and list(part.layers) for part in (configured, extension))
        if named_layers != stored_layers and (extension or base is None):
            raise MoextendError(
                f"{where}: add_layer is {shown(named_layers)}, but the files hold new experts in layers "
                f"{shown(stored_layers)}"
            )
        if extension and configured and configured.new_experts == extension.new_experts:
            extension = dataclasses.replace(configured, calibrator_width=extension.calibrator_width)
        twin = configured is not None and configured.start == "twin"
        if twin and (extension is None or extension.start != "twin" or max(extension.sources) >= decoder.experts):
            raise MoextendError(f"{where}: sources = {shown(attributes['sources'])} are not those of its new experts")
    if extension is None:
        return config
    blind = layout == "hf" and attributes.get("vision_config") is None
    return with_extension(config, dataclasses.replace(extension, medium="" if blind else IMAGE), name=name)


def _listed(config: ModelConfig, attributes: Mapping[str, Any], *, where: Path) -> ModelConfig:
    """The model with the extensions that a config.json of layout hf lists, sharing tokens as it says."""
    try:
        extensions = Named(store.extensions_in(attributes["extensions"], config.decoder))
        rule = attributes.get("composition", config.composition)
        rule = build(fields(ModelConfig)["composition"], rule, where="composition")
    except (ValueError, MoextendError) as error:
        raise MoextendError(f"{where}: extensions: {short(str(error))}") from None
    return dataclasses.replace(config, extensions=extensions, composition=rule)


def extension_config(attributes: Mapping[str, Any], *, where: Path) -> ExtensionConfig | None:
    """The one extension that config.json of this layout can name; None: it names none."""
    layers = attributes.get("add_layer")
    if not layers:
        return None
    numbers = isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
    if not numbers or layers != sorted({*layers}):
        raise MoextendError(f"{where}: add_layer = {shown(layers)} is no ascending list of layers")
    count = attributes.get("num_hidden_layers")
    if not fits("layers", count):
        raise MoextendError(f"{where}: num_hidden_layers = {shown(count)} is impossible")
    if beyond := [layer for layer in layers if layer >= count]:
        raise MoextendError(f"{where}: add_layer names layers {shown(beyond)}, but the model has only {count} layers")
    sources, start, wide = attributes.get("sources"), attributes.get("start", "copy"), attributes.get("wide", 1)
    for name, value in (("new_experts", new := attributes.get("new_experts", 1)), ("wide", wide)):
        if not fits("experts", value) or value > spelling.MOST_EXPERTS:
            raise MoextendError(f"{where}: {name} = {shown(value)} is impossible")
    if not isinstance(sources, list) or not all(type(n) is int and n >= -1 for n in sources):
        sources = []
    if "new_experts" not in attributes:  # the released layout
        new = max(1, len(sources) // len(layers))
    known = len(sources) == len(layers) * new * wide
    if start not in tuple(STARTS) or (start == "twin" and not (known and -1 not in sources)):
        raise MoextendError(
            f"{where}: start = {shown(start)} cannot be honoured (only {', '.join(STARTS)}, and twin of known sources)"
        )
    sources = sources if known else [-1] * (len(layers) * new * wide)
    return ExtensionConfig(
        layers=tuple(layers), sources=tuple(sources), new_experts=new, wide=wide, start=cast(StartName, start)
    )


def _extension_in(stored: Mapping[str, Stored]) -> ExtensionConfig | None:
    """The extension whose router columns these tensors hold; a file does not say which experts it copied (-1)."""
    pattern = re.compile(r"model\.layers\.([0-9]{1,9})\.block_sparse_moe\.(gate_vision|weight_scale)\..*")
    layers = sorted({int(match[1]) for name in stored if (match := pattern.fullmatch(name))})
    if not layers:
        return None
    block = f"model.layers.{layers[0]}.block_sparse_moe."
    gate = stored.get(block + "gate_vision.weight")
    calibrator = stored.get(block + "weight_scale.weight_scale.0.weight")
    new_experts = min(max(1, gate.shape[0]), spelling.MOST_EXPERTS) if gate and gate.shape else 1
    return ExtensionConfig(
        layers=tuple(layers),
        sources=(-1,) * (len(layers) * new_experts),
        new_experts=new_experts,
        calibrator_width=max(1, calibrator.shape[0]) if calibrator and calibrator.shape else 16,
    )


def with_sounds(config: ModelConfig, attributes: Mapping[str, Any], *, where: Path) -> ModelConfig:
    """The model with the medium of sounds that config.json of layout hf describes."""
    try:
        own, heard = dict(attributes["sounds"]), dict(attributes["audio_config"])
        name, layer = own.pop("name"), attributes.get("audio_feature_layer", -1)
        tower = dataclasses.replace(whisper_config(heard, where=where), feature_layer=layer)
        medium = store.checked_medium(name, own | {"tower": dataclasses.asdict(tower)})
        if (why := names.unheard(medium)) or name in config.media or medium.tags.pad == config.tags.pad:
            raise ValueError(f"{name}{why or ' is called, or has the tags, as pictures have'}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MoextendError(f"{where}: sounds: {short(str(error))}") from None
    check_front_end(where.parent, tower)
    return dataclasses.replace(config, media=config.media.replacing(name, medium))


def attributes_of(config: ModelConfig, decoder: Mapping[str, Any], tower: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of the decoder with what this layout adds: experts counted with the new ones, the layers that have them,
    their sources if there are several, the attributes of the tower, ids of the image tags."""
    extension, tags, before = config.extension, config.tags, decoder.get("visual")
    attributes = {**decoder, "add_layer": list(extension.layers) if extension else None}
    attributes["num_local_experts"] = config.decoder.experts + (extension.new_experts if extension else 0)
    if extension and extension.new_experts > 1:
        attributes["sources"] = list(extension.sources)
    if (tags.end, tags.pad) == (tags.start + 1, tags.start + 2):  # what the released code wrote there besides stays
        attributes["visual"] = (before if isinstance(before, dict) else {}) | {"image_start_id": tags.start}
    return attributes | ({"vision_config": tower} if tower else {})


ADDED = frozenset({"add_layer", "sources", "visual", "vision_config", "moextend"})
"""Attributes that only this layout has."""
