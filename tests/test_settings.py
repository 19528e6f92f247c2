"""Settings: any mistake is one error that names the field; files, ConfigDicts and JSON give the same settings."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

import pytest
from ml_collections import ConfigDict

from moextend_jax.config import RECIPES, MoextendError, Range, Recipe
from moextend_jax.configurations import load, names
from moextend_jax.faults import KINDS
from moextend_jax.settings import (
    GOES_WITH,
    KEEPABLE,
    POLICIES,
    SKIPPED,
    EvaluateSettings,
    ExtensionSettings,
    FaultKind,
    FaultSettings,
    Group,
    GrowSettings,
    MediumSettings,
    MethodSettings,
    OptimizerConfig,
    ProjectorSettings,
    RunSettings,
    SelectSettings,
    StageSettings,
    fields,
    from_config_dict,
    to_config_dict,
    without_effect,
)
from moextend_jax.train.stages import GROUPS

CONFIGS = Path(__file__).parents[1] / "configs"


def settings() -> RunSettings:
    stage = StageSettings(
        data="easy_vqa/questions",
        steps=3,
        batch_size=2,
        length=32,
        optimizer=OptimizerConfig(multipliers={"projector": 2.0}, weight_decays={"calibrators": 0.1}),
    )
    evaluate = EvaluateSettings(data="easy_vqa/questions", questions=10)
    stages: dict[str, Any] = {"align": stage, "extend": stage, "finetune": stage, "full": stage, "evaluate": evaluate}
    return RunSettings(
        **stages, recipe=RECIPES["released"], mixture=stage,
        media={"touch": MediumSettings(kind="features", width=2, patches=3)},
        extensions={"touch": ExtensionSettings(medium="touch", **stages)},
    )  # fmt: skip


def changed(path: str, value: Any) -> ConfigDict:
    config = to_config_dict(settings())
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({path: value})
    return config


def test_a_config_dict_gives_the_settings_back():
    assert from_config_dict(to_config_dict(settings())) == settings()


def test_json_gives_the_settings_back():
    written = json.dumps(dataclasses.asdict(settings()))
    assert from_config_dict(json.loads(written)) == settings()


def test_tables_have_the_names_that_settings_know():
    assert list(KINDS) == list(get_args(FaultKind)) == list(POLICIES) and {*SKIPPED, *KEEPABLE} < set(KINDS)
    assert set(GROUPS.values()) == set(get_args(Group))


def test_whole_numbers_are_fine_where_a_fraction_is_expected():
    assert from_config_dict(changed("aux_coefficient", 1)).aux_coefficient == 1.0
    assert isinstance(from_config_dict(changed("align.optimizer.clip_norm", 2)).align.optimizer.clip_norm, float)


WRONG = [
    ("nope", 1, "config.nope"),
    ("align.nope", 1, "config.align.nope"),
    ("align.optimizer.rate", 1.0, "config.align.optimizer.rate"),
    ("recipe.calibrator", 1, "config.recipe.calibrator"),
    ("aux_coefficient", 10**400, "config.aux_coefficient is too large a number"),
    ("align.steps", "many", "config.align.steps"),
    ("align.steps", 2.5, "config.align.steps"),
    ("align.steps", True, "config.align.steps"),
    ("baseline", 1, "config.baseline"),
    ("base", 7, "config.base"),
    ("aux_coefficient", "small", "config.aux_coefficient"),
    ("remat", "everything", "config.remat"),
    ("align.too_long", "cut", "config.align.too_long"),
    ("recipe.counted_picks", "top_2", "config.recipe.counted_picks"),
    ("recipe.global_batch", (1, 2, 3), "config.recipe.global_batch"),
    ("recipe.global_batch", ("a", 2), "config.recipe.global_batch"),
    ("recipe.global_batch", 7, "config.recipe.global_batch"),
    ("align.optimizer.multipliers", {"projektor": 1.0}, "config.align.optimizer.multipliers.projektor is no setting"),
    ("faults.policies", {"torn": "skip"}, "config.faults.policies.torn is no setting; there are .*truncated"),
    ("align.optimizer.multipliers", {"projector": "big"}, "multipliers"),
    ("mesh", 3, "config.mesh"),
    ("align", 3, "config.align"),
    ("dtype", "float99", "dtype"),
    ("align.accumulate", 3, "config.align: batch_size = 2 is no multiple of accumulate = 3"),
]


@pytest.mark.parametrize(("path", "value", "named"), WRONG)
def test_a_mistake_is_named(path: str, value, named: str):
    with pytest.raises(MoextendError, match=named):
        from_config_dict(with_value(path, value))


# --- ranges -----------------------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number among the settings: its path in a configuration, and what it may be."""

    path: str
    kind: type
    bounds: Range | None


