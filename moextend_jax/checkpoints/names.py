"""TABLE of names: our path <-> tensor name in a file <-> einops layout of one tensor, file side first.

Import reads a row left to right, export right to left with the layout's sides swapped. Braces stand for stacked
axes: "{Z}" counts the decoder's layers that route, "{z}" the dense ones before them, "{Y}" extended layers (numbers in
files are those among all layers), "{E}" pretrained experts, "{X}" new experts (numbered on from E), "{U}" layers of a
tower.

Published files know one medium, pictures, called "image" in the rows, and layout released one extension, called so
too. Leaves of others take the same rows: `row_of`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx

from moextend_jax.config import (
    IMAGE,
    RIVALS,
    AdapterConfig,
    BlocksConfig,
    CalibratorName,
    DecoderConfig,
    ExtensionConfig,
    FeaturesConfig,
    Medium,
    ModelConfig,
    MoextendError,
    ProjectorConfig,
    StartName,
    TowerConfig,
    VisionConfig,
    WhisperConfig,
)
from moextend_jax.families import FAMILIES
from moextend_jax.families.family import Name
from moextend_jax.families.towers import TOWERS
from moextend_jax.models.adapters import Adapter
from moextend_jax.models.blocks import make_blocks
from moextend_jax.models.decoder import Decoder, Extension
from moextend_jax.models.projectors import GROUPS, make_projector, sizes
from moextend_jax.models.starts import STARTS
from moextend_jax.models.vision import VisionTower
from moextend_jax.models.whisper import sizes_of
from moextend_jax.parameters import by_path


class Tensor(NamedTuple):
    """One tensor of a file: its name, and where in which of our stacked arrays it belongs."""

    file: str
    path: str
    index: tuple[int, ...]
    layout: str


_EXTENDED = "model.layers.{Y}.block_sparse_moe."
EXTENSION = tuple(
    Name(f"extensions/{IMAGE}/{ours}", _EXTENDED + theirs, layout)
    for ours, theirs, layout in (
        ("router/new_gate", "gate_vision.weight", "X D -> D X"),
        ("router/new_gate_bias", "gate_vision.bias", "X -> X"),
        ("router/new_bias", "gate_vision.selection", "X -> X"),
        ("router/offset", "gate_vision.offset", "X -> X"),
        ("router/calibrator/w_in", "weight_scale.weight_scale.0.weight", "A O -> O A"),
        ("router/calibrator/w_out", "weight_scale.weight_scale.2.weight", "O A -> A O"),
        ("router/calibrator/vector", "weight_scale.weight_scale.vector", "O -> O"),
        ("new_experts/w_gate", "experts.{X}.w1.weight", "f D -> D f"),
        ("new_experts/w_up", "experts.{X}.w3.weight", "f D -> D f"),
        ("new_experts/w_down", "experts.{X}.w2.weight", "D f -> f D"),
        ("new_experts/b_gate", "experts.{X}.w1.bias", "f -> f"),
        ("new_experts/b_up", "experts.{X}.w3.bias", "f -> f"),
        ("new_experts/b_down", "experts.{X}.w2.bias", "D -> D"),
    )
)


def _projector(first: str, second: str) -> tuple[Name, ...]:
    return (
        Name("media/image/projector/first", first + ".weight", "d C -> C d"),
        Name("media/image/projector/first_bias", first + ".bias", "d -> d"),
        Name("media/image/projector/second", second + ".weight", "D d -> d D"),
        Name("media/image/projector/second_bias", second + ".bias", "D -> D"),
    )


_ENCODER = "layers.{U}."
WHISPER = (
    Name("first", "conv1.weight", "C b w -> w b C"),
    Name("first_bias", "conv1.bias", "C -> C"),
    Name("second", "conv2.weight", "C c w -> w c C"),
    Name("second_bias", "conv2.bias", "C -> C"),
    Name("position", "embed_positions.weight", "P C -> P C"),
    Name("layers/attention_norm/scale", _ENCODER + "self_attn_layer_norm.weight", "C -> C"),
    Name("layers/attention_norm/bias", _ENCODER + "self_attn_layer_norm.bias", "C -> C"),
    Name("layers/attention/query", _ENCODER + "self_attn.q_proj.weight", "(N H) C -> C N H"),
    Name("layers/attention/query_bias", _ENCODER + "self_attn.q_proj.bias", "(N H) -> N H"),
    Name("layers/attention/key", _ENCODER + "self_attn.k_proj.weight", "(N H) C -> C N H"),
    Name("layers/attention/value", _ENCODER + "self_attn.v_proj.weight", "(N H) C -> C N H"),
    Name("layers/attention/value_bias", _ENCODER + "self_attn.v_proj.bias", "(N H) -> N H"),
    Name("layers/attention/out", _ENCODER + "self_attn.out_proj.weight", "C (N H) -> N H C"),
    Name("layers/attention/out_bias", _ENCODER + "self_attn.out_proj.bias", "C -> C"),
    Name("layers/mlp_norm/scale", _ENCODER + "final_layer_norm.weight", "C -> C"),
    Name("layers/mlp_norm/bias", _ENCODER + "final_layer_norm.bias", "C -> C"),
    Name("layers/mlp/up", _ENCODER + "fc1.weight", "J C -> C J"),
    Name("layers/mlp/up_bias", _ENCODER + "fc1.bias", "J -> J"),
    Name("layers/mlp/down", _ENCODER + "fc2.weight", "C J -> J C"),
    Name("layers/mlp/down_bias", _ENCODER + "fc2.bias", "C -> C"),
    Name("post_norm/scale", "layer_norm.weight", "C -> C"),
    Name("post_norm/bias", "layer_norm.bias", "C -> C"),
)
"""Whisper's encoder: path inside the tower <-> tensor of Hugging Face's encoder."""


TABLES: dict[str, tuple[Name, ...]] = {
    **{name: family.names for name, family in FAMILIES.items()},
    **{name: tower.names for name, tower in TOWERS.items()},
    "llava": _projector("mm_projector.0", "mm_projector.2"),
    "llava_hf": _projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
}
"""File layouts of parts: Hugging Face's decoders and picture towers by family, LLaVA's projector in its own spelling
and in transformers'."""

