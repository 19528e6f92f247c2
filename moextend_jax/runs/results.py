"""TABLE of results: what a work directory can hold, and which of them each model is made of; the only list of names.

In: the extensions of a run in order (`settings.Link`), and a name. Out: its row: what it trains, what must be there
before it, the data it reads. A row says what; how results are made is `runs/making.py`, how models are put together
`runs/models_of.py`.

The first extension's results are called align, extend, select, grow, finetune and full; those of a later one NAME
align:NAME, ..., finetune:NAME, full:NAME, and start from the model that the earlier ones make. For example a second
extension "sound" of a medium that is new: align:sound trains its projector in the model of align, grow and finetune,
whose leaves are frozen there; finetune:sound trains extensions/sound/* with all of these frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from moextend_jax.config import IMAGE, MoextendError, Recipe
from moextend_jax.configurations import meant
from moextend_jax.settings import Link, Parts, RunSettings, StageSettings

Row = TypeVar("Row")


class Data(NamedTuple):
    """Rows that a result is made from.

    of: the result whose settings name the data set. part: all of its rows, the samples S_e that are held out for the
    extender, or all but these. feeds: what of a conversation is read, see `data.batches.batches`.
    """

    of: str
    part: Literal["all", "held_out", "rest"] = "all"
    feeds: Parts = "conversation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What the folder of a result holds.

    parents: results that it is made from; training starts from the model that they make.
    how: a row of `making.MAKERS`. data: what it reads. trains: path patterns of the leaves that it trains, by recipe;
    all others are frozen. settings: path of its group in `RunSettings`.
    extension: the one that it belongs to. grown: whether its leaves are those of that extension.
    models: models that it looks at: the two whose routing is compared, or the one that is extended.
    optional: a baseline, which `moextend run` makes only if asked to.
    """

    does: str
    how: Literal["train", "select", "grow"] = "train"
    parents: tuple[str, ...] = ()
    data: Callable[[Recipe], Data] | None = None
    trains: Callable[[Recipe], tuple[str, ...]] = lambda _: ()
    settings: tuple[str, ...] = ()
    extension: str = IMAGE
    grown: bool = False
    models: tuple[str, ...] = ()
    optional: bool = False


class ModelRow(NamedTuple):
    """A model of a work directory: the pretrained parts overlaid with the leaves of these results, in order.

    title: for tables. sees: False is the pretrained decoder alone, without its media. text_is_bases: nothing that text
    passes through was trained, so its text losses are the base's and are not computed again.
    """

    title: str
    results: tuple[str, ...]
    sees: bool = True
    text_is_bases: bool = False


class Table(NamedTuple):
    """The rows of a run: results in the order in which `moextend run` makes them, and models."""

    results: dict[str, Result]
    models: dict[str, ModelRow]

    def result(self, name: str) -> Result:
        """Raises MoextendError for a name that is no row."""
        return _row(self.results, name, kind="stage")

    def model(self, name: str) -> ModelRow:
        """Raises MoextendError for a name that is no row."""
        return _row(self.models, name, kind="model")

    def training(self, *, optional: bool = True) -> tuple[str, ...]:
        """Names of the results that are trained, with or without the baselines."""
        return tuple(
            name for name, row in self.results.items() if row.how == "train" and (optional or not row.optional)
        )

    def grown(self, names: Iterable[str]) -> tuple[str, ...]:
        """The extensions that a model with these results has, in order."""
        return tuple(dict.fromkeys(self.results[name].extension for name in names if self.results[name].grown))

    def patterns(self, name: str, *, recipe: Recipe, sees: bool = True) -> tuple[str, ...]:
        """Path patterns of the leaves that a result trains; for a text model (`sees` False) without those of media."""
        return tuple(p for p in self.result(name).trains(recipe) if sees or not p.startswith("media/"))


ANSWERING = ("aligned", "moextend", "full")


def table(settings: RunSettings) -> Table:
    """The table of a run."""
    return of_links(settings.links, mixture=settings.mixture is not None)


