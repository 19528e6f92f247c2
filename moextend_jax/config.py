"""Sizes of a model, the recipe of the method, and the legend of letters that every shape uses.

Legend (array names end in their axes, einsum uses the same letters, `sharding.TABLE` gives each a mesh axis):

    B batch rows            L sequence length        S key/value length       T tokens = B*L
    D model width           N query heads            K key/value heads        H head size
    E pretrained experts    X new experts per layer  F expert hidden width    k experts per token
    R routed rows = T*k     V vocabulary             A calibrator width       O = E+X router outputs
    Z decoder layers        Y extended layers        U vision layers          M images per row
    f F of new experts      n images = B*M           d model width as an input axis
    C vision width          P patches per image      J vision hidden width    W patch pixels (h w channels)
    Q vision positions = 1+P (the class token first)
    G 1 + kinds of faults in data (`data/faults.py`): conversations read, then those skipped by kind
    g most conversations in a row

Nothing here imports the rest of the package.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Annotated, Any, Literal, NamedTuple


class MoextendError(Exception):
    """A mistake of input or use that the user can mend: printed as one line, exit code 2."""


class Range(NamedTuple):
    """What a number may be, beside its type: `steps: Annotated[int, Range(least=1)]`. NaN and infinity never are.

    `least` and `most` are allowed themselves, `above` and `below` are not; `also` are single values outside.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a Mixtral decoder; defaults are Mixtral-8x7B's."""

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

    def sizes(self) -> dict[str, int]:
        return {
            "V": self.vocab_size, "D": self.width, "F": self.hidden, "Z": self.layers, "N": self.heads,
            "K": self.kv_heads, "H": self.head_size, "E": self.experts, "f": self.hidden,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of a CLIP vision transformer; defaults are ViT-L/14 at 336 pixels.

    `feature_layer` picks the hidden state that goes to the projector: -1 the last layer's output, -2 the one before.
    """

    width: int = 1024
    hidden: int = 4096
    layers: int = 24
    heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    feature_layer: int = -2

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def sizes(self) -> dict[str, int]:
        return {
            "C": self.width, "J": self.hidden, "U": self.layers, "N": self.heads, "H": self.width // self.heads,
            "P": self.patches, "Q": self.patches + 1, "W": self.patch_size**2 * 3,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionConfig:
    """Which layers (0-based, ascending) get new experts, and the pretrained expert each one is copied from."""

    layers: tuple[int, ...]
    sources: tuple[int, ...]
    new_experts: int = 1
    calibrator_width: int = 16

    def sizes(self) -> dict[str, int]:
        return {"Y": len(self.layers), "X": self.new_experts, "A": self.calibrator_width}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTags:
    """Token ids around an image: `start`, then one `pad` per patch (its embedding is replaced), then `end`.

    The defaults are the byte pieces of ASCII's STX, ETX and NUL in Mixtral-8x7B's own vocabulary, so that no
    pretrained array has to grow; text may not contain those characters. In another vocabulary these pieces have other
    ids, or others stand for them (`data/tokenizer.py` chooses: `image_tags`), and the released code appends rows
    instead: a checkpoint names its own.
    """

    start: int = 5
    end: int = 6
    pad: int = 3

    @property
    def ids(self) -> tuple[int, int, int]:
        return self.start, self.end, self.pad


WeightGuard = Literal["none", "bounded"]

Saved = Literal["query", "key", "value", "attended", "middle", "gate", "up"]
"""What a rematerialised layer can keep: attention's inputs and output, the residual stream between attention and
experts, the experts' two products (those exist on TPU and GPU). Each is a product over D, so each costs the same memory
per FLOP that it saves; "attended" saves the attention itself: its kernel (splash, cuDNN, blocked) does not run forward
again. Where there is none (`attention.attend`) XLA computes the scores again whatever is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `vision` None is a text model; `extension` None is a model not grown yet."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    extension: ExtensionConfig | None = None
    tags: ImageTags = ImageTags()
    dtype: str = "bfloat16"
    """Storage dtype of frozen parameters and dtype of activations."""
    train_dtype: str = "float32"
    """Storage dtype of whatever a stage trains."""
    remat: Literal["none", "attention", "layer"] = "layer"
    """What the backward pass recomputes: nothing, attention only, or whole layers (least memory)."""
    saved: tuple[Saved, ...] = ()
    """With remat "layer": what is kept all the same."""
    dispatch: Literal["gather", "exchange"] = "gather"
    """How tokens meet experts on other devices: a row of `expert_parallel.DISPATCHES`."""
    text_isolation: Literal["none", "strict"] = "none"
    """Which tokens may choose new experts: all (the paper), or those of conversations with an image, so that text is
    computed as before the extension: batches of text by the same program, bit for bit."""
    weight_guard: WeightGuard = "bounded"
    """What keeps calibrated weights finite: a row of `router.WEIGHT_GUARDS`. A run takes it from its recipe."""

    def sizes(self) -> dict[str, int]:
        parts = [self.decoder.sizes()]
        if self.extension:
            parts.append(self.extension.sizes())
            parts.append({"O": self.decoder.experts + self.extension.new_experts})
        return {letter: size for part in parts for letter, size in part.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice in which the paper and its released code differ; the defaults are the paper's.

    `RECIPES["released"]` reproduces the code. The table is in docs/recipe.md.
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
    prompt: Literal["checkpoint", "mixtral", "chatml", "llama3", "released"] = "checkpoint"
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


class Batch(NamedTuple):
    """Rows of token sequences, host (NumPy) or device arrays; what data makes and models read.

    A row may hold several conversations one after another: `segments_BL` is 0 on padding and 1, 2, ... on
    the conversations, tokens see only their own segment, and `positions_BL` restart with each.
    `patches_BL` is -1 on text; on an image's pad tokens it is the index into the row's `M*P` patch features.
    Exactly one of `images_BMhwc` (float, normalised) and `features_BMPC` (from a frozen tower) is given for a
    batch with images; both are None for text. For the host's books alone: `faults_BG` counts the conversations behind a
    row, None where nothing can be skipped; `examples_Bg` are the data set's rows in it, -1 on empty places.
    """

    ids_BL: Any
    labels_BL: Any
    positions_BL: Any
    segments_BL: Any
    patches_BL: Any
    images_BMhwc: Any = None
    features_BMPC: Any = None
    faults_BG: Any = None
    examples_Bg: Any = None
