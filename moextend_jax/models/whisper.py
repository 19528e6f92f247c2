"""Whisper's encoder as a tower: log-mel spectrograms mel_nbl in, states x_nPC of 50 positions a second out (n sounds).

Radford et al. 2022 (2212.04356), as `transformers` writes it: two convolutions over time, of which the second halves
it, fixed sinusoids, pre-norm layers with exact GELU and no bias on keys, and a norm after the last layer.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.config import WhisperConfig
from moextend_jax.models.vision import LayerNorm, Layers, gelu, run_layers
from moextend_jax.parameters import constant, weight


def sizes_of(config: WhisperConfig) -> dict[str, int]:
    """Sizes of the letters of the tower's leaves. A convolution's kernel has w frames; c is C as its input, so that no
    letter stands twice."""
    return {**config.sizes(), "w": 3, "c": config.width}


class WhisperTower(nnx.Module):
    """Whisper's encoder: a call gives states x_nPC at `config.feature_layer`, -1 after the last layer and its norm.

    It hears `config.seconds`: `position` has their P rows, the first of the 1500 (30 seconds) that a published file
    has. With fewer, layers see a shorter sequence than they were trained on, without the silence that fills up 30
    seconds there, and give other states: of tiny.en on a tone of 3 seconds the cosine to those of the whole window is
    0.99 with 20 seconds, 0.97 with 10, 0.93 with 5. Cost falls with P. Train and ask with the same `seconds`.
    """

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = sizes_of(config)
        self.config = config
        self.first = weight("wbC", sizes, rngs=rngs, dtype=dtype)
        self.first_bias = constant("C", sizes, dtype=dtype, value=0.0)
        self.second = weight("wcC", sizes, rngs=rngs, dtype=dtype)
        self.second_bias = constant("C", sizes, dtype=dtype, value=0.0)
        self.position = nnx.Param(jnp.asarray(sinusoids(config.patches, config.width), dtype), axes="PC")
        self.layers = Layers(config, activation="gelu", key_bias=False, rngs=rngs, dtype=dtype)
        self.post_norm = LayerNorm("", sizes, eps=config.norm_eps, dtype=dtype)

    def __call__(self, mel_nbl: jax.Array) -> jax.Array:
        return self.hidden_state(mel_nbl, layer=self.config.feature_layer)

    def hidden_state(self, mel_nbl: jax.Array, *, layer: int) -> jax.Array:
        """Hidden state x_nPC: 0 is the input of the first layer, U or -1 the last output, and that one alone has
        passed the norm; layers above do not run."""
        depth = range(self.config.layers + 1)[layer]
        with jax.named_scope("whisper_tower"):
            x_nPC = run_layers(self, mel_nbl, axes="nbl", depth=depth)
            return self.post_norm(x_nPC) if depth == self.config.layers else x_nPC

    def embed(self, mel_nbl: jax.Array) -> jax.Array:
        x_nlb = einops.rearrange(mel_nbl, "n b l -> n l b").astype(self.first.dtype)
        x_nlC = gelu(convolve(x_nlb, self.first[...], stride=1) + self.first_bias[None, None])
        x_nPC = gelu(convolve(x_nlC, self.second[...], stride=2) + self.second_bias[None, None])
        return x_nPC + self.position[None]


def convolve(x_nlc: jax.Array, kernel_wcC: jax.Array, *, stride: int) -> jax.Array:
    """Over frames, with one of zeros before and after: `[n, l, c] -> [n, l / stride, C]`."""
    axes = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x_nlc, kernel_wcC, (stride,), [(1, 1)], dimension_numbers=axes)


def sinusoids(positions: int, width: int) -> np.ndarray:
    """Whisper's positions [P, C]: sines in the first half of C, cosines in the other, wavelengths up to 10,000 * 2 pi.
    A file stores them; these are for a tower that no file gives."""
    rates = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(positions)[:, None] * rates[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
