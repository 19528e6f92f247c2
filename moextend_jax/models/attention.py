"""Grouped-query attention with rotary positions: `x_BLD -> y_BLD`, and the keys and values a cache wants.

Kernels by platform, for whole rows: splash attention on TPU, attention_triton.py on GPU, blocked_attention.py on CPU.
They never write the weights of all pairs of positions, and skip the future half. `jax.nn.dot_product_attention` does
the rest. On a mesh, L is split between the layers and S = L whole within, where heads are split instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moextend_jax.config import DecoderConfig
from moextend_jax.models import attention_triton, blocked_attention
from moextend_jax.models.adapters import Adapted, on_attention
from moextend_jax.models.rope import frequencies
from moextend_jax.models.weights import used
from moextend_jax.parameters import constant, weight
from moextend_jax.sharding import Shards, map_shards, module_shards, platform, shards


class KeysValues(NamedTuple):
    """Rotated keys and values of S positions, as a cache has them: products with a head's read them in one piece. With
    a leading Z where layers are stacked."""

    keys_BKSH: jax.Array
    values_BKSH: jax.Array


class Rotation(NamedTuple):
    """Cosines and sines of each position's angles; h is half of a head's rotated part (H/2 or less)."""

    cos_BLh: jax.Array
    sin_BLh: jax.Array


class HeadNorm(NamedTuple):
    """RMSNorm of queries and keys: the axes of their scales; whole: over all heads of a position together."""

    query: str
    key: str
    whole: bool = False


QK_NORMS: dict[str, HeadNorm | None] = {
    "none": None,
    "head": HeadNorm("H", "H"),
    "whole": HeadNorm("NH", "KH", whole=True),
}
"""TABLE of norms, by `DecoderConfig.qk_norm`."""


class Visible(NamedTuple):
    """What each position sees: `segments_BL` of whole rows (see `segment_mask`), or a mask over the past and these
    positions after it. Splash attention reads segments, so on TPU rows of SPLASH_BLOCK or more have no mask."""

    segments_BL: jax.Array | None = None
    mask_B1LS: jax.Array | None = None

    @classmethod
    def in_rows(cls, segments_BL: jax.Array) -> Visible:
        splash = platform() == "tpu" and segments_BL.shape[1] >= SPLASH_BLOCK
        return cls(segments_BL, None if splash else segment_mask(segments_BL))


class Attention(nnx.Module):
    """Attention of a stack of layers, whose axis has the letter `stack`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: str, stack: str = "Z"):
        sizes, self.config = config.sizes(), config
        self.query = weight(f"{stack}DNH", sizes, rngs=rngs, dtype=dtype)
        self.key = weight(f"{stack}DKH", sizes, rngs=rngs, dtype=dtype)
        self.value = weight(f"{stack}DKH", sizes, rngs=rngs, dtype=dtype)
        self.out = weight(f"{stack}NHD", sizes, rngs=rngs, dtype=dtype)
        biases = {"query_bias": "NH", "key_bias": "KH", "value_bias": "KH"}
        for name, axes in biases.items():
            setattr(self, name, constant(stack + axes, sizes, dtype=dtype, value=0.0) if config.qkv_bias else None)
        self.out_bias = constant(stack + "D", sizes, dtype=dtype, value=0.0) if config.out_bias else None
        self.sinks = constant(stack + "N", sizes, dtype=dtype, value=0.0) if config.sinks else None
        norm = QK_NORMS[config.qk_norm]
        self.query_norm = constant(stack + norm.query, sizes, dtype=dtype, value=1.0) if norm else None
        self.key_norm = constant(stack + norm.key, sizes, dtype=dtype, value=1.0) if norm else None

    def __call__(
        self, x_BLD: jax.Array, rotation: Rotation, visible: Visible, past: KeysValues | None = None, *,
        is_local: jax.Array | bool | None = None, adapted: Sequence[Adapted] = (),
    ) -> tuple[jax.Array, KeysValues]:  # fmt: skip
        """Attends to what is visible of the past (if any) and of these positions; also gives the keys and values of
        these positions, for whoever keeps them.

        Args:
          adapted: low-rank updates of the four maps.
          is_local: whether only the last `local_window` of these are visible; None: no layer is local.
        """
        arrays, splits = module_shards(self)
        x_split = shards("BLd", x_BLD.shape)
        apart = x_split.over("L")  # mesh axes that split positions between the layers
        heads = splits["key"].over("K")  # those that split heads inside; none if the key heads do not divide
        heads = heads if heads == splits["query"].over("N") else ()
        cache_split = Shards("BKSH", (x_split.over("B"), heads, (), ()))
        rows = Shards("B", (x_split.over("B"),))
        lows = [module_shards(of.module.attention) for of in adapted]
        scales, tokens = [of.scale_BL1(x_BLD) for of in adapted], Shards("BL", x_split.split[:2])
        norm = QK_NORMS[self.config.qk_norm]

        def made(name, product, x_BSD, w, more_BSNH):
            """Queries, keys or values: with the update, the bias, the norm and the bound that the family has."""
            made_BSNH = sum(more_BSNH, start=jnp.einsum(product, x_BSD, w[name]))
            if (bias := w.get(f"{name}_bias")) is not None:
                made_BSNH += jnp.broadcast_to(bias, made_BSNH.shape)
            if norm is not None and (scale := w.get(f"{name}_norm")) is not None:
                over = heads if norm.whole else ()
                made_BSNH = norm_of_heads(made_BSNH, scale, eps=self.config.norm_eps, whole=norm.whole, over=over)
            most = self.config.clip_qkv
            return made_BSNH if most is None else jnp.clip(made_BSNH, -most, most)

        # For example tensor 2, L = 8, 32 query and 8 key heads. A device has positions 0 to 3 of its rows, or 4 to 7,
        # and 16 and 4 of the heads. It gathers all 8 positions, attends with its heads, and the scattered sum over
        # "tensor" leaves it with all heads' output at its own 4 positions.
        def local(x_BLD, arrays, rotation, visible, past, is_local, low, scales):
            def in_use(arrays, splits):
                how = {"dtype": x_BLD.dtype, "keep": heads}
                return {name: used(name, leaf, splits[name], **how) for name, leaf in arrays.items()}

            def everywhere(x_BLD):
                return jax.lax.all_gather(x_BLD, apart, axis=1, tiled=True) if apart else x_BLD

            w, low = in_use(arrays, splits), [in_use(own, of[1]) for own, of in zip(low, lows, strict=True)]
            low = on_attention([of.config for of in adapted], low, scales)

            def more(name):
                """What updates add to queries, keys or values: rank r where the tokens are, then at all positions."""
                for leaves, scale_BLr, weigh in low:
                    z_BLr = weigh(jnp.einsum("BLD,Dr->BLr", x_BLD, leaves[f"{name}/a"]), scale_BLr)
                    yield jnp.einsum("BSr,rNH->BSNH", everywhere(z_BLr), leaves[f"{name}/b"])

            x_BSD = everywhere(x_BLD)
            query_BSNH = made("query", "BSD,DNH->BSNH", x_BSD, w, more("query"))
            key_BSKH = made("key", "BSD,DKH->BSKH", x_BSD, w, more("key"))
            if self.config.attention_scale is not None:  # kernels multiply products with keys by 1/sqrt(H)
                query_BSNH *= self.config.attention_scale * self.config.head_size**0.5
            query_BSNH = checkpoint_name(rotate(query_BSNH, rotation), "query")
            key_BSKH = checkpoint_name(rotate(key_BSKH, rotation), "key")
            value_BSKH = checkpoint_name(made("value", "BSD,DKH->BSKH", x_BSD, w, more("value")), "value")
            present = KeysValues(*(jnp.swapaxes(made_BSKH, 1, 2) for made_BSKH in (key_BSKH, value_BSKH)))
            window, sinks_N = None if is_local is None else Window(is_local, self.config.local_window), w.get("sinks")
            if past is None:
                y_BSNH = attend(query_BSNH, key_BSKH, value_BSKH, visible, window=window, sinks_N=sinks_N)
            else:
                y_BSNH = attend_behind(query_BSNH, past, present, visible, window=window, sinks_N=sinks_N)
            y_BLD = own_positions(jnp.einsum("BSNH,NHD->BSD", y_BSNH, w["out"]), apart=apart, heads=heads)
            for leaves, scale_BLr, weigh in low:
                z_BSr = jnp.einsum("BSNH,NHr->BSr", y_BSNH, leaves["out/a"])
                z_BLr = weigh(own_positions(z_BSr, apart=apart, heads=heads), scale_BLr)
                y_BLD += jnp.einsum("BLr,rD->BLD", z_BLr, leaves["out/b"])
            return y_BLD if "out_bias" not in w else y_BLD + w["out_bias"][None, None], present

        # Arguments that are None have no leaves, so their specs are ignored.
        ins = (x_split, splits, rows, rows, cache_split, Shards("", ()), [of[1] for of in lows], tokens)
        run = map_shards(local, ins, (x_split, cache_split))
        return run(x_BLD, arrays, rotation, visible, past, is_local, [of[0] for of in lows], scales)


