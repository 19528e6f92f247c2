"""Each fault of data, planted in a small data set: found by the check, refused by policy, or skipped and counted."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import tiny
from media_files import KINDS_OF_OTHERS
from PIL import Image
from tiny import few

from moextend_jax.config import IGNORE, RECIPES, Batch, MoextendError
from moextend_jax.data import item_files, json_values
from moextend_jax.data.batches import Share, batches
from moextend_jax.data.check import _Pool, check, open_origin
from moextend_jax.data.datasets import Example, open_dataset
from moextend_jax.data.entries import read_entries
from moextend_jax.data.features import cache_features
from moextend_jax.data.inspector import ItemFile, Reading, Work
from moextend_jax.data.item_files import Facts, StorageError, find_file, read_file
from moextend_jax.data.readers import Features
from moextend_jax.data.shards import Span
from moextend_jax.data.shared_memory import no_bus_error
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.evaluate.questions import question_of
from moextend_jax.faults import KINDS, STRICT, Fault, check_share, counts, named
from moextend_jax.media.image import decode_image, prepare_image
from moextend_jax.settings import POLICIES, FaultSettings, Policy, StageSettings

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
TOKENIZER = load_tokenizer(BASE)
JSON, PATCHES, LENGTH, IMAGES_PER_ROW = "llava_v1_5_mix665k.json", 4, 64, 3
INVALID = "a byte that is wrong"
SKIP = FaultSettings(policies=cast(Any, dict.fromkeys(KINDS, "skip")), most_skipped=1.0)


def skip_but(kind: str, policy: Policy) -> FaultSettings:
    return dataclasses.replace(SKIP, policies={**SKIP.policies, kind: policy})


# --- the data set -----------------------------------------------------------------------------------------------------


def picture(shade: int, *, format: str = "PNG", mode: str = "RGB", size=(8, 8)) -> bytes:
    file = io.BytesIO()
    if mode == "F":
        Image.fromarray(np.array([[1.0, np.nan], [0, 2]], np.float32)).save(file, "TIFF")
    else:
        Image.new(mode, size, (shade, 0, 0)).save(file, format)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def entry(n: int) -> dict[str, Any]:
    """Even ones show an image."""
    talk = [
        {"from": "human", "value": "<image>\n" * (n % 2 == 0) + "what is it?"},
        {"from": "gpt", "value": f"row {n}"},
    ]
    return {"id": f"row{n}", "conversations": talk} | ({"image": f"{n}.png"} if n % 2 == 0 else {})


def shows(name: str):
    def plant(one: dict[str, Any], file: Path) -> None:
        one["image"] = name

    return plant


def holds(data: bytes):
    return lambda one, file: file.write_bytes(data)


def says(turn: int, **change: Any):
    return lambda one, file: one["conversations"][turn].update(change)


def other(**change: Any):
    return lambda one, file: one.update(change)


def links_out(one: dict[str, Any], file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/hostname")


def is_folder(one: dict[str, Any], file: Path) -> None:
    file.unlink()
    file.mkdir()


class Plant(NamedTuple):
    """`at` is the entry; `id` is what names the fault, "" for the entry's own id."""

    kind: str
    at: int
    do: Any
    id: str = ""


def four_images(one: dict[str, Any], file: Path) -> None:
    one["conversations"][0]["value"] = "<image>" * 4
    one["image"] = ["0.png"] * 4


PLANTS = [
    Plant("missing", 2, shows("none.png"), "none.png"),
    Plant("outside", 4, shows("/etc/hostname"), "/etc/hostname"),
    Plant("outside", 6, shows("../other.png"), "../other.png"),
    Plant("outside", 8, links_out, "8.png"),
    Plant("url", 10, shows("https://example.org/a.png"), "https://example.org/a.png"),
    Plant("unreadable", 12, is_folder, "12.png"),
    Plant("empty_file", 14, holds(b""), "14.png"),
    Plant("truncated", 16, holds(picture(9, size=(64, 64), format="JPEG")[:-200]), "16.png"),
    Plant("oversized", 18, holds(png_header(60_000, 60_000)), "18.png"),
    Plant("not_image", 20, holds(b"<html>not found</html>"), "20.png"),
    Plant("not_finite", 22, holds(picture(0, mode="F")), "22.png"),
    Plant("entry", 1, other(conversations="hello")),
    Plant("encoding", 3, says(0, value=INVALID)),
    Plant("encoding", 5, says(1, value="half of a pair: \ud83d")),
    Plant("reserved", 7, says(0, value="a\0b")),
    Plant("turn", 9, says(1, value=None)),
    Plant("roles", 11, says(1, **{"from": "narrator"})),
    Plant("order", 13, says(0, **{"from": "gpt"})),
    Plant("empty_answer", 15, says(1, value=" \n")),
    Plant("marks", 17, says(0, value="<image> what?")),
    Plant("too_long", 19, says(1, value="word " * LENGTH)),
    Plant("too_many_images", 24, four_images),
    Plant("duplicate_id", 21, other(id="row0"), "row0"),
    Plant("unknown_medium", 23, other(audio="a.wav")),
]  # fmt: skip
ROWS = 40
LATE = ("truncated", "oversized", "not_image", "not_finite")
"""Kinds that show only when the image is decoded."""


