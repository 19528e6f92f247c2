"""`moextend data check`: its exit code, its table and its JSON, on LLaVA-like data for every stage."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from rich.console import Console

from moextend_jax.check_data import check_command, problems_of, readings_of
from moextend_jax.config import RECIPES
from moextend_jax.data.check import Report
from moextend_jax.settings import (
    EvaluateSettings,
    ExtensionSettings,
    FaultSettings,
    RunSettings,
    SelectSettings,
    StageSettings,
)

ROWS = 20


@pytest.fixture
def folder(tmp_path):
    """LLaVA's two files with images that both show; row 3's image is not there, row 5's is cut off."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (90, 0, 0)).save(file, "JPEG")
    (tmp_path / "images").mkdir()
    rows = []
    for n in range(ROWS):
        if n != 3:
            (tmp_path / "images" / f"{n}.jpg").write_bytes(file.getvalue()[: -100 if n == 5 else None])
        talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"thing {n}"}]
        rows.append({"id": f"row{n}", "image": f"{n}.jpg", "conversations": talk})
    for name in ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    return tmp_path


def settings(folder: Path, **more: Any) -> RunSettings:
    def stage(data: str, **change: Any) -> StageSettings:
        return StageSettings(data=data, steps=1, batch_size=4, length=300, **change)

    instruct = stage("llava_instruct")
    return RunSettings(
        align=stage("llava_pretrain", split="train[:10]"), extend=instruct, finetune=instruct, full=instruct,
        evaluate=EvaluateSettings(data="llava_instruct", split="train[6:]", questions=1, length=300),
        select=SelectSettings(held_out=2), manual_dir=str(folder), **more,
    )  # fmt: skip


def checked(run: RunSettings, capsys, *, as_json: bool = True) -> tuple[int, Any]:
    written = io.StringIO()
    console = Console(file=written, width=160)
    code = check_command(run, data_dir=None, processes=0, as_json=as_json, console=console)
    return code, json.loads(capsys.readouterr().out) if as_json else written.getvalue()


def skipping(**more: Any) -> FaultSettings:
    return FaultSettings(policies={"missing": "skip"}, **more)


def test_stages_that_read_alike_are_one_reading(folder):
    run = settings(folder)
    assert [(one.data, one.stages) for one in readings_of(run)] == [
        ("llava_pretrain", ("align",)), ("llava_instruct", ("extend", "finetune", "full")),
        ("llava_instruct", ("evaluate",)),
    ]  # fmt: skip
    released = dataclasses.replace(run, recipe=RECIPES["released"])
    assert [one.stages for one in readings_of(released)] == [("align", "extend"), ("finetune", "full"), ("evaluate",)]
    packed = dataclasses.replace(run, finetune=dataclasses.replace(run.finetune, conversation_length=50))
    assert [one.length for one in readings_of(packed)] == [300, 300, 50, 300]


def test_further_sets_of_questions_are_read_too(folder):
    run = settings(folder)
    sets = {"pairs": "llava_pretrain"}
    run = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, sets=sets))
    asked = [(one.data, one.split, one.stages) for one in readings_of(run) if one.parts == "prompt"]
    further = ("llava_pretrain", "train[6:]", ("evaluate/pairs",))
    assert asked == [("llava_instruct", "train[6:]", ("evaluate",)), further]
    # Nothing named: rows of finetune are asked, and the sets as if something was.
    unnamed = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, data=""))
    asked = [(one.data, one.split, one.stages) for one in readings_of(unnamed) if one.parts == "prompt"]
    assert asked == [("llava_instruct", "train", ("evaluate",)), further]


def test_questions_of_further_sets_do_not_add_to_those_that_are_asked(folder):
    run = settings(folder)
    run = dataclasses.replace(
        run, evaluate=dataclasses.replace(run.evaluate, questions=19, sets={"pairs": "llava_pretrain"})
    )
    reports = [Report(reading=reading, rows=18, items=Counter({"<image>": 1})) for reading in readings_of(run)]
    assert problems_of(run, reports, layers=8, marks={"image": "<image>"}) == [
        "evaluate.questions = 19, but llava_instruct has 18 rows; ask at most so many"
    ]


def test_text_alone_needs_no_tower(folder, capsys):
    rows = json.loads((folder / "llava_v1_5_mix665k.json").read_text())
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = "what?"
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    code, record = checked(settings(folder, vision="none", medium=""), capsys)
    assert code == 0 and record["ok"] and {one["data"] for one in record["data"]} == {"llava_instruct"}


