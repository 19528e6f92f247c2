"""Every model of a run asked what it has learnt: a `Run` in, accuracies and losses out, as summary.json holds them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from moextend_jax.config import IMAGE
from moextend_jax.data.readers import Readers
from moextend_jax.evaluate import chains, questions
from moextend_jax.evaluate.asking import Asker, asker_of
from moextend_jax.evaluate.composing import RULES, composed
from moextend_jax.evaluate.examples import Picks, picks_of, write_examples, write_routing
from moextend_jax.evaluate.prompts import Prompt
from moextend_jax.evaluate.run_questions import (
    PromptedQuestion,
    Questions,
    asked_of_all,
    asked_with,
    check_unseen,
    inputs_of,
    prompt_for,
    questions_of,
)
from moextend_jax.evaluate.text_losses import CORPORA, answer_loss, answer_stage_of, text_losses
from moextend_jax.models.moextend import abstract
from moextend_jax.progress import Bar, counting, preparing
from moextend_jax.runs import results
from moextend_jax.runs.askable import Askable, askable
from moextend_jax.runs.data_of import source_of
from moextend_jax.runs.results import Data, ModelRow
from moextend_jax.runs.run import Run, not_run
from moextend_jax.settings import StageSettings

LOOKED_INTO = ("aligned", "moextend")
"""Models whose routing of the examples is shown."""


class _Said(NamedTuple):
    """What one model gave; None: not computed. answers, right: by question set; `right` has per question the media that
    it was asked with -> whether the answer was right."""

    answers: dict[str, list[str]]
    right: dict[str, list[dict[frozenset[str], bool]]] = {}
    answer_loss: float | None = None
    text_losses: dict[str, float] | None = None
    picks: list[Picks] | None = None


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluates every model the work directory holds. Returns accuracies and text losses; losses of the answers, if the
    questions are held out of the finetune data; with several extensions, what each step of the chain learnt and forgot.
    Writes examples.json and finetune/routing.json.

    Whatever can be wrong with the data shows before the first model is asked: a faulty conversation is left out, or
    is an error, as training does with it.
    """
    extension = run.settings.extension
    for name in run.table.model("aligned").results:  # every run has these; checked before anything is computed
        if not run.has(name):
            raise not_run(run.workdir, name)
    check_unseen(run)
    asked = {on: questions_of(run, of) for on, of in asked_of_all(run).items()}
    first, settings = asked[extension], run.settings.evaluate
    plan = _plan(run, asked)
    pictured = [row for row, item in enumerate(first.prompted) if IMAGE in item.prompt.items][: settings.examples]
    examples = [first.prompted[row] for row in pictured] if "moextend" in plan else []
    said = _ask_all(run, asked, plan, examples)

    answers = {on: {name: said[name].answers[on] for name in said if on in said[name].answers} for on in asked}
    accuracy = {on: {name: of.accuracy(texts) for name, texts in answers[on].items()} for on, of in asked.items()}
    right = {on: {name: said[name].right[on] for name in said if on in said[name].right} for on in asked}
    losses = {name: of.text_losses for name, of in said.items() if of.text_losses is not None}
    answer_losses = {name: of.answer_loss for name, of in said.items() if of.answer_loss is not None}
    plain = {"aligned", "question_only", "moextend", "full"}  # of the table of a run; a chain has its own
    own = {name: score for name, score in accuracy[extension].items() if name in plain}
    summary: dict[str, Any] = {
        "data": first.asked.title,
        "accuracy": own | {"questions": len(first.prompted)},
        "text_loss": {text: {name: of[text] for name, of in losses.items()} for text in CORPORA},
    }
    titles = {name: run.table.model(name).title for name in plan if name in plain}
    if titles := {name: title for name, title in titles.items() if title != results.FIRST.models[name].title}:
        summary["titles"] = titles
    if answer_losses:
        summary["answer_loss"] = answer_losses
    summary |= first.left_out({name: of for name, of in right[extension].items() if name in plain})
    if len(asked) > 1:
        summary |= _chains(run, asked, accuracy, {on: of.left_out(right[on]) for on, of in asked.items()})
        summary |= _composed(run, asked, accuracy)
    predictions = {
        name: [texts[row] for row in pictured]
        for name, texts in answers[extension].items()
        if name in plain and name != "question_only"
    }
    picks = {name: of for name in LOOKED_INTO if name in said and (of := said[name].picks) is not None}
    write_examples(run, examples, picks, predictions, first.asked.source.images)
    return summary


def _ask_all(
    run: Run, asked: Mapping[str, Questions], plan: Mapping[str, list[str]], examples: Sequence[PromptedQuestion]
) -> dict[str, _Said]:
    """What every model of the plan says, and `question_only`. A model of two names is asked once."""
    models = run.table.models
    first_name = {name: _first_name(plan, name, models=models) for name in plan}
    todo: dict[str, list[str]] = {name: [] for name in first_name.values()}
    for name, of_name in plan.items():
        todo[first_name[name]] += (on for on in of_name if on not in todo[first_name[name]])
    (*_, last) = (link.name for link in run.settings.links if not link.apart)
    learnt = {*plan.get("moextend", ()), *plan.get(f"moextend:{last}", ())}
    own = asked[run.settings.extension].asked.source
    answer_stage = None if run.settings.evaluate.data else answer_stage_of(run, own)
    ask = functools.partial(_ask, run, asked, learnt=learnt, examples=examples, answer_stage=answer_stage)
    total = sum(len(asked[on].prompted) + len(asked[on].again) for on_of_model in todo.values() for on in on_of_model)
    guesses = _guesses(run, asked)
    with ThreadPoolExecutor(1) as pool, counting("evaluate", total, unit="questions") as bar:
        guessed = pool.submit(guesses)  # seconds of reading, while programs are compiled
        said = {name: ask(name, of_name, bar=bar) for name, of_name in todo.items()}
    under_all_names = {name: _only(said[first_name[name]], plan[name]) for name in plan}
    return {"question_only": _Said(guessed.result()), **under_all_names}


