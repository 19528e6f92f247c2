"""Hugging Face folders in and out: `config.json` <-> sizes, and a folder's parameters as host arrays by our path.

Attributes of config.json that we do not know or cannot honour are errors that name them; so are tensors that are
unknown, missing or misshapen (`leaves.match`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moextend_jax.checkpoints import leaves
from moextend_jax.checkpoints.spelling import published, unwrapped
from moextend_jax.checkpoints.tensors import Stored, open_tensors, write_safetensors
from moextend_jax.config import DecoderConfig, ModelConfig, MoextendError, VisionConfig
from moextend_jax.families import FAMILIES
from moextend_jax.families.attributes import decoder_attributes_of, fits, read_fields, with_head_size
from moextend_jax.families.towers import TOWERS, hidden_of, ratio_of
from moextend_jax.media.image import LEVELS
from moextend_jax.outside import read_object, short, shown

PUBLISHED_TOWERS = tuple(
    VisionConfig(width=width, hidden=4 * width, layers=layers, heads=width // 64, patch_size=patch, image_size=image)
    for width, layers, patch, image in (
        (768, 12, 32, 224), (768, 12, 16, 224), (1024, 24, 14, 224), (1024, 24, 14, 336),
    )
)  # fmt: skip
"""OpenAI's CLIP towers: the only ones whose number of heads follows from the shapes of their tensors."""


RESAMPLES = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which preprocessor_config.json has."""


def preprocessor(tower: VisionConfig) -> dict[str, Any]:
    """How a tower's pictures must be prepared: by its levels in `media.image`. The rest of preprocessor_config.json,
    which part of a picture is shown, is the recipe's choice, unless the tower takes pictures stretched."""
    mean_c, std_c = LEVELS[tower.levels]
    return {
        "image_mean": [round(float(mean), 8) for mean in mean_c], "image_std": [round(float(std), 8) for std in std_c],
        "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
        "resample": RESAMPLES[tower.resample], "do_convert_rgb": True,
    }  # fmt: skip


def preprocessor_of(folder: Path, part: str = "image_processor") -> tuple[Path, dict[str, Any]]:
    """How inputs are prepared for the model of a folder, and the file that says so: a part of its
    processor_config.json, which transformers reads first, or its preprocessor_config.json. Empty: neither says.

    Args:
      part: "image_processor", or "feature_extractor" of sounds.
    """
    path = folder / "processor_config.json"
    nested = read_json(path).get(part) if path.is_file() else None
    if isinstance(nested, dict):
        return path, nested
    path = folder / "preprocessor_config.json"
    attributes = read_json(path) if path.is_file() else {}
    nested = attributes.get(part)
    return path, nested if isinstance(nested, dict) else attributes


def check_preprocessor(folder: Path, tower: VisionConfig) -> None:
    """Refuses pictures prepared for a tower that was trained on other levels: it would see wrong colours."""
    (path, attributes), wanted = preprocessor_of(folder), preprocessor(tower)
    for name, value in attributes.items():
        only = wanted.get(name)
        if only is not None and value is not None and not _nearly(value, only):
            raise MoextendError(
                f"{path}: {name} = {shown(value)} cannot be honoured (only {only}): here pictures are prepared as for "
                f"{MAKERS[tower.levels]}, and a tower that was trained on others would see other colours"
            )


MAKERS = {"clip": "OpenAI's CLIP", "half": "SigLIP", "imagenet": "DINOv2"}


def check_picture_size(folder: Path, tower: VisionConfig) -> None:
    """Refuses pictures prepared in another size than the tower takes."""
    path, attributes = preprocessor_of(folder)
    for name in () if TOWERS[tower.family].resized else ("size", "crop_size"):
        size = attributes.get(name)
        sides = size.values() if isinstance(size, dict) else [] if size is None else [size]
        if any(side != tower.image_size for side in sides):
            raise MoextendError(
                f"{path}: {name} = {shown(size)} cannot be honoured: here a picture is made as large as the tower "
                f"takes it, {tower.image_size}"
            )


