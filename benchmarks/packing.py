"""How full packed rows of LLaVA-like conversations are, how full they can be, and what a step gains by it.

python benchmarks/packing.py                     fill ratios and their bounds (two minutes)
python benchmarks/packing.py --step              one finetune step instead, padded and packed, at a ninth of the lengths

In: nothing; lengths are drawn, see MIXES. Out: a table of fill ratios, or with --step of tokens per CPU second.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import linprog

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moextend_jax.config import IGNORE, IMAGE, Batch, Room  # noqa: E402
from moextend_jax.data.batches import WINDOW  # noqa: E402
from moextend_jax.data.conversations import Encoded  # noqa: E402
from moextend_jax.data.packing import Row, Sample, Shape, pack  # noqa: E402

PATCHES, LIMIT = 576, 2048


class Part(NamedTuple):
    """Thousands of samples, and log-normal text length: mean and standard deviation of its logarithm."""

    thousands: int
    mean: float
    sigma: float
    images: int = 1


# Numbers of samples are LLaVA-1.5's as published; the text lengths are our estimates (no data set was read), from how
# many questions a sample has and how long they are.
TEXT_ONLY = Part(40, 1100, 0.7, images=0)
MIXES: dict[str, tuple[Part, ...]] = {
    "665k by source": (
        Part(58, 330, 0.3), Part(23, 150, 0.3), Part(77, 260, 0.3),  # LLaVA: conversation, detail, reasoning
        Part(83, 120, 0.4), Part(72, 270, 0.5), Part(9, 40, 0.3), Part(80, 125, 0.3),  # VQAv2, GQA, OKVQA, OCRVQA
        Part(66, 75, 0.3), Part(22, 80, 0.3), Part(48, 400, 0.6), Part(86, 450, 0.6),  # A-OKVQA, TextCaps, RefCOCO, VG
        TEXT_ONLY,
    ),
    "665k, text 270, sigma 0.4": (Part(625, 270, 0.4), TEXT_ONLY),
    "665k, text 270, sigma 0.6": (Part(625, 270, 0.6), TEXT_ONLY),
    "665k, text 270, sigma 0.8": (Part(625, 270, 0.8), TEXT_ONLY),
    "captions": (Part(558, 30, 0.4),),
}  # fmt: skip
ROWS = {"captions": ((1024, 1), (1280, 2), (2048, 3), (2560, 4))}
ROWS_665K = ((2048, 3), (3072, 5), (4096, 6))
SAMPLES = 2048


def draw(parts: tuple[Part, ...], *, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lengths, BOS and image span included and at most LIMIT, and numbers of images."""
    shares = np.array([part.thousands for part in parts]) / sum(part.thousands for part in parts)
    of_n = rng.choice(len(parts), samples, p=shares)
    mean_n, sigma_n, images_n = (np.array([getattr(p, name) for p in parts])[of_n] for name in Part._fields[1:])
    text_n = np.maximum(rng.lognormal(np.log(mean_n) - sigma_n**2 / 2, sigma_n), 16)
    return np.minimum(1 + images_n * (PATCHES + 2) + text_n, LIMIT).astype(int), images_n


