"""TFDS builders that need no TensorFlow: easy-VQA, sounds of packages, and conversations in files of any form, as
ArrayRecord files.

Goes in: the installed `easy_vqa` package, sounds of `data/made_sounds.py`, or files of `data/forms.py`. Comes out: per
config, rows `{id, conversations (JSON), images (keys), image_rows}`; config `images` has `{id, image (encoded), span
(JSON)}`, one row per image, so that no image is stored again for each of its questions. Image files, and pictures in
tar files (`span`), are not copied: `image` is empty there, and they are read where they are. Pictures that stand in
rows of a table are stored.

Of items of other media the JSON has an object `{turns, items: [[mark, key, row], ...]}` in the place of the turns, and
there is a config with rows like those of images for each mark. Data of images alone are built as they always were.

A faulty entry is built as a row without content, and its `Fault` goes into the metadata of the built files, so that
policies can change without building again. There too: a hash of the rows of each split, the marks of other media, and
how many rows hold a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax import machine
from moextend_jax.config import Medium, MoextendError
from moextend_jax.data import easy_vqa
from moextend_jax.data.entries import Content, Entry, read_entries
from moextend_jax.data.forms import SPLITS, Files, base_split
from moextend_jax.data.item_files import ItemFolder
from moextend_jax.data.made_sounds import FAMILIES
from moextend_jax.data.shards import Span
from moextend_jax.faults import Fault, unknown_medium
from moextend_jax.lock import alone
from moextend_jax.media import IMAGE_MARK, KINDS


class BuiltRef(NamedTuple):
    """`key` names an item for ever (caches use it), `row` is its place in the config of its mark, of the same split."""

    mark: str
    key: str
    row: int


def config_of(mark: str) -> str:
    """The config with the items of a mark."""
    return "images" if mark == IMAGE_MARK else f"items-{mark.strip('<>').replace(':', '-')}"


def holds_items(config: str) -> bool:
    """Whether a config has items, not conversations."""
    return config == "images" or config.startswith("items-")


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: no data of ours have published facts, and each look for them leaves an empty folder in /tmp."""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What all builders share. url_infos: nothing is downloaded; TFDS's own search for checksums needs an undeclared
    package."""

    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        # Text features hold raw bytes without any TensorFlow.
        if holds_items(_config(self)):
            features = {name: tfds.features.Text() for name in ("id", "image", "span")}
        else:
            features = {
                "id": tfds.features.Text(),
                "conversations": tfds.features.Text(),
                "images": tfds.features.Sequence(tfds.features.Text()),
                "image_rows": tfds.features.Sequence(np.int64),
            }
        # Row numbers of items must be the order in which they were generated; the pipeline shuffles later.
        return _Info(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )


def _row(
    id: str, conversations: list[dict[str, str]], refs: Sequence[BuiltRef], fault: Fault | None = None
) -> dict[str, Any]:
    images = [ref for ref in refs if ref.mark == IMAGE_MARK]
    others = [list(ref) for ref in refs if ref.mark != IMAGE_MARK]
    more = ({"fault": [str(fault), fault.kind, fault.id]} if fault else {}) | ({"items": others} if others else {})
    return {
        "id": id,
        "conversations": json.dumps({**more, "turns": conversations} if more else conversations),
        "images": [ref.key for ref in images],
        "image_rows": np.array([ref.row for ref in images], np.int64),
    }


def _item_row(key: str, content: Content | None) -> dict[str, Any]:
    """None: it is a file, read where it is."""
    span = json.dumps(content) if isinstance(content, Span) else ""
    return {"id": key, "image": content if isinstance(content, bytes) else b"", "span": span}


def talk_of_row(conversations: str | bytes) -> dict[str, Any]:
    """`{turns, items, fault}` of a row, items and fault where it has them."""
    talk = json.loads(conversations)
    return talk if isinstance(talk, dict) else {"turns": talk}


def _noted(
    builder: tfds.core.DatasetBuilder, split: str, rows: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows, numbered. After the last one the split's `fingerprint`, `faults` (by row), `stored` and, if there are
    other marks than that of images, `marks` go into the metadata.

    The fingerprint is of contents alone: it is the same wherever the files lie, whenever they were written.
    """
    digest, faults, stored, marks = hashlib.sha256(), {}, 0, {}
    for number, row in enumerate(rows):
        talk = talk_of_row(row.get("conversations", "[]"))
        if "fault" in talk:
            faults[str(number)] = talk["fault"]
        stored += bool(row.get("image"))
        for mark, *_ in talk.get("items", []):
            marks.setdefault(mark, row["id"])
        digest.update(_identity(row, talk))
        yield number, row
    assert builder.info.metadata is not None
    notes = {"fingerprint": digest.hexdigest(), "faults": faults, "stored": stored}
    notes |= {"marks": marks} if marks else {}
    builder.info.metadata[split] = notes  # pyright: ignore[reportIndexIssue]


