"""Answering a benchmark: killed and started again it loses and doubles nothing; bad images stop it before it begins."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import random_run
import tiny
from children import ended
from PIL import Image
from test_processes import launch

from moextend_jax.checkpoints import train_state
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmark import benchmark, read_exam
from moextend_jax.evaluate.benchmarks.answers import Answers
from moextend_jax.evaluate.wordings import ask_wordings, measures, read_templates
from moextend_jax.models.moextend import abstract
from moextend_jax.runs.askable import askable
from moextend_jax.runs.run import Run, open_run, remember

QUESTIONS = 60


def aligned(workdir: Path, base: Path, *, seed: int = 0) -> Run:
    """A run whose projector is random."""
    run = open_run(random_run.settings(base), workdir)
    leaves = {
        path: leaf
        for path, leaf in tiny.arrays(run.config, seed=seed).items()
        if path.startswith("media/image/projector/")
    }
    train_state.save_leaves(workdir / "align" / "result", leaves, facts=run.facts)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """answers.jsonl of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    answer(aligned(workdir, base))
    return path_of(workdir)


def answer(run: Run, *, limit: int = QUESTIONS, model: str = "aligned") -> dict:
    return benchmark(askable(run, model), read_exam("easy_vqa", limit=limit), out=run.workdir / "eval")


def path_of(workdir: Path) -> Path:
    return workdir / "eval" / "easy_vqa" / "aligned" / "answers.jsonl"