@functools.cache
def of_links(links: tuple[Link, ...], *, mixture: bool = False) -> Table:
    """The rows of these extensions, one after the other, and perhaps of the stage that trains them together."""
    results: dict[str, Result] = {}
    models = {"base": ModelRow("base", (), sees=False)}
    media: dict[str, str] = {}  # by medium the result that aligned it
    before: tuple[str, ...] = ()  # what the model is made of so far
    tuned: tuple[str, ...] = ()  # the same of full fine-tuning
    for number, link in enumerate(links):
        last, of = "" if number == 0 else f":{link.name}", f" ({link.name})" if len(links) > 1 else ""
        aligned = tuple(name for name in before if name.startswith("align")) if link.apart else before
        if link.medium and link.medium not in media:
            media[link.medium] = f"align{last}"
            results[f"align{last}"] = _of_projector(link, "align", last, does="train the projector", parents=aligned)
            aligned += (f"align{last}",)
        elif link.medium and media[link.medium] not in aligned:  # aligned by an extension that is apart
            aligned += (media[link.medium],)
        if link.connector:  # which adds nothing to the decoder: its medium's projector goes on
            only = _of_projector(link, "finetune", last, does="train the projector alone", parents=aligned)
            results[f"finetune{last}"] = only
        else:
            results |= (_rival if link.rival else _extended)(link, last, aligned=aligned)
            results[f"finetune{last}"] = _finetune(link, last, parents=(*aligned, f"grow{last}"))
        moextend = (*aligned, *(f"{stage}{last}" for stage in ("grow", "finetune") if f"{stage}{last}" in results))
        tuned += tuple(name for name in media.values() if name not in tuned)
        results[f"full{last}"] = _full(link, last, parents=tuned, media=tuple(media))
        tuned += (f"full{last}",)
        exact = not before
        title = "aligned only" if aligned else "base"  # of a task in text, for which nothing is aligned
        models[f"aligned{last}"] = ModelRow(f"{title}{of}", aligned, text_is_bases=exact)
        if f"extend{last}" in results:
            models[f"probed{last}"] = ModelRow(f"probed{of}", (*aligned, f"extend{last}"))
        models[f"moextend:{link.name}"] = ModelRow(f"{link.title}{of}", moextend)
        models[f"full:{link.name}"] = ModelRow(f"full fine-tuning{of}", tuned)
        if not link.apart:
            before = moextend
    if mixture:
        results["mixture"] = _mixture(links, parents=before)
        before = (*before, "mixture")
    titles = dict.fromkeys(link.title for link in links if not link.apart)
    models["moextend"] = ModelRow(" and ".join(titles) or "MoExtend", before)
    models["full"] = ModelRow("full fine-tuning", tuned)
    return Table(results, models)


def titles_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """What models are called, from a run's summary.json: most as in any run, others as its `titles` says."""
    method = {"moextend": str(summary["method"])} if "method" in summary else {}  # of an older version
    titles = summary.get("titles")
    return {name: row.title for name, row in FIRST.models.items()} | (titles if isinstance(titles, dict) else method)


def _of_projector(link: Link, stage: str, last: str, *, does: str, parents: tuple[str, ...]) -> Result:
    """A stage that trains the projector of the extension's medium alone."""
    return Result(
        does=does + _of(last),
        parents=parents,
        data=lambda _: Data(f"{stage}{last}"),
        trains=lambda _: (f"media/{link.medium}/projector/*",),
        settings=_group(last, stage),
        extension=link.name,
    )


def _extended(link: Link, last: str, *, aligned: tuple[str, ...]) -> dict[str, Result]:
    """extend, select and grow of an extension that starts from the model of `aligned`."""

    def captions(recipe: Recipe) -> bool:  # a task in text has none
        return recipe.probe_data == "captions" and bool(link.medium)

    def probe_data(recipe: Recipe) -> Data:
        return Data(f"align{last}") if captions(recipe) else Data(f"finetune{last}", "rest")

    def held_out(recipe: Recipe) -> Data:
        if captions(recipe):
            return Data(f"align{last}", "held_out", "bare_question")
        return Data(f"finetune{last}", "held_out")

    rows = {
        "extend": Result(
            does="train the routers alone, as a probe",
            parents=aligned,
            data=probe_data,
            trains=lambda _: ("decoder/layers/moe/gate*",),  # and a bias where there is one
        ),
        "select": Result(
            does="count routing before and after the probe; choose layers and source experts",
            how="select",
            parents=(*aligned, f"extend{last}"),
            models=(f"aligned{last}", f"probed{last}"),
            data=held_out,
        ),
        "grow": Result(
            does="add new experts, router columns and calibrators to the chosen layers",
            how="grow",
            parents=(*aligned, f"extend{last}"),
            models=(f"aligned{last}",),
            grown=True,
        ),
    }  # fmt: skip
    return {
        f"{name}{last}": dataclasses.replace(
            row,
            does=row.does + _of(last),
            settings=() if name == "grow" else _group(last, name),
            extension=link.name,
        )
        for name, row in rows.items()
    }


def _rival(link: Link, last: str, *, aligned: tuple[str, ...]) -> dict[str, Result]:
    """grow of an extension by low-rank updates or blocks: there is nothing to probe and to select."""
    grow = Result(
        does=f"add {'low-rank updates to' if link.kind == 'adapters' else 'blocks between'} layers{_of(last)}",
        how="grow",
        parents=aligned,
        grown=True,
        extension=link.name,
    )
    return {f"grow{last}": grow}


