"""Data sets as random-access rows: built once into ArrayRecord files by TFDS builders that need no TensorFlow.

Goes in: a name, a split, a folder for the built files and, for LLaVA's data, the manual folder. Comes out:
`Source`: rows `Example(id, conversations, images)`, and the encoded image files behind them.

An example refers to its images by key and row number; their bytes are read only when asked for. LLaVA's image files
are read where they are, and looked at whenever the data set is opened: one that was mended is sound.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax.config import MoextendError
from moextend_jax.data.builders import BUILDERS, NO_IMAGE, ImageRef, Llava, scan
from moextend_jax.data.conversations import pairs_of
from moextend_jax.data.faults import STRICT, Fault, refuse
from moextend_jax.data.images import look, read_image
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.settings import KEEPABLE, FaultSettings


class Example(NamedTuple):
    """`fault` is what was wrong with it when the data set was built."""

    id: str
    conversations: list[dict[str, str]]
    images: tuple[ImageRef, ...]
    fault: Fault | None = None


class EncodedImage(NamedTuple):
    key: str
    encoded: bytes


@dataclass(frozen=True)
class Images(Sequence[EncodedImage]):
    """Encoded image files by row number; picklable.

    `faults`: what was wrong with some when the data set was opened. `folder` has the files that rows name; None where
    the rows hold them. `fingerprint` changes when any image does: by the bytes of stored ones, by the names, sizes and
    times of files in a folder (and the bytes of `SAMPLED` of them), wherever the folder is.
    """

    rows: Any
    faults: Mapping[int, Fault] = field(default_factory=dict)
    folder: Path | None = None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, row: int) -> None:
        if row in self.faults:
            raise self.faults[row].again()

    def __getitem__(self, row: Any) -> EncodedImage:
        """Raises a `Fault` whose id is the key where the image cannot be read."""
        self.check(int(row))
        item = self.rows[int(row)]
        key = item["id"].decode()
        return EncodedImage(key, bytes(item["image"]) if self.folder is None else read_image(self.folder, key))


@dataclass(frozen=True, kw_only=True)
class Source(Sequence[Example]):
    """Rows of a data set, or some of them: `select` and `hold_out` make views, not copies. Picklable.

    `fingerprint` is of what the rows say, and which and in which order they are; not of their images.
    """

    rows: Any
    images: Images
    picked: np.ndarray | None = None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.rows) if self.picked is None else len(self.picked)

    def __getitem__(self, index: Any) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _example(self.rows[int(index if self.picked is None else self.picked[index])])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Many rows at once, at a fraction of the cost per row."""
        rows = np.asarray(indices) if self.picked is None else self.picked[indices]
        return [_example(item) for item in self.rows.__getitems__([int(row) for row in rows])]

    def __iter__(self) -> Iterator[Example]:
        """All in order, a chunk at a time in memory."""
        for first in range(0, len(self), CHUNK):
            yield from self.read(range(first, min(first + CHUNK, len(self))))


def _example(item: Mapping[str, Any]) -> Example:
    refs = zip(item["images"], item["image_rows"], strict=True)
    talk, fault = json.loads(item["conversations"]), None
    if isinstance(talk, dict):
        talk, fault = talk["turns"], Fault(*talk["fault"])
    return Example(item["id"].decode(), talk, tuple(ImageRef(key.decode(), int(row)) for key, row in refs), fault)


class HoldOut(NamedTuple):
    held_out: Source
    rest: Source


def select(source: Source, rows: Sequence[int] | np.ndarray) -> Source:
    """A view of the given rows, in the given order."""
    rows = np.asarray(rows, "<i8")
    fingerprint = hashlib.sha256(source.fingerprint.encode() + rows.tobytes()).hexdigest()
    return replace(source, picked=rows if source.picked is None else source.picked[rows], fingerprint=fingerprint)


def hold_out(source: Source, *, samples: int, seed: int) -> HoldOut:
    """Splits off `samples` random rows; both parts keep the source's order."""
    if not 0 < samples < len(source):
        raise MoextendError(f"cannot hold out {samples} of {len(source)} rows; choose between 1 and {len(source) - 1}")
    chosen = np.zeros(len(source), bool)
    chosen[np.random.default_rng(seed).choice(len(source), samples, replace=False)] = True
    return HoldOut(select(source, np.flatnonzero(chosen)), select(source, np.flatnonzero(~chosen)))


