"""Any checkpoint folder -> its configuration and leaves, matched and checked, nothing read yet.

In: a Hugging Face folder (a decoder, a picture tower, a LLaVA, its projector), the method's released layout (whole, or
a partial save with its base), a folder that `moextend import` made, a delta or PEFT's LoRA with its base; all of them
in a bucket too. Out: `Source`. A new layout is one more reader, which `open_source` or `_foreign` calls.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moextend_jax import distributed
from moextend_jax.checkpoints import delta, hashes, huggingface, leaves, llava, names, peft, released, spelling, store
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.positions import resized
from moextend_jax.checkpoints.tensors import Stored, name_list, open_tensors
from moextend_jax.config import IMAGE, DecoderConfig, ModelConfig, MoextendError, Named, VisionConfig, with_vision
from moextend_jax.data.tokenizer import ends_of
from moextend_jax.families import FAMILIES
from moextend_jax.families.towers import TOWERS
from moextend_jax.folders import folder as named_folder
from moextend_jax.folders import is_url, local_copy, reading
from moextend_jax.outside import inside, shown
from moextend_jax.parameters import only_chooses

OF_PICTURES = ("preprocessor_config.json", "processor_config.json")
"""What says how pictures are prepared."""

SIDE_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", *OF_PICTURES,
)  # fmt: skip
"""What lies beside weights and belongs to them."""


class Source(NamedTuple):
    """An opened checkpoint. Leaves may be those of a part alone (a tower, a projector): sizes of absent parts mean
    nothing. `files` are the side files by name; `record` is what an import would write of it; `notes` are lines on
    what was read otherwise than it stands there."""

    leaves: dict[str, Leaf]
    record: store.Record
    files: dict[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        return self.record.config

    @property
    def ends(self) -> list[int]:
        """Ids that end an answer, as the checkpoint's config.json says; its tokenizer's files may name others."""
        return ends_of(self.record.attributes.get("decoder", {}))

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder on this machine that has the tokenizer's files, or copies where they are in a bucket; None: the
        checkpoint brings none."""
        at = [self.files[name].parent for name in ("tokenizer.model", "tokenizer.json") if name in self.files]
        return local_copy(at[0], SIDE_FILES) if at else None

    @property
    def parts(self) -> set[str]:
        """decoder, vision (the picture tower), projector (of pictures), extension; other media by their name."""
        return {part_of(path) for path in self.leaves}


def part_of(path: str) -> str:
    """The part of a model that a leaf belongs to, in the words of `Source.parts`."""
    kind, name, *rest = path.split("/")
    if kind == "media":
        return name if name != IMAGE else {"tower": "vision"}.get(rest[0], rest[0])
    return kind if kind == "decoder" else "extension"


class _Wanted(NamedTuple):
    """What `open_source` was asked for beside the folder; see there."""

    base: Path | None = None
    vision: Path | None = None
    projector: Path | None = None
    feature_layer: int | None = None
    dtype: str | None = None


def with_what_is_read(config: ModelConfig, paths: Iterable[str]) -> ModelConfig:
    """The model without media that no projector among the leaves of these paths reads."""
    read = {path.split("/")[1] for path in paths if path.startswith("media/") and "/projector/" in path}
    return dataclasses.replace(config, media=Named({name: m for name, m in config.media.items() if name in read}))


def open_source(
    folder: Path,
    *,
    base: Path | None = None,
    vision: Path | None = None,
    projector: Path | None = None,
    feature_layer: int | None = None,
    dtype: str | None = None,
) -> Source:
    """Opens a checkpoint, checking every name, shape, element type and byte range; no tensor is read.

    Args:
      base: folder of the base, for partial saves and deltas.
      vision: folder of the picture tower: its sizes, and its weights where `folder` has none.
      projector: folder or file of a LLaVA projector.
      feature_layer: hidden state that the projector reads; default what the folder says, else -1 for the released
        layout and -2 for others.
      dtype: element type that all will be cast to, so that a decoder may be stored in several.

    Raises:
      MoextendError: anything that is not as it should be.
    """
    folder, wanted = named_folder(os.fspath(folder)), _Wanted(base, vision, projector, feature_layer, dtype)
    with reading(folder):
        if not folder.exists():
            where = "" if is_url(folder) or folder.is_absolute() else f" in {Path.cwd()}"
            raise MoextendError(f"{folder} does not exist{where}: give the folder of a model, as published or imported")
        imported = store.is_imported(folder)
        read = _imported if imported else _adapter if peft.is_adapter(folder) else _foreign
        source = read(folder, wanted)
        if vision and "vision" not in source.parts:
            source = with_tower(source, vision, feature_layer=feature_layer, dtype=dtype)
        elif vision and base is None and (imported or source.record.layout != "released"):
            raise MoextendError(f"{folder} has a vision tower already; leave --vision {vision} out")
        if projector and "projector" not in source.parts:
            source = _with_projector(source, projector)
        elif projector and base is None:
            raise MoextendError(f"{folder} has a projector already; leave --projector {projector} out")
        return source


