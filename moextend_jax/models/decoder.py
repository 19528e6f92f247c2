"""The decoder, plain or with extensions: embeddings `x_BLD` in, final hidden states and all routing out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moextend_jax.config import DecoderConfig, ExtensionConfig, ModelConfig, MoextendError, Quantised
from moextend_jax.models.adapters import Adapted, Adapter
from moextend_jax.models.attention import (
    Attention,
    KeysValues,
    Rotation,
    Visible,
    own_positions,
    rotation,
)
from moextend_jax.models.expert_parallel import mixture
from moextend_jax.models.experts import Experts
from moextend_jax.models.router import NewColumns, Routing
from moextend_jax.models.weights import Stacked, used
from moextend_jax.parameters import constant, weight
from moextend_jax.sharding import constrain, map_shards, module_shards, shards


class SharedExpert(nnx.Module):
    """A SwiGLU that every token passes: `x_BLD -> y_BLD`, weighed by a sigmoid of the token if it has a gate."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: str, axes: str, gate: bool):
        sizes, (stack, D, s) = config.sizes(), axes
        self.w_gate = weight(axes, sizes, rngs=rngs, dtype=dtype)
        self.w_up = weight(axes, sizes, rngs=rngs, dtype=dtype)
        self.w_down = weight(stack + s + D, sizes, rngs=rngs, dtype=dtype)
        self.gate = weight(stack + D, sizes, rngs=rngs, dtype=dtype) if gate else None

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        arrays, splits = module_shards(self)
        x_split = shards("BLd", x_BLD.shape)
        apart, kept = x_split.over("L"), splits["w_gate"].over("sj")

        # As in attention: a device takes its slice of the width for all positions, and is left with its own positions.
        def local(x_BLD, arrays):
            w = {name: used(name, leaf, splits[name], dtype=x_BLD.dtype, keep=kept) for name, leaf in arrays.items()}
            x_BSD = jax.lax.all_gather(x_BLD, apart, axis=1, tiled=True) if apart else x_BLD
            hidden_BSs = jax.nn.silu(jnp.einsum("BSD,Ds->BSs", x_BSD, w["w_gate"]))
            hidden_BSs *= jnp.einsum("BSD,Ds->BSs", x_BSD, w["w_up"])
            if "gate" in w:
                hidden_BSs *= jax.nn.sigmoid(jnp.einsum("BSD,D->BS", x_BSD, w["gate"]))[..., None]
            return own_positions(jnp.einsum("BSs,sD->BSD", hidden_BSs, w["w_down"]), apart=apart, heads=kept)

        return map_shards(local, (x_split, splits), x_split)(x_BLD, arrays)


class MoE(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: str, quantised: Quantised | None = None):
        sizes = config.sizes()
        self.gate = weight("ZDE", sizes, rngs=rngs, dtype="float32" if config.router_float32 else dtype)
        self.gate_bias = constant("ZE", sizes, dtype=dtype, value=0.0) if config.router_bias else None
        # In float32 whatever the rest is in: rounded, it would choose other experts.
        self.selection_bias = constant("ZE", sizes, dtype="float32", value=0.0) if config.selection_bias else None
        self.experts = Experts("ZEDF", sizes, rngs=rngs, dtype=dtype, bias=config.expert_bias, quantised=quantised)


