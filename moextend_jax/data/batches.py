"""Rows of a data set to batches of static shape: a Grain pipeline that shuffles, shards, packs and resumes.

Goes in: a `Source` of conversations, for each medium what reads its items, or passages of text. Comes out: a Grain
`IterDataset` of `Batch`; its iterator has `get_state` and `set_state` and goes on exactly where it stood.

Several conversations share a row where they fit, each a segment of its own. They are read and packed a window at
a time: reading rows one by one through TFDS and packing them with Grain's own packer took four times as long.

All processes read and pack the same windows, and each then decodes the images of its own rows (`Share`): batches do
not depend on how many processes there are, and the place in the data is the same in all of them. Text is the cheap
part: one core encodes and packs about two thousand conversations a second.

A `Fault` whose policy is `skip` costs its own conversation and moves no other batch's rows: with one conversation per
row its row stays empty; in a packed window it is left out before packing, or, where an image turns out bad only when
it is decoded, its place in the row is empty. `Batch.faults_BG` counts them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from moextend_jax import machine, preemption
from moextend_jax.config import IMAGE, Batch, MoextendError, Recipe, Rooms
from moextend_jax.data.conversations import Encoded, encode_row
from moextend_jax.data.datasets import Example, Source
from moextend_jax.data.missing import media_left_out, without_media
from moextend_jax.data.packing import Row, Sample, Shape, pack, row_of, take_out
from moextend_jax.data.readers import Faults, Readers, given
from moextend_jax.data.shared_memory import check_shared_memory
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.faults import STRICT, Fault, counts, described
from moextend_jax.settings import FaultSettings, Parts, StageSettings

WINDOW = 256
"""Conversations that are read and packed together. A window's last rows stay partly empty (docs/benchmarks.md), and a
resumed run reads at most this many again."""


SHORTEST = 2
"""Fewest tokens of a conversation; it bounds how many conversations a row can hold."""
MOST_TRIED = 10_000
"""Conversations tried, after a batch in which all were skipped, before the data set counts as having no other."""


class Share(NamedTuple):
    """This process's rows of every batch. The mesh makes `of` equal parts of the rows; `parts` are this process's, in
    order. On TPU tori they are scattered over the mesh: (0, 4, 16, 20) of 64."""

    parts: tuple[int, ...] = (0,)
    of: int = 1

    def of_rows(self, count: int) -> list[int]:
        """Which of `count` rows of a batch are this process's."""
        size = count // self.of
        return [row for part in self.parts for row in range(part * size, (part + 1) * size)]


def rooms_of(readers: Readers, stage: StageSettings) -> Rooms:
    """What a stage's rows hold of each medium; media of which they hold nothing are left out."""
    rooms = {name: reader.medium.room(stage.room(name)) for name, reader in readers.items()}
    return {name: room for name, room in rooms.items() if room.items}


def check_named_media(stage: StageSettings, media: Collection[str], *, where: str = "") -> None:
    """Raises MoextendError where a stage's settings name a medium that is none of the model's; `where` starts the
    message."""
    for field in ("missing", "items_per_row"):
        if unknown := [name for name in getattr(stage, field) if name not in media]:
            there = ", ".join(media) or "none"
            raise MoextendError(f"{where}{field}.{unknown[0]}: no such medium; there are {there}")
    if IMAGE in stage.items_per_row:
        raise MoextendError(f"{where}items_per_row.{IMAGE}: of pictures it is images_per_row")


