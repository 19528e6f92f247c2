"""The whole model: a `Batch` of text and media in, hidden states, routing and keys/values out."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import (
    IGNORE,
    IMAGE,
    AdapterConfig,
    Added,
    Batch,
    Medium,
    ModelConfig,
    TowerConfig,
    VisionConfig,
    WhisperConfig,
    first_places,
)
from moextend_jax.models.adapters import Adapter
from moextend_jax.models.attention import KeysValues, Visible
from moextend_jax.models.blocks import make_blocks
from moextend_jax.models.decoder import Decoded, Decoder, Extension, run_layers
from moextend_jax.models.projectors import join_frames, make_projector
from moextend_jax.models.vision import VisionTower
from moextend_jax.models.whisper import WhisperTower
from moextend_jax.models.woven import fused
from moextend_jax.parameters import arrays_of
from moextend_jax.sharding import constrain, items_to_add

TOWERS: dict[type[TowerConfig], Any] = {VisionConfig: VisionTower, WhisperConfig: WhisperTower}
"""TABLE of towers by their sizes' class: a call gives features x_nPC. `FeaturesConfig` has none."""

Shares = dict[str, jax.Array | None]
"""By extension, adapter or block set: the log of its share for tokens, or rows; None: share 1. Others do not run."""


class MediumModule(nnx.Module):
    """What reads a medium: its tower (None where features come from elsewhere) and its projector."""

    def __init__(self, medium: Medium, config: ModelConfig, *, rngs: nnx.Rngs):
        tower = TOWERS.get(type(medium.tower))
        self.tower = tower(medium.tower, rngs=rngs, dtype=config.dtype) if tower else None
        self.projector = _projector(medium, config, rngs)


