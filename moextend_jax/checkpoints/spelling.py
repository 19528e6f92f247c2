"""Names that other programs give the tensors of the same models -> the names of `names.TABLES`; no tensor is read.

In: `Stored` tensors by the name that stands in a file. Out: the same bytes by the published names, with what was done
about it in a sentence. Experts that lie fused in one tensor come out one by one, each a byte range of it. A file that
mixes two spellings of a thing is left as it is, and so refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from moextend_jax.checkpoints.names import IN_TRANSFORMERS
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import MoextendError
from moextend_jax.families import FAMILIES

WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.", "base_model.model.")
"""What torch.compile, DistributedDataParallel, Lightning and DeepSpeed, FSDP and PEFT put before every name."""

_IN_A_MODEL = ("model.model.", "model.lm_head.", "model.language_model.model.")
"""Names that show that the `model.` before all names is a wrapper's: the model is a field of another module."""

_ADAPTER = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\..*")


class Spelling(NamedTuple):
    """Names that match `theirs` become `ours`, unless there are names that match `already`."""

    theirs: str
    ours: str
    already: str


_LAYER = r"(model\.layers\.\d{1,9})\."
_BLOCK = r".*\.block_sparse_moe\..*"
_OTHER_FAMILY = r".*\.mlp\.experts\.\d{1,9}\..*"
_GATE = r"block_sparse_moe\.gate\."
_RELEASED = r".*\.(gate_vision|weight_scale)\..*"
_GRANITE = r".*\.block_sparse_moe\.(input_linear|output_linear|router\.layer)\..*"
_DINOV2 = r"(encoder\.layer\.\d{1,9}\.attention)\."
_DINOV2_PUBLISHED = r"encoder\.layer\.\d{1,9}\.attention\.(attention|output)\..*"
SPELLINGS = (
    # transformers 5 in memory: save_pretrained(save_original_format=False) and torch.save(model.state_dict())
    Spelling(_LAYER + r"mlp\.gate\.(.*)", r"\1.block_sparse_moe.gate.\2", rf"{_BLOCK}|{_OTHER_FAMILY}"),
    Spelling(_LAYER + r"mlp\.gate\.moe_statics\.(.*)", r"\1.mlp.moe_statics.\2", r".*\.mlp\.moe_statics\..*"),
    *(
        Spelling(rf"{_LAYER}block_sparse_moe\.{theirs}", rf"\1.block_sparse_moe.{ours}.weight", _GRANITE)
        for theirs, ours in (
            (r"experts\.gate_up_proj", "input_linear"),
            (r"experts\.down_proj", "output_linear"),
            (r"router\.weight", "router.layer"),
        )
    ),
    *(
        Spelling(rf"{_DINOV2}{theirs}_proj\.(.*)", rf"\1.{ours}.\2", _DINOV2_PUBLISHED)
        for theirs, ours in (
            ("q", "attention.query"),
            ("k", "attention.key"),
            ("v", "attention.value"),
            ("o", "output.dense"),
        )
    ),
    # our own modeling_moextend.py; earlier versions knew one extension, called `extension`
    *(
        Spelling(
            rf"{_LAYER}(?:mlp|block_sparse_moe)\.{number}\.{re.escape(ours)}(?P<rest>.*)",
            rf"\1.block_sparse_moe.{further}{theirs}\g<rest>",
            r"(?!)",  # these names are nobody else's
        )
        for number, further in ((r"extension(?:s\.0)?", ""), (r"(extensions\.[1-9]\d{0,3})", r"\2."))
        for theirs, ours in IN_TRANSFORMERS.items()
    ),
    # the same until version 0.1, whose experts were the pretrained ones' neighbours
    Spelling(_LAYER + _GATE + r"new\.weight", r"\1.block_sparse_moe.gate_vision.weight", _RELEASED),
    Spelling(
        _LAYER + _GATE + r"calibrator(\.[02]\.weight)", r"\1.block_sparse_moe.weight_scale.weight_scale\2", _RELEASED
    ),
    # transformers 5's CLIPVisionModel and SiglipVisionModel, in whatever way they are saved
    Spelling(
        r"((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..*)",
        r"vision_model.\1",
        r"(vision|text)_model\..*|embeddings\.cls_token",  # a DINOv2's names begin so as they are published
    ),
)

