"""Kernels for TPU and GPU, interpreted on CPU, compute what the plain code does, with gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import few

from moextend_jax.models import attention, attention_triton, grouped_triton
from moextend_jax.models.attention import (
    Visible,
    Window,
    attend,
    conversations,
    segment_mask,
    splash,
    splash_block,
)
from moextend_jax.models.grouped_matmul import MEGABLOX, TRITON, Kernels, by_kernels, ragged_dot
from moextend_jax.models.quantised import quantise
from moextend_jax.models.weights import FewBits, OfStack, plain

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    """What a test draws does not depend on which tests ran before."""
    global RNG
    RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


KERNELS = pytest.mark.parametrize("kernels", [MEGABLOX, TRITON], ids=["megablox", "triton"])


@KERNELS
@pytest.mark.parametrize("sizes", few([(5, 0, 9, 2), (0, 16, 0, 0), (3, 3, 0, 1), (0, 0, 0, 0)], (3, 3, 0, 1)))
@pytest.mark.parametrize("trained", few([(0, 1), (), (1,)]))
def test_kernels_equal_ragged_dot_where_rows_belong_to_somebody(
    kernels: Kernels, sizes: tuple[int, ...], trained: tuple[int, ...]
):
    """What a kernel leaves unwritten past the last group (NaN when interpreted) reaches nobody."""
    x_RD, dy_RF, sizes_O = normal(16, 8), normal(16, 24), jnp.asarray(sizes, jnp.int32)
    parts = [normal(3, 8, 24), normal(1, 8, 24)]

    def run(kernel):
        def of(x_RD, some):
            return kernel(x_RD, tuple(some.get(n, part) for n, part in enumerate(parts)), sizes_O)

        y_RF, pull = jax.vjp(of, x_RD, {n: parts[n] for n in trained})
        return y_RF, *pull(dy_RF)

    got, expected = run(functools.partial(by_kernels, kernels)), run(ragged_dot)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)
    assert len(jax.tree.leaves(got)) == 2 + len(trained)


@KERNELS
@pytest.mark.parametrize("layer", few([2, 0]))
@pytest.mark.parametrize("kind", few(["float32", "int4"]))
def test_frozen_experts_are_read_where_their_stack_lies(kernels: Kernels, layer: int, kind: str):
    """A part that is one layer of a stack gives what that layer's own matrices give, forward and to the rows, between
    parts that train; and the program takes no layer out of the stack."""
    x_RD, dy_RF, sizes_O = normal(16, 32), normal(16, 24), jnp.asarray([3, 5, 0, 4, 2], jnp.int32)
    stack: Any = normal(3, 3, 32, 24)
    before, after = normal(1, 32, 24), normal(1, 32, 24)
    if kind == "int4":
        stack = FewBits(*map(jnp.asarray, quantise(np.asarray(stack), "int4", 16)))
    own = jax.tree.map(lambda leaf: leaf[layer], stack)

    def run(part):
        def of(x_RD, before, after):
            return by_kernels(kernels, x_RD, (before, part, after), sizes_O)

        y_RF, pull = jax.vjp(of, x_RD, before, after)
        return y_RF, *pull(dy_RF)

    got = jax.jit(lambda number: run(OfStack(stack, number)))(jnp.int32(layer))
    for mine, theirs in zip(got, jax.jit(lambda: run(own))(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    if kind == "float32":
        program = str(jax.make_jaxpr(lambda number: run(OfStack(stack, number)))(jnp.int32(layer)))
        assert "f32[1,3,32,24]" not in program and "f32[9,32,24]" in program


@pytest.mark.parametrize("kind", few(["int4", "int8", "mxfp4", "nf4"]))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_rows_times_few_bits_is_what_multiplying_out_gives(kind: str, dtype: str):
    """On a GPU a step of an answer multiplies integers out tile by tile: the same weights, to the last bit."""
    few = FewBits(*map(jnp.asarray, quantise(np.asarray(normal(3, 128, 40)), kind, 32)))
    assert grouped_triton.multiplies_out(few, rows=23, transpose=False)
    assert not grouped_triton.multiplies_out(few, rows=23, transpose=True)
    assert not grouped_triton.multiplies_out(few, rows=200, transpose=False)
    large = FewBits(*map(jnp.asarray, quantise(np.asarray(normal(1, 512, 8)), "int8", 512)))
    assert not grouped_triton.multiplies_out(large, rows=2, transpose=False)  # shared memory has no room for a piece
    x_RD, sizes_O = normal(23, 128).astype(dtype), jnp.asarray([5, 0, 9, 4], jnp.int32)
    parts = few, normal(1, 128, 40).astype(dtype)
    got = jax.jit(functools.partial(by_kernels, TRITON))(x_RD, parts, sizes_O).astype(jnp.float32)
    out = plain(few, x_RD.dtype), parts[1]
    expected = jax.jit(functools.partial(by_kernels, TRITON))(x_RD, out, sizes_O).astype(jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 if dtype == "float32" else 0.25)
    assert np.mean(np.asarray(got) != np.asarray(expected)) < (1 if dtype == "float32" else 0.02)


@pytest.mark.parametrize(("layers", "first"), [(24, "i8[32,2880,1440]"), (12, "i8[384,2880,1440]")])
def test_a_stack_that_32_bits_cannot_count_in_is_read_layer_by_layer(layers: int, first: str):
    """gpt-oss-20b's 24 layers of 32 experts in four bits: Triton would take what is behind 2 GiB for negative."""
    values, scale = ((layers, 32, 2880, 2880), jnp.int4), ((layers, 32, 90, 2880), jnp.bfloat16)
    shapes: Any = [jax.ShapeDtypeStruct(*of) for of in (values, scale)]
    stack = FewBits(*shapes)

    def product(stack, number, x_RD, sizes_O):
        return by_kernels(TRITON, x_RD, (OfStack(stack, number),), sizes_O)

    arguments = jnp.int32(0), jnp.zeros((4, 2880), jnp.bfloat16), jnp.zeros(32, jnp.int32)
    program = str(jax.make_jaxpr(product)(stack, *arguments))
    _, _, called = program.partition("pallas_call")
    assert called and first in program and "name=triton_few_bits_product" in called