def checked_base(source: Source, folder: Path | str) -> Source:
    """Raises MoextendError where this cannot be a base, or one of its routers is broken."""
    if "decoder" not in source.parts or "extension" in source.parts:
        raise MoextendError(f"{folder} cannot be a base: it must hold a decoder that is not extended")
    check_routers(source)
    return source


def check_routers(source: Source) -> None:
    """Routers are small and decide everything: they are read before anything else is done with a model.

    Raises:
      MoextendError: a router's column is NaN or infinite; names layer and expert.
    """
    config = source.config
    columns: list[tuple[str, Sequence[int], int]] = [("decoder/layers/moe/gate", config.decoder.routed, 0)]
    columns += [
        (f"extensions/{name}/router/new_gate", added.layers, config.columns(name).start)
        for name, added in config.extensions.items()
    ]
    for path, layers, first in columns:
        if not (leaf := source.leaves.get(path)):
            continue
        for index in leaf.indices():
            broken_E = ~np.isfinite(leaf.theirs(index).astype(np.float32)).all(axis=1)
            if broken_E.any():
                raise MoextendError(
                    f"{leaf.where}: the router of layer {layers[index[0]]} has weights that are no numbers (NaN or "
                    f"infinite), for expert {first + int(broken_E.argmax())}: such a model cannot choose; get it anew"
                )


# --- one layout each --------------------------------------------------------------------------------------------------


def _imported(folder: Path, wanted: _Wanted) -> Source:
    base, feature_layer = wanted.base, wanted.feature_layer
    record, matched = store.read(folder)
    source = Source(matched, record, side_files(folder, record.config.vision))
    if record.base is None:
        if base is not None:
            raise MoextendError(f"{folder} is a whole model; leave --base {base} out")
        if feature_layer is None or record.config.vision is None:
            return source
        vision = huggingface.at_layer(record.config.vision, feature_layer, where=folder)
        return source._replace(record=record._replace(config=with_vision(record.config, vision)))
    if base is None:
        raise MoextendError(f"{folder} is a delta; name its base with --base DIR")
    below = open_source(base, **wanted._replace(base=None)._asdict())
    known = hashes.BaseHashes(*distributed.from_first(lambda: hashes.base_hashes(below.leaves)))  # of many bytes
    delta.check_base(record, known, decoder=below.config.decoder, where=folder, base=base)
    hashes.leaf_hashes(matched)  # refuses a delta that is not what was written
    vision_config = below.config.vision if feature_layer is not None else record.config.vision
    config = with_vision(record.config, vision_config)
    below_record = below.record._replace(
        config=config, layout="delta", base=record.base, facts=record.facts, parts=known.parts
    )
    # A delta in text over a base with a tower: the whole is a model of the delta's media.
    leaves = {path: leaf for path, leaf in below.leaves.items() if names.row_of(path, config) is not None}
    return Source({**leaves, **matched}, below_record, {**below.files, **source.files}, below.notes)


def _adapter(folder: Path, wanted: _Wanted) -> Source:
    """PEFT's files over the base that they belong to. They do not name it: only sizes can be checked."""
    if wanted.base is None:
        raise MoextendError(
            f"{folder} holds a LoRA in PEFT's files; name the base that it was trained on with --base DIR"
        )
    below = open_source(wanted.base, **wanted._replace(base=None)._asdict())
    if "decoder" not in below.parts:
        raise MoextendError(f"{wanted.base} cannot be a base: it holds no decoder")
    if peft.NAME in below.config.added:
        raise MoextendError(f"{wanted.base} has an extension called {peft.NAME} already: give the base without it")
    opened = peft.open_peft(folder, below.config.decoder)
    config = dataclasses.replace(below.config, adapters=below.config.adapters.replacing(peft.NAME, opened.config))
    record = below.record._replace(config=config)
    notes = (*below.notes, *opened.notes)
    return Source({**below.leaves, **opened.leaves}, record, below.files, notes)