def as_prepared(tower: VisionConfig, folder: Path) -> VisionConfig:
    """The tower, for pictures as its folder says that they are prepared, if it does: resized by another filter or, if
    its positions can be resized, of another size.

    Raises:
      MoextendError: the size is no square, smaller than a patch, or so large that its positions would fill the memory.
    """
    (path, attributes), family = preprocessor_of(folder), TOWERS[tower.family]
    for name, number in RESAMPLES.items():
        if attributes.get("resample") == number and name in family.resamples:
            tower = dataclasses.replace(tower, resample=name)
    size = attributes.get("size")
    cut = attributes.get("crop_size", size if isinstance(size, dict) and "height" in size else None)
    if not family.resized or cut is None:
        return tower
    sides = list(cut.values()) if isinstance(cut, dict) else [cut]
    least, most = tower.patch_size, 4 * tower.image_size
    if not sides or not all(fits("image_size", side) and least <= side == sides[0] <= most for side in sides):
        raise MoextendError(
            f"{path}: crop_size or size = {shown(cut)} cannot be honoured (only squares of {least} to {most} pixels)"
        )
    return dataclasses.replace(tower, image_size=sides[0])


def _nearly(value: Any, only: Any) -> bool:
    try:
        return np.shape(value) == np.shape(only) and np.allclose(np.asarray(value, float), only, rtol=1e-3, atol=0)
    except (TypeError, ValueError, OverflowError):
        return False


# --- config.json -> sizes ---------------------------------------------------------------------------------------------


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Sizes from a decoder's `config.json`; of an extended model only pretrained experts count."""
    return decoder_config(read_json(folder / "config.json"), where=folder / "config.json")


def read_vision_config(folder: Path, *, feature_layer: int) -> VisionConfig:
    """Sizes of the tower from the `config.json` of a vision model, or of a whole CLIP or SigLIP, for pictures as they
    are prepared beside it."""
    at = folder / "config.json"
    return as_prepared(vision_config(read_json(at), where=at, feature_layer=feature_layer), folder)


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
    """Why sizes that are possible one by one are impossible together; "" if they are possible."""
    in_group, rest = divmod(config.experts, config.groups)
    problems = {
        "all layers are dense, and none routes": config.dense_layers >= config.layers,
        "dense layers are of no width": config.dense_layers > 0 and not config.dense_hidden,
        f"{config.experts} experts make no {config.groups} groups of two or more": rest
        or (config.groups > 1 and in_group < 2),
        f"of {config.top_groups} groups a token cannot take {config.top_k} experts": (
            config.top_groups > config.groups or config.top_k > config.top_groups * in_group
        ),
        f"{config.layers} layers cannot be of {len(config.local)} kinds of attention": (
            len(config.local) not in (0, config.layers) or (any(config.local) and not config.local_window)
        ),
        f"a part of {config.rotary_size} of a head of {config.head_size} cannot be turned": (
            config.rotary_size % 2 or not 0 < config.rotary_size <= config.head_size
        ),
    }
    return next((problem for problem, is_so in problems.items() if is_so), "")


def is_tower(model_type: Any) -> bool:
    return any(model_type in (tower.model_type, tower.whole) for tower in TOWERS.values() if model_type)


def vision_config(attributes: Mapping[str, Any], *, where: Path, feature_layer: int) -> VisionConfig:
    """Sizes as a config.json has them; see `as_prepared` too."""
    attributes = vision_half(attributes, where)
    given = attributes.get("model_type")
    name = next((name for name, tower in TOWERS.items() if tower.model_type == given), None)
    if name is None:
        known = ", ".join(repr(tower.model_type) for tower in TOWERS.values())
        raise MoextendError(f"{where}: model_type is {shown(given)}, expected one of {known}{_why_not(given)}")
    tower = TOWERS[name]
    fields = read_fields({**tower.defaults, **attributes}, tower.attributes, where=where)
    if ratio := fields.pop("ratio", None):
        fields["hidden"] = hidden_of(ratio, width=fields["width"], gated=fields["gated"])
    config = VisionConfig(family=name, **tower.fields, **fields)
    if config.width % config.heads or config.patch_size > config.image_size:
        raise MoextendError(f"{where}: num_attention_heads must divide hidden_size, patch_size be at most image_size")
    if fields.get("registers") == 0:
        raise MoextendError(f"{where}: num_register_tokens must be one positive number, not 0")
    return at_layer(config, feature_layer, where=where)


