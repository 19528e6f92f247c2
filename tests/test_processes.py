"""Several processes, started by the local launcher, train, count and save as one process does."""

from __future__ import annotations

import dataclasses
import errno
import importlib
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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import process_of_a_run as one
import pytest
import tiny
import torus
from children import ended

from moextend_jax import compile_cache, distributed, machine
from moextend_jax.checkpoints import train_state
from moextend_jax.checkpoints.loading import open_base
from moextend_jax.config import MoextendError
from moextend_jax.runs.models_of import open_model
from moextend_jax.runs.run import check_same_files, open_run, settings_of, write_json
from moextend_jax.settings import EvaluateSettings, OptimizerConfig, RunSettings, StageSettings
from moextend_jax.sharding import MESH_AXES
from moextend_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
ALONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def launch(
    *words: str, processes: int, devices: int = 1, code: int = 0, on_torus: bool = False
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}", f"--devices={devices}"]
    environment = os.environ | ({torus.VARIABLE: "yes"} if on_torus else {})
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=900, check=False, env=environment
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def launch_work(folder: Path, llava: Path, sizes: dict[str, int], **how: Any) -> str:
    script = f"--script={ROOT / 'tests' / 'process_of_a_run.py'}"
    words = [script, "--", str(folder), str(llava), json.dumps(sizes)]
    return launch(*words, **how).stdout


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny.write_llava(tmp_path_factory.mktemp("llava"), rows=one.ROWS)


@pytest.fixture(scope="module")
def alone(llava, tmp_path_factory) -> tuple[Path, one.Done]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, one.work(folder, llava, ALONE)


def check(folder: Path, alone: tuple[Path, one.Done], *, parts: list[list[int]]) -> None:
    """`parts`: which processes read which rows, by share."""
    read = [json.loads((folder / f"read-{process}.json").read_text()) for part in parts for process in part[:1]]
    assert sorted(sum(read, [])) == list(range(one.ROWS))  # each conversation once, whoever read it
    for part in parts:
        assert len({(folder / f"read-{process}.json").read_text() for process in part}) == 1
    _same_training(folder, alone)
    with np.load(folder / "out.npz") as out:
        np.testing.assert_array_equal(out["counts"], alone[1].counts)
        np.testing.assert_array_equal(out["ids"], alone[1].ids)  # every batch, row by row


def _same_training(folder: Path, alone: tuple[Path, one.Done]) -> None:
    wanted, got = (read_metrics(where / "metrics.jsonl") for where in (alone[0], folder))
    assert [row["step"] for row in got] == list(range(1, one.STEPS + 1))
    for a, b in zip(wanted, got, strict=True):
        assert a["tokens"] == b["tokens"]
        np.testing.assert_allclose([b["loss"], b["ce"], b["aux"]], [a["loss"], a["ce"], a["aux"]], atol=1e-5, rtol=0)
    with np.load(folder / "out.npz") as out:
        for path, leaf in alone[1].trained.items():
            np.testing.assert_allclose(out[f"trained {path}"], leaf, atol=1e-5, rtol=0, err_msg=path)


def cut_off(source: Path, folder: Path) -> Path:
    """A copy of a finished run as it was after its first checkpoint."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoints" / str(one.STEPS))
    return folder


TWO = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
HOW: dict[str, Any] = {"processes": 2, "devices": 2, "on_torus": True}


@pytest.fixture(scope="module")
def two(llava, tmp_path_factory) -> Path:
    """Each process's rows lie scattered in the mesh."""
    folder = tmp_path_factory.mktemp("two") / "run"
    printed = launch_work(folder, llava, TWO, **HOW)
    assert "finetune 4/4" in printed and "Gloo" not in printed
    return folder


def trained_steps(folder: Path) -> int:
    """Of the last start: a run that begins anew ends the same as one that goes on."""
    return json.loads((folder / "trained-0.json").read_text())


def struck(folder: Path, llava: Path, *, number: int, at: int, code: int) -> str:
    """A run in two processes of which one gets a signal before step `at`, and then the rest of it."""
    words = [f"--script={ROOT / 'tests' / 'process_of_a_run.py'}", "--", str(folder), str(llava), json.dumps(TWO)]
    printed = launch(*words, "1", str(at), str(number), code=code, **HOW).stdout
    saved = max(steps_saved(folder))
    assert 0 < saved < one.STEPS
    if code == 75:
        (step,) = map(int, re.findall(rf"finetune is saved at step (\d) of {one.STEPS}", printed))
        assert step == saved
    printed = launch(*words, **HOW).stdout
    assert trained_steps(folder) == one.STEPS - saved
    return printed


