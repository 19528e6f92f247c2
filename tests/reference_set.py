"""A folder of reference numbers like ../shared/oracle's, of other sizes, made by a second derivation of everything.

In: an empty folder. Out: checkpoints in the released layout and npz files of forward passes, stages, selection
and tower, computed in float64, densely (every expert on every token), by the tensor names of the files. Sizes differ
wherever they can: 5 layers, 6 heads on 3, 6 experts of which 3 run, 9 patches, extended layers 0, 3 and 4, rows with
none to two images, batches without any, masks with holes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

Z, D, N, K, F, E, TOP, V, THETA, EPS = 5, 24, 6, 3, 20, 6, 3, 120, 1e5, 1e-5
H = D // N
C, J, U, HEADS, IMAGE, PATCH = 16, 24, 3, 2, 12, 4
P = (IMAGE // PATCH) ** 2
START, B, L, COEFFICIENT = 100, 4, 32, 0.01
EXTENDED, A = (0, 3, 4), 16
SOURCE = 2
"""The expert that new ones start as, in every extended layer of `moextend_init`."""
IMAGES = {"train0": (2, 0, 1, 1), "train1": (0, 0, 0, 0), "train2": (0, 2, 1, 0), "text": (0, 0, 0, 0)}
STAGES = {
    "align_vision": ("vision", ("visual.mm_projector.",)),
    "extend_vision": ("vision", ("block_sparse_moe.gate.",)),
    "finetune_pert": ("moextend_pert", ("gate_vision.", "weight_scale.", f"experts.{E}.", "visual.mm_projector.")),
}
LR, CLIP = 1e-3, 1.0

Tensors = dict[str, Any]


class Set:
    """A folder with models, batches and images, to which `write` and the others add what is computed of them."""

    def __init__(self, folder: Path):
        rng = np.random.default_rng(7)
        self.folder = folder
        self.models = _checkpoints(folder, rng)
        self.batches, self.images = _batches(rng), rng.normal(size=(5, 3, IMAGE, IMAGE)).astype(np.float32)
        rows = {name: rng.integers(0, len(self.images), sum(counts)) for name, counts in IMAGES.items()}
        self.sequences = _sequences(rng, len(self.images))
        order: dict[str, Any] = {f"{name}/image_index": index for name, index in rows.items() if len(index)}
        order["selection/image_index"] = self.sequences["index"]
        self.pixels = {name: self.images[rows[name]] if name in rows else self.images[:0] for name in self.batches}
        flat: dict[str, Any] = {
            f"{name}/{key}": array for name, batch in self.batches.items() for key, array in batch.items()
        }
        np.savez(folder / "batches.npz", **flat)
        np.savez(folder / "images.npz", pixel_values=self.images, **order)
        (folder / "manifest.json").write_text(json.dumps({"spec": {"image_start_id": START, "coef": COEFFICIENT}}))

    def write(self, *, stages: bool) -> Path:
        """Everything, but stages of training only if asked: their gradients take long."""
        for model in self.models:
            self.forward(model)
        _save(self.folder / "selection.npz", _selection(self.models, self.sequences, self.images))
        _save(self.folder / "clip.npz", _tower_file(self.models["vision"], self.images))
        for stage, (model, trained) in STAGES.items() if stages else ():
            with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
                arrays = _stage(self.models[model], trained, self.batches, self.pixels)
            _save(self.folder / f"stage_{stage}.npz", arrays)
        return self.folder

    def forward(self, model: str) -> Path:
        arrays = {}
        for name, batch in self.batches.items():
            by_quantity = forward(self.models[model], batch, self.pixels[name])
            by_quantity["img_pos"] = _places(batch["input_ids"])
            arrays |= {f"{name}/{key}": array for key, array in by_quantity.items()}
        return _save(self.folder / f"forward_{model}.npz", arrays)


# --- models and data --------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path, rng: np.random.Generator) -> dict[str, Tensors]:
    def normal(shapes: dict[str, tuple[int, ...]], std: float) -> Tensors:
        return {name: rng.normal(0, std, shape).astype(np.float32) for name, shape in shapes.items()}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    norms = {"model.norm.weight": (D,)}
    for z in range(Z):
        at = f"model.layers.{z}."
        norms |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        shapes |= {at + f"self_attn.{n}_proj.weight": (h * H, D) for n, h in (("q", N), ("k", K), ("v", K))}
        shapes |= {at + "self_attn.o_proj.weight": (D, N * H), at + "block_sparse_moe.gate.weight": (E, D)}
        for e in range(E):
            expert = at + f"block_sparse_moe.experts.{e}."
            shapes |= {expert + "w1.weight": (F, D), expert + "w2.weight": (D, F), expert + "w3.weight": (F, D)}
    projector = {"0.weight": (D, C), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
    shapes |= {f"model.visual.mm_projector.{name}": shape for name, shape in projector.items()}
    vision: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (C,), "embeddings.patch_embedding.weight": (C, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (P + 1, C), "pre_layrnorm.weight": (C,), "pre_layrnorm.bias": (C,),
        "post_layernorm.weight": (C,), "post_layernorm.bias": (C,),
    }  # fmt: skip
    for u in range(U):
        at = f"encoder.layers.{u}."
        vision |= {at + f"self_attn.{n}_proj.{w}": s for n in ("q", "k", "v", "out") for w, s in _linear(C, C)}
        vision |= {at + f"layer_norm{n}.{w}": (C,) for n in (1, 2) for w in ("weight", "bias")}
        vision |= {at + f"mlp.fc{n}.{w}": s for n, size in ((1, (J, C)), (2, (C, J))) for w, s in _linear(*size)}
    tower = {f"vision_model.{name}": array for name, array in normal(vision, 0.3).items()}
    scales = {name: 1 + array for name, array in normal(norms, 0.1).items()}
    inside = {f"model.visual.vision_tower.{name}": array for name, array in tower.items()}
    plain = {**normal(shapes, 0.3), **scales, **inside}
    new: dict[str, tuple[int, ...]] = {}
    for z in EXTENDED:
        at = f"model.layers.{z}.block_sparse_moe."
        new |= {at + "gate_vision.weight": (1, D), at + "weight_scale.weight_scale.0.weight": (A, E + 1)}
        new |= {at + "weight_scale.weight_scale.2.weight": (E + 1, A), at + f"experts.{E}.w2.weight": (D, F)}
        new |= {at + f"experts.{E}.{w}.weight": (F, D) for w in ("w1", "w3")}
    probed = {n: a + (rng.normal(0, 0.2, a.shape) if ".gate." in n else 0) for n, a in plain.items()}
    init = dict(probed)  # new columns that equal their sources, as they are made
    for z in EXTENDED:
        at = f"model.layers.{z}.block_sparse_moe."
        init[at + "gate_vision.weight"] = probed[at + "gate.weight"][SOURCE][None]
        init[at + "weight_scale.weight_scale.0.weight"] = rng.normal(0, 0.02, (A, E + 1))
        init[at + "weight_scale.weight_scale.2.weight"] = np.zeros((E + 1, A))
        init |= {
            at + f"experts.{E}.{w}.weight": probed[at + f"experts.{SOURCE}.{w}.weight"] for w in ("w1", "w2", "w3")
        }
    models = {
        "vision": plain,
        "vision_gate": probed,
        "moextend_init": init,
        "moextend_pert": {**plain, **normal(new, 0.3)},
    }
    models = {name: {n: np.asarray(a, np.float32) for n, a in tensors.items()} for name, tensors in models.items()}
    attributes = {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": D, "intermediate_size": F, "vocab_size": V,
        "num_hidden_layers": Z, "num_attention_heads": N, "num_key_value_heads": K, "num_experts_per_tok": TOP,
        "rope_theta": THETA, "rms_norm_eps": EPS, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    for name, tensors in models.items():
        extended = name.startswith("moextend")
        more = {"add_layer": list(EXTENDED) if extended else None, "num_local_experts": E + extended}
        _folder(folder / name, attributes | more, tensors)
    sizes = {
        "model_type": "clip_vision_model", "hidden_size": C, "intermediate_size": J, "num_hidden_layers": U,
        "num_attention_heads": HEADS, "image_size": IMAGE, "patch_size": PATCH, "layer_norm_eps": EPS,
        "hidden_act": "quick_gelu",
    }  # fmt: skip
    _folder(folder / "clip", sizes, tower)
    return models


def _linear(out: int, into: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("weight", (out, into)), ("bias", (out,))


def _folder(folder: Path, attributes: dict[str, Any], tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(attributes))
    save_file({n: np.ascontiguousarray(a, np.float32) for n, a in tensors.items()}, folder / "model.safetensors")


def _batches(rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    batches = {}
    for name, counts in IMAGES.items():
        ids = rng.integers(3, START, (B, L)).astype(np.int32)
        mask, labels = np.ones((B, L), bool), np.full((B, L), -100, np.int32)
        ids[:, 0] = 1
        for row, count in enumerate(counts):
            at = 2
            for _ in range(count):
                ids[row, at : at + P + 2] = [START, *[START + 2] * P, START + 1]
                at += P + 2 + int(rng.integers(0, 3))
            labels[row, at + 1 :] = ids[row, at + 1 :]
            mask[row, L - 2 * row :] = False  # on the right, more in later rows
            mask[row, at + 2 : at + 2 + row] = False  # and a hole, behind the images
            if count == 1:
                mask[row, 5] = False  # and one within an image
        labels[~mask] = -100
        batches[name] = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    rolled = {key: np.stack([np.roll(row, n) for n, row in enumerate(a)]) for key, a in batches["text"].items()}
    return {**batches, "left": rolled}


def _sequences(rng: np.random.Generator, images: int) -> dict[str, np.ndarray]:
    """11 sequences padded with -1, with none to two images each; `index` has a line per sequence, -1 for none."""
    count = 11
    ids, lengths = np.full((count, 30), -1, np.int32), rng.integers(5, 30, count)
    index = np.full((count, 2), -1, np.int32)
    for row in range(count):
        ids[row, : lengths[row]] = rng.integers(3, START, lengths[row])
        ids[row, 0] = 1
        for image in range(min(row % 3, (int(lengths[row]) - 1) // (P + 2))):
            at = 1 + image * (P + 2)
            ids[row, at : at + P + 2] = [START, *[START + 2] * P, START + 1]
            index[row, image] = rng.integers(0, images)
    return {"input_ids": ids, "lengths": lengths.astype(np.int32), "index": index}


# --- the derivation ---------------------------------------------------------------------------------------------------


def forward(t: Tensors, batch: dict[str, np.ndarray], images: np.ndarray, *, xp: Any = np) -> dict[str, Any]:
    """All that a reference file holds of one batch. `t` are the tensors of a checkpoint, by name; `xp` is NumPy, or
    JAX's where a gradient is wanted."""
    t = {name: xp.asarray(array, xp.float64) for name, array in t.items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, length = ids.shape
    seen: dict[str, Any] = {}
    x = t["model.embed_tokens.weight"][ids]
    index = batch["index"] if "index" in batch else _index(ids)
    if len(images):
        features = _tower(t, images, xp)[-1][:, 1:]
        hidden = _gelu(_affine(features, t, "model.visual.mm_projector.0"), xp)
        visual = _affine(hidden, t, "model.visual.mm_projector.2")
        x = xp.where((index >= 0)[..., None], visual.reshape(-1, D)[xp.maximum(index, 0)], x)
        seen |= {"clip_patch_features": features, "image_features": visual, "pixel_values": images}
    visible = np.tril(np.ones((length, length), bool))[None] & mask[:, None, :]
    picks, probs = [], []
    for z in range(Z):
        seen[f"hidden_states/{z}"] = x
        at = f"model.layers.{z}."
        x = x + _attention(t, at, _norm(x, t[at + "input_layernorm.weight"]), visible, xp)
        y = _norm(x, t[at + "post_attention_layernorm.weight"])
        out, logits, ids_k, weights, own = _mixture(t, at + "block_sparse_moe.", y.reshape(-1, D), xp)
        p = _softmax(logits)
        seen |= {f"moe_in/{z}": y, f"moe_out/{z}": out.reshape(x.shape), f"router_logits/{z}": logits}
        seen |= {f"topk_idx/{z}": ids_k, f"topk_prob/{z}": xp.take_along_axis(p, ids_k, -1)}
        seen[f"topk_weight/{z}"] = weights
        if own is not None:
            seen[f"topk_calibrated/{z}"] = own
        x = x + out.reshape(x.shape)
        picks.append((ids_k[..., None] == xp.arange(logits.shape[1])).sum(1))
        probs.append(p)
    x = _norm(x, t["model.norm.weight"])
    seen[f"hidden_states/{Z}"] = x
    seen["logits"] = x @ t["lm_head.weight"].T
    targets = batch["labels"][:, 1:]
    nats = -xp.log(_softmax(seen["logits"][:, :-1]))
    nats = xp.take_along_axis(nats, xp.maximum(targets, 0)[..., None], -1)[..., 0]
    seen["loss_ce"] = (nats * (targets >= 0)).sum() / (targets >= 0).sum()
    seen["loss_aux"] = _aux(picks, probs, mask.reshape(-1), "model.layers.0.block_sparse_moe.gate_vision.weight" in t)
    seen["loss_total"] = seen["loss_ce"] + COEFFICIENT * seen["loss_aux"]
    return seen


def _places(ids: np.ndarray) -> np.ndarray:
    """(row, start tag, end tag) of every image, row by row."""
    return np.asarray([(r, c, c + P + 1) for r, c in np.argwhere(ids == START)], np.int32).reshape(-1, 3)


def _index(ids: np.ndarray) -> np.ndarray:
    """Which patch, counted over all images, a position takes; -1 for none."""
    index = np.full(ids.shape, -1)
    for n, (r, first, end) in enumerate(_places(ids)):
        index[r, first + 1 : end] = n * P + np.arange(P)
    return index


def _aux(picks, probs, valid, extended: bool):
    loads = [((n * valid[:, None]).sum(0) / valid.sum(), (p * valid[:, None]).sum(0) / valid.sum())
             for n, p in zip(picks, probs, strict=True)]  # fmt: skip
    if extended:
        return sum(((n * p).sum() for n, p in loads), 0.0) * (E + 1) / Z
    shares: Any = sum(share for share, _ in loads)
    means: Any = sum(mean for _, mean in loads)
    return (shares / Z * means / Z).sum() * E


def _mixture(t: Tensors, at: str, x, xp: Any):
    """(output, logits, picks, weights, calibrated probabilities of the picks) of [T, D]."""
    logits, experts, own = x @ t[at + "gate.weight"].T, E, None
    if at + "gate_vision.weight" in t:
        logits, experts = xp.concatenate([logits, x @ t[at + "gate_vision.weight"].T], -1), E + 1
    p = _softmax(logits)
    ids = xp.argsort(-p, axis=-1)[:, :TOP]
    if experts > E:
        inner = _gelu(p @ t[at + "weight_scale.weight_scale.0.weight"].T, xp)
        p = p + inner @ t[at + "weight_scale.weight_scale.2.weight"].T
        own = xp.take_along_axis(p, ids, -1)
    weights = xp.take_along_axis(p, ids, -1)
    weights = weights / weights.sum(-1, keepdims=True)
    w1, w2, w3 = (xp.stack([t[at + f"experts.{e}.{w}.weight"] for e in range(experts)]) for w in ("w1", "w2", "w3"))
    up = xp.einsum("td,efd->tef", x, w1)
    y = xp.einsum("tef,edf->ted", up / (1 + xp.exp(-up)) * xp.einsum("td,efd->tef", x, w3), w2)
    share = ((ids[..., None] == xp.arange(experts)) * weights[..., None]).sum(1)
    return xp.einsum("ted,te->td", y, share), logits, ids, weights, own


def _attention(t: Tensors, at: str, x, visible, xp: Any):
    rows, length, _ = x.shape
    q, k, v = (x @ t[at + f"self_attn.{n}_proj.weight"].T for n in ("q", "k", "v"))
    angles = np.arange(length)[:, None] * THETA ** -(np.arange(0, H, 2) / H)[None]
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[None, :, None] for f in (np.cos, np.sin))

    def turned(a):
        return a * cos + xp.concatenate([-a[..., H // 2 :], a[..., : H // 2]], -1) * sin

    q, k = turned(q.reshape(rows, length, N, H)), turned(k.reshape(rows, length, K, H))
    k, v = (xp.repeat(a.reshape(rows, length, K, H), N // K, axis=2) for a in (k, v))
    scores = xp.einsum("blnh,bsnh->bnls", q, k) / H**0.5
    weights = _softmax(xp.where(visible[:, None], scores, -1e30))  # what sees nothing sees all, as in eager mode
    return xp.einsum("bnls,bsnh->blnh", weights, v).reshape(rows, length, N * H) @ t[at + "self_attn.o_proj.weight"].T


def _tower(t: Tensors, images: np.ndarray, xp: Any = np) -> list[Any]:
    """Hidden states of CLIP's tower, [images, 1 + P, C] each."""
    t = {n.partition("vision_model.")[2]: xp.asarray(a, xp.float64) for n, a in t.items() if "vision_model." in n}
    side = IMAGE // PATCH
    patches = xp.asarray(images, xp.float64).reshape(-1, 3, side, PATCH, side, PATCH)
    x = xp.einsum("ncyhxw,ochw->nyxo", patches, t["embeddings.patch_embedding.weight"]).reshape(-1, P, C)
    first = xp.broadcast_to(t["embeddings.class_embedding"], (len(x), 1, C))
    x = xp.concatenate([first, x], 1) + t["embeddings.position_embedding.weight"]
    states = [_layer_norm(x, t, "pre_layrnorm")]
    for u in range(U):
        at, x = f"encoder.layers.{u}.", states[-1]
        y = _layer_norm(x, t, at + "layer_norm1")
        q, k, v = (_affine(y, t, at + f"self_attn.{n}_proj").reshape(*y.shape[:2], HEADS, -1) for n in "qkv")
        weights = _softmax(xp.einsum("nqhd,nkhd->nhqk", q, k) / (C // HEADS) ** 0.5)
        x = x + _affine(xp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape), t, at + "self_attn.out_proj")
        h = _affine(_layer_norm(x, t, at + "layer_norm2"), t, at + "mlp.fc1")
        states.append(x + _affine(h / (1 + xp.exp(-1.702 * h)), t, at + "mlp.fc2"))
    return states


def _tower_file(t: Tensors, images: np.ndarray) -> dict[str, Any]:
    states = _tower(t, images)
    post = {n.partition("vision_model.")[2]: np.asarray(a, np.float64) for n, a in t.items() if "post_layernorm" in n}
    arrays = {f"hidden_states/{u}": state for u, state in enumerate(states)}
    arrays |= {"pixel_values": images, "patch_m1": states[-1][:, 1:], "patch_m3": states[-3][:, 1:]}
    return arrays | {"pooler_output": _layer_norm(states[-1][:, 0], post, "post_layernorm")}


def _stage(t: Tensors, trained: tuple[str, ...], batches, pixels) -> dict[str, Any]:
    names = [name for name in t if any(part in name for part in trained)]
    frozen = {name: array for name, array in t.items() if name not in names}
    now = {name: jnp.asarray(t[name], jnp.float64) for name in names}
    first, second = ({name: jnp.zeros(array.shape) for name, array in now.items()} for _ in range(2))
    arrays: dict[str, Any] = {}
    steps = []

    def total(trained, frozen, batch, images):
        seen = forward({**frozen, **trained}, batch, images, xp=jnp)
        return seen["loss_total"], (seen["loss_ce"], seen["loss_aux"])

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
    most = max(len(images) for images in pixels.values())
    for n in range(3):
        batch, images = batches[f"train{n}"], pixels[f"train{n}"]
        images = np.pad(images, ((0, most - len(images)), (0, 0), (0, 0), (0, 0)))  # one compiled program for all
        batch = {**batch, "index": _index(batch["input_ids"])}
        (loss, (ce, aux)), g = gradient(now, frozen, batch, images)
        norm = jnp.sqrt(sum((a**2).sum() for a in g.values()))
        steps.append([float(a) for a in (loss, ce, aux, norm)])
        if n == 0:
            arrays |= {f"grad/{name}": array for name, array in g.items()}
        g = {name: array * min(1.0, CLIP / max(float(norm), 1e-12)) for name, array in g.items()}
        first = {name: 0.9 * first[name] + 0.1 * a for name, a in g.items()}
        second = {name: 0.999 * second[name] + 0.001 * a**2 for name, a in g.items()}
        for name in names:
            m, v = first[name] / (1 - 0.9 ** (n + 1)), second[name] / (1 - 0.999 ** (n + 1))
            now[name] = now[name] - LR * m / (jnp.sqrt(v) + 1e-8)
        if n != 1:
            arrays |= {f"param{n + 1}/{name}": array for name, array in now.items()}
    return arrays | {"steps": np.asarray(steps)}


def _selection(models: dict[str, Tensors], sequences, images) -> dict[str, Any]:
    arrays: dict[str, Any] = {"input_ids": sequences["input_ids"], "lengths": sequences["lengths"]}
    index = sequences["index"]
    counts = {
        (mode, when): np.zeros((Z, E), np.int64) for mode in ("ascending", "top2") for when in ("before", "after")
    }
    mask = np.arange(sequences["input_ids"].shape[1]) < sequences["lengths"][:, None]
    ids = np.where(mask, sequences["input_ids"], 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    for model, when in (("vision", "before"), ("vision_gate", "after")):
        seen = forward(models[model], batch, images[index[index >= 0]])
        for z in range(Z):
            order = np.argsort(np.asarray(seen[f"router_logits/{z}"]), axis=-1)[mask.reshape(-1)]
            for mode, some in (("ascending", order[:, :TOP]), ("top2", order[:, -TOP:])):
                counts[mode, when][z] += np.bincount(some.reshape(-1), minlength=E)
    for mode in ("ascending", "top2"):
        before, after = (counts[mode, when] for when in ("before", "after"))
        shares = [n / n.sum(1, keepdims=True) for n in (before, after)]
        std = np.std(shares[0] - shares[1], axis=1, ddof=1)
        layers = np.argsort(-std)[: Z // 2]
        arrays |= {
            f"{mode}/counts_before": before, f"{mode}/counts_after": after, f"{mode}/std": std,
            f"{mode}/dist_before": shares[0], f"{mode}/dist_after": shares[1],
            f"{mode}/selected_layers": layers, f"{mode}/expert_idxmax": shares[1].argmax(1)[layers],
            f"{mode}/expert_idxmax_all_layers": shares[1].argmax(1),
        }  # fmt: skip
    return arrays


def _norm(x, scale):
    return x * ((x**2).mean(-1, keepdims=True) + EPS) ** -0.5 * scale


def _layer_norm(x, t: Tensors, name: str):
    centred = x - x.mean(-1, keepdims=True)
    return centred * ((centred**2).mean(-1, keepdims=True) + EPS) ** -0.5 * t[name + ".weight"] + t[name + ".bias"]


def _affine(x, t: Tensors, name: str):
    return x @ t[name + ".weight"].T + t[name + ".bias"]


def _gelu(x, xp: Any):
    erf = np.vectorize(math.erf) if xp is np else jax.scipy.special.erf
    return x * (1 + erf(x / 2**0.5)) / 2


def _softmax(x):
    e = np.e ** (x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _save(path: Path, arrays: dict[str, Any]) -> Path:
    host: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(path, **{n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in host.items()})
    return path
