"""Metrics files survive interruption, hold valid JSON and TensorBoard events, and other tools get the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from moextend_jax.config import MoextendError
from moextend_jax.runs.run import working
from moextend_jax.train import metrics, sinks
from moextend_jax.train.metrics import MetricsWriter, read_metrics

HERE = Path(__file__).parent


def write(directory, steps, **options):
    with MetricsWriter(directory, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": np.float32(1 / step), "tokens": 512 * step})


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(1, 11))
    write(tmp_path / "cut", range(1, 8))  # killed after step 7; its last checkpoint is step 5
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    write(tmp_path / "cut", range(6, 11), resume_step=5)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_fresh_start_forgets_the_run_before(tmp_path):
    write(tmp_path, range(1, 5))
    write(tmp_path, range(1, 3))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_are_strict_json_even_when_the_loss_is_not_a_number(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 3})
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "loss": None, "grad_norm": None, "tokens": 3}


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    from tensorboardX.record_writer import masked_crc32c

    write(tmp_path, [1, 2])
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:  # records: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        body = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(body)
        event = Event.FromString(body)
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert scalars == {("loss", 1): 1.0, ("loss", 2): 0.5, ("tokens", 1): 512.0, ("tokens", 2): 1024.0}


def test_only_process_0_writes(tmp_path):
    write(tmp_path / "run", [1], process_index=1)
    assert not (tmp_path / "run").exists()


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(MoextendError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


# --- sinks ------------------------------------------------------------------------------------------------------------


class Tools:
    """Stands for wandb, trackio and mlflow: what is called of them, with their own signatures; keeps what it was told
    by run."""

    def __init__(self, monkeypatch):
        self.logged: dict[str, list[tuple[int, dict]]] = {}
        self.named: dict[str, str] = {}
        self.closed: list[str] = []
        self.broken = False
        modules = {
            "wandb": {"init": self.wandb_init}, "trackio": {"init": self.trackio_init},
            "mlflow": {"MlflowClient": lambda tracking_uri=None, registry_uri=None: self},
            "mlflow.entities": {
                "Metric": lambda key, value, timestamp, step: (step, {key: value}),
                "Param": lambda key, value: (key, value),
            },
        }  # fmt: skip
        for name, parts in modules.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__dict__.update(parts)
            monkeypatch.setitem(sys.modules, name, module)

    def start(self, run_id, name):
        self.logged.setdefault(run_id, [])
        self.named[run_id] = name

    def run(self, run_id):
        def log(numbers, step: Any = None, commit=None):
            if self.broken:
                raise ConnectionError("no route to host\nand a stack")
            self.logged[run_id].append((step, numbers))

        latest = max((step + 1 for step, _ in self.logged[run_id]), default=0)
        return types.SimpleNamespace(log=log, step=latest, finish=lambda: self.closed.append(run_id))

    def wandb_init(
        self, entity=None, project=None, dir=None, id=None, name=None, config: Any = None, group=None, resume=None
    ):  # fmt: skip
        assert (project, group, resume, config["seed"]) == ("moextend", "demo", "allow", 3)
        self.start(id, name)
        return self.run(id)

    def trackio_init(self, project, name: Any = None, group=None, config=None, resume="never", embed=True):
        assert (project, group, resume, embed) == ("moextend", "demo", "allow", False)
        self.start(name, name.rpartition("-")[0])
        return self.run(name)

    # of MlflowClient
    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        assert experiment_id == "7"
        run_id = f"run {len(self.logged)}"
        self.start(run_id, run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert len(params) <= 100  # MLflow's own limit
        assert all(isinstance(value, str) for _, value in params)
        if metrics:
            (step,) = {step for step, _ in metrics}
            self.run(run_id).log({name: value for _, one in metrics for name, value in one.items()}, step=step)

    def set_terminated(self, run_id, status=None, end_time=None):
        self.closed.append(run_id)


@pytest.fixture
def tools(monkeypatch) -> Tools:
    return Tools(monkeypatch)


SETTINGS = {"seed": 3, "align": {"steps": 5, "optimizer": {"clip_norm": 1.0}}}


def write_to(kind, directory, steps, resume_step=0):
    with MetricsWriter(
        directory, resume_step=resume_step, sinks=(kind,), name="demo/align", settings=SETTINGS
    ) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "new_share": [0.25, None, 0.5]})


@pytest.mark.parametrize("kind", ["wandb", "trackio", "mlflow"])
def test_a_tool_gets_scalars_and_a_run_that_goes_on_is_the_same_run_there(tools, tmp_path, kind):
    write_to(kind, tmp_path, range(1, 4))
    write_to(kind, tmp_path, range(3, 5), resume_step=2)
    ((run_id, logged),) = tools.logged.items()
    assert tools.named == {run_id: "demo/align"} and tools.closed == [run_id, run_id]
    assert logged[0] == (1, {"loss": 1.0, "new_share/layer_00": 0.25, "new_share/layer_02": 0.5})
    again = [] if kind == "wandb" else [3]  # W&B takes no step twice
    assert [step for step, _ in logged] == [1, 2, 3, *again, 4]
    write_to(kind, tmp_path, [1])
    assert len(tools.logged) == 2  # a fresh start is another run
    assert [row["new_share"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [[0.25, None, 0.5]]


def test_a_half_written_file_of_ids_makes_another_run_and_is_never_written_half(tools, tmp_path, monkeypatch):
    write_to("wandb", tmp_path, [1, 2])
    (tmp_path / "sinks.json").write_text('{"wandb": "12')
    write_to("wandb", tmp_path, [3], resume_step=2)
    assert len(tools.logged) == 2
    ids, write = (tmp_path / "sinks.json").read_text(), Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[:9], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MoextendError, match="wandb does not start: .*No space left on device"):
        sinks.open_sinks(["wandb"], tmp_path, name="demo/align", settings=SETTINGS, resume_step=0)
    assert (tmp_path / "sinks.json").read_text() == ids


def test_a_tool_that_fails_is_left_behind(tools, tmp_path, capsys):
    with MetricsWriter(tmp_path, sinks=("wandb", "tensorboard"), name="demo/align", settings=SETTINGS) as writer:
        tools.broken = True
        for step in (1, 2):
            writer.write(step, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().err == "sinks: wandb failed and gets no more: no route to host\n"


def test_a_tool_that_does_not_start_is_one_line(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "create_experiment", lambda _: 1 / 0)
    with pytest.raises(MoextendError, match="^sinks: mlflow does not start: division by zero$"):
        write_to("mlflow", tmp_path, [1])


def test_a_missing_package_is_named_before_anything_else(monkeypatch, tmp_path):
    monkeypatch.setitem(sinks.SINKS, "wandb", sinks.SINKS["wandb"]._replace(package="no_such_wandb"))
    settings = dataclasses.replace(tiny.run_settings(), sinks=("tensorboard", "wandb"))
    error = pytest.raises(MoextendError, match="^sinks: wandb needs the package no_such_wandb: pip install ")
    with error, working(settings, tmp_path / "w"):
        pass
    assert not (tmp_path / "w").exists()


def test_mlflow_s_own_file_cannot_be_in_a_bucket(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sinks.SINKS, "mlflow", sinks.SINKS["mlflow"]._replace(package="json"))
    sinks.check(["mlflow"], "work")
    with pytest.raises(MoextendError, match="mlflow keeps no file in gs://bucket/work: set MLFLOW_TRACKING_URI"):
        sinks.check(["mlflow"], "gs://bucket/work")


REAL = """
import sys
import threading
from pathlib import Path
from moextend_jax.train.metrics import MetricsWriter
kind, folder = sys.argv[1], Path(sys.argv[2]) / "demo" / "align"
for steps, start in ((range(1, 4), 0), (range(3, 5), 2)):
    with MetricsWriter(folder, resume_step=start, sinks=(kind,), name="demo/align", settings={"seed": 3}) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "load_max": [0.5, float("nan")]})
