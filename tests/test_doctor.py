"""The doctor: what it says is so, what is missing comes with what mends it, and nothing makes it wait for ever."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path

import pytest

from moextend_jax import cli, doctor, lock, machine
from moextend_jax.config import MoextendError
from moextend_jax.doctor import Finding
from moextend_jax.lock import locked


def test_a_work_directory_that_is_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "w").write_text("")
    for workdir in (tmp_path / "w", tmp_path / "w" / "x"):
        with pytest.raises(MoextendError, match="is or lies below a file: give a folder"), locked(workdir):
            pass


def test_a_file_system_without_locks_is_said_once_and_used(tmp_path: Path, monkeypatch, capsys):
    def flock(*_: object):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(tmp_path / "w"):
        assert "no locks there (Function not implemented)" in capsys.readouterr().err


def by_part(findings) -> dict[str, Finding]:
    return {finding.part: finding for finding in findings}


def test_jax_speaks_of_itself_and_the_kernels_compute():
    import jax

    findings = by_part(doctor.look())
    assert jax.__version__ in findings["JAX"].value and "JAX_PLATFORMS=cpu" in findings["JAX"].value
    assert findings["kernels"] == Finding("kernels", "blocked_swiglu, blocked_attention")


@pytest.mark.parametrize(
    ("platform", "expected"), [("tpu", "megablox, splash_attention"), ("gpu", "triton, triton_attention")]
)
def test_kernels_of_another_platform_are_named_by_their_traces(
    platform: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    """The model's functions choose by `platform()`; what is reported follows them, not a table here."""
    from moextend_jax.models import attention, experts, grouped_matmul

    for module in (attention, experts, grouped_matmul):
        monkeypatch.setattr(module, "platform", lambda: platform)
    monkeypatch.setattr(doctor, "layer", lambda layer=doctor.layer: layer())  # JAX may have traced the other for CPU
    kernels = next(finding for finding in doctor.look() if finding.part == "kernels")
    assert kernels.value == expected


def test_packages_are_held_against_the_pins_and_extras_against_the_machine(monkeypatch: pytest.MonkeyPatch):
    versions = {"numpy": "1.0", "libtpu": "", "gcsfs": ""}
    version, core = doctor.version, doctor.PACKAGE
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, version(name)))
    findings = by_part(doctor.packages())
    assert findings[core] == Finding(core, "numpy 1.0", "note", "pip install moextend-jax")
    assert {findings[f"{core}[{extra}]"].verdict for extra in ("plan", "tpu", "gcs")} == {"note"}
    assert findings[f"{core}[gcs]"].mend == 'pip install "moextend-jax[gcs]"'
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(doctor.machine, "accelerator", lambda: "tpu")
    findings = by_part(doctor.packages())
    assert (findings[f"{core}[tpu]"].verdict, findings[f"{core}[plan]"].verdict) == ("missing", "note")
    versions["flax"] = ""
    assert by_part(doctor.packages())[core].verdict == "missing"
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["absent", "numpy"])  # in any version
    assert by_part(doctor.packages())[core] == Finding(core, "absent -", "missing", "pip install moextend-jax")
    monkeypatch.setattr(doctor.metadata, "requires", {core: ["jax[cuda99]"], "jax": ['absent; extra == "cuda99"']}.get)
    assert by_part(doctor.packages())[core].value == "absent -"
    versions[core] = ""
    assert list(doctor.packages()) == [Finding(core, "not installed", "missing", "pip install -e .")]


@pytest.mark.parametrize(
    ("program", "timeout", "problem"),
    [("import time; time.sleep(600)", 1, "no answer within 1 s: a library says something"),
     ("raise SystemExit('no driver')", 30, "ended with code 1: no driver")],
)  # fmt: skip
def test_devices_that_never_answer_or_die_are_given_up(tmp_path: Path, program: str, timeout: float, problem: str):
    """What was said before counts. A process that the hanging one started (an nvidia-smi) is not waited for either."""
    before = json.dumps(Finding("JAX", "0.1")._asdict())
    (tmp_path / "child.py").write_text(
        "import subprocess\nsubprocess.Popen(['sleep', '20'])\n"
        f"print({before!r}, 'a library says something', sep='\\n', flush=True)\n{program}\n"
    )
    start = time.monotonic()
    first, devices = doctor.ask([sys.executable, str(tmp_path / "child.py")], timeout=timeout)
    assert time.monotonic() - start < 15
    assert first == Finding("JAX", "0.1")
    assert (devices.part, devices.value, devices.verdict) == ("devices", problem, "missing") and devices.mend


