"""A whole model as the folder that transformers 5 loads: weights, config.json, tokenizer, processor, chat template.

In: an opened checkpoint and the recipe that it was trained by. Out: `Folder`, what to write; nothing is read of the
weights yet. A model that sees is transformers' own LLaVA over its decoder; one that is extended or hears, and one whose
logits LLaVA would not divide, is of the class of assets/hf/modeling_moextend.py, which goes along; one without eyes and
ears is a decoder, or an extended one of that file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from moextend_jax.checkpoints import huggingface, leaves, names, quantising, store, whisper
from moextend_jax.checkpoints.chat_template import ASSETS, chat_template, writes_bos
from moextend_jax.checkpoints.cost import Cost, watched
from moextend_jax.checkpoints.llava import patches_are
from moextend_jax.checkpoints.source import Source, with_what_is_read
from moextend_jax.checkpoints.tensors import Planned, new_folder, write_safetensors
from moextend_jax.checkpoints.tokenizer_json import tokenizer_files
from moextend_jax.config import (
    IMAGE,
    FeaturesConfig,
    Medium,
    ModelConfig,
    MoextendError,
    Named,
    Recipe,
    WhisperConfig,
    with_vision,
)
from moextend_jax.data.tokenizer import Tokenizer, ends_of, tokenizer_of
from moextend_jax.families import FAMILIES
from moextend_jax.models.router import Rule

CODE, PROCESSOR = "modeling_moextend.py", "processing_moextend.py"
KEPT = ("max_position_embeddings", "router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id")
"""Attributes of the base's config.json that have an effect only in transformers."""
MODEL_FILES = ("chat_template.jinja", "chat_template.json")
"""Side files of a base that a text model takes along as they are."""


class Folder(NamedTuple):
    """What a folder holds: tensors by name, files of JSON and of text by name, files to copy by their new name."""

    tensors: dict[str, Planned]
    json_files: dict[str, dict[str, Any]]
    texts: dict[str, str]
    copies: dict[str, Path]


def export_transformers(
    source: Source,
    dst: Path,
    *,
    recipe: Recipe,
    text_isolation: str = "none",
    max_shard_bytes: int,
    console: Console | None = None,
) -> Cost:
    """Writes the folder, whole or not at all.

    Raises:
      MoextendError: a part is missing, or transformers has no way to do what the model does, or files hold its experts
        in few bits.
    """
    quantising.check_readable(source.leaves)
    folder = folder_of_model(source, recipe=recipe, text_isolation=text_isolation)
    with watched(folder.tensors, dst, console) as (cost, written), new_folder(dst) as new:
        write_safetensors(new, folder.tensors, max_shard_bytes=max_shard_bytes, written=written)
        for name, value in folder.json_files.items():
            indent = None if name == "tokenizer.json" else 1  # 90,000 lines that nobody reads
            (new / name).write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, text in folder.texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for name, path in folder.copies.items():
            (new / name).write_bytes(path.read_bytes())  # which may be in a bucket
    return cost()


