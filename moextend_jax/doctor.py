"""`moextend doctor`: what is installed, which devices answer, what would be used on them, and what is missing.

In: this machine and its environment; nothing is downloaded, and nothing is left behind. Out: tables or JSON of
`Finding`s, each that is wrong with the command that mends it. Exit code 1 if something is missing that a run needs.

JAX's devices are asked for in another process under a time limit: a TPU or a cluster that is configured and not there
lets it wait for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from moextend_jax.config import MoextendError
from moextend_jax.folders import folder, is_url
from moextend_jax.terminal import Parser, console

ROOT = Path(__file__).parents[1]
PACKAGE = "moextend-jax"
VARIABLES = re.compile(
    r"(JAX|XLA|LIBTPU|TPU|MEGASCALE|NCCL|MOEXTEND)_.*|CUDA_VISIBLE_DEVICES|SLURM_(JOB_ID|N(NODES|TASKS)|PROCID|LOCALID|"
    r"STEP_NODELIST|CPUS_PER_TASK)|(LD_LIBRARY|TFDS_DATA|HF)_(PATH|DIR|HOME)|OMP_NUM_THREADS|TMPDIR"
)
"""Environment variables that change what a run does."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
FEW_FILES, LITTLE_SHARED = 4096, 1 << 30
"""Open files that a run with many workers and shards can come to; shared memory that workers pass batches through."""


class Finding(NamedTuple):
    """One line. `mend` is a command or what else to do; empty where nothing is to be done.

    verdict: "ok"; "note", which may surprise; "absent", optional and not there; "differs" from what was tested;
    "missing", without which runs fail.
    """

    part: str
    name: str
    value: str
    verdict: Literal["ok", "note", "absent", "differs", "missing"] = "ok"
    mend: str = ""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="moextend doctor", description="what is installed, what would be used, what is missing")
    parser.add_argument("--workdir", type=folder, help="also check this work directory")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for JAX to find devices (%(default)s)")
    parser.add_argument("--look", action="store_true", help="ask JAX here, without a limit, and print what it says")
    options = parser.parse_args(list(arguments))
    if not options.timeout > 0:
        raise MoextendError("doctor: --timeout must be more than 0")
    if options.look:
        for said in look():
            print(json.dumps(said), flush=True)
        return 0
    seen = ask([sys.executable, "-m", "moextend_jax.doctor"], timeout=options.timeout)
    found = [*versions(seen), *devices(seen), *used(seen), *memory(options.workdir), *limits(), *variables(_given())]
    if options.workdir is not None:
        found += workdir(options.workdir)
    missing = [finding for finding in found if finding.verdict == "missing"]
    if options.json:
        record = {"ok": not missing, "findings": [finding._asdict() for finding in found]}
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        _print(found)
    return 1 if missing else 0


# --- what JAX says ----------------------------------------------------------------------------------------------------


def look() -> Iterator[dict[str, Any]]:
    """Facts of this process's JAX, piece by piece, so that what hangs is known by what was said before."""
    yield {"doing": "importing JAX"}
    import jax

    yield {"doing": "reading the environment of the processes"}
    from moextend_jax import distributed

    try:
        joined = distributed.arguments()
        yield {"processes": "one" if joined is None else f"of several: {joined or 'found by JAX itself'}"}
    except MoextendError as error:
        yield {"processes": "incomplete", "processes_error": str(error)}
    yield {"doing": "finding devices"}
    try:
        local = jax.local_devices()
    except Exception as error:  # each plugin raises its own
        yield {"devices_error": (str(error).strip() or repr(error)).splitlines()[0]}
        return
    yield {
        "backend": jax.default_backend(),
        "devices": [
            {"platform": one.platform, "kind": one.device_kind, "memory": _device_memory(one)} for one in local
        ],
        "all": jax.device_count(),
        "cache": jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
    }
    yield {"doing": "tracing the kernels"}
    try:
        yield {"kernels": kernels()}
    except Exception as error:
        yield {"kernels_error": (str(error).strip() or repr(error)).splitlines()[0]}
    yield {"doing": "computing"}
    import jax.numpy as jnp

    yield {"computed": float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((128, 128))))}


