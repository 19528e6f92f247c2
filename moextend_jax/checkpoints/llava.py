"""A whole LLaVA of transformers (decoder, tower and projector in one folder) as what the layout `released` holds.

In: config.json and names as `LlavaForConditionalGeneration` writes them, in files and in memory, and as our own
modeling_moextend.py does, which adds experts and ears, to a decoder without eyes too. Out: attributes and names of the
released layout, beside which sounds keep theirs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moextend_jax.checkpoints.names import PUBLISHED
from moextend_jax.checkpoints.spelling import Spelling
from moextend_jax.config import MoextendError
from moextend_jax.families import FAMILIES
from moextend_jax.families.attributes import OF_ANY_MODEL, Table, fits, read_fields
from moextend_jax.families.towers import CLIP, TOWERS
from moextend_jax.outside import shown

TEXT = "moextend_text"
"""The type of an extended model without eyes."""
MODEL_TYPES = ("llava", "moextend", TEXT)

_TOWER = r"vision_tower\.(?:vision_model\.)?(.*)"


@functools.cache
def spellings(tower: str) -> tuple[Spelling, ...]:
    """Names of a LLaVA with a tower of this family -> those of the released layout."""
    whole = "vision_model." if TOWERS[tower].names[0].file.startswith("vision_model.") else ""
    seen = rf"model.visual.vision_tower.{whole}\1"
    return (
        # in files
        Spelling(r"language_model\.model\.(.*)", r"model.\1", r"model\..*"),
        Spelling(r"language_model\.lm_head\.weight", "lm_head.weight", r"lm_head\..*"),
        Spelling(_TOWER, seen, r"model\..*"),
        Spelling(r"multi_modal_projector\.linear_1\.(.*)", r"model.visual.mm_projector.0.\1", r"model\..*"),
        Spelling(r"multi_modal_projector\.linear_2\.(.*)", r"model.visual.mm_projector.2.\1", r"model\..*"),
        # in memory, since transformers 4.52
        Spelling(r"model\.language_model\.(.*)", r"model.\1", r"(language_model|model\.layers)\..*"),
        Spelling(r"model\." + _TOWER, seen, r"(vision_tower|model\.visual)\..*"),
        Spelling(r"model\.multi_modal_projector\.linear_1\.(.*)", r"model.visual.mm_projector.0.\1", r"multi_modal.*"),
        Spelling(r"model\.multi_modal_projector\.linear_2\.(.*)", r"model.visual.mm_projector.2.\1", r"multi_modal.*"),
        Spelling(r"model\.(audio_(?:tower|projector)\..*)", r"\1", r"audio_(tower|projector)\..*"),
    )


ADDED = ("extensions", "composition", "add_layer", "sources", "start", "wide")
"""What says which layers have new experts, and what those are; all but the first two of earlier versions, which knew
one extension."""

SOUNDS = ("sounds", "audio_config", "audio_feature_layer")
"""What says how a model hears."""

_TABLE = Table(
    sizes={},
    must_be={
        "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,),
    },
    harmless=OF_ANY_MODEL
    | {"text_config", "vision_config", "vision_feature_layer", "image_token_index", "image_token_id"}
    | {"image_seq_length", "ignore_index", "image_tags", *ADDED, *SOUNDS, "new_experts", "calibrator_width"}
    | {"weight_guard", "mass", "router", "expert", "text_isolation", "moextend", "vision_feature_select_strategy"},
)  # fmt: skip


def is_llava(attributes: Mapping[str, Any]) -> bool:
    return attributes.get("model_type") in MODEL_TYPES


def is_whole(names: Iterable[str]) -> bool:
    """Whether there is a decoder among tensors of these names, not a projector alone."""
    return any(re.match(r"(model\.)?language_model\.", name) for name in names)


def released_attributes(attributes: Mapping[str, Any], *, where: Path) -> tuple[dict[str, Any], int]:
    """Attributes of the released layout, and the hidden state of the tower that the projector reads.

    Raises:
      MoextendError: names what this code does not compute.
    """
    read_fields(attributes, _TABLE, where=where)
    blind = attributes["model_type"] == TEXT
    text, tower = attributes.get("text_config"), {} if blind else attributes.get("vision_config")
    if not isinstance(text, dict) or not isinstance(tower, dict):
        raise MoextendError(f"{where}: a LLaVA without text_config and vision_config has no sizes that are known")
    text = {"model_type": "mixtral"} | text
    defaults = next((family.defaults for name, family in FAMILIES.items() if name == text["model_type"]), {})
    text, tower = {**defaults, **text}, {"model_type": CLIP.model_type} | tower
    tower = {**TOWERS[tower_of(attributes, where=where)].defaults, **tower}
    if attributes.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    for name in ("torch_dtype", "dtype"):
        if name in attributes:
            text.setdefault(name, attributes[name])
    for name in ("image_tags", "new_experts", *ADDED, *SOUNDS):
        if name in attributes:
            text[name] = attributes[name]
    feature_layer = _feature_layer(attributes.get("vision_feature_layer", -2), tower, where)
    if facts := _facts(attributes, feature_layer):
        text["moextend"] = facts
    return text | ({} if blind else {"vision_config": tower}), feature_layer


def tower_of(attributes: Mapping[str, Any], *, where: Path) -> str:
    """The family of a LLaVA's tower.

    Raises:
      MoextendError: none that is known, or its projector reads other positions than the patches.
    """
    tower = attributes.get("vision_config")
    model_type = tower.get("model_type", CLIP.model_type) if isinstance(tower, dict) else CLIP.model_type
    name = next((name for name, tower in TOWERS.items() if tower.model_type == model_type), None)
    if name not in PUBLISHED["hf"].towers:
        raise MoextendError(
            f"{where}: vision_config.model_type = {shown(model_type)} cannot be honoured (only "
            f"{', '.join(TOWERS[name].model_type for name in PUBLISHED['hf'].towers)}): give decoder, tower and "
            "projector as folders of their own (--vision, --projector)"
        )
    strategy, only = attributes.get("vision_feature_select_strategy", "default"), patches_are(name)
    if strategy != only:
        raise MoextendError(
            f"{where}: vision_feature_select_strategy = {shown(strategy)} cannot be honoured (only {only!r})"
        )
    return name


def patches_are(tower: str) -> str:
    """LLaVA's word for the patches of a tower of this family: all of its positions but the first, or all."""
    return "default" if TOWERS[tower].fields.get("class_token", True) else "full"


def _facts(attributes: Mapping[str, Any], feature_layer: int) -> Any:
    """How a run made the model: all of it where it is written down, of an extended model what its own code needs."""
    if "moextend" in attributes or attributes.get("model_type") == "llava":
        return attributes.get("moextend")
    recipe = {"weight_guard": attributes.get("weight_guard", "bounded"), "feature_layer": feature_layer}
    return {"recipe": recipe, "text_isolation": attributes.get("text_isolation", "none")}


def _feature_layer(number: Any, tower: Mapping[str, Any], where: Path) -> int:
    layers: Any = tower.get("num_hidden_layers")
    if type(number) is int and number >= 0 and fits("layers", layers):
        number -= layers + 1  # counted from the end, as here: the embedding is hidden state 0
    if not fits("feature_layer", number):
        raise MoextendError(f"{where}: vision_feature_layer = {shown(number)} cannot be honoured (only one layer)")
    return number
