"""What the routers of a mixture of experts do in PyTorch, as files that `moextend routing compare` and `compare` read.

    python dump_torch_routing.py CHECKPOINT --ids IDS.npz --out STATS.npz [--forward FOLDER]

In: a folder of any mixture of experts whose routers transformers 5 calls *TopKRouter, one of `moextend export --layout
hf` (an extended model with --trust_remote_code), or one in the released MoExtend layout (text half); and an npz file
with `input_ids` and `attention_mask` [rows, length], and for a model that sees `pixel_values` [images, 3, height,
width], row by row, as `moextend routing collect --ids_out` writes them. Out: statistics of routing (docs/routing.md of
moextend_jax describes the arrays; its layers are those that have a router), and with --forward a folder with
batches.npz and forward_torch.npz: logits, losses, hidden states and every router's logits and picks, 0 at
padding. Needs torch, transformers 5, safetensors and numpy; nothing else of this repository.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (the types are checked where it is not installed, too)
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

FEW = 100_000
"""Up to so many tokens, every token's picks are written too."""
ROUTER = re.compile(r"Top[Kk]Router")
"""What transformers' classes of routers are called; each returns (logits, weights, picks)."""


class ExtendedTopKRouter(MixtralTopKRouter):
    """MoExtend's router: picks by softmax over old and new columns, weights from the calibrated probabilities."""

    def __init__(self, config, new_experts: int, calibrator_width: int):
        super().__init__(config)
        outputs = config.num_local_experts + new_experts
        self.gate_vision = torch.nn.Parameter(torch.empty(new_experts, config.hidden_size))
        self.w_in = torch.nn.Parameter(torch.empty(calibrator_width, outputs))
        self.w_out = torch.nn.Parameter(torch.empty(outputs, calibrator_width))

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = torch.cat([F.linear(hidden_states, self.weight), F.linear(hidden_states, self.gate_vision)], -1)
        probs = logits.float().softmax(-1)
        ids = probs.topk(self.top_k, dim=-1).indices
        probs = probs.to(hidden_states.dtype)
        probs = probs + F.linear(F.gelu(F.linear(probs, self.w_in)), self.w_out)
        self.calibrated = probs.gather(-1, ids)
        return logits, self.calibrated / self.calibrated.sum(-1, keepdim=True), ids


