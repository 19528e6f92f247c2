"""`moextend run` from a random base to summary and report, on a slice of easy-VQA, through the command line."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from moextend_jax import cli, preemption
from moextend_jax.checkpoints import train_state
from moextend_jax.checkpoints.hashes import content_hash
from moextend_jax.checkpoints.loading import open_base
from moextend_jax.config import MoextendError, Named
from moextend_jax.evaluate.examples import picks_of
from moextend_jax.evaluate.run_questions import asked_of_all, questions_of
from moextend_jax.evaluate.summary import summarise
from moextend_jax.evaluate.text_losses import answer_loss, answer_stage_of, text_losses
from moextend_jax.plan.abstract_step import abstract_step
from moextend_jax.runs import making
from moextend_jax.runs.askable import askable
from moextend_jax.runs.data_of import readers_of, source_of
from moextend_jax.runs.export import open_workdir
from moextend_jax.runs.making import FACTS, check_made, seconds_before
from moextend_jax.runs.models_of import frozen_unchanged, leaves_of, model_with, open_model
from moextend_jax.runs.ready import ready
from moextend_jax.runs.results import FIRST, Data
from moextend_jax.runs.run import Run, known_settings, open_run, remember, settings_of, write_json
from moextend_jax.settings import MediumSettings, from_config_dict
from moextend_jax.train.metrics import read_metrics
from moextend_jax.train.stages import split

RECIPE_CHANGES = {
    "paper": [],
    "mixed": [  # the released code's other choices, one by one, as flags
        "--config.recipe.routers_kept=after",
        "--config.recipe.source_under=after",
        "--config.recipe.finetune_trains=extension_and_projector",
        "--config.recipe.counted_picks=least_likely",
        "--config.recipe.aux_loss=released",
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(configuration file, work directory) after `moextend run` with the baseline."""
    folder = tmp_path_factory.mktemp("pipeline")
    base = tiny.write_base(folder / "base")
    config = tiny.write_config(
        folder, base=base, data="easy_vqa/questions", split="train[:400]", evaluated="test", questions=8
    )
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_easy_vqa(patch)
        flags = ["--config.baseline=true", "--config.validate_every=2", "--config.evaluate.leave_out=subsets"]
        with (folder / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
            cli.main(["run", f"--config={config}", f"--workdir={folder / 'work'}", *flags])
    return config, folder / "work"


def open_again(finished) -> Run:
    _, workdir = finished
    settings = from_config_dict(json.loads((workdir / "config.json").read_text())["settings"])
    return open_run(settings, workdir)


def test_a_run_ends_in_where_its_report_is_and_what_to_try_next(finished):
    config, workdir = finished
    lines = (config.parent / "printed.txt").read_text().splitlines()
    end = lines.index(f"report: {workdir / 'report.html'}")
    assert lines[end + 1] == "next:" and all(line.startswith("  moextend ") for line in lines[end + 2 :])
    assert sum("report" in line for line in lines) == 1 and (workdir / "report.html").is_file()


def test_the_summary_has_every_figure(finished):
    summary = json.loads((finished[1] / "summary.json").read_text())
    assert {"question_only", "aligned", "moextend", "full"} <= set(summary["accuracy"])
    for text in ("wordnet", "kjv"):
        assert set(summary["text_loss"][text]) == {"base", "moextend", "full"}
        assert all(5 < value < 15 for value in summary["text_loss"][text].values())
    assert {"align", "extend", "finetune", "total"} <= set(summary["seconds"])
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    assert all(0 <= summary["accuracy"][name] <= 1 for name in ("question_only", "aligned", "moextend", "full"))
    assert summary["frozen_unchanged"] is True


def test_seconds_are_of_all_starts(finished, tmp_path):
    """A stage that was cut off keeps what its logged steps took."""
    shutil.copytree(finished[1], tmp_path / "work")
    run, stage = open_again((finished[0], tmp_path / "work")), tmp_path / "work" / "align" / "stage.json"
    seconds = json.loads(stage.read_text())["seconds"]
    assert seconds_before(run, "align") == seconds > 0
    stage.unlink()
    assert 0 < seconds_before(run, "align") < seconds
    (tmp_path / "work" / "align" / "metrics.jsonl").unlink()
    assert seconds_before(run, "align") == 0


def test_the_questions_are_asked_without_the_image_too(finished):
    config, workdir = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary["without"]["image"]) == {"aligned", "moextend", "full"}
    for model, alone in summary["without"]["image"].items():
        asked = summary["importance"][model]
        assert asked["subsets"]["none"] == {"right": 8 * alone, "questions": 8, "accuracy": alone}
        assert asked["subsets"]["image"]["accuracy"] == summary["accuracy"][model]
        assert asked["media"]["image"]["importance"] == pytest.approx(summary["accuracy"][model] - alone)
    assert (config.parent / "printed.txt").read_text().count("without image") == 3
    assert "without image" in (workdir / "report.html").read_text()


