"""Files of tensors: what the safetensors library writes is read and the other way round; broken files are refused."""

from __future__ import annotations

import contextlib
import errno
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moextend_jax.checkpoints.tensors import (
    Planned,
    new_folder,
    open_pickles,
    open_safetensors,
    open_tensors,
    write_safetensors,
)
from moextend_jax.config import MoextendError

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c.scalar": np.array([7], np.float16),
    "d.ids": np.arange(5, dtype=np.int64),
    "e.empty": np.zeros((0, 3), np.float32),
}


def planned(array: np.ndarray) -> Planned:
    return Planned(array.shape, array.dtype, lambda: (array[n : n + 1] for n in range(len(array))))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_what_the_library_wrote_is_read_bit_for_bit(file: Path):
    for opened in (open_safetensors(file), open_safetensors(file.parent)):
        assert opened.keys() == TENSORS.keys()
        for name, stored in opened.items():
            array = stored.read()
            assert (
                (stored.shape, stored.dtype) == (TENSORS[name].shape, TENSORS[name].dtype) == (array.shape, array.dtype)
            )
            assert array.tobytes() == TENSORS[name].tobytes()
            assert not array.flags.writeable or not array.size


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path, limit: int):
    heard = []
    write_safetensors(
        tmp_path, {name: planned(a) for name, a in TENSORS.items()}, max_shard_bytes=limit, written=heard.append
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    again = {name: array for path in files for name, array in load_file(path).items()}
    assert {name: array.tobytes() for name, array in again.items()} == {n: a.tobytes() for n, a in TENSORS.items()}
    assert sum(heard) == sum(array.nbytes for array in TENSORS.values())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == (limit < 100)
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == TENSORS.keys()
        assert all(path.stat().st_size < limit + 400 or limit == 1 for path in files)
    assert open_safetensors(tmp_path).keys() == TENSORS.keys()


# --- broken files -----------------------------------------------------------------------------------------------------


def test_the_size_of_a_tensor_is_asked_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    monkeypatch.setattr(Planned, "nbytes", property(lambda tensor: asked.append(1) or tensor.dtype.itemsize))
    write_safetensors(tmp_path, {f"{n}": planned(np.ones((1, 1), np.int8)) for n in range(100)}, max_shard_bytes=10**9)
    assert len(asked) <= 500


def test_a_cut_file_names_the_tensor_that_was_cut(file: Path):
    last = list(open_safetensors(file))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MoextendError, match=rf"model\.safetensors cannot be read: it is cut short, {last} needs"):
        open_safetensors(file)


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 0, 3])
def test_an_absurd_header_is_refused_without_reading_it(tmp_path: Path, length: int):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a":' + b"x" * 100)
    with pytest.raises(MoextendError, match="cannot be read"):
        open_safetensors(path)


def test_a_sparse_file_with_a_header_of_gigabytes_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)
    with pytest.raises(MoextendError, match="no safetensors header"):
        open_safetensors(path)


def header_of(entries: dict[str, Any] | str, *, data: int = 16) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entries",
    [
        "[]",
        "{}",
        '{"a": 1}',
        '{"a": {"dtype": "F32"}}',
        {"a": ONE | {"shape": [3]}, "b": ONE | {"data_offsets": [8, 16]}},  # bytes do not fit the shape
        {"a": ONE, "b": ONE},  # two on one place
        {"a": ONE},  # bytes that belong to nobody
        {"a": ONE, "b": ONE | {"data_offsets": [12, 20]}},  # a hole
        {"a": ONE | {"shape": [-2]}, "b": ONE | {"data_offsets": [8, 16]}},
        {"a": ONE | {"shape": ["2"]}, "b": ONE | {"data_offsets": [8, 16]}},
        {"a": ONE | {"dtype": "Q4"}, "b": ONE | {"data_offsets": [8, 16]}},
        {"a": ONE | {"data_offsets": [0, 8, 16]}},
        {"a": ONE | {"data_offsets": ["0", "8"]}, "b": ONE | {"data_offsets": [8, 16]}},
        f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE | {"data_offsets": [8, 16]})}}}',
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entries: dict[str, Any] | str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_of(entries))
    with pytest.raises(MoextendError, match="model.safetensors"):
        open_safetensors(path)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_safetensors(tmp_path, {name: planned(a) for name, a in TENSORS.items()}, max_shard_bytes=1)
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_lists_a_missing_shard_names_it(shards: Path):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(MoextendError, match=rf"index\.json lists shards that do not exist: {gone.name}"):
        open_safetensors(shards)


