"""The table of a run: accuracy on questions about images, forgetting on text, and what the report shows of both."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from moextend_jax import distributed
from moextend_jax.config import IMAGE, Batch, ModelConfig, MoextendError
from moextend_jax.data.batches import batches, text_batches
from moextend_jax.data.datasets import AnyItems, Example, Source, is_packaged, open_text
from moextend_jax.data.datasets import select as select_rows
from moextend_jax.data.forms import parts_of
from moextend_jax.data.measure import measure
from moextend_jax.data.missing import without_marks
from moextend_jax.data.readers import Readers
from moextend_jax.evaluate import chains, questions
from moextend_jax.evaluate.asking import Asker
from moextend_jax.evaluate.composing import RULES, composed
from moextend_jax.evaluate.importance import importance_table
from moextend_jax.evaluate.left_out import Variant, left_out_summary, right_by_media, variants
from moextend_jax.evaluate.pictures import PIXELS, as_png
from moextend_jax.evaluate.prompts import Prompt, bucket, buckets
from moextend_jax.evaluate.routed import by_medium, expert_names, routing_program, token_texts
from moextend_jax.evaluate.running import asker_of
from moextend_jax.extension import routing
from moextend_jax.faults import Fault
from moextend_jax.media.image import framed, tower_of
from moextend_jax.mesh import on_host, place_rows, place_whole, row_shards
from moextend_jax.models.decoder import check_length
from moextend_jax.models.flops import step_flops
from moextend_jax.models.moextend import abstract
from moextend_jax.progress import Bar, counting, preparing
from moextend_jax.runs import results
from moextend_jax.runs.askable import Askable, askable
from moextend_jax.runs.data_of import open_source, readers_of, source_of, unseen_source
from moextend_jax.runs.models_of import frozen_unchanged, grown_config
from moextend_jax.runs.ready import too_many_questions
from moextend_jax.runs.results import Data, ModelRow
from moextend_jax.runs.run import Run, not_run, write_json
from moextend_jax.settings import EvaluateSettings, StageSettings
from moextend_jax.train.held_out import loss_step, mean_loss

TEXTS = Path(__file__).parents[1] / "assets" / "text"
CORPORA = ("wordnet", "kjv")
ROUTED_BATCHES = 2
"""Batches of each text whose routing is counted: enough for shares, and a small part of the evaluation's time."""
MOST_PAIRED = 64
"""Experts of a layer up to which pairs of them are written: their number grows with the square."""

CHAINS = {
    "strict": "an extension for each medium, strict text isolation",
    "open": "the same without isolation",
    "full": "full fine-tuning on one after another",
}


class PromptedQuestion(NamedTuple):
    """A question of the evaluation data and its prompt, whose items are rows of what they are read from."""

    question: questions.Question
    prompt: Prompt


class Asked(NamedTuple):
    """Rows whose first question is asked about an extension's medium or task, of a data set and split; `title` names
    them for people."""

    source: Source
    extension: str
    data: str
    split: str
    title: str