def by_id(path: Path) -> dict[str, str]:
    """The answers, each of which must be there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["question_id"]: line["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_every_question_is_answered_scored_and_recorded(whole: Path):
    found = by_id(whole)
    record = json.loads(whole.with_name("scores.json").read_text())
    assert len(found) == QUESTIONS == record["answered"] == record["questions"] == record["answered_now"]
    assert record["model"] == "aligned" and record["headline"]["name"] == "accuracy"
    assert record["questions_per_second"] > 0
    assert len(set(found.values())) > 3  # worth comparing
    shown = json.loads(whole.with_name("examples.json").read_text())
    assert len(shown) == 6 and sorted(one["points"] for one in shown) == [one["points"] for one in shown]
    assert all(base64.b64decode(one["image_png"]).startswith(b"\x89PNG") for one in shown)


def test_a_run_cut_off_between_and_within_lines_goes_on(base, whole, tmp_path, monkeypatch: pytest.MonkeyPatch):
    run = aligned(tmp_path, base)
    append, before = Answers.append, []

    def failing(self: Answers, *arguments) -> None:
        if len(before) == 21:
            raise KeyboardInterrupt
        before.append(1)
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            answer(run)
    path = path_of(tmp_path)
    assert len(by_id(path)) == 21
    with path.open("ab") as file:  # what a kill within a line leaves
        file.write(whole.read_bytes().splitlines()[-1][:40])
    assert answer(run)["answered_now"] == QUESTIONS - 21
    assert by_id(path) == by_id(whole)
    text = path.read_bytes()
    assert answer(run)["answered_now"] == 0
    assert path.read_bytes() == text


def test_fewer_or_more_questions_of_the_same_file(base, whole, tmp_path):
    run = aligned(tmp_path, base)
    assert answer(run, limit=10)["answered_now"] == 10
    assert answer(run, limit=QUESTIONS)["answered_now"] == QUESTIONS - 10
    record = answer(run, limit=20)
    assert (record["answered_now"], record["answered"]) == (0, 20)
    assert by_id(path_of(tmp_path)) == by_id(whole)


def test_answers_of_another_model_are_not_mixed_in(base, tmp_path):
    answer(aligned(tmp_path, base), limit=5)
    path = tmp_path / "align" / "result"
    path.rename(tmp_path / "old")
    run = aligned(tmp_path, base, seed=1)
    with pytest.raises(MoextendError, match=r"answers\.jsonl:1: an answer of model 'aligned-"):
        answer(run, limit=5)


@pytest.mark.parametrize(
    "other",
    [{"text_isolation": "strict"}, {"composition": "decoupled"}, {"weight_guard": "none"}, {"recipe": "llama3"}],
)
def test_a_model_that_computes_something_else_has_another_name(base, tmp_path, other: dict[str, str]):
    opened = askable(aligned(tmp_path, base), "aligned")
    if recipe := other.pop("recipe", None):
        changed = dataclasses.replace(opened, recipe=dataclasses.replace(opened.recipe, prompt=recipe))
    else:
        changed = dataclasses.replace(opened, model=abstract(dataclasses.replace(opened.config, **other)))
    assert changed.identity != opened.identity


def test_labels_are_looked_for_before_anything_is_asked(tmp_path):
    write_mmvet(tmp_path)
    with pytest.raises(MoextendError, match="mmvet has no score here to compare wordings by"):
        ask_wordings(cast(Any, None), read_exam("mmvet", data=tmp_path), {"a": "{question}"}, out=tmp_path)
    folder = tmp_path / "pope"
    (folder / "val2014").mkdir(parents=True)
    line = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "category": "random"}
    (folder / "llava_pope_test.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(MoextendError, match="coco_pope_random.json"):
        read_exam("pope", data=tmp_path)


def write_mmvet(folder: Path, *, broken: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> Path:
    images = folder / "mm-vet" / "images"
    images.mkdir(parents=True)
    lines = []
    for n in range(6):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (40 * n, 90, 10)).save(file, "PNG")
        if n not in missing:
            (images / f"v1_{n}.png").write_bytes(file.getvalue()[: 60 if n in broken else None])
        lines.append(json.dumps({"question_id": f"v1_{n}", "image": f"v1_{n}.png", "text": "What is it?"}) + "\n")
    (folder / "mm-vet" / "llava-mm-vet.jsonl").write_text("".join(lines))
    return folder


def test_official_files_from_a_folder_of_the_user(base, tmp_path):
    run = aligned(tmp_path / "work", base)
    exam = read_exam("mmvet", data=write_mmvet(tmp_path))
    record = benchmark(askable(run, "aligned"), exam, out=run.workdir / "eval", max_new_tokens=4)
    assert record["answered"] == 6 and record["max_new_tokens"] == 4
    assert len(by_id(tmp_path / "work" / "eval" / "mmvet" / "aligned" / "answers.jsonl")) == 6


@pytest.mark.parametrize(("wrong", "line"), [({"broken": (3,)}, 4), ({"missing": (1, 5)}, 2)])
def test_bad_images_are_named_by_line_before_anything_runs(base, tmp_path, monkeypatch, wrong, line):
    run = aligned(tmp_path / "work", base)
    monkeypatch.setattr("moextend_jax.evaluate.benchmark.asker_of", None)
    path = tmp_path / "work" / "eval" / "mmvet" / "aligned" / "answers.jsonl"
    with pytest.raises(MoextendError, match=rf"llava-mm-vet\.jsonl:{line}: .*image") as raised:
        exam = read_exam("mmvet", data=write_mmvet(tmp_path, **wrong))  # before a model is opened, of missing ones
        benchmark(askable(run, "aligned"), exam, out=run.workdir / "eval")
    assert str(raised.value).count("llava-mm-vet.jsonl:") == len(*wrong.values())
    assert not path.exists() if "missing" in wrong else not path.read_bytes()


def test_the_base_model_cannot_see(base, tmp_path):
    with pytest.raises(MoextendError, match="cannot see"):
        answer(aligned(tmp_path, base), model="base", limit=2)


PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_benchmark_run as here
here.answer(here.open_run(here.random_run.settings(Path({base!r})), Path({workdir!r})))
"""


@pytest.mark.slow
def test_killed_once_it_has_begun_it_goes_on(base, whole, tmp_path):
    """SIGKILL once the first answers are written; the next one finishes."""
    aligned(tmp_path, base)
    path, deadline = path_of(tmp_path), time.monotonic() + 300
    script = PROCESS.format(tests=str(Path(__file__).parent), base=str(base), workdir=str(tmp_path))
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    with ended(process):
        while not path.exists() or not path.stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=300)
    assert by_id(path) == by_id(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [pytest.param(2, 1, marks=pytest.mark.long), (2, 2)])
