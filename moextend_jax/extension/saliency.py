"""What an expert is worth by its weights and their gradient (Expert Upcycling, arXiv 2604.19835): batches in, scores
[Z, E] out; TABLE of scores, each a rival of picks in choosing which experts are copied (`select.source`).

Norms are Frobenius', over an expert's first map (gate and up together), as the released code has them by default:

    weights    |W|
    saliency   |W| |G|                      G: the gradient of the loss, the mean over all batches
    gradient   |G|^2
    fisher     |G|^2 / (|V| + 1e-8)         V: the mean of the squares of their gradients, as Adam's second moment
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moextend_jax.config import Batch, MoextendError, Recipe
from moextend_jax.mesh import Program, on_host, one_device
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import losses

FIRST_MAP = ("decoder/layers/moe/experts/w_gate", "decoder/layers/moe/experts/w_up")
Leaves = dict[str, jax.Array]


class Norms(NamedTuple):
    """Norms of W, G and V, `[Z, E]` each."""

    weights_ZE: np.ndarray
    gradient_ZE: np.ndarray
    moment_ZE: np.ndarray


NO_GRADIENT = (
    "scores need a gradient of the pretrained experts, which are {}: set expert_storage as_is, or let picks decide"
)

SCORES: dict[str, Callable[[Norms], np.ndarray]] = {
    "weights": lambda norms: norms.weights_ZE,
    "saliency": lambda norms: norms.weights_ZE * norms.gradient_ZE,
    "gradient": lambda norms: norms.gradient_ZE**2,
    "fisher": lambda norms: norms.gradient_ZE**2 / (norms.moment_ZE + 1e-8),
}


def expert_norms(
    model: MoExtend, arrays: Leaves, batches: Iterable[Batch], *, recipe: Recipe, aux_coefficient: float, chunk: int,
    mesh: Mesh | None = None,
) -> Norms:  # fmt: skip
    """Norms over all batches. Two float32 copies of the experts' first maps are kept, split as these are.

    Args:
      model: the structure; arrays: its parameters. chunk: as in `losses`.
      mesh: where these and the batches are; None: on one device.

    Raises:
      MoextendError: the experts are stored in few bits, or there is no batch.
    """
    if model.config.quantised:
        raise MoextendError(f"select.source: {NO_GRADIENT.format(model.config.quantised)}")
    own = {path: arrays[path] for path in FIRST_MAP}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in own}
    sums = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32, device=leaf.sharding), own) for _ in "GV"]
    mesh = mesh or one_device()

    def add(sums: list[Leaves], own: Leaves, frozen: Leaves, batch: Batch) -> list[Leaves]:
        def loss(own: Leaves) -> jax.Array:
            made = with_arrays(model, {**own, **frozen})
            return losses(made, batch, recipe=recipe, aux_coefficient=aux_coefficient, chunk=chunk)[0].total

        gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jax.grad(loss)(own))
        return [
            jax.tree.map(lambda of, g, power=power: of + g**power, total, gradient)
            for power, total in enumerate(sums, start=1)
        ]

    def norms(own: Leaves, sums: list[Leaves], count: jax.Array) -> list[jax.Array]:
        means = [own, *jax.tree.map(lambda leaf: leaf / count, sums)]
        squares = [sum((leaf.astype(jnp.float32) ** 2).sum(axis=(2, 3)) for leaf in of.values()) for of in means]
        return [jnp.sqrt(of_ZE) for of_ZE in squares]

    program, count = Program(add, mesh=mesh, donate_argnums=0), 0
    for batch in batches:
        sums, count = program(sums, own, frozen, batch), count + 1
    if not count:
        raise MoextendError("no rows to take gradients of; select.held_out chooses none")
    return Norms(*map(on_host, Program(norms, mesh=mesh)(own, sums, jnp.float32(count))))