def check(run: Run) -> None:
    """Raises a MoextendError for what `evaluate` would find wrong with its questions, before any model is there."""
    for asked in _asked_of_all(run).values():
        settings = run.settings.of_extension(asked.extension).evaluate
        readers = readers_of(run, asked.source, data=asked.data, split=asked.split, inputs=True)
        try:
            prompted, _ = _prompted_questions(run, asked, readers)
        except Fault as fault:
            raise MoextendError(f"{results.named(run.settings, asked.extension, 'evaluate')}: {fault}") from fault
        longest = settings.max_new_tokens + max(sum(buckets(item.prompt)) for item in prompted)  # as they are padded
        check_length(max(longest, settings.text_length), run.config.decoder)


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluates every model the work directory holds and returns accuracies, text losses and, of a held-out part of the
    finetune data, losses of its answers; of several extensions what each step of the chain learnt and forgot. Writes
    examples.json and finetune/routing.json.

    Whatever can be wrong with the data shows before the first model is asked: a faulty conversation is left out, or
    is an error, as training does with it.
    """
    table = results.table(run.settings)
    for name in table.model("aligned").results:  # which every run has; said before anything is computed
        if not run.has(name):
            raise not_run(run.workdir, name)
    if any(not run.settings.of_extension(link.name).evaluate.data for link in run.settings.links):
        _check_unseen(run)
    asked = {on: _questions(run, of) for on, of in _asked_of_all(run).items()}
    first = asked[run.settings.extension]
    settings = run.settings.evaluate
    answer_stage = None if settings.data else _answer_stage(run, first.asked.source)
    losses: dict[str, dict[str, float]] = {}
    answer_losses: dict[str, float] = {}
    answers: dict[str, dict[str, list[str]]] = {on: {} for on in asked}
    plan = _plan(run, asked)
    first_name = {name: _first_name(plan, name, models=table.models) for name in plan}
    todo: dict[str, list[str]] = {name: [] for name in first_name.values()}  # a model of two names is asked once
    for name, of_name in plan.items():
        todo[first_name[name]] += (on for on in of_name if on not in todo[first_name[name]])
    pictured = [row for row, item in enumerate(first.prompted) if IMAGE in item.prompt.items][: settings.examples]
    examples = [first.prompted[row] for row in pictured] if "moextend" in plan else []
    picks: dict[str, list[Picks]] = {}  # of the examples, by model
    right: dict[str, dict[str, list[dict[frozenset[str], bool]]]] = {on: {} for on in asked}  # by medium, of each model

    def ask(name: str, bar: Bar) -> None:
        opened, row = askable(run, name), table.model(name)  # gone when the next is opened: memory need not hold all
        # A tower that was trained has no cached features.
        pixels = table.has_trained_tower(row.results, recipe=run.settings.recipe)
        for on in todo[name]:
            of = asked[on]
            own = _inputs(run, of) if pixels else of.readers
            asker = asker_of(opened, readers=own)
            say = functools.partial(_answers, run, asker, bar=bar, most=of.settings.max_new_tokens)
            answers[on][name] = say([_seen(item, own) for item in of.prompted])
            if of.again:
                fewer = [_asked_with(run, of.prompted[some.question], own, media=some.media) for some in of.again]
                right[on][name] = of.right_by_media(answers[on][name], say(fewer))
        if answer_stage is not None and (name == "base" or run.settings.extension in todo[name]):
            own = {} if not row.sees else _inputs(run, first) if pixels else first.readers
            loss = _answer_loss(run, opened, first.asked.source, stage=answer_stage, readers=own)
            answer_losses[name] = loss
        if name in ("aligned", "moextend") and examples:
            own = _inputs(run, first) if pixels else first.readers
            picks[name] = _picks(run, opened, examples, own)
        if name == "moextend":
            (*_, last) = (link.name for link in run.settings.links if not link.apart)
            learnt = {*plan[name], *plan.get(f"moextend:{last}", ())}
            counted = {on: (of, _inputs(run, of) if pixels else of.readers) for on, of in asked.items() if on in learnt}
            _write_routing(run, opened, counted)
        if not row.text_is_bases:
            losses[name] = _text_losses(run, opened)

    total = sum(len(asked[on].prompted) + len(asked[on].again) for on_of_model in todo.values() for on in on_of_model)
    guesses = _guesses(run, asked)
    with ThreadPoolExecutor(1) as pool, counting("evaluate", total, unit="questions") as bar:
        guessed = pool.submit(guesses)  # seconds of reading, while programs are compiled
        for name in todo:
            ask(name, bar)

    def under_all_names(of_model: Mapping[str, Any], names: Iterable[str] = plan) -> dict[str, Any]:
        return {name: of_model[first_name[name]] for name in names if first_name[name] in of_model}

    losses, answer_losses = under_all_names(losses), under_all_names(answer_losses)
    for on in asked:
        names = [name for name in plan if on in plan[name]]
        answers[on] = {"question_only": guessed.result()[on]} | under_all_names(answers[on], names)
        right[on] = under_all_names(right[on], names)
    accuracy = {on: {name: of.accuracy(texts) for name, texts in answers[on].items()} for on, of in asked.items()}
    plain = {"aligned", "question_only", "moextend", "full"}  # of the table of a run; a chain has its own
    own = {name: score for name, score in accuracy[run.settings.extension].items() if name in plain}
    summary: dict[str, Any] = {
        "data": first.asked.title,
        "accuracy": own | {"questions": len(first.prompted)},
        "text_loss": {text: {name: of[text] for name, of in losses.items()} for text in ("wordnet", "kjv")},
    }
    if (title := results.table(run.settings).model("moextend").title) != "MoExtend":
        summary["method"] = title
    if answer_losses:
        summary["answer_loss"] = answer_losses
    left_out = {on: of.left_out(right[on]) for on, of in asked.items()}
    summary |= first.left_out({name: of for name, of in right[run.settings.extension].items() if name in plain})
    if len(asked) > 1:
        summary |= _chains(run, asked, accuracy, left_out)
        summary |= _composed(run, asked, accuracy)
    if examples:
        predictions = {
            name: [texts[row] for row in pictured]
            for name, texts in answers[run.settings.extension].items()
            if name in plain and name != "question_only"
        }
        _write_examples(run, examples, picks, predictions, first.asked.source.images)
    return summary


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
        """The right ones."""
        return [item.question.answer for item in self.prompted]

    @property
    def media(self) -> list[list[str]]:
        """Of each question, in the model's order."""
        return [[name for name in self.readers if name in item.prompt.items] for item in self.prompted]

    def accuracy(self, texts: Sequence[str]) -> float:
        return questions.accuracy(self.answers, texts)

    def right_by_media(self, texts: Sequence[str], texts_again: Sequence[str]) -> list[dict[frozenset[str], bool]]:
        """Of each question, which answers were right by the media that it was asked with."""
        wanted = [self.answers[variant.question] for variant in self.again]
        return right_by_media(
            self.media, questions.are_right(self.answers, texts), asked=self.again,
            right_then=questions.are_right(wanted, texts_again),
        )  # fmt: skip

    def left_out(self, right: dict[str, list[dict[frozenset[str], bool]]]) -> dict[str, Any]:
        """What summary.json gets of that, by model."""
        return left_out_summary(dict(right), media=list(self.readers), leave_out=self.settings.leave_out)


