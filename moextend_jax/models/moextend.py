"""The whole model: a `Batch` of text and images in, hidden states, routing and keys/values out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moextend_jax.config import IGNORE, Batch, ModelConfig
from moextend_jax.models.attention import KeysValues, Visible
from moextend_jax.models.mixtral import Decoded, Extension, Mixtral, run_layers
from moextend_jax.models.vision import Projector, VisionTower
from moextend_jax.parameters import arrays_of
from moextend_jax.sharding import constrain


class MoExtend(nnx.Module):
    """Pretrained decoder, and where configured a vision tower with its projector and an extension."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, calibrator_std: float = 1.0):
        self.config = config
        self.decoder = Mixtral(config.decoder, rngs=rngs, dtype=config.dtype)
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=config.dtype) if config.vision else None
        self.projector = _projector(config, rngs) if config.vision else None
        self.extension = (
            Extension(config.decoder, config.extension, rngs=rngs, dtype=config.train_dtype, std=calibrator_std)
            if config.extension
            else None
        )

    def __call__(self, batch: Batch, *, skip_padding: bool = False) -> Decoded:
        """Final hidden states of every position; `self.decoder.logits` turns them into logits.

        Args:
          skip_padding: padding costs no expert (`needed`); what comes out there is then not what PyTorch has there.
        """
        return self.decode(
            self.embed(batch),
            positions_BL=batch.positions_BL,
            visible=Visible.in_rows(batch.segments_BL),
            real_BL=needed(batch) if skip_padding else None,
            sighted_BL=sighted(batch),
        )

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings `[B, L, D]` with projected image features in the places that `patches_BL` names."""
        x_BLD = jnp.take(self.decoder.embed[...], batch.ids_BL, axis=0).astype(self.config.dtype)
        if batch.images_BMhwc is None and batch.features_BMPC is None:
            return x_BLD
        image_BpD = self.project(batch)
        index_BL1 = jnp.maximum(batch.patches_BL, 0)[..., None]
        spliced_BLD = jnp.take_along_axis(image_BpD, index_BL1, axis=1)
        return jnp.where((batch.patches_BL >= 0)[..., None], spliced_BLD, x_BLD)

    def project(self, batch: Batch) -> jax.Array:
        """Visual tokens `[B, M*P, D]` of the rows' images."""
        assert self.projector is not None
        features_BMPC = batch.features_BMPC
        if features_BMPC is None:
            assert self.vision is not None
            B, M, *image = batch.images_BMhwc.shape
            with jax.named_scope("vision"):
                features_BMPC = self.vision(batch.images_BMhwc.reshape(B * M, *image).astype(self.config.dtype))
                features_BMPC = features_BMPC.reshape(B, M, *features_BMPC.shape[1:])
        B, M, P, C = features_BMPC.shape
        with jax.named_scope("projector"):
            image_nPD = self.projector(features_BMPC.reshape(B * M, P, C).astype(self.config.dtype))
        # The projector computes in its own dtype.
        return constrain(image_nPD.astype(self.config.dtype).reshape(B, M * P, -1), "BSd")

    def decode(
        self,
        x_BLD: jax.Array,
        *,
        positions_BL: jax.Array,
        visible: Visible,
        past: KeysValues | None = None,
        real_BL: jax.Array | None = None,
        sighted_BL: jax.Array | None = None,
    ) -> Decoded:
        """Runs the layers on embeddings.

        Args:
          past, real_BL: see `run_layers`.
          sighted_BL: tokens whose conversation has an image (`sighted`), None: no token. Only "strict" text isolation
            reads it. What no image belongs to then runs through the same program as before the extension: equal bit
            for bit, which another program's roundings are not.
        """
        strict = self.config.text_isolation == "strict"
        extension = None if strict and sighted_BL is None else self.extension
        decoded = run_layers(
            self.decoder,
            x_BLD,
            config=self.config,
            positions_BL=positions_BL,
            visible=visible,
            extension=extension,
            past=past,
            real_BL=real_BL,
            sighted_BL=sighted_BL if strict else None,
        )
        if extension is self.extension:
            return decoded
        assert self.config.extension is not None
        absent = ((0, 0), (0, 0), (0, self.config.extension.new_experts))
        logits_ZTO = jnp.pad(decoded.routing.logits_TO, absent, constant_values=-jnp.inf)
        return decoded._replace(routing=decoded.routing._replace(logits_TO=logits_ZTO))


def needed(batch: Batch) -> jax.Array:
    """`[B, L]`: tokens of conversations, and padding whose output is read because a label follows it."""
    return (batch.segments_BL > 0) | (targets(batch.labels_BL) != IGNORE)


def targets(labels_BL: jax.Array) -> jax.Array:
    """`[B, L]`: what each position predicts, its next one's label."""
    return jnp.pad(labels_BL[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def sighted(batch: Batch) -> jax.Array | None:
    """`[B, L]`: whether a token's conversation, its segment of the row, has an image; None for a batch of text."""
    if batch.images_BMhwc is None and batch.features_BMPC is None:
        return None
    segments_BL, here_BL = jnp.asarray(batch.segments_BL), jnp.asarray(batch.patches_BL) >= 0
    B, L = segments_BL.shape
    row_B1 = jnp.arange(B)[:, None]
    seen_BS = jnp.zeros((B, L + 1), bool).at[row_B1, segments_BL].max(here_BL)
    return seen_BS[row_B1, segments_BL]


def _projector(config: ModelConfig, rngs: nnx.Rngs) -> Projector:
    assert config.vision is not None
    return Projector(sizes={"C": config.vision.width, "D": config.decoder.width}, rngs=rngs, dtype=config.train_dtype)


def fresh_projector(config: ModelConfig, key: jax.Array) -> dict[str, jax.Array]:
    """A projector's leaves as training starts from them, by their paths in the model ("projector/first", ...).

    Makes nothing else of the model. On a mesh, each device its own part:
    `jax.jit(functools.partial(fresh_projector, config), out_shardings=those of these paths)(key)`.
    """
    return {f"projector/{path}": leaf for path, leaf in arrays_of(_projector(config, nnx.Rngs(key))).items()}


@functools.cache
def abstract(config: ModelConfig) -> MoExtend:
    """The model's structure without arrays; one object for all who ask for these sizes, so nobody may write to it."""
    return nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
