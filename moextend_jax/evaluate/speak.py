"""One prompt, with or without a picture, in; the model's words, piece by piece, out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax import pipeline
from moextend_jax.config import IGNORE, Batch, MoextendError
from moextend_jax.data.conversations import encode_prompt
from moextend_jax.data.images import decode_image, prepare_image
from moextend_jax.generate import Generator, Sampling
from moextend_jax.pipeline import Run

BUCKET = 64
"""Prompts are padded to a multiple of this, so that prompts of many lengths share a compiled program."""


def speak(
    run: Run, *, which: str, prompt: str, image: Path | None, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[str]:
    """Yields text as it is generated. `which` is "base" (pretrained, prompt continued as plain text), "aligned",
    "moextend" or "full" (prompt in the chat template)."""
    if which == "moextend":
        model, arrays = pipeline.moextend_model(run)
    else:
        model = pipeline.abstract(run.config)
        arrays = pipeline.full_model(run) if which == "full" else pipeline.kappa(run)
    assert run.config.vision is not None
    recipe, patches = run.settings.recipe, run.config.vision.patches
    if which == "base":
        if image is not None:
            raise MoextendError("the base model cannot see: leave out --image, or choose another --model")
        ids = [run.tokenizer.bos, *run.tokenizer.encode(prompt)]
        patches_L = np.full(len(ids), -1, np.int32)
    else:
        encoded = encode_prompt(
            prompt, images=int(image is not None), tokenizer=run.tokenizer, recipe=recipe, patches=patches
        )
        ids, patches_L = encoded.ids_L, encoded.patches_L
    length = -(-len(ids) // BUCKET) * BUCKET
    rest = length - len(ids)
    ids_BL = np.pad(np.asarray(ids, np.int32), (0, rest))[None]
    batch = Batch(
        ids_BL=ids_BL,
        labels_BL=np.full_like(ids_BL, IGNORE),
        positions_BL=np.arange(length, dtype=np.int32)[None],
        segments_BL=(np.arange(length) < len(ids)).astype(np.int32)[None],
        patches_BL=np.pad(patches_L, (0, rest), constant_values=-1)[None],
        images_BMhwc=None if image is None else _picture(run, image)[None, None],
    )
    tags = run.config.tags
    generator = Generator(model, eos=run.tokenizer.eos, suppress=(tags.start, tags.end, tags.pad))
    said: list[int] = []
    shown = ""
    for ids_B in generator.stream(
        arrays, jax.tree.map(jnp.asarray, batch), max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
    ):
        if ids_B[0] == run.tokenizer.eos:
            return
        said.append(int(ids_B[0]))
        text = run.tokenizer.decode(said)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # half of a character: its other bytes come next
        yield text[len(shown) :]
        shown = text


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