def _questions(run: Run, asked: Asked) -> Questions:
    settings = run.settings.of_extension(asked.extension).evaluate
    readers = readers_of(run, asked.source, data=asked.data, split=asked.split, few=True)
    with preparing("preparing the questions"):
        prompted, skipped = _prompted_questions(run, asked, readers)
    if skipped and distributed.first():
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        print(f"evaluate: {skipped.total()} of {len(asked.source)} questions are left out: {kinds}")
    ready = Questions(asked, settings, prompted, readers, [])
    return ready._replace(again=variants(ready.media, leave_out=settings.leave_out))


def _inputs(run: Run, of: Questions) -> Readers:
    return readers_of(run, of.asked.source, data=of.asked.data, split=of.asked.split, inputs=True)


def _guesses(run: Run, asked: Mapping[str, Questions]) -> Callable[[], dict[str, list[str]]]:
    """What makes, by what is asked, the answers that can be given without the items, from what the extension was
    trained on. Its data are opened here, where all processes are."""
    known = {
        extension: source_of(run, Data(results.named(run.settings, extension, "finetune")))
        for extension in dict.fromkeys(of.asked.extension for of in asked.values())  # in one order in all processes
    }
    texts = {on: [item.question.text for item in of.prompted] for on, of in asked.items()}
    every = {text for of in texts.values() for text in of}

    def guesses() -> dict[str, list[str]]:
        guess = {
            extension: questions.frequent_answers(source, asked=every, tokenizer=run.tokenizer)
            for extension, source in known.items()
        }
        return {on: [guess[of.asked.extension](text) for text in texts[on]] for on, of in asked.items()}

    return guesses


def _plan(run: Run, asked: Mapping[str, Questions]) -> dict[str, list[str]]:
    """The models that there are, and which questions each is asked: in a chain, those of all that it has learnt."""
    table, first = results.table(run.settings), run.settings.extension
    plan: dict[str, list[str]] = {"base": []}
    for name in results.ANSWERING:
        if name == "aligned" or all(map(run.has, table.model(name).results)):
            plan[name] = [on for on in asked if on.partition("/")[0] == first]
    if len(run.settings.links) > 1:
        for kind in ("moextend", "full"):
            learnt: list[str] = []
            for link in run.settings.links:
                name, known = f"{kind}:{link.name}", [link.name] if link.apart else [*learnt, link.name]
                learnt = learnt if link.apart else known
                if all(map(run.has, table.model(name).results)):
                    plan[name] = [on for on in asked if on.partition("/")[0] in known]
    return plan


