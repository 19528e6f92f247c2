"""Reads every row and every item of data sets once, in parallel, and says what is wrong with them.

Goes in: `Reading`s (which stages read which data how) and `Origin`s (where the rows are). Comes out: a `Report` per
reading. The text of one chunk after another and the names of items are all that is held in memory.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moextend_jax.config import Medium, MoextendError, Named
from moextend_jax.data import inspector
from moextend_jax.data.builders import BUILDERS
from moextend_jax.data.datasets import ItemRef, Source, family_of, is_packaged, item_folder, open_dataset
from moextend_jax.data.entries import Entry, ItemName, read_entries
from moextend_jax.data.forms import base_split, files_of, parts_of
from moextend_jax.data.inspector import Inspector, ItemFile, PlacedFault, Reading, RowsOf, Work
from moextend_jax.data.shared_memory import check_shared_memory
from moextend_jax.faults import KINDS, STRICT, too_many
from moextend_jax.media import IMAGE_MARK, IMAGES_ALONE
from moextend_jax.media import KINDS as KINDS_OF_MEDIA
from moextend_jax.settings import FaultSettings

ROWS, ITEMS = 256, 32
"""Rows and items of one task: what a process is sent at a time."""
SHOWN = 5
"""First faults of a kind that a report names."""


# --- where rows are ---------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where the rows of a data set are.

    entries: called, gives all entries from the first on. files: reads items by the names that entries have.
    items: the name of the set of items; origins with one name share it. cut: whether the entries are those of the
    reading's slice already, not of the whole split.
    """

    entries: Callable[[], Iterator[Entry]]
    files: Any
    items: str
    cut: bool = False


class BuiltFiles(NamedTuple):
    """Items of a data set that was built. refs: (noun, key) of an item of its rows -> where it is, which is the same in
    all data sets of one family and split."""

    source: Source
    refs: dict[tuple[str, str], ItemRef]

    def read(self, name: str, noun: str = "image") -> bytes:
        ref = self.refs[noun, name]
        return self.source.items[ref.medium][ref.row].encoded


def open_origin(
    reading: Reading,
    *,
    data_dir: Path,
    manual_dir: Path | str | None = None,
    images: Path | str | None = None,
    media: Named[Medium] = IMAGES_ALONE,
    faults: FaultSettings = STRICT,
) -> Origin:
    """Files are read where they are, so that nothing need be built to check them. A mixture has an origin for each of
    its parts."""
    parts_of(reading.data)  # says what is wrong with one
    if not is_packaged(reading.data):
        files = files_of(reading.data, split=reading.split, manual_dir=manual_dir, images=images, known=BUILDERS)
        home = item_folder(files, faults)
        return Origin(lambda: read_entries(*files.paths, beside=files.beside), home, f"{home.path} of {files.paths[0]}")
    source = open_dataset(reading.data, split=reading.split, data_dir=data_dir, media=media, faults=faults)
    nouns = {name: KINDS_OF_MEDIA[medium.kind].noun for name, medium in source.media.items()}
    refs = {(nouns[ref.medium], ref.key): ref for example in source for ref in example.items}
    of_split = f"{family_of(reading.data)[0]} {base_split(reading.split)}"
    return Origin(lambda: _entries(source), BuiltFiles(source, refs), of_split, cut=True)


def _entries(source: Source) -> Iterator[Entry]:
    for number, example in enumerate(source):
        names = tuple(ItemName(source.media[ref.medium].mark, ref.key) for ref in example.items)
        yield Entry(number, example.id, names, example.conversations, example.fault)


def _wanted(reading: Reading, origin: Origin) -> Callable[[int], bool]:
    """Which entries are in the reading's slice."""
    split = base_split(reading.split)
    if origin.cut or reading.split == split:
        return lambda number: True
    total = sum(1 for _ in origin.entries())
    info = tfds.core.SplitInfo(name=split, shard_lengths=[total], num_bytes=0)  # pyright: ignore[reportCallIssue]
    try:
        parts = tfds.core.ReadInstruction.from_spec(reading.split).to_absolute({split: info})
    except (ValueError, KeyError) as error:
        raise MoextendError(
            f"data set {reading.data} has no split {reading.split!r}; {split} has {total} rows"
        ) from error
    ranges = [(part.from_ or 0, total if part.to is None else part.to) for part in parts]
    return lambda number: any(first <= number < end for first, end in ranges)


