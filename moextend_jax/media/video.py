"""Encoded moving pictures to what a picture tower expects of each.

Goes in: the bytes of a GIF, WebP, APNG or AVIF animation, or of a TIFF of several pages. Comes out: `medium.frames`
pictures, evenly chosen, then `video_thwc` float32, each as `media/image.py` prepares an image; or a `Fault`. Of fewer
frames the last is repeated. Films (MP4 and its like) are not read: no decoder that is small and well kept reads them.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from moextend_jax.config import Medium, VisionConfig
from moextend_jax.faults import Fault
from moextend_jax.media.image import MOST_PIXELS, as_rgb, is_finite, pictures, prepare_image, tower_of

TOWERS = (VisionConfig,)
SUFFIXES = ("gif", "webp", "png", "apng", "avif", "tif", "tiff")
MOST_FRAMES = 10_000
"""Of a file."""
MOST_DECODED = 2**30
"""Pixels of all frames before the last that is chosen: to know one, an animation decodes those before it."""

FILMS = {"ftyp": "MP4", "moov": "MP4", "mdat": "MP4", "\x1aE\xdf\xa3": "Matroska or WebM", "AVI ": "AVI"}


def decode(
    encoded: bytes, *, name: str = "video", id: str = "", medium: Medium, upright: bool = True, cut: bool = False
) -> tuple[Image.Image, ...]:
    """`medium.frames` pictures as RGB."""
    what = f"{name} as a video"
    if film := _film(encoded):
        advice = "convert it to an animation, for example with ffmpeg -i IN -vf fps=2,scale=336:-1 OUT.webp"
        raise Fault(f"cannot read {what}: it is {film}, which is not read; {advice}", "not_video", id or name)
    with pictures(encoded, kind="not_video", what=what, id=id or name) as (image, fault):
        first, count = _frames(image)
        # Pillow reads a GIF or APNG that is cut off behind a frame as one of fewer frames.
        if (image.format == "GIF" and cast(Any, image).fp.ended) or (image.format == "PNG" and b"IEND" not in encoded):
            raise fault("truncated", f"it ends after frame {count}, not as such a file ends")
        if count > MOST_FRAMES:
            raise fault("oversized", f"it has more than {MOST_FRAMES} frames")
        chosen = chosen_frames(count, medium.frames)
        size = image.width * image.height
        if size * len(set(chosen)) > MOST_PIXELS or size * (chosen[-1] + 1) > MOST_DECODED:
            raise fault("oversized", f"{count} frames of {image.width} x {image.height} pixels are too many")
        frames: dict[int, Image.Image] = {}
        for n in sorted(set(chosen)):
            image.seek(first + n)
            if image.width * image.height > size:  # pages of a TIFF need not be alike
                raise fault("oversized", f"frame {n} has {image.width} x {image.height} pixels, more than the first")
            image.load()
            if not is_finite(image):
                raise fault("not_finite", f"frame {n} has NaN or infinite pixels")
            frames[n] = as_rgb(image.copy())
        return tuple(frames[n] for n in chosen)


def _film(encoded: bytes) -> str:
    heads = encoded[:4], encoded[4:8], encoded[8:12]
    if heads[1] == b"ftyp" and heads[2] in (b"avif", b"avis"):
        return ""
    return next((film for magic, film in FILMS.items() if magic.encode("latin-1") in heads), "")


def _frames(image: Image.Image) -> tuple[int, int]:
    """The number of the first frame, and how many there are; of a TIFF no more pages are looked for than may be."""
    if image.format == "TIFF":
        count = 1
        while count <= MOST_FRAMES:
            try:
                image.seek(count)
            except EOFError:
                break
            count += 1
        image.seek(0)
        return 0, count
    still = bool(getattr(image, "default_image", False))  # of an APNG: what is shown where animations are not
    return int(still), int(getattr(image, "n_frames", 1)) - still


def chosen_frames(count: int, frames: int) -> list[int]:
    """`frames` of the numbers 0..count-1, the first and the last among them; of fewer all, the last again."""
    if frames >= count:
        return [min(n, count - 1) for n in range(frames)]
    return np.linspace(0, count - 1, frames).round().astype(int).tolist()


def prepare(
    item: tuple[Image.Image, ...], *, medium: Medium, preparation: Literal["pad", "crop"], id: str = ""
) -> np.ndarray:
    """`video_thwc`."""
    tower, size = tower_of(medium), tower_of(medium).image_size
    return np.stack([prepare_image(frame, size=size, preparation=preparation, tower=tower, id=id) for frame in item])


def positions(item: object, medium: Medium) -> int:
    return medium.positions


def input_shape(medium: Medium) -> tuple[int, ...]:
    size = tower_of(medium).image_size
    return medium.frames, size, size, 3


def span_of_file(encoded: bytes, *, medium: Medium, **_: object) -> int:
    return medium.positions
