"""Settings of a run: what a configuration file holds, each with its type, its range and its default, all checked.

In: a ConfigDict, JSON, or the classes called from Python. Out: `RunSettings`, or an error that names the field.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

from ml_collections import ConfigDict

from moextend_jax.config import (
    IMAGE,
    RECIPES,
    TRUNKS,
    AdaptedExperts,
    AdapterConfig,
    Amount,
    BlocksConfig,
    CalibratorName,
    ColumnStart,
    Count,
    ExpertStart,
    ExpertStorage,
    Gating,
    LayerChoice,
    MediumKind,
    MoextendError,
    Quantised,
    Range,
    Recipe,
    Saved,
    SourceChoice,
    StartName,
)

Settings = TypeVar("Settings")
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
Part = Annotated[float, Range(above=0)]
"""Of the rows of a data set, or of a layer's experts: below 1 a share, from 1 on a number."""
LayerShare = Annotated[float, Range(above=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]

Group = Literal[
    "projector", "new_experts", "router_columns", "calibrators", "adapters", "blocks", "routers", "base", "vision"
]
"""Groups of parameters with optimizer settings of their own; `train/stages.py` says which is in which."""

FaultKind = Literal[
    "missing", "outside", "url", "unreadable", "truncated", "empty_file", "oversized", "not_image", "not_finite",
    "entry", "encoding", "reserved", "turn", "roles", "order", "empty_answer", "marks", "too_long", "too_many_images",
    "duplicate_id", "not_video", "not_sound", "not_features", "wrong_shape", "long_sound", "unknown_medium",
]  # fmt: skip
"""Kinds of faults in data; `faults.py` says what each means."""

Policy = Literal["error", "skip", "keep"]
"""`error` stops the run, `skip` leaves the conversation out and counts it, `keep` takes a sound one all the same."""

# What is wrong with the configuration (a folder, a length, a template, the width of features) is wrong with many rows,
# and to skip them would train on something else than was asked for: error. One scraped file in a thousand is damaged,
# and whoever finds it after 30 hours can only leave it out: skip, within `most_skipped`. A repeated id is no damage at
# all: LLaVA's instructions ask several conversations about an image under the image's id.
SKIPPED: tuple[FaultKind, ...] = (
    "unreadable", "truncated", "empty_file", "oversized", "not_image", "not_finite", "not_video", "not_sound",
    "not_features",
)  # fmt: skip
KEEPABLE: tuple[FaultKind, ...] = ("duplicate_id", "outside", "long_sound")
"""Kinds whose conversation can be read all the same."""
POLICIES = cast(
    dict[FaultKind, Policy],
    {
        kind: "skip" if kind in SKIPPED else "keep" if kind == "duplicate_id" else "error"
        for kind in get_args(FaultKind)
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the paper sets it; `multipliers` of the learning rate and `weight_decays` are by group."""

    learning_rate: Positive = 1e-3
    """Highest learning rate, after warm-up."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises."""
    clip_norm: Positive = 1.0
    """Largest norm of a step's gradient, all leaves together; a larger one is scaled down."""
    b1: Decay = 0.9
    """Decay of AdamW's first moment."""
    b2: Decay = 0.999
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """What AdamW's first moment is kept in; the second, which bfloat16 would never let decay, is kept in float32."""
    moments: Literal["device", "host"] = "device"
    """Where the moments are kept; from the host's memory a step fetches those of one leaf after another."""
    multipliers: Mapping[Group, NotNegative] = dataclasses.field(default_factory=dict)
    """What the learning rate of a group of parameters is multiplied by; 1 where not named."""
    weight_decays: Mapping[Group, NotNegative] = dataclasses.field(default_factory=dict)
    """Weight decay of a group of parameters; 0 where not named."""

    def __post_init__(self):
        _check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Runs that differ in a few settings, each with several seeds."""

    points: Mapping[str, tuple[str, ...]]
    """What each run sets otherwise, by its name: SETTING=VALUE as on the command line. The others are compared with the
    one that sets nothing."""
    seeds: tuple[Amount, ...] = (0, 1, 2, 3, 4)
    """Seeds that every point is run with."""

    def __post_init__(self):
        _check(self)
        for name in self.points:
            if not re.fullmatch("[a-zA-Z0-9][a-zA-Z0-9_.-]*", name):
                raise MoextendError(f"study.points: {name!r} cannot name a folder: letters, digits, _, - and .")
        if not self.points or not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise MoextendError("study needs points, and seeds that are all different")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """What to do about each kind of fault in data; kinds not named have `POLICIES`' default. Above `most_skipped`, the
    share of the conversations read that were skipped, a run stops."""

    policies: Mapping[FaultKind, Policy] = dataclasses.field(default_factory=dict)
    """What is done about each kind of fault: stop, leave the conversation out, or take it all the same."""
    most_skipped: Share = 0.01
    """Share of the conversations read that may be left out; above it the run stops."""

    def __post_init__(self):
        _check(self)
        for kind, policy in self.policies.items():
            if policy == "keep" and kind not in KEEPABLE:
                raise MoextendError(f"policies.{kind} = 'keep' is not one of 'error', 'skip'")
        # All kinds are written out, so that a command line can set each, and a checkpoint's facts name each.
        object.__setattr__(self, "policies", POLICIES | dict(self.policies))

    @property
    def can_skip(self) -> bool:
        return "skip" in self.policies.values()

    def policy(self, kind: str) -> Policy:
        """What is done about a kind of fault."""
        return cast(Mapping[str, Policy], self.policies)[kind]

    def skips(self, fault: Any) -> bool:
        """Whether a `faults.Fault` is one that is left out and counted."""
        return self.policy(fault.kind) == "skip"


Parts = Literal["conversation", "bare_question"]
"""What of a conversation is fed: all of it, or its first question as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training. `data` is a name or a path (docs/data.md), or several of them with weights,
    `a.json:0.7,b.csv:0.3`; `split` is of each. How long it trains is set by `steps` or by `epochs`, the other is 0."""

    data: str
    """Data set that the stage is trained on."""
    steps: Amount = 0
    """Steps of the optimizer; 0: as many as `epochs` come to."""
    epochs: NotNegative = 0.0
    """How often every conversation is seen; the steps are counted before the first."""
    least_steps: Amount = 0
    """With `epochs`: the fewest steps, however few conversations there are."""
    batch_size: Count
    """Rows per step, on all devices together; where the data set has fewer, they are repeated."""
    length: Amount
    """Tokens of a row, visual ones too; 0: of the longest conversation of the data set, rounded up."""
    split: str = "train"
    """Part of the data set."""
    images_per_row: Amount = 1
    """Images of a row at most; 0: as many as the conversation with the most has."""
    items_per_row: Mapping[str, Amount] = dataclasses.field(default_factory=dict)
    """Items of other media in a row at most, by the medium's name; 0, or a medium that is not named: as many as the
    conversation with the most has."""
    missing: Mapping[str, Share] = dataclasses.field(default_factory=dict)
    """By medium, the share of the conversations that are fed without their items of that medium."""
    conversations_per_row: Amount = 1
    """Conversations packed into a row at most; 0 packs as many as fit."""
    conversation_length: Amount = 0
    """Most tokens of one conversation in a packed row; 0 is the row's length."""
    too_long: Literal["error", "drop_turns"] = "error"
    """What is done about a conversation longer than `conversation_length`: stop, or leave its last turns out."""
    loss_chunk: Count = 1024
    """Labelled positions that go through the head at once on a device."""
    accumulate: Count = 1
    """Parts in which a step computes its batch, one after another, where the whole does not fit."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW's settings."""

    def __post_init__(self):
        _check(self)
        if bool(self.steps) == bool(self.epochs):
            both = f"steps = {self.steps} and epochs = {self.epochs:g} are both set"
            wrong = both if self.steps else "neither steps nor epochs is set"
            raise MoextendError(f"{wrong}; one of them must be, the other 0")
        if self.least_steps and not self.epochs:
            raise MoextendError(f"least_steps = {self.least_steps} goes with epochs, not with steps")
        if self.batch_size % self.accumulate:
            raise MoextendError(f"batch_size = {self.batch_size} is no multiple of accumulate = {self.accumulate}")

    def room(self, medium: str) -> int:
        """Items of a medium that a row holds."""
        return self.images_per_row if medium == IMAGE else self.items_per_row.get(medium, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """The extender: `held_out` samples S_e of the instruction data, and the share p of layers to extend."""

    held_out: Part = 10_000.0
    """Samples on which routing is counted, and which the probe does not see (the released code's sees all rows of
    align's data): below 1 a share of the rows, from 1 on a number of rows."""
    share: LayerShare = 0.5
    """Share of the layers to extend."""
    new_experts: Part = 1 / 8
    """New experts of an extended layer, each copied from another expert, the most picked first: from 1 on a number;
    below 1 a share of the pretrained experts, but one at least."""
    layers: LayerChoice = "extender"
    """Which layers: those whose routing moved most in the probe (the paper), or one of its ablations: `random` ones or
    `interval`, evenly spread, as many as `share` says; all, first_half, second_half, first_quarter, first_interval
    (every second of the first half), every_second."""
    source: SourceChoice = "recipe"
    """What ranks the experts to copy: their picks before or after the probe; recipe: one of these, as the recipe says;
    fixed: see `expert`; or a score of their weights and gradients before it (`extension/saliency.SCORES`)."""
    expert: Amount = 0
    """With source fixed: the number of the expert that a layer's first new expert copies; further ones copy the most
    picked."""
    wide: Count = 1
    """How many pretrained experts each new one is made from: their hidden units stand side by side in it, so that its
    output at the start is their mean."""
    batch_size: Count = 64
    """Rows whose routing is counted at once."""

    def __post_init__(self):
        _check(self)
        _check_part(self.held_out, name="held_out", of="rows")
        _check_part(self.new_experts, name="new_experts", of="experts")

    def number(self, experts: int) -> int:
        """New experts (X) beside so many pretrained ones."""
        return int(self.new_experts) if self.new_experts >= 1 else max(1, int(self.new_experts * experts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowSettings:
    """How new experts start, and how they stand among the others ever after."""

    start: StartName = "copy"
    """copy: as the paper, a copy of its source beside it. twin: source and copy exclude each other, so that nothing
    changes at the start. lowered: a copy whose logits begin lower. added: beside the chosen experts, from zero on."""
    lowered_by: NotNegative = 2.0
    """With start lowered: what is subtracted from the logits of new experts."""
    calibrator: CalibratorName = "two_layers"
    """What corrects the weights of chosen experts: two layers, whose output is added and starts at zero (the paper).
    Its ablations: that output multiplied; a learnt vector, added from zero, or multiplied from one; nothing."""
    column: ColumnStart = "copy"
    """A new expert's router column: its source's, zeros, the mean of the layer's columns, or random."""
    expert: ExpertStart = "copy"
    """A new expert: its source's weights, these with a down projection of zeros, or random ones."""
    selection_bias: Literal["copy", "closed"] = "copy"
    """Where a bias chooses experts (GLM-4.5, ERNIE), a new one's: its source's, or closed: so low that no token chooses
    the expert at the start, while finetune raises it to its source's."""
    opens_by: Positive = 1e-3
    """With selection_bias closed: how much a new expert's bias rises in a step in which the expert has fewer picks than
    the mean of its layer."""

    def __post_init__(self):
        _check(self)
        if self.start == "twin" and self.selection_bias == "closed":
            raise MoextendError(
                "grow.selection_bias closed: a twin stands in its source's column, with that one's bias"
            )
        if self.start == "twin" and (self.column, self.expert) != ("copy", "copy"):
            raise MoextendError("grow.start twin starts from copies: leave grow.column and grow.expert out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What is added to the model: MoExtend's experts, or a rival's low-rank updates or layers (docs/methods.md)."""

    name: Literal["moextend", "lora", "damc", "mole", "moram", "blocks", "connector"] = "moextend"
    """moextend: new experts, chosen by `select`. lora, damc, mole, moram: low-rank updates beside the frozen maps of
    all layers that route; damc has one for the medium's tokens and another for text. blocks: layers between the
    pretrained ones. connector: nothing, finetune trains the medium's projector. Only moextend probes and chooses."""
    blocks: Count = 2
    """Of blocks: number of layers put in, evenly spread; it must divide the number of layers that route."""
    guidance: NotNegative = 0.0
    """Of moextend, in training alone: tau of LLaVA-DyMoE's token guidance (theirs is 0.2), which keeps tokens from new
    experts that do not clearly lead; 0: without. A copied column never leads: set grow.column."""
    drift: NotNegative = 0.0
    """Of moextend: coefficient of LLaVA-DyMoE's losses, which make old and new experts each other's opposites."""
    rank: Count = 128
    """Rank of one low-rank update."""
    alpha: Positive = 256.0
    """A low-rank update is multiplied by alpha/rank."""
    attention: bool = True
    """Whether attention's four maps have a low-rank update."""
    experts: AdaptedExperts = "shared"
    """Low-rank updates of the pretrained experts' three maps: none, one that all experts of a layer share, or one per
    expert."""
    router: bool = False
    """Whether the pretrained router has a low-rank update. It then chooses other experts, for text too unless
    text_isolation is strict."""
    lora_experts: Count = 3
    """Of mole: low-rank experts of a layer."""
    gating: Gating = "top1"
    """Of mole, how its experts are weighted. top1: the likeliest alone. top1_prob: that one times its probability,
    without which the task's loss never reaches their router. dense: all of them by their probabilities."""
    balance: NotNegative = 0.01
    """Of mole: coefficient of the loss that balances them."""
    top_k: Count = 8
    """Of moram: atoms of rank one that a token uses of each map."""
    tau: Positive = 0.03
    """Of moram: temperature of their weights."""
    threshold: NotNegative = 0.2
    """Of moram: the least score of an atom that is used, in answering alone."""

    def __post_init__(self):
        _check(self)
        if self.name in ("lora", "damc") and not (self.attention or self.router or self.experts != "none"):
            raise MoextendError(f"method {self.name}: neither attention nor experts nor router have an update")
        if self.name == "moram" and (self.experts != "none" or not self.attention or self.router):
            raise MoextendError("method moram adapts attention alone: set experts none, attention True, router False")
        if self.name == "mole" and self.experts == "none":
            raise MoextendError("method mole: experts none leaves nothing to choose a LoRA expert for")

    def rival(self, medium: str) -> AdapterConfig | BlocksConfig | None:
        """None: the method is moextend, or adds nothing."""
        if self.name in ("moextend", "connector"):
            return None
        if self.name == "blocks":
            return BlocksConfig(count=self.blocks, medium=medium)
        names = [field.name for field in dataclasses.fields(AdapterConfig)]
        fields = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if self.name != "mole":
            fields |= {"lora_experts": 1, "gating": "top1", "balance": 0.0}
        tokens = "items" if self.name == "damc" else "all"
        return AdapterConfig(method=self.name, medium=medium, tokens=tokens, **fields)


LeaveOut = Literal["none", "each", "subsets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Accuracy on questions, and what is forgotten of text."""

    data: str
    """Data set whose questions are asked; "" is a part of finetune's, on which no stage trains then."""
    sets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further data sets whose questions are asked, by a name for tables."""
    held_out: Part = 0.1
    """Part of finetune's data that is asked if `data` is "": below 1 a share of the rows, from 1 on a number of rows.
    Rows that show one picture stay together."""
    questions: Count
    """Number of questions, drawn at random; of a held-out part at most so many."""
    split: str = "test"
    """Part of the data set."""
    batch_size: Count = 256
    """Questions at once."""
    length: Amount = 64
    """Tokens of a question at most, visual ones too; 0: as many as the longest has."""
    max_new_tokens: Count = 8
    """Tokens of an answer at most."""
    text_length: Count = 256
    """Tokens of a row of held-out text."""
    text_batch_size: Count = 16
    """Rows of held-out text at once."""
    text_batches: Amount = 0
    """How many batches of each held-out text are read; 0: all of it, about 20,000 tokens."""
    examples: Amount = 8
    """Questions shown in the report."""
    leave_out: LeaveOut = "none"
    """Questions are asked again: none; each, without each of their media; subsets, with every subset of them, which
    gives the importance of each medium and costs 2^M answers for M media."""

    def __post_init__(self):
        _check(self)
        _check_part(self.held_out, name="held_out", of="rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorSettings:
    """What stands between a tower and the decoder; `config.ProjectorConfig` says what each kind does."""

    kind: Literal["linear", "pool", "stack", "resampler", "weave", "crema"] = "linear"
    """Two linear maps; the same behind the mean, or beside each other, of neighbours; learnt queries that look at all;
    or what is added to the frozen projector of an earlier medium: weave to linear maps, crema to a resampler."""
    neighbours: Count = 1
    """Positions of the tower that pool and stack make one token of."""
    queries: Count = 32
    """Tokens of a resampler."""
    layers: Count = 2
    """Blocks of a resampler."""
    heads: Count = 8
    """Attention heads of a resampler."""
    cross_every: Count = 1
    """Every how many of a resampler's blocks look at the tower's features (cross-attention); 1: all of them."""
    rank: Count = 8
    """Rank of weave's adapters and of crema's updates."""
    trunk: str = IMAGE
    """Of weave and crema: the medium to whose projector they add."""
    inner: Literal["identity", "random"] = "identity"
    """Of weave: its maps inside the adapters of earlier media start as the identity, or at random as released."""
    fusion: bool = False
    """Of crema: its tokens are added to those of the trunk's items and take no positions. A conversation has an item of
    it for each of the trunk's, or one for all of them."""

    def __post_init__(self):
        _check(self)
        if self.fusion and self.kind != "crema":
            raise MoextendError(f"projector.fusion is of kind crema alone, and the kind is {self.kind}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediumSettings:
    """A medium beside pictures, or how pictures reach the decoder (medium "image")."""

    kind: MediumKind = "audio"
    """What its files are."""
    tower: str = ""
    """Folder of its frozen tower, for pictures or Whisper's; embedded: the package's own for sounds, or for
    pictures; "": of kind features none, of kinds image and video the run's `vision`."""
    projector: ProjectorSettings = dataclasses.field(default_factory=ProjectorSettings)
    """Between its tower and the decoder."""
    seconds: Count = 2
    """Length in seconds of the longest sound that is heard."""
    frames: Count = 8
    """Pictures of a video."""
    join: Literal["each", "mean"] = "each"
    """The frames' tokens one after another, or averaged patch by patch."""
    spans: tuple[Count, ...] = ()
    """Tokens that an item may take, ascending: the fewest that cover it; none: all take as many as the longest."""
    width: Amount = 0
    """Of features: channels (C) of each position."""
    patches: Amount = 0
    """Of features: positions (P) of an item at most."""

    def __post_init__(self):
        _check(self)
        if (self.kind == "features") != bool(self.width and self.patches):
            raise MoextendError("width and patches belong to kind features, which needs both")
        if any(span >= longer for span, longer in itertools.pairwise(self.spans)):
            raise MoextendError(f"spans = {self.spans}: give them ascending, each once")


class Link(NamedTuple):
    """An extension in a run: its name, the medium that it is for ("": a task in text), whether it is trained apart from
    those before it, on the base, and its method: a rival's, None: new experts. closed: these open in finetune."""

    name: str = IMAGE
    medium: str = IMAGE
    apart: bool = False
    rival: AdapterConfig | BlocksConfig | None = None
    connector: bool = False
    closed: bool = False

    @property
    def kind(self) -> Literal["extensions", "adapters", "blocks"]:
        """What its leaves lie under, and the field of `ModelConfig` that it is in."""
        if self.rival is None:
            return "extensions"
        return "blocks" if isinstance(self.rival, BlocksConfig) else "adapters"

    @property
    def parts(self) -> dict[str, Any]:
        """What a rival adds to the field `kind` of a model, by name: of DAMC two."""
        if isinstance(self.rival, AdapterConfig) and self.rival.method == "damc":
            return {self.name: self.rival, f"{self.name}.text": dataclasses.replace(self.rival, tokens="text")}
        return {self.name: self.rival} if self.rival else {}

    @property
    def title(self) -> str:
        """For tables."""
        if self.rival is None:
            return "connector" if self.connector else "MoExtend"
        if isinstance(self.rival, BlocksConfig):
            return "LLaMA-Pro"
        return {"lora": "LoRA", "damc": "DAMC", "mole": "LLaVA-MoLE", "moram": "MoRAM"}[self.rival.method]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionGroups:
    """What every extension of a run has settings for."""

    align: StageSettings
    extend: StageSettings
    finetune: StageSettings
    full: StageSettings
    evaluate: EvaluateSettings
    select: SelectSettings = dataclasses.field(default_factory=SelectSettings)
    grow: GrowSettings = dataclasses.field(default_factory=GrowSettings)
    method: MethodSettings = dataclasses.field(default_factory=MethodSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionSettings(ExtensionGroups):
    """A further extension of a run."""

    medium: str = ""
    """The medium that it is for; "": a task in text."""
    apart: bool = False
    """Trained on the base alone, without the extensions before it."""

    def __post_init__(self):
        _check(self)


RESERVED = (
    "align", "extend", "select", "grow", "finetune", "full", "data", "features", "eval", "base", "aligned", "probed",
    "moextend", "strict", "open",
)  # fmt: skip
"""What an extension cannot be called: folders and models of a work directory have these names."""

MESH = {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}
"""All devices share the arrays, where nothing else is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(ExtensionGroups):
    """Everything a run needs; `base` and `vision` are Hugging Face folders, "embedded" the small real model inside."""

    extension: str = IMAGE
    """What the extension of the groups above is called."""
    medium: str = IMAGE
    """The medium that it is for; "": a task in text."""
    extensions: Mapping[str, ExtensionSettings] = dataclasses.field(default_factory=dict)
    """Further ones by name, trained one after another, each with the earlier ones frozen."""
    media: Mapping[str, MediumSettings] = dataclasses.field(default_factory=dict)
    """Media by name beside pictures, which are "image"."""
    recipe: Recipe = RECIPES["paper"]
    base: str = "embedded"
    """Folder of the pretrained language model; embedded: the small real one of the package."""
    vision: str = "embedded"
    """Folder of the pretrained vision tower; embedded: the small real one of the package; "": the one that the base
    brings; none: the run has no pictures."""
    seed: Amount = 0
    """Seed of new parameters, of the order of data, and of what is held out."""
    data_dir: str = ""
    """Where prepared data sets go; "" is WORKDIR/data."""
    manual_dir: str = ""
    """Where LLaVA's JSON and image folder are."""
    images: str = ""
    """The folder that image paths in data are relative to; "" is the folder of the file that names them, or its folder
    images."""
    cache_features: bool = True
    """Keep the frozen tower's output on disk, so that it runs once per image."""
    workers: Amount = 0
    """Processes that read and decode data; 0: the one that trains."""
    cpu_devices: Amount = 0
    """XLA devices to make of a CPU, at most one per core; 0: as many as pay. Products too small to be shared by cores
    leave all but one idle."""
    aux_coefficient: NotNegative = 0.001
    """Weight of the load-balancing loss."""
    # The next nine are those of `config.ModelConfig`.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Element type of frozen parameters and of the computation."""
    train_dtype: Literal["bfloat16", "float32"] = "float32"
    """Element type of the parameters that a stage trains."""
    remat: Literal["none", "attention", "layer"] = "layer"
    """What the backward pass computes again: nothing, attention, or whole layers, which takes least memory."""
    saved: tuple[Saved, ...] = ()
    """Products that are kept all the same where layers are computed again."""
    dispatch: Literal["gather", "exchange"] = "gather"
    """How tokens meet experts on other devices: all-gather in the expert group, or all-to-all."""
    text_isolation: Literal["none", "strict"] = "none"
    """strict: conversations without an extension's medium never choose its experts, so that all others are computed as
    before it."""
    composition: Literal["shared", "decoupled"] = "shared"
    """Where several extensions are open to a token: it chooses among all, or the tokens of a medium's span have their
    own extension alone."""
    expert_storage: ExpertStorage = "as_is"
    """How the frozen pretrained experts are stored: in `dtype`, or in 8 or 4 bits with a scale for each group of
    weights; mxfp4 is how gpt-oss is published, in groups of 32."""
    expert_group: Count = 64
    """Weights of experts that share a scale, where they are stored in few bits."""
    mesh: Mapping[str, Annotated[int, Range(least=1, also=(-1,))]] = dataclasses.field(default_factory=MESH.copy)
    """Devices along each axis of the mesh; -1: as many as are left."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    checkpoints_kept: Annotated[int, Range(least=2)] = 2
    """Checkpoints of a stage that are kept: two at least, for the newest may be damaged."""
    log_every: Count = 10
    """Steps between lines of metrics."""
    sinks: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    """What gets the logged numbers beside `metrics.jsonl`: rows of `train/sinks.py`."""
    validate_every: Amount = 0
    """Steps between two losses of held-out rows, the same rows each time; the last step has one too. 0: none."""
    profile: str = ""
    """FIRST:LAST, steps of every training stage that are traced into WORKDIR/STAGE/profile for xprof; "": none."""
    faults: FaultSettings = dataclasses.field(default_factory=FaultSettings)
    """What training does about damaged examples."""
    hang_after: NotNegative = 0.0
    """Seconds after which a training process that has not ended its step says where it stands and ends with exit code
    1, so that what started it can start it again; compiling, saving and validating do not count. 0: it waits."""
    nonfinite_limit: Amount = 10
    """Steps of a stage that may be skipped because their loss or gradient is not finite."""
    rollbacks: Amount = 0
    """How often, above that limit, a stage goes back to its newest checkpoint and on with later data."""
    mixture: StageSettings | None = None
    """A last stage that trains the router columns, calibrators and projectors of all extensions together, on data that
    may have several media in a conversation (Uni-MoE's third phase); None: there is none."""
    chains: tuple[Literal["strict", "open", "full"], ...] = ()
    """Chains of all extensions that `moextend run` makes. strict, open: in WORKDIR/strict and WORKDIR/open, with and
    without text isolation. full: full fine-tuning on one data set after another, in the last of these folders. None:
    a single chain, as `text_isolation` says."""
    study: StudySettings | None = None
    """What `moextend study` varies."""
    baseline: bool = False
    """`moextend run` also trains the full fine-tuning baseline."""

    def __post_init__(self):
        _check(self)
        if self.text_isolation == "strict" and self.recipe.routers_kept == "after":
            raise MoextendError(
                "text_isolation strict needs routers_kept before: routers that the probe trained change text too"
            )

        if self.quantised:
            self.quantised.check_group("expert_group")
        if self.expert_storage != "as_is" and (self.baseline or "full" in self.chains):
            raise MoextendError(
                f"expert_storage {self.expert_storage}: full fine-tuning trains the pretrained experts, which then are "
                "integers; set it as_is, or leave the baseline out"
            )
        for name, group in self._groups:
            if group.method.guidance and not group.method.drift and group.grow.column == "copy":
                raise MoextendError(
                    f"extension {name}: method.guidance keeps every token from a copied column, which never leads; set "
                    "grow.column to mean, zero or random, or method.drift above 0"
                )
        if self.mixture and (rivals := [link.name for link in self.links if link.rival and not link.apart]):
            raise MoextendError(
                f"mixture trains router columns, calibrators and projectors, but nothing of {', '.join(rivals)}, whose "
                "method is another; leave mixture out"
            )
        counts = {link.rival.count for link in self.links if isinstance(link.rival, BlocksConfig)}
        if len(counts) > 1:
            raise MoextendError(f"method.blocks = {' and '.join(map(str, counts))}: all extensions must have as many")
        _ = self.profiled
        if self.vision == "none" and (unseen := [link.name for link in self.links if link.medium == IMAGE]):
            raise MoextendError(
                f'vision none: the run has no pictures, but extension {unseen[0]} is of them; set its medium, "" for a '
                "task in text"
            )
        names = [link.name for link in self.links]
        if (of := self.media.get(IMAGE)) and of not in [
            MediumSettings(kind=kind, projector=of.projector)
            for kind in ("audio", "image")  # the default, or said
        ]:
            raise MoextendError(
                f"media.{IMAGE} can set a projector alone: pictures have the tower that vision names; add another "
                "medium for other items"
            )
        for name in (*names, *self.media):
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in RESERVED:
                raise MoextendError(
                    f"{name!r} cannot name an extension or a medium: small letters, digits and _, and none of "
                    f"{', '.join(RESERVED)}"
                )
        if len(set(names)) < len(names):
            raise MoextendError(f"extensions.{self.extension} has the name of the first extension")
        seen: set[str] = set()
        for link in self.links:
            if missing := [name for name in self.woven_into(link.medium) if name not in seen]:
                raise MoextendError(
                    f"extension {link.name}: the projector of {link.medium} stands on that of {missing[0]}, which no "
                    "extension before it has trained; media on one trunk stand in the order of training"
                )
            if link.connector and not link.medium:
                raise MoextendError(
                    f"extension {link.name}: method connector trains a medium's projector; name a medium"
                )
            seen |= set() if link.apart else {link.medium}
            if link.medium and link.medium not in (IMAGE, *self.media):
                known = ", ".join((IMAGE, *self.media))
                raise MoextendError(f"extension {link.name} is for the medium {link.medium!r}; media are {known}")
            if not link.medium and self.text_isolation == "strict":
                raise MoextendError(
                    f"text_isolation strict: extension {link.name} is for no medium, so that no conversation could "
                    "choose it; name one, or set text_isolation none"
                )

    @property
    def trunks_first(self) -> list[str]:
        """Media by name, those on whose projectors others stand before these: a configuration has no order of names."""
        return sorted(self.media, key=lambda name: self.media[name].projector.kind in TRUNKS)

    def woven_into(self, medium: str) -> list[str]:
        """Media whose projectors that of a medium runs through: its trunk, and of weave those before it on the same."""
        own = self.media.get(medium)
        if own is None or own.projector.kind not in TRUNKS:
            return []
        kind, trunk = own.projector.kind, own.projector.trunk
        before = list(self.media)[: list(self.media).index(medium)]
        past = [
            name for name in before if (of := self.media[name].projector).kind == kind == "weave" and of.trunk == trunk
        ]
        return [trunk, *past]

    @property
    def _groups(self) -> list[tuple[str, Any]]:
        """The extensions in order, each with its groups of settings."""
        return [(self.extension, self), *self.extensions.items()]

    def of_extension(self, extension: str) -> ExtensionGroups:
        """The groups of an extension."""
        return dict(self._groups)[extension]

    @property
    def links(self) -> tuple[Link, ...]:
        """The extensions in order."""
        return tuple(
            Link(
                name,
                of.medium,
                apart=getattr(of, "apart", False),
                rival=of.method.rival(of.medium),
                connector=of.method.name == "connector",
                closed=of.method.name == "moextend" and of.grow.selection_bias == "closed",
            )
            for name, of in self._groups
        )

    def link(self, name: str) -> Link:
        """That of an extension."""
        return next(link for link in self.links if link.name == name)

    @property
    def profiled(self) -> range:
        """The steps that `profile` names, first and last among them."""
        if not self.profile:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.profile)
        first, last = map(int, match.groups()) if match else (0, 0)
        if not 1 <= first <= last:
            raise MoextendError(f"profile = {self.profile!r} must be FIRST:LAST, steps from 1 on, such as '100:103'")
        return range(first, last + 1)

    @property
    def quantised(self) -> Quantised | None:
        return Quantised.of(self.expert_storage, self.expert_group)

    @property
    def model_options(self) -> dict[str, Any]:
        """The fields of `config.ModelConfig` that are choices of a run, not sizes of a checkpoint."""
        names = ("dtype", "train_dtype", "remat", "saved", "dispatch", "text_isolation", "composition",
                 "expert_storage", "expert_group")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "weight_guard": self.recipe.weight_guard,
            "mass": self.recipe.mass,
        }


UNDECISIVE = frozenset(
    ("mesh", "cpu_devices", "remat", "saved", "dispatch", "checkpoint_every", "checkpoints_kept", "log_every", "sinks",
     "validate_every", "profile", "hang_after")
)  # fmt: skip
"""Settings of how a run computes and what it says meanwhile: what it makes is the same, but for rounding."""


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's settings, as a mapping, those that decide what it makes."""
    return {name: value for name, value in settings.items() if name not in UNDECISIVE}


def to_config_dict(settings: RunSettings) -> ConfigDict:
    """The settings as an editable ConfigDict, which is what files in configs/ return."""
    return ConfigDict(dataclasses.asdict(settings))


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> RunSettings:
    """Checks names, types and ranges; a mistake is an error that names the field."""
    return build(RunSettings, as_mapping(config), where="config")


def as_mapping(config: Any) -> Any:
    """Settings in whatever form they come as a mapping, with the groups in it; anything else as it is."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {name: as_mapping(of) for name, of in config.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return config


_RANKED = ("lora", "damc", "mole", "moram")
_FEW_BITS = tuple(kind for kind in get_args(ExpertStorage) if kind != "as_is")
GOES_WITH: Mapping[type, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    RunSettings: {"saved": ("remat", ("layer",)), "expert_group": ("expert_storage", _FEW_BITS)},
    SelectSettings: {"share": ("layers", ("extender", "random", "interval")), "expert": ("source", ("fixed",))},
    GrowSettings: {"lowered_by": ("start", ("lowered",)), "opens_by": ("selection_bias", ("closed",))},
    MethodSettings: {"blocks": ("name", ("blocks",))}
    | dict.fromkeys(("guidance", "drift"), ("name", ("moextend",)))
    | dict.fromkeys(("rank", "alpha", "attention", "experts", "router"), ("name", _RANKED))
    | dict.fromkeys(("lora_experts", "gating", "balance"), ("name", ("mole",)))
    | dict.fromkeys(("top_k", "tau", "threshold"), ("name", ("moram",))),
    ProjectorSettings: {"neighbours": ("kind", ("pool", "stack")), "inner": ("kind", ("weave",))}
    | dict.fromkeys(("queries", "layers", "heads", "cross_every"), ("kind", ("resampler",)))
    | dict.fromkeys(("rank", "trunk"), ("kind", tuple(TRUNKS))),
    MediumSettings: {"seconds": ("kind", ("audio",)), "tower": ("kind", ("audio", "image", "video"))}
    | dict.fromkeys(("frames", "join"), ("kind", ("video",))),
}
"""TABLE of settings that work with some values of another alone: by class and field, that field and these values."""


def without_effect(settings: Any, *, where: str = "") -> Iterator[str]:
    """The settings that are not as they are by default but that others leave without effect, in words."""
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), f"{where}{field.name}"
        other, needed = GOES_WITH.get(type(settings), {}).get(field.name, ("", ()))
        if other and value != field.default and (found := getattr(settings, other)) not in needed:
            goes = " or ".join(needed)
            yield f"{path} has no effect: {where}{other} is {found}, and it goes with {goes}"
        groups = {f"{path}.{name}": of for name, of in value.items()} if isinstance(value, Mapping) else {path: value}
        for name, group in groups.items():
            if dataclasses.is_dataclass(group):
                yield from without_effect(group, where=f"{name}.")


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(settings: Any) -> None:
    """Holds every field of one of the classes above against its type and range, also where Python calls the class."""
    for name, kind in fields(type(settings)).items():
        value = build(kind, getattr(settings, name), where=f"{type(settings).__name__}.{name}")
        object.__setattr__(settings, name, value)


def _check_part(part: float, *, name: str, of: str) -> None:
    if part > 1 and part != round(part):
        raise MoextendError(f"{name} = {part:g} is neither a share, below 1, nor a whole number of {of}")


NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""How messages call the types of settings."""


@functools.cache
def fields(kind: type) -> dict[str, Any]:
    """The type of each field, with its range."""
    return typing.get_type_hints(kind, include_extras=True)


def build(kind: Any, value: Any, *, where: str) -> Any:
    """The value as `kind`: groups of settings from Mappings, tuples from lists, floats from integers; a mistake is an
    error that begins with `where`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None, or several groups: that of its `kind`, the first without one
        if value is None:
            return None
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        named = (of for of in arguments if kind is not None and getattr(of, "kind", None) == kind)
        return build(next(named, arguments[0]), value, where=where)
    if origin is Annotated:
        number = build(arguments[0], value, where=where)
        for bounds in arguments[1:]:
            bounds.check(number, what=where)
        return number
    if dataclasses.is_dataclass(kind):
        return _group(cast(type, kind), value, where=where)
    if origin is Literal:
        if value not in arguments:
            raise MoextendError(f"{where} = {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if arguments[-1] is Ellipsis and isinstance(value, list | tuple):
            arguments = arguments[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise MoextendError(f"{where} = {value!r} must be {len(arguments)} values")
        return tuple(build(part, item, where=where) for part, item in zip(arguments, value, strict=True))
    if origin is not None:  # Mapping
        if not isinstance(value, Mapping):
            raise MoextendError(f"{where} = {value!r} is not a group of settings")
        if get_origin(arguments[0]) is Literal:
            _check_names(value, get_args(arguments[0]), where=where)
        return {name: build(arguments[1], item, where=f"{where}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise MoextendError(f"{where} is too large a number")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MoextendError(f"{where} = {value!r} must be {NOUNS.get(kind, kind.__name__)}")
    return value


def _group(kind: type[Settings], value: Any, *, where: str) -> Settings:
    if isinstance(value, kind):
        for name, part in fields(kind).items():
            build(part, getattr(value, name), where=f"{where}.{name}")
        return value
    if not isinstance(value, Mapping):
        raise MoextendError(f"{where} = {value!r} is not a group of settings")
    _check_names(value, fields(kind), where=where)
    missing = [
        field.name
        for field in dataclasses.fields(cast(Any, kind))
        if field.name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise MoextendError(f"{where}: {', '.join(missing)} must be set")
    parts = {name: build(fields(kind)[name], value[name], where=f"{where}.{name}") for name in value}
    try:
        return kind(**parts)
    except MoextendError as error:  # the class's own checks, of several fields, do not know where they stand
        raise MoextendError(f"{where}: {error}") from None


def _check_names(given: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    for name in given:
        if name not in known:
            raise MoextendError(f"{where}.{name} is no setting; there are {', '.join(sorted(known))}")
