"""Generation and scoring with a key/value cache: prompts (rows padded on the right) in, new ids or log-likelihoods out.

A prompt may come in two pieces. Its head (everything up to its last image, or the context of several continuations) is
read once for all rows that share it; its tail is read row by row on top of the head's keys and values.

A row's output depends only on the row and on the shapes of the batch: experts, attention and softmax compute a row the
same way wherever it stands. This needs a multiple of `ALIGNED_ROWS` rows on each device, since otherwise CPU products
add up their last rows in another order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moextend_jax.config import IGNORE, Batch, MoextendError
from moextend_jax.mesh import Program, on_host, one_device
from moextend_jax.models.attention import KeysValues, Visible, segment_mask
from moextend_jax.models.moextend import MoExtend, Shares, abstract, shares_of_text
from moextend_jax.parameters import with_arrays
from moextend_jax.sharding import Shards, map_shards, platform, shards, spec

ALIGNED_ROWS = 8
"""The rows of a batch on each device should be a multiple of this."""
SCORED = 8
"""Positions whose logits exist at a time when a text is scored: all at once would be rows x length x vocabulary."""

Arrays = dict[str, jax.Array]


class Sampling(NamedTuple):
    """temperature 0 is greedy; otherwise tokens are drawn from the top_k most likely (0: from all)."""

    temperature: float = 0.0
    top_k: int = 0


class Heads(NamedTuple):
    """The cache of what rows have read before their tails.

    past: keys and values `[Z, B, K, S, H]`. length_B: how many of the S positions a row uses.
    shares: which extensions the text behind each head may choose, `[B]` (`models.moextend.shares_of_text`).
    """

    past: KeysValues
    length_B: jax.Array
    shares: Shares


class State(NamedTuple):
    """Where generation stands, between two tokens.

    newest_B: the newest id of each row, EOS after a row's end (ended_B); its keys are not in the cache yet.
    position_B: the position of that id.
    seen_BS: which slots of the cache a row attends to.
    shares: which extensions a row's text may choose, `[B]` by name.
    past: the cache, keys and values `[Z, B, K, S, H]`.
    slot: where in the cache the newest ids go, one for all rows.
    count: ids of a row so far, by which `key` is folded for the next draw.
    temperature: of the draws; programs are compiled for all.
    """

    newest_B: jax.Array
    ended_B: jax.Array
    position_B: jax.Array
    seen_BS: jax.Array
    shares: Shares
    past: KeysValues
    slot: jax.Array
    count: jax.Array
    key: jax.Array
    temperature: jax.Array


class Generator:
    """Compiled steps of one model. Each is compiled once for each shape it is used with; `programs` counts them.

    Args:
      mesh: where its arrays and prompts are (`mesh.place_rows`); None: on one device.
      eos: what rows that have ended are filled with; it ends a row itself.
      ends: more ids that end a row.
      suppress: token ids that are never produced (the image tags).
    """

    def __init__(
        self, model: MoExtend, *, eos: int, ends: tuple[int, ...] = (), suppress: tuple[int, ...] = (),
        mesh: Mesh | None = None,
    ):  # fmt: skip
        self.model = model = abstract(dataclasses.replace(model.config, frozen_experts="all"))
        self.mesh = mesh or one_device()
        self._ends = ends = tuple(dict.fromkeys((eos, *ends)))
        self.programs: Counter[str] = Counter()
        self._read = self._compiled(functools.partial(_read, model), donate_argnames="past")
        self._prefill = self._compiled(
            functools.partial(_prefill, model, ends=ends, suppress=suppress), static_argnames=("room", "top_k")
        )
        self._advance = self._compiled(
            functools.partial(_advance, model, ends=ends, suppress=suppress),
            static_argnames=("steps", "top_k"),
            donate_argnames="state",
        )
        self._score = self._compiled(functools.partial(_score, model))

    def _compiled(self, step: functools.partial, **options: Any) -> Callable[..., Any]:
        name = step.func.__name__.lstrip("_")

        def counted(*arguments: Any, **named: Any) -> Any:
            self.programs[name] += 1  # runs when JAX traces, not when it calls
            return step(*arguments, **named)

        return Program(counted, mesh=self.mesh, **options)

    # --- heads --------------------------------------------------------------------------------------------------------

    def no_heads(self, *, rows: int, length: int) -> KeysValues:
        """Zero keys and values `[Z, B, K, S, H]` for the heads of B = `rows` rows of S = `length` tokens, for `read` to
        fill."""
        sizes = self.model.config.decoder
        shape = (self.model.config.cached_layers, rows, sizes.kv_heads, length, sizes.head_size)
        sharding = NamedSharding(self.mesh, spec("ZBKSH", shape, self.mesh))
        return _zeros(shape, self.model.config.dtype, sharding)

    def read(self, arrays: Arrays, heads: Batch, past: KeysValues, rows_B: jax.Array) -> KeysValues:
        """Reads some heads, and puts them into the rows that share them.

        Args:
          heads: a batch of heads with their images; it may have fewer rows than `past`.
          rows_B: for each row of `past`, which row of `heads` it takes, counted on the row's own device; -1: none.
        """
        return self._read(arrays, heads, past=past, rows_B=rows_B)

    # --- tails --------------------------------------------------------------------------------------------------------

    def begin(
        self,
        arrays: Arrays,
        prompts: Batch,
        *,
        heads: Heads | None = None,
        max_new_tokens: int,
        steps: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        seed: int = 0,
    ) -> Iterator[jax.Array]:
        """New ids in pieces `[B, n]` on the devices: the first ids alone, then up to `steps` at a time. A row that has
        ended is filled up with EOS, as is one without tokens.

        Nothing here waits for the devices, so pieces come until there are `max_new_tokens`. To stop when all rows have
        ended, the caller must look at the ids.

        Args:
          prompts: whole prompts, or tails whose positions go on where their heads end.
        """
        if max_new_tokens < 1:
            raise MoextendError(f"max_new_tokens = {max_new_tokens} must be at least 1")
        top_k, temperature = sampling.top_k if sampling.temperature else 1, np.float32(sampling.temperature)
        state = self._prefill(
            arrays, prompts, heads, jax.random.key(seed), temperature, room=max_new_tokens - 1, top_k=top_k
        )
        yield state.newest_B[:, None]
        left = max_new_tokens - 1
        while left > 0:
            state, ids_BL = self._advance(arrays, state=state, steps=min(steps, left), top_k=top_k)
            yield ids_BL
            left -= steps

    def stream(
        self,
        arrays: Arrays,
        prompts: Batch,
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Ids `[B]`, one token at a time, until every row has ended (the last end is yielded too)."""
        ended_B = np.zeros(prompts.ids_BL.shape[0], bool)
        for ids_B1 in self.begin(
            arrays, prompts, max_new_tokens=max_new_tokens, steps=1, sampling=sampling, seed=seed
        ):  # fmt: skip
            ids_B = on_host(ids_B1)[:, 0]
            yield ids_B
            ended_B |= np.isin(ids_B, self._ends)
            if ended_B.all():
                return

    def score(self, arrays: Arrays, prompts: Batch, *, heads: Heads | None = None) -> tuple[jax.Array, jax.Array]:
        """Two arrays `[B, L]` on the devices: each label's log-likelihood (nats, float32, 0 where no label is), and
        whether it is the likeliest id. A label says what comes after its position (nothing is shifted here)."""
        return self._score(arrays, prompts, heads)


