"""Encoded sounds to what an audio tower expects.

Goes in: the bytes of a WAV, FLAC or OGG file. Comes out: `wave_a` float32, one channel at `RATE`, as long as the sound;
then the log-mel frames [b, l] of Whisper's encoder, or the spectrogram as a normalised picture [h, w, c] for a picture
tower (`media/mel.py`); or a `Fault`. libsndfile reads the files, of several channels their mean is taken, soxr converts
the rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from moextend_jax.config import Medium, VisionConfig, WhisperConfig
from moextend_jax.faults import Fault, wrong_size
from moextend_jax.media.image import Watched, normalised, tower_of
from moextend_jax.media.mel import RATE, log_mel, spectrogram_picture

SUFFIXES = ("wav", "flac", "ogg", "opus")
TOWERS = (VisionConfig, WhisperConfig)
POSITIONS = 50
"""Of Whisper's encoder, a second."""
MOST_SECONDS = 3600
"""Of a file; a longer one in a conversation is a mistake."""
RATES = (1_000, 768_000)
"""Samples a second of a file."""
MOST_SAMPLES = 2**25
"""That are read of a file, all channels together: 128 MB as float32."""
LOUDEST = 1e6
"""A sample's size at most; full volume is 1. The square of larger ones may leave float32."""

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
MAGIC = (b"RIFF", b"fLaC", b"OggS")
RIFFS = (b"RIFFWEBP", b"RIFFAVI ", b"RIFFACON", b"RIFFRMID")
"""Other formats whose files begin with RIFF, as WAV does."""
OTHERS = {
    b"ID3": "MP3", b"\xff\xfb": "MP3", b"\xff\xf3": "MP3", b"\xff\xf2": "MP3", b"\xff\xf1": "AAC", b"\xff\xf9": "AAC",
    b"FORM": "AIFF", b".snd": "AU", b"RF64": "RF64", b"caff": "CAF",
}  # fmt: skip
"""How sounds that are not read begin."""


class _Header(NamedTuple):
    frames: int
    rate: int


def seconds_of(medium: Medium) -> float:
    """The longest sound that a medium takes."""
    return medium.tower.seconds if isinstance(medium.tower, WhisperConfig) else medium.seconds


