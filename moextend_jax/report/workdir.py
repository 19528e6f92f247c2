"""Reads what a run left behind for its report.

In: WORKDIR with any of config.json, summary.json, examples.json, select/routing.json, finetune/routing.json and, of
every extension, STAGE/metrics.jsonl. Out: `Workdir`, None or empty where a part has not been run; letters as in
config.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.config import IMAGE, MoextendError
from moextend_jax.runs import results
from moextend_jax.runs.run import settings_of
from moextend_jax.train.metrics import read_metrics

KINDS = ("image", "text")


def kind_title(kind: str, *, medium: str) -> str:
    """What readers call a kind of token: files call those of every medium's items "image". medium: "" of several."""
    return kind if kind == "text" else medium or "item"


class Selection(NamedTuple):
    """Routing of held-out tokens before and after the probe, and the choice made from it."""

    before_ZE: dict[str, np.ndarray]
    """Share of each kind's picks, rows sum to 1 (0 where the kind had no tokens)."""
    after_ZE: dict[str, np.ndarray]
    shift_Z: np.ndarray
    chosen: tuple[int, ...]
    copied: tuple[tuple[int, int], ...]
    """Chosen layers, each with an expert that it copies."""
    source_under: str
    """The routing that named the sources: "before" or "after"; "" where none did."""
    by_shift: bool = True
    """Whether the layers were chosen whose routing moved most, as the method does."""
    first: int = 0
    """The number that row 0 has among all layers, as in every class here: layers before it are dense."""
    medium: str = IMAGE
    """Of the tokens of kind "image", for `kind_title`, as in every class here."""


class NewExperts(NamedTuple):
    """How much of each kind of token the new experts of the grown model get."""

    layers: tuple[int, ...]
    has_YX: np.ndarray
    """Which of the new experts of all extensions each of these layers has."""
    share_YX: dict[str, np.ndarray]
    fair_Y: np.ndarray
    """Share of an expert if all of its layer were used alike."""
    of_tokens: bool
    """Shares are of tokens; False: of picks, because the file does not say how many tokens there were."""
    first: int = 0
    medium: str = IMAGE


class Loads(NamedTuple):
    """Picks of the grown model's experts, by data set and kind of token."""

    names: tuple[str, ...]
    """Of the experts: those of the base, then new ones."""
    base: int
    """How many of these are the base's."""
    has_ZO: np.ndarray
    """Which of them each layer has."""
    picks_ZO: dict[tuple[str, str], np.ndarray]
    pairs_ZOO: dict[tuple[str, str], np.ndarray]
    """How many tokens picked both of two experts; empty where that was not written."""
    first: int = 0
    medium: str = IMAGE


class Workdir(NamedTuple):
    config: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    examples: Sequence[Mapping[str, Any]] | None
    selection: Selection | None
    new_experts: NewExperts | None
    loads: Loads | None
    metrics: dict[str, list[dict[str, Any]]]

    @property
    def several_chains(self) -> bool:
        """Whether these are several chains, each in a folder of its own (`continual.py`)."""
        return self.summary is not None and "chains" in self.summary and "accuracy" not in self.summary


