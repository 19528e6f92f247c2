"""Models of several media and extensions on disk: every leaf comes back, deltas by name, what cannot be composed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import folders
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from moextend_jax import cli
from moextend_jax.checkpoints import compose, convert, delta, hashes, names, store, train_state
from moextend_jax.checkpoints.loading import open_checkpoint, open_tower
from moextend_jax.checkpoints.source import Source, open_source
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.config import (
    RECIPES,
    ExtensionConfig,
    FeaturesConfig,
    ModelConfig,
    MoextendError,
    Named,
    ProjectorConfig,
    WhisperConfig,
)
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import by_path
from moextend_jax.runs import results
from moextend_jax.runs.askable import open_place
from moextend_jax.runs.media import medium_of
from moextend_jax.runs.place import Place
from moextend_jax.runs.run import as_json, facts_of_base
from moextend_jax.settings import (
    EvaluateSettings,
    ExtensionSettings,
    MediumSettings,
    ProjectorSettings,
    RunSettings,
    StageSettings,
)

CONFIG, source_of = folders.MANY, folders.source_of
MEDIA, EXTENSIONS, DECODER = CONFIG.media, CONFIG.extensions, CONFIG.decoder


def arrays(config: ModelConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    return folders.arrays(config, dtype=np.float32, seed=seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its towers, a whole model, and a delta of each of its extensions."""
    root = tmp_path_factory.mktemp("models")
    plain = ModelConfig(decoder=DECODER, dtype="float32")
    shutil.copy(tiny.ASSETS / "base" / "tokenizer.model", folders.mixtral(root / "base", config=plain, dtype="float32"))
    towers = {path: leaf for path, leaf in source_of(CONFIG).leaves.items() if "/tower/" in path}
    for name in ("image", "speech"):
        own = {path: leaf for path, leaf in towers.items() if path.startswith(f"media/{name}/")}
        convert.import_source(source_of(CONFIG)._replace(leaves=own), root / f"tower of {name}")
    recipe = dataclasses.asdict(RECIPES["paper"])
    whole = source_of(CONFIG, recipe=recipe, text_isolation="strict")
    convert.import_source(whole, root / "whole")
    for name in EXTENSIONS:
        words = ["export", str(root / "whole"), str(root / name), "--layout", "delta", "--extension", name]
        cli.call(words)
    return root


def composed(root: Path, out: Path, *words: str, deltas: tuple[str, ...] = ("image", "speech", "touch")) -> Path:
    towers = ["--vision", str(root / "tower of image")] if "image" in deltas else []
    towers += ["--tower", f"speech={root / 'tower of speech'}"] if "speech" in deltas else []
    cli.call(["compose", str(root / "base"), *(str(root / name) for name in deltas), str(out), *towers, *words])
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_leaf_of_a_model_of_many_media_has_a_row():
    params = by_path(nnx.state(abstract(CONFIG), nnx.Param))
    leaves = source_of(CONFIG).leaves
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: p.shape for path, p in params.items()}
    for path, leaf in leaves.items():  # stacked axes are those of layers and of experts where others name their tensors
        stacked = 0 if "/projector/" in path else sum(axis in "ZEYXU" for axis in params[path].axes[:2])
        assert len(leaf.stacked) == stacked, path


def test_a_model_of_many_media_and_extensions_comes_back_bit_for_bit(root: Path):
    opened = open_checkpoint(root / "whole", dtype="float32")
    folders.assert_same(opened.arrays, arrays(CONFIG))
    assert (opened.config.media, opened.config.extensions) == (MEDIA, EXTENSIONS)
    assert opened.config.composition == "decoupled"


