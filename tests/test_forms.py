"""Six conversations in every form of file: the same examples, the same batches; mixtures of them; what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import tiny
from media_files import tar
from PIL import Image

from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.data.batches import batches
from moextend_jax.data.check import Report, _weigh, check, open_origin
from moextend_jax.data.datasets import Source, hold_out, open_dataset, short_name
from moextend_jax.data.entries import read_entries
from moextend_jax.data.features import cache_features
from moextend_jax.data.forms import Part, files_of, parts_of
from moextend_jax.data.inspector import Reading, Work
from moextend_jax.data.mixing import picks
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.faults import STRICT, Fault
from moextend_jax.media.image import decode_image
from moextend_jax.settings import FaultSettings, StageSettings

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
ROWS = range(6)


# --- six conversations, in every form ---------------------------------------------------------------------------------


def picture(n: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 6), (40 * n, 9, 200)).save(file, "PNG")
    return file.getvalue()


def names(n: int) -> list[str]:
    """Row 0 shows two pictures, one of them row 1's; row 3 shows none."""
    return {0: ["0.png", "1.png"], 3: []}.get(n, [f"{n}.png"])


def encoded(n: int) -> list[bytes]:
    return [picture(int(name[0])) for name in names(n)]


def texts(n: int) -> list[str]:
    """Row 2 has two questions."""
    first = [f"what is {n}, é?", f"it is {n}"]
    return first + (["sure?", "yes"] if n == 2 else [])


def turns(n: int) -> list[dict[str, str]]:
    marked = ["<image>\n" * len(names(n)) + texts(n)[0], *texts(n)[1:]]
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(marked)]


def messages(n: int, *, marked: bool = True) -> list[dict[str, str]]:
    values = [turn["value"] for turn in turns(n)] if marked else texts(n)
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(values)]