def read_workdir(workdir: Path) -> Workdir:
    """Raises MoextendError if nothing of a run is there, or if a file does not hold what its name says."""
    if not workdir.is_dir():
        raise MoextendError(f"{workdir}: no such directory; give the --workdir of a run")
    chosen, routed = workdir / "select/routing.json", workdir / "finetune/routing.json"
    selection, routing = (read_json_of(path, dict) for path in (chosen, routed))
    settings = settings_of(workdir)
    stages = (results.FIRST if settings is None else results.table(settings)).training()
    metrics = {stage: results.folder_of(workdir, stage) / "metrics.jsonl" for stage in stages}
    summary = _summary(workdir / "summary.json")
    title = str(summary["data"]) if summary and "data" in summary else "questions"
    media = [IMAGE] if settings is None else [link.medium for link in settings.links]
    of_all = media[0] if {*media} <= {media[0], ""} else ""
    contents = Workdir(
        config=read_json_of(workdir / "config.json", dict),
        summary=summary,
        examples=read_json_of(workdir / "examples.json", list),
        selection=None if selection is None else parse_selection(selection, where=chosen, medium=media[0]),
        new_experts=None if routing is None else _new_experts(routing, media[0], where=routed),
        loads=None if routing is None else _loads(routing, title, of_all, where=routed),
        metrics={stage: read_metrics(path) for stage, path in metrics.items() if path.exists()},
    )
    if all(part is None or part == {} for part in contents):
        raise MoextendError(f"{workdir}: nothing of a run is here; run a stage first, e.g. `moextend align`")
    return contents


