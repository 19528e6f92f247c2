"""Processes that tests start: none is left behind where an assertion fails, and whether one still runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[Any]) -> Iterator[None]:
    """Kills those that still run at the end of the block, with its group one that leads one, and closes their pipes."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                kill = os.killpg if os.getpgid(process.pid) == process.pid else os.kill
                kill(process.pid, signal.SIGKILL)
        for process in processes:
            with process:
                pass


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended, and that nobody has waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
