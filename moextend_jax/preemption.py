"""Machines that are taken away, and Ctrl-C: a signal in, a saved checkpoint and an exit code out.

In one process the signal is ours. In several, JAX's own service catches SIGTERM (and a cloud's maintenance notice,
which comes as the same signal), tells all processes, and names the step at which all of them stop; the other signals
are passed on to it as SIGTERM.

The first Ctrl-C during training is such a signal too; the second, and any other, leaves at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: what can be done is done, try again later. The same command goes on."""
INTERRUPTED = 128 + signal.SIGINT
"""What shells say of a command that Ctrl-C ended."""

OTHERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SIGNALS = (signal.SIGTERM, *OTHERS)
"""What clusters announce the end with: most SIGTERM; Slurm's --signal what the user names, mostly SIGUSR1; a terminal
that is closed SIGHUP."""
SOON = 0.05
"""Seconds after which an interrupt that was lost is raised again."""


class Preempted(BaseException):
    """The run has stopped because its machine is to be taken away, or somebody pressed Ctrl-C; the message says where
    it stands, and `code` is what the process ends with.

    Like KeyboardInterrupt it can be raised anywhere, so it is no Exception: libraries that catch those would lose it.
    """

    def __init__(self, *words: object):
        super().__init__(*words)
        self.code = INTERRUPTED if _Notice.interrupted else EXIT_CODE

    @property
    def why(self) -> str:
        return "interrupted" if self.code == INTERRUPTED else "told to stop"


class _Notice:
    given = False
    interrupted = False
    deferred = False
    alone = True


def listen() -> None:
    """From here on `SIGNALS` raise `Preempted`, in training after the step; so does the first Ctrl-C in training. Any
    number of signals is as one. Only where there is one process."""
    _Notice.given, _Notice.interrupted, _Notice.alone = False, False, True
    _handle(SIGNALS, _on_signal)
    _handle((signal.SIGINT,), _on_interrupt)


def pass_on() -> None:
    """From here on `OTHERS`, and the first Ctrl-C in training, are as SIGTERM, for which JAX's service listens where
    there are several processes."""
    _Notice.alone = False
    _handle(OTHERS, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    _handle((signal.SIGINT,), _on_interrupt)


def _handle(signals: tuple[signal.Signals, ...], handler: Callable[..., None]) -> None:
    if threading.current_thread() is not threading.main_thread():  # of a web page or a notebook: no other may
        return
    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)


def _on_signal(*_: object) -> None:
    first, _Notice.given = not _Notice.given, True
    if first and not _Notice.deferred:
        raise Preempted("nothing was being trained")


def _on_interrupt(*_: object) -> None:
    if _Notice.interrupted or not _Notice.deferred:
        raise KeyboardInterrupt
    _Notice.interrupted = True
    # Not by print: the signal may have come in the middle of one.
    os.write(2, b"moextend: stopping after this step; Ctrl-C again to leave at once\n")
    if _Notice.alone:
        _Notice.given = True
    else:
        os.kill(os.getpid(), signal.SIGTERM)


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


_ASKED = itertools.count(1)


def given() -> bool:
    """Whether to save and stop now. Several processes, which all ask at the same places, get the same answer.

    JAX stops all processes at one more than the largest number that any of them has asked with. So the counter never
    restarts between stages, and nothing else may call that function with numbers of its own.
    """
    if _Notice.alone:
        return _Notice.given
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_ASKED))


def stop_if_told() -> None:
    """The same where nothing is to be saved, for what takes long beside training. In one process the signal itself has
    raised."""
    if not _Notice.alone and given():
        raise Preempted("nothing was being trained")


@contextlib.contextmanager
def not_lost() -> Iterator[None]:
    """Inside, an interrupt that Python throws away is raised again a moment later.

    Python handles a signal wherever it stands. Where that is a callback of the garbage collector, and JAX has one that
    runs all the time, or a destructor, it reports what the handler raised and goes on: every second Ctrl-C was lost.
    """
    report = sys.unraisablehook

    def raise_again(unraisable: Any) -> None:
        kind = unraisable.exc_type
        if not issubclass(kind, KeyboardInterrupt | Preempted):
            report(unraisable)
            return
        words = getattr(unraisable.exc_value, "args", ())

        def later(*_: object) -> None:
            raise kind(*words)

        signal.signal(signal.SIGALRM, later)
        signal.setitimer(signal.ITIMER_REAL, SOON)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = report
