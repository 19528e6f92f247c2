"""TABLE of names: our path <-> tensor name in a file <-> einops layout of one tensor, file side first.

Import reads a row left to right, export right to left with the layout's sides swapped. Braces stand for stacked
axes: "{Z}" counts decoder layers, "{Y}" extended layers (their number in the file is the layer's), "{E}" pretrained
experts, "{X}" new experts (numbered on from E), "{U}" vision layers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moextend_jax.config import ModelConfig


class Name(NamedTuple):
    path: str
    file: str
    layout: str


class Tensor(NamedTuple):
    """One tensor of a file: its name, and where in which of our stacked arrays it belongs."""

    file: str
    path: str
    index: tuple[int, ...]
    layout: str


MIXTRAL = (
    Name("decoder/embed", "model.embed_tokens.weight", "V D -> V D"),
    Name("decoder/norm", "model.norm.weight", "D -> D"),
    Name("decoder/head", "lm_head.weight", "V D -> D V"),
    Name("decoder/layers/attention_norm", "model.layers.{Z}.input_layernorm.weight", "D -> D"),
    Name("decoder/layers/attention/query", "model.layers.{Z}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    Name("decoder/layers/attention/key", "model.layers.{Z}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    Name("decoder/layers/attention/value", "model.layers.{Z}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    Name("decoder/layers/attention/out", "model.layers.{Z}.self_attn.o_proj.weight", "D (N H) -> N H D"),
    Name("decoder/layers/moe_norm", "model.layers.{Z}.post_attention_layernorm.weight", "D -> D"),
    Name("decoder/layers/moe/gate", "model.layers.{Z}.block_sparse_moe.gate.weight", "E D -> D E"),
    Name("decoder/layers/moe/experts/w_gate", "model.layers.{Z}.block_sparse_moe.experts.{E}.w1.weight", "F D -> D F"),
    Name("decoder/layers/moe/experts/w_up", "model.layers.{Z}.block_sparse_moe.experts.{E}.w3.weight", "F D -> D F"),
    Name("decoder/layers/moe/experts/w_down", "model.layers.{Z}.block_sparse_moe.experts.{E}.w2.weight", "D F -> F D"),
)

EXTENSION = (
    Name("extension/router/new_gate", "model.layers.{Y}.block_sparse_moe.gate_vision.weight", "X D -> D X"),
    Name(
        "extension/router/calibrator/w_in",
        "model.layers.{Y}.block_sparse_moe.weight_scale.weight_scale.0.weight",
        "A O -> O A",
    ),
    Name(
        "extension/router/calibrator/w_out",
        "model.layers.{Y}.block_sparse_moe.weight_scale.weight_scale.2.weight",
        "O A -> A O",
    ),
    Name("extension/new_experts/w_gate", "model.layers.{Y}.block_sparse_moe.experts.{X}.w1.weight", "f D -> D f"),
    Name("extension/new_experts/w_up", "model.layers.{Y}.block_sparse_moe.experts.{X}.w3.weight", "f D -> D f"),
    Name("extension/new_experts/w_down", "model.layers.{Y}.block_sparse_moe.experts.{X}.w2.weight", "D f -> f D"),
)


def _projector(first: str, second: str) -> tuple[Name, ...]:
    return (
        Name("projector/first", first + ".weight", "d C -> C d"),
        Name("projector/first_bias", first + ".bias", "d -> d"),
        Name("projector/second", second + ".weight", "D d -> d D"),
        Name("projector/second_bias", second + ".bias", "D -> D"),
    )


_LAYER = "vision_model.encoder.layers.{U}."
CLIP = (
    Name("vision/patch", "vision_model.embeddings.patch_embedding.weight", "C c h w -> (h w c) C"),
    Name("vision/class_token", "vision_model.embeddings.class_embedding", "C -> C"),
    Name("vision/position", "vision_model.embeddings.position_embedding.weight", "Q C -> Q C"),
    Name("vision/pre_norm/scale", "vision_model.pre_layrnorm.weight", "C -> C"),
    Name("vision/pre_norm/bias", "vision_model.pre_layrnorm.bias", "C -> C"),
    Name("vision/layers/attention_norm/scale", _LAYER + "layer_norm1.weight", "C -> C"),
    Name("vision/layers/attention_norm/bias", _LAYER + "layer_norm1.bias", "C -> C"),
    Name("vision/layers/attention/query", _LAYER + "self_attn.q_proj.weight", "(N H) C -> C N H"),
    Name("vision/layers/attention/query_bias", _LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    Name("vision/layers/attention/key", _LAYER + "self_attn.k_proj.weight", "(N H) C -> C N H"),
    Name("vision/layers/attention/key_bias", _LAYER + "self_attn.k_proj.bias", "(N H) -> N H"),
    Name("vision/layers/attention/value", _LAYER + "self_attn.v_proj.weight", "(N H) C -> C N H"),
    Name("vision/layers/attention/value_bias", _LAYER + "self_attn.v_proj.bias", "(N H) -> N H"),
    Name("vision/layers/attention/out", _LAYER + "self_attn.out_proj.weight", "C (N H) -> N H C"),
    Name("vision/layers/attention/out_bias", _LAYER + "self_attn.out_proj.bias", "C -> C"),
    Name("vision/layers/mlp_norm/scale", _LAYER + "layer_norm2.weight", "C -> C"),
    Name("vision/layers/mlp_norm/bias", _LAYER + "layer_norm2.bias", "C -> C"),
    Name("vision/layers/mlp/up", _LAYER + "mlp.fc1.weight", "J C -> C J"),
    Name("vision/layers/mlp/up_bias", _LAYER + "mlp.fc1.bias", "J -> J"),
    Name("vision/layers/mlp/down", _LAYER + "mlp.fc2.weight", "C J -> J C"),
    Name("vision/layers/mlp/down_bias", _LAYER + "mlp.fc2.bias", "C -> C"),
    Name("vision/post_norm/scale", "vision_model.post_layernorm.weight", "C -> C"),
    Name("vision/post_norm/bias", "vision_model.post_layernorm.bias", "C -> C"),
)

_TEXT, _ROUTER = "language_model.", "language_model.model.layers.{Y}.block_sparse_moe.gate."
TRANSFORMERS = (
    *(row._replace(file=_TEXT + row.file) for row in MIXTRAL),
    Name("extension/router/new_gate", _ROUTER + "new.weight", "X D -> D X"),
    Name("extension/router/calibrator/w_in", _ROUTER + "calibrator.0.weight", "A O -> O A"),
    Name("extension/router/calibrator/w_out", _ROUTER + "calibrator.2.weight", "O A -> A O"),
    *(row._replace(file=_TEXT + row.file) for row in EXTENSION if ".experts.{X}." in row.file),
    *_projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    *(row._replace(file="vision_tower." + row.file) for row in CLIP),
)

TABLES: dict[str, tuple[Name, ...]] = {
    "mixtral": MIXTRAL,
    "clip": CLIP,
    "llava": _projector("mm_projector.0", "mm_projector.2"),
    "llava_hf": _projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    "released": (
        *MIXTRAL,
        *EXTENSION,
        *_projector("model.visual.mm_projector.0", "model.visual.mm_projector.2"),
        *(row._replace(file="model.visual.vision_tower." + row.file) for row in CLIP),
    ),
    "transformers": TRANSFORMERS,
}
"""File layouts: Hugging Face's Mixtral and CLIP, LLaVA's projector in its own spelling and in transformers', the
method's released checkpoints, which hold everything, and a whole LLaVA of transformers, whose names of an extension
are those of assets/hf/modeling_moextend.py."""

PREFIXES = {"llava": "model.", "llava_hf": "model."}
"""What some files write before every name of a layout."""

IGNORED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Buffers that old files carry and nobody needs: they are computed from the configuration."""