def load(folder: Path, *, trust_remote_code: bool = False):
    if not (folder / "config.json").is_file():  # transformers would make the largest Mixtral up, with random weights
        raise SystemExit(f"{folder} holds no config.json; moextend export makes such a folder of an imported one")
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt")
        files |= dict.fromkeys(file.keys(), file)
    if not any(".gate_vision." in name or name.startswith("model.visual.") for name in files):
        written = json.loads((folder / "config.json").read_text())
        if "auto_map" in written and not trust_remote_code:
            raise SystemExit(f"{folder} brings Python of its own, for its auto_map; --trust_remote_code runs that")
        trust = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(folder, **trust)
        sees = getattr(config, "image_token_id", None) is not None and "vision_config" in written
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        model, report = kind.from_pretrained(folder, **options, **trust)
        if bad := {kind: sorted(names) for kind, names in report.items() if names}:  # only a warning to transformers
            raise SystemExit(f"{folder} does not hold this model: {str(bad)[:400]}")
        return model.eval()
    attributes = json.loads((folder / "config.json").read_text())
    layers = attributes.pop("add_layer", None) or []
    block = "model.layers.{}.block_sparse_moe."
    new = [files[name].get_slice(name).get_shape() for layer in layers[:1]
           for name in (block.format(layer) + "gate_vision.weight",
                        block.format(layer) + "weight_scale.weight_scale.0.weight")]  # fmt: skip
    experts = attributes.pop("num_local_experts") - (new[0][0] if layers else 0)
    config = MixtralConfig(**attributes | {"num_local_experts": experts, "attn_implementation": "eager"})
    model: Any = MixtralForCausalLM(config).float()
    for layer in layers:
        more = MixtralConfig(**attributes, num_local_experts=experts + new[0][0])
        more._experts_implementation = config._experts_implementation
        model.model.layers[layer].mlp.experts = MixtralExperts(more)
        model.model.layers[layer].mlp.gate = ExtendedTopKRouter(config, new[0][0], new[1][0])

    def read(name):
        if name not in files:
            raise SystemExit(f"{folder} holds no {name}; a partial save becomes whole by moextend import and export")
        return files[name].get_tensor(name).float()

    renamed = {
        ".mlp.gate.gate_vision": ".block_sparse_moe.gate_vision.weight",
        ".mlp.gate.w_in": ".block_sparse_moe.weight_scale.weight_scale.0.weight",
        ".mlp.gate.w_out": ".block_sparse_moe.weight_scale.weight_scale.2.weight",
        ".mlp.gate.weight": ".block_sparse_moe.gate.weight",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before, fused, kind = name.partition(".mlp.experts.")
            if fused:  # transformers keeps all experts of a layer in two tensors
                parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
                for expert, weight in enumerate(parameter):
                    one = f"{before}.block_sparse_moe.experts.{expert}"
                    weight.copy_(torch.cat([read(f"{one}.{part}.weight") for part in parts]))
                continue
            for ours, theirs in renamed.items():
                name = name.replace(ours, theirs)
            tied = name == "lm_head.weight" and name not in files
            parameter.copy_(read("model.embed_tokens.weight" if tied else name))
    return model.eval()


def routers(model) -> dict:
    """Routers by name, in the order of their layers."""
    found = {name: part for name, part in model.named_modules() if ROUTER.search(type(part).__name__)}
    if not found:
        raise SystemExit(f"{type(model).__name__} has no router that transformers calls *TopKRouter")
    return found


def layers_of(model) -> list[int]:
    """The number of each router's layer: the first layers of some families have none."""
    numbers = [re.findall(r"(?:layers|h|blocks)\.(\d+)\.", name) for name in routers(model)]
    return [int(found[-1]) if found else z for z, found in enumerate(numbers)]


@torch.no_grad()
def run(model, inputs: dict) -> dict:
    """A forward pass and what hooks see: per router (logits [T, O], weights, picks [T, k]), MoE in and out."""
    seen = {"router": [], "moe": [], "calibrated": []}
    hooks = []
    for name, router in routers(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        hooks.append(router.register_forward_hook(
            lambda router, args, out: seen["router"].append(_sorted(router, args[0], out))))  # fmt: skip
        hooks.append(router.register_forward_hook(
            lambda router, *_: seen["calibrated"].append(getattr(router, "calibrated", None))))  # fmt: skip
        hooks.append(block.register_forward_hook(
            lambda _, args, out: seen["moe"].append((args[0], out[0] if isinstance(out, tuple) else out))))  # fmt: skip
    wanted = {"output_hidden_states": True, "use_cache": False}
    out = model(**inputs, **wanted)
    for hook in hooks:
        hook.remove()
    return seen | {"logits": out.logits, "hidden": out.hidden_states or ()}


def _sorted(router, hidden, out):
    """Picks most likely first, which some families leave unsorted; and logits also of the routers that give their
    softmax instead, as most do before transformers 5.6."""
    if not isinstance(out, tuple) or len(out) != 3 or out[2].is_floating_point():  # other orders, or logits alone
        raise SystemExit(f"{type(router).__name__} of transformers {transformers.__version__} does not give (logits, "
                         "weights, picks); in a newer transformers it does")  # fmt: skip
    logits, weights, picks = out
    logits = logits.reshape(-1, logits.shape[-1]).float()
    if (logits >= 0).all() and torch.allclose(logits.sum(-1), torch.ones(len(logits))):
        logits = F.linear(hidden.reshape(len(logits), -1), router.weight).float()
    order = logits.gather(-1, picks).sort(dim=-1, descending=True, stable=True).indices
    return logits, weights.gather(-1, order), picks.gather(-1, order)


def new_experts(model) -> int:
    """How many of an extended layer's experts are new, with all extensions; 0 for a model that has none."""
    gates = [router for router in routers(model).values() if isinstance(router, ExtendedTopKRouter)]
    if gates:
        return len(gates[0].gate_vision)
    if getattr(model.config, "add_layer", None):  # of earlier versions, which knew one extension
        return model.config.new_experts
    return sum(own["new_experts"] for own in getattr(model.config, "extensions", None) or ())


def columns_of(router, outputs: int, width: int) -> np.ndarray:
    """Which of `width` experts a layer has: all that its router has outputs for, but for those of extensions of other
    layers, whose columns modeling_moextend.py leaves free."""
    extensions = getattr(router, "of_block", [None])[0]
    has = np.arange(width) < outputs
    if hasattr(extensions, "outputs"):  # that of earlier versions knew one extension
        own = [int(number) for extension in extensions.values() for number in extension.ffn]
        has[extensions.old :] = False
        has[own] = True
    return has


def statistics(model, rows, *, batch_size: int, per_token: bool | None) -> dict:
    """The arrays of a file of routing statistics."""
    extensions = getattr(model.config, "extensions", None) or [{"start": getattr(model.config, "start", "")}]
    if any(own["start"] == "added" for own in extensions):
        raise SystemExit("an extension adds experts beside those that a token picks; statistics are of as many picks "
                         "of every token: take a model without it")  # fmt: skip
    sums, kept, top_k = [], [], 0
    for some in rows.batches(batch_size):
        real, image = (torch.tensor(part).reshape(-1) for part in (some.mask > 0, some.image))
        outputs = run(model, some.inputs())["router"]
        bad = [z for z, (logits, *_) in enumerate(outputs) if torch.isnan(logits[real]).any()
               or torch.isposinf(logits[real]).any()]  # fmt: skip
        if bad:
            raise SystemExit(
                f"router logits are NaN or infinite in layers {bad}: what such a router picks means nothing"
            )
        counted = [counts(logits[real], picks[real], image[real]) for logits, _, picks in outputs]
        top_k = outputs[0][2].shape[-1]
        kept.append([(part.pop("ids"), part.pop("gaps")) for part in counted])
        sums = [{name: part[name] + (before[name] if before else 0) for name in part}
                for part, before in zip(counted, sums or [None] * len(counted), strict=True)]  # fmt: skip
    widths = [len(layer["picks/text"]) for layer in sums]
    own = zip(routers(model).values(), widths, strict=True)
    has = np.stack([columns_of(router, outputs, max(widths)) for router, outputs in own])
    arrays = {
        "format": np.array("moextend-routing/1"), "source": np.array("torch"), "outputs": has.sum(1), "has": has,
        "experts": np.int64(max(widths) - new_experts(model)), "top_k": np.int64(top_k),
        "inputs": np.array(rows.digest()), "layers": np.array(layers_of(model)),
    }  # fmt: skip
    for name in sums[0]:
        parts = [np.pad(layer[name], (0, max(widths) - len(layer[name]))) if layer[name].ndim else layer[name]
                 for layer in sums]  # fmt: skip
        arrays[name] = np.stack(parts)
    real_BL = rows.mask > 0
    for kind, of_BL in (("text", real_BL & ~rows.image), ("image", rows.image)):
        tokens = int(of_BL.sum())
        arrays[f"tokens/{kind}"] = np.int64(tokens)
        for name in (f"probs/{kind}", f"entropy/{kind}"):
            arrays[name] = arrays[name] / max(1, tokens)
    if per_token or (per_token is None and real_BL.sum() <= FEW):
        ids, gaps = ([np.concatenate([batch[z][part] for batch in kept]) for z in range(len(sums))] for part in (0, 1))
        arrays["ids"] = np.stack(ids).astype(np.int8 if max(widths) < 128 else np.int16)
        arrays |= {"gaps": np.stack(gaps), "image": rows.image[real_BL]}
    return arrays


def counts(logits, picks, image) -> dict:
    """What is summed over the tokens of one layer, by kind of token; and each token's picks and gap."""
    top_k, outputs = picks.shape[-1], logits.shape[-1]
    logp = logits.log_softmax(-1)
    closed = torch.isneginf(logits)  # new experts, to a token that may not choose them
    least = logits.masked_fill(closed, torch.inf).topk(top_k, largest=False).indices
    entropy = -torch.where(closed, 0.0, logp.exp() * logp).double().sum(-1)
    most = logits.topk(min(top_k + 1, outputs)).values
    gaps = most[:, top_k - 1] - most[:, -1] if outputs > top_k else torch.full_like(most[:, 0], 1e9)
    sums = {}
    for kind, of in (("text", ~image), ("image", image)):
        sums |= {f"{name}/{kind}": F.one_hot(which[of], outputs).sum((0, 1)) for name, which in
                 (("picks", picks), ("least", least))}  # fmt: skip
        sums |= {f"probs/{kind}": logp[of].exp().double().sum(0), f"entropy/{kind}": entropy[of].sum()}
    return {name: part.numpy() for name, part in (sums | {"ids": picks, "gaps": gaps}).items()}


def forward(model, rows, labels: np.ndarray, *, coefficient: float) -> dict:
    """The arrays of a reference file of batch "text"; places of padding hold 0."""
    seen = run(model, rows.inputs())
    real = torch.tensor(rows.mask > 0)
    logits, valid = seen["logits"].float(), real.reshape(-1)
    targets = torch.tensor(labels)[:, 1:].reshape(-1).long()
    ce = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets, ignore_index=-100)

    def shown(array):
        where = real if array.shape[:2] == real.shape else valid
        return torch.where(where.reshape(*where.shape, *[1] * (array.ndim - where.ndim)), array, 0)

    arrays = {"logits": shown(logits)} | {f"hidden_states/{i}": shown(x) for i, x in enumerate(seen["hidden"])}
    loads = []
    for z, (part, (router, weights, picks)) in enumerate(zip(routers(model).values(), seen["router"], strict=True)):
        # DeepSeek-V3's and GLM-4.5's routers score by sigmoids; moextend compares these over their sum.
        scores = router.sigmoid() if hasattr(part, "e_score_correction_bias") else router.softmax(-1)
        probs = scores / scores.sum(-1, keepdim=True)
        parts = {"router_logits": router, "topk_idx": picks.int(), "topk_weight": weights,
                 "topk_prob": probs.gather(-1, picks), "moe_in": seen["moe"][z][0], "moe_out": seen["moe"][z][1],
                 "topk_calibrated": seen["calibrated"][z]}  # fmt: skip
        arrays |= {f"{name}/{layers_of(model)[z]}": shown(part) for name, part in parts.items() if part is not None}
        largest = router.topk(picks.shape[-1]).indices  # which transformers balances, whatever chooses
        share = F.one_hot(largest, router.shape[-1]).sum(1).float()[valid].mean(0)
        loads.append((share, probs[valid].mean(0)))
    outputs = max(len(share) for share, _ in loads)
    if new_experts(model):  # the released code's form
        aux = torch.stack([(share * prob).sum() for share, prob in loads]).sum() * outputs / len(loads)
    else:  # transformers pools the tokens of all layers
        share, prob = (torch.stack(parts).mean(0) for parts in zip(*loads, strict=True))
        aux = (share * prob).sum() * outputs
    arrays |= {"loss_ce": ce, "loss_aux": aux, "loss_total": ce + coefficient * aux}
    return {f"text/{name}": array.detach().numpy() for name, array in arrays.items()}


class Rows:
    """Token rows, cut to the longest; `image` says which are image tokens, `pixels` are their pictures, row by row."""

    def __init__(self, ids, mask, pixels=None, *, pad=None, each=0):
        self.ids, self.mask, self.pixels, self.pad, self.each = ids, mask, pixels, pad, each
        self.image = (ids == pad) & (mask > 0) if pixels is not None else np.zeros(ids.shape, bool)

    def batches(self, size: int):
        images = np.cumsum([0, *self.image.sum(1) // max(1, self.each)])
        for first in range(0, len(self.ids), size):
            last = min(first + size, len(self.ids))
            pixels = None if self.pixels is None else self.pixels[images[first] : images[last]]
            yield Rows(self.ids[first:last], self.mask[first:last], pixels, pad=self.pad, each=self.each)

    def inputs(self) -> dict:
        inputs = {"input_ids": torch.tensor(self.ids), "attention_mask": torch.tensor(self.mask)}
        return inputs | ({"pixel_values": torch.tensor(self.pixels)} if self.image.any() else {})

    def digest(self) -> str:
        places = np.stack([self.ids[self.mask > 0], np.nonzero(self.mask)[1]], axis=1).astype("<i4")
        return hashlib.sha256(places.tobytes()).hexdigest()


def read_ids(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file of ids."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; moextend routing collect --ids_out makes such a file")
    with np.load(path, allow_pickle=False) as stored:
        file = dict(stored)
    if "input_ids" not in file:
        raise SystemExit(f"{path} holds no input_ids, but {', '.join(sorted(file)) or 'nothing'}")
    mask = file.setdefault("attention_mask", np.ones_like(file["input_ids"]))
    if mask.ndim != 2 or mask.shape != file["input_ids"].shape or not mask.any():
        raise SystemExit(f"{path}: input_ids and attention_mask must be [rows, length] alike, with a token to count")
    return file


def rows_of(file: dict[str, np.ndarray], path: Path, model) -> tuple[Rows, np.ndarray]:
    """The rows of such a file, and their labels."""
    ids, mask = file["input_ids"].astype(np.int64), (file["attention_mask"] != 0).astype(np.int64)
    length = 1 + int(np.nonzero(mask.any(0))[0].max())
    ids, mask = np.where(mask > 0, ids, 0)[:, :length], mask[:, :length]
    labels = file["labels"][:, :length] if "labels" in file else np.where(mask > 0, ids, -100)
    vocabulary = model.config.get_text_config().vocab_size
    if not 0 <= ids.min() <= ids.max() < vocabulary:
        raise SystemExit(f"{path}: ids from {ids.min()} to {ids.max()}, the vocabulary has {vocabulary}")
    if "pixel_values" not in file:
        return Rows(ids, mask), labels
    pixels, pad = file["pixel_values"].astype(np.float32), getattr(model.config, "image_token_id", None)
    if pad is None:
        raise SystemExit(f"{path} holds pixel_values, but {type(model).__name__} sees no images")
    tokens = int(((ids == pad) & (mask > 0)).sum())
    if not len(pixels) or tokens % len(pixels):
        raise SystemExit(f"{path}: {tokens} image tokens (id {pad}) are not those of {len(pixels)} pictures")
    return Rows(ids, mask, pixels, pad=pad, each=tokens // len(pixels)), labels


@contextlib.contextmanager
def whole(path: Path):
    """A file that is there when all of it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_forward(model, folder: Path, rows: Rows, labels: np.ndarray) -> None:
    config = model.config.get_text_config()
    tokens, layers = rows.ids.size, len(routers(model))
    size = 4 * tokens * (config.vocab_size + config.hidden_size * (config.num_hidden_layers + 1 + 2 * layers))
    print(f"{folder}: rows of {rows.ids.shape[1]} tokens, {size / 1e9:.2f} GB before compression", flush=True)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    coefficient = 0.001 if coefficient is None or math.isnan(coefficient) else coefficient
    batch = {"input_ids": rows.ids, "labels": labels, "attention_mask": rows.mask}
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "batches.npz") as file:
        np.savez_compressed(file, **{f"text/{name}": array.astype(np.int32) for name, array in batch.items()})
    tags = getattr(model.config, "image_tags", None) or {}
    spec = {"coef": coefficient, "padding": "masked", "image_start_id": tags.get("start"),
            "weight_guard": getattr(model.config, "weight_guard", "none")}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"spec": spec}))
    arrays = forward(model, rows, labels, coefficient=coefficient)
    if rows.pixels is not None:
        arrays["text/pixel_values"] = rows.pixels
    with whole(folder / "forward_torch.npz") as file:
        np.savez_compressed(file, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="npz file with input_ids and attention_mask")
    parser.add_argument("--out", type=Path, required=True, help="file of statistics to write")
    parser.add_argument("--forward", type=Path, help="folder for a reference of the forward pass (all rows at once)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--per_token", action=argparse.BooleanOptionalAction, help="write every token's picks")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python files in the checkpoint")
    options = parser.parse_args()
    if options.out.resolve() == options.ids.resolve():
        raise SystemExit(f"--out and --ids are one file, {options.out}: the statistics would replace the ids")
    file = read_ids(options.ids)  # before a large model is
    model = load(options.checkpoint, trust_remote_code=options.trust_remote_code)
    rows, labels = rows_of(file, options.ids, model)
    arrays = statistics(model, rows, batch_size=options.batch_size, per_token=options.per_token)
    with whole(options.out) as file:
        np.savez_compressed(file, **arrays)
    if options.forward:
        write_forward(model, options.forward, rows, labels)
    print(f"{options.out}: {int(rows.mask.sum())} tokens, {int(rows.image.sum())} of them of images")


if __name__ == "__main__":
    main()
