"""CLIP vision tower and projector: images_nhwc in, patch features x_nPC and visual tokens x_nPD out (n images).

The tower is CLIP's ViT (Radford et al. 2021) as `transformers` writes it, its layers stacked on the leading axis U;
the projector is the paper's (LLaVA-1.5's): Linear, GELU, Linear.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import VisionConfig
from moextend_jax.parameters import constant, weight, with_arrays
from moextend_jax.sharding import Shards, gather, map_shards, module_shards, shards


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32; `stack` is "" or "U" for stacked layers."""

    def __init__(self, stack: str, config: VisionConfig, *, dtype: str):
        self.eps = config.norm_eps
        self.scale = constant(stack + "C", config.sizes(), dtype=dtype, value=1.0)
        self.bias = constant(stack + "C", config.sizes(), dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        x32_nQC = x_nQC.astype(jnp.float32)
        mean_nQ1 = jnp.mean(x32_nQC, axis=-1, keepdims=True)
        variance_nQ1 = jnp.mean(jnp.square(x32_nQC - mean_nQ1), axis=-1, keepdims=True)
        y_nQC = (x32_nQC - mean_nQ1) * jax.lax.rsqrt(variance_nQ1 + self.eps)
        return (y_nQC * self.scale[None, None] + self.bias[None, None]).astype(x_nQC.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with biases; every position sees every other."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = config.sizes()
        self.query = weight("UCNH", sizes, rngs=rngs, dtype=dtype)
        self.query_bias = constant("UNH", sizes, dtype=dtype, value=0.0)
        self.key = weight("UCNH", sizes, rngs=rngs, dtype=dtype)
        self.key_bias = constant("UNH", sizes, dtype=dtype, value=0.0)
        self.value = weight("UCNH", sizes, rngs=rngs, dtype=dtype)
        self.value_bias = constant("UNH", sizes, dtype=dtype, value=0.0)
        self.out = weight("UNHC", sizes, rngs=rngs, dtype=dtype)
        self.out_bias = constant("UC", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        q_nQNH = jnp.einsum("nQC,CNH->nQNH", x_nQC, self.query[...]) + self.query_bias[None, None]
        k_nQNH = jnp.einsum("nQC,CNH->nQNH", x_nQC, self.key[...]) + self.key_bias[None, None]
        v_nQNH = jnp.einsum("nQC,CNH->nQNH", x_nQC, self.value[...]) + self.value_bias[None, None]
        y_nQNH = jax.nn.dot_product_attention(q_nQNH, k_nQNH, v_nQNH)
        return jnp.einsum("nQNH,NHC->nQC", y_nQNH, self.out[...]) + self.out_bias[None, None]


class MLP(nnx.Module):
    """Linear, CLIP's activation, Linear."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = config.sizes()
        self.activation = config.activation
        self.up = weight("UCJ", sizes, rngs=rngs, dtype=dtype)
        self.up_bias = constant("UJ", sizes, dtype=dtype, value=0.0)
        self.down = weight("UJC", sizes, rngs=rngs, dtype=dtype)
        self.down_bias = constant("UC", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        h_nQJ = jnp.einsum("nQC,CJ->nQJ", x_nQC, self.up[...]) + self.up_bias[None, None]
        h_nQJ = ACTIVATIONS[self.activation](h_nQJ)
        return jnp.einsum("nQJ,JC->nQC", h_nQJ, self.down[...]) + self.down_bias[None, None]


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class Layers(nnx.Module):
    """All U layers, stacked; a call on the state sliced to one u runs that layer."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str):
        self.attention_norm = LayerNorm("U", config, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm("U", config, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x_nQC: jax.Array) -> jax.Array:
        x_nQC = x_nQC + self.attention(self.attention_norm(x_nQC))
        return x_nQC + self.mlp(self.mlp_norm(x_nQC))


class VisionTower(nnx.Module):
    """CLIP's vision transformer: a call gives patch features x_nPC at `config.feature_layer`.

    Layers above the feature layer are kept, so that a file round-trips, but never run.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = config.sizes()
        self.config = config
        self.patch = weight("WC", sizes, rngs=rngs, dtype=dtype)
        self.class_token = weight("C", sizes, rngs=rngs, dtype=dtype)
        self.position = weight("QC", sizes, rngs=rngs, dtype=dtype)
        self.pre_norm = LayerNorm("", config, dtype=dtype)
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.post_norm = LayerNorm("", config, dtype=dtype)

    def __call__(self, images_nhwc: jax.Array) -> jax.Array:
        return self.hidden_state(images_nhwc, layer=self.config.feature_layer)[:, 1:]

    def pooled(self, images_nhwc: jax.Array) -> jax.Array:
        """The class token of the last layer after the final norm, x_nC: what contrastive training reads."""
        return self.post_norm(self.hidden_state(images_nhwc, layer=-1)[:, :1])[:, 0]

    def hidden_state(self, images_nhwc: jax.Array, *, layer: int) -> jax.Array:
        """Hidden state x_nQC: 0 is the input of the first layer, U or -1 the last output; layers above do not run."""
        depth = range(self.config.layers + 1)[layer]
        arrays, splits = module_shards(self)
        images = shards("nhwc", images_nhwc.shape)

        def local(images_nhwc, arrays):
            """Every device its own images, with a layer's weights gathered while it runs."""
            here = {path: leaf if path.startswith("layers/") else gather(leaf, splits[path])
                    for path, leaf in arrays.items()}  # fmt: skip

            def run(x_nQC: jax.Array, one_layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
                whole = {
                    path: gather(leaf, splits[f"layers/{path}"].without_first()) for path, leaf in one_layer.items()
                }
                return with_arrays(self.layers, whole)(x_nQC), None

            stacked = (path for path in arrays if path.startswith("layers/"))
            below_U = {path.removeprefix("layers/"): here[path][:depth] for path in stacked}
            return jax.lax.scan(run, with_arrays(self, here).embed(images_nhwc), below_U)[0]

        with jax.named_scope("vision_tower"):
            run = map_shards(local, (images, splits), Shards("nQc", (images.split[0], (), ())))
            return run(images_nhwc, arrays)

    def embed(self, images_nhwc: jax.Array) -> jax.Array:
        p = self.config.patch_size
        pixels_nPW = einops.rearrange(images_nhwc, "n (y h) (x w) c -> n (y x) (h w c)", h=p, w=p)
        x_nPC = jnp.einsum("nPW,WC->nPC", pixels_nPW.astype(self.patch.dtype), self.patch[...])
        class_n1C = jnp.broadcast_to(self.class_token[None, None], (x_nPC.shape[0], 1, x_nPC.shape[2]))
        x_nQC = jnp.concatenate([class_n1C, x_nPC], axis=1) + self.position[None]
        return self.pre_norm(x_nQC)


class Projector(nnx.Module):
    """Patch features x_nPC to visual tokens x_nPD: Linear(C, D), exact GELU, Linear(D, D)."""

    def __init__(self, *, sizes: dict[str, int], rngs: nnx.Rngs, dtype: str):
        """`sizes` holds C (tower) and D (decoder); d is D as an input axis, so that no letter stands twice."""
        sizes = {**sizes, "d": sizes["D"]}
        # The spread of PyTorch's Linear, from which LLaVA's and the released projector start.
        self.first = weight("Cd", sizes, rngs=rngs, dtype=dtype, std=(3 * sizes["C"]) ** -0.5)
        self.first_bias = constant("d", sizes, dtype=dtype, value=0.0)
        self.second = weight("dD", sizes, rngs=rngs, dtype=dtype, std=(3 * sizes["D"]) ** -0.5)
        self.second_bias = constant("D", sizes, dtype=dtype, value=0.0)

    def __call__(self, x_nPC: jax.Array) -> jax.Array:
        arrays, splits = module_shards(self)
        images = Shards("nPc", (shards("n", x_nPC.shape).split[0], (), ()))

        def local(x_nPC, arrays):
            w = {name: gather(leaf, splits[name]) for name, leaf in arrays.items()}
            h_nPd = gelu(jnp.einsum("nPC,Cd->nPd", x_nPC, w["first"]) + w["first_bias"][None, None])
            return jnp.einsum("nPd,dD->nPD", h_nPd, w["second"]) + w["second_bias"][None, None]

        return map_shards(local, (images, splits), images)(x_nPC, arrays)
