"""TFDS builders that need no TensorFlow: easy-VQA, and conversations in files of any form, as ArrayRecord files.

Goes in: the installed `easy_vqa` package, or files of `data/forms.py`. Comes out: per config, rows `{id, conversations
(JSON), images (keys), image_rows}`; config `images` has `{id, image (encoded), span (JSON)}`, one row per image, so
that no image is stored again for each of its questions. Image files, and pictures in tar files (`span`), are not
copied: `image` is empty there, and they are read where they are. Pictures that stand in rows of a table are stored.

A faulty entry is built as a row without content, and its `Fault` goes into the metadata of the built files, so that
policies can change without building again. There too: a hash of the rows of each split, and how many of them hold a
picture.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax.config import MoextendError
from moextend_jax.data.entries import Content, read_entries
from moextend_jax.data.faults import Fault
from moextend_jax.data.forms import Files
from moextend_jax.data.image_files import ImageFolder
from moextend_jax.data.shards import Span


class ImageRef(NamedTuple):
    """`key` names an image for ever (caches use it), `row` is its place in config `images` of the same split."""

    key: str
    row: int


def _info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
    # Text features hold raw bytes without any TensorFlow.
    if _config(builder) == "images":
        features = {name: tfds.features.Text() for name in ("id", "image", "span")}
    else:
        features = {
            "id": tfds.features.Text(),
            "conversations": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Text()),
            "image_rows": tfds.features.Sequence(np.int64),
        }
    # Row numbers of images must be the order in which they were generated; the pipeline shuffles later.
    return tfds.core.DatasetInfo(
        builder=builder,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(),
    )


def _row(
    id: str, conversations: list[dict[str, str]], images: Sequence[ImageRef], fault: Fault | None = None
) -> dict[str, Any]:
    talk = conversations if fault is None else {"fault": written(fault), "turns": conversations}
    return {
        "id": id,
        "conversations": json.dumps(talk),
        "images": [ref.key for ref in images],
        "image_rows": np.array([ref.row for ref in images], np.int64),
    }


def _image_row(key: str, content: Content | None) -> dict[str, Any]:
    """None: it is a file, read where it is."""
    span = json.dumps(content) if isinstance(content, Span) else ""
    return {"id": key, "image": content if isinstance(content, bytes) else b"", "span": span}


def written(fault: Fault) -> list[str]:
    """A fault in JSON."""
    return [str(fault), fault.kind, fault.id]


def _noted(
    builder: tfds.core.DatasetBuilder, split: str, rows: Iterable[tuple[dict[str, Any], Fault | None]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows, numbered; `fingerprint`, `faults` (by row) and `stored` of the split go into the metadata when all have
    passed.

    The fingerprint is of contents alone: it is the same wherever the files lie, whenever they were written.
    """
    digest, faults, stored = hashlib.sha256(), {}, 0
    for number, (row, fault) in enumerate(rows):
        if fault is not None:
            faults[str(number)] = written(fault)
        stored += bool(row.get("image"))
        digest.update(_identity(row, fault))
        yield number, row
    assert builder.info.metadata is not None
    notes = {"fingerprint": digest.hexdigest(), "faults": faults, "stored": stored}
    builder.info.metadata[split] = notes  # pyright: ignore[reportIndexIssue]


def _identity(row: dict[str, Any], fault: Fault | None) -> bytes:
    if "image" in row:
        return json.dumps([row["id"], hashlib.sha256(row["image"]).hexdigest()]).encode()
    talk = json.loads(row["conversations"])
    if fault is not None:  # its message names the file
        talk = [fault.kind, talk["turns"]]
    return json.dumps([row["id"], talk, row["images"]]).encode()


def _config(builder: tfds.core.DatasetBuilder) -> str:
    assert builder.builder_config is not None
    return builder.builder_config.name


