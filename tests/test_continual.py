"""Chains beside each other: one that fails says why, and none outlives the command that started it."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from children import alive

from moextend_jax import continual
from moextend_jax.commands import whole_run
from moextend_jax.config import MoextendError
from moextend_jax.configurations import load
from moextend_jax.continual import Beside
from moextend_jax.settings import RunSettings, from_config_dict


@pytest.mark.slow
def test_a_chain_that_fails_says_its_last_line(tmp_path: Path):
    settings = from_config_dict(load("demo") | {"base": str(tmp_path / "nowhere")})
    (tmp_path / "strict" / "finetune").mkdir(parents=True)
    beside = Beside(settings, tmp_path / "open", tmp_path / "strict", whole_run)
    with pytest.raises(MoextendError, match=r"chain open: .*nowhere.*all of it: .*open.log"):
        beside.record()


def test_a_chain_beside_may_have_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Python forbids a daemon to start processes."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda process: None)
    beside = Beside(from_config_dict(load("demo")), tmp_path / "open", tmp_path / "strict", whole_run)
    assert not beside.process.daemon


def test_an_interrupt_while_a_chain_is_waited_for_says_what_is_kept(tmp_path: Path):
    (tmp_path / "open" / "align" / "result" / "1").mkdir(parents=True)
    beside, ended = object.__new__(Beside), []

    def join() -> None:
        if not ended:
            raise KeyboardInterrupt

    beside.folder = tmp_path / "open"
    vars(beside)["process"] = SimpleNamespace(join=join, terminate=lambda: ended.append(True))
    with pytest.raises(KeyboardInterrupt, match="open: align; the same command goes on"):
        beside.record()
    assert ended


def test_a_chain_that_fails_ends_the_one_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In a notebook nothing else would."""
    ended = []

    class Other:
        def __init__(self, settings: RunSettings, folder: Path, made: Path, run: object):
            self.end = lambda: ended.append((folder.name, made.name))

    def run(settings: RunSettings, folder: Path):
        raise MoextendError("no disk")

    monkeypatch.setattr(continual, "Beside", Other)
    monkeypatch.setattr(continual.machine, "cores", lambda: 2)
    with pytest.raises(MoextendError, match="no disk"):
        continual.run_chains(from_config_dict(load("continual")), tmp_path, run=run)
    assert ended == [("open", "strict")]


STARTS_ONE = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from moextend_jax.commands import whole_run
from moextend_jax.continual import Beside
from moextend_jax.configurations import load
from moextend_jax.settings import from_config_dict

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    beside = Beside(from_config_dict(load("demo")), folder / "open", folder / "strict", whole_run)
    print(beside.process.pid, flush=True)
    os._exit(1)
"""


@pytest.mark.slow
def test_a_chain_ends_with_the_command_that_started_it(tmp_path: Path):
    (tmp_path / "start.py").write_text(STARTS_ONE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, tmp_path / "start.py", tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    pid, ended = int(said.stdout.split()[-1]), time.monotonic() + 60
    while alive(pid) and time.monotonic() < ended:
        time.sleep(0.2)
    assert not alive(pid)
