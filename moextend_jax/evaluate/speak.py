"""One prompt or conversation, with or without pictures, in; the model's words, piece by piece, out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moextend_jax.config import IGNORE, Batch, MoextendError
from moextend_jax.data.conversations import MARK, Encoded, encode_dialogue
from moextend_jax.data.images import decode_image, prepare_image
from moextend_jax.evaluate.running import generator_of
from moextend_jax.generate import Sampling
from moextend_jax.mesh import place_whole, row_shards
from moextend_jax.runs.askable import Askable

BUCKET = 64
"""Prompts are padded to a multiple of this, so that prompts of many lengths share a compiled program."""

Turn = dict[str, str]
Picture = str | Path | bytes | Image.Image | np.ndarray
"""A file's name or content, or a picture: PIL's, or uint8 `[height, width, 3]` or `[height, width]`."""


def speak(
    opened: Askable,
    prompt: str | Sequence[Turn],
    *,
    images: Sequence[Picture] = (),
    plain: bool | None = None,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    seed: int = 0,
) -> Iterator[str]:
    """Yields text as it is generated.

    Args:
      prompt: a question, or turns that end in one, with an `<image>` mark where each image stands.
      plain: whether the model continues the prompt as it is, without the chat template; None: as the model does.

    Raises:
      MoextendError: an image that cannot be read or that the model cannot see, or marks that are not the images'.
    """
    batch = batch_of(opened, encoded(opened, prompt, images=len(images), plain=plain), images=images)
    ids: list[int] = []
    printed = ""
    for ids_B in generator_of(opened).stream(
        opened.arrays,
        place_whole(batch, opened.mesh),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    ):
        if ids_B[0] in opened.tokenizer.ends:
            break
        ids.append(int(ids_B[0]))
        text = opened.tokenizer.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # half of a character: its other bytes come next
        yield text[len(printed) :]
        printed = text
    yield opened.tokenizer.decode(ids)[len(printed) :]


def generate_command(
    opened: Askable, prompts: Iterable[str], *, image: Path | None, as_json: bool = False, **options: Any
) -> None:
    """`moextend generate`: answers each prompt, about the same picture.

    Args:
      as_json: a line {"prompt", "answer"} for each, instead of the words as they are made.
      options: as `speak`.
    """
    images = () if image is None else (image,)
    for prompt in prompts:
        pieces = speak(opened, prompt, images=images, **options)
        if as_json:
            print(json.dumps({"prompt": prompt, "answer": "".join(pieces)}, ensure_ascii=False), flush=True)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def encoded(opened: Askable, prompt: str | Sequence[Turn], *, images: int, plain: bool | None) -> Encoded:
    """Ids that end where the answer begins."""
    if images and not opened.sees:
        raise MoextendError(f"the {opened.name} model cannot see: leave out --image, or choose another model")
    if opened.plain if plain is None else plain:
        if images or not isinstance(prompt, str):
            raise MoextendError("a prompt that is continued as plain text has neither images nor turns")
        ids_L = np.array([*opened.tokenizer.prefix, *opened.tokenizer.encode(prompt)], np.int32)
        return Encoded(ids_L, np.full_like(ids_L, IGNORE), np.full_like(ids_L, -1), np.ones_like(ids_L), 0)
    turns = [question(prompt, images=images)] if isinstance(prompt, str) else prompt
    return encode_dialogue(
        turns, images=images, tokenizer=opened.tokenizer, recipe=opened.recipe, patches=opened.patches
    )


def told(system: str | None, text: str, *, images: int = 0) -> str | list[Turn]:
    """A question after what the model is told first, if anything."""
    return [{"from": "system", "value": system}, question(text, images=images)] if system else text


def question(text: str, *, images: int = 0) -> Turn:
    """A turn that asks; without any mark the images go first."""
    return {"from": "human", "value": f"{MARK}\n" * images + text if MARK not in text else text}


def batch_of(opened: Askable, prompt: Encoded, *, images: Sequence[Picture] = ()) -> Batch:
    """The prompt as row 0 of a batch, on the host; the mesh's other row shards get a row without tokens each."""
    rows, length = row_shards(opened.mesh), -(-len(prompt.ids_L) // BUCKET) * BUCKET
    empty = ((0, rows - 1), (0, length - len(prompt.ids_L)))
    ids_BL = np.pad(prompt.ids_L[None], empty)
    images_BMhwc = None
    if images:
        pixels_Mhwc = np.stack([pixels(opened, image) for image in images])
        images_BMhwc = np.pad(pixels_Mhwc[None], ((0, rows - 1), *[(0, 0)] * 4))
    return Batch(
        ids_BL=ids_BL,
        labels_BL=np.full_like(ids_BL, IGNORE),
        positions_BL=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments_BL=np.pad(np.ones_like(prompt.ids_L)[None], empty),
        patches_BL=np.pad(prompt.patches_L[None], empty, constant_values=-1),
        images_BMhwc=images_BMhwc,
    )


def pixels(opened: Askable, image: Picture) -> np.ndarray:
    """`image_hwc` as the model's tower expects it."""
    assert opened.config.vision is not None
    size, preparation = opened.config.vision.image_size, opened.recipe.image_preparation
    return prepare_image(picture(image), size=size, preparation=preparation)


def picture(image: Any) -> Image.Image:
    """Raises MoextendError for what is no picture."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise MoextendError(
                f"image: an array must be uint8 [height, width, 3] or [height, width], not {image.dtype}"
                f"{list(image.shape)}"
            )
        return Image.fromarray(image)
    if isinstance(image, bytes):
        return decode_image(image)
    try:
        encoded_file = Path(image).read_bytes()
    except TypeError:
        raise MoextendError(f"image: a {type(image).__name__} is no picture, and no file's name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MoextendError(f"image {image} cannot be read: {reason}") from None
    return decode_image(encoded_file, name=str(image))
