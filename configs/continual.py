"""One small model learns to see, then to hear instruments, then to understand speech: on 2 CPU cores in minutes.

    moextend run --config configs/continual.py --workdir work/continual
    moextend run continual:strict --workdir work/strict          one chain instead of three

Pictures are easy-VQA's, sounds are made by installed packages (docs/data.md): 44 instruments of one sound font, asked
about with other keys and with another font; 36 words and easy-VQA's questions by 16 voices of eSpeak, asked with 4
others and with a person's recordings. Each extension is learnt with the earlier ones frozen; the chains strict, open
and full tell what that is worth. Pictures and speech come together at the end: put together without any training, and,
to compare, trained together.
"""

from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.settings import (
    EvaluateSettings,
    ExtensionSettings,
    MediumSettings,
    OptimizerConfig,
    RunSettings,
    SelectSettings,
    StageSettings,
    to_config_dict,
)

BATCH, LENGTH = 32, 40


def get_config(arg: Literal["all", "strict"] = "all") -> ConfigDict:
    def stage(data: str, *, steps: int, learning_rate: float, length: int = LENGTH) -> StageSettings:
        # One calibrator step at the experts' rate could turn a weight of 1 negative: it learns 50 times slower.
        optimizer = OptimizerConfig(learning_rate=learning_rate, multipliers={"calibrators": 0.02})
        return StageSettings(
            data=data, steps=steps, batch_size=BATCH, length=length, loss_chunk=48, optimizer=optimizer
        )

    def asked(data: str, **sets: str) -> EvaluateSettings:
        return EvaluateSettings(data=data, sets=sets, questions=200, length=64, max_new_tokens=8)

    select = SelectSettings(held_out=500, batch_size=128)

    def further(medium: str, *, captions: str, questions: str, evaluate: EvaluateSettings) -> ExtensionSettings:
        return ExtensionSettings(
            medium=medium,
            align=stage(captions, steps=90, learning_rate=1e-2, length=46),
            extend=stage(questions, steps=20, learning_rate=3e-3),
            finetune=stage(questions, steps=180, learning_rate=4e-3),
            full=stage(questions, steps=50, learning_rate=2e-3),
            select=select,
            evaluate=evaluate,
        )

    questions = "easy_vqa/questions"
    return to_config_dict(
        RunSettings(
            align=stage("easy_vqa/captions", steps=80, learning_rate=1e-2),
            extend=stage(questions, steps=20, learning_rate=3e-3),
            finetune=stage(questions, steps=160, learning_rate=4e-3),
            full=stage(questions, steps=50, learning_rate=2e-3),
            select=select,
            evaluate=asked(questions),
            media={
                "sound": MediumSettings(kind="audio", tower="embedded", seconds=1),
                "speech": MediumSettings(kind="audio", tower="embedded", seconds=2),
            },
            extensions={
                "sound": further(
                    "sound",
                    captions="instruments/captions",
                    questions="instruments/questions",
                    evaluate=asked("instruments/questions", other_font="instruments_fluid/questions"),
                ),
                "speech": further(
                    "speech",
                    captions="spoken_words/captions:1,spoken_questions/transcripts:1",
                    questions="spoken_words/questions:1,spoken_questions/descriptions:1",
                    evaluate=asked(
                        "spoken_words/questions",
                        recorded="recorded_words/questions",
                        described="spoken_questions/descriptions",
                        pictures="spoken_questions/pictures",
                    ),
                ),
            },
            mixture=stage("spoken_questions/pictures", steps=60, learning_rate=2e-3, length=52),
            chains=("strict", "open", "full") if arg == "all" else (),
            text_isolation="strict",
            dtype="float32",
            remat="none",
            mesh={"data": -1, "fsdp": 1, "expert": 1, "tensor": 1},
            checkpoint_every=200,
            log_every=5,
        )
    )
