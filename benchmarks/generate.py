"""Questions answered a second here and in PyTorch: the same model, questions and cores, and the ratio.

python benchmarks/generate.py --workdir work/demo [--torch-python PYTHON] [--questions 2000] [--rounds 3]

In: the work directory of a finished `make demo`, and an interpreter that has torch. Out: a table, one row a round (each
runs both, one after the other, so that what else the machine does is shared), and how many answers are the same.
Compiling is not in the time, reading images is. CPU seconds are told too: they hold on a machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter of the torch environment")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    sys.path.insert(0, str(ROOT))

    from moextend_jax.evaluate.asking import asker_of
    from moextend_jax.evaluate.benchmarks import table
    from moextend_jax.evaluate.pictures import QuestionPictures
    from moextend_jax.evaluate.questions import prompt_of
    from moextend_jax.runs.askable import open_place
    from moextend_jax.runs.export import ExportOptions, export
    from moextend_jax.runs.place import Place

    opened = open_place(Place(workdir=args.workdir))
    assert opened.config.vision is not None
    questions = table.read("easy_vqa", None)[: args.questions]
    medium, preparation = opened.config.media["image"], opened.recipe.image_preparation
    pictures = QuestionPictures(questions, medium=medium, preparation=preparation)
    prompts = [
        prompt_of(
            question.text, items={"image": images}, spans=opened.config.spans({"image": len(images)}),
            tokenizer=opened.tokenizer, recipe=opened.recipe, where=question.where,
        )
        for question, images in zip(questions, pictures.numbers, strict=True)
    ]  # fmt: skip
    asker = asker_of(opened, readers={"image": pictures})

    def answer() -> tuple[float, float, list[list[int]]]:
        said: list[list[int]] = [[] for _ in prompts]
        wall, cpu = time.perf_counter(), time.process_time()
        for some in asker.complete(prompts, max_new_tokens=NEW_TOKENS):
            for index, ids in some:
                said[index] = ids
        return time.perf_counter() - wall, time.process_time() - cpu, said

    compiling = answer()[0]
    tags = opened.tokenizer.tags
    asked = {
        "prompts": [
            {"ids": prompt.ids_L.tolist(), "image": str(question.image)}
            for prompt, question in zip(prompts, questions, strict=True)
        ],
        "pad": tags.pad, "eos": opened.tokenizer.eos, "suppress": [tags.start, tags.end, tags.pad],
        "feature_layer": opened.config.vision.feature_layer, "max_new_tokens": NEW_TOKENS,
    }  # fmt: skip
    rounds, chosen = [], []
    with tempfile.TemporaryDirectory() as scratch:
        exported, file = Path(scratch) / "model", Path(scratch) / "prompts.json"
        export(ExportOptions(args.workdir, exported, layout="released"))
        file.write_text(json.dumps(asked))
        for _ in range(args.rounds):
            ours = answer()
            done = subprocess.run(
                [
                    args.torch_python, str(ROOT / "benchmarks" / "torch_generate.py"), str(exported), str(file),
                    f"--threads={args.threads}", *chosen,
                ],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            theirs = json.loads(done.stdout)
            chosen = [f"--experts={theirs['experts']}", f"--rows={theirs['rows']}"]  # tried out once
            same = sum(a == b for a, b in zip(ours[2], theirs.pop("said"), strict=True))
            rounds.append({"jax_wall": ours[0], "jax_cpu": ours[1], **theirs, "same": same})
    count = len(questions)
    shown = Table("questions/s", "JAX", "PyTorch", "ratio", "per CPU second: JAX", "PyTorch", "ratio", "same answers")
    for n, one in enumerate(rounds, 1):
        pairs = [(one["jax_wall"], one["wall_seconds"]), (one["jax_cpu"], one["cpu_seconds"])]
        cells = [f"{x:,.1f}" for a, b in pairs for x in (count / a, count / b, b / a)]
        shown.add_row(f"round {n}", *cells, f"{one['same']}/{count}")
    console = Console(width=140)
    console.print(shown)
    console.print(
        f"PyTorch {rounds[0]['torch']}, transformers {rounds[0]['transformers']}, experts {rounds[0]['experts']}, "
        f"{rounds[0]['rows']} rows a batch; first pass here, with {sum(asker.generator.programs.values())} programs to "
        f"compile: {compiling:.1f} s"
    )
    if args.json:
        args.json.write_text(json.dumps({"questions": count, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
