"""The table of a run: accuracy on questions about images, forgetting on text, and what the report shows of both."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from moextend_jax import pipeline
from moextend_jax.config import ModelConfig, MoextendError
from moextend_jax.data.batches import Features, Pixels, text_batches
from moextend_jax.data.datasets import open_text
from moextend_jax.data.datasets import select as select_rows
from moextend_jax.distributed import gathered, put_whole
from moextend_jax.evaluate import questions as asking
from moextend_jax.evaluate.asking import Asker
from moextend_jax.evaluate.counting import Bar, counting
from moextend_jax.evaluate.running import asker_of, generator_of
from moextend_jax.evaluate.text_loss import text_loss, text_loss_step
from moextend_jax.extension import routing
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays
from moextend_jax.pipeline import Arrays, Run

TEXTS = Path(__file__).parents[1] / "assets" / "text"


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluates every model the work directory holds; writes summary.json, examples.json, finetune/routing.json."""
    with jax.set_mesh(run.mesh):
        return _evaluate(run)


def _evaluate(run: Run) -> dict[str, Any]:
    settings = run.settings.evaluate
    source = pipeline.open_source(run, settings.data, settings.split)
    if settings.questions > len(source):
        raise MoextendError(f"evaluate.questions = {settings.questions}, but {settings.data} has {len(source)} rows")
    chosen = np.random.default_rng(0).choice(len(source), settings.questions, replace=False)  # the same for every run
    test = select_rows(source, chosen)
    questions = asking.questions_of(test.read(range(len(test))))
    images = pipeline.images_of(run, source, f"{settings.data.partition('/')[0]}-{settings.split}")
    make_batch = functools.partial(
        asking.prompt_batch,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        images=images,
        patches=_patches(run),
        length=settings.length,
        rows=settings.batch_size,
    )

    training = pipeline.open_source(run, run.settings.finetune.data, run.settings.finetune.split)
    known = asking.questions_of(training.read(range(len(training))))
    models = _models(run)
    answers = {"question_only": asking.question_only_answers(known, questions)}
    losses: dict[str, dict[str, float]] = {}
    generators: dict[ModelConfig, Generator] = {}  # models of one structure share what is compiled
    with counting("evaluate", (len(models) - 1) * len(questions), unit="questions") as bar:
        for name, (model, arrays) in models.items():
            if name != "base":
                # A tower that was trained has no cached features.
                seen = pipeline.pixels_of(run, source) if name == "full" else images
                generator = generators.setdefault(model.config, generator_of(run, model))
                answers[name] = _answers(run, asker_of(run, generator, arrays, pictures=seen), questions, bar)
            if name != "aligned":
                losses[name] = _text_losses(run, model, arrays)

    summary: dict[str, Any] = {
        "easy_vqa": {name: asking.accuracy(questions, said) for name, said in answers.items()}
        | {"questions": len(questions)},
        "text_loss": {text: {name: of[text] for name, of in losses.items()} for text in ("wordnet", "kjv")},
    }
    if "moextend" in models:
        model, arrays = models["moextend"]
        _write_routing(run, model, arrays, make_batch, questions)
        shown = range(min(settings.examples, len(questions)))
        _write_examples(run, model, arrays, [questions[n] for n in shown], answers, make_batch, source.images)
    return summary


def _patches(run: Run) -> int:
    assert run.config.vision is not None
    return run.config.vision.patches


def _models(run: Run) -> dict[str, tuple[MoExtend, Arrays]]:
    plain = pipeline.abstract(run.config)
    models = {"base": (plain, pipeline.kappa(run)), "aligned": (plain, pipeline.kappa(run))}
    if (run.workdir / "finetune" / "result").exists():
        models["moextend"] = pipeline.moextend_model(run)
    if (run.workdir / "full" / "result").exists():
        models["full"] = (plain, pipeline.full_model(run))
    return models


def _answers(run: Run, asker: Asker, questions: Sequence[asking.Question], bar: Bar) -> list[str]:
    images = asker.pictures
    assert isinstance(images, Pixels | Features)
    prompts = [
        asking.prompt_of(
            question.text,
            images=tuple(images.row(ref) for ref in question.example.images),
            tokenizer=run.tokenizer,
            recipe=run.settings.recipe,
            patches=_patches(run),
            where=f"question {question.example.id}",
        )
        for question in questions
    ]
    said = [""] * len(prompts)
    for some in asker.complete(prompts, max_new_tokens=run.settings.evaluate.max_new_tokens):
        for index, ids in some:
            said[index] = run.tokenizer.decode(ids).strip()
        bar.add(len(some))
    return said


def _text_losses(run: Run, model: MoExtend, arrays: Arrays) -> dict[str, float]:
    settings = run.settings.evaluate
    step = text_loss_step(model, chunk=512)
    rows = functools.partial(
        text_batches,
        tokenizer=run.tokenizer,
        length=settings.text_length,
        batch_size=settings.text_batch_size,
        seed=None,
        epochs=1,
    )

    def loss(text: str) -> float:
        batches = (put_whole(batch, run.mesh) for batch in rows(open_text(TEXTS / f"{text}.txt")))
        return text_loss(step, arrays, batches)

    return {text: loss(text) for text in ("wordnet", "kjv")}