def test_the_selection_is_recorded_with_a_picture(finished):
    record = json.loads((finished[1] / "select" / "routing.json").read_text())
    total = {when: np.array(record[when]["text"]) + np.array(record[when]["image"]) for when in ("before", "after")}
    tokens = record["tokens"]["text"] + record["tokens"]["image"]
    for counts_ZE in total.values():
        assert counts_ZE.shape == (3, 4)
        np.testing.assert_array_equal(counts_ZE.sum(axis=1), 2 * tokens)
    shares = {when: counts_ZE / counts_ZE.sum(axis=1, keepdims=True) for when, counts_ZE in total.items()}
    shift_Z = np.std(shares["before"] - shares["after"], axis=1, ddof=1)
    np.testing.assert_allclose(record["shift"], shift_Z, atol=1e-12)
    assert record["chosen_layers"] == [int(shift_Z.argmax())]
    assert record["sources"] == [int(shares["before"][record["chosen_layers"][0]].argmax())]
    assert record["samples"] == 8 and record["tokens"]["image"] == 8 * 4
    assert (finished[1] / "select" / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", ["align", "extend", "finetune", "full"])
def test_every_stage_leaves_its_records(finished, stage: str):
    folder = finished[1] / stage
    record = json.loads((folder / "stage.json").read_text())
    assert record["frozen_unchanged"] is True and record["steps"] == (2 if stage == "full" else 3)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, record["steps"] + 1))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["tokens"] > 0 for row in rows)
    assert all(len(row["load_max"]) == 3 for row in rows) and ("new_share" in rows[0]) is (stage == "finetune")
    assert [row["step"] for row in rows if "validation_loss" in row] == ([2] if stage == "full" else [2, 3])
    assert list((folder / "tensorboard").iterdir())


def test_results_hold_what_the_stage_trains_and_nothing_else(finished):
    trained = {
        stage: set(json.loads((finished[1] / stage / "stage.json").read_text())["trained"])
        for stage in ("align", "extend", "finetune", "full")
    }
    assert all(path.startswith("media/image/projector/") for path in trained["align"])
    assert trained["extend"] == {"decoder/layers/moe/gate"}
    assert {path.split("/")[0] for path in trained["finetune"]} == {"extensions"}
    assert {"/".join(path.split("/")[:-1]).partition("/layers")[0] for path in trained["full"]} >= {
        "decoder", "media/image/projector", "media/image/tower",
    }  # fmt: skip