def steps_saved(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.fixture(scope="module")
def stopped(llava, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    printed = struck(folder, llava, number=signal.SIGTERM, at=1, code=75)
    assert "finetune 4/4" in printed and "Gloo" not in printed
    return folder


@pytest.mark.slow
def test_two_processes_that_were_told_to_stop_go_on_and_are_one_run(llava, alone, stopped, tmp_path: Path):
    """Told to stop, they agree on a step through JAX's service and save; the launcher's exit code is theirs. Also:
    their checkpoint goes on in one process, on another mesh, and ends where it would have ended."""
    check(stopped, alone, parts=[[0], [1]])
    folder = cut_off(stopped, tmp_path / "goes on alone")
    saved = max(steps_saved(folder))
    done = one.work(folder, llava, ALONE)
    assert trained_steps(folder) == one.STEPS - saved
    trained: dict[str, Any] = {f"trained {path}": leaf for path, leaf in done.trained.items()}
    np.savez(folder / "out.npz", **trained)
    _same_training(folder, alone)


@pytest.mark.slow
def test_two_processes_that_nobody_stops_are_one_run(alone, two):
    """Batches, counts, training and answers are one process's."""
    check(two, alone, parts=[[0], [1]])
    assert json.loads((two / "answers.json").read_text()) == one.answers(ALONE)


@pytest.mark.long
def test_ctrl_c_in_one_process_saves_in_all(llava, alone, tmp_path: Path):  # which has built the data
    printed = struck(tmp_path / "run", llava, number=signal.SIGINT, at=1, code=75)
    assert "finetune 4/4" in printed


@pytest.mark.slow
@pytest.mark.parametrize("how", ["told", pytest.param("killed", marks=pytest.mark.long)])
def test_a_signal_to_one_process_loses_no_bit(llava, two, stopped, tmp_path: Path, how: str):
    cut = stopped
    if how == "killed":
        cut = tmp_path / "cut"
        struck(cut, llava, number=signal.SIGKILL, at=4, code=128 + signal.SIGKILL)
    losses = [[row["loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (two, cut)]
    assert losses[0] == losses[1]
    with np.load(two / "out.npz") as whole, np.load(cut / "out.npz") as rest:
        assert set(whole) == set(rest)
        assert all(whole[name].tobytes() == rest[name].tobytes() for name in whole)


@pytest.mark.parametrize(
    ("processes", "devices", "shape", "parts"),
    [
        (4, 1, (2, 2, 1, 1), [[0], [1], [2], [3]]),
        (2, 4, (1, 2, 2, 2), [[0], [1]]),
        (4, 1, (1, 2, 1, 2), [[0, 1], [2, 3]]),  # the tensor axis crosses processes: they read the same rows
    ],
)
@pytest.mark.long
def test_more_processes_and_meshes(llava, alone, tmp_path: Path, processes, devices, shape, parts):
    sizes: dict[str, int] = dict(zip(MESH_AXES, shape, strict=True))
    launch_work(tmp_path, llava, sizes, processes=processes, devices=devices)
    check(tmp_path, alone, parts=parts)


@pytest.mark.slow
def test_several_processes_go_on_from_the_checkpoint_that_one_has_saved(llava, alone, tmp_path: Path):
    """On a mesh whose tensor axis crosses the two: both read all rows."""
    folder = cut_off(alone[0], tmp_path / "go on")
    saved = max(steps_saved(folder))
    launch_work(folder, llava, {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2}, **HOW)
    assert trained_steps(folder) == one.STEPS - saved
    check(folder, alone, parts=[[0, 1]])


@pytest.mark.long
def test_the_whole_run_in_two_processes(tmp_path: Path):
    """`moextend run` on a folder with a space in its name; then other commands on what it wrote. Finetune learns slowly
    here: new router leaves begin where their gradients are next to nothing, and Adam makes whole steps of rounding."""
    base = tiny.write_base(tmp_path / "base")
    config = tiny.write_config(tmp_path, base=base, data="easy_vqa/questions", split="train[:400]", evaluated="test")
    script, alone = f"--script={ROOT / 'tests' / 'short_run.py'}", tmp_path / "alone"
    workdir = tmp_path / "work dir"
    run = ["--", "run", f"--config={config}", "--config.finetune.optimizer.learning_rate=1e-5"]
    said = launch(script, *run, f"--workdir={workdir}", processes=2, devices=2, on_torus=True)
    # One process tells of preparations, and nobody of anything else.
    told = said.stderr.splitlines()
    assert said.stdout.count("layers to extend") == 1 and len(set(told)) == len(told)
    kinds = "preparing|compiling|opening|reading|hashing|looking for|features|evaluate"  # on a slow machine all of them
    assert not [line for line in told if not re.fullmatch(rf"({kinds}).*( \.\.\.|: \d+\.\d s)", line)]
    launch(script, *run, f"--workdir={alone}", processes=1)
    for stage in ("align", "extend", "finetune"):
        record = json.loads((workdir / stage / "stage.json").read_text())
        assert record["frozen_unchanged"] is True
        a, b = (read_metrics(where / stage / "metrics.jsonl") for where in (alone, workdir))
        np.testing.assert_allclose([row["loss"] for row in b], [row["loss"] for row in a], atol=1e-5)
    routed, expected = (json.loads((where / "select" / "routing.json").read_text()) for where in (workdir, alone))
    assert routed["chosen_layers"] == expected["chosen_layers"] and routed["tokens"] == expected["tokens"]
    summary, expected = (json.loads((where / "summary.json").read_text()) for where in (workdir, alone))
    assert summary["frozen_unchanged"] is True and summary["accuracy"] == expected["accuracy"]
    for text, losses in expected["text_loss"].items():
        np.testing.assert_allclose(list(summary["text_loss"][text].values()), list(losses.values()), atol=1e-5)
    settings, arrays = finished(workdir)
    # The routers may be as far apart as Adam's steps can bring them, and nothing else may.
    farthest = 2 * settings.finetune.steps * settings.finetune.optimizer.learning_rate
    for path, leaf in finished(alone)[1].items():
        atol = farthest if path.startswith("extensions/image/router/") else 1e-6
        np.testing.assert_allclose(arrays[path], leaf, atol=atol, rtol=0, err_msg=path)
    assert "</html>" in (workdir / "report.html").read_text()
    for words in (
        ["generate", f"--workdir={workdir}", "--prompt=What is it?", "--max_new_tokens=3"],
        ["routing", "collect", f"--checkpoint={workdir}", f"--text={tiny.ASSETS / 'text' / 'kjv.txt'}", "--samples=6",
         "--length=64", f"--out={tmp_path / 'stats.npz'}"],
        ["eval", "--benchmark=easy_vqa", "--limit=40", f"--workdir={workdir}"],
    ):  # fmt: skip
        seen = []
        for on_torus in (True, False):
            printed = launch(
                script, "--", *words, processes=1 + on_torus, devices=1 + on_torus, on_torus=on_torus
            ).stdout
            answers = workdir / "eval" / "easy_vqa" / "moextend" / "answers.jsonl"
            seen.append(
                (
                    printed if words[0] != "eval" else sorted(answers.read_text().splitlines()),
                    _arrays(tmp_path / "stats.npz"),
                )
            )
            shutil.rmtree(workdir / "eval", ignore_errors=True)
        if words[0] == "routing":
            _same_picks(seen[0][1], seen[1][1])
        else:
            assert seen[0][0] == seen[1][0], words


def _same_picks(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """All but where rounding decides: three steps of 1e-5 leave a new expert's column next to its source's."""
    decided_ZT = a["gaps"] > 1e-5
    assert decided_ZT.mean() > 0.9
    np.testing.assert_array_equal(np.sort(a["ids"])[decided_ZT], np.sort(b["ids"])[decided_ZT])
    for name in ("outputs", "tokens/text", "tokens/image", "image"):
        np.testing.assert_array_equal(a[name], b[name])
    for name in ("probs/text", "entropy/text"):
        np.testing.assert_allclose(a[name], b[name], atol=1e-6)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def finished(workdir: Path) -> tuple[RunSettings, dict[str, Any]]:
    settings = settings_of(workdir)
    assert settings is not None
    run = open_run(settings, workdir)
    return settings, open_model(run, "moextend").arrays


# --- file systems -----------------------------------------------------------------------------------------------------


@pytest.fixture
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that process 0 has made, and this one, on another host, has looked for before: on NFS this host believes
    that there is none, for as long as it believes what it knows of the folder above (nfs(5), lookupcache)."""
    folder, believed = tmp_path / "point" / "seed_0", {tmp_path / "point", tmp_path / "point" / "seed_0"}
    folder.mkdir(parents=True)
    (folder / "routing.json").touch()

    def believing(call: Any, makes: bool = False) -> Any:
        def asked(path: Any, *rest: Any, **more: Any) -> Any:
            if not isinstance(path, int):
                above = Path(path).parents if makes else (Path(path), *Path(path).parents)
                if not believed.isdisjoint(above):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                if makes:
                    believed.discard(Path(path))
            return call(path, *rest, **more)

        return asked

    for name in ("stat", "listdir", "mkdir"):
        monkeypatch.setattr(os, name, believing(getattr(os, name), makes=name == "mkdir"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "any_process", lambda here: here)
    assert not folder.exists()
    return folder


def test_a_work_directory_is_shared_though_another_host_has_looked_for_it(other_host: Path, monkeypatch):
    monkeypatch.setattr(distributed, "barrier", lambda name: (other_host / ".seen-by-all-processes").touch())
    distributed.check_shared(other_host)


def test_what_is_written_once_is_seen_by_a_host_that_has_looked_for_it(other_host: Path, monkeypatch):
    monkeypatch.setattr(distributed, "barrier", lambda name: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    write_json(other_host / "routing.json", {})


def test_a_folder_of_checkpoints_is_seen_by_a_host_that_has_looked_for_it(other_host: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_state, "_Manager", lambda root, **_: seen.append(root.exists()) or SimpleNamespace(close=int)
    )
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: None)
    with train_state.open_manager(other_host, keep=1):
        assert seen == [True]


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "said"), [("sys.exit('no disk')", 1, "[1] no disk"),
                                                   ("os.kill(os.getpid(), 9)", 128 + signal.SIGKILL, "")])  # fmt: skip
def test_a_failing_process_ends_all(tmp_path: Path, how: str, code: int, said: str):
    script = tmp_path / "fails.py"
    script.write_text(f"import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': {how}\ntime.sleep(60)")
    done = launch(f"--script={script}", processes=3, code=code)
    assert done.stderr.strip() == said


def test_ctrl_c_reaches_each_process_once(tmp_path: Path):
    """Whoever sends it: a terminal tells the launcher's group, `kill -INT` the launcher alone."""
    script = tmp_path / "counts.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "name = os.path.join(sys.argv[1], os.environ['JAX_PROCESS_ID'])\n"
        "open(name, 'w').close()\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "open(name, 'w').write(str(len(heard)))\n"
        "sys.exit(130)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "local.py"), f"--script={script}", "--", str(tmp_path)],
        start_new_session=True,
    )
    with ended(launcher):
        deadline = time.monotonic() + 30
        while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(launcher.pid, signal.SIGINT)
        assert launcher.wait(timeout=30) == 130
    assert [(tmp_path / name).read_text() for name in "01"] == ["1", "1"]


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: Path):
    words = [
        "--",
        "align",
        f"--config={ROOT / 'configs' / 'demo.py'}",
        f"--workdir={tmp_path}",
        "--config.base=nothing",
    ]
    lines = launch(*words, processes=2, code=2).stderr.strip().splitlines()
    assert lines and all("nothing" in line and line.removeprefix("[1] ").startswith("moextend: ") for line in lines)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1", "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}, None),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "n[1-2]"}, {}),
        ({"SLURM_NTASKS": "16"}, None),  # in the batch script itself, outside srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"MOEXTEND_PROCESSES": "auto"}, {}),
    ],
)
def test_who_is_asked_for_the_other_processes(monkeypatch, environment: dict[str, str], expected):
    _set(monkeypatch, environment)
    assert distributed.arguments() == expected


