"""Routing statistics of a model over batches, and the npz file that holds them, whoever wrote it.

In: a model and batches. Out: `Stats`, and one npz file (no pickles) that tools/dump_torch_routing.py writes too:

    format             text, "moextend-routing/1"
    source             text, who wrote it: "jax" or "torch"
    experts, top_k     integers: pretrained experts E, picks per token k
    outputs            [Z] integers: router outputs of each layer, E or E+X; O is the largest
    tokens/KIND        integer: tokens counted, padding left out; KIND is "text" or "image" here and below
    picks/KIND         [Z, O] integers: how often an expert was among the k most likely; sums to tokens * k
    least/KIND         [Z, O] integers: how often it was among the k least likely (what the released code counts)
    probs/KIND         [Z, O] float: mean router probability over these tokens; 0 without tokens
    entropy/KIND       [Z] float: mean over tokens of the entropy of the router's probabilities, in nats
    inputs             text: SHA-256 of (token id, place in its row) as int32 pairs of all tokens, in order
    ids                [Z, T, k] int8 or int16, optional: the picks of every token, most likely first
    gaps               [Z, T] float, with ids: k-th less (k+1)-th largest router logit
    image              [T] bool, with ids: whether it is an image token

Columns that a layer does not have hold 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax.compare.npz import read_npz
from moextend_jax.compare.observe import outputs_Z
from moextend_jax.compare.reference import whole_numbers
from moextend_jax.config import Batch, MoextendError
from moextend_jax.extension.routing import Counts, least_likely, tally
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays

FORMAT = "moextend-routing/1"
Kind = Literal["text", "image"]
KINDS: tuple[Kind, ...] = ("text", "image")
FEW = 100_000
"""Up to so many tokens, every token's picks are kept unless told otherwise."""


class PerToken(NamedTuple):
    ids_ZTk: np.ndarray
    gaps_ZT: np.ndarray
    image_T: np.ndarray


class Stats(NamedTuple):
    """The arrays of the file; those with a KIND are dicts by it. per_token is None where it was not kept."""

    source: str
    experts: int
    top_k: int
    outputs_Z: np.ndarray
    tokens: dict[str, int]
    picks_ZO: dict[str, np.ndarray]
    least_ZO: dict[str, np.ndarray]
    probs_ZO: dict[str, np.ndarray]
    entropy_Z: dict[str, np.ndarray]
    inputs: str
    per_token: PerToken | None


class Load(NamedTuple):
    """What a layer's counts say, per layer Z, of one kind of token or of all.

    share_ZO: picks of an expert / all picks. entropy_Z: of the mean probabilities, in nats; ln O is even.
    token_entropy_Z: mean of the tokens' own entropies. balance_Z: O * sum_i share_i prob_i; 1 is even, O is one expert
    for everything. busiest_Z: picks of the busiest expert over the mean.
    """

    share_ZO: np.ndarray
    probs_ZO: np.ndarray
    entropy_Z: np.ndarray
    token_entropy_Z: np.ndarray
    balance_Z: np.ndarray
    busiest_Z: np.ndarray


def collect(
    model: MoExtend, arrays: dict[str, jax.Array], batches: Iterable[Batch], *, per_token: bool | None = None
) -> Stats:
    """Statistics over batches, summed on the host in 64 bits. `per_token` None keeps picks if tokens are few."""
    counted = jax.jit(lambda arrays, batch: _count(with_arrays(model, arrays), batch))
    sums: dict[str, np.ndarray] | None = None
    kept: list[PerToken] | None = [] if per_token is not False else None
    digest = hashlib.sha256()
    for batch in batches:
        totals, ids_ZTk, gaps_ZT = jax.tree.map(np.asarray, counted(arrays, batch))
        totals = {name: total.astype(np.int64 if total.dtype.kind == "i" else float) for name, total in totals.items()}
        sums = totals if sums is None else {name: sums[name] + totals[name] for name in totals}
        real_BL = np.asarray(batch.segments_BL) > 0
        digest.update(token_places(np.asarray(batch.ids_BL), real_BL))
        if kept is not None:
            real_T, image_T = real_BL.reshape(-1), np.asarray(batch.patches_BL).reshape(-1) >= 0
            kept.append(PerToken(_small(ids_ZTk[:, real_T]), gaps_ZT[:, real_T], image_T[real_T]))
            if per_token is None and sums["tokens/text"] + sums["tokens/image"] > FEW:
                kept = None
    if sums is None or not sums["tokens/text"] + sums["tokens/image"]:
        raise MoextendError("no token to collect routing on: the data is empty")
    return Stats(
        source="jax",
        experts=model.config.decoder.experts,
        top_k=model.config.decoder.top_k,
        outputs_Z=np.asarray(outputs_Z(model)),
        tokens={kind: int(sums[f"tokens/{kind}"]) for kind in KINDS},
        picks_ZO={kind: sums[f"picks/{kind}"] for kind in KINDS},
        least_ZO={kind: sums[f"least/{kind}"] for kind in KINDS},
        probs_ZO={kind: sums[f"probs/{kind}"] / max(1, sums[f"tokens/{kind}"]) for kind in KINDS},
        entropy_Z={kind: sums[f"entropy/{kind}"] / max(1, sums[f"tokens/{kind}"]) for kind in KINDS},
        inputs=digest.hexdigest(),
        per_token=None if kept is None else PerToken(*(np.concatenate(parts, -2 if parts[0].ndim == 3 else -1)
                                                       for parts in zip(*kept, strict=True))),
    )  # fmt: skip


