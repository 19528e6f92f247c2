"""VQA accuracy: an answer and ten people's answers in, 0 to 1 out; and the two normalisations of answers.

`normalise` is that of VQA's evaluation; `normalise_m4c` is EvalAI's, as LLaVA and M4C use it for TextVQA and before
they send VQAv2 and VizWiz answers to a server: it first lowers case, drops commas and question marks, and puts a
space before 's. Their oddities are kept, because published numbers have them:

  - A mark goes away without a trace if it stands beside a space anywhere in the answer, or if the answer holds a
    comma between digits; else a space takes its place: "t-shirt" becomes "t shirt", "red - blue" becomes "red blue".
  - A full stop goes unless a digit follows: "3.5" and ".5" stay, "no." and "3." lose it. Only the first 32 go.
  - "none" is 0. Articles go wherever they stand, so that "a" alone becomes the empty answer.
  - Contractions get their apostrophe back ("dont" to "don't") only where they are a whole word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


APOSTROPHES = {
    word[:n] + word[n + 1 :]: word for word in CONTRACTED.split() for n, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction that lacks one of its apostrophes, to the whole one; the last entry is the official list's own slip."""


def strip_marks(text: str) -> str:
    numbers = NUMBER_WITH_COMMA.search(text) is not None
    stripped = text
    for mark in MARKS:
        beside_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if numbers or beside_space else " ")
    return FULL_STOP.sub("", stripped, count=32)


def plain_words(text: str) -> str:
    """Lower case, digits for number words, no articles, contractions with their apostrophes, single spaces."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def normalise(text: str) -> str:
    return plain_words(strip_marks(one_line(text)))


def normalise_m4c(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(text.strip())


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def agreement(answer: str, people: Sequence[str]) -> float:
    """Mean, over leaving out each person in turn, of min(1, how many of the others gave this answer / 3)."""
    same = sum(said == answer for said in people)
    leaving_same, leaving_other = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    return (same * leaving_same + (len(people) - same) * leaving_other) / len(people)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA's own rule: where all people agree to the letter, neither side is normalised, and the answer must be
    theirs to the letter."""
    answer, people = one_line(answer), [one_line(said) for said in people]
    if len(set(people)) > 1:
        answer, people = normalise(answer), [normalise(said) for said in people]
    return agreement(answer, people)
