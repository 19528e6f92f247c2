"""`import moextend_jax as mx`: answers are the command's, routing is that of `routing collect`; mistakes are a line."""

from __future__ import annotations

import dataclasses
import inspect
import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import random_run
from PIL import Image

import moextend_jax as mx
from moextend_jax import cli, commands, preemption
from moextend_jax.api import shown
from moextend_jax.evaluate.asking import asker_of
from moextend_jax.evaluate.questions import prompt_of
from moextend_jax.evaluate.speak import picture as read_picture
from moextend_jax.evaluate.speak import show, speak
from moextend_jax.routing.stats import read_stats
from moextend_jax.runs.askable import Askable, askable
from moextend_jax.runs.run import Run

QUESTION, NEW = "Which is it?", 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return random_run.random_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Run) -> mx.Model:
    return mx.open(run.workdir)


@pytest.fixture
def pixels_hwc(picture: Path) -> np.ndarray:
    return np.asarray(Image.open(picture))


@pytest.mark.slow
def test_the_package_is_imported_without_jax_and_has_what_it_documents():
    code = (
        "import sys, moextend_jax as mx; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; "
        "assert {'open', 'run', 'Model', 'Routing', 'MoextendError'} <= set(dir(mx)); assert callable(mx.open)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        mx.opne  # noqa: B018
    for part in (mx.open, mx.run, mx.Routing, *(part for _, part in inspect.getmembers(mx.Model, inspect.isfunction))):
        assert part.__name__.startswith("_") or part.__doc__


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_and_the_asker_and_python_say_the_same(run: Run, model: mx.Model, picture: Path, capsys):
    answer = model.generate(QUESTION, picture, max_new_tokens=NEW)
    assert answer != model.generate(QUESTION, max_new_tokens=NEW) and answer.strip()
    pieces = list(model.stream(QUESTION, picture, max_new_tokens=NEW))
    assert "".join(pieces) == answer and len(pieces) > 1 and all(pieces)
    cli.call(
        ["generate", QUESTION, "--image", str(picture), "--workdir", str(run.workdir), "--max_new_tokens", str(NEW)]
    )
    assert capsys.readouterr().out == f"{answer}\n"
    assert model.generate([QUESTION, "Hi", QUESTION], [picture, None, None], max_new_tokens=NEW) == [
        answer, model.generate("Hi", max_new_tokens=NEW), model.generate(QUESTION, max_new_tokens=NEW)
    ]  # fmt: skip
    assert asked(askable(run, "moextend"), picture) == answer


def asked(opened: Askable, picture: Path) -> str:
    """By an `Asker`, as benchmarks are."""

    class Shown:
        field, medium = "media", opened.config.media["image"]

        def read(self, rows_BM: np.ndarray, /) -> np.ndarray:
            return np.where(
                (rows_BM >= 0)[..., None, None, None], show(opened, {"image": [picture]}).arrays["image"][0], 0
            )

    prompt = prompt_of(
        QUESTION, items={"image": (0,)}, spans={"image": [opened.patches]}, tokenizer=opened.tokenizer,
        recipe=opened.recipe, where="here",
    )  # fmt: skip
    (((_, ids),),) = asker_of(opened, readers={"image": Shown()}).complete([prompt], max_new_tokens=NEW)
    return opened.tokenizer.decode(ids)


def test_a_picture_may_be_a_file_its_bytes_an_image_or_an_array(model: mx.Model, picture: Path, pixels_hwc: np.ndarray):
    expected = model.generate(QUESTION, picture, max_new_tokens=NEW)
    for same in (str(picture), picture.read_bytes(), Image.fromarray(pixels_hwc), pixels_hwc):
        assert model.generate(QUESTION, same, max_new_tokens=NEW) == expected
    for wrong, message in (
        (pixels_hwc / 255, r"uint8 \[height, width, 3\] .* not float64\[40, 57, 3\]"),
        (picture.with_name("none.png"), "none.png cannot be read: No such file"),
        (3, "a int is no picture"),
        ([picture], r'show several in one text as items=\{"image"'),
    ):
        for ask in (model.generate, model.routing):
            with pytest.raises(mx.MoextendError, match=message):
                ask(QUESTION, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(mx.MoextendError, match="2 texts, but 1 images"):
        model.generate([QUESTION, QUESTION], [picture])


def test_a_pil_image_is_prepared_as_its_file_is(pixels_hwc: np.ndarray, tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels_hwc).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.arange(20 * 50, dtype=np.uint16).reshape(20, 50) * 60).save(tmp_path / "deep.png")
    for name in ("turned.png", "deep.png"):
        opened = Image.open(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(read_picture(opened)), np.asarray(read_picture(tmp_path / name)))
    assert read_picture(Image.open(tmp_path / "turned.png")).size == (40, 57)
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:1500])
    for wrong, message in (
        (Image.open(io.BytesIO((tmp_path / "cut.png").read_bytes())), "cannot be read: .*truncated"),
        (Image.new("RGB", (0, 3)), "no pixels"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN"),
    ):
        with pytest.raises(mx.MoextendError, match=message):
            read_picture(wrong)


def test_every_wrong_argument_is_a_line(model: mx.Model, run: Run, picture: Path, tmp_path: Path):
    assert shown(None, {"sound": "a.wav", "x": [picture], "y": b"wav"}) == {
        "sound": ["a.wav"], "x": [picture], "y": [b"wav"]
    }  # fmt: skip
    base: Any = mx.open(run.workdir, model="base")
    silent = dataclasses.replace(askable(run, "base").tokenizer, bos=None)
    mute = dataclasses.replace(askable(run, "base"), read_tokenizer=lambda: silent)
    any_model, any_mx, hi = cast(Any, model), cast(Any, mx), {"role": "user", "content": "Hi"}
    wrongs: list[tuple[str, Callable[[], Any]]] = [
        ("max_new_tokens = 0 must be", lambda: model.generate("Hi", max_new_tokens=0)),
        ("max_new_tokens = 0 must be", lambda: model.generate(["Hi"], max_new_tokens=0)),
        ("max_new_tokens = 0 must be", lambda: model.chat([hi], max_new_tokens=0)),
        ("temperature = -1.0 must be", lambda: model.generate("Hi", temperature=-1.0)),
        ("top_k = 'x' must be a whole number", lambda: any_model.generate(["Hi"], top_k="x")),
        ("seed = None must be a whole number", lambda: any_model.stream("Hi", seed=None)),
        ("text is neither a str nor a list", lambda: any_model.generate(3)),
        ("a NoneType is no text", lambda: any_model.generate(["Hi", None])),
        ("a int is no text", lambda: any_model.routing("Hi", answer=3)),
        ("items is a str, not files by medium", lambda: any_model.generate("Hi", items="a.wav")),
        ("items: sound is no file and no list", lambda: any_model.generate("Hi", items={"sound": 3})),
        ("both image and items", lambda: model.generate("Hi", picture, items={"image": picture})),
        ("text that is not UTF-8", lambda: base.generate("\ud800")),
        ("a prompt without tokens", lambda: "".join(speak(mute, "", items={}, max_new_tokens=1))),
        ("messages are no list", lambda: any_model.chat(hi)),
        ("a message is a str", lambda: any_model.chat(["Hi"])),
        ("content is neither", lambda: model.chat([{"role": "user", "content": 3}])),
        ("content is neither", lambda: model.chat([{"role": "user", "contents": "Hi"}])),
        ("a int is no folder's name", lambda: any_mx.open(3)),
        ("model = 3 must be a text", lambda: any_mx.open(run.workdir, model=3)),
        ("feature_layer = 'x' must be a whole number", lambda: any_mx.open(run.settings.base, feature_layer="x")),
        ("a NoneType is no folder's name", lambda: any_mx.run(run.settings, workdir=None)),
        ("a int is no configuration", lambda: any_mx.run(3, workdir=tmp_path)),
        ("the base model cannot see", lambda: base.routing("Hi", picture, answer="a ring")),
        ("the base model cannot see", lambda: base.routing("Hi", picture, answer="a ring", plain=False)),
        ("neither images nor turns", lambda: base.routing("Hi", answer="a ring", system="Be short.")),
    ]
    for message, call in wrongs:
        with pytest.raises(mx.MoextendError, match=message):
            call()


def test_seeds_draw_and_a_list_draws_each(model: mx.Model):
    drawn: dict[str, Any] = {"temperature": 5.0, "max_new_tokens": NEW}
    first, second = (model.generate("Hi", seed=seed, **drawn) for seed in (3, 4))
    assert first != second and model.generate(["Hi", "Hi"], seed=3, **drawn) == [first, second]


def test_messages_are_a_conversation(model: mx.Model, picture: Path):
    asks = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    answer = model.generate(QUESTION, picture, max_new_tokens=NEW)
    assert model.chat([{"role": "user", "content": asks}], max_new_tokens=NEW) == answer
    told = model.chat(
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}], max_new_tokens=NEW
    )
    assert told == model.generate("Hi", system="Be short.", max_new_tokens=NEW)
    assert told != model.generate("Hi", max_new_tokens=NEW)
    for wrong, message in (
        ([{"role": "bot", "content": "Hi"}], "role 'bot' is none of system, user, assistant"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "content is neither"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "roles must alternate"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the last turn must be the user's"),
        ([], "the last turn must be the user's"),
    ):
        with pytest.raises(mx.MoextendError, match=message):
            model.chat(wrong)


def test_a_base_continues_text_also_in_the_folder_that_it_was_published_in(run: Run):
    base, folder = mx.open(run.workdir, model="base"), mx.open(run.settings.base, dtype="float32")
    text = base.generate("In the beginning", max_new_tokens=NEW)
    assert folder.generate("In the beginning", max_new_tokens=NEW) == text
    assert base.generate("In the beginning", plain=False, max_new_tokens=NEW) != text
    assert base.generate(["In the beginning"], max_new_tokens=NEW) == [text]
    routing = base.routing("In the beginning", answer=" of the LORD")  # continued, as it was made: no template, no end
    assert "".join(routing.tokens[1:]) == "In the beginning of the LORD"
    with pytest.raises(mx.MoextendError, match="nowhere is no work directory and no checkpoint"):
        mx.open("nowhere")
    assert repr(folder) == "Model('base', 3 layers of 4 experts, text only, float32)"


# --- routing ----------------------------------------------------------------------------------------------------------


def test_routing_is_what_routing_collect_counts(run: Run, tmp_path: Path):
    routing = mx.open(run.workdir).routing("In the beginning", plain=True)
    np.savez(tmp_path / "ids.npz", input_ids=routing.ids[None])
    cli.call(["routing", "collect", "--workdir", str(run.workdir), "--ids", str(tmp_path / "ids.npz"),
              "--out", str(tmp_path / "out.npz")])  # fmt: skip
    stats = read_stats(tmp_path / "out.npz")
    assert stats.per_token is not None
    np.testing.assert_array_equal(stats.per_token.ids_ZTk, routing.picks)
    for z, picks_Tk in enumerate(routing.picks):
        counted = np.bincount(picks_Tk.reshape(-1), minlength=len(routing.experts))
        np.testing.assert_array_equal(counted, stats.picks_ZO["text"][z])
    probs = np.exp(routing.logits - routing.logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(probs.mean(axis=1), stats.probs_ZO["text"], atol=1e-6)


def test_routing_names_tokens_patches_and_experts(model: mx.Model, picture: Path):
    routing = model.routing(QUESTION, picture, answer="a ring")
    tokens, patches = len(routing.tokens), 4
    assert routing.picks.shape == routing.weights.shape == (3, tokens, 2)
    assert routing.logits.shape == (3, tokens, 5) and routing.experts == ["0", "1", "2", "3", "new 0"]
    assert np.isneginf(routing.logits[1, :, 4]).all() and np.isfinite(routing.logits[[0, 2]]).all()
    assert (routing.picks[1] < 4).all() and (routing.picks[[0, 2]] == 4).any()
    first = routing.tokens.index("<patch 0>")
    assert routing.tokens[first - 1 : first + patches + 1] == [
        "<image>",
        *(f"<patch {n}>" for n in range(4)),
        "</image>",
    ]
    np.testing.assert_array_equal(routing.patches[first : first + patches], range(patches))
    assert (np.delete(routing.patches, range(first, first + patches)) == -1).all()
    text = "".join(token for token in routing.tokens if not token.startswith("<"))
    assert QUESTION in text and text.endswith("a ring") and routing.tokens[0] == "<s>" and routing.tokens[-1] == "</s>"
    assert repr(routing) == f"Routing(3 layers, {tokens} tokens, 2 of 5 experts each)"
    asked = model.routing(QUESTION, picture)
    np.testing.assert_array_equal(asked.picks, routing.picks[:, : len(asked.tokens)])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    calls: list[tuple] = []

    def whole_run(settings, workdir, *, resume_from):
        calls.append((settings, workdir, resume_from))
        preemption.listen()
        return {"seconds": {}}

    monkeypatch.setattr(commands, "whole_run", whole_run)
    yield calls


def test_a_run_is_the_command_s_with_settings_as_keywords(started: list[tuple], run: Run, tmp_path: Path):
    before, optimizer = signal.getsignal(signal.SIGTERM), {"learning_rate": 0.5}
    mx.run("demo:released", workdir=str(tmp_path), finetune={"steps": 20, "optimizer": optimizer}, seed=1)
    mx.run(run.settings, workdir=tmp_path, resume_from="elsewhere")
    assert signal.getsignal(signal.SIGTERM) is before
    (changed, workdir, resumed), (same, _, elsewhere) = started
    assert (changed.finetune.steps, changed.finetune.optimizer.learning_rate, changed.seed) == (20, 0.5, 1)
    assert changed.align.steps == 110 and changed.finetune.optimizer.multipliers == {"calibrators": 0.02}
    assert changed.recipe.prompt == "released" and workdir == tmp_path and resumed is None
    assert same == run.settings and elsewhere == Path("elsewhere")
    mx.run("own", workdir=tmp_path, data=Path("own.jsonl"), images="pictures", align={"data": "captions.jsonl"})
    own = started.pop()[0]
    assert [of.data for of in (own.align, own.extend, own.finetune, own.full)] == ["captions.jsonl", *["own.jsonl"] * 3]
    assert own.images == "pictures" and own.evaluate.data == ""
    mx.run("own", workdir=tmp_path, data=["a.jsonl", Path("b.jsonl:0.5")])
    assert started.pop()[0].align.data == "a.jsonl,b.jsonl:0.5"
    for wrong, message in (
        (5, "data is no file, nor a list"),
        (b"a", "data is no file, nor a list"),
        ([5], "a int is no file's"),
    ):
        with pytest.raises(mx.MoextendError, match=message):
            mx.run("own", workdir=tmp_path, data=cast(Any, wrong))
    for config, change, message in (
        ("demmo", {}, "there is no configuration demmo"),
        ("demo", {"finetune": {"step": 3}}, "config.finetune.step is no setting"),
        ("demo", {"seed": -1}, "config.seed = -1 must be at least 0"),
    ):
        changes: dict[str, Any] = change
        with pytest.raises(mx.MoextendError, match=message):
            mx.run(config, workdir=tmp_path, **changes)
    assert len(started) == 2
