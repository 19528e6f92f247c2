"""Two routings side by side: how far apart, layer by layer, whether the extender would choose the same, and what new
experts took from whom.

In: two `Stats` of models of the same sizes, of one before and after its extension, or two pairs of them (before and
after the probe). Out: `LayerDistance`s, `Choice`s and `Taken`. Distributions of picks are compared with half a pick
added per expert, so that an expert that one side never picked does not make a divergence infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.extension import routing
from moextend_jax.routing.stats import KINDS, Kind, Stats, counts_of, load_of


class LayerDistance(NamedTuple):
    """One layer, one kind of token. tv: total variation, half the sum of absolute differences. kl: from A to B, nats.

    Where new experts took all picks of the layer, tv_picks and shift are NaN, and there is no source.
    agreement: share of tokens with the same set of picks, ties left out; None where it cannot be said.
    tied: tokens whose last pick was decided by less than the tie threshold, in A or in B.
    """

    layer: int
    kind: str
    agreement: float | None
    tied: int | None
    tv_picks: float
    kl_picks: float
    tv_probs: float
    kl_probs: float
    shift: float
    """d_j of the picks: sample standard deviation over experts of the difference of their shares."""
    shift_least: float
    """d_j of the k least likely, which the released code counts."""
    source_a: int | None
    """The most picked expert, which a new one would be copied from."""
    source_b: int | None


class Choice(NamedTuple):
    """Layers and source experts under one recipe."""

    recipe: str
    layers: tuple[int, ...]
    sources: tuple[int, ...]
    shift_Z: list[float]


class Taken(NamedTuple):
    """What the new experts of one extended layer get, of one kind of token.

    experts: their numbers. share_X: picks of each / all picks. probs_X: mean probabilities. tokens: share of the tokens
    that pick one. from_E: of the picks that such tokens gave up, the share of each expert that `before` has; None where
    picks cannot be compared token by token, or none was lost.
    """

    layer: int
    kind: str
    experts: list[int]
    share_X: list[float]
    probs_X: list[float]
    tokens: float | None
    from_E: list[float] | None


def is_extension_of(a: Stats, b: Stats) -> bool:
    """Whether `b` has the experts that `a` has, and a further extension's behind them."""
    alike = (a.experts, a.top_k, a.layers) == (b.experts, b.top_k, b.layers) and a.columns < b.columns
    return alike and np.array_equal(a.has_ZO, b.has_ZO[:, : a.columns])


def taken(before: Stats, after: Stats) -> list[Taken]:
    """What every expert of `after` that `before` lacks gets, and which experts of `before` lost it."""
    rows = []
    for kind in KINDS:
        if not after.tokens[kind]:
            continue
        load = load_of(after, kind)
        for z, new in enumerate(_new(after, before.columns)):
            if not new:
                continue
            tokens, from_E = _lost(before, after, z, kind)
            shares, probs = (of_ZO[z, new].tolist() for of_ZO in (load.share_ZO, load.probs_ZO))
            rows.append(Taken(after.layers[z], kind, new, shares, probs, tokens, from_E))
    return rows


def _lost(before: Stats, after: Stats, layer: int, kind: Kind) -> tuple[float | None, list[float] | None]:
    """Share of the tokens that pick a new expert; of the picks that these gave up, the share of each expert before."""
    if after.per_token is None:
        return None, None
    of_T = after.per_token.image_T == (kind == "image")
    after_Tk = after.per_token.ids_ZTk[layer][of_T]
    new_T = (after_Tk >= before.columns).any(axis=-1)
    share = float(new_T.mean()) if new_T.size else None
    if before.per_token is None or why_no_agreement(before, after):
        return share, None
    before_Tk = before.per_token.ids_ZTk[layer][of_T][new_T]
    lost_Tk = ~(before_Tk[:, :, None] == after_Tk[new_T][:, None, :]).any(axis=-1)
    counts_O = np.bincount(before_Tk[lost_Tk], minlength=before.columns)
    return share, (counts_O / counts_O.sum()).tolist() if counts_O.sum() else None


def check_same_shape(a: Stats, b: Stats, *, names: tuple[str, str]) -> None:
    for what, x, y in (
        ("experts", a.experts, b.experts),
        ("picks per token", a.top_k, b.top_k),
        ("numbers of layers", a.layers, b.layers),
        ("router outputs per layer", a.outputs_Z.tolist(), b.outputs_Z.tolist()),
        ("new experts per layer", _new(a, a.experts), _new(b, b.experts)),
    ):
        if x != y:
            hint = ""
            if is_extension_of(b, a):
                hint = f"; to see what the extension did, name {names[1]}, the model before it, first"
            raise MoextendError(f"{names[0]} and {names[1]} are not of the same sizes: {what} {x} and {y}{hint}")


