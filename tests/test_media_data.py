"""Sounds, videos and features in data sets: the same examples from every form, the same built files for images alone,
each fault found, refused or skipped."""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import media_files as files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import HEARD, KINDS_OF_OTHERS, PICTURED, TOUCHED, WATCHED

from moextend_jax.config import RECIPES, ImageTags, Medium, MoextendError, Named
from moextend_jax.data.batches import batches
from moextend_jax.data.builders import Built
from moextend_jax.data.check import Report, check, open_origin
from moextend_jax.data.datasets import Source, open_dataset
from moextend_jax.data.entries import ItemName, read_entries
from moextend_jax.data.inspector import Reading, Work
from moextend_jax.data.measure import measure
from moextend_jax.data.readers import Inputs
from moextend_jax.data.splitting import hold_out_pictures, marks_of
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.faults import KINDS, STRICT, Fault
from moextend_jax.settings import FaultSettings, StageSettings

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
DEPTH = dataclasses.replace(TOUCHED, mark="<features:depth>")
SPEECH = dataclasses.replace(HEARD, mark="<audio:speech>")
MEDIA: Named[Medium] = Named(
    {
        name: dataclasses.replace(medium, tags=ImageTags(start=5, end=6, pad=pad))
        for name, medium, pad in [("image", PICTURED, 3), ("audio", HEARD, 17), ("video", WATCHED, 18),
                                  ("depth", DEPTH, 19), ("speech", SPEECH, 20)]
    }
)  # fmt: skip
TOKENIZER = dataclasses.replace(load_tokenizer(BASE), others=MEDIA)
SKIP = FaultSettings(policies=cast(Any, dict.fromkeys(KINDS, "skip")), most_skipped=1.0)


# --- four conversations -----------------------------------------------------------------------------------------------


FILES = {
    "0.wav": files.sound(seconds=0.3), "1.flac": files.sound("FLAC", seconds=0.8), "2.ogg": files.sound("OGG"),
    "0.gif": files.video(), "1.png": files.video("PNG", count=1), "2.npz": files.npz(a=files.features(4)),
}  # fmt: skip
ROWS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"audio": "0.wav", "video": ["0.gif"]}, [("video", "0.gif"), ("audio", "0.wav")]),
    ({"audio": ["1.flac", "0.wav"], "image": "1.png"}, [("image", "1.png"), ("audio", "1.flac"), ("audio", "0.wav")]),
    ({"features": {"depth": "2.npz"}, "audio": {"speech": ["2.ogg"]}}, [("speech", "2.ogg"), ("depth", "2.npz")]),
    ({}, []),
]
"""What each row names, and its items in order."""


def question(n: int) -> str:
    return "".join(f"{MEDIA[medium].mark}\n" for medium, _ in ROWS[n][1]) + f"what is {n}?"


def turns(n: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": question(n)}, {"from": "gpt", "value": f"it is {n}"}]


def row(n: int, **more: Any) -> dict[str, Any]:
    return {"id": f"row{n}", **more}


def as_lines(to: Path, rows: list[dict[str, Any]]) -> Path:
    (to / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return to / "a.jsonl"


def llava(to: Path) -> Path:
    return as_lines(to, [row(n, conversations=turns(n), **named) for n, (named, _) in enumerate(ROWS)])


def unmarked(to: Path) -> Path:
    return as_lines(
        to, [row(n, question=f"what is {n}?", answer=f"it is {n}", **named) for n, (named, _) in enumerate(ROWS)]
    )


def part_of(medium: str, name: str) -> dict[str, Any]:
    """Of each kind another of its spellings."""
    kind = MEDIA[medium].kind
    if name == "0.wav":
        data = base64.b64encode(FILES[name]).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    if name == "1.flac":
        return {"type": "audio_url", "audio_url": {"url": name}}
    return {"type": kind, kind: {medium: name} if medium in ("depth", "speech") else name}


def in_parts(to: Path) -> Path:
    talks = []
    for n, (_, items) in enumerate(ROWS):
        content = [*(part_of(*item) for item in items), {"type": "text", "text": f"what is {n}?"}]
        answer = {"role": "assistant", "content": f"it is {n}"}
        talks.append(row(n, messages=[{"role": "user", "content": content}, answer]))
    return as_lines(to, talks)


def as_csv(to: Path) -> Path:
    fields = ("image", "video", "audio", "features")
    lines = ["\t".join(("id", "question", "answer", *fields))]
    for n, (named, _) in enumerate(ROWS):
        cells = [named.get(field, "") for field in fields]
        texts = [cell if isinstance(cell, str) else json.dumps(cell).replace('"', '""') for cell in cells]
        lines.append("\t".join((f"row{n}", f"what is {n}?", f"it is {n}", *(f'"{text}"' for text in texts))))
    (to / "a.tsv").write_text("\n".join(lines))
    return to / "a.tsv"


def parquet_of_bytes(to: Path) -> Path:
    """As Hugging Face's Image and Audio features have them."""
    rows = []
    for n, (_, items) in enumerate(ROWS):
        held = {
            medium: [{"bytes": FILES[name], "path": None} for of, name in items if of == medium] for medium in MEDIA
        }
        columns = {"image": held["image"], "video": held["video"], "audio": held["audio"] or None}
        speech = {"speech": held["speech"]} if held["speech"] else None
        rows.append(row(n, conversations=turns(n), features={"depth": held["depth"]}, **columns) | {"audio_path": None}
                    | ({} if speech is None else {"audio": None, "audio_file": speech}))  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{"audio_file": None, **row} for row in rows]), to / "a.parquet")
    return to / "a.parquet"


