"""What a Mixtral's routers do in PyTorch, as files that `moextend routing compare` and `moextend compare` read.

    python dump_torch_routing.py CHECKPOINT --ids IDS.npz --out STATS.npz [--forward FOLDER]

In: a Hugging Face Mixtral folder, or one in the released MoExtend layout (text half), and an npz file with `input_ids`
and `attention_mask` [rows, length]. Out: statistics of routing (the arrays are described in routing/stats.py of
moextend_jax), and with --forward a folder with batches.npz and forward_torch.npz: logits, losses, hidden states and
every router's logits and picks. Needs torch, transformers 5, safetensors and numpy; nothing else of this repository.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

FEW = 100_000
"""Up to so many tokens, every token's picks are written too."""


class ExtendedRouter(MixtralTopKRouter):
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


def load(folder: Path) -> MixtralForCausalLM:
    if not (folder / "config.json").is_file():  # transformers would make the largest Mixtral up, with random weights
        raise SystemExit(f"{folder} holds no config.json; moextend export makes such a folder of an imported one")
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt")
        files |= dict.fromkeys(file.keys(), file)
    if not any("gate_vision" in name or name.startswith("model.visual.") for name in files):
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        model, report = MixtralForCausalLM.from_pretrained(folder, **options)
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
    config = MixtralConfig(**attributes, num_local_experts=experts, attn_implementation="eager")
    model = MixtralForCausalLM(config).float()
    for layer in layers:
        more = MixtralConfig(**attributes, num_local_experts=experts + new[0][0])
        more._experts_implementation = config._experts_implementation
        model.model.layers[layer].mlp.experts = MixtralExperts(more)
        model.model.layers[layer].mlp.gate = ExtendedRouter(config, new[0][0], new[1][0])

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


@torch.no_grad()
def run(model, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """A forward pass and what hooks see: per layer (logits [T, O], weights, picks [T, k]), MoE in and out."""
    seen = {"router": [], "moe": [], "calibrated": []}
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.mlp.gate.register_forward_hook(lambda gate, _, out: seen["router"].append(out)))
        hooks.append(layer.mlp.register_forward_hook(lambda _, args, out: seen["moe"].append((args[0], out))))
    wanted = {"output_hidden_states": True, "output_router_logits": False, "use_cache": False}
    out = model(input_ids=ids, attention_mask=mask, **wanted)
    for hook in hooks:
        hook.remove()
    seen["calibrated"] = [getattr(layer.mlp.gate, "calibrated", None) for layer in model.model.layers]
    return seen | {"logits": out.logits, "hidden": out.hidden_states}


def statistics(model, ids: np.ndarray, mask: np.ndarray, *, batch_size: int, per_token: bool | None) -> dict:
    """The arrays of a file of routing statistics; all tokens are text."""
    top_k, kept, sums = model.config.num_experts_per_tok, [], None
    for first in range(0, len(ids), batch_size):
        some = slice(first, first + batch_size)
        real = torch.tensor(mask[some]).reshape(-1) > 0
        layers = []
        for logits, _, picks in run(model, torch.tensor(ids[some]), torch.tensor(mask[some]))["router"]:
            logits, picks = logits.float()[real], picks[real]
            logp = logits.log_softmax(-1)
            most = logits.topk(min(top_k + 1, logits.shape[-1])).values
            gaps = most[:, top_k - 1] - most[:, -1] if logits.shape[-1] > top_k else torch.full_like(most[:, 0], 1e9)
            count = [F.one_hot(which, logits.shape[-1]).sum((0, 1))
                     for which in (picks, logits.topk(top_k, largest=False).indices)]  # fmt: skip
            entropy = -(logp.exp() * logp).double().sum()
            layers.append((*count, logp.exp().double().sum(0), entropy, picks, gaps))
        kept.append([(picks.numpy(), gaps.numpy()) for *_, picks, gaps in layers])
        totals = [[part.numpy() for part in layer[:4]] for layer in layers]
        sums = totals if sums is None else [[a + b for a, b in zip(x, y, strict=True)]
                                            for x, y in zip(sums, totals, strict=True)]  # fmt: skip
    if faulty := [z for z, layer in enumerate(sums) if not np.isfinite([*layer[2], layer[3]]).all()]:
        raise SystemExit(
            f"router logits are NaN or infinite in layers {faulty}: what such a router picks means nothing"
        )
    tokens, outputs = int(mask.sum()), np.array([len(layer[0]) for layer in sums])
    wide = [[np.pad(part, (0, outputs.max() - len(part))) for part in layer[:3]] for layer in sums]
    picks, least, probs = (np.stack(parts) for parts in zip(*wide, strict=True))
    places = np.stack([ids[mask > 0], np.nonzero(mask)[1]], axis=1).astype("<i4")
    extended = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp.gate, ExtendedRouter)]
    arrays = {
        "format": np.array("moextend-routing/1"), "source": np.array("torch"), "outputs": outputs,
        "experts": np.int64(outputs.max() - (len(extended[0].gate_vision) if extended else 0)),
        "top_k": np.int64(top_k), "inputs": np.array(hashlib.sha256(places.tobytes()).hexdigest()),
        "tokens/text": np.int64(tokens), "picks/text": picks, "least/text": least, "probs/text": probs / tokens,
        "entropy/text": np.array([layer[3] for layer in sums]) / tokens,
    }  # fmt: skip
    arrays |= {name.replace("text", "image"): np.zeros_like(array) for name, array in arrays.items() if "text" in name}
    if per_token or (per_token is None and tokens <= FEW):
        columns = [[np.concatenate(parts) for parts in zip(*layer, strict=True)] for layer in zip(*kept, strict=True)]
        arrays["ids"] = np.stack([picks for picks, _ in columns]).astype(np.int8 if outputs.max() < 128 else np.int16)
        arrays |= {"gaps": np.stack([gaps for _, gaps in columns]), "image": np.zeros(tokens, bool)}
    return arrays


