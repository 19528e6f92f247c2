"""One training step of a stage in PyTorch per line of stdin: the counterpart of jax_step.py (see turns.py).

The decoder is transformers' own MixtralForCausalLM with random weights; what it lacks (projector, splice of image
features, new expert, new router column, calibrator) is built in plain torch around transformers' classes. Each stage
trains what its row of the stage table trains.

    pip install torch==2.13.0        # or the package's `torch` extra
    python benchmarks/torch_step.py align
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from turns import serve

STAGES = ("align", "extend", "finetune")
BATCH, LENGTH, PATCHES, VISION_WIDTH = 4, 512, 64, 256
VOCAB, LAYERS, EXPERTS, TOP_K, NEW_EXPERTS, CALIBRATOR_WIDTH = 32203, 8, 8, 2, 1, 16
EXTENDED = (1, 3, 5, 7)
"""Layers that get a new expert. Below the lowest of them no gradient is needed in finetune."""
LEARNING_RATE = {"align": 1e-3, "extend": 1e-3, "finetune": 2e-5}
AUX_COEFFICIENT = 0.001
CLIP = 1.0


class ExtendedGate(nn.Module):
    """Transformers' router plus new columns and a calibrator; returns what MixtralTopKRouter returns."""

    def __init__(self, gate: nn.Module, *, sources: list[int]):
        super().__init__()
        outputs = EXPERTS + len(sources)
        self.gate = gate
        self.new_weight = nn.Parameter(gate.weight.detach()[sources].clone())
        self.calibrator_in = nn.Parameter(torch.randn(CALIBRATOR_WIDTH, outputs))
        self.calibrator_out = nn.Parameter(torch.zeros(outputs, CALIBRATOR_WIDTH))

    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        logits = torch.cat([F.linear(x, self.gate.weight), F.linear(x, self.new_weight)], dim=-1)
        probs = logits.float().softmax(-1)
        picks = probs.topk(TOP_K, dim=-1).indices
        calibrated = probs + F.linear(F.gelu(F.linear(probs, self.calibrator_in)), self.calibrator_out)
        weights = calibrated.gather(1, picks)
        return logits, weights / weights.sum(-1, keepdim=True), picks


class ExtendedExperts(nn.Module):
    """Transformers' experts, frozen, plus new ones that run on the rows which picked them."""

    def __init__(self, experts: nn.Module, *, sources: list[int]):
        super().__init__()
        # Transformers' code then skips picks past its own experts, in each of its implementations.
        experts._is_expert_parallel = True
        self.experts = experts
        self.new_gate_up = nn.Parameter(experts.gate_up_proj.detach()[sources].clone())
        self.new_down = nn.Parameter(experts.down_proj.detach()[sources].clone())

    def forward(self, x, picks, weights):
        y = self.experts(x, picks.clamp(max=EXPERTS), weights)
        for i in range(len(self.new_down)):
            token, slot = torch.where(picks == EXPERTS + i)
            gate, up = F.linear(x[token], self.new_gate_up[i]).chunk(2, dim=-1)
            row = F.linear(F.silu(gate) * up, self.new_down[i])
            y = y.index_add(0, token, row * weights[token, slot, None])
        return y


class Model(nn.Module):
    """Projector, splice and decoder; forward gives cross-entropy plus the load-balancing loss."""

    def __init__(self, *, stage: str, experts: str):
        super().__init__()
        config = MixtralConfig(
            vocab_size=VOCAB, hidden_size=256, intermediate_size=896, num_hidden_layers=LAYERS,
            num_attention_heads=8, num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
            max_position_embeddings=LENGTH, use_cache=False,
        )  # fmt: skip
        self.decoder = MixtralForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
        )
        width = config.hidden_size
        self.projector = nn.Sequential(nn.Linear(VISION_WIDTH, width), nn.GELU(), nn.Linear(width, width))
        self.requires_grad_(False)
        blocks = [layer.mlp for layer in self.decoder.model.layers]
        if stage == "align":
            self.projector.requires_grad_(True)
        elif stage == "extend":
            for block in blocks:
                block.gate.requires_grad_(True)
        else:
            for i in EXTENDED:
                sources = list(range(NEW_EXPERTS))
                blocks[i].gate = ExtendedGate(blocks[i].gate, sources=sources)
                blocks[i].experts = ExtendedExperts(blocks[i].experts, sources=sources)
        self.router_logits: list[torch.Tensor] = []
        for block in blocks:
            block.gate.register_forward_hook(lambda _module, _args, out: self.router_logits.append(out[0]))

    def forward(self, ids, labels, is_patch, features):
        embedded = self.decoder.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter(is_patch[..., None], self.projector(features))
        self.router_logits.clear()
        loss = self.decoder(inputs_embeds=embedded, labels=labels).loss
        return loss + AUX_COEFFICIENT * torch.stack([balance(logits) for logits in self.router_logits]).mean()


def balance(logits: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of one layer with its own number of experts (8 or 9)."""
    probs = logits.float().softmax(-1)
    share = F.one_hot(probs.topk(TOP_K, dim=-1).indices, logits.shape[-1]).float().mean(0).sum(0)
    return logits.shape[-1] * (share * probs.mean(0)).sum()


def batch() -> tuple[torch.Tensor, ...]:
    """One image per row: a start tag, its patches, an end tag, then text; patches and tags are not predicted."""
    ids = torch.randint(3, 32000, (BATCH, LENGTH))
    is_patch = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    is_patch[:, 2 : 2 + PATCHES] = True
    labels = ids.clone()
    labels[:, : 3 + PATCHES] = -100
    return ids, labels, is_patch, torch.randn(BATCH, PATCHES, VISION_WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--experts", choices=("eager", "grouped_mm", "batched_mm"), default="grouped_mm")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Model(stage=args.stage, experts=args.experts).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE[args.stage], weight_decay=0.0, fused=True)
    data = batch()

    def step() -> float:
        loss = model(*data)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    serve(step, {"tokens": BATCH * LENGTH, "torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
