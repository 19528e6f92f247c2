"""TABLE of chips: what one of each computes, holds and sends per second, from the vendors' data sheets.

In: a name as topologies spell it ("v5p"). Out: its numbers; bytes and FLOPs are plain numbers, bfloat16 products.
"""

from __future__ import annotations

from typing import NamedTuple

from moextend_jax.config import MoextendError

GIB = 2**30


def gpu_share(*, several: bool) -> float:
    """Of a GPU's memory, what a run on it, or on several, takes for its arrays (`machine.whole_gpu`). The rest is for
    CUDA and its libraries: NCCL takes 0.7 to 1.6 GB for each group of GPUs that send to one another, and a mesh has
    several groups."""
    return 0.9 if several else 0.95


SHARED, LEAST_SHARED = {"9": 232448, "10": 232448}, 101376
"""Bytes that a block of a GPU can have in common: of data centres' by their compute capability, and of any from Ampere
on."""


class Chip(NamedTuple):
    """`hbm` is the memory, of a TPU less what its runtime keeps for itself.

    `link` is what one chip sends over one link of its torus in one direction per second (a GPU has one link, to all
    others of its node); `network` the same to chips of another node, where there are nodes. `dimensions` of the torus;
    a ring of at least `wraps` chips is closed. `shared`: memory that the threads of a GPU's block can have in common.
    `host`: what its host sends it per second (PCIe, one direction); 0: not published.
    """

    platform: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    link: float
    dimensions: int
    wraps: int = 0
    network: float = 0.0
    shared: int = 0
    host: float = 0.0

    def usable(self, chips: int) -> int:
        """Bytes of memory that a program on so many chips may use on each."""
        return self.hbm if self.platform == "tpu" else int(gpu_share(several=chips > 1) * self.hbm)


CHIPS = {
    "v5p": Chip("tpu", 459e12, int(95.74 * GIB), 2765e9, 90e9, 3, 4),
    "v5e": Chip("tpu", 197e12, int(15.75 * GIB), 819e9, 45e9, 2, 16),
    "v6e": Chip("tpu", 918e12, int(31.25 * GIB), 1640e9, 90e9, 2, 16),
    # 80 GB as CUDA counts them
    "h100": Chip("gpu", 989e12, int(79.1 * GIB), 3350e9, 450e9, 1, 0, 50e9, SHARED["9"], 64e9),
    "h200": Chip("gpu", 989e12, int(139.8 * GIB), 4800e9, 450e9, 1, 0, 50e9, SHARED["9"], 64e9),
    # 24 GB, on PCIe alone
    "rtx4090": Chip("gpu", 165.2e12, int(23.5 * GIB), 1008e9, 32e9, 1, 0, 3e9, LEAST_SHARED, 32e9),
}


KINDS = {
    "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA GeForce RTX 4090": "rtx4090",
}  # fmt: skip
"""How JAX names the devices that are these chips (`jax.Device.device_kind`)."""


def peak_flops(kind: str) -> float | None:
    """FLOPs a second at best of a device that JAX names so; None where the table has no such chip (a CPU)."""
    return CHIPS[KINDS[kind]].flops if kind in KINDS else None


def shared_memory(kind: str, capability: str | None = None) -> int:
    """Of a block on a GPU that JAX names so, or else on one of this compute capability, such as "9.0"."""
    if kind in KINDS:
        return CHIPS[KINDS[kind]].shared
    return SHARED.get((capability or "").partition(".")[0], LEAST_SHARED)


def chip(name: str) -> Chip:
    if name not in CHIPS:
        raise MoextendError(f"chip {name!r} is unknown; there are {', '.join(CHIPS)}")
    return CHIPS[name]
