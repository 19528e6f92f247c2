"""MM-Vet and LLaVA-Bench (in the wild): free answers, which a judge model of a paid service scores, not we.

In: answers. Out: no score, but the file that the judge's script takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from moextend_jax.evaluate.benchmarks.question import Answered
from moextend_jax.evaluate.benchmarks.scores import Scores


def judged(note: str) -> Callable[[Sequence[Answered], Path, str], Scores]:
    """`score` of a benchmark that is not scored here: what to do instead."""
    return lambda answered, home, split: Scores(None, notes=[note])


MMVET = "MM-Vet's evaluator (GPT-4) scores this: --submission FILE.json writes what it takes"
LLAVA_BENCH = (
    "LLaVA's eval_gpt_review_bench.py (GPT-4) scores this; it takes the answers file as it is, as --answer-list"
)


def submission_mmvet(answered: Sequence[Answered], home: Path, split: str) -> str:
    """`{"v1_0": answer, ...}`, the results file of MM-Vet's evaluator."""
    return json.dumps({f"v1_{question.question_id}": text for question, text in answered}, indent=2)
