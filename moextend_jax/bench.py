"""Times one training step of each stage: settings in, tokens/s, peak memory and the time of each part out.

The model has the sizes of the settings' base and random weights; a row is one image and random text. Each stage runs
in a process of its own, so that peak memory is its own. `moextend bench` prints the table.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from moextend_jax import chips, compile_cache, distributed, machine
from moextend_jax.apart import apart
from moextend_jax.config import IGNORE, IMAGE, Batch, ModelConfig, MoextendError
from moextend_jax.mesh import Program, make_mesh, place_whole
from moextend_jax.models.attention import Visible, rotation
from moextend_jax.models.decoder import feed_forward, layer_of
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import SCALES, with_arrays
from moextend_jax.plan.abstract_step import abstract_step, patterns
from moextend_jax.plan.sizes import model_config
from moextend_jax.runs import results
from moextend_jax.runs.run import cpu_devices
from moextend_jax.settings import RunSettings, from_config_dict
from moextend_jax.train.loss import cross_entropy
from moextend_jax.train.meter import model_flops
from moextend_jax.train.step import init_state

LABELS = {
    "answers": "labels on every other run of 32 text positions, as answers are",
    "all": "labels on every position, the head's work of a model that computes all logits",
}
STEPS, WARMUP = 5, 2
SCALE = 2**-8
"""Of random integers of four bits: weights as large as plain ones are."""


def bench(
    settings: RunSettings, console: Console, *, only: str | None = None, layers: int | None = None
) -> dict[str, dict[str, Any]]:
    """Runs every stage (or `only` one) under both kinds of labels, prints two tables and returns what `measure` does by
    "STAGE/LABELS".

    Args:
      layers: decoder layers to keep of the base, to time a slice of a model that does not fit.
    """
    names = [only] if only else results.table(settings).training(optional=False)
    why_not = {name: _not_timed(settings, name) for name in names}
    if only and why_not[only]:
        raise MoextendError(f"bench: stage {only} {why_not[only]}")
    names = [name for name in names if not why_not[name]]
    report: dict[str, dict[str, Any]] = {}
    for stage, kind in itertools.product(names, LABELS):
        try:
            report[f"{stage}/{kind}"] = apart("moextend_jax.bench", stage, kind, str(layers or 0), settings=settings)
        except MoextendError as error:
            raise MoextendError(f"bench: stage {stage} failed: {error}") from None
    table = Table(
        "stage", "labels", "tokens/s", "s/step", "MFU", "peak memory GB", "XLA temporaries GB", "trained parameters"
    )
    for name, row in report.items():
        mfu = f"{row['mfu']:.0%}" if row["mfu"] else "-"
        table.add_row(*name.split("/"), f"{row['tokens_per_second']:,.0f}", f"{row['seconds_per_step']:.3f}", mfu,
                      f"{row['peak_memory_gb']:.2f}", f"{row['temporaries_gb']:.2f}",
                      f"{row['trained_parameters']:,}")  # fmt: skip
    console.print(table)
    parts = Table("part", *report, caption="share of the sum of the parts; each is timed by itself, forward and "
                  "backward to its input, times the layers that run it")  # fmt: skip
    for part in next(iter(report.values()))["parts"]:
        shares = [row["parts"][part] / sum(row["parts"].values()) for row in report.values()]
        parts.add_row(part, *(f"{share:.0%}" for share in shares))
    console.print(parts)
    for kind, meaning in LABELS.items():
        console.print(f"{kind}: {meaning}")
    return report


def _not_timed(settings: RunSettings, name: str) -> str:
    """Why a stage's step is not timed; "": it is. Batches here have pictures and text, and with nothing of a medium in
    them its extension does not run."""
    table, media = results.table(settings), {link.name: link.medium for link in settings.links}
    if name not in table.training():
        return f"is unknown; there are {', '.join(table.training())}"
    if name == "mixture":
        return "trains all media together, and batches here have pictures alone"
    medium = media[table.result(name).extension]
    return "" if medium in (IMAGE, "") else f"is of {medium}, and batches here have pictures alone"


def random_batch(config: ModelConfig, *, rows: int, length: int, labels: str, pixels: bool = False) -> Batch:
    """Rows of two tokens, a start tag, an image, an end tag, then text; up to the text nothing has a label (or all has,
    with `labels` "all"). Images are features, as a tower makes them, or `pixels`, which go through it."""
    if config.vision is None:
        raise MoextendError("bench measures models that see pictures: name a tower, --config.vision")
    P, rng = config.media[IMAGE].tokens, np.random.default_rng(0)
    text = P + 4
    if length <= text:
        raise MoextendError(f"bench: rows of {length} tokens cannot hold the {P} of an image, and text")
    ids_BL = rng.integers(7, config.decoder.vocab_size, (rows, length), dtype=np.int32)
    places_BL = np.full_like(ids_BL, -1)
    places_BL[:, 3 : 3 + P] = np.arange(P)
    position_L, side = np.arange(length, dtype=np.int32), config.vision.image_size
    shape = (rows, 1, side, side, 3) if pixels else (rows, 1, config.vision.patches, config.vision.width)
    images = {IMAGE: rng.standard_normal(shape, dtype=np.float32)}
    labelled_L = (position_L >= text) & ((position_L - text) // 32 % 2 == 1) if labels == "answers" else position_L >= 0
    return Batch(
        ids_BL=ids_BL,
        labels_BL=np.where(labelled_L, ids_BL, IGNORE),
        positions_BL=np.tile(position_L, (rows, 1)),
        segments_BL=np.ones_like(ids_BL),
        places_BL=places_BL,
        **{"media" if pixels else "features": images},
    )


def measure(
    settings: RunSettings, *, stage: str, labels: str, layers: int | None = None, pixels: bool = False,
    parts: bool = True, trace: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Figures of one stage's step in this process; seconds are medians over `STEPS` steps after `WARMUP`.

    Args:
      pixels: images go through the tower.
      parts: whether parts are timed too, one by one.
      trace: a folder for a trace of one more step; "": none.
    """
    steps = Steps(settings, stage=stage, labels=labels, layers=layers, pixels=pixels)
    seconds = []
    for _ in range(WARMUP + STEPS):
        started = time.perf_counter()
        loss = steps.take()
        seconds.append(time.perf_counter() - started)
    if trace:
        with jax.profiler.trace(trace):
            steps.take()
    median = statistics.median(seconds[WARMUP:])
    peak_memory, device = machine.peak_memory(), jax.devices()[0].device_kind
    peak = chips.peak_flops(device)
    return {
        "tokens_per_second": steps.tokens / median,
        "seconds_per_step": median,
        "seconds": seconds,
        "mfu": steps.flops / median / (peak * steps.mesh.size) if peak else None,
        "tflops_per_step": steps.flops / 1e12,
        "peak_memory_gb": peak_memory / 1e9,
        "temporaries_gb": steps.temporaries / 1e9,
        "trained_parameters": sum(leaf.size for leaf in steps.state.trainable.values()),
        "loss": loss,
        "device": device,
        "parts": _parts(steps) if parts else {},
    }


