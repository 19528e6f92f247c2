"""Tiny models with random weights in which every part has an effect, and batches for them; also on disk.

In: nothing, or a folder to write to. Out: structures, arrays by path, `Batch`es, a Hugging Face folder, LLaVA data.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import easy_vqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from moextend_jax.checkpoints import huggingface
from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    DecoderConfig,
    ExtensionConfig,
    FeaturesConfig,
    ImageTags,
    Medium,
    ModelConfig,
    Named,
    Room,
    VisionConfig,
    first_places,
    of_pictures,
    with_extension,
)
from moextend_jax.data.datasets import AnyItems
from moextend_jax.data.readers import Inputs
from moextend_jax.evaluate import text_losses
from moextend_jax.generate import Generator
from moextend_jax.mesh import Program, make_mesh, place_leaves, place_rows
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.runs import results
from moextend_jax.settings import EvaluateSettings, OptimizerConfig, RunSettings, StageSettings
from moextend_jax.sharding import MESH_AXES
from moextend_jax.train.loop import Job
from moextend_jax.train.loss import Losses, losses


def traced(program: Program, *arguments: Any) -> jax.stages.Traced:
    """A program's trace, of which its jaxpr can be read."""
    with jax.set_mesh(program.mesh):
        return program._jitted.trace(*arguments)


def complete(
    generator: Generator, arrays: Any, prompts: Batch, *, max_new_tokens: int, **options: Any
) -> np.ndarray:  # fmt: skip
    """New ids `[B, max_new_tokens]`."""
    pieces = generator.begin(arrays, prompts, max_new_tokens=max_new_tokens, steps=max_new_tokens, **options)
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)


DECODER = DecoderConfig(
    vocab_size=61, width=24, hidden=40, layers=3, heads=4, kv_heads=2, head_size=6, experts=4, rope_theta=1e4
)
VISION = VisionConfig(width=12, hidden=20, layers=2, heads=2, image_size=8, patch_size=4, feature_layer=-1)
EXTENSION = ExtensionConfig(layers=(0, 2), sources=(1, 3), calibrator_width=5)
PLAIN = of_pictures(decoder=DECODER, vision=VISION, dtype="float32", remat="none")
EXTENDED = with_extension(PLAIN, EXTENSION)
SOUND = Medium(
    kind="features", mark="<features:sound>", tags=ImageTags(pad=4), tower=FeaturesConfig(width=6, patches=3)
)
BOTH = dataclasses.replace(
    with_extension(
        EXTENDED,
        ExtensionConfig(layers=(1, 2), sources=(0, 2, 1, 1), new_experts=2, calibrator_width=4, medium="sound"),
        name="sound",
    ),
    media=EXTENDED.media.replacing("sound", SOUND),
)
"""Two extensions of two media; the first layer has one of them, the second the other, the third both."""

ASSETS = Path(__file__).parents[1] / "moextend_jax" / "assets"
TIMES = {"seconds", "tokens_per_second", "step_seconds", "tflops_per_second", "peak_memory_gb"}
"""What runs log that is not the same when they are run again."""


structure = abstract


def arrays(config: ModelConfig, *, seed: int = 0, std: float = 0.3) -> dict[str, jax.Array]:
    """Random arrays by path; scales of norms near one. A path's entries do not depend on which others exist."""
    return {path: jnp.asarray(leaf) for path, leaf in _drawn(config, seed=seed, std=std).items()}


@functools.cache
def _drawn(config: ModelConfig, *, seed: int, std: float) -> dict[str, np.ndarray]:
    leaves = {}
    for path, param in by_path(nnx.state(structure(config), nnx.Param)).items():
        rng = np.random.default_rng([seed, *path.encode()])
        centre = 1.0 if path.endswith(("norm", "scale")) else 0.0
        leaves[path] = (centre + rng.normal(0, std, param.shape)).astype(np.float32)
    return leaves


def with_arrays_of(config: ModelConfig, leaves: dict[str, jax.Array]) -> Any:
    """The model with these leaves in it."""
    return with_arrays(structure(config), leaves)


