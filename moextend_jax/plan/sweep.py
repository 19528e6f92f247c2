"""Tries meshes, remat policies and micro-batches for a stage on a topology, and ranks what fits by time per step.

In: settings. Out: one plan per combination that was compiled, best first. Each is compiled in a process of its own,
and only if its arguments and the saved layer inputs leave room; the most promising first, by a rough count.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moextend_jax.config import ModelConfig, MoextendError
from moextend_jax.plan import topology
from moextend_jax.plan.abstract_step import abstract_step, patterns, stage_settings
from moextend_jax.plan.flops import step_flops
from moextend_jax.plan.memory import shard_bytes
from moextend_jax.plan.planning import local_tokens
from moextend_jax.plan.sizes import model_config
from moextend_jax.plan.table import describe
from moextend_jax.settings import RunSettings


class Candidate(NamedTuple):
    """A combination to compile. `held` are bytes it needs at the very least, `seconds` a rough time per step."""

    settings: RunSettings
    held: int
    seconds: float


def sweep(
    settings: RunSettings, *, stage: str, topology_name: str, most: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compiles the `most` most promising candidates; `tell` hears of each."""
    place = topology.parse(topology_name)
    possible = [estimate(one, stage=stage, place=place) for one in choices(settings, stage=stage, place=place)]
    able = sorted((one for one in possible if one.held <= place.chip.hbm), key=lambda one: one.seconds)
    if not able:
        raise MoextendError(
            f"{stage} does not fit on {topology_name} in any of {len(possible)} ways: arguments and layer inputs alone "
            f"need {min(one.held for one in possible) / 2**30:.1f} GiB per chip"
        )
    tell(f"{len(possible)} combinations, {len(able)} may fit, compiling {min(most, len(able))}")
    plans = []
    for number, one in enumerate(able[:most], 1):
        accumulate = stage_settings(one.settings, stage).accumulate
        tell(f"{number}: {describe({**dataclasses.asdict(one.settings), 'accumulate': accumulate})}")
        plans.append(_apart(one.settings, stage=stage, topology_name=topology_name, tell=tell))
    return sorted(filter(None, plans), key=lambda plan: (not plan["fits"], plan["step_seconds"]))


SAVED = ("attended", "middle", "key", "value", "query", "gate", "up")
"""What remat "layer" may keep, dearest to recompute per byte first; a sweep tries the first none, one, two, ..."""


def choices(settings: RunSettings, *, stage: str, place: topology.Topology) -> Iterator[RunSettings]:
    """All meshes that divide experts, key heads and rows, with every remat policy and power-of-two micro-batches."""
    run, config = stage_settings(settings, stage), model_config(settings, stage=stage)
    policies: list[dict[str, Any]] = [{"remat": "none", "saved": ()}]
    policies += [{"remat": "layer", "saved": SAVED[:count]} for count in range(len(SAVED) + 1)]
    data = place.shape[0] if place.chip.platform == "gpu" else 1  # replicas across nodes, sharded within one
    inside = place.chips // data
    for expert, tensor in itertools.product((1, 2, 4, 8), repeat=2):
        if config.decoder.experts % expert or config.decoder.kv_heads % tensor or inside % (expert * tensor):
            continue
        mesh = {"data": data, "fsdp": inside // expert // tensor, "expert": expert, "tensor": tensor}
        for accumulate, policy in itertools.product((2**n for n in range(8)), policies):
            if run.batch_size % (accumulate * place.chips // tensor) == 0:
                chosen: dict[str, Any] = {stage: dataclasses.replace(run, accumulate=accumulate)}
                yield dataclasses.replace(settings, mesh=mesh, **policy, **chosen)


def estimate(settings: RunSettings, *, stage: str, place: topology.Topology) -> Candidate:
    """From sizes and shardings alone."""
    run, config = stage_settings(settings, stage), model_config(settings, stage=stage)
    mesh = topology.make_mesh(place, settings.mesh)
    abstract = abstract_step(settings, config, stage=stage, mesh=mesh)
    tokens, micro = local_tokens(run, mesh), run.accumulate
    arguments = shard_bytes((abstract.state, abstract.frozen, abstract.batch))
    images = run.images_per_row if config.vision else 0
    flops = step_flops(
        config, trains=patterns(settings, stage=stage), rows=run.batch_size, length=run.length, images=images
    )
    compute = flops.total / place.chips / place.chip.flops
    sent = micro * _sent(config, abstract, tokens, mesh)
    return Candidate(settings, arguments + _saved(config, tokens), max(compute, sent / (2 * place.chip.link)))


def _saved(config: ModelConfig, tokens: int) -> int:
    """Bytes of what every layer keeps for the backward pass, at the least its input."""
    decoder = config.decoder
    heads, keys = decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size
    rows = decoder.top_k * decoder.hidden
    sizes = dict(zip(SAVED, (heads, decoder.width, keys, keys, heads, rows, rows), strict=True))
    kept = sizes if config.remat == "none" else config.saved
    return 2 * decoder.layers * tokens * (decoder.width + sum(sizes[name] for name in kept))


def _sent(config: ModelConfig, abstract: Any, tokens: int, mesh: Any) -> float:
    """Bytes that a chip receives per micro-batch: frozen weights twice, and tokens where experts or heads are split."""
    weights = 2 * shard_bytes(abstract.frozen) * (mesh.shape["fsdp"] - 1)
    activations = 2 * tokens * config.decoder.width * config.decoder.layers
    passes = 2 if config.remat == "none" else 3
    return weights + passes * activations * (
        2 * (mesh.shape["expert"] - 1) + 4 * math.log2(mesh.shape["tensor"])
    )  # fmt: skip


def _apart(settings: RunSettings, *, stage: str, topology_name: str, tell: Callable[[str], None]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "moextend_jax.plan.command", stage, topology_name],
        input=json.dumps(dataclasses.asdict(settings)), capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        tell(f"   failed: {last}")
        return None
    return json.loads(done.stdout.splitlines()[-1])
