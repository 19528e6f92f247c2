"""tools/dump_torch_routing.py: what PyTorch's routers do, in files that our commands read and find equal to ours."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference_set
import test_export_families
import tiny
from tiny import few

from moextend_jax import cli
from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.config import with_vision
from moextend_jax.families import FAMILIES as FAMILIES_HERE
from moextend_jax.routing import stats as statistics

TOOL = Path(__file__).parents[1] / "tools" / "dump_torch_routing.py"


def test_the_tool_can_be_copied_because_it_imports_nothing_of_ours():
    imported = [node for node in ast.walk(ast.parse(TOOL.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imported if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "." for node in imported if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert roots == {"numpy", "torch", "safetensors", "transformers"}


def messages_of_tool(words: list[list[str]]) -> list[str]:
    """What each of these calls of the tool ends with, "" where it ends well: in one process, since importing torch
    takes longer than all the rest."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command_line = [sys.executable, "-c", LOOP, str(TOOL), json.dumps(words)]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Dump(NamedTuple):
    """A checkpoint, the options that open it here, and the folder of what the tool wrote of it."""

    checkpoint: Path
    options: list[str]
    folder: Path


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dump]:
    """What the tool makes of three layouts, and of a router that has become NaN, from random ids with padding and
    holes."""
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
        **{family: (other(folder / family, family), []) for family in OTHERS},
        **{chain: (folder / chain, []) for chain in (*CHAINS, "mixtral-starts")},
        "own_code": (folder / "own_code", []),
        "no_ids": (folder / "model", []),
        "not_ids": (folder / "nowhere", []),
    }
    for chain in (*CHAINS, "mixtral-starts"):
        test_export_families.export(chain, folder / chain)
    (folder / "own_code").mkdir()
    (folder / "own_code" / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    rng, mask = np.random.default_rng(0), np.ones((5, 12), np.int64)
    mask[1, 8:] = mask[2, 3:6] = mask[3, 5] = 0
    words, dumped = [], {}
    for name, (checkpoint, options) in checkpoints.items():
        dumped[name] = Dump(checkpoint, options, folder / f"{name}.dump")
        dumped[name].folder.mkdir()
        ids_BL = rng.integers(3, 58, mask.shape)  # behind these are tags of pictures
        if name != "no_ids":
            arrays: dict[str, Any] = {"ids" if name == "not_ids" else "input_ids": ids_BL, "attention_mask": mask}
            np.savez(dumped[name].folder / "ids.npz", **arrays)
        at = {option: str(dumped[name].folder / file) for option, file in FILES.items()}
        trust = [] if name == "own_code" else ["--trust_remote_code"]
        files = [word for pair in at.items() for word in pair]
        words.append([str(checkpoint), *files, "--batch_size", "2", *trust])
    for name, message in zip(dumped, messages_of_tool(words), strict=True):
        assert bool(message) == (name in ("nan", "own_code", "no_ids", "not_ids", "mixtral-starts")), message
        (dumped[name].folder / "message").write_text(message)
    return dumped


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 3, "head_dim": 8},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}  # fmt: skip
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3,
         "num_key_value_heads": 3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