class DecoderLayers(nnx.Module):
    """A stack of layers of one kind, those that route (`Z`) or the dense ones before them (`z`); `run_layers` scans
    over a stack, so a method sees one layer's slice."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: str, stack: Literal["Z", "z"] = "Z",
        quantised: Quantised | None = None,
    ):  # fmt: skip
        sizes = config.sizes()
        self.attention_norm = constant(stack + "D", sizes, dtype=dtype, value=1.0)
        self.attention = Attention(config, rngs=rngs, dtype=dtype, stack=stack)
        self.moe_norm = constant(stack + "D", sizes, dtype=dtype, value=1.0)
        self.moe = MoE(config, rngs=rngs, dtype=dtype, quantised=quantised) if stack == "Z" else None
        axes, gate = ("ZDs", config.shared_gate) if stack == "Z" else ("zDj", False)
        shared = functools.partial(SharedExpert, config, rngs=rngs, dtype=dtype, axes=axes, gate=gate)
        self.shared = shared() if sizes[axes[-1]] else None


class Decoder(nnx.Module):
    """Parameters of the pretrained decoder. The head is None where it is tied to the embedding, and `dense` where all
    layers route."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: str, quantised: Quantised | None = None):
        sizes, self.config = config.sizes(), config
        self.embed = weight("VD", sizes, rngs=rngs, dtype=dtype)
        self.dense = DecoderLayers(config, rngs=rngs, dtype=dtype, stack="z") if config.dense_layers else None
        self.layers = DecoderLayers(config, rngs=rngs, dtype=dtype, quantised=quantised)
        self.norm = constant("D", sizes, dtype=dtype, value=1.0)
        self.head = None if config.tied_head else weight("DV", sizes, rngs=rngs, dtype=dtype)

    @property
    def head_DV(self) -> jax.Array:
        return self.embed[...].T if self.head is None else self.head[...]

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 logits `[B, L, V]`."""
        return logits(self.to_head(hidden_BLD), self.head_DV)

    def to_head(self, hidden_BLD: jax.Array) -> jax.Array:
        """The input of the head: final hidden states, divided by `logits_divisor`."""
        return hidden_BLD if self.config.logits_divisor == 1 else hidden_BLD / self.config.logits_divisor


class Extension(nnx.Module):
    """Everything new: per extended layer X experts, their router columns and one calibrator, stacked over Y."""

    def __init__(
        self, decoder: DecoderConfig, extension: ExtensionConfig, *, rngs: nnx.Rngs, dtype: str, std: float = 1.0,
        experts_dtype: str | None = None,
    ):  # fmt: skip
        sizes = extension.sizes(decoder)
        self.router = NewColumns(decoder, extension, rngs=rngs, dtype=dtype, std=std)
        bias, dtype = decoder.expert_bias, experts_dtype or dtype
        self.new_experts = Experts("YXDf", sizes, rngs=rngs, dtype=dtype, bias=bias)


class Decoded(NamedTuple):
    """hidden_BLD: after the final norm. routing: stacked over Z, T = B*L. keys_values: of these positions, stacked over
    all layers, dense ones first, blocks last. of_blocks: routing of the blocks that run, stacked over them all."""

    hidden_BLD: jax.Array
    routing: Routing
    keys_values: KeysValues
    of_blocks: Routing | None = None


def run_layers(
    decoder: Decoder,
    x_BLD: jax.Array,
    *,
    config: ModelConfig,
    positions_BL: jax.Array,
    visible: Visible,
    extensions: Mapping[str, Extension],
    adapters: Mapping[str, Adapter],
    blocks: Mapping[str, DecoderLayers],
    shares: Mapping[str, jax.Array | None],
    past: KeysValues | None = None,
    real_BL: jax.Array | None = None,
) -> Decoded:
    """Runs each stack of layers in one scan, whose body is compiled once whatever the depth. With blocks, the scan is
    over groups of layers, and one block of every set runs behind each group.

    Args:
      blocks: all of the model's; those that `shares` names run.
      adapters: all of the model's; those that `shares` names run, in layers that route.
      visible: the segments of a batch's rows, or with `past` a mask over both.
      extensions: all of the model's; those that `shares` names run. Without any, the layers run as before extension.
      shares: by name, the log of each token's share [B, L]; None: share 1 for all (`router.route_extended`).
      past: keys and values of earlier positions, stacked over all layers.
      real_BL: tokens that experts compute, None: all. Experts skip the others (padding).
    """
    sizes = config.decoder
    check_length(x_BLD.shape[1] + (past.keys_BKSH.shape[3] if past else 0), sizes)
    layers = _Layers(
        decoder,
        config,
        turns=rotation(positions_BL, sizes),
        visible=visible,
        extensions={name: extensions[name] for name in config.extensions if name in shares},
        adapters={name: adapters[name] for name in config.adapters if name in shares},
        blocks={name: blocks[name] for name in config.blocks if name in shares},
        shares=shares,
        past=past,
        real_BL=real_BL,
    )
    x_BLD, first = constrain(x_BLD, "BLd"), sizes.dense_layers
    local = (jnp.array(sizes.local[:first]), jnp.array(sizes.local[first:])) if sizes.local else (None, None)
    stacks, of_sets, of_blocks = [], {}, None
    if decoder.dense is not None:
        early = _Slices(cached=jnp.arange(first), is_local=local[0])
        x_BLD, (_, keys_values) = layers.scan(decoder.dense, x_BLD, early)
        stacks.append(keys_values)
    slices = layers.slices(is_local=local[1])
    above = config.gradient_from - sizes.routed.start
    if layers.blocks:
        x_BLD, (routing, keys_values), of_sets = layers.scan_groups(x_BLD, slices)
        of_blocks = jax.tree.map(lambda *sets: jnp.concatenate(sets), *(routing for routing, _ in of_sets.values()))
        of_blocks = _numbered(of_blocks, config=config, names=())
    elif above > 0:
        x_BLD, (routing, keys_values) = layers.scan_above(above, x_BLD, slices)
    else:
        x_BLD, (routing, keys_values) = layers.scan(decoder.layers, x_BLD, slices)
    stacks.append(keys_values)
    for name, added_blocks in config.blocks.items():  # sets that do not run keep their place in the cache
        empty = jax.tree.map(
            lambda leaf, n=added_blocks.count: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype), keys_values
        )
        stacks.append(of_sets[name][1] if name in of_sets else empty)
    if len(stacks) > 1:
        keys_values = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    routing = _numbered(routing, config=config, names=tuple(layers.extensions))
    return Decoded(rms_norm(x_BLD, decoder.norm[...], eps=sizes.norm_eps), routing, keys_values, of_blocks)


class _Slices(NamedTuple):
    """What a layer has of its own besides its parameters, stacked over the layers of a scan: its number among those
    that route, its part of each extension and adapter (a dense layer and a block have none), its place in the cache,
    and whether its attention is local."""

    number: Any = None
    slots: Any = ()
    adapters: Any = ()
    cached: Any = None
    is_local: Any = None


class _Layers:
    """What the layers of one forward pass share (of extensions, adapters and blocks those that run), and the scans over
    them. A scan gives `(x_BLD, (Routing, KeysValues))`, the latter two stacked over its layers."""

    def __init__(
        self, decoder: Decoder, config: ModelConfig, *, turns: Rotation, visible: Visible,
        extensions: Mapping[str, Extension], adapters: Mapping[str, Adapter], blocks: Mapping[str, DecoderLayers],
        shares: Mapping[str, jax.Array | None], past: KeysValues | None, real_BL: jax.Array | None,
    ):  # fmt: skip
        self.decoder, self.config, self.turns, self.visible = decoder, config, turns, visible
        self.extensions, self.blocks, self.shares = extensions, blocks, shares
        self.past, self.real_BL = past, real_BL
        routed = config.decoder.routed
        self.slots = tuple(_slots(of, config.extensions[name], routed) for name, of in extensions.items())
        self.adapters = {name: nnx.split(of) for name, of in adapters.items()}

    def slices(self, *, is_local: jax.Array | None) -> _Slices:
        """Those of all layers that route."""
        routed = self.config.decoder.routed
        stacked = tuple(stacked for _, stacked in self.adapters.values())
        scanned = tuple(slot.scanned for slot in self.slots)
        return _Slices(jnp.arange(len(routed)), scanned, stacked, jnp.array(routed), is_local)

    def scan(self, stack: DecoderLayers, x_BLD: jax.Array, slices: _Slices) -> tuple[jax.Array, Any]:
        body, params = self._body(stack)
        return jax.lax.scan(body, x_BLD, (params, slices))

    def scan_above(self, first: int, x_BLD: jax.Array, slices: _Slices) -> tuple[jax.Array, Any]:
        """Runs the layers that route in two scans. The lower one, of the layers before `first`, has no backward pass.
        Both read weights from the whole stacks, since cutting these in two would copy them."""
        definition, params = nnx.split(self.decoder.layers)

        def numbered(slots, x_BLD, own):
            at = own.number
            of_layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False), params)
            return self._layer(definition, slots, x_BLD, (of_layer, own))

        parts = []
        for part, slots in (slice(first), jax.lax.stop_gradient(self.slots)), (slice(first, None), self.slots):
            body = self._remat(functools.partial(numbered, slots))
            x_BLD, given = jax.lax.scan(body, x_BLD, jax.tree.map(lambda leaf, part=part: leaf[part], slices))
            parts.append(given)
        return x_BLD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def scan_groups(self, x_BLD: jax.Array, slices: _Slices) -> tuple[jax.Array, Any, dict[str, Any]]:
        """Runs the layers that route in groups, with a block of each set behind every group. Also returns, by set, what
        its blocks gave."""
        body, params = self._body(self.decoder.layers)
        bodies, own_params = zip(*map(self._body, self.blocks.values()), strict=True)
        (count,) = {self.config.blocks[name].count for name in self.blocks}
        groups = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), (params, slices))
        counts = [of.count for of in self.config.blocks.values()]
        starts = dict(
            zip(self.config.blocks, itertools.accumulate([self.config.decoder.layers, *counts]), strict=False)
        )
        cached = tuple(starts[name] + jnp.arange(count) for name in self.blocks)

        def group(x_BLD, of_group):
            (params, own), of_sets, places = of_group
            x_BLD, of_layers = jax.lax.scan(body, x_BLD, (params, own))
            is_local, made = jax.tree.map(lambda leaf: leaf[-1], own.is_local), []
            for name, run, params, place in zip(self.blocks, bodies, of_sets, places, strict=True):
                y_BLD, given = run(x_BLD, (params, _Slices(cached=place, is_local=is_local)))
                x_BLD = passed(x_BLD, y_BLD, self.shares[name])
                made.append(given)
            return x_BLD, (of_layers, tuple(made))

        x_BLD, (of_layers, of_sets) = jax.lax.scan(group, x_BLD, (groups, own_params, cached))
        of_layers = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), of_layers)
        return x_BLD, of_layers, dict(zip(self.blocks, of_sets, strict=True))

    def _body(self, stack: DecoderLayers) -> tuple[Any, Any]:
        """What runs a layer of a stack, and the stack's parameters."""
        definition, params = nnx.split(stack)
        return self._remat(functools.partial(self._layer, definition, self.slots)), params

    def _remat(self, body: Any) -> Any:
        if self.config.remat == "layer":
            policy = jax.checkpoint_policies.save_only_these_names(*self.config.saved)
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return body

    def _layer(self, definition: Any, slots: tuple[_Slots, ...], x_BLD: jax.Array, of_layer: tuple[Any, _Slices]):
        """`x_BLD -> (x_BLD, (Routing, KeysValues))`, the body of every scan."""
        params, own = of_layer
        config, sizes, shares = self.config, self.config.decoder, self.shares
        this: DecoderLayers = nnx.merge(definition, params)
        adapted = [
            Adapted(name, config.adapters[name], nnx.merge(graph, stored), shares[name])
            for (name, (graph, _)), stored in zip(
                self.adapters.items() if own.adapters else (), own.adapters, strict=True
            )
        ]
        here = [slot.of_layer(part) for slot, part in zip(slots if own.slots else (), own.slots, strict=True)]

        def attend(x_BLD, past):
            normed_BLD = rms_norm(x_BLD, this.attention_norm[...], eps=sizes.norm_eps)
            return this.attention(normed_BLD, self.turns, self.visible, past, is_local=own.is_local, adapted=adapted)

        if config.remat == "attention":
            attend = jax.checkpoint(attend)
        with jax.named_scope("attention"):
            past = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, own.cached, keepdims=False), self.past)
            y_BLD, present = attend(x_BLD, past)
            x_BLD = checkpoint_name(constrain(added(x_BLD, y_BLD, sizes), "BLd"), "middle")
        normed_BLD = rms_norm(x_BLD, this.moe_norm[...], eps=sizes.norm_eps)
        y_BLD, routing = feed_forward(
            normed_BLD,
            this,
            here,
            config=config,
            extended=[part.extended for part in own.slots],
            sources=[part.sources_X for part in own.slots],
            shares=[shares[name] for name in self.extensions],
            real_BL=self.real_BL,
            adapted=adapted,
            stacked=() if own.number is None else self._frozen(own.number, [part.row for part in own.slots]),
        )
        return constrain(added(x_BLD, y_BLD, sizes), "BLd"), (routing, present)

    def _frozen(self, number: jax.Array, rows: Sequence[jax.Array]) -> tuple[Stacked | None, ...]:
        """A layer's place in the stacks of frozen experts: pretrained ones, then each extension's; None: not frozen."""
        assert self.decoder.layers.moe is not None
        which = self.config.frozen_experts
        pretrained = None if which == "none" else Stacked(self.decoder.layers.moe.experts, number)
        new = [Stacked(of.new_experts, row) for of, row in zip(self.extensions.values(), rows, strict=True)]
        return pretrained, *(new if which == "all" else [None] * len(new))