def open_dataset(
    name: str,
    *,
    split: str = "train",
    data_dir: Path | str,
    manual_dir: Path | str | None = None,
    faults: FaultSettings = STRICT,
) -> Source:
    """Opens `easy_vqa/{questions,conversations,captions}`, `llava_pretrain` or `llava_instruct`.

    Builds the files under `data_dir` on first use. `split` is `train` (easy_vqa: or `test`) or a slice of it,
    e.g. `train[:1000]`. LLaVA's data are read from `manual_dir`: the JSON file once, the image folder beside it
    always. Faulty entries and image files of it, the whole file's, are an error before anything is built where `faults`
    says so; the others are kept as faulty.

    Raises:
      MoextendError: unknown name or split, missing package, missing or malformed manual files, no rows.
      Fault: entries or image files that are not to be skipped; names the first few.
    """
    family, config = family_of(name)
    builder = BUILDERS[family]
    data_dir = Path(data_dir)
    json_path = None
    if issubclass(builder, Llava):
        json_path = builder.find_json(manual_dir)
        # Another JSON file must never find the rows built from this one.
        stat = json_path.stat()
        mark = f"{json_path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        data_dir = data_dir / hashlib.sha256(mark.encode()).hexdigest()[:12]
    parts = [builder(config=part, data_dir=data_dir, file_format="array_record") for part in (config, "images")]
    if json_path is not None and not all(map(_is_built, parts)):
        refuse(scan(json_path), faults, where=str(json_path), hint=HINT)
    rows = _open(parts[0], split, manual_dir)
    if not len(rows.rows):
        raise MoextendError(f"data set {name} has no rows in split {split!r}")
    stored = _open(parts[1], split.partition("[")[0], manual_dir)
    images = Images(stored.rows, {}, fingerprint=stored.fingerprint)
    if json_path is not None:
        images = _in_folder(stored.rows, json_path.parent)
        refuse([*rows.faults, *images.faults.values()], faults, where=str(json_path), hint=HINT)
    fingerprint = hashlib.sha256(f"{rows.fingerprint} {split}".encode()).hexdigest()
    return Source(rows=rows.rows, images=images, fingerprint=fingerprint)


HINT = "; `moextend data check` names all"
CHUNK = 4096
"""Rows that are read at once."""
SAMPLED = 64
"""Image files whose bytes are in a folder's fingerprint: where archives set all times to one, a folder with other
pictures of the same names and sizes still has another."""


def _in_folder(rows: Any, folder: Path) -> Images:
    """The images that the rows name, as they are now: one question to the file system for each, few are read."""
    chunks = (range(first, min(first + CHUNK, len(rows))) for first in range(0, len(rows), CHUNK))
    names = [item["id"].decode() for chunk in chunks for item in rows.__getitems__(list(chunk))]
    if names == [NO_IMAGE]:
        return Images(())
    digest, faults = hashlib.sha256(), {}
    for row, file in enumerate(look(folder, names)):
        if isinstance(file, Fault):
            faults[row] = file
        state = file.kind if isinstance(file, Fault) else [file.st_size, file.st_mtime_ns]
        digest.update(json.dumps([names[row], state]).encode())
    for row in range(0, len(names), -(-len(names) // SAMPLED)):
        with contextlib.suppress(Fault):
            digest.update(hashlib.sha256(read_image(folder, names[row])).digest())
    return Images(rows, faults, folder, digest.hexdigest())


class Exchange(NamedTuple):
    """The first question of a conversation, and its right answer."""

    question: str
    answer: str


def first_exchange(example: Example, *, tokenizer: Tokenizer) -> Exchange | Fault:
    """What can be asked of an example, or the fault for which training refuses or skips it, whatever its length.

    It costs little: texts are only encoded where they have control characters, which may stand for images.
    """
    if example.fault is not None and example.fault.kind not in KEEPABLE:
        return example.fault.again()
    try:
        pairs = pairs_of(example.conversations, example_id=example.id, images=len(example.images))
        for text in (text for pair in pairs for text in pair if CONTROL.search(text)):
            tokenizer.encode(text)
    except Fault as fault:
        return fault
    except MoextendError as error:
        return Fault(f"example {example.id}: {error}", "reserved", example.id)
    return Exchange(*pairs[0])


CONTROL = re.compile("[\0-\x08\x0e-\x1f]")


def check_shows_images(source: Source, *, stage: str) -> None:
    """Raises where no conversation has an image: a stage that trains the projector alone would train nothing."""
    if not any(example.images for example in source):
        raise shows_no_image(stage, len(source))


def shows_no_image(stage: str, rows: int) -> MoextendError:
    return MoextendError(f"{stage} trains the projector, and none of its {rows} conversations has an image")


def family_of(name: str) -> tuple[str, str]:
    """The builder and the config that a data set's name stands for."""
    family, _, config = name.partition("/")
    if family not in BUILDERS:
        raise MoextendError(f"no data set {name!r}; there are {', '.join(sorted(BUILDERS))}")
    configs = [known for known in BUILDERS[family].builder_configs if known != "images"]
    config = config or configs[0]
    if config not in configs:
        raise MoextendError(f"data set {family} has no rows {config!r}; there are {', '.join(configs)}")
    return family, config


def open_text(path: Path | str) -> list[str]:
    """The lines of a UTF-8 file, one passage each; blank lines are left out."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise MoextendError(f"cannot read text {path}: {error}") from error
    if not any(lines):
        raise MoextendError(f"text {path} has no passages; write one per line")
    return [line for line in lines if line]


class Built(NamedTuple):
    """Files that TFDS built, opened: rows by number, faults of entries, and a hash of the rows' contents."""

    rows: Any
    faults: list[Fault]
    fingerprint: str


def _is_built(builder: tfds.core.DatasetBuilder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def _open(builder: Any, split: str, manual_dir: Any) -> Built:
    if not _is_built(builder):
        download = tfds.download.DownloadConfig(manual_dir=manual_dir, verify_ssl=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
    try:
        rows = builder.as_data_source(split=split)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise MoextendError(f"data set {builder.name} has no split {split!r}; there are {known}") from error
    notes = builder.info.metadata[split.partition("[")[0]]
    return Built(rows, [Fault(*fault) for fault in notes["faults"].values()], notes["fingerprint"])
