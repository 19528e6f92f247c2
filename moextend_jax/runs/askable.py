"""Models that can be asked, whatever folder they lie in: a `Place` in, an `Askable` out.

A place is a work directory and a model of `results.Table`, or a checkpoint: anything that `moextend import` accepts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from moextend_jax import distributed
from moextend_jax.checkpoints import hashes, train_state
from moextend_jax.checkpoints.loading import Checkpoint, open_checkpoint
from moextend_jax.checkpoints.source import Source
from moextend_jax.config import ADDITIONS, IMAGE, RECIPES, ModelConfig, MoextendError, Recipe
from moextend_jax.data.tokenizer import Tokenizer, tokenizer_of
from moextend_jax.data.writing import template_identity
from moextend_jax.families import FAMILIES
from moextend_jax.folders import absolute
from moextend_jax.lock import locked
from moextend_jax.mesh import make_mesh
from moextend_jax.models.moextend import MoExtend, abstract
from moextend_jax.outside import read_small
from moextend_jax.parameters import element_type
from moextend_jax.runs import models_of
from moextend_jax.runs.place import Place
from moextend_jax.runs.results import ANSWERING
from moextend_jax.runs.run import Arrays, Run, check_same_files, cpu_devices, known_settings, open_run, working
from moextend_jax.settings import MESH, EvaluateSettings, RunSettings, build, fields

SIZES = EvaluateSettings(data="", questions=1)
"""Batches of a checkpoint's evaluation, where no configuration says otherwise."""

