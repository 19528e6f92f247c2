"""Hashes: of what is in files whatever a folder claims, read once; of arrays without a copy that stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import folders
import ml_dtypes
import numpy as np
import pytest
import tiny

from moextend_jax import cli
from moextend_jax.checkpoints import hashes, leaves
from moextend_jax.checkpoints.loading import EMBEDDED, open_base, open_checkpoint
from moextend_jax.checkpoints.source import open_source
from moextend_jax.config import MoextendError

# --- the record beside a base -----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the leaves whose bytes are hashed, of folders of any size and age."""
    read: list[str] = []
    monkeypatch.setattr(hashes, "WORTH", 1)
    monkeypatch.setattr(hashes, "SETTLED", -(10**18))
    monkeypatch.setattr(hashes, "leaf_hash", lambda leaf: read.append(leaf.path) or leaves.leaf_hash(leaf))
    return read


def base_of(tmp_path: Path) -> Path:
    """A decoder in shards, and its tower in a folder inside."""
    folders.clip(folders.mixtral(tmp_path / "base", shards=3) / "vision")
    return tmp_path / "base"


def opened_hash(folder: Path) -> str:
    return hashes.base_hashes(open_source(folder).leaves).base


def test_a_base_is_read_once(tmp_path: Path, reads: list[str]):
    base = base_of(tmp_path)
    first = opened_hash(base)
    assert sorted(reads) == sorted(open_source(base).leaves)
    reads.clear()
    assert opened_hash(base) == first and not reads
    for folder in (base, base / "vision"):
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [hashes.NAME]
    (base / hashes.NAME).unlink()
    assert opened_hash(base) == first
    assert {path.partition("/")[0] for path in reads} == {"decoder"}  # the tower has a record of its own


def test_a_published_model_is_opened_without_hashing_it(tmp_path: Path, reads: list[str]):
    folder = folders.mixtral(tmp_path / "model")
    opened = open_checkpoint(folder)
    assert not reads and not (folder / hashes.NAME).exists()
    assert folders.base_hash(opened) == opened_hash(folder) and reads


