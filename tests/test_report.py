"""The report holds what the run measured, escapes what it was given, needs no network, and survives missing parts."""

import base64
import dataclasses
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from PIL import Image
from tiny import few

from moextend_jax.config import MoextendError
from moextend_jax.configurations import load
from moextend_jax.data.items import Items
from moextend_jax.evaluate.examples import write_examples
from moextend_jax.report import page as page_module
from moextend_jax.report.canvas import OURS, canvas
from moextend_jax.report.examples import cards
from moextend_jax.report.page import write_report
from moextend_jax.report.results_pictures import forgetting
from moextend_jax.report.routing_pictures import choice_panel, routing_picture, selection_panels, share_panel
from moextend_jax.report.workdir import KINDS, kind_title, parse_selection, read_workdir
from moextend_jax.runs.run import as_json
from moextend_jax.settings import MediumSettings, from_config_dict

SUMMARY = {
    "data": "easy-VQA",
    "accuracy": {"question_only": 0.671, "aligned": 0.702, "moextend": 0.934, "full": 0.951, "questions": 1000},
    "text_loss": {
        "wordnet": {"base": 3.105, "moextend": 3.118, "full": 3.402},
        "kjv": {"base": 2.511, "moextend": 2.519, "full": 3.006},
    },
    "seconds": {"align": 61.2, "extend": 30.4, "finetune": 144.9, "full": 190.1, "total": 431.0},
    "frozen_unchanged": True,
    "parameters": {"total": 12_345_678, "trained": {"align": 61_000, "extend": 16_384, "finetune": 1_200_000}},
}


