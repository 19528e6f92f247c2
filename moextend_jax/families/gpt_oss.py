"""gpt-oss: attention sinks, windows in every other layer, YaRN, biases everywhere, a clamped unit; gate and up of all
experts lie in one tensor, an element of each in turn, input axis first."""

from collections.abc import Mapping
from typing import Any

from moextend_jax.config import RopeScaling, YarnConfig
from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import BIASES, PLAIN, SIZES, Family, Fused, Name, decoder, parted
from moextend_jax.families.rope import rope_attributes


def _local(value: Any) -> Any:
    """Of `layer_types`: whether a layer's attention is local."""
    kinds = {"sliding_attention": True, "full_attention": False}
    if not isinstance(value, list) or not all(isinstance(kind, str) and kind in kinds for kind in value):
        return value
    return tuple(kinds[kind] for kind in value)


def _layer_types(local: tuple[bool, ...]) -> list[str]:
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    return rope_attributes(scaling) if scaling else {"rope_type": "default"}


def _refusal(attributes: Mapping[str, Any]) -> str:
    if "rope_scaling" in attributes:
        return ""
    return "it says nothing of rotary positions, where transformers takes YaRN's: write rope_scaling out"


_ATTENTION, _BLOCK = "model.layers.{Z}.self_attn.", "model.layers.{Z}.mlp."
_GATE_UP, _DOWN = (_BLOCK + f"experts.{name}_proj" for name in ("gate_up", "down"))
_EXPERTS = "decoder/layers/moe/experts/"
_SIZES = {
    "vocab_size": 201088, "width": 2880, "hidden": 2880, "heads": 64, "head_size": 64, "top_k": 4, "rope_theta": 1.5e5,
    "rope_scaling": YarnConfig(factor=32.0, length=4096, whole=False),
    "local_window": 128,
}  # fmt: skip

FAMILY = Family(
    architecture="GptOssForCausalLM",
    names=(
        *(name for name in decoder("mlp", "w1 w3 w2", gate="router.weight") if not name.path.startswith(_EXPERTS)),
        *BIASES,
        Name("decoder/layers/attention/out_bias", _ATTENTION + "o_proj.bias", "D -> D"),
        Name("decoder/layers/attention/sinks", _ATTENTION + "sinks", "N -> N"),
        Name("decoder/layers/moe/gate_bias", _BLOCK + "router.bias", "E -> E"),
        Name(_EXPERTS + "w_gate", parted(_GATE_UP, "gate"), "D F -> D F"),
        Name(_EXPERTS + "w_up", parted(_GATE_UP, "up"), "D F -> D F"),
        Name(_EXPERTS + "w_down", parted(_DOWN, "down"), "F D -> F D"),
        Name(_EXPERTS + "b_gate", parted(_GATE_UP + "_bias", "gate"), "F -> F"),
        Name(_EXPERTS + "b_up", parted(_GATE_UP + "_bias", "up"), "F -> F"),
        Name(_EXPERTS + "b_down", parted(_DOWN + "_bias", "down"), "D -> D"),
    ),
    attributes=Table(
        sizes=SIZES
        | {
            "intermediate_size": "hidden", "num_local_experts": "experts", "sliding_window": "local_window",
            "layer_types": "local", "swiglu_limit": "glu_limit",
        },
        must_be={name: values for name, values in PLAIN.items()
                 if name not in ("attention_bias", "layer_types")}
        | {"attention_bias": (True,), "swiglu_alpha": (1.702,)},
        # What counts in rope_scaling, and another name of num_experts_per_tok.
        harmless=OF_ANY_MODEL | {"initial_context_length", "experts_per_token", "quantization_config"},
        # Not head_dim: the class takes 64 where it is not there, and an even share of the width where it is null.
        optional={"tie_word_embeddings", "swiglu_limit"},
        aliases={"num_experts": "num_local_experts"},
        ours={"layer_types": _local},
        theirs={"layer_types": _layer_types, "rope_scaling": _rope_scaling},
    ),
    fields={
        "qkv_bias": True, "out_bias": True, "router_bias": True, "expert_bias": True, "sinks": True, "glu": "clamped",
    },
    constants={"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702},
    published={
        "gpt-oss-20b": _SIZES | {"layers": 24, "experts": 32, "local": (True, False) * 12},
        "gpt-oss-120b": _SIZES | {"layers": 36, "experts": 128, "local": (True, False) * 18},
    },
    fused=(
        Fused(_GATE_UP, ("gate", "up"), interleaved=True, packed=True),
        Fused(_DOWN, ("down",), packed=True),
        Fused(_GATE_UP + "_bias", ("gate", "up"), interleaved=True),
        Fused(_DOWN + "_bias", ("down",)),
    ),
    refusal=_refusal,
)  # fmt: skip