def decode(
    encoded: bytes, *, name: str = "sound", id: str = "", medium: Medium, upright: bool = True, cut: bool = False
) -> np.ndarray:
    """`wave_a` float32, ceil(samples * RATE / rate) of it.

    Args:
      name: for the error message; id: for its `Fault`.
      cut: of a longer sound its first `seconds_of(medium)`; else that is a fault.
    """
    wave_am, (_, rate) = _read(encoded, name=name, id=id, medium=medium, cut=cut, samples=True)
    assert wave_am is not None
    with np.errstate(over="ignore", invalid="ignore"):
        wave_a = wave_am.mean(axis=1, dtype=np.float32)
    if not (np.abs(wave_a) <= LOUDEST).all():
        why = "it has NaN or infinite samples, or some that are far too large"
        raise Fault(f"cannot read {name} as a sound: {why}", "not_finite", id or name)
    converted_a = soxr.resample(wave_a, rate, RATE)
    count = -(-len(wave_a) * RATE // rate)  # soxr gives one more or less
    return np.pad(converted_a, (0, max(0, count - len(converted_a))))[:count]


def prepare(item: np.ndarray, *, medium: Medium, preparation: str = "pad", id: str = "") -> np.ndarray:
    """[b, l] of Whisper, or [h, w, c] of a picture tower; a sound that is shorter is followed by silence."""
    tower = medium.tower
    if isinstance(tower, WhisperConfig):
        return log_mel(item, bands=tower.bands, seconds=tower.seconds)
    picture = spectrogram_picture(item, size=tower_of(medium).image_size, seconds=medium.seconds)
    return normalised(picture, tower_of(medium))


def positions(item: np.ndarray, medium: Medium) -> int:
    return _positions(len(item), RATE, medium)


def input_shape(medium: Medium) -> tuple[int, ...]:
    if isinstance(medium.tower, WhisperConfig):
        return medium.tower.bands, medium.tower.frames
    return tower_of(medium).image_size, tower_of(medium).image_size, 3


def span_of_file(encoded: bytes, *, name: str = "sound", id: str = "", medium: Medium, cut: bool = False) -> int:
    """`positions` by what the header says."""
    _, header = _read(encoded, name=name, id=id, medium=medium, cut=cut, samples=False)
    return _positions(header.frames, header.rate, medium)


def _positions(samples: int, rate: int, medium: Medium) -> int:
    if isinstance(medium.tower, WhisperConfig):
        return min(-(-samples * POSITIONS // rate), medium.tower.patches)
    return medium.tower.patches


# --- files ------------------------------------------------------------------------------------------------------------


def _read(
    encoded: bytes, *, name: str, id: str, medium: Medium, cut: bool, samples: bool
) -> tuple[np.ndarray | None, _Header]:
    """What the header says, of a sound that is cut its part; with `samples` these too, [a, channels]."""

    def fault(kind: str, why: object) -> Fault:
        return Fault(f"cannot read {name} as a sound: {why}", kind, id or name)

    if kind := wrong_size(len(encoded)):
        raise fault(kind, f"it has {len(encoded)} bytes")
    if not encoded.startswith(MAGIC) or encoded[:4] + encoded[8:12] in RIFFS:
        other = next((form for magic, form in OTHERS.items() if encoded.startswith(magic)), "")
        what = f"it is {other}, which is not read" if other else "it is none of WAV, FLAC and OGG"
        raise fault("not_sound", f"{what}; convert it to FLAC or WAV")
    if _is_cut(encoded):
        raise fault("truncated", "it ends before its header says")
    file = _Sound(encoded)
    try:
        with soundfile.SoundFile(file) as sound:
            header = _checked(sound, fault, longest=seconds_of(medium), cut=cut)
            if not samples:
                return None, header
            wave_am = sound.read(header.frames, dtype="float32", always_2d=True)
    except Fault:
        raise
    except MemoryError as error:
        raise fault("oversized", "not enough memory") from error
    except Exception as error:  # libsndfile's, and soundfile's own about numbers that make no sense
        why = " ".join(str(error).rpartition(">: ")[2].split()) or type(error).__name__
        raise fault("truncated" if file.ended else "unreadable", f"it is cut off or damaged: {why}") from error
    if len(wave_am) < header.frames:
        raise fault("truncated", f"it has {len(wave_am)} of {header.frames} samples")
    return wave_am, header


def _checked(sound: soundfile.SoundFile, fault: Callable[..., Fault], *, longest: float, cut: bool) -> _Header:
    frames, rate = sound.frames, sound.samplerate
    if sound.format not in FORMATS:
        raise fault("not_sound", f"it is {sound.format}, which is not read; convert it to FLAC or WAV")
    if not RATES[0] <= rate <= RATES[1]:
        raise fault("unreadable", f"{rate} samples a second are not between {RATES[0]} and {RATES[1]}")
    if frames <= 0:
        raise fault("empty_file", "it has no samples")
    if frames > MOST_SECONDS * rate:
        raise fault("oversized", f"{frames / rate:,.0f} seconds are more than {MOST_SECONDS}")
    if frames > longest * rate:
        if not cut:
            raise fault("long_sound", f"its {frames / rate:.2f} seconds are more than the {longest:g} that are heard")
        frames = int(longest * rate)
    if frames * sound.channels > MOST_SAMPLES:
        raise fault("oversized", f"{frames} samples of {sound.channels} channels are more than {MOST_SAMPLES}")
    return _Header(frames, rate)


UNKNOWN = 0x7FFF0000
"""Lengths from here on stand in WAV files whose writer could not go back to its beginning (a pipe)."""


def _is_cut(encoded: bytes) -> bool:
    """WAV says how long it is, and its samples are, and the last page of OGG that it is the last; libsndfile takes what
    there is."""
    if encoded.startswith(b"RIFF"):

        def end_of(chunk: int) -> int:
            return chunk + 8 + int.from_bytes(encoded[chunk + 4 : chunk + 8], "little")

        at = 12
        while at < len(encoded) and not encoded.startswith(b"data", at):
            at = end_of(at) + end_of(at) % 2
        chunks = (0, at) if at < len(encoded) else (0,)
        return any(len(encoded) + 1 < end_of(chunk) < UNKNOWN for chunk in chunks)  # the last may lack its padding
    if encoded.startswith(b"OggS"):
        page = encoded[encoded.rindex(b"OggS") :]
        sizes = page[27 : 27 + page[26]] if len(page) > 27 else b""
        return len(page) < 27 or len(page) < 27 + len(sizes) + sum(sizes) or not page[5] & 4
    return False


class _Sound(Watched):
    """Ignores seeks to places that no file has: libsndfile calls it from C, where an error is printed, not raised."""

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with contextlib.suppress(ValueError, OverflowError):
            return super().seek(offset, whence)
        return self.tell()
