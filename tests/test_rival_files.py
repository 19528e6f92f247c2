"""Low-rank updates and blocks in files: what a run has trained goes out as a delta and comes back bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import random_run
from folders import assert_same

from moextend_jax import cli
from moextend_jax.checkpoints import store
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.config import MoextendError
from moextend_jax.mesh import make_mesh
from moextend_jax.runs.models_of import open_model
from moextend_jax.settings import MESH, MethodSettings

METHODS = {
    "lora": MethodSettings(name="lora", rank=3, alpha=6.0, experts="per_expert", router=True),
    "damc": MethodSettings(name="damc", rank=2, alpha=4.0),
    "mole": MethodSettings(name="mole", rank=2, lora_experts=3),
    "moram": MethodSettings(name="moram", rank=4, experts="none"),
    "blocks": MethodSettings(name="blocks", blocks=3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By method a run with random leaves, and the delta of it."""
    made = {}
    for name, method in METHODS.items():
        folder = tmp_path_factory.mktemp(name)
        run = random_run.random_run(folder, method=method)
        cli.main(["export", str(run.workdir), str(folder / "delta"), "--layout", "delta"])
        made[name] = run, folder / "delta"
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_delta_is_what_was_trained(name: str, runs):
    run, delta = runs[name]
    expected = open_model(run, "moextend")
    opened = open_checkpoint(delta, base=Path(run.settings.base), vision=Path(run.settings.vision),
                             mesh=make_mesh(MESH))  # fmt: skip
    for kind in ("extensions", "adapters", "blocks"):
        assert getattr(opened.config, kind) == getattr(expected.model.config, kind)
    assert_same(opened.arrays, expected.arrays)


def test_deltas_of_different_methods_stand_in_one_model(runs, tmp_path: Path):
    """Each under a name of its own; a whole model of them comes back as it was written, and gives deltas again."""
    renamed = []
    for name in ("damc", "blocks"):
        delta = tmp_path / name
        _renamed(runs[name][1], delta, name)
        renamed.append(str(delta))
    run, _ = runs["lora"]
    options = ["--vision", run.settings.vision, "--text", "shared", "--rule", "shared"]
    cli.main(["compose", run.settings.base, *renamed, str(tmp_path / "whole"), "--share", "damc=0.5", *options])
    record, leaves = store.read(tmp_path / "whole")
    assert {name: of.share for name, of in record.config.added.items()} == {"damc": 0.5, "damc.text": 0.5, "blocks": 1}
    cli.main(["export", str(tmp_path / "whole"), str(tmp_path / "again"), "--layout", "delta", "--extension", "damc"])
    again, own = store.read(tmp_path / "again")
    assert [*again.config.adapters] == ["damc", "damc.text"] and not again.config.blocks
    parts = {path.split("/")[1] for path in own if path.startswith("adapters/")}
    assert parts == {"damc", "damc.text"} and all(own[path].sha256 == leaves[path].sha256 for path in own)


def _renamed(delta: Path, folder: Path, name: str) -> None:
    """The delta under another extension's name."""
    record, leaves = store.read(delta)
    config = record.config
    kinds = {
        kind: type(config.adapters)({part.replace("image", name, 1): of for part, of in getattr(config, kind).items()})
        for kind in ("adapters", "blocks")
    }
    moved = {
        (new := path.replace("/image", f"/{name}", 1) if not path.startswith("media/") else path):
        leaf._replace(path=new) for path, leaf in leaves.items()
    }  # fmt: skip
    folder.mkdir()
    changed = record._replace(config=dataclasses.replace(config, **kinds))
    store.write(folder, moved, changed, max_shard_bytes=1 << 30)


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_layouts_of_other_programs_refuse_them(layout: str, runs, tmp_path: Path):
    with pytest.raises(MoextendError, match=rf"layout {layout} .*adapters image.*--layout delta"):
        cli.call(["export", str(runs["mole"][0].workdir), str(tmp_path / "out"), "--layout", layout])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "message"),
    [
        ("lora", "adapters", "rank", 0, "impossible"),
        ("lora", "adapters", "rank", 1 << 40, "impossible"),
        ("lora", "adapters", "rank", 5, "expected"),
        ("lora", "adapters", "experts", "some", "is not one of"),
        ("moram", "adapters", "attention", False, "adapts nothing"),
        ("moram", "adapters", "share", 2.0, "share"),
        ("blocks", "blocks", "count", 2, "2 blocks of .* between 3 layers"),
        ("blocks", "blocks", "count", 0, "0 blocks"),
    ],
)
def test_records_that_contradict_themselves_are_refused(name, part, field, value, message, runs, tmp_path: Path):
    delta = runs[name][1]
    (tmp_path / "delta").mkdir()
    for file in delta.iterdir():
        (tmp_path / "delta" / file.name).write_bytes(file.read_bytes())
    record = json.loads((delta / store.FILE).read_text())
    record["model"][part]["image"][field] = value
    (tmp_path / "delta" / store.FILE).write_text(json.dumps(record))
    with pytest.raises(MoextendError, match=message):
        store.read(tmp_path / "delta")
