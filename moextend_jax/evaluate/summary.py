"""The table of a run: accuracy on questions about images, forgetting on text, and what the report shows of both."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from moextend_jax import distributed
from moextend_jax.config import Batch, MoextendError
from moextend_jax.data.batches import Features, Pixels, batches, text_batches
from moextend_jax.data.datasets import AnyImages, Example, Source, open_text
from moextend_jax.data.datasets import select as select_rows
from moextend_jax.data.faults import Fault
from moextend_jax.data.forms import parts_of
from moextend_jax.data.images import framed
from moextend_jax.data.measure import measure
from moextend_jax.evaluate import questions
from moextend_jax.evaluate.asking import Asker
from moextend_jax.evaluate.pictures import PIXELS, as_png
from moextend_jax.evaluate.prompts import Prompt, bucket
from moextend_jax.evaluate.running import asker_of
from moextend_jax.extension import routing
from moextend_jax.mesh import Program, on_host, place_rows, place_whole
from moextend_jax.models.mixtral import check_length
from moextend_jax.parameters import with_arrays
from moextend_jax.progress import Bar, counting, preparing
from moextend_jax.runs.askable import Askable, askable
from moextend_jax.runs.data_of import images_of, open_source, pixels_of, source_of, unseen_source
from moextend_jax.runs.models_of import frozen_unchanged
from moextend_jax.runs.ready import too_many_questions
from moextend_jax.runs.results import ANSWERING, MODELS, Data, result, training, trains_tower
from moextend_jax.runs.run import Run, write_json
from moextend_jax.settings import StageSettings
from moextend_jax.train.held_out import loss_step, mean_loss

TEXTS = Path(__file__).parents[1] / "assets" / "text"


class PromptedQuestion(NamedTuple):
    """A question of the evaluation data and its prompt, whose images are rows of what pictures are read from."""

    question: questions.Question
    prompt: Prompt


class Asked(NamedTuple):
    """Rows whose first question is asked, of a data set and split; `title` names them for people."""

    source: Source
    data: str
    split: str
    title: str


def check(run: Run) -> None:
    """Raises a MoextendError for what `evaluate` would find wrong with its questions, before any model is there."""
    asked, settings = _asked(run), run.settings.evaluate
    try:
        prompted, _ = _prompted_questions(run, asked, pixels_of(run, asked.source))
    except Fault as fault:
        raise MoextendError(f"evaluate: {fault}") from fault
    longest = settings.max_new_tokens + max(len(item.prompt.ids_L) for item in prompted)
    check_length(max(longest, settings.text_length), run.config.decoder)


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluates every model the work directory holds and returns accuracies, text losses and, of a held-out part of the
    finetune data, losses of its answers; writes examples.json and finetune/routing.json.

    Whatever can be wrong with the data shows before the first model is asked: a faulty conversation is left out, or
    is an error, as training does with it.
    """
    settings, asked = run.settings.evaluate, _asked(run)
    if not settings.data:
        _check_unseen(run)
    source = asked.source
    images, pixels = images_of(run, source, data=asked.data, split=asked.split), pixels_of(run, source)
    with preparing("preparing the questions"):
        prompted, skipped = _prompted_questions(run, asked, images)
    if skipped and distributed.first():
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        print(f"evaluate: {skipped.total()} of {len(source)} questions are left out: {kinds}")
    answer_stage = None if settings.data else _answer_stage(run, source)
    known = source_of(run, Data("finetune"))
    texts = [item.question.text for item in prompted]
    guesses = questions.question_only_answers(known, texts, tokenizer=run.tokenizer)
    answers = {"question_only": guesses}
    losses: dict[str, dict[str, float]] = {}
    answer_losses: dict[str, float] = {}
    trained = [name for name in ANSWERING if name == "aligned" or all(map(run.has, MODELS[name].results))]

    def ask(name: str, bar: Bar) -> None:
        opened, pictures = askable(run, name), None  # gone when the next is opened: memory need not hold all
        if MODELS[name].sees:
            # A tower that was trained has no cached features.
            pictures = pixels if trains_tower(MODELS[name].results, recipe=run.settings.recipe) else images
            asker = asker_of(opened, pictures=pictures)
            answers[name] = _answers(run, asker, [_seen(item, pictures) for item in prompted], bar)
        if answer_stage is not None:
            answer_losses[name] = _answer_loss(run, opened, source, stage=answer_stage, images=pictures)
        if not MODELS[name].text_is_bases:
            losses[name] = _text_losses(run, opened)

    with counting("evaluate", len(trained) * len(prompted), unit="questions") as bar:
        for name in ("base", *trained):
            ask(name, bar)
    right = [item.question.answer for item in prompted]
    summary: dict[str, Any] = {
        "data": asked.title,
        "accuracy": {name: questions.accuracy(right, texts) for name, texts in answers.items()}
        | {"questions": len(prompted)},
        "text_loss": {text: {name: of[text] for name, of in losses.items()} for text in ("wordnet", "kjv")},
    }
    if answer_losses:
        summary["answer_loss"] = answer_losses
    if "moextend" in trained:
        opened, in_batches = askable(run, "moextend"), functools.partial(_batches, run, images=images)
        _write_routing(run, opened, in_batches(prompted))
        pictured = [row for row, item in enumerate(prompted) if item.prompt.images][: settings.examples]
        examples = [prompted[row] for row in pictured]
        predictions = {name: [given[row] for row in pictured] for name, given in answers.items() if name in trained}
        _write_examples(run, opened, examples, in_batches(examples), predictions, source.images)
    return summary


