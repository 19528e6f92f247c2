"""`moextend chat --web`: it shows the experts that the router chose, and two visitors can ask it in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import browser
import media_files as files
import numpy as np
import pytest
import random_run
from children import ended
from PIL import Image

from moextend_jax import cli
from moextend_jax.commands import prompts_of
from moextend_jax.config import RECIPES, Medium, MoextendError, VisionConfig
from moextend_jax.evaluate.routed import Routing, routing_of
from moextend_jax.evaluate.speak import is_question, question, speak
from moextend_jax.runs.askable import choices
from moextend_jax.runs.place import Place
from moextend_jax.runs.run import Run
from moextend_jax.web.experts import MEAN, Frame, Seen, chosen, render, share_of_new
from moextend_jax.web.page import NOTHING, Page, alike, blocks, frames_of, items_of

QUESTION, NEW = "Which is it?", 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return random_run.random_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return Page(models=choices(Place(workdir=run.workdir)), start="moextend", max_new_tokens=NEW)


@pytest.fixture
def seen() -> Seen:
    """Two layers, layer 1 extended; three patches of four, then two words."""
    routing = Routing(
        picks=np.array([[[0, 1]] * 6, [[2, 0], [1, 2], [0, 1], [1, 0], [2, 1], [0, 1]]]),
        weights=np.array(
            [[[0.75, 0.25]] * 6, [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0], [0.7, 0.3], [0.8, 0.2]]]
        ),
        logits=np.zeros((2, 6, 3), np.float32),
        experts=["0", "1", "new 0"],
        tokens=["<patch 0>", "<patch 1>", "<patch 2>", "<patch 3>", " a", "<b>&"],
        ids=np.arange(6),
        patches=np.array([0, 1, 2, 3, -1, -1]),
        media=["image"] * 4 + [""] * 2,
    )
    frames = (Frame(Image.new("RGB", (4, 4)), 2, first=0, medium="image"),)
    return Seen("a <i>", 'an "answer"', routing, base=2, first_layer=0, extended=(1,), frames=frames)


# --- what is shown of the experts -------------------------------------------------------------------------------------


def test_shares_are_the_weights_of_new_experts(seen: Seen):
    np.testing.assert_allclose(share_of_new(seen, 1), [0.9, 0.4, 0, 0, 0.7, 0])
    np.testing.assert_allclose(share_of_new(seen, 0), np.zeros(6))
    np.testing.assert_allclose(share_of_new(seen, MEAN), share_of_new(seen, 1))
    assert chosen(seen, 1, 1) == [("1", 0.6), ("new 0", 0.4)]


def test_patches_are_tinted_words_have_their_experts_and_texts_are_escaped(seen: Seen):
    tree = ET.fromstring(render(seen, 1))  # well formed: whatever was typed
    patches = [(float(rect.get("fill-opacity") or 0), rect.findtext("title")) for rect in tree.iter("rect")]
    assert [opacity for opacity, _ in patches] == [0.72, 0.32, 0, 0]
    assert patches[1][1] == "patch 1\nlayer 1: 1 0.60, new 0 0.40"
    words = [(span.findtext("b"), span.findtext("small")) for span in tree.iter("span") if span.get("class") == "token"]
    assert words == [(" a", "n0 1"), ("<b>&", "0 1")]
    assert "a <i>" in "".join(tree.itertext()) and 'an "answer"' in "".join(tree.itertext())


def test_every_picture_has_its_own_patches(seen: Seen):
    seen = seen._replace(
        frames=(seen.frames[0]._replace(medium="video"), *(seen.frames[0]._replace(first=n, grid=1) for n in (1, 3)))
    )
    drawn = [of for of in ET.fromstring(render(seen, 1)).iter("div") if of.get("class") == "frame"]
    titles = [[rect.findtext("title") for rect in of.iter("rect")] for of in drawn]
    assert titles == [[], ["patch 0\nlayer 1: 1 0.60, new 0 0.40"], ["patch 0\nlayer 1: 1 1.00, 0 0.00"]]


@pytest.mark.parametrize("join, firsts", [("each", [0, 4, 8, 12]), ("mean", [0, 0, 4, 4])])
def test_every_frame_of_a_video_is_a_picture(join: Any, firsts: list[int]):
    tower = VisionConfig(image_size=8, patch_size=4, width=8, hidden=8, layers=1, heads=1)
    watched = Medium(kind="video", mark="<video>", tower=tower, frames=2, join=join)
    opened: Any = SimpleNamespace(
        config=SimpleNamespace(media={"image": Medium(tower=tower), "video": watched}), recipe=RECIPES["paper"]
    )
    videos = [files.video("GIF", count=5), files.video("GIF", count=3)]
    frames = [*frames_of(opened, {"video": videos, "image": [np.zeros((4, 4, 3), np.uint8)], "sound": [b""]})]
    assert [(frame.medium, frame.first, frame.grid) for frame in frames] == [
        *(("video", first, 2) for first in firsts), ("image", 0, 2)
    ]  # fmt: skip
    assert frames[0].picture.size == (336, 336) and frames[0].picture != frames[1].picture


def test_a_model_without_new_experts_says_so(seen: Seen):
    html = render(seen._replace(extended=(), base=3), 0)
    assert "no new experts" in html
    assert all(float(rect.get("fill-opacity") or 0) == 0 for rect in ET.fromstring(html).iter("rect"))


# --- what is answered -------------------------------------------------------------------------------------------------


def answered(page: Page, *asked: Any) -> tuple[list[str], list[Seen]]:
    every = [*page.answer(*asked)]
    return [one for one in every if isinstance(one, str)], [one for one in every if isinstance(one, Seen)]


def test_the_page_offers_finished_models_and_answers_as_generate_does(page: Page, picture: Path):
    assert list(page.models) == ["base", "aligned", "moextend"]
    talk = page.conversation("moextend")
    items = items_of(talk.opened, [picture])
    pieces, seen = answered(page, QUESTION, items, talk, "aligned")
    wanted = "".join(speak(talk.opened, QUESTION, items=items, max_new_tokens=NEW))
    assert wanted and "".join(pieces) == wanted
    assert [one.title for one in seen] == ["MoExtend", "aligned only"]
    assert [turn["value"] for turn in talk.turns] == [f"<image>\n{QUESTION}", wanted.strip()]  # though it was cut
    routing = routing_of(talk.opened, QUESTION, items=items, answer=wanted.strip())
    np.testing.assert_array_equal(seen[0].routing.picks, routing.picks)
    assert seen[0].extended and not seen[1].extended
    rects = [*ET.fromstring(render(seen[0], MEAN)).iter("rect")]
    assert len(rects) == seen[0].frames[0].grid ** 2 == talk.opened.patches
    other = page.models["aligned"].open()
    assert seen[1].answer == "".join(speak(other, QUESTION, items=items, max_new_tokens=NEW))


def test_the_second_question_is_about_the_same_picture(page: Page, picture: Path):
    talk = page.conversation("moextend")
    list(page.answer(QUESTION, items_of(talk.opened, [picture]), talk, NOTHING))
    _, seen = answered(page, "And now?", {}, talk, NOTHING)
    said = "".join(text for text in seen[0].routing.tokens if not text.startswith("<"))
    assert QUESTION in said and "And now?" in said
    assert (seen[0].routing.patches >= 0).sum() == talk.opened.patches


@pytest.mark.slow
def test_a_base_continues_text_and_is_shown_beside_without_the_picture(page: Page, picture: Path):
    talk = page.conversation("base")
    pieces, seen = answered(page, "In the beginning", {}, talk, NOTHING)
    ids: list[int] = []
    text = "".join(speak(talk.opened, "In the beginning", plain=True, max_new_tokens=NEW, ids=ids))
    assert "".join(pieces) == text and not seen[0].frames
    # The experts are those of what the model read and made: no space is lost between the two.
    tokenizer = talk.opened.tokenizer
    assert seen[0].routing.ids.tolist() == [*tokenizer.prefix, *tokenizer.encode("In the beginning"), *ids]
    assert "".join(seen[0].routing.tokens[len(tokenizer.prefix) :]) == f"In the beginning{text}"
    talk = page.conversation("moextend")
    _, seen = answered(page, QUESTION, items_of(talk.opened, [picture]), talk, "base")
    assert seen[1].title == "base" and not seen[1].frames
    talk = page.conversation("base")
    _, seen = answered(page, QUESTION, {}, talk, "moextend")  # after, beside before
    after = page.models["moextend"].open()
    assert [one.title for one in seen] == ["base", "MoExtend"]
    assert seen[1].answer == "".join(speak(after, QUESTION, max_new_tokens=NEW))


def test_a_file_that_the_model_does_not_take_is_refused_in_words(page: Page, tmp_path: Path):
    talk = page.conversation("moextend")
    with pytest.raises(MoextendError, match=r"a\.wav: the moextend model takes a file of image"):
        items_of(talk.opened, [tmp_path / "a.wav"])
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(MoextendError, match="image"):
        list(page.answer(QUESTION, items_of(talk.opened, [tmp_path / "b.png"]), talk, NOTHING))
    assert not talk.turns
    with pytest.raises(MoextendError, match="question"):
        list(page.answer("", {}, talk, NOTHING))


def test_a_spoken_question_of_one_of_two_media_of_sounds():
    marks = {"image": Medium(), "sound": Medium(kind="audio", mark="<audio:sound>"),
             "speech": Medium(kind="audio", mark="<audio:speech>")}  # fmt: skip
    opened: Any = SimpleNamespace(config=SimpleNamespace(media=marks), tokenizer=SimpleNamespace(media=marks), name="a")
    assert alike(opened) == ["sound", "speech"]
    files = [Path("a.flac"), Path("b.png")]
    assert items_of(opened, files) == {"sound": files[:1], "image": files[1:]}
    items = items_of(opened, files, medium="speech")
    assert items == {"speech": files[:1], "image": files[1:]} == items_of(opened, files[::-1], medium="speech")
    assert items_of(opened, files[1:], medium="speech") == {"image": files[1:]}
    # As in training, whatever was shown first.
    assert question(opened, "", items)["value"] == "<image>\n<audio:speech>"
    assert question(opened, "what?\n", {"speech": [1]})["value"] == "<audio:speech>\nwhat?\n"
    asks = [is_question(opened, *of) for of in (("", items), ("", {"image": files}), (" ", {}), ("a", {}))]
    assert asks == [True, False, False, True]
    assert [*prompts_of("")] == [""]  # and not standard input


def test_a_file_that_is_an_image_or_a_video_is_what_the_visitor_says():
    marks = {"image": Medium(), "film": Medium(kind="video", mark="<video:film>"),
             "sound": Medium(kind="audio", mark="<audio:sound>")}  # fmt: skip
    opened: Any = SimpleNamespace(config=SimpleNamespace(media=marks))
    assert alike(opened) == ["image", "film"]
    files = [Path("a.gif"), Path("b.jpg"), Path("c.wav")]
    assert items_of(opened, files, medium="film") == {"film": files[:1], "image": files[1:2], "sound": files[2:]}
    assert items_of(opened, files) == {"image": files[:2], "sound": files[2:]}


def test_options_of_the_page_mean_nothing_to_the_terminal(run: Run, capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--workdir", str(run.workdir), "--host=0.0.0.0", "--port=0"])
    assert "--host, --port goes with --web" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused_with_those_that_are(run: Run, capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--web", "--workdir", str(run.workdir), "--model=full"])
    assert "the page has no model full: choose of base, aligned, moextend" in capsys.readouterr().err


def test_an_answer_ends_with_forget_and_mistakes_leave_the_page_usable(page: Page, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `web`)")
    done = threading.Thread()
    done.start()

    async def build() -> Any:
        return blocks(page, after=done)

    built = asyncio.run(build())  # outside a running event loop, gradio leaves new ones unclosed
    assert built.delete_cache  # else the files of all visitors stay until the machine ends
    submit = next(event for event in built.fns.values() if event.name == "submit")
    resets = {event.targets[0]: n for n, event in built.fns.items() if event.name == "reset"}
    stops = {event.targets[0]: n for n, event in built.fns.items() if event.cancels == [submit._id]}
    assert len(resets) == 2 and all(stops[target] < n for target, n in resets.items())  # stopped, then forgotten
    made, asked = page.conversation("aligned"), {"text": QUESTION, "files": []}

    def last(beside: str) -> tuple[Any, ...]:
        history = [{"role": "user", "content": "before"}]
        *_, last = submit.fn(asked, history, made, [], "moextend", beside, 0, None)
        assert last[1].interactive
        return last

    history, _, talk, seen, first, second = last(NOTHING)
    assert talk.opened.name == "moextend" and not made.turns  # not the model of the answer that was left
    assert [one.title for one in seen] == ["MoExtend"] and "MoExtend" in first and not second

    def no_memory(self: Page, *_: Any) -> Seen:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Page, "_beside", no_memory)
    history, _, _, seen, first, second = last("aligned")
    assert len(seen) == 1 and first and not second and "out of memory" in history[-1]["content"]
    monkeypatch.setattr(Page, "_seen", no_memory)
    history, _, _, seen, first, _ = last(NOTHING)
    assert not seen and not first and "out of memory" in history[-1]["content"]


def test_without_gradio_the_command_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as left:
        cli.main(["chat", "--web", "--workdir", str(run.workdir), "--port", "0"])
    assert left.value.code == 2 and 'pip install "moextend-jax[web]"' in capsys.readouterr().err


# --- in a browser -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(workdir: Path, *, new: int = NEW) -> Iterator[str]:
    """The address of the page, served by the command in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moextend_jax", "chat", "--web", "--workdir", str(workdir), "--port=0",
         f"--max-new-tokens={new}"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    with ended(process):
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("http")), "")
        assert line, "the page was not served"
        yield line.split()[0]


