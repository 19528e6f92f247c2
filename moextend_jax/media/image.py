"""Encoded images to the pixels a picture tower expects.

Goes in: the bytes of an image file in one of `FORMATS`. Comes out: `image_hwc` float32, normalised by its tower's mean
and standard deviation; or a `Fault` of `faults.py`. Nothing here trusts the file: how large a picture is is known
from its header before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from moextend_jax.config import Medium, MoextendError, VisionConfig
from moextend_jax.faults import MOST_BYTES, Fault, wrong_size

MEAN_c = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD_c = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
LEVELS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "clip": (MEAN_c, STD_c),
    "half": (np.full(3, 0.5, np.float32), np.full(3, 0.5, np.float32)),
    "imagenet": (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)),
}
"""Mean and standard deviation of colours by `VisionConfig.levels`."""
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CLIP = VisionConfig()
SUFFIXES = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm", "jp2", "ico", "avif", "heic")
TOWERS = (VisionConfig,)

MOST_PIXELS = 89_478_485
"""Of a picture as its header says: a quarter of a GB as RGB, and where Pillow begins to warn."""
MOST_SCALED = 2**28
"""Pixels of the square around a picture, or of one scaled before its centre is cut out: a picture of few pixels that is
very long has more."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF")
"""Of Pillow's formats those that pictures come in. Others run programs (EPS) or take almost any file (TGA)."""
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of HEIC files."""
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
"""How files of the usual formats begin, also where no more of them is left."""


def decode_image(encoded: bytes, *, name: str = "image", id: str = "", upright: bool = True) -> Image.Image:
    """The picture as RGB, of an animation its first frame.

    Args:
      name: for the error message; id: for its `Fault`.
      upright: turned as its EXIF orientation says, which is how telephones save a picture. LLaVA never looked at it.
    """

    with pictures(encoded, kind="not_image", what=f"{name} as an image", id=id or name) as (image, fault):
        image.load()
        if not is_finite(image):
            raise fault("not_finite", "it has NaN or infinite pixels")
        return as_rgb(turned(image) if upright else image)


def is_finite(image: Image.Image) -> bool:
    """Whether no pixel is NaN or infinite, as those of mode F alone can be."""
    return image.mode != "F" or bool(np.isfinite(np.asarray(image)).all())


@contextlib.contextmanager
def pictures(
    encoded: bytes, *, kind: Literal["not_image", "not_video"], what: str, id: str
) -> Iterator[tuple[Image.Image, Callable[[str, object], Fault]]]:
    """A file of one or more pictures, opened, none of them larger than MOST_PIXELS; and what makes a fault. Whatever
    Pillow raises inside becomes one of `id`; `kind` is that of a file which is none, `what` for messages."""

    def fault(kind: str, why: object) -> Fault:
        return Fault(f"cannot read {what}: {why}", kind, id)

    if wrong := wrong_size(len(encoded)):
        raise fault(wrong, f"{len(encoded)} bytes are more than {MOST_BYTES}" if encoded else "it has no bytes")
    file = Watched(encoded)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise fault("oversized", f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
            if isinstance(image, TiffImageFile) and _is_raw_ycbcr(image):
                raise fault("unreadable", "a TIFF of YCbCr without compression is not read; save it as RGB")
            yield image, fault
    except Fault:
        raise
    except UnidentifiedImageError as error:
        if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIC:
            raise fault(kind, "it is HEIC, a telephone's format, which is not read; convert it to JPEG") from error
        if not _looks_like_image(encoded):
            raise fault(kind, f"it is none of {', '.join(FORMATS)}") from error
        cut = "truncated" if file.ended or _cut_riff(encoded) else "unreadable"
        raise fault(cut, "it begins as one, but its header is cut off or damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise fault("oversized", error) from error
    except MemoryError as error:
        raise fault("oversized", "not enough memory") from error
    except Exception as error:  # each of Pillow's decoders has its own way to fail on damaged data
        message = str(error) or type(error).__name__
        cut = isinstance(error, EOFError) or _cut_riff(encoded) or any(sign in message.lower() for sign in CUT)
        raise fault("truncated" if cut else "unreadable", message) from error


CUT = ("truncated", "not enough", "but only got", "end of file", "unexpected end")
"""How Pillow's decoders say that the data end too early."""


class Watched(io.BytesIO):
    """Notes whether a read asked for more than there was."""

    ended = False

    def read(self, size: int | None = -1, /) -> bytes:
        got = super().read(size)
        self.ended |= size is not None and len(got) < size
        return got


def _is_raw_ycbcr(image: TiffImageFile) -> bool:
    """Of such a pixel Pillow reads four bytes, where the file has three or fewer."""
    return image.info["compression"] == "raw" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 6


