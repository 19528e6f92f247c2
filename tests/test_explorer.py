"""The explorer holds what the run counted, is one file that loads nothing, and keeps texts from outside texts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from browser import browser
from test_report import Outside, example, fake_workdir, put

from moextend_jax import cli
from moextend_jax.config import MoextendError
from moextend_jax.extension.routing import tally_pairs
from moextend_jax.report.explorer import write_explorer
from moextend_jax.report.page import write_report

ATTACK = "</script><script>document.title='attacked'</script><img src=x onerror=\"document.title='attacked'\">&amp;"
NAMES = [*map(str, range(8)), "new 0"]
TOKENS = ["<s>", "<image>", *(f"<patch {n}>" for n in range(64)), "</image>", " What", " color", "?"]
EXTENDED = (1, 3, 4, 6)


def picks(seed: int, *, new: bool) -> dict[str, Any]:
    """Two of eight experts for every token of eight layers, with 60 and 40 per cent; in extended layers the new one
    comes first for every patch, with 61 to 69 per cent by layer."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((8, len(TOKENS), 8)), axis=-1)[..., :2]
    weights = np.broadcast_to([60, 40], ids.shape).copy()
    if new:
        for layer in EXTENDED:
            ids[layer, 2:66, 0] = 8
            weights[layer, 2:66] = [61 + layer, 39 - layer]
    return {"picks": ids.tolist(), "weights": weights.tolist()}


def traced(seed: int = 0, question: str = "What color is it?") -> dict[str, Any]:
    routing = {
        "experts": NAMES, "tokens": [*TOKENS[:-1], f"?{question}"],
        "patches": [-1, -1, *range(64), -1, -1, -1, -1],
        "models": {"aligned": picks(seed, new=False), "moextend": picks(seed, new=True)},
    }  # fmt: skip
    return {**example(seed, question), "routing": routing}


def explored_workdir(workdir: Path, **of_example: Any) -> Path:
    """That of test_report.py, with what `evaluate` writes for the explorer."""
    fake_workdir(workdir)
    path = workdir / "finetune/routing.json"
    rng, routing = np.random.default_rng(2), json.loads(path.read_text())
    half = rng.integers(0, 50, (8, 9, 9))
    pairs = {"easy-VQA": {"text": half + half.transpose(0, 2, 1), "image": half}, "kjv": {"text": half}}
    listed = {data: {kind: of.tolist() for kind, of in kinds.items()} for data, kinds in pairs.items()}
    loads = {
        data: {kind: np.diagonal(of, axis1=1, axis2=2).tolist() for kind, of in kinds.items()}
        for data, kinds in pairs.items()
    }
    more = {"names": NAMES, "loads": loads, "pairs": listed, "extended_layers": EXTENDED}
    put(path, routing | more)
    put(workdir / "examples.json", [traced(seed, **of_example) for seed in range(3)])
    return workdir


def dense_first(workdir: Path) -> Path:
    """Makes it that of a model with two dense layers before those that route."""
    for name, of in {"select": "chosen_layers", "finetune": "extended_layers"}.items():
        path = workdir / name / "routing.json"
        record = json.loads(path.read_text())
        put(path, record | {"first_layer": 2, of: [layer + 2 for layer in record[of]]})
    return workdir


def page_of(workdir: Path) -> str:
    pytest.importorskip("plotly", reason="Plotly is not installed (the extra `web`)")
    path = write_explorer(workdir)
    assert path == workdir / "explorer.html"
    return (workdir / "explorer.html").read_text()


def data_of(page: str) -> dict[str, Any]:
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert embedded
    return json.loads(embedded[1])


def outside(page: str) -> Outside:
    parser = Outside()
    parser.feed(page)
    return parser


def test_the_page_holds_what_was_counted(tmp_path: Path):
    data = data_of(page_of(explored_workdir(tmp_path)))
    examples = json.loads((tmp_path / "examples.json").read_text())
    routing = json.loads((tmp_path / "finetune/routing.json").read_text())
    selection = json.loads((tmp_path / "select/routing.json").read_text())
    assert [of["models"] for of in data["examples"]] == [of["routing"]["models"] for of in examples]
    assert [of["name"] for of in data["loads"]] == [
        "easy-VQA, text tokens", "easy-VQA, image tokens", "King James Bible, text tokens",
    ]  # fmt: skip
    assert data["loads"][1]["counts"] == routing["loads"]["easy-VQA"]["image"]
    assert data["pairs"][2]["counts"] == routing["pairs"]["kjv"]["text"]
    assert data["choice"]["shift"] == selection["shift"]
    assert [tuple(of) for of in data["choice"]["copied"]] == [
        *zip(selection["chosen_layers"], selection["sources"], strict=True)
    ]
    assert (data["base"], data["names"], data["extended"]) == (8, NAMES, list(EXTENDED))
    assert data["has"] == [[True] * 8 + [layer in EXTENDED] for layer in range(8)]


def test_texts_from_outside_cannot_end_the_data_or_begin_markup(tmp_path: Path):
    explored_workdir(tmp_path, question=ATTACK)
    page = page_of(tmp_path)
    assert data_of(page)["examples"][0]["question"] == ATTACK
    parser = outside(page)
    assert parser.scripts == ["script"] * 3  # the data, Plotly, the explorer
    assert parser.fetched == ["report.html"]


