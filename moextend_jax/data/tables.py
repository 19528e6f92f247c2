"""Tables, a row at a time: CSV, Parquet and the Arrow files of a saved Hugging Face data set.

Goes in: a file. Comes out: `Row`s whose value is `{column: value}`; an image column may hold bytes. A few rows are in
memory at once, for they may hold pictures.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from moextend_jax.config import MoextendError
from moextend_jax.data.json_values import MOST_ENTRY, Row, invalid_bytes, one_line, open_file, unreadable
from moextend_jax.folders import is_url

AT_ONCE = 16
"""Rows that are taken out of a Parquet file together."""
FREE, TIMES = MOST_ENTRY // AT_ONCE, 100
"""A Parquet file may unpack to FREE bytes plus TIMES its own size."""
BUFFER = 1 << 20
"""Bytes of a column that are read ahead, where a row group may have gigabytes of pictures."""


def read_csv(path: Path) -> Iterator[Row]:
    """The first line names the columns; they are parted by commas, semicolons or tabs, whichever that line has most of.
    All values are text."""
    invalid: list[int] = []
    csv.field_size_limit(MOST_ENTRY)
    with open_file(path) as file:
        lines = _text_lines(file, path, invalid)
        try:
            first = next(lines, "")
            delimiter = max(",;\t", key=first.count)
            header = next(csv.reader([first], delimiter=delimiter), [])
            padded = bool(header[1:]) and all(name.startswith(" ") for name in header[1:])  # `a, b, c`
            header = [name.strip() for name in header]
            if len(set(header)) < len(header):
                raise MoextendError(f"{path} has two columns of one name: {', '.join(header)[:300]!a}")
            rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=padded)
            for cells in rows:
                if not any(cells):  # a blank line, also `;;;` below the last row of a spreadsheet
                    continue
                places, why = invalid[:], ""
                invalid.clear()
                if len(cells) != len(header):
                    why = f"it has {len(cells)} columns where the first line names {len(header)}"
                value = dict(zip(header, cells, strict=False))
                yield Row(path, f"line {rows.line_num + 1}", value, places, why)
        except csv.Error as error:
            raise MoextendError(f"{path} is not CSV: {one_line(error)}") from error


def _text_lines(file: Any, path: Path, invalid: list[int]) -> Iterator[str]:
    """Lines as text; places of bytes that are not UTF-8 are added to `invalid`."""
    at = 0
    while True:
        try:
            line = file.readline(MOST_ENTRY + 1)
        except Exception as error:
            raise unreadable(path, error) from error
        if not line:
            return
        if len(line) > MOST_ENTRY:
            raise MoextendError(f"{path} is not CSV: the line at byte {at} has no end")
        text = line.decode("utf-8", errors="surrogateescape")
        invalid += [] if text.isascii() else invalid_bytes(text, at)
        yield text.removeprefix("\ufeff") if not at else text
        at += len(line)


def read_parquet(path: Path) -> Iterator[Row]:
    # Columns are read piece by piece, not a row group at once.
    options = {"buffer_size": BUFFER, "pre_buffer": False}
    with open_file(path) as file, _refusing(path), pq.ParquetFile(file, **options) as parquet:
        groups = (parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups))
        size, total = file.seek(0, os.SEEK_END), sum(group.total_byte_size for group in groups)
        if total > FREE + TIMES * size:
            raise ValueError(f"its {size:,} bytes would unpack to {total:,}")
        yield from _rows(path, parquet.iter_batches(batch_size=AT_ONCE))


def read_arrow(path: Path) -> Iterator[Row]:
    """An Arrow stream, as `datasets` saves them, or an Arrow file."""
    # Not read into memory, where a damaged file may say that a part of it has gigabytes.
    with _refusing(path), open_file(path) if is_url(path) else pa.memory_map(os.fspath(path)) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            with pa.ipc.open_file(file) as batches:
                yield from _rows(path, (batches.get_batch(n) for n in range(batches.num_record_batches)))
        else:
            with pa.ipc.open_stream(file) as batches:
                yield from _rows(path, batches)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except MoextendError:
        raise
    except Exception as error:  # pyarrow's own, Python's, and those of a bucket
        raise unreadable(path, error) from error


def _rows(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate()  # offsets of an Arrow file are not to be trusted
        for first in range(0, batch.num_rows, AT_ONCE):
            for value in _values(batch.slice(first, AT_ONCE)):
                why = value if isinstance(value, str) else ""
                yield Row(path, f"row {number}", None if why else value, [], why)
                number += 1


def _values(batch: pa.RecordBatch) -> list[Any]:
    """The rows, each as a dict, or as a text that says why it cannot be one."""
    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [value for n in range(batch.num_rows) for value in _values(batch.slice(n, 1))]
        return [f"{NOT_UTF8 if 'UTF8' in str(error) or isinstance(error, UnicodeDecodeError) else ''}{error}"[:300]]


NOT_UTF8 = "not UTF-8: "
"""How the fault of a row begins that holds such text."""
