"""Pretrains the embedded language model with the package's own "full, text" stage, from scratch or from a folder.

Run after text.py and instructions.py, once for each phase of PHASES, each from the folder of the one before:

    python launch/make_base/pretrain.py --text BUILD --phase text --out BUILD/text --state BUILD/text.state
    python launch/make_base/pretrain.py --text BUILD --phase reading --start BUILD/text --out BUILD/reading \
        --state BUILD/reading.state

Rows of text have a label on each token, rows of conversations on their answers. The whole state is saved every 50
steps, and the script goes on from there when run again. About 95 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moextend_jax.checkpoints.huggingface import read_parameters, write_decoder_config, write_parameters
from moextend_jax.config import RECIPES, DecoderConfig, ModelConfig
from moextend_jax.data.batches import batches, text_batches
from moextend_jax.data.datasets import Source, open_text
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.mesh import make_mesh, place_rows
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import arrays_of
from moextend_jax.settings import OptimizerConfig, StageSettings
from moextend_jax.sharding import parameter_shardings
from moextend_jax.train import stages
from moextend_jax.train.optimizer import learning_rate, make_optimizer
from moextend_jax.train.step import TrainState, init_state, make_step

MODEL = ModelConfig(
    decoder=DecoderConfig(width=128, hidden=256, layers=8, heads=4, kv_heads=2, head_size=32, tied_head=True),
    dtype="float32",
    remat="none",
)
LENGTH, SEED = 512, 0


class Phase(NamedTuple):
    """`schedule` counts the steps of the learning rate's schedule, `steps` those that are run of it."""

    text_rows: int
    chat_rows: int
    chats: str
    steps: int
    schedule: int
    peak: float


PHASES = {
    "text": Phase(8, 0, "reading", 560, 560, 3e-3),
    "reading": Phase(3, 5, "reading", 1300, 1300, 3e-3),
    "checking": Phase(2, 6, "checking", 300, 400, 2e-3),
    # Comparing words came within 150 steps without text beside it, and had not come in 1,700 steps with it.
    "comparing": Phase(0, 8, "comparing", 150, 400, 2e-3),
    "turning": Phase(0, 8, "turning", 200, 300, 2e-3),
    "settling": Phase(3, 5, "negating", 160, 160, 1.5e-3),
}
MESH = {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1}
TOKENIZER = Path(__file__).parents[2] / "moextend_jax" / "assets" / "base"


class Conversations(list):
    """Rows of LLaVA's JSON as `data.datasets.Source` reads them."""

    def __init__(self, path: Path):
        rows = json.loads(path.read_text())
        super().__init__({"id": row["id"].encode(), "conversations": json.dumps(row["conversations"]),
                          "images": [], "image_rows": []} for row in rows)  # fmt: skip

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [self[index] for index in indices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder that text.py and instructions.py wrote")
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--start", type=Path, help="Hugging Face folder of the phase before")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state of the run")
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)

    phase = PHASES[arguments.phase]
    mesh = make_mesh(MESH)
    model = jax.jit(lambda: nnx.split(MoExtend(MODEL, rngs=nnx.Rngs(SEED))))
    model = nnx.merge(*model())
    arrays = arrays_of(model)
    if arguments.start:
        read = read_parameters(arguments.start, table="mixtral", config=MODEL)
        arrays = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in read.items()}
    recipe, settings = RECIPES["paper"], OptimizerConfig(learning_rate=phase.peak, warmup_share=0.05, b2=0.98)
    arrays = jax.device_put(arrays, parameter_shardings(model, mesh))
    trainable, frozen = stages.split(arrays, ("decoder/*",))
    schedule = learning_rate(settings, steps=phase.schedule, recipe=recipe)
    optimizer = make_optimizer(settings, paths=trainable)
    step = make_step(
        model, optimizer=optimizer, schedule=schedule, recipe=recipe, aux_coefficient=0.01, loss_chunk=512, mesh=mesh
    )
    state = init_state(trainable, optimizer)

    tokenizer = load_tokenizer(TOKENIZER)
    passages = [line for name in ("wordnet", "kjv") for line in open_text(arguments.text / f"{name}.train.txt")]
    text = iter(
        text_batches(passages, tokenizer=tokenizer, length=LENGTH, batch_size=max(1, phase.text_rows), seed=SEED)
    )
    source = Source(rows=Conversations(arguments.text / f"{phase.chats}.json"), items={})
    rows = StageSettings(
        data="chats", steps=1, length=LENGTH, batch_size=max(1, phase.chat_rows), conversations_per_row=0
    )
    chats = iter(batches(source, stage=rows, tokenizer=tokenizer, recipe=recipe, readers={}, seed=SEED))
    saved = arguments.state / "state.pkl"
    if saved.exists():
        leaves, *positions = pickle.loads(saved.read_bytes())
        old, structure = jax.tree.flatten(state)
        leaves = [jax.device_put(leaf, like.sharding) for leaf, like in zip(leaves, old, strict=True)]
        state = jax.tree.unflatten(structure, leaves)
        for rows, position in zip((text, chats), positions, strict=True):
            rows.set_state(position)

    started, first = time.time(), int(state.step)
    for count in range(first, phase.steps):
        parts = [next(rows) for rows, wanted in ((text, phase.text_rows), (chats, phase.chat_rows)) if wanted]
        batch = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        state, metrics = step(state, frozen, place_rows(batch, mesh))
        if (count + 1) % 10 == 0:
            speed = (count + 1 - first) * (phase.text_rows + phase.chat_rows) * LENGTH / (time.time() - started)
            scalars = {name: float(value) for name, value in metrics.items() if not value.ndim}
            print(json.dumps({"step": count + 1, "tokens_per_second": speed} | scalars), flush=True)
        if (count + 1) % 50 == 0 or count + 1 == phase.steps:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            saved.with_suffix(".new").write_bytes(pickle.dumps((leaves, text.get_state(), chats.get_state())))
            saved.with_suffix(".new").rename(saved)
            save_model(state, arguments.out if count + 1 == phase.steps else arguments.state)


def save_model(state: TrainState, folder: Path) -> None:
    arrays = {path: np.asarray(array.astype(jnp.bfloat16)) for path, array in state.trainable.items()}
    write_parameters(folder, arrays, table="mixtral", config=MODEL)
    write_decoder_config(folder, MODEL.decoder, dtype="bfloat16")


if __name__ == "__main__":
    main()
