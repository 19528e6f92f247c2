"""Sizes of a dense Llama or Mistral: `config.json` in, `DecoderConfig` with one expert out, or a refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moextend_jax.config import DecoderConfig, MoextendError
from moextend_jax.families.attributes import OF_ANY_MODEL, Table, decoder_attributes_of, read_fields, with_head_size
from moextend_jax.outside import shown

MODEL_TYPES = ("llama", "mistral")

_TABLE = Table(
    sizes={
        "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "hidden",
        "num_hidden_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
        "head_dim": "head_size", "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied_head", "sliding_window": "window",
        "rope_scaling": "rope_scaling",
    },
    must_be={
        "hidden_act": ("silu",), "attention_bias": (None, False), "mlp_bias": (None, False),
        "rope_interleaved": (None, False), "partial_rotary_factor": (None, 1.0), "attention_dropout": (None, 0.0),
        "residual_dropout": (None, 0.0),
    },
    harmless=OF_ANY_MODEL,
    optional={"head_dim", "tie_word_embeddings", "sliding_window"},
)  # fmt: skip


def llama_config(attributes: Mapping[str, Any], *, where: Path) -> DecoderConfig:
    """Sizes of the dense model from a Llama's or Mistral's `config.json`: one expert, which every token takes.

    Raises:
      MoextendError: names an attribute that is unknown, or that this decoder does not compute (biases,
        other activations, ...).
    """
    attributes = decoder_attributes_of(attributes, where=where)
    model_type = attributes.get("model_type")
    if model_type not in MODEL_TYPES:
        raise MoextendError(
            f"{where}: model_type is {shown(model_type)}; only {' and '.join(MODEL_TYPES)} can be upcycled"
        )
    if model_type == "mistral":
        # Where the file is silent transformers takes 4096, and 8 key/value heads.
        attributes.setdefault("sliding_window", 4096)
        attributes.setdefault("num_key_value_heads", 8)
    attributes.setdefault("rope_theta", 1e4)
    if attributes.get("num_key_value_heads") is None:
        attributes["num_key_value_heads"] = attributes.get("num_attention_heads")
    return dense_config(where=where, **with_head_size(read_fields(attributes, _TABLE, where=where), where=where))


def dense_config(*, where: Path, **sizes: Any) -> DecoderConfig:
    """Sizes of a dense model, here and in GGUF files: a mixture of one expert."""
    config = DecoderConfig(experts=1, top_k=1, **sizes)
    if config.heads % config.kv_heads:
        raise MoextendError(f"{where}: {config.heads} heads cannot share {config.kv_heads} key/value heads evenly")
    return config
