"""Projectors on a frozen trunk: ours on the arrays of pathweave.npz and crema.npz (`methods.py`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moextend_jax.config import ProjectorConfig
from moextend_jax.models.projectors import make_projector
from moextend_jax.models.resampler import Resampler
from moextend_jax.models.woven import Crema, fused, woven
from moextend_jax.parameters import with_arrays
from parity.methods import methods_arrays
from parity.test_methods_towers import resampler

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.slow
def test_adapter_in_adapter():
    theirs = methods_arrays("pathweave")
    for m in range(len(theirs["down_mDr"])):
        check_path(theirs, m)


def check_path(theirs: dict[str, np.ndarray], m: int) -> None:
    """The map of the m-th modality, its value and all gradients."""
    given = {name: jnp.asarray(array) for name, array in theirs.items() if array.dtype == np.float32}
    trunk = {"map": given["w_DF"], "map_bias": jnp.zeros(given["w_DF"].shape[1])}
    named = {
        "down": "down_mDr",
        "down_bias": "down_bias_mr",
        "up": "up_mrF",
        "up_bias": "up_bias_mF",
        "scale": "scale_m",
    }
    inside = {"inner": "inner_mirr", "inner_bias": "inner_bias_mir"}
    names = (*named.values(), *inside.values(), "gate_mDi")

    def y(given: dict[str, jax.Array]) -> jax.Array:
        adapters = [{f"map/{leaf}": given[name][i] for leaf, name in named.items()} for i in range(m + 1)]
        *past, own = adapters
        own |= {f"map/{leaf}": given[name][m, :m] for leaf, name in inside.items()}
        own["map/gate"] = given["gate_mDi"][m, :, : m + 1]
        return woven("map", given["x_TD"][None], own, trunk, past)[0]

    value_TF, pull = jax.vjp(lambda trained: y({**given, **trained}), {name: given[name] for name in names})
    np.testing.assert_allclose(value_TF, theirs[f"{m}/y_TF"], **CLOSE)
    (gradients,) = pull(given["cotangent_TF"])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, theirs[f"{m}/d_{name}"], err_msg=name, **CLOSE)


@pytest.mark.slow
def test_crema_on_a_frozen_resampler():
    """Each medium's tokens, and the gradients of all that it trains, as its own leaves beside the trunk's; the fusion's
    map within the projectors of the media that are added."""
    theirs = methods_arrays("crema")
    given = {name: np.asarray(array, np.float32) for name, array in theirs.items()}
    trunk, leaves_of = resampler(given)
    assert isinstance(trunk, Resampler)
    M, B, t, S, c = given["features_mBtSc"].shape
    C, rank, D = *given["a_query_mCr"].shape[1:], given["project_mCD"].shape[2]
    N, H = trunk.config.heads, C // trunk.config.heads

    def module(**more: Any) -> Crema:
        """Its cross-attention reads the towers' width, so that no map stands before it."""
        config = ProjectorConfig(kind="crema", trunk="image", width=C, rank=rank, queries=trunk.config.queries,
                                 layers=1, heads=N, **more)  # fmt: skip
        made = nnx.eval_shape(lambda: make_projector(config, C=C, P=S, D=D, rngs=nnx.Rngs(0), dtype="float32"))
        assert isinstance(made, Crema) and c
        return made

    of_media = module(), *(module(fusion=True) for _ in range(M - 1))
    plain = {name: array * (name[:2] not in ("a_", "b_")) for name, array in given.items()}
    base = with_arrays(trunk, {path: jnp.asarray(leaf) for path, leaf in leaves_of(plain, 0).items()})
    trained = {name.removeprefix("d_"): jnp.asarray(given[name.removeprefix("d_")]) for name in given
               if name.startswith("d_")}  # fmt: skip

    def tokens(w: dict[str, jax.Array], *, fused: bool) -> jax.Array:
        """With `fused`, those of assisting media as they are added up."""
        made = []
        for m in range(M):
            module = of_media[m if fused else 0]
            own = {
                "queries": w["queries_mqC"][m], "out": w["project_mCD"][m], "out_bias": w["project_bias_mD"][m],
                **{f"{part}_a": w[f"a_{part}_mCr"][m][None] for part in ("query", "value")},
                **{f"{part}_b": w[f"b_{part}_mrC"][m].reshape(1, rank, N, H) for part in ("query", "value")},
            }  # fmt: skip
            if module.config.fusion:
                own |= {"fuse": w["fuse_mDd"][m - 1], "fuse_bias": w["fuse_bias_d"] * (m == 1)}
            made.append(with_arrays(module, own)(given["features_mBtSc"][m].reshape(B * t, S, c), base))
        return jnp.stack(made).reshape(M, B, t, *made[0].shape[1:])

    alone = jax.jit(functools.partial(tokens, fused=False))
    np.testing.assert_allclose(alone(trained), theirs["tokens_mBtqD"], **CLOSE)

    def added(trained: dict[str, jax.Array]) -> jax.Array:
        main, *assisting, last = tokens(trained, fused=True)  # the last one's clips are fused as their mean
        return fused(main, sum(assisting, jnp.mean(last, axis=1, keepdims=True)))

    np.testing.assert_allclose(jax.jit(added)(trained), theirs["added_BtqD"], **CLOSE)

    def loss(trained: dict[str, jax.Array]) -> jax.Array:
        return (added(trained) * given["cotangent_BtqD"]).sum()

    for name, gradient in jax.jit(jax.grad(loss))(trained).items():
        np.testing.assert_allclose(gradient, theirs[f"d_{name}"], err_msg=name, **CLOSE)