def _only(said: _Said, on: Collection[str]) -> _Said:
    """What a model says about some of what it was asked."""
    answers, right = ({key: of[key] for key in on if key in of} for of in (said.answers, said.right))
    return said._replace(answers=answers, right=right)


def _ask(
    run: Run, asked: Mapping[str, Questions], name: str, todo: Collection[str], *, learnt: Collection[str],
    examples: Sequence[PromptedQuestion], answer_stage: StageSettings | None, bar: Bar,
) -> _Said:  # fmt: skip
    """Opens a model of the run and asks it the question sets `todo`. It is freed before the next is opened: memory need
    not hold all. For `moextend` it also writes the routing over the question sets in `learnt`."""
    extension = run.settings.extension
    opened, row = askable(run, name), run.table.model(name)
    recipe = run.settings.recipe  # a tower that a result has trained has no cached features:
    pixels = any(results.trains_tower(run.table.patterns(of, recipe=recipe)) for of in row.results)

    def readers(on: str) -> Readers:
        return inputs_of(run, asked[on]) if pixels else asked[on].readers

    answers, right, loss, picks = {}, {}, None, None
    for on in todo:
        of, own = asked[on], readers(on)
        asker = asker_of(opened, readers=own)
        say = functools.partial(_answers, run, asker, bar=bar, most=of.settings.max_new_tokens)
        answers[on] = say([prompt_for(item, own) for item in of.prompted])
        if of.again:
            fewer = [asked_with(run, of.prompted[some.question], own, media=some.media) for some in of.again]
            right[on] = of.right_by_media(answers[on], say(fewer))
    if answer_stage is not None and (name == "base" or extension in todo):
        own = readers(extension) if row.sees else {}
        loss = answer_loss(run, opened, asked[extension].asked.source, stage=answer_stage, readers=own)
    if name in LOOKED_INTO and examples:
        picks = picks_of(run, opened, examples, readers(extension))
    if name == "moextend":
        write_routing(run, opened, {on: (of, readers(on)) for on, of in asked.items() if on in learnt})
    of_text = None
    if not row.text_is_bases:
        with preparing(f"evaluate: held-out text, {name}"):
            of_text = text_losses(run, opened)
    return _Said(answers, right, loss, of_text, picks)


def _plan(run: Run, asked: Mapping[str, Questions]) -> dict[str, list[str]]:
    """The models that there are, and which questions each is asked: in a chain, those of all that it has learnt."""
    first = run.settings.extension
    plan: dict[str, list[str]] = {"base": []}
    for name in results.ANSWERING:
        if name == "aligned" or all(map(run.has, run.table.model(name).results)):
            plan[name] = [on for on in asked if on.partition("/")[0] == first]
    if len(run.settings.links) > 1:
        for kind in ("moextend", "full"):
            learnt: list[str] = []
            for link in run.settings.links:
                name, known = f"{kind}:{link.name}", [link.name] if link.apart else [*learnt, link.name]
                learnt = learnt if link.apart else known
                if all(map(run.has, run.table.model(name).results)):
                    plan[name] = [on for on in asked if on.partition("/")[0] in known]
    return plan


def _first_name(plan: Iterable[str], name: str, *, models: Mapping[str, ModelRow]) -> str:
    """What the same model is called first in the plan: `moextend:LAST` is `moextend`, where nothing comes after."""
    row = models[name]
    return next(other for other in plan if (models[other].results, models[other].sees) == (row.results, row.sees))


def _guesses(run: Run, asked: Mapping[str, Questions]) -> Callable[[], dict[str, list[str]]]:
    """A function that returns, by question set, the best answers without the items, from the training data of the
    extension. The data are opened here: all processes must do that together."""
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


def _answers(run: Run, asker: Asker, prompts: Sequence[Prompt], bar: Bar, *, most: int) -> list[str]:
    texts = [""] * len(prompts)
    for completed in asker.complete(prompts, max_new_tokens=most):
        for index, ids in completed:
            texts[index] = run.tokenizer.decode(ids).strip()
        bar.add(len(completed))
    return texts


def _chains(
    run: Run, asked: Mapping[str, Questions], accuracy: Mapping[str, Mapping[str, float]],
    left_out: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What each step learnt and forgot (`evaluate/chains.py`): of MoExtend, under "strict" or "open" (its text
    isolation), and of full fine-tuning; and what was asked."""
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
    """Accuracy on questions with several media, by question set: of all extensions together under every rule of
    `composing.RULES`, of each alone with its own medium, and after the stage `mixture`. Empty if no question has
    several media, an extension is missing, or text isolation is not strict (only then were they trained apart).
    """
    if run.settings.text_isolation != "strict":
        return {}
    links = [link for link in run.settings.links if not link.apart]
    several = {on: of for on, of in asked.items() if any(len(media) > 1 for media in of.media)}
    last = f"moextend:{links[-1].name}"
    if not several or not all(map(run.has, run.table.model(last).results)):
        return {}
    scores: dict[str, dict[str, float]] = {on: dict(accuracy[on]) for on in several}

    def ask(title: str, opened: Askable, *, media: Collection[str] | None = None) -> None:
        for on, of in several.items():
            prompts = [
                item.prompt if media is None else asked_with(run, item, of.readers, media=media) for item in of.prompted
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
    if "mixture" in run.table.results and run.has("mixture"):
        ask("trained together", askable(run, "moextend"))
    return {"composed": scores}
