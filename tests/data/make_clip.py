"""Writes clip.npz beside itself: a tiny CLIPVisionModel of `transformers` (random weights), two images, its outputs.

To rerun: pip install torch==2.13.0 transformers==5.23.0 numpy; python tests/data/make_clip.py
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def main() -> None:
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            # Fresh norms and biases are 1 and 0: shift them, so that a swapped or dropped one is seen.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
        pixels = torch.randn(2, 3, 12, 12)
        outputs = model(pixels, output_hidden_states=True)
    arrays = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    arrays = {"vision_model." + name.removeprefix("vision_model."): array for name, array in arrays.items()}
    arrays |= {f"hidden_states/{i}": state.numpy() for i, state in enumerate(outputs.hidden_states)}
    arrays |= {"pixel_values": pixels.numpy(), "pooler_output": outputs.pooler_output.numpy()}
    arrays["config"] = np.array(json.dumps(SIZES))
    np.savez_compressed(Path(__file__).with_name("clip.npz"), **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
