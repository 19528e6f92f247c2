"""Files from elsewhere: whatever stands in them, every reader refuses in one line or reads what is there.

Two kinds of cases: changes drawn from seeds (fuzzing.py; benchmarks/fuzz.py runs many more of them), and a table of
those that somebody who knows the format would try. All under a limit of time and of memory.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import io
import json
import os
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folders
import fuzzing
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_llama as llama
from sentencepiece import sentencepiece_model_pb2

from moextend_jax.checkpoints.gguf import open_gguf
from moextend_jax.checkpoints.gguf_header import read_header
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.npz import FREE, read_npz
from moextend_jax.checkpoints.source import open_source
from moextend_jax.checkpoints.tensors import open_pickles, open_safetensors
from moextend_jax.checkpoints.upcycle import open_upcycled
from moextend_jax.config import MoextendError
from moextend_jax.data.entries import read_entries
from moextend_jax.runs.models_of import read_selection

CASES = 100
SECONDS, BYTES = 20, 256 << 20
"""What one case may take. The files are smaller than 200 KB."""


class TooLong(BaseException):
    """No Exception: a reader must not take it for a broken file."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A case that takes longer, or asks for more address space, fails."""

    def stop(*_: Any) -> None:
        raise TooLong

    page = os.sysconf("SC_PAGE_SIZE")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * page
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def refused(read: Callable[[], Any], *said: str) -> None:
    with limits(), pytest.raises(MoextendError) as error:
        read()
    message = str(error.value)
    assert len(message) < fuzzing.LONGEST and message.isprintable() and "allocate" not in message
    for part in said:
        assert part in message


# --- drawn cases ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[collections.Counter[str]]:
    """Counts of all cases, printed at the end whatever pytest captures."""
    counts: collections.Counter[str] = collections.Counter()
    started = time.perf_counter()
    yield counts
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print(
            f"\nfuzzing: {counts.total()} cases by {len(fuzzing.READERS)} readers, {counts['refused']} refused, "
            f"{counts['read']} read, {time.perf_counter() - started:.1f} s"
        )


@pytest.mark.parametrize("name", fuzzing.READERS)
def test_any_bytes_are_refused_or_read(
    name: str, tmp_path: Path, tally: collections.Counter[str], record_property: Callable[[str, object], None]
):
    opened = fuzzing.open_reader(name, tmp_path / "fuzzed")
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(CASES if name != "tokenizer_config.json" else CASES // 5):  # each loads a tokenizer whole
        try:
            with limits():
                counts[fuzzing.run_case(opened, name, seed)] += 1
        except BaseException as error:
            error.add_note(f"reader {name}, seed {seed}; limits are {SECONDS} s and {BYTES:,} bytes")
            raise
    record_property("cases", counts.total())
    tally.update(counts)
    # Most changes are mistakes, and not all: both ends of the reader were reached.
    assert counts["refused"] > counts.total() // 10 and counts["read"], counts


# --- safetensors ------------------------------------------------------------------------------------------------------


def tensors(folder: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / "model.safetensors"


def one(shape: Any = (4,), place: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (one(place=[-16, 0]), "impossible"),
        (one(place=[0, 2**64]), "impossible"),
        (one(place=[0, 17]), "does not fit"),
        (one(shape=[2**32, 2**32], place=[0, 0]), "impossible"),  # 0 modulo 2**64
        (one(shape=[2**62 + 1, 4]), "impossible"),
        (one(shape=[0, 2**61, 2**61], place=[0, 0]), "impossible"),
        (one(shape=[10**4000] * 20), "impossible"),
        (one(shape=[1] * 65), "impossible"),
        (one(shape={}), "not described"),
        (one(shape=[True, 4]), "impossible"),
        (one(dtype="F4"), "unknown element type"),
        (one(dtype=["F32"]), "not described"),
        (one(dtype="\x1b[2J" * 1000), "unknown element type"),
        ({"x\x1b[2J\n" * 5000: 3}, "not described"),
        ({**one(), "b": one()["a"]}, "does not fit"),  # both in the same bytes
        (b'{"a": ' + b"[" * 200_000, "nested too deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "digits"),
        (b"\xff\xfe{\0}\0", "utf-8"),
        (b"{}", "16 bytes after its last tensor"),
        (b"[]", "no JSON object"),
    ],
)
def test_a_safetensors_header_is_not_believed(tmp_path: Path, header: Any, said: str):
    refused(lambda: open_safetensors(tensors(tmp_path, header)), "model.safetensors", said)


def test_a_header_longer_than_its_file_is_not_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    for length in (17, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(14))
        refused(lambda: open_safetensors(path), f"{length:,} bytes in a file of 24")


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path):
    stored = open_safetensors(tensors(tmp_path, one()))["a"]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(20)
    refused(stored.read, "has changed since it was opened")


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "..", "", ".", "a\0.safetensors", 3, None, "sub/model.safetensors",
     "config.json", "x" * 5000 + "/.safetensors"],
)  # fmt: skip
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, file: Any):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors(tmp_path, one()).rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refused(lambda: open_safetensors(folder), "index.json")


