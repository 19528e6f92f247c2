"""TABLE of the forms of files that data may have, and where the files of a data set are.

Goes in: what `--data` says: names, paths, patterns, with weights. Comes out: `Part`s of it, and the `Files` of each.
Another form is another row of `FORMS`; what a row of a file may say is `data/talks.py`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.json_values import Row, read_json
from moextend_jax.data.shards import read_tar
from moextend_jax.data.tables import read_arrow, read_csv, read_parquet
from moextend_jax.folders import folder, is_url, reading

Form = Callable[[Path], Iterator[Row]]
"""Reads a file's rows."""
FORMS: dict[str, Form] = {
    ".json": read_json,  # a list of objects, or one object after another
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,  # as Hugging Face's save_to_disk writes it
    ".tar": read_tar,  # a WebDataset shard
}
"""By the end of the file's name."""

LLAVA = {"llava_pretrain": "blip_laion_cc_sbu_558k.json", "llava_instruct": "llava_v1_5_mix665k.json"}
"""LLaVA's own files by the names that its instructions give them; in the manual folder."""


def form_of(path: Path) -> Form:
    if path.suffix.lower() not in FORMS:
        raise MoextendError(f"{path}: data are read from {', '.join(FORMS)}, or a folder of such files")
    return FORMS[path.suffix.lower()]


# --- what was asked for -----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A data set of a mixture, and its share of the conversations; None: all of them, once."""

    name: str
    weight: float | None = None


def parts_of(text: str) -> list[Part]:
    """`a.json:0.7,b.parquet:0.3`, or one name or path."""
    if not text:
        raise MoextendError("no data is named; say --data FILE, and --images FOLDER for its pictures")
    if "," in text and "://" not in text and os.path.exists(text):
        return [Part(text)]
    parts = [_part(part.strip()) for part in re.split(r",(?![^{]*\})", text)]
    if len(parts) > 1 and 0 < sum(part.weight is None for part in parts) < len(parts):
        raise MoextendError(f"data = {text!r}: give every data set a weight, or none")
    return parts


def _part(text: str) -> Part:
    name, mark, number = text.rpartition(":")
    if not text or (mark and not name):
        raise MoextendError(f"data has an empty name in it: {text!r}")
    try:
        weight = float(number)
    except ValueError:
        return Part(text)
    if not mark or ("://" not in text and os.path.exists(text)):
        return Part(text)
    if not 0 < weight < math.inf:
        raise MoextendError(f"data = {text!r}: a weight must be above 0")
    return Part(name, weight)


def base_split(split: str) -> str:
    """`train` of `train[:100]`."""
    return re.split(r"[\[+]", split)[0]


