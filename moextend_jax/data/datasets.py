"""Data sets as random-access rows: built once into ArrayRecord files by TFDS builders that need no TensorFlow.

Goes in: a name or a path, or several with weights, a split, and a folder for the built files. Comes out: `Source`: rows
`Example(id, conversations, images)`, and the encoded images behind them.

An example refers to its images by key and row number; their bytes are read only when asked for. Image files are read
where they are, and looked at whenever the data set is opened: one that was mended is sound.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.data.builders import (
    BUILDERS,
    Conversations,
    ImageRef,
    is_built,
    open_built,
    scan,
)
from moextend_jax.data.conversations import talk_of
from moextend_jax.data.encoded_images import Images, look_at_images
from moextend_jax.data.faults import STRICT, Fault, refuse
from moextend_jax.data.forms import LLAVA, Files, base_split, files_of, parts_of
from moextend_jax.data.image_files import ImageFolder
from moextend_jax.data.mixing import JoinedImages, JoinedRows, fingerprint_of, picks
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.folders import absolute, folder, is_url
from moextend_jax.settings import KEEPABLE, FaultSettings


class Example(NamedTuple):
    """`fault` is what was wrong with it when the data set was built."""

    id: str
    conversations: list[dict[str, str]]
    images: tuple[ImageRef, ...]
    fault: Fault | None = None


AnyImages = Images | JoinedImages


@dataclass(frozen=True, kw_only=True)
class Source(Sequence[Example]):
    """Rows of a data set, or some of them: `select` and `hold_out` make views, not copies. Picklable.

    `fingerprint` is of what the rows say, and which and in which order they are; not of their images.
    """

    rows: Any
    images: AnyImages
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
    images = JoinedImages([source.images for source in sources])
    views = [_View(source) for source in sources]
    picked = None if weights is None else picks([len(view) for view in views], weights, names)
    identity = [[source.fingerprint for source in sources], None if weights is None else list(weights)]
    return Source(
        rows=JoinedRows(views, images.parts), images=images, picked=picked, fingerprint=fingerprint_of(identity)
    )


@dataclass(frozen=True)
class _View:
    """The picked rows of a source, as built rows."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def _row(self, index: int) -> int:
        return int(index if self.source.picked is None else self.source.picked[index])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source.rows[self._row(index)]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return self.source.rows.__getitems__([self._row(index) for index in indices])


def open_dataset(
    name: str,
    *,
    split: str = "train",
    data_dir: Path | str,
    manual_dir: Path | str | None = None,
    images: Path | str | None = None,
    faults: FaultSettings = STRICT,
) -> Source:
    """Opens what a setting `data` says: a name (`easy_vqa/{questions,conversations,captions}`, `llava_pretrain`,
    `llava_instruct`), a path (a file of any form of `data/forms.py`, a folder of them, a pattern), or several of these
    with commas between them, each with `:WEIGHT` or none.

    Builds rows under `data_dir` on first use; later only image files are looked at. Faulty entries and image files, the
    whole file's, are an error before anything is built where `faults` says so; the others are kept as faulty.

    Args:
      split: `train`, or another that the data have, or a slice, e.g. `train[:1000]`; of each data set.
      manual_dir: where LLaVA's files are.
      images: the folder that paths of images are relative to; None: the folder of the file that names them.

    Raises:
      MoextendError: unknown name or split, missing package, missing or malformed files, no rows.
      Fault: entries or image files that are not to be skipped; names the first few.
    """
    parts = parts_of(name)
    sources = [
        _open(part.name, split=split, data_dir=Path(data_dir), manual_dir=manual_dir, images=images, faults=faults)
        for part in parts
    ]
    if len(sources) == 1:
        return sources[0]
    weights = [part.weight for part in parts if part.weight is not None]
    return mix(sources, weights=weights or None, names=[part.name for part in parts])


def _open(
    name: str,
    *,
    split: str,
    data_dir: Path,
    manual_dir: Path | str | None,
    images: Path | str | None,
    faults: FaultSettings,
) -> Source:
    if is_packaged(name):
        family, config = family_of(name)
        builders = [
            BUILDERS[family](config=part, data_dir=data_dir, file_format="array_record") for part in (config, "images")
        ]
        rows = open_built(builders[0], split, name=name)
        stored = open_built(builders[1], base_split(split), name=name)
        pictures = Images(stored.rows, fingerprint=stored.fingerprint)
    else:
        files = files_of(name, split=split, manual_dir=manual_dir, known=BUILDERS)
        home = image_folder(files, images, faults)
        builders = _builders(files, data_dir, base_split(split))
        if not all(map(is_built, builders)):
            refuse(scan(files, home), faults, where=name, hint=HINT)
        rows = open_built(builders[0], split, name=name)
        pictures = look_at_images(open_built(builders[1], base_split(split), name=name), home, files.upright)
        refuse([*rows.faults, *pictures.faults.values()], faults, where=name, hint=HINT)
    if not len(rows.rows):
        raise MoextendError(f"data set {name} has no rows in split {split!r}")
    fingerprint = hashlib.sha256(f"{rows.fingerprint} {split}".encode()).hexdigest()
    return Source(rows=rows.rows, images=pictures, fingerprint=fingerprint)


