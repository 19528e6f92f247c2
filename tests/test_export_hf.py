"""`moextend export --layout hf`: what stock PyTorch programs make of the folder is what JAX makes of the run."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from folders import released_attributes
from local_tasks import write_tasks
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moextend_jax import cli
from moextend_jax.checkpoints import convert, hashes, huggingface, train_state
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.checkpoints.source import open_source
from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    ExtensionConfig,
    ModelConfig,
    MoextendError,
    Named,
    Recipe,
    with_extension,
    with_vision,
)
from moextend_jax.data.conversations import encode_dialogue, encode_prompt
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.media.image import prepare_image
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.run import facts_of_base

TOOL = Path(__file__).parents[1] / "tools" / "dump_torch_routing.py"
LOOP = """
import json, runpy, sys
tool, lines = sys.argv[1], json.loads(sys.argv[2])
for words in lines:
    sys.argv = [tool, *words]
    runpy.run_path(tool, run_name="__main__")
"""
SCRIPT = Path(__file__).with_name("stock_script.py")
DECODER = dataclasses.replace(tiny.BASE_CONFIG.decoder, rope_theta=1e4)
BASE = dataclasses.replace(tiny.BASE_CONFIG, decoder=DECODER, remat="none")
EXTENSION = ExtensionConfig(layers=(0, 2), sources=(1, 3))
QUESTIONS = [("what is\n it? ", True), ("  And the LORD <0x02> said é", False)]
"""Question, and whether it has a picture. Rows with and without one go through PyTorch in one batch."""
MARKED = "left  <image> or right"
TEXTS = ["two", " leading", "  two  more ", "\nline", "naïve — 日本 🙂", "<0x00>", "▁"]
SPELLED = "a </s> b <s>"
"""What stands for tokens in Hugging Face's tokenizers."""
NEW = 6
"""Tokens of an answer."""


class Case(NamedTuple):
    """An exported folder, the options that made it, and what the same model is in JAX."""

    options: tuple[str, ...]
    recipe: Recipe = RECIPES["paper"]
    results: tuple[str, ...] = ()
    text_isolation: Any = "none"
    extension: ExtensionConfig = EXTENSION

    @property
    def config(self) -> ModelConfig:
        """Of the model that it is."""
        grown = "grow" in self.results or not self.results
        config = dataclasses.replace(config_of(self.recipe), text_isolation=self.text_isolation)
        return with_extension(config, self.extension if grown else None)


PAPER = RECIPES["paper"]
CASES = {
    "aligned": Case(("--model", "aligned"), results=("align",)),
    "full": Case(("--model", "full"), results=("align", "full")),
    "moextend": Case((), results=("align", "grow", "finetune")),
    "strict": Case((), results=("align", "grow", "finetune"), text_isolation="strict"),
    "released": Case((), recipe=RECIPES["released"], results=("align", "grow", "finetune")),
    "imported": Case(
        (),
        recipe=dataclasses.replace(PAPER, feature_layer=-1),
        extension=ExtensionConfig(layers=(1, 2), sources=(-1, -1), new_experts=7, calibrator_width=5),
    ),
}
"""The last is no run but a checkpoint in bfloat16: 11 experts, so that their numbers have two digits."""


def leaves_of(recipe: Recipe) -> dict[str, dict[str, jax.Array]]:
    """What each result of a run holds: random, and so with every part to be seen."""
    arrays = tiny.arrays(with_extension(config_of(recipe), EXTENSION), seed=3)

    def named(*starts: str) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in arrays.items() if path.startswith(starts)}

    routers = named("decoder/layers/moe/gate") if recipe.routers_kept == "after" else {}
    return {
        "align": named("media/image/projector/"),
        "grow": named("extensions/image/") | routers,
        "finetune": named("extensions/image/", "media/image/projector/")
        if recipe != PAPER
        else named("extensions/image/"),
        "full": {
            path: leaf + 0.01
            for path, leaf in named("decoder/", "media/image/projector/", "media/image/tower/").items()
        },
    }


def config_of(recipe: Recipe) -> ModelConfig:
    assert BASE.vision
    vision = dataclasses.replace(BASE.vision, feature_layer=recipe.feature_layer)
    return dataclasses.replace(with_vision(BASE, vision), weight_guard=recipe.weight_guard)


