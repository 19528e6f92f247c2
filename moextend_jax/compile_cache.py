"""JAX's persistent cache of compiled programs, on by default: what one start has compiled, the next one reads.

In: the environment. Out: a folder of this user's, named after the processor (programs for CPUs use all that theirs can
do, and a home may be shared by several kinds), which stays below `MOST` bytes. JAX_COMPILATION_CACHE_DIR names another
place, or none where it is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from moextend_jax.folders import cache

MOST = 4 * 2**30


def enable() -> None:
    """Call before anything is compiled. Without a folder that can be made there is no cache, as `doctor` says."""
    named = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] (JAX adds its own)
    if named is not None:  # which the variable sets too
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies in it is run
        prune(place, most=MOST)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(place))


def folder() -> Path:
    """Where programs are kept if nothing is said."""
    return cache() / "compile" / processor()


def processor() -> str:
    """A name for what this machine's processor can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [platform.processor()]
    abilities = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return f"{platform.machine()}-{hashlib.sha256(''.join(abilities or lines[:1]).encode()).hexdigest()[:8]}"


def prune(place: Path, *, most: int) -> None:
    """Deletes the entries that were read longest ago until what is left has at most `most` bytes. JAX could do so
    itself, but once a process has been killed between two of its files, it keeps nothing more."""
    newest = sorted(_entries(place), key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime), reverse=True)
    total = 0
    for status, path in newest:
        total += status.st_size
        if total > most:
            path.unlink(missing_ok=True)


def _entries(place: Path) -> Iterator[tuple[os.stat_result, Path]]:
    for path in place.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            yield path.stat(), path


def status() -> str:
    """Which cache this process's environment means, in words."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named == "":
        return "none: JAX_COMPILATION_CACHE_DIR is empty"
    if named and "://" in named:
        return named
    place = Path(named) if named else folder()
    sizes = [status.st_size for status, _ in _entries(place)]
    return f"{place}: {len(sizes)} programs, {sum(sizes) / 1e6:,.0f} MB"