def _foreign(folder: Path, wanted: _Wanted) -> Source:
    """Somebody else's folder or file: names are made the published ones, then the reader of its layout takes it."""
    (stored, notes), attributes = spelling.unwrapped(open_tensors(folder)), _attributes(folder)
    at, layout = folder / "config.json", "released"
    if attributes and llava.is_llava(attributes) and llava.is_whole(stored):
        stored, layout = spelling.respelled(stored, llava.spellings(llava.tower_of(attributes, where=at))), "hf"
        attributes, feature_layer = llava.released_attributes(attributes, where=at)
        if wanted.feature_layer is None:
            wanted = wanted._replace(feature_layer=feature_layer)
    model_type = str(attributes.get("model_type"))
    stored, more = spelling.published(stored, model_type if model_type in FAMILIES else "mixtral")
    if layout == "hf" or wanted.base is not None or released.is_released(stored, attributes):
        source = _released(folder, stored, attributes, wanted, layout=layout)
    elif _projector_table(stored) and (not attributes or model_type.startswith("llava")):
        source = _projector(folder, stored, attributes)
        if beside := len(stored) - len(source.leaves):
            raise MoextendError(f"{folder} holds {beside} tensors besides its projector; to take that, use --projector")
    else:
        read = _tower if huggingface.is_tower(attributes.get("model_type")) else _decoder
        source = read(folder, stored, attributes or huggingface.read_json(at), wanted)
    return source._replace(notes=(*notes, *more, *source.notes))


def _attributes(folder: Path) -> dict[str, Any]:
    """What config.json says; nothing where there is none."""
    at = folder / "config.json"
    return huggingface.read_json(at) if folder.is_dir() and at.exists() else {}


def _decoder(folder: Path, stored: Mapping[str, Stored], attributes: dict[str, Any], wanted: _Wanted) -> Source:
    config = ModelConfig(decoder=huggingface.decoder_config(attributes, where=folder / "config.json"))
    matched = _matched(folder, stored, attributes, wanted, table=config.decoder.family, config=config)
    # What was packed in four bits has been unpacked.
    kept = {name: value for name, value in attributes.items() if name != "quantization_config"}
    source = Source(matched, store.Record(config, config.decoder.family, {"decoder": kept}), side_files(folder))
    if wanted.vision is None and (folder / "vision" / "config.json").is_file():
        tower = inside(folder / "vision")
        source = with_tower(source, tower, feature_layer=wanted.feature_layer, dtype=wanted.dtype)
    return source


def _tower(folder: Path, stored: Mapping[str, Stored], attributes: dict[str, Any], wanted: _Wanted) -> Source:
    at, feature_layer = folder / "config.json", -2 if wanted.feature_layer is None else wanted.feature_layer
    sizes = huggingface.vision_config(attributes, where=at, feature_layer=feature_layer)
    config, table = with_vision(ModelConfig(decoder=DecoderConfig()), sizes), sizes.family
    matched = _matched(folder, stored, attributes, wanted, table=table, config=config)
    # What is imported is the tower alone, for pictures as they are made here, so that is what it says from here on.
    attributes = huggingface.vision_half(attributes, at)
    if any(TOWERS[table].beside.fullmatch(name) for name in stored):
        attributes |= TOWERS[table].constants
    used = huggingface.as_prepared(sizes, folder)
    if used != sizes:
        stored, attributes = resized(stored, sizes, used), {**attributes, "image_size": used.image_size}
        config = with_vision(config, used)
        matched = _matched(folder, stored, attributes, wanted, table=table, config=config)
    huggingface.check_picture_size(folder, used)
    return Source(matched, store.Record(config, table, {"vision": attributes}), side_files(folder, used))


