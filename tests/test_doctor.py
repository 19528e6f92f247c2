"""The doctor: what it says is so, what is missing comes with what mends it, and nothing makes it wait for ever."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from moextend_jax import doctor
from moextend_jax.config import MoextendError

SEEN = {
    "processes": "one", "backend": "cpu", "devices": [{"platform": "cpu", "kind": "cpu", "memory": None}] * 2,
    "all": 2, "cache": None, "kernels": {"experts": "x"}, "computed": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def looked() -> dict:
    return {name: value for piece in doctor.look() for name, value in piece.items()}


def named(found: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {one.name: one for one in found}


def test_the_backend_and_its_kernels_are_what_jax_says(looked: dict):
    import jax

    assert looked["backend"] == "cpu" and looked["all"] == jax.device_count()
    assert looked["kernels"]["experts"] == "blocked SwiGLU"
    assert looked["kernels"]["attention"] == "blocked attention"
    assert looked["kernels"]["dispatch"].startswith("gather")
    assert looked["computed"] == 128**3


def test_kernels_of_other_platforms_are_named_by_their_traces(monkeypatch: pytest.MonkeyPatch):
    """The model's functions choose by `platform()`; what is reported follows them, not a table here."""
    from moextend_jax.models import attention, experts, grouped_matmul

    for module in (attention, experts, grouped_matmul):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    said = doctor.kernels()
    assert said["experts"] == "megablox (Pallas)"
    assert said["attention"] == "splash attention (Pallas)"
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "cpu")
    assert doctor.kernels()["experts"] == "XLA's ragged_dot"


def test_versions_are_held_against_the_pins(monkeypatch: pytest.MonkeyPatch):
    versions = {"numpy": "1.0", "flax": None}
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, installed(name)))
    found = named(doctor.versions(SEEN))
    assert found["numpy"].verdict == "differs" and "1.0, tested with ==" in found["numpy"].value
    assert found["numpy"].mend.startswith("pip install 'numpy==")
    assert found["flax"].verdict == "missing" and found["flax"].mend.startswith("pip install 'flax==")
    assert found["einops"] == ("versions", "einops", installed("einops"), "ok", "")


def test_pins_are_those_of_this_python():
    needed, extras = doctor.pins()
    names = [one.name for one in needed]
    assert len(names) == len(set(names)) and {"jax", "flax", "numpy"} <= set(names)
    assert {"torch", "plan", "gpu", "gcs", "dev"} <= extras.keys()
    assert len(extras["gpu"]) == 2


@pytest.mark.parametrize("there", [True, False])
def test_an_extra_is_optional_unless_this_machine_needs_it(monkeypatch: pytest.MonkeyPatch, there: bool):
    monkeypatch.setattr(doctor, "_whole", lambda requirement: there or requirement.name not in ("libtpu", "tokamax"))
    monkeypatch.setattr(doctor, "_chips", lambda: "")
    found = named(doctor.versions(SEEN))
    assert (found["plan"].verdict == "absent") == (not there)
    assert there or "[plan]'" in found["plan"].mend
    monkeypatch.setattr(doctor, "_chips", lambda: "plan")
    found = named(doctor.versions(SEEN))
    assert (found["plan"].verdict == "missing") == (not there)
    assert (found["gpu"].verdict == "absent") == (not there)
    assert (named(doctor.versions(SEEN | {"backend": "gpu"}))["gpu"].verdict == "missing") == (not there)


def test_devices_that_never_answer_are_given_up(tmp_path: Path):
    """A child that prints what it is doing and then hangs, as libtpu does where it waits for other hosts."""
    (tmp_path / "hangs.py").write_text(
        "import json, time\n"
        "print('a library says something', flush=True)\n"
        "print(json.dumps({'doing': 'finding devices'}), flush=True)\n"
        "time.sleep(600)\n"
    )
    started = time.perf_counter()
    seen = doctor.ask([sys.executable, str(tmp_path / "hangs.py")], timeout=2)
    assert time.perf_counter() - started < 30
    assert seen["stopped"] == "finding devices: gave no answer within 2 s"
    found = named(doctor.devices(seen))
    assert found["devices"].verdict == "missing" and found["devices"].mend


def test_a_crash_while_asking_is_said(tmp_path: Path):
    (tmp_path / "dies.py").write_text("raise SystemExit('no driver')\n")
    seen = doctor.ask([sys.executable, str(tmp_path / "dies.py")], timeout=30)
    assert seen["stopped"] == "starting: ended with code 1: no driver"


def test_a_backend_that_does_not_start_is_missing():
    found = named(doctor.devices({"processes": "one", "devices_error": "no TPU"}))
    assert found["devices"].verdict == "missing" and found["devices"].value == "no TPU"


