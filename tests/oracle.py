"""Reference numbers of the released PyTorch code, in our shapes: models, batches and arrays of ../shared/oracle.

In: names of that folder's files (its README describes them). Out: models, `Batch`es and arrays by our paths.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moextend_jax.checkpoints import huggingface, names
from moextend_jax.config import Batch, ImageTags, ModelConfig
from moextend_jax.models.moextend import MoExtend

FOLDER = Path(__file__).parents[2] / "shared" / "oracle"
SLICE = Path(__file__).parent / "data" / "oracle_slice.npz"
"""A few of the arrays, committed, so that some parity runs anywhere; made by data/make_oracle_slice.py."""

needs_oracle = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference values: {FOLDER} is absent")

PATCHES, START = 4, 300
COEFFICIENT = 0.001
MODELS = ("vision", "vision_gate", "moextend_init", "moextend_pert")


class Loaded(NamedTuple):
    """`model` is the structure without arrays."""

    model: MoExtend
    arrays: dict[str, jax.Array]
    config: ModelConfig


@functools.cache
def load(name: str, *, remat: Any = "none") -> Loaded:
    folder = FOLDER / name
    config = ModelConfig(
        decoder=huggingface.read_decoder_config(folder),
        vision=huggingface.read_vision_config(FOLDER / "clip", feature_layer=-1),
        extension=huggingface.read_extension_config(folder),
        dtype="float32",
        remat=remat,
        tags=ImageTags(start=START, end=START + 1, pad=START + 2),
    )
    model = nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
    arrays = huggingface.read_parameters(folder, model, table="released", config=config)
    return Loaded(model, {path: jnp.asarray(array) for path, array in arrays.items()}, config)


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"{name}.npz"))


def pixels_nhwc() -> np.ndarray:
    return einops.rearrange(reference("images")["pixel_values"], "n c h w -> n h w c")


def batch(name: str, *, images: int = 0) -> Batch:
    """A batch of batches.npz with room for at least `images` images per row."""
    arrays = reference("batches")
    ids_BL, mask_BL = arrays[f"{name}/input_ids"], arrays[f"{name}/attention_mask"]
    order = reference("images").get(f"{name}/image_index", np.zeros(0, int))
    return with_images(ids_BL, arrays[f"{name}/labels"], mask_BL.astype(np.int32), list(order), room=images)


def with_images(
    ids_BL: np.ndarray, labels_BL: np.ndarray, segments_BL: np.ndarray, images: list[int], *, room: int = 0
) -> Batch:
    """A batch whose k-th start tag (row-major) stands for image `images[k]`."""
    B, L = ids_BL.shape
    patches_BL = np.full((B, L), -1, np.int32)
    starts = [np.flatnonzero((ids_BL[row] == START) & (segments_BL[row] > 0)) for row in range(B)]
    most = max(room, *map(len, starts))
    pixels, left = pixels_nhwc(), list(images)
    images_BMhwc = np.zeros((B, most, *pixels.shape[1:]), np.float32)
    for row in range(B):
        for m, start in enumerate(starts[row]):
            patches_BL[row, start + 1 : start + 1 + PATCHES] = np.arange(PATCHES) + m * PATCHES
            images_BMhwc[row, m] = pixels[left.pop(0)]
    positions_BL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    return Batch(ids_BL, labels_BL, positions_BL, segments_BL, patches_BL, images_BMhwc if most else None)


def assert_close_by_file_name(ours: dict[str, Any], theirs: dict[str, np.ndarray], config: ModelConfig, *, atol: float):
    """Compares our stacked arrays with the released code's, tensor by tensor, none left out on either side."""
    tensors = [tensor for tensor in names.tensors("released", config) if tensor.path in ours]
    assert {tensor.file for tensor in tensors} == set(theirs)
    for tensor in tensors:
        layout = tensor.layout
        value = einops.rearrange(theirs[tensor.file], layout, **names.axis_sizes(layout, config.sizes()))
        np.testing.assert_allclose(ours[tensor.path][tensor.index], value, atol=atol, rtol=0, err_msg=tensor.file)
