"""Greedy generation: the same tokens with a cache and without, by the same logits."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moextend_jax.config import Batch
from moextend_jax.generate import Generator
from moextend_jax.parameters import with_arrays
from parity import sets

pytestmark = pytest.mark.smoke


def test_greedy_tokens_and_the_logits_that_chose_them(folder: Path):
    theirs = dict(sets.arrays(folder, "generate"))
    structure, arrays, config = sets.model(folder, "moextend_pert")
    prompt, written = theirs.pop("prompt"), theirs.pop("tokens_cache")
    length, new = prompt.shape[1], written.shape[1] - prompt.shape[1]
    suppress = tuple(range(sets.start(folder), config.decoder.vocab_size))
    images = _images_of(folder, prompt)

    def batch(ids_BL: np.ndarray) -> Batch:
        rows = sets.unlabelled(folder, ids_BL, np.ones_like(ids_BL), images)
        return jax.tree.map(jnp.asarray, sets.batch(folder, rows))

    generator = Generator(structure, eos=-1, suppress=suppress)
    completed = tiny.complete(generator, arrays, batch(prompt), max_new_tokens=new)
    np.testing.assert_array_equal(np.concatenate([prompt, completed], axis=1), written)

    @jax.jit
    def logits_of(arrays, batch: Batch):
        model = with_arrays(structure, arrays)
        return model.decoder.logits(model(batch).hidden_BLD)

    written_again = theirs.pop("tokens_nocache", written)
    logits_BLV = np.array(logits_of(arrays, batch(written_again)))[:, length - 1 :]
    last = theirs.pop("logits_last")
    last_BLV = last if last.ndim == 3 else last[None]
    assert last_BLV.shape[1] in (new, new + 1)  # with the logits after the last token, or without
    np.testing.assert_allclose(logits_BLV[:, : last_BLV.shape[1]], last_BLV, atol=sets.COMPOSED, rtol=0)
    logits_BLV[..., list(suppress)] = -np.inf
    np.testing.assert_array_equal(logits_BLV[:, :-1].argmax(axis=-1), written_again[:, length:])
    assert not theirs, "unknown arrays"


def _images_of(folder: Path, prompt: np.ndarray) -> list[int]:
    """Images of the prompt: as images.npz says, or those whose names stand in bytes behind the start tags."""
    order = sets.arrays(folder, "images").get("generate/image_index")
    if order is not None:
        return order.reshape(-1).tolist()
    images, start = [], sets.start(folder)
    for row, place in zip(*np.nonzero(prompt == start), strict=True):
        inside = prompt[row, place + 1 :].tolist()
        name = bytes(piece for piece in inside[: inside.index(start + 1)] if piece < 256).decode()
        images.append(sets.manifest(folder)["images"].index(name))
    return images