def _identity(row: dict[str, Any], talk: dict[str, Any]) -> bytes:
    if "image" in row:
        return json.dumps([row["id"], hashlib.sha256(row["image"]).hexdigest()]).encode()
    turns = talk["turns"]
    if "fault" in talk:  # its kind alone: its message names the file
        turns = [talk["fault"][1], turns]
    keys = [[mark, key] for mark, key, _ in talk.get("items", [])]
    return json.dumps([row["id"], turns, row["images"], *([keys] if keys else [])]).encode()


def _config(builder: tfds.core.DatasetBuilder) -> str:
    assert builder.builder_config is not None
    return builder.builder_config.name


def _configs(**described: str) -> list[tfds.core.BuilderConfig]:
    described["images"] = "one row per image file"
    return [tfds.core.BuilderConfig(name=name, description=text) for name, text in described.items()]


class EasyVqa(_Builder):
    """Questions on pictures of one coloured shape, from the `easy_vqa` package (MIT licence)."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = _configs(
        questions="one row per question",
        conversations="one row per image, with all its questions as turns",
        captions="one row per image, with a description of it",
        **{name: f"of the questions those with answers {', '.join(sorted(of))}" for name, of in easy_vqa.KINDS.items()},
    )

    def check_packages(self) -> None:
        """Raises a MoextendError where what it is made of is not installed."""
        easy_vqa.pictures("test")

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(split, easy_vqa.asked(split, of="easy_vqa")) for split in ("train", "test")
        }

    def _generate_examples(self, split, turns) -> Iterator[tuple[int, dict[str, Any]]]:
        refs = _easy_refs(split, turns)
        generate = {
            "questions": _easy_questions,
            "conversations": _easy_conversations,
            "captions": _easy_captions,
            **{name: functools.partial(_easy_questions, answers=of) for name, of in easy_vqa.KINDS.items()},
        }
        rows = _easy_pictures(split, refs) if holds_items(_config(self)) else generate[_config(self)](turns, refs)
        yield from _noted(self, split, rows)


def _easy_refs(split: str, turns: Iterable[int]) -> dict[int, BuiltRef]:
    return {number: BuiltRef(IMAGE_MARK, f"{split}/{number}", row) for row, number in enumerate(sorted(turns))}


def _easy_pictures(split: str, refs: Mapping[int, BuiltRef]) -> Iterator[dict[str, Any]]:
    paths = easy_vqa.pictures(split)
    return (_item_row(refs[number].key, Path(paths[number]).read_bytes()) for number in sorted(refs))


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def _easy_questions(turns, refs, *, answers: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """answers: only questions with these; none: all."""
    for number in sorted(turns):
        for n, (question, answer) in enumerate(turns[number]):
            if answers and answer not in answers:
                continue
            ref = refs[number]
            yield _row(f"{ref.key}/{n}", _talk(f"<image>\n{question}", answer), [ref])


def _easy_conversations(turns, refs) -> Iterator[dict[str, Any]]:
    for number in sorted(turns):
        first, *rest = [text for turn in turns[number] for text in turn]
        yield _row(refs[number].key, _talk(f"<image>\n{first}", *rest), [refs[number]])


def _easy_captions(turns, refs) -> Iterator[dict[str, Any]]:
    for number in sorted(turns):
        caption = easy_vqa.caption(turns[number])
        if caption:
            yield _row(refs[number].key, _talk("<image>\nDescribe the image.", caption), [refs[number]])


class Sounds(_Builder, skip_registration=True):
    """Conversations about sounds that packages make: a row of `made_sounds.FAMILIES`."""

    VERSION = tfds.core.Version("1.0.0")
    family = ""

    def check_packages(self) -> None:
        """Raises a MoextendError where what it is made of is not installed."""
        family = FAMILIES[self.family]
        next(family.sounds(family.splits[0]))

    def _split_generators(self, dl_manager):
        self.check_packages()  # before anything is written
        return {split: self._generate_examples(split) for split in FAMILIES[self.family].splits}

    def _generate_examples(self, split) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from _noted(self, split, _sound_rows(self.family, _config(self), split))


def _sound_rows(name: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    family = FAMILIES[name]
    pictures = _easy_refs(split, easy_vqa.asked(split, of=name)) if family.has_pictures else {}
    if config == "images":
        yield from _easy_pictures(split, pictures)
    elif holds_items(config):
        for row, sound in enumerate(family.sounds(split)):
            yield _item_row(f"{split}/{row}", sound.encoded)
    else:
        for talk in family.talks[config](split, family.labels(split)):
            refs = [BuiltRef(family.mark, f"{split}/{talk.sound}", talk.sound)]
            refs += [] if talk.picture is None else [pictures[talk.picture]]
            yield _row(talk.id, _talk(talk.human, talk.gpt), refs)


def _of_family(name: str) -> type[Sounds]:
    family = FAMILIES[name]
    items = ("images", config_of(family.mark)) if family.has_pictures else (config_of(family.mark),)
    configs = [tfds.core.BuilderConfig(name=config, description=name) for config in (*family.talks, *items)]
    own = {"family": name, "BUILDER_CONFIGS": configs}
    return type(name.title().replace("_", ""), (Sounds,), own, skip_registration=True)


NO_ITEM = ""
"""The id of a placeholder row, written if no entry has an item: TFDS refuses an empty split."""


class Conversations(_Builder, skip_registration=True):
    """Conversations of one split in files of any form, one row per entry; the config of a `mark` has one row per item
    of it that they name or hold. `paths` and `beside` (`Files`) are wanted only until it is built."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = _configs(conversations="one row per entry")
    paths: tuple[Path, ...] = ()
    beside = True
    split = "train"
    mark = IMAGE_MARK

    def _split_generators(self, dl_manager):
        return {self.split: self._generate_examples(read_entries(*self.paths, beside=self.beside))}

    def _generate_examples(self, entries: Iterable[Entry]) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = _items(entries, self.mark) if holds_items(_config(self)) else _rows(entries)
        yield from _noted(self, self.split, rows)


