"""Qwen2-MoE: biases on queries, keys and values, an expert that all tokens pass, weights that are not renormalised."""

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import BIASES, PLAIN, SIZES, Family, Name, decoder, shared_expert

_SIZES = {"vocab_size": 151936, "norm_eps": 1e-6}
_A27B = _SIZES | {
    "width": 2048, "hidden": 1408, "layers": 24, "heads": 16, "kv_heads": 16, "experts": 60, "top_k": 4,
    "shared_hidden": 5632,
}  # fmt: skip
_57B = _SIZES | {
    "width": 3584, "hidden": 2560, "layers": 28, "heads": 28, "kv_heads": 4, "experts": 64, "top_k": 8,
    "shared_hidden": 20480,
}  # fmt: skip

FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    names=(
        *decoder("mlp", "gate_proj up_proj down_proj"),
        *BIASES,
        *shared_expert("mlp.shared_expert"),
        Name("decoder/layers/shared/gate", "model.layers.{Z}.mlp.shared_expert_gate.weight", "1 D -> D"),
    ),
    attributes=Table(
        sizes=SIZES
        | {
            "moe_intermediate_size": "hidden", "num_experts": "experts", "norm_topk_prob": "normalised",
            "shared_expert_intermediate_size": "shared_hidden",
        },
        must_be=PLAIN
        | {
            "use_sliding_window": (False,), "mlp_only_layers": ([], None), "decoder_sparse_step": (1,),
            "qkv_bias": (True,),
        },
        # The width of dense layers, which there are none of, and what counts with use_sliding_window alone.
        harmless=OF_ANY_MODEL | {"intermediate_size", "sliding_window", "max_window_layers"},
        optional={"head_dim", "tie_word_embeddings", "norm_topk_prob"},
        aliases={"num_local_experts": "num_experts"},
    ),
    fields={"qkv_bias": True, "shared_gate": True, "normalised": False},
    constants={
        "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    },
    published={"Qwen1.5-MoE-A2.7B": _A27B, "Qwen1.5-MoE-A2.7B-Chat": _A27B, "Qwen2-57B-A14B": _57B},
    template="chatml",
)  # fmt: skip