def numbers(kind: Any, path: str) -> Iterator[Number]:
    """Every number below a setting, whatever groups, tuples and tables it is in."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        for name, part in fields(cast(type, kind)).items():
            yield from numbers(part, f"{path}.{name}" if path else name)
    elif origin is Annotated:
        yield Number(path, *arguments)
    elif origin is tuple and arguments[-1] is not Ellipsis:
        yield from (number for n, part in enumerate(arguments) for number in numbers(part, f"{path}.{n}"))
    elif origin is types.UnionType:
        yield from numbers(arguments[0], path)
    elif origin is not None and origin is not Literal:  # a table: try its first name, or one that it has
        names = get_args(arguments[0]) or (("touch",) if dataclasses.is_dataclass(arguments[-1]) else ("fsdp",))
        yield from numbers(arguments[-1], f"{path}.{names[0]}" if origin is not tuple else path)
    elif kind in (int, float):
        yield Number(path, kind, None)


NUMBERS = list(numbers(RunSettings, ""))


@functools.cache
def as_json() -> str:
    return json.dumps(dataclasses.asdict(settings()))


def with_value(path: str, value: Any) -> dict[str, Any]:
    config = json.loads(as_json())
    *parents, last = path.split(".")
    inner = config
    for name in parents:
        inner = inner[name]
    inner[int(last) if isinstance(inner, list) else last] = value
    return config


BY_EPOCHS = {"least_steps": {"steps": 0, "epochs": 1.0}}


def edges(number: Number) -> Iterator[tuple[float, bool]]:
    """Values at and just outside each edge of the range, and whether they are allowed."""
    bounds, whole = number.bounds, number.kind is int
    assert bounds is not None
    for edge, inside, outward in [
        (bounds.least, True, -1),
        (bounds.above, False, -1),
        (bounds.most, True, 1),
        (bounds.below, False, 1),
    ]:
        if edge is not None:
            near = [edge + step * outward if whole else math.nextafter(edge, step * outward * math.inf)
                    for step in (1, -1)]  # fmt: skip
            yield from [(number.kind(edge), inside), (near[0], near[0] in bounds.also), (near[1], True)]
    yield from ((value, True) for value in bounds.also)
    if not whole:
        yield from ((value, False) for value in (math.nan, math.inf, -math.inf))


def test_every_number_has_a_range():
    assert len(NUMBERS) > 50 and not [number.path for number in NUMBERS if number.bounds is None]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.path)
def test_the_edges_of_a_range(number: Number):
    tried = list(edges(number))
    assert tried
    for value, allowed in tried:
        config = with_value(number.path, value)
        group = config
        for name in number.path.split(".")[:-1]:
            group = group[name] if isinstance(group, dict) else group[int(name)]
        if allowed and number.path.endswith("accumulate"):  # it must divide that
            group["batch_size"] = value
        if allowed and number.path.endswith(".steps") or number.path.endswith("least_steps"):  # or epochs, one of them
            group |= {"epochs": 0.0 if value else 1.0} | BY_EPOCHS.get(number.path[-11:], {})
        if allowed and number.path.endswith("guidance"):  # without it no token would ever choose a copied column
            group["drift"] = 1.0
        if allowed and number.path.endswith("epochs"):
            group["steps"] = int(not value)
        if allowed and value == 0 and number.path.endswith((".width", ".patches")):  # of features, which have both
            group |= {"kind": "audio", "width": 0, "patches": 0}
        if allowed:
            from_config_dict(config)
            continue
        where = re.sub(r"\.\d$", "", number.path)
        with pytest.raises(MoextendError, match=rf"config\.{re.escape(f'{where} = {value} must be ')}"):
            from_config_dict(config)


def test_the_range_is_said():
    for bounds, words in [
        (Range(least=1), "at least 1"),
        (Range(above=0, most=1), "more than 0 and at most 1"),
        (Range(least=0, below=1), "at least 0 and less than 1"),
        (Range(least=1, also=(-1,)), "at least 1, or -1"),
        (Range(), "finite"),
    ]:
        with pytest.raises(MoextendError, match=rf"^seed = nan must be {words}$"):
            bounds.check(math.nan, what="seed")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: OptimizerConfig(clip_norm=-1),
        lambda: OptimizerConfig(multipliers=cast(Any, {"projektor": 1.0})),
        lambda: FaultSettings(most_skipped=2),
        lambda: SelectSettings(share=2.0),
        lambda: dataclasses.replace(settings(), seed=-1),
        lambda: dataclasses.replace(settings(), recipe=dataclasses.replace(RECIPES["paper"], calibrator_std=-1.0)),
        lambda: dataclasses.replace(settings(), remat=cast(Any, "everything")),
    ],
)
def test_classes_called_from_python_are_checked(wrong):
    with pytest.raises(MoextendError, match=r"^\w+\.(\w+\.)*\w+ (= .* (must be|is not one of)|is no setting)"):
        wrong()


# --- groups and files -------------------------------------------------------------------------------------------------


def test_a_setting_left_out_is_named():
    config = dataclasses.asdict(settings())
    del config["align"]["steps"], config["evaluate"]
    with pytest.raises(MoextendError, match="evaluate must be set"):
        from_config_dict(config)
    config["evaluate"] = {"data": "easy_vqa/questions", "questions": 4}
    with pytest.raises(MoextendError, match="config.align: neither steps nor epochs is set"):
        from_config_dict(config)
    del config["align"]["length"]
    with pytest.raises(MoextendError, match="config.align: length must be set"):
        from_config_dict(config)


def test_how_long_a_stage_trains_is_said_once():
    stage = {"data": "x", "batch_size": 2, "length": 0}
    assert StageSettings(**stage, epochs=0.5, least_steps=3).steps == 0
    for wrong, said in [
        ({"steps": 3, "epochs": 0.5}, "steps = 3 and epochs = 0.5 are both set"),
        ({}, "neither steps nor epochs is set"),
        ({"steps": 3, "least_steps": 2}, "least_steps = 2 goes with epochs"),
    ]:
        with pytest.raises(MoextendError, match=said):
            StageSettings(**stage, **wrong)


def test_a_part_held_out_is_a_share_or_a_number_of_rows():
    assert SelectSettings(held_out=0.25).held_out == 0.25 and SelectSettings(held_out=3).held_out == 3
    with pytest.raises(MoextendError, match=r"held_out = 2\.5 is neither"):
        SelectSettings(held_out=2.5)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_is_valid(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def check(config: ConfigDict, recipe: Recipe) -> None:
        """LoRA also trains the projector in finetune."""
        trains = {recipe.finetune_trains, "extension_and_projector" if path.stem == "mixtral_methods" else "extension"}
        found = from_config_dict(config).recipe
        assert found == dataclasses.replace(recipe, finetune_trains=found.finetune_trains)
        assert found.finetune_trains in trains

    check(module.get_config(), RECIPES["paper"])
    for arg in inspect.signature(module.get_config, eval_str=True).parameters.values():
        for kind in get_args(arg.annotation):
            check(module.get_config(kind), RECIPES["released" if kind == "released" else "paper"])


@pytest.mark.parametrize("change", [{"kind": "features", "width": 2, "patches": 3}, {"tower": "x"}, {"spans": (3, 5)}])
def test_of_pictures_a_medium_sets_the_projector_alone(change: dict[str, Any]):
    for kind in ("audio", "image"):  # a default that nobody has named, or the right one
        images = MediumSettings(**{"kind": kind, "projector": ProjectorSettings(kind="pool", neighbours=2)})
        dataclasses.replace(settings(), media={"image": images}, extensions={})
    with pytest.raises(MoextendError, match="media.image can set a projector alone"):
        dataclasses.replace(settings(), media={"image": MediumSettings(**change)}, extensions={})


def test_sizes_of_another_projector_or_kind_of_medium_have_no_effect():
    """A crema has those of its trunk, a resampler."""
    odd = ProjectorSettings(kind="crema", neighbours=2, queries=4, rank=4)
    media = {
        "film": MediumSettings(kind="video", frames=4, projector=odd),
        "touch": MediumSettings(tower="x", seconds=3),
    }
    found = [line.partition(" has")[0] for line in without_effect(dataclasses.replace(settings(), media=media))]
    assert found == ["media.film.projector.neighbours", "media.film.projector.queries"]
    media["touch"] = MediumSettings(kind="features", width=2, patches=3, tower="x", seconds=3, frames=4, join="mean")
    found = [line.partition(" has")[0] for line in without_effect(dataclasses.replace(settings(), media=media))]
    assert found[2:] == [f"media.touch.{name}" for name in ("tower", "seconds", "frames", "join")]


def test_settings_that_have_no_effect_are_named_with_what_they_go_with():
    plain = settings()
    assert not [*without_effect(plain)]
    later = dataclasses.replace(plain.extensions["touch"], grow=GrowSettings(lowered_by=1.0))
    idle = dataclasses.replace(
        plain, mixture=None, remat="attention", saved=("key",), extensions={"touch": later},
        method=MethodSettings(name="lora", tau=0.1),
    )  # fmt: skip
    assert [*without_effect(idle)] == [
        "method.tau has no effect: method.name is lora, and it goes with moram",
        "extensions.touch.grow.lowered_by has no effect: extensions.touch.grow.start is copy, and it goes with lowered",
        "saved has no effect: remat is attention, and it goes with layer",
    ]
    assert all(name in fields(kind) and other in fields(kind) for kind, rows in GOES_WITH.items()
               for name, (other, _) in rows.items())  # fmt: skip
    assert all({*needed} < {*get_args(fields(kind)[other])} for kind, rows in GOES_WITH.items()
               for other, needed in rows.values())  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_the_package_s_configurations_set_nothing_in_vain(name: str):
    assert not [*without_effect(from_config_dict(load(name)))]