def test_links_out_of_the_folder_are_refused_and_a_hub_caches_own_are_not(tmp_path: Path):
    secret = tensors(tmp_path, one()).rename(tmp_path / "secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    refused(lambda: open_safetensors(folder), "model.safetensors is a link out of its folder")
    for name in ("config.json", "tokenizer.json"):
        (link := folders.mixtral(tmp_path / name) / name).unlink(missing_ok=True)
        link.symlink_to(secret)
        refused(lambda link=link: open_source(link.parent), f"{name} is a link out of its folder")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    secret.rename(blobs / "0f")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0f"))
    assert open_safetensors(snapshot)["a"].read().shape == (4,)


def test_a_pipe_does_not_hang_and_a_device_does_not_fill_the_memory(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(lambda: open_safetensors(tmp_path), "no plain file")
    refused(lambda: read_npz(tmp_path / "model.safetensors"), "no plain file")
    refused(lambda: open_gguf(Path("/dev/zero")), "no plain file")
    (tmp_path / "config.json").symlink_to("/dev/zero")
    refused(lambda: read_json(tmp_path / "config.json"), "config.json")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def header(
    keys: bytes = b"", count: int = 1, *, tensors: bytes = b"", tensor_count: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + keys + tensors


def tensor(*shape: int, kind: int = 0, offset: int = 0, name: str = "t", axes: int | None = None) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return (
        text(name) + struct.pack("<I", len(shape) if axes is None else axes) + sizes + struct.pack("<IQ", kind, offset)
    )


def placed(*described: bytes, keys: bytes = b"", count: int = 0) -> bytes:
    made = header(keys, count, tensors=b"".join(described), tensor_count=len(described))
    return made + bytes(-len(made) % 32) + bytes(128)


ALIGNMENT = text("general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(count=2**63), "cut short"),
        (header(tensor_count=2**64 - 1, count=0), "cut short"),
        (header(struct.pack("<Q", 2**64 - 1)), "cut short"),  # the key's length
        (header(text("a") + struct.pack("<IQ", 8, 2**62)), "cut short"),  # a string's
        (header(text("a") + struct.pack("<IIQ", 9, 0, 2**63)), "cut short"),  # an array's
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**40)), "cut short"),
        (header(text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), "type 9"),  # arrays of arrays
        (header(text("a") + struct.pack("<II", 99, 0)), "type 99"),
        (header(2 * (text("a") + struct.pack("<II", 4, 0)), 2), "stands twice"),
        (header(text(b"\xff") + struct.pack("<II", 4, 0)), "utf-8"),
        (header(version=9), "version 9"),
        (header(version=3 << 24), "byte order"),
        *((placed(keys=ALIGNMENT + struct.pack("<I", n), count=1), "no power of two") for n in (0, 3, 2**31)),
        (placed(keys=text("general.alignment") + struct.pack("<I", 8) + text("32"), count=1), "no power of two"),
        (placed(tensor(2**33, 2**33)), "cut short"),  # elements run over 64 bits
        (placed(tensor(2**62, 4)), "cut short"),
        (placed(tensor(4, offset=2**64 - 32)), "next free place"),
        (placed(tensor(4), tensor(4, name="u")), "next free place"),  # both in the same bytes
        (placed(tensor(4), tensor(4)), "stands twice"),
        (placed(tensor(4, kind=999)), "unknown type 999"),
        (placed(tensor(33, kind=8)), "Q8_0 cannot have shape [33]"),  # no whole blocks of 32
        (placed(tensor(0, 4)), "cannot have shape"),
        (placed(tensor()), "cannot have shape"),
        (placed(tensor(axes=2**32 - 1)), "axes"),
    ],
)
def test_a_gguf_header_is_not_believed(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(lambda: open_gguf(tmp_path / "m.gguf"), "m.gguf cannot be read as GGUF", said)


def test_a_long_array_takes_no_more_memory_than_its_file(tmp_path: Path):
    """The gguf package makes two Python objects of each of these bytes."""
    many = 4_000_000
    key = text("a") + struct.pack("<IIQ", 9, 0, many) + bytes(many)
    (tmp_path / "m.gguf").write_bytes(header(key))
    with limits():
        assert len(read_header(tmp_path / "m.gguf")[0]["a"]) == many
    with (tmp_path / "m.gguf").open("wb") as file:  # and what Python's objects make too much of is not read
        file.write(header(text("a") + struct.pack("<IIQ", 9, 8, 1 << 30)))
        file.truncate(1 << 34)
    refused(lambda: read_header(tmp_path / "m.gguf"), "takes more than")


@pytest.mark.parametrize("layers", [4_000_000_000, 2_000_000_000])
def test_a_gguf_of_more_layers_than_tensors_is_refused_before_they_are_named(tmp_path: Path, layers: int):
    path = llama.write_gguf(tmp_path / "m.gguf", keys={"block_count": layers})
    refused(lambda: open_gguf(path), "llama.block_count")


# --- npz --------------------------------------------------------------------------------------------------------------


def npz(path: Path, content: bytes, *, method: int = zipfile.ZIP_DEFLATED, name: str = "a.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content, method)
    return path


def array(descr: str, shape: str, data: bytes = b"", *, extra: str = "") -> bytes:
    said = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {extra}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(said)) + said + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (array("'<f4'", "(1000000000000,)"), "does not fit its 0 bytes"),
        (array("'<f4'", "(4294967296, 4294967296)"), "does not fit"),
        (array("'<f4'", "(-1,)", bytes(8)), "does not fit"),
        (array("'<f4'", "(-1, -2)", bytes(8)), "does not fit"),
        (array("'<U0'", "(1000000000000,)"), "does not fit"),
        (array("'<f4'", "(2,)", bytes(12)), "does not fit its 12 bytes"),
        (array("'<f4'", "(True,)", bytes(4)), "an integer is required"),
        (array("'|O'", "(1,)", b"cos\nsystem\n(S'true'\ntR."), "neither numbers nor text"),
        (array("[('a', '|O')]", "(1,)", b"x" * 8), "neither numbers nor text"),
        (array("'|V0'", "(5,)"), "neither numbers nor text"),
        (array("'<U1'", "(1,)", b"\0\xd8\0\0"), "no text"),
        (array("'<U1'", "(1,)", b"\xff" * 4), "no text"),
        (array("'<f4'", "(" * 3000), ""),
        (array("__import__('os').getcwd()", "()"), ""),
        (b"\x93NUMPY\1\0\xff\xff" + b" " * 65535, ""),
        (b"\x93NUMPY\x09\0" + bytes(100), ""),
        (b"", ""),
    ],
)
def test_an_array_in_an_npz_file_is_not_believed(tmp_path: Path, content: bytes, said: str):
    path = npz(tmp_path / "a.npz", content)
    refused(lambda: read_npz(path), "a.npz is not a readable npz file of plain arrays", said)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path):
    zeros = (FREE + (48 << 20)) // 4
    path = npz(tmp_path / "a.npz", array("'<f4'", f"({zeros},)", bytes(4 * zeros)))
    assert path.stat().st_size < 200_000
    refused(lambda: read_npz(path), "would unpack to")
    # The directory says that it is small: then no more than that is unpacked, and the checksum is wrong.
    content = path.read_bytes()
    small = content.replace(struct.pack("<I", 4 * zeros + 128), struct.pack("<I", 1000))
    assert small != content
    path.write_bytes(small)
    refused(lambda: read_npz(path), "a.npz")