# --- where it is ------------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """A data set's files in order; the folder that names of items are relative to; whether pictures are turned upright
    (LLaVA's own never were); and whether what a file names lies beside it, not in a folder of images."""

    paths: tuple[Path, ...]
    home: Path
    upright: bool = True
    beside: bool = True


def folder_above(paths: Iterable[Path]) -> Path:
    """The nearest that all of the files are below."""
    first, *others = {path.parent for path in paths}
    return next(above for above in (first, *first.parents) if all(other.is_relative_to(above) for other in others))


def files_of(
    name: str,
    *,
    split: str = "train",
    manual_dir: Path | str | None = None,
    images: Path | str | None = None,
    known: Iterable[str] = (),
) -> Files:
    """The files of one split of a data set.

    Args:
      name: one of `LLAVA`, or a path: a file, a folder, or a pattern (`x-{000..003}.tar`, `x-*.parquet`).
      images: the folder that paths of items are relative to; None: the folder of the file that names them.
      known: other names that there are, for the message.
    """
    if name in LLAVA:
        if manual_dir is None:
            raise MoextendError(f"data set {name} needs a manual folder with {LLAVA[name]} and its images")
        path = folder(os.fspath(manual_dir)) / LLAVA[name]
        with reading(path):
            exists = path.is_file()
        if not exists:
            raise MoextendError(f"data set {name}: no file {path}; download it there, the images beside it")
        paths, upright = {"train": [path]}, False
    else:
        with reading(name):
            paths, upright = _splits(name, sorted([*known, *LLAVA])), True
    wanted = base_split(split)
    if SPLITS.get(wanted, wanted) not in paths:
        raise MoextendError(f"data set {name} has no split {split!r}; there are {', '.join(paths)}")
    chosen = paths[SPLITS.get(wanted, wanted)]
    for path in chosen:
        form_of(path)
    home = folder(os.fspath(images)) if images else folder_above(chosen)
    if images and not is_url(home) and not home.is_dir():
        raise MoextendError(f"there is no folder {images} of images; --images names it")
    return Files(tuple(chosen), home, upright, beside=not images)


def _splits(name: str, known: list[str]) -> dict[str, list[Path]]:
    path = folder(name)
    if any(character in path.name for character in "*?{"):
        paths = _matching(path)
        if not paths:
            raise MoextendError(f"no file is called {name}")
        return {"train": paths}
    if path.is_file():
        return {"train": [path]}
    if not path.is_dir():
        raise MoextendError(f"no data set {name!r}, and no such file; there are {', '.join(known)}, or give a path")
    if (path / "dataset_dict.json").is_file():
        return {split: _saved(path / split) for split in _names(path / "dataset_dict.json", "splits")}
    if (path / "state.json").is_file():
        return {"train": _saved(path)}
    return _by_split(path)


def _matching(path: Path) -> list[Path]:
    """Files of a pattern in the last part of the path: `{000..127}`, `{a,b}`, `*`, `?`."""
    choices = []
    for literal, braces in re.findall(r"([^{]+)|\{([^}]*)\}", path.name):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
        if numbers:
            first, last = numbers.groups()
            if int(last) - int(first) > MOST_FILES:
                raise MoextendError(f"{path} names more than {MOST_FILES} files")
            choices.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append([literal] if literal else braces.split(","))
    paths = []
    for name in map("".join, itertools.product(*choices)):
        paths += sorted(path.parent.glob(name)) if any(c in name for c in "*?") else [path.parent / name]
    for file in paths:
        if not file.is_file():
            raise MoextendError(f"no file {file}, which {path.name} names")
    return paths


MOST_FILES = 1_000_000


def _saved(path: Path) -> list[Path]:
    """The files of a data set that `datasets` saved, in its order."""
    names = _names(path / "state.json", "_data_files")
    return [path / Path(name).name for name in names]


def _names(path: Path, key: str) -> list[str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))[key]
        names = [item["filename"] if isinstance(item, dict) else item for item in listed]
        if not names or not all(isinstance(name, str) and name and "/" not in name for name in names):
            raise ValueError("no list of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MoextendError(f"{path} does not name its {key.strip('_')}: {error}") from error
    return names


SPLITS = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
"""Other names of a split."""
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "package.json", "config.json")
SPLIT_NAME = r"^(train|test|validation|valid|val|dev|eval)(?![a-z])"
DEPTH = 3
"""Levels of folders that are looked through."""


def _by_split(path: Path) -> dict[str, list[Path]]:
    """Files of a folder by the split that their names or folders say: `train-00000-of-00002.parquet`,
    `data/test/0.tar`, `metadata.jsonl` (train)."""
    files = list(_below(path, DEPTH))
    metadata = [file for file in files if file.stem == "metadata"]  # beside pictures, as ImageFolder has it
    files = metadata or files
    forms = sorted({file.suffix.lower() for file in files})
    if len(forms) != 1:
        what = f"files of {len(forms)} forms, {', '.join(forms)}: name those that are meant" if forms else "no data"
        raise MoextendError(f"{path} holds {what}; data are files in {', '.join(FORMS)}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = os.fspath(file)[len(os.fspath(path)) :].lower().split("/")
        words = [word for part in reversed(parts) for word in re.findall(SPLIT_NAME, part)]
        split = words[0] if words else "train"
        splits.setdefault(SPLITS.get(split, split), []).append(file)
    return splits


def _below(path: Path, depth: int) -> Iterator[Path]:
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or file.name in NOT_DATA:
            continue
        if file.suffix.lower() in FORMS:
            yield file
        elif depth > 1 and not file.suffix and file.is_dir():
            yield from _below(file, depth - 1)