def choose(
    logits_BV: jax.Array, key: jax.Array, temperature: Any, *, top_k: int, suppress: tuple[int, ...]
) -> jax.Array:
    """The next ids `[B]`, drawn at `temperature` from the `top_k` likeliest (0: from all); 1 is greedy at any
    temperature. A row's id does not depend on the other rows' logits."""
    if top_k == 1:
        return likeliest(logits_BV, suppress=suppress)
    if suppress:
        logits_BV = logits_BV.at[:, jnp.array(suppress)].set(-jnp.inf)
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1)


def likeliest(logits_BV: jax.Array, *, suppress: tuple[int, ...] = ()) -> jax.Array:
    """The id of each row's largest logit, `[B]`, ids in `suppress` excluded; the lowest id where several are equal."""
    never_V = np.zeros(logits_BV.shape[1], bool)
    never_V[list(suppress)] = True
    if platform() == "cpu":
        return _likeliest_by_blocks(logits_BV, never_V)
    return jnp.argmax(jnp.where(never_V[None, :], -jnp.inf, logits_BV), axis=-1)


def _likeliest_by_blocks(logits_BV: jax.Array, never_V: np.ndarray, *, block: int = 128) -> jax.Array:
    """As `likeliest`: the best block of `block` ids by its maximum, then the best id in it. So logits are read once and
    not written; XLA's argmax on CPU takes ten times as long."""
    rest = -len(never_V) % block
    never_Gb = np.pad(never_V, (0, rest)).reshape(-1, block)
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    logits_BGb = logits_BV.reshape(-1, *never_Gb.shape)
    largest_BG = logits_BGb.max(axis=-1)
    for g in np.flatnonzero(never_Gb.any(axis=1)):
        largest_BG = largest_BG.at[:, g].set(jnp.where(never_Gb[g][None], -jnp.inf, logits_BGb[:, g]).max(axis=-1))
    best_B = jnp.argmax(largest_BG, axis=-1)
    block_Bb = jnp.take_along_axis(logits_BGb, best_B[:, None, None], axis=1)[:, 0]
    block_Bb = jnp.where(jnp.asarray(never_Gb)[best_B], -jnp.inf, block_Bb)
    return best_B * block + jnp.argmax(block_Bb, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> KeysValues:
    zeros = jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
    return KeysValues(zeros, zeros)


def _read(model: MoExtend, arrays: Arrays, heads: Batch, *, past: KeysValues, rows_B: jax.Array) -> KeysValues:
    new = with_arrays(model, arrays)(heads, skip_padding=True).keys_values

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        def local(old_ZBKSH, new_ZBKSH, rows_B):
            taken_ZBKSH = jnp.take(new_ZBKSH, jnp.maximum(rows_B, 0), axis=1)
            return jnp.where((rows_B >= 0)[None, :, None, None, None], taken_ZBKSH, old_ZBKSH)

        split = shards("ZBKSH", old.shape)
        ins = (split, Shards("ZBKSH", split.split), Shards("B", (split.over("B"),)))
        return map_shards(local, ins, split)(old, new.astype(old.dtype), rows_B)

    return KeysValues(*(put(cached, heads_only) for cached, heads_only in zip(past, new, strict=True)))


class _Prefilled(NamedTuple):
    """Hidden states of all positions of some prompts, and the cache after them.

    past: keys and values `[Z, B, K, S, H]` of heads, then of the prompts, then zeros for new tokens.
    seen_BS: which of these S a row attends to.
    shares: which extensions a row's further text may choose, `[B]` by name.
    """

    hidden_BLD: jax.Array
    past: KeysValues
    seen_BS: jax.Array
    shares: Shares


def _prefilled(loaded: MoExtend, prompts: Batch, heads: Heads | None, *, room: int) -> _Prefilled:
    """All positions of the prompts, or of tails on top of their heads."""
    real_BL = prompts.segments_BL > 0
    B, L = real_BL.shape
    if heads is None:
        decoded, past, seen_BS = loaded(prompts, skip_padding=True), [], real_BL
        shares = shares_of_text(prompts, loaded.config)
    else:
        head_BS = jnp.arange(heads.past.keys_BKSH.shape[3])[None, :] < heads.length_B[:, None]
        head_B1LS = jnp.broadcast_to(head_BS[:, None, None, :], (B, 1, L, head_BS.shape[1]))
        mask_B1LS = jnp.concatenate([head_B1LS, segment_mask(prompts.segments_BL)], axis=-1)
        past, seen_BS, shares = [heads.past], jnp.concatenate([head_BS, real_BL], axis=1), heads.shares
        decoded = loaded.decode(
            loaded.embed(prompts),
            positions_BL=prompts.positions_BL,
            visible=Visible(mask_B1LS=mask_B1LS),
            past=heads.past,
            real_BL=real_BL,
            shares=_over_tokens(shares, L),
        )
    empty = jax.tree.map(
        lambda kv: jnp.zeros((*kv.shape[:3], room, kv.shape[4]), kv.dtype), decoded.keys_values
    )  # fmt: skip
    past = jax.tree.map(lambda *pieces: jnp.concatenate(pieces, axis=3), *past, decoded.keys_values, empty)
    return _Prefilled(decoded.hidden_BLD, past, jnp.pad(seen_BS, ((0, 0), (0, room))), shares)


def _over_tokens(shares: Shares, length: int) -> Shares:
    """`[B] -> [B, L]`."""
    return jax.tree.map(lambda share_B: jnp.broadcast_to(share_B[:, None], (len(share_B), length)), shares)


def _prefill(
    model: MoExtend, arrays: Arrays, prompts: Batch, heads: Heads | None, key: jax.Array, temperature: Any, *,
    room: int, top_k: int, ends: tuple[int, ...], suppress: tuple[int, ...],
) -> State:  # fmt: skip
    loaded = with_arrays(model, arrays)
    hidden_BLD, past, seen_BS, shares = _prefilled(loaded, prompts, heads, room=room)
    length_B = (prompts.segments_BL > 0).sum(axis=1).astype(jnp.int32)
    last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
    last_B1D = jnp.take_along_axis(hidden_BLD, last_B1[..., None], axis=1)
    position_B = jnp.take_along_axis(prompts.positions_BL, last_B1, axis=1)[:, 0] + 1
    logits_BV = loaded.decoder.logits(last_B1D)[:, 0]
    first_key = jax.random.fold_in(key, 0)
    newest_B = choose(logits_BV, first_key, temperature, top_k=top_k, suppress=suppress)
    newest_B = jnp.where(length_B > 0, newest_B, ends[0]).astype(jnp.int32)
    slot = jnp.int32(seen_BS.shape[1] - room)
    return State(
        newest_B, _is_end(newest_B, ends), position_B, seen_BS, shares, past, slot, jnp.int32(1), key,
        jnp.float32(temperature),
    )  # fmt: skip


def _advance(
    model: MoExtend, arrays: Arrays, *, state: State, steps: int, top_k: int, ends: tuple[int, ...],
    suppress: tuple[int, ...],
) -> tuple[State, jax.Array]:  # fmt: skip
    """Up to `steps` more tokens, fewer when all rows have ended. A token costs one pass; the last one costs none."""
    loaded = with_arrays(model, arrays)

    def unfinished(carry):
        state, count, _ = carry
        return (count < steps) & ~state.ended_B.all()

    def one_token(carry):
        state, count, ids_BL = carry
        logits_BV, past, seen_BS = _decode(loaded, state)
        key = jax.random.fold_in(state.key, state.count)
        newest_B = choose(logits_BV, key, state.temperature, top_k=top_k, suppress=suppress)
        newest_B = jnp.where(state.ended_B, ends[0], newest_B).astype(jnp.int32)
        state = State(
            newest_B, state.ended_B | _is_end(newest_B, ends), state.position_B + 1, seen_BS, state.shares, past,
            state.slot + 1, state.count + 1, state.key, state.temperature,
        )  # fmt: skip
        return state, count + 1, ids_BL.at[:, count].set(newest_B)

    ids_BL = jnp.full((state.newest_B.shape[0], steps), ends[0], jnp.int32)
    state, _, ids_BL = jax.lax.while_loop(unfinished, one_token, (state, jnp.int32(0), ids_BL))
    return state, ids_BL


def _is_end(ids_B: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, [ids_B == end for end in ends])


def _decode(loaded: MoExtend, state: State) -> tuple[jax.Array, KeysValues, jax.Array]:
    """Logits `[B, V]` after the newest ids, the cache with their keys and values in its slot, and the slots that rows
    then see `[B, S]`. Rows that have ended cost no expert."""
    position_B1, real_B1 = state.position_B[:, None], ~state.ended_B[:, None]
    nothing_B1 = jnp.full_like(position_B1, IGNORE)
    token = Batch(
        state.newest_B[:, None], nothing_B1, position_B1, real_B1.astype(jnp.int32), jnp.full_like(position_B1, -1)
    )
    mask_BS = jnp.concatenate([state.seen_BS, jnp.ones_like(real_B1)], axis=1)
    decoded = loaded.decode(
        loaded.embed(token),
        positions_BL=position_B1,
        visible=Visible(mask_B1LS=mask_BS[:, None, None, :]),
        past=state.past,
        real_BL=real_B1,
        shares=_over_tokens(state.shares, 1),
    )
    past = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, state.slot, axis=3),
        state.past,
        decoded.keys_values,
    )
    return loaded.decoder.logits(decoded.hidden_BLD)[:, 0], past, state.seen_BS.at[:, state.slot].set(True)