@pytest.mark.parametrize(("rows", "sizes"), [(300, (33, 0, 200, 30)), (20, (9, 0, 0, 11)), (7, (0, 7, 0, 0))])
def test_rows_that_no_tile_divides_are_filled_up(rows: int, sizes: tuple[int, ...]):
    x_RD, w_GDF, dy_RF, sizes_O = normal(rows, 16), normal(4, 16, 24), normal(rows, 24), jnp.asarray(sizes, jnp.int32)

    def run(kernel):
        y_RF, pull = jax.vjp(lambda x_RD, w_GDF: kernel(x_RD, (w_GDF,), sizes_O), x_RD, w_GDF)
        return y_RF, *pull(dy_RF)

    for mine, theirs in zip(run(functools.partial(by_kernels, MEGABLOX)), run(ragged_dot), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-5, rtol=0)  # sums of up to 200 products


@pytest.mark.parametrize(("kernels", "name"), [(MEGABLOX, "name=tgmm"), (TRITON, "name=triton_grouped_gradient")])
def test_kernels_compute_no_gradient_of_a_frozen_part(kernels: Kernels, name: str):
    x_RD, parts, sizes_O = normal(16, 8), (normal(3, 8, 24), normal(1, 8, 24)), jnp.array([5, 5, 3, 3], jnp.int32)

    def total(x_RD, new):
        return jnp.sum(by_kernels(kernels, x_RD, (parts[0], new), sizes_O))

    program = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x_RD, parts[1]))
    assert program.count(name) == 1
    assert "f32[3,8,24]" not in "".join(line for line in program.splitlines() if name in line)


@pytest.mark.parametrize(("rows", "sizes"), [(70, (33, 0, 1, 30)), (64, (0, 0, 64, 0)), (9, (0, 0, 0, 0))])
def test_tiles_cover_each_group_once_and_no_two(rows: int, sizes: tuple[int, ...]):
    """Whatever the sizes: the tiles that have rows are those of the groups, in order, and there is room for all."""
    tile = grouped_triton.Tile(rows=16, band=4)
    schedule = grouped_triton.schedule_of(jnp.asarray(sizes, jnp.int32), 1, 3, rows=rows, tile=tile)
    end, covered = np.cumsum(sizes), []
    for group, start, stop in zip(*(np.asarray(array).tolist() for array in schedule), strict=True):
        if start < stop:
            assert stop == end[1 + group]
            covered += range(start, min(start + tile.rows, stop))
    assert covered == list(range(sizes[0], sum(sizes)))
    assert len(schedule.group_T) % tile.band == 0


def test_rows_of_any_length_have_the_largest_blocks_that_pad_little():
    blocks = {128: 128, 200: 256, 300: 128, 512: 512, 640: 128, 1152: 256, 1904: 512, 2048: 512}
    assert {length: splash_block(length) for length in blocks} == blocks


@pytest.mark.slow
@pytest.mark.parametrize("S", [128, 200, 300])
def test_splash_attention_equals_the_masked_one_with_gradients(S: int):
    B, N, K, H = 2, 4, 2, 16
    query, key, value, dy = normal(B, S, N, H), normal(B, S, K, H), normal(B, S, K, H), normal(B, S, N, H)
    segments_BS = np.ones((B, S), np.int32)
    segments_BS[0, 50:] = 2  # two conversations
    segments_BS[:, [20, 21, 60]] = 0  # tokens that the released code hides, whose output a label reads
    segments_BS[1, :3] = 0  # padding before
    segments_BS[1, 100:] = 0  # padding

    def plain(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=segment_mask(jnp.asarray(segments_BS)))

    def ours(query, key, value):
        return splash(query, key, value, jnp.asarray(segments_BS))

    assert_same_with_gradients(plain, ours, query, key, value, dy=dy)


