"""A rival's run that was cut off and goes on ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import random_run
import tiny
from folders import assert_same

from moextend_jax.runs.making import make
from moextend_jax.runs.models_of import leaves_of
from moextend_jax.runs.run import open_run
from moextend_jax.settings import MethodSettings
from moextend_jax.train import loop

METHODS = {
    "mole": (MethodSettings(name="mole", rank=2, gating="top1_prob"), "slow"),
    "moram": (MethodSettings(name="moram", rank=4, experts="none", top_k=2), "long"),
    "blocks": (MethodSettings(name="blocks", blocks=1), "slow"),
    "lora": (MethodSettings(name="lora", rank=2, experts="per_expert"), "long"),
    "damc": (MethodSettings(name="damc", rank=2), "long"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, of[1])) for name, of in METHODS.items()]
)
def test_cut_off_and_gone_on_equals_uninterrupted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.shorten_easy_vqa(monkeypatch)
    settings = random_run.settings(tiny.write_base(tmp_path / "base"), method=METHODS[name][0], checkpoint_every=2)
    settings = dataclasses.replace(settings, finetune=dataclasses.replace(settings.finetune, steps=4))
    place, left = loop.place_rows, [0]

    def dying(batch, mesh):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return place(batch, mesh)

    monkeypatch.setattr(loop, "place_rows", dying)
    ends, run = {}, open_run(settings, tmp_path / "whole")
    for stage in ("align", "grow"):
        make(run, stage)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder, dies_at in (("whole", 0), ("cut", 4)):
        run, left[0] = open_run(settings, tmp_path / folder), dies_at
        if dies_at:
            with pytest.raises(KeyboardInterrupt):
                make(run, "finetune")
        left[0] = 0
        make(run, "finetune")
        assert left[0] == (-2 if dies_at else -4)  # from its checkpoint of step 2, and not anew
        ends[folder] = leaves_of(run, "finetune")
    assert_same(ends["cut"], ends["whole"])
