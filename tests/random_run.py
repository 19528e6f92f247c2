"""A work directory as `moextend run` leaves it, with random leaves for what would have been trained.

In: a folder. Out: its `Run`, whose base is a tiny random one with the real tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from moextend_jax.checkpoints import train_state
from moextend_jax.config import ExtensionConfig
from moextend_jax.runs.models_of import facts_of_added, grown_config
from moextend_jax.runs.run import Run, open_run, remember
from moextend_jax.settings import EvaluateSettings, RunSettings, StageSettings

EXTENSION = ExtensionConfig(layers=(0, 2), sources=(1, 3))
ADDED = ("extensions/", "adapters/", "blocks/")


def settings(base: Path, **more: Any) -> RunSettings:
    stage = StageSettings(data="easy_vqa/questions", steps=1, batch_size=4, length=48)
    evaluated = EvaluateSettings(data="easy_vqa/questions", questions=4, batch_size=16, length=64, max_new_tokens=3)
    options = {"base": str(base), "vision": str(base / "vision"), "dtype": "float32", "remat": "none", **more}
    return RunSettings(align=stage, extend=stage, finetune=stage, full=stage, evaluate=evaluated, **options)


def random_run(folder: Path, **more: Any) -> Run:
    """FOLDER/base and the work directory FOLDER/work. more: settings."""
    base = tiny.write_base(folder / "base")
    run = open_run(settings(base, **more), folder / "work")
    if not run.settings.links[0].rival:
        record = {"chosen_layers": list(EXTENSION.layers), "sources": list(EXTENSION.sources), "base": run.base_hash}
        (run.workdir / "select").mkdir(parents=True)
        (run.workdir / "select" / "routing.json").write_text(json.dumps(record))
    leaves = tiny.arrays(grown_config(run, ["image"]), seed=1)
    for name, kinds in {"align": ("media/image/projector/",), "grow": ADDED, "finetune": ADDED}.items():
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(kinds)}
        train_state.save_leaves(run.workdir / name / "result", own, facts=run.facts | facts_of_added(run, name))
    remember(run)
    return run