def test_an_incomplete_environment_is_an_error(monkeypatch):
    _set(monkeypatch, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})
    with pytest.raises(MoextendError, match="JAX_COORDINATOR_ADDRESS"):
        distributed.start()
    _set(monkeypatch, {"MOEXTEND_PROCESSES": "4"})
    with pytest.raises(MoextendError, match="can only be auto"):
        distributed.start()


def test_hosts_of_a_tpu_slice_that_nobody_has_told_of_each_other_are_refused(monkeypatch):
    """The slice is one to JAX also where its processes have not joined: the first checkpoint could not be saved."""
    _set(monkeypatch, {})
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    distributed.start()  # without a TPU nobody asks, since that would choose JAX's devices
    monkeypatch.setattr(machine, "accelerator", lambda: "tpu")
    monkeypatch.setattr(compile_cache, "enable", lambda: None)
    with pytest.raises(MoextendError, match="one of 16 processes.* MOEXTEND_PROCESSES=auto"):
        distributed.start()


def _set(monkeypatch, environment: dict[str, str]) -> None:
    for name in (
        "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_STEP_NODELIST",
        "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "MOEXTEND_PROCESSES",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def first_told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What process 0 has told the others, by which this process goes in each of its parts: one after another."""
    told: list[Any] = []
    monkeypatch.setattr(distributed, "from_first", lambda compute: told.append(compute()) or told[0])
    return told


def test_processes_with_other_settings_are_refused(first_told: list[Any], tmp_path: Path):
    """Each would compile another program, and go on with what the others made of theirs."""
    stage = StageSettings(data="easy_vqa/questions", steps=3, batch_size=4, length=48)
    asked = EvaluateSettings(data="", questions=1)
    stages = dict.fromkeys(("align", "extend", "finetune", "full"), stage)
    settings = RunSettings(**stages, evaluate=asked, base="one", vision="")
    for base in ("one", "two"):  # folders may have other names
        with pytest.raises(MoextendError, match=f"^{base} "):
            open_run(dataclasses.replace(settings, base=base), tmp_path)
    slower = dataclasses.replace(stage, optimizer=OptimizerConfig(learning_rate=1e-5))
    with pytest.raises(MoextendError, match=r"same settings: .*: finetune\.optimizer\.learning_rate, seed$"):
        open_run(dataclasses.replace(settings, finetune=slower, seed=7), tmp_path)


def test_processes_with_other_files_of_a_base_are_refused(first_told: list[Any], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "any_process", lambda here: here)
    base, copy = tiny.write_base(tmp_path / "base"), tmp_path / "host 1" / "copy"
    shutil.copytree(base, copy)
    for folder in (base, copy):
        check_same_files(open_base(str(folder), "", feature_layer=-2), where=folder)
    for name in ("model.safetensors", "tokenizer_config.json"):
        kept = (copy / name).read_bytes()
        half = len(kept) // 2
        (copy / name).write_bytes(kept[:half] + kept[half : half + 9].swapcase() + kept[half + 9 :])
        with pytest.raises(MoextendError, match=f"copy: not every process has the same files.*: {name}$"):
            check_same_files(open_base(str(copy), "", feature_layer=-2), where=copy)
        (copy / name).write_bytes(kept)
    attributes = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(attributes | {"rms_norm_eps": 0.5}))
    with pytest.raises(MoextendError, match=r"copy: not every process has the same files.*: decoder\.norm_eps$"):
        check_same_files(open_base(str(copy), "", feature_layer=-2), where=copy)