def passed(x_BLD: jax.Array, y_BLD: jax.Array, share_BL: jax.Array | None) -> jax.Array:
    """The output of an inserted block with input x and output y: x + share * (y - x). `share_BL` is the log of each
    token's share; exactly y where the share is 1, exactly x where it is 0. None: y."""
    if share_BL is None:
        return y_BLD
    share_BL1 = share_BL[..., None]
    part_BLD = x_BLD + jnp.exp(share_BL1).astype(x_BLD.dtype) * (y_BLD - x_BLD)
    return jnp.where(share_BL1 == 0, y_BLD, jnp.where(jnp.isneginf(share_BL1), x_BLD, part_BLD))


def layer_of(decoder: Decoder, number: int) -> DecoderLayers:
    """One layer's slice of its stack."""
    first = decoder.config.dense_layers
    stack, at = (decoder.layers, number - first) if number >= first else (decoder.dense, number)
    definition, params = nnx.split(stack)
    return cast(DecoderLayers, nnx.merge(definition, jax.tree.map(lambda leaf: leaf[at], params)))


def added(x_BLD: jax.Array, y_BLD: jax.Array, config: DecoderConfig) -> jax.Array:
    """The residual stream behind a block."""
    return x_BLD + (y_BLD if config.residual_factor == 1 else y_BLD * config.residual_factor)


