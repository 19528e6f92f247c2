"""`--layout hf` of models that hear: stock PyTorch makes of the folder, from files of sounds on, what JAX makes of the
model, alone and beside pictures; and the folder comes back."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import folders
import jax
import jax.numpy as jnp
import media_files
import numpy as np
import pytest
import tiny
import tiny_tokens
from PIL import Image

from moextend_jax import cli
from moextend_jax.checkpoints import convert, huggingface
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.checkpoints.source import open_source
from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    ExtensionConfig,
    Medium,
    ModelConfig,
    MoextendError,
    Named,
    ProjectorConfig,
    Recipe,
    VisionConfig,
    WhisperConfig,
    first_places,
    with_vision,
)
from moextend_jax.data.conversations import encode_dialogue, in_row
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer
from moextend_jax.media import KINDS
from moextend_jax.media.image import prepare_image
from moextend_jax.models.moextend import abstract
from moextend_jax.outside import read_object
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.askable import open_place
from moextend_jax.runs.place import Place

SCRIPT = Path(__file__).with_name("stock_sounds.py")
BASE = dataclasses.replace(tiny.BASE_CONFIG, decoder=dataclasses.replace(tiny.BASE_CONFIG.decoder, rope_theta=1e4))
TOWER = WhisperConfig(width=16, hidden=24, layers=2, heads=2, bands=8, seconds=1)
MARK, NEW, LENGTH = "<audio:speech>", 5, 192
MARKED = f"left  {MARK} or right"
PROJECTORS: dict[str, tuple[ProjectorConfig, tuple[int, ...]]] = {
    "linear": (ProjectorConfig(), (10, 25, 50)),
    "pool": (ProjectorConfig(kind="pool", neighbours=4), (3, 13)),  # of 50 positions: the last group has two
    "stack": (ProjectorConfig(kind="stack", neighbours=8), ()),
}
"""And the numbers of tokens that a sound may have."""
SOUNDS = {"short": {"seconds": 0.15}, "long": {"seconds": 0.9, "rate": 22050, "channels": 2}}


class Case(NamedTuple):
    """sees: it has pictures too. extensions: their media, by name. template: of another tokenizer than Mixtral's."""

    projector: str = "linear"
    sees: bool = False
    extensions: Mapping[str, str] = {"talk": "speech"}
    text_isolation: Any = "none"
    composition: Any = "shared"
    recipe: Recipe = RECIPES["paper"]
    feature_layer: int = -1
    template: str = ""


CHAIN = {"image": "image", "talk": "speech", "sums": ""}
CASES = {
    "alone": Case(),
    "strict": Case("pool", text_isolation="strict", extensions={"talk": "speech", "sums": ""}),
    "stack": Case("stack", feature_layer=-2),
    "aligned": Case(extensions={}),
    "seen": Case("pool", sees=True, extensions={}),
    "both": Case("pool", sees=True, extensions=CHAIN),
    "both_strict": Case("pool", sees=True, extensions=CHAIN, text_isolation="strict"),
    "apart": Case("pool", sees=True, extensions=CHAIN, composition="decoupled"),
    "apart_strict": Case("pool", sees=True, extensions=CHAIN, composition="decoupled", text_isolation="strict"),
    "released": Case("pool", sees=True, recipe=RECIPES["released"]),
    "chatml": Case("pool", sees=True, template="chatml"),
    "llama3": Case("stack", template="llama3"),
}


def config_of(name: str, tokenizer: Tokenizer) -> ModelConfig:
    case = CASES[name]
    projector, spans = PROJECTORS[case.projector]
    tags = dataclasses.replace(tokenizer.tags, pad=tokenizer.spare[0])
    tower = dataclasses.replace(TOWER, feature_layer=case.feature_layer)
    speech = Medium(kind="audio", mark=MARK, tags=tags, tower=tower, projector=projector, spans=spans, seconds=1.0)
    vision = dataclasses.replace(BASE.vision or VisionConfig(), feature_layer=case.recipe.feature_layer)
    config = with_vision(BASE, vision if case.sees else None, tags=tokenizer.tags)
    extensions = {
        of: ExtensionConfig(layers=layers, sources=(1, 3, 2, 0)[: len(layers)], calibrator_width=5, medium=medium)
        for (of, medium), layers in zip(case.extensions.items(), ((0, 2), (1, 2), (2,)), strict=False)
    }
    return dataclasses.replace(
        config, media=config.media.replacing("speech", speech), extensions=Named(extensions), remat="none",
        text_isolation=case.text_isolation, composition=case.composition, weight_guard=case.recipe.weight_guard,
    )  # fmt: skip


