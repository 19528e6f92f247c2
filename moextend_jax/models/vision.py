"""Vision tower: images_nhwc in, patch features x_nPC out (n images); and the layers that towers have in common.

It is the ViT of CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023) and DINOv2 (Oquab et al. 2023) as `transformers`
writes them, its layers stacked on the leading axis U; `VisionConfig` says in what they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import VisionConfig, WhisperConfig
from moextend_jax.models.weights import used
from moextend_jax.parameters import constant, weight, with_arrays
from moextend_jax.sharding import Shards, map_shards, module_shards, platform, shards

Sizes = Mapping[str, int]


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32; `stack` is "" or the letter of stacked layers."""

    def __init__(self, stack: str, sizes: Sizes, *, eps: float, dtype: str):
        self.eps = eps
        self.scale = constant(stack + "C", sizes, dtype=dtype, value=1.0)
        self.bias = constant(stack + "C", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        x32_nQC = x_nQC.astype(jnp.float32)
        mean_nQ1 = jnp.mean(x32_nQC, axis=-1, keepdims=True)
        variance_nQ1 = jnp.mean(jnp.square(x32_nQC - mean_nQ1), axis=-1, keepdims=True)
        y_nQC = (x32_nQC - mean_nQ1) * jax.lax.rsqrt(variance_nQ1 + self.eps)
        return (y_nQC * self.scale[None, None] + self.bias[None, None]).astype(x_nQC.dtype)


EVEN = 64
"""GPU products want rows in multiples of this, and heads of a power of two: for 577 positions, a prime, and for sums
over heads of 72 XLA's compiler finds no tiles."""


class Attention(nnx.Module):
    """Multi-head attention with biases (optional for keys): every position of x sees every position of `seen`."""

    def __init__(self, stack: str, sizes: Sizes, *, key_bias: bool = True, rngs: nnx.Rngs, dtype: str):
        self.query = weight(stack + "CNH", sizes, rngs=rngs, dtype=dtype)
        self.query_bias = constant(stack + "NH", sizes, dtype=dtype, value=0.0)
        self.key = weight(stack + "CNH", sizes, rngs=rngs, dtype=dtype)
        self.key_bias = constant(stack + "NH", sizes, dtype=dtype, value=0.0) if key_bias else None
        self.value = weight(stack + "CNH", sizes, rngs=rngs, dtype=dtype)
        self.value_bias = constant(stack + "NH", sizes, dtype=dtype, value=0.0)
        self.out = weight(stack + "NHC", sizes, rngs=rngs, dtype=dtype)
        self.out_bias = constant(stack + "C", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array, seen_nPC: jax.Array, *, real: int | None = None) -> jax.Array:
        """real: only the first `real` positions are seen, later ones are padding; None: all."""
        lengths_n = None if real is None else jnp.full(len(x_nQC), real)
        q_nQNH = jnp.einsum("nQC,CNH->nQNH", x_nQC, self.query[...]) + self.query_bias[None, None]
        k_nPNH = jnp.einsum("nPC,CNH->nPNH", seen_nPC, self.key[...])
        if self.key_bias is not None:
            k_nPNH = k_nPNH + self.key_bias[None, None]
        v_nPNH = jnp.einsum("nPC,CNH->nPNH", seen_nPC, self.value[...]) + self.value_bias[None, None]
        H = q_nQNH.shape[-1]
        short = (1 << (H - 1).bit_length()) - H if platform() == "gpu" else 0
        q_nQNH, k_nPNH, v_nPNH = (jnp.pad(x, [(0, 0)] * 3 + [(0, short)]) for x in (q_nQNH, k_nPNH, v_nPNH))
        y_nQNH = jax.nn.dot_product_attention(
            q_nQNH, k_nPNH, v_nPNH, key_value_seq_lengths=lengths_n, scale=H**-0.5
        )  # fmt: skip
        out_NHC = jnp.pad(self.out[...], ((0, 0), (0, short), (0, 0)))
        return jnp.einsum("nQNH,NHC->nQC", y_nQNH, out_NHC) + self.out_bias[None, None]


class MLP(nnx.Module):
    """Linear, an activation, Linear."""

    def __init__(self, stack: str, sizes: Sizes, *, activation: str, rngs: nnx.Rngs, dtype: str):
        self.activation = activation
        self.up = weight(stack + "CJ", sizes, rngs=rngs, dtype=dtype)
        self.up_bias = constant(stack + "J", sizes, dtype=dtype, value=0.0)
        self.down = weight(stack + "JC", sizes, rngs=rngs, dtype=dtype)
        self.down_bias = constant(stack + "C", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        h_nQJ = jnp.einsum("nQC,CJ->nQJ", x_nQC, self.up[...]) + self.up_bias[None, None]
        h_nQJ = ACTIVATIONS[self.activation](h_nQJ)
        return jnp.einsum("nQJ,JC->nQC", h_nQJ, self.down[...]) + self.down_bias[None, None]


class SwiGLU(nnx.Module):
    """A gated MLP with biases: silu of one linear map times another (axis g), then a third."""

    def __init__(self, stack: str, sizes: Sizes, *, rngs: nnx.Rngs, dtype: str):
        self.up = weight(stack + "CgJ", sizes, rngs=rngs, dtype=dtype)
        self.up_bias = constant(stack + "gJ", sizes, dtype=dtype, value=0.0)
        self.down = weight(stack + "JC", sizes, rngs=rngs, dtype=dtype)
        self.down_bias = constant(stack + "C", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        h_nQgJ = jnp.einsum("nQC,CgJ->nQgJ", x_nQC, self.up[...]) + self.up_bias[None, None]
        h_nQJ = jax.nn.silu(h_nQgJ[:, :, 0]) * h_nQgJ[:, :, 1]
        return jnp.einsum("nQJ,JC->nQC", h_nQJ, self.down[...]) + self.down_bias[None, None]


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_pytorch_tanh": jax.nn.gelu}
"""By what transformers calls them; jax.nn.gelu is the approximation by tanh."""


class Layers(nnx.Module):
    """All U layers, stacked; a call on the state sliced to one u runs that layer.

    Args:
      gated: with a SwiGLU, else with an MLP of this activation. scaled: with LayerScale.
    """

    def __init__(
        self, config: VisionConfig | WhisperConfig, *, activation: str, key_bias: bool = True, gated: bool = False,
        scaled: bool = False, rngs: nnx.Rngs, dtype: str,
    ):  # fmt: skip
        sizes, eps = config.sizes(), config.norm_eps
        self.attention_norm = LayerNorm("U", sizes, eps=eps, dtype=dtype)
        self.attention = Attention("U", sizes, key_bias=key_bias, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm("U", sizes, eps=eps, dtype=dtype)
        self.mlp = None if gated else MLP("U", sizes, activation=activation, rngs=rngs, dtype=dtype)
        self.swiglu = SwiGLU("U", sizes, rngs=rngs, dtype=dtype) if gated else None
        self.attention_scale = constant("UC", sizes, dtype=dtype, value=1.0) if scaled else None
        self.mlp_scale = constant("UC", sizes, dtype=dtype, value=1.0) if scaled else None

    def __call__(self, x_nQC: jax.Array, *, real: int | None = None) -> jax.Array:
        y_nQC = self.attention_norm(x_nQC)
        x_nQC = x_nQC + _times(self.attention(y_nQC, y_nQC, real=real), self.attention_scale)
        mlp: Any = self.swiglu or self.mlp
        return x_nQC + _times(mlp(self.mlp_norm(x_nQC)), self.mlp_scale)


def _times(y_nQC: jax.Array, scale_C: nnx.Param | None) -> jax.Array:
    return y_nQC if scale_C is None else y_nQC * scale_C[None, None]


def run_layers(tower: Any, inputs: jax.Array, *, axes: str, depth: int) -> jax.Array:
    """States x_nQC after the first `depth` layers of a tower that has `embed` and `layers`. Every device runs its own
    inputs, which have these axes, with a layer's weights gathered while it runs. Trained leaves with a wider dtype than
    the inputs are cast to that of the inputs."""
    arrays, splits = module_shards(tower)
    own = shards(axes, inputs.shape)

    def narrower(leaf: jax.Array) -> Any:
        return min(leaf.dtype, inputs.dtype, key=lambda kind: kind.itemsize)

    def local(inputs, arrays):
        here = {path: leaf if path.startswith("layers/") else used(path, leaf, splits[path], dtype=narrower(leaf))
                for path, leaf in arrays.items()}  # fmt: skip

        def run(x_nQC: jax.Array, one_layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            layer = {path: used(path, leaf, splits[f"layers/{path}"].without_first(), dtype=narrower(leaf))
                     for path, leaf in one_layer.items()}  # fmt: skip
            return with_arrays(tower.layers, layer)(x_nQC, real=positions if short else None), None

        stacked = (path for path in arrays if path.startswith("layers/"))
        below_U = {path.removeprefix("layers/"): here[path][:depth] for path in stacked}
        x_nQC = with_arrays(tower, here).embed(inputs)
        positions = x_nQC.shape[1]
        short = -positions % EVEN if platform() == "gpu" else 0
        return jax.lax.scan(run, jnp.pad(x_nQC, ((0, 0), (0, short), (0, 0))), below_U)[0][:, :positions]

    return map_shards(local, (own, splits), Shards("nQc", (own.split[0], (), ())))(inputs, arrays)


class VisionTower(nnx.Module):
    """A vision transformer: a call gives patch features x_nPC at `config.feature_layer`.

    Layers above the feature layer are kept, so that a file round-trips, but never run.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = config.sizes()
        self.config = config
        self.patch = weight("WC", sizes, rngs=rngs, dtype=dtype)
        self.patch_bias = constant("C", sizes, dtype=dtype, value=0.0) if config.patch_bias else None
        self.class_token = weight("C", sizes, rngs=rngs, dtype=dtype) if config.class_token else None
        self.registers = weight("rC", sizes, rngs=rngs, dtype=dtype) if config.registers else None
        self.position = weight("QC", sizes, rngs=rngs, dtype=dtype)
        self.pre_norm = LayerNorm("", sizes, eps=config.norm_eps, dtype=dtype) if config.pre_norm else None
        self.layers = Layers(
            config, activation=config.activation, gated=config.gated, scaled=config.layer_scale, rngs=rngs, dtype=dtype
        )
        self.post_norm = LayerNorm("", sizes, eps=config.norm_eps, dtype=dtype)

    def __call__(self, images_nhwc: jax.Array) -> jax.Array:
        return self.hidden_state(images_nhwc, layer=self.config.feature_layer)[:, -self.config.patches :]

    def hidden_state(self, images_nhwc: jax.Array, *, layer: int) -> jax.Array:
        """Hidden state x_nQC, registers between class token and patches: 0 is the input of the first layer, U or -1 the
        last output, which has not passed the final norm; layers above do not run."""
        depth = range(self.config.layers + 1)[layer]
        with jax.named_scope("vision_tower"):
            return run_layers(self, images_nhwc, axes="nhwc", depth=depth)

    def embed(self, images_nhwc: jax.Array) -> jax.Array:
        p, seen = self.config.patch_size, self.config.grid * self.config.patch_size
        pixels_nPW = einops.rearrange(images_nhwc[:, :seen, :seen], "n (y h) (x w) c -> n (y x) (h w c)", h=p, w=p)
        x_nQC = jnp.einsum("nPW,WC->nPC", pixels_nPW.astype(self.patch.dtype), self.patch[...])
        if self.patch_bias is not None:
            x_nQC = x_nQC + self.patch_bias[None, None]
        if self.class_token is not None:
            x_nQC = jnp.concatenate([_of_all(self.class_token[None], x_nQC), x_nQC], axis=1)
        x_nQC = x_nQC + self.position[None]
        if self.registers is not None:  # they have no positions
            before = int(self.config.class_token)
            parts = x_nQC[:, :before], _of_all(self.registers[...], x_nQC), x_nQC[:, before:]
            x_nQC = jnp.concatenate(parts, axis=1)
        return x_nQC if self.pre_norm is None else self.pre_norm(x_nQC)


def _of_all(tokens_rC: jax.Array, x_nQC: jax.Array) -> jax.Array:
    """The same tokens for each of n images."""
    return jnp.broadcast_to(tokens_rC[None], (x_nQC.shape[0], *tokens_rC.shape))