def ask(visitor: Any, text: str, file: Path | None = None) -> None:
    if file is not None:
        visitor.set_input_files("#box input[type=file]", str(file))
        visitor.wait_for_selector(
            "#box .thumbnail-item, #box [data-testid='upload-thumbnail'], #box img", timeout=30000
        )
    visitor.fill("#box textarea", text)
    visitor.keyboard.press("Enter")


@pytest.mark.slow
def test_two_visitors_ask_see_the_tint_and_are_told_of_a_wrong_file(run: Run, picture: Path, tmp_path: Path):
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `web`)")
    (tmp_path / "note.txt").write_text("no picture")
    with browser.browser() as chromium, served(run.workdir) as address:
        visitors, hosts = [chromium.new_page() for _ in range(2)], set()
        for visitor in visitors:
            visitor.on("request", lambda request: hosts.add(request.url.split("/")[2]))
            visitor.goto(address)
            visitor.wait_for_selector("#box textarea", timeout=60000)
        ask(visitors[0], QUESTION, picture)
        ask(visitors[1], "Is it a sound?")
        for visitor in visitors:  # the model beside it answers after it: aligned only
            for place in ("#first", "#second"):
                visitor.wait_for_selector(f"{place} .experts .token", timeout=120000)
        assert QUESTION in visitors[0].inner_text("#chat") and QUESTION not in visitors[1].inner_text("#chat")
        assert "Is it a sound?" in visitors[1].inner_text("#chat")
        rects = visitors[0].locator("#first rect")
        assert rects.count() == 4 and visitors[1].locator("#first rect").count() == 0
        assert visitors[0].locator("#second .experts").count() == 1
        tints = rects.evaluate_all("all => all.map(one => one.getAttribute('fill-opacity'))")
        told = rects.first.locator("title").text_content()
        assert max(map(float, tints)) > 0 and "layer" in told
        ask(visitors[0], "And this?", tmp_path / "note.txt")
        refused = "document.querySelector('#chat').innerText.includes('note.txt: the moextend')"
        visitors[0].wait_for_function(refused, timeout=120000)
        assert {host.partition(":")[0] for host in hosts} == {"127.0.0.1"}


@pytest.mark.long
def test_what_was_forgotten_during_an_answer_stays_forgotten(run: Run):
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `web`)")
    with browser.browser() as chromium, served(run.workdir, new=1500) as address:
        visitor = chromium.new_page()
        visitor.goto(address)
        visitor.wait_for_selector("#box textarea", timeout=60000)
        ask(visitor, QUESTION)
        visitor.wait_for_function("document.querySelectorAll('#chat .bot').length > 0", timeout=120000)
        visitor.click("text=Forget what was said")
        visitor.wait_for_function(f"!document.querySelector('#chat').innerText.includes('{QUESTION}')", timeout=10000)
        visitor.wait_for_timeout(1500)  # more of the answer would be here by now
        assert QUESTION not in visitor.inner_text("#chat") and visitor.locator("#chat .bot").count() == 0
        assert visitor.is_enabled("#box textarea")