def arrays_of(config: ModelConfig) -> dict[str, jax.Array]:
    return tiny.arrays(config, std=0.15)


class World(NamedTuple):
    """Bases by tokenizer ("" is Mixtral's), exported folders by case, and files of sounds and of a picture by name."""

    bases: Mapping[str, Path]
    folders: Mapping[str, Path]
    files: Mapping[str, Path]

    def tokenizer(self, name: str) -> Tokenizer:
        tokenizer = load_tokenizer(self.bases[CASES[name].template], rows=BASE.decoder.vocab_size)
        return dataclasses.replace(tokenizer, others=config_of(name, tokenizer).media)

    def config(self, name: str) -> ModelConfig:
        return config_of(name, self.tokenizer(name))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("sounds")
    bases = {"": tiny.write_base(root / "base", config=BASE)}
    for template in {case.template for case in CASES.values()} - {""}:
        bases[template] = shutil.copytree(bases[""], root / f"base {template}")
        (bases[template] / "tokenizer.model").unlink()
        tiny_tokens.write_byte_level(bases[template], template=tiny_tokens.TEMPLATES[template])
    files = {"picture": root / "picture.png"}
    noise = np.random.default_rng(2).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(noise).save(files["picture"])
    for sound, of in SOUNDS.items():
        files[sound] = root / f"{sound}.wav"
        files[sound].write_bytes(media_files.sound(**of))
    made = World(bases, {name: root / f"{name}_out" for name in CASES}, files)
    for name, case in CASES.items():
        export(made, name, root / name)
        cli.call(["export", str(root / name), str(made.folders[name])])
        assert (made.folders[name] / "modeling_moextend.py").exists() and case
    return made


def export(world: World, name: str, folder: Path, **more: Any) -> None:
    """The model of a case as a folder of our own."""
    case, config = CASES[name], world.config(name)
    config = dataclasses.replace(config, **more)
    source = open_source(world.bases[case.template])
    facts = {"recipe": dataclasses.asdict(case.recipe), "text_isolation": case.text_isolation}
    record = source.record._replace(config=config, facts=facts)
    leaves = huggingface.from_arrays(arrays_of(config), config=config)
    convert.import_source(source._replace(leaves=leaves, record=record), folder)


CHATS: dict[bool, list[list[str]]] = {
    False: [["short", "what is\n it? "], ["long", "  And é"], ["say it  "], ["short", "long", "which?"]],
    True: [["picture", "short", "what is\n it? "], ["long", "and?"], ["picture", "  And é"], ["say it  "],
           ["long", "picture", "short", "which?"]],
}  # fmt: skip
"""What is asked of models without eyes and with them: items, then a text."""


def messages_of(chat: list[str], world: World) -> list[dict[str, Any]]:
    *items, text = chat
    content = [
        {"type": "image" if item == "picture" else "audio", "path": str(world.files[item])} for item in items
    ]  # fmt: skip
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def stock(world: World, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the stock script makes of all folders, in a process that does not know where this package is."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    pytest.importorskip("accelerate")
    root = tmp_path_factory.mktemp("stock")
    chats = {name: [messages_of(chat, world) for chat in CHATS[case.sees]] for name, case in CASES.items()}
    spec = {"folders": {name: str(world.folders[name]) for name in CASES}, "chats": chats, "marked": MARKED, "new": NEW}
    (root / "spec.json").write_text(json.dumps(spec))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "HF_HOME": str(root)}
    words = [sys.executable, str(SCRIPT), str(root / "spec.json"), str(root / "out.npz")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-5000:]
    return read_npz(root / "out.npz")


# --- the same in JAX --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A chat's ids and places, and its items by medium as towers take them."""

    ids: np.ndarray
    places: np.ndarray
    items: dict[str, np.ndarray]


