"""Runs each command that runs a model on four CPU devices, notes the programs it calls, compiles these for v5e:2x2.

In, as a script: an empty FOLDER, and `all` to compile every kind of program and not only the first of a name that a
command calls; the others are lowered. Out: a line per program that went through; an error of the compiler ends it. This
is how a program that is run outside `jax.set_mesh`, or whose kernels cannot be lowered for several chips, is found
without one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moextend_jax import bench, cli, mesh
from moextend_jax.config import DecoderConfig, VisionConfig, with_vision
from moextend_jax.evaluate.asking import asker_of
from moextend_jax.evaluate.prompts import Prompt
from moextend_jax.plan import topology
from moextend_jax.runs.askable import open_place
from moextend_jax.runs.place import Place
from moextend_jax.runs.run import known_settings

# As tiny as kernels for TPU allow: widths of 128 on each device, rows of a multiple of 128 positions.
DECODER = DecoderConfig(
    vocab_size=32000, width=512, hidden=256, layers=2, heads=4, kv_heads=2, head_size=64, experts=4, tied_head=True
)
WIDE = with_vision(
    dataclasses.replace(tiny.BASE_CONFIG, decoder=DECODER),
    VisionConfig(width=512, hidden=256, layers=2, heads=2, image_size=32, patch_size=16),
)


class Noted(NamedTuple):
    """A call of a program: its function, jit's options, its arguments as shapes with shardings, and the precision of
    products in force."""

    command: str
    function: Any
    options: dict[str, Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    precision: str | None


NOTED: dict[str, Noted] = {}


def note(command: str) -> None:
    """From here on programs are noted under that command's name, each once for its shapes."""
    init, call = mesh.Program.__init__, mesh.Program.__call__

    def noting_init(self, function, *, mesh, **options):
        self.noted = function, options
        ORIGINAL[0](self, function, mesh=mesh, **options)

    def noting_call(self, *arguments, **named):
        function, options = self.noted
        own, given = jax.tree.map(described, (arguments, named))
        name = getattr(function, "__qualname__", str(function))
        precision = jax.config.values["jax_default_matmul_precision"]
        key = f"{name} {precision} {jax.tree.map(str, (own, given))}"
        NOTED.setdefault(key, Noted(command, function, options, own, given, precision))
        return ORIGINAL[1](self, *arguments, **named)

    ORIGINAL.extend((init, call) if not ORIGINAL else ())
    mesh.Program.__init__, mesh.Program.__call__ = noting_init, noting_call


ORIGINAL: list[Any] = []


def described(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(TPUS, spec))


def on_tpus(sharding: Any) -> Any:
    return NamedSharding(TPUS, sharding.spec)


def run(folder: Path) -> None:
    base = tiny.write_base(folder / "base", config=WIDE)
    config = tiny.write_config(
        folder, base=base, data="easy_vqa/questions", split="train[:60]", evaluated="test", length=128
    )
    tiny.shorten_texts(folder)
    tiny.shorten_easy_vqa(pytest.MonkeyPatch())
    workdir = f"--workdir={folder / 'work'}"
    for words in (
        ["run", f"--config={config}", workdir, "--config.finetune.accumulate=1"],
        ["generate", workdir, "--prompt=What is it?", "--max_new_tokens=3"],
        ["eval", "--benchmark=easy_vqa", "--limit=8", workdir],
        ["routing", "collect", f"--checkpoint={folder / 'work'}", f"--text={folder / 'kjv.txt'}", "--length=128",
         f"--out={folder / 'stats.npz'}"],
    ):  # fmt: skip
        note(" ".join(words[:2]) if words[0] == "routing" else words[0])
        try:
            cli.main(words)
        except SystemExit as ended:
            assert not ended.code, words
    settings = known_settings(folder / "work")
    note("eval --forgetting")
    opened = open_place(Place(workdir=folder / "work", model="base"))
    prompt = Prompt(
        ids_L=np.arange(40, 60, dtype=np.int32), places_L=np.full(20, -1, np.int32), head=12,
        targets_L=np.arange(52, 60, dtype=np.int32),
    )  # fmt: skip
    list(asker_of(opened).score([prompt]))
    note("bench")
    bench.STEPS, bench.WARMUP = 1, 0
    bench.measure(settings, stage="finetune", labels="all")


def compile_all(every_kind: bool) -> None:
    """Lowers every program, and compiles the first of those that differ in rows and lengths alone, or only of those
    of one name and command."""
    compiled: set[tuple[Any, ...]] = set()
    for name, (command, function, options, arguments, named, precision) in NOTED.items():
        options = {
            key: jax.tree.map(on_tpus, value) if key == "out_shardings" else value for key, value in options.items()
        }
        kind = command, *name.split(" ")[:2], jax.tree.structure((arguments, named)) if every_kind else None
        with jax.default_matmul_precision(precision):
            lowered = mesh.Program(function, mesh=TPUS, **options).lower(*arguments, **named)
            if kind not in compiled:
                lowered.compile()
        print(f"{command}: {kind[1]}{'' if kind not in compiled else ', lowered'}", flush=True)
        compiled.add(kind)


if __name__ == "__main__":
    TPUS: Mesh = topology.make_mesh(topology.parse("v5e:2x2"), {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    run(Path(sys.argv[1]))
    mesh.Program.__init__, mesh.Program.__call__ = ORIGINAL
    compile_all("all" in sys.argv)