def test_a_picture_that_is_none_is_refused(tmp_path: Path):
    explored_workdir(tmp_path)
    put(tmp_path / "examples.json", [{**traced(), "image_png": "data:,x"}])
    with pytest.raises(MoextendError, match=r"examples\.json"):
        page_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("examples.json", {"weights": [[[1]]]}, r"examples\.json: picks \(8, 70, 2\) and weights \(1, 1, 1\)"),
        ("examples.json", {"picks": "no"}, r"examples\.json: .*delete the file"),
        ("finetune/routing.json", {"pairs": {"kjv": {"text": [[1]]}}}, r"routing\.json: counts of shape \(1, 1\)"),
        ("finetune/routing.json", {"names": ["0"]}, r"routing\.json: 1 names of 9 experts"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, change: dict[str, Any], says: str):
    explored_workdir(tmp_path)
    if name == "examples.json":
        bad = traced()
        bad["routing"]["models"]["aligned"] |= change
        put(tmp_path / name, [bad])
    else:
        put(tmp_path / name, json.loads((tmp_path / name).read_text()) | change)
    with pytest.raises(MoextendError, match=says):
        page_of(tmp_path)


def test_a_work_directory_of_an_older_version_says_what_to_run_again(tmp_path: Path):
    page = page_of(fake_workdir(tmp_path))
    data = data_of(page)
    assert data["examples"] is None and data["pairs"] is None
    assert [of["name"] for of in data["loads"]] == ["easy-VQA, text tokens", "easy-VQA, image tokens"]
    assert page.count("not stored: run <code>moextend evaluate</code> again") == 3  # examples, texts, pairs


def test_any_single_part_is_enough(tmp_path: Path):
    put(tmp_path / "summary.json", {"data": "easy-VQA"})
    page = page_of(tmp_path)
    assert "run <code>moextend evaluate</code>" in page and "run <code>moextend select</code>" in page


def test_the_report_links_to_an_explorer_that_is_there(tmp_path: Path):
    put(tmp_path / "summary.json", {"data": "easy-VQA"})
    assert "explorer.html" not in write_report(tmp_path).read_text()
    page_of(tmp_path)
    parser = outside(write_report(tmp_path).read_text())
    assert parser.fetched == ["explorer.html"] and parser.scripts == []


def test_the_command_writes_both_and_without_plotly_says_how_to_get_it(tmp_path: Path, monkeypatch, capsys):
    put(tmp_path / "summary.json", {"data": "easy-VQA"})
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    cli.main(["report", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/report.html", 'no explorer.html: pip install "moextend-jax[web]" adds it',
    ]  # fmt: skip
    assert not (tmp_path / "explorer.html").exists()
    monkeypatch.undo()
    pytest.importorskip("plotly", reason="Plotly is not installed (the extra `web`)")
    cli.main(["report", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/report.html", f"{tmp_path}/explorer.html"]
    assert 'href="explorer.html"' in (tmp_path / "report.html").read_text()


def test_pairs_equal_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((3, 50, 5)), axis=-1)[..., :2]
    ids[0, 0, 1] = 5  # nobody: an expert that competes with none, which this token does not have
    of_T = rng.random(50) < 0.5
    of_T[0] = True
    expected = np.zeros((3, 5, 5), int)
    for layer in range(3):
        for token in np.flatnonzero(of_T):
            for a in ids[layer, token]:
                for b in ids[layer, token]:
                    if max(a, b) < 5:
                        expected[layer, a, b] += 1
    np.testing.assert_array_equal(tally_pairs(jnp.array(ids), jnp.array(of_T), outputs=5), expected)


@pytest.mark.slow
def test_in_a_browser_the_layer_changes_tint_and_hover_and_nothing_is_loaded(tmp_path: Path):
    page_of(explored_workdir(tmp_path, question=ATTACK))
    requests, errors = [], []
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1280, "height": 1000})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto((tmp_path / "explorer.html").as_uri())
        picture = page.locator("#picture-1")

        def tint() -> str:
            drawn = picture.locator(".heatmaplayer image")
            return drawn.get_attribute("href") or drawn.get_attribute("xlink:href")

        def hover() -> str:
            page.mouse.move(0, 0)
            box = picture.locator(".nsewdrag").bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2 - 5, box["y"] + box["height"] / 2 - 5)
            return picture.locator(".hoverlayer .hovertext").text_content()

        assert page.locator("#layer-name").text_content() == "1 (has new experts)"
        first, said = tint(), hover()
        assert "patch 27, layer 1" in said and "expert new 0: 62 %" in said
        page.locator("#layer").fill("6")
        assert page.locator("#layer-name").text_content() == "6 (has new experts)"
        assert "patch 27, layer 6" in hover() and "expert new 0: 67 %" in hover() and tint() != first
        page.locator("#layer").fill("0")
        assert "new 0" not in hover()
        page.locator("#example").select_option("1")
        page.locator("#load-data").select_option("2")
        page.locator("#pair-layer").fill("7")
        assert page.locator("#question").text_content() == ATTACK
        assert page.locator("#tokens-1 .xtick text").last.text_content() == f"?{ATTACK}"
        assert page.title().startswith("Routing explorer") and not errors
        assert requests == [(tmp_path / "explorer.html").as_uri()]
        page_of(dense_first(explored_workdir(tmp_path / "dense first")))
        page.goto((tmp_path / "dense first" / "explorer.html").as_uri())
        assert page.locator("#layer-name").text_content() == "3 (has new experts)"
        assert "patch 27, layer 3" in hover() and "expert new 0: 62 %" in hover()
        assert page.locator("#layers .xtick text").all_text_contents() == [str(layer) for layer in range(2, 10)]
