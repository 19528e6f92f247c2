"""TABLE of stages: what each trains, as path patterns; everything else is frozen.

The step differentiates these leaves and nothing else; optimizer state, clipping, norms and checkpoints of a stage
cover these leaves and nothing else. TABLE of groups: the optimizer settings a leaf belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from moextend_jax.config import MoextendError, Recipe
from moextend_jax.settings import GroupName

Leaf = TypeVar("Leaf")

STAGES: dict[str, tuple[str, ...]] = {
    "align": ("projector/*",),
    "extend": ("decoder/layers/moe/gate",),
    "finetune": ("extension/*",),
    "finetune_with_projector": ("extension/*", "projector/*"),
    "full": ("decoder/*", "projector/*", "vision/*"),
    "full_text": ("decoder/*",),
}

GROUPS: dict[str, GroupName] = {
    "projector/*": "projector",
    "extension/new_experts/*": "new_experts",
    "extension/router/new_gate": "router_columns",
    "extension/router/calibrator/*": "calibrators",
    "decoder/layers/moe/gate": "routers",
    "decoder/layers/moe/experts/*": "base",
    "decoder/layers/attention/*": "base",
    "decoder/layers/*_norm": "base",
    "decoder/embed": "base",
    "decoder/norm": "base",
    "decoder/head": "base",
    "vision/*": "vision",
}


def patterns(stage: str, *, recipe: Recipe) -> tuple[str, ...]:
    """The stage's patterns under a recipe (`finetune_trains`)."""
    if stage == "finetune" and recipe.finetune_trains == "extension_and_projector":
        stage = "finetune_with_projector"
    if stage not in STAGES:
        raise MoextendError(f"stage {stage!r} is unknown; there are {', '.join(STAGES)}")
    return STAGES[stage]


def split(leaves: Mapping[str, Leaf], trains: Iterable[str]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """(trainable, frozen). Every pattern must match something: a stage without its leaves is a mistake."""
    trains = tuple(trains)
    for pattern in trains:
        if not any(fnmatchcase(path, pattern) for path in leaves):
            raise MoextendError(f"this model has no parameters {pattern!r}, which the stage trains")
    trainable = {path: leaf for path, leaf in leaves.items() if any(fnmatchcase(path, p) for p in trains)}
    return trainable, {path: leaf for path, leaf in leaves.items() if path not in trainable}


def group(path: str) -> GroupName:
    """The optimizer group of a leaf; exactly one row of GROUPS matches."""
    names = [name for pattern, name in GROUPS.items() if fnmatchcase(path, pattern)]
    if len(names) != 1:
        raise KeyError(f"{path} matches {len(names)} rows of GROUPS")
    return names[0]
