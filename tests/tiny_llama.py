"""Tiny dense Llamas with random weights on disk: tensors under Hugging Face's names, a folder, a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import save_file

from moextend_jax.checkpoints.leaves import match, read_sharded
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import Batch, DecoderConfig, ModelConfig
from moextend_jax.parameters import with_arrays

# Widths are multiples of 32, a row of GGUF's simplest quantised types.
DENSE = DecoderConfig(
    vocab_size=61, width=32, hidden=64, layers=3, heads=4, kv_heads=2, head_size=8, experts=1, top_k=1, rope_theta=1e4
)


def attributes(config: DecoderConfig = DENSE, **changes: Any) -> dict[str, Any]:
    """`config.json` of such a Llama; an attribute changed to ... is left out."""
    made = {
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.width, "hidden_act": "silu",
        "intermediate_size": config.hidden, "num_hidden_layers": config.layers, "rms_norm_eps": config.norm_eps,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head, "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    return {name: value for name, value in (made | changes).items() if value is not ...}


def tensors(config: DecoderConfig = DENSE, *, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    D, F, V, N, K = config.width, config.hidden, config.vocab_size, config.heads, config.kv_heads
    H = config.head_size

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    made = {"model.embed_tokens.weight": matrix(V, D), "model.norm.weight": 1 + 0.1 * matrix(D)}
    if not config.tied_head:
        made["lm_head.weight"] = matrix(V, D)
    for layer in range(config.layers):
        made |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": 1 + 0.1 * matrix(D),
                "self_attn.q_proj": 2 * matrix(N * H, D),
                "self_attn.k_proj": 2 * matrix(K * H, D),
                "self_attn.v_proj": matrix(K * H, D),
                "self_attn.o_proj": matrix(D, N * H),
                "post_attention_layernorm": 1 + 0.1 * matrix(D),
                "mlp.gate_proj": matrix(F, D),
                "mlp.up_proj": matrix(F, D),
                "mlp.down_proj": matrix(D, F),
            }.items()
        }
    return made


def stored(arrays: dict[str, np.ndarray]) -> dict[str, Stored]:
    return {
        name: Stored(array.shape, array.dtype, lambda array=array: array, "memory") for name, array in arrays.items()
    }


def write_folder(folder: Path, *, config: DecoderConfig = DENSE, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(attributes(config, **changes)))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    path: Path,
    *,
    config: DecoderConfig = DENSE,
    kinds: Callable[[str], str] = lambda name: "F32",
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    left_out: str = "",
    architecture: str = "llama",
) -> Path:
    """As llama.cpp's converter writes it: rows of query and key permuted, vectors float32.

    Args:
      kinds: name of a matrix, as GGUF calls it -> its type.
      keys: more keys and values after "llama."; None leaves one out.
      extra: more tensors, under GGUF's names.
    """
    writer = GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        "block_count": config.layers, "context_length": 64, "embedding_length": config.width,
        "feed_forward_length": config.hidden, "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads, "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_size,
    } | (keys or {})  # fmt: skip
    for name, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(f"llama.{name}", value)
    made = dict(extra or {})
    for name, array in tensors(config).items():
        *start, last = name.removesuffix(".weight").split(".", 3)
        key = ".".join(["blk", start[2], GGUF_NAMES[last]]) if len(start) == 3 else GGUF_NAMES[".".join([*start, last])]
        if heads := {"attn_q": config.heads, "attn_k": config.kv_heads}.get(key.split(".")[-1]):
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        made[f"{key}.weight"] = array
    for name, array in made.items():
        if name == left_out:
            continue
        this = GGMLQuantizationType[kinds(name) if array.ndim > 1 else "F32"]
        if this == GGMLQuantizationType.F64:
            writer.add_tensor(name, array.astype(np.float64))
        else:
            writer.add_tensor(name, quantize(np.ascontiguousarray(array), this), raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(source: dict[str, Stored], config: DecoderConfig) -> dict[str, jax.Array]:
    """A Mixtral's tensors as our arrays, float32, matched by the table of names."""
    leaves = match(source, table="mixtral", config=ModelConfig(decoder=config, dtype="float32"), where="test")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return read_sharded(leaves, dict.fromkeys(leaves, one), dtype="float32")


def logits(arrays: dict[str, jax.Array], config: DecoderConfig, ids_BL: np.ndarray) -> np.ndarray:
    model = tiny.structure(ModelConfig(decoder=config, dtype="float32", remat="none"))
    ids_BL = np.asarray(ids_BL, np.int32)

    @jax.jit
    def run(arrays: dict[str, jax.Array], batch: Batch) -> jax.Array:
        whole = with_arrays(model, arrays)
        return whole.decoder.logits(whole(batch).hidden_BLD)

    return np.asarray(run(arrays, jax.tree.map(jnp.asarray, text_batch(ids_BL))))


def text_batch(ids_BL: np.ndarray) -> Batch:
    """Full rows of text; the label of a position is the id after it (see Batch: labels are not shifted)."""
    positions_BL = np.broadcast_to(np.arange(ids_BL.shape[1], dtype=np.int32), ids_BL.shape)
    ones_BL = np.ones_like(ids_BL)
    return Batch(ids_BL, ids_BL, positions_BL, ones_BL, -ones_BL)
