"""MoExtend beside its rivals on the demo: same base, data, steps and seeds.

    moextend study study_methods --workdir work/methods      minutes for each point and seed on 2 CPU cores

`moextend` is the method; everything else is compared with it, seed by seed. Low-rank updates have LLaVA's alpha/rank of
2; rank 8 is what they take of a model of width 128 where LLaVA's 128 is taken of 4096, and rank 64 has about as many
trained parameters as the new experts.
"""

import dataclasses

from ml_collections import ConfigDict

from moextend_jax.configurations import load
from moextend_jax.settings import StudySettings, from_config_dict, to_config_dict


def _points(name: str, *, rank: int) -> tuple[str, ...]:
    return f"method.name={name}", f"method.rank={rank}", f"method.alpha={2 * rank}"


POINTS: dict[str, tuple[str, ...]] = {
    "moextend": (),
    "moextend_strict": ("text_isolation=strict",),
    "lora": _points("lora", rank=8),
    "lora_strict": (*_points("lora", rank=8), "text_isolation=strict"),
    "lora_per_expert": (*_points("lora", rank=8), "method.experts=per_expert"),
    "mole": _points("mole", rank=8),
    "mole_top1_prob": (*_points("mole", rank=8), "method.gating=top1_prob"),
}


def get_config() -> ConfigDict:
    study = StudySettings(points=POINTS)
    return to_config_dict(dataclasses.replace(from_config_dict(load("demo")), study=study))
