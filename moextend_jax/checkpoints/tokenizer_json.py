"""A SentencePiece model as the `tokenizer.json` that Hugging Face's tokenizers read, with the image tags as tokens.

In: a folder with `tokenizer.model`, the ids of the image tags. Out: the file's content and that of
`tokenizer_config.json`. Text gets the ids of `data.tokenizer`, always: a space goes before a text's beginning,
also where it begins with one (transformers' own conversion adds none there), and none after a token.

The tags are byte pieces or appended rows there; here they are tokens with names of their own, so that a chat template
can write them. As in every such file, a token that a text spells out ("</s>") is that token there; with
`sanitize_control_tokens=True`, `apply_chat_template` takes it for text.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from moextend_jax.config import ImageTags, MoextendError

SPACE = "▁"
TAG_NAMES = {"start": "<image_start>", "end": "<image_end>", "pad": "<image>"}
"""What the tags are called. `<image>` is what transformers' processor of LLaVA multiplies, and what our prompts say."""


def tokenizer_files(
    folder: Path, *, tags: ImageTags | None, legacy: bool = True, apart: str = ""
) -> dict[str, dict[str, Any]]:
    """`tokenizer.json` and `tokenizer_config.json` by name.

    Args:
      tags: of a model that sees; None leaves the vocabulary as it is.
      legacy: what tokenizer_config.json shall say there.
      apart: a text that is tokenised apart from what is before it, where a prompt has it so.

    Raises:
      MoextendError: the model is not of SentencePiece's BPE kind, or has pieces called like the tags.
    """
    where = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(where.read_bytes())
    except Exception as error:  # protobuf's own
        raise MoextendError(f"{where} cannot be read: {error}") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE or normalizer.remove_extra_whitespaces or not trainer.byte_fallback:
        raise MoextendError(
            f"{where}: only SentencePiece models of kind BPE that fall back to bytes and keep all spaces, as Mixtral's "
            "and Llama's are, can be written as tokenizer.json"
        )
    names = {id: piece.piece for id, piece in enumerate(model.pieces)}
    if tags is not None:
        named = {getattr(tags, tag): name for tag, name in TAG_NAMES.items()}
        if taken := set(named.values()) & {name for id, name in names.items() if id not in named}:
            raise MoextendError(f"{where} has pieces called {', '.join(sorted(map(str, taken)))}, like the image tags")
        names |= named
    control = {id for id, piece in enumerate(model.pieces) if piece.type in (piece.UNKNOWN, piece.CONTROL)}
    control |= {*tags.ids} if tags is not None else set()
    spelled = {id for id, piece in enumerate(model.pieces) if piece.type == piece.USER_DEFINED} - control
    bos, eos, unk = (names[id] for id in (trainer.bos_id, trainer.eos_id, trainer.unk_id))
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(id, names[id], special=id in control) for id in sorted(control | spelled)],
        "normalizer": _normalizer(normalizer),
        # The first makes the space before a text's beginning: no text begins with one here, as all of them have become
        # "▁". The second makes it a "▁". After a token that is spelled out neither does anything.
        "pre_tokenizer": _sequence(
            "pretokenizers",
            *([_metaspace(" ", "first")] if normalizer.add_dummy_prefix else []),
            _metaspace(SPACE, "never"),
            *([_split(apart.replace(" ", SPACE))] if apart else []),
        ),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                *({"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}),
                *({"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}),
            ],
            "special_tokens": {bos: {"id": bos, "ids": [trainer.bos_id], "tokens": [bos]}},
        },
        "decoder": _sequence(
            "decoders",
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: id for id, name in names.items()},
            "merges": _merges(model),
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False,
        "bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": unk, "padding_side": "left",
        "clean_up_tokenization_spaces": False, "legacy": legacy, "model_max_length": int(1e30),
    }  # fmt: skip
    if tags is not None:
        start, end, pad = TAG_NAMES.values()
        extra = {"image_start_token": start, "image_token": pad, "image_end_token": end}
        settings |= {"image_token": pad, "extra_special_tokens": extra}
    return {"tokenizer.json": content, "tokenizer_config.json": settings}


def _merges(model: Any) -> list[list[str]]:
    """Every way to put a piece together from two others; those of likely pieces first, as SentencePiece goes on."""
    normal = {piece.piece: (-piece.score, id) for id, piece in enumerate(model.pieces) if piece.type == piece.NORMAL}
    ways = []
    for name, (rank, _) in normal.items():
        for at in range(1, len(name)):
            left, right = name[:at], name[at:]
            if left in normal and right in normal:
                ways.append((rank, normal[left][1], normal[right][1], left, right))
    return [[left, right] for *_, left, right in sorted(ways)]


def _normalizer(spec: Any) -> dict[str, Any]:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not spec.precompiled_charsmap:
        return spaces
    table = base64.b64encode(spec.precompiled_charsmap).decode()
    return _sequence("normalizers", {"type": "Precompiled", "precompiled_charsmap": table}, spaces)


def _metaspace(replacement: str, prepend: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": prepend, "split": False}


def _split(text: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"String": text}, "behavior": "Isolated", "invert": False}


def _sequence(parts: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", parts: list(steps)}


def _added(id: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": id, "content": content, **flags}
