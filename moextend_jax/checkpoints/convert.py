"""The command `moextend import`, and how opened checkpoints are written, streaming.

In: a command line, or a `Source`. Out: a new folder, whole or not at all, and a line on what it cost. Everything is
opened and checked before the first byte is written.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from moextend_jax import folders
from moextend_jax.checkpoints import delta, hashes, huggingface, leaves, names, peft, quantising, released, store
from moextend_jax.checkpoints.cost import Cost, watched
from moextend_jax.checkpoints.source import Source, check_routers, open_source, with_what_is_read
from moextend_jax.checkpoints.tensors import Planned, name_list, new_folder, write_safetensors
from moextend_jax.config import IMAGE, Amount, Count, MoextendError, Quantised, Range, with_vision
from moextend_jax.families import FAMILIES
from moextend_jax.families.towers import TOWERS
from moextend_jax.mesh import one_device
from moextend_jax.models.quantised import STORAGES
from moextend_jax.options import OneOf
from moextend_jax.outside import read_object
from moextend_jax.settings import NotNegative

SHARD = "5GB"
HF = "hf"
"""The layout of `transformers_layout`, a whole model beside those of LAYOUTS."""
LAYOUTS = (*FAMILIES, *TOWERS, "llava", "released", "delta", "peft")
_ONE_PART = dict.fromkeys(TOWERS, {"vision"}) | {"llava": {"projector"}, "peft": {"extension"}}
"""Layouts that hold a single part of a model."""


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    src: Path
    """folder (or gs://) of a checkpoint, file of a projector, or GGUF file"""
    dst: Path
    """new folder"""
    _: dataclasses.KW_ONLY
    base: Path | None = None
    """folder of the base, for partial saves and deltas"""
    vision: Path | None = None
    """folder of a vision tower"""
    projector: Path | None = None
    """folder or file of a LLaVA projector"""
    feature_layer: Annotated[int, Range(most=-1)] | None = None
    """hidden state that the projector reads"""
    dtype: Annotated[str | None, OneOf(tuple(map(str, leaves.FLOATS)))] = None
    """store in this element type"""
    storage: Annotated[str | None, OneOf(tuple(STORAGES))] = None
    """pretrained experts in few bits, for runs with this expert_storage"""
    group: Count | None = None
    """weights that share a scale; else 64, of mxfp4 32"""
    experts: Count | None = None
    """of a dense model: copies of every feed-forward layer"""
    top_k: Count | None = None
    """of a dense model: experts per token; else 2"""
    noise: NotNegative | None = None
    """of a dense model: relative noise on each copy; else 0, which is exact"""
    seed: Amount | None = None
    """of a dense model: of noise and routers; else 0"""


def import_checkpoint(values: ImportOptions) -> None:
    """A PyTorch checkpoint becomes a folder of stacked leaves; with --experts, a dense one (Llama or Mistral, folder or
    GGUF) becomes a mixture of copies of its feed-forward layers."""
    folders.local(values.dst, what="the new folder")
    storage = _storage(values)
    with tempfile.TemporaryDirectory() as scratch:
        if values.experts is not None:
            source = _upcycled(values, Path(scratch), experts=values.experts)
        else:
            if any(value is not None for value in (values.top_k, values.noise, values.seed)):
                raise MoextendError("--top_k, --noise and --seed go with --experts N")
            if values.src.suffix == ".gguf":
                from moextend_jax.checkpoints.gguf import open_gguf  # it takes a quarter of a second

                # What is no dense model is refused as what it is.
                open_gguf(folders.local(values.src, what="a GGUF file"))
                raise MoextendError(f"{values.src} is a dense model: give --experts N to upcycle it")
            source = open_source(
                values.src,
                base=values.base,
                vision=values.vision,
                projector=values.projector,
                feature_layer=values.feature_layer,
                dtype=values.dtype,
            )
        for note in source.notes:
            print(f"{values.src}: {note}")
        cost = import_source(source, values.dst, dtype=values.dtype, storage=storage, console=Console(stderr=True))
    if not_written := source.record.facts.get("tokenizer"):
        print(f"tokenizer {not_written}")
    print(f"imported {described(source)} to {values.dst}: {cost}")
    print(f"content hash {read_object(values.dst / store.FILE)['content_hash']}")


def _storage(values: ImportOptions) -> Quantised | None:
    if values.storage is None:
        if values.group is not None:
            raise MoextendError("--group goes with --storage")
        return None
    if values.dtype is not None:
        raise MoextendError("--storage leaves all but the experts in the element type of the files: leave --dtype out")
    storage = Quantised(values.storage, values.group or (32 if values.storage == "mxfp4" else 64))
    storage.check_group("--group")
    return storage


def _upcycled(values: ImportOptions, scratch: Path, *, experts: int) -> Source:
    from moextend_jax.checkpoints.upcycle import open_upcycled  # the gguf package takes a quarter of a second

    if values.base or values.vision or values.projector or values.feature_layer is not None:
        raise MoextendError("--experts takes SRC alone: leave --base, --vision, --projector and --feature_layer out")
    return open_upcycled(
        values.src,
        experts=experts,
        top_k=2 if values.top_k is None else values.top_k,
        noise=values.noise or 0.0,
        seed=values.seed or 0,
        tokenizer_folder=scratch,
    )


def described(source: Source) -> str:
    return f"{', '.join(sorted(source.parts))} ({source.record.layout})"


# --- import -----------------------------------------------------------------------------------------------------------


def import_source(
    source: Source, dst: Path, *, dtype: str | None = None, storage: Quantised | None = None,
    console: Console | None = None,
) -> Cost:  # fmt: skip
    """Writes an opened checkpoint as a folder of stacked leaves; see store.py for what is in it."""
    quantising.check_readable(source.leaves)
    check_routers(source)
    if storage and not any(path in quantising.MATRICES for path in source.leaves):
        raise MoextendError("--storage is for pretrained experts, and there are none")
    quantising.check(source.config.decoder, storage, one_device())
    planned = store.tensors_of(source.leaves, dtype=dtype, storage=storage)
    with watched(planned, dst, console) as (cost, written), new_folder(dst) as folder:
        # The base of an applied delta or of a partial save is in the folder too: what is written is whole.
        record = source.record
        if record.base is not None:
            facts = record.facts | {"base_hash": record.base, "base_parts": dict(record.parts)}
            record = record._replace(base=None, layout="released", facts=facts, parts={})
        store.write(
            folder, source.leaves, record, dtype=dtype, storage=storage, max_shard_bytes=size_of(SHARD), written=written
        )
        _copy_files(source.files, folder)
    return cost()


# --- export -----------------------------------------------------------------------------------------------------------


def default_layout(source: Source) -> str:
    if source.config.adapters or source.config.blocks:
        return "delta"
    read = with_what_is_read(source.config, source.leaves).media.values()
    taught = "projector" in source.parts or any(not names.unheard(medium) for medium in read)
    if "extension" in source.parts or (taught and "decoder" in source.parts):
        released = (
            source.config.decoder.family in names.PUBLISHED["released"].families
            and source.parts <= {"decoder", "vision", "projector", "extension"}
            and all(name == of.medium == IMAGE for name, of in source.config.extensions.items())
            and source.config.composition == "shared"
        )
        return "released" if released else HF
    if "decoder" in source.parts:
        return source.config.decoder.family
    vision = source.config.vision
    return vision.family if vision and "vision" in source.parts else "llava"


def export_source(
    source: Source,
    dst: Path,
    *,
    layout: str,
    extensions: Collection[str] | None = None,
    max_shard_bytes: int,
    console: Console | None = None,
) -> Cost:
    """Writes an opened checkpoint in a layout of LAYOUTS; for delta and peft only `extensions`, if given.

    Raises:
      MoextendError: the checkpoint lacks a part of that layout, or is extended and the layout has no place for it, or
        its files hold experts, which that layout has, in few bits.
    """
    of_delta = {"extension"} if not any("/projector/" in path for path in source.leaves) else set()
    parts = of_delta if layout == "delta" else _ONE_PART.get(layout, {"decoder"})
    if missing := parts - source.parts:
        raise MoextendError(
            f"layout {layout} needs this part: {name_list(missing)}; there is only {name_list(source.parts)}"
        )
    if "decoder" in parts:
        quantising.check_readable(source.leaves)
    if layout in FAMILIES and layout != source.config.decoder.family:
        raise MoextendError(f"layout {layout} has no place for a decoder of family {source.config.decoder.family}")
    if layout in TOWERS and source.config.vision and layout != source.config.vision.family:
        raise MoextendError(f"layout {layout} has no place for a tower of family {source.config.vision.family}")
    if layout in FAMILIES and "extension" in source.parts:
        raise MoextendError(
            f"an extended model has no place in layout {layout}: export it with --layout hf, released or delta"
        )
    if layout == "delta":
        return export_delta(source, dst, extensions=extensions, console=console)
    if layout == "peft":
        return _export_peft(source, dst, extensions=extensions, console=console)
    files = _layout(source, layout)
    everything = {f"{name}/{file}": tensor for name, (planned, _) in files.items() for file, tensor in planned.items()}
    with watched(everything, dst, console) as (cost, written), new_folder(dst) as folder:
        for name, (planned, attributes) in files.items():
            inside = folder / name
            inside.mkdir(exist_ok=True)
            write_safetensors(inside, planned, max_shard_bytes=max_shard_bytes, written=written)
            if attributes:
                huggingface.write_json(inside / "config.json", attributes)
        processor = {name: path for name, path in source.files.items() if name.startswith("preprocessor")}
        tower = folder / "vision" if "vision" in files else folder
        if layout != "llava":
            _copy_files(source.files.items() - processor.items() if layout not in TOWERS else (), folder)
            _copy_files(processor, tower)
    return cost()


def _layout(source: Source, layout: str) -> dict[str, tuple[dict[str, Planned], dict[str, Any]]]:
    """Tensors and config.json of every folder of an export, by the folder's name inside it."""
    if layout not in FAMILIES:
        names.check_published(source.leaves, source.config, layout=layout)
    config, recorded = source.config, source.record.attributes
    tower = {"vision": recorded.get("vision") or huggingface.vision_attributes(config.vision)} if config.vision else {}
    plan = functools.partial(leaves.plan_theirs, source.leaves)
    if layout == "llava":
        table, prefix = source.record.projector
        return {".": (plan(table=table, config=config, prefix=prefix), {})}
    if layout in TOWERS:
        return {".": (plan(table=layout, config=config), tower["vision"])}
    dtype = str(source.leaves["decoder/embed"].dtype)
    attributes = recorded.get("decoder") or huggingface.decoder_attributes(config.decoder, dtype=dtype)
    for name in ("torch_dtype", "dtype"):  # an import may have cast
        if isinstance(attributes.get(name), str):
            attributes = attributes | {name: dtype}
    if layout in FAMILIES:
        own_attributes = {name: value for name, value in attributes.items() if name not in released.ADDED}
        files = {".": (plan(table=layout, config=config), own_attributes)}
        if "vision" in source.parts and config.vision:
            files["vision"] = (plan(table=config.vision.family, config=config), tower["vision"])
        return files
    if config.vision and (missing := {"projector", "vision"} - source.parts):
        if missing != {"projector", "vision"}:
            raise MoextendError(
                f"layout released needs this part too: {name_list(missing)}; there is only {name_list(source.parts)}"
            )
        config = with_vision(config, None)
    merged = released.attributes_of(config, attributes, tower["vision"] if config.vision else None)
    if own := {name: source.record.facts[name] for name in ("recipe", "text_isolation") if name in source.record.facts}:
        merged["moextend"] = own  # how it is to be asked, which the released code has no place for
    return {".": (plan(table="released", config=config), merged)}


def export_delta(
    source: Source, dst: Path, *, extensions: Collection[str] | None = None, console: Console | None = None
) -> Cost:
    """Writes extensions of an opened model, all or those that are named, without its base.

    Raises:
      MoextendError: there is no such extension.
    """
    facts = source.record.facts
    changed = set(facts.get("changed", ()))  # pretrained leaves that a recipe trains, such as routers
    trained = {path: leaf for path, leaf in source.leaves.items() if path in changed}
    own = delta.of_extensions(source.leaves, source.config, extensions)
    base, parts = source.record.base or facts.get("base_hash"), source.record.parts or facts.get("base_parts")
    if base is None:
        base, parts = hashes.base_hashes(source.leaves)
    facts = {name: fact for name, fact in facts.items() if name not in ("base_hash", "base_parts")}
    record = source.record._replace(layout="delta", base=base, parts=parts or {}, config=own.config, facts=facts)
    delta_leaves = own.leaves | trained
    planned = {path: leaves.plan_ours(leaf) for path, leaf in delta_leaves.items()}
    with watched(planned, dst, console) as (cost, written), new_folder(dst) as folder:
        store.write(folder, delta_leaves, record, max_shard_bytes=size_of(SHARD), written=written)
    return cost()


def _export_peft(source: Source, dst: Path, *, extensions: Collection[str] | None, console: Console | None) -> Cost:
    """Writes one LoRA in PEFT's files.

    Raises:
      MoextendError: there is not one alone, or it has no place in them.
    """
    own = delta.of_extensions(source.leaves, source.config, extensions)
    if [*own.config.added] != [*own.config.adapters] or len(own.config.adapters) != 1:
        raise MoextendError(
            f"layout peft holds one LoRA, and this model has {', '.join(own.config.added)}: name one with --extension, "
            "or take --layout delta"
        )
    ((name, adapter),) = own.config.adapters.items()
    start = f"adapters/{name}/"
    factors = {path.removeprefix(start): leaf for path, leaf in own.leaves.items() if path.startswith(start)}
    planned, attributes = peft.planned(factors, adapter, source.config.decoder)
    with watched(planned, dst, console) as (cost, written), new_folder(dst) as folder:
        write_safetensors(folder, planned, max_shard_bytes=sum(t.nbytes for t in planned.values()), written=written)
        (folder / "model.safetensors").rename(folder / peft.TENSORS)
        huggingface.write_json(folder / peft.CONFIG, attributes)
    return cost()


def parts_of(layout: str, source: Source) -> set[str]:
    if layout in FAMILIES:
        return {"decoder", "vision"}
    if layout == HF:
        return {"decoder", "vision", "projector", "extension", *with_what_is_read(source.config, source.leaves).media}
    return _ONE_PART.get(layout, source.parts)  # a delta has decoder and towers by their hashes


def _copy_files(files: Any, folder: Path) -> None:
    for name, path in dict(files).items():
        (folder / name).write_bytes(path.read_bytes())


def size_of(text: str) -> int:
    """Bytes of a size such as 5GB or 200MB (powers of ten)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}
    number = text.strip().upper().rstrip("KMGTB")
    try:
        size = int(float(number) * units[text.strip().upper().removeprefix(number).strip()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise MoextendError(f"--max_shard_size {text!r} is no size; write it like 5GB or 200MB")
    return size
