"""OLMoE: a norm over all heads of queries and of keys together, then a bound, and weights that are not renormalised."""

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import PLAIN, SIZES, Family, decoder, normed_heads

_1B_7B = {
    "vocab_size": 50304, "width": 2048, "hidden": 1024, "layers": 16, "heads": 16, "kv_heads": 16, "experts": 64,
    "top_k": 8, "rope_theta": 1e4,
}  # fmt: skip

FAMILY = Family(
    architecture="OlmoeForCausalLM",
    names=(*decoder("mlp", "gate_proj up_proj down_proj"), *normed_heads("(N H) -> N H", "(K H) -> K H")),
    attributes=Table(
        sizes=SIZES
        | {
            "intermediate_size": "hidden", "num_experts": "experts", "norm_topk_prob": "normalised",
            "clip_qkv": "clip_qkv",
        },
        must_be=PLAIN,
        harmless=OF_ANY_MODEL,
        optional={"head_dim", "tie_word_embeddings", "norm_topk_prob", "clip_qkv"},
        aliases={"num_local_experts": "num_experts"},
    ),
    fields={"qk_norm": "whole", "normalised": False},
    constants={"hidden_act": "silu", "attention_bias": False},
    published={"OLMoE-1B-7B-0924": _1B_7B, "OLMoE-1B-7B-0924-Instruct": _1B_7B},
    template="tulu",
)  # fmt: skip
