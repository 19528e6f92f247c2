"""Pretrains the embedded language model with the package's own "full_text" stage, from scratch or from a folder.

Run after text.py and instructions.py, once for each phase:

    python launch/make_base/pretrain.py --text BUILD --phase text --out BUILD/text --state BUILD/lm
    python launch/make_base/pretrain.py --text BUILD --phase instructions --start BUILD/text \
        --out moextend_jax/assets/base --state BUILD/lm2

It saves its whole state every 50 steps and goes on from there when run again. About 40 minutes on 2 idle cores.
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

from moextend_jax.checkpoints.huggingface import read_parameters, write_decoder_config, write_parameters
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
PHASES = {  # files, steps, learning rate
    "text": (("wordnet", "kjv"), 560, 3e-3),
    "instructions": (("instructions",), 150, 2e-3),
}
BATCH, LENGTH, SEED = 8, 512, 0
TOKENIZER = Path(__file__).parents[2] / "moextend_jax" / "assets" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder with {wordnet,kjv}.train.txt")
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--start", type=Path, help="Hugging Face folder of the phase before")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state of the run")
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)

    model = jax.jit(lambda: nnx.split(MoExtend(MODEL, rngs=nnx.Rngs(SEED))))
    model = nnx.merge(*model())
    arrays = arrays_of(model)
    if arguments.start:
        read = read_parameters(arguments.start, model, table="mixtral", config=MODEL)
        arrays = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in read.items()}
    files, steps, peak = PHASES[arguments.phase]
    settings = OptimizerConfig(learning_rate=peak, warmup_share=0.05, b2=0.98)
    trainable, frozen = stages.split(arrays, stages.patterns("full_text", recipe=RECIPES["paper"]))
    schedule = learning_rate(settings, steps=steps, recipe=RECIPES["paper"])
    optimizer = make_optimizer(settings, paths=trainable, schedule=schedule)
    step = make_step(
        model, optimizer=optimizer, schedule=schedule, recipe=RECIPES["paper"], aux_coefficient=0.01, loss_chunk=64
    )
    state = init_state(trainable, optimizer)

    tokenizer = load_tokenizer(TOKENIZER)
    passages = [line for name in files for line in open_text(arguments.text / f"{name}.train.txt")]
    rows = iter(text_batches(passages, tokenizer=tokenizer, length=LENGTH, batch_size=BATCH, seed=SEED))
    saved = arguments.state / "state.pkl"
    if saved.exists():
        leaves, position = pickle.loads(saved.read_bytes())
        state = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in leaves])
        rows.set_state(position)

    started, first = time.time(), int(state.step)
    for count in range(first, steps):
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, next(rows)))
        if (count + 1) % 10 == 0:
            speed = (count + 1 - first) * BATCH * LENGTH / (time.time() - started)
            print(
                json.dumps({"step": count + 1, "tokens_per_second": speed} | jax.tree.map(float, metrics)), flush=True
            )
        if (count + 1) % 50 == 0 or count + 1 == steps:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            saved.with_suffix(".new").write_bytes(pickle.dumps((leaves, rows.get_state())))
            saved.with_suffix(".new").rename(saved)
            save_model(state, arguments.out if count + 1 == steps else arguments.state)


def save_model(state: TrainState, folder: Path) -> None:
    arrays = {path: np.asarray(array.astype(jnp.bfloat16)) for path, array in state.trainable.items()}
    write_parameters(folder, arrays, table="mixtral", config=MODEL)
    write_decoder_config(folder, MODEL.decoder, dtype="bfloat16")


if __name__ == "__main__":
    main()
