"""A medium that is added to the items of another (CREMA's fusion): no positions, the right tokens, a run, a plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flax import nnx
from test_chain import groups
from test_method_runs import assert_goes_on
from test_several_media import talk
from test_woven import CONNECTOR

from moextend_jax import cli
from moextend_jax.checkpoints import store
from moextend_jax.commands import whole_run
from moextend_jax.config import (
    RECIPES,
    ExtensionConfig,
    FeaturesConfig,
    ImageTags,
    Medium,
    MoextendError,
    Named,
    ProjectorConfig,
)
from moextend_jax.data.conversations import MEDIUM, Encoded, encode_conversation, encode_prompt
from moextend_jax.data.packing import Sample, Shape, pack, take_out
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.faults import Fault
from moextend_jax.mesh import make_mesh
from moextend_jax.models.flops import step_flops
from moextend_jax.models.moextend import MoExtend, shares
from moextend_jax.models.woven import fused
from moextend_jax.plan.abstract_step import abstract_batch
from moextend_jax.runs.models_of import leaves_of, open_model
from moextend_jax.runs.run import open_run
from moextend_jax.settings import ExtensionSettings, MediumSettings, ProjectorSettings, RunSettings
from moextend_jax.sharding import MESH_AXES

ASKING = ProjectorConfig(kind="resampler", queries=3, heads=2, layers=1)
ADDED = dataclasses.replace(ASKING, kind="crema", trunk="film", width=6, rank=2, fusion=True)
FILM = Medium(
    kind="video", mark="<video:film>", tags=ImageTags(pad=20), frames=2, projector=ASKING,
    tower=dataclasses.replace(tiny.seeing()["image"].tower, width=6, hidden=8, heads=2, layers=1),
)  # fmt: skip
TOUCH = Medium(
    kind="features", mark="<features:touch>", tags=ImageTags(pad=21), tower=FeaturesConfig(width=6, patches=5),
    projector=ADDED,
)  # fmt: skip
MEDIA: Named[Medium] = Named({"touch": TOUCH, "film": FILM})  # that it stands before its trunk changes nothing
TOKENIZER = dataclasses.replace(load_tokenizer(tiny.ASSETS / "base"), others=MEDIA)
TOKENS, OWN = FILM.tokens, TOUCH.tokens
assert (TOKENS, OWN) == (6, 3)


def encode(*texts: str, recipe: Any = "paper", films: int = 0, touched: int = 0, **more: Any) -> Encoded:
    items = {"film": [TOKENS] * films, "touch": [OWN] * touched}
    options = {"example_id": "ex7", "tokenizer": TOKENIZER, "recipe": RECIPES[recipe]}
    return encode_conversation(talk(*texts), items=items, **options, **more)


def own_places(encoded: Encoded) -> list[int]:
    """Of the tokens that get one of touch, in order."""
    of_L = encoded.fused["touch"]
    return (of_L[of_L >= 0] - [*TOKENIZER.media].index("touch") * MEDIUM).tolist()


# --- conversations and rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_item_takes_no_position_and_its_tokens_go_to_each_frame(recipe: str):
    plain = encode("<video:film>\nWhat?", "this", films=1, recipe=recipe)
    both = encode("<features:touch>\n<video:film>\nWhat?", "this", films=1, touched=1, recipe=recipe)
    for name in ("ids_L", "labels_L", "places_L", "segments_L"):
        np.testing.assert_array_equal(getattr(both, name), getattr(plain, name))
    assert plain.fused == {} and both.items == {"film": 1, "touch": 1}
    np.testing.assert_array_equal(both.fused["touch"] >= 0, both.places_L >= 0)
    assert own_places(both) == [0, 1, 2, 0, 1, 2]


def test_one_goes_to_all_of_several_and_as_many_to_each():
    films = "<video:film> or <video:film>?"
    assert own_places(encode(f"{films} <features:touch>", "no", films=2, touched=1)) == [0, 1, 2] * 4
    each = encode(f"<features:touch>{films}<features:touch>", "no", films=2, touched=2)
    assert own_places(each) == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    prompt = encode_prompt(
        films, items={"film": [TOKENS] * 2, "touch": [OWN] * 2}, tokenizer=TOKENIZER, recipe=RECIPES["paper"]
    )
    assert own_places(prompt) == own_places(each)


def test_what_goes_to_a_turn_that_is_dropped_goes_with_it():
    again = "<video:film> <features:touch> And?" + 40 * " now"
    texts = ("<video:film>\n<features:touch>\nWhat?", "this", again, "that")
    whole = encode(*texts, films=2, touched=2)
    short = encode(*texts, films=2, touched=2, length=len(whole.ids_L) - 1, too_long="drop_turns")
    assert short.items == {"film": 1, "touch": 1} and own_places(short) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("films", "touched"), [(0, 1), (1, 2), (3, 2)])
def test_numbers_that_do_not_go_together_are_refused(films: int, touched: int):
    question = "<video:film>" * films + "<features:touch>" * touched
    message = f"{touched} items of touch, which are added to those of film, and {films} of these; there must be one for"
    with pytest.raises(Fault, match=message):
        encode(f"{question} What?", "this", films=films, touched=touched)
    items = {"film": [TOKENS] * films, "touch": [OWN] * touched}
    with pytest.raises(MoextendError, match=message):
        encode_prompt(f"{question} What?", items=items, tokenizer=TOKENIZER, recipe=RECIPES["paper"])


def test_rows_say_which_token_gets_which():
    rooms = {"touch": TOUCH.room(2), "film": FILM.room(2)}
    shape = Shape(128, rooms, tuple(TOKENIZER.media))
    alone = encode("<video:film>\nWhat?", "this", films=1)
    both = encode("<video:film>\n<features:touch>\nIs it?", "that, perhaps", films=1, touched=1)
    (row,) = pack(
        [Sample(alone, {"film": [7]}), Sample(both, {"film": [8], "touch": [9]})], shape=shape, conversations_per_row=2
    )
    first = 2 * OWN  # in the row, films stand behind what is touched
    for place in row.places:
        here = row.places_L[place.positions]
        slot = place.slots["film"].start
        assert sorted(here[here >= 0]) == list(range(first + slot * TOKENS, first + (slot + 1) * TOKENS))
        touched = row.fused_L["touch"][place.positions]
        expected = [0, 1, 2, 0, 1, 2] if place.slots["touch"].stop > place.slots["touch"].start else [-1] * 6
        assert touched[here >= 0].tolist() == expected and (touched[here < 0] == -1).all()
    assert row.item_rows_M["touch"].tolist() == [9, -1]
    (place,) = [place for place in row.places if place.slots["touch"].stop > place.slots["touch"].start]
    row = take_out(row, place)
    assert (row.fused_L["touch"] == -1).all()


# --- the model --------------------------------------------------------------------------------------------------------


def small() -> tuple[MoExtend, Any]:
    """A model, and a batch of two conversations in one row, of which the second has both media."""
    config = dataclasses.replace(tiny.PLAIN, media=MEDIA, text_isolation="strict")
    model = MoExtend(config, rngs=nnx.Rngs(0))
    rooms = {"touch": TOUCH.room(1), "film": FILM.room(2)}
    one = encode("<video:film>\nWhat?", "this", films=1)
    two = encode("<video:film>\n<features:touch>\nIs it?", "that, perhaps", films=1, touched=1)
    samples = [Sample(one, {"film": [0]}), Sample(two, {"film": [1], "touch": [0]})]
    (row,) = pack(samples, shape=Shape(96, rooms, tuple(TOKENIZER.media)), conversations_per_row=2)
    rng = np.random.default_rng(0)
    batch = tiny.Batch(
        *(array[None] for array in row[:5]),
        media={"film": rng.normal(size=(1, 2, 2, 8, 8, 3)).astype(np.float32)},
        features={"touch": rng.normal(size=(1, 1, 5, 6)).astype(np.float32)},
        fused={name: array[None] for name, array in row.fused_L.items()},
    )
    return model, batch._replace(ids_BL=batch.ids_BL % config.decoder.vocab_size)


def test_nothing_is_added_at_the_start_and_then_to_these_tokens_alone():
    model, batch = small()
    without = batch._replace(features={}, fused={}, places_BL=np.where(batch.places_BL >= 0, batch.places_BL - OWN, -1))
    before = np.asarray(model.embed(batch))
    np.testing.assert_array_equal(before, model.embed(without))
    projector: Any = model.media["touch"].projector
    projector.fuse[...] = np.random.default_rng(1).normal(size=projector.fuse.shape)
    projector.fuse_bias[...] = np.random.default_rng(2).normal(size=projector.fuse_bias.shape)
    after, u_iD = np.asarray(model.embed(batch)), model.project(batch, "touch")[0]
    at_L = batch.fused["touch"][0]
    assert sorted(at_L[at_L >= 0]) == [0, 0, 1, 1, 2, 2]
    for place, own in enumerate(at_L):
        expected = before[0, place] if own < 0 else fused(before[0, place], u_iD[own])
        np.testing.assert_allclose(after[0, place], expected, atol=1e-6)
    assert np.abs(after - before)[0, at_L >= 0].max() > 0.1


def test_an_extension_of_the_medium_may_be_used_where_there_is_an_item_of_it():
    added = ExtensionConfig(layers=(1,), sources=(0,), calibrator_width=4, medium="touch")
    config = tiny.with_extension(dataclasses.replace(tiny.PLAIN, media=MEDIA), added, name="touch")
    _, batch = small()
    (share_BL,) = shares(batch, dataclasses.replace(config, text_isolation="strict")).values()
    (second,) = {*batch.segments_BL[batch.fused["touch"] >= 0]}
    np.testing.assert_array_equal(np.asarray(share_BL) == 0, batch.segments_BL == second)


def test_flops_of_the_fusion():
    trains = ("media/touch/projector/*",)
    config = dataclasses.replace(tiny.PLAIN, media=MEDIA)
    parts = step_flops(config, trains=trains, rows=1, length=96, items={"film": 2, "touch": 1}).parts
    fuse, D = parts["media/touch/projector/fuse"], config.decoder.width
    assert {fuse[of] for of in ("forward", "activation_backward", "weight_gradients")} == {2 * OWN * D * D}


# --- a run ------------------------------------------------------------------------------------------------------------


def write_both(folder: Path, *, rows: int = 24) -> Path:
    """Pictures of one colour with what is touched beside them, but for every third."""
    tiny.write_llava(folder, rows=rows)
    entries = json.loads((folder / "llava_v1_5_mix665k.json").read_text())
    for n, entry in enumerate(entries):
        if n % 3:
            np.savez(folder / f"{n}.npz", x=np.random.default_rng(n).normal(size=(3, 5)).astype(np.float32))
            entry["features"] = {"touch": f"{n}.npz"}
            entry["conversations"][0]["value"] = "<features:touch>\n" + entry["conversations"][0]["value"]
    (folder / "both.json").write_text(json.dumps(entries))
    return folder / "both.json"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """Pictures through a resampler, then what is touched added to them; no experts."""
    folder = tmp_path_factory.mktemp("fusion")
    base, both = tiny.write_base(folder / "base"), write_both(folder / "both")
    pictures = both.with_name("llava_v1_5_mix665k.json")
    own = ProjectorSettings(kind="crema", rank=2, fusion=True)
    later = groups(str(both))
    later["evaluate"] = dataclasses.replace(later["evaluate"], leave_out="subsets")
    return RunSettings(
        **groups(str(pictures)), method=CONNECTOR,
        extensions={"touch": ExtensionSettings(medium="touch", method=CONNECTOR, **later)},
        media={"image": MediumSettings(kind="image", projector=ProjectorSettings(kind="resampler", queries=3, heads=2)),
               "touch": MediumSettings(kind="features", width=5, patches=3, projector=own)},
        base=str(base), vision=str(base / "vision"), dtype="float32", remat="none", checkpoint_every=100, log_every=1,
    )  # fmt: skip


def test_a_trunk_may_stand_behind_what_stands_on_it(settings: RunSettings, tmp_path: Path):
    """A configuration has its media by name: depth before image."""
    turned = dataclasses.replace(settings, media={name: settings.media[name] for name in ("touch", "image")})
    assert open_run(turned, tmp_path / "w").config.media == open_run(settings, tmp_path / "v").config.media


@pytest.mark.slow
def test_a_run(settings: RunSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = whole_run(settings, tmp_path / "w")
    # Without the picture, nothing is left that it could be added to: the question is asked without either.
    subsets = summary["asked"]["touch"]["importance"]["moextend:touch"]["subsets"]
    assert set(subsets) == {"none", "image", "touch", "image+touch"} and subsets["touch"]["questions"] == 6
    run = open_run(settings, tmp_path / "w")
    moved = leaves_of(run, "finetune:touch")
    assert np.any(moved["media/touch/projector/fuse"]) and np.any(moved["media/touch/projector/fuse_bias"])
    before, after = (open_model(run, f"moextend:{name}").arrays for name in ("image", "touch"))
    kept = [path for path in before if not path.startswith("media/touch/")]
    assert all(np.array_equal(before[path], after[path]) for path in kept)
    cli.main(["export", str(run.workdir), str(tmp_path / "out"), "--layout", "delta"])
    record, leaves = store.read(tmp_path / "out")
    assert record.config.media["touch"].onto == "image"
    for path, leaf in moved.items():
        assert leaves[path].ours(()).tobytes() == np.asarray(leaf).tobytes(), path
    files = settings.align.data.removesuffix("llava_v1_5_mix665k.json")
    shown = ["--image", f"{files}1.png", "--show", f"touch={files}1.npz"]
    base = [settings.base, str(tmp_path / "out"), str(tmp_path / "whole"), "--vision", f"{settings.vision}"]
    cli.main(["compose", *base, "--text", "shared"])
    capsys.readouterr()
    asked = [*shown, "--prompt", "Which is it?", "--max-new-tokens", "8"]
    answers = []
    for model in (["--workdir", str(run.workdir)], ["--checkpoint", str(tmp_path / "whole")]):
        cli.main(["generate", *model, *asked])
        answers.append(capsys.readouterr().out)
    assert answers[0] and answers[0] == answers[1]


@pytest.mark.slow
def test_cut_off_and_gone_on_equals_uninterrupted(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert_goes_on(settings, "finetune:touch", tmp_path, monkeypatch)


def test_of_another_kind_it_is_refused(settings: RunSettings, tmp_path: Path):
    with pytest.raises(MoextendError, match="fusion is of kind crema alone, and the kind is weave"):
        ProjectorSettings(kind="weave", fusion=True)
    video = dataclasses.replace(settings.media["touch"], kind="video", width=0, patches=0, frames=2)
    with pytest.raises(MoextendError, match="its items have 6 tokens, no divisor of the 3 of those of image"):
        open_run(dataclasses.replace(settings, media={**settings.media, "touch": video}), tmp_path / "w")


def test_a_plan_has_its_places(settings: RunSettings):
    config = dataclasses.replace(tiny.PLAIN, media=MEDIA)
    stage = dataclasses.replace(settings.align, length=32, items_per_row={"film": 2, "touch": 1})
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1))
    batch = abstract_batch(config, stage, mesh)
    assert batch.fused.keys() == {"touch"} and batch.fused["touch"] == batch.places_BL
    assert abstract_batch(config, dataclasses.replace(stage, items_per_row={"film": 2}), mesh).fused == {}
