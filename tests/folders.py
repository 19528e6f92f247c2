"""Checkpoint folders of every layout, holding tiny random models.

In: a folder to write to. Out: that folder, as the tools of the PyTorch side would have written it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

from moextend_jax.checkpoints import hashes, huggingface, names, store
from moextend_jax.checkpoints.loading import Checkpoint
from moextend_jax.checkpoints.released import attributes_of
from moextend_jax.checkpoints.source import Source
from moextend_jax.config import (
    ExtensionConfig,
    FeaturesConfig,
    ImageTags,
    Medium,
    ModelConfig,
    Named,
    ProjectorConfig,
    WhisperConfig,
    with_extension,
    with_vision,
)

HALF = np.dtype(ml_dtypes.bfloat16)
TEXT = with_vision(tiny.PLAIN, None)
RELEASED = with_vision(tiny.EXTENDED, tiny.VISION, tags=ImageTags(start=40, end=41, pad=42))
ALIGNED = with_extension(RELEASED, None)
CHAIN = dataclasses.replace(
    ALIGNED,
    extensions=Named(
        pets=tiny.EXTENSION,
        items=dataclasses.replace(tiny.EXTENSION, medium="", layers=(1,), sources=(0, 3), new_experts=2),
    ),
)
"""Two extensions, for pictures and for a task in text."""


def arrays(config: ModelConfig, *, dtype: Any = HALF, seed: int = 0) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf).astype(dtype) for path, leaf in tiny.arrays(config, seed=seed).items()}


def whisper_attributes(config: WhisperConfig) -> dict[str, Any]:
    """A config.json of Whisper's encoder alone."""
    return {
        "architectures": ["WhisperEncoder"], "model_type": "whisper", "activation_function": "gelu",
        "d_model": config.width, "encoder_ffn_dim": config.hidden, "encoder_layers": config.layers,
        "encoder_attention_heads": config.heads, "num_mel_bins": config.bands, "max_source_positions": config.patches,
    }  # fmt: skip


