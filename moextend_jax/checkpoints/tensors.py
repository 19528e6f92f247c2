"""Tensors in files, one at a time: safetensors and torch pickles open without being read; writing streams.

In: a file, or a folder with one file or with shards and their index. Out: `Stored` by tensor name, checked against
the headers and the sizes of the files. The other way round `Planned` tensors become files, and a folder appears whole
or not at all.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.folders import extra_hint, is_url, local, read_range, size_and_generation
from moextend_jax.outside import (
    MAX_JSON,
    inside,
    parse_json,
    plain_file,
    read_small,
    said_by,
    short,
    shown,
    without_repeats,
)

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "BOOL": np.dtype(np.bool_),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
}  # fmt: skip
"""The format's names of element types."""

_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states).*")
"""What trainers leave beside weights."""

_OF_TRAINERS = {
    "checkpoint-*": "it is a trainer's folder of checkpoints; name one of them: {}",
    "global_step*": "its weights are DeepSpeed's shards {}: make them one file with the zero_to_fp32.py beside them",
    "pytorch_model_fsdp*": "its weights are FSDP's shards {}: make them one file with `accelerate merge-weights`",
    "*.distcp": "its weights are shards of torch.distributed ({}): make them one file with `accelerate merge-weights`",
    "snapshots": "it is a model of the hub's cache; name the folder that is in {}",
    "*.gguf": "name the file itself: {}",
}
"""Pattern of what a folder holds instead of weights -> what to do, for a message."""

MAX_AXES, MAX_BYTES = 64, 1 << 62
"""Most axes that a NumPy array can have; and what a tensor's axes and offsets are below, so that sizes fit 64 bits."""


class File(NamedTuple):
    """A file as it was when it was opened: its size in bytes, and when its content (`written`) and its metadata
    (`changed`) last changed, in nanoseconds. An object in a bucket is never changed, only replaced: both are then its
    generation (microseconds since 1970, when it was put there)."""

    path: Path
    size: int
    written: int
    changed: int


