"""The Python interface: folders in; models that answer and show their routing, and whole runs, out.

This is what stays as it is from version to version; docs/python.md describes it. `moextend_jax` itself has these names.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from moextend_jax import configurations, preemption
from moextend_jax.config import IMAGE, Amount, Count, Medium, ModelConfig, MoextendError
from moextend_jax.evaluate.asking import asker_of
from moextend_jax.evaluate.questions import as_prompt
from moextend_jax.evaluate.routed import Routing, routing_of
from moextend_jax.evaluate.speak import (
    Item,
    Items,
    Picture,
    Turn,
    encoded,
    show,
    speak,
    text_before,
    told,
)
from moextend_jax.folders import folder
from moextend_jax.generate import Sampling
from moextend_jax.parsing import changed
from moextend_jax.runs.askable import Askable, described, open_place
from moextend_jax.runs.place import Place
from moextend_jax.settings import NotNegative, RunSettings, as_mapping, build, from_config_dict

FolderName = str | os.PathLike[str]
"""The name of a folder."""
Shows = Mapping[str, Item | Sequence[Item]]
"""What is shown, by medium: an item, or several."""
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
"""Of `Model.chat`'s messages, and what they are called inside."""


class Model:
    """A model that answers; `open` makes them. `config` has its sizes."""

    def __init__(self, opened: Askable):
        self._opened = opened

    def __repr__(self) -> str:
        return f"Model({self._opened.name!r}, {described(self.config)})"

    @property
    def config(self) -> ModelConfig:
        return self._opened.config

    def generate(
        self, text: str | Sequence[str], image: Picture | list[Picture | None] | None = None, *,
        items: Shows | list[Shows] | None = None, max_new_tokens: int = 64, temperature: float = 0.0, top_k: int = 0,
        seed: int = 0, system: str | None = None, plain: bool | None = None,
    ) -> Any:  # fmt: skip
        """The answer to a text, or the answers to a list of texts, which are computed together.

        Args:
          image: a file, its bytes, a PIL image, or an array uint8 `[height, width, 3]`; for a list of texts one for
            all, or a list with one (or None) for each. Several in one text stand in `items`, `{"image": [...]}`.
          items: a file, or several, of other media by their name, `{"sound": "a.wav"}`; for a list of texts alike.
          temperature: 0 takes the likeliest token; else draws from the `top_k` likeliest (0: all) with `seed`.
          system: what the model is told first.
          plain: continue the text without the chat template; None: as the model was taught.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system, "plain": plain}
        drawn = {"temperature": temperature, "top_k": top_k}
        _check_drawn(max_new_tokens=max_new_tokens, seed=seed, **drawn)
        if isinstance(text, str):
            of: Any = {"image": image, "items": items}  # which refuses lists
            return "".join(self.stream(text, **of, seed=seed, **drawn, **options))
        for one in (text := _sequence(text, "text is neither a str nor a list of them")):
            _check_text(one)
        images = image if isinstance(image, list) else [image] * len(text)
        others = items if isinstance(items, list) else [items] * len(text)
        if len(images) != len(text) or len(others) != len(text):
            raise MoextendError(f"{len(text)} texts, but {len(images)} images" if len(images) != len(text) else
                                f"{len(text)} texts, but items for {len(others)}")  # fmt: skip
        each = [shown(*pair) for pair in zip(images, others, strict=True)]
        if temperature:
            pairs = enumerate(zip(text, each, strict=True), seed)
            return ["".join(self.stream(one, items=of, seed=n, **drawn, **options)) for n, (one, of) in pairs]
        return self._together(text, each, **options)

    def stream(
        self, text: str, image: Picture | None = None, *, items: Shows | None = None, max_new_tokens: int = 64,
        temperature: float = 0.0, top_k: int = 0, seed: int = 0, system: str | None = None, plain: bool | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The answer piece by piece, as it is made."""
        _check_text(text)
        _check_drawn(max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, top_k=top_k)
        every = shown(image, items)
        return speak(
            self._opened, told(self._opened, system, text, every), items=every, plain=plain, seed=seed,
            max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_k),
        )  # fmt: skip

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, max_new_tokens: int = 64, temperature: float = 0.0,
        top_k: int = 0, seed: int = 0,
    ) -> str:  # fmt: skip
        """The answer to a conversation, `[{"role": "user", "content": "..."}, ...]`; roles are system, user, assistant.

        content: a text, or parts `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
        The other arguments are those of `generate`.
        """
        _check_drawn(max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, top_k=top_k)
        turns, images = [], list[Picture]()
        for message in _sequence(messages, "chat: messages are no list"):
            turn, pictures = _turn(message)
            turns.append(turn)
            images += pictures
        return "".join(
            speak(
                self._opened, turns, items={IMAGE: images}, plain=False, max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature, top_k), seed=seed,
            )
        )  # fmt: skip

    def routing(
        self, text: str, image: Picture | None = None, *, items: Shows | None = None, answer: str | None = None,
        system: str | None = None, plain: bool | None = None,
    ) -> Routing:  # fmt: skip
        """Which experts each token of a prompt goes to, and of the answer to it where one is given."""
        for one in (text, *(() if answer is None else (answer,))):
            _check_text(one)
        opened, every = self._opened, shown(image, items)
        turns = told(opened, system, text, every)
        return routing_of(opened, turns, items=every, answer=answer, plain=plain)

    def _together(self, texts: Sequence[str], each: Sequence[Items], **options: Any) -> list[str]:
        opened, most = self._opened, options.pop("max_new_tokens")
        prompts, earlier, arrays = [], [], {name: list[np.ndarray]() for name in opened.config.media}
        for text, items in zip(texts, each, strict=True):
            read = show(opened, items)
            turns = told(opened, options["system"], text, read.spans)
            asked = encoded(opened, turns, spans=read.spans, plain=options["plain"])
            rows = {}
            for name, of in read.arrays.items():
                rows[name] = tuple(range(len(arrays[name]), len(arrays[name]) + len(of)))
                arrays[name] += list(of)
            prompts.append(as_prompt(asked, items=rows))
            earlier.append(text_before(opened, asked, plain=options["plain"]))
        answers = [""] * len(prompts)
        readers = {name: _Shown(opened.config.media[name], np.stack(of)) for name, of in arrays.items() if of}
        for completed in asker_of(opened, readers=readers).complete(prompts, max_new_tokens=most):
            for index, ids in completed:
                answers[index] = opened.tokenizer.decode(ids, after=earlier[index])
        return answers


