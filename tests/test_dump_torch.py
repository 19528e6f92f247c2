"""tools/dump_torch_routing.py: what PyTorch's routers do, in files that our commands read and find equal to ours."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference_set
import tiny

from moextend_jax import cli
from moextend_jax.checkpoints import huggingface

TOOL = Path(__file__).parents[1] / "tools" / "dump_torch_routing.py"


def test_the_tool_can_be_copied_because_it_imports_nothing_of_ours():
    imported = [node for node in ast.walk(ast.parse(TOOL.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imported if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "." for node in imported if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert roots == {"numpy", "torch", "safetensors", "transformers"}


class Dump(NamedTuple):
    """A checkpoint, the options that open it here, and the folder of what the tool wrote of it."""

    checkpoint: Path
    options: list[str]
    folder: Path


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dump]:
    """What the tool makes of three layouts, and of a router that has become NaN, from random ids with padding and
    holes. In one process: importing torch takes longer than all the rest."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    folder = tmp_path_factory.mktemp("dumps")
    (folder / "derived").mkdir()
    derived = reference_set.Set(folder / "derived")
    vision = ["--vision", str(derived.folder / "clip")]
    checkpoints = {
        "huggingface": (mixtral(folder / "model", tiny.arrays(tiny.PLAIN)), []),
        "released": (derived.folder / "vision", vision),
        "released_extended": (derived.folder / "moextend_pert", vision),
        "nan": (mixtral(folder / "nan", with_nan()), []),
    }
    rng, mask = np.random.default_rng(0), np.ones((5, 12), np.int64)
    mask[1, 8:] = mask[2, 3:6] = mask[3, 5] = 0
    words, dumped = [], {}
    for name, (checkpoint, options) in checkpoints.items():
        dumped[name] = Dump(checkpoint, options, folder / f"{name}.dump")
        dumped[name].folder.mkdir()
        ids_BL = rng.integers(3, tiny.PLAIN.decoder.vocab_size, mask.shape)
        np.savez(dumped[name].folder / "ids.npz", input_ids=ids_BL, attention_mask=mask)
        at = {option: str(dumped[name].folder / file) for option, file in FILES.items()}
        words.append([str(checkpoint), *(word for pair in at.items() for word in pair), "--batch_size", "2"])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command_line = [sys.executable, "-c", LOOP, str(TOOL), json.dumps(words)]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "nan.dump" / "message").write_text(done.stdout.splitlines()[-1])
    return dumped


FILES = {"--ids": "ids.npz", "--out": "torch.npz", "--forward": "forward"}
LOOP = """
import json, runpy, sys
tool, lines = sys.argv[1], json.loads(sys.argv[2])
for words in lines:
    sys.argv = [tool, *words]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as error:
        if words is not lines[-1]:
            raise
        print(error)
"""


def mixtral(folder: Path, arrays: dict[str, Any]) -> Path:
    huggingface.write_parameters(folder, arrays, table="mixtral", config=tiny.PLAIN)
    huggingface.write_decoder_config(folder, tiny.PLAIN.decoder, dtype="float32")
    return folder


def with_nan() -> dict[str, Any]:
    gate_ZDE = np.array(tiny.arrays(tiny.PLAIN)["decoder/layers/moe/gate"])
    gate_ZDE[1, 0, 2] = np.nan
    return {**tiny.arrays(tiny.PLAIN), "decoder/layers/moe/gate": gate_ZDE}


def test_a_router_that_has_become_nan_is_named_and_nothing_is_written(dumps: dict[str, Dump]):
    assert "NaN or infinite in layers [1, 2]" in (dumps["nan"].folder / "message").read_text()
    assert not (dumps["nan"].folder / "torch.npz").exists()


@pytest.mark.parametrize("layout", ["huggingface", "released", "released_extended"])
def test_pytorch_and_we_route_alike(dumps: dict[str, Dump], layout: str, tmp_path: Path, capsys):
    checkpoint, options, folder = dumps[layout]
    opened = ["--checkpoint", str(checkpoint), *options]
    code = cli.call(["compare", *opened, "--reference", str(folder / "forward" / "forward_torch.npz"), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert code == 0, [row for row in record["rows"] if row["verdict"] == "differs"]
    assert {row["verdict"] for row in record["rows"]} == {"ok"}
    quantities = {row["quantity"].split("/")[0] for row in record["rows"]}
    assert {"logits", "hidden_states", "router_logits", "topk_idx", "moe_out", "loss_ce", "loss_aux"} <= quantities
    assert ("topk_calibrated" in quantities) == (layout == "released_extended")

    collect = ["collect", *opened, "--ids", str(folder / "ids.npz"), "--out", str(tmp_path / "jax.npz")]
    assert cli.call(["routing", *collect]) == 0
    capsys.readouterr()
    assert cli.call(["routing", "compare", str(tmp_path / "jax.npz"), str(folder / "torch.npz"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["top_k_agreement_missing"] is None and record["same_source_experts"]
    for row in record["layers"]:
        assert row["agreement"] == 1.0 and row["tied"] == 0
        assert row["tv_picks"] == row["shift"] == row["shift_least"] == 0
        assert row["tv_probs"] < 1e-6
