"""Everything that only a GPU can show, in one run: kernels against dense sums, their speed, and steps of true width.

    python benchmarks/gpu.py [--out work/gpu] [--only checks,kernels,...] [--minutes 18] [--tiny]

In: one GPU; weights are random. Out: OUT/gpu.json, and OUT/gpu.md, the same as tables. Parts in order of use:

    checks    nibble order, grouped products and attention on this device against float32 or float64: relative errors
    kernels   their milliseconds and TFLOP/s beside one plain product of the same FLOPs, XLA's and cuDNN's
    steps     finetune of Mixtral-8x7B at true width, 12 of 32 layers: experts as they are, in int8, in int4, beside
              what `moextend plan` says of the same step for an H100
    whole     all 32 layers on one GPU, as configs/mixtral_8x7b.py:one_gpu
    families  all layers of other published sizes on one GPU, in few bits
    methods   the int4 step with the upper half of the layers extended, and with low-rank updates instead
    answers   a token of an answer, by rows at once, beside the time to read every weight once
    profile   where the time of one int4 step goes, by kernel

A part that fails is noted with its last line and the rest goes on; so is one that the minutes leave no time for, and
so are errors of checks above their limit. Where any is noted, the exit code is 1.
`--tiny` runs the same on a CPU in minutes, kernels interpreted, to see that all of it works.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from moextend_jax import bench, compile_cache, machine
from moextend_jax.commands import BenchOptions
from moextend_jax.config import MoextendError
from moextend_jax.generate import Generator
from moextend_jax.mesh import make_mesh
from moextend_jax.models import attention_triton
from moextend_jax.models.attention import conversations, segment_mask
from moextend_jax.models.grouped_matmul import TRITON, by_kernels
from moextend_jax.models.moextend import abstract
from moextend_jax.models.quantised import dequantise, quantise
from moextend_jax.models.weights import FewBits, plain
from moextend_jax.parameters import by_path
from moextend_jax.parsing import parse
from moextend_jax.plan.sizes import model_config
from moextend_jax.sharding import parameter_shardings

GIB = 2**30
GROUP = 64


class Sizes(NamedTuple):
    """Of a grouped product, and of attention from `batch` on."""

    rows: int = 16384
    experts: int = 8
    width: int = 4096
    hidden: int = 14336
    batch: int = 4
    length: int = 2048
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128


SIZES = {
    "large": Sizes(),
    "small": Sizes(96, 4, 128, 192, 2, 192, 4, 2, 32),
    "tiny": Sizes(32, 2, 64, 64, 1, 128, 2, 1, 16),
}


def random(key: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, dtype)


# --- against dense sums -----------------------------------------------------------------------------------------------


def checks(size: str) -> dict[str, Any]:
    """Relative errors ‖got - expected‖ / ‖expected‖, by what is checked; 0 where bits must be equal."""
    found, sizes = {}, SIZES[size]
    for kind in ("int8", "int4"):
        w_IO = np.random.default_rng(0).normal(0, 0.02, (2 * GROUP, 24)).astype(np.float32)
        values, scale = quantise(w_IO, kind, GROUP)
        expected = values.astype(np.float32).reshape(2, GROUP, 24) * scale.astype(np.float32)[:, None]
        got = jax.jit(lambda v, s: dequantise(v, s, jnp.float32))(jnp.asarray(values), jnp.asarray(scale))
        found[f"{kind} multiplied out"] = error(got, expected.reshape(w_IO.shape))
        back = jax.jit(lambda v: v.astype(jnp.int8))(jnp.asarray(values))
        found[f"{kind}, order in a byte"] = error(back, values.astype(np.int8))
    for kind in ("bfloat16", "float32", "int8", "int4"):
        found |= {f"grouped product, {kind}, {what}": far for what, far in grouped_errors(sizes, kind)}
    for what, options in ATTENTIONS.items():
        found |= {f"{what}, {of}": far for of, far in attention_errors(sizes, **options)}
    return found


LIMITS = {"multiplied out": 0.0, "order in a byte": 0.0, "float32": 1e-6, "": 1e-2}
"""Of relative errors, by words in the name of a check: the first that is in it. What is left is computed in 16 bits."""
TF32 = 1e-3
"""Instead of that of float32, on GPUs: JAX multiplies there in tf32."""


def too_far(errors: dict[str, float], device: str) -> str:
    """The checks whose errors are above their limits, or no numbers; empty if there are none."""
    limits = LIMITS if device == "cpu" else LIMITS | {"float32": TF32}

    def limit(name: str) -> float:
        return next(limit for word, limit in limits.items() if word in name)

    return ", ".join(f"{name} {far:.3g}" for name, far in errors.items() if not far <= limit(name))


def error(got: Any, expected: Any) -> float:
    got, expected = (np.asarray(array, np.float64) for array in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def with_gradients(function: Callable[..., Any], dy: jax.Array, *inputs: Any) -> tuple[Any, ...]:
    y, pull = jax.vjp(function, *inputs)
    return y, *pull(dy)


def grouped_errors(sizes: Sizes, kind: str) -> Iterator[tuple[str, float]]:
    """Two parts of which the second trains, an empty group, and rows of nobody, which are NaN."""
    R, G, D, F = sizes[:4]
    dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    sizes_O = np.random.default_rng(1).multinomial(R - R // 8, np.full(G, 1 / G))
    sizes_O = np.insert(sizes_O, 1, 0)
    x_RD, dy_RF, new = random(0, R, D, dtype=dtype), random(1, R, F, dtype=dtype), random(3, 1, D, F, dtype=dtype)
    x_RD = x_RD.at[int(sizes_O.sum()) :].set(jnp.nan)
    frozen: Any = random(2, G, D, F, dtype=dtype)
    if kind.startswith("int"):
        frozen = FewBits(*map(jnp.asarray, quantise(np.asarray(frozen, np.float32), kind, GROUP)))

    def run(x_RD, new):
        return by_kernels(TRITON, x_RD, (frozen, new), jnp.asarray(sizes_O, jnp.int32))

    y_RF, dx_RD, dw = jax.jit(functools.partial(with_gradients, run, dy_RF))(x_RD, new)
    w_ODF = np.concatenate([np.asarray(part, np.float64) for part in (plain(frozen, dtype), new)])
    x, dy = np.nan_to_num(np.asarray(x_RD, np.float64)), np.asarray(dy_RF, np.float64)
    y, dx, of_last = np.zeros_like(dy), np.zeros_like(x), np.zeros(w_ODF.shape[1:])
    for w_DF, end, size in zip(w_ODF, np.cumsum(sizes_O), sizes_O, strict=True):
        rows = slice(end - size, end)
        y[rows], dx[rows], of_last = x[rows] @ w_DF, dy[rows] @ w_DF.T, x[rows].T @ dy[rows]
    yield from (("y", error(y_RF, y)), ("to the rows", error(dx_RD, dx)), ("to the weights", error(dw[0], of_last)))


ATTENTIONS: dict[str, dict[str, Any]] = {
    "attention": {},
    "attention, float32": {"dtype": jnp.float32},
    "attention, window and sinks": {"window": 50, "sinks": True},
}


def attention_errors(
    sizes: Sizes, *, dtype: Any = jnp.bfloat16, window: int | None = None, sinks: bool = False
) -> Iterator[tuple[str, float]]:
    """Beside `jax.nn.dot_product_attention` in float32 with a mask, of two conversations and padding."""
    B, S, N, K, H = sizes[4:]
    query, dy = random(0, B, S, N, H, dtype=dtype), random(3, B, S, N, H, dtype=dtype)
    keys, values = random(1, B, S, K, H, dtype=dtype), random(2, B, S, K, H, dtype=dtype)
    sinks_N = random(4, N, dtype=dtype) if sinks else None
    segments_BS = np.ones((B, S), np.int32)
    segments_BS[:, S // 3 :], segments_BS[:, S - S // 8 :] = 2, 0
    dy = jnp.where(segments_BS[..., None, None] > 0, dy, 0)
    segments_BS = jnp.asarray(segments_BS)

    def kernel(query, keys, values, sinks_N):
        sight = conversations(segments_BS)
        return attention_triton.causal_attention(query, keys, values, *sight, window=window, sinks_N=sinks_N)

    def dense(query, keys, values, sinks_N):
        with jax.default_matmul_precision("highest"):
            away = jnp.arange(S)[:, None] - jnp.arange(S)[None, :]
            mask = segment_mask(segments_BS) & (away < (window or S))[None, None]
            logits = jnp.einsum("BSKGH,BTKH->BKGST", query.reshape(B, S, K, N // K, H), keys) * H**-0.5
            logits = jnp.where(mask[:, :, None], logits, -1e30)
            if sinks_N is not None:
                logits = jnp.concatenate([logits, jnp.broadcast_to(
                    sinks_N.reshape(1, K, N // K, 1, 1), (*logits.shape[:-1], 1))], axis=-1)  # fmt: skip
            weights = jax.nn.softmax(logits, axis=-1)[..., :S]
            return jnp.einsum("BKGST,BTKH->BSKGH", weights, values).reshape(B, S, N, H)

    inputs = (query, keys, values, sinks_N)
    got = jax.jit(functools.partial(with_gradients, kernel))(dy, *inputs)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (dy, *inputs))
    expected = jax.jit(functools.partial(with_gradients, dense))(*wide)
    real = (segments_BS > 0)[..., None, None]
    yield "y", error(jnp.where(real, got[0], 0), jnp.where(real, expected[0], 0))
    for name, mine, theirs in zip(("query", "keys", "values", "sinks"), got[1:], expected[1:], strict=True):
        if mine is not None:
            yield f"to the {name}", error(mine, theirs)


# --- speed ------------------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[..., Any], *inputs: Any) -> float:
    """Median of 7 rounds of several calls after two."""
    run = jax.jit(function)
    for _ in range(2):
        jax.block_until_ready(run(*inputs))
    began = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    calls = max(1, min(50, int(0.02 / (time.perf_counter() - began))))
    rounds = []
    for _ in range(7):
        began = time.perf_counter()
        jax.block_until_ready([run(*inputs) for _ in range(calls)][-1])
        rounds.append((time.perf_counter() - began) / calls)
    return 1e3 * statistics.median(rounds)


def kernels(size: str) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of each."""
    R, G, D, F, B, S, N, K, H = SIZES[size]
    x_RD, dy_RF, w_GDF = random(0, R, D), random(1, R, F), random(2, G, D, F)
    sizes_G = jnp.full(G, R // G)
    found: dict[str, dict[str, float]] = {}

    def timed(name: str, flops: float, function: Callable[..., Any], *inputs: Any) -> None:
        taken = milliseconds(function, *inputs)
        found[name] = {"ms": taken, "TFLOP/s": flops / taken / 1e9}
        print(f"{name:56} {taken:9.3f} ms {found[name]['TFLOP/s']:7.0f} TFLOP/s", flush=True)

    flops = 2.0 * R * D * F
    timed("one product by XLA", flops, lambda x, w: x @ w, x_RD, w_GDF[0])

    def product(x, w, transpose: bool = False):
        return TRITON.product(x, (w,), sizes_G, transpose=transpose)

    timed("grouped, y", flops, product, x_RD, w_GDF)
    timed("grouped, to the rows", flops, functools.partial(product, transpose=True), dy_RF, w_GDF)
    gradient = functools.partial(TRITON.gradient, first=0, like_GDF=w_GDF)
    timed("grouped, to the weights", flops, lambda x, dy: gradient(x, dy, sizes_G), x_RD, dy_RF)
    timed("jax.lax.ragged_dot, y", flops, lambda x, w: lax.ragged_dot(x, w, sizes_G), x_RD, w_GDF)
    for kind in ("int8", "int4"):
        values = bench._random("w", jax.ShapeDtypeStruct(w_GDF.shape, kind, sharding=x_RD.sharding))
        few = FewBits(values, jnp.full((G, D // GROUP, F), bench.SCALE, jnp.float16))
        timed(f"multiplied out from {kind}", 0, lambda few: plain(few, jnp.bfloat16), few)

        def whole(x, few):
            return by_kernels(TRITON, x, (few,), sizes_G)

        timed(f"grouped, {kind}, y", flops, whole, x_RD, few)
        pulled = lambda dy, x, few, whole=whole: with_gradients(lambda x: whole(x, few), dy, x)  # noqa: E731
        timed(f"grouped, {kind}, y and to the rows", 2 * flops, pulled, dy_RF, x_RD, few)
    del w_GDF, x_RD, dy_RF

    query, *present = (random(number, B, S, n, H) for number, n in enumerate((N, K, K)))
    segments, flops = jnp.ones((B, S), jnp.int32), 2.0 * B * S**2 * N * H
    packed = jnp.broadcast_to(1 + jnp.arange(S) // (S // 4), (B, S))

    def ours(query, key, value, segments=segments, window=None):
        return attention_triton.causal_attention(query, key, value, *conversations(segments), window=window)

    def causal(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    def by_xla(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=segment_mask(segments), implementation="xla")

    for name, function in {
        "attention": ours, "attention of four conversations a row": functools.partial(ours, segments=packed),
        "attention, window of 128": functools.partial(ours, window=128), "attention by XLA": by_xla,
        "cuDNN's causal attention, no segments": causal,
    }.items():  # fmt: skip
        if jax.default_backend() != "gpu" and function is causal:
            continue
        timed(f"{name}, y", flops, function, query, *present)
        both = jax.grad(lambda *inputs, f=function: f(*inputs).astype(jnp.float32).sum(), (0, 1, 2))
        timed(f"{name}, y and gradients", 3.5 * flops, both, query, *present)
    return found


# --- steps ------------------------------------------------------------------------------------------------------------


UNTIL: float | None = None
"""When the minutes end, in seconds of `time.perf_counter`."""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process with these environment variables; MoextendError where the minutes end before it does."""
    left = UNTIL and max(1.0, UNTIL - time.perf_counter())
    try:
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=left)
    except subprocess.TimeoutExpired:
        raise MoextendError("the minutes ended before it did") from None


def apart(part: str, *words: Any) -> Any:
    """A part in a process of its own, with the whole GPU to itself; MoextendError with the line that says why not."""
    done = run(sys.executable, __file__, "--apart", json.dumps([part, *words]), JAX_TRACEBACK_FILTERING="off")
    *printed, last = done.stdout.splitlines() or [""]
    print("\n".join(printed), flush=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        known = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error" in line]
        raise MoextendError((known or lines)[-1][:300])
    return json.loads(last)


def in_a_process(words: str) -> None:
    """What `apart` starts: the figures are the last line that is printed."""
    machine.whole_gpu()
    compile_cache.enable()
    part, *arguments = json.loads(words)
    made = {"checks": checks, "kernels": kernels, "step": measured, "answers": answers}[part](*arguments)
    print(json.dumps(made | {"device": jax.devices()[0].device_kind}))


def measured(config: str, options: list[str], layers: int | None, trace: str) -> dict[str, Any]:
    """One finetune step of a configuration."""
    settings = parse(BenchOptions, [config, *options], command="gpu", does="").config
    figures = bench.measure(settings, stage="finetune", labels="answers", layers=layers, pixels=True, parts=False,
                            trace=trace)  # fmt: skip
    print(f"{figures['seconds_per_step']:.3f} s, {figures['tokens_per_second']:,.0f} tokens/s")
    return figures


def planned(config: str, *options: str, layers: int | None) -> Any:
    """What `moextend plan` says of the same step for an H100, compiled on this machine's CPU."""
    words = ["plan", config, "--stage", "finetune", "--topology", "h100:1", "--json", *options]
    words += ["--layers", str(layers)] if layers else []
    try:
        done = run(sys.executable, "-m", "moextend_jax", *words, JAX_PLATFORMS="cpu")
    except MoextendError as error:
        return {"failed": str(error)}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}
    figures = json.loads(done.stdout)
    return {"gib": figures["bytes_per_chip"]["total"] / GIB, "seconds": figures["step_seconds"], "mfu": figures["mfu"]}


def beside(what: str, config: str, *options: str, layers: int | None) -> dict[str, Any]:
    print(what, end=": ", flush=True)
    with ThreadPoolExecutor() as pool:
        plan = pool.submit(planned, config, *options, layers=layers)  # on the CPU, meanwhile
        try:
            got = apart("step", config, options, layers, "")
        except MoextendError as error:
            got = {"failed": str(error)}
        return {"measured": got, "planned": plan.result(), "options": options, "layers": layers}


def rows(batch: int, parts: int, **more: Any) -> list[str]:
    named = {"finetune.batch_size": batch, "finetune.accumulate": parts, **FEW, **more}
    return [f"--config.{name}={value}" for name, value in named.items()]


FEW = {"expert_storage": "int4"}
ALONE = [f"--config.mesh.{axis}=1" for axis in ("fsdp", "tensor")]


def steps(config: str, layers: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    for storage in ("as_is", "int8", "int4"):
        options = [*ALONE, *rows(4, 1, expert_storage=storage)]
        name = f"{layers} layers, experts {storage}, 4 rows"
        yield name, functools.partial(beside, name, config, *options, layers=layers)


def whole(config: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    exact = {"finetune.optimizer.first_moment": "float32"}
    for at_once, what, more in (
        (4, "", {}), (4, ", both moments in float32", exact), (1, "", {}),
    ):  # fmt: skip
        name = f"all layers, experts int4, parts of {at_once} rows{what}"
        options = rows(8, 8 // at_once, **more)
        yield name, functools.partial(beside, name, config, *options, layers=None)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE-1B-7B, int4": ("olmoe_1b_7b:one_gpu", {}),
    "Qwen3-30B-A3B, int4": ("qwen3_30b_a3b:one_gpu", {}),
    "gpt-oss-20b, mxfp4": (
        "qwen3_30b_a3b:one_gpu", {"base": "gpt-oss-20b", "expert_storage": "mxfp4", "expert_group": 32},
    ),
}  # fmt: skip


def families() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, (config, more) in FAMILIES.items():
        yield name, functools.partial(beside, name, config, *rows(8, 2, **more), layers=None)


METHODS: dict[str, dict[str, Any]] = {
    "the upper half extended": {"select.layers": "second_half"},
    "LoRA of rank 64 on attention and every expert": {
        "method.name": "lora", "method.rank": 64, "method.alpha": 128, "method.experts": "per_expert",
    },
    "LLaVA-MoLE, three of rank 32": {"method.name": "mole", "method.rank": 32, "method.alpha": 64},
}  # fmt: skip


def methods(config: str, layers: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    for what, more in METHODS.items():
        name = f"{layers} layers, experts int4, 4 rows, {what}"
        yield name, functools.partial(beside, name, config, *ALONE, *rows(4, 1, **more), layers=layers)


NEW_TOKENS = 65


def answers(config: str, options: list[str], most: int) -> dict[str, Any]:
    """Seconds to the first token of prompts that end in text, with a picture each, and for every further one, of an
    extended model, by rows at once; greedy."""
    settings = parse(BenchOptions, [config, *options], command="gpu", does="").config
    sizes = model_config(settings, stage="finetune")
    model, mesh = abstract(sizes), make_mesh(settings.mesh)
    shardings = parameter_shardings(model, mesh)
    arrays = {}
    for path, param in by_path(nnx.state(model, nnx.Param)).items():
        dtype = sizes.dtype if param.dtype == jnp.float32 else param.dtype  # new leaves, as a finished model has them
        arrays[path] = bench._random(path, jax.ShapeDtypeStruct(param.shape, dtype, sharding=shardings[path]))
    generator = Generator(model, eos=-1, mesh=mesh)  # which no token is, so that no row ends
    taken = {}
    for B in (1, 8, 64):
        if most >= B:
            batch = bench.random_batch(sizes, rows=B, length=settings.finetune.length // 2, labels="answers")
            seconds = []
            for tokens in (1, NEW_TOKENS):
                ask = functools.partial(generator.begin, arrays, batch, max_new_tokens=tokens, steps=tokens)
                jax.block_until_ready(list(ask()))
                began = time.perf_counter()
                jax.block_until_ready(list(ask()))
                seconds.append(time.perf_counter() - began)
            taken[B] = {"first": seconds[0], "each": (seconds[1] - seconds[0]) / (NEW_TOKENS - 1)}
            print(f"{B} rows: first token {seconds[0]:.3f} s, then {1e3 * taken[B]['each']:.2f} ms each", flush=True)
    read = sum(leaf.size * (0.5 if leaf.dtype in (jnp.int4, jnp.uint4) else leaf.dtype.itemsize)
               for path, leaf in arrays.items() if path.startswith(("decoder/layers", "decoder/head")))  # fmt: skip
    return {"rows": taken, "bytes": read}


def profile(config: str, layers: int, folder: Path) -> dict[str, Any]:
    """Milliseconds of one step by kernel, the longest first."""
    options = [*ALONE, *rows(4, 1)]
    return apart("step", config, options, layers, str(folder)) | {"kernels": longest(folder)}


def longest(folder: Path, most: int = 25) -> dict[str, float]:
    file = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    process = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    thread = {(event["pid"], event["tid"]): event["args"]["name"] for event in events
              if event.get("name") == "thread_name"}  # fmt: skip
    taken: Counter[str] = Counter()
    for event in events:
        place = event.get("pid"), event.get("tid")
        if event.get("ph") == "X" and "GPU" in process.get(place[0], "") and "Stream" in thread.get(place, ""):
            taken[event["name"].rstrip("0123456789").rstrip("_.")] += event["dur"] / 1e3
    return dict(taken.most_common(most))


# --- all of it --------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# {found['device']}", "", f"jax {found['jax']}, {found['date']}, {found['seconds']:.0f} s in all."]

    def table(title: str, head: tuple[str, ...], rows: list[list[Any]]) -> None:
        if rows:
            cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
            lines.extend(["", f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)])
            lines.extend(f"| {' | '.join(row)} |" for row in cells)

    table("Relative errors", ("what", "error"), [[*pair] for pair in found.get("checks", {}).items()])
    timed = [[name, row["ms"], row["TFLOP/s"]] for name, row in found.get("kernels", {}).items()]
    table("Kernels", ("what", "ms", "TFLOP/s"), timed)
    head = ("step", "s", "tokens/s", "MFU", "GiB at most", "GiB planned", "s planned at least")
    made = []
    for name, row in [row for part in STEPS for row in found.get(part, {}).items()]:
        got, plan = row["measured"], row["planned"]
        figures, said = [got.get("failed"), *"---"], [plan.get("failed"), "-"]
        if "failed" not in got:
            at_most = f"{got['peak_memory_gb'] * 1e9 / GIB:.2f}"
            speed = f"{got['tokens_per_second']:,.0f}"
            figures = [got["seconds_per_step"], speed, f"{got['mfu'] or 0:.0%}", at_most]
        if "failed" not in plan:
            said = [f"{plan['gib']:.2f}", plan["seconds"]]
        made.append([name, *figures, *said])
    table("Finetune steps", head, made)
    said = []
    for config, row in found.get("answers", {}).items():
        for rows, of in row["rows"].items():
            first, each = of["first"], of["each"]
            said.append([config, rows, 1e3 * first, 1e3 * each, int(rows) / each, row["bytes"] / each / 1e12])
    head = ("answers", "rows", "ms to the first token", "ms each", "tokens/s", "TB/s if all weights are read once")
    table("Answers", head, said)
    taken = found.get("profile", {}).get("kernels", {})
    table("Where an int4 step goes", ("kernel", "ms"), [[*pair] for pair in taken.items()])
    table("Not done", ("part", "why"), [[*pair] for pair in found["failed"].items()])
    return "\n".join(lines) + "\n"


STEPS = ("steps", "whole", "families", "methods")
PARTS = ("checks", "kernels", *STEPS, "answers", "profile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/gpu"))
    parser.add_argument("--only", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--match", default="", help="a regular expression: only measurements with such names")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        return in_a_process(options.apart)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    global UNTIL
    began, options.out = time.perf_counter(), options.out.resolve()
    UNTIL = began + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "device": "nothing was measured",
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "failed": {},
    }

    def attempt(part: str, name: str, function: Callable[[], Any]) -> None:
        """The part's results under `part`, or under its name; kept after each, for whoever is cut off."""
        if not re.search(options.match, name):
            return
        if time.perf_counter() > began + 60 * options.minutes:
            found["failed"][name] = "no time was left"
        else:
            try:
                made = function()
                found["device"] = made.pop("device", None) or made.get("measured", {}).get("device") or found["device"]
                found.setdefault(part, {}).update(made if name == part else {name: made})
                if why := made.get("measured", {}).get("failed"):
                    found["failed"][name] = why
                if part == "checks" and (wrong := too_far(made, found["device"])):
                    found["failed"][name] = f"errors above their limits: {wrong}"
            except Exception as error:
                line, *_ = str(error).splitlines() or [""]
                found["failed"][name] = f"{type(error).__name__}: {line[:300]}"
                print(f"{name}: {found['failed'][name]}", flush=True)
        found["seconds"] = time.perf_counter() - began
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(found))

    for part, size in (("checks", "small"), ("kernels", "large")):
        if part in options.only:
            attempt(part, part, functools.partial(apart, part, "tiny" if options.tiny else size))
    sliced, all_of_it = ("bench", "bench") if options.tiny else ("mixtral_8x7b", "mixtral_8x7b:one_gpu")
    by_part = {
        "steps": steps(sliced, options.layers), "whole": whole(all_of_it), "families": families(),
        "methods": methods(sliced, options.layers),
    }  # fmt: skip
    for part, runs in by_part.items():
        for name, run in runs if part in options.only and not (options.tiny and part == "families") else ():
            attempt(part, name, run)
    most = 8 if options.tiny else 64
    for config in ("bench",) if options.tiny else ("mixtral_8x7b:one_gpu", "qwen3_30b_a3b:one_gpu"):
        if "answers" in options.only:
            attempt("answers", config, functools.partial(apart, "answers", config, rows(8, 2), most))
    if "profile" in options.only:
        attempt("profile", "profile", lambda: profile(sliced, options.layers, options.out / "trace"))
    print((options.out / "gpu.md").read_text())
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
