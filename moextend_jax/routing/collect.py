"""Runs a model over batches and counts what its routers do.

In: a model and batches of `ids_BL`. Out: `Stats` (stats.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moextend_jax import preemption
from moextend_jax.config import Batch, MoextendError
from moextend_jax.extension.routing import count_faulty, least_likely, refuse_faulty, tally
from moextend_jax.mesh import Program, on_host, one_device, place_whole
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import with_arrays
from moextend_jax.routing.stats import KINDS, PerToken, Stats

FEW = 100_000
"""Up to so many tokens, every token's picks are kept unless told otherwise."""


def collect(
    model: MoExtend,
    arrays: dict[str, jax.Array],
    batches: Iterable[Batch],
    *,
    per_token: bool | None = None,
    mesh: Mesh | None = None,
) -> Stats:
    """Statistics over batches, summed on the host in 64 bits.

    Args:
      batches: on the host, the same in every process.
      per_token: whether to keep every token's picks; None keeps them if tokens are few.
      mesh: where the arrays are; None: on one device.

    Raises:
      MoextendError: there is no token, a router gives NaN or infinity, or an extension adds to a token's picks.
    """
    for name, added in model.config.extensions.items():
        if added.start == "added":
            raise MoextendError(
                f"extension {name} adds experts beside the {model.config.decoder.top_k} that a token picks, and "
                "statistics are of so many picks of every token: collect them of a model without it"
            )
    mesh, dense = mesh or one_device(), model.config.decoder.dense_layers
    count = Program(lambda arrays, batch: _count(with_arrays(model, arrays), batch), mesh=mesh)
    sums: dict[str, np.ndarray] | None = None
    picks: list[PerToken] | None = [] if per_token is not False else None
    digest = hashlib.sha256()
    for batch in batches:
        preemption.stop_if_told()
        totals, ids_ZTk, gaps_ZT = jax.tree.map(on_host, count(arrays, place_whole(batch, mesh)))
        refuse_faulty(totals.pop("faulty"), first=dense)
        totals = {name: total.astype(np.int64 if total.dtype.kind == "i" else float) for name, total in totals.items()}
        sums = totals if sums is None else {name: sums[name] + totals[name] for name in totals}
        real_BL = np.asarray(batch.segments_BL) > 0
        digest.update(token_places(np.asarray(batch.ids_BL), real_BL))
        if picks is not None:
            real_T, image_T = real_BL.reshape(-1), np.asarray(batch.places_BL).reshape(-1) >= 0
            picks.append(PerToken(_small(ids_ZTk[:, real_T]), gaps_ZT[:, real_T], image_T[real_T]))
            if per_token is None and sums["tokens/text"] + sums["tokens/image"] > FEW:
                picks = None
    if sums is None or not sums["tokens/text"] + sums["tokens/image"]:
        raise MoextendError("no token to collect routing on: the data is empty")
    return Stats(
        source="jax",
        experts=model.config.decoder.experts,
        top_k=model.config.decoder.top_k,
        has_ZO=np.array(model.config.has_ZO),
        tokens={kind: int(sums[f"tokens/{kind}"]) for kind in KINDS},
        picks_ZO={kind: sums[f"picks/{kind}"] for kind in KINDS},
        least_ZO={kind: sums[f"least/{kind}"] for kind in KINDS},
        probs_ZO={kind: sums[f"probs/{kind}"] / max(1, sums[f"tokens/{kind}"]) for kind in KINDS},
        entropy_Z={kind: sums[f"entropy/{kind}"] / max(1, sums[f"tokens/{kind}"]) for kind in KINDS},
        inputs=digest.hexdigest(),
        per_token=None if picks is None else _concatenated(picks),
        layers_Z=dense + np.arange(len(model.config.decoder.routed)),
    )


def _concatenated(parts: list[PerToken]) -> PerToken:
    ids_ZTk, gaps_ZT, image_T = zip(*parts, strict=True)
    return PerToken(np.concatenate(ids_ZTk, 1), np.concatenate(gaps_ZT, 1), np.concatenate(image_T))


def token_places(ids_BL: np.ndarray, real_BL: np.ndarray) -> bytes:
    """(token id, place in its row) of all real tokens: how wide rows are padded does not matter."""
    places_BL = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)
    return np.stack([ids_BL[real_BL], places_BL[real_BL]], axis=1).astype("<i4").tobytes()


def _count(model: MoExtend, batch: Batch):
    """(sums by name, ids_ZTk, gaps_ZT) of one batch, traceable."""
    routing = model(batch).routing
    logits_ZTO = routing.logits_TO
    outputs, top_k = logits_ZTO.shape[-1], routing.ids_Tk.shape[-1]
    least_ZTk = least_likely(routing.chosen_by_TO, top_k=top_k)
    # Of the logits whatever a family weighs by: so files of all families, and of PyTorch, say the same.
    probs_ZTO = jax.nn.softmax(logits_ZTO, axis=-1)
    entropy_ZT = jax.scipy.special.entr(probs_ZTO).sum(axis=-1)
    image_T = (batch.places_BL >= 0).reshape(-1)
    real_T = (batch.segments_BL > 0).reshape(-1)
    sums = {"faulty": count_faulty(logits_ZTO, real_T)}
    for kind, of_T in (("text", real_T & ~image_T), ("image", real_T & image_T)):
        for name, ids_ZTk in (("picks", routing.ids_Tk), ("least", least_ZTk)):
            sums[f"{name}/{kind}"] = tally(ids_ZTk, of_T, outputs=outputs)
        sums[f"probs/{kind}"] = jnp.where(of_T[None, :, None], probs_ZTO, 0).sum(axis=1)
        sums[f"entropy/{kind}"] = jnp.where(of_T[None], entropy_ZT, 0).sum(axis=1)
        sums[f"tokens/{kind}"] = of_T.sum()
    most_ZTk = jax.lax.top_k(routing.chosen_by_TO, min(top_k + 1, outputs))[0]
    gaps_ZT = most_ZTk[..., top_k - 1] - most_ZTk[..., -1] if outputs > top_k else jnp.full(most_ZTk.shape[:2], jnp.inf)
    return sums, routing.ids_Tk, gaps_ZT


def _small(ids_ZTk: np.ndarray) -> np.ndarray:
    return ids_ZTk.astype(np.int8 if ids_ZTk.max(initial=0) < 128 else np.int16)