def _asked(run: Run) -> Asked:
    """The rows that are asked, the same for every run."""
    settings = run.settings.evaluate
    unseen = unseen_source(run)
    of = settings if unseen is None else run.settings.finetune
    source = open_source(run, settings.data, settings.split) if unseen is None else unseen
    count = settings.questions if unseen is None else min(settings.questions, len(source))
    if count > len(source):
        raise too_many_questions(settings, len(source))
    chosen = np.random.default_rng(0).choice(len(source), count, replace=False)
    title = title_of(of.data) if unseen is None else f"held-out {title_of(of.data)}"
    return Asked(select_rows(source, chosen), of.data, of.split, title)


def _check_unseen(run: Run) -> None:
    """Raises a MoextendError where a stage was trained on other rows than are left beside those held out now."""
    for name in training():
        path, data = run.workdir / name / "stage.json", result(name).data
        if data is None or not path.exists():
            continue
        if json.loads(path.read_text()).get("data") != source_of(run, data(run.settings.recipe)).fingerprint:
            raise MoextendError(
                f"{path.parent} was trained on other rows: with another evaluate.held_out or seed, or before the data "
                "changed, so that rows held out now may have been seen; name evaluate.data, or train in another folder"
            )


def title_of(data: str) -> str:
    """What tables call a data set: easy-VQA by its name, files by theirs without their folders and weights."""
    if data.partition("/")[0] == "easy_vqa":
        return "easy-VQA"
    return ", ".join(Path(part.name).name or part.name for part in parts_of(data))


def _prompted_questions(
    run: Run, asked: Asked, images: Pixels | Features
) -> tuple[list[PromptedQuestion], Counter[str]]:
    """The questions, and how many are left out, by kind, because training would skip their conversations."""
    prompted: list[PromptedQuestion] = []
    skipped: Counter[str] = Counter()
    for example in asked.source:
        try:
            prompted.append(_prompted(run, example, images))
        except Fault as fault:
            if not run.settings.faults.skips(fault):
                raise
            skipped[fault.kind] += 1
    if not prompted:
        raise MoextendError(f"evaluate: no question of {asked.title} {asked.split} can be asked")
    return prompted, skipped