def test_devices_are_counted_by_kind():
    chip = {"platform": "tpu", "kind": "TPU v5e", "memory": 16 * 10**9}
    found = named(doctor.devices({"backend": "tpu", "devices": [chip] * 4, "all": 16}))
    assert found["tpu"].value == "4 x TPU v5e, 16 GB each" and found["of all hosts"].value == "16"


def test_an_incomplete_cluster_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    seen = {name: value for piece in doctor.look() for name, value in piece.items()}
    found = named(doctor.devices(seen))
    assert found["processes"].verdict == "missing" and "must all be set" in found["processes"].value


def test_an_accelerator_that_jax_does_not_use_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_chips", lambda: "gpu")
    monkeypatch.delenv("JAX_PLATFORMS")
    found = named(doctor.devices(SEEN))
    assert found["accelerator"].verdict == "missing" and "[gpu]'" in found["accelerator"].mend
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # asked for
    assert named(doctor.devices(SEEN))["accelerator"].verdict == "note"


def test_the_compilation_cache_is_found(tmp_path: Path):
    assert named(doctor.used(SEEN))["compilation cache"].verdict == "note"
    (tmp_path / "program").write_bytes(bytes(2000))
    assert named(doctor.used(SEEN | {"cache": str(tmp_path)}))["compilation cache"].value == f"{tmp_path} (2 kB)"


def test_variables_that_matter_are_shown_and_secrets_are_not():
    given = {"XLA_FLAGS": "--a", "JAX_SECRET_KEY": "hush", "SLURM_NTASKS": "2", "HF_TOKEN": "hush", "HOME": "/x"}
    found = named(doctor.variables(given))
    assert found.keys() == {"XLA_FLAGS", "JAX_SECRET_KEY", "SLURM_NTASKS"}
    assert "hush" not in str(found)


# --- work directory ---------------------------------------------------------------------------------------------------


def test_a_good_work_directory_is_left_as_it_was(tmp_path: Path):
    found = named(doctor.workdir(tmp_path / "new" / "run"))
    assert found["writing"].verdict == "ok" and found["lock"].value == "free"
    assert not list(tmp_path.iterdir())


def test_a_work_directory_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    assert doctor.workdir(tmp_path / "file")[0].verdict == "missing"

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", refuse)
    (found,) = doctor.workdir(tmp_path)
    assert found.verdict == "missing" and "Permission denied" in found.value and found.mend


def test_room_is_held_against_the_largest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step, size in {"10": 1000, "20": 3000}.items():
        (tmp_path / "finetune" / step / "leaves").mkdir(parents=True)
        (tmp_path / "finetune" / step / "leaves" / "a").write_bytes(bytes(size))
    assert named(doctor.workdir(tmp_path))["space"].verdict == "ok"
    full = doctor.shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: full)
    assert named(doctor.workdir(tmp_path))["space"].verdict == "missing"


def test_a_run_in_the_work_directory_is_named_and_not_disturbed(tmp_path: Path):
    from moextend_jax.lock import locked

    with locked(tmp_path):
        held = named(doctor.workdir(tmp_path))["lock"]
        assert held.verdict == "note" and f"process {os.getpid()}" in held.value
    assert named(doctor.workdir(tmp_path))["lock"].value == "free"
    with locked(tmp_path):  # the doctor holds nothing itself
        pass


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seen", "code"), [(SEEN, 0), ({"stopped": "finding devices: gave no answer"}, 1)])
def test_the_exit_code_says_whether_something_is_missing(
    seen: dict, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(doctor, "ask", lambda command, timeout: seen)
    monkeypatch.setattr(doctor, "_installed", lambda name: "1")
    monkeypatch.setattr(doctor, "_whole", lambda requirement: True)
    monkeypatch.setattr(doctor, "_chips", lambda: "")
    assert doctor.main(["--json", "--workdir", str(tmp_path)]) == code
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] == (code == 0)
    parts = {one["part"] for one in record["findings"]}
    assert {"versions", "extras", "memory", "limits", "work directory"} <= parts
    assert all(one["mend"] for one in record["findings"] if one["verdict"] in ("missing", "differs"))
    assert doctor.main([]) == code
    said = capsys.readouterr().out
    assert ("Nothing that a run needs is missing" in said) == (code == 0)


def test_mistakes_of_use_are_refused():
    for arguments in (["--timeout", "0"], ["--timeout", "x"], ["--surprise"], ["--workdir", "s3://x"]):
        with pytest.raises(MoextendError, match=r"doctor|s3://"):
            doctor.main(arguments)