def _new(stats: Stats, first: int) -> list[list[int]]:
    """The numbers from `first` on of every layer's experts."""
    return [(first + np.flatnonzero(new_X)).tolist() for new_X in stats.has_ZO[:, first:]]


def distances(a: Stats, b: Stats, *, tie: float) -> list[LayerDistance]:
    rows = []
    for kind in (*KINDS, "all"):
        if not all(_counts(stats.tokens, kind) for stats in (a, b)):
            continue
        loads = [load_of(stats, kind) for stats in (a, b)]
        picks = [_counts(stats.picks_ZO, kind) for stats in (a, b)]
        least = [_counts(stats.least_ZO, kind) for stats in (a, b)]
        for z, own in enumerate(a.has_ZO):
            agreement, tied = _agreement(a, b, z, kind, tie=tie)
            a_O, b_O = (counts_ZO[z, own] for counts_ZO in picks)
            with np.errstate(invalid="ignore"):
                tv_picks, shift = _tv(routing.shares(a_O), routing.shares(b_O)), routing.shift(a_O, b_O)
                shift_least = routing.shift(*(counts_ZO[z, own] for counts_ZO in least))
            rows.append(
                LayerDistance(
                    layer=a.layers[z],
                    kind=kind,
                    agreement=agreement,
                    tied=tied,
                    tv_picks=tv_picks,
                    kl_picks=_kl(routing.shares(a_O + 0.5), routing.shares(b_O + 0.5)),
                    tv_probs=_tv(*(load.probs_ZO[z, own] for load in loads)),
                    kl_probs=_kl(*(load.probs_ZO[z, own] for load in loads)),
                    shift=float(shift),
                    shift_least=float(shift_least),
                    source_a=_most_picked(picks[0][z]),
                    source_b=_most_picked(picks[1][z]),
                )
            )
    return rows


def choices(before: Stats, after: Stats, *, share: float) -> list[Choice] | None:
    """What the extender would choose for this pair under each recipe; None for a model that is extended already.

    Raises:
      MoextendError: the share is so small that it gives no layer.
    """
    if (before.outputs_Z != before.experts).any():
        return None
    routing.chosen_layers("extender", np.zeros(len(before.outputs_Z)), share=share, where="--")
    by_recipe = []
    for name, recipe in RECIPES.items():
        counts = [counts_of(stats, recipe.counted_picks) for stats in (before, after)]
        chosen = routing.select(*counts, share=share, recipe=recipe)
        layers = tuple(before.layers[z] for z in chosen.layers)
        by_recipe.append(Choice(name, layers, chosen.sources, chosen.shift_Z.tolist()))
    return by_recipe


def why_no_agreement(a: Stats, b: Stats) -> str | None:
    """Why picks cannot be compared token by token."""
    without = [name for name, stats in (("the first", a), ("the second", b)) if stats.per_token is None]
    if without:
        return f"{' and '.join(without)} keeps no picks per token (collect with --per_token)"
    return None if a.inputs == b.inputs else "they were not collected on the same tokens"


def _agreement(
    a: Stats, b: Stats, layer: int, kind: Kind | Literal["all"], *, tie: float
) -> tuple[float | None, int | None]:
    if a.per_token is None or b.per_token is None or why_no_agreement(a, b):
        return None, None
    image_T = a.per_token.image_T
    of_T = np.ones_like(image_T) if kind == "all" else image_T == (kind == "image")
    tied_T = np.minimum(a.per_token.gaps_ZT[layer], b.per_token.gaps_ZT[layer]) < tie
    sets = [np.sort(of.ids_ZTk[layer], axis=-1) for of in (a.per_token, b.per_token)]
    same_T = (sets[0] == sets[1]).all(axis=-1)[of_T & ~tied_T]
    return (float(same_T.mean()) if same_T.size else None), int((of_T & tied_T).sum())


def _counts(by_kind: Mapping[str, Any], kind: str) -> Any:
    return np.sum([by_kind[k] for k in KINDS if kind in (k, "all")], axis=0)


def _most_picked(counts_O: np.ndarray) -> int | None:
    return int(counts_O.argmax()) if counts_O.any() else None


def _tv(p_O: np.ndarray, q_O: np.ndarray) -> float:
    return float(np.abs(p_O - q_O).sum() / 2)


def _kl(p_O: np.ndarray, q_O: np.ndarray) -> float:
    where = p_O > 0
    with np.errstate(divide="ignore"):  # a router never gives exactly 0, but float32 can
        return float(max(0.0, (p_O[where] * np.log(p_O[where] / q_O[where])).sum()))
