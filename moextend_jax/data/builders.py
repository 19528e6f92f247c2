"""TFDS builders that need no TensorFlow: easy-VQA and LLaVA's two mixes as ArrayRecord files.

Goes in: the installed `easy_vqa` package, or a manual folder with LLaVA's JSON file and images. Comes out: per
config, rows `{id, conversations (JSON), images (keys), image_rows}`; config `images` has `{id, image (encoded)}`,
one row per image file, so that no image is stored again for each of its questions. LLaVA's image files are not copied:
`image` is empty there, and they are read where they are.

A faulty entry of LLaVA's is built as a row without content, and its `Fault` goes into the metadata of the built files,
so that policies can change without building again. There too: a hash of the rows of each split.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax.config import MoextendError
from moextend_jax.data.entries import read_entries
from moextend_jax.data.faults import Fault
from moextend_jax.data.images import look


class ImageRef(NamedTuple):
    """`key` names an image for ever (caches use it), `row` is its place in config `images` of the same split."""

    key: str
    row: int


def _info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
    # Text features hold raw bytes without any TensorFlow.
    if _config(builder) == "images":
        features = {"id": tfds.features.Text(), "image": tfds.features.Text()}
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


def written(fault: Fault) -> list[str]:
    """A fault in JSON."""
    return [str(fault), fault.kind, fault.id]


def _noted(
    builder: tfds.core.DatasetBuilder, split: str, rows: Iterable[tuple[dict[str, Any], Fault | None]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows, numbered; `fingerprint` and `faults` (by row) of the split go into the metadata when all have passed.

    The fingerprint is of contents alone: it is the same wherever the files lie, whenever they were written.
    """
    digest, faults = hashlib.sha256(), {}
    for number, (row, fault) in enumerate(rows):
        if fault is not None:
            faults[str(number)] = written(fault)
        digest.update(_identity(row, fault))
        yield number, row
    assert builder.info.metadata is not None
    builder.info.metadata[split] = {"fingerprint": digest.hexdigest(), "faults": faults}  # pyright: ignore[reportIndexIssue]


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

    VERSION = tfds.core.Version("1.1.0")
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
            rows = ({"id": refs[n].key, "image": Path(paths[n]).read_bytes()} for n in sorted(turns))
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


class Llava(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """LLaVA's JSON `[{"id", "image"?, "conversations"}, ...]` with image paths relative to the manual folder or
    to its folder `images`; subclasses only name the file."""

    VERSION = tfds.core.Version("1.1.0")
    url_infos = None
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the JSON file and the image folder into the manual folder."
    BUILDER_CONFIGS = _configs(conversations="one row per entry of the JSON file")
    JSON_FILE = ""

    @classmethod
    def find_json(cls, manual_dir: Path | str | None) -> Path:
        if manual_dir is None:
            raise MoextendError(f"data set {cls.name} needs a manual folder with {cls.JSON_FILE} and its images")
        path = Path(manual_dir) / cls.JSON_FILE
        if not path.is_file():
            raise MoextendError(f"data set {cls.name}: no file {path}; download it there, the images beside it")
        return path

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(self.find_json(Path(dl_manager.manual_dir)))}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = _llava_images(path) if _config(self) == "images" else _llava_rows(path)
        yield from _noted(self, "train", rows)


def _llava_rows(path: Path) -> Iterator[tuple[dict[str, Any], Fault | None]]:
    refs: dict[str, ImageRef] = {}
    for entry in read_entries(path):
        images = [refs.setdefault(name, ImageRef(name, len(refs))) for name in entry.images]
        yield _row(entry.id, entry.turns, images, entry.fault), entry.fault


def _llava_images(path: Path) -> Iterator[tuple[dict[str, Any], None]]:
    names = dict.fromkeys(name for entry in read_entries(path) for name in entry.images)
    yield from (({"id": name, "image": b""}, None) for name in names or [NO_IMAGE])


def scan(path: Path) -> Iterator[Fault]:
    """Faults of the entries, then of the image files as far as they show without reading any."""
    names: dict[str, None] = {}
    for entry in read_entries(path):
        names |= dict.fromkeys(entry.images)
        if entry.fault is not None:
            yield entry.fault
    yield from (file for file in look(path.parent, names) if isinstance(file, Fault))


class LlavaPretrain(Llava):
    """558k image-caption pairs (LLaVA-Pretrain)."""

    JSON_FILE = "blip_laion_cc_sbu_558k.json"


class LlavaInstruct(Llava):
    """665k conversations (LLaVA-1.5's mix)."""

    JSON_FILE = "llava_v1_5_mix665k.json"


BUILDERS: Mapping[str, type[tfds.core.GeneratorBasedBuilder]] = {
    "easy_vqa": EasyVqa,
    "llava_pretrain": LlavaPretrain,
    "llava_instruct": LlavaInstruct,
}
