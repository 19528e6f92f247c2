"""PEFT's files of LoRA, in and out: adapter_config.json, and adapter_model.safetensors with the factors of every map
under the name of its weight (`...q_proj.lora_A.weight` [r, in], `lora_B` [out, r]).

Experts have names of their own, as in published files and in PEFT on transformers 4 (`experts.0.w1`); PEFT on
transformers 5 reads these too. What it writes itself of fused experts (`target_parameters`) is read: their lora_A has
rows (E r), their lora_B columns (r E), and gate and up share one A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import einops
import numpy as np

from moextend_jax.checkpoints import leaves, names
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.leaves import Leaf
from moextend_jax.checkpoints.tensors import Planned, Stored, name_list, open_tensors
from moextend_jax.config import AdapterConfig, DecoderConfig, ModelConfig, MoextendError, Named
from moextend_jax.outside import shown

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

WEIGHTS = {
    **{f"attention/{name}": f"decoder/layers/attention/{name}" for name in ("query", "key", "value", "out")},
    **{f"block/{name}": f"decoder/layers/moe/experts/w_{name}" for name in ("gate", "up", "down")},
    "block/router": "decoder/layers/moe/gate",
}
"""TABLE from an adapter's maps to the weights that they stand beside."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layer_replication": (None,), "trainable_token_indices": (None,),
    "use_qalora": (False, None), "use_bdlora": (None, False), "alora_invocation_tokens": (None,),
    "use_rslora": (False, True, None), "kasa_config": (None,), "arrow_config": (None,), "monteclora_config": (None,),
    "velora_config": (None,), "corda_config": (None,), "loftq_config": ({}, None), "lora_ga_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian"),
}  # fmt: skip
"""Settings of PEFT that change what is computed, or the base (PiSSA and OLoRA take their start out of its weights),
with the values that are read here."""


class Factor(NamedTuple):
    """A tensor of a file: its name, the adapter's leaf and the piece of it by layer and expert, and the layout."""

    name: str
    leaf: str
    index: tuple[int, ...]
    layout: str
    """Of the file, then ours: "r D -> D r"."""

    @property
    def part(self) -> str:
        """The map, a key of WEIGHTS."""
        return self.leaf.rpartition("/")[0]

    def shape(self, decoder: DecoderConfig, *, rank: int) -> tuple[int, ...]:
        """In the file."""
        return names.shape(self.layout.split(" -> ")[0], {**_letters(self.part, decoder), "r": rank})

    def rearranged(self, array: np.ndarray, layout: str, decoder: DecoderConfig) -> np.ndarray:
        """`layout` is its own, or the inverse."""
        return einops.rearrange(array, layout, **names.axis_sizes(layout, _letters(self.part, decoder)))


def factors(adapter: AdapterConfig, decoder: DecoderConfig) -> Iterator[Factor]:
    """All tensors in the files of such an adapter. Experts that share factors each have a copy there.

    Raises:
      MoextendError: the family's files fuse experts, which then have no names of their own.
    """
    config = ModelConfig(decoder=decoder)
    for part, path in WEIGHTS.items():
        if not _has(adapter, part) or (row := names.row_of(path, config)) is None:
            continue
        expert = part in ("block/gate", "block/up", "block/down")
        if expert and "{E}" not in row.file:
            raise MoextendError(
                f"files of family {decoder.family} hold all experts of a layer in one tensor, {row.file}, so that PEFT "
                "has no names for LoRA of an expert: --layout delta holds it"
            )
        of_a, of_b = _layouts(row.layout)
        for z, layer in enumerate(decoder.routed):
            for e in range(decoder.experts) if expert else (0,):
                stem = PREFIX + row.file.format(Z=layer, E=e).removesuffix(".weight")
                index = (z, e) if expert and adapter.experts == "per_expert" else (z,)
                yield Factor(f"{stem}.lora_A.weight", f"{part}/a", index, of_a)
                yield Factor(f"{stem}.lora_B.weight", f"{part}/b", index, of_b)


def _has(adapter: AdapterConfig, part: str) -> bool:
    if part.startswith("attention/"):
        return adapter.attention
    return adapter.router if part == "block/router" else adapter.of_experts


def _layouts(weight: str) -> tuple[str, str]:
    """Of A and B beside a weight, e.g. of "(N H) D -> D N H": "r D -> D r", "(N H) r -> r N H"."""
    left, right = weight.split(" -> ")
    outputs, inputs = re.findall(r"\([^)]*\)|\w", left)
    ours = re.findall(r"\([^)]*\)|\w", right)
    ours_in = [letter for letter in ours if set(re.findall(r"\w", letter)) <= set(re.findall(r"\w", inputs))]
    ours_out = [letter for letter in ours if letter not in ours_in]
    return f"r {inputs} -> {' '.join(ours_in)} r", f"{outputs} r -> r {' '.join(ours_out)}"