def _projector(path: Path, stored: Mapping[str, Stored], attributes: Mapping[str, Any]) -> Source:
    table = _projector_table(stored)
    if table is None:
        raise MoextendError(f"{path} holds no projector: no tensor is called mm_projector or multi_modal_projector")
    for name, only in {"mm_projector_type": "mlp2x_gelu", "projector_hidden_act": "gelu"}.items():
        if attributes.get(name, only) != only:
            raise MoextendError(f"{path}: {name} = {shown(attributes[name])} cannot be honoured (only {only!r})")
    _check_kind(stored, where=path)
    first = names.TABLES[table][0].file
    prefix = names.PREFIXES[table] if names.PREFIXES[table] + first in stored else ""
    weight = stored.get(prefix + first)
    D, C = weight.shape if weight and len(weight.shape) == 2 else (1, 1)
    if not D or not C:
        raise MoextendError(f"{path}: the projector's {prefix + first} is empty")
    config = with_vision(ModelConfig(decoder=DecoderConfig(width=D)), VisionConfig(width=C))
    matched = leaves.match(stored, table=table, config=config, where=path)
    return Source(matched, store.Record(config, table, {}, projector=(table, prefix)), {})


def _released(
    folder: Path, stored: Mapping[str, Stored], attributes: dict[str, Any], wanted: _Wanted, *, layout: str
) -> Source:
    """A whole released checkpoint, or the tensors that a stage trained over those of its base; a LLaVA, layout hf, with
    its names respelled."""
    base, vision, projector, feature_layer, dtype = wanted
    at = folder / "config.json"
    attributes = attributes or ({} if base else huggingface.read_json(at))
    facts = released.facts_of(attributes, where=at)
    if feature_layer is None:
        feature_layer = int(facts.get("recipe", {}).get("feature_layer", -1))
    stored = {
        re.sub(r"^(model\.)?(visual\.)?mm_projector\.", "model.visual.mm_projector.", n): t for n, t in stored.items()
    }
    _check_kind(stored, where=folder)
    has_tower = any(name.startswith("model.visual.vision_tower.") for name in stored)
    below = None
    if base is not None:
        of_base = wanted._replace(base=None, vision=None if has_tower else vision)
        below = checked_base(open_source(base, **of_base._asdict()), base)
        seen = with_vision(ModelConfig(decoder=below.config.decoder), below.config.vision, tags=below.config.tags)
        if seen.media != below.config.media:
            raise MoextendError(
                f"{base} cannot be the base of {folder}, which knows pictures behind two linear maps and nothing else: "
                "it has other media, or a projector of another kind"
            )
    name = str(facts.pop("extension", IMAGE))  # only layout hf of earlier versions has another
    config = released.model_of(
        stored, attributes, base=below and below.config.decoder, layout=layout, name=name, where=at
    )
    whole = below.config.decoder if below else config.decoder
    delta.check_layers(config.extensions.values(), whole, where=folder, base=base or folder)
    if config.decoder != whole:
        raise MoextendError(f"{folder} and its base {base} differ: {delta.differing(config.decoder, whole)}")
    tower, tower_attributes = _tower_sizes(folder, stored, attributes, vision, below, feature_layer)
    if layout == "released" and has_tower and tower and tower.family != "clip":
        raise MoextendError(
            f"{folder} holds a tower of family {tower.family}, where this layout has a CLIP: give it apart"
        )
    tags = released.image_tags(attributes) if attributes else below and below.config.tags
    config = with_vision(config, tower, tags=tags)
    if layout == "hf" and "sounds" in attributes:
        config = released.with_sounds(config, attributes, where=at)
    elsewhere = dict(below.leaves) if below else {}
    if vision is not None and not has_tower and below is None:
        elsewhere |= open_source(vision, feature_layer=feature_layer, dtype=dtype).leaves
    absent = [*elsewhere, *(row.path for row in names.TABLES["llava"] if projector)]
    own = _matched(folder, stored, attributes, wanted, table="released", config=config, elsewhere=absent)
    decoder_attributes = attributes or (below.record.attributes.get("decoder") if below else None) or {}
    decoder_attributes = {
        name: value
        for name, value in decoder_attributes.items() if name not in ("extensions", "composition", *llava.SOUNDS)
    }  # fmt: skip
    kept = {"decoder": decoder_attributes, "vision": tower_attributes}
    record = store.Record(config, layout, kept, ("llava_hf" if layout == "hf" else "llava", ""), facts=facts)
    files = {**(below.files if below else {}), **side_files(folder, config.vision)}
    return Source({**elsewhere, **own}, record, files, below.notes if below else ())