def test_other_archives_are_refused(tmp_path: Path):
    good = array("'<f4'", "(1,)", bytes(4))
    refused(lambda: read_npz(npz(tmp_path / "a.npz", good, name="a.txt")), "a.txt is no array")
    refused(lambda: read_npz(npz(tmp_path / "a.npz", good, method=zipfile.ZIP_LZMA)), "is no array")
    (tmp_path / "a.npz").write_bytes(good)
    refused(lambda: read_npz(tmp_path / "a.npz"), "does not begin as a zip file does")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.npy", good)
        archive.writestr("a.npy", good)
    (tmp_path / "a.npz").write_bytes(made.getvalue())
    refused(lambda: read_npz(tmp_path / "a.npz"), "the same name")


# --- configurations and records ---------------------------------------------------------------------------------------

IMPOSSIBLE = [10**12, 2**31, 10**400, 0, -1, 1.5, True, None, "3", [3], {}, float("nan"), float("inf")]
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rope_theta", "rms_norm_eps"]  # fmt: skip


def write_attributes(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", SIZES)
def test_every_size_of_a_config_is_checked(tmp_path: Path, name: str):
    folder = folders.mixtral(tmp_path / "m")
    said = json.loads((folder / "config.json").read_text())
    for value in IMPOSSIBLE:
        if name in ("rope_theta", "rms_norm_eps") and value in (10**12, 2**31, 1.5) and value is not True:
            continue  # rotary bases may be large, and no tensor shows that they are wrong
        write_attributes(folder, {name: value})
        refused(lambda: open_source(folder), "config.json", name)
        write_attributes(folder, said)


def test_more_layers_or_experts_than_tensors_are_refused_before_they_are_named(tmp_path: Path):
    folder = folders.mixtral(tmp_path / "m")
    for changes in ({"num_hidden_layers": 2**31 - 1}, {"num_local_experts": 2**31 - 1}, {"num_hidden_layers": 100_000}):
        said = json.loads((folder / "config.json").read_text())
        refused(lambda changes=changes: open_source(write_attributes(folder, changes)), "its sizes ask for")
        write_attributes(folder, said)
    upcycled = llama.write_folder(tmp_path / "llama", num_hidden_layers=2**31 - 1)
    refused(lambda: open_upcycled(upcycled, experts=2, tokenizer_folder=tmp_path), "its sizes ask for")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["model"]["decoder"].update(layers=10**9),
        lambda record: record["model"]["decoder"].update(layers="3"),
        lambda record: record["model"]["decoder"].update(top_k=10**400),
        lambda record: record["model"]["decoder"].update(rope_theta=float("nan")),
        lambda record: record["model"]["decoder"].update(surprise=1),
        lambda record: record["model"]["media"]["image"]["tower"].update(layers=10**9),
        lambda record: record["model"]["media"]["image"]["tower"].update(feature_layer=3),
        lambda record: record["model"]["media"]["image"]["tower"].update(feature_layer=-9),
        lambda record: record["model"]["media"]["image"]["tower"].update(heads=5),
        lambda record: record["model"]["media"]["image"]["tags"].update(start="x"),
        lambda record: record["model"]["media"]["image"]["projector"].update(kind="resampler", heads=5),
        lambda record: record["model"]["media"]["image"]["projector"].update(kind="stack", neighbours=10**9),
        lambda record: record["model"]["media"]["image"]["projector"].update(neighbours=2),
        lambda record: record["model"]["media"]["image"]["projector"].update(kind="x" * 10**6),
        lambda record: record["model"]["media"]["image"].update(tower_kind="Tower"),
        lambda record: record["model"]["media"]["image"].update(tower_kind="WhisperConfig"),
        lambda record: record["model"]["media"]["image"].update(kind="audio"),
        lambda record: record["model"]["media"]["image"].update(kind="smell"),
        lambda record: record["model"]["media"]["image"].update(mark=""),
        lambda record: record["model"]["media"]["image"].update(frames=2),
        lambda record: record["model"]["media"]["image"].update(spans=[4, 2]),
        lambda record: record["model"]["media"]["image"].update(seconds=float("inf")),
        lambda record: record["model"]["media"].update({"../x": record["model"]["media"]["image"]}),
        lambda record: record["model"]["media"].update(
            photo=record["model"]["media"]["image"] | {"mark": "<image:photo>"}
        ),
        lambda record: record["model"]["media"].clear(),
        lambda record: record["model"].update(media=[]),
        lambda record: record["model"].update(composition="sum"),
        lambda record: record["model"]["extensions"]["image"].update(new_experts=10**9),
        lambda record: record["model"]["extensions"]["image"].update(calibrator_width=10**400),
        lambda record: record["model"]["extensions"]["image"].update(layers=[2, 0]),
        lambda record: record["model"]["extensions"]["image"].update(layers=[0, 3]),
        lambda record: record["model"]["extensions"]["image"].update(sources=[]),
        lambda record: record["model"]["extensions"]["image"].update(sources=[0, 4]),
        lambda record: record["model"]["extensions"]["image"].update(share=1.5),
        lambda record: record["model"]["extensions"]["image"].update(share=float("nan")),
        lambda record: record["model"]["extensions"]["image"].update(medium="a/b"),
        lambda record: record["model"]["extensions"].update(sound=record["model"]["extensions"].pop("image")),
        lambda record: record["leaves"].clear(),
        lambda record: next(iter(record["leaves"].values())).update(sha256="../x"),
        lambda record: next(iter(record["leaves"].values())).update(shape=[10**400]),
        lambda record: record.update(attributes=[]),
        lambda record: record.update(projector=["clip", ""]),
        lambda record: record.update(layout=3),
        lambda record: record.update(model=None),
    ],
)
def test_an_imports_record_is_checked(tmp_path: Path, change: Callable[[Any], Any]):
    opened = fuzzing.open_reader("import", tmp_path / "f")
    record = json.loads(opened.whole)
    change(record)
    (tmp_path / "f" / opened.reader.file).write_text(json.dumps(record))
    refused(lambda: opened.reader.read(tmp_path / "f"), "model")