def token_places(ids_BL: np.ndarray, real_BL: np.ndarray) -> bytes:
    """(token id, place in its row) of all real tokens: how wide rows are padded does not matter."""
    places_BL = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)
    return np.stack([ids_BL[real_BL], places_BL[real_BL]], axis=1).astype("<i4").tobytes()


def load_of(stats: Stats, kind: Kind | Literal["all"]) -> Load:
    """Loads of one kind of token, or of all of them together."""
    kinds = KINDS if kind == "all" else (kind,)
    tokens = max(1, sum(stats.tokens[kind] for kind in kinds))
    picks_ZO = np.sum([stats.picks_ZO[kind] for kind in kinds], axis=0)
    probs_ZO = np.sum([stats.probs_ZO[kind] * stats.tokens[kind] for kind in kinds], axis=0) / tokens
    token_entropy_Z = np.sum([stats.entropy_Z[kind] * stats.tokens[kind] for kind in kinds], axis=0) / tokens
    share_ZO = picks_ZO / np.maximum(picks_ZO.sum(axis=1, keepdims=True), 1)
    logs_ZO = np.log(np.where(probs_ZO > 0, probs_ZO, 1))
    return Load(
        share_ZO=share_ZO,
        probs_ZO=probs_ZO,
        entropy_Z=-(probs_ZO * logs_ZO).sum(axis=1),
        token_entropy_Z=token_entropy_Z,
        balance_Z=stats.outputs_Z * (share_ZO * probs_ZO).sum(axis=1),
        busiest_Z=stats.outputs_Z * share_ZO.max(axis=1),
    )


def counts_of(stats: Stats, mode: Literal["top_k", "least_likely"]) -> Counts:
    """The counts that `extension/routing.py` chooses layers by."""
    picks_ZO = stats.picks_ZO if mode == "top_k" else stats.least_ZO
    return Counts(picks_ZO["text"], picks_ZO["image"], stats.tokens["text"], stats.tokens["image"])


def write_stats(path: Path, stats: Stats) -> None:
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "source": np.array(stats.source),
        "experts": np.int64(stats.experts),
        "top_k": np.int64(stats.top_k),
        "outputs": stats.outputs_Z.astype(np.int64),
        "inputs": np.array(stats.inputs),
    }
    for kind in KINDS:
        arrays |= {
            f"tokens/{kind}": np.int64(stats.tokens[kind]),
            f"picks/{kind}": stats.picks_ZO[kind],
            f"least/{kind}": stats.least_ZO[kind],
            f"probs/{kind}": stats.probs_ZO[kind],
            f"entropy/{kind}": stats.entropy_Z[kind],
        }
    if stats.per_token is not None:
        ids, gaps, image = stats.per_token
        arrays |= {"ids": ids, "gaps": gaps.astype(np.float32), "image": image}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:  # a name without .npz stays as it is
        np.savez_compressed(file, **arrays)
    unfinished.rename(path)


