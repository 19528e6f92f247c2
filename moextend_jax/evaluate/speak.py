"""One prompt or conversation, with or without items, in; the model's words, piece by piece, out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from moextend_jax import distributed
from moextend_jax.config import IGNORE, IMAGE, Batch, Medium, MoextendError
from moextend_jax.data.conversations import Encoded, encode_dialogue
from moextend_jax.data.readers import given
from moextend_jax.data.writing import Spans
from moextend_jax.evaluate.asking import generator_of
from moextend_jax.evaluate.prompts import Prompt, prompt_batch
from moextend_jax.generate import Sampling
from moextend_jax.media import KINDS
from moextend_jax.media.image import as_rgb, decode_image, is_finite, turned
from moextend_jax.mesh import place_whole, row_shards
from moextend_jax.runs.askable import Askable

BUCKET = 64
"""Prompts are padded to a multiple of this, so that prompts of many lengths share a compiled program."""

Turn = dict[str, str]
Picture = str | Path | bytes | Image.Image | np.ndarray
"""A file's name or content, or a picture: PIL's, or uint8 `[height, width, 3]` or `[height, width]`."""
Item = Any
"""Of a medium: a file's name or content, of pictures any `Picture`."""
Items = Mapping[str, Sequence[Item]]


def speak(
    opened: Askable,
    prompt: str | Sequence[Turn],
    *,
    items: Items | None = None,
    plain: bool | None = None,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    seed: int = 0,
    ids: list[int] | None = None,
) -> Iterator[str]:
    """Yields text as it is generated.

    Args:
      prompt: a question, or turns that end in one, with a mark where each item stands (`<image>`).
      items: what is shown, by medium, in the order of the marks.
      plain: whether the model continues the prompt as it is, without the chat template; None: as the model does. The
        text then goes on where the prompt ends, with the space between them.
      ids: takes the ids of the text.

    Raises:
      MoextendError: an item that cannot be read or of a medium that the model does not have, or marks that are not the
        items'.
    """
    shown = show(opened, items or {})
    asked = encoded(opened, prompt, spans=shown.spans, plain=plain)
    batch, before = batch_of(opened, asked, shown), text_before(opened, asked, plain=plain)
    ids = [] if ids is None else ids
    printed = ""
    placed = place_whole(batch, opened.mesh)
    for ids_B in generator_of(opened).stream(
        opened.arrays, placed, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
    ):
        if ids_B[0] in opened.tokenizer.ends:
            break
        ids.append(int(ids_B[0]))
        text = opened.tokenizer.decode(ids, after=before)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # half of a character: its other bytes come next
        yield text[len(printed) :]
        printed = text
    if rest := opened.tokenizer.decode(ids, after=before)[len(printed) :]:  # half a character, where the tokens ran out
        yield rest


