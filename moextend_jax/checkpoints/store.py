"""The folder that an import makes: stacked leaves in safetensors, and moextend.json, which says what they are.

Out and in: leaves by our path with the sizes of their model, the layout they came from, and their hashes. A delta is
the same folder with the leaves of extensions only, and the hashes of the base they belong to.

Why not Orbax, as for training checkpoints: Orbax saves arrays that are on devices, and its partial saves still take a
whole stacked leaf (30 GB of w_gate for Mixtral-8x7B) at a time. An import has no devices. Here a leaf is written piece
by piece as its bytes pass by, one tensor of a file in memory, and a shard is a byte range of it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from moextend_jax.checkpoints import hashes, leaves, quantising
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.names import PREFIXES
from moextend_jax.checkpoints.tensors import Planned, Stored, difference, open_safetensors, write_safetensors
from moextend_jax.config import (
    IMAGE,
    RIVALS,
    TRUNKS,
    AdapterConfig,
    Added,
    BlocksConfig,
    DecoderConfig,
    ExtensionConfig,
    FeaturesConfig,
    ImageTags,
    Medium,
    ModelConfig,
    MoextendError,
    Named,
    ProjectorConfig,
    Quantised,
    TowerConfig,
    VisionConfig,
)
from moextend_jax.families import FAMILIES
from moextend_jax.families.attributes import MOST, fits
from moextend_jax.families.towers import TOWERS as PICTURE_TOWERS
from moextend_jax.media import KINDS, mark_of
from moextend_jax.models.quantised import STORAGES
from moextend_jax.outside import read_object, shown
from moextend_jax.parameters import current_path
from moextend_jax.settings import build, fields

FILE, FORMAT = "moextend.json", 2
"""Format 1 knew one medium and one extension, whose leaves had other names (`parameters.current_path`)."""


class Record(NamedTuple):
    """What moextend.json holds.

    `layout` is where the leaves came from, "delta" for a delta. `attributes` are the config.json files they came with,
    by part; `projector` how their projector is spelled (table, prefix). `base` is a delta's base hash, else None;
    `parts` the hashes of its base by part (`hashes.BaseHashes`), which older deltas lack.
    """

    config: ModelConfig
    layout: str
    attributes: dict[str, dict[str, Any]]
    projector: tuple[str, str] = ("llava", "")
    base: str | None = None
    facts: dict[str, Any] = {}
    parts: Mapping[str, str] = {}


def is_imported(folder: Path) -> bool:
    return (folder / FILE).is_file()


def write(
    folder: Path,
    matched: Mapping[str, Leaf],
    record: Record,
    *,
    dtype: Any = None,
    storage: Quantised | None = None,
    max_shard_bytes: int,
    written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes leaves into an empty folder, cast to `dtype` where it is given, the pretrained experts in the few bits of
    `storage`. A base's hashes stay those of the weights before quantising."""
    experts = {path: leaf for path, leaf in matched.items() if storage and path in quantising.MATRICES}
    before = {
        path: (experts[path].dtype, experts[path].shape, sha) for path, sha in hashes.leaf_hashes(experts).items()
    }
    digests: dict[str, Any] = collections.defaultdict(hashlib.sha256)
    planned = tensors_of(matched, dtype=dtype, storage=storage, digests=digests)
    write_safetensors(folder, planned, max_shard_bytes=max_shard_bytes, written=written)
    written_leaves = {path: (plan.dtype, plan.shape, digests[path].hexdigest()) for path, plan in planned.items()}
    as_before = {path: leaf for path, leaf in written_leaves.items() if path in matched} | before
    pretrained = hashes.combined({p: leaf for p, leaf in as_before.items() if hashes.is_pretrained(p)})
    parts = {tuple(path.split("/")[:2]) for path in matched}
    has_decoder = record.base is not None or any(path.startswith("decoder/") for path in matched)
    value = {
        "format": FORMAT,
        "layout": record.layout,
        "model": {
            "decoder": dataclasses.asdict(record.config.decoder) if has_decoder else None,
            "media": {
                name: medium_attributes(medium)
                for name, medium in record.config.media.items()
                if ("media", name) in parts or record.base is not None
            },
            "extensions": {
                name: extension_attributes(added)
                for name, added in record.config.extensions.items()
                if ("extensions", name) in parts
            },
            **{
                kind: {name: extension_attributes(of) for name, of in getattr(record.config, kind).items()}
                for kind in RIVALS
                if any((kind, name) in parts for name in getattr(record.config, kind))
            },
            "composition": record.config.composition,
        },
        "attributes": record.attributes,
        "projector": record.projector,
        "facts": record.facts,
        "base_hash": record.base or (pretrained.base if pretrained.parts else None),
        "base_parts": dict(record.parts) if record.base else pretrained.parts,
        "content_hash": hashes.combine(written_leaves),
        "leaves": _claims(written_leaves),
    }
    if storage:
        value["few_bits"] = {**storage._asdict(), "before": _claims(before)}
    (folder / FILE).write_text(json.dumps(value, indent=1) + "\n")