def test_json_says_what_where_and_whether_it_may_be(folder, capsys):
    code, said = checked(settings(folder), capsys)
    assert code == 1 and said["ok"] is False
    align, instruct, evaluate = said["data"]
    assert (align["rows"], align["images"], instruct["rows"], evaluate["rows"]) == (10, 10, ROWS, ROWS - 6)
    for one in (align, instruct):
        assert {kind: (found["count"], found["policy"]) for kind, found in one["kinds"].items()} == {
            "missing": (1, "error"), "truncated": (1, "skip")
        }  # fmt: skip
        first = one["kinds"]["truncated"]["first"]
        assert [(named["entry"], named["id"]) for named in first] == [(5, "5.jpg")] and one["skipped"] == 1
    assert evaluate["ok"] and not evaluate["kinds"]


def test_rows_of_one_package_may_show_different_pictures(tmp_path, capsys, monkeypatch):
    tiny.shorten_easy_vqa(monkeypatch, train=60, test=20)
    stage = StageSettings(data="easy_vqa/questions", split="train[:20]", steps=1, batch_size=4, length=300)
    later = dataclasses.replace(stage, split="train[20:]")
    run = dataclasses.replace(
        settings(tmp_path), align=stage, extend=later, finetune=later, full=later,
        evaluate=EvaluateSettings(data="easy_vqa/questions", split="test", questions=4),
    )  # fmt: skip
    code, said = checked(run, capsys)
    assert code == 0 and not any(one["kinds"] or one["error"] for one in said["data"]), said


def test_exit_code_follows_policies_and_the_share(folder, capsys):
    assert checked(settings(folder, faults=skipping()), capsys)[0] == 0  # 2 of the 10 that align reads, as training
    assert checked(settings(folder, faults=skipping(most_skipped=0.001)), capsys)[0] == 1
    only = settings(folder, faults=skipping())
    lost = dataclasses.replace(only.align, split="train[3:4]")
    code, said = checked(dataclasses.replace(only, align=lost), capsys)
    assert code == 1 and [one["ok"] for one in said["data"]] == [False, True, True]  # all that align reads


def test_the_table_names_the_first(folder, capsys):
    code, text = checked(settings(folder, faults=skipping(most_skipped=0.001)), capsys, as_json=False)
    assert code == 1
    for part in ("llava_instruct train (extend, finetune, full)", "entry 5: 5.jpg", "truncated", "no faults"):
        assert part in text
    limit = "0.10% of at least 1,000 may be, but not all"
    assert f"2 conversations (10.00%) would be skipped, too many: {limit}" in text


def test_names_in_data_move_no_cursor(folder, capsys):
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"3.jpg"', r'"\u001b[2J[/x].jpg"'))
    _, text = checked(settings(folder, faults=skipping()), capsys, as_json=False)
    assert r"\x1b[2J[/x].jpg" in text and "\x1b" not in text


def test_a_file_that_cannot_be_read_does_not_end_the_check_of_the_others(folder, capsys):
    (folder / "blip_laion_cc_sbu_558k.json").write_text('[{"id": 1')
    code, said = checked(settings(folder, faults=skipping(most_skipped=0.2)), capsys)
    assert code == 1 and "is not JSON" in said["data"][0]["error"]
    assert said["data"][1]["ok"] and said["data"][1]["rows"] == ROWS


def test_what_a_run_would_refuse_of_sound_data_is_said_too(folder, capsys):
    """All at once: samples, questions and pictures that are not there."""
    for path in folder.glob("*.json"):
        rows = [row for row in json.loads(path.read_text()) if row["id"] not in ("row3", "row5")]
        path.write_text(json.dumps([{key: row[key] for key in row if key != "image"} | {"conversations": [
            {"from": "human", "value": "what?"}, row["conversations"][1]]} for row in rows]))  # fmt: skip
    run = settings(folder)
    run = dataclasses.replace(
        run,
        select=SelectSettings(held_out=18, share=0.01),
        evaluate=dataclasses.replace(run.evaluate, questions=13),
    )
    code, record = checked(run, capsys)
    assert code == 1 and record["ok"] is False and all(reading["ok"] for reading in record["data"])
    assert record["problems"] == [
        "select.held_out = 18: cannot hold out 18 of 18 rows; at most 17 can be, or a share such as 0.1",
        "select.share = 0.01 of 8 layers chooses none; raise it",
        "align trains the projector, and none of its 10 conversations has an image; name others in align.data",
        "evaluate.questions = 13, but llava_instruct has 12 rows; ask at most so many",
    ]
    code, text = checked(run, capsys, as_json=False)
    assert code == 1 and text.count("a run would be refused: ") == 4
    run = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, data="", held_out=17))
    assert "cannot hold out 18 of 1 rows" in checked(run, capsys)[1]["problems"][0]


