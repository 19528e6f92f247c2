"""`moextend import` and `export`: layouts come back bit for bit, errors leave nothing behind, memory is bounded."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import numpy as np
import oracle
import pytest
import tiny

from moextend_jax import cli
from moextend_jax.checkpoints import convert, hashes, huggingface, names, train_state
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.source import open_source
from moextend_jax.config import RECIPES, ExtensionConfig, ModelConfig, MoextendError, with_extension, with_vision
from moextend_jax.runs.export import is_workdir, open_workdir
from moextend_jax.runs.run import settings_of

ROOT = Path(__file__).parents[1]


def there_and_back(src: Path, tmp_path: Path, *options: str, out: tuple[str, ...] = ()) -> Path:
    cli.call(["import", str(src), str(tmp_path / "imported"), *options])
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "exported"), *out])
    return tmp_path / "exported"


# --- round trips ------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "mixtral": folders.mixtral,
    "mixtral in shards": lambda folder: folders.mixtral(folder, shards=4),
    "clip": folders.clip,
    "llava": folders.projector,
    "llava with a prefix": lambda folder: folders.projector(folder, prefix="model."),
    "llava as transformers spells it": lambda folder: folders.projector(folder, table="llava_hf"),
    "released": folders.released,
    "released, aligned": lambda folder: folders.released(folder, config=folders.ALIGNED),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard", ["5GB", "3kB"])
def test_every_layout_comes_back_bit_for_bit(tmp_path: Path, layout: str, shard: str):
    src = LAYOUTS[layout](tmp_path / "src")
    exported = there_and_back(src, tmp_path, out=("--max_shard_size", shard))
    folders.assert_same(folders.read(exported), folders.read(src))
    assert (exported / "model.safetensors.index.json").exists() == (shard == "3kB" and "llava" not in layout)
    assert open_source(exported).leaves.keys() == open_source(src).leaves.keys()
    for name in ("config.json", "tokenizer.model", "preprocessor_config.json"):
        if (src / name).exists():
            assert (exported / name).exists(), name
    if layout.startswith(("mixtral", "clip")):
        assert json.loads((exported / "config.json").read_text()) == json.loads((src / "config.json").read_text())


def test_the_tower_of_a_whole_clip(tmp_path: Path):
    exported = there_and_back(folders.whole_clip(tmp_path / "src"), tmp_path)
    folders.assert_same(folders.read(exported), folders.files("clip", tiny.PLAIN))
    assert json.loads((exported / "config.json").read_text())["model_type"] == "clip_vision_model"


def test_the_parts_of_a_model_go_in_together_and_come_out_apart(tmp_path: Path):
    src, tower = folders.mixtral(tmp_path / "src"), folders.clip(tmp_path / "tower")
    projector = folders.projector(tmp_path / "projector", table="llava_hf")
    cli.call(["import", str(src), str(tmp_path / "whole"), f"--vision={tower}", "--projector", str(projector)])
    assert open_checkpoint(tmp_path / "whole").config.vision == dataclasses.replace(tiny.VISION, feature_layer=-2)
    for layout, original in (("clip", tower), ("llava", projector), ("mixtral", src)):
        cli.call(["export", str(tmp_path / "whole"), str(tmp_path / layout), "--layout", layout])
        folders.assert_same(folders.read(tmp_path / layout), folders.read(original))
    folders.assert_same(folders.read(tmp_path / "mixtral" / "vision"), folders.read(tower))
    assert not (tmp_path / "mixtral" / "tokenizer.json").exists()  # CLIP's


def test_the_embedded_base_comes_back_bit_for_bit(tmp_path: Path):
    src = tiny.ASSETS / "base"
    exported = there_and_back(src, tmp_path)
    for part in (".", "vision"):
        folders.assert_same(folders.read(exported / part), folders.read(src / part))
        assert json.loads((exported / part / "config.json").read_text()) == json.loads(
            (src / part / "config.json").read_text()
        )
    assert (exported / "tokenizer.model").read_bytes() == (src / "tokenizer.model").read_bytes()


@oracle.needs_oracle
@pytest.mark.parametrize("name", [*oracle.MODELS, "clip"])
def test_the_released_folders_come_back_bit_for_bit(tmp_path: Path, name: str):
    options = () if name == "clip" else (f"--vision={oracle.FOLDER / 'clip'}",)
    exported = there_and_back(oracle.FOLDER / name, tmp_path, *options)
    folders.assert_same(folders.read(exported), folders.read(oracle.FOLDER / name))
    said = json.loads((oracle.FOLDER / name / "config.json").read_text())
    assert said.items() <= (json.loads((exported / "config.json").read_text()) | {"x": 0}).items()
    if name != "clip":  # and now it opens without being told the tower's sizes
        folders.assert_same(open_checkpoint(exported).arrays, oracle.load(name).arrays)


def test_a_partial_save_becomes_whole(tmp_path: Path):
    partial = folders.released(tmp_path / "partial", seed=1, keep="extensions/image/")
    base = folders.released(tmp_path / "base", config=folders.ALIGNED)
    exported = there_and_back(partial, tmp_path, f"--base={base}")
    folders.assert_same(folders.read(exported), folders.read(base) | folders.read(partial))


def test_torch_pickles_come_in(tmp_path: Path):
    torch = pytest.importorskip("torch")
    src = folders.mixtral(tmp_path / "src")
    tensors = folders.read(src)
    (src / "model.safetensors").unlink()
    bits = {name: torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16) for name, value in tensors.items()}
    torch.save(bits, src / "pytorch_model.bin")
    folders.assert_same(folders.read(there_and_back(src, tmp_path)), tensors)


def test_another_element_type_is_stored_where_asked_for(tmp_path: Path):
    src = folders.mixtral(tmp_path / "src")
    exported = there_and_back(src, tmp_path, "--dtype", "float32")
    folders.assert_same(folders.read(exported), {n: v.astype(np.float32) for n, v in folders.read(src).items()})
    assert hashes.stored_hash(open_source(exported).leaves) == hashes.stored_hash(
        open_source(tmp_path / "imported").leaves
    )


# --- the result of a run ----------------------------------------------------------------------------------------------

ROWS = dataclasses.replace(tiny.EXTENDED, decoder=dataclasses.replace(tiny.DECODER, vocab_size=32000))
"""A model with a row for each piece of a real tokenizer."""
BASE = with_extension(ROWS, None)


def run_of(
    workdir: Path, base: Path, *, extended: bool, recipe: str = "paper", changed: bool = False
) -> dict[str, Any]:
    """A work directory as the stages leave it; returns the trained leaves."""
    settings = tiny.run_settings(recipe=RECIPES[recipe], base=str(base), vision=str(base / "vision"))
    found = hashes.base_hashes(open_source(base).leaves).base
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"settings": dataclasses.asdict(settings), "base_hash": found}))
    facts = {"base": found, "recipe": dataclasses.asdict(RECIPES[recipe]) | {"global_batch": None}}
    made = tiny.arrays(ROWS, seed=3)
    results = {"align": {path: leaf for path, leaf in made.items() if path.startswith("media/image/projector/")}}
    if extended:
        (workdir / "select").mkdir()
        record = {"chosen_layers": [0, 2], "sources": [1, 3], "base": facts["base"]}
        (workdir / "select" / "routing.json").write_text(json.dumps(record))
        results["grow"] = {path: leaf for path, leaf in made.items() if path.startswith("extensions/image/")}
        if changed:
            results["grow"]["decoder/layers/moe/gate"] = made["decoder/layers/moe/gate"]
        results["finetune"] = {path: leaf + 1 for path, leaf in made.items() if path.startswith("extensions/image/")}
    trained = {}
    for name, result in results.items():
        train_state.save_leaves(workdir / name / "result", result, facts=facts)
        trained |= result
    return trained


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_of(tmp_path / "base")


def base_of(folder: Path, *, seed: int = 0, config: ModelConfig = BASE) -> Path:
    """A base with a tower and a real tokenizer."""
    folders.clip(folders.mixtral(folder, seed=seed, config=with_vision(config, None)) / "vision")
    shutil.copy(tiny.ASSETS / "base" / "tokenizer.model", folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # Orbax's own
@pytest.mark.parametrize("extended", [True, False])
def test_a_run_is_exported_in_the_released_layout(tmp_path: Path, base: Path, extended: bool, capsys):
    trained = run_of(tmp_path / "run", base, extended=extended)
    cli.call(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "in layout released" in capsys.readouterr().out
    opened = open_checkpoint(tmp_path / "out")
    expected = {**open_checkpoint(base).arrays, **folders.arrays(BASE), **trained}
    folders.assert_same(opened.arrays, expected)
    assert (opened.config.extension is not None) == extended
    assert (tmp_path / "out" / "tokenizer.model").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_a_delta_of_a_run_goes_back_onto_its_base_and_no_other(tmp_path: Path, base: Path, recipe: str):
    trained = run_of(tmp_path / "run", base, extended=True, recipe=recipe, changed=recipe == "released")
    cli.call(["export", str(tmp_path / "run"), str(tmp_path / "delta"), "--layout=delta"])
    folders.assert_same(folders.read(tmp_path / "delta"), trained)
    said = json.loads((tmp_path / "delta" / "moextend.json").read_text())
    assert said["base_hash"] == hashes.base_hashes(open_source(base).leaves).base
    assert said["facts"]["recipe"]["calibrator_std"] == RECIPES[recipe].calibrator_std

    cli.call(["import", str(base), str(tmp_path / "imported")])
    for other in (base, tmp_path / "imported"):
        opened = open_checkpoint(tmp_path / "delta", base=other)
        folders.assert_same(opened.arrays, {**folders.arrays(BASE), **trained})
        assert opened.config.extension == ExtensionConfig(layers=(0, 2), sources=(1, 3), calibrator_width=5)
        assert (opened.source.record.layout, folders.base_hash(opened)) == ("delta", said["base_hash"])
    with pytest.raises(MoextendError, match="--base DIR"):
        open_checkpoint(tmp_path / "delta")

    # Applied, imported, and taken off again it is the same delta.
    cli.call(["import", str(tmp_path / "delta"), str(tmp_path / "applied"), f"--base={base}"])
    cli.call(["export", str(tmp_path / "applied"), str(tmp_path / "again"), "--layout=delta"])
    folders.assert_same(folders.read(tmp_path / "again"), trained)
    assert json.loads((tmp_path / "again" / "moextend.json").read_text())["base_hash"] == said["base_hash"]

    other = base_of(tmp_path / "other", seed=9)
    found = hashes.base_hashes(open_source(other).leaves).base
    with pytest.raises(MoextendError, match=rf"content hash {said['base_hash']}, but {other} has {found}"):
        open_checkpoint(tmp_path / "delta", base=other)
    small = dataclasses.replace(BASE, decoder=dataclasses.replace(BASE.decoder, layers=2))
    short = base_of(tmp_path / "short", config=small)
    with pytest.raises(MoextendError, match=rf"extends layers \[2\], but {short} has only 2 layers"):
        open_checkpoint(tmp_path / "delta", base=short)
    with pytest.raises(MoextendError, match="--vision DIR"):
        open_checkpoint(tmp_path / "delta", base=folders.mixtral(tmp_path / "text", config=with_vision(BASE, None)))


def test_a_text_extension_goes_onto_a_base_with_a_tower(tmp_path: Path, base: Path):
    task = dataclasses.replace(tiny.EXTENSION, medium="")
    both = with_extension(BASE, task, name="task")
    source = open_source(base)
    extended = source._replace(
        record=source.record._replace(config=both),
        leaves=source.leaves
        | {path: leaf for path, leaf in folders.source_of(both).leaves.items() if "/task/" in path},
    )
    convert.export_delta(extended, tmp_path / "delta", extensions=["task"])
    cli.call(["import", str(tmp_path / "delta"), str(tmp_path / "whole"), f"--base={base}"])
    opened = open_checkpoint(tmp_path / "whole")
    assert [*opened.config.extensions] == ["task"] and not opened.config.media
    assert not any(path.startswith("media/") for path in opened.arrays)


def test_the_settings_of_a_run_are_those_it_was_run_with_and_a_model_has_none(tmp_path: Path, base: Path):
    run_of(tmp_path / "run", base, extended=False)
    settings = settings_of(tmp_path / "run")
    assert settings is not None and settings.base == str(base) and is_workdir(tmp_path / "run")
    assert settings_of(base) is None and not is_workdir(base) and not is_workdir(tmp_path / "nowhere")
    with pytest.raises(MoextendError, match="nowhere is no work directory: there is no such folder"):
        settings_of(tmp_path / "nowhere")
    with pytest.raises(MoextendError, match="nowhere is no work directory"):
        open_workdir(tmp_path / "nowhere")
    (tmp_path / "run" / "config.json").write_text('{"settings": {"bass": 1}}')
    with pytest.raises(MoextendError, match="config.bass is no setting"):
        settings_of(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(MoextendError, match=r"config\.json cannot be read"):
        settings_of(tmp_path / "run")


def test_what_a_run_has_not_made_yet_is_called_by_its_own_stage(tmp_path: Path, base: Path):
    """A task in text aligns nothing, and its aligned model is the base."""
    run_of(tmp_path / "run", base, extended=False)
    shutil.rmtree(tmp_path / "run" / "align")
    for medium, model, message in (
        ("image", None, "align has not been run in"), ("", None, "grow has not been run in"),
        ("", "aligned", "aligned is the base of"),
    ):  # fmt: skip
        record = json.loads((tmp_path / "run" / "config.json").read_text())
        record["settings"] |= {"medium": medium}
        (tmp_path / "run" / "config.json").write_text(json.dumps(record))
        with pytest.raises(MoextendError, match=f"^{message} .*: there is nothing to export"):
            open_workdir(tmp_path / "run", model=model)


@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_base_has_changed_is_not_exported(tmp_path: Path, base: Path):
    run_of(tmp_path / "run", base, extended=True)
    folders.change(base, {"model.norm.weight": lambda old: old + 1})
    with pytest.raises(MoextendError, match="was run on the base with content hash"):
        cli.call(["export", str(tmp_path / "run"), str(tmp_path / "out")])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> Path:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    return folder


def without_shard(folder: Path) -> Path:
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return folder


def with_attribute(folder: Path, **changed: Any) -> Path:
    attributes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(attributes | changed))
    return folder


NORM = "model.layers.1.input_layernorm.weight"
MISTAKES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing shard": (
        lambda f: without_shard(folders.mixtral(f, shards=3)),
        "lists shards that do not exist: model-00002",
    ),
    "cut shard": (
        lambda f: cut(folders.mixtral(f, shards=3)),
        r"model-00003-of-00003\.safetensors .* cut short, .* needs",
    ),
    "shape": (lambda f: folders.change(folders.mixtral(f), {NORM: lambda a: a[1:]}), f"{NORM} has shape"),
    "dtype": (
        lambda f: folders.change(folders.mixtral(f), {NORM: lambda a: a.astype(np.int32)}),
        f"{NORM} has .* int32",
    ),
    "names": (
        lambda f: folders.change(folders.mixtral(f), {NORM: None, "x": lambda a: a}),
        f"Missing: {NORM}. Not asked for: x",
    ),
    "surplus": (lambda f: folders.change(folders.mixtral(f), {"x": lambda a: a}), r"Not asked for: x\.$"),
    "attribute": (lambda f: with_attribute(folders.mixtral(f), attention_bias=True), "attention_bias = True"),
    "rope": (lambda f: with_attribute(folders.mixtral(f), rope_scaling={"type": "yarn"}), "rope_scaling"),
    "activation": (lambda f: with_attribute(folders.clip(f), hidden_act="relu"), "hidden_act = 'relu'"),
    "layers": (lambda f: with_attribute(folders.released(f), add_layer=[0, 9]), r"layers \[9\], but .* only 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(tmp_path: Path, mistake: str):
    make, said = MISTAKES[mistake]
    src = make(tmp_path / "src")
    with pytest.raises(MoextendError, match=said):
        cli.call(["import", str(src), str(tmp_path / "dst")])
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "import needs --src: .*; --dst: new folder"),
        (["{src}"], "dst"),
        (["{src}", "{dst}", "--frobnicate"], "--frobnicate"),
        (["{src}", "{dst}", "--dtype", "int8"], "int8"),
        (["{src}", "{dst}", "--base", "nowhere"], "nowhere"),
        (["{src}", "{src}"], "exists already"),
        (["nowhere", "{dst}"], "nowhere does not exist in /.*: give the folder"),
        (["{src}", "{dst}", "--vision", "{src}"], "holds no vision tower"),
        (["{src}", "{dst}", "--projector", "{src}"], "holds no projector"),
    ],
)
def test_a_mistaken_import_says_so(tmp_path: Path, arguments: list[str], said: str):
    src = folders.mixtral(tmp_path / "src")
    with pytest.raises(MoextendError, match=said):
        cli.call(["import", *(one.format(src=src, dst=tmp_path / "dst") for one in arguments)])
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "clip"], "needs this part: vision"),
        (["--layout", "delta"], "needs this part: extension"),
        (["--layout", "mixtral", "--recipe", "paper"], "--recipe paper goes with --layout hf"),
        (["--layout", "gguf"], "gguf"),
        (["--max_shard_size", "big"], "'big' is no size"),
        (["--max-shard-size", "-1GB"], "is no size|expected one argument"),
    ],
)
def test_a_mistaken_export_says_so(tmp_path: Path, arguments: list[str], said: str):
    src = folders.mixtral(tmp_path / "src")
    with pytest.raises(MoextendError, match=said):
        cli.call(["export", str(src), str(tmp_path / "dst"), *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_extended_model_is_no_mixtral(tmp_path: Path):
    with pytest.raises(MoextendError, match="no place in layout mixtral"):
        cli.call(["export", str(folders.released(tmp_path / "a")), str(tmp_path / "b"), "--layout", "mixtral"])


def test_an_error_while_writing_leaves_nothing(tmp_path: Path):
    source = open_source(folders.mixtral(tmp_path / "src"))

    def fails(index):
        raise OSError("the disk went away")

    path = "decoder/layers/moe/experts/w_down"
    broken = source._replace(leaves=source.leaves | {path: source.leaves[path]._replace(ours=fails)})
    with pytest.raises(OSError, match="went away"):
        convert.import_source(broken, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    src = folders.mixtral(tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(MoextendError, match="its disk has 10 B left"):
        cli.call(["import", str(src), str(tmp_path / "dst")])


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
from pathlib import Path
from moextend_jax.checkpoints import convert, cost, leaves
from moextend_jax.checkpoints.source import open_source
import jax
src, dst = map(Path, sys.argv[1:3])
{body}
print(cost.nbytes, cost.peak, cost.largest)
"""
IMPORT = "cost = convert.import_source(open_source(src), dst)"
EXPORT = "cost = convert.export_source(open_source(src), dst, layout='mixtral', max_shard_bytes=10**9)"
LOAD = """
source = open_source(src)
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
with cost.watched({path: leaves.plan_ours(leaf) for path, leaf in source.leaves.items()}, dst, None) as (tell, _):
    made = leaves.read_sharded(source.leaves, dict.fromkeys(source.leaves, device))
    cost = tell()
"""