def _prompted(run: Run, example: Example, images: Pixels | Features) -> PromptedQuestion:
    """Raises a `Fault` for what cannot be asked: a conversation, a length, an image that cannot be read."""
    question, length = questions.question_of(example, tokenizer=run.tokenizer), run.settings.evaluate.length
    rows = tuple(images.row(ref) for ref in example.images)
    prompt = questions.prompt_of(
        question.text,
        images=rows,
        system=question.system,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        patches=run.patches,
        where=f"question {example.id}",
    )
    if length and len(prompt.ids_L) > length:
        message = f"{prompt.where}: its prompt has {len(prompt.ids_L)} tokens, evaluate.length is {length}; raise it"
        raise Fault(message, "too_long", example.id)
    if rows:
        images.read(np.array([rows]))
    return PromptedQuestion(question, prompt)


def _seen(item: PromptedQuestion, images: Pixels | Features) -> Prompt:
    """The prompt with its pictures as rows of `images`."""
    refs = item.question.example.images
    return dataclasses.replace(item.prompt, images=tuple(images.row(ref) for ref in refs))


def _answers(run: Run, asker: Asker, prompts: Sequence[Prompt], bar: Bar) -> list[str]:
    texts = [""] * len(prompts)
    for completed in asker.complete(prompts, max_new_tokens=run.settings.evaluate.max_new_tokens):
        for index, ids in completed:
            texts[index] = run.tokenizer.decode(ids).strip()
        bar.add(len(completed))
    return texts


def _answer_stage(run: Run, source: Source) -> StageSettings:
    """How the answers of some rows are read: as finetune trains them, each in a row of its own that holds all of it."""
    alone = {"length": 0, "images_per_row": 0, "conversations_per_row": 1, "conversation_length": 0, "accumulate": 1}
    rows = run.settings.evaluate.text_batch_size
    stage = dataclasses.replace(run.settings.finetune, batch_size=rows, **alone)
    measured = measure(
        source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, patches=run.patches,
        faults=run.settings.faults,
    )  # fmt: skip
    return dataclasses.replace(stage, length=measured.length, images_per_row=measured.pictures)


def _answer_loss(
    run: Run, opened: Askable, source: Source, *, stage: StageSettings, images: Pixels | Features | None
) -> float:
    """Mean nats per token of the right answers; without `images` of a model that sees the text alone."""
    rows = batches(
        source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, images=images, patches=run.patches,
        share=run.share, seed=None, epochs=1, faults=run.settings.faults,
    )  # fmt: skip
    step = loss_step(opened.model, chunk=512, mesh=run.mesh)
    return mean_loss(step, opened.arrays, (place_rows(batch, run.mesh) for batch in rows))


def _text_losses(run: Run, opened: Askable) -> dict[str, float]:
    settings = run.settings.evaluate
    step = loss_step(opened.model, chunk=512, mesh=run.mesh)

    def loss(text: str) -> float:
        passages = text_batches(
            open_text(TEXTS / f"{text}.txt"), tokenizer=run.tokenizer, length=settings.text_length,
            batch_size=settings.text_batch_size, share=run.share, seed=None, epochs=1,
        )  # fmt: skip
        return mean_loss(step, opened.arrays, (place_rows(batch, run.mesh) for batch in passages))

    return {text: loss(text) for text in ("wordnet", "kjv")}


def _batches(run: Run, prompted: Sequence[PromptedQuestion], *, images: Pixels | Features) -> Iterator[Batch]:
    """The prompts in the order given, on the host, every process the same; the last batch ends in empty rows."""
    rows = run.settings.evaluate.batch_size
    length = run.settings.evaluate.length or bucket(max(len(item.prompt.ids_L) for item in prompted))
    for first in range(0, len(prompted), rows):
        prompts = [item.prompt for item in prompted[first : first + rows]]
        yield questions.prompt_batch(prompts, images=images, rows=rows, length=length)