def shown(image: Picture | None, items: Shows | None) -> dict[str, Sequence[Any]]:
    """What is shown, by medium, as lists."""
    if items is not None and not isinstance(items, Mapping):
        raise MoextendError(f'items is a {type(items).__name__}, not files by medium, {{"sound": ["a.wav"]}}')
    if isinstance(image, list | tuple):
        raise MoextendError('image is one picture; show several in one text as items={"image": [...]}')
    if image is not None and IMAGE in (items or {}):
        raise MoextendError("both image and items show an image: give all of them in items")
    single = str | bytes | os.PathLike | Image.Image | np.ndarray
    every: dict[str, Sequence[Any]] = {
        name: [of] if isinstance(of, single) else _sequence(of, f"items: {name} is no file and no list of files")
        for name, of in (items or {}).items()
    }
    return ({} if image is None else {IMAGE: [image]}) | every


def open(  # noqa: A001
    path: FolderName, *, model: str | None = None, base: FolderName | None = None, vision: FolderName | None = None,
    feature_layer: int | None = None, recipe: str | None = None, dtype: str | None = None,
) -> Model:  # fmt: skip
    """A model of a folder: a work directory, or a checkpoint, imported, exported or as published.

    Args:
      model: which model of a work directory: base, aligned, probed, moextend (the default) or full.
      base: folder of the base, for a checkpoint that holds an extension alone.
      vision: folder of a vision tower.
      feature_layer: the tower's layer that the projector reads, for a checkpoint that does not say so.
      recipe: how prompts and images are prepared, paper or released, for a checkpoint that does not say so.
      dtype: element type of the computation, float32 or bfloat16; None: as stored, or as trained.

    Raises:
      MoextendError: nothing that could be opened is there, or something is wrong with it.
    """
    for name, value in {"model": model, "recipe": recipe, "dtype": dtype}.items():
        build(str | None, value, where=name)
    build(int | None, feature_layer, where="feature_layer")
    place = Place(
        checkpoint=_folder(path), model=model, base=_maybe(base), vision=_maybe(vision), feature_layer=feature_layer,
        recipe=recipe, dtype=dtype,
    )  # fmt: skip
    return Model(open_place(place))