# --- what was found ---------------------------------------------------------------------------------------------------


class ReportedFault(NamedTuple):
    """A fault as a report names it: the number and the id of its entry; of an item, the number of the first entry that
    has it, and the item's name as `id`."""

    entry: int
    id: str
    message: str


@dataclass(kw_only=True)
class Report:
    """`first` are the first faults of each kind; `skipped` counts conversations, each once."""

    reading: Reading
    rows: int = 0
    items: Counter[str] = field(default_factory=Counter)
    """Number of different items, by mark."""
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[ReportedFault]] = field(default_factory=dict)
    skipped: int = 0
    tied: bool = False
    """Whether all rows share items, directly or by way of other rows."""
    error: str | None = None
    """Why the rest could not be read."""
    repeats: float = 1.0
    """How often a mixture has each row in an epoch."""
    mixture: list[Report] = field(default_factory=list, repr=False, compare=False)
    """The reports of all data sets of the mixture."""

    @property
    def images(self) -> int:
        return self.items[IMAGE_MARK]

    def ok(self, faults: FaultSettings) -> bool:
        refused = any(faults.policy(kind) == "error" for kind in self.counts)
        return self.error is None and not refused and not self.too_many(faults)

    def too_many(self, faults: FaultSettings) -> bool:
        """Whether training would skip too many conversations, or every one; for a mixture, of all its data sets."""
        of = self.mixture or [self]
        skipped, rows = (sum(getattr(one, count) * one.repeats for one in of) for count in ("skipped", "rows"))
        return 0 < rows == skipped or too_many(skipped, rows, faults)


@dataclass
class _Items:
    """Items of one set. places: item -> its number, in order of appearance; faults: number -> its fault, if any."""

    places: dict[ItemName, int] = field(default_factory=dict)
    faults: dict[int, PlacedFault] = field(default_factory=dict)


@dataclass
class _Rows:
    """What is gathered of a reading while its rows go by. faulty: kinds of faults by entry number. shows: arrays
    `[n, 2]` of pairs (entry number, item number)."""

    report: Report
    faulty: dict[int, set[str]] = field(default_factory=dict)
    shows: list[np.ndarray] = field(default_factory=list)


def check(
    readings: Sequence[Reading],
    *,
    open_origin: Callable[[Reading], Origin],
    work: Work,
    faults: FaultSettings,
    processes: int,
    tell: Callable[[str, int, int], None] = lambda what, rows, items: None,
) -> list[Report]:
    """A report for each reading, of a mixture for each of its data sets; one that cannot be opened or read on is one
    with an `error`.

    Args:
      processes: 0 works in this one.
      tell: called with a data set's name, and the rows and items done so far.
    """
    mixtures = [[Report(reading=part) for part in _parts(reading)] for reading in readings]
    mixed = [reading.data for reading in readings]
    reports = [report for of in mixtures for report in of]
    readings = [report.reading for report in reports]
    opened: dict[tuple[str, str], tuple[Origin, list[int]]] = {}
    for n, reading in enumerate(readings):
        key = (reading.data, reading.split if is_packaged(reading.data) else base_split(reading.split))
        try:
            if key not in opened:
                opened[key] = (open_origin(reading), [])
            opened[key][1].append(n)
        except MoextendError as error:
            reports[n].error = str(error)
    files: dict[str, Any] = {}
    for origin, _ in opened.values():
        if isinstance(origin.files, BuiltFiles) and origin.items in files:
            origin.files.refs.update(files[origin.items].refs)
        files[origin.items] = origin.files
    work = replace(work, readings=tuple(readings), files=files, cut=faults.policy("long_sound") == "keep")
    items: dict[str, _Items] = {name: _Items() for name in files}
    gathered = {n: _Rows(reports[n]) for _, which in opened.values() for n in which}
    with _Pool(work, processes) as pool:
        for (name, split), (origin, which) in opened.items():
            try:
                wanted = {n: _wanted(readings[n], origin) for n in which}
                done = partial(_tell, tell, f"{name} {split}".strip(), Counter())
                pool.run(_tasks(origin, wanted, gathered, items[origin.items], done))
            except MoextendError as error:
                for n in which:
                    reports[n].error = str(error)
    for origin, which in opened.values():
        for n in which:
            _finish(gathered[n], items[origin.items], faults)
    for data, of in zip(mixed, mixtures, strict=True):
        if len(of) > 1:
            _weigh(data, of)
    return reports