def selection(layers=8, experts=8, seed=0):
    rng = np.random.default_rng(seed)
    counts = {}
    before = {kind: rng.dirichlet(np.full(experts, 4), layers) for kind in ("text", "image")}
    for name, noise in (("before", 0.0), ("after", 0.5)):
        moved = {kind: share * np.exp(noise * rng.normal(size=share.shape)) for kind, share in before.items()}
        counts[name] = {k: (20000 * m / m.sum(1, keepdims=True)).astype(int).tolist() for k, m in moved.items()}
    shift = rng.uniform(0.01, 0.09, layers)
    chosen = sorted(np.argsort(-shift)[: layers // 2].tolist())
    sources = [int(np.argmax(before["text"][layer] + before["image"][layer])) for layer in chosen]
    return {
        "layers": layers, "experts": experts, "samples": 500, "tokens": {"text": 10000, "image": 10000}, **counts,
        "shift": shift.tolist(), "chosen_layers": chosen, "sources": sources, "recipe": {"source_under": "before"},
    }  # fmt: skip


def grown(layers=8, experts=8, chosen=(1, 3, 4, 6)):
    rng = np.random.default_rng(1)
    counts = {}
    for kind, share in (("text", 0.05), ("image", 0.4)):
        old = rng.dirichlet(np.full(experts, 4), layers)
        new = np.zeros((layers, 1))
        new[list(chosen)] = share * rng.uniform(0.5, 1.2, (len(chosen), 1))
        counts[kind] = (20000 * np.concatenate([old * (1 - new), new], axis=1)).astype(int).tolist()
    return {
        "layers": layers, "experts": experts, "new_experts": 1, "extended_layers": list(chosen), "counts": counts,
        "tokens": {"text": 10000, "image": 10000},
    }  # fmt: skip


def example(seed=0, question="What color is the shape?"):
    rng = np.random.default_rng(seed)
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:48, 12 + 2 * seed : 44] = rng.integers(0, 255, 3)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    share = np.round(rng.uniform(0, 0.2, (8, 8)) + 0.5 * (picture[4::8, 4::8].mean(-1) < 250), 2)
    return {
        "image_png": base64.b64encode(file.getvalue()).decode(), "question": question, "answer": "blue", "grid": 8,
        "predictions": {"aligned": "red", "moextend": "blue", "full": "Blue"}, "new_expert_share": share.tolist(),
    }  # fmt: skip


def loss_lines(steps, start=4.0, end=0.4):
    rng = np.random.default_rng(steps)
    for step in range(1, steps + 1):
        loss = end + (start - end) * np.exp(-4 * step / steps) + 0.1 * rng.normal() * start / 4
        held_out = {"validation_loss": 2.0 - step / steps} if steps == 300 and step % 50 == 0 else {}
        yield json.dumps({"step": step, "loss": loss, "ce": loss, "tokens_per_second": 2000.0, **held_out}) + "\n"


def put(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def fake_workdir(workdir: Path, layers=8) -> Path:
    chosen = selection(layers)["chosen_layers"]
    put(workdir / "summary.json", SUMMARY)
    put(workdir / "select/routing.json", selection(layers))
    put(workdir / "finetune/routing.json", grown(layers, chosen=chosen))
    put(workdir / "examples.json", [example(seed) for seed in range(6)])
    versions = {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8"}
    model = {"decoder": {"width": 64}}
    put(workdir / "config.json", {"recipe": "paper", "seed": 7, "versions": versions, "model": model})
    for stage, steps in {"align": 300, "extend": 100, "finetune": 600, "full": 600}.items():
        put(workdir / stage / "metrics.jsonl", "".join(loss_lines(steps)))
    return workdir


class Outside(HTMLParser):
    """Collects what a browser would fetch or run, and every identifier."""

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster") and not (value or "").startswith(("data:", "#")):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)
            if name.startswith("on"):
                self.scripts.append(f"{tag} {name}")
        if tag in ("script", "iframe", "object", "link"):
            self.scripts.append(tag)


def read(page: str) -> Outside:
    parser = Outside()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_report(fake_workdir(tmp_path_factory.mktemp("run"))).read_text()


def test_the_table_holds_accuracy_and_forgetting(page):
    row = re.search(r'<tr class="ours">.*?</tr>', page)
    assert row
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row[0])]
    assert cells == ["MoExtend", "93.4% 91.7–94.8", "3.118 / +0.013", "2.519 / +0.008"]
    assert "3.402 / +0.297" in page and "bit-identical" in page


def test_forgetting_is_the_loss_gained_over_the_base():
    assert forgetting(SUMMARY, model="full") == pytest.approx([0.297, 0.495])  # WordNet, King James
    assert forgetting({"text_loss": {"wordnet": {"base": 3.0}}}, model="full") == []


def test_the_page_needs_no_network_and_runs_nothing(page):
    parser = read(page)
    assert parser.fetched == [] and parser.scripts == []
    assert not re.search(r"@import|url\((?!#)", page)


def test_identifiers_are_unique_and_every_reference_has_its_target(page):
    ids = read(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)


def test_pictures_follow_the_dark_scheme(page):
    drawings = "".join(re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL))
    assert "var(--ink)" in drawings and "#1b1f24" not in drawings
    assert "DejaVu" not in page


def test_questions_and_configuration_cannot_inject_markup(tmp_path):
    attack = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
    bad = {**example(), "question": attack, "answer": attack, "predictions": {attack: attack}}
    put(tmp_path / "examples.json", [bad])
    put(tmp_path / "config.json", {"recipe": attack, "seed": attack, "versions": {attack: attack}, attack: attack})
    parameters = {"total": 5, "trained": {attack: 1}}
    put(tmp_path / "summary.json", {**SUMMARY, "seconds": {attack: 3}, "parameters": parameters})
    parser = read(write_report(tmp_path).read_text())
    assert parser.fetched == [] and parser.scripts == []


def test_answers_are_right_as_accuracy_counts_them(tmp_path):
    put(tmp_path / "examples.json", [{**example(), "predictions": {"aligned": "red", "moextend": " Blue. "}}])
    page = write_report(tmp_path).read_text()
    assert (page.count("✓</i></span>"), page.count("✗</i></span>")) == (1, 1)


def test_an_image_that_is_none_is_refused(tmp_path):
    put(tmp_path / "examples.json", [{**example(), "image_png": '"><script>alert(1)</script>'}])
    with pytest.raises(MoextendError, match=r"examples\.json"):
        write_report(tmp_path)


PARTS = ("summary.json", "examples.json", "config.json", "select/routing.json", "finetune/routing.json")


