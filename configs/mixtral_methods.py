"""Mixtral-8x7B with a rival's addition in place of MoExtend's, each with its own published settings.

    moextend run mixtral_methods:lora --workdir DIR --base MIXTRAL_FOLDER --vision CLIP_FOLDER \\
        --config.manual_dir=LLAVA_FOLDER
    moextend plan mixtral_methods:mole --stage finetune --topology v5p:4x4x4

Data, batches, schedule and mesh are those of `mixtral_8x7b`, so that methods differ in what they add. Arguments:

    lora       LLaVA-1.5's LoRA of attention and of every expert
    qlora      QLoRA's, over experts in four bits (nf4 there, int4 here)
    mole       LLaVA-MoLE: three LoRAs for the experts' maps, one of them for each token
    moram      MoRAM, as on TRACE: atoms of rank one beside attention's maps
    damc       DAMC: a LoRA for the tokens of pictures and one for text
    blocks     LLaMA-Pro: two layers more, about as many parameters as MoExtend's new experts
    dymoe      LLaVA-DyMoE's rules for MoExtend's experts; no coefficient of its losses is published
    upcycling  MoExtend's experts from the sources that Expert Upcycling's scores choose
    pathweave  a connector for a second medium on the frozen projector of pictures
    crema      likewise, with queries of its own; its tokens are added to those of the pictures
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from moextend_jax.configs import mixtral_8x7b, mixtral_media
from moextend_jax.settings import (
    GrowSettings,
    MediumSettings,
    MethodSettings,
    ProjectorSettings,
    RunSettings,
    SelectSettings,
    from_config_dict,
    to_config_dict,
)

Name = Literal["lora", "qlora", "mole", "moram", "damc", "blocks", "dymoe", "upcycling", "pathweave", "crema"]


class Method(NamedTuple):
    """learning_rate: of finetune. projector: finetune trains it too, at 2e-5. otherwise: settings of other groups."""

    settings: MethodSettings
    learning_rate: float = 2e-5
    projector: bool = False
    otherwise: Mapping[str, Any] = {}


METHODS = {
    "lora": Method(MethodSettings(name="lora", rank=128, alpha=256, experts="per_expert"), 2e-4, projector=True),
    "qlora": Method(
        MethodSettings(name="lora", rank=64, alpha=16, experts="per_expert"),
        2e-4,
        projector=True,
        otherwise={"expert_storage": "int4"},
    ),
    "mole": Method(MethodSettings(name="mole", rank=32, alpha=64, lora_experts=3, gating="top1")),
    "moram": Method(
        MethodSettings(name="moram", rank=8, alpha=16, top_k=8, tau=0.03, threshold=0.2, experts="none"), 5e-4
    ),
    "damc": Method(MethodSettings(name="damc", rank=128, alpha=256), 2e-4, projector=True),
    "blocks": Method(MethodSettings(name="blocks", blocks=2), 2e-4),
    "dymoe": Method(MethodSettings(guidance=0.2, drift=0.01), otherwise={"grow": GrowSettings(column="mean")}),
    "upcycling": Method(
        MethodSettings(), otherwise={"select": SelectSettings(held_out=10_000, share=0.5, source="saliency")}
    ),
}


def get_config(arg: Name = "lora") -> ConfigDict:
    if arg in ("pathweave", "crema"):
        return to_config_dict(_connector(arg))
    method, settings = METHODS[arg], from_config_dict(mixtral_8x7b.get_config())
    optimizer, recipe = settings.finetune.optimizer, settings.recipe
    if method.projector:
        recipe = dataclasses.replace(recipe, finetune_trains="extension_and_projector")
        optimizer = dataclasses.replace(optimizer, multipliers={"projector": 2e-5 / method.learning_rate})
    optimizer = dataclasses.replace(optimizer, learning_rate=method.learning_rate)
    finetune = dataclasses.replace(settings.finetune, optimizer=optimizer)
    return to_config_dict(
        dataclasses.replace(settings, method=method.settings, recipe=recipe, finetune=finetune, **method.otherwise)
    )


def _connector(arg: Literal["pathweave", "crema"]) -> RunSettings:
    """Depth, as features of another encoder, after pictures."""
    settings = from_config_dict(mixtral_media.get_config())
    media = {"depth": settings.media["depth"]}
    own = ProjectorSettings(kind="weave", rank=8)
    if arg == "crema":
        media["image"] = MediumSettings(kind="image", projector=ProjectorSettings(kind="resampler", queries=32))
        own = ProjectorSettings(kind="crema", rank=64, fusion=True)
    media["depth"] = dataclasses.replace(media["depth"], projector=own)
    depth = dataclasses.replace(settings.extensions["depth"], method=MethodSettings(name="connector"))
    return dataclasses.replace(settings, media=media, extensions={"depth": depth})
