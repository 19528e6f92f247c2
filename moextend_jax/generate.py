"""Generation with a key/value cache: a batch of prompts (rows padded on the right) in, new token ids out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax.config import Batch
from moextend_jax.distributed import gathered
from moextend_jax.models.attention import KeysValues, Visible
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays


class Sampling(NamedTuple):
    """temperature 0 is greedy; otherwise tokens are drawn from the top_k most likely (0: from all)."""

    temperature: float = 0.0
    top_k: int = 0


class Cursor(NamedTuple):
    """Where generation stands: logits of the next token, the cache, and the slot the next token will take."""

    logits_BV: jax.Array
    past: KeysValues
    slot_B: jax.Array


class Generator:
    """Compiled prefill and decode steps of one model; shapes are compiled once each.

    `suppress` are token ids that are never produced (the image tags).
    """

    def __init__(self, model: MoExtend, *, eos: int, suppress: tuple[int, ...] = ()):
        self._eos, self._suppress = eos, suppress
        self._prefill = jax.jit(functools.partial(_prefill, model), static_argnames="room")
        self._decode = jax.jit(functools.partial(_decode, model), donate_argnums=2)
        self._complete = jax.jit(functools.partial(_complete, model), static_argnums=(2, 3, 4, 5))

    def complete(
        self,
        arrays: dict[str, jax.Array],
        prompts: Batch,
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        seed: int = 0,
    ) -> np.ndarray:
        """New ids `[B, max_new_tokens]`; a row that has ended is filled up with EOS."""
        cursor = self._prefill(arrays, prompts, room=max_new_tokens)
        key = jax.random.key(seed)
        return gathered(self._complete(arrays, (cursor, key), max_new_tokens, sampling, self._eos, self._suppress))

    def stream(
        self,
        arrays: dict[str, jax.Array],
        prompts: Batch,
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Ids `[B]`, one token at a time, until every row has ended (the last EOS is yielded too)."""
        cursor = self._prefill(arrays, prompts, room=max_new_tokens)
        key = jax.random.key(seed)
        ended_B = np.zeros(prompts.ids_BL.shape[0], bool)
        for count in range(max_new_tokens):
            ids_B = choose(cursor.logits_BV, jax.random.fold_in(key, count), sampling, suppress=self._suppress)
            ids_B = np.where(ended_B, self._eos, gathered(ids_B))
            ended_B |= ids_B == self._eos
            yield ids_B
            if ended_B.all():
                return
            cursor = self._decode(arrays, jnp.asarray(ids_B), cursor)


def choose(logits_BV: jax.Array, key: jax.Array, sampling: Sampling, *, suppress: tuple[int, ...]) -> jax.Array:
    """The next ids `[B]`. Greedy does not look at the other rows of the batch, nor does a row's draw."""
    if suppress:
        logits_BV = logits_BV.at[:, jnp.array(suppress)].set(-jnp.inf)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1)
    if sampling.top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / sampling.temperature, axis=-1)


def _prefill(model: MoExtend, arrays: dict[str, jax.Array], prompts: Batch, *, room: int) -> Cursor:
    whole = with_arrays(model, arrays)
    decoded = whole(prompts)
    length_B = (prompts.segments_BL > 0).sum(axis=1).astype(jnp.int32)
    last_B1D = jnp.take_along_axis(decoded.hidden_BLD, (length_B - 1)[:, None, None], axis=1)
    past = jax.tree.map(lambda kv: jnp.pad(kv, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), decoded.keys_values)
    return Cursor(whole.decoder.logits(last_B1D)[:, 0], past, length_B)


def _decode(model: MoExtend, arrays: dict[str, jax.Array], ids_B: jax.Array, cursor: Cursor) -> Cursor:
    whole = with_arrays(model, arrays)
    slot_B1 = cursor.slot_B[:, None]
    nothing = jnp.full_like(slot_B1, -1)
    x_B1D = whole.embed(Batch(ids_B[:, None], nothing, slot_B1, jnp.ones_like(slot_B1), nothing))
    slots_1S = jnp.arange(cursor.past.keys_BSKH.shape[2])[None, :]
    mask_B11S = (slots_1S <= slot_B1)[:, None, None, :]
    visible = Visible.by_mask(mask_B11S)
    decoded = whole.decode(x_B1D, positions_BL=slot_B1, visible=visible, past=cursor.past, slots_BL=slot_B1)
    return Cursor(whole.decoder.logits(decoded.hidden_BLD)[:, 0], decoded.keys_values, cursor.slot_B + 1)


def _complete(model, arrays, start, max_new_tokens: int, sampling: Sampling, eos: int, suppress: tuple[int, ...]):
    cursor, key = start
    B = cursor.slot_B.shape[0]

    def unfinished(carry):
        _, count, ended_B, _ = carry
        return (count < max_new_tokens) & ~ended_B.all()

    def one_token(carry):
        cursor, count, ended_B, ids_BL = carry
        ids_B = choose(cursor.logits_BV, jax.random.fold_in(key, count), sampling, suppress=suppress)
        ids_B = jnp.where(ended_B, eos, ids_B).astype(jnp.int32)
        ids_BL = ids_BL.at[:, count].set(ids_B)
        return _decode(model, arrays, ids_B, cursor), count + 1, ended_B | (ids_B == eos), ids_BL

    ids_BL = jnp.full((B, max_new_tokens), eos, jnp.int32)
    return jax.lax.while_loop(unfinished, one_token, (cursor, jnp.int32(0), jnp.zeros(B, bool), ids_BL))[3]