def norm_of_heads(x_BSNH: jax.Array, scale: jax.Array, *, eps: float, whole: bool, over: tuple[str, ...]) -> jax.Array:
    """RMSNorm of every head, or of all heads of a position together, which lie on the mesh axes `over`."""
    x32_BSNH = x_BSNH.astype(jnp.float32)
    mean = jnp.mean(x32_BSNH**2, axis=(-2, -1) if whole else -1, keepdims=True)
    mean = jax.lax.pmean(mean, over) if over else mean
    return (x32_BSNH * jax.lax.rsqrt(mean + eps)).astype(x_BSNH.dtype) * jnp.broadcast_to(scale, x_BSNH.shape)


def own_positions(y_BSD: jax.Array, *, apart: tuple[str, ...], heads: tuple[str, ...]) -> jax.Array:
    """From a device's own heads at all positions to the sum over all heads at its own positions."""
    if apart and heads:
        return jax.lax.psum_scatter(y_BSD, apart, scatter_dimension=1, tiled=True)
    if apart:
        length = y_BSD.shape[1] // jax.lax.axis_size(apart)
        return jax.lax.dynamic_slice_in_dim(y_BSD, jax.lax.axis_index(apart) * length, length, axis=1)
    return jax.lax.psum(y_BSD, heads) if heads else y_BSD