def row_of(world: World, name: str, chat: list[str]) -> Row:
    """A chat as training and evaluation make it."""
    case, config, tokenizer = CASES[name], world.config(name), world.tokenizer(name)
    *given, text = chat
    spans: dict[str, list[int]] = {}
    prepared: dict[str, list[np.ndarray]] = {}
    for item in given:
        medium = "image" if item == "picture" else "speech"
        own, kind = config.media[medium], KINDS[config.media[medium].kind]
        decoded = kind.decode(world.files[item].read_bytes(), medium=own)
        if medium == "image":
            assert config.vision
            array = prepare_image(decoded, size=config.vision.image_size, preparation=case.recipe.image_preparation)
        else:
            array = kind.prepare(decoded, medium=own)
        spans.setdefault(medium, []).append(own.span(kind.positions(decoded, own)))
        prepared.setdefault(medium, []).append(array)
    marks = "".join(("<image>" if item == "picture" else MARK) + "\n" for item in given)
    encoded = encode_dialogue([{"from": "human", "value": marks + text}], items=spans, tokenizer=tokenizer,
                              recipe=case.recipe)  # fmt: skip
    return Row(encoded.ids_L, encoded.places_L, {medium: np.stack(own) for medium, own in prepared.items()})


def logits_of(world: World, name: str, row: Row, answer: np.ndarray) -> np.ndarray:
    """float32 logits [L, V] of a row with an answer behind."""
    config, count = world.config(name), len(row.ids) + len(answer)
    rooms = {medium: of.room(len(row.items[medium])) for medium, of in config.media.items() if medium in row.items}
    places_L = in_row(row.places, first=first_places(rooms), media=(*world.tokenizer(name).media,))
    pad = (0, LENGTH - count)
    ids_BL = np.pad(np.r_[row.ids, answer].astype(np.int32), pad)[None]
    batch = Batch(
        ids_BL=ids_BL,
        labels_BL=np.full_like(ids_BL, IGNORE),
        positions_BL=np.arange(LENGTH, dtype=np.int32)[None],
        segments_BL=np.pad(np.ones(count, np.int32), pad)[None],
        places_BL=np.pad(places_L, (0, LENGTH - len(row.ids)), constant_values=-1)[None],
        media={medium: jnp.asarray(row.items[medium])[None] for medium in rooms},
    )

    return np.array(program_of(config)(arrays_of(config), batch))[:count]


@functools.cache
def program_of(config: ModelConfig) -> Any:
    def logits(arrays: Any, batch: Batch) -> Any:
        model = with_arrays(abstract(config), arrays)
        return model.decoder.logits(model(batch).hidden_BLD)[0]

    return jax.jit(logits)


# --- tests ------------------------------------------------------------------------------------------------------------


