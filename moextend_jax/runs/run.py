"""A run: settings and a work directory in, the pretrained parts on their mesh and what all commands share out.

WORKDIR holds config.json, data/, features/, a folder per result (`results.py`), summary.json, examples.json and
report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moextend_jax import distributed, machine, preemption
from moextend_jax.checkpoints import hashes, huggingface, quantising, train_state
from moextend_jax.checkpoints.leaves import read_sharded
from moextend_jax.checkpoints.loading import folder_of, open_base, tokenizer_folder
from moextend_jax.checkpoints.source import Source
from moextend_jax.config import IMAGE, RECIPES, ModelConfig, MoextendError
from moextend_jax.data.batches import Share
from moextend_jax.data.tokenizer import Tokenizer, tokenizer_of
from moextend_jax.data.writing import encoder_of, template_identity
from moextend_jax.folders import absolute, folder, is_url, reading, written_whole
from moextend_jax.lock import locked
from moextend_jax.mesh import Rows, check_rows, make_mesh, own_row_shards, row_shards
from moextend_jax.models.moextend import abstract
from moextend_jax.outside import read_object
from moextend_jax.progress import preparing
from moextend_jax.runs import results
from moextend_jax.runs.media import with_media
from moextend_jax.settings import RunSettings, decisive, from_config_dict, without_effect
from moextend_jax.sharding import parameter_shardings
from moextend_jax.train import sinks

Arrays = dict[str, jax.Array]

FOLDERS = ("base", "vision", "data_dir", "manual_dir", "images")
"""Settings that name folders; towers of media do, too."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Run:
    """What all commands share: the pretrained parts, read once, and where everything lies."""

    settings: RunSettings
    workdir: Path
    config: ModelConfig
    tokenizer: Tokenizer
    pretrained: Arrays
    base_hash: str
    mesh: jax.sharding.Mesh
    towers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Hashes of the towers of media other than pictures, whose tower the base's hash covers."""
    resume_from: Path | None = None
    """A checkpoint of another work directory; the stage that it belongs to starts from it."""

    def __repr__(self) -> str:
        names = ", ".join(name for name in self.table.results if self.has(name)) or "nothing"
        return f"Run({str(self.workdir)!r}, base={self.settings.base!r}, made: {names})"

    @property
    def table(self) -> results.Table:
        """What the run can hold, and its models."""
        return results.table(self.settings)

    @property
    def share(self) -> Share:
        """This process's rows of every batch."""
        return Share(own_row_shards(self.mesh), row_shards(self.mesh))

    @property
    def facts(self) -> dict[str, Any]:
        """What every checkpoint of this run must agree on."""
        facts = facts_of_base(self.base_hash, self.settings)
        prompt = template_identity(self.tokenizer, self.settings.recipe)
        return facts | {"recipe": facts["recipe"] | {"prompt": prompt}, "tags": list(self.tokenizer.tags.ids)}

    def facts_of(self, name: str, **more: Any) -> dict[str, Any]:
        """What a checkpoint of a result must agree on: `facts`, and all else that decides what it computes."""
        row = self.table.result(name)
        medium = self.settings.link(row.extension).medium
        if medium in self.towers:
            more = {"tower": self.towers[medium], **more}
        if medium:
            of = as_json(dataclasses.asdict(self.config.media[medium]))
            more = {"medium": {field: of[field] for field in ("projector", "frames", "join", "seconds")}, **more}
        decisive = ["seed", "aux_coefficient", "dtype", "train_dtype", "expert_storage"]
        if (row.grown and row.how == "train") or self.table.grown(row.parents):  # else there is no extension yet
            decisive += ["text_isolation", "composition"]
        if self.settings.expert_storage != "as_is":
            decisive.append("expert_group")
        return self.facts | {
            "stage": name,
            "run": {setting: getattr(self.settings, setting) for setting in decisive},
            "parents": {parent: self.result_identity(parent) for parent in row.parents},
            **more,
        }

    def result_identity(self, name: str) -> str:
        facts = train_state.result_facts(self.folder(name) / "result")
        if facts is None:
            raise not_run(self.workdir, name)
        return facts["identity"]

    def has(self, name: str) -> bool:
        """Whether a result is there, whole."""
        return train_state.has_step(self.folder(name) / "result")

    def folder(self, name: str) -> Path:
        """Where a result lies."""
        return results.folder_of(self.workdir, name)


