"""One run at a time in a work directory, one process at a time in a file.

The lock is the kernel's (flock on WORKDIR/.lock), so that a run that dies in any way gives it back. Buckets and some
file systems have no such lock: there nothing is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from moextend_jax.config import MoextendError
from moextend_jax.distributed import first
from moextend_jax.folders import is_url

NAME = ".lock"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a work directory, in process 0 for all processes of the run.

    Raises:
      MoextendError: another run holds it; says which.
    """
    if is_url(workdir) or not first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise MoextendError(f"{workdir} is or lies below a file: give a folder as --workdir") from None
    # "a": whoever is refused must not empty what the holder wrote.
    with (workdir / NAME).open("a+") as file:
        try:
            _lock(file.fileno(), workdir / NAME, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise MoextendError(f"{workdir} is in use by {holder}; wait for it, or give another --workdir") from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since} ({' '.join(sys.argv[:2])})")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it may be gone; what the run ends with says so, or is something else
                file.truncate(0)
                if [path.name for path in workdir.iterdir()] == [NAME]:  # refused before it wrote anything
                    (workdir / NAME).unlink()
                    workdir.rmdir()


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """One process after another, in process 0 for all processes of a run, by a file beside `path`: who comes later
    waits."""
    with alone(path) if first() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """The same of every process by itself, of whichever run it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}{NAME}").open("a") as file:
        _lock(file.fileno(), path, fcntl.LOCK_EX)
        yield


def keep(descriptor: int, path: Path) -> None:
    """The file itself, which is open, for this process alone until it closes it; another that has it is an error."""
    try:
        _lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MoextendError(f"another process is writing {path}; wait for it, or stop it") from None


WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without such locks say: Lustre as it is often mounted, some of FUSE, NFS without its daemon."""


def _lock(descriptor: int, path: Path, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        print(f"moextend: {path}: no locks there ({error.strerror}), so that a second run is not noticed",
              file=sys.stderr)  # fmt: skip


def holder(workdir: Path) -> str | None:
    """Which run holds a work directory (its process, host and start, as text); None where none does."""
    with contextlib.suppress(OSError), (workdir / NAME).open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another run"
    return None
