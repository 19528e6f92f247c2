"""Hugging Face folders in and out: `config.json` -> sizes, safetensors files <-> our parameters by path.

Every tensor is matched once through `names.TABLES`; unknown, missing or misshapen ones, and attributes of
config.json that we cannot honour, are errors that name them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import einops
import ml_dtypes  # noqa: F401 - gives NumPy its bfloat16
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moextend_jax.checkpoints.names import IGNORED, axis_sizes, inverse, tensors
from moextend_jax.config import DecoderConfig, ExtensionConfig, ModelConfig, MoextendError, VisionConfig
from moextend_jax.models.parameters import by_path

_DECODER = {
    "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "num_local_experts": "experts",
    "num_experts_per_tok": "top_k", "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head", "head_dim": "head_size",
}  # fmt: skip
_VISION = {
    "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "image_size": "image_size", "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps", "hidden_act": "activation",
}  # fmt: skip
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "model_type": ("mixtral", "clip_vision_model"), "hidden_act": ("silu", "quick_gelu", "gelu"),
    "sliding_window": (None,), "rope_scaling": (None,), "attention_bias": (False,), "num_channels": (3,),
    "test": (False,), "attention_dropout": (0, 0.0), "router_jitter_noise": (0, 0.0), "dropout": (0, 0.0),
}  # fmt: skip
"""Attributes that change the computation, with the only values that this code computes."""
_HAS_A_DEFAULT = {"head_dim", "tie_word_embeddings"}
"""Sizes that files leave out and everybody fills in alike; any other that is missing is an error."""
_WITHOUT_EFFECT = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path", "pad_token_id",
    "bos_token_id", "eos_token_id", "initializer_range", "initializer_factor", "max_position_embeddings",
    "output_router_logits", "router_aux_loss_coef", "projection_dim", "quantization_config_note",
    # the released code's own: its image tower is described elsewhere, these lines are left over
    "add_layer", "visual", "embed_dim", "img_size", "in_chans", "patch_size", "tiny_vocab",
}  # fmt: skip


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Sizes from a Mixtral `config.json`; of an extended model in the released layout the pretrained experts count."""
    attributes = _read_json(folder / "config.json")
    if isinstance(attributes.get("rope_parameters"), dict):  # transformers 5 writes it so
        rope = attributes.pop("rope_parameters")
        if rope.get("rope_type", "default") != "default":
            raise MoextendError(f"{folder / 'config.json'}: rope_parameters.rope_type {rope['rope_type']!r} is unknown")
        attributes["rope_theta"] = rope["rope_theta"]
    fields = _fields(attributes, _DECODER, where=folder / "config.json", model_type="mixtral")
    fields.setdefault("head_size", fields["width"] // fields["heads"])
    if fields["head_size"] is None:
        fields["head_size"] = fields["width"] // fields["heads"]
    if attributes.get("add_layer"):
        fields["experts"] -= 1
    return DecoderConfig(**fields)


def read_vision_config(folder: Path, *, feature_layer: int) -> VisionConfig:
    attributes = _read_json(folder / "config.json")
    fields = _fields(attributes, _VISION, where=folder / "config.json", model_type="clip_vision_model")
    return VisionConfig(feature_layer=feature_layer, **fields)


def read_extension_config(folder: Path) -> ExtensionConfig | None:
    """The extended layers of a checkpoint in the released layout; its source experts are not in the file (-1)."""
    layers = _read_json(folder / "config.json").get("add_layer")
    return ExtensionConfig(layers=tuple(layers), sources=(-1,) * len(layers)) if layers else None


def write_decoder_config(folder: Path, config: DecoderConfig, *, dtype: str) -> None:
    attributes = {theirs: getattr(config, ours) for theirs, ours in _DECODER.items()}
    attributes |= {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
        "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(attributes, indent=1, sort_keys=True) + "\n")


def read_parameters(
    folder: Path, model: nnx.Module, *, table: str, config: ModelConfig, into: str | None = None
) -> dict[str, np.ndarray]:
    """Reads a folder's safetensors into stacked arrays by our path, in the file's dtype.

    Args:
      model: the abstract or real model; it gives the shapes to expect.
      table: layout of the file, a key of `names.TABLES`.
    """
    wanted = {tensor.file: tensor for tensor in tensors(table, config)}
    shapes = {path: tuple(param.shape) for path, param in by_path(nnx.state(model, nnx.Param)).items()}
    sizes = config.sizes() if into is None else {}
    files = _open_files(folder)
    found = {name for name in files if not IGNORED.fullmatch(name)}
    if missing_or_surplus := _difference(set(wanted), found):
        raise MoextendError(f"{folder}: the tensors are not those of this model.{missing_or_surplus}")
    arrays: dict[str, np.ndarray] = {}
    vision_sizes = config.vision.sizes() if config.vision else {}
    for name, tensor in wanted.items():
        value = _tensor(files[name], name)
        letters = vision_sizes if tensor.path.startswith("vision") else sizes
        if tensor.layout.startswith("C c h w"):
            letters = {}
        try:
            value = einops.rearrange(value, tensor.layout, **axis_sizes(tensor.layout, letters))
        except einops.EinopsError as error:
            raise MoextendError(f"{folder}: {name} has shape {value.shape}, not {tensor.layout}: {error}") from None
        expected = shapes[tensor.path][len(tensor.index) :]
        if value.shape != expected:
            raise MoextendError(f"{folder}: {name} has shape {value.shape} ({tensor.layout}), expected {expected}")
        if not tensor.index:
            arrays[tensor.path] = value
            continue
        stacked = arrays.setdefault(tensor.path, np.empty(shapes[tensor.path], value.dtype))
        stacked[tensor.index] = value
    return arrays


def write_parameters(folder: Path, arrays: Mapping[str, Any], *, table: str, config: ModelConfig) -> None:
    """Writes arrays by our path as one safetensors file of layout `table`."""
    vision_sizes = config.vision.sizes() if config.vision else {}
    written = {}
    for tensor in tensors(table, config):
        letters = vision_sizes if tensor.path.startswith("vision") else config.sizes()
        if tensor.layout.startswith("C c h w") and config.vision:
            letters = {"h": config.vision.patch_size, "w": config.vision.patch_size, "c": 3}
        layout = inverse(tensor.layout)
        value = einops.rearrange(np.asarray(arrays[tensor.path][tensor.index]), layout, **axis_sizes(layout, letters))
        written[tensor.file] = np.ascontiguousarray(value)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})


