"""FLOPs of a step from the sizes alone: model, stage and tokens in, FLOPs by part and by phase out.

A part is a matrix product of the model. Its phases: the forward pass; what the backward pass recomputes under the remat
policy; the gradient to its input (attention: to queries, keys, values); the gradient to its weights, only where the
stage trains them. Attention counts the causal half, the loss counts every position as labelled, and elementwise work
counts nothing. Experts compute the rows routed to them and no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from moextend_jax.config import DecoderConfig, ModelConfig, MoextendError, VisionConfig

PHASES = ("forward", "recomputed", "activation_backward", "weight_gradients")

SAVED_AS = {
    "attention/query": "query",
    "attention/key": "key",
    "attention/value": "value",
    "attention/scores": "attended",
    "attention/out": "middle",
    "router": None,
    "router/new": None,
    "calibrator": None,
    "experts/gate": "gate",
    "experts/up": "up",
    "new_experts/gate": "gate",
    "new_experts/up": "up",
}
"""TABLE decoder part -> the name in `saved` under which remat "layer" keeps its result; None: always recomputed.

"attention/scores" is both products of attention. With "attended" kept, kernels run neither again; what they compute
anew inside their backward pass is not counted. XLA's own attention (float32 on GPU, rows too short or odd for a kernel,
GPU programs compiled where there is no GPU) does half of it again all the same. The down projection is not here,
because nothing recomputes it: the combine weight goes in before it, so no gradient needs its output.
"""

RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    # Nothing needs the output of a checkpointed part again, so its last product is not recomputed.
    "attention": ("attention/query", "attention/key", "attention/value", "attention/scores"),
    "layer": tuple(SAVED_AS),
}
"""TABLE remat policy -> decoder parts that the backward pass computes again."""


class Part(NamedTuple):
    """`flops` of the forward pass of all tokens; `leaves` are its weights (none: attention's scores); `below` says
    whether a gradient must reach its input."""

    name: str
    flops: float
    leaves: tuple[str, ...]
    below: bool


class Flops(NamedTuple):
    """Part -> phase -> FLOPs of a whole step on all chips."""

    parts: dict[str, dict[str, float]]

    @property
    def total(self) -> float:
        return sum(sum(phases.values()) for phases in self.parts.values())

    def by_phase(self) -> dict[str, float]:
        return {phase: sum(phases[phase] for phases in self.parts.values()) for phase in PHASES}

    @property
    def model(self) -> float:
        """Without what is computed twice: the FLOPs that MFU counts."""
        return self.total - self.by_phase()["recomputed"]


def step_flops(
    config: ModelConfig, *, trains: Iterable[str], rows: int, length: int, images: int, new_share: float | None = None
) -> Flops:
    """FLOPs of one step.

    Args:
      trains: path patterns of the trainable leaves.
      rows, length: of the global batch; `images` per row.
      new_share: share of an extended layer's picks that go to new experts; None is X/(E+X), a balanced router.
    """
    trains = tuple(trains)
    if config.remat not in RECOMPUTED:
        raise MoextendError(
            f"remat policy {config.remat!r} has no row in models/flops.py; there are {', '.join(RECOMPUTED)}"
        )
    saved = config.saved if config.remat == "layer" else ()
    again = [name for name in RECOMPUTED[config.remat] if SAVED_AS[name] not in saved]

    def trained(leaves: tuple[str, ...]) -> bool:
        return any(fnmatchcase(leaf, pattern) for leaf in leaves for pattern in trains)

    found: dict[str, dict[str, float]] = {}
    for part in _parts(config, trained, rows=rows, length=length, images=images, new_share=new_share):
        recomputed = part.flops if part.name in again else 0.0
        backward = (1 if part.leaves else 2) * part.flops if part.below else 0.0
        gradients = part.flops if trained(part.leaves) else 0.0
        found[part.name] = dict(zip(PHASES, (part.flops, recomputed, backward, gradients), strict=True))
    return Flops(found)


def full_training(config: ModelConfig, *, rows: int, length: int, images: int) -> Flops:
    """Full fine-tuning of the model that is being extended, same batch, every layer recomputed."""
    plain = dataclasses.replace(config, extension=None, remat="layer", saved=())
    trains = ("decoder/*", "projector/*", "vision/*")
    flops = step_flops(plain, trains=trains, rows=rows, length=length, images=images)
    for (
        name,
        phases,
    ) in flops.parts.items():  # 8 x weights x tokens: by definition all of a layer, also its last product
        if name.startswith(("attention/", "router", "experts/")):
            phases["recomputed"] = phases["forward"]
    return flops


def _parts(config: ModelConfig, trained, *, rows: int, length: int, images: int, new_share: float | None) -> list[Part]:
    if config.vision is None:
        return _decoder(config, rows=rows, length=length, new_share=new_share)
    C, D = config.vision.width, config.decoder.width
    patches = rows * images * config.vision.patches
    tower = trained(("vision/patch",))
    first = Part("projector/first", 2.0 * patches * C * D, ("projector/first",), tower)
    below = tower or trained(first.leaves)
    second = Part("projector/second", 2.0 * patches * D * D, ("projector/second",), below)
    parts = [*_tower(config.vision, tower, images=rows * images), first, second]
    return parts + _decoder(config, rows=rows, length=length, new_share=new_share)


def _tower(vision: VisionConfig, trains: bool, *, images: int) -> list[Part]:
    C, J, Q = vision.width, vision.hidden, vision.patches + 1
    layers = range(vision.layers + 1)[vision.feature_layer]
    tokens = images * Q
    inside = "vision/layers/"
    return [
        Part("vision/patch", 2.0 * images * vision.patches * vision.patch_size**2 * 3 * C, ("vision/patch",), False),
        Part("vision/attention", 8.0 * layers * tokens * C * C, (inside + "attention/query",), trains),
        Part("vision/scores", 4.0 * layers * tokens * Q * C, (), trains),
        Part("vision/mlp", 4.0 * layers * tokens * C * J, (inside + "mlp/up",), trains),
    ]


def _decoder(config: ModelConfig, *, rows: int, length: int, new_share: float | None) -> list[Part]:
    decoder: DecoderConfig = config.decoder
    D, F, Z, H, k = decoder.width, decoder.hidden, decoder.layers, decoder.head_size, decoder.top_k
    N, K, E = decoder.heads, decoder.kv_heads, decoder.experts
    T = rows * length
    extended, X, A = 0, 0, 0
    if config.extension:
        extended, X, A = len(config.extension.layers), config.extension.new_experts, config.extension.calibrator_width
    share = X / (E + X) if new_share is None else new_share
    old_rows, new_rows = T * k * (Z - extended * share), T * k * extended * share
    layers = "decoder/layers/"
    experts, new = (layers + "moe/experts/", "extension/new_experts/")
    parts = [
        Part("attention/query", 2.0 * Z * T * D * N * H, (layers + "attention/query",), True),
        Part("attention/key", 2.0 * Z * T * D * K * H, (layers + "attention/key",), True),
        Part("attention/value", 2.0 * Z * T * D * K * H, (layers + "attention/value",), True),
        Part("attention/scores", 2.0 * Z * T * length * N * H, (), True),
        Part("attention/out", 2.0 * Z * T * D * N * H, (layers + "attention/out",), True),
        Part("router", 2.0 * Z * T * D * E, (layers + "moe/gate",), True),
        Part("experts/gate", 2.0 * old_rows * D * F, (experts + "w_gate",), True),
        Part("experts/up", 2.0 * old_rows * D * F, (experts + "w_up",), True),
        Part("experts/down", 2.0 * old_rows * D * F, (experts + "w_down",), True),
    ]
    if extended:
        calibrator = 4.0 * extended * T * (E + X) * A
        parts += [
            Part("router/new", 2.0 * extended * T * D * X, ("extension/router/new_gate",), True),
            Part("calibrator", calibrator, ("extension/router/calibrator/w_in",), True),
            Part("new_experts/gate", 2.0 * new_rows * D * F, (new + "w_gate",), True),
            Part("new_experts/up", 2.0 * new_rows * D * F, (new + "w_up",), True),
            Part("new_experts/down", 2.0 * new_rows * D * F, (new + "w_down",), True),
        ]
    head = "decoder/embed" if decoder.tied_head else "decoder/head"
    return [*parts, Part("head", 2.0 * T * D * decoder.vocab_size, (head,), True)]
