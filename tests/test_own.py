"""Six own pictures and a file about them, sounds, questions: commands of docs/own_data.md train, ask and evaluate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moextend_jax import cli, commands
from moextend_jax.config import MediumKind, MoextendError

OWN = Path(__file__).parents[1] / "examples" / "own"
FEWER = [f"--config.{stage}.least_steps={steps}" for stage, steps in (("align", 20), ("extend", 5), ("finetune", 40))]
FEWER += [f"--config.{stage}.batch_size=4" for stage in ("align", "extend", "finetune")]
"""A third of the steps, of a quarter of the rows, which is enough to know five answers by heart."""


def moextend(*words: str, folder: Path) -> str:
    """The command, whose evaluation reads the first lines of the held-out texts alone."""
    script = str(Path(__file__).with_name("short_run.py"))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_another_recipe_is_asked_for_by_name():
    with pytest.raises(MoextendError, match="paper.*released"):
        cli.call(["plan", "--config", "own:foo"])


def test_own_sounds_are_checked_by_one_command(tmp_path, capsys):
    for name, samples in (("a b.wav", 9000), ("c.wav", 0), ("d.wav", 9000)):
        soundfile.write(tmp_path / name, np.zeros((samples, 2)), 8000, subtype="PCM_24")
    rows = [{"audio": f"{name}.wav", "question": "what?", "answer": "nothing"} for name in ("a b", "c", "d")]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--data", str(tmp_path / "s.jsonl"), "--data_dir", str(tmp_path / "data"), "--processes", "0", "--json"]
    assert cli.call(["data", "check", "own:sounds", *words]) == 0
    for read in json.loads(capsys.readouterr().out)["data"]:
        assert {kind: found["count"] for kind, found in read["kinds"].items()} == {"empty_file": 1}
    assert cli.call(["data", "check", "own", *words]) == 1
    first = json.loads(capsys.readouterr().out)["data"][0]["kinds"]["unknown_medium"]["first"][0]
    assert "own:sounds has <audio>" in first["message"]


@pytest.mark.parametrize(
    ("kinds", "said"),
    [(["image"], "own --data FILE --images FOLDER"), (["audio"], "own:sounds --data FILE --images FOLDER"),
     ([], "own:text --data FILE"), (["audio", "image"], "own --data FILE --images FOLDER")],
)  # fmt: skip
def test_a_run_ends_in_own_data_of_its_media(kinds: list[MediumKind], said: str):
    assert commands.own_run(kinds) == said


@pytest.mark.slow
def test_a_task_in_text_by_one_command(tmp_path):
    rows = [{"question": f"add {a} and 2", "answer": f"{a + 2}"} for a in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["own:text", "--data", "sums.jsonl"]
    assert "no faults" in moextend("data", "check", *words, folder=tmp_path)
    table = moextend("run", *words, "--workdir", "w", *FEWER, folder=tmp_path)
    assert "  moextend run own:text --data FILE --workdir NEW_WORKDIR\n" in table
    assert "aligned only" not in table and "pretrained weights bit-identical: yes" in table
    assert "Base" in (report := (tmp_path / "w" / "report.html").read_text()) and "Aligned only" not in report
    moextend("export", "w", "out", folder=tmp_path)
    asked = ["--prompt", "add 3 and 2", "--max-new-tokens", "4"]
    answers = [moextend("generate", *place, *asked, folder=tmp_path)
               for place in (("--workdir", "w"), ("--checkpoint", "out"))]  # fmt: skip
    assert answers[0].strip() and answers[0] == answers[1]
    attributes = json.loads((tmp_path / "out" / "config.json").read_text())
    assert attributes["architectures"] == ["MoExtendForCausalLM"] and attributes["extensions"][0]["name"] == "task"


@pytest.mark.slow
def test_six_pictures_by_one_command(tmp_path):
    folder = Path(shutil.copytree(OWN, tmp_path / "own"))
    own = ["--config", "own", "--data", "own.jsonl", "--images", "pictures"]
    assert "6 conversations, 6 images, no faults" in moextend("data", "check", *own, "--processes=0", folder=folder)
    printed = moextend("run", *own, "--workdir", "w", *FEWER, folder=folder)
    assert "finetune: 40 steps of 4 rows, 32 x 5 conversations" in printed
    for part in ("held-out own.jsonl accuracy", "answer loss (nats)", "questions: 1", "report: "):
        assert part in printed, part
    assert "easy-VQA" not in printed and "easy-VQA" not in (folder / "w" / "report.html").read_text()
    record = json.loads((folder / "w" / "summary.json").read_text())
    assert set(record["answer_loss"]) == {"base", "aligned", "moextend"} and record["frozen_unchanged"] is True
    unseen = record["accuracy"]["moextend"]
    # All six, five of which were trained on: these are known by heart.
    asked = ["--config.evaluate.data=own.jsonl", "--config.evaluate.questions=6"]
    moextend("evaluate", *own, "--workdir", "w", *FEWER, *asked, folder=folder)
    record = json.loads((folder / "w" / "summary.json").read_text())
    assert record["data"] == "own.jsonl" and record["accuracy"]["questions"] == 6
    assert record["accuracy"]["moextend"] == pytest.approx((5 + unseen) / 6)
