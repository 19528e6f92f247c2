"""Routing statistics and the extender's choice: counts of picks [Z, O] in, chosen layers and source experts out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moextend_jax.config import Batch, LayerChoice, MoextendError, Recipe, SourceChoice
from moextend_jax.mesh import Program, on_host, one_device
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.router import Routing
from moextend_jax.parameters import with_arrays


class Counts(NamedTuple):
    """Picks of every expert in every layer, text and other tokens apart, and the numbers of those tokens; where asked
    for, how often two experts were picked by one token (`tally_pairs`). `image` stands for items of every medium, here
    and in the files that hold these counts, which are older than the other media."""

    text_ZO: Any
    image_ZO: Any
    text_tokens: Any
    image_tokens: Any
    text_pairs_ZOO: Any = None
    image_pairs_ZOO: Any = None

    @property
    def total_ZO(self) -> np.ndarray:
        return np.asarray(self.text_ZO) + np.asarray(self.image_ZO)


def spread(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers, evenly spaced: the last of each run of `layers` / `count`."""
    return [(n + 1) * layers // count - 1 for n in range(count)]


LAYERS: dict[str, Callable[[np.ndarray, int, np.random.Generator], Sequence[int]]] = {
    "extender": lambda shift_Z, count, draw: np.argsort(-shift_Z, kind="stable")[:count].tolist(),
    "random": lambda shift_Z, count, draw: draw.choice(len(shift_Z), count, replace=False).tolist(),
    "interval": lambda shift_Z, count, draw: spread(len(shift_Z), count),
    "all": lambda shift_Z, count, draw: range(len(shift_Z)),
    "first_half": lambda shift_Z, count, draw: range(len(shift_Z) // 2),
    "second_half": lambda shift_Z, count, draw: range(len(shift_Z) // 2, len(shift_Z)),
    "first_quarter": lambda shift_Z, count, draw: range(len(shift_Z) // 4),
    "first_interval": lambda shift_Z, count, draw: range(1, len(shift_Z) // 2, 2),
    "every_second": lambda shift_Z, count, draw: range(0, len(shift_Z), 2),
}
"""TABLE `select.layers` -> which of the layers that route are extended, from their shifts and the number that
`select.share` gives (the first three rows use it). The paper's ablations, and `every_second` as in MoE-LLaVA."""


class Selection(NamedTuple):
    """shift_Z: d_j of every layer that routes. layers: numbers of the chosen layers, ascending. sources: experts to
    copy, one flat list: `wide` for each of the X new experts of each chosen layer."""

    shift_Z: np.ndarray
    layers: tuple[int, ...]
    sources: tuple[int, ...]


def count_picks(
    routing: Routing, batch: Batch, *, recipe: Recipe, top_k: int | None = None, pairs: bool = False
) -> Counts:
    """Counts of one batch, traceable. The recipe `least_likely` counts the `top_k` experts with the lowest scores
    (None: as many as a token has picks). `pairs` counts pairs of picked experts, under every recipe."""
    ids_ZTk, outputs = routing.ids_Tk, routing.logits_TO.shape[-1]
    if recipe.counted_picks == "least_likely":
        ids_ZTk = least_likely(routing.chosen_by_TO, top_k=top_k or ids_ZTk.shape[-1])
    image_T = (batch.places_BL >= 0).reshape(-1)
    text_T = (batch.segments_BL > 0).reshape(-1) & ~image_T
    text_ZO, image_ZO = (tally(ids_ZTk, of_T, outputs=outputs) for of_T in (text_T, image_T))
    of_pairs = (tally_pairs(routing.ids_Tk, of_T, outputs=outputs) for of_T in (text_T, image_T)) if pairs else ()
    return Counts(text_ZO, image_ZO, text_T.sum(), image_T.sum(), *of_pairs)


def least_likely(chosen_by_ZTO: jax.Array, *, top_k: int) -> jax.Array:
    """The k experts that each token's router likes least, `[Z, T, k]`; a column that a layer lacks (-inf) is none."""
    return jax.lax.top_k(jnp.where(jnp.isneginf(chosen_by_ZTO), -jnp.inf, -chosen_by_ZTO), top_k)[1]


def tally(ids_ZTk: jax.Array, of_T: jax.Array, *, outputs: int) -> jax.Array:
    """How often each expert was picked by the tokens where `of_T` (bool) is true, `[Z, O]`."""
    picks_ZTO = jax.nn.one_hot(ids_ZTk, outputs, dtype=jnp.int32).sum(axis=-2)
    return (picks_ZTO * of_T[None, :, None]).sum(axis=1)


def tally_pairs(ids_ZTk: jax.Array, of_T: jax.Array, *, outputs: int) -> jax.Array:
    """How many of the tokens where `of_T` (bool) is true picked both of two experts, `[Z, O, O]`; on the diagonal, how
    many picked the one."""
    picked_ZTO = jax.nn.one_hot(ids_ZTk, outputs).sum(axis=-2) * of_T[None, :, None]
    return jnp.einsum("zto,ztp->zop", picked_ZTO, picked_ZTO).astype(jnp.int32)  # 0 and 1: exact on every device


def count_faulty(logits_ZTO: jax.Array, of_T: jax.Array) -> jax.Array:
    """How many of the tokens where `of_T` (bool) is true have a logit of NaN or +infinity, `[Z, O]`. -inf marks columns
    that a layer lacks and is no fault."""
    faulty_ZTO = jnp.isnan(logits_ZTO) | jnp.isposinf(logits_ZTO)
    return (faulty_ZTO & of_T[None, :, None]).sum(axis=1)


def refuse_faulty(faulty_ZO: np.ndarray, *, first: int) -> None:
    """Refuses logits that are NaN or infinite: their top-k is experts 0, 1, ..., which looks like a choice. `first` is
    the number of the first layer that routes.

    Raises:
      MoextendError: `count_faulty` counted any; names the layers.
    """
    rows = np.flatnonzero(np.any(faulty_ZO, axis=1))
    if rows.size:
        layers = (first + rows).tolist()
        raise MoextendError(
            f"router logits are NaN or infinite in layers {layers}, first in layer {layers[0]} for experts "
            f"{np.flatnonzero(faulty_ZO[rows[0]]).tolist()}: picks mean nothing there; check the "
            "weights of that layer and of those before it"
        )


def count_all(
    model: MoExtend,
    arrays: dict[str, jax.Array],
    batches: Iterable[Batch],
    *,
    recipe: Recipe,
    mesh: Mesh | None = None,
    pairs: bool = False,
) -> Counts:
    """Counts over batches, summed in 64 bits on the host.

    Args:
      model: the structure; arrays: its parameters.
      mesh: where these and the batches are; None: on one device.
      pairs: count these too.

    Raises:
      MoextendError: there is no batch, or a router gives NaN or infinity.
    """
    program, total = _counter(model, recipe, pairs, mesh or one_device()), None
    for batch in batches:
        counts, faulty_ZO = program(arrays, batch)
        refuse_faulty(on_host(faulty_ZO), first=model.config.decoder.dense_layers)
        parts = [on_host(part).astype(np.int64) for part in counts if part is not None]
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    if total is None:
        raise MoextendError("no rows to count routing on; select.held_out or evaluate.questions chooses none")
    return Counts(*total)


@functools.lru_cache(maxsize=8)
def _counter(model: MoExtend, recipe: Recipe, pairs: bool, mesh: Mesh) -> Program:
    """`(arrays, batch) -> (counts, faulty logits)`; before and after a probe it is the same program."""

    def count(arrays: dict[str, jax.Array], batch: Batch) -> tuple[Counts, jax.Array]:
        routing = with_arrays(model, arrays)(batch).routing
        real_T = (batch.segments_BL > 0).reshape(-1)
        counts = count_picks(routing, batch, recipe=recipe, top_k=model.config.decoder.top_k, pairs=pairs)
        return counts, count_faulty(routing.logits_TO, real_T)

    return Program(count, mesh=mesh)


def select(
    before: Counts,
    after: Counts,
    *,
    share: float,
    recipe: Recipe,
    new_experts: int = 1,
    wide: int = 1,
    first: int = 0,
    layers: LayerChoice = "extender",
    source: SourceChoice = "recipe",
    expert: int = 0,
    scores_ZE: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """The layers whose routing moved most, and in each the experts picked most (paper section 3.2).

    The top floor(share * Z) layers by `shift` are chosen; ties go to the lower layer, and to the lower expert. The X =
    `new_experts` new experts of a layer have different sources: the X most picked experts are their first sources, the
    next X their second ones, and so on. `first` is the number of the first layer that routes: counts have only routed
    layers, and the chosen ones are numbered among all.

    Args:
      layers: a row of LAYERS; "random" draws with `seed`.
      source: ranks by picks "before" or "after" the probe, or as the recipe says; "fixed": `expert` before all others.
      scores_ZE: scores that rank experts instead of picks (`saliency.SCORES`); None: picks do.

    Raises:
      MoextendError: no layer is chosen, there is no such expert, or a layer's shift is NaN (nothing was counted there).
    """
    with np.errstate(invalid="ignore"):
        shift_Z = shift(before.total_ZO, after.total_ZO)
    if not np.isfinite(shift_Z).all():
        without = (first + np.flatnonzero(~np.isfinite(shift_Z))).tolist()
        raise MoextendError(
            f"no layer can be chosen: the shift of layers {without} is no number, as no picks were counted there"
        )
    chosen = chosen_layers(layers, shift_Z, share=share, seed=seed)
    decided_under = source if source in ("before", "after") else recipe.source_under
    decided_ZO = shares((before if decided_under == "before" else after).total_ZO) if scores_ZE is None else scores_ZE
    check_sources(new_experts, wide, experts=decided_ZO.shape[1])
    if source == "fixed":
        check_expert(expert, experts=decided_ZO.shape[1])
        decided_ZO = np.where(np.arange(decided_ZO.shape[1]) == expert, np.inf, decided_ZO)
    by_picks = (np.argsort(-decided_ZO[z], kind="stable")[: wide * new_experts] for z in chosen)
    sources = (experts.reshape(wide, new_experts).T.reshape(-1) for experts in by_picks)
    copied = tuple(int(expert) for experts in sources for expert in experts)
    return Selection(shift_Z, tuple(first + z for z in chosen), copied)


def chosen_layers(
    layers: LayerChoice, shift_Z: np.ndarray, *, share: float, seed: int = 0, where: str = "select."
) -> list[int]:
    """The layers that a row of LAYERS chooses, ascending. Raises MoextendError if there are none; `where` is what
    stands before `share` and `layers` for whoever sets them."""
    most = int(
        round(share * len(shift_Z), 9)
    )  # rounded first: 0.58 of 50 layers are 29, and 28.999... in floating point
    chosen = sorted(LAYERS[layers](shift_Z, most, np.random.default_rng(seed)))
    if not chosen:
        by_share = layers in ("extender", "random", "interval")
        asked, mend = (f"share = {share}", "; raise it") if by_share else (f"layers = {layers}", "")
        raise MoextendError(f"{where}{asked} of {len(shift_Z)} layers chooses none{mend}")
    return chosen


def check_expert(expert: int, *, experts: int) -> None:
    """Raises MoextendError where there is no such expert to copy."""
    if expert >= experts:
        raise MoextendError(f"select.expert = {expert}: a layer has experts 0 to {experts - 1}")


def check_sources(new_experts: int, wide: int, *, experts: int) -> None:
    """Raises MoextendError where a layer has fewer experts than the different sources that are needed."""
    if new_experts * wide > experts:
        times = "" if wide == 1 else f" times select.wide = {wide}"
        raise MoextendError(
            f"select.new_experts = {new_experts}{times}: each copies another expert, and a layer has {experts}"
        )


def shares(counts_ZO: np.ndarray) -> np.ndarray:
    """r[i, j]: the share of layer j's picks that go to expert i. Layers, the first axis, may be left out."""
    return counts_ZO / counts_ZO.sum(axis=-1, keepdims=True)


def shift(before_ZO: np.ndarray, after_ZO: np.ndarray) -> np.ndarray:
    """d_j: the sample standard deviation over experts i of the difference of r[i, j] before and after the probe."""
    return np.std(shares(before_ZO) - shares(after_ZO), axis=-1, ddof=1)