def parts(n: int, part: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are lists; `part` of the k-th picture."""
    talk: list[dict[str, Any]] = [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
        for turn in messages(n, marked=False)
    ]
    talk[0]["content"] = [part(k) for k in range(len(names(n)))] + talk[0]["content"]
    return talk


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in ROWS:
        (folder / f"{n}.png").write_bytes(picture(n))


def as_json(path: Path, row: Callable[[int], dict[str, Any]]) -> Path:
    path.write_text(json.dumps([{"id": f"row{n}", **row(n)} for n in ROWS], ensure_ascii=False), encoding="utf-8")
    return path


def as_lines(path: Path, row: Callable[[int], dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(json.dumps({"id": f"row{n}", **row(n)}) for n in ROWS) + "\n")
    return path


def table(row: Callable[[int], dict[str, Any]], rows: Any = ROWS) -> pa.Table:
    return pa.Table.from_pylist([{"id": f"row{n}", **row(n)} for n in rows])


def as_parquet(path: Path, row: Callable[[int], dict[str, Any]]) -> Path:
    pq.write_table(table(row), path, row_group_size=2)
    return path


def as_csv(path: Path, row: Callable[[int], dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", *row(0)], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({"id": f"row{n}", **row(n)} for n in ROWS)
    return path


def held(n: int) -> dict[str, Any]:
    """Pictures as Hugging Face's Image feature has them."""
    return {"images": [{"bytes": data, "path": None} for data in encoded(n)]}


def saved(folder: Path) -> Path:
    """What `datasets` writes, in two files whose order is not that of their names."""
    folder.mkdir()
    files = {"data-b.arrow": ROWS[:4], "data-a.arrow": ROWS[4:]}
    for name, rows in files.items():
        part = table(lambda n: {"messages": parts(n, lambda k: {"type": "image"}), **held(n)}, rows)
        with pa.ipc.new_stream(folder / name, part.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def hub_folder(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for shard, rows in enumerate((ROWS[:2], ROWS[2:])):
        part = table(lambda n: {"messages": messages(n), **held(n)}, rows)
        pq.write_table(part, folder / "data" / f"train-{shard:05d}-of-00002.parquet")
    pq.write_table(table(lambda n: {"messages": messages(n)}, [3]), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("about it")
    return folder


def shards(folder: Path) -> Path:
    folder.mkdir()
    for shard, rows in enumerate((ROWS[:3], ROWS[3:])):
        members = []
        for n in rows:
            members += [(f"row{n}.{k}.png", data) for k, data in enumerate(encoded(n))]
            members.append((f"row{n}.json", json.dumps({"conversations": turns(n)}).encode()))
        tar(folder / f"x-{shard:03d}.tar", members)
    return folder


def data_url(n: int, k: int) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(encoded(n)[k]).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


FORMS: dict[str, Callable[[Path], Any]] = {
    "llava": lambda to: as_json(to / "a.json", lambda n: {"image": names(n), "conversations": turns(n)}),
    "json lines": lambda to: as_lines(to / "a.jsonl", lambda n: {"images": names(n), "conversations": turns(n)}),
    "json lines by content": lambda to: as_lines(to / "a.json", lambda n: {"image": names(n), "messages": messages(n)}),
    "sharegpt": lambda to: as_json(
        to / "a.json",
        lambda n: {
            "images": names(n),
            "conversations": [t | {"from": {"human": "user", "gpt": "assistant"}[t["from"]]} for t in turns(n)],
        },
    ),
    "messages, no marks": lambda to: as_lines(
        to / "a.jsonl", lambda n: {"image_path": names(n), "messages": messages(n, marked=False)}
    ),
    "openai": lambda to: as_lines(
        to / "a.jsonl",
        lambda n: {"messages": parts(n, lambda k: {"type": "image_url", "image_url": {"url": names(n)[k]}})},
    ),
    "data urls": lambda to: as_lines(to / "a.jsonl", lambda n: {"messages": parts(n, lambda k: data_url(n, k))}),
    "numbered parts": lambda to: as_json(
        to / "a.json",
        lambda n: {
            "images": names(n)[::-1],
            "messages": parts(n, lambda k: {"type": "image", "index": len(names(n)) - 1 - k}),
        },
    ),
    "parquet of paths": lambda to: as_parquet(
        to / "a.parquet", lambda n: {"images": names(n), "conversations": turns(n)}
    ),
    "parquet of bytes": lambda to: as_parquet(to / "a.parquet", lambda n: {"messages": messages(n), **held(n)}),
    "parquet of parts": lambda to: as_parquet(
        to / "a.parquet", lambda n: {"messages": parts(n, lambda k: {"type": "image"}), "images": encoded(n)}
    ),
    "csv": lambda to: as_csv(
        to / "a.csv", lambda n: {"images": json.dumps(names(n)), "conversations": json.dumps(turns(n))}
    ),
    "csv of semicolons": lambda to: as_csv(
        to / "a.csv", lambda n: {"image": json.dumps(names(n)), "messages": json.dumps(messages(n))}, ";"
    ),
    "tsv": lambda to: as_csv(
        to / "a.tsv", lambda n: {"image": json.dumps(names(n)), "messages": json.dumps(messages(n))}, "\t"
    ),
    "saved by datasets": lambda to: saved(to / "saved"),
    "folder of the hub": lambda to: hub_folder(to / "hub"),
    "webdataset folder": lambda to: shards(to / "wds"),
    "webdataset braces": lambda to: shards(to / "wds") / "x-{000..001}.tar",
    "pattern": lambda to: shards(to / "wds") / "x-*.tar",
}


def read(source: Source) -> list[tuple[str, list[Any], list[bytes]]]:
    return [
        (example.id, example.conversations, [source.images[ref.row].encoded for ref in example.images])
        for example in source
    ]


def batch_arrays(source: Source, **more: Any) -> dict[str, np.ndarray]:
    made = batches(
        source,
        stage=StageSettings(data="x", steps=1, batch_size=2, length=64, images_per_row=3, conversations_per_row=2),
        tokenizer=load_tokenizer(BASE),
        recipe=RECIPES["paper"],
        readers={"image": tiny.pictures(source.images)},
        **cast(Any, {"epochs": 1} | more),
    )
    return tiny.by_field(tiny.joined(made))


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, np.ndarray]:
    to = tmp_path_factory.mktemp("wanted")
    source = open_dataset(str(FORMS["llava"](to)), data_dir=to, images=pictures)
    assert read(source) == [(f"row{n}", turns(n), encoded(n)) for n in ROWS]
    return batch_arrays(source)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_examples_and_batches(
    form: str, tmp_path: Path, pictures: Path, wanted: dict[str, np.ndarray]
):
    path = FORMS[form](tmp_path)
    source = open_dataset(str(path), data_dir=tmp_path / "built", images=pictures)
    assert read(source) == [(f"row{n}", turns(n), encoded(n)) for n in ROWS]
    assert len(source.images) == 5 or "web" in form or form == "pattern"  # each picture is kept once
    assert_same(batch_arrays(pickle.loads(pickle.dumps(source))), wanted)


def test_what_datasets_itself_saves_is_read(tmp_path: Path, wanted: dict[str, np.ndarray]):
    datasets = pytest.importorskip("datasets")
    rows = [{"id": f"row{n}", "messages": messages(n), "images": held(n)["images"]} for n in ROWS]
    features = datasets.Features(
        id=datasets.Value("string"),
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        images=[datasets.Image()],
    )
    data = datasets.Dataset.from_list(rows, features=features)
    picked = data.select([5, 4, 3, 2, 1, 0])  # by a list of indices, which saving writes out
    datasets.DatasetDict({"train": data, "validation": picked}).save_to_disk(tmp_path / "both")
    both = {split: open_dataset(str(tmp_path / "both"), split=split, data_dir=tmp_path) for split in ("train", "val")}
    assert read(both["train"]) == read(both["val"])[::-1] and len(both["train"]) == 6
    again = open_dataset(str(tmp_path / "both"), split="validation[:2]", data_dir=tmp_path)
    assert read(again) == read(both["val"])[:2]
    assert_same(batch_arrays(both["train"]), wanted)
    for split, message in [("test", "no split 'test'; there are train, validation"), ("train[:2", "no split")]:
        with pytest.raises(MoextendError, match=message):
            open_dataset(str(tmp_path / "both"), split=split, data_dir=tmp_path)


# --- shapes of rows ---------------------------------------------------------------------------------------------------


def talk(*texts: str, system: str = "") -> list[dict[str, str]]:
    first = [{"from": "system", "value": system}] if system else []
    return first + [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def part(**more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [more]}


SAID = {"role": "assistant", "content": "b"}
SHAPES: list[tuple[dict[str, Any], list[dict[str, str]], tuple[str, ...]]] = [
    ({"question": "a?", "answer": "b", "image": "x.png"}, talk("<image>\na?", "b"), ("x.png",)),
    ({"prompt": "<image> a?", "completion": "b", "image": "x.png"}, talk("<image> a?", "b"), ("x.png",)),
    ({"instruction": "add", "input": "2 and 3", "output": 5}, talk("add\n2 and 3", "5"), ()),
    ({"instruction": "square", "input": 0, "output": 0.5}, talk("square\n0", "0.5"), ()),
    ({"instruction": "sort", "input": '{"b": 1}', "output": "c", "history": [["a?", 1], ["b?", "2"]], "image": "x.png"},
     talk("<image>\na?", "1", "b?", "2", 'sort\n{"b": 1}', "c"), ("x.png",)),
    ({"instruction": "who?", "context": "It was me.", "response": "me", "category": "qa"},
     talk("who?\nIt was me.", "me"), ()),
    ({"question": "Is a\n big?", "answer": "a", "options": {"A": "a", "B": "big"}, "prompt": "a big", "hint": ""},
     talk("Is a\n big?", "a"), ()),
    ({"question": "选择苹果还是梨?", "answer": "梨", "choices": '["苹果", "梨"]'}, talk("选择苹果还是梨?", "梨"), ()),
    ({"question": "Q", "answer": "A", "context": " \n", "hint": [" "], "input": "", "history": []}, talk("Q", "A"), ()),
    ({"instruction": "q c", "context": "c", "input": [], "output": "a"}, talk("q c", "a"), ()),
    ({"system": " ", "system_prompt": "s", "question": "a?", "response": "b"}, talk("a?", "b", system="s"), ()),
    ({"system_prompt": "s", "question": "a?", "response": "b"}, talk("a?", "b", system="s"), ()),
    ({"file_name": "x.wav", "transcription": "hello"}, talk("<audio>\nWhat is said?", "hello"), ("x.wav",)),
    ({"image": "x.png", "file_name": "x.wav", "caption": "c"}, talk("<image>\nDescribe the image.", "c"), ("x.png",)),
    ({"question": "1 or 2? Cats sit.", "answer": "1", "choices": [1, "2"], "context": "Cats sit.\n", "options": None},
     talk("1 or 2? Cats sit.", "1"), ()),
    ({"question": "a?", "answer": "b", "image": float("nan"), "prompt": float("nan")}, talk("a?", "b"), ()),
    ({"instruction": "add", "input": "", "output": "5", "system": "s"}, talk("add", "5", system="s"), ()),
    ({"caption": "a cat", "image_path": "x.png"}, talk("<image>\nDescribe the image.", "a cat"), ("x.png",)),
    ({"text": "a cat", "file_name": "x.png"}, talk("<image>\nDescribe the image.", "a cat"), ("x.png",)),
    ({"text": "a bell", "file_name": "x.WAV"}, talk("<audio>\nDescribe the sound.", "a bell"), ("x.WAV",)),
    ({"text": "a bell", "file_name": "x.mp3"}, talk("<audio>\nDescribe the sound.", "a bell"), ("x.mp3",)),
    ({"question": "a?", "answer": "b", "image_file_name": "x.png", "audio_file_name": "y.flac", "file_name": "z"},
     talk("<image>\n<audio>\na?", "b"), ("x.png", "y.flac")),
    ({"image": "x.png", "image_url": "https://a/x.png", "text": "c"}, talk("<image>\nDescribe the image.", "c"),
     ("x.png",)),
    ({"texts": [{"user": "a?", "assistant": "b", "source": "s"}, {"user": "c", "assistant": "d"}], "images": ["x.png"]},
     talk("<image>\na?", "b", "c", "d"), ("x.png",)),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": [SAID]}, talk("a", "b"), ()),
    ({"messages": [{"role": "System", "content": "s"}, {"role": "user", "content": "a"}, SAID]},
     talk("a", "b", system="s"), ()),
    ({"conversations": [{"from": "system", "value": "s"}, *talk("a", "b")]}, talk("a", "b", system="s"), ()),
    ({"conversations": talk("a", "b", system="s"), "system": "other"}, talk("a", "b", system="s"), ()),
    ({"conversations": [{"from": "user", "value": "a", "role": None}, {"from": None, "role": "model", "content": "b"}]},
     talk("a", "b"), ()),
    ({"conversation": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}, talk("a", "b"), ()),
    ({"messages": [{"role": "user", "content": [{"image": "y.png"}, {"text": "a"}, "b"]}, SAID]},
     talk("<image>\na\nb", "b"), ("y.png",)),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": None},
                                                {"type": "image", "text": None, "image": {"path": "y.png"}}]}, SAID],
      "images": None}, talk("a\n<image>", "b"), ("y.png",)),
    ({"messages": [part(type="image_url", image_url="y.png"), SAID]}, talk("<image>", "b"), ("y.png",)),
    ({"messages": [part(type="image"), SAID], "images": ["x.png"], "thumbnail": {"path": "t.png"}},
     talk("<image>", "b"), ("x.png",)),
    ({"id": None, "image": "", "images": [], "conversations": talk("a", "b")}, talk("a", "b"), ()),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns", "items"), SHAPES, ids=range(len(SHAPES)))
