"""Rows of a data set to batches of static shape: a Grain pipeline that shuffles, shards, packs and resumes.

Goes in: a `Source` of conversations with cached features or pixels, or passages of text. Comes out: a Grain
`IterDataset` of `Batch`; its iterator has `get_state` and `set_state` and goes on exactly where it stood.

Several conversations share a row where they fit, each a segment of its own. They are read and packed a window at
a time: reading rows one by one through TFDS and packing them with Grain's own packer took four times as long.

All hosts read and pack the same windows, and each then decodes the images of its own rows: batches do not depend on how
many hosts there are, and the place in the data is the same on all of them. Text is the cheap part: one core encodes and
packs about two thousand conversations a second.

A `Fault` whose policy is `skip` costs its own conversation and moves no other batch's rows: with one conversation per
row its row stays empty; in a packed window it is left out before packing, or, where an image turns out bad only when
it is decoded, its place in the row is empty. `Batch.faults_BG` counts them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from absl import flags

from moextend_jax import preemption
from moextend_jax.config import Batch, MoextendError, Recipe
from moextend_jax.data.conversations import Encoded, encode_row
from moextend_jax.data.datasets import Example, Images, Source
from moextend_jax.data.faults import STRICT, Fault, counts, described
from moextend_jax.data.features import FeatureStore
from moextend_jax.data.images import decode_image, prepare_image
from moextend_jax.data.packing import Item, Place, Row, empty_row, pack, take_out
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.settings import FaultSettings

WINDOW = 256
"""Conversations that are read and packed together. A window's last rows stay partly empty (docs/benchmarks.md), and a
resumed run reads at most this many again."""


SHORTEST = 2
"""Tokens of a conversation at least, so that it is known how many a row may hold."""
MOST_TRIED = 10_000
"""Conversations that are tried before a data set counts as one that is skipped whole."""

OnFault = Callable[[tuple[int, int], Fault], None]
"""Told which slot (B, M) has an image that cannot be read; its pixels stay zero."""


def _raise(slot: tuple[int, int], fault: Fault) -> None:
    raise fault


class Shard(NamedTuple):
    """This host's part of the rows: `index` of `count`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Images decoded and prepared for the tower, in the worker processes."""

    images: Images
    size: int
    preparation: Literal["pad", "crop"]

    field = "images_BMhwc"

    def row(self, ref) -> int:
        """Raises a `Fault` that was found when the data set was built."""
        self.images.check(ref.row)
        return ref.row

    def read(self, rows_BM: np.ndarray, on_fault: OnFault = _raise) -> np.ndarray:
        images_BMhwc = np.zeros((*rows_BM.shape, self.size, self.size, 3), np.float32)
        for b, m in zip(*np.nonzero(rows_BM >= 0), strict=True):
            try:
                key, encoded = self.images[rows_BM[b, m]]
                picture = decode_image(encoded, name=f"image {key}", id=key)
                images_BMhwc[b, m] = prepare_image(picture, size=self.size, preparation=self.preparation, id=key)
            except Fault as fault:
                on_fault((int(b), int(m)), fault)
        return images_BMhwc

    def fill(self, batch: Batch, rows_BM: np.ndarray) -> Batch:
        return batch._replace(images_BMhwc=self.read(rows_BM))


@dataclass(frozen=True, kw_only=True)
class Features:
    """Images as the cached output of the frozen tower."""

    store: FeatureStore

    field = "features_BMPC"

    def row(self, ref) -> int:
        """Raises the `Fault` of an image that could not be read when the cache was made."""
        return self.store.row(ref.key)

    def read(self, rows_BM: np.ndarray, on_fault: OnFault = _raise) -> np.ndarray:
        features_BMPC = self.store.features_nPC[np.maximum(rows_BM, 0)]
        features_BMPC[rows_BM < 0] = 0
        return features_BMPC

    def fill(self, batch: Batch, rows_BM: np.ndarray) -> Batch:
        return batch._replace(features_BMPC=self.read(rows_BM))


