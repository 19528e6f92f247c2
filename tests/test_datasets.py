import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
import tiny
from PIL import Image

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.data import builders, datasets
from moextend_jax.data.datasets import Source, check_shows, hold_out, open_dataset, open_text, select
from moextend_jax.data.easy_vqa import COLOURS, SHAPES
from moextend_jax.data.easy_vqa import caption as easy_caption
from moextend_jax.runs.data_of import open_in_step
from moextend_jax.settings import FaultSettings

TALK = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def open_llava(folder, entries, *, images=("a.png", "b.png")):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "llava_v1_5_mix665k.json").write_text(text)
    for shade, name in enumerate(images):
        Image.new("RGB", (3, 4), (shade, 0, 0)).save(folder / "images" / name)
    return open_dataset("llava_instruct", data_dir=folder / "built", manual_dir=folder)


@pytest.mark.slow
def test_easy_vqa_rows_and_images_belong_together(data_dir):
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, numbers = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    source = open_dataset("easy_vqa/questions", split="test", data_dir=data_dir)
    assert len(open_dataset("easy_vqa/questions", split="train[:2000]", data_dir=data_dir)) == 2000
    assert len(source) == len(questions) and len(source.images) == len(set(numbers))
    wanted = sorted(zip(numbers, questions, answers, strict=True))
    got = []
    for example in source.read(np.arange(0, len(source))):
        question, answer = (turn["value"] for turn in example.conversations)
        got.append((int(example.images[0].key.split("/")[1]), question.removeprefix("<image>\n"), answer))
    assert sorted(got) == wanted
    for example in (source[0], source[len(source) // 2], source[len(source) - 1]):
        (ref,) = example.images
        key, encoded = source.images[ref.row]
        assert key == ref.key
        with open(paths[int(key.split("/")[1])], "rb") as file:
            assert encoded == file.read()


def test_easy_vqa_conversations_and_captions(data_dir):
    pytest.importorskip("easy_vqa")
    talks = open_dataset("easy_vqa/conversations", split="test", data_dir=data_dir)
    assert len(talks) == 1000
    assert sum(len(talk.conversations) for talk in talks) == 2 * 9673
    assert all(str(talk.conversations).count("<image>") == 1 for talk in talks)
    for caption in open_dataset("easy_vqa/captions", split="test", data_dir=data_dir):
        words = caption.conversations[1]["value"].split()
        assert words[0] == "a" and set(words[1:]) <= SHAPES | COLOURS | {"shape"}


@pytest.mark.slow
def test_own_files_mix_with_a_packaged_data_set(data_dir, tmp_path):
    pytest.importorskip("easy_vqa")
    Image.new("RGB", (3, 4)).save(tmp_path / "a.png")
    (tmp_path / "own.csv").write_text("question,answer,image\na?,b,a.png\nc?,d,\n")
    with pytest.raises(MoextendError, match=r"data set .*own.csv has no split 'train\[:8\]'; .*; train has 2 rows"):
        open_dataset(f"{tmp_path}/own.csv", split="train[:8]", data_dir=data_dir)
    mixed = open_dataset(f"easy_vqa/questions:2,{tmp_path}/own.csv:1", split="train[:2]", data_dir=data_dir)
    assert [len(example.id) > 2 for example in mixed] == [True, False, True] * 2
    encoded = [mixed.images[ref.row].encoded for example in mixed.read([0, 1]) for ref in example.images]
    assert len(encoded) == 2 and encoded[1] == (tmp_path / "a.png").read_bytes() != encoded[0]


def test_captions_follow_from_the_questions():
    pytest.importorskip("easy_vqa")
    assert easy_caption([("is there a red shape?", "no"), ("what color is the triangle?", "blue")]) == "a blue triangle"
    assert easy_caption([("is there not a circle?", "no"), ("is no red shape present?", "yes")]) == "a circle"
    assert easy_caption([("what is the color of the shape?", "teal")]) == "a teal shape"
    assert easy_caption([("is there a circle?", "no")]) is None


def test_llava_rows(tmp_path):
    entries = [
        {"id": 7, "image": "a.png", "conversations": TALK},
        {"id": "text", "conversations": TALK},
        {"id": "two", "image": ["b.png", "a.png"], "conversations": TALK},
    ]
    source = open_llava(tmp_path, entries)
    assert [row.id for row in source] == ["7", "text", "two"]
    assert source[0].conversations == TALK and source[1].images == ()
    assert len(source.images) == 2  # a.png is stored once
    assert [source.images[ref.row].key for ref in source[2].images] == ["b.png", "a.png"]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_rows_in_order_are_read_a_chunk_at_a_time(tmp_path, monkeypatch):
    """The instructions are 665 thousand conversations; evaluation goes through all of them."""
    source = open_llava(tmp_path, [{"id": n, "conversations": TALK} for n in range(5)])
    read, chunks = datasets.Source.read, []
    monkeypatch.setattr(datasets, "CHUNK", 2)
    monkeypatch.setattr(datasets.Source, "read", lambda self, rows: chunks.append(len(rows)) or read(self, rows))
    assert [example.id for example in select(source, [4, 0, 1])] == ["4", "0", "1"]
    assert chunks == [2, 1]


@pytest.mark.slow
def test_who_comes_while_it_is_built_waits(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "conversations": TALK}]))
    call = f"open_dataset({str(tmp_path / 'a.json')!r}, data_dir={str(tmp_path)!r})"
    code = f"from moextend_jax.data.datasets import open_dataset; {call}"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(process.communicate()[1][-500:], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0] * 3, ends


