"""The command `moextend compose`: a base and deltas that were trained apart become one model, without training.

In: the folder of a base, folders of deltas of it, and how their extensions share tokens. Out: a new folder, a whole
model with all of their media and extensions (or a delta of them), whose moextend.json says what it was made of.

New experts and router columns stand side by side, nothing is averaged: `config.ModelConfig.composition` says which a
token may choose. What a delta does alone it does here too, where only its own extension is open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from moextend_jax.checkpoints import delta, hashes, store, train_state
from moextend_jax.checkpoints.convert import described, export_delta, import_source
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.loading import folder_of, open_tower
from moextend_jax.checkpoints.source import Source, checked_base, open_source
from moextend_jax.config import (
    ADDITIONS,
    IMAGE,
    ImageTags,
    Medium,
    ModelConfig,
    MoextendError,
    Named,
    Range,
    WhisperConfig,
    extension_of,
)
from moextend_jax.data.tokenizer import tokenizer_of
from moextend_jax.folders import folder, local, reading
from moextend_jax.outside import shown

ASKED = ("weight_guard", "mass", "prompt", "image_preparation")
"""Fields of a recipe that decide how the finished model computes and is asked: all deltas must agree on them."""


@dataclasses.dataclass(frozen=True)
class ComposeOptions:
    base: str
    """folder of the base; embedded: the package's own"""
    deltas: tuple[Path, ...]
    """folders that `moextend export --layout delta` wrote"""
    out: Path
    """new folder"""
    _: dataclasses.KW_ONLY
    rule: Literal["shared", "decoupled"] = "decoupled"
    """decoupled: what a picture, a sound, ... becomes sees its own extension alone; shared: all that are open to it"""
    text: Literal["strict", "shared"] = "strict"
    """strict: text beside no item of an extension's medium never chooses it; shared: it may"""
    share: tuple[str, ...] = ()
    """NAME=NUMBER, how much of an extension there is beside others: 1 all of it, 0 none"""
    vision: str | None = None
    """folder of the vision tower, where the base has none; embedded: the package's own"""
    tower: tuple[str, ...] = ()
    """MEDIUM=FOLDER, the towers of other media"""
    delta: bool = False
    """write a delta of all extensions, without base and towers"""


class Delta(NamedTuple):
    """An opened delta."""

    folder: Path
    record: store.Record
    leaves: dict[str, Leaf]

    @property
    def names(self) -> list[str]:
        """Names of its extensions."""
        return list(dict.fromkeys(map(extension_of, self.record.config.added)))


def compose(values: ComposeOptions) -> None:
    """Deltas of one base become one model: new experts and router columns side by side, nothing is trained."""
    local(values.out, what="the new folder")
    deltas = [open_delta(at) for at in values.deltas]
    if not deltas:
        raise MoextendError("compose needs BASE, at least one DELTA, and OUT")
    towers = dict(_pairs(values.tower, option="tower"))
    if values.vision is not None:
        towers[IMAGE] = values.vision
    shares = {name: _number(text, of=name) for name, text in _pairs(values.share, option="share")}
    base = open_base_of(values.base, deltas, towers=towers)
    source = composed(base, deltas, rule=values.rule, text=values.text, shares=shares)
    console = Console(stderr=True)
    write = export_delta if values.delta else import_source
    cost = write(source, values.out, console=console)
    names = ", ".join(name for part in deltas for name in part.names)
    print(f"composed {names} ({values.rule}, text {values.text}) to {values.out}, {described(source)}: {cost}")


def open_delta(at: Path) -> Delta:
    """Raises MoextendError where the folder holds something else."""
    at = folder(str(at))
    with reading(at):
        if not at.exists():
            raise MoextendError(f"{at} does not exist: give folders of deltas, then the new folder")
        if not store.is_imported(at):
            raise MoextendError(f"{at} is no delta: `moextend export` writes one with --layout delta")
        record, leaves = store.read(at)
    if record.base is None:
        raise MoextendError(
            f"{at} is a whole model: `moextend export {at} NEW_FOLDER --layout delta` makes a delta of it"
        )
    return Delta(at, record, leaves)