MAKE = """
import json, runpy, sys
from pathlib import Path
import numpy as np, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
tool, root, families = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
file = np.load(root / "ids.npz")
inputs = {name: torch.tensor(file[name]) for name in ("input_ids", "attention_mask")}
def dump(folder, file):
    sys.argv = [tool, str(root / folder), "--ids", str(root / "ids.npz"), "--out", str(root / file),
                "--batch_size", "2"]
    runpy.run_path(tool, run_name="__main__")
for name, sizes in families.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), attn_implementation="eager").float()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.normal_(0, 0.3)
        model.save_pretrained(root / name)
        if name != "deepseek_v3":
            own = model.eval()(**inputs, output_router_logits=True).router_logits
            np.save(root / f"{name}.npy", torch.stack(own).reshape(len(own), -1, own[0].shape[-1]).numpy())
    dump(name, f"{name}.npz")
def probabilities(router, hidden):
    logits, *others = forward(router, hidden)
    return logits.softmax(-1), *others
forward, OlmoeTopKRouter.forward = OlmoeTopKRouter.forward, probabilities
dump("olmoe", "olmoe 5.5.npz")
OlmoeTopKRouter.forward = lambda router, hidden: forward(router, hidden)[0]
try:
    dump("olmoe", "none.npz")
except SystemExit as error:
    (root / "message").write_text(str(error))
"""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models of other families, dumped; and what transformers itself gives out of their routers."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    root, mask = tmp_path_factory.mktemp("families"), np.ones((3, 9), np.int64)
    mask[1, 6:] = 0
    np.savez(root / "ids.npz", input_ids=np.random.default_rng(0).integers(3, 61, mask.shape), attention_mask=mask)
    made = {name: {**SIZES, **sizes} for name, sizes in FAMILIES.items()}
    words = [sys.executable, "-c", MAKE, str(TOOL), str(root), json.dumps(made)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_any_mixture_whose_routers_transformers_calls_so_is_dumped(families: Path, name: str):
    stats, sizes = statistics.read_stats(families / f"{name}.npz"), FAMILIES[name]
    real = read_npz(families / "ids.npz")["attention_mask"].reshape(-1) > 0
    assert stats.tokens == {"text": int(real.sum()), "image": 0} and stats.top_k == sizes["num_experts_per_tok"]
    assert stats.per_token is not None and len(np.unique(stats.per_token.ids_ZTk)) == stats.experts
    layers = read_npz(families / f"{name}.npz")["layers"].tolist()
    assert layers == ([1, 2] if name == "deepseek_v3" else [0, 1, 2])
    if name == "deepseek_v3":  # whose picks are not those of the largest logits
        assert stats.experts == 8
        return
    own_ZTO = np.load(families / f"{name}.npy")[:, real]
    np.testing.assert_array_equal(stats.per_token.ids_ZTk, np.argsort(-own_ZTO, axis=-1)[..., : stats.top_k])
    probs_ZTO = np.exp(own_ZTO) / np.exp(own_ZTO).sum(-1, keepdims=True)
    np.testing.assert_allclose(stats.probs_ZO["text"], probs_ZTO.mean(1), atol=1e-6)
    np.testing.assert_allclose(stats.entropy_Z["text"], -(probs_ZTO * np.log(probs_ZTO)).sum(-1).mean(1), atol=1e-5)


@pytest.mark.slow
def test_routers_that_give_probabilities_for_logits_are_dumped_alike(families: Path):
    """As those of Mixtral, OLMoE, Qwen and others do before transformers 5.6."""
    now, before = (read_npz(families / f"{name}.npz") for name in ("olmoe", "olmoe 5.5"))
    for name, array in now.items():
        np.testing.assert_array_equal(before[name], array, err_msg=name)


@pytest.mark.slow
def test_a_router_of_an_older_transformers_that_gives_no_picks_is_named(families: Path):
    """As those of DeepSeek-V3 and GLM-4.5 were."""
    assert "OlmoeTopKRouter of transformers 5." in (families / "message").read_text()


PUBLISHED = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "olmoe", "qwen2_moe", "qwen3_moe",
             "qwen3_next")  # fmt: skip


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.npz of every family's published form."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    root, words = tmp_path_factory.mktemp("published"), []
    for name in PUBLISHED:
        batch = read_npz(shared / "families" / name / "batches.npz")
        ids: dict[str, Any] = {"input_ids": batch["text/input_ids"], "attention_mask": batch["text/attention_mask"]}
        np.savez(root / f"{name} ids.npz", **ids)
        files = ["--ids", str(root / f"{name} ids.npz"), "--out", str(root / f"{name}.npz")]
        words.append([str(shared / "families" / name), *files])
    assert not any(messages := messages_of_tool(words)), messages
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_of_other_families_are_dumped(shared: Path, published: Path, name: str):
    mask_BL = read_npz(published / f"{name} ids.npz")["attention_mask"]
    wanted = read_npz(shared / "families" / name / "forward.npz")
    stats = statistics.read_stats(published / f"{name}.npz")
    assert stats.per_token is not None
    for z, layer in enumerate(read_npz(published / f"{name}.npz")["layers"]):
        picks_Tk = wanted[f"text/topk_idx/{layer}"][mask_BL.reshape(-1) > 0]
        np.testing.assert_array_equal(np.sort(stats.per_token.ids_ZTk[z]), np.sort(picks_Tk))


