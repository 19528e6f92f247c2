"""Runs that are killed, told to stop, find their disk full or their files damaged go on, or say what is wrong."""

from __future__ import annotations

import errno
import gc
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from children import alive, ended
from folders import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import multihost_utils

from moextend_jax import cli, preemption
from moextend_jax.checkpoints import sums, train_state
from moextend_jax.config import Batch, MoextendError
from moextend_jax.lock import locked
from moextend_jax.runs import run as run_module
from moextend_jax.train import loop, meter
from moextend_jax.train import step as step_module
from moextend_jax.train.metrics import read_metrics
from moextend_jax.train.nonfinite import Watch, read_batch
from moextend_jax.train.stages import split
from moextend_jax.train.step import make_step

HERE = Path(__file__).parent
FACTS = {"base": "abc", "settings": {"length": 40, "optimizer": {"learning_rate": 0.1}}}


# --- a stage with batches of one's own --------------------------------------------------------------------------------


class Rows:
    """The same few batches again and again; stands for a Grain data set and its iterator."""

    def __init__(self, count: int = 5):
        self.made = [tiny.batch(rows=2, seed=seed) for seed in range(count)]
        self.at = self.reads = 0

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self) -> Batch:
        self.at, self.reads = self.at + 1, self.reads + 1
        rows_Bg = np.array([[self.at], [-1]], np.int32)
        return self.made[self.at % len(self.made)]._replace(examples_Bg=rows_Bg)

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        pass


COMPILED: dict[int, Any] = {}
"""Steps by the length of their run: all runs here train the same but for that, and need not compile it again.
survival.py compiles anew in every process."""


def train(
    folder: Path, *, rows: Any = None, facts: dict[str, Any] = FACTS, steps: int = 8, expect: Any = (), **more: Any
):  # fmt: skip
    """Trains, or is interrupted by an error of the kinds expected."""

    def compiled_once(*arguments: Any, **named: Any) -> Any:
        return COMPILED.setdefault(steps, make_step(*arguments, **named))

    rows = cast(Any, Rows() if rows is None else rows)
    job = tiny.job("align", folder, facts=facts, steps=steps, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "make_step", compiled_once)
        if expect:
            with pytest.raises(expect):
                loop.train_loop(tiny.structure(tiny.PLAIN), tiny.arrays(tiny.PLAIN, std=0.1), rows, job)
            return {}
        return loop.train_loop(tiny.structure(tiny.PLAIN), tiny.arrays(tiny.PLAIN, std=0.1), rows, job)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("whole")
    return SimpleNamespace(trained=train(folder), folder=folder)


def goes_on(folder: Path, whole: SimpleNamespace, *, after: int) -> None:
    """The same command trains the steps after the checkpoint, no other, and ends bit for bit where `whole` did: so does
    a run that begins anew."""
    rows = Rows()
    assert_same(train(folder, rows=rows), whole.trained)
    assert rows.reads == 8 - after


# --- damaged and foreign checkpoints ----------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    file = max((path for path in folder.rglob("*") if path.parent.name == "d"), key=lambda path: path.stat().st_size)
    if how == "a flipped bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif how == "a shorter file":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "a missing file":
        file.unlink()
    elif how == "Orbax's own record":
        (folder / "_CHECKPOINT_METADATA").write_text("{")
    else:
        (folder / sums.NAME).unlink()


@pytest.mark.parametrize(
    "how", ["a flipped bit", "a shorter file", "a missing file", "Orbax's own record", "no checksums"]
)
def test_a_damaged_checkpoint_is_skipped(whole, tmp_path: Path, capsys, how: str):
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    damage(tmp_path / "run" / "checkpoints" / "6", how)  # kept: 6 and 8; so nothing whole is left
    with pytest.raises(MoextendError, match="no checkpoint in .* is whole"):
        train(tmp_path / "run")
    shutil.copytree(whole.folder / "checkpoints" / "8", tmp_path / "run" / "checkpoints" / "8")
    damage(tmp_path / "run" / "checkpoints" / "8", how)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    shutil.copytree(whole.folder / "checkpoints" / "6", tmp_path / "run" / "checkpoints" / "6")
    capsys.readouterr()
    goes_on(tmp_path / "run", whole, after=6)
    assert "checkpoints/8 is skipped: " in capsys.readouterr().err
    assert sums.fault(tmp_path / "run" / "checkpoints" / "8") is None  # made again