def batches(
    source: Source,
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    images: Pixels | Features | None,
    patches: int,
    length: int,
    batch_size: int,
    images_per_row: int = 1,
    conversations_per_row: int | None = None,
    conversation_length: int | None = None,
    seed: int | None = 0,
    epochs: int | None = None,
    shard: Shard = Shard(),  # noqa: B008  (immutable)
    workers: int = 0,
    too_long: Literal["error", "drop_turns"] = "error",
    parts: Literal["conversation", "bare_question"] = "conversation",
    faults: FaultSettings = STRICT,
) -> grain.IterDataset[Batch]:
    """Batches of `batch_size` rows of `length` tokens with room for `images_per_row` images (M).

    Args:
      images: where pixels or features come from; None leaves every image out (and its `<image>` mark), which is
        how the question alone is asked.
      conversations_per_row: at most so many share a row; 1 is one conversation per row, None as many as fit.
      conversation_length: most tokens of one conversation; None is a whole row. Rows of several times this length
        can be filled where single ones can not (docs/benchmarks.md).
      seed: order of the rows, another in every epoch; None keeps the source's order.
      epochs: None goes on for ever. At the end of the last one the batch is filled up with empty rows.
      batch_size: rows on this host.
      shard: this host's part of every batch. The hosts' batches together are those of a single host.
      workers: processes that read, encode and decode; 0 does it in the caller's process.
      too_long: `drop_turns` leaves out trailing question-answer pairs that do not fit.
      parts: what of an example is fed; `bare_question` is `conversations.encode_bare_question`.
      faults: which kinds of faults are errors and which are skipped and counted.

    Raises:
      MoextendError: no rows; while iterating, a `Fault` that is not skipped (a conversation that
        `encode_conversation` refuses, one with more than `images_per_row` images, an image that cannot be read), or
        that all conversations are skipped.
    """
    encode = partial(
        _encode_example,
        tokenizer=tokenizer,
        recipe=recipe,
        images=images,
        patches=patches,
        length=min(length, conversation_length or length),
        images_per_row=images_per_row,
        too_long=too_long,
        parts=parts,
        faults=faults,
    )
    return _pipeline(
        source,
        encode,
        images=images,
        patches=patches,
        length=length,
        batch_size=batch_size,
        images_per_row=images_per_row if images else 0,
        conversations_per_row=conversations_per_row,
        seed=seed,
        epochs=epochs,
        shard=shard,
        workers=workers,
        faults=faults,
    )


def text_batches(
    passages: Sequence[str],
    *,
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    conversations_per_row: int | None = None,
    seed: int | None = 0,
    epochs: int | None = None,
    shard: Shard = Shard(),  # noqa: B008
    workers: int = 0,
) -> grain.IterDataset[Batch]:
    """Batches of plain text, each passage BOS + text + EOS, with a label on every token but BOS.

    A passage longer than a row goes on in another piece that starts with BOS again; only the last has EOS.
    """
    pieces = []
    for passage in passages:
        ids = [*tokenizer.encode(passage), tokenizer.eos]
        pieces += [
            np.array([tokenizer.bos, *ids[n : n + length - 1]], np.int32) for n in range(0, len(ids), length - 1)
        ]
    return _pipeline(
        pieces,
        _encode_piece,
        images=None,
        patches=0,
        length=length,
        batch_size=batch_size,
        images_per_row=0,
        conversations_per_row=conversations_per_row,
        seed=seed,
        epochs=epochs,
        shard=shard,
        workers=workers,
    )


def fill_ratio(batch: Batch) -> float:
    """Share of the batch's positions that are not padding."""
    return float(np.mean(np.asarray(batch.segments_BL) > 0))


def _pipeline(
    source: Sequence[Any],
    encode: Callable[[Any], Item],
    *,
    images: Pixels | Features | None,
    patches: int,
    length: int,
    batch_size: int,
    images_per_row: int,
    conversations_per_row: int | None,
    seed: int | None,
    epochs: int | None,
    shard: Shard,
    workers: int,
    faults: FaultSettings = STRICT,
) -> grain.IterDataset[Batch]:
    indices = grain.MapDataset.range(len(source))
    if seed is not None:
        indices = indices.seed(seed).shuffle()
    windows = indices.repeat(epochs).batch(WINDOW)
    to_rows = _WindowToRows(
        source=source,
        encode=encode,
        pack=partial(
            pack,
            length=length,
            images_per_row=images_per_row,
            patches=patches,
            conversations_per_row=conversations_per_row,
        ),
        seed=seed,
        faults=faults,
        rows_stay=conversations_per_row == 1,
    )
    # Threads would only take turns: the work is Python.
    rows = grain.experimental.FlatMapIterDataset(
        windows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), to_rows
    )
    finish = partial(
        _batch,
        batch_size=batch_size,
        shard=shard,
        length=length,
        images=images,
        images_per_row=images_per_row,
        faults=faults,
        check=partial(_check_any_good, source, encode, images),
        examples=(conversations_per_row or length // SHORTEST) if isinstance(source, Source) else 0,
    )
    made = rows.batch(batch_size * shard.count, batch_fn=finish)
    if not workers:
        return made
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags; our command line has its own
    return made.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_live_with_the_run)


