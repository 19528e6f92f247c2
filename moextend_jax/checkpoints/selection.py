"""What `moextend select` chose, from routing.json: a path in, the record out with its choice checked.

The choice decides which arrays a model has, so nothing is made of it before it is held against the base's sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moextend_jax.config import DecoderConfig, MoextendError
from moextend_jax.outside import read_object, shown


def read_selection(path: Path, *, decoder: DecoderConfig) -> dict[str, Any]:
    """The whole record. Its `chosen_layers` ascend and are layers of the decoder, its `sources` are experts of it,
    `wide` for each of `new_experts`, all different in a layer; its `base` is text.

    Raises:
      MoextendError: they are not, or are not there; names the file.
    """
    record = read_object(path)
    layers: Any = record.get("chosen_layers")
    sources: Any = record.get("sources")
    if not _below(layers, decoder.layers, decoder.dense_layers) or layers != sorted({*layers}) or not layers:
        of = f"layers below {decoder.layers}" + (f" from {decoder.dense_layers} on" if decoder.dense_layers else "")
        raise MoextendError(f"{path}: chosen_layers = {shown(layers)} is no ascending list of {of}")
    new: Any = record.get("new_experts", 1)
    if type(new) is not int or not 1 <= new <= decoder.experts:
        raise MoextendError(f"{path}: new_experts = {shown(new)} is no number of experts up to {decoder.experts}")
    wide: Any = record.get("wide", 1)
    if type(wide) is not int or not 1 <= wide <= decoder.experts:
        raise MoextendError(f"{path}: wide = {shown(wide)} is no number of experts up to {decoder.experts}")
    each = new * wide
    of_layers = [sources[n : n + each] for n in range(0, len(sources), each)] if isinstance(sources, list) else []
    if not _below(sources, decoder.experts) or [len({*some}) for some in of_layers] != [each] * len(layers):
        told = "one per layer" if each == 1 else f"{each} different ones per layer"
        raise MoextendError(
            f"{path}: sources = {shown(sources)} are not {each * len(layers)} experts below {decoder.experts}, {told}"
        )
    if not isinstance(record.get("base"), str):
        raise MoextendError(f"{path}: base = {shown(record.get('base'))} is no content hash")
    return record


def _below(values: Any, most: int, least: int = 0) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < most for value in values)