def test_every_kind_is_planted():
    assert {plant.kind for plant in PLANTS} == set(KINDS) - KINDS_OF_OTHERS  # which test_media_data.py has
    assert len({plant.at for plant in PLANTS}) == len(PLANTS) < ROWS


def write(folder: Path, plants: list[Plant]) -> Path:
    (folder / "images").mkdir(parents=True)
    rows = [entry(n) for n in range(ROWS)]
    for n in range(0, ROWS, 2):
        (folder / "images" / f"{n}.png").write_bytes(picture(n))
    for plant in plants:
        plant.do(rows[plant.at], folder / "images" / f"{plant.at}.png")
    text = json.dumps(rows).encode().replace(INVALID.encode(), INVALID.encode() + b"\xff")
    (folder / JSON).write_bytes(text)
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return write(tmp_path_factory.mktemp("faulty"), PLANTS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound"), [])


def open_folder(folder: Path, faults: FaultSettings):
    return open_dataset("llava_instruct", data_dir=folder / "built", manual_dir=folder, faults=faults)


def tower(images_nhwc):
    n = images_nhwc.shape[0]
    return images_nhwc.reshape(n, PATCHES, -1, 3)[:, :, 0] + 1


def cached(folder: Path, faults: FaultSettings) -> Features:
    inputs = tiny.pictures(open_folder(folder, faults).images)
    store = cache_features(inputs, path=folder / "c", compute=tower, faults=faults, tower="t")
    return Features(store=store, medium=inputs.medium)


def make(folder: Path, faults: FaultSettings, *, kind: str = "pixels", stage: StageSettings | None = None, **more: Any):
    source = open_folder(folder, faults)
    files = tiny.pictures(source.images) if kind == "pixels" else cached(folder, faults)
    return batches(
        source,
        stage=stage or stage_of(),
        tokenizer=TOKENIZER,
        recipe=RECIPES["paper"],
        readers={"image": files},
        faults=faults,
        **cast(Any, {"epochs": 1} | more),
    )


def stage_of(conversations_per_row: int = 1, **more: Any) -> StageSettings:
    rows: dict[str, Any] = {"length": LENGTH, "batch_size": 4, "images_per_row": IMAGES_PER_ROW}
    return StageSettings(data="llava_instruct", steps=1, conversations_per_row=conversations_per_row, **(rows | more))


def assert_same(one: Batch, two: Batch) -> None:
    ours, theirs = tiny.by_field(one), tiny.by_field(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def totals(faults_BG) -> dict[str, int]:
    return dict(zip(("read", *KINDS), faults_BG.sum(axis=0).tolist(), strict=True))


def planted(*kinds: str) -> dict[str, int]:
    return {kind: sum(plant.kind == kind for plant in PLANTS) for kind in kinds or KINDS}


# --- found ------------------------------------------------------------------------------------------------------------


def run_check(folder: Path, *, processes: int = 0, faults: FaultSettings = SKIP, **change: Any):
    work = Work(tokenizer=TOKENIZER, recipe=RECIPES["paper"], media=tiny.seeing())
    reading: dict[str, Any] = {
        "stages": ("finetune",), "data": "llava_instruct", "split": "train", "length": LENGTH,
        "images_per_row": IMAGES_PER_ROW,
    }  # fmt: skip
    (report,) = check(
        [Reading(**(reading | change))],
        open_origin=lambda one: open_origin(one, data_dir=folder / "built", manual_dir=folder),
        work=work,
        faults=faults,
        processes=processes,
    )
    return report


@pytest.mark.parametrize("processes", [0, 1])
def test_the_check_finds_each_with_its_place_and_name(faulty, processes: int, monkeypatch):
    monkeypatch.setattr("moextend_jax.data.check.ROWS", 7)
    monkeypatch.setattr("moextend_jax.data.check.ITEMS", 3)
    report = run_check(faulty, processes=processes)
    assert report.counts == Counter(planted()) and report.rows == ROWS and report.skipped == len(PLANTS)
    for plant in PLANTS:
        assert (plant.at, plant.id or f"row{plant.at}") in [one[:2] for one in report.first[plant.kind]], plant
    assert report.ok(SKIP)
    assert report.ok(dataclasses.replace(SKIP, most_skipped=0.03))  # of a thousand, as a run counts
    assert not report.ok(dataclasses.replace(SKIP, most_skipped=0.02))
    for kind in KINDS:
        assert report.ok(skip_but(kind, "error")) == (kind in KINDS_OF_OTHERS), kind


def test_the_check_of_sound_data_finds_nothing(sound):
    report = run_check(sound)
    assert report.ok(STRICT) and not report.counts and (report.rows, report.images) == (ROWS, ROWS // 2)


def test_the_check_keeps_to_the_split(faulty):
    report = run_check(faulty, split="train[25:]+train[:1]")
    assert report.ok(STRICT) and report.rows == ROWS - 24
    assert run_check(faulty, split="train[:2]").counts == {"entry": 1}
    assert "no split" in (run_check(faulty, split="test").error or "")


def test_questions_are_held_against_the_length_of_a_prompt(sound):
    text = len(TOKENIZER.encode("[INST] what is it? [/INST]")) + 1
    shown = len(TOKENIZER.encode_continued("\nwhat is it? [/INST]")) + len(TOKENIZER.encode("[INST]")) + 1 + PATCHES + 2
    assert run_check(sound, parts="prompt", length=shown).ok(STRICT) and shown > text
    report = run_check(sound, parts="prompt", length=shown - 1)
    assert report.counts == {"too_long": ROWS // 2} and report.ok(SKIP) and not report.ok(STRICT)


def test_a_question_is_asked_with_its_own_pictures_alone(tmp_path):
    """As a run asks it: without those of later questions."""

    def asks_on(one: dict[str, Any], file: Path) -> None:
        one["image"] = [*([one["image"]] if "image" in one else []), "2.png"]
        one["conversations"] += [{"from": "human", "value": "and <image>?"}, {"from": "gpt", "value": "so"}]

    folder = write(tmp_path, [Plant("marks", at, asks_on) for at in (0, 1)])
    report = run_check(folder, parts="prompt", length=LENGTH)
    assert report.ok(STRICT) and report.rows == ROWS, report.first


def test_a_file_that_is_not_json_ends_only_its_own_report(tmp_path):
    (tmp_path / JSON).write_text(json.dumps([entry(1)])[:-2])
    report = run_check(tmp_path)
    assert "is not JSON" in (report.error or "") and not report.ok(SKIP)
    (tmp_path / JSON).unlink()
    assert "no file" in (run_check(tmp_path).error or "")


class Deadly(NamedTuple):
    """An image file that ends the process that reads it, as a bug in a decoder would."""

    def read(self, name: str, noun: str) -> bytes:
        if name == "deadly":
            os._exit(11)
        return picture(1)


@pytest.mark.slow
def test_a_decoder_that_crashes_is_a_fault_of_the_image():
    from moextend_jax.data.check import Task

    found = []
    work = Work(tokenizer=TOKENIZER, recipe=RECIPES["paper"], media=tiny.seeing(), files={"f": Deadly()})
    names = [[ItemFile("<image>", name) for name in task] for task in (["a"], ["b", "deadly", "c"])]
    with _Pool(work, 1) as pool:
        pool.run(
            [
                Task("items", some, "f", lambda new, some=some: found.extend((some, one) for one in new))
                for some in names
            ]
        )
    ((some, one),) = found
    assert (some[one.place].name, one.kind) == ("deadly", "unreadable")


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.kind}-{plant.at}")
def test_the_policy_error_refuses_and_names_it(faulty, plant: Plant):
    faults = skip_but(plant.kind, "error")
    names = {one.id or f"row{one.at}" for one in PLANTS if one.kind == plant.kind}
    with pytest.raises(Fault) as caught:
        list(make(faulty, faults, seed=None))
    assert caught.value.kind == plant.kind and caught.value.id in names
    assert caught.value.id in str(caught.value)


def test_refused_before_anything_is_built(tmp_path):
    write(tmp_path, PLANTS)
    with pytest.raises(Fault, match=r"10 faults: .*entry 1 .*is no conversation.*; and 7 more"):
        open_folder(tmp_path, STRICT)
    assert not (tmp_path / "built").exists()


def test_the_library_is_strict_unless_told(faulty, sound):
    assert STRICT.can_skip is False and next(iter(make(sound, STRICT))).faults_BG is None
    with pytest.raises(Fault):
        open_dataset("llava_instruct", data_dir=faulty / "built", manual_dir=faulty)


@pytest.mark.slow
def test_a_fault_in_a_worker_process_stays_what_it_is(faulty):
    faults = skip_but("truncated", "error")
    with pytest.raises(Exception, match=r"cannot read image 16.png as an image"):
        list(make(faulty, faults, workers=1))


# --- skipped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "features"])
@pytest.mark.parametrize("seed", [None, 3])
def test_skipped_rows_are_empty_and_all_others_as_they_were(faulty, sound, kind: str, seed: int | None):
    ours, theirs = (tiny.joined(make(folder, SKIP, kind=kind, seed=seed)) for folder in (faulty, sound))
    bad = ours.faults_BG[:, 1:].any(axis=1)
    assert bad.sum() == len(PLANTS) and totals(ours.faults_BG) == {"read": ROWS} | planted()
    assert totals(theirs.faults_BG) == {"read": ROWS} | dict.fromkeys(KINDS, 0)
    fed = [tiny.by_field(batch._replace(faults_BG=None, examples_Bg=None)) for batch in (ours, theirs)]
    assert len(fed[0]) == 6 and fed[0].keys() == fed[1].keys()
    for name, a in fed[0].items():
        np.testing.assert_array_equal(a[~bad], fed[1][name][~bad], err_msg=name)
        empty = {"labels_BL": IGNORE, "places_BL": -1}.get(name, 0)
        assert (a[bad] == empty).all(), name
    assert sorted(ours.examples_Bg[~bad].ravel()) == sorted(set(range(ROWS)) - {plant.at for plant in PLANTS})
    assert (ours.examples_Bg[bad] == -1).all()
    if seed is None:
        assert np.flatnonzero(bad).tolist() == sorted(plant.at for plant in PLANTS)


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_packed_rows_lose_only_the_conversations_themselves(faulty, sound, kind: str, monkeypatch):
    monkeypatch.setattr("moextend_jax.data.batches.WINDOW", 16)
    more = {"kind": kind, "stage": stage_of(0, length=96, conversation_length=LENGTH), "seed": 1}
    ours, theirs = (tiny.joined(make(folder, SKIP, **more)) for folder in (faulty, sound))
    assert totals(ours.faults_BG) == {"read": ROWS} | planted()
    bad = {plant.at for plant in PLANTS}
    assert answers(ours) == sorted(set(range(ROWS)) - bad) and answers(theirs) == list(range(ROWS))
    assert sorted(ours.examples_Bg[ours.examples_Bg >= 0]) == answers(ours)
    given = ours.media["image"] if kind == "pixels" else ours.features["image"]
    used = np.zeros(given.shape[:2], bool)
    for row, slots in enumerate(ours.places_BL):
        used[row, np.unique(slots[slots >= 0]) // PATCHES] = True
    assert used.sum() == sum(n % 2 == 0 for n in set(range(ROWS)) - bad)
    assert (given[~used] == 0).all() and (np.abs(given[used]).max(axis=tuple(range(1, given.ndim - 1))) > 0).all()


def answers(batch: Batch) -> list[int]:
    found = []
    for labels_L in batch.labels_BL:
        said = TOKENIZER.pieces.decode([int(id) for id in labels_L[labels_L != IGNORE] if id != TOKENIZER.eos])
        found += [int(number) for number in said.split("row")[1:]]
    return sorted(found)


def test_an_image_that_turns_out_bad_leaves_its_place_and_moves_nothing(tmp_path):
    """Packed; the picture shows only when decoded, so that the row keeps a gap with its neighbours unchanged."""
    late = [plant for plant in PLANTS if plant.kind in LATE]
    more: dict[str, Any] = {"stage": stage_of(0, length=96, conversation_length=LENGTH)}
    ours, theirs = (
        tiny.joined(make(write(tmp_path / name, some), SKIP, **more)) for name, some in (("a", late), ("b", []))
    )
    assert totals(ours.faults_BG) == {"read": ROWS} | dict.fromkeys(KINDS, 0) | planted(*LATE)
    changed = ours.segments_BL != theirs.segments_BL
    assert changed.sum() > 0 and (ours.segments_BL[changed] == 0).all() and (ours.labels_BL[changed] == IGNORE).all()
    for name in ("ids_BL", "labels_BL", "positions_BL", "segments_BL", "places_BL"):
        np.testing.assert_array_equal(getattr(ours, name)[~changed], getattr(theirs, name)[~changed], err_msg=name)
    rows = changed.any(axis=1)
    assert (ours.segments_BL[rows] > 0).any()  # neighbours in the same row stay
    np.testing.assert_array_equal(rows, ours.faults_BG[:, 1:].any(axis=1))


@pytest.mark.parametrize("conversations_per_row", few([1, 0]))
def test_workers_and_resumed_runs_skip_the_same(faulty, conversations_per_row):
    more: dict[str, Any] = {"stage": stage_of(conversations_per_row), "epochs": 2, "seed": 5}
    wanted = list(make(faulty, SKIP, **more))
    if not conversations_per_row:  # the slower and the harder one
        assert_same(tiny.joined(make(faulty, SKIP, workers=2, **more)), tiny.joined(wanted))
    for stop in (1, len(wanted) // 2):
        dataset = make(faulty, SKIP, **more)
        iterator = iter(dataset)
        for _ in range(stop):
            next(iterator)
        again = iter(dataset)
        again.set_state(json.loads(json.dumps(iterator.get_state())))
        assert_same(tiny.joined(list(again)), tiny.joined(wanted[stop:]))


def test_hosts_together_skip_what_one_skips(faulty):
    more: dict[str, Any] = {"seed": 5, "epochs": 2}
    alone = [totals(batch.faults_BG) for batch in make(faulty, SKIP, **more)]
    parts = [make(faulty, SKIP, share=Share((n,), 2), **more) for n in range(2)]
    both = [totals(np.concatenate([a.faults_BG, b.faults_BG])) for a, b in zip(*parts, strict=True)]
    assert both == alone


def test_duplicate_ids_are_kept_by_default(faulty):
    keeps = skip_but("duplicate_id", "keep")
    batch = tiny.joined(make(faulty, keeps, seed=None))
    assert batch.labels_BL[21].max() > 0 and totals(batch.faults_BG)["duplicate_id"] == 0
    assert FaultSettings().policies["duplicate_id"] == STRICT.policies["duplicate_id"] == "keep"


def test_without_images_only_text_counts(faulty):
    source = open_folder(faulty, SKIP)
    found = tiny.joined(
        batches(
            source, stage=stage_of(0), tokenizer=TOKENIZER, recipe=RECIPES["paper"], readers={},
            epochs=1, faults=SKIP,
        )
    )  # fmt: skip
    assert totals(found.faults_BG) == {"read": ROWS} | {
        kind: 0 if KINDS[kind].file or kind in ("too_many_images", "marks") else count
        for kind, count in planted().items()
    }


@pytest.mark.parametrize("conversations_per_row", [1, 0])
def test_data_that_are_skipped_whole_are_an_error(tmp_path, conversations_per_row, monkeypatch):
    monkeypatch.setattr("moextend_jax.data.batches.WINDOW", 8)
    rows = [{**entry(n), "conversations": []} for n in range(ROWS)]
    (tmp_path / JSON).write_text(json.dumps([{"id": row["id"], "conversations": []} for row in rows]))
    with pytest.raises(MoextendError, match="all of 40 conversations tried are skipped: 40 order; there is no data"):
        next(iter(make(tmp_path, SKIP, epochs=None, stage=stage_of(conversations_per_row))))


@pytest.mark.parametrize("conversations_per_row", [1, 0])
def test_windows_and_batches_that_are_skipped_whole_are_passed(tmp_path, conversations_per_row, monkeypatch):
    monkeypatch.setattr("moextend_jax.data.batches.WINDOW", 8)
    rows = [{"id": n, "conversations": entry(1)["conversations"] if n == 30 else []} for n in range(ROWS)]
    (tmp_path / JSON).write_text(json.dumps(rows))
    found = tiny.joined(make(tmp_path, SKIP, stage=stage_of(conversations_per_row), seed=None))
    assert answers(found) == [1] and totals(found.faults_BG) == {"read": ROWS} | dict.fromkeys(KINDS, 0) | {"order": 39}


# --- the cache of features --------------------------------------------------------------------------------------------


def test_a_cache_notes_bad_images_and_a_mended_one_is_made_again(tmp_path):
    write(tmp_path, [plant for plant in PLANTS if plant.kind == "truncated"])
    source = open_folder(tmp_path, SKIP)
    settings: dict[str, Any] = {"path": tmp_path / "c", "tower": "t", "compute": tower}
    inputs = tiny.pictures(source.images)
    store = cache_features(inputs, faults=SKIP, **settings)
    noted = json.loads((tmp_path / "c" / "cache.json").read_text())["faults"]
    assert (
        {key: fault[1] for key, fault in noted.items()}
        == {"16.png": "truncated"}
        == {key: fault.kind for key, fault in store.faults.items()}
    )
    assert (store.features_nPC[store.rows["16.png"]] == 0).all() and store["14.png"].min() > -2
    with pytest.raises(Fault, match="16.png"):
        store.row("16.png")
    with pytest.raises(Fault, match="16.png"):
        cache_features(inputs, faults=STRICT, **settings)
    mended = write(tmp_path / "mended", [])
    store = cache_features(tiny.pictures(open_folder(mended, SKIP).images), faults=SKIP, **settings)
    assert not store.faults and (store["16.png"] != 0).any()


def test_what_training_skips_is_not_asked_either(faulty):
    """Whatever is wrong with a conversation, but for its length; pictures are looked at where they are read."""
    source = open_folder(faulty, SKIP)
    kinds = {}
    for n, example in enumerate(source):
        try:
            question_of(example, tokenizer=TOKENIZER)
        except Fault as fault:
            kinds[n] = fault.kind
    late = ("too_long", "too_many_images", "duplicate_id")
    assert kinds == {plant.at: plant.kind for plant in PLANTS if not KINDS[plant.kind].file and plant.kind not in late}
    sound = question_of(source[4], tokenizer=TOKENIZER)
    assert [sound.text, sound.answer] == [turn["value"] for turn in source[4].conversations]
    longer = [{"from": role, "value": text} for role, text in zip(("human", "gpt") * 2, "abcd", strict=True)]
    assert question_of(Example("x", longer, ()), tokenizer=TOKENIZER) == ("a", "b", "", {})


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_a_picture_that_was_mended_is_read_again(tmp_path, kind: str):
    """Whether it was missing, empty or cut off; and the check and training say the same, before and after."""
    plants = [plant for plant in PLANTS if plant.kind in ("missing", "empty_file", "truncated")]
    write(tmp_path, plants)
    wanted = planted("missing", "empty_file", "truncated")
    assert run_check(tmp_path).counts == wanted
    skipped = totals(tiny.joined(make(tmp_path, SKIP, kind=kind)).faults_BG)
    assert skipped == {"read": ROWS} | dict.fromkeys(KINDS, 0) | wanted
    for plant in plants:
        (tmp_path / "images" / plant.id).write_bytes(picture(plant.at))
    assert not run_check(tmp_path).counts
    rows = tiny.joined(make(tmp_path, SKIP, kind=kind, seed=None))
    assert rows.faults_BG[:, 1:].sum() == 0
    given = rows.media["image"] if kind == "pixels" else rows.features["image"]
    assert all((given[plant.at, 0] != 0).any() for plant in plants)
    make(tmp_path, STRICT, kind=kind)


# --- paths and files --------------------------------------------------------------------------------------------------


def test_nothing_outside_the_folder_is_opened(tmp_path, monkeypatch):
    inside = tmp_path / "root"
    (inside / "images" / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(picture(1))
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "images" / "sub" / "up").symlink_to(tmp_path)
    (inside / "images" / "ok.png").write_bytes(picture(2))
    (inside / "images" / "within.png").symlink_to("ok.png")
    opened = []
    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *more, **options: opened.append(self) or plain(self, *more, **options)
    )
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "sub/up/secret.png",
        "images/../../secret.png",
    ):
        with pytest.raises(Fault) as caught:
            read_file(inside, name)
        assert caught.value.kind == "outside" and not opened, name
    for name in ("ok.png", "images/ok.png", "within.png"):
        assert read_file(inside, name) == picture(2)


def test_the_image_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(picture(1))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "disk")
    assert read_file(tmp_path / "root", "a.png") == read_file(tmp_path / "root", "images/a.png") == picture(1)


def test_names_that_no_file_can_have(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, kind in [
        ("a\0b", "unreadable"), ("x" * 300, "unreadable"), ("pipe.png", "unreadable"), ("loop.png", "unreadable"),
        ("data:image/png;base64,AAAA", "url"), ("s3://a/b.png", "url"), ("a.png/b.png", "missing"), (".", "unreadable"),
    ]:  # fmt: skip
        with pytest.raises(Fault) as caught:
            find_file(tmp_path, name)
        assert caught.value.kind == kind, name


def test_looking_at_many_files_finds_what_finding_each_does(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "away").mkdir()
    inside = tmp_path / "root"
    inside.mkdir()
    (inside / "images").symlink_to(tmp_path / "images")
    (inside / "linked").symlink_to(tmp_path / "away")
    for path in ("away/a.png", "images/a.png", "images/sub/b.png", "root/c.png"):
        (tmp_path / path).write_bytes(picture(1))
    (inside / "empty.png").touch()
    (inside / "link.png").symlink_to(tmp_path / "away" / "a.png")
    (inside / "within.png").symlink_to("c.png")
    (inside / "a:b").write_bytes(picture(1))
    names = [
        "a.png", "images/a.png", "sub/b.png", "c.png", "within.png", "a:b", "linked/a.png", "link.png", "empty.png",
        "none.png", "sub", ".", "../away/a.png", str(inside / "c.png"), "x" * 300, "a\0b", "c.png/d", "s3://a/b", "",
    ]  # fmt: skip
    for name, looked in zip(names, item_files.look(inside, names), strict=True):
        try:
            facts = find_file(inside, name).stat()
            assert looked == Facts(facts.st_size, facts.st_mtime_ns), name
        except Fault as fault:
            assert isinstance(looked, Fault) and (looked.kind, str(looked)) == (fault.kind, str(fault)), name


def test_a_picture_in_another_format_is_pointed_at(tmp_path):
    (tmp_path / "a.gif").write_bytes(picture(1, format="GIF"))
    with pytest.raises(Fault, match=r"no image a.jpg in .*; a.gif is there: convert it") as caught:
        find_file(tmp_path, "a.jpg")
    assert caught.value.kind == "missing"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    with pytest.raises(Fault, match="it is HEIC, .*convert it to JPEG") as caught:
        decode_image(heic)
    assert caught.value.kind == "not_image"


def test_names_that_this_process_cannot_spell_are_no_bad_pictures(tmp_path):
    """They would all be skipped; and the next run, in another terminal, would read them."""
    (tmp_path / "café.png").write_bytes(picture(1))
    program = f"from moextend_jax.data.item_files import *; find_file(Path({str(tmp_path)!r}), 'caf\\xe9.png')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "config.MoextendError: image 'caf\\xe9.png': names of files are ascii here" in done.stderr
    assert find_file(tmp_path, "café.png").is_file()


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), OSError(28, "No space left on device")])
def test_processes_that_cannot_start_name_shared_memory(sound, monkeypatch, error: OSError):
    def refused(*_: Any, **__: Any):
        raise error

    monkeypatch.setattr("multiprocessing.synchronize.Lock", refused)
    for start, instead in [
        (lambda: make(sound, STRICT, workers=1), "set workers = 0"),
        (lambda: run_check(sound, processes=1), "use --processes 0"),
    ]:
        with pytest.raises(MoextendError, match=f"need /dev/shm, .*{error.strerror}.*{instead}"):
            start()


