"""The three tables cover the full Mixtral-8x7B with CLIP ViT-L/336 and the published extension, each leaf once."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
import re
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import pytest
import tiny
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from moextend_jax import config, sharding
from moextend_jax.checkpoints import names
from moextend_jax.config import (
    RECIPES,
    AdapterConfig,
    Batch,
    BlocksConfig,
    DecoderConfig,
    ExtensionConfig,
    ImageTags,
    Medium,
    ModelConfig,
    MoextendError,
    Named,
    ProjectorConfig,
    VisionConfig,
    WhisperConfig,
    of_pictures,
    with_extension,
    with_vision,
)
from moextend_jax.mesh import MESH_AXES
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import by_path
from moextend_jax.runs.results import FIRST
from moextend_jax.train.stages import GROUPS, group, split

PUBLISHED = ExtensionConfig(
    layers=(2, 3, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 19, 20, 25, 27),
    sources=(1, 3, 3, 1, 0, 7, 2, 7, 0, 5, 5, 3, 0, 3, 3, 1),
)
FULL = of_pictures(decoder=DecoderConfig(), vision=VisionConfig(), extension=PUBLISHED)


SOUND = Medium(
    kind="audio",
    mark="<audio>",
    tags=ImageTags(pad=8),
    tower=WhisperConfig(),
    projector=ProjectorConfig(kind="resampler"),
)
EVERYTHING = dataclasses.replace(
    with_extension(
        FULL, ExtensionConfig(layers=(1, 31), sources=(0, 1, 2, 3), new_experts=2, medium="audio"), name="audio"
    ),
    media=FULL.media.replacing("audio", SOUND),
)
"""A second medium and extension beside, of which published files know nothing."""
OTHER_DECODER = of_pictures(
    decoder=DecoderConfig(
        qk_norm="whole", qkv_bias=True, out_bias=True, sinks=True, shared_hidden=64, shared_gate=True, layers=3,
        dense_layers=1, dense_hidden=64, router_bias=True, selection_bias=True, expert_bias=True,
    ),
    extension=ExtensionConfig(layers=(2,), sources=(0,)),
)  # fmt: skip
"""What decoders of other families have besides."""
OTHER_TOWER = of_pictures(
    decoder=DecoderConfig(layers=2), vision=VisionConfig(patch_bias=True, layer_scale=True, registers=4, layers=2)
)


ADAPTED = dataclasses.replace(
    FULL,
    adapters=Named(
        lora=AdapterConfig(experts="per_expert", router=True), mole=AdapterConfig(method="mole", lora_experts=3)
    ),
    blocks=Named(blocks=BlocksConfig(count=2)),
)
"""Low-rank updates and blocks besides."""


@functools.cache
def parameters(config: ModelConfig = FULL) -> dict[str, nnx.Param]:
    return by_path(nnx.state(abstract(config)))


def anywhere() -> dict[str, nnx.Param]:
    lowered = with_extension(FULL, dataclasses.replace(PUBLISHED, start="lowered"))
    everything = (FULL, EVERYTHING, OTHER_DECODER, OTHER_TOWER, lowered, ADAPTED)
    return functools.reduce(operator.or_, map(parameters, everything))


def size(prefix: str) -> int:
    return sum(int(param.size) for path, param in parameters().items() if path.startswith(prefix))


def test_letters_of_the_table_are_in_the_legend():
    legend, _, _ = (config.__doc__ or "").partition("Other meanings")
    letters = {letter for entry in re.findall(r" {2,}((?:[A-Za-z] )+)", legend) for letter in entry.split()}
    assert set(sharding.TABLE) <= letters


def test_it_is_the_real_model():
    assert size("decoder/") == 46_702_792_704  # Mixtral-8x7B
    assert size("media/image/tower/") == 303_507_456  # CLIP ViT-L/14 at 336 pixels
    assert size("extensions/image/new_experts/") == 16 * 3 * 4096 * 14336  # 2.82 B
    assert size("extensions/image/router/") == 16 * (4096 + 2 * 16 * 9)


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_the_file_exactly_once():
    tensors = list(names.tensors("released", FULL))
    files = collections.Counter(tensor.file for tensor in tensors)
    assert set(files.values()) == {1}
    decoder, extension, vision = 3 + 32 * (2 + 4 + 1 + 8 * 3), 16 * (1 + 2 + 3), 7 + 24 * 16
    assert len(files) == decoder + extension + vision + 4

    indices = collections.defaultdict(list)
    for tensor in tensors:
        indices[tensor.path].append(tensor.index)
    assert set(indices) == set(parameters())
    for path, seen in indices.items():
        depth = len(seen[0])
        stacked = itertools.product(*map(range, parameters()[path].shape[:depth]))
        assert sorted(seen) == list(stacked), path


def test_layouts_end_in_the_axes_of_the_parameter():
    for tensor in names.tensors("released", FULL):
        ours = tensor.layout.split(" -> ")[1]
        axes = parameters()[tensor.path].axes[len(tensor.index) :]
        assert re.sub(r"\([^)]*\)", "W", ours).split() == list(axes), tensor


def test_numbers_in_file_names():
    files = {tensor.file for tensor in names.tensors("released", FULL)}
    for layer in range(32):
        block = f"model.layers.{layer}.block_sparse_moe."
        experts = {int(m[1]) for file in files if (m := re.match(re.escape(block) + r"experts\.(\d+)\.w1", file))}
        extended = layer in PUBLISHED.layers
        assert experts == set(range(9 if extended else 8))
        assert (block + "gate_vision.weight" in files) == extended
        assert (block + "weight_scale.weight_scale.2.weight" in files) == extended


def test_inverse_layout_is_the_two_sides_swapped():
    assert names.inverse("(N H) D -> D N H") == "D N H -> (N H) D"
    for rows in names.TABLES.values():
        for row in rows:
            assert names.inverse(names.inverse(row.layout)) == row.layout


def test_a_tied_head_and_a_text_model_ask_for_less():
    tied = dataclasses.replace(FULL, decoder=DecoderConfig(tied_head=True))
    text = with_extension(with_vision(FULL, None), None)
    everything = {tensor.file for tensor in names.tensors("released", FULL)}
    assert everything - {t.file for t in names.tensors("released", tied)} == {"lm_head.weight"}
    assert {t.file for t in names.tensors("released", text)} == {t.file for t in names.tensors("mixtral", FULL)}


# --- sharding ---------------------------------------------------------------------------------------------------------


def test_every_parameter_has_a_sharding():
    for path, param in anywhere().items():
        assert len(param.axes) == len(param.shape), path
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec(param.axes) if entry]
        used = [axis for entry in entries for axis in entry]
        assert len(used) == len(set(used)) and set(used) <= set(sharding.MESH_AXES), path


def test_every_row_of_the_sharding_table_is_used():
    letters = {letter for param in anywhere().values() for letter in param.axes}
    letters |= {letter for field in Batch._fields for letter in field.partition("_")[2]}
    letters |= {"M", "h", "w", "c", "b", "l", "P", "C"}  # of its media
    letters |= {"S", "n", "i"}  # inside attention, inside a tower, tokens of all media of a row
    letters |= {"a", "v"}  # of experts in few bits
    assert set(sharding.TABLE) == letters


def test_an_unknown_letter_and_a_mesh_axis_used_twice_are_errors():
    with pytest.raises(KeyError):
        sharding.spec("D?")
    with pytest.raises(ValueError, match="twice"):
        sharding.spec("DD")
    with pytest.raises(ValueError, match="fsdp"):
        sharding.spec("BD")


@pytest.mark.parametrize(
    ("shape", "rows", "items", "more"),
    [
        ((1, 8, 1, 8), 16, 6, 2),  # a pod's packed rows: 2 pictures on each device instead of 12
        ((1, 8, 1, 8), 16, 1, 3),  # 1 instead of 2
        ((1, 8, 1, 8), 64, 6, 0),
        ((1, 8, 1, 1), 8, 1, 0),
        ((1, 1, 1, 3), 2, 1, 0),  # 2 on each device either way
        ((1, 1, 1, 1), 5, 1, 0),
    ],
)
def test_a_tower_s_items_are_filled_up_where_that_splits_its_work(shape, rows: int, items: int, more: int):
    with jax.sharding.use_abstract_mesh(AbstractMesh(shape, MESH_AXES)):
        assert sharding.items_to_add(rows, items) == more
    assert sharding.items_to_add(rows, items) == 0  # on one device


def test_the_experts_of_the_big_model_are_split_by_expert_width_and_hidden():
    axes = parameters()["decoder/layers/moe/experts/w_gate"].axes
    assert sharding.spec(axes) == PartitionSpec(None, "expert", "fsdp", "tensor")


# --- stages and groups ------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_exactly_one_group():
    for path in anywhere():
        assert group(path) in set(GROUPS.values())


def test_every_row_of_groups_is_used():
    for pattern in GROUPS:
        assert any(fnmatchcase(path, pattern) for path in anywhere()), pattern


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_every_pattern_of_a_stage_matches_something(stage: str):
    for pattern in tiny.STAGES[stage]:
        assert any(fnmatchcase(path, pattern) for path in parameters()), pattern


TRAINS = {
    "align": {"projector"},
    "extend": {"routers"},
    "finetune": {"new_experts", "router_columns", "calibrators"},
    "finetune, released": {"new_experts", "router_columns", "calibrators", "projector"},
    "full": {"projector", "routers", "base", "vision"},
    "full, text": {"routers", "base"},
}


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_stage_trains_all_of_its_groups_and_nothing_else(stage: str):
    trainable, frozen = split(parameters(), tiny.STAGES[stage])
    assert {*trainable, *frozen} == set(parameters()) and not set(trainable) & set(frozen)
    assert {group(path) for path in trainable} == TRAINS[stage]
    assert not {group(path) for path in frozen} & TRAINS[stage]


def test_the_recipe_decides_whether_finetune_trains_the_projector():
    assert FIRST.patterns("finetune", recipe=RECIPES["paper"]) == tiny.STAGES["finetune"]
    assert FIRST.patterns("finetune", recipe=RECIPES["released"]) == tiny.STAGES["finetune, released"]
    with pytest.raises(MoextendError, match="'dance'"):
        FIRST.patterns("dance", recipe=RECIPES["paper"])


def test_a_stage_whose_leaves_are_missing_is_an_error():
    plain = {path: param for path, param in parameters().items() if not path.startswith("extensions/image/")}
    with pytest.raises(MoextendError, match="extension"):
        split(plain, tiny.STAGES["finetune"])


def test_programs_of_models_run_through_the_door_alone():
    """A bare `jax.jit` of a model runs outside `jax.set_mesh`, where kernels for several chips cannot be lowered."""
    package = Path(sharding.__file__).parent
    bare = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if "jax.jit" in path.read_text()}
    no_model = {"bench.py", "doctor.py", "generate.py"}  # random leaves, one layer, room for keys and values
    assert bare == {"mesh.py", "models/moextend.py", *no_model}  # the second in a docstring
    entered = {path.name for path in package.rglob("*.py") if "jax.set_mesh(" in path.read_text()}
    assert entered == {"mesh.py"}
