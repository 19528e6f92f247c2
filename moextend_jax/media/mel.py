"""Sound as a tower takes it: a waveform in, Whisper's log-mel spectrogram out, or a spectrogram as a picture.

In: wave_a, a samples of float32 at 16 kHz, one channel, full scale 1. Out: mel_bl (b bands, 100 l frames a second), or
pixels [h, w, 3] of uint8 for an image tower. Sizes f of Fourier bins stand between.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from moextend_jax.config import MoextendError

RATE = 16_000
"""Samples a second of what towers hear."""
WINDOW, HOP = 400, 160
"""Samples under a frame (25 ms), and from one of Whisper's to the next."""
RANGE_DB = 70.0
"""What a picture shows below the loudest that is in it."""


def log_mel(wave_a: np.ndarray, *, bands: int = 80, seconds: float) -> np.ndarray:
    """Whisper's log-mel spectrogram mel_bl `[bands, 100 * seconds]`, float32, of a clip of `seconds`.

    The wave is filled up with silence to `seconds`, or cut there. All of that counts: the floor lies a fixed way below
    its loudest band, so that a clip filled up further is the same in its own frames.
    Whisper (2212.04356) as `transformers`' feature extractor computes it.
    """
    filled_a = np.pad(_clip(wave_a, seconds), WINDOW // 2, mode="reflect")
    window = np.hanning(WINDOW + 1)[:-1]  # periodic
    power_lf = np.abs(np.fft.rfft(_frames(filled_a, HOP) * window)) ** 2
    log_lb = np.log10(np.maximum(power_lf @ slaney_filters(bands), 1e-10))[:-1]
    return ((np.maximum(log_lb, log_lb.max() - 8) + 4) / 4).T.astype(np.float32)


def spectrogram_picture(wave_a: np.ndarray, *, size: int = 64, seconds: float) -> np.ndarray:
    """A spectrogram as an image tower can see it: `[size, size, 3]` of uint8, three equal channels.

    From left to right `size` frames of 25 ms, spread over `seconds`: the wave is filled up to that with silence, or cut
    there. From the bottom up `size` mel bands of 40 to 7,600 Hz. White is the loudest of them, black 70 dB below it.

    Raises:
      MoextendError: fewer samples than such frames need.
    """
    clip_a = _clip(wave_a, seconds)
    if (hop := (len(clip_a) - WINDOW) // (size - 1)) < 1:
        raise MoextendError(f"{seconds} seconds of sound are too short for a spectrogram of {size} frames")
    bins = max(512, 2 ** math.ceil(math.log2(8 * size)))  # enough that none of the bands is without one
    power_lf = np.abs(np.fft.rfft(_frames(clip_a, hop)[:size] * np.hanning(WINDOW), bins)) ** 2
    db_lb = 10 * np.log10(power_lf @ _htk_filters(size, bins) + 1e-7)
    shades_lb = np.clip((db_lb - db_lb.max() + RANGE_DB) / RANGE_DB, 0, 1)
    return np.repeat((255 * shades_lb.T[::-1, :, None]).astype(np.uint8), 3, axis=2)


def _clip(wave_a: np.ndarray, seconds: float) -> np.ndarray:
    samples = round(seconds * RATE)
    wave_a = np.asarray(wave_a, np.float64)[:samples]
    return np.pad(wave_a, (0, samples - len(wave_a)))


def _frames(wave_a: np.ndarray, hop: int) -> np.ndarray:
    """Views `[l, WINDOW]`, one every `hop` samples."""
    return np.lib.stride_tricks.sliding_window_view(wave_a, WINDOW)[::hop]


@functools.cache
def slaney_filters(bands: int) -> Any:
    """Triangles over frequency `[f, b]`, 0 to 8,000 Hz, of unit area, evenly spaced on Slaney's mel scale: linear to
    1,000 Hz (200/3 Hz a mel), logarithmic above (27 mels for a factor of 6.4)."""
    step = math.log(6.4) / 27
    top = 15 + math.log(RATE / 2 / 1000) / step
    mels = np.linspace(0, top, bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (np.maximum(mels, 15) - 15)))
    return _sparse(_triangles(edges, WINDOW) * (2 / (edges[2:] - edges[:-2])))


@functools.cache
def _htk_filters(bands: int, bins: int) -> Any:
    """Triangles of height one over frequency `[f, b]`, 40 to 7,600 Hz, evenly spaced in 2595 log10(1 + Hz / 700)."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (40, 7600))
    return _sparse(_triangles(700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1), bins))


def _sparse(filters_fb: np.ndarray) -> Any:
    """As a sparse array of SciPy's: a Fourier bin is in two bands at most. A dense product of such sizes goes to as
    many threads of BLAS as there are cores, which wait for each other and for those of XLA: 12 ms of CPU a sound.
    """
    from scipy.sparse import csr_array  # takes a quarter of a second, for those who hear alone

    return csr_array(filters_fb)


def _triangles(edges: np.ndarray, bins: int) -> np.ndarray:
    """[f, b]: band b rises from edge b to edge b + 1 and falls to edge b + 2."""
    hertz_f1 = np.fft.rfftfreq(bins, 1 / RATE)[:, None]
    rising = (hertz_f1 - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz_f1) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0)