def test_a_delta_does_not_change_the_sizes_of_its_base(tmp_path: Path):
    opened = fuzzing.open_reader("delta", tmp_path / "f")
    for name, value in {"top_k": 1, "rope_theta": 7.0, "layers": 10**9}.items():
        record = json.loads(opened.whole)
        record["model"]["decoder"][name] = value
        (tmp_path / "f" / opened.reader.file).write_text(json.dumps(record))
        refused(lambda: opened.reader.read(tmp_path / "f"), "and its base", f"{name} is {value} and")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chosen_layers", [0, 10**12]), ("chosen_layers", [2, 0]), ("chosen_layers", [0, 0]), ("chosen_layers", "02"),
        ("chosen_layers", []), ("chosen_layers", [0, True]), ("sources", [1]), ("sources", [1, 4]), ("sources", None),
        ("sources", [1, -1]), ("base", None),
    ],
)  # fmt: skip
def test_a_selection_is_held_against_the_base(tmp_path: Path, name: str, value: Any):
    opened = fuzzing.open_reader("routing.json", tmp_path / "f")
    path = tmp_path / "f" / "routing.json"
    path.write_text(json.dumps(json.loads(opened.whole) | {name: value}))
    refused(lambda: read_selection(path, decoder=tiny.DECODER), "routing.json", name)


