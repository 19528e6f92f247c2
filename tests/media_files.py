"""Encoded sounds, videos and features that tests make: sizes in, the bytes of files out; and media that read them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from moextend_jax.config import FeaturesConfig, Medium, VisionConfig, WhisperConfig
from moextend_jax.media.audio import RATE

VISION = VisionConfig(width=16, hidden=32, layers=2, heads=2, image_size=16, patch_size=8)
WHISPER = WhisperConfig(width=16, hidden=32, layers=1, heads=2, bands=8, seconds=2)
HEARD = Medium(kind="audio", mark="<audio>", tower=WHISPER, spans=(25, 100))
SEEN = Medium(kind="audio", mark="<audio>", tower=VISION, seconds=2)
WATCHED = Medium(kind="video", mark="<video>", tower=VISION, frames=4)
TOUCHED = Medium(kind="features", mark="<features>", tower=FeaturesConfig(width=6, patches=5))
PICTURED = Medium(tower=VISION)


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of these members, of which two may have one name."""
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def wave(seconds: float, *, rate: int = RATE, channels: int = 1, pitch: float = 440.0) -> np.ndarray:
    """A tone, of the second channel an octave higher: [a] or [a, channels]."""
    times = np.arange(round(seconds * rate)) / rate
    tones = [0.4 * np.sin(2 * np.pi * pitch * (n + 1) * times) for n in range(channels)]
    return np.squeeze(np.stack(tones, axis=1).astype(np.float32), axis=1 if channels == 1 else ())


def sound(form: str = "WAV", subtype: str | None = None, *, seconds: float = 0.5, rate: int = RATE, channels: int = 1,
          samples: np.ndarray | None = None) -> bytes:  # fmt: skip
    file = io.BytesIO()
    samples = wave(seconds, rate=rate, channels=channels) if samples is None else samples
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def frames(count: int, *, size: tuple[int, int] = (12, 8)) -> list[Image.Image]:
    """Frame n is n * 10 red."""
    return [Image.new("RGB", size, (10 * n, 0, 0)) for n in range(count)]


def video(form: str = "GIF", *, count: int = 6, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    first, *rest = frames(count, size=size)
    lossless = {"lossless": True} if form == "WEBP" else {}
    first.save(file, form, save_all=True, append_images=rest, **lossless)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=True, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def features(rows: int = 3, *, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


KINDS_OF_OTHERS = {"not_video", "not_sound", "not_features", "wrong_shape", "long_sound"}
"""Kinds of faults that no image and no conversation has."""

FILES: dict[str, tuple[Medium, bytes]] = {
    "wav": (HEARD, sound(channels=2, rate=8000)),
    "wav of floats": (SEEN, sound(subtype="FLOAT")),
    "wav of ADPCM": (HEARD, sound(subtype="MS_ADPCM")),
    "flac": (HEARD, sound("FLAC", rate=22050)),
    "ogg": (SEEN, sound("OGG", rate=22050)),
    "opus": (HEARD, sound("OGG", "OPUS", rate=48000)),
    "gif": (WATCHED, video()),
    "webp": (WATCHED, video("WEBP")),
    "apng": (WATCHED, video("PNG")),
    "tiff": (WATCHED, video("TIFF")),
    "npz": (TOUCHED, npz(a=features())),
    "npy": (TOUCHED, npy(features().astype(np.float16))),
    "image": (PICTURED, video("PNG", count=1)),
}
"""A valid file of each form, and a medium that takes it."""
