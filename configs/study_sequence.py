"""Three tasks one after another, each learnt with the earlier ones frozen: what is kept of them, by method and seed.

    moextend study study_sequence --workdir work/sequence      minutes for each point and seed on 2 CPU cores

The tasks are easy-VQA's questions about shapes, then about colours, then those to be answered with yes or no, on the
same pictures. Accuracy is the mean over all three at the end; backward transfer is what the first two have gained since
they were new (GEM's), so that what is lost is below zero. Every method adds something of its own for each task.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from moextend_jax.configurations import load
from moextend_jax.settings import ExtensionSettings, RunSettings, StudySettings, from_config_dict, to_config_dict

FIRST, *LATER = TASKS = ("shape", "colour", "yes_no")


def _points(name: str, **options: Any) -> tuple[str, ...]:
    """A method for every task."""
    groups = ("method", *(f"extensions.{task}.method" for task in LATER))
    return tuple(f"{group}.{key}={value}" for group in groups for key, value in {"name": name, **options}.items())


POINTS = {
    "moextend": (),
    "lora": _points("lora", rank=8, alpha=16),
    "mole": _points("mole", rank=8, alpha=16),
    "moram": _points("moram", rank=8, alpha=16, experts="none"),
}


def get_config() -> ConfigDict:
    demo = from_config_dict(load("demo"))

    def of_task(task: str) -> dict[str, Any]:
        data = f"easy_vqa/{task}_questions"
        return {
            "extend": dataclasses.replace(demo.extend, data=data, steps=20),
            "finetune": dataclasses.replace(demo.finetune, data=data, steps=60),
            "full": dataclasses.replace(demo.full, data=data, steps=60),
            "evaluate": dataclasses.replace(demo.evaluate, data=data, questions=200),
        }

    later = {
        task: ExtensionSettings(medium="image", align=demo.align, select=demo.select, **of_task(task)) for task in LATER
    }
    settings: RunSettings = dataclasses.replace(
        demo, extension=FIRST, extensions=later, study=StudySettings(points=POINTS), **of_task(FIRST)
    )
    return to_config_dict(settings)
