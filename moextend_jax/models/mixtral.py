"""The Mixtral decoder, plain or extended: embeddings `x_BLD` in, final hidden states and routing of all layers out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moextend_jax.config import DecoderConfig, ExtensionConfig, ModelConfig, MoextendError
from moextend_jax.models.attention import Attention, KeysValues, Rotation, Visible, rotation, save_these
from moextend_jax.models.expert_parallel import mixture
from moextend_jax.models.experts import Experts
from moextend_jax.models.router import NewColumns, Routing
from moextend_jax.parameters import constant, weight
from moextend_jax.sharding import constrain


class MoE(nnx.Module):
    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str):
        self.gate = weight("ZDE", sizes, rngs=rngs, dtype=dtype)
        self.experts = Experts("ZEDF", sizes, rngs=rngs, dtype=dtype)


class DecoderLayers(nnx.Module):
    """All layers, stacked over Z; `run_layers` scans over them, so a method sees one layer's slice."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: str):
        self.attention_norm = constant("ZD", sizes, dtype=dtype, value=1.0)
        self.attention = Attention(sizes, rngs=rngs, dtype=dtype)
        self.moe_norm = constant("ZD", sizes, dtype=dtype, value=1.0)
        self.moe = MoE(sizes, rngs=rngs, dtype=dtype)


class Mixtral(nnx.Module):
    """Parameters of the pretrained decoder. The head is None where it is tied to the embedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: str):
        sizes = config.sizes()
        self.embed = weight("VD", sizes, rngs=rngs, dtype=dtype)
        self.layers = DecoderLayers(sizes, rngs=rngs, dtype=dtype)
        self.norm = constant("D", sizes, dtype=dtype, value=1.0)
        self.head = None if config.tied_head else weight("DV", sizes, rngs=rngs, dtype=dtype)

    @property
    def head_DV(self) -> jax.Array:
        return self.embed[...].T if self.head is None else self.head[...]

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 logits `[B, L, V]`."""
        return logits(hidden_BLD, self.head_DV)


class Extension(nnx.Module):
    """Everything new: per extended layer X experts, their router columns and one calibrator, stacked over Y."""

    def __init__(self, decoder: DecoderConfig, extension: ExtensionConfig, *, rngs: nnx.Rngs, dtype: str, std: float):
        sizes = {**decoder.sizes(), **extension.sizes()}
        self.router = NewColumns(decoder, extension, rngs=rngs, dtype=dtype, std=std)
        self.new_experts = Experts("YXDf", sizes, rngs=rngs, dtype=dtype)


class Decoded(NamedTuple):
    """hidden_BLD: after the final norm. routing: stacked over Z, T = B*L. keys_values: of these positions, over Z."""

    hidden_BLD: jax.Array
    routing: Routing
    keys_values: KeysValues


