"""A base with tokenizer.json and a chat template of its own is trained, asked and evaluated as any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tokens
from rich.console import Console

from moextend_jax import cli
from moextend_jax.check_data import check_command
from moextend_jax.checkpoints import train_state
from moextend_jax.config import ImageTags, ModelConfig, MoextendError
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.evaluate.speak import batch_of, encoded, show, speak
from moextend_jax.generate import Sampling
from moextend_jax.routing.stats import read_stats
from moextend_jax.runs.askable import askable
from moextend_jax.runs.export import open_workdir
from moextend_jax.runs.models_of import open_model
from moextend_jax.runs.run import Run, open_run, remember
from moextend_jax.settings import SelectSettings

# ml_collections reads a configuration file through a method of importlib that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DECODER = dataclasses.replace(tiny.BASE_CONFIG.decoder, vocab_size=281)
CONFIG: ModelConfig = dataclasses.replace(tiny.BASE_CONFIG, decoder=DECODER)


def write_base(folder: Path, **tokens) -> Path:
    tiny.write_base(folder, config=CONFIG)
    (folder / "tokenizer.model").unlink()
    return tiny_tokens.write_byte_level(folder, **tokens)


def settings(base: Path):
    return tiny.run_settings(base=str(base), vision=str(base / "vision"), dtype="float32", remat="none")


@pytest.fixture
def run(tmp_path) -> Run:
    """A run whose projector is random."""
    run = open_run(settings(write_base(tmp_path / "base")), tmp_path / "work")
    leaves = {path: leaf for path, leaf in tiny.arrays(run.config).items() if path.startswith("media/image/projector/")}
    train_state.save_leaves(tmp_path / "work" / "align" / "result", leaves, facts=run.facts)
    remember(run)
    return run


def say(run: Run, which: str, **more) -> str:
    return "".join(speak(askable(run, which), "a?", **{"max_new_tokens": 3, "sampling": Sampling(), **more}))


def test_it_is_asked_in_its_own_template_and_continues_text_without_bos(run, tmp_path):
    model = askable(run, "aligned")
    chat, plain = (
        batch_of(model, encoded(model, "a?", spans={}, plain=plain), show(model, {})) for plain in (False, True)
    )
    assert run.tokenizer.decode(chat.ids_BL[0][chat.segments_BL[0] > 0]).endswith("user\na?\nassistant\n")
    assert plain.ids_BL[0, :3].tolist() == [*run.tokenizer.encode("a?"), 0]
    assert say(run, "aligned") == say(run, "aligned")
    tags = json.loads((tmp_path / "work" / "config.json").read_text())["model"]["media"]["image"]["tags"]
    assert ImageTags(**tags) == run.config.tags == run.tokenizer.tags == ImageTags(start=7, end=8, pad=9)
    assert open_workdir(tmp_path / "work").config.tags == run.config.tags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token": "<output>"}, r"tags: \[7, 8, 9\] there, \[6, 7, 8\] now"),
        ({"template": tiny_tokens.CHATML.replace("helper", "cat")}, "recipe.prompt: 'own [0-9a-f]{16}' there, 'own "),
        ({"template": None}, "recipe.prompt: 'own [0-9a-f]{16}' there, 'chatml' now"),
    ],
)
def test_other_tags_or_another_template_are_another_run(run, tmp_path, change, message):
    tiny_tokens.write_byte_level(tmp_path / "base", **change)
    with pytest.raises(MoextendError, match=f"belongs to another run .*{message}"):
        open_model(open_run(run.settings, tmp_path / "work"), "aligned")


def test_a_base_without_any_template_is_refused_before_anything_is_trained(tmp_path):
    base = write_base(tmp_path, template=None, control=("<|end|>", "<x>", "<y>", "<z>"), eos_token="<|end|>")
    with pytest.raises(MoextendError, match="has no chat template.*set recipe.prompt to mixtral"):
        open_run(settings(base), tmp_path / "work")


def test_an_import_keeps_template_and_ends(tmp_path):
    base = write_base(tmp_path / "base", template=tiny_tokens.GEMMA)
    attributes = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(attributes | {"eos_token_id": [2, 3]}))
    cli.call(["import", str(base), str(tmp_path / "imported")])
    assert not (tmp_path / "imported" / "config.json").exists()
    ours = open_run(settings(base), tmp_path / "one").tokenizer
    theirs = tiny.run_settings(base=str(tmp_path / "imported"), dtype="float32")
    imported = open_run(theirs, tmp_path / "two").tokenizer
    assert ours.ends[:2] == imported.ends[:2] == (2, 3) and 5 in imported.ends
    assert imported.templates["own"].source == tiny_tokens.GEMMA and imported.tags == ours.tags


def test_data_check_takes_the_ends_that_an_import_remembers(tmp_path, capsys):
    """Of a base whose config.json alone says what ends an answer."""
    base = write_base(tmp_path / "base", template=tiny_tokens.GEMMA, eos_token=None)
    attributes = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(attributes | {"eos_token_id": 2}))
    (base / "generation_config.json").unlink(missing_ok=True)
    cli.call(["import", str(base), str(tmp_path / "imported")])
    run = dataclasses.replace(settings(base), base=str(tmp_path / "imported"), vision="")
    rows = dataclasses.replace(run.align, data="llava_instruct", split="train")
    asked = dataclasses.replace(run.evaluate, data="llava_instruct", split="train", questions=2, length=0)
    run = dataclasses.replace(
        run, align=rows, extend=rows, finetune=rows, full=rows, evaluate=asked,
        manual_dir=str(tiny.write_llava(tmp_path / "llava")), select=SelectSettings(held_out=2),
    )  # fmt: skip
    capsys.readouterr()
    check_command(run, data_dir=None, processes=0, as_json=True, console=Console(quiet=True))
    assert all(reading["error"] is None for reading in json.loads(capsys.readouterr().out)["data"])


def test_routing_of_a_text(tmp_path):
    base, text, out = write_base(tmp_path / "base"), tmp_path / "text.txt", tmp_path / "out.npz"
    text.write_text("the the\n\nthe <|im_end|>\n")
    command = ["routing", "collect", "--checkpoint", str(base), "--text", str(text), "--length", "16"]
    cli.main([*command, "--batch_size", "2", "--out", str(out)])
    tokenizer = load_tokenizer(base)
    lengths = [len(tokenizer.encode(line)) for line in text.read_text().splitlines() if line]
    assert lengths[1] > 10  # what only spells an end is text
    assert sum(read_stats(out).tokens.values()) == sum(lengths) + len(lengths)  # EOS after each, nothing before


@pytest.mark.long
def test_it_is_taught_and_evaluated(tmp_path):
    base, manual = write_base(tmp_path / "base"), tiny.write_llava(tmp_path / "llava")
    config = tiny.write_config(
        tmp_path, base=base, data="llava_instruct", split="train", evaluated="train", manual=manual, length=96
    )
    cli.main(["run", f"--config={config}", f"--workdir={tmp_path / 'work'}"])
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert summary["frozen_unchanged"] is True and np.isfinite(summary["text_loss"]["kjv"]["base"])
    examples = json.loads((tmp_path / "work" / "examples.json").read_text())
    assert examples
