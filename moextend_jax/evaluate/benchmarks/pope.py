"""POPE: "Is there a ... in the image?", yes or no, in three splits of ever harder objects that are not there.

In: `llava_pope_test.jsonl`, `coco/coco_pope_{adversarial,popular,random}.json` (labels) and images `val2014/`. Out:
per split accuracy, precision, recall, F1 (yes is positive) and the share of yes; papers print the mean F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moextend_jax.evaluate.benchmarks.lines import first_file, json_lines, value
from moextend_jax.evaluate.benchmarks.llava_questions import reader
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores

FILE = "llava_pope_test.jsonl"


read = reader(FILE, "val2014")


def says_yes(text: str) -> bool:
    """Not where the first sentence holds No, no or not between spaces (commas aside); everything else is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    labels = _labels(home)
    of: dict[str, list[tuple[bool, bool]]] = {}
    for question, text in answered:
        of.setdefault(question.category, []).append((says_yes(text), labels[question.question_id]))
    rows = [(name, len(pairs), *_measures(pairs)) for name, pairs in sorted(of.items())]
    means = [sum(float(row[n]) for row in rows) / len(rows) for n in range(2, 7)]
    columns = ("split", "questions", "accuracy %", "precision %", "recall %", "F1 %", "yes %")
    points = [float(says_yes(text) == labels[question.question_id]) for question, text in answered]
    return Scores(Headline("mean F1", means[3]), columns, [*rows, ("mean", len(points), *means)], points)


def _measures(pairs: Sequence[tuple[bool, bool]]) -> list[float]:
    both = sum(said and right for said, right in pairs)
    said, right = sum(said for said, _ in pairs), sum(right for _, right in pairs)
    correct = sum(said == right for said, right in pairs)
    precision, recall = both / max(said, 1), both / max(right, 1)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return [100 * share for share in (correct / len(pairs), precision, recall, f1, said / len(pairs))]


def _labels(home: Path) -> dict[str | int, bool]:
    """Question n of a category is line n of the category's label file; both texts must agree."""
    categories: dict[str, list[Question]] = {}
    for question in read(home, "test"):
        categories.setdefault(question.category, []).append(question)
    labels, mistakes = {}, Mistakes()
    for name, questions in categories.items():
        path = first_file(home, f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
        entries = list(json_lines(path, mistakes))
        mistakes.check()
        if len(entries) != len(questions):
            mistakes.add(str(path), f"{len(entries)} labels for {len(questions)} questions of {home / FILE}")
        for question, (where, entry) in zip(questions, entries, strict=False):
            label = value(entry, "label", str, where, mistakes)
            text, image = entry.get("text"), entry.get("image")
            if label not in ("yes", "no", None):
                mistakes.add(where, f"label {label!r} is neither yes nor no")
            if image != question.fields["image"] or text != question.text.split("\n")[0]:
                mistakes.add(where, f"not the question of {question.where}")
            labels[question.question_id] = label == "yes"
    mistakes.check("LLaVA's question file goes with POPE's files of commit e3e3926")
    return labels