def test_samples_are_the_probes_rows_whatever_an_extension_is_called(folder):
    run = settings(folder)
    again = ExtensionSettings(
        align=run.align, extend=run.extend, finetune=run.finetune, full=run.full, select=SelectSettings(held_out=18),
        evaluate=run.evaluate,
    )  # fmt: skip
    run = dataclasses.replace(run, extensions={"extended": again})
    reports = [Report(reading=reading, rows=18, items=Counter({"<image>": 1})) for reading in readings_of(run)]
    assert problems_of(run, reports, layers=8, marks={"image": "<image>"}) == [
        "select.held_out = 18: cannot hold out 18 of 18 rows; at most 17 can be, or a share such as 0.1"
    ]


def test_rows_of_a_mixture_are_those_of_all_its_data(folder, capsys):
    (folder / "images" / "3.jpg").write_bytes((folder / "images" / "0.jpg").read_bytes())
    rows = json.loads((folder / "llava_v1_5_mix665k.json").read_text())
    rows = [row for row in rows if row["id"] != "row5"]
    texts = [{"id": "t", "conversations": [{"from": "human", "value": "what?"}, rows[0]["conversations"][1]]}]
    for name, content in (("pictures", rows), ("texts", texts)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    run = settings(folder)
    data = f"{folder}/pictures.json:0.9,{folder}/texts.json:0.1"
    stage = dataclasses.replace(run.finetune, data=data)
    run = dataclasses.replace(run, align=stage, extend=stage, finetune=stage, full=stage)
    asked = dataclasses.replace(run.evaluate, data=data, split="train", questions=20)
    code, record = checked(dataclasses.replace(run, evaluate=asked), capsys)
    assert (code, record["problems"]) == (0, []), record
    many = dataclasses.replace(run, evaluate=dataclasses.replace(asked, questions=21))
    assert checked(many, capsys)[1]["problems"][0].endswith("texts.json:0.1 has 20 rows; ask at most so many")


def test_lengths_that_the_data_decide_limit_nothing(folder, capsys):
    for path in folder.glob("*.json"):
        rows = [row for row in json.loads(path.read_text()) if row["id"] not in ("row3", "row5")]
        rows[0]["conversations"][1]["value"] = "long " * 400
        path.write_text(json.dumps(rows))
    run = settings(folder)
    code, record = checked(run, capsys)
    assert code == 1 and "too_long" in record["data"][1]["kinds"]
    stage = dataclasses.replace(run.finetune, length=0, images_per_row=0)
    own = dataclasses.replace(run, align=stage, extend=stage, finetune=stage, full=stage)
    own = dataclasses.replace(own, evaluate=dataclasses.replace(run.evaluate, data="", length=0))
    code, record = checked(own, capsys)
    assert (code, record["problems"]) == (0, []), record
    assert [reading["stages"] for reading in record["data"]] == [["align", "extend", "finetune", "full"], ["evaluate"]]


@pytest.mark.parametrize("apart", [False, True])
def test_rows_that_are_all_tied_by_their_pictures_are_said_to_be_so(folder, capsys, apart: bool):
    """Row n shows pictures n and n + 1: none can be held out unseen, unless one row shows others."""
    path = folder / "llava_v1_5_mix665k.json"
    rows = [row | {"image": [f"{n + 6}.jpg", f"{n + 7}.jpg"]} for n, row in enumerate(json.loads(path.read_text())[:8])]
    rows[4]["image"] = ["1.jpg", "2.jpg"] if apart else rows[4]["image"]
    for row in rows:
        row["conversations"][0]["value"] = "<image>\n<image>\nwhat?"
    path.write_text(json.dumps(rows))
    run = dataclasses.replace(
        settings(folder, faults=skipping()), evaluate=EvaluateSettings(data="", questions=1, length=300)
    )
    many = {name: dataclasses.replace(getattr(run, name), images_per_row=2) for name in ("extend", "finetune", "full")}
    said = "evaluate.held_out: all 8 rows share pictures or say the same, so none can be held out unseen"
    problems = checked(dataclasses.replace(run, **many), capsys)[1]["problems"]
    assert problems == ([] if apart else [f"{said}; name other rows in evaluate.data"])