BESIDE: dict[str, re.Pattern[str]] = {
    "clip": re.compile(r"text_model\..*|logit_scale|(text|visual)_projection\.weight"),
    "llava": re.compile(r"(model\.)?(embed_tokens|layers|norm|vision_tower)\..*|lm_head\.weight"),
    "llava_hf": re.compile(r"(model\.)?(language_model|vision_tower)\..*|lm_head\.weight"),
}
"""Tensors of the whole model that a part was taken from: CLIP's text half, a LLaVA's decoder and tower."""


def tensors(table: str, config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor that a file of layout `table` must hold for a model of this configuration."""
    for name in TABLES[table]:
        if not _exists(name.path, config):
            continue
        counters = stacked(name.file)
        counts = [numbers(letter, config) for letter in counters]
        for index in itertools.product(*(range(len(count)) for count in counts)):
            at = {letter: counts[axis][index[axis]] for axis, letter in enumerate(counters)}
            yield Tensor(name.file.format(**at), name.path, index, name.layout)


def count(row: Name, config: ModelConfig) -> int:
    """How many tensors a row stands for in a file, before any of their names is made."""
    if not _exists(row.path, config):
        return 0
    return math.prod(stack(row.file, config))


def stack(file: str, config: ModelConfig) -> tuple[int, ...]:
    """Sizes of the stacked axes of a row's file name."""
    return tuple(_count(letter, config) for letter in stacked(file))


def stacked(file: str) -> list[str]:
    """Letters of the stacked axes in a row's file name, in order."""
    return re.findall(r"{(\w)}", file)


def inverse(layout: str) -> str:
    left, right = layout.split(" -> ")
    return f"{right} -> {left}"


def axis_sizes(layout: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes einops needs for the grouped axes of a layout."""
    grouped = " ".join(re.findall(r"\(([^)]*)\)", layout)).split()
    return {letter: sizes[letter] for letter in grouped if letter in sizes}


def letters(path: str, config: ModelConfig) -> dict[str, int]:
    """Sizes of every letter that a layout of this path uses: N and H mean other heads in the vision tower."""
    vision = config.vision
    if path.startswith("vision/"):
        assert vision is not None
        return {**vision.sizes(), "h": vision.patch_size, "w": vision.patch_size, "c": 3}
    shared = {"d": config.decoder.width, **({"C": vision.width} if vision else {})}
    return {**config.sizes(), **shared}


def groups(side: str) -> list[list[str]]:
    """Letters of each axis of one side of a layout: [["N", "H"], ["D"]] of "(N H) D"."""
    return [(group or letter).split() for group, letter in re.findall(r"\(([^)]*)\)|(\w)", side)]


def shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one side of a layout, e.g. "(N H) D"."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups(side))


def _exists(path: str, config: ModelConfig) -> bool:
    if path == "decoder/head":
        return not config.decoder.tied_head
    needs = {"extension": config.extension, "projector": config.vision, "vision": config.vision}
    return needs.get(path.split("/")[0], config.decoder) is not None


def _count(letter: str, config: ModelConfig) -> int:
    if letter == "U":
        assert config.vision is not None
        return config.vision.layers
    return config.sizes()[letter]


def numbers(letter: str, config: ModelConfig) -> list[int]:
    """What a stacked axis counts in file names, e.g. the extended layers' numbers for "Y"."""
    if letter == "U":
        assert config.vision is not None
        return list(range(config.vision.layers))
    if letter in "ZE":
        return list(range(config.decoder.sizes()[letter]))
    assert config.extension is not None
    if letter == "Y":
        return list(config.extension.layers)
    experts = config.decoder.experts
    return list(range(experts, experts + config.extension.new_experts))