def test_a_worker_that_finds_no_room_in_shared_memory_is_one_line():
    """In a container with the usual 64 MB a batch of pictures does not fit: the kernel ends the worker by SIGBUS."""
    grains = "Worker process was terminated unexpectedly with exit code {}. Search the logs above for the source."
    with pytest.raises(MoextendError, match=r"/dev/shm: make it larger .*workers = 0"), no_bus_error():
        raise RuntimeError(grains.format(-signal.SIGBUS))
    with pytest.raises(RuntimeError, match="-9"), no_bus_error():
        raise RuntimeError(grains.format(-signal.SIGKILL))


@pytest.mark.parametrize("inside", ["a folder", "an archive"])
def test_a_file_system_that_fails_is_asked_again_and_is_no_fault_of_a_file(tmp_path, monkeypatch, inside: str):
    """One host alone would skip the row, and a cache of features would leave the picture out for good."""
    (tmp_path / "a.png").write_bytes(picture(1))
    span = Span(str(tmp_path / "a.png"), 0, len(picture(1)), "a.png")
    read = (lambda: read_file(tmp_path, "a.png")) if inside == "a folder" else lambda: item_files.read_span(span)
    opened, pauses, errors = Path.open, [], []

    def fails(path: Path, *words: Any, **named: Any):
        if errors:
            raise errors.pop()
        return opened(path, *words, **named)

    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(item_files.time, "sleep", pauses.append)
    errors += [OSError(errno.ESTALE, "Stale file handle")] * 3
    assert read() == picture(1)
    assert len(pauses) == 3
    errors += [OSError(errno.EIO, "Input/output error")] * 4
    with pytest.raises(StorageError, match="a.png.*Input/output error"):
        read()
    errors += [OSError(errno.EACCES, "Permission denied")]
    with pytest.raises(Fault, match="a.png.*Permission denied"):
        read()


