"""Image files to the pixels a CLIP tower expects.

Goes in: a path below a folder, then its bytes, in one of `FORMATS`. Comes out: `image_hwc` float32, normalised by
CLIP's mean and standard deviation; or a `Fault` of `data/faults.py`. Nothing here trusts the file: how large a picture
is is known from its header before memory is taken for it.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from moextend_jax.config import MoextendError
from moextend_jax.data.faults import Fault

MEAN_c = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD_c = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

MOST_BYTES = 64 * 2**20
"""Of an image file."""
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


# --- paths ------------------------------------------------------------------------------------------------------------


def find_image(folder: Path, name: str) -> Path:
    """The file of an image named relative to `folder` or to its folder `images`; nothing is read.

    Raises:
      Fault: it is a URL, leaves the folder, is not there, is no file, is empty, or has more than MOST_BYTES.
      MoextendError: this process cannot spell the name, and so no name of its kind.
    """
    if "://" in name or name.startswith("data:"):
        raise Fault(f"image {name[:200]} is a URL; nothing is downloaded: put the file into {folder}", "url", name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Fault(f"image {name} leaves {folder}; name it by its path below that folder", "outside", name)
    roots = folder, folder / "images"
    for root in roots:
        try:
            path = (root / name).resolve(strict=True)
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            if encoding == "utf-8":  # half of a pair, which JSON can spell
                raise Fault(f"image {name!a} in {folder}: {error}", "unreadable", ascii(name)) from error
            raise MoextendError(
                f"image {name!a}: names of files are {encoding} here, which cannot spell it; set PYTHONUTF8=1"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:  # no permission; a name no file can have; a loop of links
            raise Fault(f"cannot read image {name} in {folder}: {error}", "unreadable", name) from error
        if not any(path.is_relative_to(root.resolve()) for root in roots):
            raise Fault(
                f"image {name} is a link out of {folder}, to {path}; only the folder images itself may be a link",
                "outside",
                name,
            )
        if not stat.S_ISREG(facts.st_mode):  # to open a pipe would wait for ever
            raise Fault(f"image {name} in {folder} is not a file", "unreadable", name)
        if not facts.st_size:
            raise Fault(f"image {name} in {folder} is an empty file", "empty_file", name)
        if facts.st_size > MOST_BYTES:
            raise Fault(
                f"image {name} in {folder} has {facts.st_size} bytes, more than {MOST_BYTES}", "oversized", name
            )
        return path
    raise Fault(f"no image {name} in {folder} or {folder / 'images'}{_beside(roots, name)}", "missing", name)


def _beside(roots: Iterable[Path], name: str) -> str:
    """A hint, where the picture is there in another format: OCR-VQA's are .gif files that its JSON calls .jpg."""
    for root in roots:
        for suffix in (".jpg", ".jpeg", ".png", ".gif", ".webp", ".JPG", ".JPEG", ".PNG"):
            other = (root / name).with_suffix(suffix)
            if other.is_file():
                return f"; {other.name} is there: convert it, or name it so"
    return ""


def look(folder: Path, names: Iterable[str]) -> Iterator[os.stat_result | Fault]:
    """Size and time of each image's file, or the `Fault` that `find_image` raises.

    Folders are resolved once and a sound file costs one question to the file system: there are 665 thousand of them.
    """
    homes: dict[str, list[str]] = {}
    for name in names:
        head, tail = os.path.split(name)
        if head not in homes:
            homes[head] = _homes(folder, head)
        file = None if ":" in name else _sound_file(homes[head], tail)  # a URL is none, whatever is there
        try:
            yield file or find_image(folder, name).stat()
        except Fault as fault:
            yield fault


def _homes(folder: Path, head: str) -> list[str]:
    """Where files of `head/` may be, resolved; none where only `find_image` can tell what is right."""
    if os.path.isabs(head) or ".." in head or "\0" in head:
        return []
    try:
        roots = [os.path.realpath(root) for root in (folder, folder / "images")]
        homes = [os.path.realpath(os.path.join(root, head)) for root in roots]
    except (OSError, ValueError):
        return []
    inside = all(any(Path(home).is_relative_to(root) for root in roots) for home in homes)
    return homes if inside else []


