"""Grouped-query attention with rotary positions: `x_BLD -> y_BLD`, and the keys and values a cache wants."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.models import blocked_attention
from moextend_jax.models.parameters import weight
from moextend_jax.sharding import map_rows


class KeysValues(NamedTuple):
    """Rotated keys and values of S positions; with a leading Z where layers are stacked."""

    keys_BSKH: jax.Array
    values_BSKH: jax.Array


class Rotation(NamedTuple):
    """Cosines and sines of each position's angles, over half the head size (h = H/2)."""

    cos_BLh: jax.Array
    sin_BLh: jax.Array


class Attention(nnx.Module):
    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str):
        self.query = weight("ZDNH", sizes, rngs=rngs, dtype=dtype)
        self.key = weight("ZDKH", sizes, rngs=rngs, dtype=dtype)
        self.value = weight("ZDKH", sizes, rngs=rngs, dtype=dtype)
        self.out = weight("ZNHD", sizes, rngs=rngs, dtype=dtype)

    def __call__(
        self, x_BLD: jax.Array, rotation: Rotation, mask_B1LS: jax.Array, past: KeysValues | None, slots_BL: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """Attends where the mask is true; with `past`, new keys and values first go into its slots `slots_BL`."""

        def cast(param: nnx.Param) -> jax.Array:
            return param[...].astype(x_BLD.dtype)

        query_BLNH = rotate(jnp.einsum("BLD,DNH->BLNH", x_BLD, cast(self.query)), rotation)
        key_BLKH = rotate(jnp.einsum("BLD,DKH->BLKH", x_BLD, cast(self.key)), rotation)
        value_BLKH = jnp.einsum("BLD,DKH->BLKH", x_BLD, cast(self.value))
        present = KeysValues(key_BLKH, value_BLKH)
        if past is not None:
            rows_B1 = jnp.arange(x_BLD.shape[0])[:, None]
            present = KeysValues(*(old.at[rows_B1, slots_BL].set(new) for old, new in zip(past, present, strict=True)))
        y_BLNH = attend(query_BLNH, present, mask_B1LS, causal=past is None)
        return jnp.einsum("BLNH,NHD->BLD", y_BLNH, cast(self.out)), present


def attend(query_BLNH: jax.Array, present: KeysValues, mask_B1LS: jax.Array, *, causal: bool) -> jax.Array:
    """`causal` says that the mask hides all later positions, which long rows on CPU make use of."""
    if causal and query_BLNH.shape[1] > blocked_attention.BLOCK and jax.default_backend() == "cpu":
        split = (query_BLNH, present.keys_BSKH, present.values_BSKH, mask_B1LS)
        return map_rows(lambda split, _: blocked_attention.causal_attention(*split), split)
    return jax.nn.dot_product_attention(query_BLNH, present.keys_BSKH, present.values_BSKH, mask=mask_B1LS)


def rotation(positions_BL: jax.Array, *, head_size: int, theta: float) -> Rotation:
    frequency_h = theta ** -(jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles_BLh = positions_BL[..., None].astype(jnp.float32) * frequency_h[None, None, :]
    return Rotation(jnp.cos(angles_BLh), jnp.sin(angles_BLh))


def rotate(x_BLNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pair (i, i + H/2) of every head by the position's i-th angle (Hugging Face's half-split layout)."""
    cos_BL1h, sin_BL1h = rotation.cos_BLh[:, :, None, :], rotation.sin_BLh[:, :, None, :]
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos_BL1h - second * sin_BL1h, second * cos_BL1h + first * sin_BL1h], axis=-1)
    return turned.astype(x_BLNH.dtype)


def segment_mask(segments_BL: jax.Array) -> jax.Array:
    """bool `[B, 1, L, L]`: each token sees the tokens of its own segment up to itself.

    Segment 0 is padding, which no token sees. A padding token sees all earlier real tokens, as a right-padded row
    does in the reference code, or itself where there are none; nothing reads its output.
    """
    L = segments_BL.shape[1]
    query_BL1, key_B1L = segments_BL[:, :, None], segments_BL[:, None, :]
    causal_1LL = jnp.tril(jnp.ones((1, L, L), bool))
    seen_BLL = ((query_BL1 == key_B1L) | (query_BL1 == 0)) & (key_B1L > 0) & causal_1LL
    alone_BLL = jnp.eye(L, dtype=bool)[None] & ~seen_BLL.any(axis=-1, keepdims=True)
    return (seen_BLL | alone_BLL)[:, None]
