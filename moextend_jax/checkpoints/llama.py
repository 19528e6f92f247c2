"""Sizes of a dense Llama or Mistral: `config.json` in, `DecoderConfig` with one expert out, or a refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moextend_jax.checkpoints.huggingface import fits, read_json
from moextend_jax.checkpoints.outside import short, shown
from moextend_jax.config import DecoderConfig, MoextendError

MODEL_TYPES = ("llama", "mistral")

_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_size",
}  # fmt: skip
_NUMBERS = {"rope_theta": "rope_theta", "rms_norm_eps": "norm_eps"}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (None, False), "mlp_bias": (None, False), "rope_scaling": (None,),
    "rope_interleaved": (None, False), "partial_rotary_factor": (None, 1.0), "attention_dropout": (None, 0.0),
    "residual_dropout": (None, 0.0), "tie_word_embeddings": (True, False), "sliding_window": (None,),
}  # fmt: skip
"""Attributes that change the computation, with the only values that this code computes."""
_WITHOUT_EFFECT = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path",
    "pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "initializer_range", "max_position_embeddings",
    "max_sequence_length", "pretraining_tp", "is_llama_config", "transformers.js_config",
}  # fmt: skip


def read_llama_config(folder: Path) -> DecoderConfig:
    return llama_config(read_json(folder / "config.json"), where=folder / "config.json")


def llama_config(attributes: Mapping[str, Any], *, where: Path) -> DecoderConfig:
    """Sizes of the dense model from a Llama's or Mistral's `config.json`: one expert, which every token takes.

    Raises:
      MoextendError: names an attribute that is unknown, or that this decoder does not compute (sliding window, rope
        scaling, biases, other activations, ...).
    """
    attributes = _without_rope_parameters(dict(attributes), where=where)
    model_type = attributes.get("model_type")
    if model_type not in MODEL_TYPES:
        raise MoextendError(
            f"{where}: model_type is {shown(model_type)}; only {' and '.join(MODEL_TYPES)} can be upcycled"
        )
    if model_type == "mistral":
        # Where the file is silent transformers takes 4096, and 8 key/value heads.
        attributes.setdefault("sliding_window", 4096)
        attributes.setdefault("num_key_value_heads", 8)
    for name, value in attributes.items():
        if name == "sliding_window" and value is not None:
            raise MoextendError(
                f"{where}: sliding_window = {shown(value)} cannot be honoured: here every token sees all before it. "
                f"The two agree on texts of up to {shown(value)} tokens; if yours are, write null there"
            )
        if name in _MUST_BE and value not in _MUST_BE[name]:
            raise MoextendError(f"{where}: {name} = {shown(value)} cannot be honoured (only {_MUST_BE[name][-1]!r})")
        if name not in (_SIZES.keys() | _NUMBERS.keys() | _MUST_BE.keys() | _WITHOUT_EFFECT):
            raise MoextendError(f"{where}: attribute {short(name)!r} is unknown to this code, so it cannot be honoured")
    attributes.setdefault("rope_theta", 1e4)
    if attributes.get("num_key_value_heads") is None:
        attributes["num_key_value_heads"] = attributes.get("num_attention_heads")
    fields: dict[str, Any] = {}
    for theirs, ours in (_SIZES | _NUMBERS).items():
        value = attributes.get(theirs)
        if theirs == "head_dim" and value is None:
            value, rest = divmod(fields["width"], fields["heads"])
            if rest:
                raise MoextendError(
                    f"{where}: num_attention_heads does not divide hidden_size, and there is no head_dim"
                )
        if not fits(ours, value):
            raise MoextendError(f"{where}: {theirs} must be a positive number, not {shown(value)}")
        fields[ours] = value
    tied_head = attributes.get("tie_word_embeddings", False)
    return dense_config(where=where, tied_head=bool(tied_head), **fields)


def dense_config(*, where: Path, **sizes: Any) -> DecoderConfig:
    """Sizes of a dense model, here and in GGUF files: a mixture of one expert."""
    config = DecoderConfig(experts=1, top_k=1, **sizes)
    if config.heads % config.kv_heads:
        raise MoextendError(f"{where}: {config.heads} heads cannot share {config.kv_heads} key/value heads evenly")
    return config


def _without_rope_parameters(attributes: dict[str, Any], *, where: Path) -> dict[str, Any]:
    """transformers 5 writes rope_theta inside `rope_parameters`; a `rope_scaling` that scales nothing may stay too."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = attributes.get(name)
        if not isinstance(rope, dict):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        surplus = sorted(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if kind != "default" or surplus or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise MoextendError(f"{where}: {name} = {shown(rope)} cannot be honoured (only plain rotary positions)")
        attributes = {other: value for other, value in attributes.items() if other != name}
        if "rope_theta" in rope:
            attributes["rope_theta"] = rope["rope_theta"]
    return attributes
