"""Answers questions about images in PyTorch: the counterpart of `benchmarks/generate.py`, which runs it.

The decoder is transformers' MixtralForCausalLM with its own `generate` and cache, the tower its CLIPVisionModel; the
projector, the splice and the extension are those of torch_step.py. What helps PyTorch is done: questions of a length
together, each image through tower and projector once however many questions it has, the fastest of its expert
implementations and batch sizes.

In: a folder of `moextend export --layout released`, and a JSON file of prompts. Out: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch_step import EXPERTS, ExtendedExperts, ExtendedGate
from transformers import CLIPVisionConfig, CLIPVisionModel, MixtralConfig, MixtralForCausalLM

ROWS, IMPLEMENTATIONS, TRIAL = (32, 64, 128), ("grouped_mm", "eager"), 128


class Model(nn.Module):
    """The exported model; `forward` is not used."""

    def __init__(self, folder: Path, *, experts: str, feature_layer: int):
        super().__init__()
        about = json.loads((folder / "config.json").read_text())
        files = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        layers = about["add_layer"]
        config = MixtralConfig(
            vocab_size=about["vocab_size"], hidden_size=about["hidden_size"],
            intermediate_size=about["intermediate_size"], num_hidden_layers=about["num_hidden_layers"],
            num_attention_heads=about["num_attention_heads"], num_key_value_heads=about["num_key_value_heads"],
            head_dim=about["head_dim"], num_local_experts=EXPERTS, num_experts_per_tok=about["num_experts_per_tok"],
            rms_norm_eps=about["rms_norm_eps"], tie_word_embeddings=about["tie_word_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": about["rope_theta"]},
        )  # fmt: skip
        self.decoder = MixtralForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
        )
        own = self.decoder.state_dict()
        for name in own:
            prefix, _, last = name.partition(".mlp.")
            moe = f"{prefix}.block_sparse_moe"
            if not last:
                tied = "model.embed_tokens.weight" if name == "lm_head.weight" and name not in files else name
                own[name] = files[tied]
            elif last == "gate.weight":
                own[name] = files[f"{moe}.gate.weight"]
            else:
                own[name] = torch.stack([fused(files, f"{moe}.experts.{n}", last) for n in range(EXPERTS)])
        self.decoder.load_state_dict(own)
        for n in layers:
            block, moe = self.decoder.model.layers[n].mlp, f"model.layers.{n}.block_sparse_moe"
            block.gate, block.experts = (
                ExtendedGate(block.gate, sources=[0]),
                ExtendedExperts(block.experts, sources=[0]),
            )
            new = {
                "new_weight": files[f"{moe}.gate_vision.weight"],
                "calibrator_in": files[f"{moe}.weight_scale.weight_scale.0.weight"],
                "calibrator_out": files[f"{moe}.weight_scale.weight_scale.2.weight"],
            }
            block.gate.load_state_dict(new | {"gate.weight": files[f"{moe}.gate.weight"]})
            expert = f"{moe}.experts.{EXPERTS}"
            block.experts.new_gate_up.data = fused(files, expert, "experts.gate_up_proj")[None]
            block.experts.new_down.data = fused(files, expert, "experts.down_proj")[None]
        self.tower = CLIPVisionModel(CLIPVisionConfig(**about["vision_config"]))
        start = "model.visual.vision_tower."
        tower = {name.removeprefix(start): tensor for name, tensor in files.items() if name.startswith(start)}
        wanted = self.tower.state_dict()
        if "vision_model.post_layernorm.weight" not in wanted:
            tower = {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
        self.tower.load_state_dict(tower, strict=False)
        assert not wanted.keys() - tower.keys() - {"embeddings.position_ids", "vision_model.embeddings.position_ids"}
        width = about["hidden_size"]
        self.projector = nn.Sequential(
            nn.Linear(about["vision_config"]["hidden_size"], width), nn.GELU(), nn.Linear(width, width)
        )
        start = "model.visual.mm_projector."
        projector = {name.removeprefix(start): tensor for name, tensor in files.items() if name.startswith(start)}
        self.projector.load_state_dict(projector)
        self.feature_layer, self.size = feature_layer, about["vision_config"]["image_size"]

    def see(self, paths: list[str]) -> torch.Tensor:
        """Visual tokens of some square pictures."""
        facts = transformers.image_utils
        mean, std = np.array(facts.OPENAI_CLIP_MEAN, np.float32), np.array(facts.OPENAI_CLIP_STD, np.float32)
        pixels = []
        for path in paths:
            picture = Image.open(path).convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
            pixels.append((np.asarray(picture, np.float32) / np.float32(255) - mean) / std)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        states = self.tower(images, output_hidden_states=True).hidden_states
        return self.projector(states[self.feature_layer][:, 1:])


def fused(files: dict[str, torch.Tensor], expert: str, last: str) -> torch.Tensor:
    if last == "experts.gate_up_proj":
        return torch.cat([files[f"{expert}.w1.weight"], files[f"{expert}.w3.weight"]])
    assert last == "experts.down_proj"
    return files[f"{expert}.w2.weight"]


@torch.inference_mode()
def answer(model: Model, prompts: list[dict], *, rows: int, asked: dict) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]["ids"]), prompts[n]["image"]))
    seen: dict[str, torch.Tensor] = {}
    said: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), rows):
        some = [prompts[n] for n in order[first : first + rows]]
        new = [path for path in dict.fromkeys(prompt["image"] for prompt in some) if path not in seen]
        if new:
            seen |= zip(new, model.see(new), strict=True)
        longest = max(len(prompt["ids"]) for prompt in some)
        ids = torch.full((len(some), longest), asked["pad"])
        mask = torch.zeros(len(some), longest, dtype=torch.long)
        for row, prompt in enumerate(some):  # rows end together
            ids[row, longest - len(prompt["ids"]) :] = torch.tensor(prompt["ids"])
            mask[row, longest - len(prompt["ids"]) :] = 1
        embedded = model.decoder.get_input_embeddings()(ids)
        features = torch.stack([seen[prompt["image"]] for prompt in some])
        embedded = embedded.masked_scatter(((ids == asked["pad"]) & (mask > 0))[..., None], features)
        out = model.decoder.generate(
            inputs_embeds=embedded, attention_mask=mask, max_new_tokens=asked["max_new_tokens"], do_sample=False,
            eos_token_id=asked["eos"], pad_token_id=asked["eos"], suppress_tokens=asked["suppress"],
        )  # fmt: skip
        for n, row in zip(order[first : first + rows], out.tolist(), strict=True):
            said[n] = row[: row.index(asked["eos"])] if asked["eos"] in row else row
    return said


def timed(model: Model, prompts: list[dict], *, rows: int, asked: dict) -> tuple[float, float, list[list[int]]]:
    wall, cpu = time.perf_counter(), time.process_time()
    said = answer(model, prompts, rows=rows, asked=asked)
    return time.perf_counter() - wall, time.process_time() - cpu, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", choices=IMPLEMENTATIONS, help="default: the faster")
    parser.add_argument("--rows", type=int, help="default: the fastest of several")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asked = json.loads(args.prompts.read_text())
    prompts = asked.pop("prompts")
    trials = []
    for experts in (args.experts,) if args.experts else IMPLEMENTATIONS:
        model = Model(args.folder, experts=experts, feature_layer=asked["feature_layer"]).eval()
        for rows in (args.rows,) if args.rows else ROWS:
            answer(model, prompts[:rows], rows=rows, asked=asked)
            trials.append((timed(model, prompts[:TRIAL], rows=rows, asked=asked)[0], rows, experts, model))
    _, rows, experts, model = min(trials, key=lambda trial: trial[0])
    wall, cpu, said = timed(model, prompts, rows=rows, asked=asked)
    print(
        json.dumps(
            {
                "torch": torch.__version__, "transformers": transformers.__version__, "experts": experts, "rows": rows,
                "wall_seconds": wall, "cpu_seconds": cpu, "said": said,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
