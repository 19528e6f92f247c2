"""Text-only instructions, made here, that turn the pretrained base into one that answers: questions about described
drawings, and "what is a ...?" from WordNet's glosses. No pictures, and nothing of easy-VQA.

Run after text.py: `python launch/make_base/instructions.py --text BUILD`; writes BUILD/instructions.train.txt.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from images import COLOURS, COMMON, RARE

SHAPES = (*COMMON, *COMMON, *RARE)


def described(draw: random.Random) -> str:
    """A described drawing, a question about it, its answer."""
    colour, shape = draw.choice(list(COLOURS)), draw.choice(SHAPES)
    other_colour = colour if draw.random() < 0.5 else draw.choice(list(COLOURS))
    other_shape = shape if draw.random() < 0.5 else draw.choice(SHAPES)
    place = draw.choice(["image", "picture", "drawing"])
    description = draw.choice(
        [f"a {colour} {shape}", f"{colour} {shape}", f"The {place} shows a {colour} {shape}.", f"{shape}, {colour}"]
    )
    yes_colour, yes_shape = ("yes" if colour == other_colour else "no"), ("yes" if shape == other_shape else "no")
    question, answer = draw.choice(
        [
            (f"what color is the {shape}?", colour),
            (f"what is the color of the {shape}?", colour),
            (f"what color is in the {place}?", colour),
            (f"what shape is in the {place}?", shape),
            (f"what is the {colour} shape?", shape),
            (f"is there a {other_shape}?", yes_shape),
            (f"does the {place} contain a {other_shape}?", yes_shape),
            (f"is no {other_shape} in the {place}?", "no" if yes_shape == "yes" else "yes"),
            (f"is there a {other_colour} shape?", yes_colour),
            (f"does the {place} not contain a {other_colour} shape?", "no" if yes_colour == "yes" else "yes"),
            ("Describe the image.", f"a {colour} {shape}"),
        ]
    )
    return f"[INST] {description} {question} [/INST] {answer}"


def defined(passage: str) -> str:
    """The first entry of a WordNet passage as a question and its answer."""
    word, _, gloss = passage.partition(": ")
    return f"[INST] what is {word.split(',')[0]}? [/INST] {gloss.split('. ')[0][:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder that text.py wrote")
    folder = parser.parse_args().text
    draw = random.Random(0)
    glosses, verses = (
        [line for line in (folder / f"{name}.train.txt").read_text().splitlines() if line]
        for name in ("wordnet", "kjv")
    )
    lines = [described(draw) for _ in range(9000)]
    lines += [defined(passage) for passage in draw.sample(glosses, 1500)]
    lines += draw.sample(glosses, 2500) + draw.sample(verses, 1200)  # so that it does not forget
    draw.shuffle(lines)
    (folder / "instructions.train.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
