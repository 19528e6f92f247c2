"""One model, asked in batches: an `Askable` and `Prompt`s in; new ids or log-likelihoods of each, batch by batch, out.

Several processes ask together: each reads the pictures of its own devices' rows and computes those, and all get all
answers. The next batch is made and started while the last one's answers are fetched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from moextend_jax import preemption
from moextend_jax.config import IGNORE, IMAGE, Batch, Medium, ModelConfig, Rooms
from moextend_jax.data.conversations import text_batch
from moextend_jax.evaluate.prompts import Prompt, Work, plan, prompt_batch, rooms_of_prompts
from moextend_jax.generate import Arrays, Generator, Heads
from moextend_jax.mesh import on_host, own_row_shards, place_rows, row_shards
from moextend_jax.models.moextend import abstract, share_of_text
from moextend_jax.runs.askable import Askable

Started = TypeVar("Started")

ROW = 256
"""Tokens of a row by which batches are measured where no length is set."""
LOOK = 32
"""New tokens between two looks at the answers, where their text decides when to stop."""


class Reader(Protocol):
    """`data.readers.Inputs`, `Features`, or anything that reads rows of a medium's items as they do."""

    @property
    def field(self) -> str:
        """`media` or `features`: of `Batch`."""
        ...

    @property
    def medium(self) -> Medium: ...

    def read(self, rows_BM: np.ndarray, /) -> np.ndarray:
        """Arrays `[B, M, ...]` of items by row number, zeros for -1."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asker:
    """A model on its generator's mesh. A batch has at most `rows` rows and about `tokens` positions over all devices;
    `prompts.plan` says how it keeps to them."""

    generator: Generator
    arrays: Arrays
    ends: tuple[int, ...]
    rows: int
    tokens: int
    media: tuple[str, ...] = (IMAGE,)
    """By number, as in the prompts' places (`conversations.MEDIUM`)."""
    readers: Mapping[str, Reader] = dataclasses.field(default_factory=dict)

    @property
    def mesh(self) -> Mesh:
        return self.generator.mesh

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Greedy answers of up to `max_new_tokens` ids, a batch at a time, in the order of the plan: a prompt's index,
        and ids without what ends them.

        Args:
          stop: called every `LOOK` tokens with a prompt's index and its ids so far; True where they are enough. A batch
            ends when each of its rows has had enough or an end; so an answer may hold ids past where it stopped.
        """
        steps = LOOK if stop else max_new_tokens

        def begun() -> Iterator[tuple[Work, list[Any]]]:
            for work, tails, heads in self._started(prompts, room=max_new_tokens):
                pieces = self.generator.begin(
                    self.arrays, tails, heads=heads, max_new_tokens=max_new_tokens, steps=steps
                )
                yield work, self._until_enough(work, pieces, stop) if stop else list(pieces)

        for work, pieces in _one_behind(begun()):
            yield self._completed(work, pieces)

    def score(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[int, float, bool]]]:
        """Scores of the prompts' targets, a batch at a time, in the order of the plan: a prompt's index, the
        log-likelihood of all its targets in nats, and whether each of them is the likeliest id."""
        started = self._started(prompts, room=0)
        begun = ((work, *self.generator.score(self.arrays, tails, heads=heads)) for work, tails, heads in started)
        for work, nats, likeliest in _one_behind(begun):
            yield self._scored(prompts, work, nats, likeliest)

    # --- results ------------------------------------------------------------------------------------------------------

    def _completed(self, work: Work, pieces: Sequence[jax.Array]) -> list[tuple[int, list[int]]]:
        answers = np.concatenate([on_host(piece) for piece in pieces], axis=1).tolist()
        return [
            (n, list(itertools.takewhile(lambda id: id not in self.ends, answers[row]))) for n, row in _placed(work)
        ]

    def _until_enough(
        self, work: Work, pieces: Iterator[jax.Array], stop: Callable[[int, list[int]], bool]
    ) -> list[Any]:
        """Ids `[B, n]` in pieces, on the host, until every row has ended or `stop` says that it has enough."""
        seen: list[np.ndarray] = []
        for piece in pieces:
            seen.append(on_host(piece))
            ids_BL = np.concatenate(seen, axis=1)
            if all(np.isin(ids_BL[row], self.ends).any() or stop(n, ids_BL[row].tolist()) for n, row in _placed(work)):
                break
        return seen

    def _scored(
        self, prompts: Sequence[Prompt], work: Work, nats: jax.Array, likeliest: jax.Array
    ) -> list[tuple[int, float, bool]]:
        nats_BL, likeliest_BL = on_host(nats).astype(np.float64), on_host(likeliest)
        scores = []
        for n, row in _placed(work):
            targets_L = prompts[n].targets_L
            assert targets_L is not None
            labelled_L = targets_L != IGNORE
            greedy = bool(likeliest_BL[row, : len(labelled_L)][labelled_L].all())
            scores.append((n, float(nats_BL[row].sum()), greedy))
        return scores

    # --- batches ------------------------------------------------------------------------------------------------------

    def _started(self, prompts: Sequence[Prompt], *, room: int) -> Iterator[tuple[Work, Batch, Heads | None]]:
        """Every batch of the plan: its tails on the devices, and their heads read. `room`: new tokens of a row."""
        parts = row_shards(self.mesh)
        own = own_row_shards(self.mesh)
        works = plan(prompts, parts=parts, rows=self.rows // parts, tokens=self.tokens // parts, room=room)
        rooms = rooms_of_prompts(prompts, self.readers)

        def host_batches(work: Work) -> tuple[Batch, list[tuple[Batch, np.ndarray]]]:
            here = {name: room for name, room in rooms.items() if name in work.media}
            readings = [self._heads(prompts, work, own, n, here) for n in range(work.readings)]
            return _tails(prompts, work, own), readings

        with ThreadPoolExecutor(1) as pool:
            for work, made in _one_behind((work, pool.submit(host_batches, work)) for work in works):
                preemption.stop_if_told()
                tails, readings = made.result()
                yield work, place_rows(tails, self.mesh), self._read(prompts, work, own, readings)

    def _heads(self, prompts, work: Work, own: tuple[int, ...], reading: int, rooms: Rooms) -> tuple[Batch, np.ndarray]:
        """The heads of one reading, with their items, as a batch `[n, L]` of this process's parts; and for each row of
        the work, `[B]`, which of its part's n heads it takes, -1 for none of this reading."""
        first, count = reading * work.heads_at_once, work.heads_at_once
        rows_B = np.full(work.rows * len(own), -1, np.int32)
        read: dict[int, Prompt] = {}
        for p, part in enumerate(own):
            read |= {row: prompts[n] for row, n in enumerate(work.heads[part][first : first + count], p * count)}
            for row, head in enumerate(work.head_of[part], p * work.rows):
                if first <= head < first + count:
                    rows_B[row] = head - first
        batch = prompt_batch(
            read, readers=self.readers, rooms=rooms, media=self.media,
            rows=count * len(own), length=work.head_length, heads=True,
        )  # fmt: skip
        return batch, rows_B

    def _read(
        self, prompts, work: Work, own: tuple[int, ...], readings: list[tuple[Batch, np.ndarray]]
    ) -> Heads | None:
        if not readings:
            return None
        rows = work.rows * row_shards(self.mesh)
        past = self.generator.no_heads(rows=rows, length=work.head_length)
        for heads, rows_B in readings:
            past = self.generator.read(self.arrays, place_rows(heads, self.mesh), past, place_rows(rows_B, self.mesh))
        length_B, full_B = (np.zeros(work.rows * len(own), kind) for kind in (np.int32, bool))
        for p, part in enumerate(own):
            for row, n in enumerate(work.prompts[part], p * work.rows):
                length_B[row], full_B[row] = prompts[n].head, True
        shares = {  # -inf in rows without a prompt
            name: None if share is None else place_rows(np.where(full_B, share, -np.inf).astype(np.float32), self.mesh)
            for name, share in share_of_text(self.generator.model.config, frozenset(work.media)).items()
        }
        return Heads(past, place_rows(length_B, self.mesh), shares)


