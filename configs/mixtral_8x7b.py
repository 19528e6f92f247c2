"""Mixtral-8x7B and CLIP ViT-L/14-336 on LLaVA's data, as the paper trains it, on a pod or a GPU mesh.

    moextend run --config configs/mixtral_8x7b.py --workdir DIR \
        --config.base=MIXTRAL_FOLDER --config.vision=CLIP_FOLDER --config.manual_dir=LLAVA_FOLDER

The folders are Hugging Face's, as published: Mixtral-8x7B-Instruct-v0.1, clip-vit-large-patch14-336; LLAVA_FOLDER
holds LLaVA's JSON files and image folders. Steps are one epoch: 558k pairs in batches of 256, 665k conversations in
batches of 128. Argument `released` takes the released code's recipe and its batch sizes.
"""

from ml_collections import ConfigDict

from moextend_jax.config import RECIPES
from moextend_jax.settings import EvaluateSettings, RunSettings, SelectSettings, StageSettings, to_config_dict
from moextend_jax.train.optimizer import OptimizerConfig

PAIRS, CONVERSATIONS = 558_128, 665_298


def get_config(arg: str = "paper") -> ConfigDict:
    recipe = RECIPES[arg]
    align_batch, finetune_batch = recipe.global_batch
    finetune = StageSettings(
        data="llava_instruct",
        steps=-(-CONVERSATIONS // finetune_batch),
        batch_size=finetune_batch,
        length=2048,
        too_long="drop_turns",
        optimizer=OptimizerConfig(learning_rate=2e-5),
    )
    return to_config_dict(
        RunSettings(
            recipe=recipe,
            base="Mixtral-8x7B-Instruct-v0.1",
            vision="clip-vit-large-patch14-336",
            align=StageSettings(
                data="llava_pretrain",
                steps=-(-PAIRS // align_batch),
                batch_size=align_batch,
                length=1024,
                optimizer=OptimizerConfig(learning_rate=1e-3),
            ),
            extend=StageSettings(
                data="llava_instruct",
                steps=1000,
                batch_size=finetune_batch,
                length=2048,
                too_long="drop_turns",
                optimizer=OptimizerConfig(learning_rate=1e-3),
            ),
            finetune=finetune,
            full=finetune,
            select=SelectSettings(held_out=10_000, share=0.5, batch_size=64),
            evaluate=EvaluateSettings(data="easy_vqa/questions", questions=1000, length=704),
            cache_features=False,  # 1.2 GB per 1,000 images at this size: only worth it for several epochs
            workers=8,
            # Hidden widths in four, everything else by fsdp: a layer's gathered weights are then 0.7 GB instead of 2.8,
            # and tokens of four chips meet in one place; docs/plans.md compares meshes.
            mesh={"data": 1, "fsdp": -1, "expert": 1, "tensor": 4},
            # What a chip has room for because frozen weights need no gradient: 5 GiB on 64 chips. With "gate" too
            # (7 GiB more) a step is a tenth cheaper.
            saved=("query", "key", "value", "attended", "middle"),
        )
    )