def open_run(settings: RunSettings, workdir: Path | str) -> Run:
    """Joins the other processes, if any, and reads the pretrained decoder and tower onto the mesh."""
    workdir = folder(os.fspath(workdir))
    distributed.start(cpu_devices=cpu_devices(settings))
    _check_alike(settings)
    distributed.check_shared(workdir)
    mesh = make_mesh(settings.mesh)
    with preparing(f"opening {settings.base}"):
        source = open_base(settings.base, settings.vision, feature_layer=settings.recipe.feature_layer)
    for note in source.notes if distributed.first() else ():
        print(f"moextend: {settings.base}: {note}", file=sys.stderr)
    tokenizer = tokenizer_of_base(settings, source)
    with preparing("opening towers"):
        source = with_media(source, settings, tokenizer)
    check_same_files(source, where=settings.base)
    config = dataclasses.replace(source.config, **settings.model_options)
    quantising.check(config.decoder, config.quantised, mesh)
    tokenizer = dataclasses.replace(tokenizer, others=config.media)
    with preparing(f"reading {settings.base}"):
        leaves = quantising.stored(source.leaves, config.quantised)
        pretrained = read_sharded(leaves, parameter_shardings(abstract(config), mesh), dtype=settings.dtype)
    with preparing(f"hashing {settings.base}"):
        digest, towers = distributed.from_first(lambda: hashes_of(source))
    return Run(
        settings=settings,
        workdir=workdir,
        config=config,
        tokenizer=tokenizer,
        pretrained=pretrained,
        base_hash=digest,
        towers=towers,
        mesh=mesh,
    )


def _check_alike(settings: RunSettings) -> None:
    """Refuses several processes with other settings than process 0's: each would compile another program. Only FOLDERS
    and those of towers may have other names on other hosts."""
    found = _flat(settings)
    free = {*FOLDERS, *(f"media.{name}.tower" for name in settings.media)}
    distributed.check_same(
        {name: value for name, value in found.items() if name not in free},
        "not every process was started with the same settings: give all of them the same command and configuration",
    )