def test_a_large_file_is_never_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(item_files, "MOST_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    with pytest.raises(Fault, match="1001 bytes") as caught:
        read_file(tmp_path, "a.png")
    assert caught.value.kind == "oversized"
    monkeypatch.setattr(
        item_files, "find_file", lambda folder, name, **_: Path("/dev/zero")
    )  # grew after it was measured
    with pytest.raises(Fault, match="more than 1000") as caught:
        read_file(tmp_path, "a.png")
    assert caught.value.kind == "oversized"


@pytest.mark.parametrize("size", [(9_500, 9_500), (14_000, 14_000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_known_by_its_header(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(Fault) as caught:
        decode_image(png_header(*size), name="bomb", id="bomb")
    assert (caught.value.kind, caught.value.id) == ("oversized", "bomb")


@pytest.mark.parametrize("preparation", ["pad", "crop"])
def test_a_long_thin_picture_is_no_bomb_either(preparation):
    thin = Image.new("RGB", (60_000, 2 if preparation == "pad" else 1))
    with pytest.raises(Fault, match="too long and thin") as caught:
        prepare_image(thin, size=336, preparation=preparation, id="thin")
    assert caught.value.kind == "oversized"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_truncated(format: str):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format)
    whole = file.getvalue()
    for end in np.linspace(20, len(whole) - 40, 12).astype(int):
        with pytest.raises(Fault) as caught:
            decode_image(whole[:end])
        assert caught.value.kind == "truncated", end


def test_levels_of_sixteen_bits_keep_their_order():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 2**15, 2**16 - 1]], np.uint16)).save(file, "PNG")
    assert np.asarray(decode_image(file.getvalue()))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_an_animation_is_its_first_picture_and_transparency_no_warning():
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (50, 200)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(file.getvalue()))[..., 0].max() == 50
    file = io.BytesIO()
    Image.new("P", (4, 4), 3).save(file, "PNG", transparency=b"\0\1\2\3")
    assert decode_image(file.getvalue()).mode == "RGB"