def _letters(part: str, decoder: DecoderConfig) -> dict[str, int]:
    return names.letters(WEIGHTS[part], ModelConfig(decoder=decoder))


# --- out --------------------------------------------------------------------------------------------------------------


def planned(
    own: Mapping[str, Leaf], adapter: AdapterConfig, decoder: DecoderConfig
) -> tuple[dict[str, Planned], dict[str, Any]]:
    """Tensors and adapter_config.json of a LoRA whose leaves these are, by path inside it.

    Raises:
      MoextendError: PEFT has no such method, or no names for its experts.
    """
    if adapter.method != "lora" or adapter.tokens != "all":
        raise MoextendError(f"layout peft holds LoRA; {adapter.method} has no place in it: --layout delta holds it")
    tensors, modules = {}, {}
    for factor in factors(adapter, decoder):
        leaf = own[factor.leaf]

        def pieces(leaf: Leaf = leaf, factor: Factor = factor) -> list[np.ndarray]:
            ours = leaf.ours(factor.index[:1])[factor.index[1:]]
            return [np.ascontiguousarray(factor.rearranged(ours, names.inverse(factor.layout), decoder))]

        tensors[factor.name] = Planned(factor.shape(decoder, rank=adapter.rank), leaf.dtype, pieces)
        modules[factor.name.rsplit(".", 3)[1]] = None
    attributes = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": adapter.rank,
        "lora_alpha": adapter.alpha * adapter.share, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "use_rslora": False, "use_dora": False, "target_modules": [*modules],
    }  # fmt: skip
    return tensors, attributes


# --- in ---------------------------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


class Opened(NamedTuple):
    """An adapter of files: what it is, its leaves by path, and lines on what was read otherwise."""

    config: AdapterConfig
    leaves: dict[str, Leaf]
    notes: tuple[str, ...]


NAME = "lora"
"""What an adapter of files is called in a model."""


def open_peft(folder: Path, decoder: DecoderConfig) -> Opened:
    """A LoRA of such a decoder. Maps and layers that it leaves alone get factors of zero.

    Raises:
      MoextendError: it is no LoRA as it is computed here, or does not fit the decoder; names the setting or tensor.
    """
    at = folder / CONFIG
    attributes = read_json(at)
    for setting, values in MUST_BE.items():
        if attributes.get(setting, values[0]) not in values:
            raise MoextendError(f"{at}: {setting} = {shown(attributes[setting])} is not read (only {values[0]!r})")
    rank: Any = attributes.get("r")
    alpha: Any = attributes.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= 1 << 16 or type(alpha) not in (int, float) or not 0 < alpha < 1e30:
        raise MoextendError(f"{at}: r = {shown(rank)} and lora_alpha = {shown(alpha)} are no rank and alpha")
    scale = math.sqrt(rank) if attributes.get("use_rslora") else 1.0  # rsLoRA: alpha / sqrt(rank)
    stored = _split(open_tensors(folder / TENSORS), decoder, rank=rank, where=folder)
    rows = _rows(decoder)
    if unknown := [tensor for tensor in stored if tensor not in rows]:
        raise MoextendError(f"{folder}: {name_list(unknown)} belong to no map of this decoder that an adapter can have")
    present = {rows[tensor].part for tensor in stored}
    adapter = AdapterConfig(
        rank=rank, alpha=float(alpha) * scale, medium="", router="block/router" in present,
        attention=any(part.startswith("attention/") for part in present),
        experts="per_expert" if present & {"block/gate", "block/up", "block/down"} else "none",
    )  # fmt: skip
    wanted = [factor for factor in rows.values() if _has(adapter, factor.part)]
    absent = [factor.name for factor in wanted if factor.name not in stored]
    halves = [n for n in absent if n.replace("lora_A", "lora_B") in stored or n.replace("lora_B", "lora_A") in stored]
    if halves:
        raise MoextendError(f"{folder} lacks {name_list(halves)}, the other factors of maps that it adapts")
    config = ModelConfig(decoder=decoder, adapters=Named({NAME: adapter}))
    by_leaf: dict[str, dict[tuple[int, ...], Factor]] = {}
    for factor in wanted:
        by_leaf.setdefault(factor.leaf, {})[factor.index] = factor
    read = {
        f"adapters/{NAME}/{path}": _stacked(f"adapters/{NAME}/{path}", pieces, stored, config=config, where=folder)
        for path, pieces in by_leaf.items()
    }
    notes = (f"{len(absent) // 2} maps without an update have one of zero",) if absent else ()
    return Opened(adapter, read, notes)


def _rows(decoder: DecoderConfig) -> dict[str, Factor]:
    """Every factor that a LoRA of this decoder can have, by name."""
    everything = AdapterConfig(experts="per_expert", router=True)
    try:
        return {factor.name: factor for factor in factors(everything, decoder)}
    except MoextendError:  # its experts have no names
        rest = AdapterConfig(experts="none", router=True)
        return {factor.name: factor for factor in factors(rest, decoder)}


