"""summary.json of a run and its table: what was learned, and what was forgotten."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from moextend_jax.config import ModelConfig
from moextend_jax.evaluate import chains
from moextend_jax.evaluate.importance import importance_table
from moextend_jax.models.flops import step_flops
from moextend_jax.runs import results
from moextend_jax.runs.models_of import frozen_unchanged, grown_config
from moextend_jax.runs.run import Run, write_json
from moextend_jax.terminal import table_of


def summarise(run: Run, evaluated: dict[str, Any], *, total_seconds: float | None) -> dict[str, Any]:
    """summary.json: the evaluation, seconds of each stage, sizes, and whether the pretrained weights are untouched.

    total_seconds: of the whole run over all its starts; None where stages were started one by one."""
    stages = {}
    for name in run.table.training():
        path = run.folder(name) / "stage.json"
        if path.exists():
            stages[name] = json.loads(path.read_text())
    summary = evaluated | {
        "seconds": {name: stage["seconds"] for name, stage in stages.items()} | {"total": total_seconds},
        "parameters": {
            "total": sum(int(leaf.size) for leaf in run.pretrained.values()),
            "trained": {name: sum(stage["trained"].values()) for name, stage in stages.items()},
        },
        "frozen_unchanged": all(stage["frozen_unchanged"] for stage in stages.values())
        and ("moextend" not in evaluated["accuracy"] or frozen_unchanged(run)),
    }
    if "moextend" in evaluated["accuracy"]:
        summary["flops_per_token"] = _flops_per_token(run)
    write_json(run.workdir / "summary.json", summary)
    return summary


def _flops_per_token(run: Run) -> dict[str, float]:
    """FLOPs per token of the decoder's forward pass over a row with an item of each medium. `of_base`: the extended
    model's divided by the base's, if the routers use all experts alike."""
    config = grown_config(run, run.table.grown(run.table.model("moextend").results))
    length = run.settings.finetune.length or run.settings.evaluate.text_length

    def forward(config: ModelConfig) -> float:
        parts = step_flops(config, trains=(), rows=1, length=length, items=dict.fromkeys(config.media, 1)).parts
        return sum(of["forward"] for part, of in parts.items() if not part.startswith("media/")) / length

    base = forward(run.config)
    return {"base": base, "of_base": forward(config) / base}


def print_table(summary: dict[str, Any], console: Console) -> None:
    accuracy, losses, answer_loss = summary["accuracy"], summary["text_loss"], summary.get("answer_loss")
    of_answers = ["answer loss (nats)"] if answer_loss else []
    headings = ["", f"{summary['data']} accuracy", *of_answers, "WordNet loss (nats)", "King James loss (nats)"]
    table = table_of([*headings, "forgetting"], title="What was learned, what was forgotten")
    table.add_row("question only", f"{accuracy['question_only']:.3f}")
    wordnet, kjv = losses["wordnet"], losses["kjv"]
    titles = results.titles_of(summary)
    rows = [name for name in ("base", *results.ANSWERING) if name != "base" or titles["aligned"] != titles["base"]]
    for name in rows:
        if name not in accuracy and name not in kjv:
            continue
        read = name if name in kjv else "base"  # its text losses are the base's
        forgotten = (wordnet[read] - wordnet["base"] + kjv[read] - kjv["base"]) / 2
        cells = [f"{accuracy[name]:.3f}" if name in accuracy else ""]
        cells += [f"{answer_loss[name]:.3f}"] if answer_loss else []
        table.add_row(titles[name], *cells, f"{wordnet[read]:.3f}", f"{kjv[read]:.3f}", f"{forgotten:+.3f}")
        for medium, of in summary.get("without", {}).items():
            if name in of:
                table.add_row(f"  without {medium}", f"{of[name]:.3f}")
    console.print(table)
    for name, measured in summary.get("importance", {}).items():
        console.print(importance_table(f"{titles[name]}: what each medium is worth", measured))
    for on, scores in summary.get("composed", {}).items():
        rows = ([name, f"{score:.3f}"] for name, score in scores.items())
        console.print(table_of(["", "accuracy"], rows, left=2, title=f"{on}: extensions put together"))
    for name, chain in summary.get("chains", {}).items():
        console.print(chains.chain_table(name, chain))
    console.print(
        f"questions: {accuracy['questions']}; pretrained weights bit-identical: "
        f"{'yes' if summary['frozen_unchanged'] else 'NO'}; seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items() if value is not None)
    )
