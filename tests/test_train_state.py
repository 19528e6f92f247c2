"""A run that was cut off and goes on ends bit for bit where an uninterrupted one does; other runs are refused."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from folders import assert_same

from moextend_jax.checkpoints import train_state
from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.data.batches import batches
from moextend_jax.data.datasets import Source, open_dataset
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer
from moextend_jax.mesh import place_leaves
from moextend_jax.settings import StageSettings
from moextend_jax.train import loop
from moextend_jax.train import step as step_module
from moextend_jax.train.metrics import read_metrics

FACTS = {"base": "abc", "stage": "align", "recipe": {"turns": "all"}}
CONFIG = tiny.BASE_CONFIG


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tiny.write_llava(tmp_path_factory.mktemp("llava"), rows=7)  # less than 6 batches: epochs turn over
    return open_dataset("llava_instruct", data_dir=folder / "built", manual_dir=folder)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(tiny.ASSETS / "base")


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    return tiny.arrays(CONFIG, std=0.1)


@pytest.fixture
def run(source, tokenizer, arrays, monkeypatch):
    """Trains align for six steps with a checkpoint every three; `dies_at` cuts it off before that step."""
    seen: list[np.ndarray] = []

    def train(folder: Path, *, dies_at: int | None = None, facts=FACTS, **more):
        seen.clear()
        rows = batches(
            source,
            stage=StageSettings(data="llava_instruct", steps=6, length=40, batch_size=2),
            tokenizer=tokenizer,
            recipe=RECIPES["paper"],
            readers={"image": tiny.pictures(source.images, size=32, patch=16)},
            seed=3,
        )

        def put(batch, mesh):
            seen.append(np.asarray(batch.ids_BL))
            if len(seen) == dies_at:
                raise KeyboardInterrupt
            return batch

        monkeypatch.setattr(loop, "place_rows", put)
        job = tiny.job("align", folder, facts=facts, steps=6, **{"checkpoint_every": 3, **more})
        model = tiny.structure(CONFIG)
        own = {path: leaf.copy() for path, leaf in arrays.items()}  # what is trained is taken over
        trained = loop.train_loop(model, place_leaves(model, own, job.mesh), rows, job)
        return trained, list(seen)

    return train


def lines(folder: Path) -> list[dict]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in tiny.TIMES} for row in rows]


@pytest.mark.slow
def test_two_steps_are_under_way_at_most(run, tmp_path: Path, monkeypatch):
    """More lock up a CPU of several devices (`train/loop.py`)."""
    steps, waited, make_step, wait = [], [], step_module.make_step, jax.block_until_ready

    def making(*args, **named):
        program = make_step(*args, **named)

        def step(*arguments):
            assert len(steps) < 2 or any(tree is steps[-2] for tree in waited)
            state, metrics = program(*arguments)
            steps.append(metrics)
            return state, metrics

        return step

    monkeypatch.setattr(step_module, "make_step", making)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or wait(tree))
    run(tmp_path, log_every=100, checkpoint_every=100)
    assert len(steps) == 6


@pytest.mark.slow
def test_a_stage_may_go_on_with_its_moments_elsewhere(run, tmp_path: Path):
    """From the device's memory to the host's, and back."""
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dies_at=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dies_at=3, moments="host", checkpoint_every=1)
    resumed, rest = run(tmp_path / "cut")
    assert len(rest) == 1
    assert_same(resumed, whole)


@pytest.mark.slow
def test_cut_off_and_gone_on_equals_uninterrupted(run, tmp_path: Path, arrays, monkeypatch, capsys):
    programs, make_step = [], step_module.make_step
    monkeypatch.setattr(
        step_module, "make_step", lambda *args, **named: programs.append(make_step(*args, **named)) or programs[-1]
    )
    whole, order = run(tmp_path / "whole")
    assert len(order) == 6 and [row["step"] for row in lines(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dies_at=6)
    assert [row["step"] for row in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    resumed, rest = run(tmp_path / "cut")
    assert len(rest) == 3
    np.testing.assert_array_equal(rest, order[3:])
    assert_same(resumed, whole)
    assert all(np.abs(leaf - arrays[path]).max() > 0 for path, leaf in whole.items())
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")

    assert len(programs) == 3 and all(program._jitted._cache_size() == 1 for program in programs)  # compiled once each
    finished, nothing = run(tmp_path / "whole")
    assert not nothing
    assert_same(finished, whole)

    train_state.check_facts({}, {"pictures": "b"}, where=tmp_path)
    assert not capsys.readouterr().err  # an older checkpoint says nothing of pictures
    train_state.check_facts({"pictures": "a"}, {"pictures": "b"}, where=tmp_path)
    assert "goes on with other pictures than it began with" in capsys.readouterr().err
    with pytest.raises(MoextendError, match=r"base: 'abc' there, 'xyz' now") as error:
        run(tmp_path / "whole", facts=FACTS | {"base": "xyz"})
    assert "recipe" not in str(error.value)


# --- results of a stage -----------------------------------------------------------------------------------------------


def leaves(scale: float) -> dict[str, jax.Array]:
    made = {path: leaf for path, leaf in tiny.arrays(tiny.EXTENDED).items() if path.startswith("extensions/image/")}
    return {path: (scale * leaf).astype("bfloat16" if "w_up" in path else "float32") for path, leaf in made.items()}


def test_leaves_come_back_bit_for_bit_and_the_newest_wins(tmp_path: Path):
    for scale in (1.0, 2.0):
        train_state.save_leaves(tmp_path / "result", leaves(scale), facts=FACTS)
    again = train_state.load_leaves(tmp_path / "result", facts=FACTS)
    assert again is not None
    assert_same(again, leaves(2.0))


def test_no_result_is_none_and_another_run_s_is_an_error(tmp_path: Path):
    assert train_state.load_leaves(tmp_path / "result", facts=FACTS) is None
    train_state.save_leaves(tmp_path / "result", leaves(1.0), facts=FACTS)
    with pytest.raises(MoextendError, match="recipe.*'first'"):
        train_state.load_leaves(tmp_path / "result", facts=FACTS | {"recipe": {"turns": "first"}})
