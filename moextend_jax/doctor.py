"""`moextend doctor`: what is installed, which devices and kernels a run would use, and what is missing.

In: this machine and its environment. Out: `Finding`s as a table or JSON; exit code 1 if what a run needs is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from moextend_jax import machine
from moextend_jax.folders import extra_hint, is_url
from moextend_jax.settings import Positive
from moextend_jax.terminal import console

PACKAGE = "moextend-jax"
KERNELS = {
    "blocked_swiglu": "blocked_swiglu", "blocked_attention": "blocked_attention", "megablox": "name=gmm",
    "splash_attention": "splash_attention", "triton": "triton_grouped", "triton_attention": "triton_attention",
}  # fmt: skip
"""TABLE kernel -> what a trace has of it."""


class Finding(NamedTuple):
    """One row. A "note" may surprise, or is optional and absent; without what is "missing" runs fail."""

    part: str
    value: str
    verdict: Literal["ok", "note", "missing"] = "ok"
    mend: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    workdir: Path | None = None
    """also check this work directory"""
    json: bool = False
    """one JSON object instead of a table"""
    timeout: Positive = 90.0
    """seconds for JAX's devices"""


def doctor(options: DoctorOptions) -> int:
    """What is installed, what would be used, what is missing; exit code 1 if a run needs what is missing."""
    findings = [*packages(), *ask([sys.executable, "-m", "moextend_jax.doctor"], timeout=options.timeout)]
    findings += [shared_memory(Path("/dev/shm")), compiled(), *([workdir(options.workdir)] if options.workdir else [])]
    missing = sum(finding.verdict == "missing" for finding in findings)
    if options.json:
        print(json.dumps({"ok": not missing, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        table = Table("part", "value", "verdict", "to mend it", show_edge=False)
        for finding in findings:
            table.add_row(*map(escape, finding), style="red" if finding.verdict == "missing" else "")
        console().print(table, f"{missing or 'Nothing'} that a run needs is missing.", sep="\n")
    return 1 if missing else 0


def packages() -> Iterator[Finding]:
    """What this package and each of its extras need, against what is installed."""
    if not version(PACKAGE):
        yield Finding(PACKAGE, "not installed", "missing", "pip install -e .")
        return
    pins = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    for extra in ("", *(metadata.metadata(PACKAGE).get_all("Provides-Extra") or [])):
        name = f"{PACKAGE}[{extra}]" if extra else PACKAGE
        wanted = [pin for pin in pins if ("extra" in str(pin.marker)) == bool(extra)]
        wanted = [part for pin in wanted if _applies(pin, extra) for part in _with_extras(pin)]
        wrong = [pin for pin in wanted if not version(pin.name) or version(pin.name) not in pin.specifier]
        value = ", ".join(f"{pin.name} {version(pin.name) or '-'}" for pin in wrong or wanted)
        if wrong:
            missing = extra in ("", needed_extra()) and not all(version(pin.name) for pin in wrong)
            yield Finding(name, value, "missing" if missing else "note", extra_hint(extra))
        else:
            yield Finding(name, value)


def _applies(pin: Requirement, extra: str = "") -> bool:
    return pin.marker is None or pin.marker.evaluate({"extra": extra})


def _with_extras(pin: Requirement) -> list[Requirement]:
    """A requirement, and what it asks for besides: the plugin and CUDA of jax[cuda12]."""
    own = [Requirement(line) for line in metadata.requires(pin.name) or []] if pin.extras and version(pin.name) else []
    return [pin, *(part for extra in pin.extras for part in own if _applies(part, extra) and not _applies(part))]


def version(name: str) -> str:
    """Of an installed package; "" where it is not."""
    return next((package.version for package in metadata.distributions(name=name)), "")


def needed_extra() -> str:
    """What drives this machine's accelerator; "" where that is not to be used."""
    return "" if os.environ.get("JAX_PLATFORMS") == "cpu" else machine.accelerator()


def ask(command: Sequence[str], *, timeout: float) -> list[Finding]:
    """What another process prints of `look`: a TPU or a cluster that is configured and not there lets JAX wait for
    ever. It prints into a file, for a pipe is open until also a hanging nvidia-smi has ended."""
    findings, last = [], "no word"
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=output, timeout=timeout).returncode
            problem = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"no answer within {timeout:g} s"
        output.seek(0)
        for line in output:
            if line.startswith('{"part": '):
                findings.append(Finding(**json.loads(line)))
            else:  # of a library, or of what ended it
                last = line.strip() or last
    mend = "on a pod or cluster start it on every host; JAX_PLATFORMS=cpu leaves accelerators out"
    return [*findings, Finding("devices", f"{problem}: {last}", "missing", mend)] if problem else findings


def look() -> Iterator[Finding]:
    """What JAX says in this process, which may hang or crash at any of these."""
    import jax

    if problem := machine.no_devices():
        yield Finding("devices", problem, "missing", "unset JAX_PLATFORMS, or install what that platform needs")
        return
    yield Finding("JAX", (jax.print_environment_info(return_string=True) or "").partition("\n\n$ nvidia-smi")[0])
    if jax.default_backend() == "cpu" and (extra := needed_extra()):
        yield Finding("devices", "JAX does not use the accelerator", "missing", extra_hint(extra))
    program = jax.jit(layer).trace()
    yield Finding("kernels", kernels(program))
    jax.block_until_ready(program.lower().compile()())
    if jax.default_backend() == "cpu":
        yield Finding(
            "CPU", f"{machine.cores()} cores; what trains keeps freed memory, and of a small base has a device on each"
        )


def kernels(program: Any) -> str:
    """Names of those that a traced program has."""
    return ", ".join(name for name, trace in KERNELS.items() if trace in str(program.jaxpr))


def layer() -> Any:
    """The parts of a layer that have kernels of their own by platform."""
    import jax.numpy as jnp

    from moextend_jax.models.attention import Visible, attend
    from moextend_jax.models.experts import swiglu

    heads_BLNH, w_GDF = jnp.zeros((1, 512, 4, 128), jnp.bfloat16), jnp.zeros((4, 256, 256), jnp.bfloat16)
    y_BLNH = attend(heads_BLNH, heads_BLNH, heads_BLNH, Visible.in_rows(jnp.ones((1, 512), int)))
    x_RD, sizes_G = heads_BLNH.reshape(1024, 256), jnp.full(4, 256)
    return y_BLNH, swiglu(x_RD, x_RD[:, :1], ((w_GDF, w_GDF, w_GDF),), sizes_G)


def compiled() -> Finding:
    """Where compiled programs are kept from one start to the next."""
    from moextend_jax import compile_cache

    cache = compile_cache.status()
    place = compile_cache.folder()
    parent = next(folder for folder in (place, *place.parents) if folder.exists())
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or os.access(parent, os.W_OK):
        return Finding("compiled programs", cache)
    mend = f"every start compiles anew: chmod u+w {parent}, or set JAX_COMPILATION_CACHE_DIR"
    return Finding("compiled programs", f"{parent} cannot be written", "note", mend)


def shared_memory(path: Path) -> Finding:
    """Processes that read and decode (`workers`, `data check --processes`) need it for locks and for batches."""
    mend = "give the container more (docker run --shm-size=8g), or run with workers = 0 and --processes 0"
    return room(path, least=1 << 30, otherwise=Finding("shared memory", "", "note", mend))


def workdir(path: Path) -> Finding:
    from moextend_jax.lock import holder  # imports JAX, which may say something of its own

    if is_url(path):
        return Finding("work directory", f"{path}: a bucket, not written to from here", "note")
    if run := holder(path):
        return Finding("work directory", f"{path} is in use by {run}", "note", "wait for it, or name another --workdir")
    parent = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    mend = f"chmod u+w {parent}, free some space, or name another --workdir"
    return room(parent, least=1, otherwise=Finding("work directory", "", "missing", mend))


def room(path: Path, *, least: int, otherwise: Finding) -> Finding:
    """Whether a file can be written in a folder, and `least` bytes are free there."""
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            file.write(b"new")
        free = shutil.disk_usage(path).free
        value = f"{path}: {free / 1e9:.3g} GB free"
    except OSError as error:
        free, value = 0, f"{path}: {error.strerror or error}"
    return otherwise._replace(value=value) if free < least else Finding(otherwise.part, value)


if __name__ == "__main__":  # in the process that `ask` starts
    for piece in look():
        print(json.dumps(piece._asdict()), flush=True)
