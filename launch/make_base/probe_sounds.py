"""Checks the tower for sounds: can the instrument, the word and the question be read linearly off its patch features?

In: a CLIPVisionModel folder. Out, on the terminal: accuracies of a ridge probe trained on the train splits of
data/made_sounds.py, for features at hidden state -2, on test splits: other keys, another sound font, other voices, a
person's recordings.

    PYTHONPATH=. python launch/make_base/probe_sounds.py moextend_jax/assets/base/audio
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from probe import load_tower, ridge_accuracy
from sounds import hear

from moextend_jax.media.image import MEAN_c, STD_c
from moextend_jax.models.vision import VisionTower

TESTS = {
    "instruments": ("instruments", "instruments_fluid"),
    "spoken_words": ("spoken_words", "recorded_words"),
    "spoken_questions": ("spoken_questions",),
}
"""By the training set."""


def features(tower: VisionTower, pictures_nhwc: np.ndarray) -> np.ndarray:
    run = nnx.jit(lambda tower, images_nhwc: tower(images_nhwc))
    padded = np.concatenate([pictures_nhwc, pictures_nhwc[: -len(pictures_nhwc) % 256]])
    chunks = (padded[start : start + 256] for start in range(0, len(padded), 256))
    rows = [jax.device_get(run(tower, ((chunk / 255 - MEAN_c) / STD_c).astype(np.float32))) for chunk in chunks]
    return np.concatenate(rows)[: len(pictures_nhwc)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    tower = load_tower(parser.parse_args().folder)
    views = {
        "mean of the patches": lambda x_nPC: x_nPC.mean(axis=1),
        "patches side by side": lambda x_nPC: x_nPC.reshape(len(x_nPC), -1),
    }
    for trained, tests in TESTS.items():
        train = hear(trained, "train")
        known_nPC = features(tower, train.pictures_nhwc)
        names = [_name(trained, label) for label in train.labels]
        numbers = {name: n for n, name in enumerate(sorted(set(names)))}
        known = np.array([numbers[name] for name in names])
        for test in tests:
            heard = hear(test, "test")
            asked_nPC = features(tower, heard.pictures_nhwc)
            asked = np.array([numbers[_name(trained, label)] for label in heard.labels])
            for view, flatten in views.items():
                accuracy = ridge_accuracy(flatten(known_nPC), known, flatten(asked_nPC), asked)
                print(f"{test}, {view}: {accuracy:.3f} of {len(asked)}, {len(numbers)} classes", flush=True)


def _name(family: str, label: str) -> str:
    return label.split()[-1] if family == "instruments" else label


if __name__ == "__main__":
    main()
