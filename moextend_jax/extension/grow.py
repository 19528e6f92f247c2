"""Grow a model: its arrays by path and the chosen layers in, the extension's arrays by path out."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import IMAGE, ModelConfig, MoextendError, Recipe
from moextend_jax.models.mixtral import Extension
from moextend_jax.parameters import arrays_of

COPIED = {
    "router/new_gate": "decoder/layers/moe/gate",
    "router/new_bias": "decoder/layers/moe/selection_bias",
    "new_experts/w_gate": "decoder/layers/moe/experts/w_gate",
    "new_experts/w_up": "decoder/layers/moe/experts/w_up",
    "new_experts/w_down": "decoder/layers/moe/experts/w_down",
}
"""New leaf <- pretrained leaf it copies the source expert from; the calibrator starts as the identity."""


def grow(
    arrays: Mapping[str, jax.Array], *, config: ModelConfig, recipe: Recipe, seed: int, name: str = IMAGE
) -> dict[str, jax.Array]:
    """The leaves of the extension `name` of `config.extensions`, initialised from the pretrained ones.

    Each new expert and its router column copy a source expert of the layer (paper Eq. 8); the pretrained arrays are
    not touched.
    """
    extension = config.extensions.get(name)
    if extension is None:
        raise MoextendError("grow needs the layers to extend: run `moextend select` first")
    routed = config.decoder.routed
    if beyond := [layer for layer in extension.layers if layer not in routed]:
        raise MoextendError(
            f"the selection extends layers {beyond}, but of the base layers {routed.start} to {routed.stop - 1} route"
        )
    fresh = Extension(
        config.decoder, extension, rngs=nnx.Rngs(seed), dtype=config.train_dtype, std=recipe.calibrator_std
    )
    leaves = arrays_of(fresh)
    layers_Y1 = jnp.array(extension.layers)[:, None] - routed.start
    sources_YX = jnp.array(extension.sources).reshape(len(extension.layers), extension.new_experts)
    for new, old in COPIED.items():
        if new not in leaves:  # the base's experts have none
            continue
        if new == "router/new_gate":  # [Z, D, E] -> [Y, D, X]
            copied = jnp.swapaxes(arrays[old][layers_Y1, :, sources_YX], 1, 2)
        else:  # [Z, E, ...] -> [Y, X, ...]
            copied = arrays[old][layers_Y1, sources_YX]
        leaves[new] = copied.astype(leaves[new].dtype)
    return {f"extensions/{name}/{path}": leaf for path, leaf in leaves.items()}