def _stacked(
    path: str, pieces: Mapping[tuple[int, ...], Factor], stored: Mapping[str, Stored], *, config: ModelConfig,
    where: Path,
) -> Leaf:  # fmt: skip
    """A leaf over the tensors of its layers, and experts; missing ones are zeros.

    Raises:
      MoextendError: a tensor has another shape.
    """
    letters = names.letters(path, config)
    shape = tuple(letters.values())
    there = {index: stored[factor.name] for index, factor in pieces.items() if factor.name in stored}
    expected = next(iter(pieces.values())).shape(config.decoder, rank=letters["r"])
    for index, tensor in there.items():
        if tensor.shape != expected or tensor.dtype not in leaves.FLOATS:
            raise MoextendError(
                f"{tensor.where}: {pieces[index].name} is {tensor.dtype}{list(tensor.shape)}, expected "
                f"{list(expected)}, floating point"
            )
    dtype = next(iter(there.values())).dtype if there else np.dtype(np.float32)

    def part_of(some: tuple[int, ...]) -> Stored:
        rest = len(some)

        def read() -> np.ndarray:
            made = np.zeros(shape[rest:], dtype)
            for index, tensor in there.items():
                if index[:rest] == some:
                    factor = pieces[index]
                    made[index[rest:]] = factor.rearranged(tensor.read(), factor.layout, config.decoder)
            return made

        return Stored(shape[rest:], dtype, read, str(where))

    return leaves.from_ours(path, part_of(())._replace(part_of=part_of), config=config)


FUSED = re.compile(
    rf"(?P<stem>{re.escape(PREFIX)}model\.layers\.(?P<layer>\d{{1,9}})\.\w+\.experts)(\.base_layer)?\.lora_A\.weight"
)
"""lora_A of a fused parameter: PEFT nests two of one module, in either order."""


def _split(tensors: Mapping[str, Stored], decoder: DecoderConfig, *, rank: int, where: Path) -> dict[str, Stored]:
    """The tensors with those of fused experts as if each expert had its own, and `mlp` called as in published files.

    Raises:
      MoextendError: a fused one fits neither gate and up nor down.
    """
    E, D, F = decoder.experts, decoder.width, decoder.hidden
    rows = {part: names.row_of(path, ModelConfig(decoder=decoder)) for part, path in WEIGHTS.items()}
    router = rows["block/router"]
    assert router is not None
    found: dict[str, Stored] = {}
    taken: set[str] = set()
    for name, a in tensors.items():
        if not (match := FUSED.fullmatch(name)):
            continue
        name_b = name.replace("lora_A", "lora_B")
        if (b := tensors.get(name_b)) is None:
            raise MoextendError(f"{where} lacks {name_b}, the other factor of {name}")
        shapes = {"down": ((E * rank, F), (D, rank * E)), "gate up": ((E * rank, D), (2 * F, rank * E))}
        parts = next((parts for parts, of in shapes.items() if (a.shape, b.shape) == of), None)
        if parts is None:
            raise MoextendError(
                f"{a.where}: {name} and its lora_B are {list(a.shape)} and {list(b.shape)}; of {E} experts of widths "
                f"{D} and {F} with rank {rank} they are {shapes['gate up']} or {shapes['down']}"
            )
        taken |= {name, name_b}
        for n, part in enumerate(parts.split()):
            row = rows[f"block/{part}"]
            if row is None or "{E}" not in row.file:
                raise MoextendError(f"{where}: LoRA of the experts of family {decoder.family} is not read")
            half = slice(n * F, (n + 1) * F) if len(parts.split()) > 1 else slice(None)
            for e in range(E):
                stem = PREFIX + row.file.format(Z=int(match["layer"]), E=e).removesuffix(".weight")
                found[f"{stem}.lora_A.weight"] = _cut(a, lambda of, e=e: of[e * rank : (e + 1) * rank])
                found[f"{stem}.lora_B.weight"] = _cut(b, lambda of, e=e, half=half: of[half, e::E])
    router_now = re.compile(rf"({re.escape(PREFIX)}model\.layers\.(\d{{1,9}}))\.mlp\.gate\.(lora_[AB]\.weight)")
    for name, tensor in tensors.items():
        if name in taken:
            continue
        if (match := router_now.fullmatch(name)) and "{E}" not in router.file:
            name = PREFIX + router.file.format(Z=int(match[2])).removesuffix("weight") + match[3]
        found[name] = tensor
    return found


def _cut(tensor: Stored, piece: Callable[[np.ndarray], np.ndarray]) -> Stored:
    shape = piece(np.broadcast_to(np.zeros((), bool), tensor.shape)).shape
    return Stored(shape, tensor.dtype, lambda: piece(tensor.read()), tensor.where)