def _looks_like_image(encoded: bytes) -> bool:
    return encoded.startswith(MAGIC) or encoded[:4] + encoded[8:12] == b"RIFFWEBP" or encoded[4:12] == b"ftypavif"


def _cut_riff(encoded: bytes) -> bool:
    """A WebP file says how long it is."""
    return encoded[:4] == b"RIFF" and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the values of EXIF's orientation."""


def turned(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data: the picture itself is sound
        return image
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """Raises ValueError for grey levels that do not say which is white: beyond 16 bits, negative, fractions of 1."""
    if image.mode[0] in "IF":  # Pillow would cut every level above 255 off
        levels = np.asarray(image)
        least, most = levels.min(initial=0), levels.max(initial=0)
        if least < 0 or most >= 1 << 16 or (image.mode == "F" and (most > 255 or 0 < most <= 1)):
            raise ValueError(f"its grey levels are {least:g} to {most:g}: make them levels of 8 or 16 bits")
        if most > 255 or image.mode.startswith("I;16"):
            image = Image.fromarray((levels.astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def check_scaled(
    width: int, height: int, *, size: int, preparation: Literal["pad", "crop"], tower: VisionConfig = CLIP, id: str = ""
) -> None:
    """Raises a `Fault` where preparing a picture of this size would take more memory than MOST_SCALED pixels."""
    short, long = sorted((width, height))
    pixels = long * long if preparation == "pad" else size * int(size * long / short)
    if pixels > MOST_SCALED and not tower.stretched:
        raise Fault(f"image {id} of {width} x {height} pixels is too long and thin", "oversized", id)


def prepare_image(
    image: Image.Image, *, size: int, preparation: Literal["pad", "crop"], tower: VisionConfig = CLIP, id: str = ""
) -> np.ndarray:
    """Scales a picture to `size` x `size` pixels as `tower` has it and normalises it.

    `pad` (LLaVA's settings, the paper) first widens the short side with the tower's mean colour so that nothing is
    lost; `crop` (CLIP's own, the released code) scales the short side to `size` and cuts out the centre. A tower that
    takes pictures `stretched` (SigLIP) gets them so whichever it is.
    """
    return normalised(framed(image, size=size, preparation=preparation, tower=tower, id=id), tower)


def normalised(image: Image.Image | np.ndarray, tower: VisionConfig) -> np.ndarray:
    """`image_hwc` float32 of a picture's levels 0..255."""
    mean_c, std_c = LEVELS[tower.levels]
    return (np.asarray(image, np.float32) / np.float32(255) - mean_c) / std_c


def framed(
    image: Image.Image, *, size: int, preparation: Literal["pad", "crop"], tower: VisionConfig = CLIP, id: str = ""
) -> Image.Image:
    """The square of a picture that `prepare_image` normalises, as RGB."""
    check_scaled(*image.size, size=size, preparation=preparation, tower=tower, id=id)
    try:
        image = image.convert("RGB")
        if tower.stretched:
            return image.resize((size, size), RESAMPLING[tower.resample])
        return _pad(image, size, tower) if preparation == "pad" else _crop(image, size, tower)
    except MemoryError as error:
        raise Fault(
            f"image {id} of {image.width} x {image.height} pixels: not enough memory", "oversized", id
        ) from error


def _pad(image: Image.Image, size: int, tower: VisionConfig) -> Image.Image:
    side = max(image.size)
    if min(image.size) != side:
        colour = tuple(int(255 * mean) for mean in LEVELS[tower.levels][0])
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((size, size), RESAMPLING[tower.resample])


def _crop(image: Image.Image, size: int, tower: VisionConfig) -> Image.Image:
    short, long = sorted(image.size)
    long = int(size * long / short)
    image = image.resize((size, long) if image.width <= image.height else (long, size), RESAMPLING[tower.resample])
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# --- the kind `image` of media ----------------------------------------------------------------------------------------


def decode(
    encoded: bytes, *, name: str = "image", id: str = "", medium: Medium, upright: bool = True, cut: bool = False
) -> Image.Image:
    return decode_image(encoded, name=name, id=id, upright=upright)


def prepare(item: Image.Image, *, medium: Medium, preparation: Literal["pad", "crop"], id: str = "") -> np.ndarray:
    tower = tower_of(medium)
    return prepare_image(item, size=tower.image_size, preparation=preparation, tower=tower, id=id)


def positions(item: Image.Image, medium: Medium) -> int:
    return tower_of(medium).patches


def input_shape(medium: Medium) -> tuple[int, ...]:
    size = tower_of(medium).image_size
    return size, size, 3


def span_of_file(encoded: bytes, *, medium: Medium, **_: object) -> int:
    return tower_of(medium).patches


def tower_of(medium: Medium) -> VisionConfig:
    if not isinstance(medium.tower, VisionConfig):
        raise MoextendError(f"a medium of the kind {medium.kind} needs a picture tower")
    return medium.tower
