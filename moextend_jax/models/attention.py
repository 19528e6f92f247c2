"""Grouped-query attention with rotary positions: `x_BLD -> y_BLD`, and the keys and values a cache wants.

Kernels by platform: splash attention on TPU and the blocked one on CPU for whole rows, which never write the weights
of all pairs of positions; cuDNN's on GPU; `jax.nn.dot_product_attention` for the rest. On a mesh, L is split between
the layers and S = L whole within, where heads are split instead.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moextend_jax.models import blocked_attention
from moextend_jax.models.parameters import weight
from moextend_jax.sharding import Shards, gather, map_shards, module_shards, platform, shards


class KeysValues(NamedTuple):
    """Rotated keys and values of S positions; with a leading Z where layers are stacked."""

    keys_BSKH: jax.Array
    values_BSKH: jax.Array


class Rotation(NamedTuple):
    """Cosines and sines of each position's angles, over half the head size (h = H/2)."""

    cos_BLh: jax.Array
    sin_BLh: jax.Array


class Visible(NamedTuple):
    """What each position sees: `segments_BL` of whole rows (see `segment_mask`), or a mask over the past and these
    positions after it. Splash attention reads segments, so on TPU long rows have no mask."""

    segments_BL: jax.Array | None
    mask_B1LS: jax.Array | None

    @classmethod
    def in_rows(cls, segments_BL: jax.Array) -> Visible:
        splash = platform() == "tpu" and segments_BL.shape[1] % SPLASH_BLOCK == 0
        return cls(segments_BL, None if splash else segment_mask(segments_BL))

    @classmethod
    def by_mask(cls, mask_B1LS: jax.Array) -> Visible:
        return cls(None, mask_B1LS)


class Attention(nnx.Module):
    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str):
        self.query = weight("ZDNH", sizes, rngs=rngs, dtype=dtype)
        self.key = weight("ZDKH", sizes, rngs=rngs, dtype=dtype)
        self.value = weight("ZDKH", sizes, rngs=rngs, dtype=dtype)
        self.out = weight("ZNHD", sizes, rngs=rngs, dtype=dtype)

    def __call__(
        self, x_BLD: jax.Array, rotation: Rotation, visible: Visible, past: KeysValues | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Attends to what is visible of the past (if any) and of these positions; also gives the keys and values of
        these positions, for whoever keeps them."""
        arrays, splits = module_shards(self)
        x_split = shards("BLd", x_BLD.shape)
        apart = x_split.over("L")  # mesh axes that split positions between the layers
        heads = splits["key"].over("K")  # and heads within; key heads that do not divide keep all heads together
        heads = heads if heads == splits["query"].over("N") else ()
        keys_split = Shards("BSKH", (x_split.over("B"), (), heads, ()))
        rows = Shards("B", (x_split.over("B"),))

        def local(x_BLD, arrays, rotation, visible, past):
            w = {name: gather(leaf.astype(x_BLD.dtype), splits[name], keep=heads) for name, leaf in arrays.items()}
            x_BSD = jax.lax.all_gather(x_BLD, apart, axis=1, tiled=True) if apart else x_BLD
            query_BSNH = checkpoint_name(rotate(jnp.einsum("BSD,DNH->BSNH", x_BSD, w["query"]), rotation), "query")
            key_BSKH = checkpoint_name(rotate(jnp.einsum("BSD,DKH->BSKH", x_BSD, w["key"]), rotation), "key")
            value_BSKH = checkpoint_name(jnp.einsum("BSD,DKH->BSKH", x_BSD, w["value"]), "value")
            present = whole = KeysValues(key_BSKH, value_BSKH)
            if past is not None:
                whole = KeysValues(*(jnp.concatenate(pair, axis=1) for pair in zip(past, present, strict=True)))
            y_BSD = jnp.einsum("BSNH,NHD->BSD", attend(query_BSNH, whole, visible), w["out"])
            return own_positions(y_BSD, apart=apart, heads=heads), present

        ins = (x_split, splits, rows, rows, keys_split)  # those that are None have no parts to split
        run = map_shards(local, ins, (x_split, keys_split))
        return run(x_BLD, arrays, rotation, visible, past)


def own_positions(y_BSD: jax.Array, *, apart: tuple[str, ...], heads: tuple[str, ...]) -> jax.Array:
    """From every device's share of the heads at all positions to all heads at its own."""
    if apart and heads:
        return jax.lax.psum_scatter(y_BSD, apart, scatter_dimension=1, tiled=True)
    if apart:
        length = y_BSD.shape[1] // jax.lax.axis_size(apart)
        return jax.lax.dynamic_slice_in_dim(y_BSD, jax.lax.axis_index(apart) * length, length, axis=1)
    return jax.lax.psum(y_BSD, heads) if heads else y_BSD


def attend(query_BSNH: jax.Array, present: KeysValues, visible: Visible) -> jax.Array:
    """`y_BSNH`; the kernel by platform, and by whether whole rows or a cache are attended to."""
    if visible.mask_B1LS is None:
        assert visible.segments_BL is not None
        return splash(query_BSNH, *present, visible.segments_BL)
    long = query_BSNH.shape[1] > blocked_attention.BLOCK
    if visible.segments_BL is not None and long and platform() == "cpu":
        return blocked_attention.causal_attention(query_BSNH, *present, visible.mask_B1LS)
    # cuDNN asks the GPU, so a program compiled for GPUs where there is none goes without.
    cudnn = jax.default_backend() == "gpu" and query_BSNH.dtype != jnp.float32
    y_BSNH = jax.nn.dot_product_attention(
        query_BSNH, *present, mask=visible.mask_B1LS, implementation="cudnn" if cudnn else None
    )
    return checkpoint_name(y_BSNH, "attended")


SPLASH_BLOCK = 128
"""Splash attention wants rows of a multiple of this."""


def splash(query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """JAX's Pallas flash attention for TPU, causal within segments. Positions of segment 0 see each other, not the
    earlier positions that `segment_mask` gives them; nothing reads what they see."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, S, N, H = query_BSNH.shape
    K = key_BSKH.shape[2]
    block = next(size for size in (512, 256, SPLASH_BLOCK) if S % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    attend_GSH = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((S, S))] * (N // K)), block_sizes=sizes,
        residual_checkpoint_name="attended", interpret=platform() != "tpu",
    )  # fmt: skip

    def one_row(query_KGSH, key_KSH, value_KSH, segments_S):
        ids = kernels.SegmentIds(segments_S, segments_S)
        return jax.vmap(lambda q, k, v: attend_GSH(q, k, v, segment_ids=ids))(query_KGSH, key_KSH, value_KSH)

    query_BKGSH = (query_BSNH * H**-0.5).reshape(B, S, K, N // K, H).transpose(0, 2, 3, 1, 4)
    key_BKSH, value_BKSH = key_BSKH.transpose(0, 2, 1, 3), value_BSKH.transpose(0, 2, 1, 3)
    y_BKGSH = cast(jax.Array, jax.vmap(one_row)(query_BKGSH, key_BKSH, value_BKSH, segments_BS))
    return y_BKGSH.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


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
