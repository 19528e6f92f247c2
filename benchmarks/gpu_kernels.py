"""Times the experts' grouped products and attention on a GPU, beside XLA's own and one plain product of the same FLOPs.

    python benchmarks/gpu_kernels.py [--rows 16384] [--experts 8] [--width 4096] [--hidden 14336]

In: sizes (those of Mixtral-8x7B, 8,192 tokens of two picks). Out: a line each of milliseconds and TFLOP/s, medians of 7
rounds of several calls after two; random bfloat16, groups of the same size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moextend_jax.models import grouped_triton
from moextend_jax.models.attention import KeysValues, Visible, attend


def random(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def line(name: str, flops: float, function: Callable[..., Any], *inputs: Any) -> None:
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
    seconds = statistics.median(rounds)
    print(f"{name:44} {1e3 * seconds:8.2f} ms {flops / seconds / 1e12:7.0f} TFLOP/s", flush=True)


def grouped(rows: int, experts: int, width: int, hidden: int) -> None:
    x_RD, dy_RF, w_EDF = random(0, rows, width), random(1, rows, hidden), random(2, experts, width, hidden)
    sizes_E, flops = jnp.full(experts, rows // experts), 2.0 * rows * width * hidden
    line("one product by XLA", flops, lambda x, w: x @ w, x_RD, w_EDF[0])
    product = grouped_triton.grouped_product
    line("grouped_triton, y", flops, lambda x, w: product(x, (w,), sizes_E, transpose=False), x_RD, w_EDF)
    line("grouped_triton, dx", flops, lambda dy, w: product(dy, (w,), sizes_E, transpose=True), dy_RF, w_EDF)

    def gradient(x, dy):
        return grouped_triton.weight_gradient(x, dy, sizes_E, first=0, like_GDF=w_EDF)

    line("grouped_triton, dw", flops, gradient, x_RD, dy_RF)

    def pulled(argument: int):
        return lambda x, w, dy: jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes_E), x, w)[1](dy)[argument]

    line("jax.lax.ragged_dot, y", flops, lambda x, w: lax.ragged_dot(x, w, sizes_E), x_RD, w_EDF)
    line("jax.lax.ragged_dot, dx", flops, pulled(0), x_RD, w_EDF, dy_RF)
    line("jax.lax.ragged_dot, dw", flops, pulled(1), x_RD, w_EDF, dy_RF)


def attention(rows: int = 4, length: int = 2048, heads: int = 32, key_heads: int = 8, size: int = 128) -> None:
    query, *present = (random(number, rows, length, n, size) for number, n in enumerate((heads, key_heads, key_heads)))
    segments, flops = jnp.ones((rows, length), jnp.int32), 2.0 * rows * length**2 * heads * size

    def ours(query, key, value):
        return attend(query, KeysValues(key, value), Visible.in_rows(segments))

    def causal(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    for name, function in (("attention of segments", ours), ("cuDNN's causal attention, no segments", causal)):
        line(f"{name}, y", flops, function, query, *present)
        both = jax.grad(lambda *inputs, f=function: f(*inputs).astype(jnp.float32).sum(), (0, 1, 2))
        line(f"{name}, y and gradients", 3.5 * flops, both, query, *present)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("rows", 16384), ("experts", 8), ("width", 4096), ("hidden", 14336)):
        parser.add_argument(f"--{name}", type=int, default=size)
    print(jax.devices()[0].device_kind, jax.__version__)
    grouped(**vars(parser.parse_args()))
    attention()


if __name__ == "__main__":
    main()
