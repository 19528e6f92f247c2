"""A chain of extensions, of pictures, features and sounds: what was learnt before is bit for bit what it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import tiny
from PIL import Image
from rich.console import Console

from moextend_jax import cli, continual
from moextend_jax.check_data import check_command
from moextend_jax.commands import whole_run
from moextend_jax.config import MoextendError
from moextend_jax.continual import check_nothing_is_lost
from moextend_jax.evaluate import evaluation
from moextend_jax.evaluate.composing import RULES
from moextend_jax.routing.stats import read_stats
from moextend_jax.runs import results
from moextend_jax.runs.making import seed_of
from moextend_jax.runs.models_of import open_model, selection_of
from moextend_jax.runs.run import Run, working
from moextend_jax.settings import (
    EvaluateSettings,
    ExtensionSettings,
    Link,
    MediumSettings,
    MethodSettings,
    RunSettings,
    SelectSettings,
    StageSettings,
)

ROWS = 24


def write_features(folder: Path, *, medium: str = "touch") -> Path:
    folder.mkdir(parents=True)
    rng, entries = np.random.default_rng(0), []
    for n in range(ROWS):
        np.savez(folder / f"{n}.npz", x=rng.normal(size=(3, 5)).astype(np.float32))
        talk = [
            {"from": "human", "value": f"<features:{medium}>\nHow is it? {n}"},
            {"from": "gpt", "value": f"soft {n % 3}"},
        ]
        entries.append({"id": f"{medium}{n}", "features": {medium: f"{n}.npz"}, "conversations": talk})
    (folder / "touch.json").write_text(json.dumps(entries))
    return folder / "touch.json"


def write_sounds(folder: Path) -> Path:
    folder.mkdir(parents=True)
    entries = []
    for n in range(ROWS):
        wave = np.sin(np.arange(8000) * (0.02 + 0.005 * n)).astype(np.float32) / 2
        soundfile.write(folder / f"{n}.wav", wave, 16000)
        talk = [
            {"from": "human", "value": f"<audio:sound>\nWhat is heard? {n}"},
            {"from": "gpt", "value": f"a tone {n % 2}"},
        ]
        entries.append({"id": f"sound{n}", "audio": {"sound": f"{n}.wav"}, "conversations": talk})
    (folder / "sounds.json").write_text(json.dumps(entries))
    return folder / "sounds.json"


def write_pictures_with(sounds: Path) -> Path:
    """Conversations with a picture and one of these sounds each."""
    folder, entries = sounds.parent, []
    for n in range(ROWS):
        Image.new("RGB", (8, 8), (10 * n, 0, 0)).save(folder / f"{n}.png")
        talk = [
            {"from": "human", "value": f"<image>\n<audio:sound>\nWhich? {n}"},
            {"from": "gpt", "value": f"number {n % 2}"},
        ]
        entries.append({"id": f"both{n}", "image": f"{n}.png", "audio": {"sound": f"{n}.wav"}, "conversations": talk})
    (folder / "both.json").write_text(json.dumps(entries))
    return folder / "both.json"


def groups(data: str, **more) -> dict:
    stage = StageSettings(
        data=data, steps=2, batch_size=8, length=0, images_per_row=0, loss_chunk=64, split="train[:16]"
    )
    evaluate = EvaluateSettings(
        data=data, questions=8, split="train[16:]", batch_size=8, length=0, max_new_tokens=3, text_length=64,
        text_batch_size=8,
    )  # fmt: skip
    select = SelectSettings(held_out=6, share=0.5, batch_size=6)
    return dict(align=stage, extend=stage, finetune=stage, full=stage, evaluate=evaluate, select=select) | more


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    """Of pictures, then of features in other layers, two new experts in each."""
    folder = tmp_path_factory.mktemp("chain")
    base = tiny.write_base(folder / "base")
    llava = tiny.write_llava(folder / "llava", rows=ROWS)
    select = SelectSettings(held_out=6, share=0.7, batch_size=6, new_experts=2)
    touch = groups(str(write_features(folder / "touch")), select=select)
    return RunSettings(
        **groups(str(llava / "llava_v1_5_mix665k.json")),
        extensions={"touch": ExtensionSettings(medium="touch", **touch)},
        media={"touch": MediumSettings(kind="features", width=5, patches=3)},
        base=str(base), vision=str(base / "vision"), dtype="float32", remat="none", text_isolation="strict",
        checkpoint_every=100, log_every=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> tuple[Run, dict]:
    workdir = tmp_path_factory.mktemp("run") / "w"
    record = whole_run(settings, workdir)
    with working(settings, workdir) as run:
        return run, record


@pytest.mark.slow
def test_a_later_extension_is_copied_from_pretrained_experts(finished):
    run, _ = finished
    record = selection_of(run, "touch")
    experts = run.config.decoder.experts
    for when in ("before", "after"):
        assert all(len(row) == experts for of in record[when].values() for row in of)
    assert max(record["sources"]) < experts
    assert (run.folder("select:touch") / "routing.png").exists()


@pytest.mark.slow
def test_nothing_learnt_before_is_lost(finished):
    run, record = finished
    chain = record["chains"]["strict"]
    assert [list(row) for row in chain["scores"].values()] == [["image"], ["image", "touch"]]
    assert set(chain["forgetting"].values()) == {0.0} and chain["backward_transfer"] == 0.0
    for of in record["text_loss"].values():
        assert {of["moextend:image"], of["moextend:touch"], of["moextend"]} == {of["base"]}
    assert record["frozen_unchanged"]
    check_nothing_is_lost(record, run.settings.links)
    record["text_loss"]["kjv"] = record["text_loss"]["kjv"] | {"moextend:touch": 0.0}
    with pytest.raises(MoextendError, match="moextend:touch on kjv"):
        check_nothing_is_lost(record, run.settings.links)


def test_a_later_extension_may_answer_questions_with_its_own_medium_otherwise():
    """Two tasks on the same pictures: what is asked about these is not kept apart, what is asked about sounds is."""
    links = [Link("image", "image"), Link("sound", "sound"), Link("colour", "image")]
    of = {"image": {"image": 0.9}, "sound": {"image": 0.9, "sound": 0.5}}
    asked = {"image": {"media": ["image"]}, "sound": {"media": ["sound"]}, "colour": {"media": ["image"]}}

    def record(**after_colour: float) -> dict[str, Any]:
        scores = of | {"colour": after_colour | {"colour": 1.0}}
        return {"chains": {"strict": {"scores": scores}}, "asked": asked, "text_loss": {}}

    check_nothing_is_lost(record(image=0.1, sound=0.5), links)
    with pytest.raises(MoextendError, match=r"sound after colour -0\.25"):
        check_nothing_is_lost(record(image=0.1, sound=0.25), links)


def test_what_is_learnt_behind_an_extension_that_is_apart_goes_on_from_those_before_it(settings):
    touch = settings.extensions["touch"]
    later = {"alone": dataclasses.replace(touch, apart=True), "touch": touch}
    settings = dataclasses.replace(settings, extensions=later)
    run: Any = SimpleNamespace(settings=settings, table=results.table(settings), has=lambda name: True)
    asked: Any = {"image": None, "alone": None, "touch": None}
    plan = evaluation._plan(run, asked)
    assert plan["moextend:alone"] == ["alone"] and plan["moextend:touch"] == ["image", "touch"]


def test_a_checkpoint_to_resume_from_is_no_matter_of_several_chains(settings, tmp_path: Path):
    with pytest.raises(MoextendError, match="--resume_from is for one chain"):
        whole_run(dataclasses.replace(settings, chains=("strict", "open")), tmp_path, resume_from=tmp_path)


def test_a_medium_that_one_apart_has_aligned_is_no_random_projector():
    """Of an extension after it; and of another one that is apart."""
    links = [Link(), Link("sound", "sound", apart=True), Link("more", "sound"), Link("other", "sound", apart=True)]
    rows = results.of_links(tuple(links)).results
    assert rows["finetune:more"].parents == ("align", "grow", "finetune", "align:sound", "grow:more")
    assert rows["finetune:other"].parents == ("align", "align:sound", "grow:other")
    assert "align:more" not in rows


def test_no_two_extensions_of_a_run_begin_with_the_same_numbers(settings):
    lora, damc = MethodSettings(name="lora"), MethodSettings(name="damc")
    first, *more = dataclasses.replace(settings, method=lora).links, Link("two", "image", rival=damc.rival("image"))
    names = [part for link in (*first, *more) for part in link.parts or (link.name,)]
    of: Any = SimpleNamespace(links=(*first, *more), seed=3)
    seeds = [seed_of(of, name) for name in names]
    assert seeds[0] == 3 and len({*seeds}) == len(names) == 4


def test_a_rival_has_nothing_that_a_mixture_trains(settings):
    with pytest.raises(MoextendError, match="mixture trains router columns, .* nothing of image, whose"):
        dataclasses.replace(settings, mixture=settings.finetune, method=MethodSettings(name="lora"))


def test_all_processes_open_the_data_of_guesses_in_one_order(monkeypatch):
    """Process 0 opens first, and the others wait for it by the name of the data: a set has another order in each."""
    names, opened = [f"extension{n}" for n in range(16)], []
    monkeypatch.setattr(evaluation, "source_of", lambda run, data: opened.append(data.of))
    monkeypatch.setattr(evaluation.results, "named", lambda settings, name, stage: name)
    asked: Any = {name: SimpleNamespace(asked=SimpleNamespace(extension=name), prompted=()) for name in names}
    evaluation._guesses(cast(Any, SimpleNamespace(settings=None)), asked)
    assert opened == names


def test_a_model_of_two_names_is_asked_once(settings):
    def same(settings: RunSettings) -> list[tuple[str, str]]:
        models = results.table(settings).models
        names = ["base", "aligned", "moextend", "full", "moextend:image", "moextend:touch", "full:image", "full:touch"]
        firsts = [evaluation._first_name(names, name, models=models) for name in names]
        return [(name, first) for name, first in zip(names, firsts, strict=True) if first != name]

    assert same(settings) == [("moextend:touch", "moextend"), ("full:touch", "full")]
    assert same(dataclasses.replace(settings, mixture=settings.finetune)) == [("full:touch", "full")]
    task = results.of_links((settings.links[0]._replace(medium=""),)).models
    assert task["aligned"].results == task["base"].results  # and yet the base is asked as plain text
    assert evaluation._first_name(["base", "aligned"], "aligned", models=task) == "aligned"


@pytest.mark.slow
def test_the_finished_model_has_all_extensions_and_their_leaves_as_they_were_trained(finished):
    run, _ = finished
    opened = open_model(run, "moextend")
    config = opened.model.config
    assert [len(added.layers) for added in config.extensions.values()] == [1, 2]
    assert config.extensions["touch"].new_experts == 2 and len(config.extensions["touch"].sources) == 4
    assert config.outputs == config.decoder.experts + 3
    before = open_model(run, "moextend:image").arrays
    own = [path for path in before if path.startswith(("extensions/image/", "media/image/"))]
    assert own and all(np.array_equal(before[path], opened.arrays[path]) for path in own)


@pytest.mark.slow
def test_results_lie_in_folders_of_their_extensions(finished):
    run, _ = finished
    assert (run.workdir / "finetune" / "result").exists() and (run.workdir / "touch" / "finetune" / "result").exists()
    record = json.loads((run.workdir / "touch" / "select" / "routing.json").read_text())
    assert record["new_experts"] == 2 and len(record["sources"]) == 4
    assert results.table(run.settings).result("finetune:touch").parents == (
        "align", "grow", "finetune", "align:touch", "grow:touch",
    )  # fmt: skip


@pytest.mark.slow
def test_routing_is_counted_on_a_later_medium(finished, tmp_path):
    run, _ = finished
    data = run.settings.extensions["touch"].finetune.data
    asked = ["routing", "collect", "--workdir", str(run.workdir), "--data", data, "--samples", "4", "--length", "64"]
    cli.call([*asked, "--out", str(tmp_path / "a.npz")])
    assert read_stats(tmp_path / "a.npz").tokens["image"] == 4 * 3  # of an item each of three positions
    with pytest.raises(MoextendError, match="--ids_out carries pictures, and the data have items of touch"):
        cli.call([*asked, "--out", str(tmp_path / "b.npz"), "--ids_out", str(tmp_path / "ids.npz")])


def test_data_check_reads_the_items_of_every_medium(settings, capsys):
    assert check(settings) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert {tuple(part["items"]) for part in data} == {("<image>",), ("<features:touch>",)}
    touch = settings.extensions["touch"]
    other = dataclasses.replace(touch, align=settings.align)
    assert check(dataclasses.replace(settings, extensions={"touch": other})) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "align:touch trains the projector, and none of its" in problem and "an item of touch" in problem


def check(settings: RunSettings) -> int:
    return check_command(settings, data_dir=None, processes=0, as_json=True, console=Console(stderr=True))


RUN_BESIDE = continual._run_beside


def _run_beside(settings: RunSettings, folder: Path, *arguments: Any) -> None:
    """In a process of its own, to which `conftest.short_texts` is unknown."""
    texts = folder.with_name(f"{folder.name} texts")
    texts.mkdir()
    tiny.shorten_texts(texts)
    RUN_BESIDE(settings, folder, *arguments)


@pytest.mark.slow
def test_chains_side_by_side_then_trained_together(settings, tmp_path, monkeypatch):
    """The second extension is for sounds, and is also asked about pictures and sounds together."""
    monkeypatch.setattr(continual, "_run_beside", _run_beside)
    sounds = write_sounds(tmp_path / "sound")
    both = write_pictures_with(sounds)
    evaluate = dataclasses.replace(groups(str(sounds))["evaluate"], sets={"both": str(both)})
    sound = ExtensionSettings(medium="sound", **groups(str(sounds), evaluate=evaluate))
    tower = MediumSettings(kind="audio", tower=settings.vision, seconds=1)
    both_media = dataclasses.replace(
        settings,
        extensions={"sound": sound},
        media={"sound": tower},
        mixture=groups(str(both))["finetune"],
        chains=("strict", "open", "full"),
    )
    two_rules = {name: RULES[name] for name in [*RULES][:2]}  # test_several computes all
    monkeypatch.setattr(evaluation, "RULES", two_rules)
    record = whole_run(both_media, tmp_path / "w")
    assert record == json.loads((tmp_path / "w" / "summary.json").read_text())
    for title, chain in record["chains"].items():
        assert [len(row) for row in chain["scores"].values()] == [1, 3], title
    assert set(record["chains"]) == {"strict", "open", "full"}
    assert set(record["chains"]["strict"]["forgetting"].values()) == {0.0}
    losses = record["text_loss"]
    for text in ("wordnet", "kjv"):
        assert losses["open"][text]["full:sound"] != losses["strict"][text]["base"] == losses["open"][text]["base"]
        assert losses["open"][text]["moextend:sound"] != losses["open"][text]["base"]
    scores = record["composed"]["strict"]["sound/both"]
    assert {"image alone", "sound alone", "trained together", *two_rules} <= set(scores)
    assert (tmp_path / "w" / "strict" / "mixture" / "result").exists()
    assert not (tmp_path / "w" / "open" / "mixture").exists() and (tmp_path / "w" / "report.html").exists()
    full, finetune = (tmp_path / "w" / "open" / name / "stage.json" for name in ("full", "finetune"))
    assert full.stat().st_mtime < finetune.stat().st_mtime  # made before the other chain had chosen layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extensions": {"image": None}}, "name of the first"),
        ({"extensions": {"Data": None}}, "cannot name"),
        ({"extensions": {"eval": None}}, "cannot name"),
        ({"media": {}}, "touch is for the medium 'touch'; media are image"),
    ],
)
def test_a_chain_that_cannot_be(settings, changes, message):
    if "extensions" in changes:
        changes = {"extensions": dict.fromkeys(changes["extensions"], settings.extensions["touch"])}
    with pytest.raises(MoextendError, match=message):
        dataclasses.replace(settings, **changes)


def test_a_stage_of_a_later_extension_is_a_command(capsys):
    with pytest.raises(MoextendError, match="no stage 'align:other'"):
        cli.call(["align:other", "demo", "--workdir", "nowhere"])