"""


@pytest.fixture
def real(tmp_path):
    """Runs REAL with the real package of a sink, without a network; its id of the run."""

    def run(kind: str, **environment: str) -> str:
        if importlib.util.find_spec(kind) is None:
            pytest.skip(f"{kind} is not installed")
        done = subprocess.run(
            [sys.executable, "-c", REAL, kind, str(tmp_path)], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment},
        )  # fmt: skip
        assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
        return json.loads((tmp_path / "demo" / "align" / "sinks.json").read_text())[kind]

    return run


def test_the_real_wandb_offline(real, tmp_path):
    run_id = real("wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    runs = sorted((tmp_path / "demo" / "align" / "wandb").glob("offline-run-*"))
    assert len(runs) >= 1 and all(run_id in path.name for path in runs)
    assert b"load_max/layer_00" in b"".join(file.read_bytes() for file in tmp_path.rglob(f"run-{run_id}.wandb"))


def test_the_real_trackio(real, tmp_path):
    name = real("trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "moextend.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {row[0] for row in rows} == {name} and [row[1] for row in rows] == [1, 2, 3, 3, 4]
    assert json.loads(rows[1][2])["loss"] == 0.5


def test_the_real_mlflow(real, tmp_path):
    where = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns"}
    run_id = real("mlflow", **where)
    (losses,) = tmp_path.glob(f"mlruns/*/{run_id}/metrics/loss")  # lines of time, value, step
    assert [line.split()[1:] for line in losses.read_text().splitlines()][:2] == [["1.0", "1"], ["0.5", "2"]]
    assert (losses.parents[1] / "params" / "seed").read_text() == "3"
    assert len(list(tmp_path.glob("mlruns/*/*/metrics"))) == 1


def test_a_slow_bucket_does_not_hold_up_training(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(metrics, "is_url", lambda path: True)
    write_text, sent, may_send = Path.write_text, [], threading.Event()

    def slow(path: Path, text: str, **named: Any) -> int:
        if path == tmp_path / "metrics.jsonl":
            sent.append(text.count("\n"))
            assert may_send.wait(30)
        return write_text(path, text, **named)

    monkeypatch.setattr(Path, "write_text", slow)
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
        may_send.set()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(sent) == 2 and sent[-1] == 3  # what came meanwhile went all at once
