"""The demo: a small real Mixtral learns to see easy-VQA's images, on 2 CPU cores in minutes.

moextend demo                                           into work/demo
moextend run demo:released --workdir work/released      the released code's recipe
moextend run demo --config.baseline=true ...            with full fine-tuning beside it
"""

from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.config import RECIPES
from moextend_jax.settings import (
    EvaluateSettings,
    OptimizerConfig,
    RunSettings,
    SelectSettings,
    StageSettings,
    to_config_dict,
)


def get_config(arg: Literal["paper", "released"] = "paper") -> ConfigDict:
    def stage(data: str, *, steps: int, length: int, learning_rate: float) -> StageSettings:
        # One calibrator step at the experts' rate could turn a weight of 1 negative: it learns 50 times slower.
        optimizer = OptimizerConfig(learning_rate=learning_rate, multipliers={"calibrators": 0.02})
        return StageSettings(data=data, steps=steps, batch_size=64, length=length, loss_chunk=128, optimizer=optimizer)

    questions = "easy_vqa/questions"
    return to_config_dict(
        RunSettings(
            recipe=RECIPES[arg],
            align=stage("easy_vqa/captions", steps=110, length=36, learning_rate=1e-2),
            extend=stage(questions, steps=40, length=40, learning_rate=3e-3),
            finetune=stage(questions, steps=260, length=40, learning_rate=4e-3),
            full=stage(questions, steps=260, length=40, learning_rate=2e-3),
            select=SelectSettings(held_out=1000, batch_size=128),
            evaluate=EvaluateSettings(data=questions, questions=1000, length=40, max_new_tokens=6),
            dtype="float32",
            remat="none",
            mesh={"data": -1, "fsdp": 1, "expert": 1, "tensor": 1},
            checkpoint_every=200,
            log_every=5,
        )
    )