def opened(path: Path) -> File:
    if is_url(path):
        size, generation = size_and_generation(path)
        return File(path, size, generation, generation)
    stat = path.stat()
    return File(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Stored(NamedTuple):
    """One tensor of a file, not read yet. `read` gives a memory-mapped view where it can; drop it soon.

    `where` names it in messages. `file` holds its very bytes; None where they are computed, or not in a file.
    `run` reads only the elements from first to last (exclusive); None if that is impossible. `part_of` computes the
    part that an index of the first axes picks, if it can be computed alone."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    where: str
    file: File | None = None
    run: Callable[[int, int], np.ndarray] | None = None
    part_of: Callable[[tuple[int, ...]], Stored] | None = None

    def part(self, index: tuple[int, ...], rows: slice = slice(None)) -> Stored:
        """What `index` picks of the first axes, and of it these rows of the next axis: one run of elements."""
        if index and self.part_of is not None:
            return self.part_of(index).part((), rows)
        shape, run = self.shape[len(index) :], self.run
        if shape:
            start, stop, _ = rows.indices(shape[0])
            cut, shape = (*index, slice(start, stop)), (stop - start, *shape[1:])
        else:
            start, cut = 0, index
        if run is None:
            return self._replace(shape=shape, read=lambda: self.read()[cut])
        place = np.ravel_multi_index(index, self.shape[: len(index)]) if index else 0
        first = int(place) * math.prod(self.shape[len(index) :]) + start * math.prod(shape[1:])
        return in_runs(shape, self.dtype, lambda a, b: run(first + a, first + b), where=self.where, file=self.file)


def in_runs(
    shape: tuple[int, ...], dtype: np.dtype, run: Callable[[int, int], np.ndarray], *, where: str, file: File | None
) -> Stored:
    """A tensor whose elements lie in a row."""
    size = math.prod(shape)
    read = (lambda: run(0, size).reshape(shape)) if size else (lambda: np.zeros(shape, dtype))
    return Stored(shape, dtype, read, where, file, run)


class Planned(NamedTuple):
    """One tensor to write: its bytes come in pieces, in order, each a C-contiguous array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- reading ----------------------------------------------------------------------------------------------------------


def open_tensors(path: Path) -> dict[str, Stored]:
    """Tensors of a file or folder, by the names that stand there: safetensors where there are any, else torch pickles.

    Raises:
      MoextendError: as `open_safetensors` and `open_pickles`, or a folder of something else: it says of what.
    """
    names = [path.name] if path.is_file() else sorted(entry.name for entry in path.glob("*"))
    pickled = any(name.endswith((".bin", ".pth", ".pt")) for name in names)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names) or not pickled:
        return open_safetensors(path)
    return open_pickles(path)


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Tensors of a folder (one file, or shards, with or without their index) or of one file; headers alone are read.

    Raises:
      MoextendError: no such file, an index that lists a missing shard or does not fit its shards, a broken header,
        a tensor that ends past the end of its file.
    """
    if not path.exists():
        raise MoextendError(f"{path} does not exist")
    if path.is_file():
        return _read_header(path)
    return _merge(path, _shards(path, ".safetensors", "model.safetensors.index.json"), _read_header)


def open_pickles(path: Path) -> dict[str, Stored]:
    """Tensors of `.bin`, `.pth` or `.pt` files, by torch's own restricted unpickler: no code of the file runs."""
    local(path, what="torch pickles (*.bin, *.pth, *.pt)")
    try:
        torch = importlib.import_module("torch")  # optional, so not known to the type checker everywhere
    except ImportError:
        raise MoextendError(
            f"{path}: torch pickles need the optional dependency torch: {extra_hint('torch')}, or save the "
            "checkpoint as safetensors"
        ) from None

    def load(file: Path) -> dict[str, Any]:
        _check_archive(file)
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zipfile and torch each raise their own
            raise MoextendError(
                f"{file} cannot be read by torch.load(weights_only=True, mmap=True): {said_by(error)}"
            ) from None
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
        ):
            raise MoextendError(f"{file} holds something other than a dict of tensors")
        return loaded

    def array(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()  # a Parameter asks for gradients, which NumPy has not
        if tensor.dtype == torch.bfloat16:  # NumPy's bfloat16 is unknown to torch
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy()

    def stored(name: str, tensor: Any, file: Path, at: File) -> Stored:
        try:
            storage_bytes = tensor.untyped_storage().nbytes()
            dtype = array(tensor.new_empty(0)).dtype
        except (TypeError, RuntimeError) as error:
            raise MoextendError(f"{file}: {short(name)} of type {tensor.dtype} cannot be read: {error}") from None
        if tensor.numel() * tensor.element_size() > storage_bytes:  # strides of 0 give a few bytes any size
            raise MoextendError(
                f"{file}: {short(name)} {list(tensor.shape)} is larger than the {storage_bytes:,} bytes it has"
            )
        # Opened anew for each tensor: the mapping goes away with the last view of it, and its pages with the mapping.
        return Stored(tuple(tensor.shape), dtype, lambda: array(load(file)[name]), str(file), at)

    def read(file: Path) -> dict[str, Stored]:
        plain_file(file)
        at = opened(file)
        return {name: stored(name, tensor, file, at) for name, tensor in load(file).items()}

    if path.is_file():
        return read(path)
    for ending in (".bin", ".pth", ".pt"):
        if _weights(path, ending) or (path / f"pytorch_model{ending}.index.json").exists():
            return _merge(path, _shards(path, ending, f"pytorch_model{ending}.index.json"), read)
    raise MoextendError(f"{path} holds no *.bin, *.pth or *.pt file of weights{_elsewhere(path)}")


def _check_archive(file: Path) -> None:
    """torch stores its parts as they are; one that is compressed could unpack to any size."""
    plain_file(file)
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except Exception as error:  # zipfile, struct and OSError
        raise MoextendError(f"{file} cannot be read as torch's zip file: {said_by(error)}") from None
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise MoextendError(f"{file} cannot be read: it is a compressed zip file, which torch does not write")


def _shards(folder: Path, ending: str, index_name: str) -> dict[Path, set[str] | None]:
    """Files of a folder, with the tensors that the index says they hold (None without an index)."""
    index_path = folder / index_name
    if not index_path.exists():
        # As transformers does: what lies beside it is the same in another format, or of another program.
        alone = folder / index_name.removesuffix(".index.json")
        paths = [inside(path) for path in ([alone] if alone.is_file() else _weights(folder, ending))]
        if not paths:
            raise MoextendError(f"{folder} holds no *{ending} file{_elsewhere(folder)}")
        totals = {int(total) for path in paths if (total := path.stem.rpartition("-of-")[2]).isdecimal()}
        if totals and len(paths) != max(totals):
            raise MoextendError(f"{folder} holds {len(paths)} *{ending} files of {max(totals)}")
        return dict.fromkeys(paths)
    broken = f"{index_path} cannot be read as an index of shards"
    index = parse_json(read_small(inside(index_path)), where=broken, object_pairs_hook=without_repeats)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise MoextendError(f"{broken}: it has no weight_map")
    listed: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(ending) or Path(file).name != file or "\0" in file:
            raise MoextendError(f"{broken}: {shown(file)} is not the name of a *{ending} file")
        listed.setdefault(inside(folder / file), set()).add(name)  # pyright: ignore[reportOptionalMemberAccess]
    if missing := sorted(path.name for path in listed if not path.is_file()):
        raise MoextendError(f"{index_path} lists shards that do not exist: {name_list(missing)}")
    if surplus := sorted(path.name for path in folder.glob(f"model*{ending}") if path not in listed):
        raise MoextendError(f"{folder} holds shards that {index_path.name} does not list: {name_list(surplus)}")
    return listed


def _weights(folder: Path, ending: str) -> list[Path]:
    """Files of weights, without what Mistral put beside Hugging Face's files: the same once more, by other names."""
    paths = sorted(folder.glob(f"*{ending}"), key=lambda path: path.name)
    paths = [path for path in paths if not _NO_WEIGHTS.fullmatch(path.name)]
    return [path for path in paths if not path.name.startswith("consolidated")] or paths


def _elsewhere(folder: Path) -> str:
    """Where the weights of such a folder are, for a message."""
    for pattern, advice in _OF_TRAINERS.items():
        if names := [path.name for path in folder.glob(pattern)]:
            return ": " + advice.format(name_list(names))
    return ""


def _merge(
    folder: Path, shards: Mapping[Path, set[str] | None], read: Callable[[Path], dict[str, Stored]]
) -> dict[str, Stored]:
    merged: dict[str, Stored] = {}
    for path, listed in shards.items():
        tensors = read(path)
        if listed is not None and listed != tensors.keys():
            raise MoextendError(f"{path} does not hold what the index says.{difference(listed, tensors.keys())}")
        if twice := merged.keys() & tensors.keys():
            raise MoextendError(f"{folder}: {name_list(sorted(twice))} stands in more than one file")
        merged |= tensors
    return merged


def _read_header(path: Path) -> dict[str, Stored]:
    if not is_url(path):
        plain_file(path)
    at = opened(path)
    size = at.size
    length = int.from_bytes(_bytes(path, 0, min(8, size)), "little")
    if size < 8 or length > size - 8 or length > MAX_JSON:
        raise MoextendError(
            f"{path} cannot be read: a header of {length:,} bytes in a file of {size:,} is no safetensors header, "
            "or the file was cut short"
        )
    text = _bytes(path, 8, 8 + length)
    broken = f"{path} cannot be read: its safetensors header is broken"
    header = parse_json(text, where=broken, object_pairs_hook=without_repeats, parse_constant=_no_number)
    if not isinstance(header, dict):
        raise MoextendError(f"{broken}: it is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(entry, where=f"{broken}: {short(name)}") for name, entry in header.items()}
    start, data, end_before = 8 + length, size - 8 - length, 0
    stored = {}
    for name, (kind, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        where = f"{path}: {short(name)}"
        if (dtype := DTYPES.get(kind)) is None:
            raise MoextendError(f"{where} has the unknown element type {shown(kind)}")
        if end - begin != math.prod(shape) * dtype.itemsize or begin != end_before:
            raise MoextendError(f"{where} {kind}{shown(list(shape))} does not fit its bytes {begin}..{end}")
        if end > data:
            raise MoextendError(
                f"{path} cannot be read: it is cut short, {short(name)} needs its bytes {begin:,}..{end:,} of {data:,}"
            )
        stored[name] = in_runs(shape, dtype, run_at(path, dtype, start + begin), where=str(path), file=at)
        end_before = end
    if end_before != data:
        raise MoextendError(f"{path} cannot be read: {data - end_before:,} bytes after its last tensor")
    return stored


def _bytes(path: Path, begin: int, end: int) -> bytes:
    if is_url(path):
        return read_range(path, begin, end)
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _entry(entry: Any, *, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """(element type, shape, first byte, byte after the last), each of them a possible one."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, place = (fields.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not (isinstance(kind, str) and isinstance(shape, list) and isinstance(place, list) and len(place) == 2):
        raise MoextendError(f"{where} is not described: {shown(entry)}")
    if not all(type(n) is int and 0 <= n < MAX_BYTES for n in (*shape, *place)) or len(shape) > MAX_AXES:
        raise MoextendError(f"{where} has an impossible shape or place: {shown(entry)}")
    # An axis of 0 makes any other axis fit its bytes, so the others count by themselves.
    if math.prod(n for n in shape if n) >= MAX_BYTES // 8:
        raise MoextendError(f"{where} has an impossible shape: {shown(shape)}")
    return kind, tuple(shape), *place


def run_at(path: Path, dtype: np.dtype, offset: int) -> Callable[[int, int], np.ndarray]:
    """Reads elements of a tensor that begins at this byte. Every call maps its own byte range anew, so that its pages
    leave memory together with the view; of a bucket's object it reads that range."""

    def run(first: int, last: int) -> np.ndarray:
        begin, nbytes = offset + first * dtype.itemsize, (last - first) * dtype.itemsize
        if is_url(path):
            return np.frombuffer(read_range(path, begin, begin + nbytes), dtype)
        if not nbytes:
            return np.zeros(0, dtype)
        try:
            return np.asarray(np.memmap(path, dtype, "r", begin, (last - first,)))
        except (OSError, ValueError) as error:  # it was whole when its header was read
            raise MoextendError(f"{path} has changed since it was opened: {said_by(error)}") from None

    return run


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


# --- writing ----------------------------------------------------------------------------------------------------------


def write_safetensors(
    folder: Path,
    planned: Mapping[str, Planned],
    *,
    max_shard_bytes: int,
    written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes tensors in the given order as `model.safetensors`, or as shards with `model.safetensors.index.json`.

    No more than one piece is in memory at a time; `written` hears the size of each.
    """
    shards: list[dict[str, Planned]] = [{}]
    nbytes = 0  # of the last shard
    for name, tensor in planned.items():
        if shards[-1] and nbytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            nbytes = 0
        shards[-1][name] = tensor
        nbytes += tensor.nbytes
    many = len(shards)
    files = [
        f"model-{n:05d}-of-{many:05d}.safetensors" if many > 1 else "model.safetensors" for n in range(1, many + 1)
    ]
    for name, shard in zip(files, shards, strict=True):
        _write_file(folder / name, shard, written)
    if many > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in planned.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _write_file(path: Path, planned: Mapping[str, Planned], written: Callable[[int], None]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in planned.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in planned.items():
            left = tensor.nbytes
            for piece in tensor.pieces():
                assert piece.dtype == tensor.dtype and piece.flags.c_contiguous, name
                file.write(piece.reshape(-1).view(np.uint8).data)
                left -= piece.nbytes
                written(piece.nbytes)
                del piece  # it may be the last view of a mapped tensor, and the next one is about to be mapped
            assert left == 0, name
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write into; it takes the name `path` at the end, and goes away after an error.

    Raises:
      MoextendError: `path` exists already and is not an empty folder, or is one that nothing can take the place of.
    """
    path = path.resolve()  # beside what a link leads to, which may be another disk
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MoextendError(f"{path} exists already: name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    hidden.mkdir()
    try:
        if path.exists():  # tried now, with nothing in it: a mount point, even of the same disk, refuses
            mode = stat.S_IMODE(path.stat().st_mode)
            hidden.chmod(mode)
            try:
                hidden.rename(path)
            except OSError as error:
                raise MoextendError(f"{path} cannot be replaced ({error.strerror}): name a new folder in it") from None
            hidden.mkdir()
            hidden.chmod(mode)
        yield hidden
        for folder in (hidden, *(entry for entry in hidden.rglob("*") if entry.is_dir())):
            _sync(folder)
        hidden.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- lists in messages ------------------------------------------------------------------------------------------------


def name_list(names: Iterable[str]) -> str:
    """The first eight names in alphabetical order, and how many more there are."""
    listed = sorted(names)
    return ", ".join(map(short, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def difference(wanted: Iterable[str], given: Iterable[str]) -> str:
    """What is missing of `wanted` and what nobody asked for, as sentences."""
    wanted, given = set(wanted), set(given)
    missing = f" Missing: {name_list(wanted - given)}." if wanted - given else ""
    surplus = f" Not asked for: {name_list(given - wanted)}." if given - wanted else ""
    return missing + surplus
