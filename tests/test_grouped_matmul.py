"""Both backends multiply each row by its group's matrix: forward, gradients, empty groups, rows past the last."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moextend_jax.models import grouped_matmul as module

D, F = 6, 10
BACKENDS = {"blocked": module._blocked, "ragged_dot": module._ragged_dot}
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


@pytest.fixture(autouse=True, params=[8, 256])
def block(request, monkeypatch):
    """Groups of several blocks, and all rows in one block."""
    monkeypatch.setattr(module, "BLOCK", request.param)


def dense(x_RD: jax.Array, w_parts: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    """Every row by its own matrix, one after another."""
    w_ODF = jnp.concatenate(w_parts)
    group_R = np.repeat(np.arange(len(sizes)), sizes)
    y_RF = jnp.einsum("RD,RDF->RF", x_RD[: len(group_R)], w_ODF[group_R])
    return jnp.pad(y_RF, ((0, x_RD.shape[0] - len(group_R)), (0, 0)))


def make(rows: int, parts: Sequence[int]):
    rng = np.random.default_rng(0)

    def normal(*shape: int):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return normal(rows, D), tuple(normal(groups, D, F) for groups in parts), normal(rows, F)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_one_product_per_row(backend: str, case: str):
    sizes, rows, parts = CASES[case]
    x_RD, w_parts, dy_RF = make(rows, parts)

    @jax.jit
    def ours(x_RD, w_parts, sizes_O):
        y_RF, pull = jax.vjp(lambda x, w: BACKENDS[backend](x, w, sizes_O), x_RD, w_parts)
        return y_RF, pull(dy_RF)

    y_RF, pull = jax.vjp(lambda x, w: dense(x, w, sizes), x_RD, w_parts)
    got = ours(x_RD, w_parts, jnp.array(sizes, jnp.int32))
    for mine, reference in zip(jax.tree.leaves(got), jax.tree.leaves((y_RF, pull(dy_RF))), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5, rtol=0)
    assert not np.asarray(got[0])[sum(sizes) :].any()
    assert not np.asarray(got[1][0])[sum(sizes) :].any()


@pytest.mark.parametrize("seed", range(3))
def test_backends_agree_on_random_sizes(seed: int):
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(rng.integers(60, 70), rng.dirichlet([0.5] * 6))
    x_RD, w_parts, _ = make(70, (4, 2))
    y = [jax.jit(backend)(x_RD, w_parts, jnp.asarray(sizes, jnp.int32)) for backend in BACKENDS.values()]
    np.testing.assert_allclose(y[0], y[1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(y[0], dense(x_RD, w_parts, sizes.tolist()), atol=1e-5, rtol=0)


def test_what_stands_in_unused_rows_has_no_effect():
    x_RD, w_parts, dy_RF = make(16, (2,))
    sizes_O = jnp.array([3, 6], jnp.int32)

    @jax.jit
    def run(x_RD, dy_RF):
        y_RF, pull = jax.vjp(lambda x, w: module.grouped_matmul(x, w, sizes_O), x_RD, w_parts)
        return y_RF, pull(dy_RF)

    clean = run(x_RD, dy_RF)
    dirty = run(x_RD.at[9:].set(jnp.nan), dy_RF.at[9:].set(jnp.nan))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_follow_the_rows_dtype_and_gradients_the_weights():
    x_RD, w_parts, _ = make(16, (2, 1))
    sizes_O = jnp.array([3, 6, 7], jnp.int32)

    def total(w_parts):
        y_RF = module.grouped_matmul(x_RD.astype(jnp.bfloat16), w_parts, sizes_O)
        assert y_RF.dtype == jnp.bfloat16
        return y_RF.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))(w_parts)
    assert {dw.dtype for dw in gradient} == {jnp.dtype("float32")}
