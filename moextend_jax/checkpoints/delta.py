"""Deltas: extensions alone, with the projectors of their media, and the refusals that keep them with their base.

In: leaves of an extended model and those of its base. Out: the leaves to keep; or an error that names both bases.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from moextend_jax.checkpoints import store
from moextend_jax.checkpoints.hashes import BaseHashes
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.config import (
    ADDITIONS,
    IMAGE,
    DecoderConfig,
    ExtensionConfig,
    FeaturesConfig,
    ModelConfig,
    MoextendError,
    Named,
    extension_of,
)


class Part(NamedTuple):
    """Extensions of a model: their leaves, and the model without all others."""

    leaves: dict[str, Leaf]
    config: ModelConfig


def of_extensions(leaves: Mapping[str, Leaf], config: ModelConfig, names: Collection[str] | None = None) -> Part:
    """Some extensions, with the projectors of their media; None: all extensions and all projectors.

    Raises:
      MoextendError: there is no such extension.
    """
    known = dict.fromkeys(map(extension_of, config.added))
    if unknown := sorted({*(names or ())} - known.keys()):
        raise MoextendError(f"there is no extension {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    kept = config.with_added(lambda name, of: of if names is None or extension_of(name) in names else None)
    read = {part.medium for part in kept.added.values()}
    read |= {other for name in read & config.media.keys() for other in config.media[name].projector.others}
    media = Named({name: medium for name, medium in config.media.items() if names is None or name in read})
    starts = tuple(f"{kind}/{name}/" for kind in ADDITIONS for name in getattr(kept, kind))
    starts += tuple(f"media/{name}/projector/" for name in media)
    own = {path: leaf for path, leaf in leaves.items() if path.startswith(starts)}
    return Part(own, dataclasses.replace(kept, media=media))


def check_layers(
    extensions: Iterable[ExtensionConfig], decoder: DecoderConfig, *, where: Path, base: Path | None
) -> None:
    """An extension must not name layers that its base does not have."""
    beyond = [layer for extension in extensions for layer in extension.layers if layer not in decoder.routed]
    if beyond:
        but_dense = f", which route from {decoder.dense_layers} on" if decoder.dense_layers else ""
        raise MoextendError(f"{where} extends layers {beyond}, but {base} has only {decoder.layers} layers{but_dense}")


def check_base(
    record: store.Record, known: BaseHashes, *, decoder: DecoderConfig, where: Path, base: Path | str
) -> None:
    """A delta belongs to the very weights it was trained on.

    Args:
      known: hashes of the base, with the towers that stand in for those it does not bring.

    Raises:
      MoextendError: other sizes, layers that the base does not have, no tower where one belongs, or another content
        hash; names both.
    """
    check_layers(record.config.extensions.values(), decoder, where=where, base=Path(base))
    if record.config.decoder != decoder:
        raise MoextendError(f"{where} and its base {base} differ: {differing(record.config.decoder, decoder)}")
    for name, medium in record.config.media.items():
        if isinstance(medium.tower, FeaturesConfig) or f"media/{name}" in known.parts:
            continue
        how = f"`moextend compose BASE DELTA NEW_FOLDER --tower {name}=DIR` puts them together"
        how = "name it with --vision DIR" if name == IMAGE else how
        raise MoextendError(f"{where} was trained with a {tower_of(name)} and {base} has none: {how}")
    if record.config.media.keys() == {IMAGE} or not record.parts:
        if known.base != record.base:
            raise MoextendError(
                f"{where} belongs to the base with content hash {record.base}, but {base} has {known.base}"
            )
        return
    for part in ("decoder", *(f"media/{name}" for name in record.config.media)):
        if (expected := record.parts.get(part)) != (own := known.parts.get(part)):
            what = "decoder" if part == "decoder" else tower_of(part.removeprefix("media/"))
            raise MoextendError(
                f"{where} belongs to a base whose {what} has content hash {expected}, but that of {base} has {own}"
            )


def tower_of(medium: str) -> str:
    """What messages call a medium's tower."""
    return "vision tower" if medium == IMAGE else f"tower for {medium}"


def differing(own: DecoderConfig, other: DecoderConfig) -> str:
    pairs = zip(dataclasses.asdict(own).items(), dataclasses.asdict(other).values(), strict=True)
    return "; ".join(f"{name} is {json.dumps(a)} and {json.dumps(b)}" for (name, a), b in pairs if a != b)