def _finetune(link: Link, last: str, *, parents: tuple[str, ...]) -> Result:
    def trains(recipe: Recipe) -> tuple[str, ...]:
        projector = recipe.finetune_trains == "extension_and_projector" and link.medium
        return (
            *(f"{link.kind}/{part}/*" for part in link.parts or (link.name,)),
            *((f"extensions/{link.name}/router/new_bias",) if link.closed else ()),
            *((f"media/{link.medium}/projector/*",) if projector else ()),
        )

    return Result(
        does=f"train what was added{_of(last)}",
        parents=parents,
        data=lambda _: Data(f"finetune{last}"),
        trains=trains,
        grown=True,
        settings=_group(last, "finetune"),
        extension=link.name,
    )


def _full(link: Link, last: str, *, parents: tuple[str, ...], media: tuple[str, ...]) -> Result:
    return Result(
        does=f"full fine-tuning, the baseline{_of(last)}",
        parents=parents,
        data=lambda _: Data(f"full{last}"),
        trains=lambda _: ("decoder/*", *(f"media/{medium}/*" for medium in media)),
        settings=_group(last, "full"),
        extension=link.name,
        optional=True,
    )


def _mixture(links: tuple[Link, ...], *, parents: tuple[str, ...]) -> Result:
    names = [link.name for link in links if not link.apart and link.kind == "extensions" and not link.connector]
    media = dict.fromkeys(link.medium for link in links if link.medium and not link.apart)
    return Result(
        does="train the columns, calibrators and projectors of all extensions together",
        parents=parents,
        data=lambda _: Data("mixture"),
        trains=lambda _: (
            *(f"extensions/{name}/router/*" for name in names),
            *(f"media/{medium}/projector/*" for medium in media),
        ),
        settings=("mixture",),
        extension=links[-1].name,
    )


def _of(last: str) -> str:
    return f" of {last[1:]}" if last else ""


def _group(last: str, name: str) -> tuple[str, ...]:
    return ("extensions", last[1:], name) if last else (name,)


FIRST = of_links((Link(),))
"""The rows of a run with one extension: the names of commands."""


# --- where a result's settings and files are --------------------------------------------------------------------------


def group_of(settings: RunSettings, name: str) -> Any:
    """The settings of a result, or of what is asked (evaluate, evaluate:NAME)."""
    stage, _, extension = name.partition(":")
    path = _group(f":{extension}" if extension else "", stage) if stage == "evaluate" else None
    group: Any = settings
    for key in path or table(settings).result(name).settings:
        group = group[key] if isinstance(group, Mapping) else getattr(group, key)
    return group


def stage_of(settings: RunSettings, name: str) -> StageSettings:
    """The settings of a result that is trained."""
    group = group_of(settings, name)
    assert isinstance(group, StageSettings)
    return group


def named(settings: RunSettings, extension: str, stage: str) -> str:
    """What a stage of an extension is called: finetune of the first, finetune:NAME of a later one."""
    return stage if extension == settings.extension else f"{stage}:{extension}"


def laid_out_as(settings: RunSettings, name: str) -> str:
    """The result whose stage says how this one lays out its rows: of `select` the probe, else itself."""
    stage, extension = name.partition(":")[0], table(settings).result(name).extension
    return named(settings, extension, "extend") if stage == "select" else name


def with_stages(settings: RunSettings, stages: Mapping[str, StageSettings]) -> RunSettings:
    """The settings, with those of these trained results replaced."""

    def put(group: Any, keys: Sequence[str], stage: StageSettings) -> Any:
        key, *rest = keys
        own = group[key] if isinstance(group, Mapping) else getattr(group, key)
        new = {key: put(own, rest, stage) if rest else stage}
        return {**group, **new} if isinstance(group, Mapping) else dataclasses.replace(group, **new)

    for name, stage in stages.items():
        settings = put(settings, table(settings).result(name).settings, stage)
    return settings


def folder_of(workdir: Path, name: str) -> Path:
    """WORKDIR/align of the first extension, WORKDIR/NAME/align of a later one."""
    stage, _, extension = name.partition(":")
    return workdir / extension / stage if extension else workdir / stage


def trains_tower(trains: Iterable[str]) -> bool:
    """Whether these path patterns are those of a tower too, whose features cannot be cached then."""
    return any(pattern.startswith("media/") and "/projector/" not in pattern for pattern in trains)


def aligned_medium(trains: Sequence[str]) -> str:
    """The medium of path patterns that are of projectors alone, the first where there are several; "" of others."""
    aligning = all(pattern.startswith("media/") and "/projector/" in pattern for pattern in trains)
    return trains[0].split("/")[1] if aligning else ""


def _row(table: Mapping[str, Row], name: str, *, kind: str) -> Row:
    if name not in table:
        raise MoextendError(f"there is no {kind} {name!r}; there are {', '.join(table)}{meant(name, table)}")
    return table[name]
