"""Grow a model: its arrays by path and the chosen layers in, the extension's arrays by path out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import IMAGE, ColumnStart, ExpertStart, ModelConfig, Recipe, StartName
from moextend_jax.models.decoder import Extension
from moextend_jax.models.quantised import taken
from moextend_jax.parameters import arrays_of

COPIED = {
    "router/new_gate": "decoder/layers/moe/gate",
    "router/new_gate_bias": "decoder/layers/moe/gate_bias",
    "router/new_bias": "decoder/layers/moe/selection_bias",
    "new_experts/w_gate": "decoder/layers/moe/experts/w_gate",
    "new_experts/w_up": "decoder/layers/moe/experts/w_up",
    "new_experts/w_down": "decoder/layers/moe/experts/w_down",
    "new_experts/b_gate": "decoder/layers/moe/experts/b_gate",
    "new_experts/b_up": "decoder/layers/moe/experts/b_up",
    "new_experts/b_down": "decoder/layers/moe/experts/b_down",
}
"""New leaf -> the pretrained leaf whose source expert it copies. The calibrator is no copy (`router.CALIBRATORS`)."""

MEAN_OF: dict[str, Callable[[list[jax.Array]], jax.Array]] = {
    **dict.fromkeys(("new_experts/w_gate", "new_experts/w_up"), functools.partial(jnp.concatenate, axis=3)),
    **dict.fromkeys(("new_experts/b_gate", "new_experts/b_up"), functools.partial(jnp.concatenate, axis=2)),
    "new_experts/w_down": lambda parts: jnp.concatenate(parts, axis=2) / len(parts),
    "new_experts/b_down": lambda parts: sum(parts[1:], parts[0]) / len(parts),
}
"""TABLE of leaves -> how those of several sources are merged: hidden units are concatenated, so outputs add up, and the
down projection is divided by their number. Other leaves (router columns) are the first source's."""

CHANGED: dict[StartName, dict[str, Callable[[jax.Array, float], jax.Array]]] = {
    "copy": {},
    "twin": {},
    "lowered": {"router/offset": lambda leaf, lowered_by: jnp.full_like(leaf, -lowered_by)},
    "added": dict.fromkeys(("new_experts/w_down", "new_experts/b_down"), lambda leaf, lowered_by: jnp.zeros_like(leaf)),
}
"""TABLE of starts -> the new leaves that do not start as copies. `models/starts.py` says what each is."""


COLUMNS: dict[ColumnStart, Callable[[jax.Array, jax.Array], jax.Array] | None] = {
    "copy": None,
    "zero": lambda base_YDE, fresh_YDX: jnp.zeros_like(fresh_YDX),
    "mean": lambda base_YDE, fresh_YDX: jnp.broadcast_to(base_YDE.mean(axis=-1, keepdims=True), fresh_YDX.shape),
    "random": lambda base_YDE, fresh_YDX: fresh_YDX,
}
"""TABLE `grow.column` -> what router columns, and their biases [Y, E], become instead of copies; the paper's ablations.
A fresh column is random, a fresh bias 0."""
EXPERTS: dict[ExpertStart, tuple[str, ...]] = {"copy": (), "zero_down": ("w_down", "b_down"), "random": ()}
"""TABLE `grow.expert` -> the matrices of a copied expert that become zero; of "random" nothing is copied."""


def grow(
    arrays: Mapping[str, jax.Array],
    *,
    config: ModelConfig,
    recipe: Recipe,
    seed: int,
    name: str = IMAGE,
    lowered_by: float = 0.0,
    column: ColumnStart = "copy",
    expert: ExpertStart = "copy",
    closed: bool = False,
) -> dict[str, jax.Array]:
    """The leaves of the extension `name` of `config.extensions`, initialised from the pretrained ones.

    Each new expert and its router column copy a source expert of the layer (paper Eq. 8); the pretrained arrays are
    not touched. A wide one has the hidden units of its sources concatenated, which adds up their outputs, and a down
    projection divided by their number, so its output is their mean. Its column is that of its first source, the most
    picked, since almost no token would choose a mean of columns.

    Args:
      column, expert: rows of COLUMNS and EXPERTS, where they do not start as copies.
      closed: the selection bias starts 1, more than any score, below the lowest of the layer's pretrained experts: no
        token chooses a new one.
    """
    extension, routed = config.extensions[name], config.decoder.routed
    fresh = Extension(
        config.decoder, extension, rngs=nnx.Rngs(seed), dtype=config.train_dtype, std=recipe.calibrator_std
    )
    leaves = arrays_of(fresh)
    Y, wide = len(extension.layers), extension.wide
    layers_Y1 = jnp.array(extension.layers)[:, None] - routed.start
    sources_YXm = jnp.array(extension.sources).reshape(Y, extension.new_experts, wide)
    for new, old in COPIED.items():
        if new not in leaves or (expert == "random" and new.startswith("new_experts/")):  # or the base's have none
            continue
        if new.startswith("router/") and (made := COLUMNS[column]):  # a column's bias goes with it
            leaves[new] = made(arrays[old][layers_Y1[:, 0]].astype(leaves[new].dtype), leaves[new])
            continue
        if new == "router/new_gate":  # [Z, D, E] -> [Y, D, X]
            copied = jnp.swapaxes(arrays[old][layers_Y1, :, sources_YXm[..., 0]], 1, 2)
        else:  # [Z, E, ...] -> [Y, X, ...]
            parts = [taken(arrays, old, (layers_Y1, sources_YXm[..., n])) for n in range(wide)]
            copied = MEAN_OF[new](parts) if wide > 1 and new in MEAN_OF else parts[0]
        leaves[new] = copied.astype(leaves[new].dtype)
    for new in (f"new_experts/{matrix}" for matrix in EXPERTS[expert]):
        if new in leaves:
            leaves[new] = jnp.zeros_like(leaves[new])
    if closed:
        lowest_Y1 = arrays[COPIED["router/new_bias"]][layers_Y1[:, 0]].min(axis=-1, keepdims=True) - 1
        leaves["router/new_bias"] = jnp.broadcast_to(lowest_Y1, leaves["router/new_bias"].shape)
    for new, changed in CHANGED[extension.start].items():
        if new in leaves:
            leaves[new] = changed(leaves[new], lowered_by)
    return {f"extensions/{name}/{path}": leaf for path, leaf in leaves.items()}


def read_by_grow(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The leaves of a base that new ones are copied from, with the scales of those that are quantised."""
    return {path: leaf for path, leaf in arrays.items() if path.removesuffix("_scale") in COPIED.values()}
