"""Before the first step: what the data decide is filled in, and all that stands in the way is said at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from moextend_jax.checkpoints.loading import EMBEDDED
from moextend_jax.checkpoints.train_state import differing
from moextend_jax.config import IGNORE, MoextendError
from moextend_jax.data.batches import batches
from moextend_jax.data.readers import Readers
from moextend_jax.data.splitting import marks_of
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.evaluate import run_questions, text_losses
from moextend_jax.evaluate.prompts import buckets
from moextend_jax.mesh import make_mesh, place_leaves
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.data_of import held_out_source, readers_of, rows_of, source_of, unseen_source
from moextend_jax.runs.making import facts_of_selecting, facts_of_training, make_all
from moextend_jax.runs.models_of import Opened, text_only
from moextend_jax.runs.ready import _measure, ready, row_problems
from moextend_jax.runs.results import FIRST, Data
from moextend_jax.runs.run import Run, left_in
from moextend_jax.settings import EvaluateSettings, ExtensionSettings, RunSettings, SelectSettings, StageSettings

ROWS = 24


def settings(folder: Path, **more: Any) -> RunSettings:
    stage = StageSettings(data="llava_instruct", epochs=1.5, batch_size=4, length=0, images_per_row=0)
    evaluate = EvaluateSettings(data="", held_out=0.25, questions=100, length=0)
    first = RunSettings(
        align=stage, extend=stage, finetune=stage, full=stage, evaluate=evaluate,
        select=SelectSettings(held_out=0.1), manual_dir=str(folder), data_dir=str(folder / "data"),
    )  # fmt: skip
    return changed(first, **more)


def changed(first: RunSettings, **groups: dict[str, Any]) -> RunSettings:
    parts = {name: dataclasses.replace(getattr(first, name), **fields) for name, fields in groups.items()}
    return dataclasses.replace(first, **parts)


def open_without_weights(settings: RunSettings, workdir: Path) -> Run:
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    config = tiny.BASE_CONFIG
    return Run(settings=settings, workdir=workdir, config=config, tokenizer=load_tokenizer(EMBEDDED), pretrained={},
               base_hash="none", mesh=mesh)  # fmt: skip


@pytest.fixture
def llava(tmp_path) -> Path:
    return tiny.write_llava(tmp_path / "llava", rows=ROWS)


def turns(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def rewrite(folder: Path, change) -> None:
    path = folder / "llava_v1_5_mix665k.json"
    path.write_text(json.dumps([change(n, row) for n, row in enumerate(json.loads(path.read_text()))]))


def test_what_an_interrupt_leaves_where_nothing_was_written(tmp_path):
    assert "starts afresh" in left_in(tmp_path / "none")


def test_steps_and_lengths_come_from_the_data(llava, tmp_path, capsys):
    run = open_without_weights(settings(llava, extend={"least_steps": 30}), tmp_path)
    filled = ready(run, FIRST.results).settings
    assert filled.align.steps == filled.finetune.steps == math.ceil(1.5 * 18 / 4)  # of 24 rows 6 are held out
    assert filled.extend.steps == 30
    for stage in (filled.align, filled.extend, filled.finetune, filled.full):
        assert (stage.epochs, stage.least_steps, stage.length, stage.images_per_row) == (0, 0, 32, 1)
    assert filled.select == run.settings.select and filled.evaluate == run.settings.evaluate
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("align: 7 steps of 4 rows, 1.56 x 18 conversations; 32 tokens a row (the longest")
    assert ready(run, ["finetune"]).settings.finetune == filled.finetune  # whatever is made with it
    assert ready(run, ["select"]).settings.extend == filled.extend  # whose rows select counts on
    capsys.readouterr()
    fixed = open_without_weights(changed(settings(llava), align={"steps": 3, "epochs": 0.0, "length": 40}), tmp_path)
    assert ready(fixed, ["align"]).settings.align == dataclasses.replace(fixed.settings.align, images_per_row=1)
    assert capsys.readouterr().out == ""


def test_the_longest_conversation_and_the_one_with_most_pictures_fit(llava, tmp_path):
    def change(n: int, row: dict) -> dict:
        if n == 3:
            row["conversations"][1]["value"] = "word " * 100
        if n == 4:
            row["image"] = ["4.png", "5.png", "6.png"]
            row["conversations"][0]["value"] = "<image><image><image> which?"
        return row

    rewrite(llava, change)
    finetune = ready(open_without_weights(settings(llava), tmp_path), ["finetune"]).settings.finetune
    assert finetune.images_per_row == 3 and 100 < finetune.length <= 128


def test_rows_hold_no_pictures_where_no_conversation_has_any(llava, tmp_path):
    def change(n: int, row: dict) -> dict:
        row["conversations"][0]["value"] = "what?"
        return {name: part for name, part in row.items() if name != "image"}

    rewrite(llava, change)
    run = open_without_weights(settings(llava), tmp_path)
    filled = ready(run, ["finetune"]).settings.finetune
    assert (filled.images_per_row, filled.items_per_row) == (0, {})
    data = Data("finetune")
    (batch, *_) = rows_of(run, source_of(run, data), filled, data=data, pixels=True, epochs=1)
    assert not batch.media and not batch.features


@pytest.mark.parametrize(
    ("shown", "room", "looked_at"), [((), 0, 4096), ("ab", 0, None), ("ab", 2, 4096), ("ab", None, 4096)]
)
def test_few_rows_are_looked_at_only_where_no_room_depends_on_all(llava, tmp_path, monkeypatch, shown, room, looked_at):
    stage = {"length": 32, "images_per_row": 1, "items_per_row": {} if room is None else {"sound": room}}
    run = open_without_weights(settings(llava, finetune=stage), tmp_path)
    monkeypatch.setattr("moextend_jax.runs.ready.measure", lambda *_, most, **__: most)
    sound = {} if room is None else {"sound": shown}
    source: Any = SimpleNamespace(items={"image": "abc"} | sound)
    assert _measure(run, ["finetune"], source) == looked_at


@pytest.mark.parametrize("setting", ["missing", "items_per_row"])
def test_a_medium_that_is_none_is_refused_before_the_first_step(llava, tmp_path, setting):
    run = open_without_weights(settings(llava, finetune={setting: {"smell": 1}}), tmp_path)
    with pytest.raises(MoextendError, match=rf"finetune\.{setting}\.smell: no such medium; there are image"):
        ready(run, ["finetune"])


def test_steps_of_packed_rows_are_those_that_packing_makes(llava, tmp_path):
    rewrite(llava, lambda n, row: {"id": row["id"]} | turns("count", "one " * (1 + 7 * n % 23)))
    packed = {"conversations_per_row": 0, "length": 64, "epochs": 1.0, "batch_size": 1}
    run = open_without_weights(settings(llava, finetune=packed, evaluate={"data": "llava_instruct"}), tmp_path)
    stage = ready(run, ["finetune"]).settings.finetune
    rows = batches(
        source_of(run, Data("finetune")), stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe,
        readers={}, epochs=1,
    )  # fmt: skip
    assert stage.steps == len(list(rows)) < ROWS / 2


def test_all_that_stands_in_the_way_is_said_before_anything_is_written(llava, tmp_path):
    wrong = changed(
        settings(llava),
        align={"data": "llava_pretrain", "split": "dev"},
        extend={"length": 10},
        select={"held_out": 24.0, "share": 0.1},
        evaluate={"data": "coco"},
    )
    run = open_without_weights(wrong, tmp_path / "work")
    with pytest.raises(MoextendError) as refused:
        next(make_all(run, checks=[run_questions.check]))
    for part in (
        "5 things stand in the way, nothing was done: (1)", "has no split 'dev'", "cannot hold out 24 of 24 rows",
        "select.share = 0.1 of 3 layers", "extend: example row0", "do not fit a row of 10", "(24 are too_long)",
        "no data set 'coco'",
    ):  # fmt: skip
        assert part in str(refused.value), part
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n, row: row | {"image": []} | turns("which?", "this"), "align trains the projector"),
        (lambda n, row: row | {"image": "one.png"}, "share pictures or say the same, so none can be held out unseen"),
        (
            lambda n, row: row if n else row | {"conversations": row["conversations"][:1]},
            "align, extend, finetune: example row0: roles must .*evaluate: example row0: roles",
        ),
    ],
)
def test_data_that_a_later_stage_would_refuse(llava, tmp_path, change, said: str):
    (llava / "one.png").write_bytes((llava / "1.png").read_bytes())
    rewrite(llava, change)
    with pytest.raises(MoextendError, match=said):
        next(make_all(open_without_weights(settings(llava), tmp_path / "work"), checks=[run_questions.check]))


def test_rows_that_are_longer_than_the_window_of_the_base(llava, tmp_path):
    run = open_without_weights(settings(llava, finetune={"length": 64}), tmp_path)
    narrow = dataclasses.replace(run.config, decoder=dataclasses.replace(run.config.decoder, window=40))
    ready(dataclasses.replace(run, config=narrow), ["align", "extend"])
    with pytest.raises(MoextendError, match="^rows of 64 tokens: the model was made for a sliding window of 40"):
        next(make_all(dataclasses.replace(run, config=narrow)))
    assert not list(tmp_path.glob("align"))
    with pytest.raises(MoextendError, match="^rows of 256 tokens: the model was made for a sliding window of 40"):
        run_questions.check(dataclasses.replace(run, config=narrow))  # of held-out text


def test_more_than_may_be_skipped(llava, tmp_path):
    rewrite(llava, lambda n, row: row if n % 2 else row | {"conversations": row["conversations"][:1]})
    faults = dataclasses.replace(settings(llava).faults, policies={"order": "skip"}, most_skipped=0.01)
    run = open_without_weights(dataclasses.replace(settings(llava), faults=faults), tmp_path / "work")
    with pytest.raises(MoextendError, match="^align: 12 of 24 conversations .* more than most_skipped = 0.01 allows"):
        ready(run, ["align"])
    rewrite(llava, lambda n, row: row | {"conversations": row["conversations"][:1]})
    (tmp_path / "llava" / "data").rename(tmp_path / "gone")
    with pytest.raises(MoextendError, match="^align: all 24 conversations looked at would be skipped"):
        ready(run, ["align"])


def test_questions_are_looked_at_before_anything_is_trained(llava, tmp_path):
    (llava / "3.png").write_bytes(b"no picture")
    asked = {"data": "llava_instruct", "questions": 24, "split": "train", "length": 0}
    strict = dataclasses.replace(settings(llava).faults, policies={"not_image": "error"})
    run = open_without_weights(dataclasses.replace(settings(llava, evaluate=asked), faults=strict), tmp_path / "work")
    with pytest.raises(MoextendError, match=r"^evaluate: cannot read image 3\.png"):
        next(make_all(run, checks=[run_questions.check]))
    with pytest.raises(MoextendError, match="its prompt has 2. tokens, evaluate.length is 7"):
        run_questions.check(dataclasses.replace(run, settings=changed(run.settings, evaluate={"length": 7})))
    with pytest.raises(MoextendError, match="evaluate.questions = 25, but llava_instruct has 24 rows"):
        run_questions.check(dataclasses.replace(run, settings=changed(run.settings, evaluate={"questions": 25})))


def test_no_stage_sees_what_is_held_out_for_evaluation(llava, tmp_path):
    run = open_without_weights(settings(llava, align={"split": "train[:50%]"}), tmp_path)
    unseen = unseen_source(run, "image")
    assert unseen is not None and len(unseen) == 6
    marks = set(itertools.chain.from_iterable(marks_of(unseen)))
    parts = {name: source_of(run, row.data(run.settings.recipe)) for name, row in FIRST.results.items() if row.data}
    for name, part in parts.items():
        assert all(map(marks.isdisjoint, marks_of(part))), name
    assert len(parts["finetune"]) == 18 and len(parts["select"]) == 2 and len(parts["extend"]) == 16
    assert 6 <= len(parts["align"]) < 12
    (asked,) = run_questions.asked_of_all(run).values()
    assert {row.id for row in asked.source} == {row.id for row in unseen}
    assert (asked.title, asked.data) == ("held-out llava_instruct", "llava_instruct")
    named = changed(run.settings, evaluate={"data": "llava_instruct", "questions": 5, "split": "train[:6]"})
    assert [row.id for row in held_out_source(run, "image") or ()] == [row.id for row in unseen]
    assert held_out_source(dataclasses.replace(run, settings=named), "image") is None  # stages train on it
    assert len(source_of(dataclasses.replace(run, settings=named), Data("finetune"))) == ROWS
    path = f"{llava}/../{llava.name}/llava_v1_5_mix665k.json"
    by_path = changed(run.settings, evaluate={"data": path, "split": "train"})
    assert held_out_source(dataclasses.replace(run, settings=by_path), "image") is None


def test_only_the_first_question_s_pictures_are_asked_about(llava, tmp_path):
    def change(n: int, row: dict) -> dict:
        if n == 0:
            later = turns("<image> what is it?", "a cat")["conversations"]
            return row | {"conversations": turns("hello", "hi")["conversations"] + later}
        if n == 1:
            later = turns("<image> and this?", "a dog")["conversations"]
            return row | {"image": ["1.png", "2.png"], "conversations": [*row["conversations"], *later]}
        return row

    rewrite(llava, change)
    run = open_without_weights(
        settings(llava, evaluate={"data": "llava_instruct", "questions": 24, "split": "train"}), tmp_path
    )
    run_questions.check(run)
    (asked,) = run_questions.asked_of_all(run).values()
    readers = readers_of(run, asked.source, data="", split="", inputs=True)
    prompted, _ = run_questions.prompted_questions(run, asked, readers)
    by_id = {item.prompt.where.removeprefix("question "): item for item in prompted}
    first, second = (by_id[row.id] for row in source_of(run, Data("finetune")) if len(row.conversations) > 2)
    assert (first.question.text, first.question.answer) == ("hello", "hi") and not first.prompt.items
    assert [*second.prompt.items] == ["image"] and len(second.prompt.items["image"]) == 1


def test_a_window_holds_prompts_as_they_are_padded(llava, tmp_path):
    run = open_without_weights(settings(llava), tmp_path)
    (asked,) = run_questions.asked_of_all(run).values()
    readers = readers_of(run, asked.source, data="", split="", inputs=True)
    prompted, _ = run_questions.prompted_questions(run, asked, readers)
    new, sizes = run.settings.evaluate.max_new_tokens, [(len(p.ids_L), sum(buckets(p))) for _, p in prompted]
    plain, padded = (new + max(of) for of in zip(*sizes, strict=True))
    small = changed(run.settings, evaluate={"text_length": 1})
    assert plain < padded
    for window, refused in ((padded, False), (padded - 1, True)):
        config = dataclasses.replace(run.config, decoder=dataclasses.replace(run.config.decoder, window=window))
        with pytest.raises(MoextendError, match="sliding window") if refused else nullcontext():
            run_questions.check(dataclasses.replace(run, settings=small, config=config))


def test_no_later_stage_sees_what_an_earlier_extension_holds_out(llava, tmp_path):
    first = settings(llava)
    named = dataclasses.replace(first.evaluate, data="llava_instruct")
    later = ExtensionSettings(
        align=first.align, extend=first.extend, finetune=first.finetune, full=first.full, evaluate=named
    )
    both = dataclasses.replace(first, extensions={"task": later}, mixture=first.finetune)
    run = open_without_weights(both, tmp_path)
    unseen = unseen_source(run, "image")
    assert unseen is not None and unseen_source(run, "task") is None
    for name in ("finetune", "finetune:task", "mixture"):
        source = source_of(run, Data(name))
        assert {row.id for row in source}.isdisjoint(row.id for row in unseen) and len(source) == 18, name
        assert row_problems(run.settings, rows={name: 6}, layers=1) == [], name
        assert "cannot hold out" in row_problems(run.settings, rows={name: 1}, layers=1)[0], name


def test_a_rule_that_chooses_no_layer_is_named_as_it_is_set(llava):
    first = changed(settings(llava), select={"layers": "first_quarter"})
    stages = {name: getattr(first, name) for name in ("align", "extend", "finetune", "full", "evaluate")}
    later = ExtensionSettings(**stages, select=SelectSettings(held_out=0.1, layers="interval", share=0.2))
    both = dataclasses.replace(first, extensions={"task": later})
    rows = {"select": ROWS, "select:task": ROWS}
    assert row_problems(both, rows=rows, layers=3) == [
        "select.layers = first_quarter of 3 layers chooses none",
        "extensions.task.select.share = 0.2 of 3 layers chooses none; raise it",
    ]
    assert row_problems(both, rows=rows, layers=5) == []


@pytest.mark.parametrize(
    ("data", "title"),
    [
        ("easy_vqa/questions", "easy-VQA"),
        ("instruments/questions:1,a/b.json:2", "instruments/questions, b.json"),
        ("llava_instruct", "llava_instruct"),
        ("spoken_words/captions:1,instruments:2", "spoken_words/captions, instruments"),
        ("/a/b/own.jsonl", "own.jsonl"),
        ("gs://bucket/own.json", "own.json"),
        ("x/a.json:0.7,y/b.parquet:0.3", "a.json, b.parquet"),
        ("folder/", "folder"),
    ],
)
def test_tables_name_data_as_people_do(data: str, title: str):
    assert run_questions.title_of(data) == title


@pytest.mark.slow
def test_the_loss_of_held_out_answers_is_that_of_their_tokens(llava, tmp_path):
    """Whatever the batches; of a model with eyes, and of the base, which gets the text alone."""
    own = settings(llava, finetune={"steps": 1, "epochs": 0.0}, evaluate={"text_batch_size": 4})
    run = open_without_weights(own, tmp_path)
    source = unseen_source(run, "image")
    assert source is not None
    opened = Opened(abstract(run.config), place_leaves(abstract(run.config), tiny.arrays(run.config), run.mesh))
    readers = readers_of(run, source, data="", split="", inputs=True)

    def loss(opened: Any, readers: Readers, rows: int) -> float:
        stage = dataclasses.replace(text_losses.answer_stage_of(run, source), batch_size=rows)
        return text_losses.answer_loss(run, opened, source, stage=stage, readers=readers)

    nats, tokens = 0.0, 0
    stage = dataclasses.replace(text_losses.answer_stage_of(run, source), batch_size=6)
    (batch,) = batches(source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, readers=readers,
                       seed=None, epochs=1)  # fmt: skip
    model = with_arrays(opened.model, opened.arrays)
    hidden_BLD = jax.jit(lambda batch: model(batch).hidden_BLD)(batch._replace(examples_Bg=None))
    logits_BLV = np.asarray(hidden_BLD, np.float64) @ np.asarray(model.decoder.head_DV, np.float64)
    for logits_LV, labels_L in zip(logits_BLV, batch.labels_BL, strict=True):
        for n in np.flatnonzero(labels_L != IGNORE):
            nats += np.log(np.exp(logits_LV[n - 1]).sum()) - logits_LV[n - 1, labels_L[n]]
            tokens += 1
    seeing = loss(opened, readers, 4)
    assert seeing == pytest.approx(nats / tokens, rel=1e-4)
    blind = loss(text_only(opened), {}, 4)
    assert np.isfinite(blind) and abs(blind - seeing) > 1e-3


def test_a_part_of_the_texts_is_their_first_batches(llava, tmp_path):
    def rows(**more: int) -> list[np.ndarray]:
        evaluate = {"text_length": 64, "text_batch_size": 8, **more}
        run = open_without_weights(settings(llava, evaluate=evaluate), tmp_path)
        return [np.asarray(batch.ids_BL) for batch in text_losses.passages(run, "kjv")]

    every, two = rows(), rows(text_batches=2)
    assert len(every) > len(two) == 2
    np.testing.assert_array_equal(two, every[:2])


def test_a_cache_of_features_lies_in_no_other(llava, tmp_path, monkeypatch):
    """One that is made again takes its folder away; that of pictures is where it always was."""
    run, paths = open_without_weights(settings(llava), tmp_path), []
    source = source_of(run, Data("finetune"))
    glimpse = dataclasses.replace(run.config.media["image"], mark="<image:glimpse>")
    monkeypatch.setattr("moextend_jax.runs.data_of.cache_features", lambda inputs, *, path, **_: paths.append(path))
    both = dataclasses.replace(run.config, media=run.config.media.replacing("glimpse", glimpse))
    source = dataclasses.replace(source, items={"image": source.images, "glimpse": source.images})
    readers_of(dataclasses.replace(run, config=both), source, data="llava_instruct", split="train")
    assert paths[0] == tmp_path / "features" / "llava_instruct-train" and len(paths) == 2
    assert paths[1].parent == paths[0].parent and paths[1] != paths[0]


def test_rows_that_may_have_been_seen_are_not_asked(llava, tmp_path):
    run = open_without_weights(settings(llava), tmp_path / "work")
    record = tmp_path / "work" / "finetune" / "stage.json"
    record.parent.mkdir(parents=True)
    for held_out, refused in [(0.25, False), (0.5, True)]:
        then = dataclasses.replace(run, settings=changed(run.settings, evaluate={"held_out": held_out}))
        record.write_text(json.dumps({"data": source_of(then, Data("finetune")).fingerprint}))
        for check in (run_questions.check_unseen, run_questions.check):  # the second before anything is trained
            with pytest.raises(MoextendError, match="finetune was trained on other rows") if refused else nullcontext():
                check(run)


def test_the_rows_that_a_probe_reads_decide_what_it_makes(llava, tmp_path, monkeypatch):
    """They are finetune's, without those that layers are chosen with: settings of other stages."""
    monkeypatch.setattr(Run, "result_identity", lambda run, name: name)
    run = open_without_weights(settings(llava), tmp_path)
    for change in ({"select": {"held_out": 0.2}}, {"finetune": {"split": "train[:9]"}}, {"finetune": {"data": "d"}}):
        other = dataclasses.replace(run, settings=changed(run.settings, **change))
        for facts, name in ((facts_of_training, "extend"), (facts_of_selecting, "select")):
            assert differing(saved := json.loads(json.dumps(facts(run, name))), facts(other, name)), (name, change)
            assert not differing(saved, facts(run, name))
            if name == "extend":
                del saved["rows"]  # an older record says nothing of them
                assert not differing(saved, facts(other, name))
