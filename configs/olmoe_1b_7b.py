"""OLMoE-1B-7B and SigLIP so400m/14-384 on LLaVA's data: one host of TPUs or GPUs, or more.

    moextend run olmoe_1b_7b --workdir DIR \
        --base OLMOE_FOLDER --vision SIGLIP_FOLDER --config.manual_dir=LLAVA_FOLDER

The folders are Hugging Face's, as published: OLMoE-1B-7B-0924-Instruct, siglip-so400m-patch14-384. Data and stages
are `mixtral_8x7b`'s; an extended layer gets 8 new experts beside its 64, an eighth as in the paper. Arguments,
as there: packed (the default) and paper, which need a multiple of four devices, and one_gpu.
"""

from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.configs.qwen3_30b_a3b import with_siglip


def get_config(arg: Literal["paper", "packed", "one_gpu"] = "packed") -> ConfigDict:
    return with_siglip("OLMoE-1B-7B-0924-Instruct", arg)