def items_of(lengths_n: np.ndarray, images_n: np.ndarray, *, patches: int) -> list[Sample]:
    """Conversations of these sizes: BOS, image spans, text of which the second half has labels."""
    rng, items = np.random.default_rng(1), []
    for length, images in zip(lengths_n.tolist(), images_n.tolist(), strict=True):
        ids_L = rng.integers(7, 30000, length, dtype=np.int32)
        places_L = np.full(length, -1, np.int32)
        for image in range(images):
            start = 2 + image * (patches + 2)
            places_L[start : start + patches] = np.arange(patches) + image * patches
        text = length - 1 - images * (patches + 2)
        labels_L = np.where(np.arange(length) >= length - text // 2, ids_L, IGNORE)
        encoded = Encoded(ids_L, labels_L, places_L, np.ones(length, np.int32), {IMAGE: images})
        items.append(Sample(encoded, {IMAGE: [0] * images}))
    return items


def packed(items: list[Sample], *, length: int, images_per_row: int) -> list[Row]:
    """Rows as the pipeline makes them, a window at a time."""
    shape = Shape(length, {IMAGE: Room(images_per_row, PATCHES)})
    windows = [items[start : start + WINDOW] for start in range(0, len(items), WINDOW)]
    return [row for some in windows for row in pack(some, shape=shape, conversations_per_row=0)]


def fewest_rows(lengths_n: np.ndarray, *, length: int, rounds: int = 80) -> float:
    """A lower bound on the rows of any packing: the linear program over all ways to fill a row (Gilmore and Gomory).

    Lengths are rounded down to 1/256 of a row, and a program that is not solved to the end still gives a bound
    (Farley's): it is safe, if a little too low.
    """
    grain = length // 256
    sizes, need = np.unique(lengths_n // grain, return_counts=True)
    room, kinds = length // grain, len(sizes)
    fills = [np.eye(kinds, dtype=int)[kind] * (room // size) for kind, size in enumerate(sizes)]
    for _ in range(rounds):
        solved = linprog(np.ones(len(fills)), A_ub=-np.array(fills, float).T, b_ub=-need, method="highs")
        price = -solved.ineqlin.marginals
        # The dearest way to fill each room, and its last item: a knapsack.
        worth, last = np.zeros(room + 1), np.full(room + 1, -1)
        for some in range(1, room + 1):
            fits = np.searchsorted(sizes, some, side="right")
            if fits:
                options = worth[some - sizes[:fits]] + price[:fits]
                last[some] = int(np.argmax(options)) if options.max() > 1e-12 else -1
                worth[some] = max(options.max(), 0)
        if worth[room] < 1 + 1e-3:
            break
        for kind in np.flatnonzero(price + worth[room - sizes] > 1 + 1e-6):  # every fill that would lower the sum
            fill, some = np.eye(kinds, dtype=int)[kind], room - sizes[kind]
            while some > 0 and last[some] >= 0:
                fill[last[some]] += 1
                some -= sizes[last[some]]
            fills.append(fill)
    return solved.fun / max(worth[room], 1)


def show_fill(console: Console) -> None:
    table = Table(
        "lengths", "mean", "row", "images", "padded", "packed", "at most",
        "conversations per row", "ms per conversation",
        caption=f"share of positions that are not padding; windows of {WINDOW}",
    )  # fmt: skip
    for name, parts in MIXES.items():
        lengths_n, images_n = draw(parts, samples=SAMPLES, rng=np.random.default_rng(0))
        items, total = items_of(lengths_n, images_n, patches=PATCHES), lengths_n.sum()
        for length, images_per_row in ROWS.get(name, ROWS_665K):
            started = time.perf_counter()
            rows = len(packed(items, length=length, images_per_row=images_per_row))
            cost = (time.perf_counter() - started) / SAMPLES * 1000
            bound = min(1.0, total / (fewest_rows(lengths_n, length=length) * length))
            table.add_row(
                name, f"{lengths_n.mean():.0f}", str(length), str(images_per_row),
                f"{total / SAMPLES / (LIMIT if name not in ROWS else 1024):.3f}",
                f"{total / (rows * length):.3f}", f"{bound:.3f}", f"{SAMPLES / rows:.2f}", f"{cost:.2f}",
            )  # fmt: skip
    console.print(table)


def show_step(console: Console, *, conversations: int, steps: int) -> None:
    """One finetune step of configs/bench.py's model, the same conversations padded and packed, turn by turn."""
    scale = 9  # 576 patches become configs/bench.py's 64
    lengths_n, images_n = draw(MIXES["665k by source"], samples=conversations, rng=np.random.default_rng(0))
    lengths_n = np.where(images_n, 67 + (lengths_n - 579) // scale, lengths_n // scale)
    limit = -(-LIMIT // scale)
    items = items_of(lengths_n, images_n, patches=PATCHES // scale)
    packed_kinds = {f"packed, {images} images": (n * limit, images, 0) for n, images in ((1, 3), (2, 6))}
    kinds = {"padded": (limit, 1, 1), **packed_kinds}
    run, measured = _finetune(), {}
    for kind, (length, images, conversations_per_row) in kinds.items():
        shape = Shape(length, {IMAGE: Room(images, PATCHES // scale)})
        rows = pack(items, shape=shape, conversations_per_row=conversations_per_row)
        measured[kind] = (_batch(rows, patches=PATCHES // scale), [])
    for batch, _ in measured.values():
        run(batch)  # compiles
    for _ in range(steps):
        for batch, seconds in measured.values():
            started = time.process_time()  # of all threads: other programs on the machine disturb it less
            run(batch)
            seconds.append(time.process_time() - started)
    table = Table("rows", "shape", "fill", "CPU s/step", "tokens per CPU s, no padding", "over padded")
    speeds = {kind: lengths_n.sum() / min(seconds) for kind, (_, seconds) in measured.items()}
    for kind, (batch, seconds) in measured.items():
        table.add_row(
            kind, f"{batch.ids_BL.shape}", f"{(batch.segments_BL > 0).mean():.3f}", f"{min(seconds):.2f}",
            f"{speeds[kind]:,.0f}", f"{speeds[kind] / speeds['padded']:.2f}",
        )  # fmt: skip
    console.print(table)


def _batch(rows: list[Row], *, patches: int) -> Batch:
    rows_BM = np.stack([row.item_rows_M[IMAGE] for row in rows])
    return Batch(
        np.stack([row.ids_L for row in rows]),
        np.stack([row.labels_L for row in rows]),
        np.stack([row.positions_L for row in rows]),
        np.stack([row.segments_L for row in rows]),
        np.stack([row.places_L for row in rows]),
        features={IMAGE: np.random.default_rng(2).standard_normal((*rows_BM.shape, patches, 256), dtype=np.float32)},
    )


def _finetune():
    """A function (batch) that makes one step and waits for it; the model has random weights."""
    import jax
    from flax import nnx

    from configs.bench import get_config
    from moextend_jax.bench import model_config
    from moextend_jax.mesh import make_mesh
    from moextend_jax.models.moextend import MoExtend
    from moextend_jax.parameters import by_path
    from moextend_jax.runs.results import FIRST
    from moextend_jax.settings import from_config_dict
    from moextend_jax.train import stages
    from moextend_jax.train.step import init_state, stage_step

    settings = from_config_dict(get_config())
    finetune = dataclasses.replace(settings.finetune, loss_chunk=512)
    model = nnx.eval_shape(lambda: MoExtend(model_config(settings, stage="finetune"), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    arrays = {
        path: jax.numpy.asarray(float(path.endswith("norm")) + 0.02 * rng.standard_normal(param.shape, np.float32))
        for path, param in by_path(nnx.state(model, nnx.Param)).items()
    }
    trainable, frozen = stages.split(arrays, FIRST.patterns("finetune", recipe=settings.recipe))
    mesh = make_mesh(settings.mesh)
    step, optimizer, _ = stage_step(model, trainable, stage=finetune, settings=settings, mesh=mesh)
    state = init_state(trainable, optimizer)

    def run(batch: Batch) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, frozen, batch))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--step", action="store_true", help="time a training step instead of counting padding")
    parser.add_argument("--conversations", type=int, default=27)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    console = Console()
    if args.step:
        show_step(console, conversations=args.conversations, steps=args.steps)
    else:
        show_fill(console)


if __name__ == "__main__":
    main()