@pytest.mark.parametrize("kept", [*PARTS, "align/metrics.jsonl"])
def test_any_single_part_is_enough(tmp_path, kept):
    source, alone = fake_workdir(tmp_path / "whole"), tmp_path / "alone"
    put(alone / kept, (source / kept).read_text())
    page = write_report(alone).read_text()
    assert page.count("Not run yet") == {"summary.json": 6, "select/routing.json": 7}.get(kept, 8)


def test_half_a_summary_is_enough(tmp_path):
    put(tmp_path / "summary.json", {"accuracy": {"moextend": 0.9, "full": None}, "text_loss": {"kjv": {"base": 2.0}}})
    assert "90.0%" in write_report(tmp_path).read_text()


def test_a_report_is_named_after_the_data_that_were_asked(tmp_path):
    own = {**SUMMARY, "data": "held-out my$<1>.jsonl", "answer_loss": {"base": 3.25, "moextend": 0.125}}
    put(tmp_path / "summary.json", own)
    page = write_report(tmp_path).read_text()
    assert "held-out my$&lt;1&gt;.jsonl accuracy" in page and "easy-VQA" not in page
    assert "3.250" in page and "0.125" in page


def test_summaries_of_older_versions_are_read(tmp_path):
    old = {name: value for name, value in SUMMARY.items() if name not in ("data", "accuracy")}
    put(tmp_path / "summary.json", old | {"easy_vqa": SUMMARY["accuracy"]})
    page = write_report(tmp_path).read_text()
    assert "93.4%" in page and "easy-VQA accuracy" in page


def test_examples_of_an_earlier_evaluation_go_with_it(tmp_path):
    put(tmp_path / "summary.json", SUMMARY)
    put(tmp_path / "examples.json", [example(0)])
    run: Any = SimpleNamespace(workdir=tmp_path)
    write_examples(run, [], {}, {"aligned": []}, Items(()))  # evaluate.examples = 0, or no question with a picture
    assert "Not run yet: examples.json" in write_report(tmp_path).read_text()


def test_one_question_says_little(tmp_path):
    put(tmp_path / "summary.json", {**SUMMARY, "accuracy": {"moextend": 0.0, "questions": 1}})
    assert "0.0% <small>0.0–79.3</small>" in write_report(tmp_path).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"titles": {"moextend": "LoRA"}}, {"method": "LoRA"}], ids=["now", "older"])
def test_a_rival_s_run_is_called_by_its_method(tmp_path, own):
    """In tables, cards and pictures; the page itself is this tool's."""
    workdir = fake_workdir(tmp_path)
    put(workdir / "summary.json", {**SUMMARY, **own})
    page = write_report(workdir).read_text()
    assert "<span>LoRA</span>" in page and not re.search(r">\s*MoExtend\s*<", page)


def test_changed_weights_are_shouted_about(tmp_path):
    put(tmp_path / "summary.json", {**SUMMARY, "frozen_unchanged": False})
    page = write_report(tmp_path).read_text()
    assert "Pretrained weights changed" in page and "bit-identical" not in page


def test_new_experts_are_measured_in_tokens(tmp_path):
    counts = [[60, 100, 0], [40, 60, 60]]  # 80 tokens, 2 picks each, in layer 1 a third expert
    routing = {"layers": 2, "experts": 2, "new_experts": 1, "extended_layers": [1], "tokens": {"text": 80, "image": 80}}
    put(tmp_path / "finetune/routing.json", {**routing, "counts": {"text": counts, "image": counts}})
    new = read_workdir(tmp_path).new_experts
    assert new is not None and new.share_YX["image"].tolist() == [[0.75]]  # 60 of 80 tokens
    assert new.fair_Y == pytest.approx([2 / 3]) and new.of_tokens


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("summary.json", "{", r"summary\.json: .*column"),
        ("summary.json", "[]", r"summary\.json: a JSON list, not a dict"),
        ("summary.json", {"accuracy": {"moextend": "high"}}, r"accuracy\.moextend is 'high'"),
        ("select/routing.json", {"layers": 4}, r"routing\.json: 'experts' is missing"),
        ("select/routing.json", {**selection(), "shift": [1.0]}, "do not fit 8 layers"),
        ("finetune/routing.json", {**grown(), "counts": {"text": [[1]], "image": [[1]]}}, r"\(1, 1\), not \(8, 9\)"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, complaint):
    put(tmp_path / name, content)
    with pytest.raises(MoextendError, match=complaint):
        write_report(tmp_path)


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(MoextendError, match="nothing of a run"):
        write_report(tmp_path)
    with pytest.raises(MoextendError, match="no such directory"):
        write_report(tmp_path / "absent")


