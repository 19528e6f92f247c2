"""A GGUF file's tokenizer as files that libraries load: metadata in, tokenizer.json or tokenizer.model out.

Byte-level BPE becomes `tokenizer.json` (of the `tokenizers` library), SentencePiece becomes `tokenizer.model`; beside
either goes `tokenizer_config.json`, so that transformers' AutoTokenizer opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from moextend_jax.config import MoextendError
from moextend_jax.outside import said_by, shown

_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}

_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])
_LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
_BEGIN = ("llama-bpe", "llama3", "llama-v3")
"""Texts of these begin with their first token where the file does not say, as llama.cpp has it."""
PRE_TOKENIZERS = {
    "gpt-2": _WORDS, "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS, "refact": _SINGLE_DIGITS,
} | dict.fromkeys(_BEGIN, _LLAMA3)  # fmt: skip
"""How text is cut before merging, by `tokenizer.ggml.pre`. Another cut gives other ids, so none is guessed."""


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the tokenizer's files into `folder` and returns their paths.

    Raises:
      MoextendError: there is no tokenizer in the metadata, or one of a kind that cannot be written.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise MoextendError(
            f"the GGUF's tokenizer is {shown(kind)}; only gpt2 (byte-level BPE) and llama can be written"
        )
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int) or [1] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise MoextendError(f"the GGUF's tokenizer has {len(set(tokens))} different tokens and {len(types)} types")
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in _ROLES.items()}
    if bad := {r: id for r, id in ids.items() if id is not None and not (type(id) is int and 0 <= id < len(tokens))}:
        raise MoextendError(f"the GGUF's tokenizer has {len(tokens)} tokens, but {shown(bad)}")
    if bad := sorted(set(types) - set(range(1, 7))):
        raise MoextendError(f"the GGUF's tokenizer has tokens of the unknown types {shown(bad)}")
    if not tokens or "" in tokens:
        raise MoextendError("the GGUF's tokenizer has no tokens, or one without a letter")
    settings: dict[str, Any] = {f"{role}_token": tokens[id] for role, id in ids.items() if id is not None}
    settings["clean_up_tokenization_spaces"] = False
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _BEGIN
    settings["add_bos_token"] = add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", begins))
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = template = metadata["tokenizer.chat_template"]
        if not isinstance(template, str):
            raise MoextendError(f"the GGUF's chat template is no text: {shown(template)}")
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "gpt2":
        made, settings["tokenizer_class"] = folder / "tokenizer.json", "PreTrainedTokenizerFast"
        _byte_level(metadata, tokens, types, bos=ids["bos"] if add_bos else None).save(str(made))
    else:
        made, settings["tokenizer_class"] = folder / "tokenizer.model", "LlamaTokenizer"
        settings["legacy"] = False
        made.write_bytes(_sentencepiece(metadata, tokens, types, ids=ids))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return [made, config]


def _list(metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """Values of a key, all of the one kind; empty where the file has none."""
    values = metadata.get(f"tokenizer.ggml.{name}") or []
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise MoextendError(f"the GGUF's tokenizer.ggml.{name} is of another type than it should be: {shown(values)}")
    return values


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], *, bos: int | None) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise MoextendError(
            f"the GGUF's tokenizer cuts text as {shown(pre)}; only {', '.join(PRE_TOKENIZERS)} are known"
        )
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges", str)]
    try:
        # Llama 3's vocabulary has words that its merges do not reach.
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=PRE_TOKENIZERS[pre] is _LLAMA3))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # the library raises Exception itself
        raise MoextendError(f"the GGUF's tokenizer has merges that do not fit its tokens: {said_by(error)}") from None
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == _USER_DEFINED])
    if bos is not None:
        first = tokens[bos]
        try:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, bos)]
            )
        except ValueError:  # a blank or a colon has a meaning there
            raise MoextendError(
                f"the GGUF's tokenizer begins texts with {shown(first)}, which no tokenizer.json can name"
            ) from None
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], *, ids: dict[str, int | None]
) -> bytes:
    """GGUF numbers the types of pieces as SentencePiece does, and keeps its scores."""
    scores = _list(metadata, "scores", (int, float))
    if len(scores) != len(tokens):
        raise MoextendError(f"the GGUF's tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, len(tokens), 6 in types
    for role, id in ids.items():
        setattr(spec, f"{role}_id", -1 if id is None else id)
        if id is not None:
            setattr(spec, f"{role}_piece", tokens[id])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()
