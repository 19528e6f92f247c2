"""`moextend doctor`: what is installed, which devices answer, what would be used on them, and what is missing.

In: this machine and its environment; nothing is downloaded, and nothing is left behind. Out: tables or JSON of
`Finding`s, each that is wrong with the command that mends it. Exit code 1 if something is missing that a run needs.

JAX's devices are asked for in another process under a time limit: a TPU or a cluster that is configured and not there
lets it wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from moextend_jax import machine
from moextend_jax.folders import folder, is_url
from moextend_jax.settings import Positive
from moextend_jax.terminal import Parser, console, option

PACKAGE = "moextend-jax"
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
    parser.add_argument("--timeout", type=option(Positive), default=90, help="seconds for JAX's devices (%(default)s)")
    parser.add_argument("--look", action="store_true", help="ask JAX here, without a limit, and print what it says")
    options = parser.parse_args(list(arguments))
    if options.look:
        for piece in look():
            print(json.dumps(piece), flush=True)
        return 0
    seen = ask([sys.executable, "-m", "moextend_jax.doctor"], timeout=options.timeout)
    findings = [*versions(), *devices(seen), *limits(), *workdir(options.workdir)]
    missing = [finding for finding in findings if finding.verdict == "missing"]
    if options.json:
        print(json.dumps({"ok": not missing, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        _print(findings)
    return 1 if missing else 0


# --- what JAX says ----------------------------------------------------------------------------------------------------


def look() -> Iterator[dict[str, Any]]:
    """Facts of this process's JAX, piece by piece, so that what hangs is known by what was said before."""
    yield {"doing": "importing JAX"}
    import jax

    from moextend_jax import distributed

    try:
        yield {"processes": distributed.several() or "alone", "joins": distributed.arguments() is not None}
    except Exception as error:
        yield {"processes_error": str(error)}
    yield {"doing": "finding devices"}
    if error := machine.no_devices():
        yield {"devices_error": error}
        return
    yield {"environment": jax.print_environment_info(return_string=True), "backend": jax.default_backend()}
    yield {"cache": jax.config.jax_compilation_cache_dir}  # pyright: ignore[reportAttributeAccessIssue]
    yield {"doing": "tracing the kernels"}
    yield {"kernels": kernels()}
    yield {"doing": "computing"}
    yield {"computed": float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((128, 128))))}


EXPERTS = {
    "blocked_swiglu": "blocked SwiGLU", "megablox": "megablox (Pallas)", "triton": "tokamax (Triton)",
    "ragged_dot": "XLA's ragged_dot",
}  # fmt: skip
ATTENTION = {
    "splash_attention": "splash attention (Pallas)", "cudnn": "cuDNN", "_attend": "blocked attention",
}  # fmt: skip
"""By what stands in a traced program."""


def kernels() -> dict[str, str]:
    """What the model's own functions become on this backend, read from their traces: they alone know the rules."""
    import jax
    import jax.numpy as jnp

    from moextend_jax.models.attention import KeysValues, Visible, attend
    from moextend_jax.models.experts import apply_experts

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def rows(query_BSNH, key_BSKH, value_BSKH, segments_BL):
        return attend(query_BSNH, KeysValues(key_BSKH, value_BSKH), Visible.in_rows(segments_BL))

    def mixture(x_TD, ids_Tk, weights_Tk, *weights):
        return apply_experts(x_TD, ids_Tk, weights_Tk, [weights])

    def named(program: Any, signs: Mapping[str, str]) -> str:
        return next((name for sign, name in signs.items() if sign in str(program)), "XLA's own products")

    T, L, D, F, N, K, H, E = 8192, 1024, 256, 512, 4, 2, 128, 4
    experts = jax.make_jaxpr(mixture)(
        of(T, D), of(T, 2, dtype=jnp.int32), of(T, 2), of(E, D, F), of(E, D, F), of(E, F, D)
    )
    attended = jax.make_jaxpr(rows)(of(1, L, N, H), of(1, L, K, H), of(1, L, K, H), of(1, L, dtype=jnp.int32))
    return {"experts": named(experts, EXPERTS), "attention": named(attended, ATTENTION)}