def files(table: str, config: ModelConfig, *, dtype: Any = HALF, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by file name, written down with plain transpositions instead of the code under test."""
    made = arrays(config, dtype=dtype, seed=seed)
    by_file = {}
    for tensor in names.tensors(table, config):
        value = made[tensor.path][tensor.index]
        if tensor.path == "media/image/tower/patch":
            size = config.vision.patch_size if config.vision else 0
            value = value.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)
        elif tensor.path.endswith("/out") or tensor.path.endswith("attention/out"):
            value = value.reshape(-1, value.shape[-1]).T
        elif "attention/" in tensor.path and value.ndim == 3:
            value = value.reshape(value.shape[0], -1).T
        elif "attention/" in tensor.path and value.ndim == 2 and tensor.path.endswith("_bias"):
            value = value.reshape(-1)
        elif value.ndim == 2 and tensor.path not in ("decoder/embed", "media/image/tower/position"):
            value = value.T
        by_file[tensor.file] = np.ascontiguousarray(value)
    return by_file


def write(folder: Path, tensors: Mapping[str, np.ndarray], attributes: Mapping[str, Any] | None, *, shards: int = 1):
    folder.mkdir(parents=True, exist_ok=True)
    listed = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for n in range(shards):
            name = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
            part = {one: tensors[one] for one in listed[n::shards]}
            save_file(part, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if attributes is not None:
        (folder / "config.json").write_text(json.dumps(attributes))
    return folder


def mixtral(folder: Path, *, shards: int = 1, seed: int = 0, config: ModelConfig = TEXT, dtype: Any = HALF) -> Path:
    attributes = huggingface.decoder_attributes(config.decoder, dtype=str(np.dtype(dtype)))
    write(folder, files("mixtral", config, seed=seed, dtype=dtype), attributes, shards=shards)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def clip(folder: Path, *, seed: int = 0) -> Path:
    write(folder, files("clip", tiny.PLAIN, seed=seed), tiny.clip_attributes(tiny.VISION))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("of CLIP")
    return folder


def whole_clip(folder: Path) -> Path:
    """A CLIP with its text half."""
    others = {"text_model.embeddings.token_embedding.weight": np.ones((3, 2), HALF), "logit_scale": np.ones((), HALF)}
    others |= {"visual_projection.weight": np.ones((2, 2), HALF)}
    others |= {"vision_model.embeddings.position_ids": np.arange(5)[None]}
    attributes = {"model_type": "clip", "text_config": {}, "vision_config": tiny.clip_attributes(tiny.VISION)}
    return write(folder, files("clip", tiny.PLAIN) | others, attributes)


def projector(path: Path, *, table: str = "llava", prefix: str = "", file: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: value for name, value in files(table, tiny.PLAIN).items()}, path / file)
    return path


def released_attributes(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    tower = huggingface.vision_attributes(config.vision) if config.vision else None
    return attributes_of(config, huggingface.decoder_attributes(config.decoder, dtype=dtype), tower)


def released(
    folder: Path, *, config: ModelConfig = RELEASED, seed: int = 0, keep: str = "", tower: bool = True
) -> Path:
    """A released checkpoint; `keep` (a regular expression over our paths) makes it a partial save."""
    paths = {tensor.file: tensor.path for tensor in names.tensors("released", config)}
    tensors = files("released", config, seed=seed)
    if keep:
        tensors = {name: value for name, value in tensors.items() if re.match(keep, paths[name])}
    attributes = released_attributes(config, dtype="bfloat16")
    attributes["visual"]["heads"] = 16
    if not tower:
        attributes.pop("vision_config", None)
    return write(folder, tensors, attributes)


# --- as transformers writes a whole model -----------------------------------------------------------------------------

ADDED = {
    "gate_vision.weight": "gate.new.weight", "weight_scale.weight_scale.0.weight": "gate.calibrator.0.weight",
    "weight_scale.weight_scale.2.weight": "gate.calibrator.2.weight",
}  # fmt: skip
"""Names of the released code -> those of modeling_moextend.py."""


def fused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A decoder's tensors as transformers 5 holds them: experts of a layer in two tensors, gate above up."""
    result = {name: value for name, value in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(tiny.DECODER.layers):
        block, mlp = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        experts = sum(name.startswith(block + "experts.") for name in tensors) // 3
        w = {n: np.stack([tensors[f"{block}experts.{e}.w{n}.weight"] for e in range(experts)]) for n in (1, 2, 3)}
        result[mlp + "experts.gate_up_proj"] = np.concatenate([w[1], w[3]], axis=1)
        result[mlp + "experts.down_proj"] = w[2]
        result[mlp + "gate.weight"] = tensors[block + "gate.weight"]
        result |= {mlp + new: tensors[block + old] for old, new in ADDED.items() if block + old in tensors}
    return result


def llava_attributes() -> dict[str, Any]:
    text = huggingface.decoder_attributes(tiny.DECODER, dtype="bfloat16")
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 42,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "text_config": {name: value for name, value in text.items() if name != "torch_dtype"},
        "torch_dtype": "bfloat16", "vision_config": tiny.clip_attributes(tiny.VISION),
    }  # fmt: skip


def llava(
    folder: Path,
    *,
    config: ModelConfig = ALIGNED,
    memory: bool = False,
    tower: str = "vision_model.",
    **attributes: Any,
) -> Path:
    """transformers' LLaVA, extended or not, by its names in files or in memory (`save_original_format=False`).

    `tower`: what transformers 4 writes before the tower's names, and 5 does not.
    """
    tensors = files("released", config)
    renames = {
        r"model\.visual\.vision_tower\.vision_model\.": "vision_tower." + tower,
        r"model\.visual\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
        r"model\.visual\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
        r"model\.(?=layers|embed|norm)": "language_model." if memory else "language_model.model.",
        r"lm_head\.": "lm_head." if memory else "language_model.lm_head.",
    }
    renamed = {}
    for name, value in (fused(tensors) if memory else tensors).items():
        for theirs, ours in ADDED.items():
            name = name.replace(theirs, ours)
        old, new = next((old, new) for old, new in renames.items() if re.match(old, name))
        name = re.sub("^" + old, new, name)
        renamed[name if name.startswith("lm_head") or not memory else "model." + name] = value
    if extension := config.extension:
        attributes = {
            "model_type": "moextend", "add_layer": list(extension.layers), "new_experts": extension.new_experts,
            "calibrator_width": extension.calibrator_width, **attributes,
        }  # fmt: skip
    return write(folder, renamed, llava_attributes() | attributes)


# --- a model of many media and extensions -----------------------------------------------------------------------------

MANY = ModelConfig(
    decoder=dataclasses.replace(tiny.DECODER, vocab_size=32000),
    media=Named(
        image=Medium(tower=tiny.VISION, tags=ImageTags(start=5, end=6, pad=3)),
        speech=Medium(
            kind="audio",
            mark="<audio:speech>",
            tags=ImageTags(start=5, end=6, pad=4),
            tower=WhisperConfig(width=12, hidden=20, layers=2, heads=2, bands=4, seconds=2),
            projector=ProjectorConfig(kind="stack", neighbours=4),
            spans=(5, 25),
        ),
        touch=Medium(
            kind="features",
            mark="<features:touch>",
            tags=ImageTags(start=5, end=6, pad=7),
            tower=FeaturesConfig(width=8, patches=3),
            projector=ProjectorConfig(kind="resampler", queries=2, layers=3, heads=2, cross_every=2),
        ),
    ),
    extensions=Named(
        image=tiny.EXTENSION,
        speech=ExtensionConfig(
            layers=(1, 2), sources=(3, 0, 1, 2), new_experts=2, calibrator_width=4, medium="speech", share=0.5
        ),
        touch=ExtensionConfig(layers=(1,), sources=(2,), calibrator_width=3, medium="touch"),
    ),
    composition="decoupled",
    dtype="float32",
)
"""Three kinds of towers and of projectors; extensions of other layers, numbers of experts and sources."""


def base_hash(opened: Checkpoint) -> str:
    """Content hash of the pretrained part as stored."""
    return opened.source.record.base or hashes.base_hashes(opened.source.leaves).base


def source_of(config: ModelConfig, *, seed: int = 0, **facts: Any) -> Source:
    """A whole model in memory, opened."""
    leaves = huggingface.from_arrays(arrays(config, dtype=np.float32, seed=seed), config=config)
    return Source(leaves, store.Record(config, "mixtral", {}, ("llava", ""), None, facts), {})


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def change(folder: Path, changes: Mapping[str, Callable[[np.ndarray], np.ndarray] | None]) -> Path:
    """Changes tensors of a one-file folder in place; None takes one away."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, changed in changes.items():
        old = tensors.pop(name, np.zeros(2, HALF))
        if changed is not None:
            tensors[name] = np.ascontiguousarray(changed(old))
    save_file(tensors, path)
    return folder


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """The same names, element types, shapes and bytes."""
    assert one.keys() == other.keys()
    for name in one:
        ours, theirs = np.asarray(one[name]), np.asarray(other[name])
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert ours.tobytes() == theirs.tobytes(), name