def _device_memory(device: Any) -> int | None:
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    return (stats or {}).get("bytes_limit")


EXPERTS = {
    "blocked_swiglu": "blocked SwiGLU", "megablox": "megablox (Pallas)", "tokamax": "tokamax (Triton)",
    "ragged_dot": "XLA's ragged_dot",
}  # fmt: skip
ATTENTION = {
    "blocked_attention": "blocked attention", "splash_attention": "splash attention (Pallas)", "cudnn": "cuDNN",
}  # fmt: skip
"""By what a traced program is made of."""


def kernels() -> dict[str, str]:
    """What the model's own functions become on this backend, read from their traces: they alone know the rules."""
    import jax
    import jax.numpy as jnp

    from moextend_jax.config import ModelConfig
    from moextend_jax.models.attention import KeysValues, Visible, attend
    from moextend_jax.models.expert_parallel import DISPATCHES
    from moextend_jax.models.experts import apply_experts

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def rows(query_BSNH, key_BSKH, value_BSKH, segments_BL):
        return attend(query_BSNH, KeysValues(key_BSKH, value_BSKH), Visible.in_rows(segments_BL))

    def mixture(x_TD, ids_Tk, weights_Tk, *weights):
        return apply_experts(x_TD, ids_Tk, weights_Tk, [weights])

    T, L, D, F, N, K, H, E = 8192, 1024, 256, 512, 4, 2, 128, 4
    experts = jax.make_jaxpr(mixture)(
        of(T, D), of(T, 2, dtype=jnp.int32), of(T, 2), of(E, D, F), of(E, D, F), of(E, F, D)
    )
    attended = jax.make_jaxpr(rows)(of(1, L, N, H), of(1, L, K, H), of(1, L, K, H), of(1, L, dtype=jnp.int32))
    return {
        "experts": _named(experts.jaxpr, EXPERTS, other="XLA's own products"),
        "attention": _named(attended.jaxpr, ATTENTION, other="XLA's own products"),
        "dispatch": f"{ModelConfig.dispatch}, unless settings say one of {', '.join(DISPATCHES)}",
    }


def _named(jaxpr: Any, known: Mapping[str, str], *, other: str) -> str:
    words = " ".join(_words(jaxpr))
    return next((said for sign, said in known.items() if sign in words), other)


