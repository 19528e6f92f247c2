"""What a row of the table of families holds. No code asks which family a model is of: it reads these, or the fields of
`DecoderConfig` that they turn on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from moextend_jax.families.attributes import Table


class Name(NamedTuple):
    """Our path, the tensor's name in a file, and the einops layout of one tensor, file side first
    (`checkpoints/names.py` says what the braces count)."""

    path: str
    file: str
    layout: str


class Fused(NamedTuple):
    """A tensor `[E, ...]` that holds several of `names` for every expert: one part above the other along its second
    axis, or, `interleaved`, an element of each in turn along its last.

    Its parts are tensors of the name `parted` to all else, as if they stood in the file one by one. packed: published
    files may hold it in four bits (`checkpoints/mxfp4.py`)."""

    file: str
    parts: tuple[str, ...]
    interleaved: bool = False
    packed: bool = False


def parted(file: str, part: str) -> str:
    """What a part of a fused tensor is called."""
    return f"{file}[{{E}} {part}]"


class Family(NamedTuple):
    """A published family of decoders.

    architecture: transformers' class. names: of its tensors. attributes: how its config.json is read.
    fields: of `DecoderConfig`, what all of its models have and no attribute says.
    constants: attributes that are written besides those of `attributes`, and never read as sizes.
    published: sizes of its models by name, fields of `DecoderConfig` besides `fields`.
    fused: tensors that hold several of `names`.
    defaults: what transformers takes where a config.json inside a LLaVA's is silent.
    beside: pattern of tensors that published files hold besides; "LAYERS" in it is the number of layers.
    template: a row of `data.templates.FAMILIES`, for checkpoints without a chat template of their own; "": their tokens
    show it.
    refusal: of a config.json, what no table can say is wrong with it, or "".
    """

    architecture: str
    names: tuple[Name, ...]
    attributes: Table
    fields: Mapping[str, Any]
    constants: Mapping[str, Any]
    published: Mapping[str, Mapping[str, Any]]
    fused: tuple[Fused, ...] = ()
    defaults: Mapping[str, Any] = {}
    beside: str = ""
    template: str = ""
    refusal: Callable[[Mapping[str, Any]], str] = lambda attributes: ""


SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "num_experts_per_tok": "top_k",
    "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied_head", "head_dim": "head_size",
    "rope_scaling": "rope_scaling",
}  # fmt: skip
"""Attributes that every family has under these names."""


class Every(tuple[Any, ...]):
    """The allowed items of an attribute that is a list."""

    def __contains__(self, value: object) -> bool:
        return value is None or (isinstance(value, list) and all(super(Every, self).__contains__(v) for v in value))


PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (None, False), "attention_dropout": (0,),
    "partial_rotary_factor": (None, 1.0), "router_jitter_noise": (0,), "rope_interleaved": (None, False),
    "mlp_bias": (None, False), "test": (False,), "layer_types": Every(["full_attention"]),
}  # fmt: skip
"""What would change the computation, with the values that change nothing."""


def decoder(block: str, experts: str, *, gate: str = "gate.weight") -> tuple[Name, ...]:
    """Names that all families share, around those of the block of experts.

    Args:
      block: what a layer calls it. experts: what it calls the gate, up and down projections of an expert, joined by
        spaces. gate: what it calls the router.
    """
    layer, attention = "model.layers.{Z}.", "model.layers.{Z}.self_attn."
    w_gate, w_up, w_down = (f"{layer}{block}.experts.{{E}}.{name}.weight" for name in experts.split())
    return (
        Name("decoder/embed", "model.embed_tokens.weight", "V D -> V D"),
        Name("decoder/norm", "model.norm.weight", "D -> D"),
        Name("decoder/head", "lm_head.weight", "V D -> D V"),
        Name("decoder/layers/attention_norm", layer + "input_layernorm.weight", "D -> D"),
        Name("decoder/layers/attention/query", attention + "q_proj.weight", "(N H) D -> D N H"),
        Name("decoder/layers/attention/key", attention + "k_proj.weight", "(K H) D -> D K H"),
        Name("decoder/layers/attention/value", attention + "v_proj.weight", "(K H) D -> D K H"),
        Name("decoder/layers/attention/out", attention + "o_proj.weight", "D (N H) -> N H D"),
        Name("decoder/layers/moe_norm", layer + "post_attention_layernorm.weight", "D -> D"),
        Name("decoder/layers/moe/gate", f"{layer}{block}.{gate}", "E D -> D E"),
        Name("decoder/layers/moe/experts/w_gate", w_gate, "F D -> D F"),
        Name("decoder/layers/moe/experts/w_up", w_up, "F D -> D F"),
        Name("decoder/layers/moe/experts/w_down", w_down, "D F -> F D"),
    )


BIASES = (
    Name("decoder/layers/attention/query_bias", "model.layers.{Z}.self_attn.q_proj.bias", "(N H) -> N H"),
    Name("decoder/layers/attention/key_bias", "model.layers.{Z}.self_attn.k_proj.bias", "(K H) -> K H"),
    Name("decoder/layers/attention/value_bias", "model.layers.{Z}.self_attn.v_proj.bias", "(K H) -> K H"),
)


def shared_expert(block: str, *, stack: str = "layers", counter: str = "Z", width: str = "s") -> tuple[Name, ...]:
    """Names of an expert that every token passes."""
    inside, ours = f"model.layers.{{{counter}}}.{block}.", f"decoder/{stack}/shared/"
    return (
        Name(ours + "w_gate", inside + "gate_proj.weight", f"{width} D -> D {width}"),
        Name(ours + "w_up", inside + "up_proj.weight", f"{width} D -> D {width}"),
        Name(ours + "w_down", inside + "down_proj.weight", f"D {width} -> {width} D"),
    )


def dense(names: Iterable[Name]) -> tuple[Name, ...]:
    """Names of the layers before those that route: of their attention and norms as in `names`, of their only expert
    as in the `mlp` of a dense model."""
    layers, ours = "decoder/layers/", "decoder/dense/"
    alike = (name for name in names if name.path.startswith(layers) and "/moe/" not in name.path)
    return (
        *(Name(name.path.replace(layers, ours), name.file.replace("{Z}", "{z}"), name.layout) for name in alike),
        *shared_expert("mlp", stack="dense", counter="z", width="j"),
    )


def neighbours_turned(names: Iterable[Name]) -> tuple[Name, ...]:
    """Where positions turn pairs of neighbours (2i, 2i + 1) of a head, here they turn (i, i + H/2): rows of queries and
    keys are put in that order."""
    turned = {"query": "(N h t) D -> D N (t h)", "key": "(K h t) D -> D K (t h)"}
    return tuple(name._replace(layout=turned.get(name.path.rpartition("/")[2], name.layout)) for name in names)


def normed_heads(query: str, key: str) -> tuple[Name, ...]:
    """Scales of the norms of queries and keys, by their layouts."""
    return (
        Name("decoder/layers/attention/query_norm", "model.layers.{Z}.self_attn.q_norm.weight", query),
        Name("decoder/layers/attention/key_norm", "model.layers.{Z}.self_attn.k_norm.weight", key),
    )
