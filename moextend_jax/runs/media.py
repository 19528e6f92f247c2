"""Media of a run: settings and an opened base in, the same with every medium's tower, projector and tags out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.loading import open_tower
from moextend_jax.checkpoints.source import Source
from moextend_jax.config import (
    IMAGE,
    TRUNKS,
    FeaturesConfig,
    ImageTags,
    Medium,
    MoextendError,
    Named,
    ProjectorConfig,
    TowerConfig,
)
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.media import KINDS, mark_of
from moextend_jax.settings import MediumSettings, RunSettings


def with_media(source: Source, settings: RunSettings, tokenizer: Tokenizer) -> Source:
    """The base with the media that the settings name beside its pictures, and the tags that its tokenizer has for them.

    Raises:
      MoextendError: a tower that is not there or not of its medium's kind, or more media than the vocabulary has free
        ids for.
    """
    media, leaves = dict(source.config.media), dict(source.leaves)
    if IMAGE in media:
        media[IMAGE] = dataclasses.replace(media[IMAGE], tags=tokenizer.tags)
    others = [name for name in settings.media if name != IMAGE]
    if len(others) > len(tokenizer.spare):
        raise MoextendError(
            f"{len(others)} media beside pictures need as many ids that text does not use, and the vocabulary in "
            f"{tokenizer.where} has {len(tokenizer.spare)}: leave media out, or append rows to the base's vocabulary"
        )
    for name in settings.trunks_first:
        of = settings.media[name]
        if name == IMAGE:
            if IMAGE not in media:
                raise MoextendError(f"media.{IMAGE} is set, and the run has no pictures: vision = {settings.vision!r}")
            media[IMAGE] = dataclasses.replace(media[IMAGE], projector=projector_of(IMAGE, settings, media))
            continue
        tower, own = _tower(name, of, source, settings)
        leaves |= own
        # What stands before and behind an item is the same for all media; only what stands in it differs.
        tags = dataclasses.replace(tokenizer.tags, pad=tokenizer.spare[others.index(name)])
        media[name] = medium_of(name, settings, tower, media, tags=tags)
    config = dataclasses.replace(source.config, media=Named(media))
    return source._replace(leaves=leaves, record=source.record._replace(config=config))


def medium_of(
    name: str, settings: RunSettings, tower: TowerConfig, before: Mapping[str, Medium], *, tags: ImageTags
) -> Medium:
    """A medium as its settings have it, behind this tower and after the media `before` it."""
    of = settings.media[name]
    medium = Medium(
        kind=of.kind,
        mark=mark_of(name, of.kind),
        tags=tags,
        tower=tower,
        projector=projector_of(name, settings, before),
        frames=of.frames if of.kind == "video" else 1,
        join=of.join,
        spans=of.spans,
        seconds=float(of.seconds),
    )
    if of.spans and of.spans[-1] > medium.tokens:
        raise MoextendError(f"media.{name}.spans = {of.spans}: an item has {medium.tokens} tokens at most")
    if medium.onto and before[medium.onto].tokens % medium.tokens:
        raise MoextendError(
            f"media.{name}.projector.fusion: its items have {medium.tokens} tokens, no divisor of the "
            f"{before[medium.onto].tokens} of those of {medium.onto}, to which they are added; give {name} fewer frames"
        )
    return medium


def projector_of(name: str, settings: RunSettings, before: Mapping[str, Medium]) -> ProjectorConfig:
    """Sizes of a medium's projector, after the media `before` it.

    Raises:
      MoextendError: it adds to a projector that is not there, or of another kind.
    """
    of = settings.media[name]
    asked = dataclasses.asdict(of.projector)
    if (kind := TRUNKS.get(of.projector.kind)) is None:
        on_trunk = ("rank", "trunk", "inner", "fusion")
        return ProjectorConfig(**{field: asked[field] for field in asked if field not in on_trunk})
    trunk = before.get(of.projector.trunk)
    if trunk is None or trunk.projector.kind != kind:
        there = ", ".join(f"{name} {medium.projector.kind}" for name, medium in before.items()) or "none"
        raise MoextendError(
            f"media.{name}.projector {of.projector.kind} adds to a projector of kind {kind} of a medium before it, and "
            f"its trunk is {of.projector.trunk!r}; there are: {there}"
        )
    _, *past = settings.woven_into(name)
    if ranks := {before[n].projector.rank for n in past} - {of.projector.rank}:
        raise MoextendError(
            f"media.{name}.projector.rank = {of.projector.rank}: {', '.join(past)} on the same trunk have rank "
            f"{min(ranks)}, and its maps stand inside their adapters"
        )
    sizes = {field: getattr(trunk.projector, field) for field in ("queries", "layers", "heads", "cross_every")}
    own = {"width": trunk.tower.sizes()["C"], "past": tuple(past)}
    return ProjectorConfig(**{**asked, **sizes, **own})


def _tower(name: str, of: MediumSettings, source: Source, settings: RunSettings) -> tuple[TowerConfig, dict[str, Leaf]]:
    if of.kind == "features":
        return FeaturesConfig(width=of.width, patches=of.patches), {}
    if not of.tower:
        if of.kind == "audio" or source.config.vision is None:
            raise MoextendError(f"media.{name}.tower must name the folder of its tower")
        own = {path: leaf for path, leaf in source.leaves.items() if path.startswith(f"media/{IMAGE}/tower/")}
        return source.config.vision, {path.replace(IMAGE, name, 1): leaf for path, leaf in own.items()}
    feature_layer = settings.recipe.feature_layer
    tower, leaves = open_tower(of.tower, kind=of.kind, medium=name, seconds=of.seconds, feature_layer=feature_layer)
    if not isinstance(tower, KINDS[of.kind].towers):
        raise MoextendError(f"media.{name} is of kind {of.kind}, and {of.tower} is a tower for sound")
    return tower, leaves
