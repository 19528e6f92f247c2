"""TABLE of families of decoders, a file each: by the `model_type` of their config.json."""

from collections.abc import Mapping

from moextend_jax.families import ernie4_5_moe, glm4_moe, gpt_oss, granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from moextend_jax.families.family import Family

FAMILIES: Mapping[str, Family] = {
    "mixtral": mixtral.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "ernie4_5_moe": ernie4_5_moe.FAMILY,
}
