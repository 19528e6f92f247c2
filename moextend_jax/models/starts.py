"""How new experts stand among those of a layer, so that they can start without changing what it computes.

In: the columns that tokens of a layer choose among so far, and the router logits of an extension's own. Out: the
columns with these among them, and what its calibrator sees and corrects. TABLE of starts, classes of one signature:

    copy     the paper's: a copy of its source that competes for the k picks. A token whose source is among its first
             k-1 picks takes both, and loses its k-th
    lowered  the same, its logits lower by `offset`, a leaf that starts at -lowered_by and learns
    twin     source and copy exclude each other: of the two the one with the larger logit stands in the source's column.
             No token's function changes, no token has more rows, and everything learns from the first step on
    added    stands beside the k picks: where its logit reaches the k-th of these, p f is added to what they sum to. It
             starts with a down projection of zeros, so bit for bit as before

Whatever is there already is exactly what a later extension starts from: twins look at the columns as earlier ones have
left them, and nothing of an added expert enters the others' probabilities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TIE = 1e-4
"""A twin takes its source's place down to so much less: in float32 two products round the same sum in two ways."""


class Columns(NamedTuple):
    """What competes for the k picks of tokens: logits_To, the pretrained E first, and the expert in each column, [o] as
    they are numbered (NumPy), or [T, o] where twins take places."""

    logits_To: jax.Array
    experts_To: np.ndarray | jax.Array

    def experts(self, picked_Tk: jax.Array) -> jax.Array:
        """The experts in the columns that were picked."""
        if not isinstance(self.experts_To, np.ndarray):
            return jnp.take_along_axis(self.experts_To, picked_Tk, axis=-1)
        as_numbered = (self.experts_To == np.arange(len(self.experts_To))).all()
        return picked_Tk if as_numbered else jnp.asarray(self.experts_To)[picked_Tk]

    def held(self, values_To: jax.Array, experts: int) -> jax.Array:
        """Values of the pretrained experts, -inf where a twin holds one's column."""
        values_TE = values_To[:, :experts]
        if isinstance(self.experts_To, np.ndarray):
            return values_TE
        return jnp.where(self.experts_To[:, :experts] == np.arange(experts), values_TE, -jnp.inf)


class Competing:
    """An extension's experts in columns of their own.

    Args:
      own_TX: their logits, -inf where a token may not choose them.
      sources_X: the pretrained expert that each was copied from; only twins ask.
      first: number of the first of them among all experts. experts: E.
      columns: those before it; afterwards `columns` are those with its own among them.
    """

    competes, stands_beside = True, False

    def __init__(self, own_TX: jax.Array, sources_X: Any, *, first: int, experts: int, columns: Columns):
        self.own_TX, self.sources_X, self.experts = own_TX, sources_X, experts
        self.numbers_X = np.arange(first, first + own_TX.shape[-1])
        self.at = columns.logits_To.shape[-1]
        self.after = self.at + self.competes * own_TX.shape[-1]
        self.columns = self.joined(columns)

    def joined(self, columns: Columns) -> Columns:
        logits_To, experts_To = columns
        if isinstance(experts_To, np.ndarray):
            experts_To = np.concatenate([experts_To, self.numbers_X])
        else:
            experts_To = jnp.concatenate([experts_To, jnp.broadcast_to(self.numbers_X, self.own_TX.shape)], axis=-1)
        return Columns(jnp.concatenate([logits_To, self.own_TX], axis=-1), experts_To)

    def own(self, values_To: jax.Array, columns: Columns) -> jax.Array:
        """Values of its experts [T, X], -inf where a token cannot choose one. Here and below `columns` are all."""
        return values_To[:, self.at : self.after]

    def alone(self, columns: Columns) -> jax.Array:
        """Logits [T, O] of the pretrained experts and its own, as if there were no others."""
        return jnp.concatenate([columns.logits_To[:, : self.experts], self.own_TX], axis=-1)

    def left(self, probs_To: jax.Array) -> jax.Array:
        """The probability that columns of other extensions leave, [T, 1]."""
        before_To, behind_To = probs_To[:, self.experts : self.at], probs_To[:, self.after :]
        return 1.0 - before_To.sum(-1, keepdims=True) - behind_To.sum(-1, keepdims=True)

    def spread(self, correction_TO: jax.Array, columns: Columns) -> jax.Array:
        """A correction of the experts of `alone` as one of all columns, [T, o]."""
        old_TE, own_TX = correction_TO[:, : self.experts], correction_TO[:, self.experts :]
        own_TX = own_TX[:, : self.after - self.at]
        before, behind = self.at - self.experts, columns.logits_To.shape[-1] - self.after
        before_T, behind_T = (jnp.zeros((len(old_TE), n)) for n in (before, behind))
        return jnp.concatenate([old_TE, before_T, own_TX, behind_T], axis=-1)


class Twin(Competing):
    """Experts that take the columns of their sources, where their logits are no smaller."""

    competes = False

    def joined(self, columns: Columns) -> Columns:
        logits_To, experts_To = columns
        experts_To = jnp.broadcast_to(jnp.asarray(experts_To), logits_To.shape)
        for x, number in enumerate(self.numbers_X):
            source, own_T1 = self.sources_X[x], self.own_TX[:, x : x + 1]
            wins_T1 = own_T1 >= jax.lax.dynamic_index_in_dim(logits_To, source, axis=1) - TIE
            takes_To = (jnp.arange(logits_To.shape[-1]) == source) & wins_T1
            logits_To = jnp.where(takes_To, own_T1, logits_To)
            experts_To = jnp.where(takes_To, number, experts_To)
        return Columns(logits_To, experts_To)

    def own(self, values_To: jax.Array, columns: Columns) -> jax.Array:
        holders_TX, values_TX = (
            jnp.take(of_To, jnp.asarray(self.sources_X), axis=1) for of_To in (columns.experts_To, values_To)
        )
        return jnp.where(holders_TX == self.numbers_X, values_TX, -jnp.inf)

    def alone(self, columns: Columns) -> jax.Array:
        holders_TE = jnp.asarray(columns.experts_To)[:, : self.experts]
        mine_TE = (holders_TE >= self.numbers_X[0]) & (holders_TE <= self.numbers_X[-1])
        others_TE = jnp.where(mine_TE, -jnp.inf, columns.logits_To[:, : self.experts])
        return jnp.concatenate([others_TE, self.own(columns.logits_To, columns)], axis=-1)

    def spread(self, correction_TO: jax.Array, columns: Columns) -> jax.Array:
        spread_To, experts_To = super().spread(correction_TO, columns), jnp.asarray(columns.experts_To)
        for x, number in enumerate(self.numbers_X):
            spread_To = jnp.where(experts_To == number, correction_TO[:, self.experts + x, None], spread_To)
        return spread_To


class Added(Competing):
    """Experts that compete with nobody, and stand beside the picks that their ranks reach (`router.route_extended`)."""

    competes, stands_beside = False, True

    def joined(self, columns: Columns) -> Columns:
        return columns


STARTS: dict[str, type[Competing]] = {"copy": Competing, "lowered": Competing, "twin": Twin, "added": Added}
"""TABLE `ExtensionConfig.start` -> how new experts stand among the others."""