def _flat(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, also those inside others, by their path."""
    fields = jax.tree_util.tree_flatten_with_path(as_json(dataclasses.asdict(value)))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): field for path, field in fields}


def check_same_files(source: Source, *, where: Path | str) -> None:
    """Refuses several processes that have other files of a model: their parts of it would be of several models."""
    if jax.process_count() > 1:
        distributed.check_same(
            hashes.samples(source.leaves, source.files.values()) | _flat(source.config),
            f"{where}: not every process has the same files: give all hosts the same folder, or whole copies of it",
        )


SMALL, LEAST_ROWS = 2**16, 8
"""Entries of a matrix up to which cores share its work badly; fewest rows of a CPU device. See docs/benchmarks.md."""


def cpu_devices(settings: RunSettings) -> int:
    """XLA devices to make of a CPU: the setting, if given. If the base's experts are small and the mesh splits rows
    over all devices: as many, up to one per core, as divide all batches into LEAST_ROWS rows or more. Else one."""
    if settings.cpu_devices or not _devices_share_rows(settings):
        return settings.cpu_devices or 1
    rows = rows_of_settings(settings)
    return max(n for n in range(1, machine.cores() + 1) if n == 1 or all(of.rows == _rows_for(of, n) for of in rows))


def idle_cores(settings: RunSettings, devices: int) -> str:
    """Batch sizes with which twice as many CPU devices would have work, in words; "" where these are not what is
    lacking."""
    more = 2 * devices
    if settings.cpu_devices or more > machine.cores() or not _devices_share_rows(settings):
        return ""
    needed = {of.setting: _rows_for(of, more) for of in rows_of_settings(settings) if of.rows != _rows_for(of, more)}
    wanted = ", ".join(f"{setting} = {rows}" for setting, rows in needed.items())
    return f"; cores left idle: {machine.cores() - devices}; {more} devices need {wanted}" if wanted else ""


def _rows_for(of: Rows, devices: int) -> int:
    """The next number of rows that so many CPU devices share in LEAST_ROWS or more each."""
    step = of.parts * devices
    return step * max(LEAST_ROWS, -(-of.rows // step))


def _devices_share_rows(settings: RunSettings) -> bool:
    """Whether a CPU is split among rows: its mesh says so, and the base's experts are small."""
    if settings.mesh.get("data") != -1 or not machine.only_cpu():
        return False
    path = folder_of(settings.base) / "config.json"
    try:
        with reading(path):
            if not path.exists():
                return False
        decoder = huggingface.read_decoder_config(path.parent)
    except MoextendError:  # it holds more than a decoder, or `open_base` says what is wrong with it
        return False
    return decoder.width * decoder.hidden <= SMALL


def hashes_of(source: Source) -> tuple[str, dict[str, str]]:
    """The hash of the base (decoder and picture tower), and those of the towers of other media, by medium."""
    base, parts = hashes.base_hashes(source.leaves)
    names = {f"media/{name}": name for name in source.config.media if name != IMAGE}
    return base, {names[part]: digest for part, digest in parts.items() if part in names}


def tokenizer_of_base(settings: RunSettings, source: Source) -> Tokenizer:
    """The tokenizer of the opened base `source`. A base without a template for the recipe is an error here: it is not
    the fault of a single conversation."""
    tokenizer = tokenizer_of(tokenizer_folder(settings.base), source.config, ends=source.ends)
    encoder_of(tokenizer, settings.recipe)
    return tokenizer


@contextlib.contextmanager
def working(
    settings: RunSettings, workdir: Path, *, rows: Iterable[Rows] | None = None, resume_from: Path | None = None
) -> Iterator[Run]:
    """A run that may write: alone in its work directory, and told when its machine is to be taken away.

    Args:
      rows: batch sizes that the mesh must divide; None: all that the settings name, checked before anything is trained.
      resume_from: a checkpoint of another work directory.

    Raises:
      MoextendError: another run is there, rows of a stage do not divide, or `resume_from` holds no checkpoint.
      Preempted: inside, at any place.
    """
    if rows is None:
        sinks.check(settings.sinks, workdir)
    distributed.start(cpu_devices=cpu_devices(settings))
    mesh = make_mesh(settings.mesh)
    check_rows(rows_of_settings(settings) if rows is None else list(rows), mesh)
    for line in without_effect(settings) if rows is None and distributed.first() else ():
        print(f"moextend: {line}", file=sys.stderr)
    if rows is None and distributed.first() and jax.default_backend() == "cpu":
        idle = idle_cores(settings, len(mesh.local_devices)) if jax.process_count() == 1 else ""
        print(f"CPU: {machine.on_cpu(len(mesh.local_devices))}{idle}")
    with locked(workdir):
        (preemption.listen if jax.process_count() == 1 else preemption.pass_on)()
        if resume_from is not None:
            train_state.facts_at(resume_from)
        try:
            yield dataclasses.replace(open_run(settings, workdir), resume_from=resume_from)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(left_in(workdir)) from None


def left_in(workdir: Path) -> str:
    """What an interrupted command leaves in a work directory, in words."""
    standing = []
    settings = None
    with contextlib.suppress(MoextendError):  # of a folder that is not there yet
        settings = settings_of(workdir)
    for name in (results.FIRST if settings is None else results.table(settings)).training():
        folder = results.folder_of(workdir, name)
        if train_state.has_step(folder / "result"):
            standing.append(name)
        elif steps := train_state.steps_in(folder / "checkpoints"):
            standing.append(f"{name} until step {max(steps)}")
    if not standing:
        return f"no stage had saved anything in {workdir}: the same command starts afresh"
    return f"kept in {workdir}: {', '.join(standing)}; the same command goes on from there"


def rows_of_settings(settings: RunSettings) -> list[Rows]:
    """Every number of rows that a run computes together, in any of its stages and in evaluation."""
    rows = results.table(settings).results
    stages = [(name, results.group_of(settings, name)) for name, row in rows.items() if row.settings]
    rows = [Rows(f"{name}.batch_size", stage.batch_size, getattr(stage, "accumulate", 1)) for name, stage in stages]
    return rows + evaluation_rows(settings)


def evaluation_rows(settings: RunSettings) -> list[Rows]:
    """The batch sizes of `moextend evaluate` alone."""
    names = [results.named(settings, link.name, "evaluate") for link in settings.links]
    rows = [Rows(f"{name}.batch_size", results.group_of(settings, name).batch_size) for name in names]
    return [*rows, Rows("evaluate.text_batch_size", settings.evaluate.text_batch_size)]


def facts_of_base(base: str, settings: RunSettings) -> dict[str, Any]:
    """What a checkpoint must agree on, as far as it can be said without the base's tokenizer."""
    recipe = dataclasses.asdict(settings.recipe) | {"global_batch": None}
    del recipe["prompt"]  # what it stands for lies with the tokenizer
    return {"base": base, "recipe": recipe}


def not_run(workdir: Path, name: str) -> MoextendError:
    return MoextendError(f"{name} has not been run in {workdir}: run `moextend {name}` with this --workdir first")


# --- what a work directory remembers ----------------------------------------------------------------------------------


def remember(run: Run, *, made: Collection[str] | None = None) -> None:
    """Keeps the settings in WORKDIR/config.json, for the report and for `generate`. A summary.json of other settings
    becomes summary_before.json.

    Only what worked is worth remembering: call it after a command, so that a refused one changes nothing.

    Args:
      made: results that the command made, None: all. Stages of others that are there keep the settings that they were
        trained with: a command that does not train them may be given other ones.
    """
    settings, known = found_anywhere(run.settings), None
    with contextlib.suppress(MoextendError):  # of another version, or damaged: it is written anew
        known = settings_of(run.workdir)
    if known is not None and made is not None:
        there = [name for name in results.table(settings).training() if (run.folder(name) / "stage.json").exists()]
        trained = {name for name in there if name in results.table(known).results}.difference(made or ())
        settings = results.with_stages(settings, {name: results.stage_of(known, name) for name in trained})
    before, now = (of and decisive(dataclasses.asdict(of)) for of in (known and found_anywhere(known), settings))
    summary = run.workdir / "summary.json"
    if before != now and distributed.first() and summary.exists():
        summary.replace(summary.with_name("summary_before.json"))
        print(f"moextend: {summary} is of other settings: it is summary_before.json now", file=sys.stderr)
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets", "numpy")
    record = {
        "settings": as_json(dataclasses.asdict(settings)),
        "workdir": os.fspath(absolute(run.workdir)),
        "recipe": "paper" if run.settings.recipe == RECIPES["paper"] else "other than the paper's",
        "seed": run.settings.seed,
        "model": as_json(dataclasses.asdict(run.config)),
        "base_hash": run.base_hash,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "devices": [str(device.device_kind) for device in jax.devices()],
    }
    write_json(run.workdir / "config.json", record)


def with_folders(settings: RunSettings, change: Callable[[str], str]) -> RunSettings:
    """The settings with each folder of this machine that they name changed."""

    def changed(name: str) -> str:
        return name if name in ("", "none", "embedded") or is_url(name) else change(name)

    folders = {field: changed(getattr(settings, field)) for field in FOLDERS}
    media = {name: dataclasses.replace(of, tower=changed(of.tower)) for name, of in settings.media.items()}
    return dataclasses.replace(settings, media=media, **folders)


def found_anywhere(settings: RunSettings) -> RunSettings:
    """The settings with the folders by their whole paths: a later command may be started in another folder."""
    return with_folders(settings, lambda name: os.path.abspath(os.path.expanduser(name)))


def moved_along(name: str, *, before: str, now: Path) -> str:
    """A folder that is gone from where it was, where it is if it has been moved together with the work directory."""
    if not os.path.isabs(name) or os.path.exists(name):
        return name
    there = os.path.abspath(now / os.path.relpath(name, before))
    return there if os.path.exists(there) else name


def remembered(workdir: Path) -> dict[str, Any]:
    """What `remember` wrote; nothing where config.json is a model's, or not there."""
    path = workdir / "config.json"
    attributes = read_object(path) if path.is_file() else {}
    return attributes if "settings" in attributes else {}


def settings_of(workdir: Path | str) -> RunSettings | None:
    """The settings that a work directory's stages were run with, and folders where they are if they were moved with it;
    None where the folder is no work directory.

    Raises:
      MoextendError: there is no such folder, or its config.json cannot be read.
    """
    workdir = folder(os.fspath(workdir))
    with reading(workdir):
        exists = workdir.exists()
    if not exists:
        raise MoextendError(f"{workdir} is no work directory: there is no such folder")
    record = remembered(workdir)
    if not record:
        return None
    settings = record["settings"]
    if isinstance(settings, dict) and isinstance(recipe := settings.get("recipe"), dict):
        settings = settings | {"recipe": {"weight_guard": train_state.BEFORE["weight_guard"]} | recipe}
    settings, before = from_config_dict(settings), record.get("workdir")
    if not isinstance(before, str) or is_url(before) or is_url(workdir):
        return settings
    return with_folders(settings, partial(moved_along, before=before, now=absolute(workdir)))


def known_settings(workdir: Path | str) -> RunSettings:
    """As `settings_of`, but an error if no stage has been run in the folder, or what its model is made of is gone."""
    settings = settings_of(workdir)
    if settings is None:
        raise MoextendError(f"{workdir} is no work directory: run a stage with this --workdir first")
    for name in (settings.base, settings.vision, *(of.tower for of in settings.media.values())):
        if os.path.isabs(name) and not os.path.exists(name):
            raise MoextendError(
                f"{name} does not exist, which {folder(os.fspath(workdir)) / 'config.json'} names, nor was it moved "
                "together with that folder: write its new place there"
            )
    return settings


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Process 0 writes; when it returns, all processes can read."""
    if distributed.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(value, indent=indent) + "\n")
    distributed.barrier(f"wrote {path}")
    until = time.monotonic() + 60
    while not is_url(path) and not path.exists() and time.monotonic() < until:
        # On NFS another host may still believe that the folder is not there, or the file.
        path.parent.mkdir(parents=True, exist_ok=True)
        os.listdir(path.parent)
        time.sleep(0.5)
