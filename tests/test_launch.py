"""Launchers: what they show is what they run, words arrive as they were given, manifests and shell files are valid.

The programs they call (sbatch, gcloud, xpk, kubectl, uv) are stand-ins that note their words; no cluster is needed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moextend_jax import preemption

LAUNCH = Path(__file__).parents[1] / "launch"
MOEXTEND = ["run", "--config", "my configs/it's.py:paper", "--workdir", "/d/a b", '--config.base=a "b" $(c) $HOME \\ *']
"""Words with everything that a shell could stumble over."""

NOTE = """#!{python}
import json, os, sys
with open({file!r}, "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""
NOTE_ENVIRONMENT = """#!{python}
import json, os, sys
told = {{name: value for name, value in os.environ.items() if name.startswith(("JAX_", "MOEXTEND_"))}}
with open("noted.json", "w") as file:
    json.dump([sys.argv[1:], told], file)
"""
PASS_ON = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
KUBECTL = """#!/bin/sh
cat > {file}.yaml
printf '["%s"]\\n' "$*" > {file}
"""


@pytest.fixture
def noted(tmp_path: Path):
    """`noted.run(words)` runs a command beside the stand-ins and returns what those were called with."""

    class Noted:
        folder, file = tmp_path / "bin", tmp_path / "noted.jsonl"

        def add(self, name: str, *, at: Path | None = None, text: str = NOTE) -> Path:
            path = (at or self.folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            made = text.format(python=sys.executable, file=str(self.file), name=name) if text is NOTE else text
            path.write_text(made)
            path.chmod(0o755)
            return path

        def run(self, command: list[str], *, cwd: Path = tmp_path) -> list[list[str]]:
            self.file.unlink(missing_ok=True)
            path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
            subprocess.run(command, check=True, cwd=cwd, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE)
            return [json.loads(line) for line in self.file.read_text().splitlines()]

    return Noted()


def launch(script: str, *options: str, moextend: list[str] = MOEXTEND, code: int = 0) -> str:
    words = [sys.executable, str(LAUNCH / script), *options, *(["--", *moextend] if moextend else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def both_ways(noted, script: str, *options: str) -> list[list[str]]:
    """What the launcher called; the shown line, run by a shell, must call the same."""
    really = noted.run([sys.executable, str(LAUNCH / script), *options, "--", *MOEXTEND])
    shown = launch(script, *options, "--dry-run")
    assert noted.run(["sh", "-c", shown]) == really
    return really


def test_slurm(noted):
    noted.add("sbatch", text=PASS_ON)
    noted.add("srun", text=PASS_ON)
    python = noted.add("python on nodes")
    options = ["--nodes=2", "--sbatch=--partition=big", f"--python={python}"]
    (called,) = both_ways(noted, "slurm.py", *options)
    assert called == ["python on nodes", "-m", "moextend_jax.cli", *MOEXTEND]
    noted.add("sbatch")
    ((_, *words),) = both_ways(noted, "slurm.py", *options)
    flags = words[: words.index(str(LAUNCH / "slurm_job.sh"))]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8", "--partition=big"} <= set(
        flags
    )
    # The notice is for the steps alone: the batch shell takes SIGTERM for a cancelled job.
    assert {"--requeue", "--open-mode=append", "--signal=TERM@300"} <= set(flags)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runn --config demo --workdir w", "there is no command 'runn'; did you mean run"),
        ("run --config mixtral_8x7c --workdir w", "there is no configuration mixtral_8x7c"),
        ("run mixtral_8x7b:packed", "run needs --workdir"),
        ("run demo --workdir gs://b/w --config.finetune.step=3", "no option --config.finetune.step; did you mean"),
    ],
)
def test_a_command_that_would_be_refused_is_not_sent(words: str, message: str):
    said = launch("slurm.py", "--dry-run", moextend=words.split(), code=2)
    assert said.startswith("launch: moextend would refuse this: ") and message in said and said.count("\n") == 1
    launch("local.py", "--script=own.py", "--dry-run", moextend=words.split())


@pytest.mark.parametrize(
    "words", ["run mixtral_8x7b:packed --workdir gs://b/w --base gs://b/m", "run --config=/there/own.py:x --no 1"]
)
def test_a_command_for_a_bucket_and_with_a_file_that_is_only_there_is_sent(words: str):
    assert launch("slurm.py", "--dry-run", moextend=words.split()).endswith(f"{words}\n")


@pytest.mark.parametrize(
    ("code", "cancelled", "requeued"),
    [(75, False, ["requeue", "12"]), (75, True, []), (2, False, []), (0, False, [])],
)
def test_slurm_puts_a_preempted_job_back(tmp_path: Path, code: int, cancelled: bool, requeued: list[str]):
    # With that option srun kills the other tasks when the first has ended with 75, and says 137.
    srun = f'case "$SRUN_CPUS_PER_TASK $* " in "4 --kill-on-bad-exit=0 --wait="*) exit {code};; *) exit 137;; esac'
    if cancelled:
        srun = f'kill -TERM "$PPID"\n{srun}'
    for name, text in {"srun": srun, "scontrol": f'printf "%s\\n" "$@" > "{tmp_path}/asked"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12",
        "SLURM_CPUS_PER_TASK": "4",
    }
    done = subprocess.run(["sh", str(LAUNCH / "slurm_job.sh"), "moextend", "run"], env=environment, check=False)
    asked = tmp_path / "asked"
    assert done.returncode == code and (asked.read_text().split() if asked.exists() else []) == requeued


def test_tpu_pod_runs_on_all_workers(noted, tmp_path):
    noted.add("gcloud")
    ((_, *words),) = both_ways(noted, "tpu_pod.py", "run", "pod", "--zone=us-east5-a")
    assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"] and "--worker=all" in words
    assert "--zone=us-east5-a" in words
    (line,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    noted.add("python", at=tmp_path / "moextend_jax" / ".venv" / "bin")
    assert noted.run(["sh", "-c", line]) == [["python", "-m", "moextend_jax.cli", *MOEXTEND]]
    assert "MOEXTEND_PROCESSES=auto" in line


def test_tpu_pod_life(noted):
    noted.add("gcloud")
    where = ["pod", "--zone=z", "--project=p"]
    kind = ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]
    (created,) = both_ways(noted, "tpu_pod.py", "create", *where, *kind, "--spot")
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert created == [*queued, "create", "pod", "--node-id=pod", "--zone=z", "--project=p", *kind, "--spot"]
    (deleted,) = both_ways(noted, "tpu_pod.py", "delete", *where)
    assert deleted[:6] == [*queued, "delete", "pod"]
    noted.add("git")
    archived, copied, unpacked = both_ways(noted, "tpu_pod.py", "setup", *where)
    assert archived[0] == "git" and copied[4] == "scp" and unpacked[4] == "ssh"


@pytest.mark.parametrize("version, with_uv", [((3, 10, 12), False), ((3, 14, 0), True)])
def test_a_tpu_host_whose_python_is_too_old_or_too_new_takes_uv(noted, tmp_path: Path, version, with_uv: bool):
    script = tmp_path / "launch" / "tpu_setup.sh"
    script.parent.mkdir()
    shutil.copy(LAUNCH / "tpu_setup.sh", script)
    home, host = tmp_path / "home" / ".local" / "bin", tmp_path / "host"
    uv = noted.add("uv", at=home if with_uv else tmp_path)
    python = noted.add("python3 of the host")
    # Asked for its version it says another one; asked for uv it brings it.
    says = f'exec "{sys.executable}" -c "import sys; sys.version_info = {version}; $2"'
    noted.add("python3", at=host, text=f'#!/bin/sh\n[ "$1" != -c ] || {says}\n"{python}" "$@"\nmv "{uv}" "{home}"\n')
    for name in ("dirname", "mv"):
        (host / name).symlink_to(str(shutil.which(name)))
    pip = noted.add("pip")
    noted.add("python", at=tmp_path / ".venv" / "bin", text=f'#!/bin/sh\n[ "$1" = -c ] && echo 1.2 || "{pip}" "$@"\n')
    home.mkdir(parents=True, exist_ok=True)
    environment = {"PATH": str(host), "HOME": str(tmp_path / "home")}
    subprocess.run(["/bin/sh", str(script)], env=environment, check=True)
    *before, made, ours, tpu = map(json.loads, noted.file.read_text().splitlines())
    assert before == ([] if with_uv else [["python3 of the host", "-m", "pip", "install", "-qq", "--user", "uv"]])
    assert made == ["uv", "venv", "-q", "--allow-existing", "--seed", "--python", "3.12", ".venv"]
    assert ours[-4:] == ["-c", "constraints.txt", "-e", ".[gcs]"] and tpu[-3:] == ["-qq", "-e", ".[tpu]"]


def test_xpk(noted):
    noted.add("xpk")
    noted.add("moextend")
    options = ["xpk", "job-1", "--cluster=c", "--zone=z", "--image=i:1", "--tpu-type=v5p-128", "--slices=2"]
    ((_, *words),) = both_ways(noted, "gke.py", *options)
    assert words[:2] == ["workload", "create"]
    assert {"--workload=job-1", "--num-slices=2", "--docker-image=i:1", "--tpu-type=v5p-128"} <= set(words)
    # As the JobSet's.
    assert {"--termination-grace-period-seconds=300", "--max-restarts=4"} <= set(words)
    assert f"--restart-on-exit-codes={preemption.EXIT_CODE}" in words
    (line,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    assert noted.run(["sh", "-c", line]) == [["moextend", *MOEXTEND]]


# --- JobSet -----------------------------------------------------------------------------------------------------------

# The fields of jobset.x-k8s.io/v1alpha2 that we write, from the API's documentation. The jobs inside are checked
# against Kubernetes' own schemas.
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]  # fmt: skip
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object"},
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize(
    ("options", "jobs", "pods", "limit"),
    [
        (["--tpu=tpu-v5p-slice:4x4x4:4", "--slices=2"], 2, 16, {"google.com/tpu": 4}),
        (["--tpu=tpu-v6e-slice:2x2:4"], 1, 1, {"google.com/tpu": 4}),
        (["--gpu=nvidia-h100-80gb:8", "--nodes=3", "--claim=files:/mnt/my files"], 1, 3, {"nvidia.com/gpu": 8}),
    ],
)
def test_jobset_manifest(noted, options: list[str], jobs: int, pods: int, limit: dict[str, int]):
    import yaml

    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the dev extra brings it")
    import jsonschema

    noted.add("kubectl", text=KUBECTL.format(file=shlex.quote(str(noted.file))))
    assert both_ways(noted, "gke.py", "jobset", "job-1", "--image=i:1", *options) == [["apply -f -"]]
    manifest = yaml.safe_load(Path(f"{noted.file}.yaml").read_text())
    jsonschema.validate(manifest, JOBSET)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}, **replicated["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    assert (replicated["replicas"], job["spec"]["parallelism"], job["spec"]["completions"]) == (jobs, pods, pods)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == limit
    volumes = {one["name"]: one for one in job["spec"]["template"]["spec"]["volumes"]}
    mounted = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert ("/mnt/my files" in mounted) == ("--claim=files:/mnt/my files" in options)
    assert [word.replace("$$", "$") for word in container["command"]] == ["moextend", *MOEXTEND]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"spec": manifest["spec"] | {"replicas": 1}}, JOBSET)


