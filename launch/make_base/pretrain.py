"""Pretrains the embedded language model from scratch with the package's own "full_text" stage.

Run after text.py: `python launch/make_base/pretrain.py --text BUILD --out moextend_jax/assets/base --state BUILD/lm`.
It saves its whole state every 50 steps and goes on from there when run again. About 25 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.checkpoints.huggingface import write_decoder_config, write_parameters
from moextend_jax.config import RECIPES, DecoderConfig, ModelConfig
from moextend_jax.data.batches import text_batches
from moextend_jax.data.datasets import open_text
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import arrays_of
from moextend_jax.train import stages
from moextend_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from moextend_jax.train.step import TrainState, init_state, make_step

MODEL = ModelConfig(
    decoder=DecoderConfig(width=128, hidden=256, layers=8, heads=4, kv_heads=2, head_size=32, tied_head=True),
    dtype="float32",
    remat="none",
)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_share=0.05, b2=0.98)
BATCH, LENGTH, STEPS, SEED = 8, 512, 560, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder with {wordnet,kjv}.train.txt")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder with the tokenizer")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state of the run")
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)

    model = jax.jit(lambda: nnx.split(MoExtend(MODEL, rngs=nnx.Rngs(SEED))))
    model = nnx.merge(*model())
    trainable, frozen = stages.split(arrays_of(model), stages.patterns("full_text", recipe=RECIPES["paper"]))
    schedule = learning_rate(OPTIMIZER, steps=STEPS, recipe=RECIPES["paper"])
    optimizer = make_optimizer(OPTIMIZER, paths=trainable, schedule=schedule)
    step = make_step(
        model, optimizer=optimizer, schedule=schedule, recipe=RECIPES["paper"], aux_coefficient=0.01, loss_chunk=64
    )
    state = init_state(trainable, optimizer)

    tokenizer = load_tokenizer(arguments.out)
    passages = [line for name in ("wordnet", "kjv") for line in open_text(arguments.text / f"{name}.train.txt")]
    rows = iter(text_batches(passages, tokenizer=tokenizer, length=LENGTH, batch_size=BATCH, seed=SEED))
    saved = arguments.state / "state.pkl"
    if saved.exists():
        leaves, position = pickle.loads(saved.read_bytes())
        state = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in leaves])
        rows.set_state(position)

    started, first = time.time(), int(state.step)
    for count in range(first, STEPS):
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, next(rows)))
        if (count + 1) % 10 == 0:
            speed = (count + 1 - first) * BATCH * LENGTH / (time.time() - started)
            print(
                json.dumps({"step": count + 1, "tokens_per_second": speed} | jax.tree.map(float, metrics)), flush=True
            )
        if (count + 1) % 50 == 0 or count + 1 == STEPS:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            saved.with_suffix(".new").write_bytes(pickle.dumps((leaves, rows.get_state())))
            saved.with_suffix(".new").rename(saved)
            save_model(state, arguments.out if count + 1 == STEPS else arguments.state)


def save_model(state: TrainState, folder: Path) -> None:
    arrays = {path: np.asarray(array.astype(jnp.bfloat16)) for path, array in state.trainable.items()}
    write_parameters(folder, arrays, table="mixtral", config=MODEL)
    write_decoder_config(folder, MODEL.decoder, dtype="bfloat16")


if __name__ == "__main__":
    main()
