"""Qwen3-30B-A3B and SigLIP so400m/14-384 on LLaVA's data: one host of TPUs or GPUs, or more.

    moextend run qwen3_30b_a3b --workdir DIR \
        --base QWEN3_FOLDER --vision SIGLIP_FOLDER --config.manual_dir=LLAVA_FOLDER

The folders are Hugging Face's, as published: Qwen3-30B-A3B-Instruct-2507, siglip-so400m-patch14-384. Data and stages
are `mixtral_8x7b`'s; an extended layer gets 16 new experts beside its 128, an eighth as in the paper.
Arguments as there.
"""

from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.configs import mixtral_8x7b


def get_config(arg: Literal["paper", "packed"] = "packed") -> ConfigDict:
    return with_siglip("Qwen3-30B-A3B-Instruct-2507", arg)


def with_siglip(base: str, arg: Literal["paper", "packed"]) -> ConfigDict:
    """Of a base of many small experts."""
    config = mixtral_8x7b.get_config(arg)
    config.base, config.vision = base, "siglip-so400m-patch14-384"
    if arg == "packed":  # a picture is 729 tokens here, where CLIP's is 576
        config.align.length, config.align.images_per_row = 1536, 2
        for stage in (config.extend, config.finetune, config.full):
            stage.images_per_row = 5
    # Whole experts on a device, and tokens brought to them; on one device: --config.mesh.expert=1
    config.mesh = {"data": 1, "fsdp": -1, "expert": 4, "tensor": 1}
    config.saved = ()
    return config