def test_a_row_of_every_usual_shape(tmp_path: Path, row: dict[str, Any], turns: Any, items: tuple[str, ...]):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (entry,) = read_entries(tmp_path / "a.jsonl")
    names = tuple(item.name for item in entry.items)
    assert (entry.turns, names, entry.fault and str(entry.fault)) == (turns, items, None)
    assert entry.id == "0"


def test_columns_of_a_text_alone_are_not_taken_for_pictures(tmp_path: Path):
    row = {"question": "a?", "answer": "b", "image_id": "7", "img_ids": ["7"], "Feature": "x", "Image": "", "vides": 3}
    row |= {"audit": "passed", "round": "2", "fileName": "a.py"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (entry,) = read_entries(tmp_path / "a.jsonl")
    assert entry.fault is None and not entry.images


NOT_READ: list[tuple[Any, str, str]] = [
    ({"question": "a?", "choices": ["b"]}, "entry", "this is no conversation: .* its keys are question, choices"),
    ({"caption": "a cat"}, "entry", "no image with a caption; its keys are caption"),
    ({"Question": "a?", "anwser": "b"}, "entry", "is Question meant as question.; is anwser meant as answer"),
    ({"imgae": "x.png", "question": "a?", "answer": "b"}, "entry", "imgae is not read; is it meant as image"),
    ({"image": "x.png", "question": "a?", "answer": ""}, "empty_answer", "its answer is empty"),
    ({"image": "x.png", "question": None, "answer": "b"}, "entry", "its question is empty"),
    ({"image": "x.png", "caption": ""}, "empty_answer", "its caption is empty"),
    ({"question": "a?", "answer": float("nan")}, "empty_answer", "its answer is empty"),
    ({"instruction": "add", "input": [2, 3], "output": "5"}, "entry", r"its input must be text, not \[2, 3\]"),
    (
        {"question": "a?", "answer": 1, "choices": ["b", "c"]},
        "entry",
        "what its choices says is not read; write it",
    ),
    (
        {"prompt": "add", "input": "2", "response": "b"},
        "entry",
        "its input says is not read; write it into the prom",
    ),
    ({"instruction": "say", "input": True, "output": "b"}, "entry", "its input must be text, not True"),
    ({"question": "What is big?", "answer": 0, "choices": ["a", "big"]}, "entry", "what its choices says is not read"),
    ({"question": "Say it", "answer": "hello", "context": "hello"}, "entry", "its context says .*, or leave it out"),
    ({"prompt": "add one", "input": 0, "output": 1}, "entry", "what its input says is not read"),
    ({"question": "a?", "answer": "b", "system": "s", "system_prompt": "t"}, "entry", "its system_prompt says is not"),
    ({"prompt": [{"role": "user", "content": "x"}], "completion": [SAID], "history": [["c", "d"]]}, "entry", "history"),
    (
        {"question": "a?", "answer": "b", "hint": "c"},
        "entry",
        "what its hint says is not read; write it into the quest",
    ),
    (
        {"question": "a?", "instruction": "In French.", "answer": "b"},
        "entry",
        "what its instruction says .* leave out that or the question",
    ),
    ({"messages": [part(type="text", text="a"), SAID], "context": "c"}, "entry", "what its context says is not read"),
    ({"conversations": talk("a", "b"), "history": [["c", "d"]]}, "entry", "what its history says is not read"),
    ({"image": "x.png", "caption": "b", "passage": "c"}, "entry", "what its passage says is not read"),
    ({"messages": '[{"role": "user", "content": "a", "content": "c"}]'}, "entry", "the key 'content' stands twice"),
    ({"question": "a?", "answer": ["b"]}, "entry", r"its answer must be text, not \['b'\]"),
    ({"question": "a?", "answer": "b", "history": ["c"]}, "entry", r"its history must be pairs .* not \['c'\]"),
    ([1], "entry", "this is not an object with keys"),
    ({"messages": [part(type="file", file="a.pdf"), SAID]}, "entry", "a part of a turn, 'file', is neither text nor"),
    ({"messages": [part(type="audio"), SAID], "image": "x.png"}, "marks", "it shows more audio than it has"),
    ({"conversations": [], "audio": {"array": [0.5]}}, "entry", "audio must be a path or a list of paths, or bytes"),
    ({"conversations": [], "features": {"x" * 5000: "a.npz"}}, "entry", "a medium's name of 5000 characters"),
    ({"audio": "a.wav", "audios": ["b.wav"], "messages": []}, "entry", "audio and audios name different items"),
    ({"messages": [{"role": "user", "content": "a", "images": ["x.png"]}, SAID]}, "entry", "what images of a turn"),
    ({"messages": [{"role": "user", "content": "a"}, {**SAID, "tool_calls": [{}]}]}, "entry", "what tool_calls of a"),
    ({"messages": [{"role": "user", "content": "a"}, {**SAID, "weight": 0}]}, "entry", "what weight of a turn"),
    ({"messages": [part(type="image"), SAID]}, "marks", "it shows more pictures than it has"),
    ({"messages": [part(type="image", index=7), SAID], "images": ["x.png"]}, "marks", "more pictures than it has"),
    ({"conversations": [], "image": 7}, "entry", "image must be a path or a list of paths, or bytes, not 7"),
    ({"conversations": [], "image": [None]}, "entry", "image must be a path"),
    ({"conversations": [], "image": "x" * 5000}, "entry", "an image path of 5000 characters"),
    ({"conversations": [], "image": "data:image/png;base64,?"}, "entry", "a data: URL, .*, that cannot be read"),
    ({"conversations": [], "image": "data:,a"}, "entry", "it is not base64"),
    ({"conversations": [], "image": "\ud83d"}, "encoding", "not UTF-8"),
]


@pytest.mark.parametrize(("row", "kind", "message"), NOT_READ, ids=range(len(NOT_READ)))
def test_what_of_a_row_is_not_read_is_named(tmp_path: Path, row: Any, kind: str, message: str):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"id": "good", "conversations": []})
        + "\n"
        + json.dumps(row)[:-1]
        + ("}" if isinstance(row, dict) else "]")
    )
    good, entry = read_entries(tmp_path / "a.jsonl")
    assert good.fault is None and entry.fault is not None and not entry.images and not entry.turns
    assert entry.fault.kind == kind
    with pytest.raises(Fault, match=f"a.jsonl: entry 1 .id 1, line 2, byte 36.: .*{message}"):
        raise entry.fault


