"""Ends a process that hangs: a host that waits for ever, for others or for a disk, costs as much as one that works.

In: how long a step may take. Out: after that time, the stack of every thread on standard error, and exit code 1, so
that whatever started the run starts it again from its newest checkpoint. Python's own `faulthandler` does both, in a
thread that does not need the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator


class Watchdog:
    """Use it in `with`, and call `alive` after every step. seconds: at most between two calls; 0: no limit."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside may take as long as it likes: compiling, saving, validating."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
        yield
        self.alive()
