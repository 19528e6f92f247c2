"""Kinds of media: a file in, what the tower takes out; what no file may be is a fault of its kind."""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import Any

import media_files as files
import numpy as np
import pytest
import soxr
from media_files import FILES, HEARD, SEEN, TOUCHED, WATCHED
from PIL import Image

from moextend_jax import faults
from moextend_jax.config import FeaturesConfig, Medium, MoextendError
from moextend_jax.faults import Fault
from moextend_jax.media import KINDS, audio, mark_of, video
from moextend_jax.media.image import prepare_image


def decode(encoded: bytes, medium: Medium, **more: Any) -> Any:
    return KINDS[medium.kind].decode(encoded, name="sound a.x", id="a.x", medium=medium, **more)


def refused(encoded: bytes, medium: Medium, kind: str, message: str, **more: Any) -> None:
    """By decoding; and by the header alone, if that shows it, in the same words."""
    with pytest.raises(Fault, match=message) as caught:
        decode(encoded, medium, **more)
    assert (caught.value.kind, caught.value.id) == (kind, "a.x") and "sound a.x" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


# --- all kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_what_the_tower_takes(name: str):
    medium, encoded = FILES[name]
    kind = KINDS[medium.kind]
    item = decode(encoded, medium)
    prepared = kind.prepare(item, medium=medium, preparation="pad", id="a.x")
    assert prepared.shape == kind.input_shape(medium) and prepared.dtype == np.float32 and np.isfinite(prepared).all()
    assert kind.field == medium.kind and medium.mark == mark_of(medium.kind, medium.kind)


@pytest.mark.parametrize("name", FILES)
def test_positions_are_known_before_anything_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch):
    medium, encoded = FILES[name]
    kind = KINDS[medium.kind]
    positions = kind.positions(decode(encoded, medium), medium)
    assert 0 < positions <= medium.positions
    for decoder in ("soundfile.SoundFile.read", "numpy.lib.format.read_array", "PIL.Image.open"):
        monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("decoded"))
    assert kind.span_of_file(encoded, medium=medium) == positions


@pytest.mark.parametrize("name", FILES)
def test_no_bytes_and_too_many(name: str, monkeypatch: pytest.MonkeyPatch):
    medium, encoded = FILES[name]
    refused(b"", medium, "empty_file", "bytes")
    monkeypatch.setattr(faults, "MOST_BYTES", len(encoded) - 1)
    refused(encoded, medium, "oversized", f"{len(encoded)} bytes")


@pytest.mark.parametrize("name", FILES)
def test_what_is_none_of_the_kind(name: str):
    medium, _ = FILES[name]
    kinds = {"image": "not_image", "video": "not_video", "audio": "not_sound", "features": "not_features"}
    for encoded in (b"<html>not found</html>", bytes(100), b"\0" * 8 + b"ftyp", *(data for _, data in FILES.values())):
        try:
            decode(encoded, medium)
        except Fault as fault:
            assert fault.kind in (kinds[medium.kind], "wrong_shape", "long_sound"), (encoded[:12], str(fault))
        else:
            assert encoded in [data for of, data in FILES.values() if of.kind == medium.kind or of.kind in PICTURES]


PICTURES = ("image", "video")
"""Either reads the other's files."""


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("image", "tiff")])
def test_a_file_cut_anywhere_is_truncated(name: str):
    medium, encoded = FILES[name]
    seen = set()
    for end in np.linspace(30, len(encoded) - 13, 20).astype(int):
        with pytest.raises(Fault) as caught:
            decode(encoded[:end], medium)
        seen.add(caught.value.kind)
    assert seen <= {"truncated", "unreadable"} and "truncated" in seen


# --- sounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, subtype, near", [("WAV", None, 1e-4), ("FLAC", None, 1e-4), ("WAV", "FLOAT", 0),
                                                 ("WAV", "PCM_24", 1e-6), ("OGG", None, 0.1)])  # fmt: skip
