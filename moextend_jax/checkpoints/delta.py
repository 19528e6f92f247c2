"""Deltas: an extension alone, and the refusals that keep it with its base.

In: leaves of a grown model and those of its base. Out: the leaves to keep; or an error that names both bases.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from moextend_jax.checkpoints import hashes, store
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.config import DecoderConfig, ExtensionConfig, MoextendError


def of_model(matched: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Projector, new experts, router columns and calibrators."""
    return {path: leaf for path, leaf in matched.items() if path.startswith(("projector/", "extension/"))}


def check_layers(extension: ExtensionConfig | None, decoder: DecoderConfig, *, where: Path, base: Path | None) -> None:
    """An extension must not name layers that its base does not have."""
    beyond = [layer for layer in (extension.layers if extension else ()) if layer >= decoder.layers]
    if beyond:
        raise MoextendError(f"{where} extends layers {beyond}, but {base} has only {decoder.layers} layers")


def check_base(
    record: store.Record, base_leaves: Mapping[str, Leaf], *, decoder: DecoderConfig, where: Path, base: Path
) -> None:
    """A delta belongs to the very weights it was trained on.

    Raises:
      MoextendError: other sizes, layers that the base does not have, no tower where one belongs, or another content
        hash; names both.
    """
    check_layers(record.config.extension, decoder, where=where, base=base)
    if record.config.decoder != decoder:
        raise MoextendError(f"{where} and its base {base} differ: {differing(record.config.decoder, decoder)}")
    if record.config.vision and not any(path.startswith("vision/") for path in base_leaves):
        raise MoextendError(f"{where} was trained with a vision tower and {base} has none: name it with --vision DIR")
    base_hash = hashes.base_hash(base_leaves)
    if base_hash != record.base:
        raise MoextendError(f"{where} belongs to the base with content hash {record.base}, but {base} has {base_hash}")


def differing(own: DecoderConfig, other: DecoderConfig) -> str:
    pairs = zip(dataclasses.asdict(own).items(), dataclasses.asdict(other).values(), strict=True)
    return "; ".join(f"{name} is {json.dumps(a)} and {json.dumps(b)}" for (name, a), b in pairs if a != b)