COMPUTED = (
    "text_isolation", "composition", "expert_storage", "expert_group", "weight_guard", "mass",
)  # fmt: skip
"""Fields of `ModelConfig` that change the answers, besides the leaves, their element type and the shares."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Askable:
    """A model on its mesh, with all that asking it takes.

    name: what its answers are filed under: a model of `results.Table`, or the name of a checkpoint's folder.
    folder: where it came from. recipe: its chat template and how its images are prepared.
    sizes: how large batches of questions are.
    identify, is_plain, read_tokenizer: compute `identity`, `plain` and `tokenizer`, which not everything needs.
    open_base: opens the model that this one was made from, where that is at hand.
    to_see: what to do where it does not see.
    """

    name: str
    folder: Path
    model: MoExtend
    arrays: Arrays
    mesh: Mesh
    recipe: Recipe
    sizes: EvaluateSettings
    identify: Callable[[], str]
    is_plain: Callable[[], bool]
    read_tokenizer: Callable[[], Tokenizer]
    open_base: Callable[[], Askable] | None
    to_see: str = f"choose another --model of the run, such as {' or '.join(ANSWERING)}"

    def __repr__(self) -> str:
        return f"Askable({self.name!r} of {str(self.folder)!r}, {described(self.config)})"

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def sees(self) -> bool:
        return IMAGE in self.config.media

    @property
    def patches(self) -> int:
        """Visual tokens of an image; 0 of a model that does not see."""
        return self.config.media[IMAGE].tokens if self.sees else 0

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.read_tokenizer()

    @functools.cached_property
    def plain(self) -> bool:
        """Whether a prompt is a text that the model continues, rather than a question in the chat template."""
        return self.is_plain()

    @functools.cached_property
    def identity(self) -> str:
        """Names the model by what it is made of and by how it computes: answers of two identities must not be mixed."""
        config, recipe = self.config, self.recipe
        computed = [getattr(config, name) for name in COMPUTED] + [recipe.prompt, recipe.image_preparation]
        computed += [(name, of.share) for name, of in config.added.items()]
        computed += [(name, getattr(medium.tower, "feature_layer", None)) for name, medium in config.media.items()]
        return f"{self.identify()}-{hashlib.sha256(repr(computed).encode()).hexdigest()[:8]}"


def open_place(place: Place, *, settings: RunSettings | None = None, mesh: Mesh | None = None) -> Askable:
    """Opens and reads a model.

    Args:
      settings: for a work directory, the default is the settings of its run. For a checkpoint they give only the mesh,
        the element type, the storage of the pretrained experts and the batch sizes.
      mesh: for a checkpoint, replaces the mesh of the settings.

    Raises:
      MoextendError: nothing that could be opened is there, or something is wrong with it.
    """
    if place.in_workdir:
        run = open_run(settings or known_settings(place.folder), place.folder)
        return askable(run, place.model or "moextend", dtype=place.dtype)
    distributed.start(cpu_devices=cpu_devices(settings) if settings else 1)
    mesh = mesh or make_mesh(settings.mesh if settings else MESH)
    dtype = place.dtype or (settings.dtype if settings else None)
    checkpoint = open_checkpoint(
        place.folder, base=place.base, vision=place.vision, feature_layer=place.feature_layer, dtype=dtype, mesh=mesh,
        storage=settings.quantised if settings else None,
    )  # fmt: skip
    check_same_files(checkpoint.source, where=place.folder)
    return _of_checkpoint(checkpoint, place, mesh=mesh, sizes=settings.evaluate if settings else SIZES)


class Choice(NamedTuple):
    """A model of a folder: what tables call it, and what opens it, once."""

    title: str
    open: Callable[[], Askable]


def choices(place: Place, *, settings: RunSettings | None = None) -> dict[str, Choice]:
    """The models of a folder that can be asked, by name.

    For a work directory: its finished models, which share the pretrained parts in memory. One with several names is
    listed once, as `place.model` if that is one of them. For a checkpoint: the model and, if it is extended, its base.

    Raises:
      MoextendError: as `open_place`.
    """
    if not place.in_workdir:
        opened = open_place(place, settings=settings)
        found = {opened.name: Choice(opened.name, lambda: opened)}
        if opened.open_base is not None:
            found["base"] = Choice("base", _once(opened.open_base))
        return found
    run = open_run(settings or known_settings(place.folder), place.folder)
    models = {name: row for name, row in run.table.models.items() if not name.startswith("probed")}
    # "aligned" is the base, if nothing is aligned for a task in text.
    rows = {name: row for name, row in models.items() if row.results or name in ("base", place.model)}
    finished = {(row.results, row.sees): name for name, row in rows.items() if all(map(run.has, row.results))}
    if (asked := rows.get(place.model or "")) and (asked.results, asked.sees) in finished:
        finished[asked.results, asked.sees] = str(place.model)
    return {
        name: Choice(rows[name].title, _once(functools.partial(askable, run, name, dtype=place.dtype)))
        for name in finished.values()
    }


def _once(open: Callable[[], Askable]) -> Callable[[], Askable]:
    """Opens a model when it is first asked for. Only one thread opens it: else each would hold a copy."""
    opened, lock = functools.cache(open), threading.Lock()

    def opened_by_one() -> Askable:
        with lock:
            return opened()

    return opened_by_one


@contextlib.contextmanager
def evaluating(
    place: Place, *, settings: RunSettings | None = None, out: Path | None = None
) -> Iterator[tuple[Askable, Path]]:
    """A model and the folder for its answers, locked against other writers: `out`, by default WORKDIR/eval. For a
    checkpoint, whose folder is not written to, the default is `eval` in the current directory."""
    if place.in_workdir and out is None:
        with working(settings or known_settings(place.folder), place.folder, rows=()) as run:  # batches divide anyhow
            yield askable(run, place.model or "moextend", dtype=place.dtype), place.folder / "eval"
        return
    out = out or Path("eval")
    settings = settings or (known_settings(place.folder) if place.in_workdir else None)
    distributed.start(cpu_devices=cpu_devices(settings) if settings else 1)
    distributed.check_shared(out)
    with locked(out):
        yield open_place(place, settings=settings), out


def askable(run: Run, name: str, *, dtype: str | None = None) -> Askable:
    """A model of an opened run, computed in `dtype`, else as it was trained."""
    model, arrays = models_of.open_model(run, name)
    if dtype is not None:
        model = abstract(dataclasses.replace(model.config, dtype=dtype, train_dtype=dtype))
        kinds = {path: element_type(path, dtype, stored=leaf.dtype) for path, leaf in arrays.items()}
        arrays = {path: leaf if (kind := kinds[path]) is None else leaf.astype(kind) for path, leaf in arrays.items()}
    identity = models_of.identity(run, name)
    return Askable(
        name=name,
        folder=run.workdir,
        model=model,
        arrays=arrays,
        mesh=run.mesh,
        recipe=run.settings.recipe,
        is_plain=lambda: not run.table.model(name).sees,
        sizes=run.settings.evaluate,
        identify=lambda: identity if dtype is None else f"{identity}-{dtype}",
        read_tokenizer=lambda: run.tokenizer,
        open_base=lambda: askable(run, "base", dtype=dtype),
        to_see=Askable.to_see if IMAGE in run.config.media else "no model of this run has learnt pictures",
    )


def text_only(opened: Askable) -> Askable:
    """The model without media (towers, projectors)."""
    model, arrays = models_of.text_only(models_of.Opened(opened.model, opened.arrays))
    return dataclasses.replace(opened, model=model, arrays=arrays)


def not_extended(opened: Askable) -> Askable:
    """An extended model without what its extension added. This is the base if the pretrained leaves, routers included,
    are still the base's (`Recipe.routers_kept`)."""
    model = abstract(opened.config.with_added(lambda *_: None))
    arrays = {path: leaf for path, leaf in opened.arrays.items() if path.partition("/")[0] not in ADDITIONS}
    return dataclasses.replace(
        opened, name="base", model=model, arrays=arrays, open_base=None, identify=lambda: f"base-of-{opened.identity}"
    )