def batch(*, rows: int = 3, length: int = 14, seed: int = 0, pixels: bool = False) -> Batch:
    """Row 0 is full, later rows end in padding; even rows have an image (4 patches), odd rows are text."""
    rng = np.random.default_rng(seed)
    P = VISION.patches
    ids_BL = rng.integers(7, DECODER.vocab_size, (rows, length)).astype(np.int32)
    segments_BL = np.ones_like(ids_BL)
    places_BL = np.full_like(ids_BL, -1)
    for row in range(rows):
        segments_BL[row, length - row :] = 0
        if row % 2 == 0:
            places_BL[row, 2 : 2 + P] = np.arange(P)
    labels_BL = np.where((segments_BL > 0) & (np.arange(length) > 7), ids_BL, IGNORE).astype(np.int32)
    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BL.shape)
    size = VISION.image_size
    images = {
        "media": {"image": rng.normal(size=(rows, 1, size, size, 3)).astype(np.float32)} if pixels else {},
        "features": {} if pixels else {"image": rng.normal(size=(rows, 1, P, VISION.width)).astype(np.float32)},
    }
    return Batch(ids_BL, labels_BL, positions_BL, segments_BL, places_BL, **images)


def seeing(*, size: int = 8, patch: int = 4) -> Named[Medium]:
    """The media of a model with a tower for pictures of so many pixels, in patches of so many."""
    return Named({"image": Medium(tower=VisionConfig(image_size=size, patch_size=patch))})


def pictures(images: AnyItems, *, size: int = 8, patch: int = 4, preparation: Literal["pad", "crop"] = "pad") -> Inputs:
    """What prepares pictures for such a tower."""
    return Inputs(items=images, medium=seeing(size=size, patch=patch)["image"], preparation=preparation)


def joined(batches: Iterable[Batch]) -> Batch:
    """The rows of all of them as one batch."""
    return jax.tree.map(lambda *columns: np.concatenate(columns), *batches)