def _tower_sizes(
    folder: Path, stored: Mapping[str, Stored], attributes: Mapping[str, Any], vision: Path | None,
    below: Source | None, feature_layer: int,
) -> tuple[VisionConfig | None, dict[str, Any]]:  # fmt: skip
    """Sizes of the tower inside a released checkpoint, whose config.json does not tell them."""
    prefix = "model.visual.vision_tower."
    tower = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    for tower_folder in (vision, folder / "vision"):
        if tower_folder and (at := tower_folder / "config.json").is_file():
            if tower_folder != vision:
                inside(tower_folder)
            tower_attributes = huggingface.read_json(at)
            return huggingface.read_vision_config(tower_folder, feature_layer=feature_layer), tower_attributes
    if vision is not None:
        source = open_source(vision, feature_layer=feature_layer)
        return source.config.vision, source.record.attributes.get("vision", {})
    if isinstance(nested := attributes.get("vision_config"), dict):
        sizes = huggingface.vision_config(nested, where=folder / "config.json", feature_layer=feature_layer)
        return huggingface.as_prepared(sizes, folder), nested
    if below is not None and "vision" in below.parts and below.config.vision:
        sizes = huggingface.at_layer(below.config.vision, feature_layer, where=folder)
        return sizes, below.record.attributes.get("vision", {})
    for sizes in huggingface.PUBLISHED_TOWERS:
        config = with_vision(ModelConfig(decoder=DecoderConfig()), sizes)
        try:
            leaves.match(tower, table="clip", config=config, where=folder)
        except MoextendError:
            continue
        return huggingface.at_layer(sizes, feature_layer, where=folder), {}
    if not tower and not any("mm_projector" in name for name in stored):
        return None, {}
    raise MoextendError(
        f"{folder}: the sizes of its vision tower are not in its config.json and are none of CLIP's published ones; "
        "name the folder of that tower (its config.json is enough) with --vision DIR"
    )


# --- putting parts together -------------------------------------------------------------------------------------------


def with_tower(source: Source, vision: Path, *, feature_layer: int | None, dtype: str | None = None) -> Source:
    """With the picture tower of another folder."""
    tower = open_source(vision, feature_layer=feature_layer, dtype=dtype)
    if "vision" not in tower.parts:
        raise MoextendError(f"{vision} holds no vision tower")
    matched = {path: leaf for path, leaf in tower.leaves.items() if path.startswith("media/image/tower/")}
    record = source.record._replace(
        config=with_vision(source.config, tower.config.vision),
        attributes=source.record.attributes | {"vision": tower.record.attributes.get("vision", {})},
    )
    # A tower folder's tokenizer is not this model's, and how pictures were prepared for another tower is not either.
    files = {name: path for name, path in source.files.items() if name not in OF_PICTURES}
    files |= {name: path for name, path in tower.files.items() if name in OF_PICTURES}
    notes = (*source.notes, *tower.notes)
    return Source({**source.leaves, **matched}, record, files, notes)


def _with_projector(source: Source, projector: Path) -> Source:
    if store.is_imported(projector):
        other = open_source(projector)
        if "projector" not in other.parts:
            raise MoextendError(f"{projector} holds no projector, only {', '.join(sorted(other.parts))}")
    else:
        other = _projector(projector, spelling.unwrapped(open_tensors(projector))[0], _attributes(projector))
    config, made = source.config, other.config.media[IMAGE]
    if config.vision is None or "vision" not in source.parts:
        raise MoextendError(f"a projector needs a vision tower: name its folder with --vision DIR besides {projector}")
    if made.projector.others:
        raise MoextendError(
            f"the projector of {projector} is on that of {made.projector.trunk}, and cannot be taken without it"
        )
    if made.projector.neighbours > config.vision.patches:
        raise MoextendError(
            f"{projector} makes one token of {made.projector.neighbours} patches, and the model's tower has only "
            f"{config.vision.patches}"
        )
    projector_widths = (made.tower.sizes()["C"], other.config.decoder.width)
    model_widths = (config.vision.width, config.decoder.width)
    if model_widths != projector_widths:
        raise MoextendError(
            f"{projector} leads from width {projector_widths[0]} to {projector_widths[1]}, the model's tower and "
            f"decoder have {model_widths[0]} and {model_widths[1]}"
        )
    matched = {path: leaf for path, leaf in other.leaves.items() if path.startswith("media/image/projector/")}
    # Several kinds have the same shapes: only the configuration says what a projector computes.
    media = config.media.replacing(IMAGE, dataclasses.replace(config.media[IMAGE], projector=made.projector))
    record = source.record._replace(config=dataclasses.replace(config, media=media), projector=other.record.projector)
    return source._replace(leaves={**source.leaves, **matched}, record=record)


