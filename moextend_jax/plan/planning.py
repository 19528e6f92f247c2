"""One plan: settings, stage and topology in; whether it fits, bytes, FLOPs, messages and the least time of a step out.

The step is compiled for the topology's chips on this machine's CPU. What data would decide is assumed: every position
has a label, and routers are balanced (or new experts get `new_share` of the picks of their layers).
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from moextend_jax.checkpoints import quantising
from moextend_jax.config import IMAGE, ModelConfig
from moextend_jax.models.flops import full_training, of_those, step_flops
from moextend_jax.plan import collectives, hlo, topology
from moextend_jax.plan.abstract_step import abstract_step, patterns, stage_settings
from moextend_jax.plan.compiling import compile_step
from moextend_jax.plan.memory import memory
from moextend_jax.plan.products import Kernel, products
from moextend_jax.plan.roofline import BOUNDS, Roofline, roofline
from moextend_jax.plan.sizes import model_config
from moextend_jax.plan.traffic import traffic
from moextend_jax.settings import RunSettings, StageSettings
from moextend_jax.sharding import TABLE, spec


def plan(
    settings: RunSettings,
    *,
    stage: str,
    topology_name: str,
    new_share: float | None = None,
    layers: int | None = None,
) -> dict[str, Any]:
    """The plan as plain numbers, ready for JSON: FLOPs of a whole step on all chips, bytes of one chip, seconds.

    Args:
      new_share: share of the picks in extended layers that go to new experts (0 to 1); None: as balanced routers do.
      layers: decoder layers to keep of the base; None: all.
    """
    place = topology.parse(topology_name)
    run = stage_settings(settings, stage)
    config = model_config(settings, stage=stage, layers=layers)
    mesh = topology.make_mesh(place, settings.mesh)
    quantising.check(config.decoder, config.quantised, mesh)
    abstract = abstract_step(settings, config, stage=stage, mesh=mesh)
    compiled = compile_step(abstract)
    chip_bytes = memory(abstract, compiled)
    items = {name: run.room(name) for name in config.media}
    shape: dict[str, Any] = {"rows": run.batch_size, "length": run.length, "items": items}
    flops = step_flops(config, trains=patterns(settings, stage=stage), new_share=new_share, **shape)
    full = full_training(config, **shape)
    figures: dict[str, Any] = {
        "fits": compiled.memory is not None and chip_bytes.total <= place.chip.usable(place.chips),
        "stage": stage,
        "topology": place.name,
        "chips": place.chips,
        "mesh": dict(mesh.shape),
        "rows": run.batch_size,
        "accumulate": run.accumulate,
        "length": run.length,
        "images": items.get(IMAGE, 0),
        "items": items,
        "remat": settings.remat,
        "saved": list(settings.saved) if settings.remat == "layer" else [],
        "trained_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.state.trainable)),
        "bytes_per_chip": {**chip_bytes._asdict(), "limit": place.chip.usable(place.chips)},
        "flops_per_step": {
            "total": flops.total,
            "full_training": full.total,
            "share_of_full_training": flops.total / full.total,
            "per_chip": flops.total / place.chips,
            **flops.by_phase(),
            "parts": flops.parts,
        },
        "undivided": undivided(config, mesh),
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
    }
    if not compiled.text:
        line = _times(Roofline(flops.total / place.chips / place.chip.flops, 0.0, 0.0, {}), run, flops.model, place)
        return {**figures, **line}
    module = hlo.parse(compiled.text)
    tokens = local_tokens(run, mesh)

    def unknown(loop: hlo.Instruction) -> float:
        """The loss goes through its labelled positions; nothing else in a step depends on data."""
        return math.ceil(tokens / run.loss_chunk) if "cross_entropy" in loop.op_name else 1.0

    done = products(module, unknown=unknown, share=_share(config, run, mesh, new_share))
    sent = collectives.collectives(module, mesh, unknown=unknown)
    moved = traffic(module, unknown=unknown)
    line = roofline(place.chip, mesh, flops=done.flops, traffic=moved, sent=sent, host=chip_bytes.host)
    figures["flops_per_step"] |= {
        "compiled": done.flops * place.chips,
        "compiled_over_analytic": done.flops * place.chips / flops.total,
        "compiled_by_phase": {phase: of * place.chips for phase, of in done.by_phase.items()},
        "uncounted_kernels": done.uncounted,
    }
    figures["collective_bytes_per_chip"] = collectives.by_axis(sent)
    figures["collective_bytes_per_chip_by_phase"] = {
        phase: collectives.by_axis([collective for collective in sent if collective.phase == phase])
        for phase in ("forward", "recomputed", "backward")
    }
    figures["memory_traffic_per_chip"] = moved
    return {**figures, **_times(line, run, flops.model, place)}


SPLIT = {
    "D": "channels",
    "E": "experts",
    "N": "heads",
    "K": "key heads",
    "F": "columns of an expert",
    "V": "rows of the vocabulary",
}
"""Axes of a decoder that a mesh splits, by their letter."""


def undivided(config: ModelConfig, mesh: Any) -> list[str]:
    """Sizes of a decoder that their mesh axis does not divide: every device along it holds all, and computes all but
    for channels, which are gathered for use anyway."""
    sizes = config.decoder.sizes()
    axis = {letter: (TABLE[letter] or ("",))[0] for letter in SPLIT}
    return [
        f"{sizes[letter]} {what} on an axis {axis[letter]} of {mesh.shape[axis[letter]]}"
        for letter, what in SPLIT.items()
        if sizes[letter] % mesh.shape[axis[letter]]
    ]


def local_tokens(run: StageSettings, mesh: Any) -> int:
    """Positions (rows times length) of one micro-batch on one chip."""
    shape = (run.batch_size // run.accumulate, run.length)
    return math.prod(NamedSharding(mesh, spec("BL", shape, mesh)).shard_shape(shape))


def _share(config: ModelConfig, run: StageSettings, mesh: Any, new_share: float | None):
    """A function of a grouped product and how often it runs in a step: the share of the product's rows that are picks
    of its experts, not padding. models/expert_parallel.py says which experts a device computes."""
    decoder = config.decoder
    present = frozenset(name for name in config.media if run.room(name))
    running = of_those(config, present)
    extensions = running.extensions.values()
    expert, tensor, k = mesh.shape["expert"], mesh.shape["tensor"], decoder.top_k
    X = sum(added.new_experts for added in extensions)
    # Share of the picks in an extended layer that go to one new expert.
    one = (
        1 / (decoder.experts + X)
        if new_share is None or not X
        else new_share / max(added.new_experts for added in extensions)
    )
    gone = sum(len(added.layers) * added.new_experts for added in extensions) * one / len(decoder.routed)
    extended = sum(len(added.layers) * added.new_experts for added in extensions) / max(X, 1)
    here = decoder.experts // expert if decoder.experts % expert == 0 else decoder.experts
    picks = local_tokens(run, mesh) * expert * tensor * k
    # New ones that do not share the buffer of the others have their own: min(X, k) rows for each token.
    unlike = any(added.wide > 1 or added.start == "added" for added in extensions)
    adapted = any(of.of_experts for of in running.adapters.values())
    alone = expert > 1 or config.dispatch == "exchange" or unlike or adapted

    def share(kernel: Kernel, times: float) -> float:
        like_pretrained = kernel.groups == here and decoder.hidden // tensor in kernel.matrix and kernel.rows >= picks
        if X and not like_pretrained:
            new = kernel.groups * one
            # The product runs in every layer, though only the extended ones have rows for it.
            return (new * k / min(X, k) if alone else new) * min(1.0, extended * run.accumulate / times)
        return (1 - gone) * here / decoder.experts

    return share


def _times(line: Roofline, run: StageSettings, model_flops: float, place: topology.Topology) -> dict[str, Any]:
    peak = place.chip.flops * place.chips
    return {
        "step_seconds": line.seconds,
        "bound": line.bound,
        "roofline": {name: getattr(line, name) for name in BOUNDS},
        "network_seconds": line.by_axis,
        "tokens_per_second": run.batch_size * run.length / line.seconds,
        "mfu": model_flops / (line.seconds * peak),
    }
