"""GGUF files of Llama-shaped models: a path in, sizes and tensors under Hugging Face's names out, none read yet.

Quantised tensors come out as float32 (`gguf` dequantises them), float32, float16 and bfloat16 ones as they are. GGUF
keeps the rows of query and key as rotation pairs side by side; here they come in Hugging Face's order, halves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import einops
import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from moextend_jax.checkpoints.gguf_header import Placed, read_header
from moextend_jax.checkpoints.llama import dense_config
from moextend_jax.checkpoints.tensors import Stored, difference
from moextend_jax.config import DecoderConfig, Llama3RopeConfig, MoextendError
from moextend_jax.families.attributes import Table, fits, read_fields
from moextend_jax.models.rope import frequencies
from moextend_jax.outside import said_by, shown


class Opened(NamedTuple):
    """tensors: under a Hugging Face Llama's names. config: of the dense model, experts = top_k = 1.

    metadata: the file's keys and values; `gguf_tokenizer.write_tokenizer` makes tokenizer files of them.
    """

    tensors: dict[str, Stored]
    config: DecoderConfig
    metadata: dict[str, Any]


class _Row(NamedTuple):
    gguf: str
    file: str
    shape: tuple[str, ...]


TABLE = (
    _Row("token_embd.weight", "model.embed_tokens.weight", ("V", "D")),
    _Row("output_norm.weight", "model.norm.weight", ("D",)),
    _Row("output.weight", "lm_head.weight", ("V", "D")),
    _Row("blk.{Z}.attn_norm.weight", "model.layers.{Z}.input_layernorm.weight", ("D",)),
    _Row("blk.{Z}.attn_q.weight", "model.layers.{Z}.self_attn.q_proj.weight", ("NH", "D")),
    _Row("blk.{Z}.attn_k.weight", "model.layers.{Z}.self_attn.k_proj.weight", ("KH", "D")),
    _Row("blk.{Z}.attn_v.weight", "model.layers.{Z}.self_attn.v_proj.weight", ("KH", "D")),
    _Row("blk.{Z}.attn_output.weight", "model.layers.{Z}.self_attn.o_proj.weight", ("D", "NH")),
    _Row("blk.{Z}.ffn_norm.weight", "model.layers.{Z}.post_attention_layernorm.weight", ("D",)),
    _Row("blk.{Z}.ffn_gate.weight", "model.layers.{Z}.mlp.gate_proj.weight", ("F", "D")),
    _Row("blk.{Z}.ffn_up.weight", "model.layers.{Z}.mlp.up_proj.weight", ("F", "D")),
    _Row("blk.{Z}.ffn_down.weight", "model.layers.{Z}.mlp.down_proj.weight", ("D", "F")),
)

TEXT_ATTRIBUTES = {
    "bos_token_id": "tokenizer.ggml.bos_token_id", "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id", "max_position_embeddings": "llama.context_length",
}  # fmt: skip
"""Attributes of a config.json that say nothing about the computation, and their keys in GGUF."""

_FLOAT32 = np.dtype(np.float32)
_KEPT = {Kind.F32: _FLOAT32, Kind.F16: np.dtype(np.float16), Kind.BF16: np.dtype(ml_dtypes.bfloat16)}
_QUANTISED = {
    Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
    Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS,
    Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4,
}  # fmt: skip

_KEYS = Table(
    sizes={
        "embedding_length": "width", "feed_forward_length": "hidden", "block_count": "layers",
        "attention.head_count": "heads", "attention.head_count_kv": "kv_heads", "attention.key_length": "head_size",
        "rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "norm_eps",
    },
    must_be={
        "expert_count": (0,), "expert_used_count": (0,), "rope.scaling.type": ("none",),
        "rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (0.0, 1.0), "attention.causal": (True,),
    },
    harmless={
        "context_length", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "vocab_size", "rope.dimension_count", "attention.value_length",  # these are held against the others
    },
)  # fmt: skip
DIVISORS = "rope_freqs.weight"
"""What each rotary frequency is divided by, in a Llama 3.1 or later."""
MORE_LAYERS = 1000
"""A file that lacks more layers than this gets an error without their names."""


def open_gguf(path: Path) -> Opened:
    """Reads the header of a file of architecture "llama"; `Stored.read` reads and dequantises one tensor.

    Raises:
      MoextendError: not a GGUF file, cut short, of another architecture, with a key or a tensor that this decoder
        does not compute (other rope scaling than Llama 3's, experts, biases), or with a tensor missing, misshapen or of
        an unknown type.
    """
    metadata, placed = read_header(path)
    config = _config(metadata, placed, where=path)
    return Opened(_tensors(placed, config, where=path), config, metadata)


def _config(metadata: Mapping[str, Any], placed: Mapping[str, Placed], *, where: Path) -> DecoderConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise MoextendError(f'{where}: architecture is {shown(architecture)}; only "llama" can be read')
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise MoextendError(f"{where} is one of {shown(parts)} parts; merge them with llama-gguf-split")
    given = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    if experts := given.get("expert_count", 0):
        raise MoextendError(
            f"{where} is a mixture of {shown(experts)} experts, and as GGUF only dense models are read: import "
            "the model's folder of safetensors"
        )
    given.setdefault("attention.head_count_kv", given.get("attention.head_count"))
    given.setdefault("rope.freq_base", 1e4)
    width, heads = given.get("embedding_length"), given.get("attention.head_count")
    if fits("width", width) and fits("heads", heads) and width and heads:
        given.setdefault("attention.key_length", width // heads)
    fields = read_fields(given, _KEYS, where=where, prefix="llama.")
    # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
    fields = {ours: float(str(np.float32(v))) if isinstance(v, float) else v for ours, v in fields.items()}
    head_size = fields["head_size"]
    for name in ("rope.dimension_count", "attention.value_length"):
        if given.get(name, head_size) != head_size:
            raise MoextendError(
                f"{where}: llama.{name} = {shown(given[name])} is not the head size {head_size}: not computed"
            )
    if "token_embd.weight" not in placed:
        raise MoextendError(f"{where}: missing: token_embd.weight")
    if fields["layers"] > MORE_LAYERS + len(placed):  # before anything is made of so many names
        raise MoextendError(
            f"{where}: llama.block_count = {fields['layers']}, but the file holds {len(placed)} tensors"
        )
    vocab_size = placed["token_embd.weight"].shape[0]
    tied_head = "output.weight" not in placed
    config = dense_config(where=where, vocab_size=vocab_size, tied_head=tied_head, **fields)
    return _scaled(config, placed, where=where) if DIVISORS in placed else config


def _scaled(config: DecoderConfig, placed: Mapping[str, Placed], *, where: Path) -> DecoderConfig:
    """With the scaling that the divisors follow from. No file says its numbers, so these are what llama.cpp's converter
    takes, as all of Llama 3.1 to 3.3 have them; the factor is the largest divisor."""
    if placed[DIVISORS].kind == Kind.F32 and placed[DIVISORS].shape == (config.head_size // 2,):
        divisors_h = _read(where, placed, config, DIVISORS, _FLOAT32)
        scaling = Llama3RopeConfig(factor=float(divisors_h.max()), length=8192, low=1.0, high=4.0)
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        if config.head_size % 2 == 0 and fits("rope_scaling", scaling):
            expected_h = frequencies(config)[0] / frequencies(scaled)[0]
            if np.allclose(divisors_h, expected_h, rtol=1e-4, atol=0):
                return scaled
    raise MoextendError(
        f"{where}: {DIVISORS} scales rotary positions otherwise than in Llama 3.1 to 3.3: import the model's folder of "
        "safetensors instead, whose config.json says how"
    )


def _tensors(placed: Mapping[str, Placed], config: DecoderConfig, *, where: Path) -> dict[str, Stored]:
    # Upcycling asks for a matrix once per expert, one after the other: dequantise it once.
    read = functools.lru_cache(maxsize=1)(functools.partial(_read, where, placed, config))
    tensors: dict[str, Stored] = {}
    wanted: set[str] = set()
    for row in TABLE:
        if row.gguf == "output.weight" and config.tied_head:
            continue
        numbers = range(config.layers if "{Z}" in row.gguf else 1)
        names = {row.gguf.format(Z=layer): row.file.format(Z=layer) for layer in numbers}
        wanted |= names.keys()
        shape = tuple(math.prod(config.sizes()[letter] for letter in axis) for axis in row.shape)
        row_tensors = {name: placed[name] for name in names if name in placed}
        for tensor in row_tensors.values():
            if tensor.kind not in _KEPT.keys() | _QUANTISED:
                raise MoextendError(f"{where}: {tensor.name} is of type {tensor.kind.name}, which cannot be read")
            if tensor.shape != shape:
                raise MoextendError(f"{where}: {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")
        # Layers are stacked into one array: its type is what they have in common.
        kinds = {_KEPT.get(tensor.kind, _FLOAT32) for tensor in row_tensors.values()}
        dtype = kinds.pop() if len(kinds) == 1 else _FLOAT32
        for name in row_tensors:
            tensors[names[name]] = Stored(shape, dtype, functools.partial(read, name, dtype), str(where))
    if missing_or_surplus := difference(wanted | ({DIVISORS} & placed.keys()), placed):
        raise MoextendError(f"{where}: the tensors are not those of this model.{missing_or_surplus}")
    return tensors


def _read(path: Path, placed: Mapping[str, Placed], config: DecoderConfig, name: str, dtype: np.dtype) -> np.ndarray:
    tensor = placed[name]
    try:
        stored = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.nbytes,)).view(np.ndarray)
    except (OSError, ValueError) as error:  # it was whole when its header was read
        raise MoextendError(f"{path} has changed since it was opened: {said_by(error)}") from None
    if as_stored := _KEPT.get(tensor.kind):
        array = stored.view(as_stored).reshape(tensor.shape)
    else:
        with np.errstate(all="ignore"):  # scales may be anything: what comes of them is theirs
            array = gguf.dequantize(stored.reshape(*tensor.shape[:-1], -1), tensor.kind)
    if heads := {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2]):
        array = einops.rearrange(array, "(N h pair) D -> (N pair h) D", N=heads, pair=2)
    array = np.asarray(array, dtype).view()
    array.flags.writeable = False
    return array
