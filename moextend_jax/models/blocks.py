"""Blocks of LLaMA-Pro (arXiv 2401.02415): whole layers put between the pretrained ones, which stay frozen.

In: the decoder and `BlocksConfig`. Out: a stack of N layers, of which one runs behind every Z/N of the layers that
route (`decoder.run_layers`). Each starts as a copy of the layer below it, but with zeros in the maps whose outputs are
added to the hidden states: attention's output map and the experts' down projections (`SILENT`). So hidden states are
exactly the base's, and at first only these maps have a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import BlocksConfig, DecoderConfig, ModelConfig, MoextendError
from moextend_jax.models.decoder import DecoderLayers
from moextend_jax.models.quantised import taken
from moextend_jax.parameters import by_path

SILENT = (
    "attention/out", "attention/out_bias", "moe/experts/w_down", "moe/experts/b_down", "shared/w_down",
)  # fmt: skip
"""Leaves that start at zero: all that a layer adds to the residual stream comes out of these."""

BASE = "decoder/layers/"


def make_blocks(decoder: DecoderConfig, config: BlocksConfig, *, rngs: nnx.Rngs, dtype: str) -> DecoderLayers:
    """The stack. Its leaves are those of the base's layers, one for each block.

    Raises:
      MoextendError: as `check_blocks`.
    """
    check_blocks(decoder, config.count)
    return DecoderLayers(config.decoder(decoder), rngs=rngs, dtype=dtype)


def check_blocks(decoder: DecoderConfig, count: int) -> None:
    """Raises MoextendError where the layers that route cannot be cut into so many equal groups."""
    layers = len(decoder.routed)
    if layers % count:
        divisors = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise MoextendError(
            f"method.blocks = {count}: the {layers} layers that route cannot be cut into so many equal groups; "
            f"{divisors} would do"
        )


def fresh_blocks(arrays: Mapping[str, jax.Array], *, config: ModelConfig, name: str) -> dict[str, jax.Array]:
    """Initial leaves of the blocks `name`, made from those of the base's layers (`read_by_blocks`)."""
    blocks = config.blocks[name]
    made = nnx.eval_shape(lambda: make_blocks(config.decoder, blocks, rngs=nnx.Rngs(0), dtype=config.train_dtype))
    layers = jnp.array(blocks.sources(config.decoder)) - config.decoder.routed.start
    leaves = {}
    for path, param in by_path(nnx.state(made, nnx.Param)).items():
        copied = taken(arrays, BASE + path, layers)
        leaf = jnp.zeros_like(copied) if path in SILENT else copied
        leaves[f"blocks/{name}/{path}"] = leaf.astype(param.dtype)
    return leaves


def read_by_blocks(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Those leaves of a model that blocks are copied from."""
    return {path: leaf for path, leaf in arrays.items() if path.startswith(BASE)}
