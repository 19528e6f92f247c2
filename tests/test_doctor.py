"""The doctor: what it says is so, what is missing comes with what mends it, and nothing makes it wait for ever."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from moextend_jax import doctor
from moextend_jax.config import MoextendError
from moextend_jax.lock import locked

SEEN = {
    "processes": "alone", "joins": False, "backend": "cpu", "environment": "jax:    0.1\nXLA_FLAGS=--a\n",
    "cache": None, "kernels": {"experts": "x"}, "computed": 1.0,
}  # fmt: skip


def named(findings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def looked() -> dict:
    return {name: value for piece in doctor.look() for name, value in piece.items()}


def test_the_backend_and_its_kernels_are_what_jax_says():
    import jax

    seen = looked()
    assert seen["backend"] == "cpu" and seen["computed"] == 128**3
    assert seen["kernels"] == {"experts": "blocked SwiGLU", "attention": "blocked attention"}
    findings = named(doctor.devices(seen))
    assert findings["jax"].value == jax.__version__ and "cpu" in findings["device info"].value
    assert findings["JAX_PLATFORMS"].value == "cpu"
    assert named(doctor.devices(SEEN))["compilation cache"].verdict == "note"


def test_kernels_of_other_platforms_are_named_by_their_traces(monkeypatch: pytest.MonkeyPatch):
    """The model's functions choose by `platform()`; what is reported follows them, not a table here."""
    from moextend_jax.models import attention, experts, grouped_matmul

    for module in (attention, experts, grouped_matmul):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    assert doctor.kernels() == {"experts": "megablox (Pallas)", "attention": "splash attention (Pallas)"}
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "cpu")
    assert doctor.kernels()["experts"] == "XLA's ragged_dot"


def test_versions_are_held_against_the_pins_and_extras_against_the_machine(monkeypatch: pytest.MonkeyPatch):
    versions = {"numpy": "1.0", "libtpu": "", "gcsfs": "", "tokamax": ""}
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, installed(name)))
    findings = named(doctor.versions())
    assert findings[doctor.PACKAGE].verdict == "differs" and "numpy 1.0" in findings[doctor.PACKAGE].value
    assert findings[doctor.PACKAGE].mend.startswith("pip install 'numpy==")
    assert {findings[extra].verdict for extra in ("plan", "gcs", "gpu")} == {"absent"}
    assert findings["gcs"].mend == "pip install 'moextend-jax[gcs]'"
    for platform, extra in (("tpu", "plan"), ("gpu", "gpu")):
        monkeypatch.setattr(doctor.machine, "accelerator", lambda platform=platform: platform)
        assert named(doctor.versions())[extra].verdict == "missing"
    versions["flax"] = ""
    assert named(doctor.versions())[doctor.PACKAGE].verdict == "missing"


@pytest.mark.parametrize(
    ("program", "timeout", "stopped"),
    [
        ("print('{\"doing\": \"finding devices\"}', flush=True)\nimport time\ntime.sleep(600)", 1,
         "finding devices: gave no answer within 1 s"),
        ("raise SystemExit('no driver')", 30, "starting: ended with code 1: no driver"),
    ],
)  # fmt: skip
def test_devices_that_never_answer_or_die_are_given_up(tmp_path: Path, program: str, timeout: float, stopped: str):
    (tmp_path / "child.py").write_text(f"print('a library says something', flush=True)\n{program}\n")
    seen = doctor.ask([sys.executable, str(tmp_path / "child.py")], timeout=timeout)
    assert seen["stopped"] == stopped
    devices = named(doctor.devices(seen))["devices"]
    assert devices.verdict == "missing" and devices.mend


def test_a_platform_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch):
    import jax

    def refuse():
        raise AssertionError  # all that JAX says of JAX_PLATFORMS=cuda without its plugin

    monkeypatch.setattr(jax, "local_devices", refuse)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    devices = named(doctor.devices(looked()))["devices"]
    assert devices.verdict == "missing" and devices.value.startswith("JAX_PLATFORMS = cuda gives no devices")
    assert devices.mend.startswith("unset JAX_PLATFORMS")


def test_an_incomplete_cluster_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    monkeypatch.setattr(doctor, "kernels", dict)
    processes = named(doctor.devices(looked()))["processes"]
    assert processes.verdict == "missing" and "must all be set" in processes.value


def test_an_accelerator_that_jax_does_not_use_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.machine, "accelerator", lambda: "gpu")
    monkeypatch.delenv("JAX_PLATFORMS")
    accelerator = named(doctor.devices(SEEN))["accelerator"]
    assert accelerator.verdict == "missing" and "[gpu]'" in accelerator.mend
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # asked for
    assert named(doctor.devices(SEEN))["accelerator"].verdict == "note"


def test_shared_memory_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone = doctor.shared_memory(tmp_path / "shm")
    assert gone.verdict == "note" and str(tmp_path / "shm") in gone.value and "workers = 0" in gone.mend
    usage = doctor.psutil.disk_usage(str(tmp_path))
    for free, verdict in ((4096, "note"), (1 << 32, "ok")):
        monkeypatch.setattr(doctor.psutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert doctor.shared_memory(tmp_path).verdict == verdict


# --- work directory ---------------------------------------------------------------------------------------------------


def test_a_work_directory_is_described_and_left_as_it_was(tmp_path: Path):
    findings = named(doctor.workdir(tmp_path / "new" / "run"))
    assert findings["writing"].verdict == "ok" and findings["lock"].value == "free"
    assert not list(tmp_path.iterdir())
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "stage.json").write_text("{}")
    findings = named(doctor.workdir(tmp_path))
    assert findings["finished"].value == "align" and findings["space"].value.endswith(" free")


def test_a_work_directory_that_cannot_be_written_is_missing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (finding,) = doctor.workdir(tmp_path / "file")
    assert finding.verdict == "missing" and "Not a directory" in finding.value and finding.mend


def test_a_run_in_the_work_directory_is_named_and_not_disturbed(tmp_path: Path):
    with locked(tmp_path):
        lock = named(doctor.workdir(tmp_path))["lock"]
        assert lock.verdict == "note" and f"process {os.getpid()}" in lock.value
    assert named(doctor.workdir(tmp_path))["lock"].value == "free"
    with locked(tmp_path):  # the doctor holds nothing itself
        pass


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seen", "code"), [(SEEN, 0), ({"stopped": "finding devices: gave no answer"}, 1)])
def test_the_exit_code_says_whether_something_is_missing(
    seen: dict, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(doctor, "ask", lambda command, timeout: seen)
    monkeypatch.setattr(doctor.machine, "accelerator", lambda: "")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy"])
    assert doctor.main(["--json", "--workdir", str(tmp_path)]) == code
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] == (code == 0)
    assert {"versions", "devices", "limits", "work directory"} <= {finding["part"] for finding in record["findings"]}
    assert all(finding["mend"] for finding in record["findings"] if finding["verdict"] in ("missing", "differs"))
    assert doctor.main([]) == code
    assert ("Nothing that a run needs is missing" in capsys.readouterr().out) == (code == 0)


def test_mistakes_of_use_are_refused():
    for arguments in (["--timeout", "0"], ["--timeout", "x"], ["--surprise"], ["--workdir", "s3://x"]):
        with pytest.raises(MoextendError, match=r"doctor|s3://"):
            doctor.main(arguments)