def _weigh(data: str, mixture: list[Report]) -> None:
    """Fills in `mixture` and `repeats` of the reports of a mixture: how often it repeats each row (`mixing.picks`)."""
    weights = [part.weight for part in parts_of(data)]
    longest = max(report.rows / (weight or 1) for report, weight in zip(mixture, weights, strict=True))
    for report, weight in zip(mixture, weights, strict=True):
        report.mixture = mixture
        report.repeats = weight * longest / max(report.rows, 1) if weight else 1.0


def _parts(reading: Reading) -> list[Reading]:
    try:
        return [replace(reading, data=part.name) for part in parts_of(reading.data)]
    except MoextendError:
        return [reading]  # to be refused when it is opened


def _tell(tell: Callable[[str, int, int], None], name: str, told: Counter[str], kind: str, count: int) -> None:
    told[kind] += count
    tell(name, told["rows"], told["items"])


class Task(NamedTuple):
    """A call of an `Inspector`: `method(items, what)`. `take` is called with the faults that it returns."""

    method: str
    items: Sequence[Any]
    what: Any
    take: Callable[[list[PlacedFault]], None]


def _tasks(
    origin: Origin,
    wanted: Mapping[int, Callable[[int], bool]],
    gathered: Mapping[int, _Rows],
    items: _Items,
    done: Callable[[str, int], None],
) -> Iterator[Task]:
    new: list[ItemFile] = []
    entries: list[Entry] = []

    def of_items() -> Task:
        files = new[:]
        new.clear()

        def take(faults: list[PlacedFault]) -> None:
            places = (items.places[ItemName(*files[fault.place][:2])] for fault in faults)
            items.faults.update(zip(places, faults, strict=True))
            done("items", len(files))

        return Task("items", files, origin.items, take)

    def of_rows() -> Iterator[Task]:
        for n, is_wanted in wanted.items():
            chosen = [entry for entry in entries if is_wanted(entry.number)]
            shows = [(entry.number, items.places[item]) for entry in chosen for item in entry.items]
            gathered[n].shows.append(np.array(shows, np.int32).reshape(-1, 2))
            gathered[n].report.rows += len(chosen)
            ids = [(entry.number, entry.id) for entry in chosen]
            yield Task("rows", chosen, RowsOf(n, origin.items), _take_rows(gathered[n], ids))
        done("rows", len(entries))
        entries.clear()

    for entry in origin.entries():
        for item in entry.items:
            if item not in items.places:
                items.places[item] = len(items.places)
                new.append(ItemFile(*item, entry.contents.get(item.name)))
        # Pictures inside rows go with the items, a few at a time. Other items stay: the row's length depends on them.
        contents = {item.name: entry.contents.get(item.name) for item in entry.items if item.mark != IMAGE_MARK}
        entries.append(entry._replace(contents={name: file for name, file in contents.items() if file is not None}))
        if len(new) >= ITEMS:
            yield of_items()
        if len(entries) >= ROWS:
            yield from of_rows()
    yield from of_rows()
    yield of_items()


def _take_rows(rows: _Rows, ids: list[tuple[int, str]]) -> Callable[[list[PlacedFault]], None]:
    def take(faults: list[PlacedFault]) -> None:
        for place, kind, message in faults:
            number, id = ids[place]
            rows.report.counts[kind] += 1
            _note(rows.report, kind, ReportedFault(number, id, message))
            rows.faulty.setdefault(number, set()).add(kind)

    return take


def _note(report: Report, kind: str, fault: ReportedFault) -> None:
    """Keeps the first few in order of entries: chunks come back in any order."""
    report.first[kind] = sorted([*report.first.get(kind, []), fault])[:SHOWN]


