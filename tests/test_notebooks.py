"""The notebooks: each runs from its first cell to its last and shows what it says; stored outputs are of such a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_docs import slugs

REASON = "is not installed: pip install 'moextend-jax[notebooks]'"
nbformat = pytest.importorskip("nbformat", reason=f"nbformat {REASON}")
nbclient = pytest.importorskip("nbclient", reason=f"nbclient {REASON}")
pytest.importorskip("ipykernel", reason=f"ipykernel {REASON}")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST = 200_000
"""Characters of an output."""
ABSOLUTE = re.compile(r"(?<![\w.~-])/(?:content|home|mnt|opt|root|tmp|usr|Users|var|work)/")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_the_outputs_of_a_run_from_top_to_bottom(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert max(len(json.dumps(output)) for output in outputs) < MOST
    shown = [part for output in outputs for part in texts_of(output)]
    assert not [part for part in (*shown, *(cell.source for cell in notebook.cells)) if ABSOLUTE.search(part)]
    assert not [part for part in shown if "\x1b" in part]  # colors of a terminal


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    links = [link for cell in cells if cell.cell_type == "markdown" for link in re.findall(r"\]\((.+?)\)", cell.source)]
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        page = (path.parent / file).read_text()
        assert not heading or heading in slugs(page), link


def texts_of(output: Any) -> list[str]:
    """What is written there; a picture's letters mean nothing."""
    data = output.get("data", {})
    return [output.get("text", ""), *(of for kind, of in data.items() if not kind.startswith("image/"))]


def test_notebooks_are_clean_for_ruff():
    assert {path.stem for path in NOTEBOOKS} == {"first_steps", "new_modality", "where_does_my_moe_route"}
    if subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True).returncode:
        pytest.skip("no ruff: the dev extra brings it")
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", *map(str, NOTEBOOKS)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


def executed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, results: str, fewer: dict[int, int] | None = None,
    cheap: bool = True,
) -> Any:  # fmt: skip
    """The value of the expression `results` after a copy of the notebook has been executed by this interpreter, whose
    evaluations read the first lines of the held-out texts alone. One core: tests run in several processes.

    Args:
      fewer: how many steps a stage has here that has so many in the notebook; the same of questions.
      cheap: compiled as other tests are; otherwise as for a person, which takes several times as long.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell ended in an error.
    """
    for part in ("notebooks", "tools", "examples"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("work"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, not the user's
    if not cheap:
        monkeypatch.setenv("XLA_FLAGS", "")
    # What `run` compiles, what opens the model again reads.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    notebook = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
    for many, few in (fewer or {}).items():
        number = re.compile(rf"(\b(?:steps|questions)\W+){many}\b")
        (cell,) = (cell for cell in notebook.cells if number.search(cell.source))
        cell.source = number.sub(rf"\g<1>{few}", cell.source)
    (folder / "texts").mkdir()
    first = (
        "import pathlib, tiny\nfrom moextend_jax import machine\nmachine.cores = lambda: 1\n"
        f"tiny.shorten_texts(pathlib.Path({str(folder / 'texts')!r}))\n"
    )
    if cheap:
        first += "import pytest\ntiny.shorten_easy_vqa(pytest.MonkeyPatch(), train=3000)\n"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({results}))"))
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=3600, resources=resources).execute()
    return json.loads("".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"))


# Tornado's and zmq's own warnings are not ours.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the first cell to the last, in so few steps that nothing is learnt."""
    results = "[summary['frozen_unchanged'], weights[list(layers)][:, patches].tolist()]"
    fewer = {60: 4, 10: 2, 70: 4, 256: 32}
    unchanged, weights = executed("first_steps", tmp_path, monkeypatch, results=results, fewer=fewer)
    assert unchanged is True
    assert [len(row) for row in weights] == [16] * 4 and 0 < max(map(max, weights)) <= 1.001


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_first_steps_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = "[summary['accuracy'], summary['frozen_unchanged'], weights[list(layers)][:, patches].tolist()]"
    accuracy, unchanged, weights = executed(
        "first_steps", tmp_path, monkeypatch, results=results, fewer={60: 20, 10: 5, 70: 40}, cheap=False
    )  # fmt: skip
    assert unchanged is True
    assert accuracy["moextend"] > accuracy["aligned"] + 0.1
    assert [len(row) for row in weights] == [16] * 4 and 0 < max(map(max, weights)) <= 1.001


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_where_does_my_moe_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[torch]'")
    results = "[agreement, shift, balance['kjv'].tolist(), balance['torch'].tolist()]"
    agreement, shift, ours, theirs = executed("where_does_my_moe_route", tmp_path, monkeypatch, results=results)
    assert len(agreement) == 8 and min(agreement) > 0.999
    assert min(shift) > 0.01  # between two texts; between two programs it is 0
    assert ours == pytest.approx(theirs, rel=1e-3) and 1 < min(ours) < max(ours) < 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fewer", "learns"),
    [
        pytest.param({100: 8, 20: 4, 140: 8}, False, marks=pytest.mark.slow),
        pytest.param({100: 50, 20: 10, 140: 70}, True, marks=pytest.mark.long),
    ],
)
def test_new_modality(fewer: dict[int, int], learns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = "[accuracy, text_loss, bool(same_logits), same_text, float(confusion.trace() / confusion.sum())]"
    accuracy, losses, same_logits, same_text, traced = executed(
        "new_modality", tmp_path, monkeypatch, results=results, fewer=fewer, cheap=not learns
    )  # fmt: skip
    assert accuracy["question_only"] == pytest.approx(1 / 3) and accuracy["questions"] == 150
    assert traced == pytest.approx(accuracy["moextend"])
    if learns:
        assert accuracy["moextend"] > 0.6
    assert same_logits is same_text is True
    assert all(of["moextend"] == of["base"] for of in losses.values())
