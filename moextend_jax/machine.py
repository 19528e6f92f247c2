"""What this machine has, by its device files and without JAX; and what is wrong where JAX finds no devices.

In: /dev and the environment. Out: names of platforms, variables for libtpu, one line of an error.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
"""libtpu without a TPU, as the extra `plan` installs it, complains in five lines unless it is told these."""


def accelerator() -> str:
    """ "gpu", "tpu" or "": what the machine has, whether or not JAX knows of it."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "gpu"
    return "tpu" if any(Path("/dev").glob("accel[0-9]*")) else ""


def quiet_libtpu() -> None:
    """Where there is surely no TPU (newer ones are vfio devices). Call before JAX looks for devices."""
    if accelerator() != "tpu" and not any(Path("/dev/vfio").glob("[0-9]*")):
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


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