def test_what_a_process_says_last_is_shown(tmp_path: Path):
    (tmp_path / "talks.py").write_text("""
import os, sys
sys.stderr.write("a line\\n" * 3000 + f"the last of {os.environ['JAX_PROCESS_ID']}\\n")
sys.exit(3)
""")
    said = launch(f"--script={tmp_path / 'talks.py'}", processes=3, code=3).stderr
    assert {f"the last of {index}" in said for index in range(3)} == {True}


@pytest.mark.slow
def test_a_process_that_ends_later_ends_with_the_same_code(monkeypatch: pytest.MonkeyPatch):
    """One that still closes its files after process 0 is done, where the service runs that tells of lost processes."""
    script = """
import sys, time
from moextend_jax import compile_cache, distributed, machine
distributed.start()
time.sleep(0 if distributed.first() else 3)
distributed.end_together()
distributed.leave(75)
"""
    assert _codes_of_two(script, monkeypatch) == [75, 75]


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_mistake_of_one_process_is_the_exit_code_of_all(monkeypatch: pytest.MonkeyPatch, process: int):
    """JAX would end the other with 134, after which XPK starts the run again."""
    script = f"""
from moextend_jax import cli, distributed
from moextend_jax.config import MoextendError

def work(words):
    distributed.start()
    if distributed.first() == {process == 0}:
        raise MoextendError("only here")
    distributed.barrier("waits for ever")

cli.call = work
cli.main()
"""
    assert _codes_of_two(script, monkeypatch) == [2, 2]


def _codes_of_two(script: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.syspath_prepend(ROOT / "launch")
    local = importlib.import_module("local")
    port = str(local.free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=os.environ | local.environment(index, processes=2, devices=1, port=port)
        )
        for index in range(2)
    ]
    with ended(*processes):
        return [process.wait(timeout=120) for process in processes]