def _write_routing(run: Run, model: MoExtend, arrays: Arrays, make_batch, questions: Sequence[asking.Question]) -> None:
    rows = run.settings.evaluate.batch_size
    batches = (
        put_whole(make_batch(questions[first : first + rows]), run.mesh)
        for first in range(0, len(questions) - rows + 1, rows)
    )
    counts = routing.count_all(model, arrays, batches, recipe=run.settings.recipe)
    assert model.config.extension is not None
    record = {
        "layers": run.config.decoder.layers,
        "experts": run.config.decoder.experts,
        "new_experts": model.config.extension.new_experts,
        "extended_layers": list(model.config.extension.layers),
        "tokens": {"text": int(counts.text_tokens), "image": int(counts.image_tokens)},
        "counts": {"text": counts.text_ZO.tolist(), "image": counts.image_ZO.tolist()},
    }
    pipeline.write_json(run.workdir / "finetune" / "routing.json", record)


def _write_examples(run: Run, model, arrays, shown, answers, make_batch, images) -> None:
    """Questions with all answers, and for each patch the share of extended layers where it chose a new expert."""
    experts, extension = run.config.decoder.experts, model.config.extension
    batch = make_batch(shown)
    assert run.config.vision is not None
    ids_ZTk = jax.jit(lambda arrays, batch: with_arrays(model, arrays)(batch).routing.ids_Tk)(
        arrays, put_whole(batch, run.mesh)
    )
    chose_ZT = np.any(gathered(ids_ZTk) >= experts, axis=-1)
    share_BL = chose_ZT[list(extension.layers)].mean(axis=0).reshape(batch.ids_BL.shape)
    grid = round(run.config.vision.patches**0.5)
    records = []
    for row, question in enumerate(shown):
        share_P = share_BL[row][batch.patches_BL[row] >= 0][: grid * grid]
        picture = images[question.example.images[0].row].encoded
        records.append(
            {
                "image_png": base64.b64encode(picture).decode(),
                "question": question.text.replace("<image>", "").strip(),
                "answer": question.answer,
                "predictions": {name: said[row] for name, said in answers.items() if name != "question_only"},
                "grid": grid,
                "new_expert_share": share_P.reshape(grid, grid).tolist(),
            }
        )
    pipeline.write_json(run.workdir / "examples.json", records)


def summarise(run: Run, evaluated: dict[str, Any], *, total_seconds: float | None) -> dict[str, Any]:
    """summary.json: the evaluation, seconds of each stage, sizes, and whether the pretrained weights are untouched."""
    stages = {}
    for name in ("align", "extend", "finetune", "full"):
        path = run.workdir / name / "stage.json"
        if path.exists():
            stages[name] = json.loads(path.read_text())
    summary = evaluated | {
        "seconds": {name: stage["seconds"] for name, stage in stages.items()} | {"total": total_seconds},
        "parameters": {
            "total": sum(int(leaf.size) for leaf in run.pretrained.values()),
            "trained": {name: sum(stage["trained"].values()) for name, stage in stages.items()},
        },
        "frozen_unchanged": all(stage["frozen_unchanged"] for stage in stages.values())
        and ("moextend" not in evaluated["easy_vqa"] or pipeline.frozen_unchanged(run)),
    }
    pipeline.write_json(run.workdir / "summary.json", summary)
    return summary


def print_table(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="What was learned, what was forgotten")
    for column in ("", "easy-VQA accuracy", "WordNet loss (nats)", "King James loss (nats)", "forgetting"):
        table.add_column(column, justify="left" if not column else "right")
    accuracy, losses = summary["easy_vqa"], summary["text_loss"]
    rows = {
        "question only": ("question_only", None), "base": (None, "base"), "aligned only": ("aligned", "base"),
        "MoExtend": ("moextend", "moextend"), "full fine-tuning": ("full", "full"),
    }  # fmt: skip
    for title, (answered, read) in rows.items():
        if answered not in accuracy and (answered or read not in losses["kjv"]):
            continue
        cells = [f"{accuracy[answered]:.3f}" if answered else "", "", "", ""]
        if read:
            wordnet, kjv = losses["wordnet"], losses["kjv"]
            forgot = (wordnet[read] - wordnet["base"] + kjv[read] - kjv["base"]) / 2
            cells[1:] = [f"{wordnet[read]:.3f}", f"{kjv[read]:.3f}", f"{forgot:+.3f}"]
        table.add_row(title, *cells)
    console.print(table)
    console.print(
        f"{accuracy['questions']} questions; pretrained weights bit-identical: "
        f"{'yes' if summary['frozen_unchanged'] else 'NO'}; seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items() if value is not None)
    )