def test_what_another_process_builds_just_before_one_looks_is_opened(tmp_path, monkeypatch):
    """The builder has looked before it was there, and has no splits."""
    tiny.shorten_easy_vqa(monkeypatch, train=3, test=2)
    early, other = (builders.packaged("easy_vqa", "questions", tmp_path) for _ in range(2))
    builders.build(other)
    assert len(builders.open_built(early, "train", name="easy_vqa").rows) == 3


def test_rows_of_several_splits_are_refused(tmp_path, monkeypatch):
    """Questions of the test split would be asked about pictures of the training split: each split counts its own."""
    tiny.shorten_easy_vqa(monkeypatch, train=3, test=2)
    with pytest.raises(MoextendError, match=r"'train\[:1\]\+test' is of several splits; take one, or slices of one"):
        open_dataset("easy_vqa/questions", split="train[:1]+test", data_dir=tmp_path)
    assert len(open_dataset("easy_vqa/questions", split="train[2:]+train[:1]", data_dir=tmp_path)) == 2


def test_building_and_opening_leave_nothing_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for _ in range(2):
        open_llava(tmp_path, [{"id": 1, "conversations": TALK}])
    assert not list((tmp_path / "temporary").iterdir())


def test_another_json_file_is_another_data_set(tmp_path):
    assert len(open_llava(tmp_path, [{"id": 1, "conversations": TALK}])) == 1
    assert len(open_llava(tmp_path, [{"id": n, "conversations": TALK} for n in (1, 2)])) == 2


def test_fingerprints_are_of_contents_wherever_and_whenever_they_were_written(tmp_path):
    entries = [{"id": n, "image": f"{'ab'[n % 2]}.png", "conversations": TALK} for n in range(6)]
    source = open_llava(tmp_path / "one", entries)
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("built"))  # keeps times
    (tmp_path / "two" / "llava_v1_5_mix665k.json").write_text(json.dumps(entries, indent=1))
    moved = open_dataset("llava_instruct", data_dir=tmp_path / "built", manual_dir=tmp_path / "two")
    assert (moved.fingerprint, moved.images.fingerprint) == (source.fingerprint, source.images.fingerprint)
    parts = [source, *hold_out(source, samples=2, seed=0), select(source, [1, 0]), select(source, [0, 1])]
    more = {"data_dir": tmp_path / "one" / "built", "manual_dir": tmp_path / "one"}
    parts.append(open_dataset("llava_instruct", split="train[:3]", **more))
    assert len({part.fingerprint for part in parts}) == 6
    entries[3]["conversations"] = [TALK[0], {"from": "gpt", "value": "B"}]
    edited = open_llava(tmp_path / "one", entries)
    assert edited.fingerprint != source.fingerprint


