"""Qwen3-MoE: a norm on every head of queries and keys, and weights that are renormalised where the file says so."""

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import PLAIN, SIZES, Family, decoder, normed_heads

_SIZES = {
    "vocab_size": 151936, "experts": 128, "top_k": 8, "kv_heads": 4, "norm_eps": 1e-6, "normalised": True,
}  # fmt: skip
_30B = _SIZES | {"width": 2048, "hidden": 768, "layers": 48, "heads": 32}

FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    names=(*decoder("mlp", "gate_proj up_proj down_proj"), *normed_heads("H -> H", "H -> H")),
    attributes=Table(
        sizes=SIZES
        | {"moe_intermediate_size": "hidden", "num_experts": "experts", "norm_topk_prob": "normalised"},
        must_be=PLAIN
        | {
            "use_sliding_window": (False,), "mlp_only_layers": ([], None), "decoder_sparse_step": (1,),
            "qkv_bias": (False,), "use_qk_norm": (True,), "shared_expert_intermediate_size": (0,),  # Qwen3-Coder's
        },
        # The width of dense layers, which there are none of, and what counts with use_sliding_window alone.
        harmless=OF_ANY_MODEL | {"intermediate_size", "sliding_window", "max_window_layers"},
        optional={"head_dim", "tie_word_embeddings", "norm_topk_prob"},
        aliases={"num_local_experts": "num_experts"},
    ),
    fields={"qk_norm": "head", "normalised": False},  # what the class takes where norm_topk_prob is not there
    constants={
        "hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "use_sliding_window": False, "sliding_window": None,
    },
    published={
        "Qwen3-30B-A3B": _30B, "Qwen3-30B-A3B-Base": _30B,
        "Qwen3-30B-A3B-Instruct-2507": _30B | {"rope_theta": 1e7},
        "Qwen3-Coder-30B-A3B-Instruct": _30B | {"rope_theta": 1e7},
        "Qwen3-235B-A22B": _SIZES | {"width": 4096, "hidden": 1536, "layers": 94, "heads": 64},
    },
    template="chatml",
)  # fmt: skip
