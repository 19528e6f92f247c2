"""Sound in front of a tower: Whisper's spectrograms exactly, and spectrograms as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moextend_jax.config import MoextendError
from moextend_jax.media.mel import RATE, log_mel, slaney_filters, spectrogram_picture


def tone(hertz: float, *, seconds: float, loud: float = 0.5) -> np.ndarray:
    return (loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def test_the_reference_clip(shared: Path):
    with np.load(shared / "methods_oracle" / "whisper.npz") as file:
        np.testing.assert_allclose(slaney_filters(80).toarray(), file["filters_fb"], atol=1e-7)
        mel_bl = log_mel(file["wave_a"], seconds=1)
        np.testing.assert_allclose(mel_bl, file["wave_mel_bl"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bands", "seconds", "samples"), [(80, 2, 20_000), (128, 1, 40_000), (80, 30, 5)])
def test_parity_with_the_feature_extractor_of_transformers(bands: int, seconds: int, samples: int):
    """Of clips that are filled up, cut, and all but silent."""
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    wave_a = (rng.normal(0, 0.2, samples) * np.sin(np.arange(samples) / 900)).astype(np.float32)
    front = transformers.WhisperFeatureExtractor(feature_size=bands, chunk_length=seconds)
    filled_a = np.pad(wave_a[: seconds * RATE], (0, max(0, seconds * RATE - samples)))
    expected = front._np_extract_fbank_features(filled_a[None], "cpu")[0]  # the other one computes in float32
    mel_bl = log_mel(wave_a, bands=bands, seconds=seconds)
    assert mel_bl.shape == (bands, 100 * seconds) and mel_bl.dtype == np.float32
    np.testing.assert_allclose(mel_bl, expected, atol=1e-6, rtol=0)


def test_a_tone_is_loudest_in_its_band_and_silence_is_one_value():
    centres = np.argmax(slaney_filters(80).toarray(), axis=0) * RATE / 400
    mel_bl = log_mel(tone(2000, seconds=1), seconds=1)
    assert abs(centres[mel_bl[:, 50].argmax()] - 2000) < 60
    assert np.ptp(log_mel(np.zeros(10, np.float32), seconds=1)) == 0


def test_a_picture_shows_pitch_from_below_and_time_from_the_left():
    wave_a = np.concatenate([tone(300, seconds=0.5), tone(3000, seconds=0.3)])
    picture = spectrogram_picture(wave_a, seconds=1)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[..., 0], picture[..., 1])
    rows = picture[..., 0].argmax(axis=0)
    mels = 2595 * np.log10(1 + np.array([40, 300, 3000, 7600]) / 700)
    low, high = 64 - 65 * (mels[1:3] - mels[0]) / (mels[3] - mels[0])
    assert np.ptp(rows[2:28]) <= 1 and abs(rows[10] - low) < 1.5
    assert np.ptp(rows[36:48]) <= 1 and abs(rows[40] - high) < 1.5
    assert picture.max() == 255 and not picture[:, 54:].any()  # silence at the end is more than 70 dB below


def test_a_picture_is_white_at_its_loudest_and_loses_a_step_a_quarter_decibel():
    quiet = np.concatenate([tone(1000, seconds=0.5), tone(1000, seconds=0.5, loud=0.05)])  # 20 dB below
    picture = spectrogram_picture(quiet, seconds=1)[..., 0]
    assert picture[:, 10].max() in (254, 255) and abs(int(picture[:, 54].max()) - 255 * (1 - 20 / 70)) < 2
    with pytest.raises(MoextendError, match=r"0.03 seconds of sound are too short for a spectrogram of 128 frames"):
        spectrogram_picture(quiet, size=128, seconds=0.03)
    assert spectrogram_picture(quiet, size=224, seconds=1).any(axis=(1, 2)).all()  # no band without a Fourier bin