def test_shards_without_index_must_be_complete(shards: Path):
    (shards / "model.safetensors.index.json").unlink()
    assert open_safetensors(shards).keys() == TENSORS.keys()
    sorted(shards.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(MoextendError, match="4 .*files of 5"):
        open_safetensors(shards)


@pytest.mark.parametrize("beside", ["model.fp32-00001-of-00002", "model.fp32", "open_clip_model"])
def test_beside_a_whole_file_others_are_not_read(tmp_path: Path, beside: str):
    """The same in another format, or of another program: whisper-large-v3 and LAION's CLIPs are published so."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({**TENSORS, "visual.conv1.weight": TENSORS["a.weight"]}, tmp_path / f"{beside}.safetensors")
    assert open_safetensors(tmp_path).keys() == TENSORS.keys()


def test_an_index_and_its_shards_must_agree(shards: Path):
    change_index(shards, lambda listed: listed.update({"z.weight": listed["a.weight"]}))
    with pytest.raises(MoextendError, match=r"does not hold what the index says\. Missing: z\.weight"):
        open_safetensors(shards)
    change_index(shards, lambda listed: (listed.pop("z.weight"), listed.pop("a.weight")))
    with pytest.raises(MoextendError, match="index.json does not list"):
        open_safetensors(shards)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": 3}']
)
def test_a_broken_index_is_refused(shards: Path, text: str):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MoextendError, match="index.json"):
        open_safetensors(shards)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        save_file({"a": TENSORS["a.weight"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MoextendError, match="a stands in more than one file"):
        open_safetensors(tmp_path)


# --- a new folder -----------------------------------------------------------------------------------------------------


def test_a_folder_appears_at_the_end(tmp_path: Path):
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "new").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new" / "a").read_text() == "a"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), new_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    with pytest.raises(MoextendError, match="exists already"), new_folder(tmp_path):
        pass
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "b").write_text("b")
    assert (tmp_path / "empty" / "b").exists()


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def busy(*_: Path) -> Path:
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "rename", busy)
    said = "mount cannot be replaced .Device or resource busy.: name a new folder in it"
    with pytest.raises(MoextendError, match=said), new_folder(tmp_path / "mount"):
        pytest.fail("it was to be written")
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]


def test_an_empty_folder_keeps_its_rights(tmp_path: Path):
    (tmp_path / "new").mkdir(mode=0o750)
    for mistake in (KeyboardInterrupt, None):
        with contextlib.suppress(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
            (folder / "a").write_text("a")
            if mistake:
                raise mistake
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
        assert (tmp_path / "new" / "a").exists() == (mistake is None)


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_link_is_followed_to_the_new_folder(tmp_path: Path, target: str):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "new").symlink_to(tmp_path / "disk" / target)
    with new_folder(tmp_path / "new") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "a").write_text("a")
    assert (tmp_path / "new").is_symlink() and (tmp_path / "disk" / target / "a").exists()


# --- torch pickles ----------------------------------------------------------------------------------------------------


def test_without_torch_a_pickle_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(MoextendError, match=r"moextend-jax\[torch\]"):
        open_pickles(tmp_path)


def test_torch_pickles_are_read_bit_for_bit(tmp_path: Path):
    torch = pytest.importorskip("torch")
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "b": torch.arange(6).to(torch.bfloat16),
        "c": torch.tensor(3.0),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    opened = open_pickles(tmp_path)
    assert opened["a"].shape == (3, 2) and opened["b"].dtype == ml_dtypes.bfloat16 and opened["c"].shape == ()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(opened[name].read().astype(np.float32), tensor.float().numpy())
    (tmp_path / "shards").mkdir()
    for n, name in enumerate(tensors, 1):
        torch.save({name: tensors[name]}, tmp_path / "shards" / f"pytorch_model-0000{n}-of-00003.bin")
    assert open_pickles(tmp_path / "shards").keys() == tensors.keys()


class Evil:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


@pytest.mark.parametrize("value", [Evil(), {"a": Evil()}, {"a": 3}, [1, 2]])
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, value: Any, capfd: pytest.CaptureFixture[str]):
    torch = pytest.importorskip("torch")
    torch.save(value, tmp_path / "model.pth")
    with pytest.raises(MoextendError, match="model.pth"):
        open_pickles(tmp_path / "model.pth")
    assert "ran code" not in capfd.readouterr().out


def test_what_a_trainer_leaves_beside_weights_is_not_taken_for_them(tmp_path: Path):
    torch = pytest.importorskip("torch")
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    for name in ("training_args.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "random_states_0.bin"):
        torch.save({"learning_rate": 1e-3}, tmp_path / name)
    with pytest.raises(MoextendError, match=r"holds no \*\.bin, .* file of weights"):
        open_tensors(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert open_tensors(tmp_path).keys() == weights.keys()


def test_parameters_are_read_as_the_tensors_that_they_are(tmp_path: Path):
    torch = pytest.importorskip("torch")
    values = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": torch.nn.Parameter(values), "b": torch.nn.Parameter(values.bfloat16())}, tmp_path / "p.bin")
    stored = open_tensors(tmp_path / "p.bin")
    np.testing.assert_array_equal(stored["a"].read(), values.numpy())
    np.testing.assert_array_equal(stored["b"].read().astype(np.float32), values.numpy())
