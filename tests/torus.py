"""Meshes whose devices lie as on TPU tori: neighbours in a mesh belong to different processes."""

from __future__ import annotations

import os
from collections import defaultdict

import numpy as np

from moextend_jax import mesh

VARIABLE = "MOEXTEND_TEST_TORUS"


def arranged(devices, shape) -> np.ndarray:
    """Two processes of two devices each: a0, b0, a1, b1."""
    by_process = defaultdict(list)
    for device in devices:
        by_process[device.process_index].append(device)
    return np.array([device for turn in zip(*by_process.values(), strict=True) for device in turn]).reshape(shape)


def asked() -> bool:
    """Whether this process shall have such meshes; from here on it has."""
    if VARIABLE not in os.environ:
        return False
    mesh.arranged = arranged
    return True
