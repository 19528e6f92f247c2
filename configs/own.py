"""One's own pictures, sounds or questions: the demo's small base learns from a file of conversations, six or sixty
thousand.

moextend run --config own --data own.jsonl --images pictures --workdir work/own
moextend run --config own --data own.jsonl --images pictures --workdir work/own --config.finetune.epochs=10
moextend run --config own:sounds --data sounds.json --images sounds --workdir work/sounds
moextend run --config own:text --data questions.csv --workdir work/text      a task in text, which shows nothing

Nothing need be counted: lengths and numbers of steps follow from the data, and a tenth of it is held out for the table
at the end (docs/own_data.md).
"""

from typing import Any, Literal

from ml_collections import ConfigDict

from moextend_jax.config import RECIPES
from moextend_jax.settings import (
    EvaluateSettings,
    MediumSettings,
    OptimizerConfig,
    RunSettings,
    SelectSettings,
    StageSettings,
    to_config_dict,
)


def get_config(arg: Literal["paper", "released", "sounds", "text"] = "paper") -> ConfigDict:
    def stage(*, epochs: float, least_steps: int, learning_rate: float) -> StageSettings:
        return StageSettings(
            data="",  # --data
            epochs=epochs,
            least_steps=least_steps,
            batch_size=16,
            length=0,
            images_per_row=0,
            loss_chunk=256,
            # As in the demo: one calibrator step at the experts' rate could turn a weight of 1 negative.
            optimizer=OptimizerConfig(learning_rate=learning_rate, multipliers={"calibrators": 0.02}),
        )

    others: dict[str, dict[str, Any]] = {
        "sounds": {
            "extension": "audio",
            "medium": "audio",
            "media": {"audio": MediumSettings(kind="audio", tower="embedded", seconds=5)},
            "vision": "none",
        },
        "text": {"extension": "task", "medium": "", "vision": "none"},
    }
    return to_config_dict(
        RunSettings(
            **others.get(arg, {}),
            recipe=RECIPES["released" if arg == "released" else "paper"],
            align=stage(epochs=1, least_steps=60, learning_rate=1e-2),
            extend=stage(epochs=0.5, least_steps=20, learning_rate=3e-3),
            finetune=stage(epochs=3, least_steps=120, learning_rate=4e-3),
            full=stage(epochs=3, least_steps=120, learning_rate=2e-3),
            select=SelectSettings(held_out=0.1, batch_size=32),
            evaluate=EvaluateSettings(
                data="", split="train", questions=1000, length=0, batch_size=64, max_new_tokens=64
            ),
            dtype="float32",
            remat="none",
            mesh={"data": -1, "fsdp": 1, "expert": 1, "tensor": 1},
            checkpoint_every=200,
            log_every=10,
        )
    )
