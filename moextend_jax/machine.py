"""What this machine has, by its device files and without JAX, and whether this process is one of several; and what is
wrong where JAX finds no devices.

In: /dev and the environment. Out: names of platforms, variables for libtpu, one line of an error.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moextend_jax.chips import gpu_share
from moextend_jax.config import MoextendError

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
"""libtpu without a TPU, as the extra `plan` installs it, complains in five lines unless it is told these."""


def accelerator() -> str:
    """ "gpu", "tpu" or "": what the machine has, whether or not JAX knows of it."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/usr/lib/wsl/lib").glob("libcuda.so*")):
        return "gpu"
    return "tpu" if any(Path("/dev").glob("accel[0-9]*")) or (_vfio() and _of_google()) else ""


def surely_no_tpu() -> bool:
    return accelerator() != "tpu" and not _vfio()


def _vfio() -> bool:
    """Newer TPUs are such devices, but not they alone."""
    return any(Path("/dev/vfio").glob("[0-9]*"))


def _of_google() -> bool:
    """Whether a device is Google's, which network cards can be too."""
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def quiet_libtpu() -> None:
    """Where there is surely no TPU. Call before JAX looks for devices."""
    if surely_no_tpu():
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def whole_gpu() -> None:
    """JAX takes three quarters of a GPU's memory; here it takes what plans count on. Call before JAX looks for devices.
    Who has said how much, or that nothing is to be taken beforehand, is not overruled."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    if accelerator() == "gpu" and not any(name in os.environ for name in names):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        here = visible.split(",") if visible else [*Path("/dev").glob("nvidia[0-9]*")]
        os.environ[names[0]] = str(gpu_share(several=len(here) > 1 or several() is not None))


def several() -> str | None:
    """The environment variable that says that this process is one of several; None where it is alone."""
    if "JAX_NUM_PROCESSES" in os.environ:
        return None if number("JAX_NUM_PROCESSES") == 1 else "JAX_NUM_PROCESSES"
    if (setting := os.environ.get("MOEXTEND_PROCESSES", "")) not in ("", "auto"):
        raise MoextendError(f"MOEXTEND_PROCESSES = {setting!r}: it can only be auto")
    if setting:
        return "MOEXTEND_PROCESSES"
    if "SLURM_STEP_NODELIST" in os.environ and number("SLURM_NTASKS", default=1) > 1:
        return "SLURM_NTASKS"
    if number("MEGASCALE_NUM_SLICES", default=1) > 1:
        return "MEGASCALE_NUM_SLICES"
    return "TPU_WORKER_HOSTNAMES" if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") else None


def number(name: str, *, default: int = 0) -> int:
    """What an environment variable holds."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise MoextendError(f"{name} = {text!r} is no number")
    return int(text)


def only_cpu() -> bool:
    """Whether JAX will surely compute on the CPU, without asking JAX."""
    return os.environ.get("JAX_PLATFORMS") == "cpu" or (accelerator() == "" and surely_no_tpu())


def keep_memory() -> None:
    """On CPU what a step frees stays with the process for the next step: else glibc gives it back to the kernel, and
    one CPU second in fifteen goes into getting it again, zeroed. Call before JAX starts threads, which come with arenas
    of their own. Nothing happens with an accelerator, or where the C library is another."""
    global kept
    if only_cpu() and hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        kept = all([library.mallopt(setting, value) for setting, value in MALLOC.items()])


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def when_left(parent: int, then: Callable[[], object]) -> None:
    """From now on, a thread calls `then` when the process `parent`, which has started this one, is no more: a process
    that is killed does not end its children."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        then()

    threading.Thread(target=watch, daemon=True).start()


def on_cpu(devices: int) -> str:
    """How a run uses a CPU, in words."""
    memory = "kept" if kept else "given back"
    return f"{devices} XLA device{'s' * (devices > 1)} on {cores()} core{'s' * (cores() > 1)}, freed memory {memory}"


kept = False
"""Whether `keep_memory` has set the C library so."""

MALLOC = {-4: 0, -1: 2**31 - 1, -8: 1}
"""Of mallopt(3): `M_MMAP_MAX`, no block has a mapping of its own; `M_TRIM_THRESHOLD`, what is freed stays;
`M_ARENA_MAX`, in one arena, since the others are mapped."""


def peak_memory() -> int:
    """Most bytes that were in use at once: of the first device, or of this process where devices do not say."""
    import jax

    if statistics := jax.local_devices()[0].memory_stats():
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def no_devices() -> str:
    """What is wrong with JAX's devices, in one line; "" where it has some."""
    import jax

    try:
        jax.local_devices()
    except Exception as error:  # each plugin raises its own, and JAX an AssertionError without words
        message = (str(error) or "it is not on this machine").splitlines()[0].partition(" (set JAX_PLATFORMS")[0]
        asked = os.environ.get("JAX_PLATFORMS")
        return f"{f'JAX_PLATFORMS = {asked} gives' if asked else 'JAX finds'} no devices: {message}"
    return ""
