"""The bench measures the stage it names, on rows that hold what it says."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import ended
from rich.console import Console

from configs.bench import get_config
from moextend_jax import bench
from moextend_jax.commands import BenchOptions, bench_command
from moextend_jax.config import IGNORE, IMAGE, MoextendError, with_vision
from moextend_jax.configurations import load
from moextend_jax.plan.sizes import model_config
from moextend_jax.settings import RunSettings, StageSettings, from_config_dict

TINY = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """configs/bench.py with the sizes made small."""
    whole = from_config_dict(get_config())
    for inside in ("", "vision"):
        attributes = json.loads((Path(whole.base) / inside / "config.json").read_text())
        attributes |= {name: value for name, value in TINY.items() if name in attributes}
        (tmp_path / inside).mkdir(exist_ok=True)
        (tmp_path / inside / "config.json").write_text(json.dumps(attributes))
    stage = StageSettings(data="none", steps=9, batch_size=1, length=160, loss_chunk=32)
    return dataclasses.replace(
        whole, base=str(tmp_path), vision=str(tmp_path / "vision"), align=stage, extend=stage, finetune=stage
    )


@pytest.mark.slow
def test_finetune_is_measured_whole_and_by_parts(settings: RunSettings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "STEPS", 1)
    row = bench.measure(settings, stage="finetune", labels="answers", pixels=True)
    # One layer of two is extended: three matrices, a router column, a calibrator of width 16 over 9 outputs.
    assert row["trained_parameters"] == 3 * 16 * 8 + 16 + 2 * 16 * 9
    assert row["tokens_per_second"] == pytest.approx(160 / row["seconds_per_step"])
    assert np.isfinite(row["loss"]) and row["temporaries_gb"] > 0 and row["peak_memory_gb"] > row["temporaries_gb"]
    assert all(seconds > 0 for seconds in row["parts"].values())


def test_stages_of_other_media_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Batches have pictures and text, so that what those stages train would not run."""
    chain, asked = from_config_dict(load("continual:strict")), []

    def noted(_: str, stage: str, *__: str, **___: Any) -> dict[str, Any]:
        asked.append(stage)
        raise MoextendError("noted")

    monkeypatch.setattr(bench, "apart", noted)
    for only, message in (
        ("finetune:sound", "stage finetune:sound is of sound"), ("mixture", "stage mixture trains all media"),
        ("finetun", "stage finetun is unknown; there are align, "), ("finetune", "noted"),
    ):  # fmt: skip
        with pytest.raises(MoextendError, match=message):
            bench.bench(chain, Console(), only=only)
    assert asked == ["finetune"]


def test_a_file_that_cannot_be_written_is_said_before_all_is_timed(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(bench, "bench", lambda *_, **__: {"align/all": {}})
    bench_command(BenchOptions(settings, json=tmp_path / "new" / "x.json"))
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"align/all": {}}
    monkeypatch.setattr(bench, "bench", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(OSError, match=r"new/x\.json"):
        bench_command(BenchOptions(settings, json=tmp_path / "new" / "x.json" / "y.json"))


def test_rows_hold_one_image_and_the_labels_they_say(settings: RunSettings):
    config = model_config(settings, stage="align")
    answers, every = (bench.random_batch(config, rows=2, length=160, labels=kind) for kind in bench.LABELS)
    assert [sorted(row[row >= 0]) for row in answers.places_BL] == [list(range(64))] * 2
    assert not (answers.labels_BL[answers.places_BL >= 0] != IGNORE).any()
    assert (answers.labels_BL != IGNORE).sum(axis=1).tolist() == [32, 32]
    assert (every.labels_BL != IGNORE).all()


def test_rows_too_short_for_the_image_are_refused(settings: RunSettings):
    config = model_config(settings, stage="align")
    with pytest.raises(MoextendError, match="the 64 of an image"):
        bench.random_batch(config, rows=1, length=40, labels="all")
    with pytest.raises(MoextendError, match="models that see pictures"):
        bench.random_batch(with_vision(config, None), rows=1, length=40, labels="all")


def test_an_image_has_as_many_tokens_as_its_projector_makes(settings: RunSettings):
    config = model_config(settings, stage="align")
    projector = dataclasses.replace(config.media[IMAGE].projector, kind="stack", neighbours=4)
    pooled = dataclasses.replace(config, media={IMAGE: dataclasses.replace(config.media[IMAGE], projector=projector)})
    batch = bench.random_batch(pooled, rows=1, length=40, labels="all")
    assert sorted(batch.places_BL[batch.places_BL >= 0]) == list(range(16))
    assert batch.features[IMAGE].shape[2] == 64


WORKER = """
import sys, time
from turns import serve
def step():
    time.sleep(float(sys.argv[1]))
    return 1.0
serve(step, {"tokens": 3})
"""


def test_processes_take_turns_and_are_compared(monkeypatch: pytest.MonkeyPatch):
    """benchmarks/turns.py, with which compare.py races PyTorch."""
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.syspath_prepend(benchmarks)
    from turns import Worker, race, ratios  # pyright: ignore[reportMissingImports]

    fast, slow = (
        Worker([sys.executable, "-c", WORKER, seconds], PYTHONPATH=benchmarks) for seconds in ("0.02", "0.06")
    )
    with ended(fast.process, slow.process):
        assert len(race([fast, slow], rounds=3)) == len(fast.rows) == len(slow.rows) == 3  # the first ones do not count
        median, fastest, least, most = ratios(fast, slow, "wall")
        assert fast.facts == {"tokens": 3} and slow.median("loss") == 1
        assert median > 1 and fastest > 1 and least <= median <= most
        for worker in (fast, slow):
            worker.close()
            assert worker.process.returncode == 0
