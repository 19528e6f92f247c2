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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax.config import MoextendError
from moextend_jax.data.builders import BUILDERS, ImageRef, Llava, scan
from moextend_jax.data.faults import STRICT, Fault, refuse
from moextend_jax.settings import FaultSettings


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
    """Encoded image files by row number; picklable. `faults`: what was wrong with some when they were built."""

    rows: Any
    faults: Mapping[int, Fault] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, row: int) -> None:
        if row in self.faults:
            raise self.faults[row].again()

    def __getitem__(self, row: Any) -> EncodedImage:
        """Raises a `Fault` whose id is the key where the image could not be built."""
        self.check(int(row))
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
    talk, fault = json.loads(item["conversations"]), None
    if isinstance(talk, dict):
        talk, fault = talk["turns"], Fault(*talk["fault"])
    return Example(item["id"].decode(), talk, tuple(ImageRef(key.decode(), int(row)) for key, row in refs), fault)


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
    name: str,
    *,
    split: str = "train",
    data_dir: Path | str,
    manual_dir: Path | str | None = None,
    faults: FaultSettings = STRICT,
) -> Source:
    """Opens `easy_vqa/{questions,conversations,captions}`, `llava_pretrain` or `llava_instruct`.

    Builds the files under `data_dir` on first use. `split` is `train` (easy_vqa: or `test`) or a slice of it,
    e.g. `train[:1000]`. LLaVA's data are read from `manual_dir`: the JSON file, and the image folder beside it.
    Faulty entries and image files of it, the whole file's, are an error before anything is built where `faults` says
    so; the others are kept as faulty.

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
    if json_path is not None and not all(map(_is_built, parts)):  # before a million images are copied
        refuse(scan(json_path), faults, where=str(json_path), hint="; `moextend data check` names all")
    rows = _open(parts[0], split, manual_dir, faults)
    images = _open(parts[1], split.partition("[")[0], manual_dir, faults)
    if len(images.rows) == 1 and not images.rows[0]["id"]:
        images = Built((), {})
    if not len(rows.rows):
        raise MoextendError(f"data set {name} has no rows in split {split!r}")
    return Source(rows=rows.rows, images=Images(images.rows, images.faults))


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
    rows: Any
    faults: dict[int, Fault]


def _is_built(builder: tfds.core.DatasetBuilder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def _open(builder: Any, split: str, manual_dir: Any, faults: FaultSettings) -> Built:
    if not _is_built(builder):
        download = tfds.download.DownloadConfig(manual_dir=manual_dir, verify_ssl=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
    recorded = (builder.info.metadata or {}).get("faults", {})
    found = {int(row): Fault(*fault) for row, fault in recorded.items()}
    hint = f" (so when it was built; to build it again delete {builder.data_path})"
    refuse(found.values(), faults, where=str(builder.data_path), hint=hint)
    try:
        return Built(builder.as_data_source(split=split), found)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise MoextendError(f"data set {builder.name} has no split {split!r}; there are {known}") from error