def test_a_picture_whose_patches_were_joined_is_shown_without_a_tint():
    with_grid = example()
    without = {name: of for name, of in with_grid.items() if name != "new_expert_share"}
    assert cards([with_grid]).count("<img") == 2 and "<svg" in cards([with_grid])
    assert cards([without]).count("<img") == 1 and "<svg" not in cards([without])


@pytest.mark.slow
def test_a_long_run_of_the_full_model_stays_small_and_quick(tmp_path):
    workdir = fake_workdir(tmp_path, layers=32)
    put(workdir / "align/metrics.jsonl", "".join(loss_lines(20_000)))
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (600, 800, 3), dtype=np.uint8)).save(file, "PNG")
    photo = {**example(), "grid": 24, "image_png": base64.b64encode(file.getvalue()).decode()}
    photo["new_expert_share"] = rng.uniform(0, 1, (24, 24)).tolist()
    put(workdir / "examples.json", [photo] * 40)
    began = time.monotonic()
    assert write_report(workdir).stat().st_size < 6e6
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_picture_files_are_pictures(tmp_path):
    routing_picture(selection(), tmp_path / "routing.png", medium="image")
    with Image.open(tmp_path / "routing.png") as image:
        assert image.format == "PNG" and image.width > 1000
    with pytest.raises(MoextendError, match="routing: 'layers' is missing"):
        routing_picture({}, tmp_path / "none.png", medium="image")


# --- benchmarks -------------------------------------------------------------------------------------------------------


def evaluated(workdir: Path) -> Path:
    for model, value in (("aligned", 61.25), ("probed", 70.0), ("moextend", 84.5)):
        folder = workdir / "eval" / "pope" / model
        folder.mkdir(parents=True)
        record = {
            "headline": {"name": "mean F1", "value": value}, "published": {"MoExtend": 85.5, "LLaVA-1.5-13B": 85.9},
            "answered": 8910, "questions": 8910,
        }  # fmt: skip
        (folder / "scores.json").write_text(json.dumps(record))
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 30)).save(file, "PNG")
    png = base64.b64encode(file.getvalue()).decode()
    example = {"question": "Is there <b>snow</b>?", "said": "no", "answer": "yes", "points": 0.0, "image_png": png}
    (folder / "examples.json").write_text(json.dumps([example]))
    judged = workdir / "eval" / "mmvet" / "moextend"
    judged.mkdir(parents=True)
    record = {"headline": None, "published": {}, "answered": 218, "questions": 218}
    (judged / "scores.json").write_text(json.dumps(record))
    figures = {"base": 61.0, "moextend": 60.25}
    of = {name: {"name": "acc,none", "value": value, "higher_is_better": True} for name, value in figures.items()}
    forgot = {"tasks": {"piqa": of}, "average_drop": {"moextend": 0.75}, "published_average_drop": {"MoExtend": 0.41}}
    (workdir / "eval" / "forgetting.json").write_text(json.dumps(forgot))
    return workdir


