"""TABLE of picture towers: a published vision transformer's tensors, how its config.json is read, and the fields of
`VisionConfig` that it turns on. No code asks which family a tower is of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import Name


class Tower(NamedTuple):
    """A published family of picture towers.

    model_type: of its config.json; whole: of one that holds it as `vision_config`, "" where there is none.
    architecture: transformers' class. names: of its tensors. beside: those of the whole that it is taken from.
    attributes: how its config.json is read; `ratio` is as `hidden_of` takes it. fields: of `VisionConfig`, what all of
    them have and no attribute says. constants: attributes that are written besides. defaults: what the class takes
    where a config.json is silent. published: sizes by name, fields of `VisionConfig` besides `fields`.
    resized: how its positions are brought to another grid, "" where they are not (`checkpoints/positions.py`).
    resamples: what its pictures may have been resized by, bicubic where nothing says so.
    """

    model_type: str
    whole: str
    architecture: str
    names: tuple[Name, ...]
    beside: re.Pattern[str]
    attributes: Table
    fields: Mapping[str, Any]
    constants: Mapping[str, Any]
    defaults: Mapping[str, Any]
    published: Mapping[str, Mapping[str, Any]]
    resized: str = ""
    resamples: tuple[str, ...] = ("bicubic",)


_SIZES = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads", "image_size": "image_size",
    "patch_size": "patch_size", "layer_norm_eps": "norm_eps", "hidden_act": "activation",
}  # fmt: skip
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
_PLAIN = {
    "hidden_act": _ACTIVATIONS, "num_channels": (3,), "is_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},),
}  # fmt: skip


def hidden_of(ratio: int, *, width: int, gated: bool) -> int:
    """Hidden width of a layer, where a config.json gives its ratio to the width: a SwiGLU has two thirds of an MLP's,
    rounded up to eight, so that it has about as many parameters."""
    hidden = width * ratio
    return -(-(hidden * 2 // 3) // 8) * 8 if gated else hidden


def ratio_of(hidden: int, *, width: int, gated: bool) -> int:
    """The least ratio of which `hidden_of` makes this width or more."""
    return next(ratio for ratio in itertools.count(1) if hidden_of(ratio, width=width, gated=gated) >= hidden)


def _names(*rows: tuple[str, str, str]) -> tuple[Name, ...]:
    return tuple(Name("media/image/tower/" + path, file, layout) for path, file, layout in rows)


def _norm(path: str, file: str) -> tuple[tuple[str, str, str], ...]:
    return (path + "/scale", file + ".weight", "C -> C"), (path + "/bias", file + ".bias", "C -> C")


_MLP = ("mlp/up", "mlp.fc1", "J C -> C J", "J -> J"), ("mlp/down", "mlp.fc2", "C J -> J C", "C -> C")
_SWIGLU = (
    ("swiglu/up", "mlp.weights_in", "(g J) C -> C g J", "(g J) -> g J"),
    ("swiglu/down", "mlp.weights_out", "C J -> J C", "C -> C"),
)


def _layers(
    layer: str, *, norms: str, attention: str, mlps: tuple[tuple[str, str, str, str], ...] = _MLP
) -> tuple[tuple[str, str, str], ...]:
    """Rows of the layers, whose parts are called `layer` with {} for the part.

    Args:
      norms: before attention and before the MLP. attention: query, key, value and out. Joined by spaces.
      mlps: rows of each kind of MLP that the family's layers may have.
    """
    (first, second), (query, key, value, out) = norms.split(), attention.split()

    def linear(path: str, part: str, weight: str, bias: str) -> tuple[tuple[str, str, str], ...]:
        file = layer.replace("{}", part)
        return ("layers/" + path, file + ".weight", weight), (f"layers/{path}_bias", file + ".bias", bias)

    heads = "(N H) C -> C N H", "(N H) -> N H"
    return (
        *_norm("layers/attention_norm", layer.replace("{}", first)),
        *linear("attention/query", query, *heads),
        *linear("attention/key", key, *heads),
        *linear("attention/value", value, *heads),
        *linear("attention/out", out, "C (N H) -> N H C", "C -> C"),
        *_norm("layers/mlp_norm", layer.replace("{}", second)),
        *(row for kind in mlps for row in linear(*kind)),
    )


# --- CLIP and SigLIP --------------------------------------------------------------------------------------------------

_EMBEDDINGS = "vision_model.embeddings."
_PATCH = ("patch", _EMBEDDINGS + "patch_embedding.weight", "C c h w -> (h w c) C")
_POSITION = ("position", _EMBEDDINGS + "position_embedding.weight", "Q C -> Q C")
_ENCODER = (
    *_layers(
        "vision_model.encoder.layers.{U}.{}",
        norms="layer_norm1 layer_norm2",
        attention="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj",
    ),
    *_norm("post_norm", "vision_model.post_layernorm"),
)

CLIP = Tower(
    model_type="clip_vision_model",
    whole="clip",
    architecture="CLIPVisionModel",
    names=_names(
        _PATCH,
        ("class_token", _EMBEDDINGS + "class_embedding", "C -> C"),
        _POSITION,
        *_norm("pre_norm", "vision_model.pre_layrnorm"),
        *_ENCODER,
    ),
    beside=re.compile(r"text_model\..*|logit_scale|(text|visual)_projection\.weight"),
    attributes=Table(
        sizes=_SIZES | {"intermediate_size": "hidden"},
        must_be=_PLAIN | {"attention_dropout": (0,), "dropout": (0,)},
        harmless=OF_ANY_MODEL,
    ),
    fields={},
    constants={"num_channels": 3},
    defaults={
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    },
    published={"clip-vit-large-patch14-336": {}, "clip-vit-large-patch14": {"image_size": 224}},
)  # fmt: skip

_BASE = {"width": 768, "hidden": 3072, "layers": 12, "heads": 12, "patch_size": 16}
_SO400M = {"width": 1152, "hidden": 4304, "layers": 27, "heads": 16}
_SIGLIP = {"norm_eps": 1e-6, "activation": "gelu_pytorch_tanh"}

SIGLIP = Tower(
    model_type="siglip_vision_model",
    whole="siglip",
    architecture="SiglipVisionModel",
    names=_names(_PATCH, ("patch_bias", _EMBEDDINGS + "patch_embedding.bias", "C -> C"), _POSITION, *_ENCODER),
    # The head pools the positions that a projector reads one by one.
    beside=re.compile(r"text_model\..*|logit_(scale|bias)|vision_model\.head\..*"),
    attributes=Table(
        sizes=_SIZES | {"intermediate_size": "hidden"},
        must_be=_PLAIN | {"attention_dropout": (0,)},
        harmless=OF_ANY_MODEL | {"vision_use_head", "projection_size"},
    ),
    fields={
        "class_token": False, "pre_norm": False, "patch_bias": True, "levels": "half", "stretched": True,
    },
    constants={"num_channels": 3, "vision_use_head": False},
    defaults={
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    },
    published={
        "siglip-base-patch16-224": _SIGLIP | _BASE | {"image_size": 224},
        "siglip-so400m-patch14-384": _SIGLIP | _SO400M | {"image_size": 384},
        "siglip2-base-patch16-224": _SIGLIP | _BASE | {"image_size": 224},
        "siglip2-so400m-patch14-384": _SIGLIP | _SO400M | {"image_size": 384},
    },
    resamples=("bicubic", "bilinear"),
)  # fmt: skip
"""SigLIP, and SigLIP2 of a fixed resolution, whose files say that they are SigLIP's."""

