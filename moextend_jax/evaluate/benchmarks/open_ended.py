"""MM-Vet and LLaVA-Bench (in the wild): free answers, which a judge model of a paid service scores, not we.

In: LLaVA's question files. Out: no score, but the file that the judge's script takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moextend_jax.evaluate.benchmarks.lines import first_file
from moextend_jax.evaluate.benchmarks.llava_questions import llava_questions
from moextend_jax.evaluate.benchmarks.question import Answered, Question
from moextend_jax.evaluate.benchmarks.scores import Scores


def read_mmvet(home: Path, split: str) -> list[Question]:
    return llava_questions(first_file(home, "llava-mm-vet.jsonl"), home / "images")


def score_mmvet(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    return Scores(None, notes=["MM-Vet's evaluator (GPT-4) scores this: --submission FILE.json writes what it takes"])


def submission_mmvet(answered: Sequence[Answered], home: Path, split: str) -> str:
    """`{"v1_0": answer, ...}`, the results file of MM-Vet's evaluator."""
    return json.dumps({f"v1_{question.question_id}": text for question, text in answered}, indent=2)


def read_llava_bench(home: Path, split: str) -> list[Question]:
    return llava_questions(first_file(home, "questions.jsonl"), home / "images")


def score_llava_bench(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    note = "LLaVA's eval_gpt_review_bench.py (GPT-4) scores this; it takes the answers file as it is, as --answer-list"
    return Scores(None, notes=[note])