ROWS = [(name, row) for name, case in CASES.items() for row in range(len(CHATS[case.sees]))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_stock_script_hears_and_answers_as_jax_does(stock, world: World, name: str, row: int):
    made = row_of(world, name, CHATS[CASES[name].sees][row])
    np.testing.assert_array_equal(stock[f"{name}/{row}/input_ids"][0], made.ids)
    if "speech" in made.items:
        np.testing.assert_allclose(stock[f"{name}/{row}/input_features"], made.items["speech"], atol=1e-3)
    here = stock[f"{name}/all/attention_mask"][row] > 0
    np.testing.assert_array_equal(stock[f"{name}/all/input_ids"][row][here], made.ids)
    answer = stock[f"{name}/{row}/answer"][0]
    longer = logits_of(world, name, made, answer)
    wanted = longer[: len(made.ids)]
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(stock[f"{name}/{row}/logits"][0], wanted, atol=1e-4, rtol=0)
    # In a batch with the others, padded on the left.
    np.testing.assert_allclose(stock[f"{name}/all/logits"][row][here], wanted, atol=1e-4, rtol=0)
    # Each token of the answer is the likeliest of those that may be said.
    unspeakable = list(world.tokenizer(name).unspeakable(BASE.decoder.vocab_size))
    longer[:, unspeakable] = -np.inf
    best = longer[len(made.ids) - 1 : -1].argmax(axis=-1)
    said = int(np.argmax(np.isin(best, world.tokenizer(name).ends))) or len(best)
    for theirs in (answer, stock[f"{name}/all/answer"][row]):
        np.testing.assert_array_equal(theirs[:said], best[:said])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_marks_are_read_tensors_named_and_models_rounded_as_they_should_be(stock, world: World, name: str):
    assert sorted(folders.read(world.folders[name])) == list(stock[f"{name}/names"])
    tokenizer, span = world.tokenizer(name), world.config(name).media["speech"].span(8)  # of 0.15 seconds
    turns, recipe = [{"from": "human", "value": MARKED}], CASES[name].recipe
    marked = encode_dialogue(turns, items={"speech": [span]}, tokenizer=tokenizer, recipe=recipe)
    np.testing.assert_array_equal(stock[f"{name}/marked"], marked.ids_L)
    exact, half = stock[f"{name}/all/logits"], stock[f"{name}/half"]
    assert np.median(np.abs(half - exact)) < 0.03 * np.abs(exact).max()


@pytest.mark.slow
def test_isolation_is_there_to_be_seen(stock):
    """Without a sound, and without a picture, a strict model says what the one that is not extended says."""
    for strict, plain, others in (("strict", "aligned", "alone"), ("both_strict", "seen", "both")):
        row = next(n for n, chat in enumerate(CHATS[CASES[strict].sees]) if len(chat) == 1)
        text, aligned, other = (stock[f"{name}/{row}/logits"] for name in (strict, plain, others))
        np.testing.assert_allclose(text, aligned, atol=1e-5)
        assert np.abs(text - other).max() > 1e-3
    # One medium's extension is closed to the conversations of the other.
    for row in (1, 2):
        every, own = (stock[f"{name}/{row}/logits"] for name in ("both", "both_strict"))
        assert np.abs(every - own).max() > 1e-3


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.few(CASES, "both_strict", "stack", "chatml"))
def test_a_folder_that_hears_comes_back_bit_for_bit(world: World, name: str, tmp_path: Path, capsys):
    config, folder = world.config(name), world.folders[name]
    cli.call(["import", str(folder), str(tmp_path / "back")])
    for where in (folder, tmp_path / "back"):
        opened = open_checkpoint(where)
        folders.assert_same(opened.arrays, {path: np.asarray(leaf) for path, leaf in arrays_of(config).items()})
        assert (opened.config.media, opened.config.extensions) == (config.media, config.extensions)
        assert (opened.config.decoder, opened.config.composition) == (config.decoder, config.composition)
        askable = open_place(Place(checkpoint=where))
        assert (askable.recipe, askable.model.config.text_isolation) == (CASES[name].recipe, config.text_isolation)
        ours, theirs = world.tokenizer(name), askable.tokenizer
        assert (theirs.media, theirs.tags, theirs.ends) == (ours.media, ours.tags, ours.ends)
        row = row_of(world, name, CHATS[config.vision is not None][0])
        spans = {medium: [int((row.ids == of.tags.pad).sum())] for medium, of in ours.media.items()}
        spans = {medium: of for medium, of in spans.items() if of != [0]}
        marks = "".join(f"{ours.media[medium].mark}\n" for medium in spans)
        turns = [{"from": "human", "value": marks + CHATS[config.vision is not None][0][-1]}]
        again = encode_dialogue(turns, items=spans, tokenizer=theirs, recipe=askable.recipe)
        np.testing.assert_array_equal(again.ids_L, row.ids)
    words = ["--prompt", "what is it?", "--show", f"speech={world.files['short']}", "--max_new_tokens", "2"]
    capsys.readouterr()
    assert cli.call(["generate", "--checkpoint", str(folder), *words]) == 0
    cli.call(["export", str(tmp_path / "back"), str(tmp_path / "again"), "--layout", "hf"])
    for path in sorted(folder.iterdir()) if not CASES[name].template else ():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_control_tokens_of_sounds_have_names_and_are_not_said(world: World):
    folder, medium = world.folders["both"], world.config("both").media["speech"]
    names = {token["content"]: token["id"] for token in read_object(folder / "tokenizer.json")["added_tokens"]}
    assert names[MARK] == medium.tags.pad and names["<image>"] != medium.tags.pad
    suppressed = read_object(folder / "generation_config.json")["suppress_tokens"]
    assert {*medium.tags.ids, names["<image>"]} <= {*suppressed}
    attributes = read_object(folder / "config.json")
    assert attributes["sounds"]["name"] == "speech" and attributes["audio_config"]["max_source_positions"] == 50
    processor = read_object(folder / "processor_config.json")
    assert (processor["feature_extractor"]["chunk_length"], processor["spans"]) == (1, [3, 13])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_what_layout_hf_does_not_hear_is_said_and_a_delta_advised(world: World, tmp_path: Path):
    config = world.config("both")
    speech = config.media["speech"]
    tower, tags = BASE.vision or VisionConfig(), [dataclasses.replace(speech.tags, pad=pad) for pad in (11, 12)]
    films = Medium(kind="video", mark="<video:films>", tags=tags[0], tower=tower, frames=2)
    music = dataclasses.replace(speech, mark="<audio:music>", tags=tags[1])
    queries = ProjectorConfig(kind="resampler", queries=2, heads=2)
    others = {
        "medium speech of kind audio behind a picture tower": {"speech": dataclasses.replace(speech, tower=tower)},
        "medium speech with a projector of kind resampler": {"speech": dataclasses.replace(speech, projector=queries)},
        "medium films of kind video": {"speech": speech, "films": films},
        "medium music too": {"speech": speech, "music": music},
    }
    for n, (message, media) in enumerate(others.items()):
        every = Named({"image": config.media["image"], **media})
        export(world, "both", tmp_path / str(n), media=every, extensions=Named())
        with pytest.raises(MoextendError, match=f"has {message}: export it with --layout delta"):
            cli.call(["export", str(tmp_path / str(n)), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_chain_of_which_sounds_are_not_learnt_yet_leaves_as_what_it_sees(world: World, tmp_path: Path, capsys):
    export(world, "seen", tmp_path / "whole")
    source = open_source(tmp_path / "whole")
    kept = {path: leaf for path, leaf in source.leaves.items() if not path.startswith("media/speech/projector/")}
    convert.import_source(source._replace(leaves=kept), tmp_path / "kept")
    cli.call(["export", str(tmp_path / "kept"), str(tmp_path / "out"), "--layout", "hf"])
    assert "left out, because layout hf has no place for it: speech" in capsys.readouterr().out
    assert read_object(tmp_path / "out" / "config.json")["model_type"] == "llava"
    assert not (tmp_path / "out" / "processing_moextend.py").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sounds": 3}, "sounds: "),
        ({"sounds": {"name": "speech"}}, "sounds: "),
        ({"sounds": {"projector": {"kind": "resampler", "heads": 2}}}, "projector of kind resampler"),
        ({"sounds": {"projector": {"kind": "pool", "neighbours": 51}}}, "has 51 neighbours"),
        ({"sounds": {"name": "image", "mark": "<audio:image>"}}, "image is called, or has the tags, as pictures"),
        ({"sounds": {"tags": {"start": 5, "end": 6, "pad": 3}}}, "has the tags, as pictures"),
        ({"audio_config": {"max_source_positions": 51}}, "whole seconds"),
        ({"audio_config": {"activation_function": "relu"}}, "activation_function = 'relu' cannot be honoured"),
        ({"audio_config": {"d_model": 18}}, "are not those of this model|has shape|is .*18"),
        ({"audio_feature_layer": -4}, "no layer -4"),
    ],
)
def test_what_a_config_says_of_sounds_is_checked(world: World, tmp_path: Path, change: dict[str, Any], message: str):
    folder = shutil.copytree(world.folders["both"], tmp_path / "out")
    attributes = read_object(folder / "config.json")
    for name, value in change.items():
        is_part = isinstance(value, dict) and len(attributes[name]) > 1 and value != {"name": "speech"}
        attributes[name] = attributes[name] | value if is_part else value
    (folder / "config.json").write_text(json.dumps(attributes))
    with pytest.raises(MoextendError, match=message):
        open_source(folder)
