"""Checksums of a checkpoint's files: written before Orbax commits it, checked before it is read.

In: a folder. Out: its file SHA256SUMS, as coreutils writes it (`sha256sum -c SHA256SUMS`), or what is wrong. A bucket
keeps a checksum of every object: its lines have those, with CRC32C before them, so that no process reads again what all
have just written, while a machine is taken away or a pod waits.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moextend_jax.config import MoextendError
from moextend_jax.folders import is_url, object_checksum

NAME = "SHA256SUMS"
METADATA = "_CHECKPOINT_METADATA"
"""Orbax's own file. It is written again after the checksums, so it has none and `fault` only parses it."""
KEPT = "CRC32C="
THREADS = 8


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS of all files in a folder but itself and `METADATA`."""
    digests = _digests(folder, _files(folder), kept=is_url(folder))
    lines = [f"{digest}  {name}\n" for name, digest in digests.items()]
    (folder / NAME).write_text("".join(lines))


def fault(folder: Path) -> str | None:
    """What is wrong with a folder that `write_sums` finished; None: nothing.

    Raises:
      MoextendError: a file is there and cannot be read: the disk may be at fault, or the network, and not the file.
    """
    try:
        return _fault(folder)
    except OSError as error:
        raise MoextendError(
            f"{folder} cannot be read: {error}. Try again; if it stays so, delete it, and what was saved before it is "
            "taken"
        ) from error


def _fault(folder: Path) -> str | None:
    try:
        lines = (folder / NAME).read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        return f"its {NAME} cannot be read ({type(error).__name__}): it was not finished"
    try:
        json.loads((folder / METADATA).read_text())
    except (FileNotFoundError, ValueError) as error:
        return f"its {METADATA} cannot be read ({error})"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    names = _files(folder)
    if missing := sorted(expected.keys() - set(names)):
        return f"{len(missing)} of its {len(expected)} files are missing, for instance {missing[0]}"
    kept = any(digest.startswith(KEPT) for digest in expected.values())
    if kept and not is_url(folder):  # it was copied out of a bucket, by a program that checks what it copies
        return None
    digests = _digests(folder, [name for name in names if name in expected], kept=kept)
    if changed := [name for name, digest in digests.items() if digest != expected[name]]:
        return f"{len(changed)} of its {len(expected)} files are not what was written, for instance {changed[0]}"
    return None


def identity(folder: Path) -> str:
    """Names one finished checkpoint: another one with the same arrays has another."""
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()[:16]


def _files(folder: Path) -> list[str]:
    """Paths of all files in a folder and the folders in it, relative to it. (Paths in buckets have no `Path.walk`.)"""
    names, folders = [], [("", folder)]
    while folders:
        prefix, here = folders.pop()
        for path in here.iterdir():
            name = f"{prefix}{path.name}"
            if path.is_dir():
                folders.append((f"{name}/", path))
            elif name not in (NAME, METADATA):
                names.append(name)
    return sorted(names)


def _digests(folder: Path, names: list[str], *, kept: bool) -> dict[str, str]:
    """kept: those that the folder's bucket keeps; False: computed."""

    def digest(name: str) -> str:
        if kept:
            return KEPT + object_checksum(folder / name)
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
