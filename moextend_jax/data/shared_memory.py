"""Whether this machine lets processes work together: asked before any is started, and where one has died.

Goes in: advice for the message. Comes out: nothing, or an error that names /dev/shm.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator

from moextend_jax.config import MoextendError

LOCKS = 64
"""More than a pool of workers takes; of 4 kB each."""


def check_shared_memory(instead: str) -> None:
    """Raises a MoextendError where worker processes cannot be started; `instead` says how to go on without any."""
    try:
        # What queues between processes are made of: each a file in /dev/shm, which Python's error does not name.
        [multiprocessing.get_context("spawn").Lock() for _ in range(LOCKS)]
    except OSError as error:
        raise MoextendError(
            f"worker processes need /dev/shm, which cannot be used here ({error.strerror or error}): mount it writable "
            f"and larger (containers: --shm-size=8g), or {instead}"
        ) from error


@contextlib.contextmanager
def no_bus_error() -> Iterator[None]:
    """Inside, a worker's bus error (its batch found no room in /dev/shm) becomes a MoextendError."""
    try:
        yield
    except RuntimeError as error:  # Grain's
        if not str(error).startswith("Worker process") or f"exit code -{int(signal.SIGBUS)}." not in str(error):
            raise
        raise MoextendError(
            "a worker process found no room for a batch in /dev/shm: make it larger (containers: --shm-size=8g), or "
            "set workers = 0"
        ) from error