# --- DINOv2 -----------------------------------------------------------------------------------------------------------


def _dinov2(
    model_type: str,
    architecture: str,
    *,
    published: str,
    patch_size: int,
    resized: str,
    registers: int = 0,
    **constants: Any,
) -> Tower:
    layer, extra = "encoder.layer.{U}.", {"num_register_tokens": "registers"} if registers else {}
    return Tower(
        model_type=model_type,
        whole="",
        architecture=architecture,
        names=_names(
            ("patch", "embeddings.patch_embeddings.projection.weight", "C c h w -> (h w c) C"),
            ("patch_bias", "embeddings.patch_embeddings.projection.bias", "C -> C"),
            ("class_token", "embeddings.cls_token", "1 1 C -> C"),
            *((("registers", "embeddings.register_tokens", "1 r C -> r C"),) if registers else ()),
            ("position", "embeddings.position_embeddings", "1 Q C -> Q C"),
            *_layers(
                layer + "{}",
                norms="norm1 norm2",
                attention="attention.attention.query attention.attention.key attention.attention.value "
                "attention.output.dense",
                mlps=(*_MLP, *_SWIGLU),
            ),
            ("layers/attention_scale", layer + "layer_scale1.lambda1", "C -> C"),
            ("layers/mlp_scale", layer + "layer_scale2.lambda1", "C -> C"),
            *_norm("post_norm", "layernorm"),
        ),
        beside=re.compile(r"embeddings\.mask_token"),  # of pretraining alone
        attributes=Table(
            sizes=_SIZES | {"mlp_ratio": "ratio", "use_swiglu_ffn": "gated"} | extra,
            must_be=_PLAIN
            | {"qkv_bias": (True,), "hidden_dropout_prob": (0,), "attention_probs_dropout_prob": (0,)}
            | {"drop_path_rate": (0,)},
            # How it starts to be trained, and what it gives as another network's backbone.
            harmless=OF_ANY_MODEL
            | {"layerscale_value", "use_mask_token", "apply_layernorm", "reshape_hidden_states", "stage_names"}
            | {"out_features", "out_indices", "_out_features", "_out_indices"},
        ),
        fields={"pre_norm": False, "patch_bias": True, "layer_scale": True, "levels": "imagenet"},
        constants={"num_channels": 3, "qkv_bias": True, **constants},
        defaults={
            "hidden_size": 768, "mlp_ratio": 4, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
            "patch_size": patch_size, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "use_swiglu_ffn": False,
            **dict.fromkeys(extra, registers),
        },
        published={
            f"{published}-{size}": {
                "width": width, "hidden": hidden_of(4, width=width, gated=gated), "layers": layers,
                "heads": width // 64, "norm_eps": 1e-6, "activation": "gelu", "image_size": 518,
                "registers": registers, "gated": gated,
            }
            for size, width, layers, gated in (
                ("small", 384, 12, False), ("base", 768, 12, False), ("large", 1024, 24, False),
                ("giant", 1536, 40, True),
            )
        },
        resized=resized,
    )  # fmt: skip


DINOV2 = _dinov2("dinov2", "Dinov2Model", published="dinov2", patch_size=14, resized="bicubic", use_mask_token=False)
DINOV2_WITH_REGISTERS = _dinov2(
    "dinov2_with_registers", "Dinov2WithRegistersModel", published="dinov2-with-registers", patch_size=16,
    resized="antialiased", registers=4,
)  # fmt: skip

TOWERS: Mapping[str, Tower] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
}
"""By `VisionConfig.family`, which is also what their layout of files is called."""
