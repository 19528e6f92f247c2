"""A model's tokenizer as the `tokenizer.json` that Hugging Face's tokenizers read, with the tags of media as tokens.

In: a folder with `tokenizer.model` or `tokenizer.json`, and what it is read as. Out: the file's content, that of
`tokenizer_config.json`, and what the tags are called there. Text gets the ids of `data.tokenizer`: of a
SentencePiece model a space goes before a text's beginning, also where it begins with one (transformers' own conversion
adds none there), and none after a token.

Tags that are byte pieces or appended rows get names, so that a chat template can write them. As in every such file, a
token that a text spells out ("</s>") is that token there; with `sanitize_control_tokens=True`, `apply_chat_template`
takes it for text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moextend_jax.config import IMAGE, MoextendError
from moextend_jax.data.pieces import SentencePieces
from moextend_jax.data.tags import TAG_NAMES
from moextend_jax.data.tokenizer import Tokenizer

SPACE = "▁"


class TokenizerFiles(NamedTuple):
    """tags: by medium what its tags are called: start, end, pad; empty for a model of text."""

    content: dict[str, Any]
    settings: dict[str, Any]
    tags: dict[str, dict[str, str]]


def tokenizer_files(
    folder: Path, tokenizer: Tokenizer, *, media: Collection[str], apart: str = ""
) -> TokenizerFiles:  # fmt: skip
    """What lies beside the weights as `tokenizer.json` and `tokenizer_config.json`.

    Args:
      media: of the model. If there are any, their tags are tokens of their own, and so are those of pictures.
      apart: a text that is tokenised separately from what is before it, if a prompt needs that.

    Raises:
      MoextendError: the tokenizer cannot be written so.
    """
    pieces = tokenizer.pieces
    tags, ids = {}, {}
    control = {token.id: piece for piece, token in pieces.control.items()}
    for medium, marked in tokenizer.media.items() if media else ():
        names = TAG_NAMES | {"pad": marked.mark}
        tags[medium] = {tag: control.get(getattr(marked.tags, tag), name) for tag, name in names.items()}
        ids |= {id: tags[medium][tag] for tag, id in dataclasses.asdict(marked.tags).items()}
    if taken := [name for id, name in ids.items() if pieces.piece_to_id(name) not in (None, pieces.unknown, id)]:
        raise MoextendError(f"the tokenizer in {folder} has pieces called {', '.join(taken)}, like the image tags")
    if isinstance(pieces, SentencePieces):
        content = _from_sentencepiece(folder / "tokenizer.model", tokenizer, tags=ids, apart=apart)
    else:
        content = _with_tags(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), ids)
    names = {name: pieces.id_to_piece(id) for name, id in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos),
             ("unk_token", pieces.unknown)) if id is not None}  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.bos is not None,
        "add_eos_token": False, **names, "pad_token": names.get("unk_token") or names["eos_token"],
        "padding_side": "left", "clean_up_tokenization_spaces": False, "legacy": tokenizer.legacy,
        "model_max_length": int(1e30),
    }  # fmt: skip
    if tags:
        extra = {f"image_{tag}_token" if tag != "pad" else "image_token": name for tag, name in tags[IMAGE].items()}
        pads = {"image_token" if medium == IMAGE else "audio_token": own["pad"] for medium, own in tags.items()}
        settings |= {**pads, "extra_special_tokens": extra | pads}
    return TokenizerFiles(content, settings, tags)


def _with_tags(content: dict[str, Any], tags: Mapping[int, str]) -> dict[str, Any]:
    """A tokenizer.json in which these ids are special tokens of these names."""
    model = content["model"]
    own = {token["id"]: token for token in content["added_tokens"]}
    vocabulary = model["vocab"]
    if tags and not isinstance(vocabulary, dict):
        raise MoextendError("a tokenizer.json of kind Unigram has no place for image tags")
    by_id = {id: piece for piece, id in vocabulary.items()} if tags else {}
    for id, name in tags.items():
        before = own.get(id, {"id": id, "single_word": False, "lstrip": False, "rstrip": False})
        own[id] = before | {"content": name, "special": True, "normalized": False}
        if by_id.get(id) != name:
            vocabulary.pop(by_id.get(id, ""), None)
            vocabulary[name] = id
    return content | {"added_tokens": [own[id] for id in sorted(own)], "truncation": None, "padding": None}


def _from_sentencepiece(where: Path, tokenizer: Tokenizer, *, tags: Mapping[int, str], apart: str) -> dict[str, Any]:
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
    control = {token.id: piece for piece, token in tokenizer.pieces.control.items()}
    names = {id: piece.piece for id, piece in enumerate(model.pieces)} | control | dict(tags)
    spelled = {id for id, piece in enumerate(model.pieces) if piece.type == piece.USER_DEFINED}
    vocabulary = {name: id for id, name in names.items()}
    unknown = names[trainer.unk_id]
    made: Any = tokenizers.Tokenizer(
        models.BPE(vocabulary, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    table = normalizer.precompiled_charsmap
    made.normalizer = normalizers.Sequence([normalizers.Precompiled(table), spaces]) if table else spaces
    # The first makes the space before a text's beginning: no text begins with one here, as all of them have become "▁".
    # The second makes it a "▁". After a token that is spelled out neither does anything.
    steps: list[Any] = [pre_tokenizers.Metaspace(" ", "first", split=False)] if normalizer.add_dummy_prefix else []
    steps += [pre_tokenizers.Metaspace(SPACE, "never", split=False)]
    steps += [pre_tokenizers.Split(apart.replace(" ", SPACE), "isolated")] if apart else []
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for id in sorted(control.keys() | tags.keys() | spelled):
        made.add_tokens([AddedToken(names[id], normalized=False, special=id in control or id in tags)])
    before = [] if tokenizer.bos is None else [names[tokenizer.bos]]
    parts = [[*({"SpecialToken": {"id": name, "type_id": type_id}} for name in before),
              {"Sequence": {"id": "AB"[type_id], "type_id": type_id}}] for type_id in (0, 1)]  # fmt: skip
    return json.loads(made.to_str()) | {
        "post_processor": {  # the library's own class reads no name with a colon
            "type": "TemplateProcessing", "single": parts[0], "pair": parts[0] + parts[1],
            "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]} for name in before},
        },
    }  # fmt: skip


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others; those of likely pieces first, as SentencePiece goes on."""
    normal = {piece.piece: (-piece.score, id) for id, piece in enumerate(model.pieces) if piece.type == piece.NORMAL}
    ways = []
    for name, (rank, _) in normal.items():
        for at in range(1, len(name)):
            left, right = name[:at], name[at:]
            if left in normal and right in normal:
                ways.append((rank, normal[left][1], normal[right][1], left, right))
    return [(left, right) for *_, left, right in sorted(ways)]
