"""Image files to the pixels a CLIP tower expects.

Goes in: encoded bytes of any format Pillow reads. Comes out: `image_hwc` float32, normalised by CLIP's mean and
standard deviation.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

from moextend_jax.config import MoextendError

MEAN_c = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD_c = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def decode_image(encoded: bytes, *, name: str = "image") -> Image.Image:
    """The picture as RGB; `name` is for the error message."""
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MoextendError(f"cannot read {name} as an image: {error}") from error


def prepare_image(image: Image.Image, *, size: int, preparation: Literal["pad", "crop"]) -> np.ndarray:
    """Scales a picture to `size` x `size` pixels with bicubic resampling and normalises it.

    `pad` (LLaVA's settings, the paper) first widens the short side with CLIP's mean colour so that nothing is
    lost; `crop` (CLIP's own, the released code) scales the short side to `size` and cuts out the centre.
    """
    image = image.convert("RGB")
    image = _pad(image, size) if preparation == "pad" else _crop(image, size)
    return (np.asarray(image, np.float32) / np.float32(255) - MEAN_c) / STD_c


def _pad(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    if min(image.size) != side:
        colour = tuple(int(255 * mean) for mean in MEAN_c)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    long = int(size * long / short)
    image = image.resize((size, long) if image.width <= image.height else (long, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
