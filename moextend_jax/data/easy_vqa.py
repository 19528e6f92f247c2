"""The questions, pictures and descriptions of the installed package easy-vqa, by split and picture."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moextend_jax.folders import package

INSTALL = "pip install easy-vqa"
SHAPES = {"circle", "rectangle", "triangle"}
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
KINDS = {"shape_questions": SHAPES, "colour_questions": COLOURS, "yes_no_questions": {"yes", "no"}}
"""TABLE config -> the answers of its questions."""


def caption(turns: Sequence[tuple[str, str]]) -> str | None:
    """What an image's own questions and answers say of it: "a blue triangle", "a triangle", "a blue shape"."""
    true: set[str] = set()
    for question, answer in turns:
        words = set(re.findall(r"\w+", question))
        if answer not in ("yes", "no"):
            true |= words | {answer}
        elif (answer == "yes") != bool(words & {"no", "not"}):
            true |= words
    shape, colour = sorted(true & SHAPES), sorted(true & COLOURS)
    if not shape and not colour:
        return None
    return " ".join(["a", *colour[:1], *(shape[:1] or ["shape"])])


def asked(split: str, *, of: str) -> dict[int, list[tuple[str, str]]]:
    """By picture its questions and answers.

    Args:
      of: the data set that needs them.

    Raises:
      MoextendError: the package is not installed.
    """
    made, turns = package("easy_vqa", of=of, install=INSTALL), {}
    questions = made.get_train_questions() if split == "train" else made.get_test_questions()
    for question, answer, picture in zip(*questions, strict=True):
        turns.setdefault(picture, []).append((question, answer))
    return turns


def pictures(split: str) -> dict[int, str]:
    """The files of pictures."""
    made = package("easy_vqa", of="easy_vqa", install=INSTALL)
    return made.get_train_image_paths() if split == "train" else made.get_test_image_paths()
