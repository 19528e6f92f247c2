"""MoExtend beside its rivals on the demo: same base, data, steps and seeds.

    moextend study study_methods --workdir work/methods      minutes for each point and seed on 2 CPU cores

`moextend` is the method; everything else is compared with it, seed by seed, after 100 steps of finetune instead of the
demo's 260. Low-rank updates have LLaVA's alpha/rank of 2; rank 8 is to a model of width 128 about what LLaVA's rank is
to one of 4096. `_equal` trains as many parameters as the new experts have, or up to 2 % fewer. One block, twice as
many, is the least that LLaMA-Pro can add. `_strict` is under strict text isolation: text stays exactly as it was.
"""

import dataclasses

from ml_collections import ConfigDict

from moextend_jax.configurations import load
from moextend_jax.settings import StudySettings, from_config_dict, to_config_dict


def _points(name: str, *, rank: int) -> tuple[str, ...]:
    return f"method.name={name}", f"method.rank={rank}", f"method.alpha={2 * rank}"


STRICT = ("text_isolation=strict",)
LORA_EQUAL = _points("lora", rank=24)
MORAM = ("method.experts=none", "method.top_k=8")
EQUAL: dict[str, tuple[str, ...]] = {
    "lora_equal": LORA_EQUAL,
    "mole_equal": _points("mole", rank=11),
    "moram_equal": (*_points("moram", rank=55), *MORAM),
    "damc_equal": _points("damc", rank=12),
}
POINTS: dict[str, tuple[str, ...]] = {
    "moextend": (),
    "dymoe": ("grow.column=mean", "method.guidance=0.2", "method.drift=0.01"),
    "lora": _points("lora", rank=8),
    "qlora": (*_points("lora", rank=8), "expert_storage=int4"),
    "mole": _points("mole", rank=8),
    "moram": (*_points("moram", rank=8), *MORAM),
    "damc": _points("damc", rank=8),
    "blocks": ("method.name=blocks", "method.blocks=1"),
    **EQUAL,
    "qlora_equal": (*LORA_EQUAL, "expert_storage=int4"),
}
POINTS |= {f"{name}_strict": (*own, *STRICT) for name, own in POINTS.items()}


def get_config() -> ConfigDict:
    demo = from_config_dict(load("demo"))
    return to_config_dict(
        dataclasses.replace(
            demo,
            study=StudySettings(points=POINTS),
            finetune=dataclasses.replace(demo.finetune, steps=100),
            evaluate=dataclasses.replace(demo.evaluate, questions=500),
        )
    )