_FUSED = re.compile(r"model\.layers\.(\d{1,9})\.mlp\.experts\.(gate_up_proj|down_proj)")
MOST_EXPERTS = 4096
"""Most experts of a layer that a fused tensor is split into."""


def unwrapped(stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The tensors without a prefix that all their names share and that only says who held the model.

    Raises:
      MoextendError: they are an adapter's, which changes a model and is none.
    """
    prefix, tensors = "", dict(stored)
    while wrapper := _wrapper(tensors):
        prefix += wrapper
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if adapter := next((name for name in tensors if _ADAPTER.fullmatch("." + name)), None):
        raise MoextendError(
            f"{tensors[adapter].where} holds a PEFT adapter ({adapter}), which is no model: merge it into its base "
            "(`merge_and_unload()`, then `save_pretrained`) and give that folder"
        )
    return tensors, [f"read without {prefix!r}, which stands before all of its names"] if prefix else []


def _wrapper(tensors: Mapping[str, Stored]) -> str | None:
    candidates = (*WRAPPERS, *(["model."] if any(name.startswith(_IN_A_MODEL) for name in tensors) else []))
    return next((w for w in candidates if tensors and all(name.startswith(w) for name in tensors)), None)


def published(stored: Mapping[str, Stored], family: str = "mixtral") -> tuple[dict[str, Stored], list[str]]:
    """A decoder's and a vision model's tensors by their published names, however transformers 5 has saved them.

    Args:
      family: of the decoder, which says what its experts are called; one whose published files fuse them is left alone.
    """
    rows = {row.path.rpartition("/")[2]: row.file for row in FAMILIES[family].names if "/moe/experts/" in row.path}
    own_block = ".mlp." in rows["w_gate"]  # transformers 5 names all families' so
    tensors = respelled(stored, SPELLINGS[1:] if own_block else SPELLINGS)
    if "[" in rows["w_gate"]:
        return tensors, []
    fused = {name: match for name in tensors if (match := _FUSED.fullmatch(name)) and _divides(name, tensors[name])}
    other = "its names are those of transformers 5 or of modeling_moextend.py; they were read as the published ones"
    notes = [other] if tensors.keys() != stored.keys() else []
    if not fused or any(re.fullmatch(f"{_BLOCK}|{_OTHER_FAMILY}", name) and ".experts." in name for name in stored):
        return tensors, notes
    split = {name: tensor for name, tensor in tensors.items() if name not in fused}
    for name, match in fused.items():
        for expert, matrix, tensor in _experts(tensors[name], down=match[2] == "down_proj"):
            split[rows[matrix].format(Z=match[1], E=expert)] = tensor
    return split, [*notes, f"its experts lie fused in {len(fused)} tensors; they were read one by one"]


def respelled(stored: Mapping[str, Stored], spellings: tuple[Spelling, ...]) -> dict[str, Stored]:
    """The tensors with each spelling's names changed, in order."""
    tensors = dict(stored)
    names = tuple(stored)
    for theirs, ours, already in spellings:
        if not any(re.fullmatch(already, name) for name in names):
            renamed = {re.sub(f"^{theirs}$", ours, name): tensor for name, tensor in tensors.items()}
            tensors = renamed if len(renamed) == len(tensors) else tensors
    return tensors


def _divides(name: str, tensor: Stored) -> bool:
    halves = 2 if name.endswith("gate_up_proj") else 1
    return len(tensor.shape) == 3 and 0 < tensor.shape[0] <= MOST_EXPERTS and tensor.shape[1] % halves == 0


def _experts(fused: Stored, *, down: bool) -> list[tuple[int, str, Stored]]:
    """(expert, matrix, its tensor) of `[E, 2F, D]`, gate above up, or of `[E, D, F]`."""
    matrices = ("w_down",) if down else ("w_gate", "w_up")
    rows = fused.shape[1] // len(matrices)
    return [
        (expert, matrix, fused.part((expert,), slice(nth * rows, (nth + 1) * rows)))
        for expert in range(fused.shape[0])
        for nth, matrix in enumerate(matrices)
    ]
