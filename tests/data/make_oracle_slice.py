"""Makes oracle_slice.npz: the small part of ../shared/oracle with which a stranger's checkout tests parity.

    PYTHONPATH=. python tests/data/make_oracle_slice.py

In: selection.npz, batches.npz and forward_*.npz of the oracle, and one router of its model `moextend_pert`. Out:
`selection/*`, `router/*` (layer 1: inputs, weights, outputs) and `aux/*` (router logits of all layers and the losses).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
ORACLE = HERE.parents[2] / "shared" / "oracle"


def main() -> None:
    kept: dict[str, np.ndarray] = {}
    selection = np.load(ORACLE / "selection.npz")
    for mode in ("ascending", "top2"):
        for name in ("counts_before", "counts_after", "std", "selected_layers", "expert_idxmax"):
            kept[f"selection/{mode}/{name}"] = selection[f"{mode}/{name}"]

    forward = np.load(ORACLE / "forward_moextend_pert.npz")
    weights = load_file(ORACLE / "moextend_pert" / "model.safetensors")
    block = "model.layers.1.block_sparse_moe."
    kept["router/gate_DE"] = weights[block + "gate.weight"].T
    kept["router/new_gate_DX"] = weights[block + "gate_vision.weight"].T
    kept["router/w_in_OA"] = weights[block + "weight_scale.weight_scale.0.weight"].T
    kept["router/w_out_AO"] = weights[block + "weight_scale.weight_scale.2.weight"].T
    kept["router/x_TD"] = forward["train0/moe_in/1"].reshape(-1, 32)
    for name in ("router_logits", "topk_idx", "topk_prob", "topk_calibrated", "topk_weight"):
        kept[f"router/{name}"] = forward[f"train0/{name}/1"]

    kept["aux/valid_T"] = np.load(ORACLE / "batches.npz")["train0/attention_mask"].reshape(-1)
    for model in ("vision", "moextend_pert"):
        forward = np.load(ORACLE / f"forward_{model}.npz")
        for layer in range(4):
            kept[f"aux/{model}/router_logits/{layer}"] = forward[f"train0/router_logits/{layer}"]
            kept[f"aux/{model}/topk_idx/{layer}"] = forward[f"train0/topk_idx/{layer}"].astype(np.int8)
        for name in ("loss_aux", "loss_aux_nomask"):
            kept[f"aux/{model}/{name}"] = forward[f"train0/{name}"]
    np.savez_compressed(HERE / "oracle_slice.npz", allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