def test_the_finished_model_is_the_files_plus_the_new_leaves(finished):
    run = open_again(finished)
    _, arrays = open_model(run, "moextend")
    _, start = model_with(run, FIRST.results["finetune"].parents)
    files = open_base(run.settings.base, run.settings.vision, feature_layer=run.settings.recipe.feature_layer).leaves
    assert files.keys() == run.pretrained.keys()
    for path, leaf in files.items():  # the probe's routers are gone, in the paper's recipe
        whole = np.stack([leaf.ours(index) for index in leaf.indices()]).reshape(leaf.shape)
        assert np.asarray(arrays[path]).tobytes() == np.asarray(whole, arrays[path].dtype).tobytes(), path
    for path in (
        "extensions/image/new_experts/w_up",
        "extensions/image/router/new_gate",
        "extensions/image/router/calibrator/w_out",
    ):
        assert np.abs(np.asarray(arrays[path]) - np.asarray(start[path])).max() > 0, path
    layer, source = run_selection(finished)
    np.testing.assert_array_equal(
        start["extensions/image/new_experts/w_up"][0, 0],
        run.pretrained["decoder/layers/moe/experts/w_up"][layer, source],
    )
    assert frozen_unchanged(run)


def test_a_pretrained_weight_that_has_changed_is_seen(finished, tmp_path):
    """In what finetune has written, and in what a stage has recorded of itself."""
    shutil.copytree(finished[1], tmp_path / "work")
    run = open_again((finished[0], tmp_path / "work"))
    assert frozen_unchanged(run) and summarise(run, {"accuracy": {}}, total_seconds=None)["frozen_unchanged"] is True
    record = json.loads((tmp_path / "work" / "align" / "stage.json").read_text())
    (tmp_path / "work" / "align" / "stage.json").write_text(json.dumps(record | {"frozen_unchanged": False}))
    assert summarise(run, {"accuracy": {}}, total_seconds=None)["frozen_unchanged"] is False
    result, path = tmp_path / "work" / "finetune" / "result", "decoder/layers/attention/query"
    facts, leaves = train_state.result_facts(result), leaves_of(run, "finetune")
    assert facts is not None and path not in leaves
    shutil.rmtree(result)
    changed = {**leaves, path: run.pretrained[path].at[0, 0, 0, 0].add(1e-3)}
    train_state.save_leaves(result, changed, facts={name: fact for name, fact in facts.items() if name != "identity"})
    assert not frozen_unchanged(open_again((finished[0], tmp_path / "work")))


def test_what_a_stage_trains_is_its_own_and_in_train_dtype(finished):
    """Small updates of bfloat16 weights would be lost; what is frozen takes no more than the files' weights."""
    run = open_again(finished)
    half = {path: leaf.astype("bfloat16") for path, leaf in run.pretrained.items()}
    run = dataclasses.replace(
        run, pretrained=half, settings=dataclasses.replace(run.settings, dtype="bfloat16"),
        config=dataclasses.replace(run.config, dtype="bfloat16"),
    )  # fmt: skip
    for stage in ("extend", "finetune", "full"):
        row = FIRST.results[stage]
        trains = FIRST.patterns(stage, recipe=run.settings.recipe)
        model, arrays = model_with(run, row.parents, trains=trains)
        trainable, frozen = split(arrays, trains)
        assert {str(leaf.dtype) for leaf in trainable.values()} == {"float32"}
        assert {str(frozen[path].dtype) for path in frozen.keys() & half.keys()} <= {"bfloat16"}
        train_state.free(trainable)
        assert not any(leaf.is_deleted() for leaf in half.values())
        planned = abstract_step(run.settings, model.config, stage=stage, mesh=run.mesh).state.trainable
        assert {path: leaf.dtype for path, leaf in planned.items()} == {
            path: leaf.dtype for path, leaf in trainable.items()
        }


@pytest.mark.parametrize(
    ("command", "change"),
    [
        *((command, "--config.text_isolation=strict") for command in ("run", "align", "evaluate")),
        *((command, "--config.select.share=0.7") for command in ("run", "select", "align")),
        ("run", "--config.grow.start=twin"),
        ("run", "--config.finetune.steps=4"),
    ],
)
def test_a_refused_command_changes_nothing(finished, command: str, change: str):
    """Neither what the folder remembers, by which chat and export open it, nor what it holds."""
    config, workdir = finished
    kept = [workdir / "config.json", workdir / "select" / "routing.json", workdir / "summary.json"]
    before = [path.read_bytes() for path in kept]
    words = [command, f"--config={config}", f"--workdir={workdir}", "--config.baseline=true", change]
    with pytest.raises(MoextendError, match="belongs to another run"):
        cli.call(words)
    assert [path.read_bytes() for path in kept] == before


