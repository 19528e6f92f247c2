"""What trains and what is frozen: leaves and path patterns (`runs/results.py`) in, two dicts out; TABLE of groups, the
optimizer settings that a leaf belongs to.

The step differentiates the trainable leaves and nothing else; optimizer state, clipping, norms and checkpoints of a
stage cover these leaves and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax.config import ADDITIONS, ExtensionConfig, ModelConfig, MoextendError
from moextend_jax.models.moextend import MoExtend, abstract
from moextend_jax.parameters import SCALES, only_chooses
from moextend_jax.settings import Group

Leaf = TypeVar("Leaf")

GROUPS: dict[str, Group] = {
    "media/*/projector/*": "projector",
    "extensions/*/new_experts/*": "new_experts",
    "extensions/*/router/new_gate": "router_columns",
    "extensions/*/router/new_gate_bias": "router_columns",
    "extensions/*/router/new_bias": "router_columns",
    "extensions/*/router/offset": "router_columns",
    "extensions/*/router/calibrator/*": "calibrators",
    "adapters/*": "adapters",
    "blocks/*": "blocks",
    "decoder/layers/moe/gate": "routers",
    "decoder/layers/moe/gate_bias": "routers",
    "decoder/layers/moe/selection_bias": "routers",
    "decoder/layers/moe/experts/*": "base",
    "decoder/layers/attention/*": "base",
    "decoder/layers/shared/*": "base",
    "decoder/layers/attention_norm": "base",
    "decoder/layers/moe_norm": "base",
    "decoder/dense/*": "base",
    "decoder/embed": "base",
    "decoder/norm": "base",
    "decoder/head": "base",
    "media/*/tower/*": "vision",
}


def split(leaves: Mapping[str, Leaf], trains: Iterable[str]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """(trainable, frozen). Every pattern must match something: a stage without its leaves is a mistake. Leaves that
    only choose experts are frozen unless a pattern is their path: they have no gradient, and a step that opens closed
    experts changes theirs by a rule (`opening`)."""
    trains = tuple(trains)
    for pattern in trains:
        if not any(fnmatchcase(path, pattern) for path in leaves):
            raise MoextendError(f"this model has no parameters {pattern!r}, which the stage trains")
    asked = {path: leaf for path, leaf in leaves.items() if any(fnmatchcase(path, p) for p in trains)}
    trainable = {path: leaf for path, leaf in asked.items() if path in trains or not only_chooses(path)}
    if path := next((path for path in trainable if path.endswith(SCALES)), None):
        raise MoextendError(f"the stage trains experts that are stored as integers ({path}): set expert_storage=as_is")
    return trainable, {path: leaf for path, leaf in leaves.items() if path not in trainable}


def for_training(model: MoExtend, trainable: Iterable[str]) -> MoExtend:
    """The model's structure for a step that trains these leaves; its config says which parts have a gradient. Guidance
    and drift are rules for one extension, so they are off in a step that trains several additions."""
    trainable = tuple(trainable)
    training = {path.split("/")[1] for path in trainable if path.startswith(ADDITIONS)}
    guided = {} if len(training) < 2 else {"guidance": 0.0, "drift": 0.0}

    def of_step(name: str, of: Any) -> Any:
        rules = guided if isinstance(of, ExtensionConfig) else {}
        return dataclasses.replace(of, trains=name in training, **rules)

    config = model.config.with_added(of_step)
    base = any(path.startswith("decoder/layers/moe/experts/") for path in trainable)
    frozen = "none" if base else "pretrained"
    config = dataclasses.replace(config, gradient_from=config.lowest_trained(trainable), frozen_experts=frozen)
    return model if config == model.config else abstract(config)


def opening(
    bias_YX: jax.Array, path: str, by: float, frozen: Mapping[str, jax.Array], *, picks_ZO: jax.Array,
    config: ModelConfig,
) -> jax.Array:  # fmt: skip
    """The selection bias of an extension's experts after a step, by the rule with which DeepSeek-V3 (2412.19437,
    section 2.1.2) balances experts: `by` more where an expert had fewer picks than the mean of its layer, and less
    where it had more. It never exceeds the source's, which a copy has: then the expert is open.

    Args:
      path: of the leaf. picks_ZO: how many tokens chose each expert in this step, by layer that routes.
    """
    name = path.split("/")[1]
    extension = config.extensions[name]
    own_Y = np.array(extension.layers) - config.decoder.routed.start
    sources_YX = np.array(extension.sources).reshape(*bias_YX.shape, extension.wide)[..., 0]
    mean_Y1 = picks_ZO[own_Y].sum(axis=1, keepdims=True) / np.sum(config.has_ZO, axis=1)[own_Y, None]
    fewer_YX = jnp.sign(mean_Y1 - picks_ZO[own_Y][:, np.array(config.columns(name))])
    return jnp.minimum(bias_YX + by * fewer_YX, frozen["decoder/layers/moe/selection_bias"][own_Y[:, None], sources_YX])


def group(path: str) -> Group:
    """The optimizer group of a leaf; exactly one row of GROUPS matches."""
    names: list[Group] = [name for pattern, name in GROUPS.items() if fnmatchcase(path, pattern)]
    if len(names) != 1:
        raise KeyError(f"{path} matches {len(names)} rows of GROUPS")
    return names[0]