def forward(model, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, *, coefficient: float) -> dict:
    """The arrays of a reference file of batch "text"."""
    seen = run(model, torch.tensor(ids), torch.tensor(mask))
    logits, valid = seen["logits"].float(), torch.tensor(mask).reshape(-1) > 0
    targets = torch.tensor(labels)[:, 1:].reshape(-1).long()
    ce = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets, ignore_index=-100)
    arrays = {"logits": logits} | {f"hidden_states/{i}": state for i, state in enumerate(seen["hidden"])}
    loads = []
    for z, (router, weights, picks) in enumerate(seen["router"]):
        probs = router.float().softmax(-1)
        arrays |= {f"router_logits/{z}": router, f"topk_idx/{z}": picks.int(), f"topk_weight/{z}": weights,
                   f"topk_prob/{z}": probs.gather(-1, picks), f"moe_in/{z}": seen["moe"][z][0],
                   f"moe_out/{z}": seen["moe"][z][1]}  # fmt: skip
        if seen["calibrated"][z] is not None:
            arrays[f"topk_calibrated/{z}"] = seen["calibrated"][z]
        share = F.one_hot(picks, router.shape[-1]).sum(1).float()[valid].mean(0)
        loads.append((share, probs[valid].mean(0)))
    outputs = max(len(share) for share, _ in loads)
    if any(calibrated is not None for calibrated in seen["calibrated"]):  # the released code's form
        aux = sum((share * prob).sum() for share, prob in loads) * outputs / len(loads)
    else:  # transformers pools the tokens of all layers
        share, prob = (torch.stack(parts).mean(0) for parts in zip(*loads, strict=True))
        aux = (share * prob).sum() * outputs
    arrays |= {"loss_ce": ce, "loss_aux": aux, "loss_total": ce + coefficient * aux}
    return {f"text/{name}": array.detach().numpy() for name, array in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="npz file with input_ids and attention_mask")
    parser.add_argument("--out", type=Path, required=True, help="file of statistics to write")
    parser.add_argument("--forward", type=Path, help="folder for a reference of the forward pass (all rows at once)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--per_token", action=argparse.BooleanOptionalAction, help="write every token's picks")
    options = parser.parse_args()
    file = np.load(options.ids, allow_pickle=False)
    ids = file["input_ids"].astype(np.int64)
    mask = (file["attention_mask"] != 0).astype(np.int64) if "attention_mask" in file else np.ones_like(ids)
    ids = np.where(mask > 0, ids, 0)
    model = load(options.checkpoint)
    if not 0 <= ids.min() <= ids.max() < model.config.vocab_size:
        raise SystemExit(f"{options.ids}: ids from {ids.min()} to {ids.max()}, the vocabulary has "
                         f"{model.config.vocab_size}")  # fmt: skip
    arrays = statistics(model, ids, mask, batch_size=options.batch_size, per_token=options.per_token)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as out:
        np.savez_compressed(out, **arrays)
    if options.forward:
        labels = file["labels"] if "labels" in file else np.where(mask > 0, ids, -100)
        coefficient = getattr(model.config, "router_aux_loss_coef", None)
        coefficient = 0.001 if coefficient is None or math.isnan(coefficient) else coefficient
        options.forward.mkdir(parents=True, exist_ok=True)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batch = {f"text/{name}": array.astype(np.int32) for name, array in batch.items()}
        np.savez_compressed(options.forward / "batches.npz", **batch)
        (options.forward / "manifest.json").write_text(json.dumps({"spec": {"coef": coefficient}}))
        reference = forward(model, ids, mask, labels, coefficient=coefficient)
        np.savez_compressed(options.forward / "forward_torch.npz", **reference)
    print(f"{options.out}: {int(mask.sum())} tokens")


if __name__ == "__main__":
    main()
