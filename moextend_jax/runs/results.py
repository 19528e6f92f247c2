"""TABLE of results: what a work directory can hold, and which of them each model is made of; the only list of names.

In: a name. Out: its row: what it trains, what must be there before it, the data it reads. A row says what; how results
are made is `runs/making.py`, how models are put together `runs/models_of.py`. Another extension or method is another
row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

from moextend_jax.config import MoextendError, Recipe

Row = TypeVar("Row")


class Data(NamedTuple):
    """Rows that a result is made from: of the data set that the settings of result `of` name all of them, the samples
    S_e that are held out for the extender, or the rest. `feeds`: what of a conversation, see `data.batches.batches`."""

    of: str
    part: Literal["all", "held_out", "rest"] = "all"
    feeds: Literal["conversation", "bare_question"] = "conversation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What WORKDIR/NAME holds.

    parents: results that it is made from: one that trains starts from the model that they make.
    how: a row of `making.MAKERS`. data: what it reads. trains: path patterns of the leaves that it trains, by recipe;
    all others are frozen. settings: the group of `RunSettings` that sets it.
    grown: whether its leaves belong to the extended model.
    models: rows of MODELS that it looks at: those whose routing is compared, or the one that is extended.
    optional: a baseline, which `moextend run` makes only if asked to.
    """

    does: str
    how: Literal["train", "select", "grow"] = "train"
    parents: tuple[str, ...] = ()
    data: Callable[[Recipe], Data] | None = None
    trains: Callable[[Recipe], tuple[str, ...]] = lambda _: ()
    settings: str = ""
    grown: bool = False
    models: tuple[str, ...] = ()
    optional: bool = False


def _probe_data(recipe: Recipe) -> Data:
    return Data("align") if recipe.probe_data == "captions" else Data("finetune", "rest")


def _held_out(recipe: Recipe) -> Data:
    if recipe.probe_data == "captions":
        return Data("align", "held_out", "bare_question")
    return Data("finetune", "held_out")


def _finetuned(recipe: Recipe) -> tuple[str, ...]:
    also = ("projector/*",) if recipe.finetune_trains == "extension_and_projector" else ()
    return ("extension/*", *also)


RESULTS: dict[str, Result] = {
    "align": Result(
        does="train the projector",
        data=lambda _: Data("align"),
        trains=lambda _: ("projector/*",),
        settings="align",
    ),
    "extend": Result(
        does="train the routers alone, as a probe",
        parents=("align",),
        data=_probe_data,
        trains=lambda _: ("decoder/layers/moe/gate",),
        settings="extend",
    ),
    "select": Result(
        does="count routing before and after the probe; choose layers and source experts",
        how="select",
        parents=("align", "extend"),
        models=("aligned", "probed"),
        data=_held_out,
        settings="select",
    ),
    "grow": Result(
        does="add new experts, router columns and calibrators to the chosen layers",
        how="grow",
        parents=("align", "extend"),
        models=("aligned",),
        grown=True,
    ),
    "finetune": Result(
        does="train what was added",
        parents=("align", "grow"),
        data=lambda _: Data("finetune"),
        trains=_finetuned,
        settings="finetune",
        grown=True,
    ),
    "full": Result(
        does="full fine-tuning, the baseline",
        parents=("align",),
        data=lambda _: Data("full"),
        trains=lambda _: ("decoder/*", "projector/*", "vision/*"),
        settings="full",
        optional=True,
    ),
}  # fmt: skip
"""In the order in which `moextend run` makes them."""


class ModelRow(NamedTuple):
    """A model of a work directory: the results whose leaves lie, one over the other, over the pretrained parts.

    title: for tables. sees: False is the pretrained decoder alone, without its eyes. text_is_bases: nothing that text
    passes through was trained, so its text losses are the base's and are not computed again.
    """

    title: str
    results: tuple[str, ...]
    sees: bool = True
    text_is_bases: bool = False


MODELS: dict[str, ModelRow] = {
    "base": ModelRow("base", (), sees=False),
    "aligned": ModelRow("aligned only", ("align",), text_is_bases=True),
    "probed": ModelRow("probed", ("align", "extend")),
    "moextend": ModelRow("MoExtend", ("align", "grow", "finetune")),
    "full": ModelRow("full fine-tuning", ("align", "full")),
}
ANSWERING = ("aligned", "moextend", "full")
"""Models that are asked questions; the probe is not meant to answer."""


def result(name: str) -> Result:
    """Raises MoextendError for a name that is no row."""
    return _row(RESULTS, name, kind="stage")


def model_row(name: str) -> ModelRow:
    """Raises MoextendError for a name that is no row."""
    return _row(MODELS, name, kind="model")


def patterns(name: str, *, recipe: Recipe, sees: bool = True) -> tuple[str, ...]:
    """Path patterns of the leaves that a result trains; of a text model (`sees` False) those of its decoder."""
    return tuple(p for p in result(name).trains(recipe) if sees or not p.startswith(("projector/", "vision/")))


def trains_tower(names: Iterable[str], *, recipe: Recipe) -> bool:
    """Whether one of these results holds a trained vision tower."""
    return any(path.startswith("vision/") for name in names for path in RESULTS[name].trains(recipe))


def training(*, optional: bool = True) -> tuple[str, ...]:
    """Names of the results that are trained, with or without the baselines."""
    return tuple(name for name, row in RESULTS.items() if row.how == "train" and (optional or not row.optional))


def is_grown(results: Iterable[str]) -> bool:
    """Whether a model with these results is an extended one."""
    return any(RESULTS[name].grown for name in results)


def _row(table: Mapping[str, Row], name: str, *, kind: str) -> Row:
    if name not in table:
        raise MoextendError(f"there is no {kind} {name!r}; there are {', '.join(table)}")
    return table[name]
