"""Tiny correct files of every benchmark, and all that is done with them.

In: an empty folder. Out: the files, and one of answers; `score` reads them all, as commands do.
"""

from __future__ import annotations

import json
from pathlib import Path

from moextend_jax.evaluate.benchmarks import table

RUNS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("pope", None): ("pope/llava_pope_test.jsonl", "pope/coco_pope_random.json"),
    ("gqa", None): ("gqa/llava_gqa_testdev_balanced.jsonl", "gqa/testdev_balanced_questions.json"),
    ("textvqa", None): ("textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/TextVQA_0.5.1_val.json"),
    ("mme", None): ("MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version/OCR/a.txt"),
    ("mmvet", None): ("mmvet/llava-mm-vet.jsonl",),
    ("vizwiz", None): ("vizwiz/llava_test.jsonl",),
    ("vizwiz", "val"): ("vizwiz/val.json",),
    ("vqav2", "val"): (
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/v2_mscoco_val2014_annotations.json",
    ),
    ("scienceqa", None): ("scienceqa/llava_test_CQM-A.json", "scienceqa/problems.json"),
    ("mmbench", None): ("mmbench/mmbench_dev_20230712.tsv",),
}  # fmt: skip
"""Benchmark and split -> the files that its scores are made of."""


def everything(folder: Path) -> None:
    """A tiny correct folder of every benchmark."""
    text = "Q?\nReference OCR token: A\nAnswer the question using a single word or phrase."
    people = [{"answer": "a", "answer_id": n} for n in range(10)]
    said = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
    entry = {"question_id": 1, "image": "a.jpg", "text": text, "category": "random"}
    lines = {
        "pope/llava_pope_test.jsonl": entry,
        "pope/coco_pope_random.json": {"image": "a.jpg", "text": "Q?", "label": "yes"},
        "gqa/llava_gqa_testdev_balanced.jsonl": entry,
        "textvqa/llava_textvqa_val_v051_ocr.jsonl": entry | {"question_id": "a"},
        "MME/llava_mme.jsonl": entry | {"question_id": "OCR/a.jpg", "text": "Q?"},
        "mmvet/llava-mm-vet.jsonl": entry,
        "vizwiz/llava_test.jsonl": entry,
    }
    problem = {"subject": "natural science", "grade": "grade3", "hint": "h", "image": None}
    label = {"answer": "a", "isBalanced": True, "types": {"structural": "query", "semantic": "obj"}}
    whole = {
        "gqa/testdev_balanced_questions.json": {"1": label},
        "textvqa/TextVQA_0.5.1_val.json": {"data": [{"image_id": "a", "question": "Q?", "answers": ["a"] * 10}]},
        "scienceqa/llava_test_CQM-A.json": [{"id": "1", "image": "1.png", "conversations": said}],
        "scienceqa/problems.json": {"1": problem},
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": {
            "questions": [{"question_id": 1, "image_id": 1, "question": "Q?"}]
        },
        "vqav2/v2_mscoco_val2014_annotations.json": {
            "annotations": [{"question_id": 1, "answer_type": "other", "answers": people}]
        },
        "vizwiz/val.json": [{"image": "a.jpg", "question": "Q?", "answer_type": "other", "answers": people}],
    }
    table_of = "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n1\tQ?\th\ta\tb\t\t\tA\taGk=\n"
    texts = {"mmbench/mmbench_dev_20230712.tsv": table_of}
    texts["MME/MME_Benchmark_release_version/OCR/a.txt"] = (
        "Q? Please answer yes or no.\tYes\n" + 9 * "Another? Yes or no.\tNo\n"
    )
    for name, content in {**lines, **whole, **texts}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")


def answer(folder: Path, name: str, split: str | None) -> None:
    """A file with an answer to every question."""
    questions = table.read(name, folder, split)
    with table.open_answers(name, folder / "answers.jsonl", questions=questions, model_id="m") as some:
        for question in questions:
            some.append(question, "A")


def score(folder: Path, name: str, split: str | None) -> None:
    questions = table.read(name, folder, split)
    answered = table.read_answered(name, folder / "answers.jsonl", questions=questions, partial=True)
    table.score(name, answered, folder, split)
    if table.benchmark(name).submission:
        table.submission(name, answered, folder, split)