def feed_forward(
    x_BLD: jax.Array, layer: DecoderLayers, slots: Sequence[Any], **options: Any
) -> tuple[jax.Array, Routing]:
    """`x_BLD -> (y_BLD, Routing)`: the experts that tokens choose (`mixture`, which takes `options`), plus the shared
    expert. A dense layer has only an expert that all tokens pass, and no routing."""
    y_BLD, routing = mixture(x_BLD, layer.moe, slots, **options) if layer.moe is not None else (None, None)
    if layer.shared is not None:
        with jax.named_scope("shared"):
            of_all_BLD = layer.shared(x_BLD)
        y_BLD = of_all_BLD if y_BLD is None else y_BLD + of_all_BLD
    return cast(jax.Array, y_BLD), cast(Routing, routing)


def _numbered(routing: Routing, *, config: ModelConfig, names: tuple[str, ...]) -> Routing:
    """Routing in which only the extensions `names` ran, widened to the columns of the whole model. Columns of the other
    extensions are -inf, and no token has chosen them."""
    if names == tuple(config.extensions):
        return routing
    columns = [*range(config.decoder.experts), *(n for name in names for n in config.columns(name))]

    def widened(narrow: jax.Array) -> jax.Array:
        wide = jnp.full((*narrow.shape[:-1], config.outputs), -jnp.inf, narrow.dtype)
        return wide.at[..., jnp.array(columns)].set(narrow)

    number = jnp.array([*columns, config.outputs])  # the last is the id for "no expert", which padding has
    selection_TO = None if routing.selection_TO is None else widened(routing.selection_TO)
    ids_Tk = number[routing.ids_Tk].astype(routing.ids_Tk.dtype)
    return routing._replace(logits_TO=widened(routing.logits_TO), ids_Tk=ids_Tk, selection_TO=selection_TO)


