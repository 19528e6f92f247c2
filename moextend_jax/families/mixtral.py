"""Mixtral: experts renormalised over the chosen, nothing besides. The family of the paper."""

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import PLAIN, SIZES, Family, decoder

_8X22B = {"width": 6144, "hidden": 16384, "layers": 56, "heads": 48}

FAMILY = Family(
    architecture="MixtralForCausalLM",
    names=decoder("block_sparse_moe", "w1 w3 w2"),
    attributes=Table(
        sizes=SIZES
        | {"intermediate_size": "hidden", "num_local_experts": "experts", "sliding_window": "window"},
        must_be=PLAIN,
        harmless=OF_ANY_MODEL,
        optional={"head_dim", "tie_word_embeddings", "sliding_window"},
    ),
    fields={},
    constants={"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2},
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "rope_theta": 1e6, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    published={
        "Mixtral-8x7B-v0.1": {}, "Mixtral-8x7B-Instruct-v0.1": {},
        "Mixtral-8x22B-v0.1": _8X22B, "Mixtral-8x22B-Instruct-v0.1": _8X22B | {"vocab_size": 32768},
    },
)  # fmt: skip
