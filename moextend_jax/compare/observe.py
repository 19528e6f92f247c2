"""Everything inside a forward pass, by the names that reference files use: (arrays, batch) -> {name: array}.

Routing, logits and losses are those of the model as it trains. Hidden states and what goes into and out of the
experts of each layer come from running the same parts one layer after another, because the model's scan keeps neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.config import IMAGE, RECIPES, Batch
from moextend_jax.mesh import Program, one_device
from moextend_jax.models.attention import Visible, rotation
from moextend_jax.models.decoder import added, feed_forward, layer_of, rms_norm
from moextend_jax.models.moextend import MoExtend, shares
from moextend_jax.models.router import Routing, probabilities
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import aux_released, load, losses_of

RELEASED = RECIPES["released"]

Arrays = dict[str, jax.Array]


class Layer(NamedTuple):
    """One layer seen from inside. in_BLD: its input. calibrated_Tk: None in a plain layer."""

    in_BLD: jax.Array
    moe_in_BLD: jax.Array
    moe_out_BLD: jax.Array
    calibrated_Tk: jax.Array | None


Observe = Callable[[Arrays, Batch], dict[str, Any]]


def observer(structure: MoExtend, *, aux_coefficient: float, inside: bool) -> Observe:
    """A compiled forward pass; `inside` also runs layer by layer for `hidden_states`, `moe_in` and the like."""
    config = structure.config

    def run(arrays: Arrays, batch: Batch) -> dict[str, Any]:
        model = with_arrays(structure, arrays)
        decoded = model(batch)
        losses = losses_of(decoded, model, batch, recipe=RELEASED, aux_coefficient=aux_coefficient, chunk=64)
        everyone = load(decoded.routing, jnp.ones(batch.ids_BL.size, bool), scores=config.decoder.scores)
        seen: dict[str, Any] = {
            "logits": model.decoder.logits(decoded.hidden_BLD),
            "loss_total": losses.total,
            "loss_ce": losses.ce,
            "loss_aux": losses.aux,
            "loss_aux_nomask": aux_released(everyone, config=config),
            **_routing(decoded.routing, model),
            **_images(model, batch),
        }
        if inside and not (config.adapters or config.blocks):  # `layer_by_layer` runs neither
            for z, layer in enumerate(layer_by_layer(model, batch)):
                seen |= {f"hidden_states/{z}": layer.in_BLD, f"moe_in/{z}": layer.moe_in_BLD}
                seen |= {f"moe_out/{z}": layer.moe_out_BLD}
                if layer.calibrated_Tk is not None:
                    seen[f"topk_calibrated/{z}"] = layer.calibrated_Tk
            seen[f"hidden_states/{config.decoder.layers}"] = decoded.hidden_BLD
        return seen

    program = Program(run, mesh=one_device())  # where `open_checkpoint` puts the arrays
    return lambda arrays, batch: {name: np.asarray(array) for name, array in program(arrays, batch).items()}


def layer_by_layer(model: MoExtend, batch: Batch) -> Iterator[Layer]:
    """The layers of `models.decoder.run_layers`, from the same parts, with what passes between them."""
    config = model.config.decoder
    turns = rotation(batch.positions_BL, config)
    visible = Visible.in_rows(batch.segments_BL)
    x_BLD, open_to = model.embed(batch), shares(batch, model.config)
    for z in range(config.layers):
        this = layer_of(model.decoder, z)
        normed_BLD = rms_norm(x_BLD, this.attention_norm[...], eps=config.norm_eps)
        attended_BLD, _ = this.attention(normed_BLD, turns, visible, is_local=config.local[z] if config.local else None)
        between_BLD = added(x_BLD, attended_BLD, config)
        moe_in_BLD = rms_norm(between_BLD, this.moe_norm[...], eps=config.norm_eps)
        new = _extension_of(model, z) if open_to else None
        moe_out_BLD, routing = feed_forward(
            moe_in_BLD,
            this,
            [new] if new else [],
            config=model.config,
            extended=[True] if new else [],
            sources=_sources_of(model, z) if new else [],
            shares=list(open_to.values()) if new else [],
        )
        calibrated_Tk = None
        if new is not None:
            probs_TO = probabilities(routing.logits_TO, config.scores)
            probs_TO = probs_TO + new.router.calibrator.correction(probs_TO)
            calibrated_Tk = jnp.take_along_axis(probs_TO, routing.ids_Tk, axis=-1)
        yield Layer(x_BLD, moe_in_BLD, moe_out_BLD, calibrated_Tk)
        x_BLD = added(between_BLD, moe_out_BLD, config)


def _extension_of(model: MoExtend, layer: int):
    extension = model.config.extension
    if extension is None or layer not in extension.layers:
        return None
    (module,) = model.extensions.values()
    definition, state = nnx.split(module)
    y = extension.layers.index(layer)
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf[y], state))


def _sources_of(model: MoExtend, layer: int) -> list[jax.Array | None]:
    extension = model.config.extension
    if extension is None or extension.start != "twin":
        return [None]
    return [jnp.array(extension.sources).reshape(len(extension.layers), -1)[extension.layers.index(layer)]]


def _routing(routing: Routing, model: MoExtend) -> dict[str, Any]:
    seen, decoder = {}, model.config.decoder
    for z, (number, outputs) in enumerate(zip(decoder.routed, model.config.outputs_Z, strict=True)):
        logits_TO, ids_Tk = routing.logits_TO[z], routing.ids_Tk[z]
        probs_TO = probabilities(logits_TO, decoder.scores)
        seen |= {
            f"router_logits/{number}": logits_TO[:, :outputs],
            f"chosen_by/{number}": routing.chosen_by_TO[z][:, :outputs],
            f"topk_idx/{number}": ids_Tk,
            f"topk_prob/{number}": jnp.take_along_axis(probs_TO, ids_Tk, axis=-1),
            f"topk_weight/{number}": routing.weights_Tk[z],
        }
    return seen


def _images(model: MoExtend, batch: Batch) -> dict[str, Any]:
    """`clip_patch_features` and `image_features` of every image slot [B*M, P, ...], empty slots included."""
    if IMAGE not in batch.media:
        return {}
    images_BMhwc, module = batch.media[IMAGE], model.media[IMAGE]
    assert module.tower is not None
    B, M, *image = images_BMhwc.shape
    features_nPC = module.tower(images_BMhwc.reshape(B * M, *image).astype(model.config.dtype))
    return {"clip_patch_features": features_nPC, "image_features": module.projector(features_nPC)}