FILES = {"--ids": "ids.npz", "--out": "torch.npz", "--forward": "forward"}
LOOP = """
import json, runpy, sys
tool, lines = sys.argv[1], json.loads(sys.argv[2])
messages = []
for words in lines:
    sys.argv = [tool, *words]
    try:
        runpy.run_path(tool, run_name="__main__")
        messages.append("")
    except SystemExit as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


def mixtral(folder: Path, arrays: dict[str, Any]) -> Path:
    huggingface.write_parameters(folder, arrays, table="mixtral", config=tiny.PLAIN)
    huggingface.write_decoder_config(folder, tiny.PLAIN.decoder, dtype="float32")
    return folder


def other(folder: Path, family: str) -> Path:
    fields: dict[str, Any] = {**FAMILIES_HERE[family].fields, **OTHERS[family]}
    decoder = dataclasses.replace(tiny.DECODER, family=family, experts=8, top_k=3, **fields)
    config = with_vision(dataclasses.replace(tiny.PLAIN, decoder=decoder), None)
    huggingface.write_parameters(folder, tiny.arrays(config), table=family, config=config)
    huggingface.write_decoder_config(folder, decoder, dtype="float32")
    return folder


OTHERS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"groups": 4, "top_groups": 2, "head_size": 8, "dense_hidden": 20, "shared_experts": 1},
    "ernie4_5_moe": {"dense_hidden": 20, "shared_experts": 1},
    "granitemoe": {"tied_head": True, "logits_divisor": 2.0},
    "qwen2_moe": {"shared_hidden": 20},
    "qwen3_moe": {"head_size": 8},
    "olmoe": {},
    "gpt_oss": {"head_size": 8, "local": (True, False, True), "local_window": 4},
}


CHAINS = ("mixtral-tasks", "glm4_moe-seen", "mixtral-seen-strict")
"""Models with several extensions of other layers; the last layer of the first lacks its first extension."""


def with_nan() -> dict[str, Any]:
    gate_ZDE = np.array(tiny.arrays(tiny.PLAIN)["decoder/layers/moe/gate"])
    gate_ZDE[1, 0, 2] = np.nan
    return {**tiny.arrays(tiny.PLAIN), "decoder/layers/moe/gate": gate_ZDE}


@pytest.mark.slow
def test_a_router_that_has_become_nan_is_named_and_nothing_is_written(dumps: dict[str, Dump]):
    assert "NaN or infinite in layers [1, 2]" in (dumps["nan"].folder / "message").read_text()
    assert not (dumps["nan"].folder / "torch.npz").exists()


@pytest.mark.slow
def test_what_the_tool_needs_besides_is_one_line(dumps: dict[str, Dump]):
    assert "--trust_remote_code runs" in (dumps["own_code"].folder / "message").read_text()
    assert "ids.npz does not exist; moextend" in (dumps["no_ids"].folder / "message").read_text()
    # Said before the model is looked for, since reading a large one takes minutes.
    assert "holds no input_ids, but attention_mask, ids" in (dumps["not_ids"].folder / "message").read_text()
    assert "an extension adds experts beside" in (dumps["mixtral-starts"].folder / "message").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("layout", few(["released_extended", "huggingface", "released", *OTHERS, *CHAINS]))
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
    # What is least likely is by what chooses here, by the logits there: another where a bias chooses.
    biased = [family for family, of in FAMILIES_HERE.items() if of.fields.get("selection_bias")]
    assert_alike(json.loads(capsys.readouterr().out), least=layout.split("-")[0] not in biased)
    ours, theirs = (statistics.read_stats(path) for path in (tmp_path / "jax.npz", folder / "torch.npz"))
    np.testing.assert_array_equal(ours.has_ZO, theirs.has_ZO)
    if layout == "mixtral-tasks":
        assert not ours.has_ZO[-1, 8] and ours.picks_ZO["text"][-1, 9:].all()


def assert_alike(record: dict[str, Any], *, least: bool = True) -> None:
    assert record["top_k_agreement_missing"] is None and record["same_source_experts"]
    for row in record["layers"]:
        assert row["agreement"] == 1.0 and row["tied"] == 0
        assert row["tv_picks"] == row["shift"] == 0 and (row["shift_least"] == 0 or not least)
        assert row["tv_probs"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe"])
def test_probabilities_are_of_the_logits_whatever_chooses(dumps: dict[str, Dump], family: str, tmp_path: Path, capsys):
    checkpoint, _, folder = dumps[family]
    files = [str(tmp_path / "jax.npz"), str(folder / "torch.npz")]
    words = ["collect", "--checkpoint", str(checkpoint), "--ids", str(folder / "ids.npz"), "--out", files[0]]
    assert cli.call(["routing", *words]) == 0
    capsys.readouterr()
    assert cli.call(["routing", "compare", *files, "--json"]) == 0
    # What is least likely is by what chooses here, by the logits there.
    assert_alike(json.loads(capsys.readouterr().out), least=False)
    ours, theirs = (statistics.read_stats(Path(file)) for file in files)
    np.testing.assert_allclose(ours.entropy_Z["text"], theirs.entropy_Z["text"], rtol=1e-5)
