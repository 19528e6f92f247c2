"""Checks the vision tower: can shape and colour of easy-VQA's test pictures be read linearly off its patch features?

In: a CLIPVisionModel folder. Out, on the terminal: test accuracy of a ridge probe trained on easy-VQA's train pictures,
for features at hidden state -2, averaged over the patches and side by side.

    PYTHONPATH=. python launch/make_base/probe.py moextend_jax/assets/base/vision
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from moextend_jax.checkpoints.huggingface import read_parameters, read_vision_config
from moextend_jax.config import DecoderConfig, of_pictures
from moextend_jax.media.image import prepare_image
from moextend_jax.models.vision import VisionTower
from moextend_jax.parameters import with_arrays

ANSWERS = {
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}


class Split(NamedTuple):
    features_nPC: np.ndarray
    labels: dict[str, np.ndarray]
    """Per kind, the index of each picture's answer, -1 where no question asks for it."""


def load_tower(folder: Path) -> VisionTower:
    config = read_vision_config(folder, feature_layer=-2)
    tower = nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0), dtype="float32"))
    whole = of_pictures(decoder=DecoderConfig(), vision=config)
    arrays = read_parameters(folder, table="clip", config=whole)
    float32 = {
        path.removeprefix("media/image/tower/"): jnp.asarray(array, jnp.float32) for path, array in arrays.items()
    }
    tower = with_arrays(tower, float32)
    assert isinstance(tower, VisionTower)
    return tower


def split(tower: VisionTower, *, paths: dict[int, str], questions: tuple[list, list, list]) -> Split:
    labels = {kind: np.full(len(paths), -1) for kind in ANSWERS}
    for _, answer, picture in zip(*questions, strict=True):
        for kind, answers in ANSWERS.items():
            if answer in answers:
                labels[kind][picture] = answers.index(answer)
    run = nnx.jit(lambda tower, images_nhwc: tower(images_nhwc))
    pictures = [Image.open(paths[i]) for i in range(len(paths))]
    pixels = [prepare_image(picture, size=tower.config.image_size, preparation="pad") for picture in pictures]
    chunks = [np.stack(pixels[i : i + 250]) for i in range(0, len(pixels), 250)]
    return Split(np.concatenate([jax.device_get(run(tower, chunk)) for chunk in chunks]), labels)


def ridge_accuracy(
    train_nf: np.ndarray, train_labels: np.ndarray, test_nf: np.ndarray, test_labels: np.ndarray
) -> float:
    """Share of test rows whose label scores highest in a ridge regression on one-hot labels."""
    mean_f, std_f = train_nf.mean(axis=0), train_nf.std(axis=0) + 1e-6
    train_nf, test_nf = ((x_nf - mean_f) / std_f for x_nf in (train_nf, test_nf))
    target_nc = np.eye(train_labels.max() + 1)[train_labels]
    gram_ff = train_nf.T @ train_nf + 0.01 * len(train_nf) * np.eye(train_nf.shape[1])
    weights_fc = np.linalg.solve(gram_ff, train_nf.T @ (target_nc - target_nc.mean(axis=0)))
    scores_nc = test_nf @ weights_fc + target_nc.mean(axis=0)
    return float((scores_nc.argmax(axis=1) == test_labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    tower = load_tower(parser.parse_args().folder)
    train = split(tower, paths=easy_vqa.get_train_image_paths(), questions=easy_vqa.get_train_questions())
    test = split(tower, paths=easy_vqa.get_test_image_paths(), questions=easy_vqa.get_test_questions())
    views = {
        "mean of the patches": lambda x_nPC: x_nPC.mean(axis=1),
        "mean and maximum": lambda x_nPC: np.concatenate([x_nPC.mean(axis=1), x_nPC.max(axis=1)], axis=1),
        "patches side by side": lambda x_nPC: x_nPC.reshape(len(x_nPC), -1),
    }
    for view, flatten in views.items():
        for kind in ANSWERS:
            known, asked = train.labels[kind] >= 0, test.labels[kind] >= 0
            accuracy = ridge_accuracy(
                flatten(train.features_nPC)[known],
                train.labels[kind][known],
                flatten(test.features_nPC)[asked],
                test.labels[kind][asked],
            )
            print(f"{view}: {kind} {accuracy:.3f} of {asked.sum()} test pictures")


if __name__ == "__main__":
    main()