def test_a_file_of_ours_that_is_none_is_not_taken_for_a_models(tmp_path: Path):
    path = tmp_path / "routing.json"
    for said in ("does not exist", "holds no JSON object"):
        with pytest.raises(MoextendError, match=f"routing.json {said}$"):
            read_selection(path, decoder=tiny.DECODER)
        path.write_text("[]")


NINES = "9" * 5000


@pytest.mark.parametrize(
    ("reader", "old", "new", "came"),
    [
        ("mmbench: mmbench_dev_20230712.tsv", "\n1\t", f"\n{NINES}\t", "refused"),
        ("scienceqa: problems.json", "grade3", f"grade{NINES}", "read"),
        ("header: PEFT", "layers.0.block_sparse_moe.gate.", f"layers.{NINES}.mlp.gate.", "refused"),
        ("adapter_config.json", '"lora_alpha": 256.0', f'"lora_alpha": 1{NINES[:400]}', "refused"),
    ],
)
def test_numbers_of_more_digits_than_python_takes(tmp_path: Path, reader: str, old: str, new: str, came: str):
    opened = fuzzing.open_reader(reader, tmp_path / "f")
    made = opened.whole.replace(old.encode(), new.encode())
    assert made != opened.whole
    if reader.startswith("header"):
        length = int.from_bytes(made[:8], "little") + len(made) - len(opened.whole)
        made = length.to_bytes(8, "little") + made[8:]
    with limits():
        assert fuzzing.judge(opened, made) == came


