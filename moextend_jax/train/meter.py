"""What a logged line says of the steps since the line before: losses, time, FLOPs, memory, and where tokens went.

In: each step's batch and the metrics that the last one returned. Out: plain numbers by name, and lists by layer;
docs/watching.md says what each means. Nothing here is computed by the step but `picks_ZO`, which its loss needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

import numpy as np

from moextend_jax import chips, machine
from moextend_jax.config import Batch, ModelConfig
from moextend_jax.mesh import on_host
from moextend_jax.models.flops import step_flops

GIGA, TERA = 1e9, 1e12


class Meter:
    """Counts from one line to the next."""

    def __init__(self, config: ModelConfig, *, trains: tuple[str, ...], devices: list[Any]):
        self.config, self.trains = config, trains
        peak = chips.peak_flops(devices[0].device_kind)
        self.peak = None if peak is None else peak * len(devices)
        self.flops = 0.0
        self.compiles = True  # the time of the first line includes compilation
        self._restart()

    def note(self, batch: Batch, metrics: Mapping[str, Any]) -> None:
        """Notes a step that has been started: its batch of all processes, and its metrics. It does not wait for these,
        nor sum them, since on CPU JAX would wait for the step to compute a small sum."""
        self.tokens.append(metrics["tokens"])
        self.flops = self.flops or model_flops(self.config, batch, trains=self.trains)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted as step time."""
        began = perf_counter()
        yield
        self.other += perf_counter() - began

    def numbers(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What the line says; waits for the last step."""
        others = ("finite", "picks_ZO", "tokens")
        numbers = {name: float(value) for name, value in metrics.items() if name not in others}
        seconds, tokens = perf_counter() - self.began, sum(map(int, self.tokens))
        numbers |= {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
        if not self.compiles:
            step_seconds = (seconds - self.other) / len(self.tokens)
            numbers |= {"step_seconds": step_seconds, "tflops_per_second": self.flops / step_seconds / TERA}
            if self.peak:
                numbers["mfu"] = self.flops / step_seconds / self.peak
        numbers["peak_memory_gb"] = machine.peak_memory() / GIGA
        self.compiles = False
        self._restart()
        return numbers | by_layer(on_host(metrics["picks_ZO"]), config=self.config)

    def _restart(self) -> None:
        self.began, self.other = perf_counter(), 0.0
        self.tokens: list[Any] = []


def model_flops(config: ModelConfig, batch: Batch, *, trains: tuple[str, ...]) -> float:
    """FLOPs of a step on this batch, without recomputation, and without towers whose features are cached."""
    rows, length = batch.ids_BL.shape
    items = {name: array.shape[1] for name, array in (*batch.media.items(), *batch.features.items())}
    flops = step_flops(config, trains=trains, rows=rows, length=length, items=items)
    cached = tuple(f"media/{name}/tower/" for name in batch.features)
    return flops._replace(parts={name: of for name, of in flops.parts.items() if not name.startswith(cached)}).model


def by_layer(picks_ZO: np.ndarray, *, config: ModelConfig) -> dict[str, list[float | None]]:
    """For each layer, dense ones too: the busiest expert's share of picks, their normalised entropy (1: all experts
    alike, 0: one has all), and in an extended model the share of new experts. None: the layer does not route, or has no
    new experts."""
    experts, routed = config.decoder.experts, config.decoder.routed
    share_ZO = picks_ZO / np.maximum(picks_ZO.sum(axis=1, keepdims=True), 1e-9)
    nats_Z = -(share_ZO * np.log(np.maximum(share_ZO, 1e-30))).sum(axis=1)
    extended = {z for added in config.extensions.values() for z in added.layers}
    numbers = {
        "load_max": _short(share_ZO.max(axis=1)),
        "load_entropy": _short(nats_Z / np.log(np.sum(config.has_ZO, axis=1))),
    }
    if extended:
        new = _short(share_ZO[:, experts:].sum(axis=1))
        numbers["new_share"] = [new[n] if z in extended else None for n, z in enumerate(routed)]
    return {name: [*[None] * routed.start, *values] for name, values in numbers.items()}


def _short(values_Z: np.ndarray) -> list[Any]:
    return [round(float(value), 4) for value in values_Z]