def test_gpu_pods_know_each_other():
    import yaml

    shown = launch("gke.py", "jobset", "job-1", "--image=i", "--gpu=nvidia-h100-80gb:8", "--nodes=3", "--dry-run")
    manifest = yaml.safe_load(shown.partition("\n")[2].rpartition("END")[0])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    values = {one["name"]: one.get("value") for one in job["template"]["spec"]["containers"][0]["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"].startswith("job-1-hosts-0-0.job-1:")
    assert values["JAX_NUM_PROCESSES"] == "3" and "JAX_PROCESS_ID" in values


# --- SkyPilot ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bucket_names")
@pytest.mark.parametrize("name", ["sky_gpu.yaml", "sky_tpu.yaml"])
def test_a_task_of_skypilot_runs_a_command_of_ours(noted, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import yaml

    from moextend_jax import distributed
    from moextend_jax.commands import RunOptions
    from moextend_jax.parsing import parse

    task = yaml.safe_load((LAUNCH / name).read_text())
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [preemption.EXIT_CODE]}
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    noted.add("moextend", at=tmp_path / ".venv" / "bin", text=NOTE_ENVIRONMENT.format(python=sys.executable))
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    envs = {name: value.replace("BUCKET", "mine") for name, value in task["envs"].items()}  # as by --env
    environment = {"PATH": os.environ["PATH"], **envs, **nodes}
    subprocess.run(["bash", "-e"], input=task["run"], text=True, check=True, cwd=tmp_path, env=environment)
    words, told = json.loads((tmp_path / "noted.json").read_text())
    assert words[0] == "run"
    options = parse(RunOptions, words[1:], command="run", does="")
    assert isinstance(options, RunOptions) and os.fspath(options.workdir) == envs["WORKDIR"]
    # Pictures behind a mounted bucket are looked at one by one, those of a gs:// path by thousands.
    read = (options.config.base, options.config.vision, options.config.manual_dir)
    assert all(str(path).startswith("gs://mine/") for path in read) and "file_mounts" not in task
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
    found = distributed.arguments()  # how the process finds the others
    if name == "sky_tpu.yaml":
        assert found == {}
    else:
        assert found and (found["coordinator_address"], found["num_processes"]) == ("10.0.0.7:1234", 2)
        assert found["process_id"] == 1


# --- mistakes, shell --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm.py"], "after --"),
        (["tpu_pod.py", "create", "pod", "--zone=z"], "--accelerator-type"),
        (["gke.py", "jobset", "job_1", "--image=i"], "lower case"),
        (["gke.py", "jobset", "a", "--image=i"], "--tpu or --gpu"),
        (["gke.py", "xpk", "a", "--image=i", "--zone=z"], "--cluster, --tpu-type"),
        (["gke.py", "xpk", "a", "--image=i", "--gpu=h100:8"], "--gpu means nothing to xpk"),
        (["gke.py", "jobset", "a", "--image=i", "--gpu=h100:8", "--slices=2"], "--slices is of TPUs"),
        (["gke.py", "jobset", "a", "--image=i", "--tpu=v5p:4x4:4", "--nodes=4"], "--nodes of GPUs"),
        (["gke.py", "jobset", "a", "--image=i", "--tpu=v5p:4x4:3"], "16 chips are not hosts of 3"),
        (["local.py", "--processes=0"], "at least 1"),
    ],
)
def test_mistakes_are_the_last_line_and_exit_code_2(words: list[str], said: str):
    told = launch(*words, moextend=[] if words == ["slurm.py"] else MOEXTEND, code=2)
    assert said in told.strip().splitlines()[-1] and "Traceback" not in told


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
          "SLURM_JOB_ID": str(os.getpid())},  # which the port comes from
         "1 more of 2 processes did not come within 1 s (SLURM_NTASKS = 2)"),
        ({"SLURM_NTASKS": "two", "SLURM_STEP_NODELIST": "localhost"}, "SLURM_NTASKS = 'two' is no number"),
    ],
)  # fmt: skip
def test_processes_that_do_not_come_are_one_line_and_exit_code_2(environment: dict[str, str], words: str):
    program = (
        "from moextend_jax import cli, distributed\ncli.call = lambda _: distributed.start() or 0\ncli.main(['align'])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOEXTEND_WAIT": "1", **environment}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    *before, last = done.stderr.splitlines()
    assert done.returncode == 2 and words in last, done.stderr
    assert not before or "waits at most 1 s for 1 more of 2 processes" in before[0]
    assert "SLURM_JOB_ID" not in environment or "alone by `env -u SLURM_NTASKS moextend ...`" in last


def test_shell_files_are_clean():
    checker = Path(sys.executable).parent / "shellcheck"
    if not checker.exists():
        pytest.skip("no shellcheck: the dev extra brings it")
    files = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(files) == 2
    done = subprocess.run([str(checker), "--severity=style", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for script, *options in (
        ("slurm.py",),
        ("local.py", "--processes=2"),
        ("tpu_pod.py", "run", "p", "--zone=z"),
        ("gke.py", "xpk", "a", "--cluster=c", "--zone=z", "--image=i", "--tpu-type=v5p-8"),
    ):
        shown = launch(script, *options, "--dry-run")
        checked = [str(checker), "--shell=sh", "--severity=warning", "--exclude=SC2154", "-"]
        done = subprocess.run(checked, input=shown, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