def shard(to: Path) -> Path:
    members = {}
    for n, (named, items) in enumerate(ROWS):
        members |= {f"row{n}.{name}": FILES[name] for _, name in items}
        renamed = json.loads(json.dumps(named).replace('"0.', f'"row{n}.0.').replace('"1.', f'"row{n}.1.')
                             .replace('"2.', f'"row{n}.2.'))  # fmt: skip
        members[f"row{n}.json"] = json.dumps({"conversations": turns(n), **renamed}).encode()
    return files.tar(to / "a.tar", members.items())


FORMS: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "question and answer": unmarked,
    "parts": in_parts,
    "tsv": as_csv,
    "parquet of bytes": parquet_of_bytes,
    "webdataset": shard,
}


def read(source: Source) -> list[Any]:
    return [
        (example.id, example.conversations, [(ref.medium, source.items[ref.medium][ref.row].encoded)
                                             for ref in example.items])
        for example in source
    ]  # fmt: skip


WANTED = [
    (f"row{n}", turns(n), sorted((medium, FILES[name]) for medium, name in items)) for n, (_, items) in enumerate(ROWS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items")
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


def opened(path: Path | str, to: Path, **more: Any) -> Source:
    return open_dataset(str(path), data_dir=to / "built", **cast(Any, {"media": MEDIA} | more))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_or_holds_items_of_every_medium(form: str, tmp_path: Path, folder: Path):
    source = pickle.loads(pickle.dumps(opened(FORMS[form](tmp_path), tmp_path, images=folder)))
    found = read(source)
    assert [(id, talk) for id, talk, _ in found] == [(id, talk) for id, talk, _ in WANTED]
    # Items of one medium stand in the order of their marks.
    assert [sorted(items) for *_, items in found] == [items for *_, items in WANTED]
    assert [data for medium, data in found[1][2] if medium == "audio"] == [FILES["1.flac"], FILES["0.wav"]]
    assert {name: len(items) for name, items in source.items.items()} == {
        "image": 1, "audio": 2 + (form == "webdataset"), "video": 1, "depth": 1, "speech": 1,
    }  # fmt: skip
    assert read(opened(FORMS[form](tmp_path), tmp_path, images=folder)) == found  # built already


def inputs(source: Source) -> dict[str, Inputs]:
    return {name: Inputs(items=source.items[name], medium=MEDIA[name], preparation="pad") for name in MEDIA}


STAGE = StageSettings(
    data="x", steps=1, batch_size=2, length=64, images_per_row=1, items_per_row=dict.fromkeys([*MEDIA][1:], 2)
)


def made(source: Source, **more: Any) -> list[Any]:
    options: dict[str, Any] = {"stage": STAGE, "seed": None, "epochs": 1} | more
    return list(batches(source, tokenizer=TOKENIZER, recipe=RECIPES["paper"], readers=inputs(source), **options))


LONG = dataclasses.replace(STAGE, length=256)


def test_batches_hold_what_towers_take_and_spans_that_cover_the_sounds(tmp_path: Path, folder: Path):
    source = opened(llava(tmp_path), tmp_path, images=folder)
    (first, second) = made(source, stage=LONG)
    assert first.media["audio"].shape == (2, 2, 8, 200) and first.media["video"].shape[2:] == (4, 16, 16, 3)
    assert first.features["depth"].shape == (2, 2, 5, 6) and (second.features["depth"][0, 0] != 0).any()
    pads = [[int((batch.ids_BL[b] == MEDIA[name].tags.pad).sum()) for name in MEDIA] for batch in (first, second)
            for b in range(2)]  # fmt: skip
    # 0.3 s are 15 positions, which 25 cover; 0.8 s are 40, which only 100 do.
    assert pads == [[0, 25, 16, 0, 0], [4, 125, 0, 0, 0], [0, 0, 0, 5, 25], [0, 0, 0, 0, 0]]
    of = measure(source, stage=LONG, tokenizer=TOKENIZER, recipe=RECIPES["paper"], media=MEDIA, faults=STRICT)
    assert of.tokens_n.tolist() == [
        int((batch.segments_BL[b] > 0).sum()) for batch in (first, second) for b in range(2)
    ]


# --- images alone -----------------------------------------------------------------------------------------------------


def test_data_of_images_alone_are_built_as_before_there_were_other_media(tmp_path: Path):
    """Recorded from the code of before: work directories go on with what they have built."""

    def url(n: int) -> str:
        return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes([n]) * 9).decode()

    talk = [{"from": "human", "value": "<image>\na?"}, {"from": "gpt", "value": "b"}]
    rows = [
        {"id": "one", "image": url(1), "conversations": talk},
        {"id": "two", "image": [url(2), url(1)], "conversations": talk},
        {"id": "text", "conversations": [dict(talk[0], value="é?"), talk[1]]},
        {"id": "one", "image": url(3), "conversations": talk},
        {"id": "bad", "image": url(1)},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    skip = FaultSettings(policies={"entry": "skip"})
    source = open_dataset(str(tmp_path / "a.json"), data_dir=tmp_path / "built", faults=skip)
    assert source.fingerprint == "7fcdb344e02c85bae2aa3c7620ae8d1bfcda68deac3c60c7f87f2f41e29fcf68"
    assert source.images.fingerprint == "0df270f1eb091426c88fd0ab57dd226bf7ea00591dfa0a628777e7e8d88192cf"
    (home,) = (tmp_path / "built").glob("*/conversations")
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith(".")) == ["conversations", "images"]
    (features,) = (home / "conversations").glob("1.2.0/features.json")
    names = json.loads(features.read_text())["featuresDict"]["features"]
    assert sorted(names) == ["conversations", "id", "image_rows", "images"]
    notes = json.loads((home / "conversations" / "1.2.0" / "metadata.json").read_text())["train"]
    assert notes.keys() == {"fingerprint", "faults", "stored"}
    # A run of more media reads its pictures under the same names, and caches of them stay.
    more = opened(tmp_path / "a.json", tmp_path, faults=skip)
    assert (more.fingerprint, more.images.fingerprint) == (source.fingerprint, source.images.fingerprint)


def test_other_items_count_in_the_fingerprint(tmp_path: Path, folder: Path):
    prints = set()
    for n, audio in enumerate(("0.wav", "1.flac", {"speech": "0.wav"})):
        (tmp_path / f"{n}").mkdir()
        path = as_lines(tmp_path / f"{n}", [{"id": 1, "question": "a", "answer": "b", "audio": audio}])
        prints.add(opened(path, tmp_path, images=folder).fingerprint)
    assert len(prints) == 3


# --- mixtures and splits ----------------------------------------------------------------------------------------------


def test_a_mixture_keeps_the_items_of_each_apart(tmp_path: Path, folder: Path):
    one = unmarked(tmp_path)
    (tmp_path / "b").mkdir()
    other = as_lines(tmp_path / "b", [{"id": "s", "question": "a", "answer": "b", "audio": "2.ogg", "image": "1.png"}])
    mixed = opened(f"{one}:1,{other}:1", tmp_path, images=folder)
    found = read(mixed)
    last = ("s", [{"from": "human", "value": "<image>\n<audio>\na"}, {"from": "gpt", "value": "b"}],
            [("image", FILES["1.png"]), ("audio", FILES["2.ogg"])])  # fmt: skip
    assert found.count(last) == 4 and [item for item in found if item != last] == read(
        opened(one, tmp_path, images=folder)
    )
    audio = mixed.items["audio"]
    keys = [ref.key for example in mixed for ref in example.items if ref.medium == "audio"]
    assert set(keys) == {"0/0.wav", "0/1.flac", "1/2.ogg"} == {audio.decoded(n, HEARD).key for n in range(3)}
    assert [audio.span(n, HEARD) for n in range(3)] == [25, 100, 25]


def test_no_sound_is_on_both_sides_of_a_split(tmp_path: Path, folder: Path):
    rows = [{"id": n, "question": "a", "answer": "b", "audio": f"{n % 3}.x"} for n in range(9)]
    skip = FaultSettings(policies={"missing": "skip"})
    source = opened(as_lines(tmp_path, rows), tmp_path, images=folder, faults=skip)
    for seed in range(5):
        held_out, rest = hold_out_pictures(source, part=4, seed=seed, setting="x")
        assert len(held_out) == 3 and set(marks_of(held_out)).isdisjoint(marks_of(rest))


# --- media that the run does not have ---------------------------------------------------------------------------------


def test_an_item_of_no_medium_of_the_run_is_named(tmp_path: Path, folder: Path):
    path = llava(tmp_path)
    images = Named({"image": PICTURED})
    message = (
        r"(entry 0 .id row0.|example row0) has an item '<video>', and the run has no such medium; there are image <im"
    )
    for _ in range(2):  # not built, and built by others
        with pytest.raises(Fault, match=message) as caught:
            opened(path, tmp_path, images=folder, media=images)
        assert (caught.value.kind, caught.value.id) == ("unknown_medium", "row0")
        skip = FaultSettings(policies={"unknown_medium": "skip"})
        source = opened(path, tmp_path, images=folder, media=images, faults=skip)
        assert [example.fault and example.fault.kind for example in source] == ["unknown_medium"] * 3 + [None]
        assert [len(example.items) for example in source] == [0, 1, 0, 0]
    audio = Named({"audio": HEARD})  # nor need there be images
    rows = [{"id": 1, "question": "a", "answer": "b", "audio": "0.wav"}]
    (tmp_path / "b").mkdir()
    source = opened(as_lines(tmp_path / "b", rows), tmp_path, images=folder, media=audio)
    assert read(source)[0][2] == [("audio", FILES["0.wav"])]


def test_a_name_from_the_data_becomes_no_path(tmp_path: Path, folder: Path):
    rows = [{"id": 1, "question": "a", "answer": "b", "audio": {"../../../x": "0.wav", "a\0\x1b[2J": "0.wav"}}]
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    with pytest.raises(Fault, match="unknown|no such medium") as caught:
        opened(as_lines(inner, rows), inner, images=folder)
    assert str(caught.value).isprintable()
    opened(as_lines(inner, rows), inner, images=folder, faults=SKIP)
    assert [path.name for path in (tmp_path).iterdir()] == ["a"] and [
        path.name for path in (tmp_path / "a").iterdir()
    ] == ["b"]


# --- faults -----------------------------------------------------------------------------------------------------------


class Plant(NamedTuple):
    kind: str
    field: str
    name: str
    data: bytes | None


PLANTS = [
    Plant("missing", "audio", "none.wav", None),
    Plant("empty_file", "audio", "empty.wav", b""),
    Plant("empty_file", "audio", "silent.wav", files.sound(samples=files.wave(0.1)[:0])),
    Plant("truncated", "audio", "cut.flac", files.sound("FLAC")[:-30]),
    Plant("truncated", "video", "cut.webp", files.video("WEBP")[:-30]),
    Plant("unreadable", "features", "extra.npy", files.npy(files.features()) + b"x"),
    Plant("oversized", "audio", "hour.flac", files.sound("FLAC", samples=np.zeros(3601 * 1000, "f4"), rate=1000)),
    Plant("not_finite", "audio", "nan.wav", files.sound(samples=files.wave(0.1) * np.float32("nan"), subtype="FLOAT")),
    Plant("not_finite", "features", "nan.npz", files.npz(a=files.features() * np.float32("nan"))),
    Plant("not_sound", "audio", "page.wav", b"<html>not found</html>"),
    Plant("not_video", "video", "film.mp4", b"\0\0\0\x18ftypmp42" + bytes(99)),
    Plant("not_features", "features", "page.npz", b"<html>not found</html>"),
    Plant("wrong_shape", "features", "wide.npz", files.npz(a=files.features(width=7))),
    Plant("long_sound", "audio", "long.ogg", files.sound("OGG", seconds=2.2)),
    Plant("url", "audio", "https://example.org/a.wav", None),
    Plant("outside", "audio", "/etc/hostname", None),
    Plant("marks", "audio", "", None),
]  # fmt: skip
WITH_FEATURES = MEDIA.replacing("features", dataclasses.replace(TOUCHED, tags=ImageTags(start=5, end=6, pad=21)))


def test_every_kind_of_fault_of_other_media_is_planted():
    assert {plant.kind for plant in PLANTS} >= KINDS_OF_OTHERS


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound row after each faulty one."""
    to = tmp_path_factory.mktemp("faulty")
    rows = []
    for n, plant in enumerate(PLANTS):
        if plant.data is not None:
            (to / plant.name).write_bytes(plant.data)
        named = {plant.field: plant.name} if plant.name else {}
        mark = f"<{plant.field}>"
        rows.append({"id": f"bad{n}", "conversations": turns_of(mark), **named})
        rows.append({"id": f"good{n}", "conversations": turns_of("<audio>"), "audio": "0.wav"})
    (to / "0.wav").write_bytes(FILES["0.wav"])
    as_lines(to, rows)
    return to


def turns_of(mark: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{mark}\nwhat?"}, {"from": "gpt", "value": "a"}]


def checked(data: Path | str, to: Path, faults: FaultSettings = SKIP) -> Report:
    tokenizer = dataclasses.replace(TOKENIZER, others=WITH_FEATURES)
    reading = Reading(stages=("finetune",), data=str(data), split="train", length=256)
    (report,) = check(
        [reading],
        open_origin=lambda one: open_origin(one, data_dir=to, faults=faults),
        work=Work(tokenizer=tokenizer, recipe=RECIPES["paper"], media=WITH_FEATURES),
        faults=faults,
        processes=0,
    )
    return report


def counts_of(*, without: str = "") -> dict[str, int]:
    kinds = [plant.kind for plant in PLANTS if plant.kind != without]
    return {kind: kinds.count(kind) for kind in kinds}


def test_the_check_finds_each_and_its_file(faulty: Path, tmp_path: Path):
    report = checked(faulty / "a.jsonl", tmp_path)
    assert dict(report.counts) == counts_of() and report.skipped == len(PLANTS)
    assert report.items == {"<audio>": 11, "<video>": 2, "<features>": 4}
    for n, plant in enumerate(PLANTS):
        names = [one.id for one in report.first[plant.kind]]
        assert (plant.name or f"bad{n}") in names, plant
    assert "no sound none.wav in" in report.first["missing"][0].message
    keep = dataclasses.replace(SKIP, policies={**SKIP.policies, "long_sound": "keep"})
    assert dict(checked(faulty / "a.jsonl", tmp_path, keep).counts) == counts_of(without="long_sound")


@pytest.mark.parametrize("policy", ["skip", "keep"])
def test_what_is_skipped_costs_its_own_row_alone(faulty: Path, tmp_path: Path, policy: Any):
    """Two seconds of a longer sound are heard where the user says so."""
    faults = dataclasses.replace(SKIP, policies={**SKIP.policies, "long_sound": policy})
    source = opened(faulty / "a.jsonl", tmp_path, media=WITH_FEATURES, faults=faults)
    readers = {name: Inputs(items=source.items[name], medium=medium, preparation="pad")
               for name, medium in WITH_FEATURES.items()}  # fmt: skip
    tokenizer = dataclasses.replace(TOKENIZER, others=WITH_FEATURES)
    stage = dataclasses.replace(STAGE, length=128, items_per_row={name: 1 for name in readers if name != "image"})
    made = list(
        batches(
            source, stage=stage, tokenizer=tokenizer, recipe=RECIPES["paper"], readers=readers, seed=None, epochs=1,
            faults=faults,
        )
    )  # fmt: skip
    skipped = np.concatenate([batch.faults_BG[:, 1:] for batch in made])
    wanted = counts_of(without="long_sound" if policy == "keep" else "")
    assert {kind: count for kind, count in zip(KINDS, skipped.sum(axis=0).tolist(), strict=True) if count} == wanted
    empty = [not row.any() for batch in made for row in batch.segments_BL]
    assert empty == [
        n % 2 == 0 and (policy == "skip" or PLANTS[n // 2].kind != "long_sound") for n in range(len(empty))
    ]
    if policy == "skip":
        with pytest.raises(MoextendError, match=r"2\.20 seconds are more than the 2 that are heard"):
            next(ref for example in source for ref in example.items if ref.key == "long.ogg" and
                 source.items["audio"].decoded(ref.row, HEARD))  # fmt: skip


def test_what_a_medium_takes_is_in_the_fingerprint_of_its_items(faulty: Path, tmp_path: Path):
    keep = dataclasses.replace(SKIP, policies={**SKIP.policies, "long_sound": "keep"})
    sources = [
        opened(faulty / "a.jsonl", tmp_path, media=WITH_FEATURES, faults=faults) for faults in (SKIP, keep, SKIP)
    ]
    prints = [source.items["audio"].fingerprint for source in sources]
    assert prints[0] == prints[2] != prints[1]
    for medium in WITH_FEATURES.keys() - {"audio"}:  # of which nothing is cut
        assert len({source.items[medium].fingerprint for source in sources}) == 1, medium


def test_sounds_of_packages_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stored = {"id": b"train/0", "image": files.sound("OGG", seconds=2.2), "span": b""}
    monkeypatch.setattr("moextend_jax.data.datasets.open_built", lambda *_, **__: Built([stored], [], "made", 1))
    keep = dataclasses.replace(SKIP, policies={**SKIP.policies, "long_sound": "keep"})
    skips, keeps = (opened("spoken_words", tmp_path, faults=faults).items["speech"] for faults in (SKIP, keep))
    assert (keeps.span(0, SPEECH), keeps.decoded(0, SPEECH).key) == (100, "train/0")
    assert skips.fingerprint == "made" != keeps.fingerprint
    with pytest.raises(Fault, match="more than the 2 that are heard"):
        skips.span(0, SPEECH)


def test_the_check_skips_of_a_package_what_a_run_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Rows(list):
        def __getitems__(self, rows: list[int]) -> list[Any]:
            return [self[row] for row in rows]

    talk = {"turns": turns_of("<speech>"), "items": [["<speech>", "train/0", 0]]}
    row = {"id": b"train/0", "conversations": json.dumps(talk), "images": [], "image_rows": []}
    built = Built(Rows([row]), [], "made", 0, {"<speech>": "train/0"})
    monkeypatch.setattr("moextend_jax.data.datasets.open_built", lambda *_, **__: built)
    report = checked("spoken_words", tmp_path)
    assert (report.error, report.counts, report.skipped) == (None, {"unknown_medium": 1}, 1)


def test_items_of_shards_by_their_suffix(tmp_path: Path):
    """Where no JSON names any; what a suffix cannot say, JSON does."""
    talk = json.dumps({"conversations": turns_of("<video>")})
    members = {
        "a.flac": FILES["1.flac"], "a.txt": b"a tone", "b.npz": FILES["2.npz"], "b.question.txt": b"q",
        "b.answer.txt": b"a", "c.gif": FILES["0.gif"], "c.json": talk.replace("{", '{"video": "c.gif", ', 1).encode(),
        "d.mp4": b"", "e.mp3": b"", "f.json": b"[" * 900 + b"]" * 900,
        "g.wav": FILES["0.wav"], "g.json": b'{"audio": {"a": ' * 300 + b"1" + b"}" * 600, "g.txt": b"x",
    }  # fmt: skip
    entries = dict(zip("abcdefg", read_entries(files.tar(tmp_path / "a.tar", members.items())), strict=True))
    marks = {id: [item.mark for item in entry.items] for id, entry in entries.items()}
    assert marks["a"] == ["<audio>"] and marks["b"] == ["<features>"] and marks["c"] == ["<video>"]
    assert entries["a"].turns[0]["value"] == "<audio>\nDescribe the sound."
    assert "convert it to an animation (.webp)" in str(entries["d"].fault)
    assert "convert it to .flac" in str(entries["e"].fault)
    assert isinstance(entries["a"].items[0], ItemName) and entries["a"].contents
