"""Rows of a data set to batches of static shape: a Grain pipeline that shuffles, shards, packs and resumes.

Goes in: a `Source` of conversations with cached features or pixels, or passages of text. Comes out: a Grain
`IterDataset` of `Batch`; its iterator has `get_state` and `set_state` and goes on exactly where it stood.

Several conversations share a row where they fit, each a segment of its own. They are read and packed a window at
a time: reading rows one by one through TFDS and packing them with Grain's own packer took four times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from absl import flags

from moextend_jax.config import Batch, MoextendError, Recipe
from moextend_jax.data.conversations import Encoded, encode_bare_question, encode_conversation
from moextend_jax.data.datasets import Example, Images, Source
from moextend_jax.data.features import FeatureStore
from moextend_jax.data.images import decode_image, prepare_image
from moextend_jax.data.packing import Item, Row, empty_row, pack
from moextend_jax.data.tokenizer import Tokenizer

WINDOW = 256
"""Conversations that are read and packed together. A window's last rows stay partly empty (docs/benchmarks.md), and a
resumed run reads at most this many again."""


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

    def row(self, ref) -> int:
        return ref.row

    def fill(self, batch: Batch, rows_BM: np.ndarray) -> Batch:
        images_BMhwc = np.zeros((*rows_BM.shape, self.size, self.size, 3), np.float32)
        for slot in zip(*np.nonzero(rows_BM >= 0), strict=True):
            key, encoded = self.images[rows_BM[slot]]
            images_BMhwc[slot] = prepare_image(
                decode_image(encoded, name=f"image {key}"), size=self.size, preparation=self.preparation
            )
        return batch._replace(images_BMhwc=images_BMhwc)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Images as the cached output of the frozen tower."""

    store: FeatureStore

    def row(self, ref) -> int:
        return self.store.row(ref.key)

    def fill(self, batch: Batch, rows_BM: np.ndarray) -> Batch:
        features_BMPC = self.store.features_nPC[np.maximum(rows_BM, 0)]
        features_BMPC[rows_BM < 0] = 0
        return batch._replace(features_BMPC=features_BMPC)


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
) -> grain.IterDataset[Batch]:
    """Batches of `batch_size` rows of `length` tokens with room for `images_per_row` images (M).

    Args:
      images: where pixels or features come from; None leaves every image out (and its `<image>` mark), which is
        how the question alone is asked.
      conversations_per_row: at most so many share a row; 1 is one conversation per row, None as many as fit.
      conversation_length: most tokens of one conversation; None is a whole row. Rows of several times this length
        can be filled where single ones can not (docs/benchmarks.md).
      seed: order of the rows, another in every epoch; None keeps the source's order.
      epochs: None goes on for ever. At the end of the last one the batch is filled up with empty rows; hosts may
        then differ by a batch, so with several hosts count steps instead, or use `distributed.in_step`.
      batch_size: rows on this host.
      shard: this host's part. Each conversation is on one host, once an epoch; with one conversation per row the
        hosts' batches together are those of a single host.
      workers: processes that read, encode and decode; 0 does it in the caller's process.
      too_long: `drop_turns` leaves out trailing question-answer pairs that do not fit.
      parts: what of an example is fed; `bare_question` is `conversations.encode_bare_question`.

    Raises:
      MoextendError: no rows; while iterating, a conversation that `encode_conversation` refuses, or one with
        more than `images_per_row` images.
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
) -> grain.IterDataset[Batch]:
    if len(source) < shard.count:
        raise MoextendError(f"{len(source)} rows cannot be shared by {shard.count} hosts; use more data")
    indices = grain.MapDataset.range(len(source))
    if seed is not None:
        indices = indices.seed(seed).shuffle()
    indices = indices.repeat(epochs)
    if conversations_per_row == 1:
        windows = indices.batch(WINDOW).map_with_index(_Deal(shard=shard, seed=seed))
    else:
        windows = indices.slice(slice(shard.index, None, shard.count)).batch(WINDOW)
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
        seed=None if conversations_per_row == 1 else seed,
    )
    # Threads would only take turns: the work is Python.
    rows = grain.experimental.FlatMapIterDataset(
        windows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), to_rows
    )
    finish = partial(_batch, batch_size=batch_size, length=length, images=images, images_per_row=images_per_row)
    made = rows.batch(batch_size, batch_fn=finish)
    if not workers:
        return made
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags; our command line has its own
    return made.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


@dataclass(frozen=True, kw_only=True)
class _Deal(grain.transforms.MapWithIndex):
    """A window's rows, dealt one by one to the hosts: together they read the batches that one host would read."""

    shard: Shard
    seed: int | None

    def map_with_index(self, index: int, element: np.ndarray) -> np.ndarray:
        order = list(range(len(element)))
        if self.seed is not None:
            np.random.default_rng([self.seed, *element]).shuffle(order)  # pyright: ignore[reportArgumentType]
        mine = order[(self.shard.index - index * WINDOW) % self.shard.count :: self.shard.count]
        return element[np.array(mine, np.int64)]


@dataclass(frozen=True, kw_only=True)
class _WindowToRows(grain.experimental.FlatMapTransform):
    source: Sequence[Any]
    encode: Callable[[Any], Item]
    pack: Callable[[list[Item]], list[Row]]
    seed: int | None
    max_fan_out: int = WINDOW

    def flat_map(self, element: np.ndarray) -> list[Row]:
        examples = self.source.read(element) if isinstance(self.source, Source) else [self.source[n] for n in element]
        rows = self.pack([self.encode(example) for example in examples])
        if self.seed is not None:  # packing sorts by length: mix the rows again
            np.random.default_rng([self.seed, *element]).shuffle(rows)  # pyright: ignore[reportArgumentType]
        return rows


def _encode_example(
    example: Example,
    *,
    tokenizer,
    recipe,
    images: Pixels | Features | None,
    patches,
    length,
    images_per_row,
    too_long,
    parts,
) -> Item:
    turns, refs = example.conversations, example.images
    if images is None:
        turns = [{**turn, "value": turn["value"].replace("<image>\n", "").replace("<image>", "")} for turn in turns]
        refs = ()
    encode = encode_bare_question if parts == "bare_question" else partial(encode_conversation, too_long=too_long)
    encoded = encode(
        turns,
        example_id=example.id,
        images=len(refs),
        tokenizer=tokenizer,
        recipe=recipe,
        patches=patches,
        length=length,
    )
    if encoded.images > images_per_row:
        raise MoextendError(
            f"example {example.id}: {encoded.images} images, but a row holds {images_per_row}; raise images_per_row"
        )
    return Item(encoded, [images.row(ref) for ref in refs[: encoded.images]] if images else [])


def _encode_piece(ids_L: np.ndarray) -> Item:
    return Item(Encoded(ids_L, ids_L, np.full_like(ids_L, -1), np.ones_like(ids_L), 0), [])


def _batch(
    rows: Sequence[Row], *, batch_size: int, length: int, images: Pixels | Features | None, images_per_row: int
) -> Batch:
    missing = batch_size - len(rows)
    rows = [*rows, *[empty_row(length=length, images_per_row=images_per_row)] * missing]
    *text, rows_BM = (np.stack(column) for column in zip(*rows, strict=True))
    batch = Batch(*text)
    return images.fill(batch, rows_BM) if images else batch
