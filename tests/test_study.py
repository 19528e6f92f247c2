"""A study makes every point for every seed, what they share once, and says what they came to."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from moextend_jax.commands import run_and_start
from moextend_jax.config import MoextendError
from moextend_jax.configurations import load
from moextend_jax.continual import COMMON
from moextend_jax.evaluate.chains import score_matrix
from moextend_jax.parsing import with_words
from moextend_jax.report.canvas import canvas
from moextend_jax.report.study import AGAINST, _panel
from moextend_jax.runs.sharing import share
from moextend_jax.settings import EvaluateSettings, RunSettings, StageSettings, StudySettings, from_config_dict
from moextend_jax.study import FIGURES, Estimate, estimate, run_study, study_table

STAGE = StageSettings(data="d", steps=1, batch_size=1, length=8)
PLAIN = RunSettings(
    align=STAGE, extend=STAGE, finetune=STAGE, full=STAGE, evaluate=EvaluateSettings(data="d", questions=1)
)


def of(points: dict[str, tuple[str, ...]], seeds: tuple[int, ...] = (0, 1), **more: Any) -> RunSettings:
    return dataclasses.replace(PLAIN, study=StudySettings(points=points, seeds=seeds), **more)


def test_intervals_are_students():
    """By a table of t: 12.706 with one degree of freedom, 4.303 with two."""
    assert estimate([0.5]) == Estimate(0.5, None)
    two, three = estimate([0.0, 2.0]), estimate([1.0, 2.0, 3.0])
    assert two.mean == 1 and two.half == pytest.approx(12.706, rel=1e-4)
    assert three.mean == 2 and three.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert estimate([0.91, 0.93]).text(2, sign=True) == "+0.92 ± 0.13" and Estimate(3.0, None).text(1) == "3.0"


def made_up(calls: list[tuple[RunSettings, Path]], *, dies_at: int | None = None):
    """A run whose accuracy is 0.8, more with a later seed, 0.1 more where all layers are extended."""

    def run(settings: RunSettings, workdir: Path) -> dict[str, Any]:
        calls.append((settings, workdir))
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        accuracy = 0.8 + 0.01 * settings.seed + 0.1 * (settings.select.layers == "all")
        texts = {text: {"base": 5.0, "moextend": 5.25} for text in ("wordnet", "kjv")}
        summary = {
            "data": "easy-VQA", "accuracy": {"moextend": accuracy}, "text_loss": texts,
            "parameters": {"trained": {"align": 9, "finetune": 1000}}, "seconds": {"align": 1.0, "finetune": 10.0},
            "start": {"changed": 0.25, "nats": 0.0}, "flops_per_token": {"base": 4e6, "of_base": 1.044},
        }  # fmt: skip
        for stage in ("align", "extend", "select") if settings.method.name == "moextend" else ("align",):
            (workdir / stage).mkdir(parents=True, exist_ok=True)
            (workdir / stage / "made").touch()
            (workdir / stage / ("routing.json" if stage == "select" else "stage.json")).touch()
        (workdir / "config.json").write_text(json.dumps({"settings": dataclasses.asdict(settings)}))
        (workdir / "summary.json").write_text(json.dumps(summary))
        return summary

    return run


def test_points_and_seeds_go_on_where_they_stood(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings, calls = of({"paper": (), "all": ("select.layers=all",), "zero": ("grow.column=zero",)}), []
    with pytest.raises(KeyboardInterrupt):
        run_study(settings, tmp_path, run=made_up(calls, dies_at=5))
    assert [str(folder.relative_to(tmp_path)) for _, folder in calls] == [
        "paper/seed_0", "all/seed_0", "zero/seed_0", "paper/seed_1", "all/seed_1"
    ]  # fmt: skip
    known = json.loads((tmp_path / "study.json").read_text())["points"]
    assert list(known["all"]["seeds"]) == ["0"] and known["all"]["settings"] == ["select.layers=all"]
    calls.clear()
    record = run_study(settings, tmp_path, run=made_up(calls))
    assert [folder.parent.name for _, folder in calls] == ["all", "zero"]
    assert calls[0][0].select.layers == "all" and calls[1][0].grow.column == "zero" and calls[0][0].study is None
    assert {folder.parent.name for _, folder in calls if (folder / "select" / "made").stat().st_nlink > 1} == {"zero"}
    assert (tmp_path / "all" / "seed_1" / "extend" / "made").stat().st_nlink == 3  # of paper, linked twice
    assert record["points"]["all"]["seeds"][1]["accuracy"] == pytest.approx(0.91)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "study.html").read_text()
    assert page.count("<svg") == 2 and "<td>+0.100 ± 0.000</td>" in page and "select.layers=all" in page
    out = capsys.readouterr().out
    assert "study: 5 of 6: all, seed 1" in out and "study.json" in out
    calls.clear()
    again = dataclasses.replace(settings, study=StudySettings(points={"paper": ()}, seeds=(0, 1)), mesh={"data": -1})
    run_study(again, tmp_path, run=made_up(calls))
    assert not calls


def test_a_summary_of_other_settings_is_not_taken_for_that_of_a_run_that_was_cut_off(tmp_path: Path):
    """A run writes its config.json when a stage is there, and its summary at the end."""

    def dies(settings: RunSettings, workdir: Path) -> dict[str, Any]:
        (workdir / "config.json").write_text(json.dumps({"settings": dataclasses.asdict(settings)}))
        raise KeyboardInterrupt

    run_study(of({"paper": ()}, (0,)), tmp_path, run=made_up([]))
    other, calls = of({"paper": ()}, (0,), rollbacks=1), []
    with pytest.raises(KeyboardInterrupt):
        run_study(other, tmp_path, run=dies)
    run_study(other, tmp_path, run=made_up(calls))
    assert len(calls) == 1


def test_what_a_rival_s_run_lacks_is_shared_from_another(tmp_path: Path):
    points = {"a": ("method.name=lora",), "b": ("grow.column=zero",), "c": ("grow.column=mean",)}
    run_study(of(points, (0,)), tmp_path, run=made_up([]))
    links = {stage: (tmp_path / "c/seed_0" / stage / "made").stat().st_nlink for stage in ("align", "extend", "select")}
    assert links == {"align": 3, "extend": 2, "select": 2}


def test_a_stage_that_was_cut_off_is_not_shared(tmp_path: Path):
    """Two runs would go on with the same checkpoints and lines of metrics."""
    made, other = tmp_path / "c/seed_0", tmp_path / "other"
    for name in COMMON:
        (made / name / "checkpoints" / "1").mkdir(parents=True)
    share(made, other, COMMON)
    assert not other.exists()
    run_study(of({"b": ("grow.column=zero",), "c": ("grow.column=mean",)}, (0,)), tmp_path, run=made_up([]))
    assert not (tmp_path / "b/seed_0/align/checkpoints").exists()
    (made / "grow" / "result" / "1").mkdir(parents=True)  # the others have been finished by the study
    share(made, other, COMMON)
    assert {path.name for path in other.iterdir()} == {*COMMON, "features"} > {"align", "select", "grow"}


def test_names_of_dots_in_one_place_stand_apart():
    """As those of methods that forget nothing under strict isolation."""
    seeds = {0: {"accuracy": 0.9, "wordnet": 0.0, "kjv": 0.0}}
    with canvas(width=6.4, height=4.2) as figure:
        ax = figure.add_subplot()
        _panel(ax, {f"method_{n}": seeds for n in range(9)}, AGAINST["forgetting"], data="d")
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(name) for name in ax.texts]
    assert len(boxes) == 9
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_the_picture_is_written_by_what_opens_buckets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Matplotlib takes the path of one for a local file's."""
    settings, save, opened = of({"paper": (), "all": ("select.layers=all",)}), Figure.savefig, []

    def noted(figure: Figure, to: Any, **options: Any) -> None:
        opened.append(hasattr(to, "write"))
        save(figure, to, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    run_study(settings, tmp_path, run=made_up([]))
    assert opened == [True] * 3 and (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", ["select.held_out=5", "evaluate.held_out=0.3", "finetune.split=train[:9]", "dtype=float32"]
)
def test_first_stages_that_were_trained_on_other_rows_are_not_shared(words: str, tmp_path: Path):
    calls: list[tuple[RunSettings, Path]] = []
    run_study(of({"paper": (), "other": (words,)}, (0,)), tmp_path, run=made_up(calls))
    assert [(folder / "extend" / "made").stat().st_nlink for _, folder in calls] == [1, 1]


def test_the_table_compares_with_the_first_seed_by_seed(tmp_path: Path):
    record = run_study(of({"paper": (), "all": ("select.layers=all",)}, (3, 5)), tmp_path, run=made_up([]))
    screen = Console(width=200, record=True)
    screen.print(study_table(record))
    lines = screen.export_text().splitlines()
    (paper,), (other,) = ([line for line in lines if f" {name} " in line] for name in ("paper", "all"))
    assert "0.840 ± 0.127" in paper and "+0.250" not in paper and "0.250 ± 0.000" in paper and "1,000" in paper
    assert "25.0 ± 0.0" in paper and "1.044 ± 0.000" in paper and not any("backward" in line for line in lines)
    assert "0.940 ± 0.127" in other and "+0.100 ± 0.000" in other


def test_of_a_chain_all_that_it_has_learnt_counts(tmp_path: Path):
    def run(settings: RunSettings, workdir: Path) -> dict[str, Any]:
        scores = {"image": {"image": 0.9}, "word": {"image": 0.7, "word": 0.5}}
        return made_up([])(settings, workdir) | {"chains": {"open": score_matrix(scores)}}

    record = run_study(of({"lora": ("method.name=lora",)}, (0,)), tmp_path, run=run)
    found = record["points"]["lora"]["seeds"][0]
    assert found["accuracy"] == pytest.approx(0.6) and found["backward"] == pytest.approx(-0.2)


def test_mistakes_are_seen_before_anything_runs(tmp_path: Path):
    calls: list[Any] = []
    for settings, message in (
        (PLAIN, "this configuration has no study"),
        (of({"a": ("select.layer=all",)}), "study: a: there is no option --config.select.layer; did you mean"),
        (of({"a": (), "b": ("select.layers=some",)}), "study: b: --config.select.layers = 'some' is not one of"),
        (of({"a": ("grow.start=twin", "grow.column=zero")}), "grow.start twin starts from copies"),
        (of({"a": ("chains=strict,open",)}), "study: a has chains, and a point is one run"),
        (of({"a": (), "b": ("seed=7",)}), "study: b sets seed, and every point has all of study.seeds"),
    ):
        with pytest.raises(MoextendError, match=message):
            run_study(settings, tmp_path, run=made_up(calls))
    for points, seeds, message in (
        ({"a/b": ()}, (0,), "cannot name a folder"), ({}, (0,), "needs points"), ({"a": ()}, (1, 1), "all different"),
    ):  # fmt: skip
        with pytest.raises(MoextendError, match=message):
            of(points, seeds)
    assert not calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["layers", "start", "calibrator"])
