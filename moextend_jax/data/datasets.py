"""Data sets as random-access rows: built once into ArrayRecord files by TFDS builders that need no TensorFlow.

Goes in: a name or a path, or several with weights, a split, the media of the run, and a folder for the built files.
Comes out: `Source`: rows `Example(id, conversations, items)`, and the encoded items behind them, by medium.

An example refers to its items by medium, key and row number; their bytes are read only when asked for. Files are read
where they are, and looked at whenever the data set is opened: one that was mended is sound.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.config import IMAGE, Medium, MoextendError, Named
from moextend_jax.data.builders import (
    BUILDERS,
    Built,
    BuiltRef,
    Conversations,
    build_all,
    config_of,
    holds_items,
    is_built,
    items_builder,
    open_built,
    packaged,
    scan,
    talk_of_row,
)
from moextend_jax.data.forms import LLAVA, Files, base_split, files_of, parts_of
from moextend_jax.data.item_files import ItemFolder
from moextend_jax.data.items import Items, look_at_items
from moextend_jax.data.mixing import JoinedItems, JoinedRows, fingerprint_of, picks
from moextend_jax.faults import STRICT, Fault, refuse, unknown_medium
from moextend_jax.folders import absolute, is_url
from moextend_jax.media import IMAGE_MARK, IMAGES_ALONE
from moextend_jax.settings import FaultSettings


class ItemRef(NamedTuple):
    """`key` names an item for ever (caches use it), `row` is its place in `Source.items[medium]`."""

    medium: str
    key: str
    row: int


class Example(NamedTuple):
    """items: those of one medium in the order of its marks. `fault` is what was wrong with it when the data set was
    built, or that it has items of a medium that the run has not (these are not among `items`)."""

    id: str
    conversations: list[dict[str, str]]
    items: tuple[ItemRef, ...]
    fault: Fault | None = None

    @property
    def by_medium(self) -> dict[str, tuple[ItemRef, ...]]:
        """Its items by medium; media without items are left out."""
        return {name: self.of(name) for name in dict.fromkeys(ref.medium for ref in self.items)}

    def of(self, medium: str) -> tuple[ItemRef, ...]:
        return tuple(ref for ref in self.items if ref.medium == medium)

    @property
    def images(self) -> tuple[ItemRef, ...]:
        return self.of(IMAGE)


AnyItems = Items | JoinedItems


@dataclass(frozen=True, kw_only=True)
class Source(Sequence[Example]):
    """Rows of a data set, or some of them: `select` and `hold_out` make views, not copies. Picklable.

    items: of each of `media`. `fingerprint` is of what the rows say, and which and in which order they are; not of
    their items' files.
    """

    rows: Any
    items: Mapping[str, AnyItems]
    media: Named[Medium] = IMAGES_ALONE
    picked: np.ndarray | None = None
    fingerprint: str = ""

    @property
    def images(self) -> AnyItems:
        return self.items.get(IMAGE, Items(()))

    def __len__(self) -> int:
        return len(self.rows) if self.picked is None else len(self.picked)

    def __getitem__(self, index: Any) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._example(self.rows[int(index if self.picked is None else self.picked[index])])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Many rows at once, at a fraction of the cost per row."""
        return [self._example(item) for item in self.built(indices)]

    def built(self, indices: Sequence[int] | np.ndarray) -> list[Mapping[str, Any]]:
        """The same as they were built."""
        rows = np.asarray(indices) if self.picked is None else self.picked[indices]
        return self.rows.__getitems__([int(row) for row in rows])

    def __iter__(self) -> Iterator[Example]:
        """All in order, a chunk at a time in memory."""
        for first in range(0, len(self), CHUNK):
            yield from self.read(range(first, min(first + CHUNK, len(self))))

    def _example(self, item: Mapping[str, Any]) -> Example:
        images = zip(item["images"], item["image_rows"], strict=True)
        refs = [BuiltRef(IMAGE_MARK, key.decode(), int(row)) for key, row in images]
        id, talk = item["id"].decode(), talk_of_row(item["conversations"])
        refs += [BuiltRef(*ref) for ref in talk.get("items", [])]
        fault = Fault(*talk["fault"]) if "fault" in talk else None
        names = {medium.mark: name for name, medium in self.media.items()}
        items = tuple(ItemRef(names[ref.mark], ref.key, ref.row) for ref in refs if ref.mark in names)
        if len(items) < len(refs):
            fault = unknown_medium(id, (ref.mark for ref in refs), self.media)
        return Example(id, talk["turns"], items, fault)