def measure(body: str, src: Path, dst: Path) -> tuple[int, int, int]:
    """Bytes, peak memory above the start, and the largest stacked tensor, in a process of its own."""
    command = [sys.executable, "-c", MEMORY.format(body=body), str(src), str(dst)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    nbytes, peak, largest = done.stdout.split()[-3:]
    if peak == "None":
        pytest.skip("this system does not tell a process's peak memory")
    return int(nbytes), int(peak), int(largest)


def big(folder: Path, *, layers: int, width: int, hidden: int) -> Path:
    """A Mixtral of zeros (but for its last tensors) in files with holes, which take no disk."""
    decoder = dataclasses.replace(tiny.DECODER, layers=layers, width=width, hidden=hidden, heads=8, kv_heads=4)
    decoder = dataclasses.replace(decoder, head_size=width // 8, experts=8, vocab_size=4096)
    config = dataclasses.replace(folders.TEXT, decoder=decoder)
    folder.mkdir()
    header, begin, weight_map = {}, 0, {}
    shards: list[tuple[dict[str, Any], int]] = []
    for tensor in names.tensors("mixtral", config):
        shape = names.shape(tensor.layout.split(" -> ")[0], names.letters(tensor.path, config))
        end = begin + 2 * int(np.prod(shape))
        header[tensor.file] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        begin = end
        if begin > 10**9:
            shards.append((header, begin))
            header, begin = {}, 0
    shards.append((header, begin))
    for n, (header, size) in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
            file.seek(-1000, 2)
            file.write(b"\x3f" * 1000)
        weight_map |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    huggingface.write_decoder_config(folder, decoder, dtype="bfloat16")
    return folder


def assert_bounded(folder: Path, tmp_path: Path, *, at_least: int, margin: int) -> None:
    nbytes, peak, largest = measure(IMPORT, folder, tmp_path / "imported")
    print(f"import: {nbytes / 1e9:.2f} GB, peak {peak / 1e6:.1f} MB, largest stacked tensor {largest / 1e6:.1f} MB")
    assert nbytes >= at_least and peak <= 2 * largest
    _, peak, piece = measure(EXPORT, tmp_path / "imported", tmp_path / "exported")
    print(f"export: peak {peak / 1e6:.1f} MB, largest tensor of a file {piece / 1e6:.1f} MB")
    assert peak <= 2 * largest
    for src in (folder, tmp_path / "imported"):
        _, peak, _ = measure(LOAD, src, tmp_path)
        print(f"read of {src.name}: {(peak - nbytes) / 1e6:.1f} MB above the arrays themselves")
        assert peak - nbytes <= largest + margin  # the arrays are in this memory too: the device is the host


@pytest.mark.slow
def test_memory_stays_within_twice_the_largest_stacked_tensor(tmp_path: Path):
    folder = big(tmp_path / "src", layers=2, width=1024, hidden=2048)
    assert_bounded(folder, tmp_path, at_least=200_000_000, margin=40_000_000)


@pytest.mark.long
def test_memory_stays_within_twice_the_largest_stacked_tensor_of_gigabytes(tmp_path: Path):
    folder = big(tmp_path / "src", layers=8, width=2048, hidden=4096)
    assert_bounded(folder, tmp_path, at_least=3_000_000_000, margin=60_000_000)


def test_the_command_tells_what_it_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.call(["import", str(folders.mixtral(tmp_path / "src")), str(tmp_path / "dst")])
    out = capsys.readouterr().out
    assert re.search(
        r"imported decoder \(mixtral\) .* MB/s; peak memory .* above the start \(largest tensor written", out
    )
    assert re.search(r"content hash [0-9a-f]{64}", out)