def test_what_was_selected_under_other_settings_is_not_grown(finished, tmp_path: Path):
    """`moextend grow` alone took the old choice in silence; after `moextend select` it takes the new one."""
    config, workdir = finished[0], shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(workdir / "grow")
    share = [f"--config={config}", f"--workdir={workdir}", "--config.baseline=true", "--config.select.share=0.7"]
    with pytest.raises(MoextendError, match=r"select was chosen under other settings \(settings.share: 0.5 there, 0.7"):
        cli.call(["grow", *share])
    assert not (workdir / "grow").exists()
    cli.call(["select", *share])
    cli.call(["grow", *share])


def test_what_was_cut_off_while_it_was_written_is_not_there(finished, tmp_path: Path):
    """So that the same command goes on; and a selection of before there were facts is counted again."""
    run = open_again(finished)
    shutil.copytree(run.workdir, tmp_path / "cut")
    cut = dataclasses.replace(run, workdir=tmp_path / "cut")
    path = cut.workdir / "select" / "routing.json"
    record = json.loads(path.read_text())
    del record["facts"]
    path.write_text(json.dumps(record))
    check_made(cut, FIRST.results)
    for name in ("grow", "finetune", "align"):
        for step in (cut.workdir / name / "result").iterdir():
            shutil.rmtree(step)
        check_made(cut, FIRST.results)


DECISIVE = {
    "finetune": {
        "expert_storage": "int8", "method.drift": 0.01, "finetune.optimizer.weight_decays": {"new_experts": 0.1},
        "finetune.optimizer.multipliers": {"projector": 2.0},
    },
    "select": {"select.layers": "interval", "select.source": "weights", "select.wide": 2, "select.new_experts": 2},
    "grow": {"grow.column": "mean", "grow.expert": "random", "grow.start": "twin"},
}  # fmt: skip


@pytest.mark.parametrize("name", DECISIVE)
def test_what_decides_a_result_is_seen_in_both_directions(finished, name: str):
    """A setting that goes back to its default makes another run too."""
    run, facts = open_again(finished), FACTS[FIRST.results[name].how]
    for setting, value in DECISIVE[name].items():
        record = json.loads((run.workdir / "config.json").read_text())["settings"] | {"baseline": False}
        *groups, field = setting.split(".")
        group = record
        for part in groups:
            group = group[part]
        group[field] = value
        changed = dataclasses.replace(run, settings=from_config_dict(record))
        saved = [json.loads(json.dumps(facts(of, name))) for of in (run, changed)]
        assert train_state.differing(*saved) and train_state.differing(*reversed(saved)), setting
        assert not train_state.differing(saved[1], saved[1])


def test_what_stands_between_tower_and_decoder_decides_a_result(finished):
    run = open_again(finished)
    medium = run.config.media["image"]
    pooled = dataclasses.replace(medium, projector=dataclasses.replace(medium.projector, kind="pool", neighbours=2))
    configs = [dataclasses.replace(run.config, media=Named({"image": of})) for of in (medium, pooled)]
    facts, changed = (dataclasses.replace(run, config=config).facts_of("align") for config in configs)
    assert train_state.differing(facts, changed) and train_state.differing(changed, facts)
    del facts["medium"]  # an older record says nothing of it
    assert not train_state.differing(facts, changed)