def test_processes_share_the_questions(base, whole, tmp_path, processes, devices):
    """Through the command line: the mesh holds the model's parts and the rows; the first process writes."""
    remember(aligned(tmp_path, base))
    words = ["--", "eval", "--benchmark=easy_vqa", "--model=aligned", f"--limit={QUESTIONS}", f"--workdir={tmp_path}"]
    said = launch(*words, processes=processes, devices=devices).stdout
    assert said.count("questions answered") == 1
    assert by_id(path_of(tmp_path)) == by_id(whole)


def test_wordings_gain_nothing_where_no_question_was_answered_rightly():
    found = measures(np.zeros((2, 1, 3)))
    assert not found["gain_of_instruction_jd"].any() and not found["gain_of_model_md"].any()


@pytest.mark.slow
def test_several_wordings(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each wording has its answers; nothing is asked twice; models that were asked alike stand in one table."""
    run = aligned(tmp_path, base)
    exam, out = read_exam("easy_vqa", limit=8), tmp_path / "eval"
    templates = {"as_is": "{question}", "brief": "{question} In one word.", "look": "Look closely: {question}"}
    first = ask_wordings(askable(run, "aligned"), exam, templates, out=out)
    assert [*first["models"]["aligned"]] == [*templates] and "spread" in capsys.readouterr().out
    lines = (out / "wordings" / "look" / "easy_vqa" / "aligned" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 8 and not json.loads(lines[0])["prompt"].startswith("Look")  # some are told apart by these
    said = {
        name: (out / "wordings" / name / "easy_vqa" / "aligned" / "answers.jsonl").read_text() for name in templates
    }
    assert len({tuple(json.loads(line)["text"] for line in text.splitlines()) for text in said.values()}) > 1
    again = ask_wordings(askable(run, "aligned"), exam, templates, out=out)
    assert again == first and json.loads((out / "wordings" / "easy_vqa.json").read_text()) == first
    scores = json.loads((out / "wordings" / "look" / "easy_vqa" / "aligned" / "scores.json").read_text())
    assert scores["answered_now"] == 0 and scores["headline"]["value"] == first["models"]["aligned"]["look"]
    other = dict(first, models={"moextend": {"as_is": 50.0, "brief": 40.0, "look": 60.0}})
    (out / "wordings" / "easy_vqa.json").write_text(json.dumps(other))
    alone = ask_wordings(askable(run, "aligned"), exam, templates, out=out)
    assert [*alone["models"]] == ["aligned"]  # of the other no answers lie there
    for name, score in other["models"]["moextend"].items():
        folder = out / "wordings" / name / "easy_vqa" / "moextend"
        folder.mkdir()
        (folder / "scores.json").write_text(json.dumps({"headline": {"value": score}}))
    (out / "wordings" / "easy_vqa.json").write_text(json.dumps(other))
    both = ask_wordings(askable(run, "aligned"), exam, templates, out=out)
    assert [*both["models"]] == ["moextend", "aligned"] and "gain %" in capsys.readouterr().out
    fewer = ask_wordings(askable(run, "aligned"), exam, {"as_is": "{question}"}, out=out)
    assert [*fewer["models"]] == ["aligned"]
    with pytest.raises(MoextendError, match="an answer of model"):  # the same name for another wording
        ask_wordings(askable(run, "aligned"), exam, {"as_is": "Say: {question}"}, out=out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "templates.json holds no JSON object"),
        ("{}", "has no templates"),
        ('{"a": "no place"}', "must be a text with {question} in it once"),
        ('{"a": 3}', "must be a text"),
        ('{"a/b": "{question}"}', "cannot name a folder"),
        ("{", "templates.json"),
    ],
)
def test_templates_that_are_none_are_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "templates.json").write_text(text)
    with pytest.raises(MoextendError, match=message):
        read_templates(tmp_path / "templates.json")
