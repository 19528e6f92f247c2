"""The benchmarks: one row each, and the functions that a run or a scorer calls by a benchmark's name.

In: a name, and the folder where the user has put the official files, laid out as LLaVA's playground/data/eval (or
the benchmark's own folder in it). Out: questions, an answers file to append to, scores, a server's file.
docs/evaluation.md says which files lie where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks import (
    answers,
    easy_vqa,
    gqa,
    llava_questions,
    mcub,
    mmbench,
    mme,
    open_ended,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)  # fmt: skip
from moextend_jax.evaluate.benchmarks.answers import Answers
from moextend_jax.evaluate.benchmarks.question import Answered, Key, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """read, score, submission: see any of the modules. All take the benchmark's folder and a split."""

    title: str
    folders: tuple[str, ...]
    """Its folder below the user's; the first that is there."""
    splits: tuple[str, ...]
    """The first is the default."""
    read: Callable[[Path, str], list[Question]]
    score: Callable[[Sequence[Answered], Path, str], Scores]
    submission: Callable[[Sequence[Answered], Path, str], str] | None = None
    """The text of the file that a server or a judge takes."""
    max_new_tokens: int
    """LLaVA's, so that long answers are cut where its are."""
    key: Callable[[dict[str, Any]], Key] = llava_questions.by_id
    """An entry of an answers file to what matches it to its question."""
    repeats: bool = False
    """Whether the official file may ask the same thing of the same picture twice."""
    recorded: Callable[[Question], dict[str, Any]] | None = None
    """Further fields of its lines in an answers file."""
    strangers: bool = False
    """Whether lines of an answers file that answer none of the questions count, as wrong; else they are an error."""
    asked: bool = True
    """Whether `moextend eval --benchmark` can ask its questions; False: their answers are scored, no more."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "vqav2": Benchmark(
        title="VQAv2", folders=("vqav2",), splits=("test-dev", "test", "val"), max_new_tokens=128,
        read=vqav2.read, score=vqav2.score, submission=vqav2.submission,
    ),
    "gqa": Benchmark(
        title="GQA", folders=("gqa",), splits=("testdev_balanced",), max_new_tokens=128,
        read=gqa.read, score=gqa.score, submission=gqa.submission,
    ),
    "vizwiz": Benchmark(
        title="VizWiz", folders=("vizwiz",), splits=("test", "val"), max_new_tokens=128,
        read=vizwiz.read, score=vizwiz.score, submission=vizwiz.submission,
    ),
    "scienceqa": Benchmark(
        title="ScienceQA", folders=("scienceqa",), splits=("test",), max_new_tokens=1024,
        read=scienceqa.read, score=scienceqa.score,
    ),
    "textvqa": Benchmark(
        title="TextVQA", folders=("textvqa",), splits=("val",), max_new_tokens=128,
        read=textvqa.read, score=textvqa.score, key=textvqa.key, repeats=True,
    ),
    "pope": Benchmark(
        title="POPE", folders=("pope",), splits=("test",), max_new_tokens=128,
        read=pope.read, score=pope.score,
    ),
    "mme": Benchmark(
        title="MME", folders=("MME",), splits=("test",), max_new_tokens=128,
        read=mme.read, score=mme.score, key=llava_questions.by_prompt,
    ),
    "mmbench": Benchmark(
        title="MMBench", folders=("mmbench",), splits=("en",), max_new_tokens=1024,
        read=mmbench.read, score=mmbench.score, submission=mmbench.submission,
        key=mmbench.by_round, recorded=mmbench.recorded,
    ),
    "mmbench_cn": Benchmark(
        title="MMBench-CN", folders=("mmbench_cn", "mmbench"), splits=("cn",), max_new_tokens=1024,
        read=mmbench.read, score=mmbench.score, submission=mmbench.submission,
        key=mmbench.by_round, recorded=mmbench.recorded,
    ),
    "mmvet": Benchmark(
        title="MM-Vet", folders=("mmvet", "mm-vet"), splits=("test",), max_new_tokens=1024,
        read=llava_questions.reader("llava-mm-vet.jsonl", "images"), score=open_ended.judged(open_ended.MMVET),
        submission=open_ended.submission_mmvet,
    ),
    "llava_bench": Benchmark(
        title="LLaVA-Bench", folders=("llava-bench-in-the-wild",), splits=("test",), max_new_tokens=1024,
        read=llava_questions.reader("questions.jsonl", "images"), score=open_ended.judged(open_ended.LLAVA_BENCH),
    ),
    "mcub": Benchmark(
        title="MCUB", folders=("mcub", "MCUB"), splits=mcub.SPLITS, max_new_tokens=128,
        read=mcub.read, score=mcub.score, strangers=True, asked=False,
    ),
    "easy_vqa": Benchmark(
        title="easy-VQA", folders=(), splits=("test", "train"), max_new_tokens=8,
        read=easy_vqa.read, score=easy_vqa.score,
    ),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise MoextendError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read(name: str, folder: Path | None, split: str | None = None) -> list[Question]:
    """All questions of a benchmark, in the official order. Images are not looked at: `question.check_images` does.

    `folder` may be None for easy_vqa, whose files are a package's. `split` None is the benchmark's default.

    Raises:
      MoextendError: unknown name or split, missing files; lines that are not JSON or UTF-8, lack a field, or repeat a
        question's id.
    """
    found, home, split = _open(name, folder, split)
    questions = found.read(home, split)
    keys = answers.numbered(question.key for question in questions)
    mistakes, first = Mistakes(), {}
    for question, key in zip(questions, keys, strict=True):
        if key[-1] and not found.repeats:
            same = first[question.key]
            mistakes.add(question.where, f"the same question as {same.where} (id {question.question_id!r})")
        first.setdefault(question.key, question)
    mistakes.check()
    return [dataclasses.replace(question, key=key) for question, key in zip(questions, keys, strict=True)]


def open_answers(name: str, path: Path, *, questions: Sequence[Question], model_id: str) -> Answers:
    """An answers file to append to: `.texts` are the answers so far, by key, `.append(question, text)`
    adds one. Use as a context manager; see `answers.open_answers`."""
    found = benchmark(name)
    return answers.open_answers(path, questions=questions, key=found.key, model_id=model_id, more=found.recorded)


def read_answered(name: str, path: Path, *, questions: Sequence[Question], partial: bool = False) -> list[Answered]:
    """Questions with their answers, in the questions' order; `partial` leaves out those that have none.

    Of a benchmark that counts them, answers to no question come last, as answers to questions without a text.

    Raises:
      MoextendError: names lines of the file that answer nothing, and, unless `partial`, questions without answer.
    """
    row = benchmark(name)
    texts = answers.read_answers(path, questions=questions, key=row.key, strangers=row.strangers)
    mistakes = Mistakes()
    for question in questions:
        if question.key not in texts and not partial:
            mistakes.add(question.where, f"question {question.question_id!r} has no answer in {path}")
    mistakes.check("Go on with the run that answers them, or score what there is with --partial")
    answered = [Answered(question, texts.pop(question.key)) for question in questions if question.key in texts]
    answered += [
        Answered(Question(question_id=key[0], text="", image=None, where=str(path), key=key), text)
        for key, text in texts.items()
    ]
    if not answered:
        raise MoextendError(f"{path} holds no answers")
    return answered


def score(name: str, answered: Sequence[Answered], folder: Path | None, split: str | None = None) -> Scores:
    """Scores by the benchmark's own rule; of a split whose labels are not public, only what to do about it."""
    found, home, split = _open(name, folder, split)
    return found.score(answered, home, split)


def submission(name: str, answered: Sequence[Answered], folder: Path | None, split: str | None = None) -> str:
    """The text of the file that the benchmark's server or judge takes."""
    found, home, split = _open(name, folder, split)
    if found.submission is None:
        raise MoextendError(f"{found.title} has no file to submit: its answers are scored here or taken as they are")
    return found.submission(answered, home, split)


def _open(name: str, folder: Path | None, split: str | None) -> tuple[Benchmark, Path, str]:
    found = benchmark(name)
    split = split or found.splits[0]
    if split not in found.splits:
        raise MoextendError(f"{found.title} has no split {split!r}; there are {', '.join(found.splits)}")
    if folder is None and found.folders:
        raise MoextendError(f"{found.title} needs the folder of its files; docs/evaluation.md says which they are")
    folder = folder or Path()
    if found.folders and not folder.is_dir():
        raise MoextendError(f"no folder {folder}")
    inner = [folder / one for one in found.folders if (folder / one).is_dir()]
    return found, (inner[0] if inner else folder), split