def test_a_tower_has_one_hash_whatever_it_is_called_and_whichever_folder_it_lies_in(root: Path, tmp_path: Path):
    known = hashes.base_hashes(open_source(root / "whole").leaves)
    alone = hashes.base_hashes(open_source(root / "base").leaves)
    assert known.parts.keys() == {"decoder", "media/image", "media/speech"} and alone.parts.keys() == {"decoder"}
    assert alone.parts["decoder"] == known.parts["decoder"] and alone.base != known.base
    _, other = open_tower(str(root / "tower of image"), kind="video", medium="video", seconds=1, feature_layer=-1)
    assert hashes.base_hashes(other).parts == {"media/video": known.parts["media/image"]}
    folder = write_whisper(tmp_path / "whisper")
    for of in (folder, root / "tower of speech"):
        config, leaves = open_tower(str(of), kind="audio", medium="sound", seconds=2, feature_layer=-1)
        assert config == MEDIA["speech"].tower
        assert hashes.base_hashes(leaves).parts == {"media/sound": known.parts["media/speech"]}
    with pytest.raises(MoextendError, match="hears 2 seconds of sound, not 3"):
        open_tower(str(root / "tower of speech"), kind="audio", medium="sound", seconds=3, feature_layer=-1)
    with pytest.raises(MoextendError, match="holds no tower"):
        open_tower(str(root / "base"), kind="audio", medium="sound", seconds=1, feature_layer=-1)


def write_whisper(folder: Path) -> Path:
    """The speech tower as Hugging Face has it."""
    folder.mkdir()
    leaves = source_of(CONFIG).leaves
    tensors = {}
    for row in names.WHISPER:
        leaf = leaves[f"media/speech/tower/{row.path}"]
        for index in leaf.indices():
            tensors["model.encoder." + row.file.format(U=index[0] if index else "")] = leaf.theirs(index).copy()
    save_file(tensors, folder / "model.safetensors")
    tower = MEDIA["speech"].tower
    assert isinstance(tower, WhisperConfig)
    (folder / "config.json").write_text(json.dumps(folders.whisper_attributes(tower)))
    return folder


def test_layouts_of_one_extension_refuse_more_in_a_line(root: Path, tmp_path: Path):
    for layout, other in (("released", "extension speech"), ("hf", "extension touch .* medium touch of kind features")):
        with pytest.raises(MoextendError, match=rf"layout {layout} holds a decoder .* this model has .*{other}"):
            cli.call(["export", str(root / "whole"), str(tmp_path / "out"), "--layout", layout])
    config = dataclasses.replace(CONFIG, media=Named(image=MEDIA["image"]), extensions=Named(image=tiny.EXTENSION))
    halved = dataclasses.replace(config, extensions=Named(image=dataclasses.replace(tiny.EXTENSION, share=0.5)))
    pooled = dataclasses.replace(MEDIA["image"], projector=ProjectorConfig(kind="pool", neighbours=2))
    for odd, message in (
        (halved, "a share of 0.5 of extension image"),
        (dataclasses.replace(config, media=Named(image=pooled)), "a projector of kind pool"),
    ):
        with pytest.raises(MoextendError, match=message):
            convert.export_source(source_of(odd), tmp_path / "out", layout="released", max_shard_bytes=1 << 30)
    assert not list(tmp_path.iterdir())


def test_two_new_experts_of_different_sources_go_through_published_layouts(tmp_path: Path):
    two = ExtensionConfig(layers=(0, 2), sources=(1, 3, 0, 2), new_experts=2, calibrator_width=5)
    config = dataclasses.replace(
        CONFIG, media=Named(image=MEDIA["image"]), extensions=Named(image=two), composition="shared"
    )
    recipe = dataclasses.replace(RECIPES["paper"], feature_layer=-1)
    source = source_of(config, recipe=dataclasses.asdict(recipe))
    convert.export_source(source, tmp_path / "released", layout="released", max_shard_bytes=1 << 30)
    export_transformers(source, tmp_path / "hf", recipe=recipe, max_shard_bytes=1 << 30)
    for layout in ("released", "hf"):
        opened = open_checkpoint(tmp_path / layout, dtype="float32")
        folders.assert_same(opened.arrays, arrays(config))
        assert opened.config.extensions == config.extensions, layout