def _sound_file(homes: Iterable[str], name: str) -> os.stat_result | None:
    """None also for links, which may lead anywhere."""
    for home in homes:
        try:
            file = os.lstat(f"{home}/{name}")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
        return file if stat.S_ISREG(file.st_mode) and 0 < file.st_size <= MOST_BYTES else None
    return None


def read_image(folder: Path, name: str) -> bytes:
    """Its bytes; raises as `find_image`, also where reading fails."""
    try:
        with find_image(folder, name).open("rb") as file:
            encoded = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise Fault(f"cannot read image {name} in {folder}: {error}", "unreadable", name) from error
    if len(encoded) > MOST_BYTES:  # it grew
        raise Fault(f"image {name} in {folder} has more than {MOST_BYTES} bytes", "oversized", name)
    return encoded


# --- pictures ---------------------------------------------------------------------------------------------------------


def decode_image(encoded: bytes, *, name: str = "image", id: str = "") -> Image.Image:
    """The picture as RGB, of an animation its first frame; `name` is for the error message, `id` for its `Fault`."""

    def fault(kind: str, why: object) -> Fault:
        return Fault(f"cannot read {name} as an image: {why}", kind, id or name)

    if not encoded:
        raise fault("empty_file", "it has no bytes")
    if len(encoded) > MOST_BYTES:
        raise fault("oversized", f"{len(encoded)} bytes are more than {MOST_BYTES}")
    file = _Watched(encoded)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise fault("oversized", f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
            image.load()
            if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                raise fault("not_finite", "it has NaN or infinite pixels")
            return _rgb(image)
    except Fault:
        raise
    except UnidentifiedImageError as error:
        if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIC:
            raise fault(
                "not_image", "it is HEIC, a telephone's format, which is not read; convert it to JPEG"
            ) from error
        if not _looks_like_image(encoded):
            raise fault("not_image", f"it is none of {', '.join(FORMATS)}") from error
        kind = "truncated" if file.ended or _cut_riff(encoded) else "unreadable"
        raise fault(kind, "it begins as one, but its header is cut off or damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise fault("oversized", error) from error
    except MemoryError as error:
        raise fault("oversized", "not enough memory") from error
    except Exception as error:  # each of Pillow's decoders has its own way to fail on damaged data
        said = str(error) or type(error).__name__
        cut = isinstance(error, EOFError) or _cut_riff(encoded) or any(sign in said.lower() for sign in CUT)
        raise fault("truncated" if cut else "unreadable", said) from error


CUT = ("truncated", "not enough", "but only got", "end of file", "unexpected end")
"""How Pillow's decoders say that the data end too early."""


class _Watched(io.BytesIO):
    """Knows whether more was asked for than there was."""

    ended = False

    def read(self, size: int | None = -1, /) -> bytes:
        got = super().read(size)
        self.ended |= size is not None and len(got) < size
        return got


def _looks_like_image(encoded: bytes) -> bool:
    return encoded.startswith(MAGIC) or encoded[:4] + encoded[8:12] == b"RIFFWEBP" or encoded[4:12] == b"ftypavif"


def _cut_riff(encoded: bytes) -> bool:
    """A WebP file says how long it is."""
    return encoded[:4] == b"RIFF" and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut every level above 255 off
        levels = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def check_scaled(width: int, height: int, *, size: int, preparation: Literal["pad", "crop"], id: str = "") -> None:
    """Raises a `Fault` where preparing a picture of this size would take more memory than MOST_SCALED pixels."""
    short, long = sorted((width, height))
    pixels = long * long if preparation == "pad" else size * int(size * long / short)
    if pixels > MOST_SCALED:
        raise Fault(f"image {id} of {width} x {height} pixels is too long and thin", "oversized", id)


def prepare_image(image: Image.Image, *, size: int, preparation: Literal["pad", "crop"], id: str = "") -> np.ndarray:
    """Scales a picture to `size` x `size` pixels with bicubic resampling and normalises it.

    `pad` (LLaVA's settings, the paper) first widens the short side with CLIP's mean colour so that nothing is
    lost; `crop` (CLIP's own, the released code) scales the short side to `size` and cuts out the centre.
    """
    check_scaled(*image.size, size=size, preparation=preparation, id=id)
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