def items_builder(mark: str, **options: Any) -> Conversations:
    config = config_of(mark)
    if config != "images":
        config = tfds.core.BuilderConfig(name=config, description=f"one row per file of {mark}")
    builder = Conversations(config=config, **options)
    builder.mark = mark
    return builder


def _rows(entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
    rows: dict[str, dict[str, int]] = {}  # of each mark, by the names of items
    for entry in entries:
        refs = []
        for mark, name in entry.items:
            of_mark = rows.setdefault(mark, {})
            refs.append(BuiltRef(mark, name, of_mark.setdefault(name, len(of_mark))))
        yield _row(entry.id, entry.turns, refs, entry.fault)


def _items(entries: Iterable[Entry], mark: str) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for entry in entries:
        for item in entry.items:
            if item.mark == mark and item.name not in seen:
                seen.add(item.name)
                yield _item_row(item.name, entry.contents.get(item.name))
    if not seen:
        yield _item_row(NO_ITEM, None)


def scan(files: Files, folder: ItemFolder, media: Mapping[str, Medium]) -> Iterator[Fault]:
    """Faults of the entries, then of the items' files as far as they show without reading any."""
    names: dict[str, dict[str, None]] = {medium.mark: {} for medium in media.values()}
    for entry in read_entries(*files.paths, beside=files.beside):
        for mark, name in entry.items:
            if mark in names and name not in entry.contents:
                names[mark][name] = None
        if entry.fault is not None:
            yield entry.fault
        marks, where = (item.mark for item in entry.items), f"entry {entry.number} (id {entry.id})"
        if (fault := unknown_medium(entry.id, marks, media, where=where)) is not None:
            yield fault
    for medium in media.values():
        looked = folder.look(names[medium.mark], KINDS[medium.kind].noun)
        yield from (file for file in looked if isinstance(file, Fault))


# --- built files ------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """Files that TFDS built, opened: rows by number, faults of entries, a hash of the rows' contents, how many rows
    hold a file, and by the marks of items other than images the first row that has one."""

    rows: Any
    faults: list[Fault]
    fingerprint: str
    stored: int
    marks: Mapping[str, str] = {}


def is_built(builder: tfds.core.DatasetBuilder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def build(builder: tfds.core.DatasetBuilder) -> None:
    """Builds the data set if it is not there yet; waits if another process builds it."""
    if not is_built(builder):
        with alone(Path(builder.data_path)):
            if not is_built(builder):
                tfds.disable_progress_bar()
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(verify_ssl=True))
    if not builder.info.initialized:  # built since this builder looked
        builder.info.read_from_directory(builder.data_path)


def open_built(builder: Any, split: str, *, name: str) -> Built:
    """Builds the files where they are not there yet; `name` is the data set's, for messages. Where the split was built
    under another of its names, it is found under that."""
    build(builder)
    base = base_split(split)
    same = [other for other in builder.info.splits if SPLITS.get(other, other) == SPLITS.get(base, base)]
    if base not in same and len(same) == 1:
        split, base = same[0] + split[len(base) :], same[0]
    if any(base_split(part) != base for part in split.split("+")):  # items would be looked up among those of the first
        raise MoextendError(f"data set {name}: {split!r} is of several splits; take one, or slices of one")
    try:
        rows = builder.as_data_source(split=split)
    except ValueError as error:
        splits = builder.info.splits
        rows = f"; {base} has {splits[base].num_examples} rows" if base in splits else ""
        raise MoextendError(f"data set {name} has no split {split!r}; there are {', '.join(splits)}{rows}") from error
    notes = builder.info.metadata[base]
    faults = [Fault(*fault) for fault in notes["faults"].values()]
    return Built(rows, faults, notes["fingerprint"], notes["stored"], notes.get("marks", {}))


def build_all(wanted: Iterable[tuple[str, str]], *, data_dir: Path) -> None:
    """Builds the missing ones of these data sets (family and config), one per core at a time, if the sounds of two or
    more must be made: one core takes over a minute for those of `configs/continual.py`. Else nothing is built here:
    opening a data set builds it."""

    def missing(of: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(family, config) for family, config in of if not is_built(packaged(family, config, data_dir))]

    wanted = list(dict.fromkeys(wanted))
    sounds = missing(of for of in wanted if of[0] in FAMILIES and holds_items(of[1]))
    if len(sounds) < 2 or machine.cores() < 2:
        return
    # In processes, since eSpeak and a C library's random numbers have one state in each; spawned, for JAX has threads.
    with ProcessPoolExecutor(machine.cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        ordered = dict.fromkeys([*sounds, *missing(wanted)])  # what takes longest first
        for future in [pool.submit(_build_packaged, *of, data_dir) for of in ordered]:
            future.result()


def packaged(family: str, config: str, data_dir: Path | str) -> EasyVqa | Sounds:
    """The builder of a data set that comes with a package."""
    return BUILDERS[family](config=config, data_dir=data_dir, file_format="array_record")


def _build_packaged(family: str, config: str, data_dir: Path) -> None:
    build(packaged(family, config, data_dir))


BUILDERS: Mapping[str, type[EasyVqa | Sounds]] = {
    "easy_vqa": EasyVqa,
    **{name: _of_family(name) for name in FAMILIES},
}
"""By the names of data sets that come with a package."""