class HoldOut(NamedTuple):
    held_out: Source
    rest: Source


def select(source: Source, rows: Sequence[int] | np.ndarray) -> Source:
    """A view of the given rows, in the given order."""
    rows = np.asarray(rows, "<i8")
    fingerprint = hashlib.sha256(source.fingerprint.encode() + rows.tobytes()).hexdigest()
    return replace(source, picked=rows if source.picked is None else source.picked[rows], fingerprint=fingerprint)


def distinct(source: Source) -> Source:
    """The source without the rows that a mixture repeats."""
    first = () if source.picked is None else np.unique(source.picked, return_index=True)[1]
    return source if source.picked is None or len(first) == len(source) else select(source, np.sort(first))


def hold_out(source: Source, *, samples: int, seed: int) -> HoldOut:
    """Splits off `samples` random rows; both parts keep the source's order. A row that a mixture repeats is in one of
    them only, and once where it is held out."""
    rows = np.arange(len(source)) if source.picked is None else source.picked
    count = len(np.unique(rows))
    if not 0 < samples < count:
        raise MoextendError(f"cannot hold out {samples} of {count} rows; choose between 1 and {count - 1}")
    rng = np.random.default_rng(seed)
    if count == len(rows):
        chosen = rng.choice(count, samples, replace=False)
    else:
        order = rng.permutation(len(rows))
        chosen = order[np.sort(np.unique(rows[order], return_index=True)[1])[:samples]]
    return HoldOut(select(source, np.sort(chosen)), select(source, np.flatnonzero(~np.isin(rows, rows[chosen]))))


def mix(sources: Sequence[Source], *, weights: Sequence[float] | None = None, names: Sequence[str] = ()) -> Source:
    """Several sources as one: all their rows, one source after the other; with weights, an epoch in which the shares
    of conversations follow them, and each row comes at least once (see `mixing.picks`)."""
    media = sources[0].media
    items = {name: JoinedItems([source.items[name] for source in sources]) for name in media}
    of_marks = {medium.mark: items[name].parts for name, medium in media.items()}
    picked = None if weights is None else picks(list(map(len, sources)), weights, names)
    identity = [[source.fingerprint for source in sources], None if weights is None else list(weights)]
    rows, fingerprint = JoinedRows(sources, of_marks), fingerprint_of(identity)
    return Source(rows=rows, items=items, media=media, picked=picked, fingerprint=fingerprint)


def open_dataset(
    name: str,
    *,
    split: str = "train",
    data_dir: Path | str,
    manual_dir: Path | str | None = None,
    images: Path | str | None = None,
    media: Named[Medium] = IMAGES_ALONE,
    faults: FaultSettings = STRICT,
) -> Source:
    """Opens what a setting `data` says: a name (`easy_vqa/{questions,conversations,captions}`, one of
    `made_sounds.FAMILIES`, `llava_pretrain`, `llava_instruct`), a path (a file of any form of `data/forms.py`, a folder
    of them, a pattern), or several of these with commas between them, each with `:WEIGHT` or none.

    Builds rows under `data_dir` on first use; later only items' files are looked at. Faulty entries and files, the
    whole file's, are an error before anything is built where `faults` says so; the others are kept as faulty.

    Args:
      split: `train`, or another that the data have, or a slice, e.g. `train[:1000]`; of each data set.
      manual_dir: where LLaVA's files are.
      images: the folder that paths of items are relative to; None: the folder of the file that names them.
      media: of the run; items of others are faults.

    Raises:
      MoextendError: unknown name or split, missing package, missing or malformed files, no rows.
      Fault: entries or items' files that are not to be skipped; names the first few.
    """
    parts = parts_of(name)
    sources = [
        _open(
            part.name, split=split, data_dir=Path(data_dir), manual_dir=manual_dir, images=images, media=media,
            faults=faults,
        )
        for part in parts
    ]  # fmt: skip
    if len(sources) == 1:
        return sources[0]
    weights = [part.weight for part in parts if part.weight is not None]
    return mix(sources, weights=weights or None, names=[part.name for part in parts])