def test_benchmarks_stand_beside_published_numbers(workdir):
    (workdir / "config.json").write_text('{"seed": 0}')
    page = write_report(evaluated(workdir)).read_text()
    (row,) = re.findall(r"<tr><td>pope</td>.*?</tr>", page)
    assert re.findall(r"<td>(.*?)</td>", row) == ["pope", "mean F1", "61.2", "70.0", "84.5", "85.5", "85.9", "8,910"]
    (judged,) = re.findall(r"<tr><td>mmvet</td>.*?</tr>", page)
    assert re.findall(r"<td>(.*?)</td>", judged) == ["mmvet", "to be judged", "not run", "not run", "–", "", "", "218"]
    assert "<td>piqa</td><td>acc,none</td><td>61.00</td><td>60.25</td><td>+0.75</td>" in page
    assert "average drop: MoExtend 0.41" in page
    assert "Is there &lt;b&gt;snow&lt;/b&gt;?" in page and page.count("data:image/png") == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pope/moextend/scores.json", "[]"), ("pope/moextend/scores.json", "{}"), ("forgetting.json", '{"tasks": 3}'),
        ("pope/moextend/examples.json", '[{"question": 1}]'),
        ("pope/moextend/examples.json", '[{"question": "a", "said": "b", "image_png": "AAAA"}]'),
    ],
)  # fmt: skip
def test_malformed_evaluations_are_one_line(workdir, file: str, content: str):
    (workdir / "config.json").write_text('{"seed": 0}')
    (evaluated(workdir) / "eval" / file).write_text(content)
    with pytest.raises(MoextendError, match="run the command that writes it again, or delete the file"):
        write_report(workdir)


def test_a_model_of_a_chain_has_a_figure_beside_the_others(workdir):
    (workdir / "config.json").write_text('{"seed": 0}')
    folder = evaluated(workdir) / "eval" / "pope" / "moextend:sound"
    folder.mkdir()
    record = {"headline": {"name": "mean F1", "value": 12.5}, "published": {}, "answered": 1, "questions": 1}
    (folder / "scores.json").write_text(json.dumps(record))
    page = write_report(workdir).read_text()
    assert "<th>moextend:sound</th>" in page and "<td>12.5</td>" in page


def test_several_chains_are_said_to_be_frozen_only_where_all_are(tmp_path):
    score = {"scores": {"image": {"image": 0.5}}, "transfer": {"image": 0.5}, "forgetting": {"image": 0.0}}
    summary: dict[str, Any] = {
        "chains": {kind: score | {"backward_transfer": 0.0} for kind in ("strict", "open")},
        "text_loss": {"strict": {}, "open": {}}, "seconds": {"strict": 3.0, "total": 5.0},
    }  # fmt: skip
    for last, said in ((True, "✓ identical"), (False, "✗ changed")):
        put(tmp_path / "summary.json", summary | {"frozen_unchanged": {"strict": True, "open": last}})
        page = write_report(tmp_path).read_text()
        assert said in page and "not run" not in page.lower()
        assert 'href="strict/report.html"' in page and 'href="open/report.html"' in page