class Steps:
    """A stage's step on random weights, compiled, with all that it needs. flops: of a step, nothing counted twice.
    temporaries: XLA's, in bytes."""

    def __init__(
        self, settings: RunSettings, *, stage: str, labels: str, layers: int | None = None, pixels: bool = False
    ):
        stage_settings = results.stage_of(settings, stage)
        self.config, self.chunk = model_config(settings, stage=stage, layers=layers), stage_settings.loss_chunk
        distributed.split_cpu(cpu_devices(settings))
        self.mesh = make_mesh(settings.mesh)
        self.planned = abstract_step(settings, self.config, stage=stage, mesh=self.mesh)
        trainable, self.frozen = (
            {path: _random(path, leaf) for path, leaf in leaves.items()}
            for leaves in (self.planned.state.trainable, self.planned.frozen)
        )
        rows, length = stage_settings.batch_size, stage_settings.length
        self.tokens = rows * length
        batch = random_batch(self.config, rows=rows, length=length, labels=labels, pixels=pixels)
        self.batch = place_whole(batch, self.mesh)
        self.flops = model_flops(self.config, self.batch, trains=patterns(settings, stage=stage))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.planned.state)
        self.state = init_state(trainable, self.planned.optimizer, shardings=shardings)  # which the first step takes
        # For its figures alone: jax 0.10 does not call a compiled program with int4 arrays that were put on a device.
        analysis = self.planned.step.lower(self.state, self.frozen, self.batch).compile().memory_analysis()
        self.temporaries = analysis.temp_size_in_bytes if analysis else float("nan")

    def take(self) -> float:
        """One step; its loss."""
        self.state, metrics = jax.block_until_ready(self.planned.step(self.state, self.frozen, self.batch))
        return float(metrics["loss"])


