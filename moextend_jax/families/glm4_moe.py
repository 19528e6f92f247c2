"""GLM-4.5: sigmoid scores with a bias that chooses and does not weigh, dense first layers, an expert that all tokens
pass, and positions that turn half of a head."""

from typing import Any

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import BIASES, PLAIN, SIZES, Family, Name, decoder, dense, normed_heads, shared_expert

_LAYERS = (*decoder("mlp", "gate_proj up_proj down_proj"), *BIASES, *normed_heads("H -> H", "H -> H"))


def _qk_norm(value: Any) -> Any:
    return {True: "head", False: "none"}.get(value, value) if isinstance(value, bool) else value


FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    names=(
        *_LAYERS,
        *dense(_LAYERS),
        *shared_expert("mlp.shared_experts"),
        Name("decoder/layers/moe/selection_bias", "model.layers.{Z}.mlp.gate.e_score_correction_bias", "E -> E"),
    ),
    attributes=Table(
        sizes=SIZES
        | {
            "moe_intermediate_size": "hidden", "n_routed_experts": "experts", "norm_topk_prob": "normalised",
            "n_shared_experts": "shared_experts", "first_k_dense_replace": "dense_layers",
            "intermediate_size": "dense_hidden", "n_group": "groups", "topk_group": "top_groups",
            "routed_scaling_factor": "routed_factor", "partial_rotary_factor": "rotary_share",
            "attention_bias": "qkv_bias", "use_qk_norm": "qk_norm",
        },
        must_be={name: values for name, values in PLAIN.items()
                 if name not in ("partial_rotary_factor", "attention_bias")},
        # Layers that predict further tokens are left out (`beside`), as transformers does.
        harmless=OF_ANY_MODEL | {"num_nextn_predict_layers"},
        optional={"head_dim", "tie_word_embeddings", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor",
                  "partial_rotary_factor", "attention_bias", "use_qk_norm", "first_k_dense_replace"},
        aliases={"num_local_experts": "n_routed_experts"},
        ours={"use_qk_norm": _qk_norm},
        theirs={"use_qk_norm": lambda qk_norm: qk_norm == "head"},
    ),
    # What the class takes where the file is silent.
    fields={"scores": "sigmoid", "selection_bias": True, "dense_layers": 1, "rotary_share": 0.5},
    constants={"hidden_act": "silu"},
    published={
        "GLM-4.5-Air": {
            "vocab_size": 151552, "width": 4096, "hidden": 1408, "layers": 46, "heads": 96, "experts": 128, "top_k": 8,
            "qkv_bias": True, "dense_hidden": 10944, "shared_experts": 1,
        },
    },
    beside=r"model\.layers\.LAYERS\..*",
    template="glm4",
)  # fmt: skip