def tensors_of(
    matched: Mapping[str, Leaf], *, dtype: Any = None, storage: Quantised | None = None,
    digests: Mapping[str, Any] | None = None,
) -> dict[str, Planned]:  # fmt: skip
    """What `write` writes; `digests` by path, made when asked for, take its bytes."""
    digests = collections.defaultdict(hashlib.sha256) if digests is None else digests
    planned = {}
    for path, leaf in matched.items():
        if storage and path in quantising.MATRICES:
            own = {suffix: digests[path + suffix] for suffix in ("", quantising.SCALE)}
            tensors = quantising.planned(leaf, storage, digests=own)
            planned |= {path + suffix: tensor for suffix, tensor in tensors.items()}
        else:
            planned[path] = leaves.plan_ours(leaf, dtype=dtype, digest=digests[path])
    return planned


def _claims(hashed: hashes.Hashed) -> dict[str, dict[str, Any]]:
    return {path: {"dtype": str(d), "shape": list(s), "sha256": sha} for path, (d, s, sha) in hashed.items()}


def read(folder: Path) -> tuple[Record, dict[str, Leaf]]:
    """What `write` wrote; headers alone are read.

    Raises:
      MoextendError: moextend.json is broken or does not fit the tensors beside it.
    """
    where = folder / FILE
    value = read_object(where)
    if value.get("format") not in (1, FORMAT):
        raise MoextendError(
            f"{where} has format {shown(value.get('format'))}; this version reads formats 1 and {FORMAT}"
        )
    stored = open_safetensors(folder)
    try:
        model, listed = value["model"], {current_path(path): claim for path, claim in value["leaves"].items()}
        stored = {current_path(path): tensor for path, tensor in stored.items()}
        record = _checked(
            Record(
                config=_config(model, projector_shape=listed.get("media/image/projector/first", {}).get("shape")),
                layout=value["layout"],
                attributes=value["attributes"],
                projector=tuple(value["projector"]),
                base=value["base_hash"] if value["layout"] == "delta" else None,
                facts=value["facts"],
                parts=value.get("base_parts", {}) if value["layout"] == "delta" else {},
            )
        )
        if unequal := difference(listed, stored):
            raise MoextendError(f"{folder}: the tensors are not those of {FILE}.{unequal}")
        matched = {}
        for path in stored:
            if not hashes.is_hash(sha256 := listed[path]["sha256"]):
                raise ValueError(f"the sha256 of {path} is {shown(sha256)}")
        if few_bits := value.get("few_bits"):
            matched = _in_few_bits(few_bits, stored, listed, config=record.config)
            stored = {path: t for path, t in stored.items() if path.removesuffix(quantising.SCALE) not in matched}
        for path, tensor in stored.items():
            claim = (tuple(listed[path]["shape"]), listed[path]["dtype"])
            if claim != (tensor.shape, str(tensor.dtype)):
                raise MoextendError(
                    f"{tensor.where}: {path} is {tensor.dtype}{list(tensor.shape)}; {FILE} says "
                    f"{shown(claim[1])}{shown(list(claim[0]))}"
                )
            matched[path] = leaves.from_ours(path, tensor, config=record.config, sha256=listed[path]["sha256"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MoextendError(f"{where} cannot be read: {shown(error)}") from None
    return record, matched


def _in_few_bits(
    few_bits: Mapping[str, Any], stored: Mapping[str, Stored], listed: Mapping[str, Any], *, config: ModelConfig
) -> dict[str, Leaf]:
    """The leaves that files hold in few bits; raises as `read`, or ValueError."""
    how = Quantised(few_bits["kind"], few_bits["group"])
    if how.kind not in STORAGES or not isinstance(how.group, int) or not 0 < how.group < MOST:
        raise ValueError(f"few_bits are {shown(few_bits['kind'])} in groups of {shown(how.group)}")
    matched = {}
    for path, claim in few_bits["before"].items():
        if path not in quantising.MATRICES or not hashes.is_hash(claim["sha256"]):
            raise ValueError(f"few_bits of {shown(path)}, {shown(claim['sha256'])}")
        tensors = {suffix: stored[path + suffix] for suffix in ("", quantising.SCALE)}
        claims = {suffix: listed[path + suffix]["sha256"] for suffix in tensors}
        # The weights before quantising; nothing of them is read.
        weights = Stored(tuple(claim["shape"]), np.dtype(claim["dtype"]), stored[path].read, stored[path].where)
        before = leaves.from_ours(path, weights, config=config, sha256=claim["sha256"])
        if before.shape[-2] % how.group:
            raise ValueError(f"groups of {how.group} do not divide {path} {list(before.shape)}")
        matched[path] = quantising.opened(before, how, tensors, claims)
    return matched


def _checked(record: Record) -> Record:
    """Raises ValueError where another program would have gone wrong later."""
    config = record.config
    for part in (config.decoder, *(medium.tower for medium in config.media.values())):
        _check_sizes(part)
    if config.decoder.family not in FAMILIES:
        raise ValueError(f"family {shown(config.decoder.family)} is not among {', '.join(FAMILIES)}")
    for name in (*config.media, *config.added):
        if not NAME.fullmatch(name.removesuffix(".text") if name in config.adapters else name):
            raise ValueError(f"{shown(name)} is no name of a medium or an extension")
    for name, medium in config.media.items():
        _check_medium(name, medium)
        _check_trunk(name, medium.projector, config)
    pads = [medium.tags.pad for medium in config.media.values()]
    if len({*pads}) < len(pads):
        raise ValueError(f"media {shown(list(config.media))} have the same tags")
    for name, extension in config.extensions.items():
        _check_extension(name, extension, config.decoder)
    _check_rivals(config)
    if not isinstance(record.layout, str) or not isinstance(record.facts, dict):
        raise ValueError("layout or facts are of another type than they should be")
    if not all(isinstance(part, dict) for part in (record.attributes, *record.attributes.values())):
        raise ValueError("attributes are of another type than they should be")
    if record.projector not in {(table, prefix) for table, own in PREFIXES.items() for prefix in ("", own)}:
        raise ValueError(f"projector {shown(record.projector)} is spelled in no known way")
    for base in (record.base, record.facts.get("base_hash")):
        if not hashes.is_hash(base) and (base is not None or (record.layout == "delta" and base is record.base)):
            raise ValueError(f"base_hash is {shown(base)}")
    for parts in (record.parts, record.facts.get("base_parts", {})):
        if not isinstance(parts, dict) or not all(map(hashes.is_hash, parts.values())):
            raise ValueError(f"base_parts are {shown(parts)}")
    return record


NAME = re.compile("[a-z][a-z0-9_]{0,63}")


def _check_sizes(part: DecoderConfig | TowerConfig) -> None:
    for name, value in dataclasses.asdict(part).items():
        if not fits(name, value):
            raise ValueError(f"{name} = {shown(value)} is impossible")


def _check_medium(name: str, medium: Medium) -> None:
    tower, projector = medium.tower, medium.projector
    if not isinstance(tower, KINDS[medium.kind].towers) or medium.mark != mark_of(name, medium.kind):
        raise ValueError(f"{name} is of kind {medium.kind}, not with {type(tower).__name__} and {shown(medium.mark)}")
    if isinstance(tower, VisionConfig):
        if (of := PICTURE_TOWERS.get(tower.family)) is None:
            raise ValueError(f"family {shown(tower.family)} is not among {', '.join(PICTURE_TOWERS)}")
        if wrong := [field for field, value in of.fields.items() if getattr(tower, field) != value]:
            raise ValueError(f"a tower of family {tower.family} has another {', '.join(wrong)}")
    if not isinstance(tower, FeaturesConfig) and tower.feature_layer < -tower.layers - 1:
        raise ValueError(f"the tower of {name} has {tower.layers} layers, no layer {tower.feature_layer}")
    if not all(-1 <= tag < 1 << 31 for tag in medium.tags.ids):
        raise ValueError(f"{name} tags {shown(medium.tags.ids)} are impossible")
    counted = ("neighbours", "queries", "layers", "heads", "cross_every", "rank")
    numbers = (medium.frames, *medium.spans, *(getattr(projector, name) for name in counted))
    if not all(0 < n < MOST for n in numbers) or list(medium.spans) != sorted({*medium.spans}):
        raise ValueError(f"{name} has frames, spans or a projector that are impossible")
    if (medium.frames > 1 and medium.kind != "video") or not 0 < medium.seconds < MOST:
        raise ValueError(f"{name} has frames or seconds that are impossible")
    if not 0 <= projector.width < MOST or bool(projector.trunk) != (projector.kind in TRUNKS):
        raise ValueError(f"the projector of {name} is a {projector.kind} on {shown(projector.trunk)}")
    width = projector.width or tower.width
    if projector.kind in ("resampler", "crema") and width % projector.heads:
        raise ValueError(f"the resampler of {name} has {projector.heads} heads in width {width}")
    if projector.neighbours > (1 if projector.kind == "linear" else tower.patches):
        raise ValueError(f"the projector of {name} has {projector.neighbours} neighbours")


def _check_trunk(name: str, projector: ProjectorConfig, config: ModelConfig) -> None:
    if not projector.trunk:
        return
    trunk = config.media.get(projector.trunk)
    if trunk is None or trunk.projector.kind != TRUNKS[projector.kind] or trunk.tower.sizes()["C"] != projector.width:
        raise ValueError(f"the projector of {name} is on that of {shown(projector.trunk)}, which does not fit it")
    onto = config.media[name].onto
    if onto and (projector.kind != "crema" or config.media[onto].tokens % config.media[name].tokens):
        raise ValueError(f"tokens of {name} cannot be added to those of {onto}")
    for other in projector.past:
        of = config.media[other].projector if other in config.media else ProjectorConfig()
        if (of.kind, of.trunk, of.rank) != (projector.kind, projector.trunk, projector.rank) or other == name:
            raise ValueError(f"the projector of {name} stands beside that of {shown(other)}, which does not fit it")


def extensions_in(listed: Any, decoder: DecoderConfig) -> dict[str, ExtensionConfig]:
    """By name, from a list of `extension_attributes` with their names, as config.json of layout hf holds it.

    Raises:
      ValueError: it is none, or one of them is impossible.
    """
    if not isinstance(listed, list) or not all(
        isinstance(of, dict) and isinstance(of.get("name"), str) for of in listed
    ):
        raise ValueError(f"{shown(listed)} is no list of extensions, each with its name")
    found: dict[str, ExtensionConfig] = {}
    for attributes in listed:
        own = dict(attributes)
        if not NAME.fullmatch(name := own.pop("name")) or name in found:
            raise ValueError(f"{shown(name)} is no name of an extension, or of two")
        found[name] = _built(ExtensionConfig, own, where=name)
        _check_extension(name, found[name], decoder)
    return found


def _check_extension(name: str, extension: ExtensionConfig, decoder: DecoderConfig) -> None:
    layers, sources = extension.layers, extension.sources
    if list(layers) != sorted({*layers}) or not layers or not all(layer in decoder.routed for layer in layers):
        raise ValueError(f"extended layers {shown(layers)} are impossible")
    if min(extension.new_experts, extension.calibrator_width) < 1 or extension.calibrator_width >= MOST:
        raise ValueError(f"extension {shown(name)} has {extension.new_experts} experts for each layer")
    if not 1 <= extension.wide <= decoder.experts:
        raise ValueError(f"extension {shown(name)} has {extension.wide} sources of an expert")
    if len(sources) != len(layers) * extension.new_experts * extension.wide:
        raise ValueError(f"{len(layers)} layers copy {len(sources)} experts")
    if not all(-1 <= source < decoder.experts for source in sources):
        raise ValueError(f"sources {shown(sources)} are impossible")
    if extension.start == "twin" and (extension.wide > 1 or -1 in sources):
        raise ValueError(f"twins of sources {shown(sources)}, {extension.wide} of each, are impossible")
    _check_place(name, extension)


def _check_place(name: str, added: Added) -> None:
    if not 0 <= added.share <= 1 or (added.medium and not NAME.fullmatch(added.medium)):
        raise ValueError(f"extension {shown(name)} has medium {shown(added.medium)}, share {added.share}")


def _check_rivals(config: ModelConfig) -> None:
    for name, of in config.adapters.items():
        _check_place(name, of)
        sizes = (of.rank, of.lora_experts, of.top_k)
        if not all(0 < n <= 1 << 16 for n in sizes) or not (math.isfinite(of.alpha) and of.alpha > 0 < of.tau):
            raise ValueError(f"adapter {shown(name)} has rank, alpha, lora_experts, top_k or tau that are impossible")
        if not (of.attention or of.router or of.of_experts):
            raise ValueError(f"adapter {shown(name)} adapts nothing")
    for name, of in config.blocks.items():
        _check_place(name, of)
        if of.count < 1 or len(config.decoder.routed) % of.count:
            raise ValueError(f"{of.count} blocks of {shown(name)} between {len(config.decoder.routed)} layers")
    if len({of.count for of in config.blocks.values()}) > 1 or len(config.added) < sum(
        map(len, (config.extensions, config.adapters, config.blocks))
    ):
        raise ValueError("sets of blocks differ in number, or two parts have one name")


def _config(model: Mapping[str, Any], *, projector_shape: Any) -> ModelConfig:
    decoder = _built(DecoderConfig, _renamed(model["decoder"]), where="decoder") if model["decoder"] else None
    if "media" in model:
        media = {name: medium_of(attributes, where=name) for name, attributes in model["media"].items()}
        extensions, composition = model["extensions"], model["composition"]
    else:  # format 1
        tower = VisionConfig(**model["vision"]) if model["vision"] else None
        media = {IMAGE: Medium(tower=tower, tags=ImageTags(**model["tags"]))} if tower else {}
        extensions, composition = {IMAGE: model["extension"]} if model["extension"] else {}, "shared"
    if projector_shape:  # a projector alone has these two sizes and no others
        C, D = projector_shape
        decoder, media = decoder or DecoderConfig(width=D), media or {IMAGE: Medium(tower=VisionConfig(width=C))}
    return ModelConfig(
        decoder=decoder or DecoderConfig(),
        media=Named(media),
        extensions=Named({name: _built(ExtensionConfig, part, where=name) for name, part in extensions.items()}),
        adapters=Named(
            {name: _built(AdapterConfig, part, where=name) for name, part in model.get("adapters", {}).items()}
        ),
        blocks=Named({name: _built(BlocksConfig, part, where=name) for name, part in model.get("blocks", {}).items()}),
        composition=_built(fields(ModelConfig)["composition"], composition, where="composition"),
    )


def _renamed(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Once YaRN was the only scaling, and its field was called so."""
    return {"rope_scaling" if name == "yarn" else name: value for name, value in decoder.items()}


def medium_attributes(medium: Medium) -> dict[str, Any]:
    """A medium in JSON."""
    return dataclasses.asdict(medium) | {"tower_kind": type(medium.tower).__name__}


def medium_of(attributes: Mapping[str, Any], *, where: str) -> Medium:
    """The inverse of `medium_attributes`; raises TypeError, KeyError or ValueError where it is none."""
    rest = dict(attributes)
    kind = {kind.__name__: kind for kind in get_args(TowerConfig)}[rest.pop("tower_kind")]
    tower = _built(kind, rest.pop("tower"), where=where)
    return dataclasses.replace(_built(Medium, rest, where=where), tower=tower)


def checked_medium(name: str, attributes: Mapping[str, Any]) -> Medium:
    """`medium_of` attributes that somebody else may have written; raises as that, or ValueError if impossible."""
    medium = medium_of(attributes, where=name)
    _check_sizes(medium.tower)
    if not NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} is no name of a medium")
    _check_medium(name, medium)
    return medium


def _built(kind: Any, value: Any, *, where: str) -> Any:
    try:
        return build(kind, value, where=where)
    except MoextendError as error:  # which may be as long as what stands in the file
        raise ValueError(str(error)) from None


def extension_attributes(added: Added) -> dict[str, Any]:
    """An extension or a rival in JSON; whether and how it trains is no fact about it."""
    training = ("trains", "guidance", "drift")
    return {name: value for name, value in dataclasses.asdict(added).items() if name not in training}


def dtype_of(matched: Mapping[str, Leaf]) -> np.dtype:
    """The element type that most of a model's bytes have."""
    sizes: collections.Counter[np.dtype] = collections.Counter()
    for leaf in matched.values():
        sizes[leaf.dtype] += math.prod(leaf.shape)
    return sizes.most_common(1)[0][0]