def test_a_checkpoint_that_cannot_be_read_now_is_not_thrown_away(whole, tmp_path: Path, monkeypatch):
    """A disk or a network may be at fault, and be well again."""

    def refuses(*_: object, **_named: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    shutil.copytree(whole.folder, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with monkeypatch.context() as patch, pytest.raises(MoextendError, match="8 cannot be read: .* Stale file handle"):
        patch.setattr(sums, "_digests", refuses)
        train(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
    goes_on(tmp_path / "run", whole, after=8)


def test_other_settings_are_named(whole, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    other = {"base": "abc", "settings": {"length": 48, "optimizer": {"learning_rate": 0.2}}}
    with pytest.raises(MoextendError) as error:
        train(tmp_path / "run", facts=other)
    assert "settings.length: 40 there, 48 now" in str(error.value)
    assert "settings.optimizer.learning_rate: 0.1 there, 0.2 now" in str(error.value)
    assert "base" not in str(error.value).split("(")[1]


def test_resume_from_starts_elsewhere_once(whole, tmp_path: Path, capsys):
    there = whole.folder / "checkpoints"
    rows = Rows()
    assert_same(train(tmp_path / "a", resume_from=there / "6", rows=rows), whole.trained)
    assert [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl")] == [7, 8]
    assert f"starting from step 6 in {there}" in capsys.readouterr().out
    train(tmp_path / "a", resume_from=there / "6")  # its own checkpoints come first
    assert "starting from" not in capsys.readouterr().out
    train(tmp_path / "b", resume_from=whole.folder)
    assert f"starting from step 8 in {there}" in capsys.readouterr().out
    with pytest.raises(MoextendError, match="holds no checkpoints"):
        train(tmp_path / "c", resume_from=tmp_path)
    with pytest.raises(MoextendError, match="settings.length"):
        train(tmp_path / "d", resume_from=there, facts={**FACTS, "settings": {"length": 41}})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    arrays=st.dictionaries(
        st.text("abcd/_", min_size=1, max_size=8).map(lambda name: f"x{name}y".replace("//", "/")),
        hnp.arrays(
            st.sampled_from(["float32", "float16", "int32", "uint8", "bool"]), hnp.array_shapes(min_dims=0, max_side=4)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_leaves_come_back_bit_for_bit(tmp_path_factory, arrays: dict[str, np.ndarray]):
    folder = tmp_path_factory.mktemp("leaves") / "result"
    train_state.save_leaves(folder, {path: jax.numpy.asarray(array) for path, array in arrays.items()}, facts={"a": 1})
    again = train_state.load_leaves(folder, facts={"a": 1})
    assert again is not None
    assert_same(again, arrays)


# --- losses that are not finite ---------------------------------------------------------------------------------------


class Hanging(Rows):
    """Waits for ever before batch `at`."""

    def __init__(self, at: int):
        super().__init__()
        self._hangs = at

    def __next__(self) -> Batch:
        while self.at + 1 == self._hangs:
            time.sleep(1)
        return super().__next__()


@pytest.mark.slow
def test_a_step_that_takes_too_long_ends_the_process_and_says_where(tmp_path: Path):
    code = (
        "import sys, pathlib, test_survival as t; t.train(pathlib.Path(sys.argv[1]), rows=t.Hanging(6), hang_after=12)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "__next__" in done.stderr and "train_loop" in done.stderr
    assert_same(train(tmp_path), train(tmp_path / "uninterrupted"))


class Poisoned(Rows):
    """Some steps' batches have an image that is not a number."""

    def __init__(self, *bad: int):
        super().__init__()
        self.bad = bad

    def __next__(self) -> Batch:
        batch = super().__next__()
        return batch._replace(features={"image": batch.features["image"] * np.nan}) if self.at in self.bad else batch


def test_steps_that_are_not_finite_change_nothing(tmp_path: Path):
    before = train(tmp_path / "before", steps=2)
    after = train(tmp_path / "after", rows=Poisoned(3), steps=3, nonfinite_limit=1)
    assert_same(after, before)
    start = tiny.arrays(tiny.PLAIN, std=0.1)
    assert all((leaf != start[path]).any() for path, leaf in before.items())
    rows = read_metrics(tmp_path / "after" / "metrics.jsonl")
    assert [row["nonfinite_steps"] for row in rows] == [0, 0, 1] and rows[2]["loss"] is None
    saved = tmp_path / "after" / "nonfinite" / "step_0000003-process_0.npz"
    batch = read_batch(saved)
    assert np.isnan(batch.features["image"]).all()
    np.testing.assert_array_equal(batch.ids_BL, Rows().made[3].ids_BL)
    assert json.loads(saved.with_suffix(".json").read_text())["examples"] == ["3"]


def test_too_many_of_them_end_the_run_and_a_restart_goes_on(tmp_path: Path):
    with pytest.raises(MoextendError, match=r"2 steps until step 6 .* 1 are allowed; their batches are in .*nonfinite"):
        train(tmp_path, rows=Poisoned(4, 6), nonfinite_limit=1)
    names = {path.stem for path in (tmp_path / "nonfinite").glob("*.npz")}
    assert names == {"step_0000004-process_0", "step_0000006-process_0"}
    # What is on disk is from before step 6, with step 4 counted.
    rows = Poisoned(4)
    train(tmp_path, rows=rows, nonfinite_limit=1)
    assert rows.reads == 8 - 4 and read_metrics(tmp_path / "metrics.jsonl")[-1]["nonfinite_steps"] == 1


def test_roll_back_goes_on_with_later_data(tmp_path: Path, capsys):
    rows = Poisoned(4, 6)
    with pytest.raises(MoextendError, match="1 steps until step 5"):  # the sixth batch is the fifth step's
        train(tmp_path / "once", rows=rows, rollbacks=1, checkpoint_every=3)
    assert "step 4 goes back to step 3, with later data" in capsys.readouterr().out
    written = {path.stem for path in (tmp_path / "once" / "nonfinite").glob("*.npz")}
    assert written == {"step_0000004-process_0", "step_0000005-process_0-back_1"}
    train(tmp_path / "twice", rows=rows, rollbacks=2, checkpoint_every=3)
    assert [row["step"] for row in read_metrics(tmp_path / "twice" / "metrics.jsonl")] == list(range(1, 9))
    assert rows.at == 11  # 4 is skipped; 5 was trained and undone; 6 is skipped
    with pytest.raises(MoextendError, match="1 steps until step 1"):  # no checkpoint to go back to
        train(tmp_path / "none", rows=Poisoned(1), rollbacks=1)


def test_going_back_is_no_step_time(tmp_path: Path, monkeypatch):
    away, roll_back = 0.0, train_state.roll_back

    def slow(*arguments: Any) -> Any:
        nonlocal away
        away += 1000
        return roll_back(*arguments)

    monkeypatch.setattr(meter, "perf_counter", lambda: time.perf_counter() + away)
    monkeypatch.setattr(train_state, "roll_back", slow)
    train(tmp_path, rows=Poisoned(4), rollbacks=1, checkpoint_every=3)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[3]["seconds"] > 1000 and rows[3]["step_seconds"] < 100


@pytest.mark.slow
def test_what_trains_is_in_memory_once(tmp_path: Path, monkeypatch):
    """Weights and AdamW's moments, from the second step on: after a first start, a resume, and going back. (On a CPU a
    save keeps what it writes, so these do not save between.)"""
    trains = tiny.job("align", tmp_path, facts={}, steps=1).trains
    trainable, frozen = split(tiny.arrays(tiny.PLAIN), trains)
    shape = next(leaf.shape for leaf in trainable.values() if leaf.shape not in {of.shape for of in frozen.values()})
    alike = sum(leaf.shape == shape for leaf in trainable.values())
    del trainable, frozen
    put, seen = loop.place_rows, []

    def counted(batch, mesh):
        seen.append(sum(leaf.shape == shape for leaf in jax.live_arrays()) - others)
        return put(batch, mesh)

    monkeypatch.setattr(loop, "place_rows", counted)
    runs: list[dict[str, Any]] = [{"steps": 4}, {"steps": 8}, {"steps": 12, "rows": Poisoned(10), "rollbacks": 1}]
    for more in runs:
        gc.collect()
        others = sum(leaf.shape == shape for leaf in jax.live_arrays())
        seen.clear()
        train(tmp_path, checkpoint_every=100, **more)
        assert len(seen) >= 4 and seen[1:] == [3 * alike] * (len(seen) - 1)


def test_batches_of_good_steps_are_let_go(tmp_path: Path):
    watch = Watch(tmp_path, most=1, name_of=str)
    for step in range(1, 9):
        watch.note(step, Rows().made[0], {"finite": step != 3, "loss": 0.0, "grad_norm": 0.0})
        assert len(watch._seen) <= 3
    assert watch.check() == [3] and {path.name for path in tmp_path.glob("*.npz")} == {"step_0000003-process_0.npz"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("503 of a bucket")])
def test_a_full_disk_does_not_end_a_run_for_a_bad_batch(tmp_path: Path, monkeypatch, capsys, error: Exception):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(np, "savez", full)
    train(tmp_path, rows=Poisoned(3), steps=4, nonfinite_limit=1)
    assert f"the batch of step 3 is not written: {error}" in capsys.readouterr().err


def test_a_bad_batch_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(file: Any, **_: Any):
        file.write(b"PK")
        raise KeyboardInterrupt

    watch = Watch(tmp_path, most=1, name_of=str)
    watch.note(1, Rows().made[0], {"finite": False, "loss": 0.0, "grad_norm": 0.0})
    monkeypatch.setattr(np, "savez", stopped)
    with pytest.raises(KeyboardInterrupt):
        watch.check()
    assert not [*tmp_path.iterdir()]


# --- being told to stop -----------------------------------------------------------------------------------------------


def told_at(monkeypatch, step: int, signals: int = 1, number: int = signal.SIGTERM):
    """A signal arrives while that step is prepared."""
    put = loop.place_rows
    seen = 0

    def put_and_signal(batch, mesh):
        nonlocal seen
        seen += 1
        if seen == step:
            for _ in range(signals):
                os.kill(os.getpid(), number)
        return put(batch, mesh)

    monkeypatch.setattr(loop, "place_rows", put_and_signal)


@pytest.fixture
def listening(monkeypatch):
    before = {number: signal.getsignal(number) for number in (*preemption.SIGNALS, signal.SIGINT)}
    monkeypatch.setattr(preemption._Notice, "given", False)
    monkeypatch.setattr(preemption._Notice, "interrupted", False)
    preemption.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Service:
    """JAX's, in one process: all stop at the number after the last that was asked with, and at no other."""

    def __init__(self):
        self.asked: list[int] = []
        self.stops_at: int | None = None

    def reached(self, number: int) -> bool:
        self.asked.append(number)
        return number == self.stops_at

    def notice(self) -> None:
        self.stops_at = self.asked[-1] + 1 if self.asked else 1


def test_of_several_processes_a_notice_between_two_stages_stops_the_second(whole, tmp_path: Path, monkeypatch):
    """The steps of a stage that begins, or goes on, are no numbers to ask with: they begin anew, or jump."""
    service = Service()
    monkeypatch.setattr(preemption._Notice, "alone", False)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    train(tmp_path / "first")
    assert len(service.asked) == 8  # by each step, and by nothing that is saved
    shutil.copytree(whole.folder, tmp_path / "second")
    for step in (tmp_path / "second" / "checkpoints").glob("8"):
        shutil.rmtree(step)
    service.notice()
    with pytest.raises(preemption.Preempted, match="align is saved at step 7 of 8"):
        train(tmp_path / "second")
    service.notice()
    with pytest.raises(preemption.Preempted, match="nothing was being trained"):
        preemption.stop_if_told()


def test_of_several_processes_a_notice_while_one_goes_back_is_not_lost(tmp_path: Path, monkeypatch):
    service = Service()
    service.stops_at = 4
    monkeypatch.setattr(preemption._Notice, "alone", False)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    monkeypatch.setattr(preemption, "_ASKED", itertools.count(1))
    with pytest.raises(preemption.Preempted, match="align is saved at step 3 of 8"):
        train(tmp_path, rows=Poisoned(4), rollbacks=1, checkpoint_every=3)
    assert service.asked == [1, 2, 3, 4]


@pytest.mark.parametrize("signals", [1, 3])
def test_told_to_stop_it_saves_and_goes_on_bit_for_bit(whole, tmp_path: Path, monkeypatch, listening, signals: int):
    with monkeypatch.context() as patch, pytest.raises(preemption.Preempted, match="align is saved at step 5 of 8"):
        told_at(patch, 5, signals)
        train(tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["4", "5"]
    monkeypatch.setattr(preemption._Notice, "given", False)
    goes_on(tmp_path, whole, after=5)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 9))


def test_the_first_interrupt_saves_and_goes_on_bit_for_bit(whole, tmp_path: Path, monkeypatch, listening, capfd):
    with monkeypatch.context() as patch, pytest.raises(preemption.Preempted) as notice:
        told_at(patch, 5, number=signal.SIGINT)
        train(tmp_path)
    assert (str(notice.value), notice.value.code) == ("align is saved at step 5 of 8", 130)
    assert capfd.readouterr().err == "moextend: stopping after this step; Ctrl-C again to leave at once\n"
    preemption.listen()  # as the next command of this process does
    goes_on(tmp_path, whole, after=5)


def test_the_second_interrupt_leaves_at_once(tmp_path: Path, monkeypatch, listening):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        told_at(patch, 5, 2, signal.SIGINT)
        train(tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "4"]


def test_an_interrupt_where_nothing_trains_says_what_stays(tmp_path: Path, monkeypatch, listening):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_module, "open_run", interrupted)
    work = tmp_path / "w"
    (work / "align" / "result" / "0").mkdir(parents=True)
    for step in ("300", "1200", "1300.orbax-checkpoint-tmp"):
        (work / "extend" / "checkpoints" / step).mkdir(parents=True)

    def message() -> str:
        with pytest.raises(KeyboardInterrupt) as error, run_module.working(tiny.run_settings(), work):
            pass
        return str(error.value)

    assert message() == f"kept in {work}: align, extend until step 1200; the same command goes on from there"
    work = tmp_path / "empty"
    assert message().startswith(f"no stage had saved anything in {work}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads the configuration by it
@pytest.mark.parametrize(
    ("number", "code", "why"),
    [
        (signal.SIGTERM, preemption.EXIT_CODE, "told to stop"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.long),
    ],
)
def test_the_command_line_saves_when_told_to_stop(tmp_path: Path, capsys, number: int, code: int, why: str):
    """A whole process, told while it trains; the same command then ends, and says nothing was lost."""
    llava = tiny.write_llava(tmp_path / "llava")
    config = tiny.write_config(
        tmp_path, base=tiny.write_base(tmp_path / "base"), data="llava_pretrain", split="train", evaluated="train",
        manual=llava,
    )  # fmt: skip
    config.write_text(config.read_text().replace("align=stage(3)", "align=stage(400)"))
    words = ["align", "--config", str(config), "--workdir", str(tmp_path / "w")]
    process = subprocess.Popen(
        [sys.executable, "-m", "moextend_jax.cli", *words], env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = tmp_path / "w" / "align" / "metrics.jsonl"
    with ended(process):
        deadline = time.monotonic() + 120
        while not (lines.exists() and lines.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(SystemExit) as second:
            cli.main(words)
        assert second.value.code == 2 and f"is in use by process {process.pid}" in capsys.readouterr().err
        for _ in range(1 if number == signal.SIGINT else 2):
            process.send_signal(number)
        _, message = process.communicate(timeout=120)
    assert process.returncode == code, message
    (step,) = re.findall(rf"{why}: align is saved at step (\d+) of 400; the same command goes on", message)
    saved = max(int(path.name) for path in (tmp_path / "w" / "align" / "checkpoints").iterdir())
    assert saved == int(step)


# --- locks and disks --------------------------------------------------------------------------------------------------


def test_a_work_directory_has_one_run(tmp_path: Path):
    with locked(tmp_path / "w"):
        code = (
            "import sys; from pathlib import Path; from moextend_jax.lock import locked\n"
            "with locked(Path(sys.argv[1])): print('alone', flush=True); sys.stdin.read()"
        )
        start = [sys.executable, "-c", code, str(tmp_path / "w")]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        other = subprocess.run(start, capture_output=True, text=True, env=environment, input="")
        assert other.returncode and f"in use by process {os.getpid()} on " in other.stderr
    # a holder that dies leaves nothing behind
    holder = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    with ended(holder):
        assert holder.stdout and holder.stdout.readline() == "alone\n"
        with pytest.raises(MoextendError, match=f"in use by process {holder.pid} "), locked(tmp_path / "w"):
            pass
    with locked(tmp_path / "w"):
        pass


def test_a_work_directory_that_is_gone_hides_no_notice(tmp_path: Path):
    with pytest.raises(preemption.Preempted, match="saved"), locked(tmp_path / "w"):
        (tmp_path / "w").rename(tmp_path / "moved")
        raise preemption.Preempted("align is saved")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 400 kB, where this user may mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb") as file:
        while True:
            try:
                os.write(file.fileno(), b"\0" * 4096)
            except OSError:
                return


@pytest.fixture
def failed_saves():
    """Orbax leaves coroutines of a save that failed unawaited; their end must be this test's, not a later one's."""
    yield
    gc.collect()


OF_ORBAX = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # whose threads still save


@OF_ORBAX
@pytest.mark.usefixtures("failed_saves")
def test_a_full_disk(whole, small_disk: Path):
    def full(batch, mesh, put=loop.place_rows):
        nonlocal seen
        seen += 1
        if seen == 6:
            fill(small_disk)
        return put(batch, mesh)

    seen = 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MoextendError, match="No space left on device"):
        patch.setattr(loop, "place_rows", full)
        train(small_disk)
    (small_disk / "filler").unlink()
    finished = [path for path in (small_disk / "checkpoints").iterdir() if path.name.isdigit()]
    assert finished and all(sums.fault(path) is None for path in finished)
    goes_on(small_disk, whole, after=max(int(path.name) for path in finished))


@OF_ORBAX
@pytest.mark.usefixtures("failed_saves")
def test_a_process_that_cannot_save_does_not_wait_for_the_others(tmp_path: Path, monkeypatch):
    """They wait elsewhere for it, and would with it for an hour; when it leaves, it tells them."""
    waited: list[str] = []
    for module in (ocp.multihost, importlib.import_module("orbax.checkpoint._src.multihost.multihost")):
        monkeypatch.setattr(module, "get_barrier_sync_fn", lambda **_: lambda key, timeout_ms: waited.append(key))

    def full(folder: Path) -> None:
        waited.append("failed")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        raise ValueError("of the caller, who handles it by this")
    except ValueError:
        train_state.save_leaves(tmp_path / "result", {"leaf": jax.numpy.ones(3)}, facts={})
    monkeypatch.setattr(sums, "write_sums", full)
    with pytest.raises(MoextendError, match="No space left on device"):
        train_state.save_leaves(tmp_path / "result", {"leaf": jax.numpy.ones(3)}, facts={})
    assert len(waited) > 1 and waited[-1] == "failed"


@OF_ORBAX
@pytest.mark.usefixtures("failed_saves")
def test_a_work_directory_that_vanishes(whole, tmp_path: Path):
    def vanishing(batch, mesh, put=loop.place_rows):
        nonlocal seen
        seen += 1
        if seen == 5:
            (tmp_path / "run").rename(tmp_path / "moved")
        return put(batch, mesh)

    seen = 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MoextendError, match="is gone|cannot save"):
        patch.setattr(loop, "place_rows", vanishing)
        train(tmp_path / "run")
    # Orbax's threads may have made one again, in which nothing is whole.
    shutil.copytree(tmp_path / "moved", tmp_path / "back")
    kept = [path for path in (tmp_path / "back" / "checkpoints").iterdir() if path.name.isdigit()]
    goes_on(tmp_path / "back", whole, after=max(int(path.name) for path in kept if sums.fault(path) is None))


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_of_a_killed_run_end(tmp_path: Path):
    llava = tiny.write_llava(tmp_path / "llava", rows=13)
    code = (
        "import multiprocessing, os, sys, signal; from pathlib import Path\n"
        "import survival\n"
        "def work():\n"
        "    def die(batch, mesh):\n"
        "        pids = [child.pid for child in multiprocessing.active_children()]\n"
        "        Path(sys.argv[3]).write_text(' '.join(map(str, pids)))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    survival.place_rows = die\n"
        "    survival.stage(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)\n"
        "if __name__ == '__main__': work()\n"
    )
    (tmp_path / "killed.py").write_text(code)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "run"), str(llava), str(tmp_path / "workers")],
        env=environment,
    )  # fmt: skip
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert done.returncode == -signal.SIGKILL and len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("points", [2, pytest.param(8, marks=pytest.mark.long)])
def test_killed_at_some_points_it_ends_where_it_would_have(tmp_path: Path, points: int):
    """A few points of survival.py, in a process that has not started JAX."""
    done = subprocess.run(
        [sys.executable, str(HERE / "survival.py"), "--points", str(points)],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same end True") == points
    assert done.stdout.count("codes [-9, 0]") >= points * 3 // 4  # a time may fall behind the end
