"""FLOPs of a step from the sizes alone: model, stage and tokens in, FLOPs by part and by phase out.

A part is a matrix product of the model. Its phases: the forward pass; what the backward pass recomputes under the remat
policy; the gradient to its input (attention: to queries, keys, values); the gradient to its weights, only where the
stage trains them. Attention counts the causal half, the loss counts every position as labelled, and elementwise work
counts nothing. Experts compute the rows routed to them and no more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from moextend_jax.config import (
    AdapterConfig,
    DecoderConfig,
    FeaturesConfig,
    Medium,
    ModelConfig,
    VisionConfig,
    WhisperConfig,
)
from moextend_jax.models.adapters import ATTENTION, EXPERTS
from moextend_jax.models.moextend import running

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
    "shared/gate": None,
    "shared/up": None,
    "new_experts/gate": "gate",
    "new_experts/up": "up",
    # The gradient of B needs A's product. No gradient needs the product of the down map's B.
    **{f"adapters/{name}/a": None for name in ("query", "key", "value", "out", "gate", "up", "down", "router")},
    **{f"adapters/{name}/b": name for name in ("query", "key", "value", "gate", "up")},
    "adapters/out/b": "middle",
    "adapters/router/b": None,
    "adapters/choice": None,
}
"""TABLE decoder part, of dense layers too -> the name in `saved` under which remat "layer" keeps its result; None:
always recomputed.

