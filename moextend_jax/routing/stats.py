"""Routing statistics and the npz file that holds them, whoever wrote it: `collect.py` or tools/dump_torch_routing.py.

In: `Stats`, or a file. Out: a file without pickles, or `Stats`; what its counts say, layer by layer. docs/routing.md
describes the arrays of the file. Column o is of expert o of the whole model, also where a layer lacks some before it.
Columns that a layer lacks hold 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from moextend_jax.checkpoints.npz import read_npz, whole_numbers, write_npz
from moextend_jax.config import MoextendError
from moextend_jax.extension.routing import Counts

FORMAT = "moextend-routing/1"
Kind = Literal["text", "image"]
KINDS: tuple[Kind, ...] = ("text", "image")


class PerToken(NamedTuple):
    ids_ZTk: np.ndarray
    gaps_ZT: np.ndarray
    image_T: np.ndarray


class Stats(NamedTuple):
    """The arrays of the file; those with a KIND are dicts by it. per_token is None where it was not kept."""

    source: str
    experts: int
    top_k: int
    has_ZO: np.ndarray
    tokens: dict[str, int]
    picks_ZO: dict[str, np.ndarray]
    least_ZO: dict[str, np.ndarray]
    probs_ZO: dict[str, np.ndarray]
    entropy_Z: dict[str, np.ndarray]
    inputs: str
    per_token: PerToken | None
    layers_Z: np.ndarray | None = None
    """Numbers of these layers among all; None: 0, 1, ..."""

    @property
    def columns(self) -> int:
        """All experts of the model, which a layer may lack some of."""
        return self.has_ZO.shape[1]

    @property
    def outputs_Z(self) -> np.ndarray:
        """How many experts each layer has."""
        return self.has_ZO.sum(axis=1)

    @property
    def layers(self) -> list[int]:
        return list(range(len(self.has_ZO))) if self.layers_Z is None else self.layers_Z.tolist()


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


def on_first_columns(stats: Stats, columns: int) -> Stats:
    """The first columns alone: the picks that went to their experts, and the probabilities of these, rescaled to a sum
    of one. Single tokens keep their picks and entropies."""
    own = slice(0, columns)

    def of_all(probs_ZO: np.ndarray) -> np.ndarray:
        return probs_ZO[:, own] / np.maximum(probs_ZO[:, own].sum(axis=1, keepdims=True), 1e-300)

    return stats._replace(
        has_ZO=stats.has_ZO[:, own],
        picks_ZO={kind: picks_ZO[:, own] for kind, picks_ZO in stats.picks_ZO.items()},
        least_ZO={kind: least_ZO[:, own] for kind, least_ZO in stats.least_ZO.items()},
        probs_ZO={kind: of_all(probs_ZO) for kind, probs_ZO in stats.probs_ZO.items()},
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
        "has": stats.has_ZO,
        "layers": np.array(stats.layers, np.int64),
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
    write_npz(path, arrays)


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
    layers, most = len(outputs_Z), max(0, int(outputs_Z.max()), *arrays["picks/text"].shape[-1:])
    numbers_Z = whole_numbers(arrays.get("layers", np.arange(layers)), what=f"{path}: layers")
    if numbers_Z.shape != (layers,):
        raise MoextendError(f"{path}: layers must be one number per layer, as outputs is")
    top_k = int(arrays["top_k"])
    shapes = {"tokens": (), "picks": (layers, most), "least": (layers, most), "probs": (layers, most),
              "entropy": (layers,)}  # fmt: skip
    for kind in KINDS:
        for name in by_kind:
            if arrays[f"{name}/{kind}"].shape != shapes[name]:
                shape = arrays[f"{name}/{kind}"].shape
                raise MoextendError(f"{path}: {name}/{kind} has shape {shape}, expected {shapes[name]}")
            if arrays[f"{name}/{kind}"].dtype.kind not in ("f" if name in ("probs", "entropy") else "iu"):
                raise MoextendError(f"{path}: {name}/{kind} has element type {arrays[f'{name}/{kind}'].dtype}")
        for name in ("probs", "entropy"):
            _check_finite(arrays[f"{name}/{kind}"], what=f"{path}: {name}/{kind}")
        if (arrays[f"picks/{kind}"].sum(axis=1) != arrays[f"tokens/{kind}"] * top_k).any():
            raise MoextendError(f"{path}: picks/{kind} are not {top_k} per token in every layer")
    kinds = {name: {kind: arrays[f"{name}/{kind}"] for kind in KINDS} for name in by_kind}
    experts, probs_ZO = int(arrays["experts"]), np.sum([*kinds["probs"].values()], axis=0)
    has_ZO = arrays.get("has", _had(outputs_Z, probs_ZO, experts=experts))
    fits = has_ZO.dtype == bool and has_ZO.shape == (layers, most) and (has_ZO.sum(axis=1) == outputs_Z).all()
    if not fits or experts > most or not has_ZO[:, :experts].all() or not has_ZO[:, -1].any():
        raise MoextendError(
            f"{path}: outputs and has must say which of {most} experts each layer has, the first {experts} among them"
        )
    return Stats(
        source=str(arrays["source"]),
        experts=experts,
        top_k=top_k,
        has_ZO=has_ZO,
        tokens={kind: int(kinds["tokens"][kind]) for kind in KINDS},
        picks_ZO=kinds["picks"],
        least_ZO=kinds["least"],
        probs_ZO=kinds["probs"],
        entropy_Z=kinds["entropy"],
        inputs=str(arrays["inputs"]),
        per_token=_per_token(path, arrays, layers, top_k, experts=most),
        layers_Z=numbers_Z,
    )


def _had(outputs_Z: np.ndarray, probs_ZO: np.ndarray, *, experts: int) -> np.ndarray:
    """What `has` would be in a file from before it: the pretrained experts, then those with the largest probabilities,
    as absent ones have none."""
    worth_ZO = np.where(np.arange(probs_ZO.shape[1]) < experts, np.inf, probs_ZO)
    return np.argsort(np.argsort(-worth_ZO, axis=1, kind="stable"), axis=1) < outputs_Z[:, None]


def _check_finite(array: np.ndarray, *, what: str) -> None:
    faulty_Z = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if faulty_Z.any():
        layers = np.flatnonzero(faulty_Z).tolist()
        raise MoextendError(f"{what} is NaN or infinite in layers {layers}: picks of such a router mean nothing")


def _per_token(path: Path, arrays: dict[str, np.ndarray], layers: int, top_k: int, *, experts: int) -> PerToken | None:
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
    _check_finite(np.where(np.isposinf(arrays["gaps"]), 0, arrays["gaps"]), what=f"{path}: gaps")
    if arrays["ids"].min(initial=0) < 0 or arrays["ids"].max(initial=0) >= experts:
        raise MoextendError(f"{path}: ids must be of experts 0 to {experts - 1}")
    if arrays["image"].sum() != arrays["tokens/image"]:
        raise MoextendError(f"{path}: image must be true for {arrays['tokens/image']} tokens")
    return PerToken(arrays["ids"], arrays["gaps"], arrays["image"].astype(bool))