def check_length(length: int, sizes: DecoderConfig) -> None:
    """Raises MoextendError where a sliding window, which is not computed here, would hide tokens of such a row."""
    if sizes.window is not None and length > sizes.window:
        raise MoextendError(
            f"rows of {length} tokens: the model was made for a sliding window of {sizes.window} (sliding_window in "
            "its config.json), which is not computed here: up to that length it makes no difference. Set shorter rows, "
            "or if the window is a mistake, as in early Mixtral files, write null there"
        )


def logits(hidden_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits; any axes may stand before D."""
    return jnp.einsum("...D,DV->...V", hidden_BLD, head_DV.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32)


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, *, eps: float) -> jax.Array:
    x32_BLD = x_BLD.astype(jnp.float32)
    x32_BLD = x32_BLD * jax.lax.rsqrt(jnp.mean(x32_BLD**2, axis=-1, keepdims=True) + eps)
    return x32_BLD.astype(x_BLD.dtype) * scale_D.astype(x_BLD.dtype)[None, None, :]


class _Scanned(NamedTuple):
    """What the scan takes of an extension for each layer: whether the layer has it, its row y of the stacked leaves,
    and of twins their sources. All stacked over Z outside of the layer."""

    extended: Any
    row: Any
    sources_X: Any


class _Slots(NamedTuple):
    """An extension as the layers read it. stored: its leaves [Y, ...]."""

    definition: Any
    stored: Any
    scanned: _Scanned

    def of_layer(self, own: _Scanned) -> Extension:
        """The extension in the layer whose part of `scanned` is `own`; anything where the layer does not have it."""
        leaves = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, own.row, keepdims=False), self.stored)
        return nnx.merge(self.definition, leaves)


def _slots(extension: Extension, config: ExtensionConfig, routed: range) -> _Slots:
    """Where each of the layers that route finds its part of an extension.

    For example layers 1 and 3 of four are extended, so Y = 2:

        row_Z = 0 0 0 1,  extended_Z = no yes no yes

    They are read at that row inside the scan: nothing is copied for layers that do not have them, however many
    extensions there are. A plain layer reads some row, whose experts no token can choose: no rows, hence no FLOPs. The
    transpose of `dynamic_index_in_dim` adds to that row of a gradient in place (`train/step.summed`).
    """
    Y = len(config.layers)
    rows_Z = jnp.full(len(routed), Y).at[jnp.array(config.layers) - routed.start].set(jnp.arange(Y))
    definition, state = nnx.split(extension)
    extended_Z = rows_Z < Y
    here_Z = jnp.where(extended_Z, rows_Z, 0)
    sources_ZX = jnp.array(config.sources).reshape(Y, -1)[here_Z] if config.start == "twin" else None
    return _Slots(definition, state, _Scanned(extended_Z, here_Z, sources_ZX))