def ask(command: Sequence[str], *, timeout: float) -> dict[str, Any]:
    """What `command --look` says within the time; `stopped` tells what it was doing where it did not end well."""
    seen: dict[str, Any] = {}
    # A session of its own: JAX's plugins may start processes that outlive it.
    child = subprocess.Popen(
        [*command, "--look"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines, errors = child.communicate(timeout=timeout)
        ended = f"ended with code {child.returncode}: {(errors.strip().splitlines() or ['no word'])[-1]}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        lines, _ = child.communicate()
        ended = f"gave no answer within {timeout:g} s"
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):  # a library may print too
            seen |= json.loads(line) if line.startswith("{") else {}
    if "computed" not in seen and "devices_error" not in seen:
        seen["stopped"] = f"{seen.get('doing', 'starting')}: {ended}"
    return seen


# --- parts of the report ----------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Installed versions against the pins; extras that are not there with the command that brings them."""
    try:
        pins = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        yield Finding("versions", PACKAGE, "not installed", "missing", "pip install -e .")
        return
    needed = [pin for pin in pins if _holds(pin, "")]
    for extra in ("", *(metadata.metadata(PACKAGE).get_all("Provides-Extra") or [])):
        wanted = [pin for pin in pins if _holds(pin, extra) and pin not in needed] if extra else needed
        here = {pin.name: _installed(pin.name) for pin in wanted}
        wrong = [pin for pin in wanted if here[pin.name] not in pin.specifier]
        name, install = extra or PACKAGE, f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install {PACKAGE}"
        value = ", ".join(f"{pin.name} {here[pin.name] or 'not installed'}" for pin in wrong or wanted)
        if not wrong:
            yield Finding("versions", name, value)
        elif all(here[pin.name] for pin in wrong):
            mend = "pip install " + " ".join(f"'{pin.name}{pin.specifier}'" for pin in wrong)
            yield Finding("versions", name, value, "differs", mend)
        else:
            missing = not extra or extra == EXTRAS.get(machine.accelerator())
            yield Finding("versions", name, value, "missing" if missing else "absent", install)


EXTRAS = {"gpu": "gpu", "tpu": "plan"}
"""What drives an accelerator."""


def _holds(pin: Requirement, extra: str) -> bool:
    return pin.marker is None or pin.marker.evaluate({"extra": extra})


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def devices(seen: Mapping[str, Any]) -> Iterator[Finding]:
    """What JAX found, and what a run would use on it."""
    hint = "on a pod or cluster start it on every host; JAX_PLATFORMS=cpu leaves accelerators out"
    hint = "unset JAX_PLATFORMS, or install what that platform needs" if "JAX_PLATFORMS" in os.environ else hint
    if error := seen.get("processes_error"):
        yield Finding("devices", "processes", error, "missing", "set these variables, or unset all of them")
    elif "processes" in seen:
        yield Finding("devices", "processes", f"one of several, says {seen['processes']}" if seen["joins"] else "alone")
    for problem in ("devices_error", "stopped"):
        if problem in seen:
            yield Finding("devices", "devices", seen[problem], "missing", hint)
    for line in seen.get("environment", "").splitlines():
        name, separator, value = re.split(r"(: +|=)", f"{line}=", maxsplit=1)
        if separator and value.strip("= "):
            yield Finding("devices", name, value.rstrip('="'))
    if seen.get("backend") == "cpu" and (extra := EXTRAS.get(machine.accelerator())):
        verdict, mend = "missing", f"pip install '{PACKAGE}[{extra}]'"
        if "JAX_PLATFORMS" in os.environ:
            verdict, mend = "note", ""
        yield Finding("devices", "accelerator", "this machine has one that JAX does not use", verdict, mend)
    for name, value in seen.get("kernels", {}).items():
        yield Finding("kernels", name, value)
    if "cache" in seen and not seen["cache"]:
        mend = "export JAX_COMPILATION_CACHE_DIR=DIR"
        yield Finding("kernels", "compilation cache", "none: every start compiles anew", "note", mend)


def limits() -> Iterator[Finding]:
    """Memory, room on disk, and what the system lets a process have."""
    memory = psutil.virtual_memory()
    yield Finding("limits", "memory", f"{_size(memory.available)} free of {_size(memory.total)}")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        yield Finding("limits", "container", f"may have {_size(limit)} of memory")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    mend = f"ulimit -n {FEW_FILES if most < 0 else min(FEW_FILES, most)}" if 0 <= files < FEW_FILES else ""
    yield Finding("limits", "open files", str(files), "note" if mend else "ok", mend)
    yield shared_memory(Path("/dev/shm"))


def shared_memory(path: Path) -> Finding:
    """Processes that read and decode (`workers`, `data check --processes`) need it for locks and for batches."""
    mend = "give the container more (docker run --shm-size=8g), or run with workers = 0 and --processes 0"
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return Finding("limits", "shared memory", f"{path}: {error.strerror}; workers need it", "note", mend)
    free = psutil.disk_usage(str(path)).free
    little = free < LITTLE_SHARED
    value = f"{_size(free)} free in {path}"
    return Finding("limits", "shared memory", value, "note" if little else "ok", mend if little else "")


def workdir(path: Path | None) -> Iterator[Finding]:
    """Whether checkpoints can be written there: a file that is renamed over another, room, and nobody else."""
    part = "work directory"
    if path is None or is_url(path):
        yield from [Finding(part, os.fspath(path), "a bucket: not written to from here", "note")] if path else []
        return
    at = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=at) as file:
            os.fsync(file.write(b"new") and file.fileno())
    except OSError as error:
        mend = f"chmod u+w {at}, free some space, or name another --workdir"
        yield Finding(part, "writing", f"{at}: {error.strerror or error}", "missing", mend)
        return
    yield Finding(part, "writing", str(path) if path.exists() else f"{path} will be made in {at}")
    yield Finding(part, "finished", ", ".join(sorted(file.parent.name for file in path.glob("*/stage.json"))) or "-")
    yield Finding(part, "space", f"{_size(psutil.disk_usage(str(at)).free)} free")
    from moextend_jax.lock import holder  # imports JAX, which may say something of its own

    name = holder(path)
    if name:
        yield Finding(part, "lock", f"in use by {name}", "note", "wait for it, or name another --workdir")
    else:
        yield Finding(part, "lock", "free")


# --- printing ---------------------------------------------------------------------------------------------------------

_COLOURS = {"ok": "green", "note": "yellow", "absent": "dim", "differs": "yellow", "missing": "bold red"}


def _print(findings: Iterable[Finding]) -> None:
    table, part, missing = Table(show_edge=False), "", 0
    for name in ("", "what", "found", "verdict", "to mend it"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        if finding.part != part:
            table.add_section()
        first, part = finding.part if finding.part != part else "", finding.part
        verdict = f"[{_COLOURS[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(first, escape(finding.name), escape(finding.value), verdict, escape(finding.mend))
        missing += finding.verdict == "missing"
    console().print(table, f"{missing or 'Nothing'} that a run needs is missing.", sep="\n")


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