def _random(path: str, leaf: Any) -> jax.Array:
    """Random values for a leaf: near one if it is a norm's scale, else near zero, or integers. A path always gets the
    same."""
    centre, key = float(path.endswith("norm")), zlib.crc32(path.encode())
    if jnp.issubdtype(leaf.dtype, jnp.integer):

        def any_integer(key):  # of four bits
            return ((jax.random.bits(key, leaf.shape, jnp.uint32) >> 28).astype(jnp.int32) - 8).astype(leaf.dtype)

        return jax.jit(any_integer, out_shardings=leaf.sharding)(jax.random.key(key))
    if path.endswith(SCALES):
        return jax.device_put(jnp.full(leaf.shape, SCALE, leaf.dtype), leaf.sharding)
    if jax.default_backend() == "cpu":
        # NumPy, because jax.random would compile a program per shape and its memory would count as the step's.
        array = np.random.default_rng(key).standard_normal(leaf.shape, np.float32)
        array *= 0.02
        array += centre
        return jax.device_put(array.astype(leaf.dtype, copy=False), leaf.sharding)

    def make(key):  # where it will be: billions of entries take a host minutes
        return (centre + 0.02 * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)

    return jax.jit(make, out_shardings=leaf.sharding)(jax.random.key(key))


def _parts(steps: Steps) -> dict[str, float]:
    """Seconds of each part of a step on the mesh. Plain layers stand for extended ones: a new expert adds no rows."""
    batch, optimizer, trainable, mesh = steps.batch, steps.planned.optimizer, steps.state.trainable, steps.mesh
    model = with_arrays(abstract(steps.config), {**trainable, **steps.frozen})
    decoder = model.config.decoder
    number = decoder.routed.start
    layer, is_local = layer_of(model.decoder, number), decoder.local[number] if decoder.local else None
    B, L = batch.ids_BL.shape
    turns = rotation(batch.positions_BL, decoder)
    x_BLD = jax.random.normal(jax.random.key(0), (B, L, decoder.width), model.config.dtype)
    tower = steps.config.media[IMAGE].tower
    features_BPC = jax.random.normal(jax.random.key(0), (B, tower.patches, tower.width))  # a batch may have pixels

    def attended(x_BLD):
        return layer.attention(x_BLD, turns, Visible.in_rows(batch.segments_BL), is_local=is_local)[0]

    def mixed(x_BLD):
        return feed_forward(x_BLD, layer, [], config=model.config)[0]

    def updated(trainable):
        updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    def nats(x_BLD):
        return cross_entropy(model.decoder.to_head(x_BLD), model.decoder.head_DV, batch.labels_BL, chunk=steps.chunk)[0]

    def both_ways(function: Callable, *inputs: jax.Array) -> float:
        """The function and its backward pass as one computation."""

        def program(*inputs):
            y, pull = jax.vjp(function, *inputs)
            return y, pull(jnp.ones_like(y))

        return _seconds(Program(program, mesh=mesh), *inputs)

    return {
        "attention": decoder.layers * both_ways(attended, x_BLD),
        "mixture of experts": len(decoder.routed) * both_ways(mixed, x_BLD),
        "projector": both_ways(model.media[IMAGE].projector, features_BPC),
        "cross_entropy": both_ways(nats, x_BLD),
        "optimizer": _seconds(Program(updated, mesh=mesh), trainable),
    }


def _seconds(program: Program, *inputs: Any) -> float:
    times = []
    for _ in range(WARMUP + STEPS):
        started = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP:])


if __name__ == "__main__":
    machine.keep_memory()  # as the commands that train
    compile_cache.enable()
    _stage, _labels, _layers = sys.argv[1:]
    _settings = from_config_dict(json.load(sys.stdin))
    print(json.dumps(measure(_settings, stage=_stage, labels=_labels, layers=int(_layers) or None)))
