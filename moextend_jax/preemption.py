"""Machines that are taken away: SIGTERM in, a saved checkpoint and exit code 75 out.

In one process the signal is ours. In several, JAX's own service catches it (and a cloud's maintenance notice, which
comes as the same signal), tells all processes, and names the step at which all of them stop.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: what can be done is done, try again later. The same command goes on."""


class Preempted(Exception):
    """The run has stopped because its machine is to be taken away; the message says where it stands."""


class _Notice:
    given = False
    deferred = False


def listen() -> None:
    """From here on SIGTERM raises `Preempted`, in training after the step. Any number of signals is as one. Only where
    there is one process."""
    signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(*_: object) -> None:
    first, _Notice.given = not _Notice.given, True
    if first and not _Notice.deferred:
        raise Preempted("nothing was being trained")


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the signal only sets `given`: the caller asks, saves, and raises `Preempted` itself."""
    _Notice.deferred = True
    try:
        yield
    finally:
        _Notice.deferred = False
    if _Notice.given:
        raise Preempted("nothing was left to save")


def given() -> bool:
    """Whether this process has been told; several processes ask JAX's service instead."""
    return _Notice.given