"attention/scores" is both products of attention. With "attended" kept, kernels run neither again; what they compute
anew inside their backward pass is not counted. XLA's own attention (rows too short for a kernel, on TPU and CPU) does
half of it again all the same. The down projection is not here, because nothing recomputes it: the combine weight goes
in before it, so no gradient needs its output.
"""

RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    # Nothing needs the output of a checkpointed part again, so its last product is not recomputed.
    "attention": (
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/scores",
        "adapters/out/a",
        *(f"adapters/{name}/{factor}" for name in ("query", "key", "value") for factor in "ab"),
    ),  # fmt: skip
    "layer": tuple(SAVED_AS),
}
"""TABLE remat policy -> decoder parts that the backward pass computes again."""


class Part(NamedTuple):
    """`flops` of the forward pass of all tokens; `leaves` are its weights (none: attention's scores); `below` is the
    share of it that has a backward pass, in layers where a gradient must reach its input."""

    name: str
    flops: float
    leaves: tuple[str, ...]
    below: float


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


def of_those(config: ModelConfig, media: frozenset[str]) -> ModelConfig:
    """The model with only the extensions, adapters and blocks that run for a batch with these media."""
    names = running(config, media)
    return config.with_added(lambda name, of: of if name in names else None)


def step_flops(
    config: ModelConfig,
    *,
    trains: Iterable[str],
    rows: int,
    length: int,
    items: Mapping[str, int],
    new_share: float | None = None,
) -> Flops:
    """FLOPs of one step.

    Args:
      trains: path patterns of the trainable leaves.
      rows, length: of the global batch; `items` of each medium per row.
      new_share: share of an extended layer's picks that go to the new experts of one extension; None: X / (E + all new
        experts), as with a balanced router.
    """
    trains, present = tuple(trains), frozenset(name for name, count in items.items() if count)
    config = of_those(config, present)
    saved = config.saved if config.remat == "layer" else ()
    again = [name for name in RECOMPUTED[config.remat] if SAVED_AS[name] not in saved]

    def trained(leaves: tuple[str, ...]) -> bool:
        return any(fnmatchcase(leaf, pattern) for leaf in leaves for pattern in trains)

    found: dict[str, dict[str, float]] = {}
    config = dataclasses.replace(config, gradient_from=config.lowest_trained(trains))
    for part in _parts(config, trained, rows=rows, length=length, items=items, new_share=new_share):
        kind = part.name.partition(" of ")[0].removeprefix("dense/")
        recomputed = part.below * part.flops if kind in again else 0.0
        backward = (1 if part.leaves else 2) * part.below * part.flops
        gradients = part.flops if trained(part.leaves) else 0.0
        found[part.name] = dict(zip(PHASES, (part.flops, recomputed, backward, gradients), strict=True))
    return Flops(found)


def full_training(config: ModelConfig, *, rows: int, length: int, items: Mapping[str, int]) -> Flops:
    """Full fine-tuning of the model that is being extended, same batch, every layer recomputed."""
    plain = dataclasses.replace(config.with_added(lambda *_: None), remat="layer", saved=())
    flops = step_flops(plain, trains=("decoder/*", "media/*"), rows=rows, length=length, items=items)
    for name, phases in flops.parts.items():
        # By definition 8 x weights x tokens: all products of a layer are recomputed, also the last one.
        if name.removeprefix("dense/").startswith(("attention/", "router", "experts/", "shared/")):
            phases["recomputed"] = phases["forward"]
    return flops


def _parts(
    config: ModelConfig, trained, *, rows: int, length: int, items: Mapping[str, int], new_share: float | None
) -> list[Part]:
    parts: list[Part] = []
    for name, medium in config.media.items():
        if n := rows * items.get(name, 0):
            parts += _medium(f"media/{name}/", medium, trained, n=n, width=config.decoder.width)
            parts += _woven(f"media/{name}/projector/", medium, n=n, width=config.decoder.width)
    return parts + _decoder(config, rows=rows, length=length, new_share=new_share)


def _medium(inside: str, medium: Medium, trained, *, n: int, width: int) -> list[Part]:
    """Tower and projector of n items."""
    tower, C, D, n = medium.tower, medium.tower.sizes()["C"], width, n * medium.frames
    parts: list[Part] = []
    if not isinstance(tower, FeaturesConfig):
        parts = _tower(inside + "tower/", tower, trained((inside + "tower/layers/attention/query",)), n=n)
    projector, below = medium.projector, trained((inside + "tower/layers/attention/query",))
    if projector.trunk:  # its maps are the trunk's; a map to the trunk's width is below them
        below |= projector.width != C
    if projector.kind in ("resampler", "crema"):
        return parts + _resampler(inside + "projector/", medium, below, trained, n=n, width=D)
    tokens, inputs = n * projector.tokens(tower.patches), projector.width or C
    inputs *= projector.neighbours if projector.kind == "stack" else 1
    maps = f"media/{projector.trunk}/projector/" if projector.trunk else inside + "projector/"
    first = Part(inside + "projector/first", 2.0 * tokens * inputs * D, (maps + "first",), below)
    below = below or trained(first.leaves) or bool(projector.trunk)
    second = Part(inside + "projector/second", 2.0 * tokens * D * D, (maps + "second",), below)
    return [*parts, first, second]


def _resampler(inside: str, medium: Medium, below: bool, trained, *, n: int, width: int) -> list[Part]:
    """A resampler's blocks and its last map. Maps of blocks are the trunk's where there is one; queries and the last
    map are its own. below: whether a gradient must reach the tower's states."""
    projector, P = medium.projector, medium.tower.patches
    C, q, U = projector.width or medium.tower.sizes()["C"], projector.queries, projector.layers
    u = -(-U // projector.cross_every)
    maps = f"media/{projector.trunk}/projector/" if projector.trunk else inside
    own = below or trained((inside + "out",))
    blocks = 2.0 * n * q * C * C * ((4 + 8) * U + 2 * u)  # self-attention and MLP; cross-attention's queries and output
    return [
        Part(inside + "blocks", blocks, (maps + "self_attention/inner/query",), own),
        Part(inside + "seen", 4.0 * n * P * C * C * u, (maps + "cross_attention/inner/key",), below),
        Part(inside + "scores", 4.0 * n * q * C * (q * U + P * u), (), own),
        Part(inside + "out", 2.0 * n * q * C * width, (inside + "out",), own),
    ]


def _woven(inside: str, medium: Medium, *, n: int, width: int) -> list[Part]:
    """What a medium adds to its trunk: a map to the trunk's width, and two thin products beside each of the trunk's
    maps, of its own adapter and of those before it. Of crema its map and its fusion; its updates are small."""
    projector, C, n = medium.projector, medium.tower.sizes()["C"], n * medium.frames
    c, parts = projector.width, []
    if projector.trunk and c != C:
        parts += [Part(inside + "input", 2.0 * n * medium.tower.patches * C * c, (inside + "input/weight",), False)]
    if projector.kind == "weave":
        tokens, adapters = n * projector.tokens(medium.tower.patches), len(projector.past) + 1
        flops = 2.0 * tokens * projector.rank * adapters * ((c + width) + (width + width))
        parts += [Part(inside + "adapters", flops, (inside + "first/up",), True)]
    if projector.fusion:
        flops = 2.0 * n * projector.queries * width * width
        parts += [Part(inside + "fuse", flops, (inside + "fuse",), True)]
    return parts


def _tower(inside: str, tower: VisionConfig | WhisperConfig, trains: bool, *, n: int) -> list[Part]:
    C, J = tower.width, tower.hidden
    layers = range(tower.layers + 1)[tower.feature_layer]
    if isinstance(tower, VisionConfig):
        Q, first = tower.sizes()["Q"] + tower.registers, 2.0 * n * tower.patches * tower.patch_size**2 * 3 * C
    else:  # two convolutions of three taps, the second at half the frames
        Q, first = tower.patches, 2.0 * n * 3 * (tower.frames * tower.bands * C + tower.patches * C * C)
    tokens = n * Q
    mlp, maps = ("swiglu", 3) if isinstance(tower, VisionConfig) and tower.gated else ("mlp", 2)
    return [
        Part(inside + "patch", first, (inside + "patch", inside + "conv1"), False),
        Part(inside + "attention", 8.0 * layers * tokens * C * C, (inside + "layers/attention/query",), trains),
        Part(inside + "scores", 4.0 * layers * tokens * Q * C, (), trains),
        Part(inside + mlp, 2.0 * maps * layers * tokens * C * J, (f"{inside}layers/{mlp}/up",), trains),
    ]


def _decoder(config: ModelConfig, *, rows: int, length: int, new_share: float | None) -> list[Part]:
    decoder: DecoderConfig = config.decoder
    D, F, Z, H, k = decoder.width, decoder.hidden, len(decoder.routed), decoder.head_size, decoder.top_k
    N, K, E = decoder.heads, decoder.kv_heads, decoder.experts
    T = rows * length
    picked: dict[str, float] = {}  # by extension, the share of all picks of all layers that go to its experts
    for name, added in config.extensions.items():
        columns = E + sum(other.new_experts for other in config.extensions.values())
        share = added.new_experts / columns if new_share is None else new_share
        picked[name] = len(added.layers) * share
    # Experts of start "added" take no pick from others.
    taken = sum(share for name, share in picked.items() if config.extensions[name].start != "added")
    old_rows = T * k * (Z - taken)
    layers = "decoder/layers/"
    experts = layers + "moe/experts/"

    def above(layers: Sequence[int]) -> float:
        return sum(layer >= config.gradient_from for layer in layers) / len(layers)

    below = above(decoder.routed)

    def pairs(layers: Sequence[int]) -> float:
        """Pairs of a query and a key that it sees, in a row, over these layers: half of all, fewer with a window."""
        window = min(decoder.local_window, length)
        local = sum(decoder.local[layer] for layer in layers) if decoder.local else 0
        return (len(layers) - local) * length**2 / 2 + local * (window * length - window**2 / 2)

    def attention(inside: str, layers: Sequence[int], stack: str = "") -> list[Part]:
        Z = len(layers)
        of = {"query": N, "key": K, "value": K, "out": N}
        parts = [
            Part(f"{stack}attention/{name}", 2.0 * Z * T * D * heads * H, (f"{inside}attention/{name}",), above(layers))
            for name, heads in of.items()
        ]
        scores = Part(f"{stack}attention/scores", 4.0 * rows * pairs(layers) * N * H, (), above(layers))
        return [*parts[:3], scores, parts[3]]

    def passed_by_all(inside: str, layers: Sequence[int], width: int, stack: str = "") -> list[Part]:
        each = 2.0 * len(layers) * T * D * width
        names = ("gate", "up", "down") if width else ()
        return [Part(f"{stack}shared/{part}", each, (f"{inside}shared/w_{part}",), above(layers)) for part in names]

    dense, sizes = "decoder/dense/", decoder.sizes()
    first = range(sizes["z"])
    parts = [
        *(attention(dense, first, "dense/") + passed_by_all(dense, first, sizes["j"], "dense/") if first else []),
        *attention(layers, decoder.routed),
        Part("router", 2.0 * Z * T * D * E, (layers + "moe/gate",), below),
        Part("experts/gate", 2.0 * old_rows * D * F, (experts + "w_gate",), below),
        Part("experts/up", 2.0 * old_rows * D * F, (experts + "w_up",), below),
        Part("experts/down", 2.0 * old_rows * D * F, (experts + "w_down",), below),
    ]
    for name, added in config.extensions.items():
        extended, X, A, new = len(added.layers), added.new_experts, added.calibrator_width, f"extensions/{name}/"
        f = added.wide * F
        of, new_rows = "" if len(config.extensions) == 1 else f" of {name}", T * k * picked[name]
        router, calibrator = 2.0 * extended * T * D * X, 4.0 * extended * T * (E + X) * A
        share = above(added.layers)
        if added.calibrator.startswith("two_layers"):
            parts += [Part(f"calibrator{of}", calibrator, (new + "router/calibrator/w_in",), share)]
        parts += [
            Part(f"router/new{of}", router, (new + "router/new_gate",), share),
            Part(f"new_experts/gate{of}", 2.0 * new_rows * D * f, (new + "new_experts/w_gate",), share),
            Part(f"new_experts/up{of}", 2.0 * new_rows * D * f, (new + "new_experts/w_up",), share),
            Part(f"new_experts/down{of}", 2.0 * new_rows * D * f, (new + "new_experts/w_down",), share),
        ]
    for name, adapter in config.adapters.items():
        of = "" if len(config.adapters) == 1 else f" of {name}"
        parts += _adapter(f"adapters/{name}/", adapter, decoder, T=T, of=of)
    for name, blocks in config.blocks.items():
        inside = f"blocks/{name}/"
        own = attention(inside, blocks.sources(decoder))
        own += [Part("router", 2.0 * blocks.count * T * D * E, (inside + "moe/gate",), True)]
        for part, leaf in {"gate": "w_gate", "up": "w_up", "down": "w_down"}.items():
            flops = 2.0 * blocks.count * T * k * D * F
            own += [Part(f"experts/{part}", flops, (f"{inside}moe/experts/{leaf}",), True)]
        own += passed_by_all(inside, blocks.sources(decoder), sizes["s"])
        parts += [part._replace(name=f"{part.name} of blocks {name}") for part in own]
    parts += passed_by_all(layers, decoder.routed, sizes["s"])
    head = "decoder/embed" if decoder.tied_head else "decoder/head"
    return [*parts, Part("head", 2.0 * T * D * decoder.vocab_size, (head,), True)]


def _adapter(inside: str, adapter: AdapterConfig, decoder: DecoderConfig, *, T: int, of: str) -> list[Part]:
    """Low-rank updates: two thin products beside each map, of all LoRA experts' ranks, for every row of the map."""
    sizes, k = adapter.sizes(decoder), decoder.top_k
    maps = [(f"attention/{name}", axes, T, adapter.rank) for name, axes in ATTENTION.items() if adapter.attention]
    if adapter.of_experts:
        maps += [(f"block/{name}", axes, T * k, adapter.columns) for name, axes in EXPERTS.items()]
    if adapter.router:
        maps += [("block/router", ("D", "E"), T, adapter.rank)]
    parts = []
    for path, axes, rows, rank in maps:
        for factor, letters in zip("ab", axes, strict=True):
            flops = 2.0 * sizes["Z"] * rows * rank * math.prod(sizes[letter] for letter in letters)
            name = f"adapters/{path.rpartition('/')[2]}/{factor}{of}"
            parts.append(Part(name, flops, (f"{inside}{path}/{factor}",), True))
    if adapter.method == "mole":
        flops = 2.0 * sizes["Z"] * T * sizes["D"] * sizes["I"]
        parts.append(Part(f"adapters/choice{of}", flops, (f"{inside}block/choice/weight",), True))
    return parts
