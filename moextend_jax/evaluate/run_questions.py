"""What a run's models are asked: for each extension rows of a data set in, questions with their prompts and what reads
their items out.

Whatever can be wrong with the data shows here, before a model is opened: a faulty conversation is left out, or is an
error, as training does with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.data.datasets import Example, Source, is_packaged
from moextend_jax.data.datasets import select as select_rows
from moextend_jax.data.forms import parts_of
from moextend_jax.data.missing import without_marks
from moextend_jax.data.readers import Readers
from moextend_jax.evaluate import questions
from moextend_jax.evaluate.benchmarks.scores import are_right
from moextend_jax.evaluate.importance import Variant, left_out_summary, right_by_media, variants
from moextend_jax.evaluate.prompts import Prompt, buckets
from moextend_jax.faults import Fault
from moextend_jax.models.decoder import check_length
from moextend_jax.progress import preparing
from moextend_jax.runs import results
from moextend_jax.runs.data_of import open_source, readers_of, source_of, unseen_source
from moextend_jax.runs.ready import too_many_questions
from moextend_jax.runs.run import Run
from moextend_jax.settings import EvaluateSettings


class Asked(NamedTuple):
    """Rows whose first question is asked about an extension's medium or task, of a data set and split; `title` names
    them for people."""

    source: Source
    extension: str
    data: str
    split: str
    title: str


class PromptedQuestion(NamedTuple):
    """A question of the evaluation data and its prompt, whose items are rows of what they are read from."""

    question: questions.Question
    prompt: Prompt


class Questions(NamedTuple):
    """Questions ready to be asked of any model, and what reads their items. again: what is asked once more with fewer
    media."""

    asked: Asked
    settings: EvaluateSettings
    prompted: list[PromptedQuestion]
    readers: Readers
    again: list[Variant]

    @property
    def answers(self) -> list[str]:
        """The right answers."""
        return [item.question.answer for item in self.prompted]

    @property
    def media(self) -> list[list[str]]:
        """The media of each question, in the model's order."""
        return [[name for name in self.readers if name in item.prompt.items] for item in self.prompted]

    def accuracy(self, texts: Sequence[str]) -> float:
        return questions.accuracy(self.answers, texts)

    def right_by_media(self, texts: Sequence[str], texts_again: Sequence[str]) -> list[dict[frozenset[str], bool]]:
        """For each question: the media that it was asked with -> whether the answer was right."""
        wanted = [self.answers[variant.question] for variant in self.again]
        return right_by_media(
            self.media, are_right(self.answers, texts), asked=self.again,
            right_then=are_right(wanted, texts_again),
        )  # fmt: skip

    def left_out(self, right: dict[str, list[dict[frozenset[str], bool]]]) -> dict[str, Any]:
        """What summary.json gets of `right_by_media`, by model."""
        return left_out_summary(dict(right), media=list(self.readers), leave_out=self.settings.leave_out)


def check(run: Run) -> None:
    """Raises a MoextendError for what `evaluate` would find wrong with its questions, before any model is there."""
    check_unseen(run)
    for asked in asked_of_all(run).values():
        settings = run.settings.of_extension(asked.extension).evaluate
        readers = readers_of(run, asked.source, data=asked.data, split=asked.split, inputs=True)
        try:
            prompted, _ = prompted_questions(run, asked, readers)
        except Fault as fault:
            raise MoextendError(f"{results.named(run.settings, asked.extension, 'evaluate')}: {fault}") from fault
        longest = settings.max_new_tokens + max(sum(buckets(item.prompt)) for item in prompted)  # as they are padded
        check_length(max(longest, settings.text_length), run.config.decoder)


def asked_of_all(run: Run) -> dict[str, Asked]:
    """The rows asked about every extension, by its name; further test sets are NAME/SET. The same for every run."""
    asked = {}
    for link in run.settings.links:
        settings = run.settings.of_extension(link.name).evaluate
        asked[link.name] = _asked(run, link.name, settings.data)
        for name, data in settings.sets.items():
            asked[f"{link.name}/{name}"] = _asked(run, link.name, data, fewer=True)
    return asked


def _asked(run: Run, extension: str, data: str, *, fewer: bool = False) -> Asked:
    """fewer: if there are fewer rows than `evaluate.questions`, take all; else that is an error."""
    settings = run.settings.of_extension(extension).evaluate
    unseen = None if data else unseen_source(run, extension)
    finetune = results.stage_of(run.settings, results.named(run.settings, extension, "finetune"))
    data, split = (data, settings.split) if unseen is None else (finetune.data, finetune.split)
    source = open_source(run, data, split) if unseen is None else unseen
    count = min(settings.questions, len(source)) if fewer or unseen is not None else settings.questions
    if count > len(source):
        raise too_many_questions(settings, len(source), data=data)
    chosen = np.random.default_rng(0).choice(len(source), count, replace=False)
    title = title_of(data) if unseen is None else f"held-out {title_of(data)}"
    return Asked(select_rows(source, chosen), extension, data, split, title)


