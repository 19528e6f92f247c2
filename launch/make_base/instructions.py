"""Text-only conversations, made here, that teach the base to read: questions about drawings and things described in
words, repeating words, and "what is a ...?" from WordNet's glosses. No pictures, and nothing of easy-VQA.

Run after text.py: `python launch/make_base/instructions.py --text BUILD`; writes reading.json, checking.json,
comparing.json, negating.json and turning.json there, in LLaVA's format. A model that has only read books cannot look
back at what it was told; an aligned picture is something told.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from images import COLOURS, COMMON, RARE

CONVERSATIONS = {
    "reading": {"drawing": 40_000, "thing": 14_000, "repeat": 6_000, "definition": 4_000},
    "checking": {"check": 24_000, "drawing": 4_000, "thing": 2_000, "repeat": 1_000, "definition": 1_000},
    "negating": {"negate": 24_000, "drawing": 4_000, "thing": 2_000, "repeat": 1_000, "definition": 1_000},
}
CHECKS = {"checking": "comparing", "negating": "turning"}
"""Files that hold only the rows of yes and no of another file."""
SHAPES = (*COMMON, *COMMON, *RARE)
PLACES = ("image", "picture", "drawing")

Turns = list[tuple[str, str]]


def drawing(draw: random.Random) -> Turns:
    """A described drawing and three questions about it."""
    colour, shape, place = draw.choice(list(COLOURS)), draw.choice(SHAPES), draw.choice(PLACES)
    description = _described(draw, colour, shape, place)
    turns = [_about_drawing(draw, colour, shape, place) for _ in range(3)]
    return [(f"{description} {turns[0][0]}", turns[0][1]), *turns[1:]]


def check(draw: random.Random, *, share_negated: float = 0.2) -> Turns:
    """A described drawing and whether other things are in it, each asked for once; some with "not"."""
    colour, shape, place = draw.choice(list(COLOURS)), draw.choice(SHAPES), draw.choice(PLACES)
    others = [other for other in COLOURS if other != colour], [other for other in set(SHAPES) if other != shape]
    asked = [(colour, True), (shape, True)]
    asked += [(other, False) for kind in others for other in draw.sample(sorted(kind), draw.randint(1, 2))]
    draw.shuffle(asked)
    turns = []
    for word, there in asked:
        thing = f"{word} shape" if word in COLOURS else word
        article = "an" if thing[0] in "aeiou" else "a"
        plain = [
            f"is there {article} {thing}?",
            f"does the {place} show {article} {thing}?",
            f"is {article} {thing} there?",
        ]
        negated = [f"is there not {article} {thing}?", f"is no {thing} in the {place}?"]
        if share_negated > 0.2:  # phrasings that came later: the files of earlier phases stay byte for byte
            negated += [f"does the {place} not show {article} {thing}?", f"is no {thing} there?"]
        turned = draw.random() < share_negated
        turns.append((draw.choice(negated if turned else plain), "yes" if there != turned else "no"))
    return [(f"{_described(draw, colour, shape, place)} {turns[0][0]}", turns[0][1]), *turns[1:]]


def _described(draw: random.Random, colour: str, shape: str, place: str) -> str:
    tags = [colour, shape] * draw.randint(1, 6)
    draw.shuffle(tags)
    return draw.choice(
        [f"a {colour} {shape}", f"{colour} {shape}", f"{shape}, {colour}", " ".join(tags), " ".join(tags)]
        + [f"The {place} shows a {colour} {shape}.", f"One {shape} is in the {place}, and it is {colour}."]
    )


def _about_drawing(draw: random.Random, colour: str, shape: str, place: str) -> tuple[str, str]:
    kind = draw.choice(["colour", "shape", "is it", "is it", "caption"])
    if kind == "colour":
        question = [
            f"what color is the {shape}?",
            f"what is the color of the {shape}?",
            f"which color has the {shape}?",
        ]
        return draw.choice([*question, f"what color is in the {place}?"]), colour
    if kind == "shape":
        question = [f"what shape is in the {place}?", f"what is the {colour} shape?", "what shape is it?"]
        return draw.choice([*question, f"which shape does the {place} show?"]), shape
    if kind == "caption":
        return draw.choice(["Describe it.", f"Describe the {place}.", "What do you see?"]), f"a {colour} {shape}"
    other_colour = colour if draw.random() < 0.5 else draw.choice(list(COLOURS))
    other_shape = shape if draw.random() < 0.5 else draw.choice(SHAPES)
    thing, there = draw.choice(
        [(other_shape, other_shape == shape), (f"{other_colour} shape", other_colour == colour)]
        + [(f"{other_colour} {other_shape}", (other_colour, other_shape) == (colour, shape))]
    )
    article = "an" if thing[0] in "aeiou" else "a"
    question, yes = draw.choice(
        [(f"is there {article} {thing}?", there), (f"does the {place} show {article} {thing}?", there)]
        + [(f"is there not {article} {thing} in the {place}?", not there), (f"is no {thing} there?", not there)]
    )
    return question, "yes" if yes else "no"


def thing(draw: random.Random, words: list[str]) -> Turns:
    """The same with any word, so that reading does not mean knowing the colours."""
    first, second, third, other = draw.sample(words, 4)
    asked = draw.choice([first, second, other])
    turns = [
        ("what comes first?", first),
        ("what comes second?", second),
        (f"what comes after {first}?", second),
        (f"what comes before {third}?", second),
        (f"is there {asked}?", "no" if asked == other else "yes"),
        (f"is {asked} there?", "no" if asked == other else "yes"),
        ("say it again.", f"{first}, {second}, {third}"),
    ]
    turns = draw.sample(turns, 3)
    return [(f"{first}, {second}, {third}. {turns[0][0]}", turns[0][1]), *turns[1:]]


def repeat(draw: random.Random, words: list[str]) -> Turns:
    some = ", ".join(draw.sample(words, draw.randint(1, 8)))
    return [(draw.choice([f"Repeat: {some}", f"{some}. Repeat it.", f"Say {some}."]), some)]


def definition(passage: str) -> Turns:
    """The first entry of a WordNet passage as a question and its answer."""
    word, _, gloss = passage.partition(": ")
    return [(f"what is {word.split(',')[0]}?", gloss.split("; ")[0].split(". ")[0][:200])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder that text.py wrote")
    folder = parser.parse_args().text
    draw = random.Random(0)
    glosses = [line for line in (folder / "wordnet.train.txt").read_text().splitlines() if line]
    words = sorted({line.split(":")[0].split(",")[0] for line in glosses})
    words = [word for word in words if re.fullmatch(r"[a-z]{3,10}", word)]
    makers = {
        "drawing": lambda: drawing(draw),
        "check": lambda: check(draw),
        "negate": lambda: check(draw, share_negated=0.5),
        "thing": lambda: thing(draw, words),
        "repeat": lambda: repeat(draw, words),
        "definition": lambda: definition(draw.choice(glosses)),
    }
    for name, counts in CONVERSATIONS.items():
        conversations = [makers[kind]() for kind, count in counts.items() for _ in range(count)]
        draw.shuffle(conversations)
        rows = [{"id": str(number), "conversations": _said(turns)} for number, turns in enumerate(conversations)]
        (folder / f"{name}.json").write_text(json.dumps(rows) + "\n")
        if name in CHECKS:
            checks = [row for row in rows if _checks(row["conversations"])]
            (folder / f"{CHECKS[name]}.json").write_text(json.dumps(checks) + "\n")


def _said(turns: Turns) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text} for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]


def _checks(said: list[dict[str, str]]) -> bool:
    """Four questions or more, all answered by yes or no."""
    return len(said) >= 8 and all(message["value"] in ("yes", "no") for message in said[1::2])


if __name__ == "__main__":
    main()