def _live_with_the_run(*_: int) -> None:
    """In a worker. Clusters and terminals send their signals to workers too: what they make is needed until the run
    has saved, which then ends them itself. One that is killed cannot: workers see that they have lost their parent."""
    for number in (*preemption.SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@dataclass(frozen=True, kw_only=True)
class _WindowToRows(grain.experimental.FlatMapTransform):
    source: Sequence[Any]
    encode: Callable[[Any], Item]
    pack: Callable[[list[Item]], list[Row]]
    seed: int | None
    faults: FaultSettings
    rows_stay: bool
    """One conversation per row: one that is skipped leaves its row empty, so that all others keep theirs."""
    max_fan_out: int = WINDOW

    def flat_map(self, element: np.ndarray) -> list[Row]:
        examples = self.source.read(element) if isinstance(self.source, Source) else [self.source[n] for n in element]
        items, skipped = [], {}
        for n, example in enumerate(examples):
            try:
                items.append(self.encode(example)._replace(example=int(element[n])))
            except Fault as fault:
                if not self.faults.skips(fault):
                    raise
                skipped[n] = fault.kind
                if self.rows_stay:
                    items.append(NOTHING)
        # Without any row the counts would be lost, and a data set of such windows would be waited for without end.
        rows = self.pack(items) if items else [self.pack([NOTHING])[0]._replace(places=())]
        rows = self._counted(rows, skipped) if self.faults.can_skip else rows
        if self.seed is not None:  # packing sorts by length, and hosts take blocks of rows: mix them
            np.random.default_rng([self.seed, *element]).shuffle(rows)  # pyright: ignore[reportArgumentType]
        return rows

    def _counted(self, rows: list[Row], skipped: dict[int, str]) -> list[Row]:
        """Those left out of a packed window count in one of its rows."""
        if self.rows_stay:
            by_row = [counts([skipped[n]] if n in skipped else (), read=1) for n in range(len(rows))]
        else:
            by_row = [counts(read=len(row.places)) for row in rows]
            by_row[0] += counts(skipped.values(), read=len(skipped))
        return [row._replace(faults_G=faults_G) for row, faults_G in zip(rows, by_row, strict=True)]


def _encode_example(
    example: Example, *, images: Pixels | Features | None, faults: FaultSettings, **options: Any
) -> Item:
    if example.fault is not None and faults.policies[example.fault.kind] != "keep":
        raise example.fault.again()
    turns, refs = example.conversations, example.images
    if images is None:
        turns, refs = [_without_marks(turn) for turn in turns], ()
    encoded = encode_row(turns, example_id=example.id, images=len(refs), **options)
    return Item(encoded, [images.row(ref) for ref in refs[: encoded.images]] if images else [])


def _without_marks(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        return turn  # for encoding to refuse
    return {**turn, "value": turn["value"].replace("<image>\n", "").replace("<image>", "")}


def _encode_piece(ids_L: np.ndarray) -> Item:
    return Item(Encoded(ids_L, ids_L, np.full_like(ids_L, -1), np.ones_like(ids_L), 0), [])


NOTHING = _encode_piece(np.zeros(0, np.int32))
"""In place of a conversation that is skipped."""


def _batch(
    rows: Sequence[Row],
    *,
    batch_size: int,
    length: int,
    images: Pixels | Features | None,
    images_per_row: int,
    shard: Shard = Shard(),  # noqa: B008
    faults: FaultSettings = STRICT,
    check: Callable[[], None] = lambda: None,
    examples: int = 0,
) -> Batch:
    """This host's rows of all hosts' `rows`; `examples` is g, most conversations of a row, 0 does not say which they
    are."""
    rows = rows[shard.index * batch_size :][:batch_size]
    missing = batch_size - len(rows)
    rows = [*rows, *[empty_row(length=length, images_per_row=images_per_row)] * missing]
    bad: dict[tuple[int, int], Fault] = {}

    def on_fault(slot: tuple[int, int], fault: Fault) -> None:
        if not faults.skips(fault):
            raise fault
        bad[slot] = fault

    pixels = images.read(np.stack([row.image_rows_M for row in rows]), on_fault) if images else None
    for (b, m), fault in bad.items():
        for place in rows[b].places:  # none, if it is out for another of its images
            if not place.images.start <= m < place.images.stop:
                continue
            rows[b] = _skip(rows[b], place, fault.kind)
            assert pixels is not None
            pixels[b, place.images] = 0
    text = (np.stack(column) for column in zip(*(row[:5] for row in rows), strict=True))
    batch = Batch(*text)
    if images:
        batch = batch._replace(**{images.field: pixels})
    if examples:
        examples_Bg = np.full((batch_size, examples), -1, np.int32)
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


def _skip(row: Row, place: Place, kind: str) -> Row:
    places = tuple(one for one in row.places if one is not place)
    row = Row(*(array.copy() for array in row[:6]), places=places, faults_G=row.faults_G + counts([kind]))
    take_out(row, place)
    return row


def _check_any_good(source: Sequence[Any], encode: Callable[[Any], Item], images: Pixels | Features | None) -> None:
    """After a batch in which everything was skipped: raises where there is nothing else."""
    tried = np.random.default_rng(0).permutation(len(source))[:MOST_TRIED]
    found = counts(read=len(tried))
    for n in tried:
        try:
            item = encode(source[int(n)])
            if images:
                images.read(np.array([item.image_rows], np.int32))
            return
        except Fault as fault:
            found += counts([fault.kind])
    raise MoextendError(f"all of {len(tried)} conversations tried are skipped: {described(found)}; there is no data")
