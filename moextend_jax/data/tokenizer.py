"""Text to token ids and back, by the SentencePiece model of a Hugging Face folder.

Goes in: a folder with `tokenizer.model` and, where present, `tokenizer_config.json`. Comes out: `Tokenizer`.

The SentencePiece library is used directly: it is what the model was trained with, is an order of magnitude
faster than `AutoTokenizer`, and transformers 5's conversion differs from it on leading spaces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from moextend_jax.config import ImageTags, MoextendError


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """`bos` and `eos` are ids; `legacy` is the field of that name in tokenizer_config.json (only the released
    prompt depends on it); ids of `tags` are reserved for images, text can never produce them."""

    pieces: sentencepiece.SentencePieceProcessor
    pieces_no_prefix: sentencepiece.SentencePieceProcessor
    tags: ImageTags
    bos: int
    eos: int
    vocab_size: int
    legacy: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a text that starts a word: a space goes before it, as in the official Mixtral code."""
        return self._checked(self.pieces.encode(text), text)

    def encode_continued(self, text: str) -> list[int]:
        """Ids of a text that goes on after something else, e.g. an image: no space goes before it."""
        return self._checked(self.pieces_no_prefix.encode(text), text)

    def decode(self, ids) -> str:
        """Text of the ids; BOS, EOS and image tags are left out."""
        silent = {self.bos, self.eos, self.tags.start, self.tags.end, self.tags.pad}
        return self.pieces.decode([int(id) for id in ids if int(id) not in silent])

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if not {self.tags.start, self.tags.end, self.tags.pad}.isdisjoint(ids):
            raise MoextendError(
                f"text holds a control character that is reserved for images: {text[:60]!r}; remove NUL, STX and ETX"
            )
        return ids


def load_tokenizer(directory: Path | str, *, tags: ImageTags | None = None) -> Tokenizer:
    """Reads `tokenizer.model` (and `legacy` of `tokenizer_config.json`, true where absent) of a folder."""
    model_path = Path(directory) / "tokenizer.model"
    config_path = Path(directory) / "tokenizer_config.json"
    if not model_path.is_file():
        raise MoextendError(f"no tokenizer.model in {directory}; give a folder in the Hugging Face layout")
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(model_path.read_bytes())
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        model.normalizer_spec.add_dummy_prefix = False
        pieces_no_prefix = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        legacy = json.loads(config_path.read_text()).get("legacy", True) if config_path.is_file() else True
    except Exception as error:  # protobuf, sentencepiece and json each raise their own
        raise MoextendError(f"cannot read the tokenizer in {directory}: {error}") from error
    return Tokenizer(
        pieces=pieces,
        pieces_no_prefix=pieces_no_prefix,
        tags=tags or ImageTags(),
        bos=pieces.bos_id(),
        eos=pieces.eos_id(),
        vocab_size=pieces.vocab_size(),
        legacy=legacy is not False,
    )