def test_what_a_turn_says_is_left_to_encoding(tmp_path: Path):
    """Turns that are none keep their places, so that the fault that encoding finds is that of today."""
    for turns, left in [
        ([7, {"from": "human"}], [None, {}]),
        ([{"from": "human", "value": {"a": 1}}], [{"from": "human", "value": {}}]),
        ([{"role": "tool", "content": "x"}], [{"from": "tool", "value": "x"}]),
        ([{"from": 7, "value": None}], [{"from": "?", "value": None}]),
    ]:
        (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
        (entry,) = read_entries(tmp_path / "a.json")
        assert (entry.turns, entry.fault) == (left, None)


def test_bytes_that_are_no_pictures_are_named(tmp_path: Path):
    for column, message in [("sound", "what sound holds is not read"), ("image", None)]:
        rows = [{"question": "a", "answer": "b", column: {"bytes": b"x", "path": "a"}}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        (entry,) = read_entries(tmp_path / "a.parquet")
        assert (entry.fault and message and message in str(entry.fault)) or (message is None and entry.contents)


# --- what is refused --------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(table(lambda n: {"messages": messages(n)}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a', "is not JSON: line 2, in the entry at byte 9: "),
        ("a.json", '[{"question": "a",\n "answer": "b"\n "id": 1}]', "is not JSON: line 3, in the entry at byte 1: "),
        ("a.json", '[{"a": 1}\n{"a": 1}]', "is not JSON: line 2, byte 10: there is no , or ]"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), "a.json is UTF-16: save it as UTF-8"),
        ("a.csv", "question,answer\na,b\n".encode("utf-16"), "a.csv is UTF-16: save it as UTF-8"),
        ("a.jsonl", "", "holds no entries"),
        ("a.csv", "", "holds no entries"),
        ("a.csv", "question,question\na,b\n", "two columns of one name"),
        ("a.csv", "question, answer,answer\na, b,c\n", "two columns of one name"),
        ("a.csv", 'question,answer\na,"b\n', "is not CSV: unexpected end of data"),
        ("a.parquet", "PAR1 and no more", "cannot read .*a.parquet"),
        ("a.parquet", b"", "cannot read .*a.parquet"),
        ("a.parquet", parquet_bytes()[:-9], "cannot read .*a.parquet"),
        ("a.arrow", "ARROW1 and no more", "cannot read .*a.arrow"),
        ("a.arrow", b"", "cannot read .*a.arrow"),
        ("a.tar", "no tar", "is no tar file that can be read.*not compressed"),
        ("a.tar", b"\x1f\x8b" + bytes(600), "is no tar file that can be read.*not compressed"),
        ("a.xlsx", "a", "data are read from .json, .jsonl, .*, or a folder of such files"),
        ("a/b.json", None, "no data set '.*a/b.json', and no such file; there are easy_vqa, .*, or give a path"),
        ("a-{0..2}.tar", None, "no file .*a-0.tar, which a-.0..2..tar names"),
        ("a-*.tar", None, "no file is called .*a-\\*.tar"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_its_form_is_one_line(tmp_path: Path, name: str, data: Any, message: str):
    path = tmp_path / name if data is None else write(tmp_path / name, data)
    with pytest.raises(MoextendError, match=message) as error:
        open_dataset(str(path), data_dir=tmp_path / "built")
    assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_a_key_that_stands_twice_is_a_fault_of_its_row(tmp_path: Path):
    """JSON would take the last one, in silence: here the first turn."""
    twice = '{"id": 7, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "value": "c"}]}'
    once = json.dumps({"question": "a" * (1 << 20), "answer": "b"})  # a row of two blocks
    for name, data in [("a.jsonl", f"{once}\n{twice}\n{once}"), ("a.json", f"[{once},\n{twice},\n{once}]")]:
        first, second, third = read_entries(path := write(tmp_path / name, data))
        assert not first.fault and not third.fault and second.fault and second.fault.kind == "entry"
        where = f"{path}: entry 1 (id 7, line 2, byte {data.index(twice)}): "
        assert str(second.fault) == f"{where}the key 'value' stands twice in an object"
    (entry,) = read_entries(tar(tmp_path / "a.tar", [("0.json", twice.encode())]))
    assert "0.json: the key 'value' stands twice in an object" in str(entry.fault)


@pytest.mark.parametrize("url", ["https://a.org/x.json", "s3://bucket/x.parquet"])
def test_urls_other_than_buckets_say_what_to_do(tmp_path: Path, url: str):
    own = as_json(tmp_path / "a.json", lambda n: {"image": names(n), "conversations": turns(n)})
    for data, more in [(url, {}), (str(own), {"images": url}), ("llava_instruct", {"manual_dir": url})]:
        with pytest.raises(MoextendError, match=f"{url}: of URLs only gs:// ones are read; copy it to a folder"):
            open_dataset(data, data_dir=tmp_path / "built", **more)


def test_rows_of_tables_that_are_wrong_are_faults(tmp_path: Path):
    path = write(tmp_path / "a.csv", b'\xef\xbb\xbfquestion,answer\na,b\n\nc\nd,caf\xe9\n"e\nf",g,h\ni,j\n')
    faults = [entry.fault and (entry.fault.kind, str(entry.fault)) for entry in read_entries(path)]
    assert [fault and fault[0] for fault in faults] == [None, "entry", "encoding", "entry", None]
    assert faults[1] and "line 4): it has 1 columns where the first line names 2" in faults[1][1]
    at = path.read_bytes().index(b"\xe9")
    assert faults[2] and f"line 5): text that is not UTF-8 at byte {at}" in faults[2][1]
    text = pa.array([b"a", b"caf\xe9", b"c"], pa.binary()).view(pa.string())
    for name, writer in [("b.parquet", pq.write_table), ("b.arrow", write_arrow)]:
        writer(pa.table({"question": text, "answer": ["1", "2", "3"]}), tmp_path / name)
        entries = list(read_entries(tmp_path / name))
        assert [entry.fault and entry.fault.kind for entry in entries] == [None, "encoding", None], name
        assert "entry 1 (id 1, row 1): not UTF-8" in str(entries[1].fault)


def test_tables_as_spreadsheets_and_people_write_them(tmp_path: Path):
    """Empty lines below the last row, and spaces behind the commas."""
    for text in ("image;question;answer\n1.png;a;b\n;;\n;;\n", "image, question, answer\n1.png, a, b\n"):
        (entry,) = read_entries(write(tmp_path / "a.csv", text))
        assert (entry.fault, entry.images, entry.turns) == (None, ("1.png",), talk("<image>\na", "b"))


def write_arrow(data: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, data.schema) as writer:
        writer.write_table(data)


def test_rows_of_shards(tmp_path: Path):
    """A caption beside a picture; keys as members; pictures in the order in which the JSON names them."""
    ordered = {"conversations": talk("<image><image>", "b"), "images": ["d/0.r.png", "0.l.png"]}
    path = tar(
        tmp_path / "a.tar",
        {
            "a.jpg": picture(0), "a.txt": b"a cat\n", "b.question.txt": b"q", "b.answer.txt": b"a",
            "d/0.l.png": picture(1), "d/0.r.png": picture(2), "d/0.json": json.dumps(ordered).encode(),
            "e.json": b"{", "f.mp4": b"", "g.txt": b"caf\xe9", "h.cls": b"7", "a.png": b"",
        }.items(),
    )  # fmt: skip
    entries = list(read_entries(path))
    assert [entry.fault and entry.fault.kind for entry in entries] == [
        None, None, None, "entry", "entry", "encoding", "entry", "entry",
    ]  # fmt: skip
    assert entries[0].turns == talk("<image>\nDescribe the image.", "a cat") and entries[1].turns == talk("q", "a")
    assert [name.partition("@")[0] for name in entries[2].images] == ["a.tar/d/0.r.png", "a.tar/d/0.l.png"]
    assert "member f.mp4" in str(entries[4].fault) and "f.mp4 holds is not read" in str(entries[4].fault)
    whole = path.read_bytes()
    write(path, whole[: len(whole) // 2 - 300])
    with pytest.raises(MoextendError, match="a.tar is no tar file that can be read: it is cut off or damaged at byte "):
        list(read_entries(path))


def test_one_picture_of_two_members_of_a_name(tmp_path: Path):
    tar(
        tmp_path / "a.tar",
        [(name, data) for n in (1, 2) for name, data in (("x.png", picture(n)), ("x.txt", b"%d" % n), ("y.txt", b""))],
    )
    (tmp_path / "b.json").write_text("[]")
    skip = FaultSettings(policies={"entry": "skip"})
    source = open_dataset(str(tmp_path / "a.tar"), data_dir=tmp_path / "built", faults=skip)
    assert [images for _, _, images in read(source)] == [[picture(1)], [], [picture(2)], []]


def test_shards_of_one_name_in_two_folders_hold_two_pictures(tmp_path: Path):
    home, images = tmp_path / "all", [b"no picture", picture(1)[:10]]
    for folder, image in zip(("cc", "laion"), images, strict=True):
        (home / folder).mkdir(parents=True)
        row = json.dumps({"id": folder, "text": "a"}).encode()
        tar(home / folder / "0.tar", [("0.png", image), ("0.json", row)])
    source = open_dataset(str(home), data_dir=tmp_path / "built")
    assert [shown for *_, shown in read(source)] == [[image] for image in images]
    keys = [ref.key for row in source for ref in row.images]
    assert keys == ["cc/0.tar/0.png@512", "laion/0.tar/0.png@512"]
    (report,) = checked(str(home))
    assert report.images == 2 and sorted(one.id for of in report.first.values() for one in of) == keys
    alone = open_dataset(str(home / "laion"), data_dir=tmp_path / "built")
    assert alone[0].images[0].key == "0.tar/0.png@512"  # as caches have it
    write(home / "cc" / "0.tar", (home / "cc" / "0.tar").read_bytes()[:515])
    with pytest.raises(Fault, match="ends with its archive") as fault:
        source.images[0]
    assert fault.value.id == keys[0]  # by which caches of features note it


# --- folders and splits -----------------------------------------------------------------------------------------------


def test_splits_are_those_that_files_and_folders_are_named_by(tmp_path: Path):
    hub = hub_folder(tmp_path / "hub")
    assert len(open_dataset(str(hub), split="test", data_dir=tmp_path)) == 1
    assert [row.id for row in open_dataset(str(hub), split="train[3:]", data_dir=tmp_path)] == ["row3", "row4", "row5"]
    with pytest.raises(MoextendError, match="no split 'dev'; there are test, train"):
        open_dataset(str(hub), split="dev", data_dir=tmp_path)
    folder = tmp_path / "imagefolder"
    for split in ("train", "val"):
        write_pictures(folder / split)
        as_lines(folder / split / "metadata.jsonl", lambda n, s=split: {"file_name": f"{n}.png", "text": f"{s} {n}"})
    source = open_dataset(str(folder), split="validation", data_dir=tmp_path / "built")
    assert read(source)[2] == ("row2", talk("<image>\nDescribe the image.", "val 2"), [picture(2)])
    (folder / "train" / "a.csv").write_text("question,answer\na,b\n")
    assert len(files_of(str(folder)).paths) == 1  # metadata says what the folder is
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("a.csv", "b.jsonl"):
        (mixed / name).touch()
    for path, message in [(mixed, "files of 2 forms, .csv, .jsonl"), (tmp_path / "imagefolder" / "x", "no data set")]:
        with pytest.raises(MoextendError, match=message):
            files_of(str(path))
    (mixed / "state.json").write_text('{"_data_files": [{"filename": "../../a.arrow"}]}')
    with pytest.raises(MoextendError, match="state.json does not name its data_files"):
        files_of(str(mixed))


def test_images_are_looked_for_beside_the_file_or_where_the_setting_says(tmp_path: Path):
    write_pictures(tmp_path / "own" / "images")
    own = as_json(tmp_path / "own" / "a.json", lambda n: {"image": names(n), "conversations": turns(n)})
    assert read(open_dataset(str(own), data_dir=tmp_path / "built"))[1][2] == [picture(1)]
    write_pictures(tmp_path / "other")
    for n in ROWS:
        (tmp_path / "other" / f"{n}.png").write_bytes(picture(6))
    both = [open_dataset(str(own), data_dir=tmp_path / "built", images=tmp_path / at) for at in ("other", "own")]
    assert [read(source)[1][2] for source in both] == [[picture(6)], [picture(1)]]
    assert both[0].fingerprint == both[1].fingerprint
    assert both[0].images.fingerprint != both[1].images.fingerprint


def test_a_folder_of_images_that_is_not_there_is_named(tmp_path: Path):
    own = as_json(tmp_path / "a.json", lambda n: {"image": names(n), "conversations": turns(n)})
    with pytest.raises(MoextendError, match="there is no folder .*pictrues of images; --images names it"):
        open_dataset(str(own), data_dir=tmp_path / "built", images=tmp_path / "pictrues")


def test_images_are_looked_for_beside_each_of_several_files(tmp_path: Path):
    """As Hugging Face's ImageFolder has them; where the setting says, names are below its folder alone."""
    home, data = tmp_path / "train", str(tmp_path / "train")
    for n, (folder, name, at) in enumerate(
        (("cats", "1.png", "1.png"), ("dogs", "1.png", "1.png"), ("fish", "at/1.png", "images/at/1.png"))
    ):
        (home / folder / at).parent.mkdir(parents=True)
        write(home / folder / at, picture(n))
        write(home / folder / "metadata.jsonl", json.dumps({"id": folder, "file_name": name, "text": "a"}))
    source = open_dataset(data, data_dir=tmp_path / "built")
    assert [images for *_, images in read(source)] == [[picture(0)], [picture(1)], [picture(2)]]
    assert [ref.key for row in source for ref in row.images] == ["cats/1.png", "dogs/1.png", "fish/at/1.png"]
    (report,) = checked(data)
    assert (report.images, report.counts) == (3, {})
    write_pictures(tmp_path / "other")
    (tmp_path / "other" / "at").mkdir()
    write(tmp_path / "other" / "at" / "1.png", picture(1))
    source = open_dataset(data, data_dir=tmp_path / "built", images=tmp_path / "other")
    assert [images for *_, images in read(source)] == [[picture(1)]] * 3
    (report,) = checked(data, images=tmp_path / "other")
    assert (report.images, report.counts) == (2, {})
    with pytest.raises(Fault, match="image https://a/b.png is a URL"):
        write(home / "dogs" / "metadata.jsonl", json.dumps({"file_name": "https://a/b.png", "text": "a"}))
        open_dataset(data, data_dir=tmp_path / "built")


def test_links_that_the_user_laid_are_followed_when_told(tmp_path: Path):
    """LLaVA's five folders are usually links to where the pictures are."""
    write_pictures(tmp_path / "disk")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "coco").symlink_to(tmp_path / "disk")
    keep = FaultSettings(policies={"outside": "keep"})
    for name in ("coco/1.png", "../disk/1.png", str(tmp_path / "disk" / "1.png")):
        own = as_json(tmp_path / "own" / "a.json", lambda n, name=name: {"image": name, "caption": "a"})
        with pytest.raises(Fault, match="outside to keep"):
            open_dataset(str(own), data_dir=tmp_path / "built")
        source = open_dataset(str(own), data_dir=tmp_path / "built", faults=keep)
        assert read(source)[1][2] == [picture(1)], name


# --- upright ----------------------------------------------------------------------------------------------------------


def lying(orientation: int) -> bytes:
    """Red above blue once it is turned, saved as a telephone saves it."""
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8, :, 0], upright[8:, :, 2] = 255, 255
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    image = Image.fromarray(upright)
    image = image.transpose(back[orientation]) if orientation in back else image
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 99])
def test_pictures_of_telephones_are_upright(orientation: int):
    image = decode_image(lying(orientation))
    assert image.size == (8, 16)
    top, bottom = np.asarray(image)[2, 4], np.asarray(image)[-3, 4]
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]
    assert decode_image(lying(6), upright=False).size == (16, 8)


