"""Tries meshes, remat policies and micro-batches for a stage on a topology, and ranks what fits by time per step.

In: settings. Out: one plan per combination that was compiled, best first. Each is compiled in a process of its own,
and only if its arguments, gathered weights and saved activations leave room; the most promising first, by a rough
count.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh

from moextend_jax.apart import apart
from moextend_jax.config import ModelConfig, MoextendError
from moextend_jax.models.flops import step_flops
from moextend_jax.plan import topology
from moextend_jax.plan.abstract_step import abstract_step, patterns, stage_settings
from moextend_jax.plan.memory import shard_bytes
from moextend_jax.plan.planning import local_tokens
from moextend_jax.plan.sizes import model_config
from moextend_jax.plan.table import describe
from moextend_jax.runs import results
from moextend_jax.settings import RunSettings


class Candidate(NamedTuple):
    """A combination to compile. `least_bytes` is what a chip needs for it at the very least, `seconds` a rough time per
    step."""

    settings: RunSettings
    accumulate: int
    least_bytes: int
    seconds: float


def sweep(
    settings: RunSettings,
    *,
    stage: str,
    topology_name: str,
    most: int,
    within: float | None,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Plans (`planning.plan`) of the most promising candidates: first those that fit, the fastest step first.

    Args:
      most: candidates that are compiled at most; `tell` is called with a line about each.
      within: GiB per chip that a step may use; None is all that a chip has.

    Raises:
      MoextendError: no candidate can fit, or none that was tried could be compiled.
    """
    place = topology.parse(topology_name)
    limit = place.chip.usable(place.chips) if within is None else int(within * 2**30)
    possible: list[list[Candidate]] = []
    for _, group in itertools.groupby(choices(settings, stage=stage, place=place), key=lambda choice: choice.mesh):
        on_mesh = list(group)
        mesh_bytes = bytes_on_mesh(on_mesh[0], stage=stage, place=place)
        possible.append([estimate(choice, mesh_bytes, stage=stage, place=place) for choice in on_mesh])
    able = [
        sorted((candidate for candidate in group if candidate.least_bytes <= limit), key=_promise) for group in possible
    ]
    if not any(able):
        least = min(candidate.least_bytes for group in possible for candidate in group)
        raise MoextendError(
            f"{stage} does not fit into {limit / 2**30:.1f} GiB per chip of {topology_name} in any of "
            f"{sum(map(len, possible))} ways: arguments and layer inputs alone need {least / 2**30:.1f} GiB"
        )
    chosen = sorted((candidate for group in able for candidate in group[:PER_MESH]), key=_promise)[:most]
    tell(f"{sum(map(len, possible))} combinations, {sum(map(len, able))} may fit, compiling {len(chosen)}")
    plans = []
    for number, candidate in enumerate(chosen, 1):
        tell(f"{number}: {describe({**dataclasses.asdict(candidate.settings), 'accumulate': candidate.accumulate})}")
        try:
            plan = apart("moextend_jax.plan.command", stage, topology_name, settings=candidate.settings, on_cpu=True)
        except MoextendError as error:
            tell(f"   failed: {error}")
            continue
        plan["fits"] &= plan["bytes_per_chip"]["total"] <= limit
        plans.append(plan)
    if not plans:
        raise MoextendError(f"none of the {len(chosen)} programs that were tried could be compiled for {topology_name}")
    return sorted(plans, key=lambda plan: (not plan["fits"], plan["step_seconds"]))


PER_MESH = 2
"""Candidates of one mesh that may be compiled: the estimate is rough, and its errors differ more from mesh to mesh."""


def _promise(candidate: Candidate) -> tuple[int, int, int]:
    """Sorts candidates: by time to one part in a hundred, then by fewer micro-batches, then by less memory."""
    return round(100 * math.log(candidate.seconds)), candidate.accumulate, candidate.least_bytes


SAVED = ("attended", "middle", "key", "value", "query", "gate", "up")
"""Activations that remat "layer" can save, first those that spare most time per byte. A sweep tries to save none of
them, the first, the first two, ..."""