def generator_of(opened: Askable) -> Generator:
    """Models of one structure share what is compiled."""
    tokenizer = opened.tokenizer
    suppress = tokenizer.unspeakable(opened.config.decoder.vocab_size)
    return _generator(opened.config, tokenizer.ends, suppress, opened.mesh)


@functools.lru_cache(maxsize=16)
def _generator(config: ModelConfig, ends: tuple[int, ...], suppress: tuple[int, ...], mesh: Mesh) -> Generator:
    return Generator(abstract(config), eos=ends[0], ends=ends, suppress=suppress, mesh=mesh)


def asker_of(opened: Askable, *, readers: Mapping[str, Reader] | None = None) -> Asker:
    """Batches are as large as `sizes.batch_size` rows of `sizes.length` tokens, or of `ROW` where that is 0."""
    return Asker(
        generator=generator_of(opened),
        arrays=opened.arrays,
        ends=opened.tokenizer.ends,
        rows=opened.sizes.batch_size,
        tokens=opened.sizes.batch_size * (opened.sizes.length or ROW),
        media=tuple(opened.tokenizer.media),
        readers=readers or {},
    )


def _one_behind(started: Iterable[Started]) -> Iterator[Started]:
    """Each once the next one is started, which then goes on while this one is waited for."""
    end: Any = None
    return (one for one, _ in itertools.pairwise(itertools.chain(started, (end,))))


def _tails(prompts: Sequence[Prompt], work: Work, own: tuple[int, ...]) -> Batch:
    batch = text_batch(*np.zeros((2, work.rows * len(own), work.tail_length), np.int32))
    for p, part in enumerate(own):
        for row, n in enumerate(work.prompts[part], p * work.rows):
            prompt = prompts[n]
            batch.ids_BL[row, : prompt.tail] = prompt.ids_L[prompt.head :]
            batch.positions_BL[row] += prompt.head
            batch.segments_BL[row, : prompt.tail] = 1
            if prompt.targets_L is not None:
                batch.labels_BL[row, : prompt.tail] = prompt.targets_L
    return batch


def _placed(work: Work) -> Iterator[tuple[int, int]]:
    """Index of every prompt of the batch, and its row in the batch of all processes."""
    for part, indices in enumerate(work.prompts):
        yield from ((n, part * work.rows + row) for row, n in enumerate(indices))
