"""Grow a model: its arrays by path and the chosen layers in, the extension's arrays by path out."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import ModelConfig, MoextendError, Recipe
from moextend_jax.models.mixtral import Extension
from moextend_jax.parameters import arrays_of

COPIED = {
    "router/new_gate": "decoder/layers/moe/gate",
    "new_experts/w_gate": "decoder/layers/moe/experts/w_gate",
    "new_experts/w_up": "decoder/layers/moe/experts/w_up",
    "new_experts/w_down": "decoder/layers/moe/experts/w_down",
}
"""New leaf <- pretrained leaf it copies the source expert from; the calibrator starts as the identity."""


def grow(arrays: Mapping[str, jax.Array], *, config: ModelConfig, recipe: Recipe, seed: int) -> dict[str, jax.Array]:
    """The leaves of the extension that `config.extension` describes, initialised from the pretrained ones.

    Each new expert and its router column copy the layer's source expert (paper Eq. 8); the pretrained arrays are
    not touched.
    """
    extension = config.extension
    if extension is None:
        raise MoextendError("grow needs the layers to extend: run `moextend select` first")
    if max(extension.layers) >= config.decoder.layers:
        raise MoextendError(
            f"the selection extends layer {max(extension.layers)}, but the base has {config.decoder.layers}"
        )
    fresh = Extension(
        config.decoder, extension, rngs=nnx.Rngs(seed), dtype=config.train_dtype, std=recipe.calibrator_std
    )
    leaves = arrays_of(fresh)
    layers_Y, sources_Y = jnp.array(extension.layers), jnp.array(extension.sources)
    for new, old in COPIED.items():
        if new == "router/new_gate":  # [Z, D, E] -> [Y, D, X]
            copied = arrays[old][layers_Y, :, sources_Y][..., None]
        else:  # [Z, E, ...] -> [Y, X, ...]
            copied = arrays[old][layers_Y, sources_Y][:, None]
        leaves[new] = jnp.broadcast_to(copied, leaves[new].shape).astype(leaves[new].dtype)
    return {f"extension/{path}": leaf for path, leaf in leaves.items()}