def test_a_sound_keeps_its_samples(form: str, subtype: str | None, near: float):
    wave_a = decode(files.sound(form, subtype, seconds=0.3), HEARD)
    assert wave_a.dtype == np.float32
    np.testing.assert_allclose(wave_a, files.wave(0.3), atol=near)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_rates_are_converted_and_lengths_exact(rate: int):
    """The tone stays where it was; what soxr gives more or less of it does not count."""
    for seconds in (0.3, 0.30007, 0.999):
        samples = files.wave(seconds, rate=rate)
        encoded = files.sound(samples=samples, subtype="FLOAT", rate=rate)
        wave_a = decode(encoded, HEARD)
        assert len(wave_a) == -(-len(samples) * 16000 // rate)
        middle = slice(1000, len(wave_a) - 1000)
        np.testing.assert_allclose(wave_a[middle], files.wave(seconds)[: len(wave_a)][middle], atol=2e-3)
        wanted = -(-len(samples) * 50 // rate)
        assert audio.positions(wave_a, HEARD) == audio.span_of_file(encoded, medium=HEARD) == wanted


def test_channels_are_averaged():
    both = files.wave(0.2, channels=2)
    wave_a = decode(files.sound(samples=both, subtype="FLOAT"), HEARD)
    np.testing.assert_allclose(wave_a, both.mean(axis=1), atol=1e-7)
    assert soxr.resample(both, 16000, 16000).shape == both.shape  # what would have come out of it


def test_a_span_covers_the_sound():
    """Buckets of positions: 0.4 s are 20, 0.51 s are 26, of at most 100."""
    for seconds, wanted in ((0.4, 25), (0.5, 25), (0.51, 100), (2, 100)):
        encoded = files.sound(seconds=seconds)
        assert HEARD.span(audio.span_of_file(encoded, medium=HEARD)) == wanted
    assert SEEN.span(audio.span_of_file(files.sound(seconds=0.4), medium=SEEN)) == SEEN.tokens == 4


@pytest.mark.parametrize("medium", [HEARD, SEEN])
def test_a_sound_that_is_longer_is_a_fault_or_is_cut(medium: Medium):
    longer = files.sound(seconds=2.5, rate=8000)
    refused(longer, medium, "long_sound", r"2\.50 seconds are more than the 2 that are heard")
    with pytest.raises(Fault, match="2.50 seconds"):
        audio.span_of_file(longer, medium=medium)
    kept = decode(longer, medium, cut=True)
    np.testing.assert_array_equal(
        kept, decode(files.sound(samples=files.wave(2.5, rate=8000)[:16000], rate=8000), medium)
    )
    assert audio.span_of_file(longer, medium=medium, cut=True) == audio.positions(kept, medium) == medium.positions
    refused(longer, dataclasses.replace(SEEN, seconds=1), "long_sound", "more than the 1 that")


def wav_header(*, samples: int, rate: int = 8000, channels: int = 1, data: bytes = b"") -> bytes:
    """A WAV whose header says so of 8-bit samples."""
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels, channels, 8)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", samples * channels) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flac_of(samples: int) -> bytes:
    """A FLAC file whose header says that it has so many."""
    encoded = bytearray(files.sound("FLAC"))
    encoded[21:26] = ((encoded[21] & 0xF0) << 32 | samples).to_bytes(5, "big")
    return bytes(encoded)


def test_ten_hours_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("soundfile.SoundFile.read", lambda *_, **__: pytest.fail("read"))
    for encoded in (wav_header(samples=36000 * 1000, rate=1000, data=bytes(36000 * 1000)), flac_of(36000 * 16000)):
        refused(encoded, HEARD, "oversized", "36,000 seconds are more than 3600", cut=True)
    many = wav_header(samples=15_000, channels=900, rate=15_000, data=bytes(15_000 * 900))
    monkeypatch.setattr(audio, "MOST_SAMPLES", 10_000_000)
    refused(many, HEARD, "oversized", "15000 samples of 900 channels")


def test_a_sound_of_nothing_or_of_what_is_no_number():
    refused(wav_header(samples=0), HEARD, "empty_file", "it has no samples")
    for value in (np.nan, np.inf, -np.inf, 1e30):
        samples = files.wave(0.1)
        samples[77] = value
        refused(files.sound(samples=samples, subtype="FLOAT"), HEARD, "not_finite", "samples")
    both = np.stack([samples * 0 + np.float32(3e38)] * 2, axis=1)  # whose sum is not finite
    refused(files.sound(samples=both, subtype="FLOAT"), HEARD, "not_finite", "samples")
    for rate in (1, 999, 10**6):
        refused(wav_header(samples=9, rate=rate, data=bytes(9)), HEARD, "unreadable", f"{rate} samples a second")


def test_a_header_that_says_more_than_there_is():
    refused(flac_of(8001), HEARD, "truncated", "cut off|8000 of 8001")
    cut = files.sound()[:-100]
    refused(cut, HEARD, "truncated", "ends before its header says")
    refused(wav_header(samples=36000 * 8000, data=bytes(1000)), HEARD, "truncated", "ends before its header says")
    titled = b"LIST" + struct.pack("<I", 5) + b"INFOa\0data"  # an odd length, and a byte behind it
    refused(wav_header(samples=99, data=bytes(9)).replace(b"data", titled), HEARD, "truncated", "ends before")
    piped = bytearray(files.sound())  # by a program that could not go back to the beginning
    piped[4:8] = piped[40:44] = b"\xff" * 4
    np.testing.assert_array_equal(decode(bytes(piped), HEARD), decode(files.sound(), HEARD))
    pages = files.sound("OGG")
    refused(pages[: pages.rindex(b"OggS")], HEARD, "truncated", "ends before")


@pytest.mark.parametrize("start, form", [(b"ID3\3", "MP3"), (b"\xff\xfb\x90", "MP3"), (b"FORM\0\0\0\0AIFF", "AIFF")])
def test_other_forms_of_sound_say_what_to_do(start: bytes, form: str):
    refused(start + bytes(50), HEARD, "not_sound", f"it is {form}, which is not read; convert it to FLAC or WAV")


def test_towers_of_sound():
    with pytest.raises(MoextendError, match="audio needs a picture tower"):
        audio.input_shape(dataclasses.replace(HEARD, tower=FeaturesConfig(width=3, patches=2)))


# --- videos -----------------------------------------------------------------------------------------------------------


def reds(item: tuple[Image.Image, ...]) -> list[int]:
    return [int(np.asarray(frame)[0, 0, 0]) for frame in item]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_are_chosen_evenly_and_the_last_repeated(form: str):
    assert reds(decode(files.video(form, count=10), WATCHED)) == pytest.approx([0, 30, 60, 90], abs=3)
    assert reds(decode(files.video(form, count=2), WATCHED)) == pytest.approx([0, 10, 10, 10], abs=3)
    assert reds(decode(files.video(form, count=1), WATCHED)) == [0] * 4
    assert len(decode(files.video(form, count=10), dataclasses.replace(WATCHED, frames=1))) == 1


def test_frames_are_prepared_as_images_are():
    item = decode(files.video(), WATCHED)
    prepared = video.prepare(item, medium=WATCHED, preparation="crop")
    for frame, wanted in zip(prepared, item, strict=True):
        np.testing.assert_array_equal(frame, prepare_image(wanted, size=16, preparation="crop"))
    assert WATCHED.positions == 16 and dataclasses.replace(WATCHED, join="mean").positions == 4


def test_the_picture_for_those_who_show_no_animations_is_no_frame():
    file = io.BytesIO()
    first, *rest = files.frames(5)
    first.save(file, "PNG", save_all=True, append_images=rest, default_image=True)
    assert reds(decode(file.getvalue(), WATCHED)) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "start, form",
    [(b"\0\0\0\x18ftypmp42", "MP4"), (b"\x1aE\xdf\xa3", "Matroska or WebM"), (b"RIFF\0\0\0\0AVI ", "AVI")],
)
def test_films_say_what_to_convert_them_to(start: bytes, form: str):
    refused(start + bytes(99), WATCHED, "not_video", f"it is {form}, which is not read; convert it to an anim.*webp$")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_bomb_of_frames_is_refused_before_it_is_decoded(form: str, monkeypatch: pytest.MonkeyPatch):
    encoded = files.video(form, count=9)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for name, most in (("MOST_FRAMES", 8), ("MOST_DECODED", 12 * 8 * 9 - 1), ("MOST_PIXELS", 12 * 8 * 4 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(video, name, most)
            refused(
                encoded, WATCHED, "oversized", "more than 8 frames" if name == "MOST_FRAMES" else "9 frames of 12 x 8"
            )


def test_pages_of_other_sizes():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "TIFF", save_all=True, append_images=[Image.new("RGB", (50, 50))])
    refused(file.getvalue(), WATCHED, "oversized", "frame 1 has 50 x 50 pixels, more than the first")
    file = io.BytesIO()
    bad = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    Image.new("F", (4, 4)).save(file, "TIFF", save_all=True, append_images=[bad])
    refused(file.getvalue(), WATCHED, "not_finite", "frame 1 has NaN")


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_are_rows_with_zeros_behind():
    rows = files.features(3)
    for encoded in (files.npz(a=rows), files.npy(rows), files.npy(np.asfortranarray(rows))):
        item = decode(encoded, TOUCHED)
        np.testing.assert_array_equal(item, rows)
        prepared = KINDS["features"].prepare(item, medium=TOUCHED, preparation="pad")
        np.testing.assert_array_equal(prepared, np.pad(rows, ((0, 2), (0, 0))))
        assert KINDS["features"].positions(item, TOUCHED) == 3
    assert decode(files.npy(files.features(5)), TOUCHED).shape == (5, 6)


@pytest.mark.parametrize(
    "encoded, kind, message",
    [
        (files.npy(files.features(6)), "wrong_shape", r"\[6, 6\] are not at most 5 positions of width 6"),
        (files.npz(a=files.features(2, width=7)), "wrong_shape", r"\[2, 7\]"),
        (files.npy(files.features(2)[0]), "wrong_shape", r"\[6\] are not"),
        (files.npy(np.zeros((10**4, 6), np.float32)), "wrong_shape", r"\[10000, 6\]"),
        (files.npz(a=np.zeros((10**5, 600), np.float32)), "wrong_shape", r"\[100000, 600\]"),
        (files.npy(np.zeros((0, 6), np.float32)), "empty_file", "no positions"),
        (files.npy(np.ones((2, 6))), "not_features", "element type is float64"),
        (files.npy(np.ones((2, 6), int)), "not_features", "element type is int64"),
        (files.npz(a=np.array([[None] * 6])), "not_features", "element type is object"),
        (files.npz(a=files.features(), b=files.features()), "not_features", "2 files, not exactly one array"),
        (files.npz(), "not_features", "0 files"),
        (files.npy(np.full((2, 6), np.nan, np.float32)), "not_finite", "NaN"),
        (files.npy(np.full((2, 6), np.inf, np.float16)), "not_finite", "infinite"),
        (files.npy(files.features()) + b"x", "unreadable", "73 bytes for 72"),
        (files.npy(files.features())[:-1], "truncated", "71 bytes for 72"),
        (files.npz(a=files.features())[:-30], "truncated", "before the list of its arrays"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_features_that_are_none_or_do_not_fit(encoded: bytes, kind: str, message: str):
    refused(encoded, TOUCHED, kind, message)


def test_a_pickle_is_never_unpacked(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    refused(files.npz(a=np.array([Evil()], object)), TOUCHED, "not_features", "object")
    assert not (tmp_path / "touched").exists()


# --- kinds of faults --------------------------------------------------------------------------------------------------


def test_counts_of_a_checkpoint_of_before_are_read():
    """It has fewer kinds, which come first in the table."""
    saved = [9, 1, *[0] * 18, 3]
    counts_G = faults.restored(saved)
    assert counts_G.shape == faults.counts().shape and counts_G.dtype == np.int64
    assert faults.named(counts_G) == {"skipped": 4, "skipped/missing": 1, "skipped/duplicate_id": 3}
    np.testing.assert_array_equal(faults.restored(list(counts_G)), counts_G)