def open_base_of(base: str, deltas: Sequence[Delta], *, towers: Mapping[str, str]) -> Source:
    """The pretrained leaves that these deltas belong to: those of the base, and of the towers that it does not bring.

    Raises:
      MoextendError: a delta was trained on other weights or with a tower that is missing; or a tower is not needed.
    """
    media = _union_of_media(deltas)
    for name in towers:
        if name not in media:
            raise MoextendError(f"--tower {name}: no delta is for the medium {name!r}; they are for {', '.join(media)}")
    feature_layer = getattr(media[IMAGE].tower, "feature_layer", None) if IMAGE in media else None
    vision = folder_of(towers[IMAGE], inside="vision") if IMAGE in towers else None
    source = checked_base(open_source(folder_of(base), vision=vision, feature_layer=feature_layer), base)
    leaves = {path: leaf for path, leaf in source.leaves.items() if hashes.is_pretrained(path)}
    for name, at in towers.items():
        if name != IMAGE:
            leaves |= _tower(name, media[name], at)
    known = hashes.base_hashes(leaves)
    for part in deltas:
        delta.check_base(part.record, known, decoder=source.config.decoder, where=part.folder, base=base)
        hashes.leaf_hashes(part.leaves)  # refuses a delta that is not what was written
    record = source.record._replace(base=known.base, parts=known.parts)
    wanted = ("decoder/", *(f"media/{name}/" for name in media))
    return source._replace(leaves={p: leaf for p, leaf in leaves.items() if p.startswith(wanted)}, record=record)


def composed(base: Source, deltas: Sequence[Delta], *, rule: Any, text: str, shares: Mapping[str, float]) -> Source:
    """One model of a base and deltas of it (`open_base_of` has checked that).

    Raises:
      MoextendError: what the deltas hold cannot stand side by side, or a share is of no extension.
    """
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in ADDITIONS}
    extensions: dict[str, Any] = {}  # by name one of its parts
    for part in deltas:
        for name in part.names:
            if name in extensions:
                raise MoextendError(
                    f"two deltas have an extension called {name}, one of them {part.folder}: an extension's name "
                    "belongs to it, so train one of them under another (--config.extension NAME)"
                )
        for kind, own in kinds.items():
            for name, added in getattr(part.record.config, kind).items():
                of = extension_of(name)
                own[name] = extensions[of] = dataclasses.replace(added, share=shares.get(of, added.share))
    if unknown := sorted(shares.keys() - extensions.keys()):
        raise MoextendError(f"--share {unknown[0]}: there is no such extension; there are {', '.join(extensions)}")
    if len(counts := {blocks.count for blocks in kinds["blocks"].values()}) > 1:
        raise MoextendError(f"the deltas have {' and '.join(map(str, counts))} blocks: in one model all have as many")
    media = _with_own_pads(_union_of_media(deltas), base)
    for name, added in extensions.items():
        if added.medium and added.medium not in media:
            raise MoextendError(f"extension {name} is for the medium {added.medium}, which no delta describes")
        if not added.medium and text == "strict":
            raise MoextendError(f"extension {name} is for text, which --text strict closes to it: give --text shared")
    changed = [(part, path) for part in deltas for path in part.leaves if hashes.is_pretrained(path)]
    if changed and len(deltas) > 1:
        part, path = changed[0]
        raise MoextendError(
            f"{part.folder} changes {path} of its base, which the other deltas need unchanged: leave it out"
        )
    added_parts: dict[str, Any] = {kind: Named(own) for kind, own in kinds.items()}
    config = ModelConfig(
        decoder=base.config.decoder,
        media=Named(media),
        composition=rule,
        **added_parts,
        text_isolation="strict" if text == "strict" else "none",
    )
    record = {"rule": rule, "text": text, "shares": {n: added.share for n, added in extensions.items()}}
    record["deltas"] = [{"extensions": d.names, "content_hash": hashes.stored_hash(d.leaves)} for d in deltas]
    facts = _how_to_ask(deltas) | {"text_isolation": config.text_isolation, "composed": record}
    facts |= {"changed": sorted(path for _, path in changed)} if changed else {}
    stored = dict.fromkeys(str(part.record.facts.get("expert_storage", "as_is")) for part in deltas)
    facts |= {"expert_storage": " and ".join(stored)} if [*stored] != ["as_is"] else {}
    leaves = dict(base.leaves)
    for part in deltas:
        leaves |= part.leaves
    whole = base.record._replace(config=config, layout="delta", facts=facts)
    return base._replace(leaves=leaves, record=whole)


