"""Hugging Face folders in and out: `config.json` <-> sizes, and a folder's parameters as host arrays by our path.

Attributes of config.json that we do not know or cannot honour are errors that name them; so are tensors that are
unknown, missing or misshapen (`leaves.match`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moextend_jax.checkpoints import leaves
from moextend_jax.checkpoints.attributes import (
    MOST,
    OF_ANY_MODEL,
    Table,
    decoder_attributes_of,
    fits,
    read_fields,
    with_head_size,
)
from moextend_jax.checkpoints.outside import inside, parse_json, read_small, short, shown
from moextend_jax.checkpoints.spelling import published, unwrapped
from moextend_jax.checkpoints.tensors import Stored, open_tensors, write_safetensors
from moextend_jax.config import DecoderConfig, ExtensionConfig, ImageTags, ModelConfig, MoextendError, VisionConfig
from moextend_jax.families import FAMILIES
from moextend_jax.media.image import MEAN_c, STD_c
from moextend_jax.parameters import by_path

_VISION = {
    "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "image_size": "image_size", "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps", "hidden_act": "activation",
}  # fmt: skip

_CLIP = Table(
    sizes=_VISION,
    must_be={
        "hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,), "attention_dropout": (0,), "dropout": (0,),
        "is_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},),
    },
    harmless=OF_ANY_MODEL,
    optional={"layer_norm_eps", "hidden_act"},
)  # fmt: skip

CLIP_DEFAULTS: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
"""What transformers takes where a configuration inside another is silent: it leaves out there what is so."""

PUBLISHED_TOWERS = tuple(
    VisionConfig(width=width, hidden=4 * width, layers=layers, heads=width // 64, patch_size=patch, image_size=image)
    for width, layers, patch, image in (
        (768, 12, 32, 224), (768, 12, 16, 224), (1024, 24, 14, 224), (1024, 24, 14, 336),
    )
)  # fmt: skip
"""OpenAI's CLIP towers: the only ones whose number of heads follows from the shapes of their tensors."""


PREPROCESSOR: dict[str, Any] = {
    "image_mean": [round(float(mean), 6) for mean in MEAN_c], "image_std": [round(float(std), 6) for std in STD_c],
    "do_normalize": True, "do_rescale": True, "rescale_factor": round(1 / 255, 6), "resample": 3,
    "do_convert_rgb": True,
}  # fmt: skip
"""What a tower's pictures must be prepared by: the levels of `media.image`. What of a picture is shown, the rest of
preprocessor_config.json, is the recipe's choice."""


def check_preprocessor(path: Path) -> None:
    """Refuses a preprocessor_config.json (or the part of a processor_config.json that is one) of a tower that was
    trained on other levels: it would see wrong colours."""
    attributes = read_json(path)
    nested = attributes.get("image_processor")
    for name, value in (nested if isinstance(nested, dict) else attributes).items():
        only = PREPROCESSOR.get(name)
        if only is not None and value is not None and not _nearly(value, only):
            raise MoextendError(
                f"{path}: {name} = {shown(value)} cannot be honoured (only {only}): here pictures are prepared as for "
                "OpenAI's CLIP, and a tower that was trained on others would see other colours"
            )


def check_picture_size(folder: Path, tower: VisionConfig) -> None:
    """Refuses a tower whose preprocessor_config.json makes pictures of another size than the tower takes."""
    path = folder / "preprocessor_config.json"
    attributes = read_json(path) if path.is_file() else {}
    for name in ("size", "crop_size"):
        size = attributes.get(name)
        sides = size.values() if isinstance(size, dict) else [] if size is None else [size]
        if any(side != tower.image_size for side in sides):
            raise MoextendError(
                f"{path}: {name} = {shown(size)} cannot be honoured: here a picture is made as large as the tower "
                f"takes it, {tower.image_size}"
            )


def _nearly(value: Any, only: Any) -> bool:
    try:
        return np.shape(value) == np.shape(only) and np.allclose(np.asarray(value, float), only, rtol=1e-3, atol=0)
    except (TypeError, ValueError):
        return False


# --- config.json -> sizes ---------------------------------------------------------------------------------------------


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Sizes from a decoder's `config.json`; of an extended model only pretrained experts count."""
    return decoder_config(read_json(folder / "config.json"), where=folder / "config.json")


def read_vision_config(folder: Path, *, feature_layer: int) -> VisionConfig:
    """Sizes of the tower from the `config.json` of a CLIP vision model or of a whole CLIP."""
    return vision_config(read_json(folder / "config.json"), where=folder / "config.json", feature_layer=feature_layer)


