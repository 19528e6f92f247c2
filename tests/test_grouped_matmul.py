"""Grouped products and the blocked SwiGLU do each row's own product: forward, gradients, empty groups, spare rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import few

from moextend_jax.models import blocked_swiglu as blocked
from moextend_jax.models.grouped_matmul import grouped_matmul

D, F = 6, 10
CASES = {
    "mixed": ([5, 0, 17, 1, 9], 32, (4, 1)),
    "all rows in one group": ([0, 0, 32], 32, (3,)),
    "one group": ([32], 32, (1,)),
    "first and last empty": ([0, 16, 8, 0], 24, (2, 2)),
    "rows left over": ([3, 0, 11, 2], 40, (2, 1, 1)),
    "no rows at all": ([0, 0, 0], 8, (2, 1)),
    "several parts": ([7, 9, 8, 8, 8], 40, (1, 2, 2)),
    "new part empty": ([20, 20, 0], 40, (2, 1)),
}


@pytest.fixture(params=[(8, 256), (256, 256), (8, 16)])
def block(request, monkeypatch):
    """Groups of several blocks, all rows in one block, and blocks of two sizes."""
    for name, rows in zip(("BLOCK", "LARGE"), request.param, strict=True):
        monkeypatch.setattr(blocked, name, rows)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def swiglu_weights(parts: Sequence[int]) -> tuple[blocked.Weights, ...]:
    return tuple((normal(g, D, F), normal(g, D, F) / 2, normal(g, F, D)) for g in parts)


def product_per_row(x_RD: jax.Array, w_parts: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    w_ODF = jnp.concatenate(w_parts)
    group_R = np.repeat(np.arange(len(sizes)), sizes)
    y_RF = jnp.einsum("RD,RDF->RF", x_RD[: len(group_R)], w_ODF[group_R])
    return jnp.pad(y_RF, ((0, x_RD.shape[0] - len(group_R)), (0, 0)))


def swiglu_per_row(x_RD, weights_R1, parts, sizes):
    gate, up, down = zip(*parts, strict=True)
    hidden_RF = jax.nn.silu(product_per_row(x_RD, gate, sizes)) * product_per_row(x_RD, up, sizes) * weights_R1
    return product_per_row(hidden_RF, down, sizes)


def assert_same_with_gradients(ours, theirs, *inputs: object, dy: jax.Array):
    @jax.jit
    def run(inputs):
        results = []
        for function in (ours, theirs):
            y, pull = jax.vjp(function, *inputs)
            results.append((y, pull(dy)))
        return results

    got, expected = run(inputs)
    for mine, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5, rtol=1e-5)
    return got


@pytest.mark.parametrize("case", CASES)
def test_grouped_matmul_equals_one_product_per_row(case: str):
    sizes, rows, parts = CASES[case]
    sizes_O = jnp.array(sizes, jnp.int32)
    y_RF, pulled = assert_same_with_gradients(
        lambda x, w: grouped_matmul(x, w, sizes_O),
        lambda x, w: product_per_row(x, w, sizes),
        normal(rows, D),
        tuple(normal(g, D, F) for g in parts),
        dy=normal(rows, F),
    )
    assert not np.asarray(y_RF)[sum(sizes) :].any() and not np.asarray(pulled[0])[sum(sizes) :].any()


@pytest.mark.parametrize("case", few(CASES, *list(CASES)[::4]))
def test_blocked_swiglu_equals_one_swiglu_per_row(case: str, block: None):
    sizes, rows, parts = CASES[case]
    sizes_O = jnp.array(sizes, jnp.int32)
    y_RD, pulled = assert_same_with_gradients(
        lambda x, w, parts: blocked.blocked_swiglu(x, w, parts, sizes_O),
        lambda x, w, parts: swiglu_per_row(x, w, parts, sizes),
        normal(rows, D) / 3,
        normal(rows, 1),
        swiglu_weights(parts),
        dy=normal(rows, D) / 3,
    )
    for array in (y_RD, *pulled[:2]):
        assert not np.asarray(array)[sum(sizes) :].any()


@pytest.mark.parametrize("seed", range(3))
def test_blocked_swiglu_on_random_sizes(seed: int, block: None):
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(rng.integers(60, 70), rng.dirichlet([0.5] * 6))
    x_RD, weights_R1, parts = normal(70, D), normal(70, 1), swiglu_weights((4, 2))
    y_RD = jax.jit(blocked.blocked_swiglu)(x_RD, weights_R1, parts, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(y_RD, swiglu_per_row(x_RD, weights_R1, parts, sizes.tolist()), atol=1e-4, rtol=0)


def test_what_stands_in_unused_rows_has_no_effect(block: None):
    x_RD, weights_R1, parts, dy_RD = normal(16, D), normal(16, 1), swiglu_weights((2,)), normal(16, D)
    sizes_O = jnp.array([3, 6], jnp.int32)

    @jax.jit
    def run(x_RD, weights_R1, dy_RD):
        y_RD, pull = jax.vjp(lambda x, w, p: blocked.blocked_swiglu(x, w, p, sizes_O), x_RD, weights_R1, parts)
        return y_RD, pull(dy_RD)

    clean = run(x_RD, weights_R1, dy_RD)
    dirty = run(*(array.at[9:].set(jnp.nan) for array in (x_RD, weights_R1, dy_RD)))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("which", ["matmul", "swiglu"])
def test_bfloat16_rows_give_bfloat16(which: str):
    sizes_O = jnp.array([10, 6], jnp.int32)
    x_RD, weights_R1, parts = normal(16, D), normal(16, 1), swiglu_weights((2,))
    y: Any
    exact: Any
    if which == "matmul":
        y, exact = (grouped_matmul(x_RD.astype(t), [parts[0][0]], sizes_O) for t in (jnp.bfloat16, jnp.float32))
    else:
        y, exact = (
            blocked.blocked_swiglu(*jax.tree.map(lambda a, t=t: a.astype(t), (x_RD, weights_R1, parts)), sizes_O)
            for t in (jnp.bfloat16, jnp.float32)
        )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05 * float(jnp.abs(exact).max()), rtol=0)
