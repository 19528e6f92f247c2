"""Items that are rows of ArrayRecord files: the name FILE.array_record:ROW in, the row's bytes out, or a `Fault`.

A row is what the item's own file would hold: a .npz or .npy file, a picture, a sound. Such files are believed more than
others: how large a row is shows only when it has been unpacked.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource

from moextend_jax.faults import Fault, wrong_size

_ROW = re.compile(r"(.+\.array_record):(\d{1,18})")


class Row(NamedTuple):
    """A row, from 0, of a file named as items are."""

    file: str
    row: int


def row_of(name: str) -> Row | None:
    """What such a name names; None for other names."""
    match = _ROW.fullmatch(name)
    return Row(match[1], int(match[2])) if match else None


def read_row(path: Path, row: int, *, name: str, noun: str) -> bytes:
    """Raises a `Fault`: no ArrayRecord file, a damaged one, one without such a row, an empty or enormous row."""
    facts = path.stat()
    try:
        rows = _open(os.fspath(path), facts.st_mtime_ns, facts.st_size)
        encoded = rows[row] if row < len(rows) else None
    except (RuntimeError, ValueError, OSError) as error:
        raise Fault(f"cannot read {noun} {name}: {error}", "unreadable", name) from error
    if encoded is None:
        raise Fault(f"no {noun} {name}: {path} has {len(rows)} rows", "missing", name)
    if kind := wrong_size(len(encoded)):
        raise Fault(f"{noun} {name} has {len(encoded)} bytes", kind, name)
    return encoded


@functools.lru_cache(maxsize=16)
def _open(path: str, time: int, size: int) -> ArrayRecordDataSource:
    """Anew where the file is another than it was."""
    del time, size
    return ArrayRecordDataSource(path)