def parse_selection(routing: Mapping[str, Any], *, where: Path | str, medium: str = IMAGE) -> Selection:
    """The content of select/routing.json; `where` names it in errors."""
    with malformed(where):
        layers, each = int(routing["layers"]), int(routing.get("new_experts", 1)) * int(routing.get("wide", 1))
        shape = (layers, int(routing["experts"]))
        chosen = _routed(routing, "chosen_layers")
        sources = tuple(int(expert) for expert in routing["sources"])
        shift_Z = np.asarray(routing["shift"], float)
        if shift_Z.shape != shape[:1] or not all(0 <= layer < layers for layer in chosen):
            raise ValueError(f"shift or chosen_layers do not fit {layers} layers")
        if len(sources) != each * len(chosen):
            raise ValueError(f"{len(sources)} sources for {len(chosen)} chosen layers")
        return Selection(
            before_ZE={kind: _shares(routing["before"][kind], shape) for kind in KINDS},
            after_ZE={kind: _shares(routing["after"][kind], shape) for kind in KINDS},
            shift_Z=shift_Z,
            chosen=chosen,
            copied=tuple((chosen[n // each], expert) for n, expert in enumerate(sources)),
            source_under=_source_under(routing),
            by_shift=_asked(routing, "layers", "extender") == "extender",
            first=_first(routing),
            medium=medium,
        )


def _source_under(routing: Mapping[str, Any]) -> str:
    source = _asked(routing, "source", "recipe")
    if source == "recipe":
        source = routing.get("recipe", {}).get("source_under", "before")
    return source if source in ("before", "after") else ""


def _asked(routing: Mapping[str, Any], setting: str, default: str) -> str:
    """What a choice was made by; the method's own is not written."""
    return str(routing.get("facts", {}).get("settings", {}).get(setting, default))


def _summary(path: Path) -> Mapping[str, Any] | None:
    summary = read_json_of(path, dict)
    if summary is not None and "easy_vqa" in summary:  # as it was written before other data could be evaluated
        return {"data": "easy-VQA", "accuracy": summary["easy_vqa"], **summary}
    return summary


def data_title(summary: Mapping[str, Any] | None) -> str:
    """What the questions were taken from."""
    return str((summary or {}).get("data", "data not recorded"))


def value_at(summary: Mapping[str, Any] | None, *path: str) -> Any:
    """What is at `path` of nested mappings; None if it, or anything on the way, is absent or null."""
    value: Any = summary
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def number(summary: Mapping[str, Any] | None, *path: str) -> float | None:
    """The same, which must be a number."""
    value = value_at(summary, *path)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MoextendError(f"summary.json: {'.'.join(path)} is {value!r}, not a number; evaluate again")
    return float(value)


def _new_experts(routing: Mapping[str, Any], medium: str, *, where: Path) -> NewExperts:
    with malformed(where):
        layers, experts, new = (int(routing[name]) for name in ("layers", "experts", "new_experts"))
        extended = _routed(routing, "extended_layers")
        if not all(0 <= layer < layers for layer in extended):
            raise ValueError(f"extended_layers do not fit {layers} layers")
        has_YX = _has(routing, (layers, experts + new))[list(extended), experts:]
        share_ZO = {kind: _shares(routing["counts"][kind], (layers, experts + new)) for kind in KINDS}
        tokens, top_k = routing.get("tokens"), 1.0
        if tokens is not None:
            picks_ZO = {kind: _counts(routing["counts"][kind], (layers, experts + new)) for kind in KINDS}
            share_ZO = {kind: picks_ZO[kind] / max(1, tokens[kind]) for kind in KINDS}
            # Of a token, in the layer with most: an extension may add its experts to the others.
            top_k = max(float(of.sum(axis=1).max()) for of in share_ZO.values())
        return NewExperts(
            layers=extended,
            has_YX=has_YX,
            share_YX={kind: share_ZO[kind][list(extended), experts:] for kind in KINDS},
            fair_Y=top_k / (experts + has_YX.sum(axis=1)),
            of_tokens=tokens is not None,
            first=_first(routing),
            medium=medium,
        )


def _loads(routing: Mapping[str, Any], title: str, medium: str, *, where: Path) -> Loads:
    """title: of the questions, where no loads by data set were written, but their counts alone."""
    with malformed(where):
        layers, experts, new = (int(routing[name]) for name in ("layers", "experts", "new_experts"))
        names = routing.get("names", [*range(experts), *(f"new {n}" for n in range(new))])
        if len(names) != experts + new:
            raise ValueError(f"{len(names)} names of {experts + new} experts")
        loads, shape = routing.get("loads", {title: routing["counts"]}), (layers, experts + new)
        return Loads(
            names=tuple(map(str, names)),
            base=experts,
            has_ZO=_has(routing, shape),
            picks_ZO={key: _counts(of, shape) for key, of in _by_kind(loads)},
            pairs_ZOO={key: _counts(of, (*shape, experts + new)) for key, of in _by_kind(routing.get("pairs", {}))},
            first=_first(routing),
            medium=medium,
        )


def _by_kind(loads: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], Any]]:
    return (((str(data), str(kind)), counts) for data, of in loads.items() for kind, counts in of.items())


def _routed(routing: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Layers that a file names, counted from the first that routes, as its counts are."""
    return tuple(int(layer) - _first(routing) for layer in routing[name])


def _has(routing: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Which experts each layer has; in a file from before `has`, an extended layer has them all."""
    extended = np.isin(np.arange(shape[0]), _routed(routing, "extended_layers"))
    whole_ZO = (np.arange(shape[1]) < int(routing["experts"])) | extended[:, None]
    return _counts(routing.get("has", whole_ZO), shape) > 0


def _first(routing: Mapping[str, Any]) -> int:
    return int(routing.get("first_layer", 0))


def _counts(counts: Any, shape: tuple[int, ...]) -> np.ndarray:
    counts = np.asarray(counts, float)
    if counts.shape != shape or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"counts of shape {counts.shape}, not {shape} numbers >= 0")
    return counts


def _shares(counts: Any, shape: tuple[int, int]) -> np.ndarray:
    counts = _counts(counts, shape)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def read_json_of(path: Path, kind: type) -> Any:
    """What a file holds, None where it is not there; a MoextendError where that is no JSON, or of another kind."""
    if not path.exists():
        return None
    with malformed(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"a JSON {type(content).__name__}, not a {kind.__name__}")
        return content


@contextlib.contextmanager
def malformed(where: Path | str) -> Iterator[None]:
    """Turns what goes wrong while a file's content is taken apart into one line that names the file."""
    mend = "run the command that writes it again, or delete the file"
    try:
        yield
    except KeyError as error:
        raise MoextendError(f"{where}: {error} is missing; {mend}") from error
    except (ValueError, TypeError, AttributeError, IndexError, OSError) as error:
        raise MoextendError(f"{where}: {error}; {mend}") from error
