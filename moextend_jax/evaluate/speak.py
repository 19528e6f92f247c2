"""One prompt, with or without a picture, in; the model's words, piece by piece, out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moextend_jax.config import IGNORE, Batch, MoextendError
from moextend_jax.data.conversations import encode_prompt
from moextend_jax.data.images import decode_image, prepare_image
from moextend_jax.evaluate.running import generator_of
from moextend_jax.generate import Sampling
from moextend_jax.mesh import place_whole, row_shards
from moextend_jax.runs.models_of import open_model
from moextend_jax.runs.results import model_row
from moextend_jax.runs.run import Run

BUCKET = 64
"""Prompts are padded to a multiple of this, so that prompts of many lengths share a compiled program."""


def speak(
    run: Run, *, which: str, prompt: str, image: Path | None, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[str]:
    """Yields text as it is generated. `which` is a row of `results.MODELS`; "base" continues the prompt as plain text,
    the others get it in the chat template."""
    if not model_row(which).sees and image is not None:
        raise MoextendError(f"the {which} model cannot see: leave out --image, or choose another --model")
    opened = open_model(run, which)
    batch = prompt_batch(run, prompt, image, plain=not model_row(which).sees)
    generator = generator_of(run, opened.model)
    ids: list[int] = []
    printed = ""
    for ids_B in generator.stream(
        opened.arrays,
        place_whole(batch, run.mesh),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    ):
        if ids_B[0] in run.tokenizer.ends:
            return
        ids.append(int(ids_B[0]))
        text = run.tokenizer.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # half of a character: its other bytes come next
        yield text[len(printed) :]
        printed = text


def prompt_batch(run: Run, prompt: str, image: Path | None, *, plain: bool) -> Batch:
    """The prompt as row 0 of a batch, on the host; the mesh's other row shards get a row without tokens each."""
    if plain:
        ids_L = np.array([*run.tokenizer.prefix, *run.tokenizer.encode(prompt)], np.int32)
        patches_L = np.full(len(ids_L), -1, np.int32)
    else:
        encoded = encode_prompt(
            prompt, images=int(image is not None), tokenizer=run.tokenizer, recipe=run.settings.recipe,
            patches=run.patches,
        )  # fmt: skip
        ids_L, patches_L = encoded.ids_L, encoded.patches_L
    rows, length = row_shards(run.mesh), -(-len(ids_L) // BUCKET) * BUCKET
    empty = ((0, rows - 1), (0, length - len(ids_L)))
    ids_BL = np.pad(ids_L[None], empty)
    images_BMhwc = None
    if image is not None:
        images_BMhwc = np.pad(_picture(run, image)[None, None], ((0, rows - 1), *[(0, 0)] * 4))
    return Batch(
        ids_BL=ids_BL,
        labels_BL=np.full_like(ids_BL, IGNORE),
        positions_BL=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments_BL=np.pad(np.ones_like(ids_L)[None], empty),
        patches_BL=np.pad(patches_L[None], empty, constant_values=-1),
        images_BMhwc=images_BMhwc,
    )


def _picture(run: Run, path: Path) -> np.ndarray:
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise MoextendError(f"image {path} cannot be read: {error.strerror}") from None
    assert run.config.vision is not None
    return prepare_image(
        decode_image(encoded, name=str(path)),
        size=run.config.vision.image_size,
        preparation=run.settings.recipe.image_preparation,
    )