def folder_of_model(source: Source, *, recipe: Recipe, text_isolation: str = "none") -> Folder:
    """The folder for what `source` holds: a LLaVA, extended or not, if there are a tower and a projector; else a
    decoder, extended by tasks in text or not. Either may hear too."""
    if "decoder" not in source.parts:
        raise MoextendError(f"layout hf needs a decoder; there is only {', '.join(sorted(source.parts))}")
    config, extended = _of_what_is_there(source), "extension" in source.parts
    sees, taught = IMAGE in config.media, extended or bool(config.media)  # taught here: it is asked by the recipe
    if taught:
        kept = [path for path in source.leaves if not path.startswith("media/") or path.split("/")[1] in config.media]
        names.check_published(kept, config, layout="hf")
    for name, extension in config.extensions.items():
        if extension.medium and extension.medium not in config.media:
            raise MoextendError(
                f"extension {name} is for the medium {extension.medium}, and there is no tower and no projector for "
                "it: name its --vision, or export it with --layout delta"
            )
    hears = next((name for name, medium in config.media.items() if isinstance(medium.tower, WhisperConfig)), None)
    tokenizer = _tokenizer(source, config)
    text = _text_attributes(source)
    table = "transformers" if taught else config.decoder.family
    if sees:
        config = with_vision(config, config.vision, tags=tokenizer.tags if tokenizer else None)
        attributes = _llava_attributes(config, text)
    elif taught:
        attributes = {"dtype": text["dtype"], "text_config": text, "tie_word_embeddings": config.decoder.tied_head}
    else:
        attributes = {"architectures": [FAMILIES[table].architecture], **text}
    if extended or hears or (sees and config.decoder.logits_divisor != 1):
        attributes |= _own_class(sees=sees)
    if taught:
        attributes["moextend"] = {"recipe": dataclasses.asdict(recipe), "text_isolation": text_isolation}
    if extended:
        attributes |= _extension_attributes(config, recipe, text_isolation)
    if hears:
        attributes |= _sound_attributes(hears, config.media[hears])
    folder = Folder(
        tensors=leaves.plan_theirs(source.leaves, table=table, config=config),
        json_files={"config.json": attributes, "generation_config.json": _generation(source, config, tokenizer)},
        texts={},
        copies={name: path for name, path in source.files.items() if name in MODEL_FILES and not taught},
    )
    if "auto_map" in attributes:
        folder.copies[CODE] = ASSETS / CODE
    if sees:
        folder.json_files.update(_processor(config, recipe))
    if hears:
        own = folder.json_files.get("processor_config.json", {})
        folder.json_files["processor_config.json"] = own | _sound_processor(config.media[hears], sees=sees)
        folder.copies[PROCESSOR] = ASSETS / PROCESSOR
    if tokenizer is not None:
        _add_tokenizer(folder, source, tokenizer, recipe, media=[*config.media], taught=taught)
    return folder


def _of_what_is_there(source: Source) -> ModelConfig:
    """The model with the media that have a projector, and a tower if they need one: in a chain, those that are not
    learnt yet have a tower alone."""
    config = with_what_is_read(source.config, source.leaves)
    towers = {path.split("/")[1] for path in source.leaves if path.startswith("media/") and "/tower/" in path}
    there = {name: m for name, m in config.media.items() if name in towers or isinstance(m.tower, FeaturesConfig)}
    return dataclasses.replace(config, media=Named(there))


def _add_tokenizer(
    folder: Folder, source: Source, tokenizer: Tokenizer, recipe: Recipe, *, media: Sequence[str], taught: bool
) -> None:
    # The released code tokenises its question apart from what follows: a space at its end stays one.
    apart = f"{' ' * (1 + tokenizer.legacy)}[/INST]" if taught and recipe.prompt == "released" else ""
    files = tokenizer_files(Path(tokenizer.where), tokenizer, media=media, apart=apart)
    if "tokenizer.model" in source.files:
        folder.copies["tokenizer.model"] = source.files["tokenizer.model"]
    if taught:
        template = folder.texts["chat_template.jinja"] = chat_template(tokenizer, recipe, files)
        if not writes_bos(template, tokenizer, files):  # then the tokenizer must not write one either
            files = files._replace(content=files.content | {"post_processor": None})
            files.settings["add_bos_token"] = False
    elif (at := Path(tokenizer.where) / "tokenizer_config.json").is_file():
        own = huggingface.read_json(at)  # its chat template may lie here alone
        files.settings.update((name, own[name]) for name in ("chat_template",) if name in own)
    folder.json_files.update({"tokenizer.json": files.content, "tokenizer_config.json": files.settings})


def _tokenizer(source: Source, config: ModelConfig) -> Tokenizer | None:
    """None if the checkpoint brings none: the model then takes ids."""
    if (folder := source.tokenizer_folder) is None:
        return None
    tokenizer = tokenizer_of(folder, source.config, ends=source.ends)
    others = Named({name: medium for name, medium in config.media.items() if name != IMAGE})
    return dataclasses.replace(tokenizer, others=others)


# --- attributes -------------------------------------------------------------------------------------------------------


def _text_attributes(source: Source) -> dict[str, Any]:
    decoder, recorded = source.config.decoder, source.record.attributes.get("decoder", {})
    dtype = str(source.leaves["decoder/embed"].dtype)
    own = huggingface.decoder_attributes(decoder, dtype=dtype)
    carried = {name: recorded[name] for name in KEPT if recorded.get(name) is not None}
    return {name: value for name, value in (own | carried).items() if name not in ("architectures", "torch_dtype")} | {
        "dtype": dtype
    }