def _score(model: MoExtend, arrays: Arrays, prompts: Batch, heads: Heads | None) -> tuple[jax.Array, jax.Array]:
    loaded = with_arrays(model, arrays)
    hidden_BLD = _prefilled(loaded, prompts, heads, room=0).hidden_BLD
    B, L, _ = hidden_BLD.shape
    short = -L % SCORED
    hidden_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, short), (0, 0)))
    labels_BL = jnp.pad(prompts.labels_BL, ((0, 0), (0, short)), constant_values=IGNORE)

    def piece(start):
        part_BlD = jax.lax.dynamic_slice_in_dim(hidden_BLD, start, SCORED, axis=1)
        label_Bl = jax.lax.dynamic_slice_in_dim(labels_BL, start, SCORED, axis=1)
        logits_BlV = loaded.decoder.logits(part_BlD)
        logit_Bl = jnp.take_along_axis(logits_BlV, jnp.maximum(label_Bl, 0)[..., None], axis=-1)[..., 0]
        nats_Bl = jnp.where(label_Bl == IGNORE, 0.0, logit_Bl - jax.nn.logsumexp(logits_BlV, axis=-1))
        return nats_Bl, jnp.argmax(logits_BlV, axis=-1) == label_Bl

    nats_nBl, likeliest_nBl = jax.lax.map(piece, jnp.arange(0, L + short, SCORED))
    return _joined(nats_nBl, B, L), _joined(likeliest_nBl, B, L)


def _joined(parts_nBl: jax.Array, B: int, L: int) -> jax.Array:
    return jnp.moveaxis(parts_nBl, 0, 1).reshape(B, -1)[:, :L]
