"""Sounds that installed packages make: a note of an instrument or a sentence in, wave_a (float32, 16 kHz) out.

Instruments are the recordings of a sound font (General MIDI), played by `tinysoundfont`; speech is eSpeak NG's, whose
library `espeakng-loader` brings. An instrument gives the same samples for the same note; a `Speaker` does so for the
same sentences in the same order.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from moextend_jax.config import MoextendError
from moextend_jax.folders import extra_hint, package
from moextend_jax.media.mel import RATE

TINYSOUNDFONT = "pip install --no-deps tinysoundfont"
"""Without its dependency: pyaudio plays sounds aloud, which nobody needs here, and has to be compiled."""
EXTRA = extra_hint("sounds")


def shared_file(name: str, *, of: str, package: str) -> Path:
    """A file or folder that a Debian package puts below /usr/share, here or in a folder of XDG_DATA_HOME or
    XDG_DATA_DIRS (the usual way to name others): no root is needed to unpack it there."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    folders = [home, *(os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")]
    for folder in folders:
        if (path := Path(folder).expanduser() / name).exists():
            return path
    raise MoextendError(
        f"data set {of} needs Debian's package {package}, and there is no {name} in {', '.join(folders)}; apt-get "
        f"install {package}, or without root: apt-get download {package}, dpkg-deb -x {package}_*.deb X, and copy "
        f"X/usr/share/* to {home}"
    )


class Band:
    """The instruments of a sound font (`.sf2` or `.sf3`)."""

    def __init__(self, font: Path, *, of: str):
        self.synth: Any = package("tinysoundfont", of=of, install=TINYSOUNDFONT).Synth(samplerate=RATE)
        self.font = self.synth.sfload(str(font))

    def note(self, program: int, *, key: int, velocity: int, seconds: float) -> np.ndarray:
        """A note that is held for `seconds`, and what sounds for a tenth of one more.

        Args:
          program: of General MIDI, from 0. key: 60 is the middle C. velocity: how hard it is struck, 1 to 127.
        """
        synth = self.synth
        synth.sounds_off()  # the note before it, which is heard for a moment all the same
        self._samples(0.1)
        synth.program_select(0, self.font, 0, program)
        synth.noteon(0, key, velocity)
        held = self._samples(seconds)
        synth.noteoff(0, key)
        return np.concatenate([held, self._samples(0.1)])

    def _samples(self, seconds: float) -> np.ndarray:
        both_ac = np.frombuffer(bytes(self.synth.generate(round(seconds * RATE))), np.float32).reshape(-1, 2)
        return both_ac.mean(axis=1)


_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1
_RATE, _PITCH = 1, 3
"""Numbers of eSpeak's C interface (speak_lib.h)."""


COPIES: list[tempfile.TemporaryDirectory[str]] = []
"""Copies of eSpeak's library, one per speaker, each with its own state. They stay while the process lives: a new copy
at the path of a deleted one would be taken for the deleted one."""


class Speaker:
    """eSpeak NG. Its flutter goes on from one sentence to the next: two speakers give the same samples if they say the
    same sentences in the same order."""

    def __init__(self, *, of: str):
        loader = package("espeakng_loader", of=of, install=EXTRA)
        COPIES.append(tempfile.TemporaryDirectory())
        self.library = ctypes.CDLL(shutil.copy(loader.get_library_path(), COPIES[-1].name))
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 500, loader.get_data_path().encode(), 0)
        if self.rate <= 0:
            raise MoextendError(f"data set {of}: eSpeak cannot read its data in {loader.get_data_path()}")
        self.chunks: list[np.ndarray] = []
        form = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = form(self._take)  # kept: the library calls it for as long as it lives
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: Any, count: int, _: Any) -> int:
        if count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, *, voice: str, words_per_minute: int = 175, pitch: int = 50) -> np.ndarray:
        """A sentence.

        Args:
          voice: as `en-us+f3`: a language or an accent, and a variant. pitch: 0 to 100.

        Raises:
          MoextendError: no such voice.
        """
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise MoextendError(f"eSpeak has no voice {voice!r}")
        self.library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        ctypes.CDLL(None).srand(0)  # of C's library: breath is noise
        self.chunks, encoded = [], text.encode() + b"\0"
        self.library.espeak_Synth(encoded, len(encoded), 0, _CHARACTERS, 0, _UTF8, None, None)
        return soxr.resample(np.concatenate(self.chunks).astype(np.float32) / 2**15, self.rate, RATE)
