"""How new experts stand among those of a layer, so that they can start without changing what it computes.

In: the columns that tokens of a layer choose among so far, and the router logits of an extension's own. Out: the
columns with these among them, and what its calibrator sees and corrects. TABLE of starts, classes of one signature:

    copy     the paper's: a copy of its source that competes for the k picks. A token whose source is among its first
             k-1 picks takes both, and loses its k-th
    lowered  the same, its logits lower by `offset`, a leaf that starts at -lowered_by and learns
    twin     source and copy exclude each other: of the two the one with the larger logit stands in the source's column.
             No token's function changes, no token has more rows, and everything learns from the first step on
    added    is used besides the k picks: where its logit reaches the k-th pick's, p f is added to the picks' sum. Its
             down projection starts at zero, so outputs are as before, bit for bit

Whatever is there already is exactly what a later extension starts from: twins look at the columns as earlier ones have
left them, and nothing of an added expert enters the others' probabilities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TIE = 1e-4
"""A copy's logit may be this much lower and still count as equal to its source's: two float32 products round the same
sum differently."""


class Columns(NamedTuple):
    """What competes for the k picks of tokens: the pretrained experts' columns, then those of extensions.

    base_TE: logits of the pretrained columns. holders_TE: the expert in each of these, [E] of NumPy, or [T, E] where
    twins take places. behind: logits [T, X] of each extension's columns. numbers: those of their experts.
    """

    base_TE: jax.Array
    holders_TE: np.ndarray | jax.Array
    behind: tuple[jax.Array, ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """How many there are, o."""
        return self.base_TE.shape[-1] + len(self.numbers)

    def logits(self) -> jax.Array:
        """[T, o]."""
        return jnp.concatenate([self.base_TE, *self.behind], axis=-1)

    def experts(self, picked_Tk: jax.Array) -> jax.Array:
        """The experts in the columns that were picked."""
        behind_o = np.array(self.numbers, np.int32)
        if isinstance(self.holders_TE, np.ndarray):
            experts_o = np.concatenate([self.holders_TE, behind_o])
            as_numbered = (experts_o == np.arange(self.width)).all()
            return picked_Tk if as_numbered else jnp.asarray(experts_o)[picked_Tk]
        behind_To = jnp.broadcast_to(behind_o, (len(self.base_TE), len(behind_o)))
        return jnp.take_along_axis(jnp.concatenate([self.holders_TE, behind_To], axis=-1), picked_Tk, axis=-1)

    def held(self, values_To: jax.Array) -> jax.Array:
        """Values of the pretrained experts, -inf where a twin holds one's column."""
        values_TE = values_To[:, : self.base_TE.shape[-1]]
        if isinstance(self.holders_TE, np.ndarray):
            return values_TE
        return jnp.where(self.holders_TE == np.arange(values_TE.shape[-1])[None], values_TE, -jnp.inf)


class Competing:
    """An extension's experts in columns of their own.

    Args:
      own_TX: their logits, -inf where a token may not choose them.
      sources_X: the pretrained expert that each was copied from; only twins ask.
      first: number of the first of them among all experts.
      columns: those before it. The attribute `columns` has its own among them too.
    """

    competes, stands_beside = True, False

    def __init__(self, own_TX: jax.Array, sources_X: Any, *, first: int, columns: Columns):
        self.own_TX, self.sources_X, self.experts = own_TX, sources_X, columns.base_TE.shape[-1]
        self.numbers_X = np.arange(first, first + own_TX.shape[-1], dtype=np.int32)
        self.at, self.columns = columns.width, self.joined(columns)
        self.after = self.columns.width

    def joined(self, columns: Columns) -> Columns:
        behind = (*columns.behind, self.own_TX)
        return columns._replace(behind=behind, numbers=(*columns.numbers, *self.numbers_X.tolist()))

    def own(self, values_To: jax.Array, columns: Columns) -> jax.Array:
        """Values of its experts [T, X], -inf where a token cannot choose one. Here and below `columns` are those of all
        extensions."""
        return values_To[:, self.at : self.after]

    def alone(self, columns: Columns) -> jax.Array:
        """Logits [T, O] of the pretrained experts and its own, as if there were no others."""
        return jnp.concatenate([columns.base_TE, self.own_TX], axis=-1)

    def left(self, probs_To: jax.Array) -> jax.Array:
        """The probability that columns of other extensions leave, [T, 1]."""
        before_To, behind_To = probs_To[:, self.experts : self.at], probs_To[:, self.after :]
        return 1.0 - before_To.sum(-1, keepdims=True) - behind_To.sum(-1, keepdims=True)

    def spread(self, correction_TO: jax.Array, columns: Columns) -> jax.Array:
        """A correction of the experts in `alone`, spread to all columns, [T, o]."""
        old_TE, own_TX = correction_TO[:, : self.experts], correction_TO[:, self.experts :]
        own_TX = own_TX[:, : self.after - self.at]
        before_T, behind_T = (jnp.zeros((len(old_TE), n)) for n in (self.at - self.experts, columns.width - self.after))
        return jnp.concatenate([old_TE, before_T, own_TX, behind_T], axis=-1)


class Twin(Competing):
    """Experts that take the columns of their sources, where their logits are no smaller."""

    competes = False

    def joined(self, columns: Columns) -> Columns:
        base_TE, holders_TE = columns.base_TE, columns.holders_TE
        holders_TE = jnp.broadcast_to(jnp.asarray(holders_TE), base_TE.shape)
        for x, number in enumerate(self.numbers_X):
            source, own_T1 = self.sources_X[x], self.own_TX[:, x : x + 1]
            wins_T1 = own_T1 >= jax.lax.dynamic_index_in_dim(base_TE, source, axis=1) - TIE
            takes_TE = (jnp.arange(self.experts)[None] == source) & wins_T1
            base_TE, holders_TE = jnp.where(takes_TE, own_T1, base_TE), jnp.where(takes_TE, number, holders_TE)
        return columns._replace(base_TE=base_TE, holders_TE=holders_TE)

    def own(self, values_To: jax.Array, columns: Columns) -> jax.Array:
        holders_TX, values_TX = (
            jnp.take(of_TE, jnp.asarray(self.sources_X), axis=1) for of_TE in (columns.holders_TE, values_To)
        )
        return jnp.where(holders_TX == self.numbers_X[None], values_TX, -jnp.inf)

    def alone(self, columns: Columns) -> jax.Array:
        mine_TE = (columns.holders_TE >= self.numbers_X[0]) & (columns.holders_TE <= self.numbers_X[-1])
        others_TE = jnp.where(mine_TE, -jnp.inf, columns.base_TE)
        return jnp.concatenate([others_TE, self.own(columns.base_TE, columns)], axis=-1)

    def spread(self, correction_TO: jax.Array, columns: Columns) -> jax.Array:
        corrected_TE, own_TX = correction_TO[:, : self.experts], correction_TO[:, self.experts :]
        for x, number in enumerate(self.numbers_X):
            corrected_TE = jnp.where(columns.holders_TE == number, own_TX[:, x : x + 1], corrected_TE)
        return jnp.concatenate([corrected_TE, jnp.zeros((len(own_TX), len(columns.numbers)))], axis=-1)


class Added(Competing):
    """Experts that do not compete. A token uses them besides its picks if their scores reach those of the picks."""

    competes, stands_beside = False, True

    def joined(self, columns: Columns) -> Columns:
        return columns


STARTS: dict[str, type[Competing]] = {"copy": Competing, "lowered": Competing, "twin": Twin, "added": Added}
"""TABLE `ExtensionConfig.start` -> how new experts stand among the others."""
