"""tools/dump_torch_routing.py: what PyTorch's routers do, in files that our commands read and find equal to ours."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_set
import tiny

from moextend_jax.checkpoints import huggingface
from moextend_jax.compare import command
from moextend_jax.routing import command as routing_command

TOOL = Path(__file__).parents[1] / "tools" / "dump_torch_routing.py"


def test_the_tool_can_be_copied_because_it_imports_nothing_of_ours():
    imported = [node for node in ast.walk(ast.parse(TOOL.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imported if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "." for node in imported if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert roots == {"numpy", "torch", "safetensors", "transformers"}


def dump(checkpoint: Path, folder: Path, *, vocabulary: int) -> list[str]:
    """Runs the tool on random ids with padding and holes."""
    rng = np.random.default_rng(0)
    mask = np.ones((5, 12), np.int64)
    mask[1, 8:] = mask[2, 3:6] = mask[3, 5] = 0
    np.savez(folder / "ids.npz", input_ids=rng.integers(3, vocabulary, (5, 12)), attention_mask=mask)
    arguments = [str(checkpoint), "--ids", "ids.npz", "--out", "torch.npz", "--forward", "forward", "--batch_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ["--checkpoint", str(checkpoint), "--reference", str(folder / "forward" / "forward_torch.npz"), "--json"]


@pytest.mark.parametrize("layout", ["huggingface", "released", "released_extended"])
def test_pytorch_and_we_route_alike(layout: str, tmp_path: Path, capsys):
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    vision = []
    if layout == "huggingface":
        checkpoint, config = tmp_path / "model", tiny.PLAIN
        arrays = tiny.arrays(config)
        huggingface.write_parameters(checkpoint, arrays, table="mixtral", config=config)
        huggingface.write_decoder_config(checkpoint, config.decoder, dtype="float32")
        compared = dump(checkpoint, tmp_path, vocabulary=config.decoder.vocab_size)
    else:
        (tmp_path / "set").mkdir()
        derived = reference_set.Set(tmp_path / "set")
        checkpoint = derived.folder / ("moextend_pert" if layout == "released_extended" else "vision")
        vision = ["--vision", str(derived.folder / "clip")]
        compared = dump(checkpoint, tmp_path, vocabulary=reference_set.START)
    code = command.main([*compared, *vision])
    record = json.loads(capsys.readouterr().out)
    assert code == 0, [row for row in record["rows"] if row["verdict"] == "differs"]
    assert {row["verdict"] for row in record["rows"]} == {"ok"}
    quantities = {row["quantity"].split("/")[0] for row in record["rows"]}
    assert {"logits", "hidden_states", "router_logits", "topk_idx", "moe_out", "loss_ce", "loss_aux"} <= quantities
    assert ("topk_calibrated" in quantities) == (layout == "released_extended")

    collect = ["collect", "--checkpoint", str(checkpoint), *vision, "--ids", str(tmp_path / "ids.npz")]
    assert routing_command.main([*collect, "--out", str(tmp_path / "jax.npz")]) == 0
    capsys.readouterr()
    assert routing_command.main(["compare", str(tmp_path / "jax.npz"), str(tmp_path / "torch.npz"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["top_k_agreement_missing"] is None and record["same_source_experts"]
    for row in record["layers"]:
        assert row["agreement"] == 1.0 and row["tied"] == 0
        assert row["tv_picks"] == row["shift"] == row["shift_least"] == 0
        assert row["tv_probs"] < 1e-6