def test_other_pictures_of_the_same_names_sizes_and_times_have_another_fingerprint(tmp_path):
    entries = [{"id": 1, "image": "a.png", "conversations": TALK}]
    fingerprints = set()
    for name in ("cats", "dogs"):
        file = tmp_path / name / "images" / "a.png"
        open_llava(tmp_path / name, entries)
        file.write_bytes(name.encode())
        os.utime(file, ns=(0, 0))
        source = open_dataset("llava_instruct", data_dir=tmp_path, manual_dir=tmp_path / name)
        fingerprints.add((source.fingerprint, source.images.fingerprint))
    assert len({rows for rows, _ in fingerprints}) == 1 and len({images for _, images in fingerprints}) == 2


def test_lists_of_images_are_read_and_other_keys_named(tmp_path):
    talk = [{"from": "human", "value": "<image><image>a?"}, {"from": "gpt", "value": "b"}]
    source = open_llava(tmp_path, [{"id": 1, "images": ["b.png", "a.png"], "image": None, "conversations": talk}])
    assert [ref.key for ref in source[0].images] == ["b.png", "a.png"]
    for more, message in [
        ({"image_path": "a.png", "img": "b.png"}, "image_path and img name different pictures"),
        ({"image": "a.png", "video": "a.webp"}, "has an item '<video>', .* no such medium; there are image <image>"),
        ({"image": "a.png", "images": ["b.png"]}, "image and images name different pictures"),
        ({"images": {"a": 1}}, "must be a path or a list of paths, or bytes"),
    ]:
        with pytest.raises(MoextendError, match=f"entry 0 .*{message}"):
            open_llava(tmp_path, [{"id": 1, "conversations": TALK, **more}])
    same = {"id": 1, "image": "a.png", "images": ["a.png"], "image_url": "https://a/a.png", "audio": None}
    assert len(open_llava(tmp_path, [{**same, "conversations": TALK}])[0].images) == 1


def test_data_without_any_image_train_no_projector(tmp_path):
    text = {"id": 0, "conversations": TALK}
    source = open_llava(tmp_path, [text, {"id": 1, "image": "a.png", "conversations": TALK}])
    check_shows(source, medium="image", stage="align")
    for without in (select(source, [0]), open_llava(tmp_path / "text", [text])):
        with pytest.raises(MoextendError, match="align trains the projector, and none of its 1 conversations has an"):
            check_shows(without, medium="image", stage="align")
    with pytest.raises(MoextendError, match="none of its 2 conversations has an item of sound"):
        check_shows(source, medium="sound", stage="align:sound")


