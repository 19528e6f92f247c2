"""Pretrains the embedded base's tower for sounds, contrastively, on spectrograms of made sounds and the words for them.

In: the packages of the extra `sounds` (see README.md). Out: the tower as a Hugging Face CLIPVisionModel folder,
moextend_jax/assets/base/audio. Only the train splits of data/made_sounds.py are heard: the training sound font without
every fourth key, and the training voices.

    PYTHONPATH=. python launch/make_base/sounds.py
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from contrastive import FOLDER, WORDS, Pair, Pictures, train
from flax import nnx

from moextend_jax.data.made_sounds import FAMILIES, SOUND, SPEECH
from moextend_jax.media.image import MEAN_c, STD_c
from moextend_jax.media.mel import spectrogram_picture

CAPTIONS = {"instruments": "a {}", "spoken_words": "the word {}", "spoken_questions": "{}"}
SECONDS = {SOUND: 1, SPEECH: 2}
"""Of a picture, as configs/continual.py has them."""
SHIFT = 3
"""Frames by which the pictures of a batch are turned at most, so that it matters less when a sound starts."""


class Heard(NamedTuple):
    pictures_nhwc: np.ndarray
    labels: list[str]


def hear(family: str, split: str) -> Heard:
    """The spectrograms of a data set, uint8, and what each is of."""
    seconds = SECONDS[FAMILIES[family].mark]
    sounds = list(FAMILIES[family].sounds(split))
    waves = (soundfile.read(io.BytesIO(sound.encoded), dtype="float32")[0] for sound in sounds)
    pictures_nhwc = np.stack([spectrogram_picture(wave_a, seconds=seconds) for wave_a in waves])
    return Heard(pictures_nhwc, [sound.label for sound in sounds])


class Source:
    """Batches, a third of each data set, from one seed."""

    def __init__(self, *, seed: int):
        self.rng = np.random.default_rng(seed)
        parts = [hear(family, "train") for family in CAPTIONS]
        forms = CAPTIONS.values()
        captions = [form.format(label) for form, part in zip(forms, parts, strict=True) for label in part.labels]
        words = [caption.replace("?", "").split()[:WORDS] for caption in captions]
        self.vocabulary = {word: n + 1 for n, word in enumerate(sorted({word for line in words for word in line}))}
        self.words_nl = np.zeros((len(words), WORDS), np.int32)
        for row, line in enumerate(words):
            self.words_nl[row, : len(line)] = [self.vocabulary[word] for word in line]
        self.captions_n = np.unique(captions, return_inverse=True)[1]
        self.pictures_nhwc = np.concatenate([part.pictures_nhwc for part in parts])
        ends = np.cumsum([len(part.labels) for part in parts])
        self.ranges = list(zip([0, *ends[:-1]], ends, strict=True))

    def batch(self, n: int) -> Pictures:
        shares = np.diff(np.linspace(0, n, len(self.ranges) + 1).astype(int))
        drawn = [self.rng.integers(low, high, share) for (low, high), share in zip(self.ranges, shares, strict=True)]
        rows = np.concatenate(drawn)
        pictures_nhwc = np.roll(self.pictures_nhwc[rows], int(self.rng.integers(-SHIFT, SHIFT + 1)), axis=2)
        images_nhwc = (pictures_nhwc.astype(np.float32) / 255 - MEAN_c) / STD_c
        return Pictures(images_nhwc.astype(np.float32), self.words_nl[rows], self.captions_n[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER.with_name("audio"), help="where the tower goes")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = Source(seed=options.seed)
    pair = nnx.jit(lambda: Pair(len(source.vocabulary) + 1, rngs=nnx.Rngs(options.seed)))()
    train(pair, source.batch, steps=options.steps, batch=options.batch, folder=options.folder)


if __name__ == "__main__":
    main()
