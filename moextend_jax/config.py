"""Sizes of a model, the recipe of the method, and the legend of letters that every shape uses.

Legend (array names end in their axes, einsum uses the same letters, `sharding.TABLE` gives each axis of a parameter or
a batch its mesh axes; 1 is an axis of size 1):

    B batch rows            L sequence length        S key/value length       T tokens = B*L
    D model width           N query heads            K key/value heads        H head size
    E pretrained experts    X new experts per layer  F expert hidden width    k experts per token
    R routed rows = T*k     V vocabulary             A calibrator width       O = E+X router outputs
    o columns among O that compete for a token's k picks (`models/starts.py`)
    Z routed layers         Y extended layers        U layers of a tower      M items of a medium per row
    f F of new experts      n items = B*M            d model width as an input axis
    s hidden width of the shared expert   z dense layers before the routed ones   j hidden width of their one expert
    C tower width           P patches per image      J tower hidden width     W patch pixels (h w channels)
    Q vision positions = P, or 1+P with a class token, which is first; then r registers, then patches, in hidden states
    h w c rows, columns and colours of a picture     t frames of a video      p tokens that a projector makes of an item
    b mel bands   l mel frames   q queries of a resampler   u its blocks that attend to the tower
    G 1 + kinds of faults in data (`faults.py`): conversations read, then those skipped by kind
    g most conversations in a row
    i positions of all media of a row, one after another (`Batch.places_BL` counts them)
    I LoRA experts          r rank of low-rank updates, of all I together
    a groups of D           v groups of F; their weights share a scale where experts are stored in few bits

Other meanings, in these files alone:

    attention, blocked_attention   G query heads of a key head   h half of a head's rotated part   n = B*K
    blocked_attention, blocked_swiglu   b queries or rows of a block   s keys that a block sees
    grouped_matmul, grouped_triton, blocked_swiglu   G groups of rows, each with its matrix   S those of all layers
    grouped_triton   T tiles of rows   K contracted axis   N output columns
    quantised        I contracted axis   O output columns   g groups of I
    expert_parallel  p sending, q receiving devices   e experts of a device
    router           g groups of experts, E of each
    vision, whisper, resampler, projectors   c = C where it is not split   vision   g gate and up of a SwiGLU
    whisper          w frames under a convolution
    woven            c tower width of the trunk   h = r as an output axis   i earlier media   g = i+1 gates   w = 1
    train/loss       c tokens of a chunk   v columns of a block of V   n layers or rows, each balanced by itself
    generate         l positions, n pieces, of what is scored at a time   b ids of a block, G blocks
    grow             m sources of a new expert
    positions        y x rows and columns of patches
    media/, made_sounds   a samples of a sound   m its channels   f Fourier bins   p patches that a file has
    data/measure     n conversations   report/results_pictures   n points of a curve
    wordings         m models   d data sets   j wordings   t the best of these

Nothing here imports the rest of the package.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

Value = TypeVar("Value")


class MoextendError(Exception):
    """A mistake of input or use that the user can mend: printed as one line, exit code 2."""


class Range(NamedTuple):
    """The values that a number may have: `steps: Annotated[int, Range(least=1)]`. NaN and infinity are never allowed.

    `least` and `most` are inclusive bounds, `above` and `below` exclusive; `also`: single allowed values outside.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def __str__(self) -> str:
        inside = " and ".join(f"{words} {edge}" for words, _, edge in self._edges()) or "finite"
        return ", or ".join([inside, *map(str, self.also)])

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return value in self.also or all(compare(value, edge) for _, compare, edge in self._edges())

    def check(self, value: float, *, what: str) -> None:
        """Raises MoextendError with the name `what`, the value and the range."""
        if value not in self:
            raise MoextendError(f"{what} = {value} must be {self}")

    def _edges(self) -> list[tuple[str, Any, float]]:
        edges = [
            ("at least", operator.ge, self.least),
            ("more than", operator.gt, self.above),
            ("at most", operator.le, self.most),
            ("less than", operator.lt, self.below),
        ]
        return [(words, compare, edge) for words, compare, edge in edges if edge is not None]


LARGEST = 2**31 - 1
"""Arrays count in int32."""
Count = Annotated[int, Range(least=1, most=LARGEST)]
Amount = Annotated[int, Range(least=0, most=LARGEST)]