# --- the JSON file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_entries_are_the_same_in_blocks_of_any_size(tmp_path, monkeypatch, block: int):
    monkeypatch.setattr(json_values, "BLOCK", block)
    rows = [{"id": f"é漢😀{n}", "conversations": [{"from": "human", "value": 'a"\\b é' * n}]} for n in range(6)]
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=1) + "\n"):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        got = list(read_entries(tmp_path / "a.json"))
        assert [(one.id, one.turns, one.fault) for one in got] == [
            (row["id"], row["conversations"], None) for row in rows
        ]


def test_invalid_utf8_is_named_by_its_byte(tmp_path):
    rows = [{"id": f"é{n}", "conversations": [{"from": "human", "value": "x"}]} for n in range(3)]
    data = json.dumps(rows, ensure_ascii=False).encode()
    at = [n for n, byte in enumerate(data) if data[n : n + 3] == b'"x"']
    (tmp_path / "a.json").write_bytes(data[: at[1] + 1] + b"\xff" + data[at[1] + 2 :])
    kinds = [one.fault and (one.fault.kind, str(one.fault)) for one in read_entries(tmp_path / "a.json")]
    assert kinds[0] is kinds[2] is None and kinds[1] is not None
    assert kinds[1][0] == "encoding" and f"not UTF-8 at byte {at[1] + 1}" in kinds[1][1] and "entry 1" in kinds[1][1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[{",
        '{"a": 1',
        '{"a": 1}, {"a": 1}',
        "[1,]",
        "[1 2]",
        "[1] x",
        "[tru]",
        "[" * 100_000,
        "[" + "9" * 5000 + "]",
        '["a',
        "nul",
    ],
)
def test_what_is_no_list_of_entries_is_one_clear_line(tmp_path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(MoextendError, match="a.json (is not JSON|holds no entries)"):
        list(read_entries(tmp_path / "a.json"))


def test_repeated_ids_are_all_counted(tmp_path):
    rows = [{"id": id, "conversations": []} for id in ("a", "b", "a", 1, "1", "a")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = [one.fault.kind if one.fault else None for one in read_entries(tmp_path / "a.json")]
    assert found == [None, None, "duplicate_id", None, "duplicate_id", "duplicate_id"]


# --- settings and counts ----------------------------------------------------------------------------------------------


def test_settings_name_every_kind_and_refuse_others():
    settings = FaultSettings(policies={"truncated": "error"})
    assert settings.policies == POLICIES | {"truncated": "error"} and list(settings.policies) == list(KINDS)
    for policies, message in [
        ({"torn": "skip"}, "policies.torn is no setting; there are .*, missing, "),
        ({"roles": "ignore"}, "policies.roles = 'ignore' is not one of 'error', 'skip'"),
        ({"roles": "keep"}, "policies.roles = 'keep' is not one of 'error', 'skip'"),
    ]:
        with pytest.raises(MoextendError, match=message):
            FaultSettings(policies=policies)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MoextendError, match="most_skipped = 2"):
        FaultSettings(most_skipped=2)


def test_the_share_has_a_limit():
    settings = FaultSettings(most_skipped=0.01)
    check_share(counts(["truncated"] * 10, read=10), settings)  # the first ones of a run
    check_share(counts(["truncated"] * 50, read=5000), settings)
    for kinds, read in [(["truncated"] * 11, 12), (["truncated"] * 50 + ["roles"], 5000)]:
        with pytest.raises(MoextendError, match=f"{len(kinds)} of {read} conversations were skipped"):
            check_share(counts(kinds, read=read), settings)
    # 24 conversations, 10 of them damaged, which the check lets pass, may be read for ever; with 11 the first time not.
    for read in range(1, 241):
        check_share(counts(["truncated"] * min(read, 10 * -(-read // 24)), read=read), settings, conversations=24)
    with pytest.raises(MoextendError, match="110 of 240 conversations were skipped"):
        check_share(counts(["truncated"] * 110, read=240), settings, conversations=24)
    assert named(counts(["truncated", "roles", "roles"], read=9)) == {
        "skipped": 3, "skipped/truncated": 1, "skipped/roles": 2,
    }  # fmt: skip


def test_a_fault_travels_between_processes():
    fault = pickle.loads(pickle.dumps(Fault("what", "roles", "row1")))
    assert (str(fault), fault.kind, fault.id) == ("what", "roles", "row1") and isinstance(fault, MoextendError)


def test_kinds_are_counted_in_the_tables_order():
    for n, kind in enumerate(KINDS):
        assert counts([kind])[1 + n] == 1
    assert list(itertools.chain(counts(read=3))) == [3, *[0] * len(KINDS)]