def batches(
    source: Source,
    *,
    stage: StageSettings,
    tokenizer: Tokenizer,
    recipe: Recipe,
    readers: Readers,
    share: Share = Share(),  # noqa: B008  (immutable)
    seed: int | None = 0,
    epochs: int | None = None,
    workers: int = 0,
    parts: Parts = "conversation",
    faults: FaultSettings = STRICT,
) -> grain.IterDataset[Batch]:
    """Batches of `stage.batch_size` rows of `stage.length` tokens with room for `stage.room(name)` items of each
    medium.

    Args:
      stage: sizes and packing of the rows of the whole batch, over all processes.
      share: the rows of every batch that this process gets. The rows of all processes, each part at its place, are the
        batch of a single process.
      seed: decides the order of the rows, another in every epoch, and which rows lack a medium (`stage.missing`). None
        keeps the source's order and all media.
      epochs: None goes on for ever. At the end of the last one the batch is filled up with empty rows.
      workers: processes that read, encode and decode; 0 does it in the caller's process.
      parts: what of an example is fed; `bare_question` is `conversations.encode_bare_question`.
      faults: which kinds of faults are errors and which are skipped and counted.

    Raises:
      MoextendError: a batch that cannot be divided into `share.of` parts, a medium in `stage.missing` or
        `stage.items_per_row` that is none, or workers where no processes can be; while iterating, a `Fault` that is not
        skipped (a conversation that `encode_row` refuses, an image that cannot be read), or that all conversations are
        skipped.
    """
    check_named_media(stage, tokenizer.media)
    encode = partial(
        encode_example, stage=stage, tokenizer=tokenizer, recipe=recipe, readers=readers, parts=parts, faults=faults
    )
    return _pipeline(
        source, encode, stage=stage, readers=readers, media=tuple(tokenizer.media), share=share, seed=seed,
        epochs=epochs, workers=workers, faults=faults,
    )  # fmt: skip


def text_batches(
    passages: Sequence[str],
    *,
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    conversations_per_row: int = 0,
    share: Share = Share(),  # noqa: B008
    seed: int | None = 0,
    epochs: int | None = None,
) -> grain.IterDataset[Batch]:
    """Batches of plain text, each passage BOS + text + EOS, with a label on every token but BOS.

    A passage longer than a row goes on in another piece that starts with BOS again; only the last has EOS. Of a model
    without BOS a passage's first token has no label, and a piece starts with the last token of the one before.
    `conversations_per_row` passages at most share a row, 0 as many as fit.
    """
    if length < SHORTEST:
        raise MoextendError(f"length = {length}: a row of text takes at least {SHORTEST} tokens")
    pieces = []
    for passage in passages:
        ids = [*tokenizer.encode(passage), tokenizer.eos]
        prefix, step = tokenizer.prefix, length - 1
        starts = range(0, len(ids) if prefix else max(1, len(ids) - 1), step)
        pieces += [np.array([*prefix, *ids[n : n + length - len(prefix)]], np.int32) for n in starts]
    stage = StageSettings(
        data="text", steps=1, length=length, batch_size=batch_size, conversations_per_row=conversations_per_row
    )
    return _pipeline(
        pieces, _encode_piece, stage=stage, readers={}, media=(), share=share, seed=seed, epochs=epochs, workers=0
    )