def test_what_a_command_does_not_train_keeps_its_settings(finished, tmp_path):
    """`moextend evaluate` may be given another configuration than the run's."""
    run = dataclasses.replace(open_again(finished), workdir=shutil.copytree(finished[1], tmp_path / "run"))
    trained = settings_of(run.workdir)
    assert trained is not None
    other = dataclasses.replace(
        run.settings,
        finetune=dataclasses.replace(run.settings.finetune, loss_chunk=77),
        evaluate=dataclasses.replace(run.settings.evaluate, questions=3),
    )
    remember(dataclasses.replace(run, settings=other), made=[])
    assert settings_of(run.workdir) == dataclasses.replace(trained, evaluate=other.evaluate)
    remember(dataclasses.replace(run, settings=other), made=["finetune"])
    assert settings_of(run.workdir) == dataclasses.replace(trained, evaluate=other.evaluate, finetune=other.finetune)
    write_json(run.workdir / "config.json", {"settings": {"bass": 1}})  # of another version
    remember(run, made=[])
    assert settings_of(run.workdir) == run.settings


def unopened(workdir: Path, **changes: Any) -> Run:
    """A run of which nothing has been read."""
    none: Any = None
    settings = dataclasses.replace(tiny.run_settings(), **changes)
    return Run(
        settings=settings, workdir=workdir, config=tiny.PLAIN, tokenizer=none, pretrained={}, base_hash="", mesh=none
    )  # fmt: skip


def test_layers_that_were_chosen_by_other_rows_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """By `moextend finetune` or `evaluate` on other data than the probe's, which may be meant; `run` refuses it."""
    (tmp_path / "select").mkdir()
    (tmp_path / "select" / "routing.json").touch()
    monkeypatch.setattr(train_state, "result_facts", lambda folder: None if folder.parent.name == "select" else {})
    monkeypatch.setattr(Run, "facts_of", lambda *_, **__: {})
    monkeypatch.setattr(making, "selection_of", lambda *_: {"facts": {"rows": {"data": "a"}}})
    monkeypatch.setitem(making.FACTS, "select", lambda *_: {"rows": now})
    now = {"data": "a"}
    check_made(unopened(tmp_path))
    assert not capsys.readouterr().err
    now["data"] = "b"
    check_made(unopened(tmp_path))
    assert "select was made from other rows: rows.data: 'a' there, 'b' now\n" in capsys.readouterr().err
    with pytest.raises(MoextendError, match="rows.data"):
        check_made(unopened(tmp_path), ["select"])


@pytest.mark.parametrize("what", ["select", "text", "answers", "features", "examples"])
def test_several_processes_stop_between_batches_of_whatever_they_compute(finished, what: str, tmp_path, monkeypatch):
    """JAX has caught the signal, so that a phase of hours would be killed in the end, and not put back."""
    run = dataclasses.replace(open_again(finished), workdir=shutil.copytree(finished[1], tmp_path / "run"))
    ready_run, model, computed = ready(run, ["finetune"]), askable(run, "base"), run.workdir / "select" / "routing.json"
    source = source_of(ready_run, Data("finetune"))
    questions = questions_of(run, asked_of_all(run)["image"])
    computed.unlink()
    if what == "features":
        shutil.rmtree(run.workdir / "features")
    asks: dict[str, Callable[[], Any]] = {
        "select": lambda: making.select(ready_run, "select"),
        "text": lambda: text_losses(run, model),
        "answers": lambda: answer_loss(run, model, source, stage=answer_stage_of(run, source), readers={}),
        "features": lambda: readers_of(run, source, data="easy_vqa/questions", split="train[:400]"),
        "examples": lambda: picks_of(run, model, questions.prompted, questions.readers),
    }
    monkeypatch.setattr(preemption._Notice, "alone", False)
    monkeypatch.setattr(preemption, "given", lambda: True)
    with pytest.raises(preemption.Preempted):
        asks[what]()
    assert not computed.exists() and (what != "features" or not [*(run.workdir / "features").glob("*/features.npy")])