def _first_name(plan: Iterable[str], name: str, *, models: Mapping[str, ModelRow]) -> str:
    """What the same model is called first in the plan: `moextend:LAST` is `moextend`, where nothing comes after."""
    row = models[name]
    return next(other for other in plan if (models[other].results, models[other].sees) == (row.results, row.sees))


def _chains(
    run: Run, asked: Mapping[str, Questions], accuracy: Mapping[str, Mapping[str, float]],
    left_out: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What each step learnt and forgot (`evaluate/chains.py`), of MoExtend, called by its text isolation, and of full
    fine-tuning; and what was asked."""
    found: dict[str, Any] = {}
    moextend = "strict" if run.settings.text_isolation == "strict" else "open"
    for title, kind in ((moextend, "moextend"), ("full", "full")):
        names = {link.name: f"{kind}:{link.name}" for link in run.settings.links if not link.apart}
        scores = {after: {on: of[name] for on, of in accuracy.items() if name in of} for after, name in names.items()}
        if scores := {after: row for after, row in scores.items() if row}:
            found[title] = chains.score_matrix(scores)
    about = {
        on: {
            "data": of.asked.title,
            "questions": len(of.prompted),
            "media": sorted({name for media in of.media for name in media}),
            "accuracy": dict(accuracy[on]),
            **left_out[on],
        }
        for on, of in asked.items()
    }
    return {"chains": found, "asked": about}


def _composed(run: Run, asked: Mapping[str, Questions], accuracy: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Questions with several media, asked of all extensions together under every rule of `composing.RULES`, of each
    alone with its own medium, and after the stage `mixture`; by what is asked. Nothing where no question has several,
    an extension is not there, or each was trained on top of the earlier ones, not apart.
    """
    if run.settings.text_isolation != "strict":
        return {}
    table, links = results.table(run.settings), [link for link in run.settings.links if not link.apart]
    several = {on: of for on, of in asked.items() if any(len(media) > 1 for media in of.media)}
    last = f"moextend:{links[-1].name}"
    if not several or not all(map(run.has, table.model(last).results)):
        return {}
    scores: dict[str, dict[str, float]] = {on: dict(accuracy[on]) for on in several}

    def ask(title: str, opened: Askable, *, media: Collection[str] | None = None) -> None:
        for on, of in several.items():
            prompts = [
                item.prompt if media is None else _asked_with(run, item, of.readers, media=media)
                for item in of.prompted
            ]
            asker = asker_of(opened, readers=of.readers)
            with counting(title, len(prompts), unit="questions") as bar:
                texts = _answers(run, asker, prompts, bar=bar, most=of.settings.max_new_tokens)
            scores[on][title] = of.accuracy(texts)

    shown = {name for of in several.values() for media in of.media for name in media}
    for link in links:
        if link.medium in shown:
            ask(f"{link.name} alone", askable(run, f"moextend:{link.name}"), media=[link.medium])
    opened = askable(run, last)
    for name, rule in RULES.items():
        model = abstract(composed(opened.model.config, rule))
        ask(name, dataclasses.replace(opened, model=model))
    if "mixture" in table.results and run.has("mixture"):
        ask("trained together", askable(run, "moextend"))
    return {"composed": scores}


def _asked_of_all(run: Run) -> dict[str, Asked]:
    """The rows that are asked of every extension, by its name, further sets as NAME/SET; the same for every run."""
    asked = {}
    for link in run.settings.links:
        settings = run.settings.of_extension(link.name).evaluate
        asked[link.name] = _asked(run, link.name, settings.data)
        for name, data in settings.sets.items():
            asked[f"{link.name}/{name}"] = _asked(run, link.name, data, fewer=True)
    return asked


def _asked(run: Run, extension: str, data: str, *, fewer: bool = False) -> Asked:
    """fewer: of a data set with fewer rows than questions all of them."""
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


def _check_unseen(run: Run) -> None:
    """Raises a MoextendError where a stage was trained on other rows than are left beside those held out now."""
    table, read = results.table(run.settings), functools.cache(functools.partial(open_source, run))
    for name in table.training():
        path, data = run.folder(name) / "stage.json", table.result(name).data
        if data is None or not path.exists():
            continue
        if json.loads(path.read_text()).get("data") != source_of(run, data(run.settings.recipe), read=read).fingerprint:
            raise MoextendError(
                f"{path.parent} was trained on other rows: with another evaluate.held_out or seed, by another version "
                "of this package, or before the data changed, so that rows held out now may have been seen; name "
                "evaluate.data, or train in another folder"
            )


def title_of(data: str) -> str:
    """What tables call a data set: easy-VQA and others of packages by their names, files by theirs without their
    folders; without weights."""
    if data.partition("/")[0] == "easy_vqa":
        return "easy-VQA"
    names = [part.name for part in parts_of(data)]
    return ", ".join(name if is_packaged(name) else Path(name).name or name for name in names)


def _prompted_questions(run: Run, asked: Asked, readers: Readers) -> tuple[list[PromptedQuestion], Counter[str]]:
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
    items = _rows(question, readers)
    prompt = questions.prompt_of(
        question.text,
        items=items,
        spans={name: [readers[name].span(row) for row in rows] for name, rows in items.items()},
        system=question.system,
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        where=f"question {example.id}",
    )
    if length and len(prompt.ids_L) > length:
        message = f"{prompt.where}: its prompt has {len(prompt.ids_L)} tokens, evaluate.length is {length}; raise it"
        raise Fault(message, "too_long", example.id)
    for name, rows in items.items():
        readers[name].read(np.array([rows]))
    return PromptedQuestion(question, prompt)


def _rows(question: questions.Question, readers: Readers) -> dict[str, tuple[int, ...]]:
    return {name: tuple(readers[name].row(ref) for ref in refs) for name, refs in question.items.items()}


def _seen(item: PromptedQuestion, readers: Readers) -> Prompt:
    """The prompt with its items as rows of these readers."""
    return dataclasses.replace(item.prompt, items=_rows(item.question, readers))


def _asked_with(run: Run, item: PromptedQuestion, readers: Readers, *, media: Collection[str]) -> Prompt:
    """The question's prompt with its items of these media alone."""
    question, tokenizer = item.question, run.tokenizer
    items = {name: rows for name, rows in _rows(question, readers).items() if name in media}
    return questions.prompt_of(
        without_marks(question.text, (marked.mark for name, marked in tokenizer.media.items() if name not in media)),
        items=items,
        spans={name: [readers[name].span(row) for row in rows] for name, rows in items.items()},
        system=question.system,
        tokenizer=tokenizer,
        recipe=run.settings.recipe,
        where=item.prompt.where,
    )


def _answers(run: Run, asker: Asker, prompts: Sequence[Prompt], bar: Bar, *, most: int) -> list[str]:
    texts = [""] * len(prompts)
    for completed in asker.complete(prompts, max_new_tokens=most):
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
        source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, media=run.config.media,
        faults=run.settings.faults,
    )  # fmt: skip
    return measured.filled(stage)


