"""A rival's run that was cut off and goes on ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import random_run
import tiny
from folders import assert_same

from moextend_jax.runs import results
from moextend_jax.runs.making import make
from moextend_jax.runs.models_of import leaves_of
from moextend_jax.runs.run import open_run
from moextend_jax.settings import MethodSettings, RunSettings
from moextend_jax.train import loop

METHODS = {
    "mole": (MethodSettings(name="mole", rank=2, gating="top1_prob"), "slow"),
    "moram": (MethodSettings(name="moram", rank=4, experts="none", top_k=2), "long"),
    "blocks": (MethodSettings(name="blocks", blocks=1), "slow"),
    "lora": (MethodSettings(name="lora", rank=2, experts="per_expert"), "long"),
    "damc": (MethodSettings(name="damc", rank=2), "long"),
}


def assert_goes_on(settings: RunSettings, stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off before the last of 4 steps, with a checkpoint of 2, the stage ends as it does uninterrupted."""
    longer = dataclasses.replace(results.stage_of(settings, stage), steps=4)
    settings = dataclasses.replace(results.with_stages(settings, {stage: longer}), checkpoint_every=2)
    place, left = loop.place_rows, [0]

    def dying(batch, mesh):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return place(batch, mesh)

    monkeypatch.setattr(loop, "place_rows", dying)
    ends, run = {}, open_run(settings, folder / "whole")
    for name in itertools.takewhile(lambda name: name != stage, results.table(settings).results):
        make(run, name)
    shutil.copytree(folder / "whole", folder / "cut")
    for name, dies_at in (("whole", 0), ("cut", 4)):
        run, left[0] = open_run(settings, folder / name), dies_at
        if dies_at:
            with pytest.raises(KeyboardInterrupt):
                make(run, stage)
        left[0] = 0
        make(run, stage)
        assert left[0] == (-2 if dies_at else -4)  # from its checkpoint of step 2, and not anew
        ends[name] = leaves_of(run, stage)
    assert ends["cut"]
    assert_same(ends["cut"], ends["whole"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, of[1])) for name, of in METHODS.items()]
)
def test_cut_off_and_gone_on_equals_uninterrupted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.shorten_easy_vqa(monkeypatch)
    settings = random_run.settings(tiny.write_base(tmp_path / "base"), method=METHODS[name][0])
    assert_goes_on(settings, "finetune", tmp_path, monkeypatch)