IN_TRANSFORMERS = {
    "gate_vision.selection": "selection_bias", "gate_vision.offset": "offset", "gate_vision.weight": "gate.weight",
    "gate_vision.bias": "gate.bias", "weight_scale.weight_scale.": "calibrator.", "experts.": "ffn.",
}  # fmt: skip
"""How names of an extension begin in a block of experts, in released checkpoints -> in one of the `extensions` of a
block of assets/hf/modeling_moextend.py."""

TEXT = {"released": "", "transformers": "language_model."}
"""File layouts of whole models -> what they write before a decoder's names: the method's released checkpoints, and a
whole LLaVA of transformers."""


def rows(table: str, config: ModelConfig) -> tuple[Name, ...]:
    """Rows of a file layout, for a model of this configuration's families."""
    if table not in TEXT:
        return TABLES[table]
    tower = config.vision.family if config.vision else "clip"
    sounds = tuple(name for name, medium in config.media.items() if isinstance(medium.tower, WhisperConfig))
    return _whole(table, config.decoder.family, tower, tuple(config.extensions), sounds)


@functools.cache
def _whole(
    table: str, family: str, tower: str, extensions: tuple[str, ...], sounds: tuple[str, ...]
) -> tuple[Name, ...]:
    decoder, pictures = FAMILIES[family].names, TOWERS[tower].names
    text = tuple(row._replace(file=TEXT[table] + row.file) for row in decoder)
    # Released files hold no sounds; a whole one of transformers is read by their names (`checkpoints/llava.py`).
    text += tuple(row for name in sounds for row in _heard(name))
    if table == "released":
        projector = _projector("model.visual.mm_projector.0", "model.visual.mm_projector.2")
        seen = (row._replace(file="model.visual.vision_tower." + row.file) for row in pictures)
        return (*text, *_extensions(extensions, _of_released), *projector, *seen)
    seen = (row._replace(file="vision_tower." + row.file) for row in pictures)
    block = next(row.file for row in text if row.path == "decoder/layers/moe/gate").split("{Z}.")[1].split(".")[0]
    return (*text, *_extensions(extensions, functools.partial(_of_transformers, block)), *TABLES["llava_hf"], *seen)


