"""Readers of files from elsewhere, and what fuzzing does to a valid file: (reader, seed) in, changed bytes and what
came of reading them out.

Every case follows from its seed alone. A reader must refuse (`MoextendError`) or read; where the format has a library
of its own, what is read must be what that library reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import benchmark_files
import folders
import gguf
import media_files
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import safetensors.numpy
import tiny
import tiny_llama as llama
import tiny_tokens
from array_record.python.array_record_module import ArrayRecordWriter

from moextend_jax.checkpoints import convert, names
from moextend_jax.checkpoints.gguf import open_gguf
from moextend_jax.checkpoints.gguf_tokenizer import write_tokenizer
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.checkpoints.peft import open_peft
from moextend_jax.checkpoints.source import Source, open_source
from moextend_jax.checkpoints.tensors import Stored, open_tensors
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.checkpoints.upcycle import open_upcycled
from moextend_jax.checkpoints.whisper import read_whisper
from moextend_jax.compare import reference
from moextend_jax.config import RECIPES, AdapterConfig, ModelConfig, MoextendError, Named
from moextend_jax.data.conversations import encode_conversation
from moextend_jax.data.entries import read_entries
from moextend_jax.data.item_files import read_span
from moextend_jax.data.records import read_row
from moextend_jax.data.shards import Span
from moextend_jax.data.tokenizer import load_tokenizer, tokenizer_of
from moextend_jax.faults import Fault
from moextend_jax.media import KINDS
from moextend_jax.models.whisper import sizes_of
from moextend_jax.routing import stats as routing_stats
from moextend_jax.runs.models_of import read_selection

Rng = np.random.Generator
LONGEST = 2000
"""Letters of a message: a file does not decide how long a line is printed."""


class Reader(NamedTuple):
    """make: writes valid files into an empty folder. file: the one that is changed. read: what is under test; it raises
    AssertionError where something was read that is not there. change: how bytes are changed."""

    make: Callable[[Path], Any]
    file: str
    read: Callable[[Path], Any]
    change: Callable[[bytes, Rng], bytes]


# --- changes ----------------------------------------------------------------------------------------------------------

EDGES = (0, 1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
         2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8)  # fmt: skip
"""Whole numbers at which sizes run over, turn negative or stop fitting."""


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400, -(10**400), 0.5, -0.0,
    1e-300, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "0", "1e400", "../../../etc/passwd", "/dev/zero",
    "a\0b", "\ud800", "\x1b[2J\n\n", "x" * 100_000, [], {}, [0], [1, 2], [[]], [None], {"a": 1}, {"": {}}, deep(400),
    list(range(3000)), "F32", "BF16", "F4", "default", "delta", "mixtral", "clip", "llama", "gelu",
)  # fmt: skip
"""What any value of a JSON file may be replaced by."""


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def flip(data: bytes, rng: Rng) -> bytes:
    """Some bits, some bytes, or a whole number at an edge; mostly in the first part, where the sizes are."""
    made = bytearray(data)
    first = min(len(made), pick(rng, (64, 512, 4096, len(made))))
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(first))
        match rng.integers(3):
            case 0:
                made[at] ^= 1 << int(rng.integers(8))
            case 1:
                made[at] = int(rng.integers(256))
            case _:
                width = pick(rng, (1, 2, 4, 8))
                number = pick(rng, EDGES) % 256**width
                made[at : at + width] = number.to_bytes(width, "little")[: max(0, len(made) - at)]
    return bytes(made)


def cut(data: bytes, rng: Rng) -> bytes:
    """Shorter, longer, or with a piece taken out, doubled or moved."""
    a, b = sorted(int(n) for n in rng.integers(0, len(data) + 1, 2))
    to = int(rng.integers(0, len(data) + 1))
    short = data[a : min(b, a + pick(rng, (1, 8, 64, 4096)))]
    return (
        data[:a],
        data + data[a:b],
        data[:a] + data[a + len(short) :],
        data[:to] + short + data[to:],
        data[b:] + data[:a],
        data[:a] + bytes(b - a) + data[b:],
    )[int(rng.integers(6))]


def change_bytes(data: bytes, rng: Rng) -> bytes:
    return flip(data, rng) if rng.random() < 0.7 else cut(data, rng)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(way for key, item in inside for way in places(item, (*at, key)))]


def change_value(value: Any, rng: Rng) -> Any:
    """A JSON value with one of the values in it replaced, taken away, renamed, doubled or moved by a little."""
    value = json.loads(json.dumps(value))
    ways = places(value)
    way = pick(rng, ways if rng.random() < 0.7 else ways[:40])
    if not way:
        return pick(rng, VALUES) if rng.random() < 0.2 else value
    *up, last = way
    holder = value
    for key in up:
        holder = holder[key]
    old, new = holder[last], pick(rng, VALUES)
    match rng.integers(6):
        case 0 if isinstance(holder, dict):
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[str(last) + "x"] = holder.pop(last)
        case 2 if isinstance(old, int | float):
            holder[last] = old + pick(rng, (-1, 1, 8, 2**32))
        case 3 if isinstance(holder, dict):
            holder[str(new)[:50]] = old
        case _:
            holder[last] = new
    return value


def change_json(data: bytes, rng: Rng) -> bytes:
    if rng.random() < 0.25:
        return change_bytes(data, rng)
    value = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        value = change_value(value, rng) if isinstance(value, dict | list) else value
    text = json.dumps(value, ensure_ascii=bool(rng.integers(2))).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:  # deeper than a parser that calls itself can follow
        text = text.replace(b":", b":" + b"[" * 100_000, 1)
    if rng.random() < 0.05 and b'"' in text:  # a name twice
        text = text.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    return text


def change_safetensors(data: bytes, rng: Rng) -> bytes:
    """Bytes as they come, or the header changed as JSON and its length put right."""
    if rng.random() < 0.4:
        return change_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def change_npz(data: bytes, rng: Rng) -> bytes:
    """Bytes as they come, or one array's header changed and the zip file made anew around it."""
    if rng.random() < 0.4:
        return flip_zip(data, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        members = old.infolist()
        chosen = int(rng.integers(len(members)))
        for index, member in enumerate(members):
            content, name = old.read(member), member.filename
            if index == chosen:
                content, name = change_array(content, name, rng)
            method = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of two members by one name
                new.writestr(name, content, method)
    return made.getvalue()


def flip_zip(data: bytes, rng: Rng) -> bytes:
    """The directory of a zip file is at its end."""
    return change_bytes(data, rng) if rng.random() < 0.5 else change_bytes(data[::-1], rng)[::-1]


def change_array(content: bytes, name: str, rng: Rng) -> tuple[bytes, str]:
    if rng.random() < 0.2:
        return change_bytes(content, rng), name
    if rng.random() < 0.1:
        return content, pick(rng, ("x", "x.npy", "../x.npy", "logits/a.npy", "batches.npz", ".npy"))
    array = np.load(io.BytesIO(content))
    edge = pick(rng, EDGES)
    shapes: list[Any] = [
        (edge,), (edge, edge), (0, edge), (*array.shape, 1), array.shape[1:], (-1,), (edge, -1), (), ("x",), (1.5,),
        (10**400,), deep(3),
    ]  # fmt: skip
    kinds: list[Any] = [
        "|O", "|V0", "<U0", "<U1", "<f8", "<i8", "<i4", "<f4", ">f4", "|b1", "<c16", "|S4", "<M8[s]", "<f2", "x",
        [("a", "<f4")], "<f4, <f4", "<U99999999", "V" + "9" * 30,
    ]  # fmt: skip
    header: dict[Any, Any] = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    match rng.integers(6):
        case 0 | 1:
            header["shape"] = pick(rng, shapes)
        case 2 | 3:
            header["descr"] = pick(rng, kinds)
        case 4:
            header["fortran_order"] = pick(rng, VALUES)
        case _:
            header.pop(pick(rng, list(header)))
    text = repr(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = b"(" * 5000 + text
    text = text.ljust(118) + b"\n"
    version = b"\1\0" if rng.random() < 0.8 else pick(rng, (b"\2\0", b"\3\0", b"\4\0", b"\0\0"))
    size = struct.pack("<H", len(text) % 65536) if version == b"\1\0" else struct.pack("<I", len(text))
    return b"\x93NUMPY" + version + size + text + content[128:], name


def change_gguf(data: bytes, rng: Rng) -> bytes:
    """Bytes as they come, or a whole number put where a length, a type or an offset stands."""
    if rng.random() < 0.4:
        return change_bytes(data, rng)
    made = bytearray(data)
    for _ in range(int(rng.integers(1, 3))):
        offset, width = pick(rng, GGUF_NUMBERS)
        old = int.from_bytes(made[offset : offset + width], "little")
        edges = (*EDGES, old + 1, old - 1, old * 2, old + 32, old ^ 1, int(rng.integers(40)))
        number = pick(rng, edges) % 256**width
        made[offset : offset + width] = number.to_bytes(width, "little")
    return bytes(made)


# --- valid files ------------------------------------------------------------------------------------------------------


def _safetensors(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.normal(size=(3, 4)).astype(np.float32), "b": np.arange(6, dtype=np.int64)}
    arrays |= {"c": np.array([1, 2], np.float16), "d": np.zeros((0, 3), np.float32), "e": np.array(True)}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def _gguf(folder: Path) -> None:
    kinds = {"token_embd.weight": "F32", "blk.0.attn_q.weight": "F16", "blk.0.attn_k.weight": "Q4_0",
             "blk.0.attn_v.weight": "Q8_0", "output.weight": "BF16"}  # fmt: skip
    config = llama.DENSE.__class__(
        vocab_size=16, width=32, hidden=32, layers=1, heads=4, kv_heads=2, head_size=8, experts=1, top_k=1
    )
    made = llama.write_gguf(folder / "plain.gguf", config=config, kinds=lambda name: kinds.get(name, "F32"))
    _with_tokenizer(made, folder / "model.gguf")
    made.unlink()


def _with_tokenizer(path: Path, to: Path) -> None:
    """The same file with a tokenizer and one key of every type."""
    old = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, "llama")
    for name, field in old.fields.items():
        if name.startswith("llama."):
            value: Any = field.contents()
            add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|end|>", "<|user|>", *"abcdefghijkl", "ab", "Ġ"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("more.floats", [0.5, 1.5])
    writer.add_int8("more.small", -1)
    writer.add_float64("more.double", 0.25)
    for tensor in old.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _numbers_of_gguf(path: Path) -> list[tuple[int, int]]:
    """(offset, width) of every length, count, type, dimension and offset, by the library's own reader."""
    found = [(4, 4), (8, 8), (16, 8)]
    read = gguf.GGUFReader(path)
    for field in [*list(read.fields.values())[3:], *(tensor.field for tensor in read.tensors)]:
        at = field.offset
        for part in field.parts:
            if part.dtype.itemsize > 1:
                found += [(at + n * part.dtype.itemsize, part.dtype.itemsize) for n in range(part.size)]
            at += part.nbytes
    return found


def _reference(folder: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(7, 50, (2, 12)).astype(np.int32)
    ids[0, 1:7] = [50, 3, 3, 3, 3, 51]
    pixels, logits = (rng.random(shape).astype(np.float32) for shape in ((1, 3, 8, 8), (2, 12, 5)))
    batches: dict[str, Any] = {"text/input_ids": ids, "text/attention_mask": np.ones_like(ids)}
    images: dict[str, Any] = {"pixel_values": pixels, "text/image_index": np.array([0])}
    forward: dict[str, Any] = {"text/logits": logits, "text/img_pos": np.array([[0, 1, 6]])}
    np.savez(folder / "batches.npz", **batches)
    np.savez(folder / "images.npz", **images)
    np.savez_compressed(folder / "forward.npz", **forward)
    (folder / "manifest.json").write_text(json.dumps({"spec": {"coef": 0.01}, "images": ["a", "b"]}))


def _stats(folder: Path) -> None:
    rng = np.random.default_rng(0)
    picks = np.array([[4, 4, 2, 2], [3, 3, 3, 3]])
    by_kind: dict[str, Any] = {kind: picks for kind in routing_stats.KINDS}
    floats: dict[str, Any] = {kind: rng.random((2, 4)) for kind in routing_stats.KINDS}
    tokens: dict[str, int] = dict.fromkeys(routing_stats.KINDS, 6)
    per_token = routing_stats.PerToken(rng.integers(0, 4, (2, 12, 2)).astype(np.int8), rng.random((2, 12)),
                                       np.arange(12) < 6)  # fmt: skip
    entropy: dict[str, Any] = {kind: rng.random(2) for kind in routing_stats.KINDS}
    stats = routing_stats.Stats(
        "jax", 4, 2, np.ones((2, 4), bool), tokens, by_kind, by_kind, floats, entropy, "00", per_token
    )
    routing_stats.write_stats(folder / "stats.npz", stats)


def _llava(folder: Path) -> None:
    """An extended one with the names of transformers 5 in memory, whose experts are fused."""
    folders.llava(folder, config=folders.RELEASED, memory=True)


def _chain(folder: Path) -> None:
    """Two extensions in layout hf."""
    _transformers(folder, folders.CHAIN)


def _hears(folder: Path) -> None:
    """Pictures and sounds in layout hf."""
    media = {name: medium for name, medium in folders.MANY.media.items() if name in ("image", "speech")}
    _transformers(folder, ModelConfig(decoder=tiny.DECODER, media=Named(media)))


def _transformers(folder: Path, config: ModelConfig) -> None:
    options: dict[str, Any] = {"recipe": RECIPES["paper"], "max_shard_bytes": 1 << 30}
    export_transformers(folders.source_of(config), folder / "model", **options)


def _imported(folder: Path) -> None:
    folders.released(folder / "source")
    convert.import_source(open_source(folder / "source"), folder / "model")
    shutil.rmtree(folder / "source")


def _many(folder: Path) -> None:
    small = dataclasses.replace(folders.MANY, decoder=tiny.DECODER)
    convert.import_source(folders.source_of(small, text_isolation="strict"), folder / "model")


def _delta(folder: Path) -> None:
    folders.released(folder / "whole")
    folders.mixtral(folder / "base")
    folders.clip(folder / "base" / "vision")
    convert.export_source(open_source(folder / "whole"), folder / "delta", layout="delta", max_shard_bytes=1 << 30)
    shutil.rmtree(folder / "whole")


def _peft(folder: Path) -> None:
    adapter = AdapterConfig(rank=2, router=True, experts="per_expert", medium="")
    source = folders.source_of(ModelConfig(decoder=tiny.DECODER, adapters=Named({"a": adapter})))
    convert.export_source(source, folder / "lora", layout="peft", max_shard_bytes=1 << 30)


def _whisper(folder: Path) -> None:
    config = media_files.WHISPER
    shapes = {row.file: names.shape(row.layout.split(" -> ")[0], sizes_of(config)) for row in names.WHISPER}
    arrays = {f"model.encoder.{name.format(U=0)}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    folders.write(folder, arrays, folders.whisper_attributes(config))
    sounds = {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "feature_size": config.bands}
    (folder / "preprocessor_config.json").write_text(json.dumps(sounds))


def _records(folder: Path) -> None:
    writer = ArrayRecordWriter(os.fspath(folder / "a.array_record"), "group_size:1")
    for row in range(4):
        writer.write(bytes([row]) * (row + 1))
    writer.close()


def _selection(folder: Path) -> None:
    record = {"chosen_layers": [0, 2], "sources": [1, 3], "base": "0" * 64, "shift": [0.1, 0.2, 0.3]}
    (folder / "routing.json").write_text(json.dumps(record))


def _tokenizer(folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        if (tiny.ASSETS / "base" / name).is_file():
            shutil.copy(tiny.ASSETS / "base" / name, folder / name)


def _byte_level(folder: Path) -> None:
    tiny_tokens.write_byte_level(folder, template=None)
    (folder / "chat_template.jinja").write_text(tiny_tokens.THINKING)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')


# --- reading ----------------------------------------------------------------------------------------------------------


def _all_of(stored: dict[str, Stored]) -> dict[str, np.ndarray]:
    read = {name: one.read() for name, one in stored.items()}
    for name, one in stored.items():
        assert (read[name].shape, read[name].dtype) == (one.shape, one.dtype), name
    return read


def _same(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.shape == theirs[name].shape and array.tobytes() == theirs[name].tobytes(), name


def _read_chat(folder: Path) -> None:
    decoder = dataclasses.replace(tiny.DECODER, vocab_size=300)
    tokenizer = tokenizer_of(folder, ModelConfig(decoder=decoder))
    turns = [{"from": "human", "value": "<image> a?"}, {"from": "gpt", "value": "b <|im_end|>"}]
    encoded = encode_conversation(
        turns * 2, example_id=str(folder), items={"image": [2, 2]}, tokenizer=tokenizer, recipe=RECIPES["paper"]
    )
    assert encoded.ids_L.min() >= 0 and encoded.ids_L.max() < decoder.vocab_size
    tokenizer.decode(encoded.ids_L)


def _read_safetensors(folder: Path) -> None:
    ours = _all_of(open_tensors(folder))
    try:
        theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    except (KeyError, safetensors.SafetensorError) as error:
        # It also wants text in __metadata__, which nobody reads here, and has no NumPy type for some element types.
        assert "metadata" in str(error) or isinstance(error, KeyError) or "invalid type" in str(error), error
        return
    _same(ours, theirs)


def _read_gguf(folder: Path) -> None:
    path = folder / "model.gguf"
    opened = open_gguf(path)
    _all_of(opened.tensors)
    theirs = gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert repr(opened.metadata[name]) == repr(field.contents()), name
    by_name = {tensor.name: tensor for tensor in theirs.tensors}
    embedding = opened.tensors["model.embed_tokens.weight"].read()
    their = by_name["token_embd.weight"]
    assert embedding.tobytes() == gguf.dequantize(their.data, their.tensor_type).astype(embedding.dtype).tobytes()
    write_tokenizer(opened.metadata, folder / "tokenizer")


def _read_npz(path: Path) -> None:
    ours = read_npz(path)
    with np.load(path, allow_pickle=False) as theirs:
        _same(ours, dict(theirs))


def _read_reference(folder: Path) -> None:
    read = reference.read_reference(folder / "forward.npz")
    for name in ("forward", "batches", "images"):
        _read_npz(folder / f"{name}.npz")
    start = reference.start_tag(read, given=None, attributes={})
    rows = reference.rows_of(read, "text", start=start)
    reference.check_fits(rows, tiny.PLAIN, name="text")
    reference.to_batch(rows, start=start, patches=4)


def _read_stats(folder: Path) -> None:
    stats = routing_stats.read_stats(folder / "stats.npz")
    _read_npz(folder / "stats.npz")
    with np.errstate(all="ignore"):  # its probabilities may be anything
        routing_stats.load_of(stats, "all")


def _read_source(source: Source) -> None:
    _read_leaves(source.leaves)


def _read_leaves(leaves: Mapping[str, Leaf]) -> None:
    for leaf in leaves.values():
        for index in leaf.indices():
            leaf.ours(index)


def _read_whisper(folder: Path) -> None:
    _read_leaves(read_whisper(folder, seconds=1).leaves)


def _read_records(folder: Path) -> None:
    for row in range(4):
        read_row(folder / "a.array_record", row, name=f"image {folder.name}", noun="image")


def _data_rows() -> list[dict[str, Any]]:
    image = {"bytes": PNG, "path": None}
    part = {"type": "image", "text": None}
    return [
        {"id": f"é{n}", "images": [image] * (n % 3), "system": "s",
         "messages": [{"role": "user", "content": [part] * (n % 3) + [{"type": "text", "text": f"what is {n}? é"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": f"it is {n}"}]}]}
        for n in range(6)
    ]  # fmt: skip


PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)


def _data_lines(folder: Path) -> None:
    rows = [row | {"images": ["a.png"] * len(row["images"])} for row in _data_rows()]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")


def _data_json(folder: Path) -> None:
    rows = [row | {"images": ["a.png"] * len(row["images"])} for row in _data_rows()]
    (folder / "data.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _data_csv(folder: Path) -> None:
    rows = [f'{n},"what is {n}, é?",it is {n},"[""a.png"", ""b.png""]"' for n in range(6)]
    (folder / "data.csv").write_text("\n".join(["id,question,answer,images", *rows]), encoding="utf-8")


def _data_arrow(folder: Path) -> None:
    table = pa.Table.from_pylist(_data_rows())
    with pa.ipc.new_stream(folder / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def _data_tar(folder: Path) -> None:
    with tarfile.open(folder / "data.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(4):
            talk = {"id": f"é{n}", "conversations": [{"from": "human", "value": "<image>"}]}
            for kind, data in (("json", json.dumps(talk).encode()), ("png", PNG), ("note.txt", b"a")):
                info = tarfile.TarInfo(f"é/{n}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


DATA: dict[str, Callable[[Path], None]] = {
    "json": _data_json,
    "jsonl": _data_lines,
    "csv": _data_csv,
    "parquet": lambda folder: pq.write_table(pa.Table.from_pylist(_data_rows()), folder / "data.parquet"),
    "arrow": _data_arrow,
    "tar": _data_tar,
}


def _read_data(folder: Path) -> None:
    """All rows, as they are built; a fault is one line of bounded length that names the entry."""
    (path,) = folder.glob("data.*")
    for entry in read_entries(path):
        json.dumps([entry.id, entry.turns])
        for turn in entry.turns:
            assert turn is None or turn.keys() <= {"from", "value"}, turn
        assert all(isinstance(name, str) for name in entry.images) and set(entry.contents) <= set(entry.images)
        assert entry.fault is None or f"entry {entry.number} " in str(entry.fault)
        assert len(str(entry.fault)) < LONGEST
        for content in entry.contents.values():
            with contextlib.suppress(Fault):
                if isinstance(content, Span):
                    read_span(content)


def _read_item(name: str) -> Callable[[Path], None]:
    """What a tower takes is of its shape and finite, and what the header says is what decoding finds."""
    medium, kind = media_files.FILES[name][0], KINDS[media_files.FILES[name][0].kind]

    def read(folder: Path) -> None:
        encoded, options = (folder / "item").read_bytes(), {"name": f"image {folder.name}", "id": "x", "medium": medium}
        item = kind.decode(encoded, **options)
        inputs = kind.prepare(item, medium=medium, preparation="pad", id=folder.name)
        assert inputs.shape == kind.input_shape(medium) and inputs.dtype == np.float32 and np.isfinite(inputs).all()
        positions = kind.positions(item, medium)
        assert 0 < positions <= medium.positions and kind.span_of_file(encoded, **options) == positions

    return read


def _item(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "item").write_bytes(media_files.FILES[name][1])


def change_line(data: bytes, rng: Rng) -> bytes:
    """Another value in one of the lines' JSON."""
    lines = data.split(b"\n")
    n = int(rng.integers(len(lines)))
    lines[n] = change_json(lines[n], rng).replace(b"\n", b" ")
    return b"\n".join(lines)


def change_table(data: bytes, rng: Rng) -> bytes:
    """Another value in one of the cells."""
    if rng.random() < 0.4:
        return change_bytes(data, rng)
    lines = [line.split(b"\t") for line in data.split(b"\n")]
    cells = pick(rng, lines)
    cells[int(rng.integers(len(cells)))] = f"{pick(rng, (*VALUES, '9' * 5000))}".encode(errors="replace")
    return b"\n".join(map(b"\t".join, lines))


def _benchmark(name: str, split: str | None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        benchmark_files.everything(folder)
        benchmark_files.answer(folder, name, split)

    return make


BENCHMARKS = {
    f"{name}: {Path(file).name}": Reader(
        _benchmark(name, split), file, functools.partial(benchmark_files.score, name=name, split=split),
        change_json if Path(file).suffix.startswith(".json") else change_table,
    )
    for (name, split), files in benchmark_files.RUNS.items()
    for file in (*files, "answers.jsonl")
}  # fmt: skip
"""Each file that scores are made of."""


def _upcycled(folder: Path) -> None:
    _read_source(open_upcycled(folder / "model", experts=2, tokenizer_folder=folder / "tokenizer"))


READERS: dict[str, Reader] = {
    "safetensors": Reader(_safetensors, "model.safetensors", _read_safetensors, change_safetensors),
    "index of shards": Reader(
        lambda folder: folders.mixtral(folder, shards=3), "model.safetensors.index.json",
        lambda folder: _read_source(open_source(folder)), change_json,
    ),
    "gguf": Reader(_gguf, "model.gguf", _read_gguf, change_gguf),
    "npz: forward": Reader(_reference, "forward.npz", _read_reference, change_npz),
    "npz: batches": Reader(_reference, "batches.npz", _read_reference, change_npz),
    "npz: images": Reader(_reference, "images.npz", _read_reference, change_npz),
    "manifest.json": Reader(_reference, "manifest.json", _read_reference, change_json),
    "npz: routing": Reader(_stats, "stats.npz", _read_stats, change_npz),
    "config.json: Mixtral": Reader(
        folders.mixtral, "config.json", lambda folder: _read_source(open_source(folder)), change_json
    ),
    "config.json: CLIP": Reader(
        folders.whole_clip, "config.json", lambda folder: _read_source(open_source(folder)), change_json
    ),
    "config.json: released": Reader(
        folders.released, "config.json", lambda folder: _read_source(open_source(folder)), change_json
    ),
    "config.json: LLaVA": Reader(
        _llava, "config.json", lambda folder: _read_source(open_source(folder)), change_json
    ),
    "header: LLaVA, fused": Reader(
        _llava, "model.safetensors", lambda folder: _read_source(open_source(folder)), change_safetensors
    ),
    "config.json: extensions": Reader(
        _chain, "model/config.json", lambda folder: _read_source(open_source(folder / "model")), change_json
    ),
    "config.json: sounds": Reader(
        _hears, "model/config.json", lambda folder: _read_source(open_source(folder / "model")), change_json
    ),
    "config.json: Llama": Reader(
        lambda folder: llama.write_folder(folder / "model"), "model/config.json", _upcycled, change_json
    ),
    "header: released": Reader(
        folders.released, "model.safetensors", lambda folder: _read_source(open_source(folder)), change_safetensors
    ),
    "header: Llama": Reader(
        lambda folder: llama.write_folder(folder / "model"), "model/model.safetensors", _upcycled, change_safetensors
    ),
    "import": Reader(
        _imported, "model/moextend.json", lambda folder: _read_source(open_source(folder / "model")), change_json
    ),
    "import of many media": Reader(
        _many, "model/moextend.json", lambda folder: _read_source(open_source(folder / "model")), change_json
    ),
    "delta": Reader(
        _delta, "delta/moextend.json",
        lambda folder: _read_source(open_source(folder / "delta", base=folder / "base")), change_json,
    ),
    "adapter_config.json": Reader(
        _peft, "lora/adapter_config.json", lambda folder: _read_leaves(open_peft(folder / "lora", tiny.DECODER).leaves),
        change_json,
    ),
    "header: PEFT": Reader(
        _peft, "lora/adapter_model.safetensors",
        lambda folder: _read_leaves(open_peft(folder / "lora", tiny.DECODER).leaves), change_safetensors,
    ),
    "config.json: Whisper": Reader(_whisper, "config.json", _read_whisper, change_json),
    "preprocessor_config.json": Reader(_whisper, "preprocessor_config.json", _read_whisper, change_json),
    "header: Whisper": Reader(_whisper, "model.safetensors", _read_whisper, change_safetensors),
    "routing.json": Reader(
        _selection, "routing.json", lambda folder: read_selection(folder / "routing.json", decoder=tiny.DECODER),
        change_json,
    ),
    **{f"data: {form}": Reader(make, f"data.{form}", _read_data, change_bytes) for form, make in DATA.items()},
    "data: messages": Reader(DATA["jsonl"], "data.jsonl", _read_data, change_line),
    **{f"media: {name}": Reader(_item(name), "item", _read_item(name), change_bytes) for name in media_files.FILES},
    "rows of ArrayRecord": Reader(_records, "a.array_record", _read_records, change_bytes),
    "media: npz, header": Reader(_item("npz"), "item", _read_item("npz"), change_npz),
    "tokenizer.model": Reader(_tokenizer, "tokenizer.model", load_tokenizer, change_bytes),
    "tokenizer_config.json": Reader(_tokenizer, "tokenizer_config.json", load_tokenizer, change_json),
    "tokenizer.json": Reader(_byte_level, "tokenizer.json", _read_chat, change_json),
    "tokenizer_config.json: chat": Reader(_byte_level, "tokenizer_config.json", _read_chat, change_json),
    "generation_config.json": Reader(_byte_level, "generation_config.json", _read_chat, change_json),
    "chat_template.jinja": Reader(_byte_level, "chat_template.jinja", _read_chat, change_bytes),
    **BENCHMARKS,
}  # fmt: skip

GGUF_NUMBERS: list[tuple[int, int]] = []


class Opened(NamedTuple):
    """A reader with its valid files on disk."""

    reader: Reader
    folder: Path
    whole: bytes


def open_reader(name: str, folder: Path) -> Opened:
    """Writes the valid files into an empty folder and reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = READERS[name]
    reader.make(folder)
    if name == "gguf" and not GGUF_NUMBERS:
        GGUF_NUMBERS.extend(_numbers_of_gguf(folder / reader.file))
    reader.read(folder)
    return Opened(reader, folder, (folder / reader.file).read_bytes())


def run_case(opened: Opened, name: str, seed: int) -> Literal["refused", "read"]:
    """Changes the file by the seed and reads it; anything but a result or a short `MoextendError` is raised."""
    changed = opened.reader.change(opened.whole, np.random.default_rng([seed, *name.encode()]))
    return judge(opened, changed)


def judge(opened: Opened, changed: bytes) -> Literal["refused", "read"]:
    (opened.folder / opened.reader.file).write_bytes(changed)
    try:
        opened.reader.read(opened.folder)
    except MoextendError as error:
        said = str(error)
        assert len(said) < LONGEST, f"a message of {len(said)} letters: {said[:300]}"
        assert "MemoryError" not in said and "allocate" not in said, said
        assert any(place in said for place in (opened.folder.name, "batch ", "GGUF's", "image")), f"where? {said}"
        # Of what the tokenizer's library says, the command's last line makes something printable.
        assert said.isprintable() or "tokenizer" in said, ascii(said)
        return "refused"
    return "read"
