"""ERNIE 4.5: probabilities with a bias that chooses and does not weigh, dense first layers, experts that all tokens
pass, and positions that turn neighbours in a head."""

from collections.abc import Mapping
from typing import Any

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import (
    PLAIN,
    SIZES,
    Family,
    Name,
    decoder,
    dense,
    neighbours_turned,
    shared_expert,
)

_LAYERS = neighbours_turned(decoder("mlp", "gate_proj up_proj down_proj"))


def _refusal(attributes: Mapping[str, Any]) -> str:
    last = attributes.get("moe_layer_end_index", -1)
    if last in (-1, attributes["num_hidden_layers"] - 1):
        return ""
    return f"moe_layer_end_index = {last} cannot be honoured (only the last layer)"


FAMILY = Family(
    architecture="Ernie4_5_MoeForCausalLM",
    names=(
        *_LAYERS,
        *dense(_LAYERS),
        *shared_expert("mlp.shared_experts"),
        Name("decoder/layers/moe/selection_bias", "model.layers.{Z}.mlp.moe_statics.e_score_correction_bias",
             "1 E -> E"),
    ),
    attributes=Table(
        sizes={theirs: ours for theirs, ours in SIZES.items() if ours != "top_k"}
        | {
            "moe_k": "top_k", "moe_intermediate_size": "hidden", "moe_num_experts": "experts",
            "moe_num_shared_experts": "shared_experts", "moe_layer_start_index": "dense_layers",
            "intermediate_size": "dense_hidden",
        },
        must_be=PLAIN
        | {
            "moe_layer_interval": (1,), "moe_gate": ("topk",), "moe_use_aux_free": (True,), "use_bias": (False,),
            "moe_norm_min": (1e-12,),  # of a sum that is at least k/E
            "use_rmsnorm": (True,), "is_quantized": (False,),
        },
        # Layers that predict further tokens are left out (`beside`), as transformers does.
        harmless=OF_ANY_MODEL | {"moe_capacity", "moe_layer_end_index", "num_nextn_predict_layers"},
        optional={"head_dim", "tie_word_embeddings", "moe_layer_start_index"},
        aliases={"num_experts_per_tok": "moe_k", "num_experts": "moe_num_experts", "num_local_experts":
                 "moe_num_experts"},
    ),
    fields={"router_float32": True, "selection_bias": True, "dense_layers": 1, "tied_head": True},
    constants={"hidden_act": "silu", "moe_layer_end_index": -1, "moe_layer_interval": 1, "use_bias": False},
    published={
        "ERNIE-4.5-21B-A3B-PT": {
            "vocab_size": 103424, "width": 2560, "hidden": 1536, "layers": 28, "heads": 20, "kv_heads": 4,
            "experts": 64, "top_k": 6, "rope_theta": 5e5, "dense_hidden": 12288, "shared_experts": 2,
        },
    },
    beside=r"model\.mtp_.*",
    refusal=_refusal,
    template="ernie",
)  # fmt: skip
