"""Two tasks of lm-eval on a file of one's own: choices that are scored, and texts whose words are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
WORDS = """
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
"""
TASKS = {"local_choice": ("multiple_choice", CHOICE), "local_words": ("loglikelihood_rolling", WORDS)}


def write_tasks(folder: Path, lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Their names. Lines have "question", "choices" and "answer", the number of the right one."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, (kind, rest) in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, rest=rest))
    return list(TASKS)