def by_field(batch: Batch) -> dict[str, np.ndarray]:
    """The arrays that a batch has by name: ids_BL, media/image, ..."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Talk(NamedTuple):
    """A conversation of WORDS text tokens about items of these media, as its number draws them."""

    number: int
    media: tuple[str, ...] = ()


WORDS = 6


def talks(*rows: Sequence[Talk], length: int = 16) -> Batch:
    """Rows of conversations one after another. What one holds does not depend on the others, nor on its place."""
    names = [name for name in BOTH.media if any(name in talk.media for row in rows for talk in row)]
    rooms = {
        name: Room(max(sum(name in talk.media for talk in row) for row in rows), BOTH.media[name].tokens)
        for name in names
    }
    features = {
        name: np.zeros((len(rows), room.items, room.tokens, BOTH.media[name].tower.sizes()["C"]), np.float32)
        for name, room in rooms.items()
    }
    ids_BL, positions_BL, segments_BL = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    labels_BL, places_BL = np.full_like(ids_BL, IGNORE), np.full_like(ids_BL, -1)
    for b, row in enumerate(rows):
        start, counts = 0, dict.fromkeys(names, 0)
        for segment, talk in enumerate(row, 1):
            here = slice(start, start + WORDS + sum(BOTH.media[name].tokens for name in talk.media))
            rng, count = np.random.default_rng(talk.number), here.stop - start
            assert here.stop <= length
            ids_BL[b, here] = rng.integers(7, DECODER.vocab_size, count)
            positions_BL[b, here], segments_BL[b, here] = np.arange(count), segment
            labels_BL[b, here.stop - 3 : here.stop] = ids_BL[b, here.stop - 3 : here.stop]
            at = start + 1
            for name in talk.media:
                tokens, m = BOTH.media[name].tokens, counts[name]
                places_BL[b, at : at + tokens] = first_places(rooms)[name] + m * tokens + np.arange(tokens)
                features[name][b, m] = rng.normal(size=features[name].shape[2:])
                at, counts[name] = at + tokens + 1, m + 1
            start = here.stop
    return Batch(ids_BL, labels_BL, positions_BL, segments_BL, places_BL, features=features)


STAGES = {
    **{name: results.FIRST.patterns(name, recipe=RECIPES["paper"]) for name in results.FIRST.training()},
    "finetune, released": results.FIRST.patterns("finetune", recipe=RECIPES["released"]),
    "full, text": results.FIRST.patterns("full", recipe=RECIPES["paper"], sees=False),
}
"""What each stage trains, as path patterns; those that a recipe or a model without eyes changes stand twice."""


def run_settings(**more: Any) -> RunSettings:
    """Settings for whoever runs one stage with rows of its own."""
    stage = StageSettings(data="none", steps=1, batch_size=1, length=1)
    evaluate = EvaluateSettings(data="none", questions=1)
    return RunSettings(align=stage, extend=stage, finetune=stage, full=stage, evaluate=evaluate, **more)


def job(
    name: str, folder: Path, *, facts: dict[str, Any], steps: int, learning_rate: float = 1e-2, mesh: Any = None,
    resume_from: Path | None = None, name_of: Any = str, held_out: Any = (),
    moments: Literal["device", "host"] = "device", **more: Any,
) -> Job:  # fmt: skip
    """A stage of a few steps that saves and logs often; `more` are fields of `RunSettings`."""
    optimizer = OptimizerConfig(learning_rate=learning_rate, moments=moments)
    settings = {"checkpoint_every": 2, "log_every": 1, "aux_coefficient": 0.01, "nonfinite_limit": 0, **more}
    return Job(
        name=name, trains=STAGES[name], folder=folder, facts=facts, resume_from=resume_from, name_of=name_of,
        held_out=held_out,
        stage=StageSettings(data="none", steps=steps, batch_size=2, length=40, loss_chunk=4, optimizer=optimizer),
        settings=run_settings(**settings),
        mesh=mesh or make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}),
    )  # fmt: skip


def loss_and_gradient(config: ModelConfig, leaves: Any, rows: Batch, *, of: str, coefficient: float = 0.01) -> Any:
    """A batch's losses, and the gradient of their total by the leaves whose paths begin with `of`."""
    own = {path: leaf for path, leaf in leaves.items() if path.startswith(of)}

    def total(own: dict[str, jax.Array]) -> tuple[jax.Array, Losses]:
        model = with_arrays_of(config, {**leaves, **own})
        made = losses(model, rows, recipe=RECIPES["paper"], aux_coefficient=coefficient, chunk=8)[0]
        return made.total, made

    (_, made), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(own)
    return made, gradient


def check_sharded_is_unsharded(config: ModelConfig, *, of: str, shape: Sequence[int] = (1, 2, 2, 2)) -> None:
    """`loss_and_gradient` over a mesh of this shape is that of one device."""
    leaves, rows = arrays(config, std=0.2), batch(rows=8)
    expected, d_expected = loss_and_gradient(config, leaves, rows, of=of)
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)))
    with jax.set_mesh(mesh):
        placed = place_leaves(structure(config), leaves, mesh)
        got, gradient = loss_and_gradient(config, placed, place_rows(rows, mesh), of=of)
    np.testing.assert_allclose(got.total, expected.total, atol=1e-5)
    for path, leaf in d_expected.items():
        np.testing.assert_allclose(gradient[path], leaf, atol=1e-5, rtol=1e-4, err_msg=path)


def check_same_on_a_mesh(module: Any, leaves: dict[str, Any], inputs: np.ndarray) -> None:
    """What a module makes of its inputs over a mesh is what it makes on one device."""
    run = jax.jit(lambda leaves, inputs: with_arrays(module, leaves)(inputs))
    mesh = make_mesh(dict(zip(MESH_AXES, (1, 2, 2, 2), strict=True)))
    with jax.set_mesh(mesh):
        got = run(place_leaves(module, leaves, mesh), inputs)
    np.testing.assert_allclose(got, run(leaves, inputs), atol=1e-5)