def _answer_loss(run: Run, opened: Askable, source: Source, *, stage: StageSettings, readers: Readers) -> float:
    """Mean nats per token of the right answers; of a model without `readers` of the text alone."""
    rows = batches(
        source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, readers=readers,
        share=run.share, seed=None, epochs=1, faults=run.settings.faults,
    )  # fmt: skip
    step = loss_step(opened.model, chunk=512, mesh=run.mesh)
    return mean_loss(step, opened.arrays, (place_rows(batch, run.mesh) for batch in rows))


def _text_losses(run: Run, opened: Askable) -> dict[str, float]:
    step = loss_step(opened.model, chunk=512, mesh=run.mesh)
    return {text: mean_loss(step, opened.arrays, _passages(run, text)) for text in CORPORA}


def _passages(run: Run, text: str) -> Iterator[Batch]:
    """One of CORPORA in batches on the mesh."""
    settings = run.settings.evaluate
    rows = text_batches(
        open_text(TEXTS / f"{text}.txt"), tokenizer=run.tokenizer, length=settings.text_length,
        batch_size=settings.text_batch_size, share=run.share, seed=None, epochs=1,
    )  # fmt: skip
    return (place_rows(batch, run.mesh) for batch in rows)


def _batches(
    run: Run, prompted: Sequence[PromptedQuestion], *, readers: Readers, settings: EvaluateSettings
) -> Iterator[Batch]:
    """The prompts in the order given, on the mesh; the last batch ends in empty rows."""
    rows = settings.batch_size
    length = settings.length or bucket(max(len(item.prompt.ids_L) for item in prompted))
    for first in range(0, len(prompted), rows):
        prompts = [_seen(item, readers) for item in prompted[first : first + rows]]
        batch = questions.prompt_batch(
            prompts, readers=readers, media=tuple(run.tokenizer.media), rows=rows, length=length
        )
        yield place_whole(batch, run.mesh)