def run_layers(
    decoder: Mixtral,
    x_BLD: jax.Array,
    *,
    config: ModelConfig,
    positions_BL: jax.Array,
    visible: Visible,
    extension: Extension | None = None,
    past: KeysValues | None = None,
    real_BL: jax.Array | None = None,
    sighted_BL: jax.Array | None = None,
) -> Decoded:
    """Runs all layers in one scan, whose body is compiled once whatever the depth.

    Args:
      visible: the segments of a batch's rows, or with `past` a mask over both.
      extension: None runs the layers as they were before it, also where `config` has one.
      past: keys and values of earlier positions, stacked over Z.
      real_BL: tokens that experts compute, None: all. The others (padding) pass the experts by.
      sighted_BL: tokens that may choose new experts, None: all.
    """
    sizes = config.decoder
    check_length(x_BLD.shape[1] + (past.keys_BSKH.shape[2] if past else 0), sizes)
    turns = rotation(positions_BL, head_size=sizes.head_size, theta=sizes.rope_theta)
    layer_def, layers = nnx.split(decoder.layers)
    if extension is None or config.extension is None:
        extension_def, slots, extended_Z = None, None, jnp.zeros(sizes.layers, bool)
    else:
        extension_def, state = nnx.split(extension)
        slots, extended_Z = _one_slot_per_layer(state, config.extension.layers, sizes.layers, dtype=x_BLD.dtype)

    def layer(x_BLD, layer_slice):
        params, extension_slice, extended, past = layer_slice
        this: DecoderLayers = nnx.merge(layer_def, params)
        new = None if extension_def is None else nnx.merge(extension_def, extension_slice)

        def attend(x_BLD, past):
            normed_BLD = rms_norm(x_BLD, this.attention_norm[...], eps=sizes.norm_eps)
            return this.attention(normed_BLD, turns, visible, past)

        if config.remat == "attention":
            attend = jax.checkpoint(attend)
        with jax.named_scope("attention"):
            y_BLD, present = attend(x_BLD, past)
            x_BLD = checkpoint_name(constrain(x_BLD + y_BLD, "BLd"), "middle")
        normed_BLD = rms_norm(x_BLD, this.moe_norm[...], eps=sizes.norm_eps)
        y_BLD, routing = mixture(
            normed_BLD,
            this.moe,
            new,
            extended=extended,
            config=config,
            real_BL=real_BL,
            sighted_BL=sighted_BL if new else None,
        )
        return constrain(x_BLD + y_BLD, "BLd"), (routing, present)

    if config.remat == "layer":
        layer = jax.checkpoint(layer, prevent_cse=False, policy=save_these(config.saved))
    x_BLD = constrain(x_BLD, "BLd")
    x_BLD, (routing, keys_values) = jax.lax.scan(layer, x_BLD, (layers, slots, extended_Z, past))
    return Decoded(rms_norm(x_BLD, decoder.norm[...], eps=sizes.norm_eps), routing, keys_values)


def check_length(length: int, sizes: DecoderConfig) -> None:
    """Raises MoextendError where a sliding window, which is not computed here, would hide tokens of such a row."""
    if sizes.window is not None and length > sizes.window:
        raise MoextendError(
            f"rows of {length} tokens: the model was made for a sliding window of {sizes.window} (sliding_window in "
            "its config.json), and here every token sees all before it, which up to that length is the same; take "
            "shorter rows, or where the window is a mistake, as in early Mixtral files, write null there"
        )


def logits(hidden_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits; any axes may stand before D."""
    return jnp.einsum("...D,DV->...V", hidden_BLD, head_DV.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32)


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, *, eps: float) -> jax.Array:
    x32_BLD = x_BLD.astype(jnp.float32)
    x32_BLD = x32_BLD * jax.lax.rsqrt(jnp.mean(x32_BLD**2, axis=-1, keepdims=True) + eps)
    return x32_BLD.astype(x_BLD.dtype) * scale_D.astype(x_BLD.dtype)[None, None, :]


def _one_slot_per_layer(state: nnx.State, extended_layers: tuple[int, ...], layers: int, *, dtype: Any):
    """Extension leaves `[Y, ...]` spread to `[Z, ...]`, zeros on plain layers, as inputs of the scan.

    One scan over all layers with zeros is cheaper than it looks: an unchosen expert gets no rows, hence no FLOPs,
    and the body stays one program without branches, which collectives of a mesh could not cross. Experts are spread
    in the dtype they compute in. For example layers 1 and 3 of four are extended, so Y = 2:

        slot_Z = 2 0 2 1            (2 is past the end of Y)
        leaf_Y = a b  ->  leaf_Z = 0 a 0 b,  extended_Z = no yes no yes
    """
    slot_Z = jnp.full(layers, len(extended_layers)).at[jnp.array(extended_layers)].set(jnp.arange(len(extended_layers)))

    def spread(path, param: nnx.Param):
        leaf = param[...].astype(dtype) if "new_experts" in path else param[...]
        leaf = constrain(jnp.take(leaf, slot_Z, axis=0, mode="fill", fill_value=0), param.axes)
        return param.replace(leaf)

    flat = [(path, spread(path, param)) for path, param in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat), slot_Z < len(extended_layers)


__all__ = ["Decoded", "Extension", "Mixtral", "Rotation", "logits", "mixture", "rms_norm", "run_layers"]