# --- conversations ----------------------------------------------------------------------------------------------------


def test_values_as_deep_as_the_parser_follows_are_faults_of_their_entry(tmp_path: Path):
    """Some levels below its limit everything else that goes through a value ends at it first; from Python 3.12 on, the
    parser is the first to end."""
    path, turns = tmp_path / "a.json", '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]'
    faults = set()
    for levels in (*range(700, 1000), *range(9900, 10000, 3)):
        deep = "[" * levels + "]" * levels
        path.write_text(f'[{{"image": {deep}, "images": {deep}, "conversations": {turns}}}]')
        try:
            (entry,) = read_entries(path)
            faults.add(str(entry.fault).rpartition(": ")[2])
        except MoextendError as error:
            assert "recursion" in str(error)
    assert sys.version_info >= (3, 12) or "it is nested too deep" in faults
    assert any(fault.startswith("image must be a path") for fault in faults)


@pytest.mark.parametrize(("rows", "size"), [(1, 20 << 20), (20, 5 << 20)])
def test_a_parquet_file_that_unpacks_to_much_more_than_it_is_is_refused(tmp_path: Path, rows: int, size: int):
    """The second has one value, in its dictionary, of which each of 16 rows at once would have a copy."""
    table = pa.table({"question": ["q"] * rows, "answer": pa.array(["a" * size]).take([0] * rows)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    del table
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    refused(lambda: [*read_entries(tmp_path / "a.parquet")], "a.parquet", "bytes would unpack to")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


def written(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(size: int, rest: bytes) -> dict[str, Any]:
    table = base64.b64encode(struct.pack("<I", size) + rest).decode()
    return {"type": "Precompiled", "precompiled_charsmap": table}


def template(special: str, sequence: str, **ids: list[int]) -> dict[str, Any]:
    single = [{"SpecialToken": {"id": special, "type_id": 0}}, {"Sequence": {"id": sequence, "type_id": 0}}]
    tokens = {name: {"id": name, "ids": numbers, "tokens": [name]} for name, numbers in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "?"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # Rust's panics, when the file is read and when a text is
        ({"model": {"continuing_subword_prefix": "#" * 50}}, "out of range"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "precompiled_charsmap"),
        ({"normalizer": charsmap(4, b"\xff\xff\xff\x9fabc\0")}, "out of bounds"),
        ({"normalizer": written("aa", String="")}, "out of bounds"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
        ({"post_processor": template("x", "A")}, "no entry"),
        ({"post_processor": template("x", "B", x=[1])}, "out of bounds"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}}, "out of bounds"),
        # its errors, of a text alone
        ({"model": WORDS}, "Missing [UNK] token"),
        # what would fill the memory, or end the process
        ({"normalizer": charsmap(2**32 - 1, b"")}, "cut short"),
        ({"normalizer": charsmap(0, b"x" * 5000)}, "1000 times longer"),
        ({"normalizer": sequence("normalizers", *[written("x" * 10, Regex=".")] * 9)}, "1000 times longer"),
        ({"normalizer": sequence("normalizers", *[written("x", Regex="")] * 40)}, "1000 times longer"),
        ({"normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "x" * 10**6})}, "1000 times longer"),
        ({"pre_tokenizer": sequence("pretokenizers", *[{"type": "ByteLevel"}] * 40)}, "1000 times longer"),
        ({"decoder": sequence("decoders", *[written("x" * 1000, String="a")] * 3)}, "1000 times longer"),
        # what an export writes again as it is
        ({"added_tokens": [{"id": 0, "content": "<|end|>", "special": 0}]}, "expected a boolean"),
        # other ids of the same text each time
        ({"model": {"dropout": 0.5}}, "dropout"),
    ],
)
def test_a_tokenizer_json_neither_ends_the_process_nor_fills_the_memory(
    tmp_path: Path, changes: dict[str, Any], said: str
):
    opened = fuzzing.open_reader("tokenizer.json", tmp_path / "f")
    described = json.loads(opened.whole)
    model = changes.get("model", {})
    described |= changes | {"model": model if "vocab" in model else described["model"] | model}
    (tmp_path / "f" / "tokenizer.json").write_text(json.dumps(described))
    refused(lambda: opened.reader.read(tmp_path / "f"), str(tmp_path / "f"), said)


def test_a_tokenizer_model_knows_what_is_unknown(tmp_path: Path):
    opened = fuzzing.open_reader("tokenizer.model", tmp_path / "f")
    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(opened.whole)
    next(piece for piece in model.pieces if piece.type == piece.UNKNOWN).type = model.pieces[0].NORMAL
    (tmp_path / "f" / "tokenizer.model").write_bytes(model.SerializeToString())
    refused(lambda: opened.reader.read(tmp_path / "f"), str(tmp_path / "f"), "no piece for what is unknown")


# --- torch pickles ----------------------------------------------------------------------------------------------------


def test_a_pickle_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.bin"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    refused(lambda: open_pickles(path), "model.bin", "larger than")
    torch.save({"a": torch.zeros(4)}, path)
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member) + bytes(10**6))
    path.write_bytes(made.getvalue())
    refused(lambda: open_pickles(path), "model.bin", "compressed")
    torch.save({3: torch.zeros(4)}, path)
    refused(lambda: open_pickles(path), "something other than a dict of tensors")
    path.write_bytes(b"\x80\x04N.")
    refused(lambda: open_pickles(path), "model.bin")


def test_changed_pickles_are_refused_or_read(tmp_path: Path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2).bfloat16()}, path)
    whole, counts = path.read_bytes(), collections.Counter()
    for seed in range(CASES):
        path.write_bytes(fuzzing.change_bytes(whole, np.random.default_rng(seed)))
        try:
            with limits():
                for stored in open_pickles(path).values():
                    assert stored.read().shape == stored.shape
            counts["read"] += 1
        except MoextendError as error:
            assert len(str(error)) < fuzzing.LONGEST
            counts["refused"] += 1
    assert counts["refused"] > CASES // 10 and counts["read"], counts