def _write_routing(run: Run, opened: Askable, asked: Mapping[str, tuple[Questions, Readers]]) -> None:
    """finetune/routing.json: picks of every expert over the questions of the run's extension, which come first; then of
    all questions and texts by their names, and how often two experts were picked by one token."""
    count = functools.partial(
        routing.count_all, opened.model, opened.arrays, recipe=run.settings.recipe, mesh=run.mesh, pairs=True
    )
    counted: dict[str, routing.Counts] = {}
    for on, (of, readers) in asked.items():
        title = of.asked.title if len(asked) == 1 else f"{on}: {of.asked.title}"
        counted[title] = count(_batches(run, of.prompted, readers=readers, settings=of.settings))
    first = next(iter(counted.values()))
    counted |= {text: count(itertools.islice(_passages(run, text), ROUTED_BATCHES)) for text in CORPORA}
    pairs = {
        data: {"text": counts.text_pairs_ZOO} | ({"image": counts.image_pairs_ZOO} if counts.image_tokens else {})
        for data, counts in counted.items()
    }
    extensions, routed = opened.model.config.extensions.values(), run.config.decoder.routed
    names = expert_names(opened.model.config)
    record = {
        "layers": len(routed),
        **({"first_layer": routed.start} if routed.start else {}),
        "experts": run.config.decoder.experts,
        "new_experts": sum(added.new_experts for added in extensions),
        "names": names,
        "extended_layers": sorted({layer for added in extensions for layer in added.layers}),
        "tokens": {"text": int(first.text_tokens), "image": int(first.image_tokens)},
        "counts": {"text": first.text_ZO.tolist(), "image": first.image_ZO.tolist()},
        "loads": {
            data: {kind: np.diagonal(of_ZOO, axis1=1, axis2=2).tolist() for kind, of_ZOO in of.items()}
            for data, of in pairs.items()
        },
    }
    if len(names) <= MOST_PAIRED:
        record["pairs"] = {data: {kind: of_ZOO.tolist() for kind, of_ZOO in of.items()} for data, of in pairs.items()}
    write_json(run.workdir / "finetune" / "routing.json", record, indent=None)


class Picks(NamedTuple):
    """Experts that every token of a prompt picked, `[Z, L, k]`, and their weights."""

    ids_ZLk: np.ndarray
    weights_ZLk: np.ndarray