def generate_command(
    opened: Askable, prompts: Iterable[str], *, items: Items, as_json: bool = False, **options: Any
) -> None:
    """`moextend generate`: answers each prompt, about the same items.

    Args:
      prompts: those of process 0, which alone may have the standard input that they come from.
      as_json: a line {"prompt", "answer"} for each, instead of the words as they are made.
      options: as `speak`.
    """
    if jax.process_count() > 1:
        of_first = prompts
        prompts = distributed.from_first(lambda: [*of_first])
    for prompt in prompts:
        pieces = speak(opened, prompt, items=items, **options)
        if as_json:
            print(json.dumps({"prompt": prompt, "answer": "".join(pieces)}, ensure_ascii=False), flush=True)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def encoded(opened: Askable, prompt: str | Sequence[Turn], *, spans: Spans, plain: bool | None) -> Encoded:
    """Ids that end where the answer begins. spans: by medium the tokens of each item that is shown."""
    check_media(opened, spans)
    shows = any(spans.values())
    if is_plain(opened, plain):
        if shows or not isinstance(prompt, str):
            raise MoextendError(
                "a prompt that is continued as plain text has neither images nor turns: leave them out, or set --plain "
                "false"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # half of a pair, which Python can spell
            raise MoextendError(f"prompt: text that is not UTF-8: {error}") from None
        ids_L = np.array([*opened.tokenizer.prefix, *opened.tokenizer.encode(prompt)], np.int32)
        if not len(ids_L):
            raise MoextendError(
                "prompt: a prompt without tokens, and the model has none that texts begin with: give some text"
            )
        return Encoded(ids_L, np.full_like(ids_L, IGNORE), np.full_like(ids_L, -1), np.ones_like(ids_L), {})
    turns = [question(opened, prompt, spans)] if isinstance(prompt, str) else prompt
    return encode_dialogue(turns, items=spans, tokenizer=opened.tokenizer, recipe=opened.recipe)


def check_media(opened: Askable, spans: Spans) -> None:
    """Raises MoextendError for an item of a medium that the model does not have."""
    for name, of in spans.items():
        if of and name not in opened.config.media:
            option = "--image" if name == IMAGE else f"--show {name}=FILE"
            raise MoextendError(f"{cannot(opened, name)}; or leave out {option}")


def cannot(opened: Askable, name: str) -> str:
    """That a model does not have a medium, and what to do."""
    if name == IMAGE:
        return f"the {opened.name} model cannot see: {opened.to_see}"
    media = ", ".join(opened.config.media) or "none"
    return f"the {opened.name} model cannot take {name}; its media are {media}: choose another model"


def is_plain(opened: Askable, plain: bool | None) -> bool:
    return opened.plain if plain is None else plain


def text_before(opened: Askable, asked: Encoded, *, plain: bool | None) -> list[int]:
    """The ids that the new text goes on from: the last one of a text that is continued; an answer begins anew."""
    return asked.ids_L[-1:].tolist() if is_plain(opened, plain) else []


def told(opened: Askable, system: str | None, text: str, items: Mapping[str, Sized]) -> str | list[Turn]:
    """A question after what the model is told first, if anything."""
    return [{"from": "system", "value": system}, question(opened, text, items)] if system else text


def question(opened: Askable, text: str, items: Mapping[str, Sized]) -> Turn:
    """A turn that asks about these items, or their spans; without any mark of a medium its items go first, media in the
    model's order. Nothing need be typed beside a sound, which may be the question."""
    known, typed = opened.tokenizer.media, text
    for name in reversed([*(name for name in known if name in items), *(name for name in items if name not in known)]):
        mark = known[name].mark if name in known else ""
        text = text if mark and mark in text else f"{mark}\n" * len(items[name]) + text
    return {"from": "human", "value": text if typed else text.removesuffix("\n")}


def is_question(opened: Askable, text: str, items: Items) -> bool:
    """Whether there is anything to answer: a text, or a sound."""
    return bool(text.strip()) or any(items[name] and opened.config.media[name].kind == "audio" for name in items)


def batch_of(opened: Askable, prompt: Encoded, shown: Shown) -> Batch:
    """The prompt as row 0 of a batch, on the host; the mesh's other row shards get a row without tokens each."""
    media, rows = opened.config.media, row_shards(opened.mesh)
    rooms = {name: media[name].room(len(shown.arrays[name])) for name in media if name in shown.arrays}
    batch = prompt_batch(
        {0: Prompt(ids_L=prompt.ids_L, places_L=prompt.places_L, fused=prompt.fused)}, readers={}, rooms=rooms,
        media=tuple(opened.tokenizer.media), rows=rows, length=-(-len(prompt.ids_L) // BUCKET) * BUCKET,
    )  # fmt: skip
    arrays = {name: np.pad(of[None], ((0, rows - 1), *[(0, 0)] * of.ndim)) for name, of in shown.arrays.items()}
    return given(batch, media, arrays)


class Shown(NamedTuple):
    """Items as their towers take them, `[M, ...]` by medium, and the tokens that each of them takes."""

    arrays: dict[str, np.ndarray]
    spans: dict[str, list[int]]


def show(opened: Askable, items: Items) -> Shown:
    """Reads what is shown to a model. A sound that is too long is heard to where its medium ends.

    Raises:
      MoextendError: an item that cannot be read; of a medium that the model does not have `encoded` says it.
    """
    arrays, spans = {}, {}
    for name, files in items.items():
        medium = opened.config.media.get(name)
        if medium is None or not files:
            spans[name] = [1] * len(files)
            continue
        read = [read_item(file, name, medium) for file in files]
        kind, preparation = KINDS[medium.kind], opened.recipe.image_preparation
        arrays[name] = np.stack([kind.prepare(item, medium=medium, preparation=preparation, id=name) for item in read])
        spans[name] = [medium.span(kind.positions(item, medium)) for item in read]
    return Shown(arrays, {name: of for name, of in spans.items() if of})


def read_item(file: Item, name: str, medium: Medium) -> Any:
    """What `decode` of the medium's kind makes of a file; `name` is the medium's. Raises MoextendError as `show`."""
    if medium.kind == "image":
        return picture(file)
    encoded_file = file if isinstance(file, bytes) else _bytes_of(file, what=name)
    named = name if isinstance(file, bytes) else str(file)
    return KINDS[medium.kind].decode(encoded_file, name=named, id=named, medium=medium, cut=True)


def _bytes_of(file: Any, *, what: str) -> bytes:
    try:
        return Path(os.path.expanduser(file)).read_bytes()
    except TypeError:
        noun = "picture" if what == "image" else what
        raise MoextendError(f"{what}: a {type(file).__name__} is no {noun}, and no file's name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MoextendError(f"{what} {file} cannot be read: {reason}") from None


def picture(image: Any) -> Image.Image:
    """Raises MoextendError for what is no picture."""
    if isinstance(image, Image.Image):
        try:
            image.load()
            if 0 in image.size:
                raise ValueError("it has no pixels")
            if not is_finite(image):
                raise ValueError("it has NaN or infinite pixels")
            return as_rgb(turned(image))  # as of a file
        except Exception as error:  # it is read only now, and each of Pillow's decoders has its own way to fail
            raise MoextendError(f"the image cannot be read: {str(error) or type(error).__name__}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise MoextendError(
                f"image: an array must be uint8 [height, width, 3] or [height, width], not {image.dtype}"
                f"{list(image.shape)}"
            )
        return picture(Image.fromarray(image))
    if isinstance(image, bytes):
        return decode_image(image)
    return decode_image(_bytes_of(image, what="image"), name=str(image))