def test_a_platform_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch):
    import jax

    def refuse():
        raise AssertionError  # all that JAX says of JAX_PLATFORMS=cuda without its plugin

    monkeypatch.setattr(jax, "local_devices", refuse)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    (devices,) = doctor.look()
    assert devices.verdict == "missing" and devices.value.startswith("JAX_PLATFORMS = cuda gives no devices")
    assert devices.mend.startswith("unset JAX_PLATFORMS")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, ""), ({"dev/nvidia0": ""}, "gpu"), ({"usr/lib/wsl/lib/libcuda.so.1": ""}, "gpu"),
        ({"dev/accel0": ""}, "tpu"),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/a/vendor": "0x1ae0\n"}, "tpu"),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/a/vendor": "0x8086\n"}, ""),
        ({"sys/bus/pci/devices/a/vendor": "0x1ae0\n"}, ""),  # a network card
    ],
)  # fmt: skip
def test_accelerators_are_known_by_their_files(tmp_path, monkeypatch, files: dict[str, str], found: str):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert machine.accelerator() == found


def test_an_accelerator_that_jax_does_not_use_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.machine, "accelerator", lambda: "gpu")
    looked = doctor.look()  # JAX_PLATFORMS=cpu: asked for
    assert [next(looked).part, next(looked).part] == ["JAX", "kernels"]
    monkeypatch.delenv("JAX_PLATFORMS")
    looked = doctor.look()
    assert next(looked).part == "JAX"
    assert next(looked)[2:] == ("missing", 'pip install "moextend-jax[gpu]"')


def test_shared_memory_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone = doctor.shared_memory(tmp_path / "shm")
    assert gone.verdict == "note" and str(tmp_path / "shm") in gone.value and "workers = 0" in gone.mend
    usage = doctor.shutil.disk_usage(tmp_path)
    for free, verdict in ((4096, "note"), (1 << 32, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert doctor.shared_memory(tmp_path).verdict == verdict

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert doctor.shared_memory(tmp_path).value == f"{tmp_path}: Read-only file system"


def test_a_work_directory_is_tried_and_left_as_it_was(tmp_path: Path):
    assert doctor.workdir(tmp_path / "new" / "run").verdict == "ok"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    unwritable = doctor.workdir(tmp_path / "file")
    assert unwritable.verdict == "missing" and "Not a directory" in unwritable.value and unwritable.mend


def test_a_run_in_the_work_directory_is_named_and_not_disturbed(tmp_path: Path):
    with locked(tmp_path):
        finding = doctor.workdir(tmp_path)
        assert finding.verdict == "note" and f"process {os.getpid()}" in finding.value
    assert doctor.workdir(tmp_path).verdict == "ok"
    with locked(tmp_path):  # the doctor holds nothing itself
        pass


@pytest.mark.parametrize("devices", [Finding("devices", "cpu"), Finding("devices", "[none]", "missing", "mend [it]")])
def test_the_exit_code_says_whether_something_is_missing(
    devices: Finding, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(doctor, "ask", lambda command, timeout: [devices])
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy"])
    missing = devices.verdict == "missing"
    assert cli.call(["doctor", "--json", "--workdir", str(tmp_path)]) == missing
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] != missing and devices._asdict() in record["findings"]
    assert {doctor.PACKAGE, "shared memory", "work directory"} <= {finding["part"] for finding in record["findings"]}
    assert cli.call(["doctor"]) == missing
    table = capsys.readouterr().out
    assert ("Nothing that a run needs is missing" in table) != missing
    assert devices.value in table and devices.mend in table and "moextend-jax[gcs]" in table


def test_mistakes_of_use_are_refused():
    for arguments in (["--timeout", "0"], ["--timeout", "x"], ["--surprise"], ["--workdir", "s3://x"]):
        with pytest.raises(MoextendError, match=r"doctor|s3://"):
            cli.call(["doctor", *arguments])