def _heard(name: str) -> Iterator[Name]:
    """Rows of a medium of sounds, as our class for transformers has them."""
    for row in WHISPER:
        yield row._replace(path=f"media/{name}/tower/{row.path}", file=f"audio_tower.{row.file}")
    for row in _projector("audio_projector.linear_1", "audio_projector.linear_2"):
        yield row._replace(path=row.path.replace(IMAGE, name, 1))


def _extensions(names: Iterable[str], called: Callable[[int, str], str]) -> Iterator[Name]:
    """Rows of EXTENSION for each of these extensions; `called` gives a file's name for the number of one, from what
    EXTENSION has behind the block."""
    for number, name in enumerate(names):
        for row in EXTENSION:
            path = row.path.replace(f"extensions/{IMAGE}/", f"extensions/{name}/")
            yield row._replace(path=path, file=called(number, row.file.removeprefix(_EXTENDED)))


def _of_released(number: int, theirs: str) -> str:
    """Such a checkpoint holds one. Further ones are called so when a folder of layout hf is read (`spelling`)."""
    return _EXTENDED + (f"extensions.{number}." if number else "") + theirs


def _of_transformers(block: str, number: int, theirs: str) -> str:
    """As our class for transformers has it."""
    begins = next(begins for begins in IN_TRANSFORMERS if theirs.startswith(begins))
    ours = IN_TRANSFORMERS[begins] + theirs.removeprefix(begins)
    return f"{TEXT['transformers']}model.layers.{{Y}}.{block}.extensions.{number}.{ours}"


PREFIXES = {"llava": "model.", "llava_hf": "model."}
"""What some files write before every name of a layout."""

IGNORED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Buffers that old files carry and nobody needs: they are computed from the configuration."""

BESIDE: dict[str, re.Pattern[str]] = {
    **{name: tower.beside for name, tower in TOWERS.items()},
    "llava": re.compile(r"(model\.)?(embed_tokens|layers|norm|vision_tower)\..*|lm_head\.weight"),
    "llava_hf": re.compile(r"(model\.)?(language_model|vision_tower)\..*|lm_head\.weight"),
}
"""Tensors of the whole model that a part was taken from: CLIP's text half, a LLaVA's decoder and tower."""


def beside(table: str, config: ModelConfig) -> re.Pattern[str] | None:
    """Tensors that files of a layout may hold besides."""
    if table in FAMILIES and (pattern := FAMILIES[table].beside):
        return re.compile(pattern.replace("LAYERS", str(config.decoder.layers)))
    return BESIDE.get(table)


def _inside(rows: Iterable[Name], part: str = "") -> dict[str, Name]:
    return {row.path.removeprefix(part): row for row in rows}


_DECODERS = {name: _inside(family.names) for name, family in FAMILIES.items()}
_EXTENSION = _inside(EXTENSION, f"extensions/{IMAGE}/")
_TOWERS = {name: _inside(tower.names, f"media/{IMAGE}/tower/") for name, tower in TOWERS.items()}
_OTHERS: dict[type[TowerConfig], dict[str, Name]] = {WhisperConfig: _inside(WHISPER), FeaturesConfig: {}}
_LINEAR = _inside(TABLES["llava"], f"media/{IMAGE}/projector/")
"""Rows by path inside the part: `row_of` finds them whatever a medium or an extension is called."""


def row_of(path: str, config: ModelConfig) -> Name | None:
    """The row of one of our leaves; None: a model of this configuration has no such leaf."""
    kind, _, inside = path.partition("/")
    name, _, inside = inside.partition("/")
    if _is_ours(path, config):
        axes, stacked = _own_axes(path, config), kind in RIVALS
        kept = " ".join(list(axes or ())[stacked:])
        return None if axes is None else Name(path, path + ".{Z}" * stacked, f"{kept} -> {kept}")
    rows, leaf = _DECODERS[config.decoder.family], path
    if kind == "extensions":
        rows, leaf = _EXTENSION if name in config.extensions else {}, inside
        added = config.extensions.get(name)
        if added is not None and leaf not in _leaves_of_extension(config.decoder, added.start, added.calibrator):
            return None
    elif kind == "media":
        part, _, leaf = inside.partition("/")
        rows = _rows_of_medium(config.media[name], part) if name in config.media else {}
    if leaf not in rows or (kind == "decoder" and path not in _leaves(config.decoder)):
        return None
    return rows[leaf]._replace(path=path)


@functools.cache
def _leaves(decoder: DecoderConfig) -> frozenset[str]:
    """What a decoder has of its family's rows: sizes say whether there are biases, norms, dense layers, a head."""
    module = nnx.eval_shape(lambda: Decoder(decoder, rngs=nnx.Rngs(0), dtype="float32"))
    return frozenset(f"decoder/{path}" for path in by_path(nnx.state(module, nnx.Param)))