def run(
    config: str | os.PathLike[str] | RunSettings | ConfigDict | Mapping[str, Any], *, workdir: FolderName,
    data: FolderName | Sequence[FolderName] | None = None, resume_from: FolderName | None = None, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """`moextend run`: all stages, evaluation and report; goes on where it stood. Returns what summary.json holds.

    Args:
      config: name or file of a configuration, as "demo" or "demo:released", or settings.
      data: own conversations for every stage, as `--data`: a file or a folder, or several.
      changes: settings to change, groups as mappings: `finetune={"steps": 20}, seed=1`.
    """
    from moextend_jax.commands import TrainingData, whole_run

    named = isinstance(config, str | os.PathLike)
    given = configurations.load(os.fspath(config)) if named else as_mapping(config)
    if not isinstance(given, Mapping):
        raise MoextendError(f"a {type(config).__name__} is no configuration: give its name, its file, or settings")
    if data is not None:
        several = _sequence(
            [data] if isinstance(data, str | os.PathLike) else data, "data is no file, nor a list of them"
        )
        given = changed(given, dict.fromkeys(TrainingData.settings, ",".join(_name(one, "file") for one in several)))
    settings = from_config_dict(_changed(given, changes))
    with _own_signals():
        return whole_run(settings, _folder(workdir), resume_from=_maybe(resume_from))


# --- inside -----------------------------------------------------------------------------------------------------------


def _folder(named: FolderName) -> Path:
    return folder(_name(named))


def _name(named: FolderName, of: str = "folder") -> str:
    if not isinstance(named, str | os.PathLike):
        raise MoextendError(f"a {type(named).__name__} is no {of}'s name")
    return os.fspath(named)


def _maybe(named: FolderName | None) -> Path | None:
    return None if named is None else _folder(named)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise MoextendError(f"a {type(text).__name__} is no text")


def _sequence(values: Any, mistake: str) -> list[Any]:
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
        return list(values)
    raise MoextendError(mistake)


def _check_drawn(**given: Any) -> None:
    """As the command checks its options."""
    kinds = {"max_new_tokens": Count, "temperature": NotNegative, "top_k": Amount, "seed": Amount}
    for name, value in given.items():
        build(kinds[name], value.item() if isinstance(value, np.generic) else value, where=name)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Signals mean afterwards what they meant before: a run listens for those that announce its end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *preemption.SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and handler != signal.getsignal(number):
                signal.signal(number, handler)


class _Shown:
    """Items `[n, ...]` of a medium that an `Asker` reads by row."""

    def __init__(self, medium: Medium, arrays: np.ndarray):
        self.medium, self.field, self._arrays = medium, medium.field, arrays

    def read(self, rows_BM: np.ndarray, /) -> np.ndarray:
        arrays = self._arrays[np.maximum(rows_BM, 0)]
        return np.where((rows_BM >= 0).reshape(*rows_BM.shape, *[1] * (arrays.ndim - 2)), arrays, 0)


def _turn(message: Mapping[str, Any]) -> tuple[Turn, list[Picture]]:
    """A message as a turn, and its pictures."""
    if not isinstance(message, Mapping):
        raise MoextendError(f"chat: a message is a {type(message).__name__}, not a role with its content")
    role = message.get("role")
    content: Any = message.get("content")
    if role not in tuple(ROLES):
        raise MoextendError(f"chat: role {role!r} is none of {', '.join(ROLES)}")
    try:
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        images: list[Picture] = [part["image"] for part in parts if part["type"] == "image"]
        text = "\n".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
    except (KeyError, TypeError):
        raise MoextendError("chat: content is neither a text nor parts of type text and image") from None
    return {"from": ROLES[role], "value": text}, images


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in changes.items():
        group = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _changed(merged[name], value) if group else value
    return merged