def read_stats(path: Path) -> Stats:
    """Reads and checks a file; a missing array, a wrong shape or counts that do not add up are named."""
    arrays = read_npz(path)
    if str(arrays.get("format", "")) != FORMAT:
        raise MoextendError(
            f"{path} is no file of routing statistics ({FORMAT}); make one with `moextend routing collect`"
        )
    needed = ("source", "experts", "top_k", "outputs", "inputs")
    by_kind = ("tokens", "picks", "least", "probs", "entropy")
    wanted = [*needed, *(f"{name}/{kind}" for name in by_kind for kind in KINDS)]
    if missing := [name for name in wanted if name not in arrays]:
        raise MoextendError(f"{path} lacks {', '.join(missing)}")
    for name in ("experts", "top_k", *(f"tokens/{kind}" for kind in KINDS)):
        if arrays[name].shape != () or arrays[name].dtype.kind not in "iu" or not 0 <= arrays[name] < 1 << 62:
            raise MoextendError(f"{path}: {name} must be a whole number")
    outputs_Z = whole_numbers(arrays["outputs"], what=f"{path}: outputs")
    if outputs_Z.ndim != 1 or not outputs_Z.size or outputs_Z.min() < 1:
        raise MoextendError(f"{path}: outputs must be one positive number per layer")
    layers, most = len(outputs_Z), int(outputs_Z.max())
    top_k = int(arrays["top_k"])
    shapes = {"tokens": (), "picks": (layers, most), "least": (layers, most), "probs": (layers, most),
              "entropy": (layers,)}  # fmt: skip
    for kind in KINDS:
        for name in by_kind:
            if arrays[f"{name}/{kind}"].shape != shapes[name]:
                was = arrays[f"{name}/{kind}"].shape
                raise MoextendError(f"{path}: {name}/{kind} has shape {was}, expected {shapes[name]}")
            if arrays[f"{name}/{kind}"].dtype.kind not in ("f" if name in ("probs", "entropy") else "iu"):
                raise MoextendError(f"{path}: {name}/{kind} has element type {arrays[f'{name}/{kind}'].dtype}")
        if (arrays[f"picks/{kind}"].sum(axis=1) != arrays[f"tokens/{kind}"] * top_k).any():
            raise MoextendError(f"{path}: picks/{kind} are not {top_k} per token in every layer")
    kinds = {name: {kind: arrays[f"{name}/{kind}"] for kind in KINDS} for name in by_kind}
    return Stats(
        source=str(arrays["source"]),
        experts=int(arrays["experts"]),
        top_k=top_k,
        outputs_Z=arrays["outputs"],
        tokens={kind: int(kinds["tokens"][kind]) for kind in KINDS},
        picks_ZO=kinds["picks"],
        least_ZO=kinds["least"],
        probs_ZO=kinds["probs"],
        entropy_Z=kinds["entropy"],
        inputs=str(arrays["inputs"]),
        per_token=_per_token(path, arrays, layers, top_k),
    )


def _per_token(path: Path, arrays: dict[str, np.ndarray], layers: int, top_k: int) -> PerToken | None:
    if "ids" not in arrays:
        return None
    if missing := {"gaps", "image"} - arrays.keys():
        raise MoextendError(f"{path} holds ids but lacks {', '.join(sorted(missing))}")
    count = int(arrays["tokens/text"] + arrays["tokens/image"])
    shapes = {"ids": (layers, count, top_k), "gaps": (layers, count), "image": (count,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise MoextendError(f"{path}: {name} has shape {arrays[name].shape}, expected {shape}")
    kinds = {"ids": "iu", "gaps": "f", "image": "b"}
    if wrong := [name for name in kinds if arrays[name].dtype.kind not in kinds[name]]:
        raise MoextendError(f"{path}: {', '.join(wrong)} has another element type than it should")
    return PerToken(arrays["ids"], arrays["gaps"], arrays["image"].astype(bool))


def _count(model: MoExtend, batch: Batch):
    """(sums by name, ids_ZTk, gaps_ZT) of one batch, traceable."""
    routing = model(batch).routing
    logits_ZTO = routing.logits_TO
    outputs, top_k = logits_ZTO.shape[-1], routing.ids_Tk.shape[-1]
    least_ZTk = least_likely(logits_ZTO, top_k=top_k)
    log_probs_ZTO = jax.nn.log_softmax(logits_ZTO, axis=-1)
    probs_ZTO = jnp.exp(log_probs_ZTO)
    absent_ZTO = jnp.isneginf(logits_ZTO)  # new columns of plain layers
    entropy_ZT = -jnp.where(absent_ZTO, 0.0, probs_ZTO * log_probs_ZTO).sum(axis=-1)
    image_T = (batch.patches_BL >= 0).reshape(-1)
    real_T = (batch.segments_BL > 0).reshape(-1)
    sums = {}
    for kind, of_T in (("text", real_T & ~image_T), ("image", real_T & image_T)):
        for name, ids_ZTk in (("picks", routing.ids_Tk), ("least", least_ZTk)):
            sums[f"{name}/{kind}"] = tally(ids_ZTk, of_T, outputs=outputs)
        sums[f"probs/{kind}"] = jnp.where(of_T[None, :, None], probs_ZTO, 0).sum(axis=1)
        sums[f"entropy/{kind}"] = jnp.where(of_T[None], entropy_ZT, 0).sum(axis=1)
        sums[f"tokens/{kind}"] = of_T.sum()
    most_ZTk = jax.lax.top_k(logits_ZTO, min(top_k + 1, outputs))[0]
    gaps_ZT = most_ZTk[..., top_k - 1] - most_ZTk[..., -1] if outputs > top_k else jnp.full(most_ZTk.shape[:2], jnp.inf)
    return sums, routing.ids_Tk, gaps_ZT


def _small(ids_ZTk: np.ndarray) -> np.ndarray:
    return ids_ZTk.astype(np.int8 if ids_ZTk.max(initial=0) < 128 else np.int16)