def _write_routing(run: Run, opened: Askable, batches: Iterator[Batch]) -> None:
    placed = (place_whole(batch, run.mesh) for batch in batches)
    counts = routing.count_all(opened.model, opened.arrays, placed, recipe=run.settings.recipe, mesh=run.mesh)
    extension = opened.model.config.extension
    assert extension is not None
    record = {
        "layers": run.config.decoder.layers,
        "experts": run.config.decoder.experts,
        "new_experts": extension.new_experts,
        "extended_layers": list(extension.layers),
        "tokens": {"text": int(counts.text_tokens), "image": int(counts.image_tokens)},
        "counts": {"text": counts.text_ZO.tolist(), "image": counts.image_ZO.tolist()},
    }
    write_json(run.workdir / "finetune" / "routing.json", record)


def _write_examples(
    run: Run, opened: Askable, prompted: Sequence[PromptedQuestion], batches: Iterator[Batch],
    predictions: dict[str, list[str]], images: AnyImages,
) -> None:  # fmt: skip
    """Questions with all answers, and for each patch the share of extended layers where it chose a new expert."""
    experts, extension = run.config.decoder.experts, opened.model.config.extension
    assert extension is not None
    picks = Program(lambda arrays, batch: with_arrays(opened.model, arrays)(batch).routing.ids_Tk, mesh=run.mesh)
    grid, preparation = round(run.patches**0.5), run.settings.recipe.image_preparation
    records: list[dict[str, Any]] = []
    for batch in batches:
        ids_ZTk = on_host(picks(opened.arrays, place_whole(batch, run.mesh)))
        chose_ZT = np.any(ids_ZTk >= experts, axis=-1)
        share_BL = chose_ZT[list(extension.layers)].mean(axis=0).reshape(batch.ids_BL.shape)
        for row, (question, _) in enumerate(prompted[len(records) :][: len(share_BL)]):
            picture = images.decoded(question.example.images[0].row).picture  # of which the grid is
            share_P = share_BL[row][batch.patches_BL[row] >= 0][: grid * grid]
            records.append(
                {
                    "image_png": as_png(framed(picture, size=min(PIXELS, max(picture.size)), preparation=preparation)),
                    "question": question.text.replace("<image>", "").strip(),
                    "answer": question.answer,
                    "predictions": {name: answers[len(records)] for name, answers in predictions.items()},
                    "grid": grid,
                    "new_expert_share": share_P.reshape(grid, grid).tolist(),
                }
            )
    write_json(run.workdir / "examples.json", records)


def summarise(run: Run, evaluated: dict[str, Any], *, total_seconds: float | None) -> dict[str, Any]:
    """summary.json: the evaluation, seconds of each stage, sizes, and whether the pretrained weights are untouched."""
    stages = {}
    for name in training():
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
        and ("moextend" not in evaluated["accuracy"] or frozen_unchanged(run)),
    }
    write_json(run.workdir / "summary.json", summary)
    return summary


def print_table(summary: dict[str, Any], console: Console) -> None:
    accuracy, losses, answer_loss = summary["accuracy"], summary["text_loss"], summary.get("answer_loss")
    table = Table(title="What was learned, what was forgotten")
    of_answers = ["answer loss (nats)"] if answer_loss else []
    columns = ["", f"{summary['data']} accuracy", *of_answers, "WordNet loss (nats)", "King James loss (nats)"]
    for column in (*columns, "forgetting"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("question only", f"{accuracy['question_only']:.3f}")
    wordnet, kjv = losses["wordnet"], losses["kjv"]
    for name in ("base", *ANSWERING):
        if name not in accuracy and name not in kjv:
            continue
        read = name if name in kjv else "base"  # whose text is the base's
        forgotten = (wordnet[read] - wordnet["base"] + kjv[read] - kjv["base"]) / 2
        cells = [f"{accuracy[name]:.3f}" if name in accuracy else ""]
        cells += [f"{answer_loss[name]:.3f}"] if answer_loss else []
        table.add_row(MODELS[name].title, *cells, f"{wordnet[read]:.3f}", f"{kjv[read]:.3f}", f"{forgotten:+.3f}")
    console.print(table)
    console.print(
        f"questions: {accuracy['questions']}; pretrained weights bit-identical: "
        f"{'yes' if summary['frozen_unchanged'] else 'NO'}; seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items() if value is not None)
    )