def _llava_attributes(config: ModelConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    vision = config.vision
    assert vision is not None
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": text["dtype"],
        "text_config": dict(text),
        "vision_config": {
            name: value for name, value in huggingface.vision_attributes(vision).items() if name != "architectures"
        },
        "image_token_index": config.tags.pad, "image_seq_length": vision.patches,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": patches_are(vision.family),
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "tie_word_embeddings": config.decoder.tied_head,
        "image_tags": dataclasses.asdict(config.tags),
    }  # fmt: skip


def _own_class(*, sees: bool) -> dict[str, Any]:
    """Attributes by which transformers finds our class; `transformers serve` loads it as AutoModelForMultimodalLM."""
    module, autos = CODE.removesuffix(".py"), ["AutoModelForCausalLM", "AutoModelForMultimodalLM"]
    if sees:
        config, model, model_type = "MoExtendConfig", "MoExtendForConditionalGeneration", "moextend"
        autos.append("AutoModelForImageTextToText")
    else:
        config, model, model_type = "MoExtendTextConfig", "MoExtendForCausalLM", "moextend_text"
    auto_map = {"AutoConfig": f"{module}.{config}", **dict.fromkeys(autos, f"{module}.{model}")}
    return {"architectures": [model], "model_type": model_type, "auto_map": auto_map}


def _extension_attributes(config: ModelConfig, recipe: Recipe, text_isolation: str) -> dict[str, Any]:
    decoder = config.decoder
    router = {"experts": decoder.experts, **Rule.of(decoder)._asdict()}
    return {
        # A list, since their order numbers the experts, and transformers sorts names.
        "extensions": [{"name": n, **store.extension_attributes(added)} for n, added in config.extensions.items()],
        "weight_guard": recipe.weight_guard, "mass": recipe.mass, "text_isolation": text_isolation,
        "composition": config.composition,
        "router": router | {"bias": decoder.router_bias, "selection_bias": decoder.selection_bias},
        "expert": {
            "width": decoder.hidden, "bias": decoder.expert_bias, "glu": decoder.glu, "glu_limit": decoder.glu_limit,
        },
    }  # fmt: skip


def _sound_attributes(name: str, medium: Medium) -> dict[str, Any]:
    own = {key: value for key, value in store.medium_attributes(medium).items() if key != "tower"}
    assert isinstance(medium.tower, WhisperConfig)
    return {
        "sounds": {"name": name, **own},
        "audio_config": whisper.whisper_attributes(medium.tower), "audio_feature_layer": medium.tower.feature_layer,
    }  # fmt: skip


def _generation(source: Source, config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Every id that ends an answer, and those that none may have."""
    recorded = source.record.attributes.get("decoder", {})
    ends = list(tokenizer.ends) if tokenizer else ends_of(recorded)
    bos = tokenizer.bos if tokenizer else recorded.get("bos_token_id")
    pad = tokenizer.pieces.unknown if tokenizer else None
    pad = ends[0] if pad is None and ends else pad
    generation = {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad, "do_sample": False}
    if tokenizer is not None and config.media:
        generation["suppress_tokens"] = sorted(tokenizer.unspeakable(config.decoder.vocab_size))
    return {name: value for name, value in generation.items() if value not in (None, [])}


def _processor(config: ModelConfig, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """LLaVA's processor, which prepares pictures as `media.image` does for this recipe. On its Pillow backend the
    pixels are ours; torchvision's resizing rounds some of them otherwise by a level or two."""
    vision = config.vision
    assert vision is not None
    size = vision.image_size
    pictures = huggingface.preprocessor(vision) | {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor",
        "do_pad": recipe.image_preparation == "pad", "do_resize": True, "size": {"shortest_edge": size},
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
    }  # fmt: skip
    if vision.stretched:
        pictures |= {"do_pad": False, "size": {"height": size, "width": size}, "do_center_crop": False}
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": patches_are(vision.family),
    }  # fmt: skip
    return {"preprocessor_config.json": pictures, "processor_config.json": processor}


def _sound_processor(medium: Medium, *, sees: bool) -> dict[str, Any]:
    """Attributes of the processor of assets/hf/processing_moextend.py, which prepares sounds as `media.audio` does."""
    name = "MoExtendProcessor" if sees else "MoExtendAudioProcessor"
    assert isinstance(medium.tower, WhisperConfig)
    return {
        "processor_class": name, "auto_map": {"AutoProcessor": f"{PROCESSOR.removesuffix('.py')}.{name}"},
        "feature_extractor": whisper.front_end(medium.tower), "neighbours": medium.projector.neighbours,
        "spans": list(medium.spans),
    }  # fmt: skip
