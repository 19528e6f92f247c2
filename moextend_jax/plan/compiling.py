"""Compiles the step for a machine that is not there: an `AbstractStep` in, sizes and the program's text out."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moextend_jax.config import MoextendError
from moextend_jax.plan.abstract_step import AbstractStep

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Compiled(NamedTuple):
    """A compiled step, or what is known of one that does not fit the chip.

    memory: the compiler's totals in bytes; None where the program does not fit.
    needed: bytes that the compiler asked for where it does not fit (0: it did not say); None where it fits.
    text: the final program as HLO, "" where it does not fit.
    seconds, cpu_seconds: time of compiling, by the clock and of all cores; a busy machine stretches only the first.
    """

    memory: Any
    needed: int | None
    text: str
    seconds: float
    cpu_seconds: float


def compile_step(abstract: AbstractStep) -> Compiled:
    """Lowers and compiles. A program too big for the chip is an answer, any other failure a MoextendError."""
    started, worked = time.perf_counter(), time.process_time()
    platform = (chip := abstract.mesh.devices.flat[0]).platform
    # Kernels may ask the default device what it is.
    default = jax.default_device(chip) if platform == "gpu" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="moextend-plan-") as folder:
        with default:
            lowered = abstract.step.lower(abstract.state, abstract.frozen, abstract.batch)
        # libtpu writes its program down itself: it may be newer than jaxlib, which then cannot read it back.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": "jit_step"}
        try:
            with _not_kept():
                compiled = lowered.compile(compiler_options=options if platform == "tpu" else None)
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                lines = str(error).splitlines()
                said = next((line for line in lines if "Ran out of memory" in line), lines[0])
                raise MoextendError(f"the compiler failed: {said.strip()}") from error
            return Compiled(None, needed, "", time.perf_counter() - started, time.process_time() - worked)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
        if platform == "tpu":
            (path,) = Path(folder).glob("*after_optimizations.txt")
            text = path.read_text()
        else:
            text = compiled.as_text() or ""
    return Compiled(compiled.memory_analysis(), None, text, seconds, cpu_seconds)


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Programs for chips that are not here stay out of JAX's compilation cache: it cannot read them back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def memory_needed(message: str) -> int | None:
    """Bytes that a compiler asked for, by its error message; 0 if it does not say, None if it is not about the chip's
    main memory: a kernel may want too much of the little that is on the chip."""
    if "RESOURCE_EXHAUSTED" not in message or re.search(r"memory space [vs]mem", message):
        return None
    match = re.search(r"Used ([\d.]+)([KMG])i?B? of [\d.]+[KMG]i?B? hbm", message)
    return int(float(match[1]) * UNITS[match[2]]) if match else 0
