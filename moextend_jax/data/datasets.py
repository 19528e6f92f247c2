"""Data sets as random-access rows: built once into ArrayRecord files by TFDS builders that need no TensorFlow.

Goes in: a name, a split, a folder for the built files and, for LLaVA's data, the manual folder. Comes out:
`Source`: rows `Example(id, conversations, images)`, and the encoded image files behind them, each stored once.

An example refers to its images by key and row number; their bytes are read only when asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax.config import MoextendError
from moextend_jax.data.builders import BUILDERS, ImageRef, Llava


class Example(NamedTuple):
    id: str
    conversations: list[dict[str, str]]
    images: tuple[ImageRef, ...]


class EncodedImage(NamedTuple):
    key: str
    encoded: bytes


@dataclass(frozen=True)
class Images(Sequence[EncodedImage]):
    """Encoded image files by row number; picklable."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> EncodedImage:
        item = self.rows[int(row)]
        return EncodedImage(item["id"].decode(), bytes(item["image"]))


@dataclass(frozen=True, kw_only=True)
class Source(Sequence[Example]):
    """Rows of a data set, or some of them: `select` and `hold_out` make views, not copies. Picklable."""

    rows: Any
    images: Images
    picked: np.ndarray | None = None

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


def _example(item: Mapping[str, Any]) -> Example:
    refs = zip(item["images"], item["image_rows"], strict=True)
    return Example(
        item["id"].decode(),
        json.loads(item["conversations"]),
        tuple(ImageRef(key.decode(), int(row)) for key, row in refs),
    )


class HoldOut(NamedTuple):
    held_out: Source
    rest: Source


def select(source: Source, rows: Sequence[int] | np.ndarray) -> Source:
    """A view of the given rows, in the given order."""
    rows = np.asarray(rows, np.int64)
    return replace(source, picked=rows if source.picked is None else source.picked[rows])


def hold_out(source: Source, *, samples: int, seed: int) -> HoldOut:
    """Splits off `samples` random rows; both parts keep the source's order."""
    if not 0 < samples < len(source):
        raise MoextendError(f"cannot hold out {samples} of {len(source)} rows; choose between 1 and {len(source) - 1}")
    chosen = np.zeros(len(source), bool)
    chosen[np.random.default_rng(seed).choice(len(source), samples, replace=False)] = True
    return HoldOut(select(source, np.flatnonzero(chosen)), select(source, np.flatnonzero(~chosen)))


def open_dataset(
    name: str, *, split: str = "train", data_dir: Path | str, manual_dir: Path | str | None = None
) -> Source:
    """Opens `easy_vqa/{questions,conversations,captions}`, `llava_pretrain` or `llava_instruct`.

    Builds the files under `data_dir` on first use. `split` is `train` (easy_vqa: or `test`) or a slice of it,
    e.g. `train[:1000]`. LLaVA's data are read from `manual_dir`: the JSON file, and the image folder beside it.

    Raises:
      MoextendError: unknown name or split, missing package, missing or malformed manual files, no rows.
    """
    family, _, config = name.partition("/")
    if family not in BUILDERS:
        raise MoextendError(f"no data set {name!r}; there are {', '.join(sorted(BUILDERS))}")
    builder = BUILDERS[family]
    configs = [known for known in builder.builder_configs if known != "images"]
    config = config or configs[0]
    if config not in configs:
        raise MoextendError(f"data set {family} has no rows {config!r}; there are {', '.join(configs)}")
    data_dir = Path(data_dir)
    if issubclass(builder, Llava):
        json_path = builder.find_json(manual_dir)
        # Another JSON file must never find the rows built from this one.
        stat = json_path.stat()
        mark = f"{json_path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        data_dir = data_dir / hashlib.sha256(mark.encode()).hexdigest()[:12]
    rows = _open(builder, config, split, data_dir, manual_dir)
    images = _open(builder, "images", split.partition("[")[0], data_dir, manual_dir)
    if len(images) == 1 and not images[0]["image"]:
        images = ()
    if not len(rows):
        raise MoextendError(f"data set {name} has no rows in split {split!r}")
    return Source(rows=rows, images=Images(images))


def open_text(path: Path | str) -> list[str]:
    """The lines of a UTF-8 file, one passage each; blank lines are left out."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise MoextendError(f"cannot read text {path}: {error}") from error
    if not any(lines):
        raise MoextendError(f"text {path} has no passages; write one per line")
    return [line for line in lines if line]


def _open(builder_class, config: str, split: str, data_dir: Path, manual_dir) -> Any:
    builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
    if not (builder.data_path / "dataset_info.json").exists():
        download = tfds.download.DownloadConfig(manual_dir=manual_dir, verify_ssl=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
    try:
        return builder.as_data_source(split=split)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise MoextendError(f"data set {builder.name} has no split {split!r}; there are {known}") from error