def swap_bytes(path: Path) -> None:
    """Other contents of the same size and, as far as a program can say, the same time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-100:-60] = content[-100:-60][::-1]
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_file_that_changed_is_read_again_even_if_size_and_time_are_as_before(tmp_path: Path, reads: list[str]):
    base = base_of(tmp_path)
    first = opened_hash(base)
    shard = base / "model-00002-of-00003.safetensors"
    old = shard.read_bytes()
    swap_bytes(shard)
    reads.clear()
    assert opened_hash(base) != first
    assert reads and "media/image/tower/patch" not in reads
    shard.write_bytes(old)
    assert opened_hash(base) == first


def test_a_file_that_changed_since_it_was_opened_is_not_recorded(tmp_path: Path, reads: list[str]):
    base = folders.mixtral(tmp_path / "base")
    opened = open_source(base).leaves
    swap_bytes(base / "model.safetensors")
    hashes.base_hashes(opened)
    assert reads and not (base / hashes.NAME).exists()


def test_a_record_that_came_with_a_copy_says_nothing(tmp_path: Path, reads: list[str]):
    base = base_of(tmp_path)
    first = opened_hash(base)
    subprocess.run(["cp", "-a", base, tmp_path / "copy"], check=True)  # keeps the times
    swap_bytes(tmp_path / "copy" / "model-00001-of-00003.safetensors")
    reads.clear()
    assert opened_hash(tmp_path / "copy") != first and len(reads) == len(open_source(base).leaves)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-30],
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"leaves"', '"lives"'),
        lambda text: text.replace('"sha256": "', '"sha256": "x'),
        lambda text: text.replace('"bfloat16"', '"float16"'),
    ],
)
def test_a_record_that_is_not_as_it_should_be_says_nothing(tmp_path: Path, reads, change: Callable[[str], str]):
    base = folders.mixtral(tmp_path / "base")
    first = opened_hash(base)
    record = base / hashes.NAME
    whole = record.read_text()
    record.write_text(change(whole))
    reads.clear()
    assert opened_hash(base) == first and reads
    assert record.read_text() == whole


def test_a_record_is_not_read_or_written_through_a_link(tmp_path: Path, reads: list[str]):
    base, elsewhere = folders.mixtral(tmp_path / "base"), tmp_path / "elsewhere"
    first = opened_hash(base)
    (base / hashes.NAME).rename(elsewhere)
    before = elsewhere.read_text()
    (base / hashes.NAME).symlink_to(elsewhere)
    reads.clear()
    assert opened_hash(base) == first and reads
    assert elsewhere.read_text() == before and not (base / hashes.NAME).is_symlink()


def test_a_folder_that_cannot_be_written_to_stays_as_it_is(tmp_path: Path, reads: list[str], monkeypatch):
    base = folders.mixtral(tmp_path / "base")
    files = sorted(base.iterdir())

    def refuse(*args, **kwargs):
        raise PermissionError(30, "Read-only file system")

    for name in ("write_text", "replace"):  # also half-way
        monkeypatch.setattr(Path, name, refuse)
        first = opened_hash(base)
        assert sorted(base.iterdir()) == files
        monkeypatch.undo()
    assert opened_hash(base) == first


def test_small_folders_and_fresh_files_get_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = sorted(EMBEDDED.rglob("*"))
    hashes.base_hashes(open_base("embedded", "embedded", feature_layer=-2).leaves)  # installed long ago, but small
    assert sorted(EMBEDDED.rglob("*")) == before
    base = folders.mixtral(tmp_path / "base")
    monkeypatch.setattr(hashes, "WORTH", 1)
    monkeypatch.setattr(hashes, "SETTLED", 3600 * 10**9)  # files of this test could still change unseen
    opened_hash(base)
    assert not (base / hashes.NAME).exists()


# --- what a folder claims ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """An import, whole when it was written."""
    cli.call(["import", str(base_of(tmp_path)), str(tmp_path / "imported")])
    swap_bytes(tmp_path / "imported" / "model.safetensors")
    return tmp_path / "imported"


def test_the_bytes_of_an_import_are_hashed_not_its_claims(damaged: Path):
    with pytest.raises(MoextendError, match=r"model\.safetensors: \S+ is not what was imported: .*import it again"):
        opened_hash(damaged)
    with pytest.raises(MoextendError, match="is not what was imported"):
        open_checkpoint(damaged)


@pytest.mark.parametrize("layout", ["mixtral", "clip"])
def test_a_damaged_import_is_exported_nowhere(tmp_path: Path, damaged: Path, layout: str):
    leaf = next(leaf for leaf in open_source(damaged).leaves.values() if leaf.sha256 != leaves.leaf_hash(leaf))
    assert leaf.path.startswith("media/image/tower/")  # the last of the file
    with pytest.raises(MoextendError, match=f"{leaf.path} is not what was imported"):
        cli.call(["export", str(damaged), str(tmp_path / "out"), f"--layout={layout}"])
    with pytest.raises(MoextendError, match=f"{leaf.path} is not what was imported"):
        cli.call(["import", str(damaged), str(tmp_path / "out"), "--dtype=float32"])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "imported"}


def test_a_delta_is_not_applied_to_a_damaged_base_nor_damaged_itself(tmp_path: Path, damaged: Path):
    whole = folders.released(tmp_path / "whole")
    base = tmp_path / "base"
    cli.call(["import", str(whole), str(tmp_path / "model"), "--feature_layer=-2"])
    delta = tmp_path / "delta"
    cli.call(["export", str(tmp_path / "model"), str(delta), "--layout=delta"])
    assert open_checkpoint(delta, base=base).source.record.layout == "delta"
    with pytest.raises(MoextendError, match="is not what was imported"):
        open_checkpoint(delta, base=damaged)
    swap_bytes(delta / "model.safetensors")
    with pytest.raises(MoextendError, match=r"delta/model\.safetensors: \S+ is not what was imported"):
        open_source(delta, base=base)


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_the_hash_of_arrays_is_of_names_types_shapes_and_bytes():
    arrays = {**tiny.arrays(tiny.EXTENDED), "half": np.arange(6.0).astype(ml_dtypes.bfloat16), "one": np.float32(3.0)}
    digest = hashes.content_hash(arrays)
    assert hashes.content_hash({path: np.asarray(array) for path, array in reversed(arrays.items())}) == digest
    first = next(iter(arrays))
    for other in (
        {**arrays, first: np.nextafter(np.asarray(arrays[first]), np.float32(9))},
        {**arrays, first: np.asarray(arrays[first]).reshape(-1)},
        {**arrays, "half": np.asarray(arrays["half"]).view(np.float16)},
        {("x" if path == first else path): array for path, array in arrays.items()},
        {path: array for path, array in arrays.items() if path != first},
    ):
        assert hashes.content_hash(other) != digest


SHARDED = """
import jax, sys
jax.config.update("jax_num_cpu_devices", 4)
from pathlib import Path
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from moextend_jax.checkpoints import hashes

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

mesh = jax.make_mesh((4,), ("x",))
rows, columns, copies = (NamedSharding(mesh, P(*axes)) for axes in (("x",), (None, "x"), ()))
values = np.arange(16, dtype=np.float32).reshape(4, 4)
def placed(array, sharding):
    return {"w": jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])}
for sharding in (rows, columns):
    same = hashes.content_hash(placed(values, sharding))
    assert hashes.content_hash(placed(values, sharding)) == same
    other = values.copy()
    other[3, 1] = np.nextafter(other[3, 1], np.float32(99))
    assert hashes.content_hash(placed(other, sharding)) != same
    assert hashes.content_hash(placed(values[::-1], sharding)) != same
assert hashes.content_hash(placed(values, columns)) != hashes.content_hash(placed(values.T, rows))
assert hashes.content_hash(placed(values, copies)) == hashes.content_hash({"w": values})

big = jax.make_array_from_callback((4, 10_000_000), rows, lambda index: np.ones((1, 10_000_000), np.float32))
hashes.content_hash({"w": big[:, :1000]})
before = resident()
hashes.content_hash({"w": big})
print(resident() - before, big._npy_value, [shard.data._npy_value for shard in big.addressable_shards])
"""


@pytest.mark.slow
def test_no_copy_of_an_array_on_several_devices_stays():
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, rest = done.stdout.split(" ", 1)
    assert int(grown) < 20_000_000 and rest.strip() == "None [None, None, None, None]"  # the array has 160 MB