def described(config: ModelConfig) -> str:
    """A model's sizes in a few words."""
    sizes = config.decoder
    sees = f", sees {config.vision.patches} patches" if config.vision else "" if config.media else ", text only"
    sees += "".join(f", {name} of {medium.tokens} tokens" for name, medium in config.media.items() if name != IMAGE)
    grown = "".join(
        f", {added.new_experts} new in {len(added.layers)} of them"
        + (f" for {name}" if len(config.extensions) > 1 else "")
        for name, added in config.extensions.items()
    )
    grown += "".join(f", low-rank updates ({of.method}) for {name}" for name, of in config.adapters.items())
    grown += "".join(f", {of.count} blocks for {name}" for name, of in config.blocks.items())
    return f"{sizes.layers} layers of {sizes.experts} experts{grown}{sees}, {config.dtype}"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _of_checkpoint(checkpoint: Checkpoint, place: Place, *, mesh: Mesh, sizes: EvaluateSettings) -> Askable:
    source = checkpoint.source
    recipe, isolation = how_trained(source, recipe=place.recipe, where=place.folder)
    config = dataclasses.replace(
        checkpoint.config, weight_guard=recipe.weight_guard, mass=recipe.mass, text_isolation=isolation
    )
    name = absolute(place.folder).name
    if name == "base" and config.added:  # the model inside it has that name
        name = f"{absolute(place.folder).parent.name}-base"
    trained_over, here = source.record.facts.get("expert_storage"), config.quantised and str(config.quantised)
    if config.added and trained_over != here and distributed.first():
        as_files = "as their files have them"
        print(
            f"moextend: {place.folder} was trained over experts {f'in {trained_over}' if trained_over else as_files}; "
            f"here they are {f'in {here}' if here else as_files}",
            file=sys.stderr,
        )

    def identify() -> str:
        stored = distributed.from_first(lambda: hashes.stored_hash(source.leaves))
        tokenizer = opened.tokenizer
        asks = [template_identity(tokenizer, recipe), tokenizer.prefix, tokenizer.ends]
        asks_as = hashlib.sha256(repr(asks).encode()).hexdigest()[:8]
        return f"{name}-{stored[:12]}-{config.dtype}-{asks_as}"

    def read_tokenizer() -> Tokenizer:
        tokenizer = tokenizer_of(source.tokenizer_folder or place.folder, config, ends=source.ends)
        return dataclasses.replace(tokenizer, others=config.media)

    def is_plain() -> bool:
        taught = config.media or config.added or "recipe" in source.record.facts
        if taught or _has_template(source.files):
            return False
        return opened.tokenizer.prompt in (None, "mixtral", FAMILIES[config.decoder.family].template)

    opened = Askable(
        name=name,
        folder=place.folder,
        model=abstract(config),
        arrays=checkpoint.arrays,
        mesh=mesh,
        recipe=recipe,
        is_plain=is_plain,
        sizes=sizes,
        identify=identify,
        read_tokenizer=read_tokenizer,
        open_base=(lambda: not_extended(opened)) if config.added else None,
        to_see=f"`moextend import` joins {'' if 'vision' in source.parts else 'a tower (--vision) and '}"
        "a projector (--projector) to a model",
    )
    return opened


def how_trained(source: Source, *, recipe: str | None, where: Path) -> tuple[Recipe, str]:
    """Recipe and text isolation of the run that made a checkpoint. If the checkpoint does not record a recipe: the one
    that is asked for, else that of the code that wrote its layout.

    Raises:
      MoextendError: the checkpoint records another recipe than `recipe`.
    """
    facts = source.record.facts
    isolation = build(fields(ModelConfig)["text_isolation"], facts.get("text_isolation", "none"),
                      where=f"{where}: text_isolation")  # fmt: skip
    if not isinstance(recorded := facts.get("recipe"), dict):
        usual = "released" if source.record.layout in ("released", "delta") else "paper"
        return RECIPES[recipe or usual], isolation
    recorded = {"weight_guard": train_state.BEFORE["weight_guard"]} | recorded
    trained = build(Recipe, recorded, where=f"{where}: recipe")
    if recipe is not None and RECIPES[recipe] != trained:
        raise MoextendError(f"{where} knows its recipe, which is not {recipe}: leave --recipe out")
    return trained, isolation


def _has_template(files: Mapping[str, Path]) -> bool:
    """Whether a tokenizer brings a chat template, so that the model was taught to answer."""
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    return "tokenizer_config.json" in files and b'"chat_template"' in read_small(files["tokenizer_config.json"])