def _union_of_media(deltas: Iterable[Delta]) -> dict[str, Medium]:
    """The media of all deltas, by name; media of one name must be the same, projectors too."""
    media: dict[str, Medium] = {}
    first: dict[str, Delta] = {}
    for part in deltas:
        for name, medium in part.record.config.media.items():
            if name in media and (
                dataclasses.replace(medium, tags=media[name].tags) != media[name]
                or _projector(part, name) != _projector(first[name], name)
            ):
                raise MoextendError(
                    f"{first[name].folder} and {part.folder} each have the medium {name}, with other sizes or another "
                    "projector: only one of them can stand in one model"
                )
            media.setdefault(name, medium)
            first.setdefault(name, part)
    return media


def _projector(part: Delta, medium: str) -> dict[str, str | None]:
    return {path: leaf.sha256 for path, leaf in part.leaves.items() if path.startswith(f"media/{medium}/projector/")}


def _with_own_pads(media: Mapping[str, Medium], base: Source) -> dict[str, Medium]:
    """Media trained apart may have the same pad id. The later one then gets another id that text does not need. The
    choice changes nothing, since the embedding of a pad is always replaced."""
    own: dict[str, Medium] = {}
    for name, medium in media.items():
        taken = {id for other in own.values() for id in other.tags.ids}
        if medium.tags.pad in taken:
            medium = dataclasses.replace(medium, tags=_other_tags(medium.tags, {*taken}, media, base, name=name))
        own[name] = medium
    return own


def _other_tags(tags: ImageTags, taken: set[int], media: Mapping[str, Medium], base: Source, *, name: str) -> ImageTags:
    every = taken | {id for medium in media.values() for id in medium.tags.ids}
    if base.tokenizer_folder is None:
        raise MoextendError(
            f"{name} has the tags of another medium, and without a tokenizer no others can be chosen: give the base one"
        )
    spare = tokenizer_of(base.tokenizer_folder, base.config, ends=base.ends).spare
    free = next((id for id in spare if id not in every), None)
    if free is None:
        raise MoextendError(
            f"{name} needs an id that text does not use, and the vocabulary has no more: leave a medium out"
        )
    return dataclasses.replace(tags, pad=free)


def _how_to_ask(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The recipe that all deltas have in common, as the first has it."""
    recipes = [part.record.facts.get("recipe") for part in deltas]
    for part, recipe in zip(deltas, recipes, strict=True):
        for name in ASKED:
            before = train_state.BEFORE.get(name)
            ours, theirs = ((r.get(name, before) if isinstance(r, dict) else None) for r in (recipes[0], recipe))
            if ours != theirs:
                raise MoextendError(
                    f"{deltas[0].folder} and {part.folder} were trained by recipes that one model cannot have both of: "
                    f"{name} = {shown(ours)} and {shown(theirs)}"
                )
    return {"recipe": recipes[0]} if recipes[0] is not None else {}


def _tower(name: str, medium: Medium, at: str) -> dict[str, Leaf]:
    """Leaves of the tower that a medium describes."""
    tower = medium.tower
    seconds = tower.seconds if isinstance(tower, WhisperConfig) else 1
    feature_layer = getattr(tower, "feature_layer", -1)
    config, leaves = open_tower(at, kind=medium.kind, medium=name, seconds=seconds, feature_layer=feature_layer)
    if config != tower:
        raise MoextendError(f"{at} is another tower than the one that {name} was trained with: its sizes differ")
    return leaves


def _pairs(words: Iterable[str], *, option: str) -> Iterable[tuple[str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise MoextendError(f"--{option} {word}: write NAME=VALUE")
        yield name, value


def _number(text: str, *, of: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise MoextendError(f"--share {of}={text}: {text} is no number") from None
    Range(least=0, most=1).check(share, what=f"--share {of}")
    return share
