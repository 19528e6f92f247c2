"""Rows of ArrayRecord files as items: read, looked at, and everything that can be wrong with one."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from moextend_jax.config import FeaturesConfig, ImageTags, Medium, Named
from moextend_jax.data.datasets import open_dataset
from moextend_jax.data.item_files import ItemFolder
from moextend_jax.data.records import Row, row_of
from moextend_jax.faults import Fault

DEPTH = Medium(
    kind="features", mark="<features:depth>", tags=ImageTags(pad=9), tower=FeaturesConfig(width=5, patches=3)
)


def write(path: Path, rows: list[bytes]) -> Path:
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()
    return path


def array(value: float) -> bytes:
    file = io.BytesIO()
    np.save(file, np.full((3, 5), value, np.float32))
    return file.getvalue()


def test_names_of_rows():
    assert row_of("a/depth.array_record:17") == Row("a/depth.array_record", 17)
    others = [
        "depth.array_record",
        "depth.array_record:",
        "depth.array_record:-1",
        "a.png",
        "a.png:3",
        ".array_record:x",
    ]
    assert [row_of(name) for name in others] == [None] * len(others)


def test_conversations_show_rows(tmp_path: Path):
    write(tmp_path / "depth.array_record", [array(n) for n in range(4)])
    talk = [{"from": "human", "value": "<features:depth>\nfar?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": f"{n}", "features": {"depth": f"depth.array_record:{n}"}, "conversations": talk} for n in (2, 0, 3)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    source = open_dataset(str(tmp_path / "d.json"), data_dir=tmp_path / "built", media=Named({"depth": DEPTH}))
    values = []
    for example in source:
        (ref,) = example.by_medium["depth"]
        values.append(source.items["depth"].decoded(ref.row, DEPTH).item[0, 0])
    assert values == [2, 0, 3]
    before = source.items["depth"].fingerprint
    write(tmp_path / "depth.array_record", [array(9 - n) for n in range(4)])
    again = open_dataset(str(tmp_path / "d.json"), data_dir=tmp_path / "built", media=Named({"depth": DEPTH}))
    assert again.items["depth"].fingerprint != before


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.array_record:4", "missing", "a.array_record has 4 rows"),
        ("b.array_record:0", "missing", "no features b.array_record in"),
        ("cut.array_record:1", "unreadable", "cannot read features cut.array_record:1"),
        ("text.array_record:0", "unreadable", "64KB"),
        ("a.array_record:3", "empty_file", "has 0 bytes"),
        ("../a.array_record:0", "outside", "leaves"),
        ("gs://b/a.array_record:0", "url", "is a URL"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, name: str, kind: str, message: str):
    path = write(tmp_path / "a.array_record", [array(0), array(1), array(2), b""])
    (tmp_path / "cut.array_record").write_bytes(path.read_bytes()[:-70_000])
    (tmp_path / "text.array_record").write_text("text")
    with pytest.raises(Fault, match=message) as caught:
        ItemFolder(tmp_path).read(name, "features")
    assert (caught.value.kind, caught.value.id) == (kind, name)


def test_names_keep_their_order_where_rows_and_files_mix(tmp_path: Path):
    write(tmp_path / "a.array_record", [array(0)])
    (tmp_path / "x.npy").write_bytes(array(1))
    names = ["x.npy", "a.array_record:0", "none.npy", "a.array_record:1", "b.array_record:0", "x.npy"]
    looked = list(ItemFolder(tmp_path).look(names))
    assert [isinstance(facts, Fault) for facts in looked] == [False, False, True, False, True, False]
    assert looked[0] == looked[-1] != looked[1]


def test_bytes_changed_at_random_are_a_fault_or_what_they_say(tmp_path: Path):
    raw = write(tmp_path / "a.array_record", [array(n) for n in range(4)]).read_bytes()
    rng = np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(raw, np.uint8))
    for n in range(60):
        changed = bytearray(raw)
        for at in rng.choice(used, 3):
            changed[at] = rng.integers(256)
        (tmp_path / f"{n}.array_record").write_bytes(changed)
        try:
            assert ItemFolder(tmp_path).read(f"{n}.array_record:2", "features") == array(2)
        except Fault as fault:
            assert fault.kind in ("unreadable", "missing")