def read_extension_config(folder: Path) -> ExtensionConfig | None:
    """The extended layers of a checkpoint in the released layout; its source experts are mostly not in it (-1)."""
    return extension_config(read_json(folder / "config.json"), where=folder / "config.json")


def decoder_config(attributes: Mapping[str, Any], *, where: Path) -> DecoderConfig:
    attributes = decoder_attributes_of(attributes, where=where)
    family = attributes.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise MoextendError(f"{where}: model_type is {shown(family)}, expected one of {known}{_why_not(family)}")
    fields = with_head_size(read_fields(attributes, FAMILIES[family].attributes, where=where), where=where)
    if attributes.get("add_layer"):
        fields["experts"] -= 1
    if fields["heads"] % fields["kv_heads"] or not 1 <= fields["top_k"] <= fields["experts"]:
        raise MoextendError(
            f"{where}: num_key_value_heads must divide num_attention_heads, and num_experts_per_tok be at most "
            "num_local_experts"
        )
    config = DecoderConfig(family=family, **{**FAMILIES[family].fields, **fields})
    if problem := _impossible(config) or FAMILIES[family].refusal(attributes):
        raise MoextendError(f"{where}: {problem}")
    return config


def _impossible(config: DecoderConfig) -> str:
    """What sizes that are possible one by one cannot be together; "" where they can."""
    in_group, rest = divmod(config.experts, config.groups)
    problems = {
        "all layers are dense, and none routes": config.dense_layers >= config.layers,
        "dense layers are of no width": config.dense_layers > 0 and not config.dense_hidden,
        f"{config.experts} experts make no {config.groups} groups of two or more": rest
        or (config.groups > 1 and in_group < 2),
        f"of {config.top_groups} groups a token cannot take {config.top_k} experts": (
            config.top_groups > config.groups or config.top_k > config.top_groups * in_group
        ),
        f"a part of {config.rotary_size} of a head of {config.head_size} cannot be turned": (
            config.rotary_size % 2 or not 0 < config.rotary_size <= config.head_size
        ),
    }
    return next((problem for problem, is_so in problems.items() if is_so), "")


def vision_config(attributes: Mapping[str, Any], *, where: Path, feature_layer: int) -> VisionConfig:
    attributes = dict(attributes)
    if attributes.get("model_type") == "clip":
        attributes = vision_half(attributes, where)
    if (given := attributes.get("model_type")) != "clip_vision_model":
        raise MoextendError(f"{where}: model_type is {shown(given)}, expected 'clip_vision_model'{_why_not(given)}")
    config = VisionConfig(feature_layer=feature_layer, **read_fields(attributes, _CLIP, where=where))
    if config.width % config.heads or config.image_size % config.patch_size:
        raise MoextendError(f"{where}: num_attention_heads must divide hidden_size, and patch_size divide image_size")
    if not -config.layers - 1 <= feature_layer < 0:
        raise MoextendError(f"feature layer {feature_layer} is not among the {config.layers} layers of {where}")
    return config


def vision_half(attributes: Mapping[str, Any], where: Path) -> dict[str, Any]:
    half = attributes.get("vision_config")
    if not isinstance(half, dict):
        raise MoextendError(f"{where}: a CLIP without vision_config has no tower whose sizes are known")
    wins = attributes.get("vision_config_dict") or {}
    if not isinstance(wins, dict):
        raise MoextendError(f"{where}: vision_config_dict = {shown(wins)} holds no attributes")
    for name, value in wins.items():  # transformers lets these win
        if half.setdefault(name, value) != value:
            raise MoextendError(f"{where}: vision_config.{short(name)} and vision_config_dict.{short(name)} differ")
    return {**CLIP_DEFAULTS, **half}


def extension_config(attributes: Mapping[str, Any], *, where: Path) -> ExtensionConfig | None:
    layers = attributes.get("add_layer")
    if not layers:
        return None
    if (
        not isinstance(layers, list)
        or not all(type(n) is int and n >= 0 for n in layers)
        or layers != sorted({*layers})
    ):
        raise MoextendError(f"{where}: add_layer = {shown(layers)} is no ascending list of layers")
    count = attributes.get("num_hidden_layers")
    if not fits("layers", count):
        raise MoextendError(f"{where}: num_hidden_layers = {shown(count)} is impossible")
    if beyond := [layer for layer in layers if layer >= count]:
        raise MoextendError(f"{where}: add_layer names layers {shown(beyond)}, but the model has only {count} layers")
    sources: Any = attributes.get("sources")
    known = isinstance(sources, list) and sources and all(type(n) is int and n >= -1 for n in sources)
    known = known and not len(sources) % len(layers)
    start: Any = attributes.get("start", "copy")
    if start not in ("copy", "twin") or (start == "twin" and not (known and -1 not in sources)):
        raise MoextendError(f"{where}: start = {shown(start)} cannot be honoured (only copy, or twin of known sources)")
    if not known:
        return ExtensionConfig(layers=tuple(layers), sources=(-1,) * len(layers))
    return ExtensionConfig(
        layers=tuple(layers), sources=tuple(sources), new_experts=len(sources) // len(layers), start=start
    )


