"""Qwen3-30B-A3B and SigLIP so400m/14-384 on LLaVA's data: one host of TPUs or GPUs, or more.

    moextend run qwen3_30b_a3b --workdir DIR \
        --base QWEN3_FOLDER --vision SIGLIP_FOLDER --config.manual_dir=LLAVA_FOLDER

The folders are Hugging Face's, as published: Qwen3-30B-A3B-Instruct-2507, siglip-so400m-patch14-384. Data and stages
are `mixtral_8x7b`'s; an extended layer gets 16 new experts beside its 128, an eighth as in the paper. Arguments,
as there: packed (the default) and paper, which need a multiple of four devices, and one_gpu.
"""

from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.configs import mixtral_8x7b


def get_config(arg: Literal["paper", "packed", "one_gpu"] = "packed") -> ConfigDict:
    return with_siglip("Qwen3-30B-A3B-Instruct-2507", arg)


def with_siglip(base: str, arg: Literal["paper", "packed", "one_gpu"]) -> ConfigDict:
    """Of a base of many small experts."""
    config = mixtral_8x7b.get_config(arg)
    if arg == "packed":  # a picture is 729 tokens here, where CLIP's is 576
        instructions = {"images_per_row": 5}
        config.update(
            align={"length": 1536, "images_per_row": 2},
            **dict.fromkeys(("extend", "finetune", "full"), instructions),
        )
    if arg != "one_gpu":  # whole experts on a device, and tokens brought to them
        config.update(mesh={"fsdp": -1, "expert": 4, "tensor": 1}, saved=())
    config.update(base=base, vision="siglip-so400m-patch14-384", evaluate={"length": 0})
    return config