class Named(dict[str, Value]):
    """A dict that is never changed (see `replacing`) and so can be hashed. Two are equal only if their order is, too.
    It holds media and extensions of a model by name."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def replacing(self, name: str, value: Value) -> Named[Value]:
        """A copy with `value` under `name`: in place of the old value, or at the end."""
        return Named({**self, name: value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071). Rotary frequencies that turn less than `slow` times within `length` positions are
    divided by `factor`. Those that turn more than `fast` times are unchanged. Between them, the two are mixed linearly
    by their number; `whole` rounds the ends of that ramp to integers. Queries and keys are each multiplied by `growth`;
    None: by m(1) = 0.1 ln(factor) + 1, or with both of the others, by m(mscale) / m(mscale_all), where
    m(s) = 0.1 s ln(factor) + 1."""

    factor: float
    length: int
    fast: float = 32.0
    slow: float = 1.0
    whole: bool = True
    growth: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None
    kind: Literal["yarn"] = "yarn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeConfig:
    """Llama 3.1's. Rotary frequencies that turn less than `low` times within `length` positions are divided by
    `factor`. Those that turn more than `high` times are unchanged. Between them, the two are mixed linearly by the
    number of turns."""

    factor: float
    length: int
    low: float
    high: float
    kind: Literal["llama3"] = "llama3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeConfig:
    """All rotary frequencies are divided by `factor`."""

    factor: float
    kind: Literal["linear"] = "linear"


