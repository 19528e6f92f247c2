"""What a base in few bits costs: experts as they are, in int8 and in int4, several seeds.

    moextend study study_storage --workdir work/storage
    moextend study study_storage:smollm2 --workdir work/smollm2 --config.base=smollm2 --config.recipe.prompt=chatml

The first is the demo. The second is for a base of real weights, SmolLM2-135M upcycled to 4 experts (docs/own_model.md):
fewer and smaller steps, since it is a larger model. Its own template would begin every row with a system turn.
Results of both: docs/one_gpu.md.
"""

import dataclasses
from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.configurations import load
from moextend_jax.settings import RunSettings, StageSettings, StudySettings, from_config_dict, to_config_dict

STUDY = StudySettings(
    points={"as_is": (), "int8": ("expert_storage=int8",), "int4": ("expert_storage=int4",)}, seeds=(0, 1, 2)
)


def get_config(arg: Literal["demo", "smollm2"] = "demo") -> ConfigDict:
    demo = from_config_dict(load("demo"))
    return to_config_dict(dataclasses.replace(demo if arg == "demo" else _smaller(demo), study=STUDY))


def _smaller(demo: RunSettings) -> RunSettings:
    def stage(of: StageSettings, *, steps: int, learning_rate: float) -> StageSettings:
        optimizer = dataclasses.replace(of.optimizer, learning_rate=learning_rate)
        return dataclasses.replace(of, steps=steps, batch_size=16, length=48, optimizer=optimizer)

    return dataclasses.replace(
        demo,
        align=stage(demo.align, steps=40, learning_rate=5e-3),
        extend=stage(demo.extend, steps=10, learning_rate=1e-3),
        finetune=stage(demo.finetune, steps=40, learning_rate=5e-4),
        select=dataclasses.replace(demo.select, held_out=200, batch_size=32),
        evaluate=dataclasses.replace(demo.evaluate, questions=200, length=64, batch_size=50, text_batches=2),
    )