def run_of(workdir: Path, base: Path, *, recipe: Recipe, **more: Any) -> Path:
    """A work directory as the stages leave it."""
    settings = tiny.run_settings(recipe=recipe, base=str(base), vision=str(base / "vision"), **more)
    base_hash = hashes.base_hashes(open_source(base).leaves).base
    (workdir / "select").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"settings": dataclasses.asdict(settings), "base_hash": base_hash}))
    chosen = {"chosen_layers": list(EXTENSION.layers), "sources": list(EXTENSION.sources), "base": base_hash}
    (workdir / "select" / "routing.json").write_text(json.dumps(chosen))
    facts = facts_of_base(base_hash, settings)
    for name, result in leaves_of(recipe).items():
        train_state.save_leaves(workdir / name / "result", result, facts=facts)
    return workdir


def export(words: Sequence[str | Path]) -> None:
    cli.call(["export", *map(str, words)])


def imported(folder: Path, base: Path) -> Path:
    """A checkpoint in the released layout, its base in bfloat16."""
    config = CASES["imported"].config
    huggingface.write_parameters(folder, imported_arrays(config), table="released", config=config)
    huggingface.write_json(folder / "config.json", released_attributes(config, dtype="bfloat16"))
    shutil.copy(base / "tokenizer.model", folder)
    return folder


