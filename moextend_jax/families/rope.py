"""What a config.json says of rotary positions: `rope_scaling` of transformers 4, `rope_parameters` of transformers 5.

In and out: `DecoderConfig.rope_scaling`, whose frequencies `models/rope.py` computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moextend_jax.config import LinearRopeConfig, Llama3RopeConfig, MoextendError, RopeScaling, YarnConfig
from moextend_jax.outside import shown
from moextend_jax.settings import build

LENGTH, MOST_POSITIONS = "original_max_position_embeddings", "max_position_embeddings"
ROPE_TYPES: dict[str, tuple[type[RopeScaling], dict[str, str]]] = {
    "yarn": (
        YarnConfig,
        {
            "factor": "factor", LENGTH: "length", "beta_fast": "fast", "beta_slow": "slow", "truncate": "whole",
            "attention_factor": "growth", "mscale": "mscale", "mscale_all_dim": "mscale_all",
        },
    ),
    "llama3": (
        Llama3RopeConfig,
        {"factor": "factor", LENGTH: "length", "low_freq_factor": "low", "high_freq_factor": "high"},
    ),
    "linear": (LinearRopeConfig, {"factor": "factor"}),
}  # fmt: skip
"""TABLE of scalings, by transformers' rope_type: our class, and its fields by the names in a file."""
BESIDE = ("rope_theta", "partial_rotary_factor")
"""What transformers 5 writes into `rope_parameters` too."""


def read_rope(name: str, attributes: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """BESIDE where they are said, there or outside, and our `rope_scaling`, of the attribute `name`. What transformers
    takes from elsewhere where it is silent, is taken from there: the length from max_position_embeddings.

    Raises:
      MoextendError: a rope_type that is not in the table, or other keys or values than it has.
    """
    rope = attributes[name]
    if isinstance(rope, dict):
        said = {key: at[key] for at in (attributes, rope) for key in BESIDE if key in at}
        kind = rope.get("rope_type", rope.get("type", "default"))
        rest = {key: value for key, value in rope.items() if key not in ("rope_type", "type", *BESIDE)}
        if kind == "default" and not rest:
            return said | {"rope_scaling": None}
        if isinstance(kind, str) and kind in ROPE_TYPES:
            scaling = _scaling(kind, rest, attributes)
            if scaling is not None and not (kind == "yarn" and said.get("rope_theta") == 1):  # divides by log theta
                return said | {"rope_scaling": scaling}
            only = f"{kind} has positive numbers {', '.join(ROPE_TYPES[kind][1])}"
            raise MoextendError(f"{where}: {name} = {shown(rope)} cannot be honoured ({only})")
    only = ", ".join(["default", *ROPE_TYPES])
    raise MoextendError(f"{where}: {name} = {shown(rope)} cannot be honoured (only a rope_type of {only})")


def _scaling(kind: str, rest: Mapping[str, Any], attributes: Mapping[str, Any]) -> RopeScaling | None:
    """None if it is impossible."""
    of, fields = ROPE_TYPES[kind]
    values, most = dict(rest), attributes.get(MOST_POSITIONS)
    if LENGTH in fields:
        values[LENGTH] = attributes.get(LENGTH, values.get(LENGTH, most))
    if kind == "yarn" and values.get("factor", 0) is None and _is_count(most) and _is_count(values[LENGTH]):
        values["factor"] = most / values[LENGTH]
    if not values.keys() <= fields.keys():
        return None
    values = {fields[key]: value for key, value in values.items() if value is not None or key == "truncate"}
    with contextlib.suppress(MoextendError):
        scaling = build(of, values, where=kind)
        return scaling if is_possible(vars(scaling)) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_possible(scaling: Mapping[str, Any]) -> bool:
    """Whether fields of a scaling, each of its type, are possible together."""
    numbers = [value for value in scaling.values() if isinstance(value, int | float) and not isinstance(value, bool)]
    return all(1e-6 <= number < 1 << 31 for number in numbers) and scaling.get("low", 0) < scaling.get("high", 1)


def rope_attributes(scaling: RopeScaling) -> dict[str, Any]:
    """What `read_rope` makes this scaling of."""
    named = {name: getattr(scaling, field) for name, field in ROPE_TYPES[scaling.kind][1].items()}
    return {"rope_type": scaling.kind, **{name: value for name, value in named.items() if value is not None}}