def _fields(attributes: dict, known: dict[str, str], *, where: Path, model_type: str) -> dict[str, Any]:
    if attributes.get("model_type") != model_type:
        raise MoextendError(f"{where}: model_type is {attributes.get('model_type')!r}, expected {model_type!r}")
    for name, value in attributes.items():
        if name in _MUST_BE and value not in _MUST_BE[name]:
            raise MoextendError(f"{where}: {name} = {value!r} cannot be honoured (only {_MUST_BE[name]})")
        if name not in known and name not in _MUST_BE and name not in _WITHOUT_EFFECT:
            raise MoextendError(f"{where}: attribute {name!r} is unknown to this code, so it cannot be honoured")
    if model_type == "mixtral" and attributes.get("hidden_act", "silu") != "silu":
        raise MoextendError(f"{where}: hidden_act = {attributes['hidden_act']!r} cannot be honoured (only 'silu')")
    if missing := sorted(known.keys() - attributes.keys() - _HAS_A_DEFAULT):
        raise MoextendError(f"{where}: {', '.join(missing)} must be given")
    return {ours: attributes[theirs] for theirs, ours in known.items() if theirs in attributes}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        attributes = json.loads(path.read_text())
    except FileNotFoundError:
        raise MoextendError(f"{path} does not exist: not a Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise MoextendError(f"{path} cannot be read: {error}") from None
    if not isinstance(attributes, dict):
        raise MoextendError(f"{path} holds no attributes of a model")
    return attributes


def _open_files(folder: Path) -> dict[str, Any]:
    """Tensor name -> open file that holds it."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise MoextendError(f"{folder} holds no *.safetensors file")
    try:
        return {name: file for path in paths for file in [safe_open(path, "flax")] for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MoextendError(f"{folder}: a safetensors file cannot be read: {error}") from None


def _tensor(file: Any, name: str) -> np.ndarray:
    return np.asarray(file.get_tensor(name))


def _difference(wanted: set[str], found: set[str]) -> str:
    def some(names: set[str]) -> str:
        listed = sorted(names)
        return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")

    missing = f" Missing: {some(wanted - found)}." if wanted - found else ""
    surplus = f" Not asked for: {some(found - wanted)}." if found - wanted else ""
    return missing + surplus
