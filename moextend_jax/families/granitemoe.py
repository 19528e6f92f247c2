"""Granite 3 MoE: factors on embeddings, blocks, attention and logits; gate and up of all experts lie in one tensor."""

from moextend_jax.families.attributes import OF_ANY_MODEL, Table
from moextend_jax.families.family import PLAIN, SIZES, Family, Fused, Name, decoder, parted

_BLOCK = "model.layers.{Z}.block_sparse_moe."
_IN, _OUT = _BLOCK + "input_linear.weight", _BLOCK + "output_linear.weight"
_EXPERTS = "decoder/layers/moe/experts/"
_SIZES = {
    "vocab_size": 49155, "hidden": 512, "kv_heads": 8, "head_size": 64, "top_k": 8, "norm_eps": 1e-6,
    "tied_head": True, "embed_factor": 12.0, "residual_factor": 0.22, "attention_scale": 0.015625,
    "logits_divisor": 6.0,
}  # fmt: skip
_1B = _SIZES | {"width": 1024, "layers": 24, "heads": 16, "experts": 32, "rope_theta": 1.5e6}
_3B = _SIZES | {"width": 1536, "layers": 32, "heads": 24, "experts": 40, "rope_theta": 1e7}

FAMILY = Family(
    architecture="GraniteMoeForCausalLM",
    names=(
        *(name for name in decoder("block_sparse_moe", "w1 w3 w2", gate="router.layer.weight")
          if not name.path.startswith(_EXPERTS)),
        Name(_EXPERTS + "w_gate", parted(_IN, "gate"), "F D -> D F"),
        Name(_EXPERTS + "w_up", parted(_IN, "up"), "F D -> D F"),
        Name(_EXPERTS + "w_down", parted(_OUT, "down"), "D F -> F D"),
    ),
    attributes=Table(
        sizes=SIZES
        | {
            "intermediate_size": "hidden", "num_local_experts": "experts", "embedding_multiplier": "embed_factor",
            "residual_multiplier": "residual_factor", "attention_multiplier": "attention_scale",
            "logits_scaling": "logits_divisor",
        },
        must_be=PLAIN,
        harmless=OF_ANY_MODEL,
        optional={"head_dim", "tie_word_embeddings", "embedding_multiplier", "residual_multiplier",
                  "attention_multiplier", "logits_scaling"},
    ),
    # What the class takes where the file is silent: its attention_multiplier is 1, not 1/sqrt(H).
    fields={"attention_scale": 1.0},
    constants={"hidden_act": "silu", "attention_bias": False},
    published={
        "granite-3.1-1b-a400m-base": _1B, "granite-3.1-1b-a400m-instruct": _1B,
        "granite-3.1-3b-a800m-base": _3B, "granite-3.1-3b-a800m-instruct": _3B,
    },
    fused=(Fused(_IN, ("gate", "up")), Fused(_OUT, ("down",))),
    template="granite",
)  # fmt: skip
