"""Settings of a run: what a configuration file holds, checked and typed."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from moextend_jax.config import RECIPES, MoextendError, Recipe, Saved
from moextend_jax.data.faults import FaultSettings
from moextend_jax.train.optimizer import OptimizerConfig


def _at_least_one(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise MoextendError(f"{name} = {getattr(settings, name)} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training. `data` is a data set of `data/datasets.py`, with a split."""

    data: str
    steps: int
    batch_size: int
    length: int
    split: str = "train"
    images_per_row: int = 1
    conversations_per_row: int = 1
    """Conversations packed into a row at most; 0 packs as many as fit."""
    conversation_length: int = 0
    """Most tokens of one conversation in a packed row; 0 is the row's length."""
    too_long: Literal["error", "drop_turns"] = "error"
    loss_chunk: int = 1024
    """Labelled positions that go through the head at once on a device."""
    accumulate: int = 1
    """Parts in which a step computes its batch, one after another, where the whole does not fit."""
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        _at_least_one(self, "steps", "batch_size", "length", "images_per_row", "loss_chunk", "accumulate")
        if self.batch_size % self.accumulate:
            raise MoextendError(f"batch_size = {self.batch_size} is no multiple of accumulate = {self.accumulate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """The extender: `held_out` samples S_e of the instruction data, and the share p of layers to extend."""

    held_out: int = 10_000
    share: float = 0.5
    batch_size: int = 64

    def __post_init__(self):
        _at_least_one(self, "held_out", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    data: str
    questions: int
    split: str = "test"
    batch_size: int = 250
    length: int = 64
    max_new_tokens: int = 8
    text_length: int = 256
    text_batch_size: int = 16
    examples: int = 8
    """Questions shown in the report."""

    def __post_init__(self):
        _at_least_one(self, "batch_size", "length", "max_new_tokens", "text_length", "text_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a run needs; `base` and `vision` are Hugging Face folders, "embedded" the small real model inside."""

    align: StageSettings
    extend: StageSettings
    finetune: StageSettings
    full: StageSettings
    evaluate: EvaluateSettings
    select: SelectSettings = SelectSettings()
    recipe: Recipe = RECIPES["paper"]
    base: str = "embedded"
    vision: str = "embedded"
    seed: int = 0
    data_dir: str = ""
    """Where prepared data sets go; "" is WORKDIR/data."""
    manual_dir: str = ""
    """Where LLaVA's JSON and image folder are."""
    cache_features: bool = True
    """Keep the frozen tower's output on disk, so that it runs once per image."""
    workers: int = 0
    cpu_devices: int = 1
    """XLA devices to make of a CPU, one per core: products too small to be shared by cores leave all but one idle."""
    aux_coefficient: float = 0.001
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    train_dtype: Literal["bfloat16", "float32"] = "float32"
    remat: Literal["none", "attention", "layer"] = "layer"
    saved: tuple[Saved, ...] = ()
    dispatch: Literal["gather", "exchange"] = "gather"
    text_isolation: Literal["none", "strict"] = "none"
    """`remat`, `saved`, `dispatch` and `text_isolation` are those of `config.ModelConfig`."""
    mesh: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}
    )
    checkpoint_every: int = 500
    checkpoints_kept: int = 2
    log_every: int = 10
    faults: FaultSettings = FaultSettings()
    """What training does about damaged examples."""
    nonfinite_limit: int = 10
    """Steps of a stage that may be skipped because their loss or gradient is not finite."""
    rollbacks: int = 0
    """How often, above that limit, a stage goes back to its newest checkpoint and on with later data."""
    baseline: bool = False
    """`moextend run` also trains the full fine-tuning baseline."""

    def __post_init__(self):
        _at_least_one(self, "checkpoint_every", "log_every")
        if self.checkpoints_kept < 2:
            raise MoextendError("checkpoints_kept must be at least 2: the older one is there if the newest is damaged")

        if self.text_isolation == "strict" and self.recipe.routers_kept == "after":
            raise MoextendError(
                "text_isolation strict needs routers_kept before: routers that the probe trained change text too"
            )

    @property
    def model_options(self) -> dict[str, Any]:
        """The fields of `config.ModelConfig` that are choices of a run, not sizes of a checkpoint."""
        names = ("dtype", "train_dtype", "remat", "saved", "dispatch", "text_isolation")
        return {name: getattr(self, name) for name in names} | {"weight_guard": self.recipe.weight_guard}


def to_config_dict(settings: RunSettings) -> ConfigDict:
    """The settings as an editable ConfigDict, which is what files in configs/ return."""
    return ConfigDict(dataclasses.asdict(settings))


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> RunSettings:
    """Checks names and types; a mistake is an error that names the field."""
    return _build(RunSettings, config.to_dict() if isinstance(config, ConfigDict) else config, where="config")


def _build(kind: Any, value: Any, *, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        assert isinstance(kind, type)
        if not isinstance(value, Mapping):
            raise MoextendError(f"{where} = {value!r} is not a group of settings")
        names = {field.name for field in dataclasses.fields(kind)}
        for name in value:
            if name not in names:
                raise MoextendError(f"{where}.{name} is no setting; there are {', '.join(sorted(names))}")
        missing = [
            field.name
            for field in dataclasses.fields(kind)
            if field.name not in value
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise MoextendError(f"{where}: {', '.join(missing)} must be set")
        parts = {name: _build(hints[name], value[name], where=f"{where}.{name}") for name in value}
        try:
            return kind(**parts)
        except MoextendError as error:  # the dataclass's own checks do not know where they stand
            raise MoextendError(f"{where}: {error}") from None
    if origin is Literal:
        if value not in arguments:
            raise MoextendError(f"{where} = {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if arguments[-1] is Ellipsis and isinstance(value, list | tuple):
            arguments = arguments[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise MoextendError(f"{where} = {value!r} must be {len(arguments)} values")
        return tuple(_build(part, one, where=where) for part, one in zip(arguments, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        return value
    if origin is not None:  # Mapping
        if not isinstance(value, Mapping):
            raise MoextendError(f"{where} = {value!r} is not a group of settings")
        return {name: _build(arguments[1], one, where=f"{where}.{name}") for name, one in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MoextendError(f"{where} = {value!r} is not of type {kind.__name__}")
    return value