def assert_same_with_gradients(plain, ours, *arguments: jax.Array, dy: jax.Array) -> None:
    (y, pull), (mine, mine_pull) = (jax.vjp(function, *arguments) for function in (plain, ours))
    np.testing.assert_allclose(mine, y, atol=1e-4, rtol=0)
    for got, expected in zip(mine_pull(dy), pull(dy), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("S", few([200, 128]))
@pytest.mark.parametrize("is_local", few([True, False]))
def test_so_does_it_with_sinks_and_a_window(S: int, is_local: bool):
    B, N, K, H = 2, 4, 2, 16
    query, key, value, dy = normal(B, S, N, H), normal(B, S, K, H), normal(B, S, K, H), normal(B, S, N, H)
    segments_BS = np.ones((B, S), np.int32)
    segments_BS[0, 50:], segments_BS[1, 100:] = 2, 0
    rows = Visible(jnp.asarray(segments_BS), segment_mask(jnp.asarray(segments_BS)))
    window = Window(jnp.array(is_local), 9)

    def by(visible: Visible):
        return lambda q, k, v, sinks: attend(q, k, v, visible, window=window, sinks_N=sinks)

    assert_same_with_gradients(by(rows), by(rows._replace(mask_B1LS=None)), query, key, value, normal(N), dy=dy)
    far = jnp.zeros((B, S, N, H)).at[0, 30].set(1.0)  # the gradient of keys is zero beyond a window
    _, pull = jax.vjp(by(rows), query, key, value, normal(N))
    seen_S = np.abs(np.asarray(pull(far)[1][0])).max(axis=(1, 2)) > 0
    assert np.flatnonzero(seen_S).tolist() == list(range(22 if is_local else 0, 31))


def test_on_a_tpu_it_takes_all_rows_but_those_shorter_than_a_block(monkeypatch: pytest.MonkeyPatch):
    """A mask is made where XLA attends, which then writes logits of all pairs of positions."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    masks = {length: Visible.in_rows(jnp.ones((1, length), jnp.int32)).mask_B1LS for length in (120, 128, 200, 1904)}
    assert [length for length, mask in masks.items() if mask is not None] == [120]


# --- attention for GPUs -----------------------------------------------------------------------------------------------


def by_mask(query, key, value, sinks_N, segments_BS, window: int | None) -> jax.Array:
    """A softmax over all pairs and the sink."""
    (B, S, N, H), K = query.shape, key.shape[2]
    away = jnp.arange(S)[:, None] - jnp.arange(S)[None, :]
    mask = segment_mask(jnp.asarray(segments_BS)) & (away < (window or S))[None, None]
    logits = jnp.einsum("BSKGH,BTKH->BKGST", query.reshape(B, S, K, N // K, H), key) * H**-0.5
    logits = jnp.where(mask[:, :, None], logits, -1e30)
    if sinks_N is not None:
        sink = jnp.broadcast_to(sinks_N.reshape(1, K, N // K, 1, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sink], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :S]
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, value).reshape(B, S, N, H)


def on_this_platform(query, key, value, sinks_N, segments_BS, window: int | None) -> jax.Array:
    visible = Visible(jnp.asarray(segments_BS), segment_mask(jnp.asarray(segments_BS)))
    sight = None if window is None else Window(True, window)
    return attend(query, key, value, visible, window=sight, sinks_N=sinks_N)


def in_kernels(query, key, value, sinks_N, segments_BS, window: int | None) -> jax.Array:
    reads = conversations(jnp.asarray(segments_BS))
    return attention_triton.causal_attention(query, key, value, *reads, window=window, sinks_N=sinks_N)


@pytest.mark.parametrize(
    ("length", "size", "window", "sinks"),
    [
        (200, 24, 70, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((256, 16, None, False), (130, 16, 1, True))),
    ],
)
@pytest.mark.parametrize("kernel", [in_kernels, on_this_platform], ids=["gpu", "here"])
def test_attention_equals_a_softmax_over_all_pairs_with_gradients(
    kernel, length: int, size: int, window: int | None, sinks: bool
):
    """Rows that no tile divides, heads that are no power of two, conversations, padding, hidden tokens."""
    B, N, K = 2, 4, 2
    segments_BS = np.ones((B, length), np.int32)
    segments_BS[0, 90:], segments_BS[1, 120:] = 2, 0
    segments_BS[1, :3] = 0
    if window is None:  # hidden tokens would see nothing in a window, and nothing reads what they are then
        segments_BS[:, [20, 21, 60]] = 0
    query, dy = normal(B, length, N, size), normal(B, length, N, size)
    dy *= jnp.asarray((segments_BS > 0) | (window is None))[..., None, None]
    keys = normal(B, length, K, size), normal(B, length, K, size), normal(N) if sinks else None
    results = []
    for function in (by_mask, kernel):
        y, pull = jax.vjp(lambda *some, of=function: of(*some, segments_BS, window), query, *keys)
        results.append((y[segments_BS > 0], *pull(dy)))
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