def as_format_1(folder: Path) -> Path:
    """Turns a folder of one extension into what earlier versions wrote."""
    before = {
        "media/image/tower/": "vision/",
        "media/image/projector/": "projector/",
        "extensions/image/": "extension/",
    }

    def old(path: str) -> str:
        return next((then + path.removeprefix(now) for now, then in before.items() if path.startswith(now)), path)

    save_file(
        {old(path): array for path, array in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    record = json.loads((folder / store.FILE).read_text())
    medium, model = record["model"]["media"]["image"], record["model"]
    added = ("layers", "sources", "new_experts", "calibrator_width")
    record["model"] = {
        "decoder": model["decoder"], "vision": medium["tower"], "tags": medium["tags"],
        "extension": {name: model["extensions"]["image"][name] for name in added},
    }  # fmt: skip
    record |= {"format": 1, "leaves": {old(path): leaf for path, leaf in record["leaves"].items()}}
    del record["base_parts"]
    (folder / store.FILE).write_text(json.dumps(record))
    return folder


def test_folders_of_earlier_versions_are_read_and_their_hashes_still_hold(tmp_path: Path):
    folders.clip(folders.mixtral(tmp_path / "base") / "vision")
    folders.released(tmp_path / "released")
    cli.call(["import", str(tmp_path / "released"), str(tmp_path / "whole")])
    cli.call(["export", str(tmp_path / "released"), str(tmp_path / "delta"), "--layout", "delta"])
    opened = open_checkpoint(tmp_path / "released")
    # Byte for byte the record that an earlier version made of the same weights has this base_hash.
    base_hash = json.loads((tmp_path / "whole" / store.FILE).read_text())["base_hash"]
    for folder, base in (("whole", None), ("delta", tmp_path / "base")):
        again = open_checkpoint(as_format_1(tmp_path / folder), base=base)
        folders.assert_same(again.arrays, opened.arrays)
        assert (again.config.media, again.config.extensions) == (opened.config.media, opened.config.extensions)
        assert folders.base_hash(again) == base_hash
    other = folders.mixtral(tmp_path / "other", seed=9)
    folders.clip(other / "vision")
    with pytest.raises(MoextendError, match=f"content hash {base_hash}"):
        open_checkpoint(tmp_path / "delta", base=other)
    cli.call(["compose", str(tmp_path / "base"), str(tmp_path / "delta"), str(tmp_path / "composed")])
    folders.assert_same(open_checkpoint(tmp_path / "composed").arrays, opened.arrays)


def test_content_hashes_go_by_the_names_of_one_medium():
    zeros = np.zeros((2,), np.float32)
    digest = hashlib.sha256(zeros.tobytes()).hexdigest()
    by_path = {path: (zeros.dtype, zeros.shape, digest) for path in ("decoder/norm", "media/image/tower/class_token")}
    lines = f"decoder/norm float32 [2] {digest}\nvision/class_token float32 [2] {digest}\n"
    assert hashes.combined(by_path).base == hashlib.sha256(lines.encode()).hexdigest()


# --- deltas and compositions ------------------------------------------------------------------------------------------


def test_a_delta_of_one_extension_has_its_leaves_its_projector_and_the_hashes_of_its_base(root: Path):
    record, leaves = store.read(root / "speech")
    expected = {
        p: a for p, a in arrays(CONFIG).items() if p.startswith(("extensions/speech/", "media/speech/projector/"))
    }
    folders.assert_same(folders.read(root / "speech"), expected)
    assert leaves.keys() == expected.keys()
    assert (record.config.media, record.config.extensions) == (
        Named(speech=MEDIA["speech"]),
        Named(speech=EXTENSIONS["speech"]),
    )
    assert record.parts == hashes.base_hashes(open_source(root / "whole").leaves).parts
    with pytest.raises(MoextendError, match="there is no extension sound; there are: image, speech, touch"):
        delta.of_extensions(leaves, CONFIG, ["sound"])


def test_deltas_trained_apart_make_one_model(root: Path, tmp_path: Path):
    out = composed(root, tmp_path / "out", "--rule", "shared", "--text", "shared", "--share", "image=0.25")
    opened = open_checkpoint(out, dtype="float32")
    folders.assert_same(opened.arrays, arrays(CONFIG))
    image = dataclasses.replace(EXTENSIONS["image"], share=0.25)
    assert (opened.config.media, opened.config.extensions) == (MEDIA, EXTENSIONS.replacing("image", image))
    assert opened.config.composition == "shared"
    facts = opened.source.record.facts
    assert facts["text_isolation"] == "none" and facts["recipe"]["prompt"] == RECIPES["paper"].prompt
    record = facts["composed"]
    assert (record["rule"], record["text"]) == ("shared", "shared")
    assert record["shares"] == {"image": 0.25, "speech": 0.5, "touch": 1.0}
    assert [part["extensions"] for part in record["deltas"]] == [["image"], ["speech"], ["touch"]]
    for part, name in zip(record["deltas"], EXTENSIONS, strict=True):
        assert part["content_hash"] == json.loads((root / name / store.FILE).read_text())["content_hash"]
    asked = open_place(Place(checkpoint=out))
    assert (asked.config.text_isolation, asked.config.composition) == ("none", "shared")
    assert asked.tokenizer.media["speech"].tags == MEDIA["speech"].tags

    # Taken off again, each is what it was.
    cli.call(["export", str(out), str(tmp_path / "again"), "--layout", "delta", "--extension", "touch"])
    folders.assert_same(folders.read(tmp_path / "again"), folders.read(root / "touch"))
    assert store.read(tmp_path / "again")[0].parts == store.read(root / "touch")[0].parts


def test_a_delta_of_several_goes_onto_a_base_that_has_their_towers(root: Path, tmp_path: Path):
    several = composed(root, tmp_path / "several", "--delta")
    assert not any(path.startswith("decoder/") or "/tower/" in path for path in folders.read(several))
    plain = dataclasses.replace(CONFIG, extensions=Named())
    own = {path: leaf for path, leaf in source_of(plain).leaves.items() if hashes.is_pretrained(path)}
    convert.import_source(source_of(plain)._replace(leaves=own), tmp_path / "pretrained")
    blind = open_checkpoint(tmp_path / "pretrained")  # towers that no projector reads
    assert not blind.config.media and all(path.startswith("decoder/") for path in blind.arrays)
    opened = open_checkpoint(several, base=tmp_path / "pretrained", dtype="float32")
    folders.assert_same(opened.arrays, arrays(CONFIG))
    assert opened.config.extensions == EXTENSIONS and opened.source.record.facts["text_isolation"] == "strict"
    with pytest.raises(MoextendError, match="trained with a vision tower and .* has none: name it with --vision DIR"):
        open_checkpoint(several, base=root / "base")
    with pytest.raises(MoextendError, match="trained with a tower for speech and .* --tower speech=DIR"):
        open_checkpoint(root / "speech", base=root / "base")
    other = dataclasses.replace(plain, media=Named(speech=MEDIA["speech"]))
    leaves = {path: leaf for path, leaf in source_of(other, seed=1).leaves.items() if "/tower/" in path}
    decoder = {path: leaf for path, leaf in own.items() if path.startswith("decoder/")}
    convert.import_source(source_of(other)._replace(leaves=decoder | leaves), tmp_path / "other tower")
    with pytest.raises(MoextendError, match="belongs to a base whose tower for speech has content hash"):
        open_checkpoint(root / "speech", base=tmp_path / "other tower")


def test_the_storage_that_deltas_were_trained_over_is_kept(root: Path, tmp_path: Path):
    touch = dataclasses.replace(CONFIG, media=Named(touch=MEDIA["touch"]), extensions=Named(touch=EXTENSIONS["touch"]))
    delta = export_delta(touch, root, tmp_path / "touch", expert_storage="int4 in groups of 64")
    for words, said in (([delta], "int4 in groups of 64"), ([delta, root / "image"], "int4 in groups of 64 and as_is")):
        out = tmp_path / f"out{len(words)}"
        vision = ["--vision", str(root / "tower of image")] if len(words) > 1 else []
        cli.call(["compose", str(root / "base"), *map(str, words), str(out), *vision])
        assert open_source(out).record.facts["expert_storage"] == said


def test_media_that_were_given_the_same_id_apart_get_ids_of_their_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    same = dataclasses.replace(MEDIA["touch"], tags=MEDIA["speech"].tags)
    config = dataclasses.replace(CONFIG, media=Named(touch=same), extensions=Named(touch=EXTENSIONS["touch"]))
    clashing = export_delta(config, root, tmp_path / "clashing")
    words = [str(root / "base"), str(root / "speech"), str(clashing), str(tmp_path / "out")]
    read, ends = compose.tokenizer_of, []
    monkeypatch.setattr(Source, "ends", [7])  # of config.json alone: no id for a medium either
    monkeypatch.setattr(compose, "tokenizer_of", lambda *of, **own: ends.append(own["ends"]) or read(*of, **own))
    cli.call(["compose", *words, "--tower", f"speech={root / 'tower of speech'}"])
    assert ends == [[7]]
    media = open_source(tmp_path / "out").config.media
    assert media["speech"] == MEDIA["speech"]
    pads = {medium.tags.pad for medium in media.values()}
    assert len(pads) == 2 and not pads & {5, 6, 12, 13, 16}  # start, end, tab, new line, return
    assert media["touch"] == dataclasses.replace(same, tags=dataclasses.replace(same.tags, pad=media["touch"].tags.pad))


def export_delta(config: ModelConfig, root: Path, folder: Path, *, seed: int = 0, **facts: Any) -> Path:
    """A delta of a model that has the decoder of `root`."""
    recipe = facts.pop("recipe", dataclasses.asdict(RECIPES["paper"]))
    extra = facts.pop("leaves", {})
    source = source_of(config, seed=seed, recipe=recipe, text_isolation="strict", **facts)
    parts = store.read(root / "touch")[0].parts
    record = source.record._replace(base="0" * 64, parts=parts)
    convert.export_delta(source._replace(leaves={**source.leaves, **extra}, record=record), folder)
    return folder


TOUCH = dataclasses.replace(CONFIG, media=Named(touch=MEDIA["touch"]), extensions=Named(touch=EXTENSIONS["touch"]))
TASK = dataclasses.replace(
    TOUCH, media=Named(), extensions=Named(sums=dataclasses.replace(EXTENSIONS["touch"], medium=""))
)
OTHER = dataclasses.replace(TOUCH, extensions=Named(other=EXTENSIONS["touch"]))
SENSE = dataclasses.replace(TOUCH, extensions=Named(other=dataclasses.replace(EXTENSIONS["touch"], medium="sense")))
GATE = "decoder/layers/moe/gate"
RELEASED = dataclasses.asdict(RECIPES["released"])

MISTAKES: dict[str, tuple[Callable[[Path, Path], list[Any]], str]] = {
    "no delta": (lambda root, tmp: [root / "base"], "compose needs --deltas"),
    "nothing": (lambda root, tmp: [root / "base", tmp / "nowhere"], "nowhere does not exist"),
    "no folder of ours": (lambda root, tmp: [root / "base", root / "base"], "base is no delta: .*--layout delta"),
    "a whole model": (lambda root, tmp: [root / "base", root / "whole"], "is a whole model.*--layout delta"),
    "an extended base": (lambda root, tmp: [root / "whole", root / "touch"], "whole cannot be a base"),
    "another base": (
        lambda root, tmp: [folders.mixtral(tmp / "b", seed=3, dtype="float32",
                                           config=ModelConfig(decoder=DECODER)), root / "touch"],
        "touch belongs to a base whose decoder has content hash [0-9a-f]{64}, but that of .*b has [0-9a-f]{64}",
    ),
    "other sizes": (
        lambda root, tmp: [folders.mixtral(tmp / "b"), root / "touch"], "differ: vocab_size is 32000 and 61",
    ),
    "no tower": (lambda root, tmp: [root / "base", root / "speech"], "a tower for speech and .*base has none"),
    "another tower": (
        lambda root, tmp: [root / "base", root / "speech", "--tower", f"speech={root / 'tower of image'}"],
        "another tower than the one that speech was trained with",
    ),
    "a tower of nothing": (
        lambda root, tmp: [root / "base", root / "touch", "--tower", f"smell={root}"],
        "no delta is for the medium 'smell'",
    ),
    "no pair": (
        lambda root, tmp: [root / "base", root / "touch", "--share", "touch"],
        "--share touch: write NAME=VALUE",
    ),
    "no number": (lambda root, tmp: [root / "base", root / "touch", "--share", "touch=x"], "x is no number"),
    "too large": (
        lambda root, tmp: [root / "base", root / "touch", "--share", "touch=1.5"],
        "--share touch = 1.5 must be at least 0",
    ),
    "unknown share": (
        lambda root, tmp: [root / "base", root / "touch", "--share", "image=1"], "no such extension; there are touch",
    ),
    "unknown rule": (
        lambda root, tmp: [root / "base", root / "touch", "--rule", "sum"],
        "is not one of shared, decoupled",
    ),
    "the same name twice": (
        lambda root, tmp: [root / "base", root / "touch", root / "touch"], "two deltas have an extension called touch",
    ),
    "the same medium twice": (
        lambda root, tmp: [root / "base", root / "touch", export_delta(OTHER, root, tmp / "o", seed=1)],
        "each have the medium touch, with other sizes or another projector",
    ),
    "an unknown medium": (
        lambda root, tmp: [root / "base", export_delta(SENSE, root, tmp / "o")],
        "extension other is for the medium sense, which no delta describes",
    ),
    "a task that is closed": (
        lambda root, tmp: [root / "base", export_delta(TASK, root, tmp / "o")],
        "is for text, which --text strict closes",
    ),
    "other recipes": (
        lambda root, tmp: [root / "base", root / "touch", export_delta(TASK, root, tmp / "o", recipe=RELEASED),
                           "--text", "shared"],
        "recipes that one model cannot have both of: weight_guard = 'bounded' and 'none'",
    ),
    "changed routers": (
        lambda root, tmp: [root / "base", root / "touch", export_delta(TASK, root, tmp / "o", changed=[GATE]),
                           "--text", "shared"],
        "o changes decoder/layers/moe/gate of its base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_composed_is_one_line_and_nothing_is_written(root: Path, tmp_path: Path, mistake: str, capsys):
    make, message = MISTAKES[mistake]
    base, *words = map(str, make(root, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    arguments = ["compose", base, *words[:first], str(tmp_path / "out"), *words[first:]]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert sorted(tmp_path.rglob("*")) == before


def test_several_extensions_of_one_medium_stand_side_by_side(root: Path, tmp_path: Path):
    other = export_delta(OTHER, root, tmp_path / "other")
    cli.call(["compose", str(root / "base"), str(root / "touch"), str(other), str(tmp_path / "out")])
    opened = open_source(tmp_path / "out")
    assert list(opened.config.extensions) == ["touch", "other"] and list(opened.config.media) == ["touch"]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "message"), [((3, 2), "give them ascending"), ((2, 2), "each once"), ((1, 4), "has 3 tokens at most")]
)
def test_spans_that_an_item_cannot_take_are_refused(spans: tuple[int, ...], message: str):
    settings = SimpleNamespace(media={}, woven_into=lambda _: ())
    tower = FeaturesConfig(width=8, patches=3)
    with pytest.raises(MoextendError, match=message):
        settings.media["touch"] = MediumSettings(kind="features", width=8, patches=3, spans=spans)
        medium_of("touch", cast(Any, settings), tower, {}, tags=MEDIA["touch"].tags)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Orbax's own
def test_a_chain_is_exported_as_one_delta_or_extension_by_extension(root: Path, tmp_path: Path):
    medium, added = MEDIA["touch"], EXTENSIONS["touch"]
    stage = StageSettings(data="d", steps=1, batch_size=1, length=8)
    groups: Any = {"align": stage, "extend": stage, "finetune": stage, "full": stage}
    groups["evaluate"] = EvaluateSettings(data="d", questions=1)
    touch = MediumSettings(
        kind="features", width=8, patches=3,
        projector=ProjectorSettings(
            **{field.name: getattr(medium.projector, field.name) for field in dataclasses.fields(ProjectorSettings)}
        ),
    )  # fmt: skip
    settings = RunSettings(
        **groups, base=str(root / "base"), vision=str(root / "tower of image"), media={"touch": touch},
        extensions={"touch": ExtensionSettings(**groups, medium="touch")}, text_isolation="strict",
        recipe=dataclasses.replace(RECIPES["paper"], feature_layer=-1),
    )  # fmt: skip
    base = open_source(root / "base", vision=root / "tower of image", feature_layer=-1)
    base_hash, workdir = hashes.base_hashes(base.leaves).base, tmp_path / "run"
    workdir.mkdir()
    record = {"settings": as_json(dataclasses.asdict(settings)), "base_hash": base_hash}
    (workdir / "config.json").write_text(json.dumps(record))
    trained = {
        path: leaf for path, leaf in arrays(CONFIG).items() if "/tower/" not in path and "speech" not in path
        and not path.startswith("decoder/")
    }  # fmt: skip
    for name, chosen in {"image": EXTENSIONS["image"], "touch": added}.items():
        last = "" if name == "image" else f":{name}"
        for result, start in {"align": f"media/{name}/projector/", "finetune": f"extensions/{name}/"}.items():
            for row in (result, "grow") if result == "finetune" else (result,):
                own = {path: jnp.asarray(leaf) for path, leaf in trained.items() if path.startswith(start)}
                folder = results.folder_of(workdir, row + last) / "result"
                train_state.save_leaves(folder, own, facts=facts_of_base(base_hash, settings))
        select = results.folder_of(workdir, f"select{last}")
        select.mkdir(parents=True)
        selection = {"chosen_layers": list(chosen.layers), "sources": list(chosen.sources), "base": base_hash}
        (select / "routing.json").write_text(json.dumps(selection))

    cli.call(["export", str(workdir), str(tmp_path / "both"), "--layout", "delta"])
    folders.assert_same(folders.read(tmp_path / "both"), trained)
    both = store.read(tmp_path / "both")[0]
    assert both.config.extensions == Named(image=EXTENSIONS["image"], touch=added)
    assert both.parts == hashes.base_hashes(base.leaves).parts and both.base == base_hash
    cli.call(["export", str(workdir), str(tmp_path / "one"), "--layout", "delta", "--extension", "touch"])
    expected = {path: leaf for path, leaf in trained.items() if "touch" in path}
    folders.assert_same(folders.read(tmp_path / "one"), expected)
    cli.call(["compose", str(root / "base"), str(tmp_path / "one"), str(tmp_path / "out")])
    opened = open_checkpoint(tmp_path / "out", dtype="float32")
    decoder = {path: leaf for path, leaf in arrays(CONFIG).items() if path.startswith("decoder/")}
    folders.assert_same(opened.arrays, decoder | expected)
    with pytest.raises(MoextendError, match="--extension touch goes with --layout delta"):
        cli.call(["export", str(workdir), str(tmp_path / "x"), "--layout", "hf", "--extension", "touch"])
    with pytest.raises(MoextendError, match="layout hf holds .*, and this model has medium touch of .*--layout delta"):
        cli.call(["export", str(workdir), str(tmp_path / "x")])


@pytest.mark.parametrize("layout", ["hf", "released"])
def test_what_transformers_does_not_compute_is_refused_by_name(tmp_path: Path, layout: str):
    of_pictures = dataclasses.replace(
        CONFIG, media=Named(image=MEDIA["image"]), extensions=Named(image=EXTENSIONS["image"])
    )
    cases = [(CONFIG, "extension speech.*, extension touch.*, medium speech, medium touch")]
    if layout == "hf":
        cases = [(CONFIG, "extension touch.*, medium touch of kind features: export it with --layout delta")]
    if layout == "released":
        cases.append((of_pictures, "the composition 'decoupled' of extensions: export it with --layout delta"))
    for config, told in cases:
        options: dict[str, Any] = {"max_shard_bytes": 1 << 30}
        with pytest.raises(MoextendError, match=f"layout {layout} holds .* this model has .*{told}"):
            if layout == "hf":
                export_transformers(source_of(config), tmp_path / "out", recipe=RECIPES["paper"], **options)
            else:
                convert.export_source(source_of(config), tmp_path / "out", layout=layout, **options)
    assert not (tmp_path / "out").exists()


def test_how_extensions_were_composed_goes_to_transformers_and_comes_back(root: Path, tmp_path: Path):
    out, hf = composed(root, tmp_path / "out", deltas=("image",)), tmp_path / "hf"
    cli.call(["export", str(out), str(hf)])
    at = hf / "config.json"
    written = json.loads(at.read_text())
    assert (written["model_type"], written["composition"]) == ("moextend", "decoupled")
    opened = open_checkpoint(hf, dtype="float32")
    assert opened.config.composition == "decoupled" and opened.source.record.facts["text_isolation"] == "strict"
    cli.call(["export", str(hf), str(tmp_path / "again")])
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written
    at.write_text(json.dumps({name: value for name, value in written.items() if name != "composition"}))
    assert open_checkpoint(hf, dtype="float32").config.composition == "shared"
    at.write_text(json.dumps(written | {"composition": "sum"}))
    with pytest.raises(MoextendError, match=r"config\.json: extensions: composition = 'sum' is not one of 'shared', "):
        open_checkpoint(hf, dtype="float32")


@pytest.mark.slow
def test_a_composed_model_answers(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = composed(root, tmp_path / "out")
    Image.new("RGB", (9, 7), (200, 30, 30)).save(tmp_path / "a.png")
    capsys.readouterr()
    words = ["generate", "hi", "--checkpoint", str(out), "--max_new_tokens", "1", "--json"]
    cli.call([*words, "--image", str(tmp_path / "a.png")])
    assert json.loads(capsys.readouterr().out)["prompt"] == "hi"
