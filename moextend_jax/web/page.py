"""`moextend chat --web`: a page to ask the models of a folder, and to see what their experts did with every token.

In: the models by name, each opened when it is first asked for. Out: a page on this machine, by gradio: no server of our
own, nothing fetched from other hosts. Every visitor has a conversation of their own; one answer is made at a time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moextend_jax.config import IMAGE, MoextendError
from moextend_jax.evaluate.chat import Conversation, remembered
from moextend_jax.evaluate.routed import routing_of
from moextend_jax.evaluate.speak import Items, is_question, question, read_item, speak
from moextend_jax.folders import extra_hint
from moextend_jax.generate import Sampling
from moextend_jax.media import KINDS
from moextend_jax.media.image import framed, tower_of
from moextend_jax.runs.askable import Askable, Choice
from moextend_jax.web.experts import CSS, MEAN, Frame, Seen, render

NOTHING = "nothing"
PICTURE_PIXELS = 336
"""Side of a tinted picture."""
LARGEST = "64mb"
"""Files that the page takes; what is inside is checked again when it is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What the page's events do. models: by name; start: the one that is chosen at first.
    system, max_new_tokens, sampling, seed: as of `Conversation`."""

    models: Mapping[str, Choice]
    start: str
    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = Sampling()
    seed: int = 0

    def conversation(self, name: str) -> Conversation:
        return Conversation(
            opened=self.models[name].open(), system=self.system, max_new_tokens=self.max_new_tokens,
            sampling=self.sampling, seed=self.seed,
        )  # fmt: skip

    def answer(self, text: str, items: Items, talk: Conversation, beside: str) -> Iterator[str | Seen]:
        """Yields the answer piece by piece, then what the experts of the model did, then those of the one `beside` it.

        Raises:
          MoextendError: an item that cannot be read, or a text that the model cannot be asked.
        """
        if not is_question(talk.opened, text, items):
            raise MoextendError("type a question, too")
        before, turns = talk.told, len(talk.turns)
        if talk.opened.plain:
            ids: list[int] = []
            said = yield from _joined(self._speak(talk.opened, text, items, ids))
            yield self._seen(talk.opened, text, items, said, ids)
            prompt, shown = None, items
        else:
            said = yield from _joined(talk.ask(text, items=items))
            if len(talk.turns) == turns:  # an empty answer is not remembered
                return
            prompt, shown = [*before, talk.turns[-2]], talk.items
            yield self._seen(talk.opened, prompt, shown, said)  # whatever becomes of the other
        other = None if beside in (NOTHING, talk.opened.name) else self.models[beside].open()
        if other is not None and (text or not other.plain):  # which has nothing to go on with
            yield self._beside(other, text, prompt or [question(other, text, shown)], shown)

    def _beside(self, opened: Askable, text: str, prompt: Any, items: Items) -> Seen:
        """The same question to another model, which may not be able to see what is shown."""
        asked, ids = text if opened.plain else prompt, list[int]()
        try:
            said = "".join(self._speak(opened, asked, items, ids))
            return self._seen(opened, asked, items, said, ids)
        except MoextendError as error:
            if opened.plain and items:
                return self._beside(opened, text, prompt, {})
            raise MoextendError(f"beside it: {error}") from None

    def _speak(self, opened: Askable, prompt: Any, items: Items, ids: list[int] | None = None) -> Iterator[str]:
        return speak(
            opened, prompt, items=items, plain=opened.plain, max_new_tokens=self.max_new_tokens,
            sampling=self.sampling, seed=self.seed, ids=ids,
        )  # fmt: skip

    def _seen(self, opened: Askable, prompt: Any, items: Items, said: str, ids: Sequence[int] = ()) -> Seen:
        """ids: of a text that is continued, whose words may be cut otherwise when they are read again."""
        answer = ids if opened.plain else remembered(opened, said) or None
        routing = routing_of(opened, prompt, items=items, answer=answer, plain=opened.plain)
        config = opened.config
        return Seen(
            title=self.models[opened.name].title,
            answer=said,
            routing=routing,
            base=config.decoder.experts,
            first_layer=config.decoder.routed.start,
            extended=extended_layers(opened),
            frames=tuple(frames_of(opened, items)),
        )


def items_of(opened: Askable, files: Any, *, medium: str = "") -> dict[str, list[Path]]:
    """Uploaded files by the medium of the model that takes them: of those that take such files, by their suffix, the
    one that is named, else the first."""
    items: dict[str, list[Path]] = {}
    for file in map(Path, files):
        suffix = file.suffix.lower().removeprefix(".")
        takes_it = [name for name, of in opened.config.media.items() if suffix in KINDS[of.kind].suffixes]
        if not takes_it:
            takes = " or ".join(sorted({f"a file of {KINDS[of.kind].noun}" for of in opened.config.media.values()}))
            raise MoextendError(f"{file.name}: the {opened.name} model takes {takes or 'no files'}")
        items.setdefault(medium if medium in takes_it else takes_it[0], []).append(file)
    return items


def alike(opened: Askable) -> list[str]:
    """The media of the model that take some file, by its suffix, which another one takes too: a GIF is an image and a
    video."""
    taken = {name: KINDS[of.kind].suffixes for name, of in opened.config.media.items()}
    counts = Counter(suffix for suffixes in taken.values() for suffix in suffixes)
    return [name for name, suffixes in taken.items() if any(counts[suffix] > 1 for suffix in suffixes)]


def extended_layers(opened: Askable) -> tuple[int, ...]:
    return tuple(sorted({layer for added in opened.config.extensions.values() for layer in added.layers}))


def frames_of(opened: Askable, items: Items) -> Iterator[Frame]:
    """Every picture that is shown, and every frame of a video."""
    for name, files in items.items():
        medium = opened.config.media.get(name)
        if medium is None or medium.kind not in ("image", "video"):
            continue
        tower = tower_of(medium)
        each = medium.projector.tokens(tower.patches)
        grid = tower.grid if each == tower.patches else 0  # a connector that joins patches has no grid
        step = each if medium.join == "each" else 0  # frames that are averaged share their tokens
        look: dict[str, Any] = {"preparation": opened.recipe.image_preparation, "tower": tower, "id": name}
        for n, file in enumerate(files):
            item = read_item(file, name, medium)
            for t, picture in enumerate(item if isinstance(item, tuple) else (item,)):
                image = framed(picture, size=PICTURE_PIXELS, **look)
                yield Frame(image, grid, first=n * medium.tokens + t * step, medium=name)


def _joined(pieces: Iterator[str]) -> Any:
    """Passes pieces on; returns them as one text."""
    said = ""
    for piece in pieces:
        said += piece
        yield piece
    return said.strip()


def warm_up(page: Page) -> None:
    """Compiles what a first short question needs, so that no visitor waits for it."""
    opened = page.models[page.start].open()
    items = {IMAGE: [np.zeros((32, 32, 3), np.uint8)]} if opened.sees else {}
    said = "".join(itertools.islice(page._speak(opened, "?", items), 2))
    page._seen(opened, "?", items, said)


def blocks(page: Page, *, after: threading.Thread) -> Any:
    """The page, as gradio's Blocks; nothing is computed before a thread has ended."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    names = [(choice.title, name) for name, choice in page.models.items()]
    besides = [("nothing", NOTHING), *names]
    aligned = next((name for name in page.models if name.startswith("aligned")), NOTHING)

    def layers(name: str) -> Any:
        opened = page.models[name].open()
        extended, routed = extended_layers(opened), opened.config.decoder.routed
        choices = [(f"layer {z}{' (extended)' if z in extended else ''}", z) for z in routed]
        if extended:
            choices.insert(0, ("mean of the extended layers", MEAN))
        return gr.Dropdown(choices=choices, value=choices[0][1])

    def media(name: str) -> Any:
        choices = alike(page.models[name].open())
        return gr.Dropdown(choices=choices, value=choices[0] if choices else None, visible=bool(choices))

    def draw(seen: list[Seen], layer: int) -> tuple[str, str]:
        html = [render(one, layer if layer != MEAN or one.extended else one.first_layer) for one in seen]
        return (html + ["", ""])[0], (html + ["", ""])[1]

    def submit(
        asked: dict[str, Any], history: list[Any], talk: Conversation | None, seen: list[Seen], name: str, beside: str,
        layer: int, medium: str | None,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        if talk is not None and (not history or talk.opened.name != name):  # an answer that was left may have kept it
            talk = None
        shown = [{"role": "user", "content": {"path": file}} for file in asked["files"]]
        history = [*history, *shown, {"role": "user", "content": asked["text"]}]
        said, seen, left = "", [], gr.MultimodalTextbox(value=None, interactive=False)
        yield history, left, talk, seen, gr.skip(), gr.skip()
        after.join()
        try:
            talk = talk or page.conversation(name)
            items = items_of(talk.opened, asked["files"], medium=medium or "")
            for piece in page.answer(asked["text"].strip(), items, talk, beside):
                if isinstance(piece, str):
                    said += piece
                else:
                    seen = [*seen, piece]
                drawn = draw(seen, layer) if seen else (gr.skip(), gr.skip())
                yield [*history, _assistant(said)], left, talk, seen, *drawn
            history.append(_assistant(said or "(the model said nothing)"))
        except Exception as error:  # also that of a device without memory, after which one may ask something shorter
            if not isinstance(error, MoextendError):
                traceback.print_exc()
            why = str(error) or type(error).__name__
            history.append(_assistant(f"{said}\n\n{why}" if said else why))
        yield history, gr.MultimodalTextbox(interactive=True), talk, seen, *draw(seen, layer)

    def reset() -> tuple[Any, ...]:
        return [], None, [], "", "", gr.MultimodalTextbox(interactive=True)

    forgotten = (3600, 24 * 3600)  # every hour files that visitors have sent more than a day ago
    with gr.Blocks(title="moextend", analytics_enabled=False, fill_width=True, delete_cache=forgotten) as built:
        talk, seen = gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    model = gr.Dropdown(names, value=page.start, label="Model")
                    other = gr.Dropdown(besides, value=aligned if aligned != page.start else NOTHING, label="Beside it")
                chat = gr.Chatbot(
                    label="Conversation", height=420, allow_tags=False, feedback_options=None, buttons=["copy"],
                    elem_id="chat", placeholder="Ask something. The clip takes a file to ask about.",
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    sources=["upload", "microphone"], file_count="multiple", show_label=False, elem_id="box",
                    placeholder="a question, with or without a file",
                )  # fmt: skip
                medium = gr.Dropdown(label="Take the next file as", visible=False, elem_id="medium")
                clear = gr.Button("Forget what was said")
            with gr.Column(scale=6, min_width=320):
                gr.Markdown("### What the experts did\nOrange: how much of a patch or a word went to new experts. "
                            "Numbers below words: the chosen experts (n0 is the first new one). Point at either "
                            "for the weights.")  # fmt: skip
                layer = gr.Dropdown([("", MEAN)], value=MEAN, label="Layer")
                with gr.Row():
                    first = gr.HTML(elem_id="first", min_width=280)
                    second = gr.HTML(elem_id="second", min_width=280)
        built.load(layers, model, layer)
        built.load(media, model, medium)
        asked = box.submit(
            submit, [box, chat, talk, seen, model, other, layer, medium], [chat, box, talk, seen, first, second],
            concurrency_id="model", concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
        layer.change(draw, [seen, layer], [first, second], api_visibility="private", show_progress="hidden")
        emptied = [chat, talk, seen, first, second, box]
        # Listeners run in their order: an answer must have ended before it is forgotten, or its next piece comes back.
        for forgets in (clear.click, model.change):
            forgets(None, cancels=[asked], api_visibility="private")
        clear.click(reset, None, emptied, api_visibility="private")
        model.change(reset, None, emptied, api_visibility="private").then(layers, model, layer).then(
            media, model, medium
        )
    return built


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def serve(page: Page, *, host: str, port: int) -> None:
    """Serves the page until it is closed with Ctrl-C.

    Raises:
      MoextendError: gradio is not installed, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MoextendError(f"the page needs gradio: {extra_hint('web')} (or ask at the terminal: leave --web out)")
    page.models[page.start].open()
    warming = threading.Thread(target=warm_up, args=(page,), daemon=True)  # while gradio is imported, and after
    warming.start()
    from gradio.themes import Soft  # pyright: ignore[reportMissingImports]

    fonts = ["system-ui", "sans-serif"]
    try:
        _, address, _ = blocks(page, after=warming).launch(
            server_name=host, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True,
            theme=Soft(font=fonts, font_mono=["ui-monospace", "monospace"]), css=CSS, footer_links=[],
            ssr_mode=False, max_file_size=LARGEST, enable_monitoring=False, pwa=False, mcp_server=False,
        )  # fmt: skip
    except OSError as error:
        raise MoextendError(f"{host}:{port} cannot be served: {error}; name another with --port") from None
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    threading.Event().wait()
