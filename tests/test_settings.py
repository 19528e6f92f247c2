"""Settings: any mistake is one error that names the field; files, ConfigDicts and JSON give the same settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.settings import EvaluateSettings, RunSettings, StageSettings, from_config_dict, to_config_dict
from moextend_jax.train.optimizer import OptimizerConfig

CONFIGS = Path(__file__).parents[1] / "configs"


def settings() -> RunSettings:
    stage = StageSettings(
        data="easy_vqa/questions",
        steps=3,
        batch_size=2,
        length=32,
        optimizer=OptimizerConfig(multipliers={"projector": 2.0}, weight_decays={"calibrators": 0.1}),
    )
    return RunSettings(
        align=stage, extend=stage, finetune=stage, full=stage,
        evaluate=EvaluateSettings(data="easy_vqa/questions", questions=10), recipe=RECIPES["released"],
    )  # fmt: skip


def changed(path: str, value: Any) -> ConfigDict:
    config = to_config_dict(settings())
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({path: value})
    return config


def test_a_config_dict_gives_the_settings_back():
    assert from_config_dict(to_config_dict(settings())) == settings()


def test_json_gives_the_settings_back():
    written = json.dumps(dataclasses.asdict(settings()))
    assert from_config_dict(json.loads(written)) == settings()


def test_whole_numbers_are_fine_where_a_fraction_is_expected():
    assert from_config_dict(changed("aux_coefficient", 1)).aux_coefficient == 1.0
    assert isinstance(from_config_dict(changed("align.optimizer.clip_norm", 2)).align.optimizer.clip_norm, float)


WRONG = [
    ("nope", 1, "config.nope"),
    ("align.nope", 1, "config.align.nope"),
    ("align.optimizer.rate", 1.0, "config.align.optimizer.rate"),
    ("recipe.calibrator", 1, "config.recipe.calibrator"),
    ("align.steps", "many", "config.align.steps"),
    ("align.steps", 2.5, "config.align.steps"),
    ("align.steps", True, "config.align.steps"),
    ("baseline", 1, "config.baseline"),
    ("base", 7, "config.base"),
    ("aux_coefficient", "small", "config.aux_coefficient"),
    ("remat", "everything", "config.remat"),
    ("align.too_long", "cut", "config.align.too_long"),
    ("recipe.counted_picks", "top_2", "config.recipe.counted_picks"),
    ("recipe.global_batch", (1, 2, 3), "config.recipe.global_batch"),
    ("recipe.global_batch", ("a", 2), "config.recipe.global_batch"),
    ("recipe.global_batch", 7, "config.recipe.global_batch"),
    ("align.optimizer.multipliers", {"projektor": 1.0}, "projektor"),
    ("align.optimizer.multipliers", {"projector": "big"}, "multipliers"),
    ("mesh", 3, "config.mesh"),
    ("align", 3, "config.align"),
    ("dtype", "float99", "dtype"),
    ("align.steps", 0, "config.align: steps"),
    ("align.batch_size", -4, "config.align: batch_size"),
    ("align.length", 0, "config.align: length"),
]


@pytest.mark.parametrize(("path", "value", "named"), WRONG)
def test_a_mistake_is_named(path: str, value, named: str):
    config = json.loads(json.dumps(dataclasses.asdict(settings())))
    *parents, last = path.split(".")
    inner = config
    for name in parents:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(MoextendError, match=named):
        from_config_dict(config)


def test_a_setting_left_out_is_named():
    config = dataclasses.asdict(settings())
    del config["align"]["steps"], config["evaluate"]
    with pytest.raises(MoextendError, match="evaluate must be set"):
        from_config_dict(config)
    config["evaluate"] = {"data": "easy_vqa/questions", "questions": 4}
    with pytest.raises(MoextendError, match="config.align: steps must be set"):
        from_config_dict(config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_is_valid(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert from_config_dict(module.get_config()).recipe == RECIPES["paper"]
    if inspect.signature(module.get_config).parameters:
        assert from_config_dict(module.get_config("released")).recipe == RECIPES["released"]
