"""Chains and importance in the report: the numbers are there, nothing is fetched or run, bad files are one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_chains import CHAIN
from test_report import SUMMARY, put, read

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.chains import score_matrix
from moextend_jax.evaluate.importance import importance
from moextend_jax.report.chains import chains_section
from moextend_jax.report.importance import importance_section
from moextend_jax.report.page import write_report

NONE, IMAGE, SOUND, BOTH = map(frozenset, ((), ("image",), ("sound",), ("image", "sound")))
ASKED = importance(
    [{NONE: 0, IMAGE: 1, SOUND: 0, BOTH: 1}, {NONE: 0, IMAGE: 0, SOUND: 0, BOTH: 1}], media=("image", "sound")
)
ATTACK = "<img src=x onerror=alert(1)>$\\frac"


def texts(markup: str) -> list[str]:
    """Texts of drawings, which matplotlib keeps as text, and cells of tables."""
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]*)<", markup) + re.findall(r"<td>([^<]*)</td>", markup)


def test_the_matrix_and_the_bars_hold_every_number(tmp_path: Path):
    strict = {after: {**row, "image": 0.9} for after, row in CHAIN.items()}
    chains = {
        "open": score_matrix(CHAIN),
        "strict": score_matrix(strict),
        "mine": score_matrix({"image": CHAIN["image"]}),
    }
    put(tmp_path / "summary.json", {**SUMMARY, "chains": chains})
    page = write_report(tmp_path).read_text()
    for title in ("Extensions without isolation", "Extensions under strict isolation", "<h3>mine</h3>"):
        assert title in page
    drawn = texts(chains_section({"chains": {"open": chains["open"]}}))
    # after sound image lost 0.1, sound's two sets 0.1 and 0.2 after speech; transfer 0.4 and forgetting 0.075
    for number in ("0.900", "0.800", "-0.100", "-0.200", "0.700", "+0.000", "0.400", "0.075"):
        assert number in [text.replace("−", "-") for text in drawn], (number, drawn)
    assert "Backward transfer -0.075." in page and "Backward transfer +0.000." in page
    ids = read(page).ids
    assert len(ids) == len(set(ids))


def test_importance_is_drawn_and_listed(tmp_path: Path):
    put(tmp_path / "summary.json", {**SUMMARY, "importance": {"moextend": ASKED}})
    page = write_report(tmp_path).read_text()
    assert "What each medium is worth" in page
    section = importance_section({"importance": {"moextend": ASKED}})
    # image: ((1 + 1) / 2 - 0 + (0 + 1) / 2 - 0) / 2; sound: ((0 + 1) / 2 - 1 + (0 + 1) / 2 - 0) / 2
    assert {"+0.75", "+0.00"} <= {text.replace("−", "-") for text in texts(section)}
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    assert ["image + sound", "100.0%", "2"] in rows and ["none", "0.0%", "2"] in rows


def test_accuracy_without_a_medium_stands_beside_that_with_everything():
    without = {"image": {"moextend": 0.25, "full": 0.5}, "sound": {"moextend": 0.875}}
    section = importance_section({**SUMMARY, "without": without})
    rows = [re.findall(r"<t[dh]>([^<]*)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    assert rows == [
        ["", "MoExtend", "Full fine-tuning"],
        ["with everything", "93.4%", "95.1%"],
        ["without image", "25.0%", "50.0%"],
        ["without sound", "87.5%", "not asked"],
    ]


def test_a_run_without_them_has_no_such_sections(tmp_path: Path):
    put(tmp_path / "summary.json", SUMMARY)
    page = write_report(tmp_path).read_text()
    assert "What each medium is worth" not in page and "Extension after extension" not in page


def test_names_cannot_inject_markup(tmp_path: Path):
    chain = score_matrix({ATTACK: {ATTACK: 0.5}, "b": {ATTACK: 0.5, "b": 0.1}})
    asked = importance([{NONE: 0, frozenset({ATTACK}): 1}], media=(ATTACK,))
    put(
        tmp_path / "summary.json",
        {**SUMMARY, "chains": {ATTACK: chain}, "importance": {ATTACK: asked}, "without": {ATTACK: {ATTACK: 0.5}}},
    )
    parser = read(write_report(tmp_path).read_text())
    assert parser.fetched == [] and parser.scripts == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chains": {"strict": {"image": 0.9}}}, "summary.json: its chains: "),
    ({"chains": [3]}, "summary.json: its chains: "),
    ({"chains": {"strict": {"scores": {"image": {"image": "high"}}}}}, "is 'high', not a finite number"),
    ({"chains": {"strict": {"scores": {"image": 3}}}}, "summary.json: its chains: "),
    ({"without": {"image": {"moextend": "less"}}}, "'less', not a number"),
    ({"importance": {"moextend": {"media": {"image": {"importance": "much"}}}}}, "'much', not a number"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_files_are_one_line(tmp_path: Path, content: dict[str, Any], message: str):
    put(tmp_path / "summary.json", {**json.loads(json.dumps(SUMMARY)), **content})
    with pytest.raises(MoextendError, match=message):
        write_report(tmp_path)
