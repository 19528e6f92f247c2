"""MoExtend in JAX: new modalities for pretrained mixture-of-experts models by adding experts.

`import moextend_jax as mx` is quick and imports no JAX; what docs/python.md describes is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moextend_jax.config import MoextendError
from moextend_jax.machine import quiet_libtpu

if TYPE_CHECKING:
    from moextend_jax.api import Model, Routing, open, run  # noqa: A004

__version__ = "0.2.0"
__all__ = ["Model", "MoextendError", "Routing", "open", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    quiet_libtpu()  # before JAX is imported
    return getattr(importlib.import_module("moextend_jax.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
