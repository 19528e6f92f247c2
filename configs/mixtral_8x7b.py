"""Mixtral-8x7B and CLIP ViT-L/14-336 on LLaVA's data, as the paper trains it, on a pod or a GPU mesh.

    moextend run mixtral_8x7b:packed --workdir DIR \
        --base MIXTRAL_FOLDER --vision CLIP_FOLDER --config.manual_dir=LLAVA_FOLDER

The folders are Hugging Face's, as published: Mixtral-8x7B-Instruct-v0.1, clip-vit-large-patch14-336; LLAVA_FOLDER
holds LLaVA's JSON files and image folders. Stages but the probe are one epoch: 558k pairs in batches of 256, 665k
conversations in batches of 128. Arguments:

    paper     one conversation a row, as published: more than half of every step is padding
    packed    the paper's recipe with several conversations a row, about as many conversations a step
    released  the released code's recipe and its batch sizes, one conversation a row
    gpus      the paper's on hosts of eight GPUs of 80 GB: layers split over a host's, replicas over hosts
    one_host  the paper's on the chips of one TPU host, in parts of 4 rows (v5e: docs/one_gpu.md)
    one_gpu   the paper's on one GPU of 80 GB, in parts of 4 rows, the frozen experts in four bits, AdamW's first moment
              in bfloat16
"""

from typing import Any, Literal

from ml_collections import ConfigDict

from moextend_jax.config import RECIPES
from moextend_jax.settings import (
    EvaluateSettings,
    FaultSettings,
    OptimizerConfig,
    RunSettings,
    SelectSettings,
    StageSettings,
    to_config_dict,
)

POD: dict[str, Any] = {
    # What `plan --sweep` found best for finetune on 64 chips of v5p within the memory of full training: hidden widths
    # in eight, so that a layer's gathered weights are 0.4 GB instead of 2.8; two micro-batches, which halve what a
    # layer keeps; and with that room all but one of the products that are dear to compute again.
    "mesh": {"data": 1, "fsdp": -1, "expert": 1, "tensor": 8},
    "saved": ("query", "key", "value", "attended", "middle", "gate"),
}
MACHINES: dict[str, dict[str, Any]] = {
    "gpus": {"mesh": {"data": -1, "fsdp": 8, "expert": 1, "tensor": 1}},
    "one_host": {"mesh": {"data": 1, "fsdp": 1, "expert": 1, "tensor": -1}},
    "one_gpu": {"mesh": {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}, "expert_storage": "int4"},
}
ROWS = 4
"""Of a part of a batch on one machine; parts cost no memory, so that batches are the paper's there too."""
ASKED = {"one_host": 64, "one_gpu": 32}
"""Questions at a time."""


def get_config(arg: Literal["paper", "packed", "released", "gpus", "one_host", "one_gpu"] = "paper") -> ConfigDict:
    recipe, asked = RECIPES["released" if arg == "released" else "paper"], ASKED.get(arg, 256)
    align_batch, instruct_batch = recipe.global_batch
    captions: dict[str, Any] = {"batch_size": align_batch, "length": 1024, "epochs": 1}
    instructions: dict[str, Any] = {"batch_size": instruct_batch, "length": 2048}
    captions["accumulate"] = instructions["accumulate"] = 4 if arg == "gpus" else 2
    if arg in ASKED:
        captions["accumulate"], instructions["accumulate"] = align_batch // ROWS, instruct_batch // ROWS
    if arg == "packed":
        captions |= {"batch_size": align_batch // 2, "length": 1280, "conversation_length": 1024}
        captions |= {"conversations_per_row": 0, "images_per_row": 2}
        # Rows of 4096 keep 99 % of their positions for tokens, those of 2048 at most 95 %: images are 578 tokens.
        instructions |= {"batch_size": instruct_batch // 4, "length": 4096, "conversation_length": 2048}
        instructions |= {"conversations_per_row": 0, "images_per_row": 6}

    first_moment = "bfloat16" if arg == "one_gpu" else "float32"

    def instruct(*, learning_rate: float, **many: Any) -> StageSettings:
        optimizer = OptimizerConfig(learning_rate=learning_rate, first_moment=first_moment)
        return StageSettings(data="llava_instruct", too_long="drop_turns", optimizer=optimizer, **instructions | many)

    finetune = instruct(epochs=1, learning_rate=2e-5)
    return to_config_dict(
        RunSettings(
            recipe=recipe,
            base="Mixtral-8x7B-Instruct-v0.1",
            vision="clip-vit-large-patch14-336",
            align=StageSettings(data="llava_pretrain", optimizer=OptimizerConfig(learning_rate=1e-3), **captions),
            extend=instruct(steps=1000, learning_rate=1e-3),
            finetune=finetune,
            full=finetune,
            select=SelectSettings(held_out=10_000, share=0.5, batch_size=asked // 8),
            evaluate=EvaluateSettings(
                data="easy_vqa/questions",
                questions=1000,
                length=704,
                batch_size=asked,
                text_batch_size=min(asked // 2, 64),
            ),  # fmt: skip
            # Scraped conversations; `moextend data check` says how many. Damaged images are skipped in any case.
            faults=FaultSettings(policies={"order": "skip", "empty_answer": "skip"}),
            cache_features=False,  # 1.2 GB per 1,000 images at this size: only worth it for several epochs
            workers=8,
            **MACHINES.get(arg, POD),
        )
    )