def imported_arrays(config: ModelConfig) -> dict[str, jax.Array]:
    frozen = ("decoder/", "media/image/tower/")
    arrays = tiny.arrays(config, seed=5)
    return {path: leaf.astype("bfloat16") if path.startswith(frozen) else leaf for path, leaf in arrays.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"), config=BASE)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    runs: dict[Any, Path] = {}
    export([str(imported(root / "checkpoint", base)), str(root / "imported"), "--layout", "hf", "--recipe", "paper"])
    for name, case in CASES.items():
        if not case.results:
            continue
        key = (case.recipe == PAPER, case.text_isolation)
        if key not in runs:
            more = {"recipe": case.recipe, "text_isolation": case.text_isolation}
            runs[key] = run_of(root / f"run of {name}", base, **more)
        export([str(runs[key]), str(root / name), "--layout", "hf", *case.options])
    export([str(runs[True, "none"]), str(root / "base"), "--layout", "hf", "--model", "base"])
    return {name: root / name for name in (*CASES, "base")}


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path], picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the stock script makes of all folders, in a process that does not know where this package is."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    root = tmp_path_factory.mktemp("stock")
    image = {"type": "image", "path": str(picture)}
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": text}, *([image] if sees else [])]}]
        for text, sees in QUESTIONS
    ]
    spec = {
        "folders": {name: str(folders[name]) for name in CASES}, "chats": chats, "texts": [*TEXTS, SPELLED],
        "marked": MARKED, "picture": str(picture), "new": NEW,
    }  # fmt: skip
    (root / "spec.json").write_text(json.dumps(spec))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    words = [sys.executable, str(SCRIPT), str(root / "spec.json"), str(root / "out.npz")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_npz(root / "out.npz")


# --- the same in JAX --------------------------------------------------------------------------------------------------


@functools.cache
def model_of(name: str) -> tuple[ModelConfig, dict[str, jax.Array]]:
    case = CASES[name]
    if not case.results:
        return case.config, {path: leaf.astype("float32") for path, leaf in imported_arrays(case.config).items()}
    arrays = dict(tiny.arrays(BASE, std=0.1))
    for result in case.results:
        arrays |= leaves_of(case.recipe)[result]
    return case.config, arrays


@functools.cache
def logits_program(config: ModelConfig):
    def logits(arrays, batch: Batch):
        whole = with_arrays(abstract(config), arrays)
        return whole.decoder.logits(whole(batch).hidden_BLD)[0]

    return jax.jit(logits)


def logits_of(name: str, ids: np.ndarray, patches: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
    """float32 logits [L, V] of one row, which is padded on the right so that one program serves all."""
    config, arrays = model_of(name)
    pad = (0, 48 - len(ids))
    ids_BL = np.pad(ids, pad)[None]
    batch = Batch(
        ids_BL=ids_BL,
        labels_BL=np.full_like(ids_BL, IGNORE),
        positions_BL=np.arange(48, dtype=np.int32)[None],
        segments_BL=np.pad(np.ones_like(ids), pad)[None],
        places_BL=np.pad(patches, pad, constant_values=-1)[None],
        media={} if pixels is None else {"image": jnp.asarray(pixels)[None, None]},
    )
    return np.asarray(logits_program(config)(arrays, batch))[: len(ids)]


def inputs_of(name: str, row: int, base: Path, picture: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ids, patches and pixels of a question, as training and evaluation make them."""
    text, sees = QUESTIONS[row]
    recipe, vision = CASES[name].recipe, BASE.vision
    assert vision
    items = {"image": [vision.patches]} if sees else {}
    encoded = encode_prompt(text, items=items, tokenizer=load_tokenizer(base), recipe=recipe)
    pixels = prepare_image(Image.open(picture), size=vision.image_size, preparation=recipe.image_preparation)
    return encoded.ids_L, encoded.places_L, pixels if sees else None


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("row", [0, 1])
def test_a_stock_script_sees_what_jax_sees(stock, name: str, row: int, base: Path, picture: Path):
    ids, patches, pixels = inputs_of(name, row, base, picture)
    np.testing.assert_array_equal(stock[f"{name}/{row}/ids"][0], ids)
    if pixels is not None:
        np.testing.assert_allclose(stock[f"{name}/{row}/pixel_values"][0].transpose(1, 2, 0), pixels, atol=1e-5)
    wanted = logits_of(name, ids, patches, pixels)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(stock[f"{name}/{row}/logits"][0], wanted, atol=1e-4, rtol=0)
    # In a batch with the other row, padded on the left.
    here = stock[f"{name}/all/mask"][row] > 0
    np.testing.assert_array_equal(stock[f"{name}/all/ids"][row][here], ids)
    np.testing.assert_allclose(stock[f"{name}/all/logits"][row][here], wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("row", [0, 1])
def test_a_stock_script_answers_as_jax_does(stock, name: str, row: int, base: Path, picture: Path):
    ids, patches, pixels = inputs_of(name, row, base, picture)
    tokenizer = load_tokenizer(base)
    answer: list[int] = []
    while len(answer) < NEW and tokenizer.eos not in answer:
        more = np.array(answer, np.int32)
        logits_V = logits_of(name, np.r_[ids, more], np.r_[patches, np.full_like(more, -1)], pixels)[-1].copy()
        logits_V[list(tokenizer.unspeakable(BASE.decoder.vocab_size))] = -np.inf
        answer.append(int(logits_V.argmax()))
    for where in (stock[f"{name}/{row}/answer"][0], stock[f"{name}/all/answer"][row]):
        np.testing.assert_array_equal(where[: len(answer)], answer)


@pytest.mark.slow
def test_strict_isolation_is_there_to_be_seen(stock, base: Path, picture: Path):
    """Of the row without a picture the strict model says what the aligned one says, and the other does not."""
    text, other = stock["strict/all/logits"][1], stock["moextend/all/logits"][1]
    here = stock["strict/all/mask"][1] > 0
    np.testing.assert_allclose(text[here], stock["aligned/all/logits"][1][here], atol=1e-4)
    assert np.abs(other - text)[here].max() > 0.1
    np.testing.assert_allclose(stock["strict/0/logits"], stock["moextend/0/logits"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tensors_are_named_as_transformers_names_them(stock, name: str, folders: dict[str, Path]):
    from safetensors import safe_open

    with safe_open(folders[name] / "model.safetensors", "np") as file:
        assert sorted(file.keys()) == list(stock[f"{name}/names"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aligned", "moextend", "released"])
def test_text_has_the_same_ids(stock, name: str, base: Path):
    tokenizer, recipe = load_tokenizer(base), CASES[name].recipe
    prompt = functools.partial(encode_prompt, tokenizer=tokenizer, recipe=recipe)
    for n, text in enumerate(TEXTS):
        assert list(stock[f"{name}/text/{n}"]) == [tokenizer.bos, *tokenizer.encode(text)], text
        assert list(stock[f"{name}/chat/{n}"]) == list(prompt(text).ids_L), text
    # What spells a token is text on request, though in other pieces.
    chat = list(stock[f"{name}/chat/{len(TEXTS)}"])
    assert (chat.count(tokenizer.bos), chat.count(tokenizer.eos)) == (1, 0)
    assert list(stock[f"{name}/marked"]) == list(prompt(MARKED, items={"image": [4]}).ids_L)


@pytest.mark.slow
def test_what_is_stored_in_bfloat16_runs_in_it(stock):
    assert list(stock["aligned/dtypes"]) == ["torch.float32"]
    assert list(stock["imported/dtypes"]) == ["torch.bfloat16", "torch.float32"]  # the calibrators
    exact, rounded = stock["imported/0/logits"], stock["imported/stored"]
    assert 0 < np.abs(rounded - exact).mean() < 0.03 * np.abs(exact).max()


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dumped(folders: dict[str, Path], base: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/dump_torch_routing.py writes of exported folders, for a row with a picture and one without."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    root = tmp_path_factory.mktemp("dumped")
    rows = [inputs_of("strict", row, base, picture) for row in (0, 1)]
    ids_BL, mask_BL = np.zeros((2, 60), np.int32), np.zeros((2, 60), np.int32)
    for row, (ids, _, _) in enumerate(rows):
        ids_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, 1
    pixels = rows[0][2]
    assert pixels is not None
    given = {"input_ids": ids_BL, "attention_mask": mask_BL, "pixel_values": pixels.transpose(2, 0, 1)[None]}
    np.savez(root / "ids.npz", **given)
    lines = [
        [str(folders[name]), "--ids", str(root / "ids.npz"), "--out", str(root / f"{name}.npz"), "--forward",
         str(root / name), "--batch_size", "1", *more]
        for name, more in (("aligned", []), ("strict", ["--trust_remote_code"]))
    ]  # fmt: skip
    words = [sys.executable, "-c", LOOP, str(TOOL), json.dumps(lines)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GB before compression" in done.stdout
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aligned", "strict"])
def test_an_exported_folder_routes_in_pytorch_as_here(dumped: Path, folders: dict[str, Path], name: str, capsys):
    """The folder is opened here too: what was exported comes back, isolation and all."""
    words = ["--checkpoint", str(folders[name]), "--ids", str(dumped / "ids.npz"), "--out", str(dumped / "jax.npz")]
    assert cli.call(["routing", "collect", *words]) == 0
    capsys.readouterr()
    assert cli.call(["routing", "compare", str(dumped / "jax.npz"), str(dumped / f"{name}.npz"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["top_k_agreement_missing"] is None and record["tokens"]["image"] == [4, 4]
    assert {row["kind"] for row in record["layers"]} == {"text", "image", "all"}
    for row in record["layers"]:
        assert row["agreement"] == 1.0 and row["tv_picks"] == row["shift_least"] == 0 and row["tv_probs"] < 1e-5
    reference = str(dumped / name / "forward_torch.npz")
    code = cli.call(["compare", "--checkpoint", str(folders[name]), "--reference", reference, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert code == 0, [row for row in record["rows"] if row["verdict"] == "differs"]
    assert read_npz(dumped / name / "forward_torch.npz")["text/logits"].shape[1] < 40  # cut to the longest row


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_and_nothing_is_written(folders: dict[str, Path], base: Path, tmp_path: Path):
    run = folders["aligned"].parent / "run of aligned"
    blind = with_vision(CASES["imported"].config, None)
    text = tiny.arrays(blind)
    huggingface.write_parameters(tmp_path / "blind", text, table="released", config=blind)
    attributes = released_attributes(blind, dtype="float32")
    huggingface.write_json(tmp_path / "blind" / "config.json", attributes)
    for words, message in (
        ([run, "--model", "probed"], "extend has not been run"),
        ([base, "--model", "aligned"], "is one model, not a run"),
        ([tmp_path / "nowhere", "--model", "aligned"], "does not exist"),
        ([run, "--recipe", "released"], "knows its recipe"),
        ([tmp_path / "blind"], "is for the medium image, and there is no tower and no projector for it"),
        ([base / "vision"], "layout hf needs a decoder"),
    ):
        with pytest.raises(MoextendError, match=message):
            export([words[0], tmp_path / "out", "--layout", "hf", *words[1:]])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "media", [{"sums": ""}, {"pets": "image"}, {"sums": "", "days": ""}, {"pets": "image", "items": ""}]
)
def test_extensions_come_back_under_their_names(base: Path, tmp_path: Path, capsys, media: dict[str, str]):
    """Tasks in text too, whose template has no place for pictures. They need not be in one order of the alphabet."""
    source, medium = open_source(base), any(media.values())
    config = source.config if medium else with_vision(source.config, None)
    extensions = {
        name: dataclasses.replace(EXTENSION, medium=of, new_experts=len(name) - 3, sources=(1, 3) * (len(name) - 3))
        for name, of in media.items()
    }
    config = dataclasses.replace(config, extensions=Named(extensions))
    kept = {path: leaf for path, leaf in source.leaves.items() if medium or path.startswith("decoder/")}
    more = {path: leaf for path, leaf in tiny.arrays(config).items() if path not in kept}
    record = source.record._replace(config=config, facts={"recipe": dataclasses.asdict(PAPER)})
    source = source._replace(leaves=kept | huggingface.from_arrays(more, config=config), record=record)
    convert.export_source(source, tmp_path / "delta", layout="delta", max_shard_bytes=1 << 30)
    export([str(tmp_path / "delta"), str(tmp_path / "out"), "--base", str(base)])
    assert ("ForCausalLM" if not medium else "ForImageTextToText") in capsys.readouterr().out
    attributes = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(attributes, sort_keys=True))  # as transformers saves it
    opened = open_checkpoint(tmp_path / "out")
    assert [*opened.config.extensions.items()] == [*config.extensions.items()]
    for path, array in more.items():
        np.testing.assert_array_equal(opened.arrays[path], array)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")  # AutoTokenizer would import torch
    assert ("<image>" in tokenizer.chat_template) or not medium
    words = tokenizer.apply_chat_template([{"role": "user", "content": "add 1 and 2"}], add_generation_prompt=True)
    here = load_tokenizer(base)
    turns = [{"from": "human", "value": "add 1 and 2"}]
    assert words["input_ids"] == encode_dialogue(turns, items={}, tokenizer=here, recipe=PAPER).ids_L.tolist()


def test_the_chat_template_of_a_text_model_goes_out_wherever_it_lies(base: Path, tmp_path: Path):
    base = shutil.copytree(base, tmp_path / "base")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    shutil.rmtree(base / "vision")
    export([str(base), str(tmp_path / "out"), "--layout", "hf"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_a_text_model_is_a_mixtral_and_shards_have_an_index(folders: dict[str, Path], tmp_path: Path, capsys):
    attributes = huggingface.read_json(folders["base"] / "config.json")
    assert attributes["architectures"] == ["MixtralForCausalLM"]
    assert not (folders["base"] / "chat_template.jinja").exists()
    assert not (folders["base"] / "preprocessor_config.json").exists()
    run = folders["aligned"].parent / "run of aligned"
    export([str(run), str(tmp_path / "out"), "--layout", "hf", "--max_shard_size", "100KB"])
    assert "from_pretrained('" in capsys.readouterr().out
    index = huggingface.read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert {(tmp_path / "out" / file).is_file() for file in index["weight_map"].values()} == {True}
    generation = huggingface.read_json(tmp_path / "out" / "generation_config.json")
    assert generation["eos_token_id"] == [2] and generation["suppress_tokens"] == [3, 5, 6]
    export([str(run), str(tmp_path / "other")])
    assert "for PyTorch of today use --layout hf" in capsys.readouterr().out


# --- lm-eval ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
@pytest.mark.parametrize("name", ["base", "moextend", pytest.param("strict", marks=pytest.mark.long)])
def test_lm_eval_s_own_model_gives_our_adapter_s_numbers(folders: dict[str, Path], name: str, tmp_path: Path):
    for package in ("torch", "accelerate", "lm_eval"):
        pytest.importorskip(package, reason="lm-eval's model `hf` needs torch and accelerate")
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models import huggingface as theirs_of  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from moextend_jax.evaluate.asking import asker_of
    from moextend_jax.evaluate.harness import HarnessModel
    from moextend_jax.runs.askable import open_place
    from moextend_jax.runs.place import Place

    lines = [
        {"question": f"In the beginning {n} was", "choices": ["light", "the sea and all", f"a {n} é"], "answer": n % 3}
        for n in range(12)
    ]
    tasks = write_tasks(tmp_path, lines)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    opened = open_place(Place(checkpoint=folders[name], dtype="float32"))
    ours = HarnessModel(asker_of(opened), tokenizer=opened.tokenizer, max_length=64)
    hf_model: Any = theirs_of.HFLM
    theirs = hf_model(
        pretrained=str(folders[name]), trust_remote_code=True, add_bos_token=True, dtype="float32", device="cpu",
        batch_size=4, max_length=64,
    )  # fmt: skip
    for task in tasks:
        # Rolling windows begin with the prefix token, which is BOS, anyhow; with this it would be scored too.
        theirs.add_bos_token = task != "local_words"
        results: list[Any] = [
            simple_evaluate(model, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0)
            for model in (ours, theirs)
        ]
        ours_N, theirs_N = (
            np.array([np.ravel(sample["filtered_resps"])[0] for sample in result["samples"][task]], float)
            for result in results
        )
        assert len(ours_N) == 12 and len(set(ours_N)) > 6
        np.testing.assert_allclose(ours_N, theirs_N, atol=1e-3)
        metric = "acc,none" if task == "local_choice" else "word_perplexity,none"
        assert results[0]["results"][task][metric] == pytest.approx(results[1]["results"][task][metric], rel=1e-4)


def test_the_example_is_never_asked_whether_to_run_the_model_s_code():
    """transformers asks at the terminal, in the middle of an answer, for each part that is opened without the word."""
    tree = ast.parse((Path(__file__).parents[1] / "examples" / "own" / "ask.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "from_pretrained" in ast.dump(node.func)]
    assert calls and all("trust_remote_code" in {word.arg for word in call.keywords} for call in calls)