def test_own_data_are_turned_and_llavas_are_as_released(tmp_path: Path):
    (tmp_path / "1.jpg").write_bytes(lying(6))
    sizes = {}
    for data, name in [("llava_instruct", "llava_v1_5_mix665k.json"), (str(tmp_path / "own.json"), "own.json")]:
        as_json(tmp_path / name, lambda n: {"image": "1.jpg", "conversations": talk("<image>", "b")})
        source = open_dataset(data, data_dir=tmp_path / "built", manual_dir=tmp_path)
        sizes[name] = source.images.decoded(0).item.size, source.images.fingerprint
    assert [size for size, _ in sizes.values()] == [(16, 8), (8, 16)]
    assert len({fingerprint for _, fingerprint in sizes.values()}) == 2


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_is_spelt_with_commas_and_weights(tmp_path: Path):
    assert parts_of("a.json:0.7,b.parquet:0.3") == [Part("a.json", 0.7), Part("b.parquet", 0.3)]
    assert parts_of("easy_vqa/questions") == [Part("easy_vqa/questions")]
    assert parts_of("gs://b/x-{0,1}.tar:2, c.csv:1") == [Part("gs://b/x-{0,1}.tar", 2), Part("c.csv", 1)]
    assert parts_of("gs://b/a.json,a:b.json") == [Part("gs://b/a.json"), Part("a:b.json")]
    odd = write(tmp_path / "a,b.json:3", "[]")
    assert parts_of(str(odd)) == [Part(str(odd))]
    long = [f"{'x' * 200}/{n}.json" for n in range(30)]  # longer than any path
    assert parts_of(",".join(long)) == list(map(Part, long))
    assert parts_of(",".join(f"{name}:2" for name in long)) == [Part(name, 2) for name in long]
    for text, message in [
        ("a:1,b", "give every data set a weight, or none"), ("a,,b", "empty name"), (":3", "empty name"),
        ("a:0", "a weight must be above 0"), ("a:nan", "above 0"), ("a:inf", "above 0"), ("", "no data is named"),
    ]:  # fmt: skip
        with pytest.raises(MoextendError, match=message):
            parts_of(text)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.json of six rows and b.csv of two, whose pictures have the same names and are others."""
    to = tmp_path_factory.mktemp("two")
    write_pictures(to / "a")
    as_json(to / "a" / "a.json", lambda n: {"image": names(n), "conversations": turns(n)})
    (to / "b").mkdir()
    (to / "b" / "b.csv").write_text("question,answer,image\n0,b,0.png\n1,b,1.png\n")
    for n in (0, 1):
        (to / "b" / f"{n}.png").write_bytes(picture(n + 2))
    return to


def test_files_without_weights_are_read_one_after_the_other(two: Path):
    a, b = (open_dataset(str(two / name), data_dir=two / "built") for name in ("a/a.json", "b/b.csv"))
    both = open_dataset(f"{two}/a/a.json,{two}/b/b.csv", data_dir=two / "built")
    assert read(both) == read(a) + read(b) and len(both) == 8
    assert [example.id for example in both.read([7, 0, 6])] == ["1", "row0", "0"]
    assert read(pickle.loads(pickle.dumps(both))) == read(both)
    keys = {ref.key for example in both for ref in example.images}
    assert len(keys) == len(both.images) == len(a.images) + len(b.images)
    assert len({source.fingerprint for source in (a, b, both)}) == 3
    assert len({source.images.fingerprint for source in (a, b, both)}) == 3
    kept, rest = hold_out(both, samples=3, seed=0)
    assert sorted(read(kept) + read(rest)) == sorted(read(both))


def test_weights_are_shares_of_conversations(two: Path):
    mixed = open_dataset(f"{two}/a/a.json:1,{two}/b/b.csv:3", data_dir=two / "built")
    counts = Counter(example.id for example in mixed)
    assert {id: counts[id] for id in ("0", "1")} == {"0": 9, "1": 9} and set(counts.values()) == {1, 9}
    halves = [Counter(len(example.id) for example in mixed.read(range(start, start + 12))) for start in (0, 12)]
    assert halves == [{1: 9, 4: 3}] * 2  # evenly alternating
    again = open_dataset(f"{two}/a/a.json:0.25,{two}/b/b.csv:0.75", data_dir=two / "built")
    assert read(again) == read(mixed)
    kept, rest = hold_out(mixed, samples=2, seed=1)
    assert len(kept) == 2 and not {row.id for row in kept} & {row.id for row in rest}
    assert hold_out(mixed, samples=2, seed=1).rest.fingerprint == rest.fingerprint
    with pytest.raises(MoextendError, match="cannot hold out 8 of 8 rows"):
        hold_out(mixed, samples=8, seed=0)


def test_a_mixture_goes_on_where_it_stood(two: Path):
    mixed = open_dataset(f"{two}/a/a.json:1,{two}/b/b.csv:1", data_dir=two / "built")
    whole = batch_arrays(mixed, seed=3)
    assert (whole["examples_Bg"] >= 0).sum() == 12 and whole["media/image"].any()
    made = batches(
        mixed, stage=StageSettings(data="x", steps=1, batch_size=2, length=64, images_per_row=3),
        tokenizer=load_tokenizer(BASE), recipe=RECIPES["paper"],
        readers={"image": tiny.pictures(mixed.images)}, seed=3,
    )  # fmt: skip
    iterator = iter(made)
    next(iterator)
    state, wanted = iterator.get_state(), [next(iterator).ids_BL for _ in range(8)]
    other = iter(made)
    other.set_state(state)
    np.testing.assert_array_equal([next(other).ids_BL for _ in range(8)], wanted)


def test_every_row_comes_at_least_once_and_no_epoch_is_endless():
    for sizes, weights in [((5,), (2.0,)), ((7, 3, 11), (1.0, 1.0, 1.0)), ((4, 100), (0.9, 0.1)), ((1, 1), (1, 1e-3))]:
        rows = picks(sizes, weights, names=[""] * len(sizes))
        assert set(rows) == set(range(sum(sizes)))
        ends = np.cumsum(sizes)
        counts = np.array([np.sum((rows >= end - size) & (rows < end)) for size, end in zip(sizes, ends, strict=True)])
        np.testing.assert_allclose(counts / len(rows), np.array(weights) / sum(weights), atol=1 / len(rows))
        repeats = np.unique(rows, return_counts=True)[1]
        for size, end in zip(sizes, ends, strict=True):
            assert np.ptp(repeats[end - size : end]) <= 1
    with pytest.raises(MoextendError, match="b.csv has 1000000 rows and a share of 1e-06"):
        picks((10, 10**6), (1, 1e-6), names=["a.json", "b.csv"])


def test_faults_of_a_mixture_are_those_of_its_files(two: Path, tmp_path: Path):
    (tmp_path / "c.jsonl").write_text('{"question": "a", "answer": "b", "image": "none.png"}\n{"a": 1}\n')
    with pytest.raises(Fault, match=r"c.jsonl: 2 faults: .*entry 1 .*no image none.png"):
        open_dataset(f"{two}/b/b.csv,{tmp_path}/c.jsonl", data_dir=tmp_path)
    skip = FaultSettings(policies={"entry": "skip", "missing": "skip"}, most_skipped=1.0)
    both = open_dataset(f"{two}/b/b.csv,{tmp_path}/c.jsonl", data_dir=tmp_path, faults=skip)
    made = batches(
        both, stage=StageSettings(data="x", steps=1, batch_size=4, length=64), tokenizer=load_tokenizer(BASE),
        recipe=RECIPES["paper"], readers={"image": tiny.pictures(both.images)}, seed=None,
        epochs=1, faults=skip,
    )  # fmt: skip
    (batch,) = made
    store = cache_features(
        tiny.pictures(both.images), path=tmp_path / "features", compute=lambda x: x.reshape(len(x), 4, -1), tower="t",
        faults=skip,
    )  # fmt: skip
    assert [store.row(ref.key) for example in both.read([0, 1]) for ref in example.images] == [0, 1]
    with pytest.raises(Fault, match="no image none.png"):
        store.row(both[2].images[0].key)
    assert batch.faults_BG.sum() == 6 and [row[0] for row in batch.examples_Bg] == [0, 1, -1, -1]


def test_folders_of_features_have_names_of_their_own():
    assert short_name("easy_vqa/questions", "train[:9]") == "easy_vqa-train"
    assert short_name("llava_instruct", "train") == "llava_instruct-train"
    own = [short_name(data, "train") for data in ("a/data.json", "b/data.json", "gs://x/y z-{0..2}.tar:3,b.csv:1")]
    assert own[0].startswith("data-") and own[2].startswith("y-z-0-2-") and len(set(own)) == 3
    assert not any(set(name) & set("/:{}, ") for name in own)


# --- data check -------------------------------------------------------------------------------------------------------


def checked(data: str, **more: Any) -> list[Report]:
    reading = Reading(stages=("align",), data=data, split=more.pop("split", "train"), length=64, images_per_row=2)
    return check(
        [reading],
        open_origin=lambda one: open_origin(one, data_dir=Path("none"), images=more.get("images")),
        work=Work(tokenizer=load_tokenizer(BASE), recipe=RECIPES["paper"], media=tiny.seeing()),
        faults=STRICT,
        processes=more.get("processes", 0),
    )


def test_the_check_reads_every_form(tmp_path: Path, pictures: Path):
    for n, (form, make) in enumerate(FORMS.items()):
        (tmp_path / str(n)).mkdir()
        (report,) = checked(str(make(tmp_path / str(n))), images=pictures)
        tarred = "web" in form or form == "pattern"
        assert (report.error, report.counts, report.rows) == (None, {}, 6), form
        assert report.images == 5 + tarred and report.ok(STRICT), form


def test_what_a_mixture_would_skip_is_judged_in_all(tmp_path: Path):
    """As a run counts it: by its weights, and of at least a thousand."""
    reading = Reading(stages=("align",), data="x", split="train", length=64)
    skip = FaultSettings(policies={"entry": "skip"}, most_skipped=0.01)
    good, bad = (Report(reading=reading, rows=rows, skipped=skipped) for rows, skipped in ((1990, 0), (10, 10)))
    assert good.ok(skip) and not bad.ok(skip)  # every one of it
    for data, fine in (("a.json,b.json", True), ("a.json:0.99,b.json:0.01", True), ("a.json:0.98,b.json:0.02", False)):
        _weigh(data, [good, bad])
        assert (good.ok(skip), bad.ok(skip)) == (fine, fine), data


@pytest.mark.parametrize("processes", [0, 1])
def test_the_check_names_bad_pictures_wherever_they_are(tmp_path: Path, processes: int, monkeypatch):
    monkeypatch.setattr("moextend_jax.data.check.ITEMS", 2)
    monkeypatch.setattr("moextend_jax.data.check.ROWS", 4)
    bad = {2: lying(6)[:-200], 4: b"<html>"}
    row = lambda n: {"id": f"row{n}", "question": "a", "answer": "b", "image": bad.get(n, picture(n))}  # noqa: E731
    pq.write_table(pa.Table.from_pylist([row(n) for n in ROWS]), tmp_path / "a.parquet")
    members = {}
    for n in ROWS:
        members |= {f"row{n}.png": row(n)["image"], f"row{n}.txt": b"c"}
    tar(tmp_path / "a.tar", members.items())
    reports = checked(f"{tmp_path}/a.parquet:1,{tmp_path}/a.tar:2", processes=processes)
    assert [report.reading.data for report in reports] == [f"{tmp_path}/a.parquet", f"{tmp_path}/a.tar"]
    for report in reports:
        assert (report.rows, report.images, report.skipped) == (6, 6, 0)
        assert {kind: [one.entry for one in first] for kind, first in report.first.items()} == {
            "truncated": [2], "not_image": [4]
        }  # fmt: skip
    (sliced,) = checked(f"{tmp_path}/a.tar", split="train[5:]", processes=processes)
    assert (sliced.rows, sliced.images, sliced.counts) == (1, 1, {})
    skip = FaultSettings(policies={"truncated": "skip", "not_image": "skip"}, most_skipped=1.0)
    for name in ("a.parquet", "a.tar"):
        source = open_dataset(str(tmp_path / name), data_dir=tmp_path / "built", faults=skip)
        assert [read_or_kind(source, n) for n in ROWS] == [None, None, "truncated", None, "not_image", None]


def read_or_kind(source: Source, n: int) -> str | None:
    try:
        source.images.decoded(source[n].images[0].row)
    except Fault as fault:
        return fault.kind
    return None


def test_a_mixture_that_cannot_be_opened_is_a_report_each():
    reports = checked("none/a.json,none/b.json")
    assert [report.reading.data for report in reports] == ["none/a.json", "none/b.json"]
    assert all("no data set" in (report.error or "") for report in reports)
    (report,) = checked("a.json:0,b.json")
    assert "a weight must be above 0" in (report.error or "")
