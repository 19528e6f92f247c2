"""Mixtral-8x7B taught three media one after another: pictures (CLIP), sound (Whisper), and features of another encoder.

    moextend run mixtral_media --workdir DIR --base MIXTRAL_FOLDER --vision CLIP_FOLDER \\
        --config.media.audio.tower=WHISPER_FOLDER --config.manual_dir=LLAVA_FOLDER \\
        --config.extensions.audio.align.data=CAPTIONS.json ...
    moextend plan mixtral_media --stage finetune:depth --topology v5p:4x4x4

Each of the three has an extension of its own; strict isolation keeps what was learnt before bit for bit as it was. A
second of sound is 10 tokens (Whisper's 50 positions, five put side by side), an item of features 256. Data of the later
extensions have no published set: name your own files.
"""

import dataclasses

from ml_collections import ConfigDict

from moextend_jax.configs import mixtral_8x7b
from moextend_jax.settings import (
    ExtensionSettings,
    MediumSettings,
    ProjectorSettings,
    StageSettings,
    from_config_dict,
    to_config_dict,
)


def get_config() -> ConfigDict:
    pictures = from_config_dict(mixtral_8x7b.get_config())

    def of(medium: str) -> ExtensionSettings:
        def stage(like: StageSettings) -> StageSettings:
            items = {medium: 1}
            return dataclasses.replace(like, data=f"{medium}.json", images_per_row=0, items_per_row=items)

        return ExtensionSettings(
            medium=medium,
            align=stage(pictures.align),
            extend=stage(pictures.extend),
            finetune=stage(pictures.finetune),
            full=stage(pictures.full),
            select=pictures.select,
            evaluate=dataclasses.replace(pictures.evaluate, data=""),
        )

    return to_config_dict(
        dataclasses.replace(
            pictures,
            media={
                "audio": MediumSettings(
                    kind="audio",
                    tower="whisper-large-v3",
                    seconds=30,
                    projector=ProjectorSettings(kind="stack", neighbours=5),
                    spans=(10, 50, 100, 300),
                ),
                "depth": MediumSettings(kind="features", width=1024, patches=256),
            },
            extensions={"audio": of("audio"), "depth": of("depth")},
            text_isolation="strict",
        )
    )