def test_loss_curves_are_of_every_extension(tmp_path):
    settings = from_config_dict(load("continual"))
    put(tmp_path / "config.json", {"settings": as_json(dataclasses.asdict(settings))})
    for folder in ("finetune", "sound/finetune"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    page = write_report(tmp_path).read_text()
    assert "Loss of stage finetune" in page and "Loss of stage finetune:sound" in page


def test_new_experts_that_are_added_to_the_others_get_their_share_of_tokens(tmp_path):
    """Every token of an image has the new one besides one other; no token of text has it."""
    counts = {"text": [[50, 50, 0]], "image": [[50, 50, 100]]}
    put(tmp_path / "finetune/routing.json", {
        "layers": 1, "experts": 2, "new_experts": 1, "extended_layers": [0], "counts": counts,
        "tokens": {"text": 100, "image": 100},
    })  # fmt: skip
    new = read_workdir(tmp_path).new_experts
    assert new is not None and new.of_tokens
    assert {kind: share_YX.tolist() for kind, share_YX in new.share_YX.items()} == {"text": [[0.0]], "image": [[1.0]]}


def test_experts_that_a_layer_lacks_are_no_bars_of_it(tmp_path):
    """Expert 2 is of an extension of layer 0, expert 3 of one of layer 1."""
    counts, has = [[60, 60, 40, 0], [40, 40, 0, 80]], [[True, True, True, False], [True, True, False, True]]
    put(tmp_path / "finetune/routing.json", {
        "layers": 2, "experts": 2, "new_experts": 2, "extended_layers": [0, 1], "has": has,
        "counts": {"text": counts, "image": counts}, "tokens": {"text": 80, "image": 80},
    })  # fmt: skip
    found = read_workdir(tmp_path)
    assert found.new_experts is not None and found.loads is not None and found.loads.has_ZO.tolist() == has
    assert found.new_experts.fair_Y == pytest.approx([2 / 3, 2 / 3])
    with canvas(width=4, height=4) as figure:
        share_panel(ax := figure.subplots(), found.new_experts)
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0", "1.1"]
        assert [bar.get_height() for bar in ax.patches if isinstance(bar, Rectangle)] == [0.5, 1.0] * 2


def test_copied_experts_are_framed_in_the_routing_that_named_them():
    def under(**settings: str) -> tuple[str, bool]:
        read = parse_selection(selection() | {"facts": {"settings": settings}}, where="here")
        return read.source_under, read.by_shift

    assert under() == ("before", True) and under(source="after") == ("after", True)
    assert under(source="fixed", layers="all") == ("", False)


def test_layers_are_numbered_among_all_where_the_first_are_dense(tmp_path):
    record = selection()
    chosen = [layer + 2 for layer in record["chosen_layers"]]
    read = parse_selection(record | {"first_layer": 2, "chosen_layers": chosen}, where="here")
    with canvas(width=4, height=4) as figure:
        bars, shares, new = figure.subplots(3)
        choice_panel(bars, read)
        blue = [bar for bar in bars.patches if bar.get_facecolor() == to_rgba(OURS)]
        assert [round(bar.get_x() + 0.4) for bar in blue] == chosen
        selection_panels(read, kind="text", top=1.0, most=1.0)["before"](shares)
        frames = {round(patch.get_y() + 0.5) for patch in shares.patches if isinstance(patch, Rectangle)}
        assert frames == set(chosen) and sorted(shares.get_ylim()) == [1.5, 9.5]
        put(tmp_path / "finetune/routing.json", {**grown(chosen=(1, 3)), "first_layer": 2, "extended_layers": [3, 5]})
        found = read_workdir(tmp_path).new_experts
        assert found is not None
        share_panel(new, found)
        assert [label.get_text() for label in new.get_xticklabels()] == ["3", "5"]


def test_tokens_are_named_after_what_they_are_of(tmp_path, monkeypatch):
    """Files call those of every medium `image`."""
    settings = tiny.run_settings(media={"sound": MediumSettings(tower="embedded")}, medium="sound")
    put(fake_workdir(tmp_path) / "config.json", {"settings": as_json(dataclasses.asdict(settings))})
    found = read_workdir(tmp_path)
    assert found.selection is not None and found.new_experts is not None and found.loads is not None
    with canvas(width=4, height=4) as figure:
        shares, new = figure.subplots(2)
        selection_panels(found.selection, kind="image", top=1.0, most=1.0)["before"](shares)
        share_panel(new, found.new_experts)
        assert shares.get_title(loc="left") == "Sound tokens: before"
        assert {of.get_text() for of in new.get_legend().get_texts()} >= {"sound tokens", "text tokens"}
    monkeypatch.setattr(page_module, "picture", lambda draw, label, **_: label)  # drawing takes seconds
    said = page_module._routing(found.selection) + page_module._new_experts(found.new_experts)
    assert "Routing of sound tokens, before" in said and "A tall sound bar" in said and "image" not in said
    assert found.loads.medium == "sound" and [kind_title(kind, medium="") for kind in KINDS] == ["item", "text"]


@pytest.mark.parametrize("more", few([{"new_experts": 2}, {"new_experts": 1, "wide": 2}]))
def test_a_selection_of_two_sources_a_layer(more: dict[str, int], tmp_path):
    record: dict[str, Any] = {**selection(), **more}
    record["sources"] = [expert for layer in record["chosen_layers"] for expert in (layer % 8, (layer + 1) % 8)]
    read = parse_selection(record, where="here")
    assert read.copied == tuple((layer, (layer + n) % 8) for layer in record["chosen_layers"] for n in (0, 1))
    routing_picture(record, tmp_path / "routing.png", medium="image")
    assert (tmp_path / "routing.png").stat().st_size > 1000
    with pytest.raises(MoextendError, match="here: 7 sources for 4 chosen layers"):
        parse_selection(record | {"sources": record["sources"][1:]}, where="here")