def _configs(**described: str) -> list[tfds.core.BuilderConfig]:
    described["images"] = "one row per image file"
    return [tfds.core.BuilderConfig(name=name, description=text) for name, text in described.items()]


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """Questions on pictures of one coloured shape, from the `easy_vqa` package (MIT licence)."""

    VERSION = tfds.core.Version("1.2.0")
    url_infos = None  # nothing is downloaded; TFDS's own search for checksums needs an undeclared package
    BUILDER_CONFIGS = _configs(
        questions="one row per question",
        conversations="one row per image, with all its questions as turns",
        captions="one row per image, with a description of it",
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self)

    def _split_generators(self, dl_manager):
        if importlib.util.find_spec("easy_vqa") is None:
            raise MoextendError("data set easy_vqa needs the package easy-vqa; pip install easy-vqa")
        import easy_vqa

        return {
            "train": self._generate_examples("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
            "test": self._generate_examples("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
        }

    def _generate_examples(self, split, questions, paths) -> Iterator[tuple[int, dict[str, Any]]]:
        turns: dict[int, list[tuple[str, str]]] = {}
        for question, answer, number in zip(*questions, strict=True):
            turns.setdefault(number, []).append((question, answer))
        refs = {number: ImageRef(f"{split}/{number}", row) for row, number in enumerate(sorted(turns))}
        generate = {
            "questions": _easy_questions, "conversations": _easy_conversations, "captions": _easy_captions
        }  # fmt: skip
        if _config(self) == "images":
            rows = (_image_row(refs[n].key, Path(paths[n]).read_bytes()) for n in sorted(turns))
        else:
            rows = generate[_config(self)](turns, refs)
        yield from _noted(self, split, ((row, None) for row in rows))


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def _easy_questions(turns, refs) -> Iterator[dict[str, Any]]:
    for number in sorted(turns):
        for n, (question, answer) in enumerate(turns[number]):
            ref = refs[number]
            yield _row(f"{ref.key}/{n}", _talk(f"<image>\n{question}", answer), [ref])


def _easy_conversations(turns, refs) -> Iterator[dict[str, Any]]:
    for number in sorted(turns):
        first, *rest = [text for turn in turns[number] for text in turn]
        yield _row(refs[number].key, _talk(f"<image>\n{first}", *rest), [refs[number]])


def _easy_captions(turns, refs) -> Iterator[dict[str, Any]]:
    for number in sorted(turns):
        caption = easy_caption(turns[number])
        if caption:
            yield _row(refs[number].key, _talk("<image>\nDescribe the image.", caption), [refs[number]])


SHAPES = {"circle", "rectangle", "triangle"}
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def easy_caption(turns: Sequence[tuple[str, str]]) -> str | None:
    """What an image's own questions and answers say of it: "a blue triangle", "a triangle", "a blue shape"."""
    true: set[str] = set()
    for question, answer in turns:
        words = set(re.findall(r"\w+", question))
        if answer not in ("yes", "no"):
            true |= words | {answer}
        elif (answer == "yes") != bool(words & {"no", "not"}):
            true |= words
    shape, colour = sorted(true & SHAPES), sorted(true & COLOURS)
    if not shape and not colour:
        return None
    return " ".join(["a", *colour[:1], *(shape[:1] or ["shape"])])


NO_IMAGE = ""
"""The id of the only row of `images` where no entry has one: TFDS refuses an empty split."""


class Conversations(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Conversations of one split in files of any form, one row per entry; `images` has one row per image that they name
    or hold. `paths` are wanted only until it is built."""

    VERSION = tfds.core.Version("1.2.0")
    url_infos = None
    BUILDER_CONFIGS = _configs(conversations="one row per entry")
    paths: tuple[Path, ...] = ()
    split = "train"

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self)

    def _split_generators(self, dl_manager):
        return {self.split: self._generate_examples(self.paths)}

    def _generate_examples(self, paths: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from _noted(self, self.split, _images(paths) if _config(self) == "images" else _rows(paths))


def _rows(paths: Sequence[Path]) -> Iterator[tuple[dict[str, Any], Fault | None]]:
    refs: dict[str, ImageRef] = {}
    for entry in read_entries(*paths):
        images = [refs.setdefault(name, ImageRef(name, len(refs))) for name in entry.images]
        yield _row(entry.id, entry.turns, images, entry.fault), entry.fault


def _images(paths: Sequence[Path]) -> Iterator[tuple[dict[str, Any], None]]:
    seen: set[str] = set()
    for entry in read_entries(*paths):
        for name in entry.images:
            if name not in seen:
                seen.add(name)
                yield _image_row(name, entry.contents.get(name)), None
    if not seen:
        yield _image_row(NO_IMAGE, None), None


def scan(files: Files, images: ImageFolder) -> Iterator[Fault]:
    """Faults of the entries, then of the image files as far as they show without reading any."""
    names: dict[str, None] = {}
    for entry in read_entries(*files.paths):
        names |= dict.fromkeys(name for name in entry.images if name not in entry.contents)
        if entry.fault is not None:
            yield entry.fault
    yield from (file for file in images.look(names) if isinstance(file, Fault))


# --- built files ------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """Files that TFDS built, opened: rows by number, faults of entries, a hash of the rows' contents, and how many rows
    hold a picture."""

    rows: Any
    faults: list[Fault]
    fingerprint: str
    stored: int


def is_built(builder: tfds.core.DatasetBuilder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def open_built(builder: Any, split: str) -> Built:
    """Builds the files where they are not there yet."""
    if not is_built(builder):
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(verify_ssl=True))
    try:
        rows = builder.as_data_source(split=split)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise MoextendError(f"data set {builder.name} has no split {split!r}; there are {known}") from error
    notes = builder.info.metadata[split.partition("[")[0]]
    return Built(rows, [Fault(*fault) for fault in notes["faults"].values()], notes["fingerprint"], notes["stored"])


BUILDERS: Mapping[str, type[tfds.core.GeneratorBasedBuilder]] = {"easy_vqa": EasyVqa}
"""By the names of data sets that come with a package."""
