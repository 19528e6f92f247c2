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

from moextend_jax.config import IMAGE, RECIPES, Batch, ExtensionConfig
from moextend_jax.mesh import Program, one_device
from moextend_jax.models.attention import Visible, rotation
from moextend_jax.models.decoder import Extension, added, feed_forward, layer_of, rms_norm
from moextend_jax.models.moextend import MoExtend, shares
from moextend_jax.models.router import Routing, probabilities
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import aux_released, load, losses_of

RELEASED = RECIPES["released"]

Arrays = dict[str, jax.Array]


class Layer(NamedTuple):
    """One layer seen from inside. in_BLD: its input. calibrated_Tk: of a layer with one extension, else None."""

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
        here = {name: of for name, of in model.config.extensions.items() if name in open_to and z in of.layers}
        slots = [_of_layer(model.extensions[name], of, z) for name, of in here.items()]
        moe_out_BLD, routing = feed_forward(
            moe_in_BLD,
            this,
            slots,
            config=model.config,
            extended=[True] * len(here),
            sources=[_sources(of, z) for of in here.values()],
            shares=[open_to[name] for name in here],
        )
        calibrated_Tk = None
        if len(slots) == 1:
            probs_TO = probabilities(routing.logits_TO, config.scores)
            probs_TO = probs_TO + slots[0].router.calibrator.correction(probs_TO)
            calibrated_Tk = jnp.take_along_axis(probs_TO, routing.ids_Tk, axis=-1)
        yield Layer(x_BLD, moe_in_BLD, moe_out_BLD, calibrated_Tk)
        x_BLD = added(between_BLD, moe_out_BLD, config)


def _of_layer(module: Extension, extension: ExtensionConfig, layer: int) -> Extension:
    definition, state = nnx.split(module)
    y = extension.layers.index(layer)
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf[y], state))


def _sources(extension: ExtensionConfig, layer: int) -> jax.Array | None:
    if extension.start != "twin":
        return None
    return jnp.array(extension.sources).reshape(len(extension.layers), -1)[extension.layers.index(layer)]


def _routing(routing: Routing, model: MoExtend) -> dict[str, Any]:
    """A plain layer's columns are those of the pretrained experts, an extended layer's those of the whole model."""
    seen, decoder = {}, model.config.decoder
    for z, (number, has_O) in enumerate(zip(decoder.routed, model.config.has_ZO, strict=True)):
        outputs = len(has_O) if any(has_O[decoder.experts :]) else decoder.experts
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