def _picks(run: Run, opened: Askable, prompted: Sequence[PromptedQuestion], readers: Readers) -> list[Picks]:
    program = routing_program(opened.model.config, run.mesh)
    shards = row_shards(run.mesh)
    rows = min(-(-len(prompted) // shards) * shards, run.settings.evaluate.batch_size)
    settings = dataclasses.replace(run.settings.evaluate, batch_size=rows)
    found: list[Picks] = []
    for batch in _batches(run, prompted, readers=readers, settings=settings):
        routing = program(opened.arrays, batch)
        ids_ZTk, weights_ZTk = on_host(routing.ids_Tk), on_host(routing.weights_Tk)
        shape = (len(ids_ZTk), *batch.ids_BL.shape, -1)
        ids_ZBLk, weights_ZBLk = ids_ZTk.reshape(shape), weights_ZTk.reshape(shape)
        for row, item in enumerate(prompted[len(found) :][:rows]):
            own = slice(len(item.prompt.ids_L))
            found.append(Picks(ids_ZBLk[:, row, own], weights_ZBLk[:, row, own]))
    return found


def _write_examples(
    run: Run, prompted: Sequence[PromptedQuestion], picks: Mapping[str, Sequence[Picks]],
    predictions: dict[str, list[str]], images: AnyItems,
) -> None:  # fmt: skip
    """Questions with all answers; for each patch the share of extended layers where it chose a new expert; and for each
    token what each model's routers picked in every layer, with weights in per cent."""
    grown = grown_config(run, results.table(run.settings).grown(results.table(run.settings).model("moextend").results))
    experts, names, routed = run.config.decoder.experts, expert_names(grown), run.config.decoder.routed
    layers = sorted({routed.index(layer) for added in grown.extensions.values() for layer in added.layers})
    tower = tower_of(run.config.media[IMAGE])
    gridded = run.config.media[IMAGE].tokens == tower.patches  # a connector may join them, or ask them
    grid = tower.grid if gridded else 1
    look: dict[str, Any] = {"preparation": run.settings.recipe.image_preparation, "tower": tower}
    records: list[dict[str, Any]] = []
    for row, (question, prompt) in enumerate(prompted):
        picture = images.decoded(question.items[IMAGE][0].row).item  # of which the grid is
        ids_ZLk = picks["moextend"][row].ids_ZLk
        chose_ZL = np.any((ids_ZLk >= experts) & (ids_ZLk < len(names)), axis=-1)
        # Of an extension without experts no layer.
        share_L = chose_ZL[layers or slice(0)].sum(axis=0) / max(len(layers), 1)
        media, own_L = by_medium(run.tokenizer, prompt.places_L)
        patches_L = np.where([medium == IMAGE and gridded for medium in media], own_L, -1)
        share_P = share_L[patches_L >= 0][: grid * grid]
        share = {"new_expert_share": share_P.reshape(grid, grid).tolist()} if gridded else {}
        records.append(
            {
                "image_png": as_png(framed(picture, size=min(PIXELS, max(picture.size)), **look)),
                "question": question.text.replace("<image>", "").strip(),
                "answer": question.answer,
                "predictions": {name: answers[row] for name, answers in predictions.items()},
                "grid": grid,
                **share,
                "routing": {
                    "experts": names,
                    "tokens": token_texts(run.tokenizer, prompt.ids_L, media, own_L),
                    "patches": patches_L.tolist(),
                    "models": {
                        model: {
                            "picks": of[row].ids_ZLk.tolist(),
                            "weights": np.rint(100 * of[row].weights_ZLk).astype(int).tolist(),
                        }
                        for model, of in picks.items()
                    },
                },
            }
        )
    write_json(run.workdir / "examples.json", records, indent=None)


def summarise(run: Run, evaluated: dict[str, Any], *, total_seconds: float | None) -> dict[str, Any]:
    """summary.json: the evaluation, seconds of each stage, sizes, and whether the pretrained weights are untouched."""
    stages = {}
    for name in results.table(run.settings).training():
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
    """Of the decoder's forward pass over a row with an item of each medium: in the base, and how many times that with
    what was added, if the routers use all experts alike."""
    grown = results.table(run.settings).model("moextend").results
    config = grown_config(run, results.table(run.settings).grown(grown))
    length = run.settings.finetune.length or run.settings.evaluate.text_length

    def forward(config: ModelConfig) -> float:
        parts = step_flops(config, trains=(), rows=1, length=length, items=dict.fromkeys(config.media, 1)).parts
        return sum(of["forward"] for part, of in parts.items() if not part.startswith("media/")) / length

    base = forward(run.config)
    return {"base": base, "of_base": forward(config) / base}


def print_table(summary: dict[str, Any], console: Console) -> None:
    accuracy, losses, answer_loss = summary["accuracy"], summary["text_loss"], summary.get("answer_loss")
    table = Table(title="What was learned, what was forgotten")
    of_answers = ["answer loss (nats)"] if answer_loss else []
    columns = ["", f"{summary['data']} accuracy", *of_answers, "WordNet loss (nats)", "King James loss (nats)"]
    for column in (*columns, "forgetting"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("question only", f"{accuracy['question_only']:.3f}")
    wordnet, kjv = losses["wordnet"], losses["kjv"]
    titles = {name: row.title for name, row in results.FIRST.models.items()}
    titles["moextend"] = summary.get("method", titles["moextend"])
    for name in ("base", *results.ANSWERING):
        if name not in accuracy and name not in kjv:
            continue
        read = name if name in kjv else "base"  # whose text is the base's
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
        rows = Table("", "accuracy", title=f"{on}: extensions put together")
        for name, score in scores.items():
            rows.add_row(name, f"{score:.3f}")
        console.print(rows)
    for title, chain in summary.get("chains", {}).items():
        console.print(chains.chain_table(CHAINS[title], chain))
    console.print(
        f"questions: {accuracy['questions']}; pretrained weights bit-identical: "
        f"{'yes' if summary['frozen_unchanged'] else 'NO'}; seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items() if value is not None)
    )