def _open(
    name: str, *, split: str, data_dir: Path, manual_dir: Path | str | None, images: Path | str | None,
    media: Named[Medium], faults: FaultSettings,
) -> Source:  # fmt: skip
    items = {of: Items((), kind=medium.kind) for of, medium in media.items()}
    if is_packaged(name):
        family, config = family_of(name)
        rows = open_built(packaged(family, config, data_dir), split, name=name)
        refuse(_unknown(rows, media), faults, where=name)
        for of, own in _item_configs(family, media).items():
            stored = open_built(packaged(family, own, data_dir), base_split(split), name=name)
            cut = _cuts(media[of], faults)
            fingerprint = f"{stored.fingerprint}{' cut' if cut else ''}"
            items[of] = Items(stored.rows, fingerprint=fingerprint, kind=media[of].kind, cut=cut)
    else:
        files = files_of(name, split=split, manual_dir=manual_dir, images=images, known=BUILDERS)
        home = item_folder(files, faults)
        builder = partial(_builder, files=files, data_dir=data_dir, split=base_split(split), media=media)
        wanted = (None, *(medium.mark for medium in media.values() if medium.mark == IMAGE_MARK))
        if not all(is_built(builder(mark)) for mark in wanted):
            refuse(scan(files, home, media), faults, where=name, hint=HINT)
        rows = open_built(builder(None), split, name=name)
        refuse(_unknown(rows, media), faults, where=name, hint=HINT)
        for of, medium in media.items():
            if medium.mark == IMAGE_MARK or medium.mark in rows.marks:
                built = open_built(builder(medium.mark), base_split(split), name=name)
                cut = _cuts(medium, faults)
                items[of] = look_at_items(built, home, upright=files.upright, kind=medium.kind, cut=cut)
        of_items = (fault for of_medium in items.values() for fault in of_medium.faults.values())
        refuse([*rows.faults, *of_items], faults, where=name, hint=HINT)
    if not len(rows.rows):
        raise MoextendError(f"data set {name} has no rows in split {split!r}")
    fingerprint = hashlib.sha256(f"{rows.fingerprint} {split}".encode()).hexdigest()
    return Source(rows=rows.rows, items=items, media=media, fingerprint=fingerprint)


def _cuts(medium: Medium, faults: FaultSettings) -> bool:
    """Whether an item that is too long is cut to its beginning."""
    return medium.kind == "audio" and faults.policy("long_sound") == "keep"


def _unknown(rows: Built, media: Named[Medium]) -> Iterator[Fault]:
    """Where some rows have items of a medium that the run has not."""
    for mark, id in rows.marks.items():
        if (fault := unknown_medium(id, [mark], media)) is not None:
            yield fault


def _builder(mark: str | None, *, files: Files, data_dir: Path, split: str, media: Named[Medium]) -> Conversations:
    """The builder of the items of a mark; None: of the rows. Other files must never find what was built from these."""
    marks = []
    for path in files.paths:
        facts: Any = path.stat()
        size, time = (facts.length, facts.mtime) if is_url(path) else (facts.st_size, facts.st_mtime_ns)
        marks.append(f"{absolute(path)} {size} {time}")
    if list(media) != [IMAGE]:
        marks.append(READS)
    if len({path.parent for path in files.paths}) > 1:  # what was built before has items of one name as one
        marks.append(f"names with folders{', beside' if files.beside else ''}")
    home = data_dir / hashlib.sha256("\n".join(marks).encode()).hexdigest()[:12]
    options: dict[str, Any] = {"data_dir": home, "file_format": "array_record"}
    builder = Conversations(config="conversations", **options) if mark is None else items_builder(mark, **options)
    builder.paths, builder.beside, builder.split = files.paths, files.beside, split
    return builder


