"""Causal grouped-query attention on CPU, in blocks: `query_BLNH, key_BLKH, value_BLKH, mask_B1LL -> y_BLNH`.

`jax.nn.dot_product_attention` writes out all L x L weights of all heads on CPU, several times. Here one row and one
key head at a time are in cache, blocks of keys in the future are never touched, and the backward pass keeps one
number per query, the logarithm of its normaliser (FlashAttention's arithmetic, Dao et al. 2022).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 64
"""Queries per block; at 512 positions 64 was ahead of 128 and 256 (docs/benchmarks.md)."""


def causal_attention(
    query_BLNH: jax.Array, key_BLKH: jax.Array, value_BLKH: jax.Array, mask_B1LL: jax.Array,
    sinks_N: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attends where the mask is true, which it must never be for a key after its query. sinks_N: logits of one more key
    of each head, whose value is zero."""
    B, L, N, H = query_BLNH.shape
    K = key_BLKH.shape[2]
    query_BLKGH = (query_BLNH * H**-0.5).reshape(B, L, K, N // K, H)
    query_nGLH = query_BLKGH.transpose(0, 2, 3, 1, 4).reshape(B * K, N // K, L, H)
    key_nLH, value_nLH = (array.transpose(0, 2, 1, 3).reshape(B * K, L, H) for array in (key_BLKH, value_BLKH))
    sinks_nG = None if sinks_N is None else jnp.tile(sinks_N.astype(jnp.float32).reshape(K, N // K), (B, 1))
    y_nGLH = _blocked_attention(query_nGLH, key_nLH, value_nLH, mask_B1LL[:, 0], sinks_nG)
    return y_nGLH.reshape(B, K, N // K, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)


@jax.custom_vjp
def _blocked_attention(
    query_nGLH: jax.Array, key_nLH: jax.Array, value_nLH: jax.Array, mask_BLL: jax.Array, sinks_nG: jax.Array | None
) -> jax.Array:
    return _forward(query_nGLH, key_nLH, value_nLH, mask_BLL, sinks_nG)[0]


def _forward(query_nGLH, key_nLH, value_nLH, mask_BLL, sinks_nG):
    n, G, L, H = query_nGLH.shape

    def one_head(i):
        ys, norms = [], []
        for block, seen in _blocks(L):
            mask_bs = mask_BLL[i // (n // len(mask_BLL)), block, seen]
            scores_Gbs = _scores(query_nGLH[i, :, block], key_nLH[i, seen], mask_bs)
            top_Gb1 = scores_Gbs.max(axis=-1, keepdims=True)
            if sinks_nG is not None:
                top_Gb1 = jnp.maximum(top_Gb1, sinks_nG[i, :, None, None])
            weights_Gbs = jnp.exp(scores_Gbs - top_Gb1)
            total_Gb1 = weights_Gbs.sum(axis=-1, keepdims=True)
            if sinks_nG is not None:
                total_Gb1 += jnp.exp(sinks_nG[i, :, None, None] - top_Gb1)
            ys.append((_by_key(weights_Gbs, value_nLH[i, seen]) / total_Gb1).astype(query_nGLH.dtype))
            norms.append(top_Gb1 + jnp.log(total_Gb1))
        return jnp.concatenate(ys, axis=1), jnp.concatenate(norms, axis=1)

    y_nGLH, norm_nGL1 = (checkpoint_name(array, "attended") for array in jax.lax.map(one_head, jnp.arange(n)))
    return y_nGLH, (query_nGLH, key_nLH, value_nLH, mask_BLL, sinks_nG, y_nGLH, norm_nGL1)


def _backward(saved, dy_nGLH):
    query_nGLH, key_nLH, value_nLH, mask_BLL, sinks_nG, y_nGLH, norm_nGL1 = saved
    n, G, L, H = query_nGLH.shape

    def one_head(i):
        # Of keys and values as [H, L], for products whose left side is the small transposed array: 20 % of the whole.
        d_queries, d_key_HL, d_value_HL = [], *[jnp.zeros((H, L), jnp.float32)] * 2
        for block, seen in _blocks(L):
            query_GbH, dy_GbH = query_nGLH[i, :, block], dy_nGLH[i, :, block]
            key_sH, value_sH = key_nLH[i, seen], value_nLH[i, seen]
            scores_Gbs = _scores(query_GbH, key_sH, mask_BLL[i // (n // len(mask_BLL)), block, seen])
            weights_Gbs = jnp.exp(scores_Gbs - norm_nGL1[i, :, block])
            mean_Gb1 = (dy_GbH * y_nGLH[i, :, block].astype(jnp.float32)).sum(axis=-1, keepdims=True)
            d_scores_Gbs = weights_Gbs * (_by_key(dy_GbH, value_sH.T) - mean_Gb1)
            d_queries.append(_by_key(d_scores_Gbs, key_sH))
            d_key_HL = d_key_HL.at[:, seen].add(_flat(query_GbH).T @ _flat(d_scores_Gbs))
            d_value_HL = d_value_HL.at[:, seen].add(_flat(dy_GbH).T @ _flat(weights_Gbs))
        d_key_LH, d_value_LH = (array_HL.T.astype(key_nLH.dtype) for array_HL in (d_key_HL, d_value_HL))
        return jnp.concatenate(d_queries, axis=1), d_key_LH, d_value_LH

    d_sinks_nG = None
    if sinks_nG is not None:
        mean_nGL = (dy_nGLH.astype(jnp.float32) * y_nGLH.astype(jnp.float32)).sum(axis=-1)
        d_sinks_nG = -(jnp.exp(sinks_nG[:, :, None] - norm_nGL1[..., 0]) * mean_nGL).sum(axis=-1)
    return *jax.lax.map(one_head, jnp.arange(n)), None, d_sinks_nG


_blocked_attention.defvjp(_forward, _backward)


def _blocks(L: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that they can see."""
    return [(slice(start, min(start + BLOCK, L)), slice(0, min(start + BLOCK, L))) for start in range(0, L, BLOCK)]


def _scores(query_GbH: jax.Array, key_sH: jax.Array, mask_bs: jax.Array) -> jax.Array:
    scores_Gbs = _by_key(query_GbH, key_sH.T).astype(jnp.float32)
    return jnp.where(mask_bs[None], scores_Gbs, -1e30)


def _by_key(x_Gbs: jax.Array, y_sH: jax.Array) -> jax.Array:
    """One product for all heads of a group."""
    return (_flat(x_Gbs).astype(y_sH.dtype) @ y_sH).reshape(*x_Gbs.shape[:2], y_sH.shape[1])


def _flat(x_GbH: jax.Array) -> jax.Array:
    return x_GbH.reshape(-1, x_GbH.shape[-1])