def test_the_package_s_studies_are_ones(which: str):
    settings = from_config_dict(load(f"study_extension:{which}"))
    assert settings.study is not None and "paper" in settings.study.points
    for name, words in settings.study.points.items():
        assert (with_words(settings, words, what=name) == settings) == (name == "paper")
    assert {"accuracy", "wordnet", "kjv", "start", "trained", "flops", "seconds"} < set(FIGURES)


@pytest.mark.parametrize("name", ["study_methods", "study_sequence"])
def test_so_are_those_of_methods(name: str):
    settings = from_config_dict(load(name))
    assert settings.study is not None
    made = {point: with_words(settings, words, what=point) for point, words in settings.study.points.items()}
    assert made["moextend"] == settings
    later = [len(point.extensions) for point in made.values()]
    assert later == [2 * (name == "study_sequence")] * len(made)
    for point, own in made.items():
        methods = {own.method.name, *(of.method.name for of in own.extensions.values())}
        first = point.partition("_")[0]
        assert methods == {{"dymoe": "moextend", "qlora": "lora"}.get(first, first)}


def test_programs_of_a_run_are_let_go(tmp_path: Path):
    """On a CPU a process can hold some ten thousand."""
    compiled, small = [], made_up([])

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        compiled.append(x)
        return 2 * x

    def run(settings: RunSettings, workdir: Path) -> dict[str, Any]:
        double(1.0)
        return small(settings, workdir)

    run_study(of({"a": (), "b": ("grow.column=zero",)}, (0,)), tmp_path, run=run)
    assert len(compiled) == 2