RopeScaling = YarnConfig | Llama3RopeConfig | LinearRopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder and the features that its family turns on; defaults are Mixtral-8x7B's.

    family: a key of `families.FAMILIES`, which names tensors and attributes in files; no computation depends on it.
    qk_norm: RMSNorm of queries and keys before rotation: per head, or over all heads of a position ("whole").
    clip_qkv: queries, keys and values are clipped to this magnitude. qkv_bias: they have biases.
    shared_hidden: hidden width of the shared expert, which every token passes besides its chosen ones; 0:
    shared_experts * hidden, and if that is 0 too, there is none. shared_gate: a sigmoid gate of the token weights it.
    dense_layers: number of first layers with one expert of width dense_hidden for all tokens, and no routing.
    embed_factor, residual_factor: multiply token embeddings (and media features in their places), and what a block
    adds. logits_divisor: divides the logits. attention_scale: multiplies query-key products; None: 1/sqrt(H).
    scores: how router logits become scores, a row of `router.SCORES`. selection_bias: experts are chosen by score plus
    a bias, and weighted by the score alone. groups, top_groups: experts are in `groups` groups, and a token chooses
    within its `top_groups` best. normalised: the chosen experts' weights sum to one; else they are the scores.
    routed_factor: multiplies all weights. rotary_share: share of a head, its first part, that is rotated.
    rope_scaling: extends the context beyond the pretraining length, by a row of `rope.ROPE_SCALINGS`. local: for each
    layer, whether a token sees only the last local_window tokens, itself included; (): none does. sinks: each head has
    a learnt logit that takes part in the softmax and has no value. out_bias, router_bias, expert_bias: biases of
    attention's output, of router logits, of experts' three maps. router_float32: the router's columns are stored in
    float32, whatever the other dtypes, and its logits are computed in float32. glu, glu_limit: the gated unit, a row of
    `glu.GLUS`, and its clamp limit.

    `window` is the sliding window of a checkpoint, in tokens. It is not computed: every token sees all earlier ones,
    which is the same in rows of up to `window` tokens. Longer rows are refused.
    """

    vocab_size: int = 32000
    width: int = 4096
    hidden: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    experts: int = 8
    top_k: int = 2
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    tied_head: bool = False
    window: int | None = None
    family: str = "mixtral"
    qk_norm: Literal["none", "head", "whole"] = "none"
    clip_qkv: float | None = None
    normalised: bool = True
    qkv_bias: bool = False
    shared_hidden: int = 0
    shared_gate: bool = False
    embed_factor: float = 1.0
    residual_factor: float = 1.0
    logits_divisor: float = 1.0
    attention_scale: float | None = None
    dense_layers: int = 0
    dense_hidden: int = 0
    shared_experts: int = 0
    scores: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    routed_factor: float = 1.0
    rotary_share: float = 1.0
    rope_scaling: RopeScaling | None = None
    local: tuple[bool, ...] = ()
    local_window: int = 0
    sinks: bool = False
    out_bias: bool = False
    router_bias: bool = False
    router_float32: bool = False
    expert_bias: bool = False
    glu: Literal["silu", "clamped"] = "silu"
    glu_limit: float = 7.0

    @property
    def routed(self) -> range:
        """Numbers of the layers that route: `Z` counts these, file names and extensions number all layers."""
        return range(self.dense_layers, self.layers)

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.rotary_share)

    def sizes(self) -> dict[str, int]:
        return {
            "V": self.vocab_size, "D": self.width, "F": self.hidden, "Z": len(self.routed), "N": self.heads,
            "K": self.kv_heads, "H": self.head_size, "E": self.experts, "f": self.hidden,
            "s": self.shared_hidden or self.shared_experts * self.hidden, "z": self.dense_layers,
            "j": self.dense_hidden,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of a vision transformer and features of its family; defaults are CLIP's ViT-L/14 at 336 pixels.

    Where `patch_size` does not divide `image_size`, the last pixels of each side are not seen.
    `feature_layer` picks the hidden state that goes to the projector: -1 the last layer's output, -2 the one before.
    family: a key of `families.towers.TOWERS`, which names tensors and attributes in files; no computation depends on
    it.
    class_token, registers: positions before the patches, which the projector does not read. pre_norm: a norm before the
    layers. gated: layers have a SwiGLU of width `hidden`, whatever `activation` says. layer_scale: what a layer adds is
    scaled, channel by channel.
    levels: mean and standard deviation that normalise colours, a row of `media.image.LEVELS`. stretched: a picture is
    resized to a square without keeping its aspect ratio, whatever `Recipe.image_preparation` says.
    """

    width: int = 1024
    hidden: int = 4096
    layers: int = 24
    heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "quick_gelu"
    feature_layer: int = -2
    family: str = "clip"
    class_token: bool = True
    registers: int = 0
    pre_norm: bool = True
    patch_bias: bool = False
    gated: bool = False
    layer_scale: bool = False
    levels: Literal["clip", "half", "imagenet"] = "clip"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    stretched: bool = False

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    def sizes(self) -> dict[str, int]:
        return {
            "C": self.width, "J": self.hidden, "U": self.layers, "N": self.heads, "H": self.width // self.heads,
            "P": self.patches, "Q": self.patches + self.class_token, "r": self.registers, "W": self.patch_size**2 * 3,
            "g": 2,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Sizes of Whisper's encoder; defaults are whisper-tiny's. `seconds` is the longest sound that it hears here, and
    bounds the mel frames (100 a second) and the positions (50 a second); its weights were made for 30."""

    width: int = 384
    hidden: int = 1536
    layers: int = 4
    heads: int = 6
    bands: int = 80
    seconds: int = 30
    norm_eps: float = 1e-5
    feature_layer: int = -1

    @property
    def frames(self) -> int:
        return 100 * self.seconds

    @property
    def patches(self) -> int:
        return 50 * self.seconds

    def sizes(self) -> dict[str, int]:
        return {
            "C": self.width, "J": self.hidden, "U": self.layers, "N": self.heads, "H": self.width // self.heads,
            "P": self.patches, "b": self.bands, "l": self.frames,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """In place of a tower: features [P, C] that another program computed. Items of fewer positions are allowed."""

    width: int
    patches: int

    def sizes(self) -> dict[str, int]:
        return {"C": self.width, "P": self.patches}


TowerConfig = VisionConfig | WhisperConfig | FeaturesConfig


TRUNKS = {"weave": "linear", "crema": "resampler"}
"""TABLE kind of projector that extends an earlier medium's (the trunk) -> kind of the trunk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """How tower features [P, C] become tokens [p, D] of the decoder.

    linear: two linear maps with a GELU, p = P. pool: the same on means of `neighbours` positions. stack: the same on
    `neighbours` positions concatenated, of width `neighbours` * C. resampler: `queries` learnt vectors attend to all P,
    in `layers` blocks of width C with `heads` heads and cross-attention in every `cross_every`-th, then a linear map.
    weave, crema: updates of rank `rank` on the frozen projector of the medium `trunk`: two linear maps for weave, a
    resampler for crema (`models/woven.py`). `width`: channels of the trunk's tower. Weave alone has `past`, the media
    woven into the same trunk before, and `inner`, how its maps inside their adapters start. Crema alone has `fusion`:
    its tokens are added to those of the trunk's items and take no positions (`Batch.fused`).
    """

    kind: Literal["linear", "pool", "stack", "resampler", "weave", "crema"] = "linear"
    neighbours: int = 1
    queries: int = 32
    layers: int = 2
    heads: int = 8
    cross_every: int = 1
    rank: int = 8
    trunk: str = ""
    width: int = 0
    past: tuple[str, ...] = ()
    inner: Literal["identity", "random"] = "identity"
    fusion: bool = False

    def tokens(self, positions: int) -> int:
        """How many tokens `positions` of a tower become; a last group of neighbours may be incomplete."""
        return self.queries if self.kind in ("resampler", "crema") else -(-positions // self.neighbours)

    @property
    def others(self) -> tuple[str, ...]:
        """Media whose projectors it runs through, frozen: the trunk, then those woven into it before."""
        return (self.trunk, *self.past) if self.trunk else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTags:
    """Token ids around an image, or an item of another medium: `start`, then one `pad` per token of it (whose embedding
    is replaced), then `end`. Every medium has its own `pad`.

    The defaults are the byte pieces of ASCII's STX, ETX and NUL in Mixtral-8x7B's own vocabulary, so that no
    pretrained array has to grow; text may not contain those characters. Other vocabularies have other ids for these
    pieces, or need other pieces (`image_tags` in `data/tokenizer.py` chooses). The released code appends rows instead.
    So each checkpoint names its own ids.
    """

    start: int = 5
    end: int = 6
    pad: int = 3

    @property
    def ids(self) -> tuple[int, int, int]:
        return self.start, self.end, self.pad


IMAGE = "image"
"""Name of the first medium and the first extension, and the only name in file formats of one extension."""

MediumKind = Literal["image", "video", "audio", "features"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medium:
    """A medium of a model: what stands for it in text, the tower that reads it, the projector behind the tower.

    frames: pictures in one item of a video. join: their tokens are concatenated ("each"), or averaged patch by patch
    (Uni-MoE, 2405.11273). spans: the token lengths that an item may have, ascending; () for one length. An item gets
    the shortest that covers it; the longest is P of every array. seconds: for audio whose tower reads spectrograms as
    pictures, the longest sound, which fills the picture (`WhisperConfig` has its own).
    """

    kind: MediumKind = "image"
    mark: str = f"<{IMAGE}>"
    tags: ImageTags = ImageTags()
    tower: TowerConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    frames: int = 1
    join: Literal["each", "mean"] = "each"
    spans: tuple[int, ...] = ()
    seconds: float = 2.0

    @property
    def field(self) -> Literal["media", "features"]:
        """The field of `Batch` that has its items: inputs of a tower, or features that come from elsewhere."""
        return "features" if isinstance(self.tower, FeaturesConfig) else "media"

    @property
    def positions(self) -> int:
        """Tower positions that become one item's tokens: those of all frames, or of one where frames are averaged."""
        return self.tower.patches * (self.frames if self.join == "each" else 1)

    @property
    def tokens(self) -> int:
        """Tokens of an item at most: P of arrays of tokens."""
        return self.projector.tokens(self.tower.patches) * (self.frames if self.join == "each" else 1)

    def room(self, items: int) -> Room:
        """Of so many items."""
        return Room(items, self.tokens, bool(self.onto))

    @property
    def onto(self) -> str:
        """The medium to whose items its own are added; "": they have positions of their own."""
        return self.projector.trunk if self.projector.fusion else ""

    def span(self, positions: int | None = None) -> int:
        """Tokens of an item with `positions` tower positions that are not padding; None: all positions."""
        needed = self.tokens
        # The projector runs frame by frame, so all frames together give more tokens than `tokens(positions)` says.
        if positions is not None and positions < self.positions:
            needed = self.projector.tokens(positions)
        return next((length for length in self.spans if length >= needed), self.tokens)


StartName = Literal["copy", "twin", "lowered", "added"]
"""How new experts start and stand among the others: rows of `models.starts.STARTS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionConfig:
    """Which layers (0-based, ascending) get new experts, and the pretrained experts that each one is copied from.

    sources: one flat list, layer by layer, of the sources of each layer's X experts, `wide` for each; with X = 1 and
    wide = 1 one per layer. wide: number of sources of a new expert; their hidden units are concatenated (f = wide * F),
    the most picked first. start: how new experts start; all but "copy" also change how the trained model computes.
    medium: the medium that it was made for, "" for a task in text. share: its weight beside other extensions
    (`log share` is added to its router logits); 0 removes it exactly, 1 keeps it whole.
    calibrator: corrects the probabilities that weight the chosen experts (`models/router.CALIBRATORS`).
    trains: its experts are stored in `ModelConfig.train_dtype`; experts of other extensions in `ModelConfig.dtype`.
    guidance, drift: for a step that trains it alone, tau of token guidance and the coefficient of the drift losses
    (`models/guidance.py`); 0: off.
    """

    layers: tuple[int, ...]
    sources: tuple[int, ...]
    new_experts: int = 1
    calibrator_width: int = 16
    medium: str = "image"
    share: float = 1.0
    trains: bool = False
    start: StartName = "copy"
    wide: int = 1
    calibrator: CalibratorName = "two_layers"
    guidance: float = 0.0
    drift: float = 0.0

    def sizes(self, decoder: DecoderConfig) -> dict[str, int]:
        """Sizes of the decoder's letters and of those of this extension of it."""
        return {
            **decoder.sizes(), "Y": len(self.layers), "X": self.new_experts, "A": self.calibrator_width,
            "O": decoder.experts + self.new_experts, "f": self.wide * decoder.hidden,
        }  # fmt: skip


MethodName = Literal["lora", "damc", "mole", "moram"]
Gating = Literal["top1", "top1_prob", "dense"]
AdaptedExperts = Literal["none", "shared", "per_expert"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A low-rank update beside the frozen maps of all layers that route (`models/adapters.py`).

    method: LoRA, DAMC, LLaVA-MoLE or MoRAM. tokens: which tokens have it. DAMC makes two adapters: NAME for tokens of
    its medium's items, and NAME.text for tokens of no item. rank: of one LoRA. alpha: the update is multiplied by
    alpha / rank. attention: whether its four maps have an update. experts: whether the pretrained experts' three maps
    have none, one for all experts of a layer, or one per expert. router: whether the pretrained router has one; it
    changes which experts text chooses. lora_experts, gating: MoLE's number of LoRA experts in a layer, and how they are
    weighted (a row of `adapters.GATINGS`). balance: coefficient of their load-balancing loss. top_k, tau, threshold:
    MoRAM's (`adapters.self_activated`). trains: whether a step trains it; MoRAM then has no threshold.
    medium, share: as in `ExtensionConfig`.
    """

    method: MethodName = "lora"
    tokens: Literal["all", "items", "text"] = "all"
    rank: int = 128
    alpha: float = 256.0
    attention: bool = True
    experts: AdaptedExperts = "shared"
    router: bool = False
    lora_experts: int = 1
    gating: Gating = "top1"
    balance: float = 0.0
    top_k: int = 8
    tau: float = 0.03
    threshold: float = 0.2
    trains: bool = False
    medium: str = "image"
    share: float = 1.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def columns(self) -> int:
        """r of the experts' maps: the ranks of all LoRA experts together."""
        return self.lora_experts * self.rank

    @property
    def of_experts(self) -> bool:
        return self.experts != "none"

    def sizes(self, decoder: DecoderConfig) -> dict[str, int]:
        """Sizes of the decoder's letters and of those of this adapter of it."""
        return {**decoder.sizes(), "r": self.columns, "I": self.lora_experts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """Layers put between the pretrained ones that route (`models/blocks.py`): `count` of them, one behind every group
    of Z/count. trains, medium, share: as in `ExtensionConfig`."""

    count: int
    trains: bool = False
    medium: str = "image"
    share: float = 1.0

    def sources(self, decoder: DecoderConfig) -> tuple[int, ...]:
        """Numbers of the layers that they stand behind, and are copied from."""
        each = len(decoder.routed) // self.count
        return tuple(decoder.routed[(n + 1) * each - 1] for n in range(self.count))

    def decoder(self, decoder: DecoderConfig) -> DecoderConfig:
        """Sizes of a decoder of these layers alone."""
        local = tuple(decoder.local[layer] for layer in self.sources(decoder)) if decoder.local else ()
        return dataclasses.replace(decoder, layers=self.count, dense_layers=0, local=local)


class Quantised(NamedTuple):
    """How pretrained experts are quantised: a row of `models/quantised.STORAGES`, and the group size, which is how many
    weights along the contracted axis share a scale."""

    kind: str
    group: int

    @classmethod
    def of(cls, storage: ExpertStorage, group: int) -> Quantised | None:
        """None for "as_is"."""
        return None if storage == "as_is" else cls(storage, group)

    def check_group(self, what: str) -> None:
        """Raises MoextendError where a storage cannot have groups of this size; `what` said it."""
        if self.kind == "mxfp4" and self.group != 32:
            raise MoextendError(f"{what} = {self.group}: groups of mxfp4 are of 32")

    def __str__(self) -> str:
        return f"{self.kind} in groups of {self.group}"


CalibratorName = Literal["two_layers", "two_layers_multiplied", "vector", "vector_multiplied", "none"]
ColumnStart = Literal["copy", "zero", "mean", "random"]
ExpertStart = Literal["copy", "zero_down", "random"]
LayerChoice = Literal[
    "extender", "random", "interval", "all", "first_half", "second_half", "first_quarter", "first_interval",
    "every_second",
]  # fmt: skip
SourceChoice = Literal["recipe", "before", "after", "fixed", "weights", "saliency", "gradient", "fisher"]
ExpertStorage = Literal["as_is", "int8", "int4", "mxfp4", "nf4"]
WeightGuard = Literal["none", "bounded"]
Mass = Literal["base", "literal"]

Saved = Literal["query", "key", "value", "attended", "middle", "gate", "up"]
"""What a rematerialised layer can keep: attention's inputs and output, the residual stream between attention and
experts, the experts' two products (those exist on TPU and GPU). Each is a product over D, so each costs the same memory
per FLOP that it saves. "attended" is the output of attention's kernel (splash, Triton, blocked), which then does not
run forward again. Without a kernel (`attention.attend`) XLA computes the scores again, whatever is kept."""


Added = ExtensionConfig | AdapterConfig | BlocksConfig
RIVALS = ("adapters", "blocks")
ADDITIONS = ("extensions", *RIVALS)
"""Fields of `ModelConfig` that hold what was added to the decoder; paths of its leaves begin so."""


def extension_of(name: str) -> str:
    """The extension that a part called NAME, or NAME.text, belongs to."""
    return name.partition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. Without `media` it is a text model; without `extensions` one that is not grown yet."""

    decoder: DecoderConfig
    media: Named[Medium] = Named()
    """By name, in the order in which their tokens lie in a row's `i`."""
    extensions: Named[ExtensionConfig] = Named()
    """By name, in the order in which they were added. New experts are numbered in this order, from E on."""
    adapters: Named[AdapterConfig] = Named()
    """By name, in the order in which they were added. A name is not that of an extension too."""
    blocks: Named[BlocksConfig] = Named()
    """As `adapters`; all sets have the same number of blocks."""
    dtype: str = "bfloat16"
    """Storage dtype of frozen parameters and dtype of activations."""
    train_dtype: str = "float32"
    """Storage dtype of whatever a stage trains."""
    remat: Literal["none", "attention", "layer"] = "layer"
    """What the backward pass recomputes: nothing, attention only, or whole layers (least memory)."""
    saved: tuple[Saved, ...] = ()
    """With remat "layer": results that are kept."""
    dispatch: Literal["gather", "exchange"] = "gather"
    """How tokens meet experts on other devices: a row of `expert_parallel.DISPATCHES`."""
    text_isolation: Literal["none", "strict"] = "none"
    """Which tokens may choose an extension's experts: all (the paper), or with "strict" those of conversations with its
    medium. Then all others are computed as before the extension, and batches without that medium run the same program,
    bit for bit."""
    composition: Literal["shared", "decoupled"] = "shared"
    """For several extensions. "shared": a token chooses among all that `text_isolation` opens to it. "decoupled":
    tokens of an item choose only its medium's extensions; text tokens choose none with strict text isolation, else
    all."""
    weight_guard: WeightGuard = "bounded"
    """What keeps calibrated weights finite: a row of `router.WEIGHT_GUARDS`. A run takes it from its recipe."""
    mass: Mass = "base"
    """What weights of an extended layer sum to, where the base's do not sum to one (`Recipe.mass`)."""
    expert_storage: ExpertStorage = "as_is"
    """How the pretrained experts' matrices are stored: in `dtype`, or quantised (`models/quantised.py`)."""
    expert_group: int = 64
    """Quantised weights that share a scale."""
    gradient_from: int = 0
    """Set for a step: the first layer that has a backward pass (`train/stages.for_training`)."""
    frozen_experts: Literal["none", "pretrained", "all"] = "none"
    """Set for a step and for generation: which experts surely have no gradient. They are read in place, not copied."""

    def lowest_trained(self, patterns: Iterable[str]) -> int:
        """The lowest layer with extension leaves that these patterns match; layers below need no backward pass. 0 if
        other leaves train, or if the model has blocks, since its layers then run in one scan."""
        parts = [pattern.split("/") for pattern in patterns]
        if self.blocks or any(kind != "extensions" for kind, *_ in parts):
            return 0
        names = {name for name in self.extensions for _, pattern, *_ in parts if fnmatchcase(name, pattern)}
        return min((self.extensions[name].layers[0] for name in names), default=0)

    @property
    def quantised(self) -> Quantised | None:
        return Quantised.of(self.expert_storage, self.expert_group)

    def sizes(self, extension: str | None = None) -> dict[str, int]:
        """Sizes of the decoder's letters, and of those of one of the extensions."""
        return self.decoder.sizes() if extension is None else self.extensions[extension].sizes(self.decoder)

    @property
    def added(self) -> dict[str, Added]:
        """Extensions, then adapters, then blocks."""
        return {**self.extensions, **self.adapters, **self.blocks}

    def with_added(self, change: Callable[[str, Added], Added | None]) -> ModelConfig:
        """A copy in which `change(name, config)` replaces the config of each addition; None removes it."""
        changed: dict[str, Any] = {}
        for kind in ADDITIONS:
            of_kind = {name: change(name, of) for name, of in getattr(self, kind).items()}
            changed[kind] = Named({name: of for name, of in of_kind.items() if of is not None})
        return dataclasses.replace(self, **changed)

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values: all pretrained ones, then those of the blocks."""
        return self.decoder.layers + sum(blocks.count for blocks in self.blocks.values())

    @property
    def outputs(self) -> int:
        """O of routing of the whole model: pretrained experts, then those of all extensions."""
        return self.decoder.experts + sum(added.new_experts for added in self.extensions.values())

    @property
    def has_ZO(self) -> list[list[bool]]:
        """Which of all `outputs` each layer that routes has: the pretrained experts, and those of its extensions;
        between these there may be some that it lacks."""
        parts = [(added.layers, added.new_experts) for added in self.extensions.values()]
        return [
            [True] * self.decoder.experts + [z in layers for layers, new in parts for _ in range(new)]
            for z in self.decoder.routed
        ]

    def spans(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        """For each medium, the token lengths of its count of items, all of maximal length."""
        return {name: [self.media[name].tokens] * count for name, count in counts.items()}

    @property
    def vision(self) -> VisionConfig | None:
        """The picture tower, which files of CLIP, LLaVA and the released code hold; None where there is none."""
        medium = self.media.get(IMAGE)
        return medium.tower if medium and isinstance(medium.tower, VisionConfig) else None

    @property
    def tags(self) -> ImageTags:
        """Those of pictures."""
        return self.media[IMAGE].tags if IMAGE in self.media else ImageTags()

    @property
    def extension(self) -> ExtensionConfig | None:
        """The extension of a model that has at most one, which is all that the released layout can hold."""
        if len(self.extensions) > 1:
            raise MoextendError(
                f"the model has {len(self.extensions)} extensions, {', '.join(self.extensions)}, not one"
            )
        return next(iter(self.extensions.values()), None)

    def columns(self, extension: str) -> range:
        """Numbers of an extension's experts among `outputs`."""
        names = list(self.extensions)
        before = sum(self.extensions[name].new_experts for name in names[: names.index(extension)])
        first = self.decoder.experts + before
        return range(first, first + self.extensions[extension].new_experts)


def of_pictures(
    *,
    decoder: DecoderConfig,
    vision: VisionConfig | None = None,
    extension: ExtensionConfig | None = None,
    tags: ImageTags | None = None,
    **options: Any,
) -> ModelConfig:
    """A model that sees pictures and has at most one extension, both called IMAGE: what published files hold."""
    config = ModelConfig(decoder=decoder, **options)
    return with_extension(with_vision(config, vision, tags=tags), extension)


def with_vision(config: ModelConfig, vision: VisionConfig | None, *, tags: ImageTags | None = None) -> ModelConfig:
    """The model with another picture tower, or without any (None), its tags as they were if none are given."""
    rest = {name: medium for name, medium in config.media.items() if name != IMAGE}
    if vision is None:
        return dataclasses.replace(config, media=Named(rest))
    medium = dataclasses.replace(config.media.get(IMAGE, Medium()), tower=vision)
    medium = medium if tags is None else dataclasses.replace(medium, tags=tags)
    return dataclasses.replace(config, media=Named({IMAGE: medium, **rest}))


def with_extension(config: ModelConfig, extension: ExtensionConfig | None, *, name: str = IMAGE) -> ModelConfig:
    """The model with this extension in the place of the one of that name, or without that one (None)."""
    if extension is not None:
        return dataclasses.replace(config, extensions=config.extensions.replacing(name, extension))
    rest = {other: added for other, added in config.extensions.items() if other != name}
    return dataclasses.replace(config, extensions=Named(rest))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice in which the paper and its released code differ; the defaults are the paper's.

    `RECIPES["released"]` reproduces the code. The table is in docs/reproducing.md.
    """

    counted_picks: Literal["top_k", "least_likely"] = "top_k"
    """Which experts of a token the extender counts."""
    source_under: Literal["before", "after"] = "before"
    """Routing counts that name the expert to copy: the aligned model's or the probed one's."""
    routers_kept: Literal["before", "after"] = "before"
    """Routers of the grown model: the aligned model's, untouched, or those that the probe trained."""
    probe_data: Literal["instruct_held_out", "captions"] = "instruct_held_out"
    """Data of the extend stage: instructions less the held-out samples, or the captions of align."""
    calibrator_std: Annotated[float, Range(above=0)] = 1.0
    """Standard deviation of the calibrator's input matrix at the start."""
    weight_guard: WeightGuard = "bounded"
    """What keeps calibrated weights finite where their sum comes near zero: `models/router.py`."""
    mass: Mass = "base"
    """Of families whose weights do not sum to one: the chosen, calibrated, weigh together what the base's would for the
    token; or literally their calibrated probabilities among E+X, so that a new column takes from every weight."""
    aux_loss: Literal["per_layer", "released"] = "per_layer"
    """Load-balancing loss: `train/loss.py` has both forms."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up; `constant` comes with the released logarithmic warm-up."""
    feature_layer: Annotated[int, Range(most=-1)] = -2
    """Hidden state of the vision tower that the projector reads."""
    image_preparation: Literal["pad", "crop"] = "pad"
    """Pad to a square, or resize the shortest edge and crop the centre."""
    turns: Literal["all", "first"] = "all"
    """Question-answer pairs kept of a conversation."""
    finetune_trains: Literal["extension", "extension_and_projector"] = "extension"
    """What the finetune stage updates."""
    prompt: Literal["checkpoint", "mixtral", "chatml", "llama3", "granite", "glm4", "ernie", "tulu", "released"] = (
        "checkpoint"
    )
    """Chat template: `data/conversations.py` says what each is. That of Mixtral-8x7B-Instruct is "mixtral"."""
    global_batch: tuple[Count, Count] = (256, 128)
    """Rows per step of align and of finetune; a run's own batch size overrides it."""


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(),
    "released": Recipe(
        counted_picks="least_likely",
        source_under="after",
        routers_kept="after",
        probe_data="captions",
        calibrator_std=0.02,
        weight_guard="none",
        aux_loss="released",
        schedule="constant",
        feature_layer=-1,
        image_preparation="crop",
        turns="first",
        finetune_trains="extension_and_projector",
        prompt="released",
        global_batch=(512, 256),
    ),
}

IGNORE = -100
"""Label of a position that the loss does not count."""


class Room(NamedTuple):
    """What a row can hold of a medium: at most M items of at most P tokens each. fused: as `Medium.onto` says."""

    items: int
    tokens: int
    fused: bool = False


Rooms = Mapping[str, Room]
"""By medium, for the media of a batch, in the order of `ModelConfig.media`."""


def first_places(rooms: Rooms) -> dict[str, int]:
    """Where the tokens of each medium begin in a row's `i`."""
    first, places = 0, {}
    for name, room in rooms.items():
        places[name] = first
        first += room.items * room.tokens
    return places


class Batch(NamedTuple):
    """Rows of token sequences, host (NumPy) or device arrays; what data makes and models read.

    A row may hold several conversations one after another: `segments_BL` is 0 on padding and 1, 2, ... on
    the conversations, tokens see only their own segment, and `positions_BL` restart with each.
    `places_BL` is -1 on text; on a pad token of a medium it is the index into the row's tokens of all media (letter i):
    those of the first medium of `ModelConfig.media` that the batch has, M items of P tokens, then those of the next.
    `fused` has such an index `[B, L]` for each medium of the batch that adds to another's tokens (`Medium.onto`): where
    that one's token gets one of its own. It is -1 elsewhere, and where a conversation has no item of it.
    For each medium of the batch, `media` holds its tower's input, [B, M, ...] (an image's [h, w, c], float and
    normalised), or `features` holds a frozen tower's output, [B, M, P, C]; both are empty for text. Only the host reads
    the last two: `faults_BG` counts the conversations behind a row (None where nothing can be skipped); `examples_Bg`
    are the numbers of the data set's rows in it, -1 in empty places.
    """

    ids_BL: Any
    labels_BL: Any
    positions_BL: Any
    segments_BL: Any
    places_BL: Any
    media: Mapping[str, Any] = {}
    features: Mapping[str, Any] = {}
    fused: Mapping[str, Any] = {}
    faults_BG: Any = None
    examples_Bg: Any = None

    @property
    def names(self) -> frozenset[str]:
        """The media that the batch has."""
        return frozenset((*self.media, *self.features))