def test_numbers_of_other_settings_do_not_stay_beside_the_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As they did where a run was cut off between a stage and its summary."""
    remember(unopened(tmp_path))
    write_json(tmp_path / "summary.json", {"data": "old"})
    remember(unopened(tmp_path))
    remember(unopened(tmp_path), made=["align"])
    remember(unopened(tmp_path, mesh={"data": 2, "expert": 4}, log_every=1))  # which decide no number
    assert (tmp_path / "summary.json").exists() and not capsys.readouterr().err
    remember(unopened(tmp_path, rollbacks=1), made=["align"])
    assert not (tmp_path / "summary.json").exists() and "summary.json is of other settings" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary_before.json").read_text()) == {"data": "old"}


def test_folders_of_a_run_are_found_from_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    media = {"film": MediumSettings(kind="video", tower="clip")}
    named = {"base": "models/base", "vision": "none", "images": "", "manual_dir": "gs://b/LLAVA", "media": media}
    run = unopened(tmp_path / "work", medium="", **named)
    remember(run)
    known = settings_of(run.workdir)
    assert known is not None and known.media["film"].tower == str(tmp_path / "clip")
    assert {**named, "base": str(tmp_path / "models/base"), "media": known.media} == {
        field: getattr(known, field) for field in named
    }
    # In a work directory from before they are as they were given: still the same settings.
    record = json.loads((run.workdir / "config.json").read_text())
    record["settings"]["base"] = "models/base"
    write_json(run.workdir / "config.json", record)
    write_json(run.workdir / "summary.json", {})
    remember(run)
    assert (run.workdir / "summary.json").exists()


def test_what_was_moved_together_with_a_work_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project = tmp_path / "project"
    for name in ("base", "towers/clip", "elsewhere"):
        (project / name).mkdir(parents=True)
    (project / "elsewhere").rename(elsewhere := tmp_path / "elsewhere")
    media = {"film": MediumSettings(kind="video", tower=str(project / "towers/clip"))}
    named = {"base": str(project / "base"), "vision": "none", "images": str(elsewhere), "media": media}
    run = unopened(project / "runs/work", medium="", **named)
    remember(run)
    assert known_settings(run.workdir) == settings_of(run.workdir) == run.settings
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(moved / "runs")
    known = known_settings("work")
    assert (known.base, known.images) == (str(moved / "base"), str(elsewhere))
    assert known.media["film"].tower == str(moved / "towers/clip")
    (moved / "base").rename(tmp_path / "gone")
    where = r"project/base does not exist, which .*work/config.json names, .* write its new place there"
    for open_it in (known_settings, open_workdir):
        with pytest.raises(MoextendError, match=where):
            open_it(moved / "runs/work")
    record = json.loads((moved / "runs/work/config.json").read_text())
    record["settings"]["base"] = str(tmp_path / "gone")
    write_json(moved / "runs/work/config.json", record)
    assert known_settings("work").base == str(tmp_path / "gone")


def run_selection(finished) -> tuple[int, int]:
    record = json.loads((finished[1] / "select" / "routing.json").read_text())
    return record["chosen_layers"][0], record["sources"][0]


def test_the_hash_sees_one_changed_bit():
    arrays = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}
    digest = content_hash(arrays)
    assert content_hash(dict(reversed(arrays.items()))) == digest
    for other in (
        arrays | {"a": np.array([0, 0, -0.0], np.float32)},
        arrays | {"b": np.ones(4, np.float32)},
        {"c": arrays["a"], "b": arrays["b"]},
    ):
        assert content_hash(other) != digest


def test_the_report_is_one_self_contained_file(finished):
    text = (finished[1] / "report.html").read_text()
    assert len(text) > 10_000 and "</html>" in text
    assert not any(mark in text for mark in ('src="http', 'href="http', "@import", "url(http"))


@pytest.mark.slow
def test_generate_streams_from_the_finished_model(finished, capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "red.png")
    for extra in ([], [f"--image={tmp_path / 'red.png'}"], ["--model=full"], ["--temperature=1.0", "--top_k=5"]):
        cli.main(["generate", f"--workdir={finished[1]}", "--prompt=What is it?", "--max_new_tokens=3", *extra])
        assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_few_questions_and_data_that_training_skips_are_evaluated(finished, tmp_path: Path, capsys):
    """A conversation without an answer is left out of the questions and of what answers are guessed from; one without
    an image is asked; seven questions make two batches of four, and more examples than rows."""
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "work")
    llava = tiny.write_llava(tmp_path / "llava", rows=7)
    for path in llava.glob("*.json"):
        entries = json.loads(path.read_text())
        entries[3]["conversations"].pop()
        entries[4] = {"id": "text", "conversations": [
            {"from": "human", "value": "Which is it?"}, {"from": "gpt", "value": "number 4"},
        ]}  # fmt: skip
        path.write_text(json.dumps(entries))
    Image.new("RGB", (40, 20), (0, 90, 0)).save(llava / "0.png")  # the report's grid is of the square around it
    settings = {
        "finetune.data": "llava_instruct", "finetune.split": "train", "evaluate.data": "llava_instruct",
        "evaluate.split": "train", "evaluate.questions": 7, "evaluate.examples": 6, "manual_dir": llava,
        "data_dir": tmp_path / "data", "faults.policies.order": "skip", "cache_features": "false",
    }  # fmt: skip
    words = [f"--config={config}", f"--workdir={tmp_path / 'work'}"]
    cli.main(["evaluate", *words, *(f"--config.{name}={value}" for name, value in settings.items())])
    assert "1 of 7 questions are left out: 1 order" in capsys.readouterr().out
    record = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert record["accuracy"]["questions"] == 6
    examples = json.loads((tmp_path / "work" / "examples.json").read_text())
    pictures = [Image.open(io.BytesIO(base64.b64decode(example["image_png"]))) for example in examples]
    assert sorted(picture.size for picture in pictures) == [(32, 32)] * 4 + [(40, 40)]  # those with an image
    routing = json.loads((tmp_path / "work" / "finetune" / "routing.json").read_text())
    assert routing["tokens"]["image"] == 5 * 4  # every question once, and no row that only fills a batch
    assert sum(routing["counts"]["text"][0]) == 2 * routing["tokens"]["text"]
    assert routing["loads"]["llava_instruct"] == routing["counts"]
    assert [all(has_O) for has_O in routing["has"]] == [z in routing["extended_layers"] for z in range(3)]
    assert {data: [*kinds] for data, kinds in routing["pairs"].items()} == {
        "llava_instruct": ["text", "image"], "wordnet": ["text"], "kjv": ["text"],
    }  # fmt: skip
    pairs_ZOO = np.array(routing["pairs"]["llava_instruct"]["text"])
    assert (pairs_ZOO.sum(axis=(1, 2)) == 2 * 2 * routing["tokens"]["text"]).all()
    for example in examples:
        traced = example["routing"]
        assert traced["experts"][-1] == "new 0" and sum(patch >= 0 for patch in traced["patches"]) == 4
        for model in traced["models"].values():
            ids_ZLk, weights_ZLk = np.array(model["picks"]), np.array(model["weights"])
            assert ids_ZLk.shape == weights_ZLk.shape == (len(pairs_ZOO), len(traced["tokens"]), 2)
            assert (weights_ZLk.sum(axis=-1) == 100).all()
        assert np.max(traced["models"]["aligned"]["picks"]) < len(traced["experts"]) - 1


@pytest.mark.slow
def test_the_other_choices_of_the_recipe_run_too(finished, tmp_path):
    config, _ = finished
    arguments = [f"--config={config}", f"--workdir={tmp_path}", *RECIPE_CHANGES["mixed"]]
    for stage in ("align", "extend", "select", "grow", "finetune"):
        cli.main([stage, *arguments])
    record = json.loads((tmp_path / "finetune" / "stage.json").read_text())
    assert {path.split("/")[0] for path in record["trained"]} == {"extensions", "media"}
    run = open_again((config, tmp_path))
    _, arrays = open_model(run, "moextend")
    gate = "decoder/layers/moe/gate"
    assert np.abs(np.asarray(arrays[gate]) - np.asarray(run.pretrained[gate])).max() > 0