class MoExtend(nnx.Module):
    """Pretrained decoder, and where configured what reads its media, its extensions and its adapters."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=config.dtype, quantised=config.quantised)
        self.media = nnx.Dict({name: MediumModule(medium, config, rngs=rngs) for name, medium in config.media.items()})
        self.extensions = nnx.Dict(
            {
                name: Extension(
                    config.decoder,
                    added,
                    rngs=rngs,
                    dtype=config.train_dtype,
                    # What experts compute in, so that frozen ones are stored at that size.
                    experts_dtype=config.train_dtype if added.trains else config.dtype,
                )
                for name, added in config.extensions.items()
            }
        )

        own, frozen = config.train_dtype, config.dtype
        self.adapters = nnx.Dict(
            {name: Adapter(config.decoder, added, rngs=rngs, dtype=own) for name, added in config.adapters.items()}
        )
        self.blocks = nnx.Dict(
            {
                name: make_blocks(config.decoder, added, rngs=rngs, dtype=own if added.trains else frozen)
                for name, added in config.blocks.items()
            }
        )

    def __call__(self, batch: Batch, *, skip_padding: bool = False) -> Decoded:
        """Final hidden states of every position; `self.decoder.logits` turns them into logits.

        Args:
          skip_padding: experts skip padding (`needed`), so outputs there differ from PyTorch's.
        """
        return self.decode(
            self.embed(batch),
            positions_BL=batch.positions_BL,
            visible=Visible.in_rows(batch.segments_BL),
            real_BL=needed(batch) if skip_padding else None,
            shares=shares(batch, self.config),
        )

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings `[B, L, D]` with projected features in the places that `places_BL` names, and added where
        `fused` does."""
        x_BLD = jnp.take(self.decoder.embed[...], batch.ids_BL, axis=0).astype(self.config.dtype)
        if batch.names:
            tokens = [self.project(batch, name) for name in self.config.media if name in batch.names]
            tokens_BiD = tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens, axis=1)
            x_BLD = jnp.where((batch.places_BL >= 0)[..., None], _at(tokens_BiD, batch.places_BL), x_BLD)
            added = [jnp.where((at >= 0)[..., None], _at(tokens_BiD, at), 0) for at in batch.fused.values()]
            if added:
                x_BLD = fused(x_BLD, sum(added[1:], start=added[0]))
        factor = self.config.decoder.embed_factor
        return x_BLD if factor == 1 else x_BLD * factor

    def project(self, batch: Batch, name: str) -> jax.Array:
        """Tokens `[B, M*P, D]` of the rows' items of a medium."""
        medium, module = self.config.media[name], self.media[name]
        items = batch.features[name] if name in batch.features else batch.media[name]
        B, M = items.shape[:2]
        if more := items_to_add(B, M):
            items = jnp.pad(items, ((0, 0), (0, more), *[(0, 0)] * (items.ndim - 2)))
        features_BMPC = items  # cached ones, or else:
        if name not in batch.features:
            with jax.named_scope(name):
                items = items.reshape(-1, *items.shape[2:])
                features_nPC = tower_features(module.tower, medium, items, self.config.dtype)
            features_BMPC = features_nPC.reshape(B, M + more, *features_nPC.shape[1:])
        P, C = features_BMPC.shape[2:]
        frames = medium.frames
        with jax.named_scope("projector"):
            features_nPC = features_BMPC.reshape(-1, P // frames, C).astype(self.config.dtype)
            others = (self.media[other].projector for other in medium.projector.others)
            tokens_npD = module.projector(features_nPC, *others)
            tokens_npD = join_frames(tokens_npD, frames=frames, join=medium.join)
        # The projector computes in its own dtype.
        tokens_BMpD = tokens_npD.astype(self.config.dtype).reshape(B, M + more, *tokens_npD.shape[1:])[:, :M]
        return constrain(tokens_BMpD.reshape(B, -1, tokens_BMpD.shape[-1]), "BSd")

    def decode(
        self,
        x_BLD: jax.Array,
        *,
        positions_BL: jax.Array,
        visible: Visible,
        shares: Shares,
        past: KeysValues | None = None,
        real_BL: jax.Array | None = None,
    ) -> Decoded:
        """Runs the layers on embeddings.

        Args:
          past, real_BL: see `run_layers`.
          shares: of the batch (`shares`). Extensions that it does not name are left out of the compiled program:
            batches without their medium run the same program as before the extension was added, and give the same bits.
        """
        return run_layers(
            self.decoder,
            x_BLD,
            config=self.config,
            positions_BL=positions_BL,
            visible=visible,
            extensions=self.extensions,
            adapters=self.adapters,
            blocks=self.blocks,
            shares=shares,
            past=past,
            real_BL=real_BL,
        )


def tower_features(tower: Any, medium: Medium, items: jax.Array, dtype: Any) -> jax.Array:
    """Features `[n, P, C]` of items `[n, ...]` as data prepares them; of a video those of its frames one after another.
    Items of a medium without a tower are features already."""
    if tower is None:
        return items
    n = len(items)
    if medium.kind == "video":
        items = items.reshape(-1, *items.shape[2:])
    features_nPC = tower(items.astype(dtype))
    return features_nPC.reshape(n, -1, features_nPC.shape[-1])


def needed(batch: Batch) -> jax.Array:
    """`[B, L]`: tokens of conversations, and padding whose output is read because a label follows it."""
    return (batch.segments_BL > 0) | (targets(batch.labels_BL) != IGNORE)


def targets(labels_BL: jax.Array) -> jax.Array:
    """`[B, L]`: what each position predicts, its next one's label."""
    return jnp.pad(labels_BL[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def shares(batch: Batch, config: ModelConfig) -> Shares:
    """The extensions, adapters and blocks that tokens of a batch may use, with the log of each token's share `[B, L]`.

    With strict text isolation, a token may use those of the media in its conversation (its segment of the row). For
    "decoupled" see `config.ModelConfig.composition`. The names depend only on the media that the batch has, so that
    batches with the same media run one program.
    """
    strict, open_to = config.text_isolation == "strict", {}
    for name in running(config, batch.names):
        added = config.added[name]
        log_share, tokens = math.log(added.share), _tokens(added)
        inside_BL, is_text_BL = _inside(batch, config, added.medium), jnp.asarray(batch.places_BL) < 0
        if tokens == "items":  # closed to all others
            open_to[name] = jnp.where(inside_BL, 0.0, -jnp.inf)
        elif tokens == "text":
            open_to[name] = jnp.where(is_text_BL & (not strict or _near(batch, inside_BL)), log_share, -jnp.inf)
        elif config.composition == "decoupled":
            open_to[name] = jnp.where(inside_BL, 0.0, jnp.where(is_text_BL & (not strict), log_share, -jnp.inf))
        elif strict:
            open_to[name] = jnp.where(_near(batch, inside_BL), log_share, -jnp.inf)
        else:
            open_to[name] = jnp.full(batch.ids_BL.shape, log_share) if log_share else None
    return open_to


def running(config: ModelConfig, media: frozenset[str]) -> list[str]:
    """The extensions, adapters and blocks that run for a batch with items of these media."""
    strict = config.text_isolation == "strict"
    return [name for name, of in config.added.items() if of.share and not (strict and of.medium not in media)]


def _tokens(added: Added) -> str:
    return added.tokens if isinstance(added, AdapterConfig) else "all"


def shares_of_text(batch: Batch, config: ModelConfig) -> Shares:
    """`shares` `[B]` for generated text, which continues the only conversation of each row."""
    if config.composition == "decoupled":
        texts = share_of_text(config, batch.names)
        return {name: jnp.full(len(batch.ids_BL), share) for name, share in texts.items() if share is not None}
    return {
        name: None if of_BL is None else of_BL.max(axis=1)
        for name, of_BL in shares(batch, config).items()
        if _tokens(config.added[name]) != "items"
    }


def share_of_text(config: ModelConfig, media: frozenset[str]) -> dict[str, float | None]:
    """`shares` of text behind items of exactly these media, as numbers: -inf if it may not use one; None: share 1."""
    strict, open_to = config.text_isolation == "strict", {}
    for name in running(config, media):
        added = config.added[name]
        if (tokens := _tokens(added)) != "items":
            decoupled = config.composition == "decoupled" and tokens == "all"
            share = -math.inf if decoupled and strict else math.log(added.share)
            open_to[name] = share if share or decoupled or strict else None
    return open_to


def _at(tokens_BiD: jax.Array, places_BL: jax.Array) -> jax.Array:
    """The token in each place `[B, L, D]`; any where there is none."""
    return jnp.take_along_axis(tokens_BiD, jnp.maximum(places_BL, 0)[..., None], axis=1)


def _inside(batch: Batch, config: ModelConfig, medium: str) -> jax.Array:
    """`[B, L]`: whether a token is one of an item of this medium, or one that such a token is added to."""
    if medium in batch.fused:
        return jnp.asarray(batch.fused[medium]) >= 0
    items = {**batch.media, **batch.features}
    rooms = {name: of.room(items[name].shape[1]) for name, of in config.media.items() if name in items}
    if medium not in rooms:
        return jnp.zeros(batch.ids_BL.shape, bool)
    first, places_BL = first_places(rooms)[medium], jnp.asarray(batch.places_BL)
    return (places_BL >= first) & (places_BL < first + rooms[medium].items * rooms[medium].tokens)


def _near(batch: Batch, inside_BL: jax.Array) -> jax.Array:
    """`[B, L]`: whether a token's conversation has a token that is `inside`."""
    segments_BL = jnp.asarray(batch.segments_BL)
    B, L = segments_BL.shape
    row_B1 = jnp.arange(B)[:, None]
    seen_BS = jnp.zeros((B, L + 1), bool).at[row_B1, segments_BL].max(inside_BL)
    return seen_BS[row_B1, segments_BL]


def _projector(medium: Medium, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    sizes = medium.tower.sizes()
    return make_projector(
        medium.projector, C=sizes["C"], P=sizes["P"], D=config.decoder.width, rngs=rngs, dtype=config.train_dtype
    )


def fresh_projector(config: ModelConfig, key: jax.Array, *, medium: str = IMAGE) -> dict[str, jax.Array]:
    """A projector's initial leaves, by their paths in the model ("media/image/projector/first").

    Nothing else of the model is made. On a mesh, this makes each device's own part there:
    `jax.jit(functools.partial(fresh_projector, config), out_shardings=those of these paths)(key)`.
    """
    leaves = arrays_of(_projector(config.media[medium], config, nnx.Rngs(key)))
    return {f"media/{medium}/projector/{path}": leaf for path, leaf in leaves.items()}


def fresh_adapter(key: jax.Array, *, config: ModelConfig, name: str) -> dict[str, jax.Array]:
    """An adapter's initial leaves, by their paths in the model. They do not change what the model computes."""
    made = Adapter(config.decoder, config.adapters[name], rngs=nnx.Rngs(key), dtype=config.train_dtype)
    return {f"adapters/{name}/{path}": leaf for path, leaf in arrays_of(made).items()}


@functools.cache
def abstract(config: ModelConfig) -> MoExtend:
    """The model's structure without arrays; one object for all who ask for these sizes, so nobody may write to it."""
    return nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