def at_layer(tower: VisionConfig, feature_layer: int, *, where: Path) -> VisionConfig:
    """The tower, of which another hidden state is read.

    Raises:
      MoextendError: it has no such hidden state; names the folder or file `where`.
    """
    if not -tower.layers - 1 <= feature_layer < 0:
        raise MoextendError(f"feature layer {feature_layer} is not among the {tower.layers} layers of {where}")
    return dataclasses.replace(tower, feature_layer=feature_layer)


def vision_half(attributes: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The attributes of the tower inside those of a whole model; those of a tower as they are."""
    whole = next(
        (tower for tower in TOWERS.values() if tower.whole and tower.whole == attributes.get("model_type")), None
    )
    if whole is None:
        return dict(attributes)
    half = attributes.get("vision_config")
    if not isinstance(half, dict):
        raise MoextendError(f"{where}: a {whole.whole} without vision_config has no tower whose sizes are known")
    half, wins = dict(half), attributes.get("vision_config_dict") or {}
    if not isinstance(wins, dict):
        raise MoextendError(f"{where}: vision_config_dict = {shown(wins)} holds no attributes")
    for name, value in wins.items():  # transformers lets these win
        if half.setdefault(name, value) != value:
            raise MoextendError(f"{where}: vision_config.{short(name)} and vision_config_dict.{short(name)} differ")
    return {"architectures": [whole.architecture], "model_type": whole.model_type, **whole.defaults, **half}


def _why_not(model_type: Any) -> str:
    if model_type in ("siglip2", "siglip2_vision_model"):
        return ": SigLIP2 for pictures of any shape (NaFlex) is not supported, that of one size says siglip here"
    if model_type in ("llama", "mistral"):
        return ": a dense model has to be upcycled: give --experts N to moextend import"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The attributes in a model's config.json, or in a file beside it.

    Raises:
      MoextendError: as `read_object`.
    """
    if not path.exists():
        raise MoextendError(f"{path} does not exist: not a Hugging Face model folder")
    return read_object(path)


# --- sizes -> config.json ---------------------------------------------------------------------------------------------


def decoder_attributes(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    family = FAMILIES[config.family]
    return family.attributes.attributes_of(config) | {
        "architectures": [family.architecture], "model_type": config.family, "torch_dtype": dtype, **family.constants,
    }  # fmt: skip


def vision_attributes(config: VisionConfig) -> dict[str, Any]:
    tower = TOWERS[config.family]
    ratio = ratio_of(config.hidden, width=config.width, gated=config.gated)
    values = {**dataclasses.asdict(config), "ratio": ratio}
    return {theirs: values[ours] for theirs, ours in tower.attributes.sizes.items()} | {
        "architectures": [tower.architecture], "model_type": tower.model_type, **tower.constants,
    }  # fmt: skip


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_decoder_config(folder: Path, config: DecoderConfig, *, dtype: str) -> None:
    write_json(folder / "config.json", decoder_attributes(config, dtype=dtype))


# --- parameters -------------------------------------------------------------------------------------------------------


def read_parameters(folder: Path, *, table: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of a folder of layout `table`, a key of `names.TABLES`, as stacked host arrays by our path, in the file's
    element type."""
    stored, _ = published(unwrapped(open_tensors(folder))[0], config.decoder.family)
    matched = leaves.match(stored, table=table, config=config, where=folder)
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