@functools.cache
def _leaves_of_extension(decoder: DecoderConfig, start: StartName, calibrator: CalibratorName) -> frozenset[str]:
    """The same of an extension: it has the biases that the decoder's experts and routers have, its start's leaf and
    those of its calibrator."""
    any_layer = ExtensionConfig(layers=(decoder.routed.start,), sources=(0,), start=start, calibrator=calibrator)
    module = nnx.eval_shape(lambda: Extension(decoder, any_layer, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    return frozenset(by_path(nnx.state(module, nnx.Param)))


def _is_ours(path: str, config: ModelConfig) -> bool:
    """Whether only our own files hold a leaf (of a rival, or of a projector that is not two linear maps). Then its row
    follows from the leaf itself."""
    kind, name, *rest = path.split("/")
    of_projector = kind == "media" and rest[:1] == ["projector"] and name in config.media
    return kind in RIVALS or (of_projector and config.media[name].projector.kind not in GROUPS)


def _own_axes(path: str, config: ModelConfig) -> dict[str, int] | None:
    """The letters of such a leaf's axes and their sizes; None: there is no such leaf."""
    kind, name, inside = path.split("/", 2)
    if kind in RIVALS:
        rival = getattr(config, kind).get(name)
        return _leaves_of_rival(config.decoder, rival).get(inside) if rival else None
    medium = config.media[name]
    leaves = _leaves_of_projector(medium.projector, medium.tower.sizes()["C"], config.decoder.width)
    return leaves.get(inside.removeprefix("projector/"))


@functools.cache
def _leaves_of_projector(projector: ProjectorConfig, width: int, decoder_width: int) -> dict[str, dict[str, int]]:
    options: Any = {"C": width, "P": 1, "D": decoder_width}
    return _axes_of(lambda rngs: make_projector(projector, **options, rngs=rngs, dtype="float32"))


@functools.cache
def _leaves_of_rival(decoder: DecoderConfig, rival: AdapterConfig | BlocksConfig) -> dict[str, dict[str, int]]:
    make: Any = make_blocks if isinstance(rival, BlocksConfig) else Adapter
    return _axes_of(lambda rngs: make(decoder, rival, rngs=rngs, dtype="float32"))


def _axes_of(make: Callable[[nnx.Rngs], Any]) -> dict[str, dict[str, int]]:
    """By path inside a module the letters of a leaf's axes and their sizes."""
    leaves = by_path(nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param))
    return {path: dict(zip(param.axes, param.shape, strict=True)) for path, param in leaves.items()}


def _rows_of_medium(medium: Medium, part: str) -> dict[str, Name]:
    tower = medium.tower
    of_tower = _rows_of_pictures(tower) if isinstance(tower, VisionConfig) else _OTHERS[type(tower)]
    return {"tower": of_tower, "projector": _LINEAR}.get(part, {})


@functools.cache
def _rows_of_pictures(tower: VisionConfig) -> dict[str, Name]:
    """What a tower has of its family's rows: its layers have an MLP or a SwiGLU."""
    module = nnx.eval_shape(lambda: VisionTower(tower, rngs=nnx.Rngs(0), dtype="float32"))
    leaves = by_path(nnx.state(module, nnx.Param))
    return {path: row for path, row in _TOWERS[tower.family].items() if path in leaves}


class Published(NamedTuple):
    """What programs that read a layout of whole models compute."""

    families: tuple[str, ...]
    towers: tuple[str, ...]
    starts: tuple[str, ...]
    ours: bool
    """Whether our own code computes it: sounds, and extensions of any number, name, width and share, by either
    composition."""


PUBLISHED = {
    "released": Published(families=("mixtral",), towers=("clip",), starts=("copy",), ours=False),
    # LLaVA takes one position before the patches away, or none.
    "hf": Published(families=tuple(FAMILIES), towers=("clip", "siglip", "dinov2"), starts=tuple(STARTS), ours=True),
}


def check_published(paths: Iterable[str], config: ModelConfig, *, layout: str) -> None:
    """Published layouts of whole models hold pictures behind two linear maps, and extensions for these or for text; hf
    also one medium of sounds behind Whisper's encoder.

    Args:
      layout: of parts, or a row of PUBLISHED.

    Raises:
      MoextendError: the model has leaves that such a layout cannot hold.
    """
    parts = dict.fromkeys(tuple(path.split("/")[:2]) for path in paths if not path.startswith("decoder/"))
    known = PUBLISHED.get(layout, PUBLISHED["hf"]._replace(towers=tuple(TOWERS), ours=False))
    family = config.vision.family if config.vision else "clip"
    media = config.media.items() if known.ours else ()
    heard = [name for name, medium in media if ("media", name) in parts and not unheard(medium)][:1]
    others = [] if config.decoder.family in known.families else [f"a decoder of family {config.decoder.family}"]
    for kind, name in parts:
        if kind in RIVALS:
            others.append(f"{kind} {name}")
        elif kind == "media" and name in heard:
            continue
        elif kind == "media" and name != IMAGE:
            others.append(f"medium {name}" + (unheard(config.media[name]) or " too") * known.ours)
        elif name != IMAGE and not known.ours:
            others.append(f"extension {name}")
        elif kind == "media" and family not in known.towers:
            others.append(f"a tower of family {family}")
        elif kind == "media" and config.media[name].projector != ProjectorConfig():
            others.append(f"a projector of kind {config.media[name].projector.kind}")
        elif kind == "extensions":
            added = config.extensions[name]
            others += [f"extension {name} for the medium {added.medium}"] * (added.medium not in (IMAGE, "", *heard))
            others += [f"a share of {added.share} of extension {name}"] * (added.share != 1 and not known.ours)
            others += [f"the start {added.start!r} of extension {name}"] * (added.start not in known.starts)
            others += [f"the calibrator {added.calibrator!r} of extension {name}"] * (added.calibrator != "two_layers")
            others += [f"experts {added.wide} times as wide in extension {name}"] * (added.wide != 1 and not known.ours)
    composed = config.extensions and config.media and config.composition != "shared"
    if layout in PUBLISHED and composed and not known.ours:
        others.append(f"the composition {config.composition!r} of extensions")
    if others:
        rest = f", and one extension called {IMAGE}"
        if known.ours:
            rest = (
                ", one medium of sounds behind Whisper's encoder and a projector of kind linear, pool or stack, and "
                "extensions for these or for text"
            )
        raise MoextendError(
            f"layout {layout} holds a decoder of family {' or '.join(known.families)}, pictures behind a tower of "
            f"family {' or '.join(known.towers)} and two linear maps{rest}, and this model "
            f"has {', '.join(others)}: export it with --layout delta, which `moextend compose` puts back onto its base"
        )


def unheard(medium: Medium) -> str:
    """Why layout hf does not hold a medium beside pictures; "" for sounds that it does."""
    if not isinstance(medium.tower, WhisperConfig):
        return f" of kind {medium.kind}" + " behind a picture tower" * (medium.kind == "audio")
    kind = medium.projector.kind
    return "" if kind in ("linear", "pool", "stack") else f" with a projector of kind {kind}"


def tensors(table: str, config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor that a file of layout `table` must hold for a model of this configuration."""
    for name in rows(table, config):
        if row_of(name.path, config) is None:
            continue
        counters = stacked(name.file)
        counts = [list(numbers(letter, name.path, config)) for letter in counters]
        for index in itertools.product(*(range(len(count)) for count in counts)):
            at = {letter: counts[axis][index[axis]] for axis, letter in enumerate(counters)}
            yield Tensor(name.file.format(**at), name.path, index, name.layout)


def count(row: Name, config: ModelConfig) -> int:
    """How many tensors a row stands for in a file, before any of their names is made."""
    return 0 if row_of(row.path, config) is None else math.prod(stack(row, config))


def stack(row: Name, config: ModelConfig) -> tuple[int, ...]:
    """Sizes of the stacked axes of a row's file name."""
    sizes = letters(row.path, config)
    return tuple(sizes[letter] for letter in stacked(row.file))


def stacked(file: str) -> list[str]:
    """Letters of the stacked axes in a row's file name, in order."""
    return re.findall(r"{(\w)}", file)


def inverse(layout: str) -> str:
    left, right = layout.split(" -> ")
    return f"{right} -> {left}"


def axis_sizes(layout: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes einops needs for the grouped axes of a layout."""
    grouped = " ".join(re.findall(r"\(([^)]*)\)", layout)).split()
    return {letter: sizes[letter] for letter in grouped if letter in sizes}


def letters(path: str, config: ModelConfig) -> dict[str, int]:
    """Sizes of every letter that a layout of this path uses: N and H mean other heads in a tower."""
    kind, name, part = (*path.split("/", 3), "")[:3]
    if kind == "extensions":
        return config.sizes(name)
    if _is_ours(path, config):
        return _own_axes(path, config) or {}
    if kind != "media":
        return {**config.sizes(), "1": 1, "h": config.decoder.head_size // 2, "t": 2}  # a head's halves, or neighbours
    medium, tower = config.media[name], config.media[name].tower
    if part == "projector":
        return sizes(medium.projector, C=tower.sizes()["C"], D=config.decoder.width)
    if isinstance(tower, WhisperConfig):
        return sizes_of(tower)
    patch = tower.patch_size if isinstance(tower, VisionConfig) else 0
    return {**tower.sizes(), "h": patch, "w": patch, "c": 3, "1": 1}


def groups(side: str) -> list[list[str]]:
    """Letters of each axis of one side of a layout: [["N", "H"], ["D"]] of "(N H) D"."""
    return [(group or letter).split() for group, letter in re.findall(r"\(([^)]*)\)|(\w)", side)]


def shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one side of a layout, e.g. "(N H) D"."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups(side))


def numbers(letter: str, path: str, config: ModelConfig) -> Iterable[int]:
    """What a stacked axis of a leaf counts in file names, e.g. the extended layers' numbers for "Y"."""
    _, name, *_ = path.split("/")
    if letter == "Y":
        return config.extensions[name].layers
    if letter == "Z":
        return config.decoder.routed
    return config.columns(name) if letter == "X" else range(letters(path, config)[letter])