class Window(NamedTuple):
    """Whether a token of a layer sees only the last `tokens` tokens, itself included; else it sees all earlier ones."""

    is_local: jax.Array | bool
    tokens: int


def attend(
    query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, visible: Visible, *,
    window: Window | None = None, sinks_N: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """`y_BSNH` of whole rows; the kernel by platform."""
    if visible.mask_B1LS is None:
        assert visible.segments_BL is not None
        whole = functools.partial(splash, query_BSNH, key_BSKH, value_BSKH, visible.segments_BL, sinks_N=sinks_N)
        if window is None:
            return whole()
        return jax.lax.cond(window.is_local, functools.partial(whole, window=window.tokens), whole)
    if visible.segments_BL is not None and platform() == "gpu":
        tokens = None if window is None else jnp.where(window.is_local, window.tokens, query_BSNH.shape[1])
        return attention_triton.causal_attention(
            query_BSNH, key_BSKH, value_BSKH, *conversations(visible.segments_BL), window=tokens, sinks_N=sinks_N
        )
    mask_B1LS = visible.mask_B1LS if window is None else _within(window, visible)
    if visible.segments_BL is not None and query_BSNH.shape[1] > blocked_attention.BLOCK and platform() == "cpu":
        return blocked_attention.causal_attention(query_BSNH, key_BSKH, value_BSKH, mask_B1LS, sinks_N)
    bias = None
    if sinks_N is not None:  # one more key that all see, whose logit is a bias and whose value is zero
        key_BSKH, value_BSKH = (jnp.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0))) for array in (key_BSKH, value_BSKH))
        mask_B1LS = jnp.pad(mask_B1LS, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
        bias = jnp.pad(sinks_N[None, :, None, None], ((0, 0), (0, 0), (0, 0), (mask_B1LS.shape[-1] - 1, 0)))
    y_BSNH = jax.nn.dot_product_attention(query_BSNH, key_BSKH, value_BSKH, bias=bias, mask=mask_B1LS)
    return checkpoint_name(y_BSNH, "attended")


def attend_behind(
    query_BLNH: jax.Array, past: KeysValues, present: KeysValues, visible: Visible, *, window: Window | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """`y_BLNH` of positions behind a cache, whose keys and values are multiplied where they lie: joined to those of
    these positions, the whole cache would be copied for each token."""
    mask_B1LS = visible.mask_B1LS if window is None else _within(window, visible)
    assert mask_B1LS is not None
    query_BKGLH = einops.rearrange(query_BLNH, "B L (K G) H -> B K G L H", K=present.keys_BKSH.shape[1])
    parts, product = (past, present), functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = [product("BKGLH,BKSH->BKGLS", query_BKGLH, part.keys_BKSH) for part in parts]
    logits_BKGLS = jnp.concatenate(logits, axis=-1) * query_BLNH.shape[-1] ** -0.5
    logits_BKGLS = jnp.where(mask_B1LS[:, None], logits_BKGLS, jnp.finfo(jnp.float32).min)
    if sinks_N is not None:  # one more key that all see, whose value is zero
        sinks_KG = sinks_N.astype(jnp.float32).reshape(query_BKGLH.shape[1:3])
        sinks_BKGL = jnp.broadcast_to(sinks_KG[None, :, :, None], query_BKGLH.shape[:4])
        logits_BKGLS = jnp.concatenate([logits_BKGLS, sinks_BKGL[..., None]], axis=-1)
    weights_BKGLS = jax.nn.softmax(logits_BKGLS).astype(query_BLNH.dtype)
    split = jnp.split(weights_BKGLS[..., : mask_B1LS.shape[-1]], [past.keys_BKSH.shape[2]], axis=-1)
    of_past, of_present = (
        product("BKGLS,BKSH->BKGLH", weights, part.values_BKSH) for weights, part in zip(split, parts, strict=True)
    )
    return einops.rearrange(of_past + of_present, "B K G L H -> B L (K G) H").astype(query_BLNH.dtype)


def _within(window: Window, visible: Visible) -> jax.Array:
    """The mask of visible keys, limited to the window in a local layer."""
    assert visible.mask_B1LS is not None
    if visible.segments_BL is not None:
        L, S = visible.mask_B1LS.shape[2:]
        away = (jnp.arange(L)[:, None] - jnp.arange(S)[None, :])[None, None]
    else:  # Cache slots are not positions, so a key's distance is the number of visible keys after it.
        away = jnp.flip(jnp.cumsum(jnp.flip(visible.mask_B1LS, -1), axis=-1), -1) - 1
    return visible.mask_B1LS & ((away < window.tokens) | ~jnp.asarray(window.is_local))


SPLASH_BLOCK = 128
"""Splash attention wants rows of a multiple of this: longer ones are padded, shorter ones are left to XLA."""


def splash_block(length: int) -> int:
    """How many positions splash attention takes at a time, in rows that are padded to a multiple of it. The larger the
    faster, as long as padding stays below an eighth of the row or is the same anyway."""
    padded = {size: length + -length % size for size in (512, 256, SPLASH_BLOCK)}
    most = max(1.125 * length, min(padded.values()))
    return next(size for size, whole in padded.items() if whole <= most)


def splash(
    query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, segments_BS: jax.Array, *,
    window: int | None = None, sinks_N: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """JAX's Pallas flash attention for TPU, of rows of any length. Every position, hidden ones too, sees what
    `segment_mask` allows; with a window, only the last `window` positions of that."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = query_BSNH.shape[1]
    block = splash_block(length)
    rest = -length % block
    query_BSNH, key_BSKH, value_BSKH = (
        jnp.pad(array, ((0, 0), (0, rest), (0, 0), (0, 0))) for array in (query_BSNH, key_BSKH, value_BSKH)
    )
    segments_BS = jnp.pad(segments_BS, ((0, 0), (0, rest)))  # 0 is hidden
    B, S, N, H = query_BSNH.shape
    K = key_BSKH.shape[2]
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = masks.CausalMask((S, S)) if window is None else masks.LocalMask((S, S), (window - 1, 0), 0)
    attend_GSH = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (N // K)), block_sizes=sizes,
        residual_checkpoint_name="attended", interpret=platform() != "tpu",
    )  # fmt: skip

    sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)

    def one_row(query_KGSH, key_KSH, value_KSH, reads_S, read_by_S):
        ids = kernels.SegmentIds(reads_S, read_by_S)

        def of_key_head(query_GSH, key_SH, value_SH, sinks_G):
            return attend_GSH(query_GSH, key_SH, value_SH, segment_ids=ids, sinks=sinks_G)

        return jax.vmap(of_key_head)(query_KGSH, key_KSH, value_KSH, sinks_KG)

    query_BKGSH = (query_BSNH * H**-0.5).reshape(B, S, K, N // K, H).transpose(0, 2, 3, 1, 4)
    key_BKSH, value_BKSH = key_BSKH.transpose(0, 2, 1, 3), value_BSKH.transpose(0, 2, 1, 3)
    y_BKGSH = cast(jax.Array, jax.vmap(one_row)(query_BKGSH, key_BKSH, value_BKSH, *conversations(segments_BS)))
    return y_BKGSH.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)[:, :length]


def rotation(positions_BL: jax.Array, config: DecoderConfig) -> Rotation:
    frequency_h, growth = frequencies(config)
    angles_BLh = positions_BL[..., None].astype(jnp.float32) * frequency_h[None, None, :]
    return Rotation(jnp.cos(angles_BLh) * growth, jnp.sin(angles_BLh) * growth)


def rotate(x_BLNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pair (i, i + h) of every head by the position's i-th of h angles (Hugging Face's half-split layout).
    Entries of the head from 2h on are unchanged."""
    cos_BL1h, sin_BL1h = rotation.cos_BLh[:, :, None, :], rotation.sin_BLh[:, :, None, :]
    h = cos_BL1h.shape[-1]
    first, second = jnp.split(x_BLNH[..., : 2 * h].astype(jnp.float32), 2, axis=-1)
    turned = [first * cos_BL1h - second * sin_BL1h, second * cos_BL1h + first * sin_BL1h]
    rest = [x_BLNH[..., 2 * h :].astype(jnp.float32)] if 2 * h < x_BLNH.shape[-1] else []
    return jnp.concatenate(turned + rest, axis=-1).astype(x_BLNH.dtype)


def conversations(segments_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 `[B, L]` twice, `reads` and `read_by`: the conversation whose tokens a position sees, and the one whose
    tokens see it. Position q sees position k <= q where reads[q] == read_by[k].

    Segments ascend along a row; 0 is hidden: padding, or a token that the released code masks. No other position sees
    it. It sees the earlier tokens of the conversation around or before it, or without one only itself. For example

        segments   0   1  1  0  1   2  2  0
        reads     -1   1  1  1  1   2  2  2
        read by   -1   1  1 -4  1   2  2 -8
    """
    segments_BL = jnp.asarray(segments_BL)
    alone_BL = jnp.broadcast_to(-1 - jnp.arange(segments_BL.shape[1], dtype=segments_BL.dtype), segments_BL.shape)
    begun_BL = jax.lax.cummax(segments_BL, axis=1)
    return jnp.where(begun_BL > 0, begun_BL, alone_BL), jnp.where(segments_BL > 0, segments_BL, alone_BL)


def segment_mask(segments_BL: jax.Array) -> jax.Array:
    """bool `[B, 1, L, L]`, queries then keys: what each position of a row sees (`conversations`)."""
    reads_BL, read_by_BL = conversations(segments_BL)
    L = segments_BL.shape[1]
    causal_1LL = jnp.tril(jnp.ones((1, L, L), bool))
    return ((reads_BL[:, :, None] == read_by_BL[:, None, :]) & causal_1LL)[:, None]