def _words(jaxpr: Any) -> Iterator[str]:
    """Names of primitives, and of functions with their files, all the way down."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield str(getattr(getattr(inner, "debug_info", None), "func_src_info", ""))
                    yield from _words(inner)


def ask(command: Sequence[str], *, timeout: float) -> dict[str, Any]:
    """What `command --look` says within the time; `stopped` tells what it was doing where it did not end well."""
    seen: dict[str, Any] = {}
    # A session of its own: JAX's plugins may start processes that outlive it.
    child = subprocess.Popen(
        [*command, "--look"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**_given(), "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
    )
    try:
        said, errors = child.communicate(timeout=timeout)
        ended = f"ended with code {child.returncode}: {(errors.strip().splitlines() or ['no word'])[-1]}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        said, errors = child.communicate()
        ended = f"gave no answer within {timeout:g} s"
    for line in said.splitlines():
        with contextlib.suppress(ValueError):  # a library may print too
            seen |= json.loads(line) if line.startswith("{") else {}
    if "computed" not in seen and "devices_error" not in seen:
        seen["stopped"] = f"{seen.get('doing', 'starting')}: {ended}"
    return seen


# --- parts of the report ----------------------------------------------------------------------------------------------


def versions(seen: Mapping[str, Any]) -> list[Finding]:
    """Installed versions against the pins; extras that are not there with the command that brings them."""
    found = [Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")]
    needed, extras = pins()
    for one in needed:
        here = _installed(one.name)
        if here is None:
            found.append(Finding("versions", one.name, "not installed", "missing", f"pip install '{_plain(one)}'"))
        elif here not in one.specifier:
            value = f"{here}, tested with {one.specifier}"
            found.append(Finding("versions", one.name, value, "differs", f"pip install '{_plain(one)}'"))
        else:
            found.append(Finding("versions", one.name, here))
    for extra, wanted in extras.items():
        lacking = [_plain(one) for one in wanted if not _whole(one)]
        if not lacking:
            held = ", ".join(f"{one.name} {_installed(one.name)}" for one in wanted)
            odd = [_plain(one) for one in wanted if (_installed(one.name) or "") not in one.specifier]
            verdict = "differs" if odd else "ok"
            found.append(Finding("extras", extra, held, verdict, f"pip install {' '.join(odd)}" if odd else ""))
            continue
        accelerated = seen.get("backend") == "gpu" if extra == "gpu" else _chips() == extra
        found.append(
            Finding(
                "extras", extra, f"not installed: {', '.join(lacking)}",
                "missing" if accelerated else "absent", _install(extra),
            )
        )  # fmt: skip
    return found


def pins() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What this version was tested with: of the checkout where there is one, else of the installed package."""
    if (ROOT / "requirements.txt").is_file() and (ROOT / "pyproject.toml").is_file():
        lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
        needed = [line for line in lines if line and not line.startswith("#")]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return _current(needed), {name: _current(own) for name, own in project["optional-dependencies"].items()}
    try:
        said = importlib.metadata.requires(PACKAGE) or []
        names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        raise MoextendError(f"{PACKAGE} is neither installed nor a checkout: its requirements are not known") from None
    needed = _current(said)
    known = {str(one) for one in needed}
    extras = {name: [one for one in _current(said, extra=name) if str(one) not in known] for name in names}
    return needed, extras


def _current(lines: Iterable[str], *, extra: str = "") -> list[Requirement]:
    """Those that hold for this Python."""
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]


def _whole(requirement: Requirement) -> bool:
    """Whether it is installed, and of jax[cuda12] also what the extra brings."""
    if _installed(requirement.name) is None:
        return False
    said = importlib.metadata.requires(requirement.name) or []
    without = {str(one) for one in _current(said)}
    brought = [one for extra in requirement.extras for one in _current(said, extra=extra) if str(one) not in without]
    return all(_installed(one.name) for one in brought)