def _builders(files: Files, data_dir: Path, split: str) -> list[Conversations]:
    """Those of rows and of images. Other files must never find what was built from these."""
    marks = []
    for path in files.paths:
        facts: Any = path.stat()
        size, time = (facts.length, facts.mtime) if is_url(path) else (facts.st_size, facts.st_mtime_ns)
        marks.append(f"{absolute(path)} {size} {time}")
    home = data_dir / hashlib.sha256("\n".join(marks).encode()).hexdigest()[:12]
    builders = [Conversations(config=part, data_dir=home, file_format="array_record") for part in PARTS]
    for builder in builders:
        builder.paths, builder.split = files.paths, split
    return builders


PARTS = ("conversations", "images")


def image_folder(files: Files, images: Path | str | None, faults: FaultSettings) -> ImageFolder:
    """Where the pictures are that the files name by path."""
    home = folder(os.fspath(images)) if images else files.home
    return ImageFolder(home, anywhere=faults.policy("outside") == "keep")


HINT = "; `moextend data check` names all"
CHUNK = 4096
"""Rows that are read at once."""


class Exchange(NamedTuple):
    """The first question of a conversation, its right answer, and what a system turn says before it."""

    question: str
    answer: str
    system: str = ""


def first_exchange(example: Example, *, tokenizer: Tokenizer) -> Exchange | Fault:
    """What can be asked of an example, or the fault for which training refuses or skips it, whatever its length.

    It costs little: texts are only encoded where they have control characters, which may stand for images.
    """
    if example.fault is not None and example.fault.kind not in KEEPABLE:
        return example.fault.again()
    try:
        talk = talk_of(example.conversations, example_id=example.id, images=len(example.images))
        texts = (talk.system, *(text for pair in talk.pairs for text in pair if text is not None))
        for text in filter(CONTROL.search, texts):
            tokenizer.encode(text)
    except Fault as fault:
        return fault
    except MoextendError as error:
        return Fault(f"example {example.id}: {error}", "reserved", example.id)
    question, answer = talk.pairs[0]
    assert answer is not None
    return Exchange(question, answer, talk.system)


CONTROL = re.compile("[\0-\x08\x0e-\x1f]")


def check_shows_images(source: Source, *, stage: str) -> None:
    """Raises where no conversation has an image: a stage that trains the projector alone would train nothing."""
    if not any(example.images for example in source):
        raise shows_no_image(stage, len(source))


def shows_no_image(stage: str, rows: int) -> MoextendError:
    return MoextendError(f"{stage} trains the projector, and none of its {rows} conversations has an image")


def is_packaged(name: str) -> bool:
    """Whether it is the name of a data set that comes with a package, and no path."""
    return name.partition("/")[0] in BUILDERS


def family_of(name: str) -> tuple[str, str]:
    """The builder and the config that such a name stands for."""
    family, _, config = name.partition("/")
    configs = [known for known in BUILDERS[family].builder_configs if known != "images"]
    config = config or configs[0]
    if config not in configs:
        raise MoextendError(f"data set {family} has no rows {config!r}; there are {', '.join(configs)}")
    return family, config


def short_name(data: str, split: str) -> str:
    """A folder's name for what is kept of a data set's images: a word of it, and what tells it from others."""
    if not is_packaged(data) and data not in LLAVA:
        words = re.sub(r"[^A-Za-z0-9]+", "-", Path(parts_of(data)[0].name).stem).strip("-")[:40]
        data = f"{words or 'data'}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
    return f"{data.partition('/')[0]}-{base_split(split)}"


def open_text(path: Path | str) -> list[str]:
    """The lines of a UTF-8 file, one passage each; blank lines are left out."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise MoextendError(f"cannot read text {path}: {error}") from error
    if not any(lines):
        raise MoextendError(f"text {path} has no passages; write one per line")
    return [line for line in lines if line]
