"""Routing statistics and the extender's choice: counts of picks [Z, O] in, chosen layers and source experts out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moextend_jax.config import Batch, MoextendError, Recipe
from moextend_jax.mesh import Program, on_host, one_device
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays


class Counts(NamedTuple):
    """Picks of every expert in every layer, text and image tokens apart, and the numbers of those tokens."""

    text_ZO: Any
    image_ZO: Any
    text_tokens: Any
    image_tokens: Any

    @property
    def total_ZO(self) -> np.ndarray:
        return np.asarray(self.text_ZO) + np.asarray(self.image_ZO)


class Selection(NamedTuple):
    """shift_Z: d_j of every layer. layers: chosen, ascending. sources: expert to copy in each chosen layer."""

    shift_Z: np.ndarray
    layers: tuple[int, ...]
    sources: tuple[int, ...]


def count_picks(model: MoExtend, batch: Batch, *, recipe: Recipe) -> Counts:
    """Counts of one batch, traceable. `least_likely` counts the k experts that the router likes least."""
    routing = model(batch).routing
    ids_ZTk, outputs = routing.ids_Tk, routing.logits_TO.shape[-1]
    if recipe.counted_picks == "least_likely":
        ids_ZTk = least_likely(routing.logits_TO, top_k=ids_ZTk.shape[-1])
    image_T = (batch.patches_BL >= 0).reshape(-1)
    text_T = (batch.segments_BL > 0).reshape(-1) & ~image_T
    text_ZO, image_ZO = (tally(ids_ZTk, of_T, outputs=outputs) for of_T in (text_T, image_T))
    return Counts(text_ZO, image_ZO, text_T.sum(), image_T.sum())


def least_likely(logits_ZTO: jax.Array, *, top_k: int) -> jax.Array:
    """The k experts that each token's router likes least, `[Z, T, k]`; a column that a layer lacks (-inf) is none."""
    return jax.lax.top_k(jnp.where(jnp.isneginf(logits_ZTO), -jnp.inf, -logits_ZTO), top_k)[1]


def tally(ids_ZTk: jax.Array, of_T: jax.Array, *, outputs: int) -> jax.Array:
    """How often the tokens `of_T` (bool) picked each expert, `[Z, O]`."""
    picks_ZTO = jax.nn.one_hot(ids_ZTk, outputs, dtype=jnp.int32).sum(axis=-2)
    return (picks_ZTO * of_T[None, :, None]).sum(axis=1)


def count_all(
    model: MoExtend,
    arrays: dict[str, jax.Array],
    batches: Iterable[Batch],
    *,
    recipe: Recipe,
    mesh: Mesh | None = None,
) -> Counts:
    """Counts over batches, summed in 64 bits on the host. `model` gives the structure, `arrays` the parameters, `mesh`
    says where they and the batches are (None: on one device)."""
    counted = Program(
        lambda arrays, batch: count_picks(with_arrays(model, arrays), batch, recipe=recipe), mesh=mesh or one_device()
    )
    total = None
    for batch in batches:
        counts = [on_host(part).astype(np.int64) for part in counted(arrays, batch)]
        total = counts if total is None else [a + b for a, b in zip(total, counts, strict=True)]
    if total is None:
        raise MoextendError("no batch to count routing on: the held-out data set is empty")
    return Counts(*total)


def select(before: Counts, after: Counts, *, share: float, recipe: Recipe) -> Selection:
    """The layers whose routing moved most (paper section 3.2).

    The top floor(share * Z) layers by `shift` are chosen; ties go to the lower layer.
    """
    shift_Z = shift(before.total_ZO, after.total_ZO)
    count = int(share * len(shift_Z))
    if count < 1:
        raise MoextendError(f"select.share = {share} of {len(shift_Z)} layers chooses none; raise it")
    layers = tuple(sorted(int(z) for z in np.argsort(-shift_Z, kind="stable")[:count]))
    decided_ZO = shares((before if recipe.source_under == "before" else after).total_ZO)
    return Selection(shift_Z, layers, tuple(int(decided_ZO[z].argmax()) for z in layers))


def shares(counts_ZO: np.ndarray) -> np.ndarray:
    """r[i, j]: the share of layer j's picks that go to expert i. Layers, the first axis, may be left out."""
    return counts_ZO / counts_ZO.sum(axis=-1, keepdims=True)


def shift(before_ZO: np.ndarray, after_ZO: np.ndarray) -> np.ndarray:
    """d_j: the sample standard deviation over experts i of the difference of r[i, j] before and after the probe."""
    return np.std(shares(before_ZO) - shares(after_ZO), axis=-1, ddof=1)
