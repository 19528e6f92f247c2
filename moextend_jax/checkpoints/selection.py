"""What `moextend select` chose, from routing.json: a path in, the record out with its choice checked.

The choice decides which arrays a model has, so nothing is made of it before it is held against the base's sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.outside import shown
from moextend_jax.config import DecoderConfig, MoextendError


def read_selection(path: Path, *, decoder: DecoderConfig) -> dict[str, Any]:
    """The whole record. Its `chosen_layers` ascend and are layers of the decoder, its `sources` are experts of it, one
    per layer; its `base` is text.

    Raises:
      MoextendError: they are not, or are not there; names the file.
    """
    record = read_json(path)
    layers: Any = record.get("chosen_layers")
    sources: Any = record.get("sources")
    if not _below(layers, decoder.layers) or layers != sorted({*layers}) or not layers:
        raise MoextendError(
            f"{path}: chosen_layers = {shown(layers)} is no ascending list of layers below {decoder.layers}"
        )
    if not _below(sources, decoder.experts) or len(sources) != len(layers):
        raise MoextendError(
            f"{path}: sources = {shown(sources)} are not {len(layers)} experts below {decoder.experts}, one per layer"
        )
    if not isinstance(record.get("base"), str):
        raise MoextendError(f"{path}: base = {shown(record.get('base'))} is no content hash")
    return record


def _below(values: Any, most: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < most for value in values)