def title_of(data: str) -> str:
    """What tables call a data set: the name of one that comes with a package; for files the file name without folders.
    Weights are left out."""
    if data.partition("/")[0] == "easy_vqa":
        return "easy-VQA"
    names = [part.name for part in parts_of(data)]
    return ", ".join(name if is_packaged(name) else Path(name).name or name for name in names)


def check_unseen(run: Run) -> None:
    """Raises a MoextendError if an extension is asked about rows that are held out, and a stage was trained on rows
    other than those that are left after holding out now."""
    if all(run.settings.of_extension(link.name).evaluate.data for link in run.settings.links):
        return
    read = functools.cache(functools.partial(open_source, run))
    for name in run.table.training():
        path, data = run.folder(name) / "stage.json", run.table.result(name).data
        if data is None or not path.exists():
            continue
        if json.loads(path.read_text()).get("data") != source_of(run, data(run.settings.recipe), read=read).fingerprint:
            raise MoextendError(
                f"{path.parent} was trained on other rows: with another evaluate.held_out or seed, by another version "
                "of this package, or before the data changed, so that rows held out now may have been seen; name "
                "evaluate.data, or train in another folder"
            )


def questions_of(run: Run, asked: Asked) -> Questions:
    settings = run.settings.of_extension(asked.extension).evaluate
    readers = readers_of(run, asked.source, data=asked.data, split=asked.split, few=True)
    with preparing("preparing the questions"):
        prompted, skipped = prompted_questions(run, asked, readers)
    if skipped and distributed.first():
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        print(f"evaluate: {skipped.total()} of {len(asked.source)} questions are left out: {kinds}")
    ready = Questions(asked, settings, prompted, readers, [])
    return ready._replace(again=variants(ready.media, leave_out=settings.leave_out))


def inputs_of(run: Run, of: Questions) -> Readers:
    return readers_of(run, of.asked.source, data=of.asked.data, split=of.asked.split, inputs=True)


def prompted_questions(run: Run, asked: Asked, readers: Readers) -> tuple[list[PromptedQuestion], Counter[str]]:
    """The questions, and how many are left out, by kind, because training would skip their conversations."""
    prompted: list[PromptedQuestion] = []
    skipped: Counter[str] = Counter()
    length = run.settings.of_extension(asked.extension).evaluate.length
    for example in asked.source:
        try:
            prompted.append(_prompted(run, example, readers, length=length))
        except Fault as fault:
            if not run.settings.faults.skips(fault):
                raise
            skipped[fault.kind] += 1
    if not prompted:
        raise MoextendError(f"evaluate: no question of {asked.title} {asked.split} can be asked")
    return prompted, skipped


def _prompted(run: Run, example: Example, readers: Readers, *, length: int) -> PromptedQuestion:
    """Raises a `Fault` for what cannot be asked: a conversation, a length, an item that cannot be read."""
    question = questions.question_of(example, tokenizer=run.tokenizer)
    prompt = _prompt_with(run, question, readers, media=question.items, where=f"question {example.id}")
    if length and len(prompt.ids_L) > length:
        message = f"{prompt.where}: its prompt has {len(prompt.ids_L)} tokens, evaluate.length is {length}; raise it"
        raise Fault(message, "too_long", example.id)
    for name, rows in prompt.items.items():
        readers[name].read(np.array([rows]))
    return PromptedQuestion(question, prompt)


def _rows(question: questions.Question, readers: Readers) -> dict[str, tuple[int, ...]]:
    return {name: tuple(readers[name].row(ref) for ref in refs) for name, refs in question.items.items()}


def prompt_for(item: PromptedQuestion, readers: Readers) -> Prompt:
    """The prompt with its items as rows of these readers."""
    return dataclasses.replace(item.prompt, items=_rows(item.question, readers))


def asked_with(run: Run, item: PromptedQuestion, readers: Readers, *, media: Collection[str]) -> Prompt:
    """The question's prompt with its items of these media alone."""
    return _prompt_with(run, item.question, readers, media=media, where=item.prompt.where)


def _prompt_with(
    run: Run, question: questions.Question, readers: Readers, *, media: Collection[str], where: str
) -> Prompt:
    left_out = run.tokenizer.with_fused(question.items.keys() - media)
    items = {name: rows for name, rows in _rows(question, readers).items() if name not in left_out}
    return questions.prompt_of(
        without_marks(question.text, [run.tokenizer.media[name].mark for name in left_out]),
        items=items,
        spans={name: [readers[name].span(row) for row in rows] for name, rows in items.items()},
        system=question.system,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        where=where,
    )