def _pipeline(
    source: Sequence[Any],
    encode: Callable[[Any], Sample],
    *,
    stage: StageSettings,
    readers: Readers,
    media: Sequence[str],
    share: Share,
    seed: int | None,
    epochs: int | None,
    workers: int,
    faults: FaultSettings = STRICT,
) -> grain.IterDataset[Batch]:
    if stage.batch_size % share.of:
        raise MoextendError(
            f"batch_size = {stage.batch_size} must be a multiple of {share.of}, the parts that the mesh makes of it"
        )
    indices = grain.MapDataset.range(len(source))
    if seed is not None:
        indices = indices.seed(seed).shuffle()
    size = max(1, len(source))
    numbered = indices.repeat(epochs).map_with_index(lambda place, row: (place // size, row))
    windows = numbered.batch(WINDOW)
    shape = Shape(stage.length, rooms_of(readers, stage), media)
    to_rows = _WindowToRows(
        source=source,
        encode=encode,
        pack=partial(pack, shape=shape, conversations_per_row=stage.conversations_per_row),
        seed=seed,
        missing={} if seed is None else stage.missing,
        faults=faults,
        rows_stay=stage.conversations_per_row == 1,
    )
    # Threads would only take turns: the work is Python.
    rows = grain.experimental.FlatMapIterDataset(
        windows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), to_rows
    )
    finish = partial(
        _batch,
        stage=stage,
        shape=shape,
        share=share,
        readers=readers,
        faults=faults,
        check=partial(_check_any_good, source, encode, readers),
        examples=(stage.conversations_per_row or stage.length // SHORTEST) if isinstance(source, Source) else 0,
    )
    ready = rows.batch(stage.batch_size, batch_fn=finish)
    if not workers:  # the next batch is made while the step computes
        return grain.experimental.ThreadPrefetchIterDataset(ready, prefetch_buffer_size=1)
    check_shared_memory("set workers = 0")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags; our command line has its own
    return ready.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=partial(_live_with_the_run, os.getpid())
    )


def _live_with_the_run(parent: int, *_: int) -> None:
    """In a worker: ignores the signals that clusters and terminals send to workers too. The run needs its workers until
    it has saved; then it ends them. A killed run cannot: so workers end when they have lost their parent."""
    for number in (*preemption.SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    machine.when_left(parent, lambda: os._exit(1))


@dataclass(frozen=True, kw_only=True)
class _WindowToRows(grain.experimental.FlatMapTransform):
    source: Sequence[Any]
    encode: Callable[..., Sample]
    pack: Callable[[list[Sample]], list[Row]]
    seed: int | None
    missing: Mapping[str, float]
    faults: FaultSettings
    rows_stay: bool
    """One conversation per row: one that is skipped leaves its row empty, so that all others keep theirs."""
    max_fan_out: int = WINDOW

    def flat_map(self, element: tuple[np.ndarray, np.ndarray]) -> list[Row]:
        epochs, numbers = element
        examples = self.source.read(numbers) if isinstance(self.source, Source) else [self.source[n] for n in numbers]
        items, skipped = [], {}
        for n, example in enumerate(examples):
            try:
                epoch, number = int(epochs[n]), int(numbers[n])
                out = media_left_out(self.missing, seed=self.seed or 0, epoch=epoch, row=number)
                items.append(self.encode(example, out=out)._replace(example=number))
            except Fault as fault:
                if not self.faults.skips(fault):
                    raise
                skipped[n] = fault.kind
                if self.rows_stay:
                    items.append(NOTHING)
        # At least one row per window: else its counts are lost, and if all windows are empty no batch ever comes.
        rows = self.pack(items) if items else [self.pack([NOTHING])[0]._replace(places=())]
        rows = self._counted(rows, skipped) if self.faults.can_skip else rows
        if self.seed is not None:  # packing sorts by length, and processes take blocks of rows: mix them
            np.random.default_rng([self.seed, *numbers]).shuffle(rows)  # pyright: ignore[reportArgumentType]
        return rows

    def _counted(self, rows: list[Row], skipped: dict[int, str]) -> list[Row]:
        """The rows with their `faults_G`; conversations left out of a packed window are counted in its first row."""
        if self.rows_stay:
            by_row = [counts([skipped[n]] if n in skipped else (), read=1) for n in range(len(rows))]
        else:
            by_row = [counts(read=len(row.places)) for row in rows]
            by_row[0] += counts(skipped.values(), read=len(skipped))
        return [row._replace(faults_G=faults_G) for row, faults_G in zip(rows, by_row, strict=True)]


def encode_example(
    example: Example, *, stage: StageSettings, tokenizer: Tokenizer, readers: Readers, faults: FaultSettings,
    out: Collection[str] = (), **options: Any,
) -> Sample:  # fmt: skip
    """A conversation as a stage reads it, without its items of the media in `out` and of those that have no reader."""
    if example.fault is not None and faults.policy(example.fault.kind) != "keep":
        raise example.fault.again()
    turns, refs_of = example.conversations, example.by_medium
    if out := tokenizer.with_fused({*out, *(tokenizer.media.keys() - readers.keys())}):
        marks = {name: marked.mark for name, marked in tokenizer.media.items()}
        turns, refs_of = without_media(turns, refs_of, marks=marks, out=out)
    rows = {
        name: [readers[name].row(ref) for ref in refs] if name in readers else [-1] * len(refs)
        for name, refs in refs_of.items()
    }
    encoded = encode_row(
        turns,
        example_id=example.id,
        items={name: [readers[name].span(row) if name in readers else 1 for row in of] for name, of in rows.items()},
        tokenizer=tokenizer,
        length=min(stage.length, stage.conversation_length or stage.length),
        rooms={name: reader.medium.room(stage.room(name)) for name, reader in readers.items()},
        too_long=stage.too_long,
        **options,
    )
    return Sample(encoded, {name: rows[name][:count] for name, count in encoded.items.items()})


def _encode_piece(ids_L: np.ndarray, *, out: Collection[str] = ()) -> Sample:
    return Sample(Encoded(ids_L, ids_L, np.full_like(ids_L, -1), np.ones_like(ids_L), {}), {})


NOTHING = _encode_piece(np.zeros(0, np.int32))
"""In place of a conversation that is skipped."""


def _batch(
    rows: Sequence[Row],
    *,
    stage: StageSettings,
    shape: Shape,
    readers: Readers,
    share: Share,
    faults: FaultSettings,
    check: Callable[[], None],
    examples: int,
) -> Batch:
    """This process's rows of a batch, from the `rows` of all processes (empty ones fill it up).

    Args:
      check: called where every conversation of the batch was skipped.
      examples: most conversations of a row (g of `examples_Bg`); 0: the batch does not say which it holds.
    """
    empty = row_of([], shape)
    rows = [rows[b] if b < len(rows) else empty for b in share.of_rows(stage.batch_size)]
    arrays = {}
    for name in shape.rooms:
        bad: Faults = {}
        arrays[name] = readers[name].read(np.stack([row.item_rows_M[name] for row in rows]), bad)
        for (b, m), fault in bad.items():
            if not faults.skips(fault):
                raise fault
            for place in rows[b].places:  # no match if it is out already for another of its items
                if not place.slots[name].start <= m < place.slots[name].stop:
                    continue
                rows[b] = take_out(rows[b], place)._replace(faults_G=rows[b].faults_G + counts([fault.kind]))
                for medium, array in arrays.items():
                    array[b, place.slots[medium]] = 0
    ids_BL, labels_BL, positions_BL, segments_BL, places_BL = (
        np.stack(column) for column in zip(*(row[:5] for row in rows), strict=True)
    )
    fused = {name: np.stack([row.fused_L[name] for row in rows]) for name in empty.fused_L}
    batch = given(Batch(ids_BL, labels_BL, positions_BL, segments_BL, places_BL, fused=fused), readers, arrays)
    if examples:
        examples_Bg = np.full((len(rows), examples), -1, np.int32)
        for b, row in enumerate(rows):
            examples_Bg[b, : len(row.places)] = [place.example for place in row.places]
        batch = batch._replace(examples_Bg=examples_Bg)
    if not faults.can_skip:
        return batch
    faults_BG = np.stack([counts() if row.faults_G is None else row.faults_G for row in rows])
    read, *skipped = faults_BG.sum(axis=0)
    if read == sum(skipped):
        check()
    return batch._replace(faults_BG=faults_BG)


def _check_any_good(source: Sequence[Any], encode: Callable[[Any], Sample], readers: Readers) -> None:
    """Raises MoextendError where none of up to `MOST_TRIED` random conversations can be read."""
    tried = np.random.default_rng(0).permutation(len(source))[:MOST_TRIED]
    counts_G = counts(read=len(tried))
    for n in tried:
        try:
            item = encode(source[int(n)])
            for name, rows in item.rows.items():
                readers[name].read(np.array([rows], np.int32))
            return
        except Fault as fault:
            counts_G += counts([fault.kind])
    raise MoextendError(f"all of {len(tried)} conversations tried are skipped: {described(counts_G)}; there is no data")