@pytest.mark.slow
def test_a_study_of_real_runs(tmp_path: Path):
    """Points differ in what they set and in nothing else: the first stages are the same files."""
    base, llava = tiny.write_base(tmp_path / "base"), tiny.write_llava(tmp_path / "llava", rows=24)
    stage = StageSettings(data=str(llava / "llava_v1_5_mix665k.json"), steps=2, batch_size=8, length=0,
                          images_per_row=0, loss_chunk=64, split="train[:16]")  # fmt: skip
    evaluate = EvaluateSettings(data=stage.data, questions=8, split="train[16:]", batch_size=8, length=0,
                                max_new_tokens=3, text_length=64, text_batch_size=8)  # fmt: skip
    settings = dataclasses.replace(
        PLAIN, align=stage, extend=stage, finetune=stage, full=stage, evaluate=evaluate, base=str(base),
        vision=str(base / "vision"), dtype="float32", log_every=1,
        select=dataclasses.replace(PLAIN.select, held_out=6, batch_size=6),
        study=StudySettings(
            points={
                "paper": (), "all": ("select.layers=all",), "lora": ("method.name=lora", "method.rank=2"),
            },
            seeds=(0,),
        ),
    )  # fmt: skip
    record = run_study(settings, tmp_path / "w", run=run_and_start)
    chosen = {name: json.loads((tmp_path / "w" / name / "seed_0/select/routing.json").read_text())["chosen_layers"]
              for name in ("paper", "all")}  # fmt: skip
    assert chosen["all"] == [0, 1, 2] and len(chosen["paper"]) == 1
    trained = {name: point["seeds"][0]["trained"] for name, point in record["points"].items()}
    assert trained["all"] == 3 * trained["paper"]
    start = {name: point["seeds"][0]["start"] for name, point in record["points"].items()}
    assert start["lora"] == 0 < start["paper"]
    flops = {name: point["seeds"][0]["flops"] for name, point in record["points"].items()}
    assert flops["lora"] > 1 and flops["paper"] == pytest.approx(1, abs=0.05)
    results = [sorted((tmp_path / "w" / name / "seed_0/align/result").rglob("*")) for name in record["points"]]
    inodes = [{path.stat().st_ino for path in of if path.is_file()} for of in results]
    assert inodes[0] and all(of == inodes[0] for of in inodes[1:])