def image_tags(attributes: Mapping[str, Any]) -> ImageTags:
    """The ids of a checkpoint for images: where our export says so by name, or the released layout has added them,
    start, end, pad in a row."""
    named = attributes.get("image_tags")
    names = {"start", "end", "pad"}
    if isinstance(named, dict) and named.keys() == names and all(map(_is_id, named.values())):
        return ImageTags(**named)
    visual = attributes.get("visual")
    start: Any = visual.get("image_start_id") if isinstance(visual, dict) else None
    return ImageTags(start=start, end=start + 1, pad=start + 2) if _is_id(start) else ImageTags()


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _why_not(model_type: Any) -> str:
    if model_type in ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"):
        # A SigLIP tower has a bias on its patches, no class token, no norm before the layers and a pooling head
        # with attention: another forward pass, not other names.
        return ": a SigLIP tower is another network than CLIP's and is not supported"
    if model_type in ("llama", "mistral"):
        return ": a dense model has to be upcycled: give --experts N to moextend import"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      MoextendError: no such file, or something else in it; names the file.
    """
    if not path.exists():
        raise MoextendError(f"{path} does not exist: not a Hugging Face model folder")
    attributes = parse_json(read_small(inside(path)), where=f"{path} cannot be read")
    if not isinstance(attributes, dict):
        raise MoextendError(f"{path} holds no attributes of a model")
    return attributes


# --- sizes -> config.json ---------------------------------------------------------------------------------------------


def decoder_attributes(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    family = FAMILIES[config.family]
    return family.attributes.attributes_of(config) | {
        "architectures": [family.architecture], "model_type": config.family, "torch_dtype": dtype, **family.constants,
    }  # fmt: skip


def vision_attributes(config: VisionConfig) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _VISION.items()} | {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "num_channels": 3,
    }  # fmt: skip


def released_attributes(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Attributes of the released layout: experts counted with the new one, `add_layer`, ids of the image tags."""
    extension, vision, tags = config.extension, config.vision, config.tags
    added: dict[str, Any] = {}
    if extension:
        added["num_local_experts"] = config.decoder.experts + extension.new_experts
    tower = {"vision_config": vision_attributes(vision)} if vision else {}
    if extension and extension.new_experts > 1:
        added["sources"] = list(extension.sources)
    in_a_row = (tags.end, tags.pad) == (tags.start + 1, tags.start + 2)
    return {
        **decoder_attributes(config.decoder, dtype=dtype), **added, **tower,
        "add_layer": list(extension.layers) if extension else None,
        **({"visual": {"image_start_id": tags.start}} if in_a_row else {}),
    }  # fmt: skip


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_decoder_config(folder: Path, config: DecoderConfig, *, dtype: str) -> None:
    write_json(folder / "config.json", decoder_attributes(config, dtype=dtype))


# --- parameters -------------------------------------------------------------------------------------------------------


def read_parameters(folder: Path, model: nnx.Module, *, table: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """A folder's tensors as stacked host arrays by our path, in the file's element type.

    Args:
      model: the abstract or real model that must have these shapes.
      table: layout of the file, a key of `names.TABLES`.
    """
    shapes = {path: tuple(param.shape) for path, param in by_path(nnx.state(model, nnx.Param)).items()}
    matched = leaves.match(published(unwrapped(open_tensors(folder))[0])[0], table=table, config=config, where=folder)
    for path, leaf in matched.items():
        assert leaf.shape == shapes[path], path
    return {path: leaves.read_slice(leaf, (slice(None),) * len(leaf.shape)) for path, leaf in matched.items()}


def write_parameters(folder: Path, arrays: Mapping[str, Any], *, table: str, config: ModelConfig) -> None:
    """Writes arrays by our path as one safetensors file of layout `table`."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = leaves.plan_theirs(from_arrays(arrays, config=config), table=table, config=config)
    write_safetensors(folder, planned, max_shard_bytes=1 << 62)


def from_arrays(arrays: Mapping[str, Any], *, config: ModelConfig) -> dict[str, leaves.Leaf]:
    """Leaves over arrays in memory."""

    def stored(array: Any) -> Stored:
        return Stored(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array), "memory")

    return {path: leaves.from_ours(path, stored(array), config=config) for path, array in arrays.items()}