def side_files(folder: Path, tower: VisionConfig | None = None) -> dict[str, Path]:
    """The side files of a folder, by name. Pictures must be prepared as for `tower`; default CLIP.

    Raises:
      MoextendError: one leads out of the folder, or asks for pictures prepared in a way that is not done here.
    """
    if not folder.is_dir():
        return {}
    files = {name: inside(folder / name) for name in SIDE_FILES if (folder / name).is_file()}
    huggingface.check_preprocessor(folder, tower or VisionConfig())
    return files


def _projector_table(stored: Mapping[str, Stored]) -> str | None:
    first = {name.removeprefix("model.").partition(".")[0] for name in stored}
    return next((t for t in names.PREFIXES if names.TABLES[t][0].file.partition(".")[0] in first), None)


def _check_kind(stored: Mapping[str, Stored], *, where: Path) -> None:
    """Refuses LLaVA projectors of other kinds, by their names: config.json often does not say the kind."""
    own = {match[1] for name in stored if (match := re.fullmatch(r"(?:model\.)?(?:visual\.)?mm_projector\.(.*)", name))}
    numbers = sorted({int(match[1]) for name in own if (match := re.fullmatch(r"([0-9]{1,9})\.(weight|bias)", name))})
    if kind := "linear" if "weight" in own else f"mlp{len(numbers)}x_gelu" if len(numbers) > 2 else None:
        raise MoextendError(f"{where}: its projector is of kind {kind}; only mlp2x_gelu is read")


def _matched(
    folder: Path, stored: Mapping[str, Stored], attributes: Mapping[str, Any], wanted: _Wanted, *, table: str,
    config: ModelConfig, elsewhere: Collection[str] = (),
) -> dict[str, Leaf]:  # fmt: skip
    """`leaves.match`, of a decoder in the one element type that its config.json says, of a tower in one, unless all is
    to be cast. Routers are let off: a recipe trains them, in float32; so are leaves that are never cast."""
    if config.decoder.tied_head:  # it stands in files of `torch.save(model.state_dict())` a second time
        stored = {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}
    hint = "" if wanted.base or table in TOWERS else " A partial save needs its base: --base DIR."
    options: dict[str, Any] = {"elsewhere": elsewhere, "hint": hint, "dtype": wanted.dtype}
    matched = leaves.match(stored, table=table, config=config, where=folder, **options)
    if wanted.dtype is not None:
        return matched
    configured = attributes.get("torch_dtype") or attributes.get("dtype")
    for part in ("decoder/", *(f"media/{name}/tower/" for name in config.media)):
        own = {
            path: leaf
            for path, leaf in matched.items()
            if path.startswith(part) and not path.endswith("/gate") and not only_chooses(path)
        }
        if not own:
            continue
        known = part == "decoder/" and configured in ("float32", "bfloat16", "float16")
        dtypes = collections.Counter(leaf.dtype for leaf in own.values())
        usual = np.dtype(configured) if known else dtypes.most_common()[0][0]
        odd = [
            tensor for tensor in names.tensors(table, config) if tensor.path in own and own[tensor.path].dtype != usual
        ]
        if odd:
            leaf, so = own[odd[0].path], f"{folder / 'config.json'} says" if known else "the others have"
            raise MoextendError(
                f"{leaf.where}: {name_list(tensor.file for tensor in odd)} has element type {leaf.dtype}, where {so} "
                f"{usual}{leaves.CAST}"
            )
    return matched