def _finish(rows: _Rows, items: _Items, faults: FaultSettings) -> None:
    """Faults of items become those of the readings that have them."""
    report, names = rows.report, list(items.places)
    shows = np.concatenate(rows.shows) if rows.shows else np.zeros((0, 2), np.int32)
    numbers, first = np.unique(shows[:, 1], return_index=True)
    report.items = Counter(names[number].mark for number in numbers)
    report.tied = report.rows > 1 and _is_tied(shows, rows=report.rows)
    by_item = {int(item): int(shows[at, 0]) for item, at in zip(numbers, first, strict=True)}
    faulty = [item for item in sorted(items.faults) if item in by_item]
    for item in faulty:
        _, kind, message = items.faults[item]
        report.counts[kind] += 1
        _note(report, kind, ReportedFault(by_item[item], names[item].name, message))
    for number, item in shows[np.isin(shows[:, 1], faulty)]:
        rows.faulty.setdefault(int(number), set()).add(items.faults[int(item)].kind)
    report.skipped = sum(any(faults.policy(kind) == "skip" for kind in kinds) for kinds in rows.faulty.values())
    report.counts = Counter({kind: report.counts[kind] for kind in KINDS if report.counts[kind]})


def _is_tied(shows: np.ndarray, *, rows: int) -> bool:
    """Whether pairs (entry, item) tie all `rows` together; a row without an item is tied to none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    entries, entry = np.unique(shows[:, 0], return_inverse=True)
    if len(entries) < rows:
        return False
    total = rows + int(shows[:, 1].max()) + 1
    _, parts = connected_components(coo_array((np.ones(len(shows)), (entry, rows + shows[:, 1])), shape=(total, total)))
    return bool((parts[:rows] == parts[0]).all())


# --- processes --------------------------------------------------------------------------------------------------------


class _Pool:
    """Runs tasks, a few for each process at a time. One that ends its process (a crash in a decoder, no memory) is
    taken apart, and the item that does it is a fault."""

    def __init__(self, work: Work, processes: int):
        self.work, self.processes = work, processes
        self.inspector = None if processes else Inspector(work)
        self.executor = self._start(processes) if processes else None

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)

    def _start(self, processes: int) -> ProcessPoolExecutor:
        check_shared_memory("use --processes 0")
        # Not forked: the libraries that are loaded here have threads.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, mp_context=context, initializer=inspector.start, initargs=(self.work,))

    def run(self, tasks: Iterable[Task]) -> None:
        if self.inspector is not None:
            for task in tasks:
                task.take(getattr(self.inspector, task.method)(task.items, task.what))
            return
        waiting: deque[tuple[Task, Future]] = deque()
        for task in tasks:
            self._submit(task, waiting)
            while len(waiting) > 4 * self.processes:
                self._take(waiting)
        while waiting:
            self._take(waiting)

    def _submit(self, task: Task, waiting: deque[tuple[Task, Future]]) -> None:
        assert self.executor is not None
        try:
            waiting.append((task, self.executor.submit(inspector.do, task.method, task.items, task.what)))  # pyright: ignore
        except BrokenProcessPool:
            self._mend([*[earlier for earlier, _ in waiting], task])
            waiting.clear()

    def _take(self, waiting: deque[tuple[Task, Future]]) -> None:
        task, future = waiting.popleft()
        try:
            faults = future.result()
        except BrokenProcessPool:
            self._mend([task, *[later for later, _ in waiting]])
            waiting.clear()
            return
        task.take(faults)

    def _mend(self, tasks: list[Task]) -> None:
        """After a process has ended: what was under way is done again, one item at a time."""
        assert self.executor is not None
        self.executor.shutdown(cancel_futures=True)
        alone = self._start(1)
        for task in tasks:
            faults = []
            for place, item in enumerate(task.items):
                try:
                    of_item = alone.submit(inspector.do, task.method, [item], task.what).result()  # pyright: ignore
                    faults += [fault._replace(place=place) for fault in of_item]
                except BrokenProcessPool:
                    kind = "unreadable" if task.method == "items" else "entry"
                    name = item.name if isinstance(item, ItemFile) else item.id
                    faults.append(PlacedFault(place, kind, f"{name}: reading it ends the process that does it"))
                    alone = self._start(1)
            task.take(faults)
        alone.shutdown(cancel_futures=True)
        self.executor = self._start(self.processes)
