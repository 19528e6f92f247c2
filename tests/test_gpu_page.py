"""benchmarks/gpu.py on this CPU, at its smallest: what a GPU's only run will be asked to do does run."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


def run(out: Path, *words: str) -> dict:
    command = [sys.executable, gpu.__file__, "--tiny", "--layers", "2", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((out / "gpu.json").read_text())
    assert done.stdout.endswith((out / "gpu.md").read_text() + "\n") and not found["failed"]
    return found


@pytest.mark.slow
def test_kernels_agree_with_dense_sums(tmp_path: Path):
    found = run(tmp_path, "--only", "checks")["checks"]
    assert not gpu.too_far(found, "cpu") and max(found.values()) > 1e-4
    assert {word: sum(word in name for name in found) for word in gpu.LIMITS} == {
        "multiplied out": 2, "order in a byte": 2, "float32": 7, "": len(found),
    }  # fmt: skip


def test_wrong_kernels_are_said():
    errors = {
        "int8 multiplied out": 0.0, "int4, order in a byte": 1e-9, "attention, float32, y": 2e-6, "attention, y": 3e-3,
        "grouped product, int8, y": float("nan"),
    }  # fmt: skip
    assert gpu.too_far(errors, "cpu") == (
        "int4, order in a byte 1e-09, attention, float32, y 2e-06, grouped product, int8, y nan"
    )
    assert "float32" not in gpu.too_far(errors, "NVIDIA H200")


@pytest.mark.long
def test_so_does_all_the_rest(tmp_path: Path):
    found = run(tmp_path, "--only", "kernels,steps,profile")
    assert len(found["steps"]) == 3 and all("failed" not in row["measured"] for row in found["steps"].values())
    assert found["kernels"]["grouped, int4, y"]["ms"] > 0


@pytest.mark.slow
def test_a_part_that_fails_is_said_and_ends_in_code_1(tmp_path: Path):
    command = [sys.executable, gpu.__file__, "--tiny", "--layers", "1", "--out", str(tmp_path), "--only", "profile"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1
    assert "of 1 layers chooses none" in json.loads((tmp_path / "gpu.json").read_text())["failed"]["profile"]


def test_a_trace_is_added_up_by_kernel(tmp_path: Path):
    """Streams of GPUs alone; numbers at the end of a kernel's name count its uses."""
    names = [
        ("process_name", 1, 0, "/device:GPU:0"),
        ("thread_name", 1, 7, "Stream #7"),
        ("process_name", 2, 0, "host"),
    ]
    events: list[dict] = [{"ph": "M", "name": n, "pid": pid, "tid": tid, "args": {"name": is_called}}
                          for n, pid, tid, is_called in names]  # fmt: skip
    for name, pid, tid in (("dot_1", 1, 7), ("dot_22", 1, 7), ("copy", 1, 7), ("dot_3", 1, 8), ("dot_4", 2, 7)):
        events.append({"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": 500})
    file = tmp_path / "a.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert gpu.longest(tmp_path) == {"dot": 1.0, "copy": 0.5}