@pytest.mark.parametrize("data", ["llava_instruct", "{}/own.json,{}/own.json"])
def test_processes_that_do_not_read_the_same_files_are_told(tmp_path, monkeypatch, data: str):
    """Each would skip other conversations, and rows of one batch would be of two orders."""
    entries = [{"id": name, "image": f"{name}.png", "conversations": TALK} for name in "abc"]
    for own in ("llava_v1_5_mix665k.json", "own.json"):
        (tmp_path / own).write_text(json.dumps(entries))
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (3, 4)).save(tmp_path / "images" / f"{name}.png")
    faults = FaultSettings(policies={"missing": "skip"})
    told: list[str] = []

    def of_first(compute: Callable[[], str]) -> str:
        told.append(compute())
        return told[0]

    def open_here() -> Source:
        return open_in_step(
            data.format(tmp_path, tmp_path), split="train", data_dir=tmp_path / "built", manual_dir=tmp_path,
            faults=faults,
        )  # fmt: skip

    monkeypatch.setattr(distributed, "from_first", of_first)
    assert open_here().fingerprint == open_here().fingerprint
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(
        MoextendError, match=r"not every process can read the same files \(here \d cannot be read, first: miss"
    ):
        open_here()
    faults = FaultSettings()
    with pytest.raises(MoextendError, match=r"not every process .* \(here .*no image b.png"):  # it takes part, alone
        open_here()
    told.clear()
    with pytest.raises(MoextendError, match="^(?!.*not every process).*no image b.png"):
        open_here()  # all are refused the same
    faults = FaultSettings(policies={"missing": "skip"})
    told.clear()
    assert len(open_here()) in (3, 6)  # all miss the same
    entries[0] |= {"conversations": [TALK[0], {"from": "gpt", "value": "another answer"}]}
    for own in ("llava_v1_5_mix665k.json", "own.json"):
        (tmp_path / own).write_text(json.dumps(entries))
    with pytest.raises(MoextendError, match="give all hosts the same folder; here otherwise than in process 0: rows$"):
        open_here()  # as many rows, of which one says something else


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no entries"),
        ('{"id": 1, "conversations": []}\n{"id": 2}\n', "entry 1 .*is no conversation"),
        ("7", "holds no entries; it must be a list"),
        ("[{", "is not JSON"),
        ([{"id": 1}], "entry 0 .*is no conversation: .*; its keys are id"),
        ([{"id": 1, "image": "z.png", "conversations": TALK}], "no image z.png"),
    ],
)
def test_bad_llava_files_are_one_clear_line(tmp_path, entries, message):
    with pytest.raises(MoextendError, match=message):
        open_llava(tmp_path, entries)


def test_wrong_names_list_what_there_is(data_dir, tmp_path):
    for name, more, message in [
        ("vqa", {}, "there are easy_vqa, instruments, .*, llava_pretrain, recorded_words"),
        ("easy_vqa/images", {}, "there are questions, conversations, captions"),
        ("easy_vqa/captions", {"split": "val"}, "there are train, test"),
        ("llava_pretrain", {}, "needs a manual folder with blip_laion_cc_sbu_558k.json"),
        ("llava_pretrain", {"manual_dir": tmp_path}, "no file .*blip_laion_cc_sbu_558k.json"),
    ]:
        with pytest.raises(MoextendError, match=message):
            open_dataset(name, data_dir=data_dir, **more)


def test_hold_out_is_a_random_partition(tmp_path):
    source = open_llava(tmp_path, [{"id": n, "conversations": TALK} for n in range(30)])
    held, rest = hold_out(source, samples=10, seed=1)
    ids = [row.id for row in held]
    assert len(ids) == 10 and len(rest) == 20
    assert sorted(ids + [row.id for row in rest], key=int) == [str(n) for n in range(30)]
    assert ids == [row.id for row in hold_out(source, samples=10, seed=1).held_out] != [str(n) for n in range(10)]
    assert ids != [row.id for row in hold_out(source, samples=10, seed=2).held_out]
    assert [row.id for row in select(rest, [3, 0])] == [rest[3].id, rest[0].id]
    for samples in (0, 30):
        with pytest.raises(MoextendError, match="cannot hold out"):
            hold_out(source, samples=samples, seed=0)


def test_text_is_one_passage_per_line(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("one café\n\n two\u2028same \n", encoding="utf-8")
    assert open_text(tmp_path / "text") == ["one café", "two\u2028same"]
    (tmp_path / "marked").write_text("one\n", encoding="utf-8-sig")  # as Notepad and Excel write it
    assert open_text(tmp_path / "marked") == ["one"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_text("~/marked") == ["one"]  # a shell leaves the ~ of --text=~/marked
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, message in [("none", "cannot read"), ("empty", "no passages"), ("latin", "cannot read")]:
        with pytest.raises(MoextendError, match=message):
            open_text(tmp_path / name)
