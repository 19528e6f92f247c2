"""Devices that are not there: a topology's name in ("v5p:4x4x4", "h100:2x8"), a mesh to compile for out.

TPU topologies come from libtpu, those of GPUs from JAX's CUDA plugin; neither needs the hardware.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental import topologies
from jax.sharding import Mesh

from moextend_jax.chips import Chip, chip
from moextend_jax.config import MoextendError
from moextend_jax.folders import extra_hint
from moextend_jax.machine import NO_TPU
from moextend_jax.mesh import mesh_of

TARGETS = Path(__file__).parent
"""Folder of NAME.txtpb, which describe GPUs to the CUDA compiler."""


class Topology(NamedTuple):
    """Chips of one kind. shape: chips along each side of a TPU torus, or (nodes, GPUs per node)."""

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def parse(name: str) -> Topology:
    """Raises MoextendError for what is no topology, in words that say what one looks like."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if not match:
        raise MoextendError(f"topology {name!r}: write CHIP:SHAPE, for instance v5p:4x4x4, v5e:16x16 or h100:2x8")
    kind, shape = match[1], tuple(map(int, match[2].split("x")))
    hardware = chip(kind)
    dimensions = {"tpu": (hardware.dimensions,), "gpu": (1, 2)}[hardware.platform]
    if len(shape) not in dimensions or 0 in shape:
        wanted = {3: "AxBxC", 2: "AxB", 1: "GPUS or NODESxGPUS"}[hardware.dimensions]
        raise MoextendError(f"topology {name!r}: {kind} is written {kind}:{wanted}")
    if hardware.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    return Topology(name, kind, hardware, shape)


def make_mesh(topology: Topology, sizes: Mapping[str, int]) -> Mesh:
    """A mesh of compile-only devices."""
    devices = _tpus(topology) if topology.chip.platform == "tpu" else _gpus(topology)
    if len(devices) != topology.chips:
        raise MoextendError(f"topology {topology.name!r} has {len(devices)} chips, not {topology.chips}")
    return mesh_of(devices, sizes)


def _tpus(topology: Topology) -> list[Any]:
    # libtpu would look for a TPU, ask a metadata server about it, and refuse to run beside another process.
    for variable, value in {**NO_TPU, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]  an extra
    except ImportError:
        raise MoextendError(f"plans for TPUs need their compiler: {extra_hint('plan')}") from None
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu").devices)
    except Exception as error:  # libtpu's own wording of what it does not have
        message = str(error).splitlines()[0]
        raise MoextendError(f"topology {topology.name!r} is unknown to libtpu: {message}") from None


def _gpus(topology: Topology) -> list[Any]:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    target = TARGETS / f"{topology.kind}.txtpb"
    nodes, gpus = topology.shape
    try:
        described = topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x{nodes}x{gpus}", target_config=target.read_text()
        )
    except Exception as error:  # whatever is missing: the plugin, CUDA's libraries, a field of the target
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoextendError(f"plans for GPUs need JAX's CUDA plugin ({extra_hint('gpu')}): {message}") from None
    return list(described.devices)