def few(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """All of them as parameters of a test, of which `fast`, or else the first, run with the fast tests."""
    every = list(cases)
    return [case if case in (fast or every[:1]) else pytest.param(case, marks=pytest.mark.slow) for case in every]


# --- on disk ----------------------------------------------------------------------------------------------------------

BASE_CONFIG = of_pictures(
    decoder=DecoderConfig(
        vocab_size=32000, width=16, hidden=24, layers=3, heads=2, kv_heads=1, head_size=8, experts=4, tied_head=True
    ),
    vision=VisionConfig(width=12, hidden=20, layers=2, heads=2, image_size=32, patch_size=16),
    dtype="float32",
)


def write_base(folder: Path, *, seed: int = 0, config: ModelConfig = BASE_CONFIG) -> Path:
    """A random base with the real tokenizer, and its tower in `vision/`, as Hugging Face folders."""
    vision = config.vision
    assert vision is not None
    made = arrays(config, seed=seed, std=0.1)
    huggingface.write_parameters(folder, made, table="mixtral", config=config)
    huggingface.write_decoder_config(folder, config.decoder, dtype="float32")
    huggingface.write_parameters(folder / "vision", made, table="clip", config=config)
    (folder / "vision" / "config.json").write_text(json.dumps(clip_attributes(vision)))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ASSETS / "base" / name, folder / name)
    return folder


def clip_attributes(config: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model", "hidden_size": config.width, "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "image_size": config.image_size,
        "patch_size": config.patch_size, "layer_norm_eps": config.norm_eps, "hidden_act": config.activation,
    }  # fmt: skip


def write_llava(folder: Path, *, rows: int = 24) -> Path:
    """LLaVA's two mixes in small: pictures of one colour and short questions about them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for n in range(rows):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (10 * n % 256, 90, 20 * n % 256)).save(file, "PNG")
        (folder / f"{n}.png").write_bytes(file.getvalue())
        talk = [{"from": "human", "value": f"<image>\nWhich is it? {n}"}, {"from": "gpt", "value": f"number {n % 5}"}]
        entries.append({"id": f"row{n}", "image": f"{n}.png", "conversations": talk})
    for name in ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json"):
        (folder / name).write_text(json.dumps(entries))
    return folder


def shorten_easy_vqa(patch: pytest.MonkeyPatch, *, train: int = 400, test: int = 200) -> None:
    """Leaves the first questions of its package, of which building takes no time."""
    for name, count in (("get_train_questions", train), ("get_test_questions", test)):
        columns = getattr(easy_vqa, name)()
        patch.setattr(easy_vqa, name, lambda columns=columns, count=count: tuple(part[:count] for part in columns))


def shorten_texts(folder: Path) -> None:
    """From here on this process's `evaluate` reads copies in `folder`, of the first lines of its texts."""
    for path in text_losses.TEXTS.glob("*.txt"):
        (folder / path.name).write_text("\n".join(path.read_text().split("\n")[:8]))
    text_losses.TEXTS = folder


CONFIG_FILE = """
from moextend_jax.settings import EvaluateSettings, RunSettings, SelectSettings, StageSettings, to_config_dict


def get_config(_=""):
    def stage(steps, length={length}):
        return StageSettings(data={data!r}, split={split!r}, steps=steps, batch_size=4, length=length, loss_chunk=4)

    return to_config_dict(
        RunSettings(
            align=stage(3),
            extend=stage(3),
            finetune=stage(3),
            full=stage(2),
            select=SelectSettings(held_out={held_out}, batch_size=4),
            evaluate=EvaluateSettings(
                data={data!r}, split={evaluated!r}, questions={questions}, batch_size=4, length={length},
                max_new_tokens=3, text_length=64, text_batch_size=4, examples=2,
            ),
            base={base!r},
            vision={vision!r},
            manual_dir={manual!r},
            data_dir={data_dir!r},
            dtype="float32",
            remat="none",
            checkpoint_every=2,
            log_every=1,
        )
    )
"""


def write_config(
    folder: Path, *, base: Path, data: str, split: str, evaluated: str, manual: Path | None = None, questions: int = 8,
    length: int = 48,
) -> Path:  # fmt: skip
    """A configuration file for the tiny base in `base`."""
    path = folder / "config.py"
    text = CONFIG_FILE.format(
        data=data,
        split=split,
        evaluated=evaluated,
        questions=questions,
        held_out=8,
        length=length,
        base=str(base),
        vision=str(base / "vision"),
        manual=str(manual or ""),
        data_dir=str(folder / "data"),
    )
    path.write_text(text)
    return path