def _plain(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(extra: str) -> str:
    return (
        f"pip install -e '.[{extra}]'" if (ROOT / "pyproject.toml").is_file() else f"pip install '{PACKAGE}[{extra}]'"
    )


def _chips() -> str:
    """The extra that drives the accelerator of this machine, whether or not JAX knows of it."""
    if Path("/dev/nvidia0").exists():
        return "gpu"
    return "plan" if any(Path("/dev").glob("accel[0-9]*")) else ""


def devices(seen: Mapping[str, Any]) -> list[Finding]:
    found = []
    if error := seen.get("processes_error"):
        found.append(Finding("devices", "processes", error, "missing", "set the three variables, or unset all of them"))
    elif "processes" in seen:
        found.append(Finding("devices", "processes", seen["processes"]))
    hint = "unset JAX_PLATFORMS, or look at the environment below" if "JAX_PLATFORMS" in os.environ else ""
    hint = hint or "on a pod or cluster start it on every host; JAX_PLATFORMS=cpu leaves accelerators out"
    if error := seen.get("devices_error"):
        found.append(Finding("devices", "devices", error, "missing", hint))
    if stopped := seen.get("stopped"):
        found.append(Finding("devices", "devices", stopped, "missing", hint))
    kinds: dict[tuple[str, str, int | None], int] = {}
    for one in seen.get("devices", ()):
        key = (one["platform"], one["kind"], one["memory"])
        kinds[key] = kinds.get(key, 0) + 1
    for (name, kind, size), count in kinds.items():
        memory = f", {_size(size)} each" if size else ""
        found.append(Finding("devices", name, f"{count} x {kind}{memory}"))
    if "all" in seen and seen["all"] != len(seen["devices"]):
        found.append(Finding("devices", "of all hosts", str(seen["all"])))
    if seen.get("backend") == "cpu" and (extra := _chips()):
        verdict, mend = ("note", "") if "JAX_PLATFORMS" in os.environ else ("missing", _install(extra))
        found.append(Finding("devices", "accelerator", "this machine has one that JAX does not use", verdict, mend))
    return found


def used(seen: Mapping[str, Any]) -> list[Finding]:
    found = [Finding("used", name, said) for name, said in seen.get("kernels", {}).items()]
    if error := seen.get("kernels_error"):
        mend = _install("gpu") if seen.get("backend") == "gpu" else "see the message"
        found.append(Finding("used", "kernels", error, "missing", mend))
    if "cache" not in seen:
        return found
    cache = seen["cache"]
    if not cache:
        mend = "export JAX_COMPILATION_CACHE_DIR=DIR"
        found.append(Finding("used", "compilation cache", "none: every start compiles anew", "note", mend))
    elif is_url(cache):
        found.append(Finding("used", "compilation cache", cache))
    else:
        at = _existing(Path(cache))
        writable = os.access(at, os.W_OK)
        held = sum(file.stat().st_size for file in Path(cache).glob("*") if file.is_file())
        value = f"{cache} ({_size(held)})" if writable else f"{cache} cannot be written to"
        mend = "" if writable else f"chmod u+w {at}, or name another in JAX_COMPILATION_CACHE_DIR"
        found.append(Finding("used", "compilation cache", value, "ok" if writable else "note", mend))
    return found


def memory(workdir: Path | None) -> list[Finding]:
    facts = dict(re.findall(r"(?m)^(\w+):\s+(\d+) kB", _read("/proc/meminfo")))
    total, free = (int(facts.get(name, 0)) << 10 for name in ("MemTotal", "MemAvailable"))
    found = [Finding("memory", "host", f"{_size(free)} free of {_size(total)}")] if total else []
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal() and int(limit) < total:
        held = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        found.append(Finding("memory", "container", f"{_size(int(limit) - held)} free of {_size(int(limit))}"))
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    if workdir is not None and not is_url(workdir):
        places["work directory"] = _existing(workdir)
    for name, place in places.items():
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(place)
            found.append(Finding("memory", name, f"{_size(disk.free)} free of {_size(disk.total)} on {place}"))
    return found


def limits() -> list[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < FEW_FILES
    mend = f"ulimit -n {FEW_FILES if most < 0 else min(FEW_FILES, most)}" if few else ""
    found = [Finding("limits", "open files", "unlimited" if files < 0 else str(files), "note" if few else "ok", mend)]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space >= 0:
        found.append(Finding("limits", "address space", _size(space), "note", "ulimit -v unlimited"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.append(Finding("limits", "processor cores", f"{cores} of {os.cpu_count()}"))
    shared = Path("/dev/shm")
    if not shared.is_dir():
        found.append(Finding("limits", "shared memory", "there is no /dev/shm: data workers need it", "note"))
    else:
        disk = shutil.disk_usage(shared)
        little = disk.free < LITTLE_SHARED
        mend = "give the container more (docker run --shm-size=8g), or run with workers = 0" if little else ""
        value = f"{_size(disk.free)} free of {_size(disk.total)}"
        found.append(Finding("limits", "shared memory", value, "note" if little else "ok", mend))
    return found


def variables(environment: Mapping[str, str]) -> list[Finding]:
    named = sorted(name for name in environment if VARIABLES.fullmatch(name))
    return [
        Finding("environment", name, "(not shown)" if SECRET.search(name) else environment[name][:200])
        for name in named
    ]


def workdir(path: Path) -> list[Finding]:
    """Whether checkpoints can be written there: a file that is renamed over another, room, and nobody else."""
    if is_url(path):
        return [Finding("work directory", os.fspath(path), "a bucket: not written to from here", "note")]
    at = _existing(path)
    if path.exists() and not path.is_dir():
        return [Finding("work directory", str(path), "is a file", "missing", "name another --workdir")]
    found = []
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor", dir=at) as scratch:
            old, new = Path(scratch) / "old", Path(scratch) / "new"
            old.write_text("old")
            with new.open("w") as file:
                file.write("new")
                file.flush()
                os.fsync(file.fileno())
            new.rename(old)
            renamed = old.read_text() == "new" and not new.exists()
    except OSError as error:
        mend = f"chmod u+w {at}, free some space, or name another --workdir"
        return [Finding("work directory", "writing", f"{at}: {error.strerror or error}", "missing", mend)]
    where = str(path) if path.exists() else f"{path} will be made in {at}"
    found.append(Finding("work directory", "writing", where))
    if not renamed:
        mend = "name a --workdir on another file system"
        found.append(Finding("work directory", "renaming", "does not replace a file at once", "missing", mend))
    largest = largest_checkpoint(path)
    if largest:
        free = shutil.disk_usage(at).free
        value = f"{_size(free)} free, the largest checkpoint there has {_size(largest)}"
        tight = free < 2 * largest  # one is written before one is deleted
        mend = "delete what is not needed, or name another --workdir" if tight else ""
        found.append(Finding("work directory", "space", value, "missing" if tight else "ok", mend))
    holder = lock_holder(path)
    if holder is not None:
        mend = "wait for it, or name another --workdir"
        found.append(Finding("work directory", "lock", f"in use by {holder}", "note", mend))
    else:
        found.append(Finding("work directory", "lock", "free"))
    return found


def largest_checkpoint(path: Path) -> int:
    """Bytes of the largest folder that is named by a number of steps; 0 where there is none."""
    steps = [one for one in path.rglob("[0-9]*") if one.name.isdecimal() and one.is_dir()] if path.is_dir() else []
    sizes = [sum(file.lstat().st_size for file in one.rglob("*") if file.is_file()) for one in steps]
    return max(sizes, default=0)


def lock_holder(path: Path) -> str | None:
    """Who runs in the work directory; None where nobody does."""
    from moextend_jax.lock import NAME as LOCK  # imports JAX, which may say something of its own

    try:
        with (path / LOCK).open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another run"
    except OSError:
        return None
    return None


# --- printing ---------------------------------------------------------------------------------------------------------

_COLOURS = {"ok": "green", "note": "yellow", "absent": "dim", "differs": "yellow", "missing": "bold red"}


def _print(found: Iterable[Finding]) -> None:
    found, screen = list(found), console()
    table = Table(show_edge=False)
    for name in ("", "what", "found", "verdict", "to mend it"):
        table.add_column(name, overflow="fold")
    part = ""
    for one in found:
        if part and one.part != part:
            table.add_section()
        first, part = one.part if one.part != part else "", one.part
        verdict = f"[{_COLOURS[one.verdict]}]{one.verdict}[/]"
        table.add_row(first, escape(one.name), escape(one.value), verdict, escape(one.mend))
    screen.print(table)
    missing = [one for one in found if one.verdict == "missing"]
    if not missing:
        screen.print("Nothing that a run needs is missing.")
        return
    screen.print(f"{len(missing)} of what a run needs is missing:")
    for one in missing:
        screen.print(f"  {escape(one.name)}: {escape(one.value)}" + (f"\n    {escape(one.mend)}" if one.mend else ""))


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _given() -> dict[str, str]:
    """The environment as it was when this process began: libraries add to it when they are imported."""
    text = _read("/proc/self/environ")
    return dict(one.split("=", 1) for one in text.split("\0") if "=" in one) or dict(os.environ)


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _size(nbytes: int | None) -> str:
    value = float(nbytes or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