READS = "items of all media"
"""Goes into a folder's hash: older builds have faults in place of items of other media."""


def item_folder(files: Files, faults: FaultSettings) -> ItemFolder:
    """Where the items are that the files name by path."""
    return ItemFolder(files.home, anywhere=faults.policy("outside") == "keep")


HINT = "; `moextend data check` names all"
CHUNK = 4096
"""Rows that are read at once."""


def check_shows(source: Source, *, medium: str, stage: str) -> None:
    """Raises where no conversation has an item of a medium: a stage that trains its projector alone would train
    nothing."""
    if not any(example.by_medium.get(medium) for example in source):
        raise shows_none(stage, len(source), medium=medium)


def shows_none(stage: str, rows: int, *, medium: str = IMAGE) -> MoextendError:
    what = "an image" if medium == IMAGE else f"an item of {medium}"
    return MoextendError(
        f"{stage} trains the projector, and none of its {rows} conversations has {what}; name others in {stage}.data"
    )


def check_packages(name: str, *, data_dir: Path | str) -> None:
    """Raises a MoextendError where a data set must still be built from a package that is not installed. Takes a moment,
    where to find it out by building takes minutes."""
    for part in parts_of(name):
        if is_packaged(part.name):
            family, config = family_of(part.name)
            builder = packaged(family, config, data_dir)
            if not is_built(builder):
                builder.check_packages()


def make_ahead(names: Iterable[str], *, data_dir: Path, media: Named[Medium]) -> None:
    """Builds on all cores what opening these data sets would build on one core, in minutes."""
    wanted = []
    for part in (part.name for name in names for part in parts_of(name) if is_packaged(part.name)):
        family, config = family_of(part)
        wanted += [(family, config), *((family, items) for items in _item_configs(family, media).values())]
    build_all(wanted, data_dir=data_dir)


def _item_configs(family: str, media: Named[Medium]) -> dict[str, str]:
    """By medium, where a packaged data set has items of it."""
    configs = {name: config_of(medium.mark) for name, medium in media.items()}
    return {name: config for name, config in configs.items() if config in BUILDERS[family].builder_configs}


def is_packaged(name: str) -> bool:
    """Whether it is the name of a data set that comes with a package, and no path."""
    return name.partition("/")[0] in BUILDERS


def family_of(name: str) -> tuple[str, str]:
    """The builder and the config that such a name stands for."""
    family, _, config = name.partition("/")
    configs = [known for known in BUILDERS[family].builder_configs if not holds_items(known)]
    config = config or configs[0]
    if config not in configs:
        raise MoextendError(f"data set {family} has no rows {config!r}; there are {', '.join(configs)}")
    return family, config


def short_name(data: str, split: str) -> str:
    """A folder's name for the caches of a data set's items: a readable word and, for files, a hash of the name."""
    names = [part.name for part in parts_of(data)]
    if all(map(is_packaged, names)):  # rows of a family's configs are about the same items
        data = "-".join(name.partition("/")[0] for name in names)
    elif data not in LLAVA:
        words = re.sub(r"[^A-Za-z0-9]+", "-", Path(names[0]).stem).strip("-")[:40]
        data = f"{words or 'data'}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
    return f"{data}-{base_split(split)}"


def open_text(path: Path | str) -> list[str]:
    """The lines of a UTF-8 file, one passage each; blank lines are left out, and so is a byte order mark."""
    try:
        lines = [line.strip() for line in Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise MoextendError(f"cannot read text {path}: {error}") from error
    if not any(lines):
        raise MoextendError(f"text {path} has no passages; write one per line")
    return [line for line in lines if line]