def choices(settings: RunSettings, *, stage: str, place: topology.Topology) -> Iterator[RunSettings]:
    """All meshes that divide experts, key heads and rows, with power-of-two micro-batches and remat policies.

    Not remat "none": it computes no less than "layer" with everything in SAVED kept, and keeps three times as much.
    """
    run, config = stage_settings(settings, stage), model_config(settings, stage=stage)
    policies: list[dict[str, Any]] = [{"remat": "layer", "saved": SAVED[:count]} for count in range(len(SAVED) + 1)]
    data = place.shape[0] if place.chip.platform == "gpu" else 1  # replicas across nodes, sharded within one
    inside = place.chips // data
    for expert, tensor in itertools.product((1, 2, 4, 8), repeat=2):
        if config.decoder.experts % expert or config.decoder.kv_heads % tensor or inside % (expert * tensor):
            continue
        mesh = {"data": data, "fsdp": inside // expert // tensor, "expert": expert, "tensor": tensor}
        for accumulate, policy in itertools.product((2**n for n in range(8)), policies):
            if run.batch_size % (accumulate * place.chips // tensor) == 0:
                chosen = results.with_stages(settings, {stage: dataclasses.replace(run, accumulate=accumulate)})
                yield dataclasses.replace(chosen, mesh=mesh, **policy)


class MeshBytes(NamedTuple):
    """Bytes on one chip that depend on the mesh alone: all arguments of the step, and the frozen weights among them."""

    mesh: Mesh
    arguments: int
    frozen: int


def bytes_on_mesh(settings: RunSettings, *, stage: str, place: topology.Topology) -> MeshBytes:
    mesh = topology.make_mesh(place, settings.mesh)
    abstract = abstract_step(settings, model_config(settings, stage=stage), stage=stage, mesh=mesh)
    arguments = shard_bytes((abstract.state, abstract.frozen, abstract.batch))
    return MeshBytes(mesh, arguments, shard_bytes(abstract.frozen))


def estimate(settings: RunSettings, mesh_bytes: MeshBytes, *, stage: str, place: topology.Topology) -> Candidate:
    """A candidate's least bytes and rough time, from sizes and shardings alone: nothing is compiled."""
    run, config = stage_settings(settings, stage), model_config(settings, stage=stage)
    tokens = local_tokens(run, mesh_bytes.mesh)
    items = {name: run.room(name) for name in config.media}
    flops = step_flops(
        config, trains=patterns(settings, stage=stage), rows=run.batch_size, length=run.length, items=items
    )
    compute = flops.total / place.chips / place.chip.flops
    sent = run.accumulate * _sent(config, mesh_bytes, tokens)
    # While a layer computes, its own weights and the next one's are gathered; where nothing is split they lie there.
    fsdp = mesh_bytes.mesh.shape["fsdp"]
    gathered = 2 * mesh_bytes.frozen * fsdp // config.decoder.layers if fsdp > 1 else 0
    saving = config.decoder.layers - config.lowest_trained(patterns(settings, stage=stage))
    least = mesh_bytes.arguments + gathered + saving * _saved(config, tokens, mesh_bytes.mesh)
    return Candidate(settings, run.accumulate, least, max(compute, sent / (2 * place.chip.link)))


def _saved(config: ModelConfig, tokens: int, mesh: Mesh) -> int:
    """Bytes on one chip that a layer saves for the backward pass of `tokens` positions: its input, `config.saved`."""
    decoder = config.decoder
    heads, keys = decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size
    rows = decoder.top_k * decoder.hidden * mesh.shape["expert"]  # room for all picks of the group, should all come
    sizes = dict(zip(SAVED, (heads, decoder.width, keys, keys, heads, rows, rows), strict=True))
    return 2 * tokens * (decoder.width + sum(sizes[name] for name in config.saved))


def _sent(config: ModelConfig, mesh_bytes: MeshBytes, tokens: int) -> float:
    """Bytes that a chip receives in a micro-batch of `tokens` positions per chip: frozen weights twice, and activations
    where experts or heads are split."""
    shape = mesh_bytes.mesh.shape
    weights = 2 * mesh_bytes.frozen * (shape["fsdp"] - 1)
    activations = 2 * tokens * config.decoder.width * config.decoder.layers
    return weights + 3 * activations * (2 * (shape["expert"] - 1) + 4 * math.log2(shape["tensor"]))
