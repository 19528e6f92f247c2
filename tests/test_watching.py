"""While a stage trains: numbers of routing and speed, the loss of held-out rows, and traces; none changes it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
import test_survival
import tiny
from folders import assert_same

from moextend_jax import chips
from moextend_jax.config import MoextendError, with_extension
from moextend_jax.models.flops import step_flops
from moextend_jax.runs import results
from moextend_jax.runs.data_of import held_out_source
from moextend_jax.runs.run import Run
from moextend_jax.settings import EvaluateSettings, RunSettings, StageSettings
from moextend_jax.train import meter
from moextend_jax.train.loss import load
from moextend_jax.train.meter import Meter, by_layer, model_flops
from moextend_jax.train.metrics import read_metrics
from moextend_jax.train.sinks import scalars
from moextend_jax.train.tracing import Tracer

HELD_OUT = [tiny.batch(rows=2, seed=90), tiny.batch(rows=2, seed=91)]


def test_load_by_layer():
    """Layers 0 and 2 of three are extended by one expert, so layer 1 has four and a column that nobody picks."""
    picks_ZO = np.array([[4, 4, 4, 4, 4], [8, 0, 8, 0, 0], [0, 0, 0, 0, 0.0]])
    numbers = by_layer(picks_ZO, config=tiny.EXTENDED)
    assert numbers == {
        "load_max": [0.2, 0.5, 0.0], "load_entropy": [1.0, 0.5, 0.0], "new_share": [0.2, None, 0.0]
    }  # fmt: skip
    assert "new_share" not in by_layer(picks_ZO[:, :4], config=tiny.PLAIN)


def test_layers_have_the_same_numbers_where_the_first_do_not_route():
    decoder = dataclasses.replace(tiny.DECODER, layers=4, dense_layers=2)
    extension = dataclasses.replace(tiny.EXTENSION, layers=(3,), sources=(0,))
    config = with_extension(dataclasses.replace(tiny.PLAIN, decoder=decoder), extension)
    numbers = by_layer(np.array([[8, 0, 8, 0, 0], [4, 4, 4, 4, 4.0]]), config=config)
    assert numbers == {
        "load_max": [None, None, 0.5, 0.2], "load_entropy": [None, None, 0.5, 1.0], "new_share": [None, None, None, 0.2]
    }  # fmt: skip
    assert scalars(numbers)["load_max/layer_03"] == 0.2 and "load_max/layer_00" not in scalars(numbers)


@pytest.mark.slow
def test_a_step_returns_how_many_tokens_chose_each_expert():
    from test_step import compiled

    step, state, frozen = compiled("finetune")
    batch = tiny.batch()
    _, metrics = step(jax.tree.map(lambda leaf: leaf.copy(), state), frozen, batch)
    model = tiny.with_arrays_of(tiny.EXTENDED, {**state.trainable, **frozen})
    expected = load(model(batch, skip_padding=True).routing, batch.segments_BL.reshape(-1) > 0).picks_ZO
    tokens = (batch.segments_BL > 0).sum()
    np.testing.assert_allclose(metrics["picks_ZO"], expected * tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["picks_ZO"].sum(axis=1), tokens * tiny.DECODER.top_k, rtol=1e-5)


def test_flops_are_those_of_the_plan_without_what_is_not_computed():
    trains = tiny.STAGES["finetune"]
    planned = step_flops(tiny.EXTENDED, trains=trains, rows=3, length=14, items={"image": 1})
    pixels, features = tiny.batch(pixels=True), tiny.batch()
    assert model_flops(tiny.EXTENDED, pixels, trains=trains) == planned.model
    tower = sum(sum(phases.values()) for name, phases in planned.parts.items() if name.startswith("media/image/tower/"))
    assert tower > 0
    assert model_flops(tiny.EXTENDED, features, trains=trains) == pytest.approx(planned.model - tower)
    text = features._replace(features={})
    no_images = step_flops(tiny.EXTENDED, trains=trains, rows=3, length=14, items={"image": 0})
    assert model_flops(tiny.EXTENDED, text, trains=trains) == no_images.model


def test_speed_leaves_out_compiling_and_what_is_no_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(meter, "perf_counter", lambda: now)
    monkeypatch.setattr(chips, "peak_flops", lambda _: 1e9)
    counted = Meter(tiny.EXTENDED, trains=tiny.STAGES["finetune"], devices=jax.devices()[:1] * 4)
    metrics = {"loss": np.float32(2), "finite": np.True_, "picks_ZO": np.ones((3, 5)), "tokens": np.int32(39)}
    lines = []
    for seconds in (100, 1):  # the first line's steps compiled
        for _ in range(4):
            counted.note(tiny.batch(), metrics)
            now += seconds
        with counted.paused():
            now += 7
        lines.append(counted.numbers(metrics))
    first, second = lines
    assert first["seconds"] == 407 and not {"step_seconds", "tflops_per_second", "mfu"} & set(first)
    flops, tokens = model_flops(tiny.EXTENDED, tiny.batch(), trains=tiny.STAGES["finetune"]), 4 * 39
    assert (second["step_seconds"], second["seconds"], second["tokens"]) == (1, 11, tokens)
    assert second["tokens_per_second"] == tokens / 11
    assert second["tflops_per_second"] == pytest.approx(flops / 1e12)
    assert second["mfu"] == pytest.approx(flops / 4e9) and second["peak_memory_gb"] > 0.01


def test_chips_by_the_names_that_jax_gives_them():
    assert chips.peak_flops("TPU v5 lite") == 197e12 and chips.peak_flops("cpu") is None
    # A GPU that the table lacks goes by its capability; large tiles on all would not compile, small ones are slow.
    assert chips.shared_memory("NVIDIA H100 80GB HBM3") == chips.shared_memory("NVIDIA H100 NVL", "9.0") == 232448
    assert chips.shared_memory("NVIDIA L4", "8.9") == chips.shared_memory("NVIDIA GeForce RTX 4090") == 101376
    assert set(chips.KINDS.values()) == set(chips.CHIPS)


# --- held-out rows ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_changes_nothing_and_resumes(tmp_path: Path):
    plain = test_survival.train(tmp_path / "plain")
    watched: Any = {"validate_every": 3, "held_out": HELD_OUT}
    assert_same(test_survival.train(tmp_path / "watched", **watched), plain)
    test_survival.train(tmp_path / "cut", rows=DiesAt(7), **watched, expect=KeyboardInterrupt)
    assert_same(test_survival.train(tmp_path / "cut", **watched), plain)
    losses = validation_losses(tmp_path / "watched")
    assert [step for step, _ in losses] == [3, 6, 8] and validation_losses(tmp_path / "cut") == losses
    assert losses[-1][1] != losses[0][1] and not validation_losses(tmp_path / "plain")
    # At the end it is the mean over labelled tokens of the trained model.
    model = tiny.with_arrays_of(tiny.PLAIN, {**tiny.arrays(tiny.PLAIN, std=0.1), **plain})
    nats = [nats_of(model, batch) for batch in HELD_OUT]
    assert losses[-1][1] == pytest.approx(sum(total for total, _ in nats) / sum(count for _, count in nats), rel=1e-5)


def nats_of(model: Any, batch: Any) -> tuple[float, int]:
    logits_BLV = model.decoder.logits(model(batch).hidden_BLD)
    log_probs_BLV = np.asarray(jax.nn.log_softmax(logits_BLV))
    rows, places = np.nonzero(batch.labels_BL[:, 1:] != -100)
    targets = batch.labels_BL[rows, places + 1]
    return -log_probs_BLV[rows, places, targets].sum(), len(targets)


def validation_losses(folder: Path) -> list[tuple[int, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


class DiesAt(test_survival.Rows):
    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def __next__(self):
        if self.at + 1 == self.step:
            raise KeyboardInterrupt
        return super().__next__()


def test_rows_that_a_stage_trains_on_are_not_held_out():
    settings = tiny.run_settings()
    stage = StageSettings(data="own", split="train[:90%]", steps=1, batch_size=1, length=1)
    evaluate = EvaluateSettings(data="own", split="train[90%:]", questions=1)

    def run_of(settings: RunSettings) -> Run:
        return cast(Run, SimpleNamespace(settings=settings, table=results.table(settings)))

    own = dataclasses.replace(settings, finetune=stage, evaluate=evaluate)
    assert held_out_source(run_of(own), "image") is None  # whether two parts of a split overlap is not looked into
    for data, asked in (
        ("a.json:0.7,own:0.3", "own"),
        ("own", "./own,b.json"),
        ("easy_vqa/captions", "easy_vqa/questions"),
    ):
        both = dataclasses.replace(stage, data=data), dataclasses.replace(evaluate, data=asked)
        mixed = dataclasses.replace(settings, finetune=both[0], evaluate=both[1])
        assert held_out_source(run_of(mixed), "image") is None


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["100", "3:2", "0:4", "a:b", "1:2:3"])
def test_a_profile_that_names_no_steps_is_refused(text: str):
    with pytest.raises(MoextendError, match="profile = .* must be FIRST:LAST"):
        tiny.run_settings(profile=text)


def traced_steps(folder: Path) -> set[int]:
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    steps = set()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            steps |= {int(dict(event.stats)["step_num"]) for event in line.events if event.name == "train"}
    return steps


def alone(code: str, folder: Path) -> str:
    """What a process of its own prints: one that has asked libtpu for a topology, as tests of plans do, dies of a
    trace."""
    start = (
        "from pathlib import Path\nfrom test_survival import train\nfrom test_watching import DiesAt\n"
        f"folder = Path({str(folder)!r})\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    finished = subprocess.run(
        [sys.executable, "-c", start + code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_only_the_steps_that_are_named_are_traced(tmp_path: Path):
    """Also where a run fails inside a trace, and where it goes on from a checkpoint."""
    printed = alone(
        "train(folder / 'a', profile='4:5')\n"
        "train(folder / 'cut', rows=DiesAt(6), profile='5:7', expect=KeyboardInterrupt)\n"
        "train(folder / 'again', rows=DiesAt(6), expect=KeyboardInterrupt)\n"
        "train(folder / 'again', profile='3:6')  # goes on from step 4",
        tmp_path,
    )
    steps = [traced_steps(tmp_path / name / "profile") for name in ("a", "cut", "again")]
    assert steps == [{4, 5}, {5}, {5, 6}]
    assert f"traced: {tmp_path / 'a' / 'profile'}" in printed


def test_steps_that_are_over_or_never_come_are_named(tmp_path: Path, capsys):
    tracer = Tracer(tmp_path, range(100, 104))
    for after, last in ((103, 200), (0, 99), (102, 200), (0, 100)):
        tracer.announce("align", after=after, last=last)
    assert capsys.readouterr().out.splitlines() == [
        "align: nothing is traced: profile is 100:103, and this goes from step 104 to 200",
        "align: nothing is traced: profile is 100:103, and this goes from step 1 to 99",
    ]
