"""Attention: rotary positions are relative, masks follow segments, grouped heads equal a loop, the cache too."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax._src.interpreters.partial_eval import dce_jaxpr

from moextend_jax.config import DecoderConfig
from moextend_jax.models import attention as attention_module
from moextend_jax.models import blocked_attention
from moextend_jax.models.attention import (
    Attention,
    KeysValues,
    Visible,
    attend,
    rotate,
    rotation,
    segment_mask,
)
from moextend_jax.parameters import with_arrays

B, L = 2, 9
N, K, H, D = 4, 2, 6, 24


def attention() -> Attention:
    prefix = "decoder/layers/attention/"
    arrays = {path.removeprefix(prefix): leaf[1] for path, leaf in tiny.arrays(tiny.PLAIN).items() if prefix in path}
    made = nnx.eval_shape(lambda: Attention(tiny.DECODER, rngs=nnx.Rngs(0), dtype="float32"))
    whole = with_arrays(made, arrays)
    assert isinstance(whole, Attention)
    return whole


X_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)
POSITIONS_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
SEGMENTS_BL = jnp.array([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2])


def turn(positions_BL):
    return rotation(positions_BL, DecoderConfig(head_size=H, rope_theta=100.0))


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, H)), jnp.float32) for _ in range(2))

    def score(at_q: int, at_k: int) -> float:
        turned = [rotate(x, turn(jnp.array([[at]]))) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(5, 2) - score(103, 100)) < 1e-4
    assert abs(score(5, 2) - score(5, 3)) > 1e-2
    np.testing.assert_allclose(rotate(q, turn(jnp.array([[0]]))), q, atol=1e-7)


def test_rotation_is_the_half_split_one():
    """Hugging Face's layout: dimension i turns with i + H/2 by position * theta^(-2i/H)."""
    x_H = np.arange(1.0, H + 1)
    ours = np.asarray(rotate(jnp.asarray(x_H, jnp.float32).reshape(1, 1, 1, H), turn(jnp.array([[3]]))))[0, 0, 0]
    for i in range(H // 2):
        angle = 3 * 100.0 ** (-2 * i / H)
        z = (x_H[i] + 1j * x_H[i + H // 2]) * np.exp(1j * angle)
        np.testing.assert_allclose([ours[i], ours[i + H // 2]], [z.real, z.imag], atol=1e-5)


def test_mask_by_hand():
    mask_LL = np.asarray(segment_mask(SEGMENTS_BL))[1, 0]
    expected = np.zeros((9, 9), bool)
    for query in range(9):
        for key in range(query + 1):
            expected[query, key] = key < 4 if query < 4 else 4 <= key < 7  # padding reads the conversation before it
    np.testing.assert_array_equal(mask_LL, expected)
    only_padding = np.asarray(segment_mask(jnp.zeros((1, 3), jnp.int32)))[0, 0]
    np.testing.assert_array_equal(only_padding, np.eye(3, dtype=bool))


def test_a_hidden_token_reads_its_own_conversation_and_nobody_reads_it():
    segments_BL = jnp.array([[0, 1, 1, 0, 1, 2, 0, 2, 0]])
    mask_LL = np.asarray(segment_mask(segments_BL))[0, 0]
    assert [list(np.flatnonzero(row)) for row in mask_LL] == [
        [0], [1], [1, 2], [1, 2], [1, 2, 4], [5], [5], [5, 7], [5, 7],
    ]  # fmt: skip


def test_grouped_heads_equal_a_loop():
    this, mask = attention(), np.asarray(segment_mask(SEGMENTS_BL))
    y_BLD, _ = this(X_BLD, turn(POSITIONS_BL), Visible(mask_B1LS=jnp.asarray(mask)))
    x_BLD = np.asarray(X_BLD)
    q, k, v = (np.einsum("bld,dnh->blnh", x_BLD, np.asarray(w[...])) for w in (this.query, this.key, this.value))
    q, k = (np.asarray(rotate(jnp.asarray(one), turn(POSITIONS_BL))) for one in (q, k))
    expected = np.zeros((B, L, D))
    for head in range(N):
        shared = head // (N // K)
        scores = np.einsum("blh,bsh->bls", q[:, :, head], k[:, :, shared]) / np.sqrt(H)
        scores = np.where(mask[:, 0], scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        expected += np.einsum("bls,bsh->blh", p, v[:, :, shared]) @ np.asarray(this.out[...])[head]
    np.testing.assert_allclose(y_BLD, expected, atol=1e-5, rtol=0)


def test_one_position_at_a_time_after_its_past():
    this = attention()
    whole_BLD, whole = this(X_BLD, turn(POSITIONS_BL), Visible.in_rows(jnp.ones((B, L), jnp.int32)))
    past = KeysValues(*(jnp.full((B, K, L, H), 9.0) for _ in range(2)))  # room, of which only what is filled is seen
    for at in range(L):
        seen_B11S = jnp.broadcast_to(jnp.append(jnp.arange(L) < at, True), (B, 1, 1, L + 1))
        x_B1D, turn_B1 = X_BLD[:, at : at + 1], turn(jnp.full((B, 1), at))
        y_B1D, present = this(x_B1D, turn_B1, Visible(mask_B1LS=seen_B11S), past)
        np.testing.assert_allclose(y_B1D[:, 0], whole_BLD[:, at], atol=1e-5, rtol=0)
        past = KeysValues(*(old.at[:, :, at].set(new[:, :, 0]) for old, new in zip(past, present, strict=True)))
    np.testing.assert_allclose(past.keys_BKSH, whole.keys_BKSH, atol=1e-5, rtol=0)


# --- on GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is traced as for a GPU."""
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")


def layers_of(length: int, head_size: int, *, saved: tuple[str, ...], dtype=jnp.bfloat16) -> str:
    """The program of two rematerialised attention layers and their gradients, less what nobody reads."""

    def layer(x_BLNH, _):
        return attend(x_BLNH, x_BLNH[:, :, :2], x_BLNH[:, :, :2], Visible.in_rows(segments_BL)), None

    def total(x_BLNH):
        kept = jax.checkpoint(layer, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*saved))
        return jax.lax.scan(kept, x_BLNH, length=2)[0].astype(jnp.float32).sum()

    segments_BL = jnp.ones((1, length), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(total))(jax.ShapeDtypeStruct((1, length, 4, head_size), dtype))
    return str(dce_jaxpr(traced.jaxpr, [True])[0])


@pytest.mark.parametrize(("saved", "times"), [((), 2), (("attended",), 1)])
def test_saving_attended_spares_the_second_run_of_the_gpu_s_forward_kernel(saved, times: int, gpu):
    """JAX drops no Pallas call itself, XLA does: so those whose results are read count."""
    program = layers_of(256, 128, saved=saved)
    calls = re.findall(r"(\w+):\S+(?: (\w+):\S+)? = pallas_call\[.*?name=triton_attention_(\w+)", program, re.DOTALL)
    read = [kernel for y, _, kernel in calls if len(re.findall(rf"\b{y}\b", program)) > 1]
    assert sorted(read) == ["forward"] * times + ["key", "query"]


@pytest.mark.parametrize(("saved", "times"), [((), 2), (("attended",), 1)])
def test_and_of_the_blocked_one_on_cpu(saved, times: int, monkeypatch: pytest.MonkeyPatch, cpu_program: None):
    """Maxima are the forward pass's alone: of the scores of each of its two blocks."""
    monkeypatch.setattr(blocked_attention, "BLOCK", 16)
    assert layers_of(32, 8, saved=saved).count("reduce_max[") == 2 * times


# --- in the whole model -----------------------------------------------------------------------------------------------


@functools.cache
def forward():
    model, arrays = tiny.structure(tiny.EXTENDED), tiny.arrays(tiny.EXTENDED)

    @jax.jit
    def run(batch):
        whole = with_arrays(model, arrays)
        return whole.decoder.logits(whole(batch).hidden_BLD)

    return lambda batch: np.asarray(run(batch))


def test_a_later_token_does_not_change_earlier_logits():
    batch = tiny.batch()
    ids_BL = batch.ids_BL.copy()
    ids_BL[:, 9:] = (ids_BL[:, 9:] + 3) % 50 + 7
    before, after = forward()(batch), forward()(batch._replace(ids_BL=ids_BL))
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-5, rtol=0)
    assert np.abs(after[:, 9:] - before[:, 9:]).max() > 0.1


def test_an_image_changes_only_what_comes_after_it():
    batch = tiny.batch()
    moved = forward()(batch._replace(features={"image": -batch.features["image"]})) - forward()(batch)
    assert np.abs(moved[0, :2]).max() < 1e-5 and np.abs(moved[0, 2:]).max() > 0.1
    assert np.abs(moved[1]).max() < 1e-5  # a row of text alone


def test_what_stands_in_the_padding_has_no_effect():
    batch = tiny.batch()
    padding_BL = batch.segments_BL == 0
    other = forward()(batch._replace(ids_BL=np.where(padding_BL, 9, batch.ids_BL)))
    np.testing.assert_allclose(other[~padding_BL], forward()(batch)[~padding_BL], atol=1e-5, rtol=0)
    assert padding_BL.any()


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_blocked_attention_equals_the_plain_one_with_gradients(block: int, packed: bool, monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", block)
    B, L, N, K, H = 3, 22, 4, 2, 6
    rng = np.random.default_rng(0)
    query, key, value, dy = (jnp.asarray(rng.normal(size=(B, L, n, H)), jnp.float32) for n in (N, K, K, N))
    segments_BL = np.ones((B, L), np.int32)
    segments_BL[1, 15:] = 0  # padding
    segments_BL[2, :3] = 0  # padding before the first token, which sees only itself
    if packed:
        segments_BL[0, 9:] = 2
    mask = segment_mask(jnp.asarray(segments_BL))

    def plain(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    def ours(query, key, value):
        return blocked_attention.causal_attention(query, key, value, mask)

    y, pull = jax.vjp(plain, query, key, value)
    mine, mine_pull = jax.vjp(jax.jit(ours), query, key, value)
    np.testing.assert_allclose(mine, y, atol=1e-5, rtol=0)
    for got, expected in zip(mine_pull(dy), pull(dy), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
