"""How a parameter is declared: the letters of its axes give its shape, and later its sharding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in axes)


def weight(axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, dtype: str, std: float = 0.02) -> nnx.Param:
    """A parameter with normal entries; `axes`, e.g. "ZEDF", are letters of the legend in config.py.

    The letters stay on the parameter as its `axes` metadata: `sharding.py` reads them there.
    """
    array = std * jax.random.normal(rngs.params(), shape(axes, sizes), jnp.float32)
    return nnx.Param(array.astype(dtype), axes=axes)


def uniform(axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, dtype: str, bound: float) -> nnx.Param:
    """A parameter with entries between -bound and bound, each as likely as any other."""
    array = jax.random.uniform(rngs.params(), shape(axes, sizes), jnp.float32, -bound, bound)
    return nnx.Param(array.astype(dtype), axes=axes)


def constant(axes: str, sizes: Mapping[str, int], *, dtype: str, value: float) -> nnx.Param:
    """A parameter that starts as one value everywhere (norm scales 1, biases 0)."""
    return nnx.Param(jnp.full(shape(axes, sizes), value, dtype), axes=axes)


def only_chooses(path: str) -> bool:
    """Whether a leaf chooses experts and weighs nothing, so that no gradient reaches it."""
    return path.endswith(("/selection_bias", "/new_bias"))


SCALES = ("/w_gate_scale", "/w_up_scale", "/w_down_scale")
"""How paths of the scales of matrices in few bits end (`models/quantised.py`)."""


def element_type(path: str, dtype: Any, *, stored: Any = None) -> Any:
    """The dtype that a leaf is cast to in a model that is cast to `dtype`; None: it is not cast.

    Leaves that only choose experts stay in float32, since rounding would change the choice. Routers that are stored in
    float32 stay so too: some families compute in float32 (`DecoderConfig.router_float32`), others cast them at use.
    Quantised matrices and their scales are not cast.
    """
    in_few_bits = path.endswith(SCALES) or (stored is not None and jnp.issubdtype(stored, jnp.integer))
    if dtype is None or in_few_bits:
        return None
    in_float32 = only_chooses(path) or (path.endswith("/moe/gate") and stored == jnp.float32)
    return jnp.float32 if in_float32 else dtype


_BEFORE = {"vision/": "media/image/tower/", "projector/": "media/image/projector/", "extension/": "extensions/image/"}


def current_path(path: str) -> str:
    """A leaf's present path, from its path in old files, when a model had at most one medium and one extension."""
    return next((now + path.removeprefix(then) for then, now in _BEFORE.items() if path.startswith(then)), path)


def lasting_path(path: str) -> str:
    """The inverse of `current_path`. Content hashes use these old paths, so that hashes in old files stay valid."""
    return next((then + path.removeprefix(now) for then, now in _BEFORE.items() if path.startswith(now)), path)


def by_path(state: nnx.State) -> dict[str, nnx.Param]:
    """The parameters of a state under slash-joined paths, e.g. "decoder/layers/moe/gate"."""
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}


def arrays_of(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's arrays by path: the form in which steps, optimizers and checkpoints hold parameters."""
    return {path: param[...] for path, param in by_path(nnx.state(model, nnx.Param)).items()}


def with_arrays(model: Module, arrays: Mapping[str, jax.Array]) -> Module:
    """A model of the same structure (real or abstract) around these arrays, of which every path must be given."""
    graph, state = nnx.split(model)
    params = by_path(state)
    if params.keys() != arrays.keys():
        raise KeyError(f"paths that differ: {sorted(params.keys() ^ arrays.keys())}")
    flat = [(tuple(path.split("/")), params[path].replace(array)) for path, array in arrays.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))
