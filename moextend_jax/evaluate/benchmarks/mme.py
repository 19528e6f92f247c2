"""MME: two yes/no questions per picture in 14 tasks; a task's score is accuracy plus accuracy+, at most 200.

In: `llava_mme.jsonl` and `MME_Benchmark_release_version/` (images, and labels as `question<TAB>Yes|No` text files).
Out: score per task and the totals of perception (10 tasks) and cognition (4). Accuracy+ is the share of pictures
with both questions right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.lines import decoded
from moextend_jax.evaluate.benchmarks.lines import read as read_bytes
from moextend_jax.evaluate.benchmarks.llava_questions import SHORT, by_prompt, reader
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, percent

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
RELEASE = "MME_Benchmark_release_version"
YES_OR_NO = "Please answer yes or no."


read = reader("llava_mme.jsonl", RELEASE, key=by_prompt)


def verdict(text: str) -> str:
    """MME's reading: yes or no within the first four letters, yes first; so "Not at all" is no, "Sure" is other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    labels = _labels(home / RELEASE)
    mistakes, points, others = Mistakes(), [], 0
    for question, text in answered:
        stem = str(question.question_id).split("/")[-1].split(".")[0]
        label = labels.get((_task(question), stem, _bare(question.recorded)))
        if label is None:
            mistakes.add(question.where, f"the question is not in {home / RELEASE / _task(question)}")
            continue
        points.append(float(verdict(text) == label))
        others += verdict(text) == "other"
    mistakes.check()
    pairs, single = _pairs(answered, points)
    rows: list[tuple[str | float | int, ...]] = []
    totals = {"perception": 0.0, "cognition": 0.0}
    for kind, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        for task in (task for task in tasks if task in pairs):
            accuracy = percent(point for pair in pairs[task] for point in pair)
            plus = percent(float(all(pair)) for pair in pairs[task])
            rows.append((task, 2 * len(pairs[task]), accuracy, plus, accuracy + plus))
            totals[kind] += accuracy + plus
    absent = [task for task in (*PERCEPTION, *COGNITION) if task not in pairs]
    rows += [(kind, "", "", "", total) for kind, total in totals.items()]
    rows.append(("total", "", "", "", sum(totals.values())))
    notes = [f"no questions of {', '.join(absent)}: totals are not comparable"] if absent else []
    notes += [f"{others} answers are neither yes nor no and count as wrong"] if others else []
    notes += [f"{single} pictures have one answered question alone and are left out"] if single else []
    whole = not set(PERCEPTION) & set(absent)
    headline = Headline("perception", totals["perception"]) if whole else None
    return Scores(headline, ("task", "questions", "accuracy %", "accuracy+ %", "score"), rows, points, notes)


def _pairs(answered: Sequence[Answered], points: Sequence[float]) -> tuple[dict[str, list[list[float]]], int]:
    """Per task the points of each picture's two questions, which are neighbours in the file; and how many
    pictures had only one."""
    pairs: dict[str, list[list[float]]] = {}
    single, waiting = 0, None
    for (question, _), point in zip(answered, points, strict=True):
        task = _task(question)
        if task not in PERCEPTION and task not in COGNITION:
            raise MoextendError(f"{question.where}: MME has no task {task!r}")
        if waiting and waiting[0] == question.question_id:
            pairs.setdefault(task, []).append([waiting[1], point])
            waiting = None
        else:
            single += waiting is not None
            waiting = question.question_id, point
    return pairs, single + (waiting is not None)


def _labels(release: Path) -> dict[tuple[str, str, str], str]:
    """(task, picture's stem, bare question) to yes or no."""
    if not release.is_dir():
        raise MoextendError(f"no folder {release}: MME's labels are its text files; put the released folder there")
    labels, mistakes = {}, Mistakes()
    for task in sorted(path for path in release.iterdir() if path.is_dir()):
        beside = task / "questions_answers_YN"
        for path in sorted((beside if (task / "images").is_dir() else task).glob("*.txt")):
            for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
                if not line.strip():
                    continue
                try:
                    question, _, label = decoded(line).strip().partition("\t")
                except ValueError as error:
                    mistakes.add(f"{path}:{number}", str(error))
                    continue
                if label.lower() not in ("yes", "no"):
                    mistakes.add(f"{path}:{number}", "not a question, a tab, and Yes or No")
                labels[task.name, path.stem.split(".")[0], _bare(question)] = label.lower()
    mistakes.check()
    return labels


def _task(question: Question) -> str:
    return str(question.question_id).split("/")[0]


def _bare(text: str) -> str:
    return text.replace(SHORT.strip(), "").replace(YES_OR_NO, "").strip()
