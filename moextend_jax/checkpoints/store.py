"""The folder that an import makes: stacked leaves in safetensors, and moextend.json, which says what they are.

Out and in: leaves by our path with the sizes of their model, the layout they came from, and their hashes. A delta is
the same folder with the leaves of an extension only, and the hash of the base it belongs to.

Why not Orbax, as for training checkpoints: Orbax saves arrays that are on devices, and its partial saves still take a
whole stacked leaf (30 GB of w_gate for Mixtral-8x7B) at a time. An import has no devices. Here a leaf is written piece
by piece as its bytes pass by, one tensor of a file in memory, and a shard is a byte range of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.checkpoints import hashes, leaves
from moextend_jax.checkpoints.attributes import fits
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.names import PREFIXES
from moextend_jax.checkpoints.outside import shown
from moextend_jax.checkpoints.tensors import difference, open_safetensors, write_safetensors
from moextend_jax.config import DecoderConfig, ExtensionConfig, ImageTags, ModelConfig, MoextendError, VisionConfig

FILE, FORMAT = "moextend.json", 1


class Record(NamedTuple):
    """What moextend.json holds.

    `layout` is where the leaves came from, "delta" for a delta. `attributes` are the config.json files they came with,
    by part; `projector` how their projector is spelled (table, prefix). `base` is a delta's base hash, else None.
    """

    config: ModelConfig
    layout: str
    attributes: dict[str, dict[str, Any]]
    projector: tuple[str, str]
    base: str | None
    facts: dict[str, Any]


def is_imported(folder: Path) -> bool:
    return (folder / FILE).is_file()


def write(
    folder: Path,
    matched: Mapping[str, Leaf],
    record: Record,
    *,
    dtype: Any = None,
    max_shard_bytes: int,
    written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes leaves into an empty folder, cast to `dtype` where it is given."""
    digests = {path: hashlib.sha256() for path in matched}
    planned = {path: leaves.plan_ours(leaf, dtype=dtype, digest=digests[path]) for path, leaf in matched.items()}
    write_safetensors(folder, planned, max_shard_bytes=max_shard_bytes, written=written)
    written_leaves = {path: (plan.dtype, plan.shape, digests[path].hexdigest()) for path, plan in planned.items()}
    pretrained = {path: leaf for path, leaf in written_leaves.items() if path.startswith(hashes.PRETRAINED)}
    parts = {path.partition("/")[0] for path in matched} if record.base is None else {"decoder", "vision", "extension"}
    value = {
        "format": FORMAT,
        "layout": record.layout,
        "model": {
            "decoder": dataclasses.asdict(record.config.decoder) if "decoder" in parts else None,
            "vision": _asdict(record.config.vision) if "vision" in parts else None,
            "extension": _asdict(record.config.extension) if "extension" in parts else None,
            "tags": dataclasses.asdict(record.config.tags),
        },
        "attributes": record.attributes,
        "projector": record.projector,
        "facts": record.facts,
        "base_hash": record.base or (hashes.combine(pretrained) if pretrained else None),
        "content_hash": hashes.combine(written_leaves),
        "leaves": {
            path: {"dtype": str(d), "shape": list(s), "sha256": sha} for path, (d, s, sha) in written_leaves.items()
        },
    }
    (folder / FILE).write_text(json.dumps(value, indent=1) + "\n")


