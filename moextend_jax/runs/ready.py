"""What a run needs of its data, looked at before the first step: a `Run` and the results it is to make in; the run with
every length and number of steps filled in out, or one error that names all that stands in the way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moextend_jax import distributed
from moextend_jax.config import DecoderConfig, MoextendError
from moextend_jax.data.batches import check_named_media
from moextend_jax.data.datasets import Source, check_packages, check_shows, distinct, make_ahead
from moextend_jax.data.inspector import Reading
from moextend_jax.data.measure import Measured, measure, rows_per_conversation
from moextend_jax.data.splitting import rows_of_part
from moextend_jax.extension.routing import check_expert, check_sources, chosen_layers
from moextend_jax.extension.saliency import NO_GRADIENT, SCORES
from moextend_jax.faults import too_many
from moextend_jax.models.blocks import check_blocks
from moextend_jax.models.decoder import check_length
from moextend_jax.progress import preparing
from moextend_jax.runs import results
from moextend_jax.runs.data_of import Read, data_dir_of, open_source, source_of
from moextend_jax.runs.results import Data
from moextend_jax.runs.run import Run
from moextend_jax.settings import EvaluateSettings, FaultSettings, RunSettings, StageSettings

LOOKED_AT = 4096
"""Conversations of each data set that are encoded before the first step, if the settings give the row's length and
items (else all are encoded); `moextend data check` reads every one."""

Check = Callable[[Run], None]


def ready(run: Run, names: Iterable[str], *, checks: Iterable[Check] = ()) -> Run:
    """Looks at the data of results that are to be made, and counts what their settings leave open.

    Args:
      names: of results in `results.Table`.
      checks: further ones, each of which raises a MoextendError for what it finds.

    Raises:
      MoextendError: says all that is wrong: data that cannot be read, rows that are refused, too few of them for what
        is held out, no picture to align on, what `checks` say.
    """
    names, checks, settings = list(names), list(checks), run.settings
    problems = Problems()
    read = functools.cache(functools.partial(open_source, run))
    stages = _stages(settings, names)
    opened = list(_data_names(settings, stages, evaluated=bool(checks)))
    with preparing("looking for packages"):
        for data in opened:
            with problems:
                check_packages(data, data_dir=data_dir_of(run.settings, run.workdir))
    problems.raise_any()
    with distributed.first_alone("make data"), preparing("preparing data of packages"):
        make_ahead(opened, data_dir=data_dir_of(run.settings, run.workdir), media=run.config.media)
    sources: dict[str, Source] = {}
    for name in dict.fromkeys([*names, *stages]):
        if (data := _data(settings, name)) is not None:
            of = results.stage_of(settings, data.of)
            with problems:
                sources[name] = read(of.data, of.split)
    rows = {name: len(distinct(source)) for name, source in sources.items()}
    problems.note(row_problems(settings, rows=rows, layers=len(run.config.decoder.routed)))
    problems.note(extension_problems(settings, names, decoder=run.config.decoder))
    readings = {
        name: Reading.of(results.stage_of(settings, name), results.stage_of(settings, data.of), parts=data.feeds)
        for name, data in stages.items()
    }
    readers: dict[Reading, list[str]] = {}
    for name in (name for name in stages if name in sources):
        readers.setdefault(readings[name], []).append(name)
        with problems:
            check_named_media(results.stage_of(settings, name), run.config.media, where=f"{name}.")
        with problems:
            if medium := results.aligned_medium(results.table(settings).patterns(name, recipe=settings.recipe)):
                check_shows(sources[name], medium=medium, stage=name)
    measured = {reading: _measure(run, of, sources[of[0]]) for reading, of in readers.items()}
    for reading, of in readers.items():
        problems.note(_refused(measured[reading], settings.faults, stages=of))
    for check in checks:
        with problems:
            check(run)
    problems.raise_any()
    filled = {}
    for name, data in stages.items():
        filled[name], line = _counted(run, name, data, measured[readings[name]], read)
        with problems:
            check_length(filled[name].length, run.config.decoder)
        if line and name in names and distributed.first():
            print(f"{name}: {line}")
    problems.raise_any()
    return dataclasses.replace(run, settings=results.with_stages(settings, filled))


def _data_names(settings: RunSettings, stages: Mapping[str, Data], *, evaluated: bool) -> Iterable[str]:
    """What is going to be opened, each once."""
    names = [results.stage_of(settings, data.of).data for data in stages.values()]
    for link in settings.links if evaluated else ():
        evaluate = settings.of_extension(link.name).evaluate
        names += [evaluate.data, *evaluate.sets.values()]
    return filter(None, dict.fromkeys(names))


def row_problems(settings: RunSettings, *, rows: Mapping[str, int], layers: int) -> list[str]:
    """Problems that follow from the numbers of rows alone.

    Args:
      rows: for each result that is to be made, by its name, the rows of its data set, each counted once, before
        anything is held out.
      layers: number of the decoder's layers that route.
    """
    problems = Problems()
    left = dict(rows)
    table = results.table(settings)
    links = [link.name for link in settings.links]
    for name, data in ((name, _data(settings, name)) for name in rows):
        if data is None:
            continue
        for extension in links[: links.index(table.result(name).extension) + 1]:
            evaluate = settings.of_extension(extension).evaluate
            finetune = results.stage_of(settings, results.named(settings, extension, "finetune"))
            if not evaluate.data and results.stage_of(settings, data.of).data == finetune.data:
                with problems:  # extensions on one data set hold out nearly the same rows
                    taken = rows_of_part(evaluate.held_out, rows[name], setting="evaluate.held_out")
                    left[name] = min(left[name], rows[name] - taken)
    for name in left:
        data = _data(settings, name)
        if data is not None and data.part != "all" and left[name] > 0:
            with problems:
                select = settings.of_extension(table.result(name).extension).select
                rows_of_part(select.held_out, left[name], setting="select.held_out")
    for name in rows:
        if name.partition(":")[0] == "select":
            select, where = results.group_of(settings, name), ".".join(table.result(name).settings)
            with problems:  # what it chooses from is not known yet, but how many
                chosen_layers(select.layers, np.zeros(layers), share=select.share, where=f"{where}.")
    return problems.messages


ONE_CHOSEN = (
    "the base has top_k = 1 and weights that sum to one: the chosen expert always weighs 1, so that routers, new "
    "columns and calibrators get no gradient; take a base of top_k = 2 or more (num_experts_per_tok)"
)
WIDE_TWIN = (
    "grow.start = 'twin' and select.wide = {}: the mean of several experts is nobody's twin; set wide = 1, or take "
    "another start"
)


def extension_problems(settings: RunSettings, names: Iterable[str], *, decoder: DecoderConfig) -> list[str]:
    """What stands against extending such a decoder by the results that are to be made."""
    problems, table = Problems(), results.table(settings)
    for name, row in ((name, table.result(name)) for name in names):
        if name.partition(":")[0] not in ("extend", "select", "grow", "finetune"):
            continue
        method = settings.of_extension(row.extension).method
        if method.name == "blocks":
            with problems:
                check_blocks(decoder, method.blocks)
        if method.name != "moextend":  # which alone chooses experts
            continue
        if decoder.top_k == 1 and decoder.normalised:
            problems.note([ONE_CHOSEN])
        select, grow = settings.of_extension(row.extension).select, settings.of_extension(row.extension).grow
        with problems:
            check_sources(select.number(decoder.experts), select.wide, experts=decoder.experts)
        if grow.selection_bias == "closed" and not decoder.selection_bias:
            problems.note([f"grow.selection_bias closed: no bias chooses experts in a {decoder.family}; leave it out"])
        if grow.start == "twin" and select.wide > 1:
            problems.note([WIDE_TWIN.format(select.wide)])
        if select.source in SCORES and settings.quantised:
            problems.note([f"select.source = {select.source!r}: {NO_GRADIENT.format(settings.quantised)}"])
        if select.source == "fixed":
            with problems:
                check_expert(select.expert, experts=decoder.experts)
    return problems.messages


def too_many_questions(settings: EvaluateSettings, rows: int, *, data: str = "") -> MoextendError:
    asked, found = f"evaluate.questions = {settings.questions}", f"{data or settings.data} has {rows} rows"
    return MoextendError(f"{asked}, but {found}; ask at most so many")


class Problems:
    """What is wrong, each thing once: messages that are noted, and errors raised inside of `with problems:`."""

    def __init__(self):
        self.messages: list[str] = []

    def note(self, messages: Iterable[str]) -> None:
        self.messages = list(dict.fromkeys([*self.messages, *messages]))

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, MoextendError):
            return False
        self.note([str(error)])
        return True

    def raise_any(self) -> None:
        if len(self.messages) == 1:
            raise MoextendError(self.messages[0])
        if self.messages:
            listed = "; ".join(f"({number}) {message}" for number, message in enumerate(self.messages, 1))
            raise MoextendError(f"{len(self.messages)} things stand in the way, nothing was done: {listed}")


def _data(settings: RunSettings, name: str) -> Data | None:
    row = results.table(settings).result(name)
    return None if row.data is None else row.data(settings.recipe)


def _stages(settings: RunSettings, names: Iterable[str]) -> dict[str, Data]:
    """The stages that lay out the rows of these results, the probe for `select`, else the result's own; and the data
    that each of them reads."""
    data = {stage: _data(settings, stage) for stage in (results.laid_out_as(settings, name) for name in names)}
    return {stage: of for stage, of in data.items() if of is not None}


def _measure(run: Run, stages: Sequence[str], source: Source) -> Measured:
    """Of stages that read alike."""
    own = [results.stage_of(run.settings, name) for name in stages]
    data = _data(run.settings, stages[0])
    assert data is not None
    rooms = (own[0].room(name) for name, shown in source.items.items() if len(shown))
    return measure(
        source,
        stage=own[0],
        tokenizer=run.tokenizer,
        recipe=run.settings.recipe,
        media=run.config.media,
        faults=run.settings.faults,
        parts=data.feeds,
        most=LOOKED_AT if all(stage.length for stage in own) and all(rooms) else None,
    )


def _refused(measured: Measured, faults: FaultSettings, *, stages: Sequence[str]) -> Iterable[str]:
    names = ", ".join(stages)
    for kind, fault in measured.refused.items():
        more = f" ({measured.counts[kind]} are {kind})" if measured.counts[kind] > 1 else ""
        yield f"{names}: {fault}{more}"
    if measured.skipped == measured.read:
        yield f"{names}: all {measured.read} conversations looked at would be skipped; `moextend data check` says why"
    elif too_many(measured.skipped, measured.read, faults):
        yield (
            f"{names}: {measured.skipped} of {measured.read} conversations looked at would be skipped, more than "
            f"most_skipped = {faults.most_skipped:g} allows; `moextend data check` names them"
        )


def _counted(run: Run, name: str, data: Data, measured: Measured, read: Read) -> tuple[StageSettings, str]:
    """A stage's settings with length, pictures per row and steps filled in where left open; and a line about them."""
    settings = results.stage_of(run.settings, name)
    sized = measured.filled(settings)
    lines = []
    if sized.epochs:
        conversations = len(source_of(run, data, read=read))
        each = rows_per_conversation(measured, stage=sized, media=run.config.media)
        steps = max(math.ceil(sized.epochs * conversations * each / sized.batch_size), sized.least_steps, 1)
        epochs = steps * sized.batch_size / each / conversations
        about = "about " if each != 1 else ""
        lines = [f"{steps:,} steps of {sized.batch_size} rows, {about}{epochs:.3g} x {conversations:,} conversations"]
        sized = dataclasses.replace(sized, steps=steps, epochs=0.0, least_steps=0)
    if not settings.length:
        lines.append(f"{sized.length} tokens a row (the longest conversation: {measured.tokens_n.max(initial=0)})")
    return sized, "; ".join(lines)