def read(folder: Path) -> tuple[Record, dict[str, Leaf]]:
    """What `write` wrote; headers alone are read.

    Raises:
      MoextendError: moextend.json is broken or does not fit the tensors beside it.
    """
    where = folder / FILE
    value = read_json(where)
    if value.get("format") != FORMAT:
        raise MoextendError(f"{where} has format {shown(value.get('format'))}; this version reads format {FORMAT}")
    stored = open_safetensors(folder)
    try:
        model, listed = value["model"], value["leaves"]
        record = _checked(
            Record(
                config=_config(model, projector_shape=listed.get("projector/first", {}).get("shape")),
                layout=value["layout"],
                attributes=value["attributes"],
                projector=tuple(value["projector"]),
                base=value["base_hash"] if value["layout"] == "delta" else None,
                facts=value["facts"],
            )
        )
        if unequal := difference(listed, stored):
            raise MoextendError(f"{folder}: the tensors are not those of {FILE}.{unequal}")
        matched = {}
        for path, tensor in stored.items():
            claim = (tuple(listed[path]["shape"]), listed[path]["dtype"])
            if claim != (tensor.shape, str(tensor.dtype)):
                raise MoextendError(
                    f"{tensor.where}: {path} is {tensor.dtype}{list(tensor.shape)}; {FILE} says "
                    f"{shown(claim[1])}{shown(list(claim[0]))}"
                )
            if not hashes.is_hash(sha256 := listed[path]["sha256"]):
                raise ValueError(f"the sha256 of {path} is {shown(sha256)}")
            matched[path] = leaves.from_ours(path, tensor, config=record.config, sha256=sha256)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MoextendError(f"{where} cannot be read: {shown(error)}") from None
    return record, matched


def _checked(record: Record) -> Record:
    """Raises ValueError where another program would have gone wrong later."""
    config, extension = record.config, record.config.extension
    for part in (config.decoder, config.vision):
        for name, value in dataclasses.asdict(part).items() if part else ():
            if not fits(name, value):
                raise ValueError(f"{name} = {shown(value)} is impossible")
    tags = dataclasses.astuple(config.tags)
    if not all(type(tag) is int and -1 <= tag < 1 << 31 for tag in tags):
        raise ValueError(f"image tags {shown(tags)} are impossible")
    if extension:
        numbers = (extension.new_experts, extension.calibrator_width)
        if not all(type(n) is int for n in (*extension.layers, *extension.sources, *numbers)):
            raise ValueError(f"extension {shown(dataclasses.asdict(extension))} is impossible")
        if list(extension.layers) != sorted({*extension.layers}) or min(0, *extension.layers) < 0 or min(numbers) < 1:
            raise ValueError(f"extended layers {shown(extension.layers)} are impossible")
        if len(extension.sources) != len(extension.layers) or not extension.layers:
            raise ValueError(f"{len(extension.layers)} layers copy {len(extension.sources)} experts")
    if not isinstance(record.layout, str) or not isinstance(record.facts, dict):
        raise ValueError("layout or facts are of another type than they should be")
    if not all(isinstance(part, dict) for part in (record.attributes, *record.attributes.values())):
        raise ValueError("attributes are of another type than they should be")
    if record.projector not in {(table, prefix) for table, own in PREFIXES.items() for prefix in ("", own)}:
        raise ValueError(f"projector {shown(record.projector)} is spelled in no known way")
    if record.layout == "delta" and not hashes.is_hash(record.base):
        raise ValueError(f"base_hash is {shown(record.base)}")
    return record


def _config(model: Mapping[str, Any], *, projector_shape: Any) -> ModelConfig:
    decoder = DecoderConfig(**model["decoder"]) if model["decoder"] else None
    vision = VisionConfig(**model["vision"]) if model["vision"] else None
    if projector_shape:  # a projector alone has these two sizes and no others
        C, D = projector_shape
        decoder, vision = decoder or DecoderConfig(width=D), vision or VisionConfig(width=C)
    extension = model["extension"]
    return ModelConfig(
        decoder=decoder or DecoderConfig(),
        vision=vision,
        extension=ExtensionConfig(
            **{**extension, "layers": tuple(extension["layers"]), "sources": tuple(extension["sources"])}
        )
        if extension
        else None,
        tags=ImageTags(**model["tags"]),
    )


def _asdict(config: Any) -> dict[str, Any] | None:
    return dataclasses.asdict(config) if config else None


def dtype_of(matched: Mapping[str, Leaf]) -> np.dtype:
    """The element type that most of a model's bytes have."""
    sizes: dict[np.dtype, int] = {}
    for leaf in matched.values():
        sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + int(np.prod(leaf.shape))
    return max(sizes, key=lambda kind: sizes[kind])
