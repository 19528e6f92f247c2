"""Text to token ids and back, by the SentencePiece model of a Hugging Face folder.

Goes in: a folder with `tokenizer.model` and, where present, `tokenizer_config.json`; of a model, its vocabulary's rows
and the image tags that its checkpoint names, if any. Comes out: `Tokenizer`.

The SentencePiece library is used directly: it is what the model was trained with, is an order of magnitude
faster than `AutoTokenizer`, and transformers 5's conversion differs from it on leading spaces.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from moextend_jax.config import ImageTags, ModelConfig, MoextendError


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
        """Text of the ids; BOS, EOS, image tags and ids that no piece has are left out."""
        silent = {self.bos, self.eos, *self.tags.ids}
        return self.pieces.decode([int(id) for id in ids if int(id) not in silent and id < self.vocab_size])

    def unspeakable(self, rows: int) -> tuple[int, ...]:
        """Ids that an answer may not have, of a model with so many rows in its vocabulary: the image tags, and rows
        that no piece has (tokens that a tune has added, rows that only round the number)."""
        added = (id for id in range(self.vocab_size, rows) if id not in self.tags.ids)
        return (*self.tags.ids, *added)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if not set(self.tags.ids).isdisjoint(ids):
            raise MoextendError(
                f"text holds a control character that is reserved for images: {text[:60]!r}; remove NUL, STX and ETX"
            )
        return ids


def tokenizer_of(directory: Path | str, config: ModelConfig) -> Tokenizer:
    """The tokenizer that a model's inputs are made with: it has the image tags that the checkpoint names, else its own.

    Raises:
      MoextendError: as `load_tokenizer`, or the model has no rows for some of the tokenizer's pieces or the tags.
    """
    rows = config.decoder.vocab_size
    tokenizer = load_tokenizer(directory, tags=None if config.tags == ImageTags() else config.tags)
    needed = 1 + max(tokenizer.vocab_size - 1, *tokenizer.tags.ids)
    if needed > rows:
        raise MoextendError(
            f"the tokenizer in {directory} and the image tags need {needed} rows, but the model's vocabulary has "
            f"{rows}: it is another model's tokenizer"
        )
    return tokenizer


def load_tokenizer(directory: Path | str, *, tags: ImageTags | None = None) -> Tokenizer:
    """Reads `tokenizer.model` (and `legacy` of `tokenizer_config.json`, true where absent) of a folder.

    `tags` None are those of `image_tags`; ids beyond the tokenizer's are rows that a checkpoint has appended.

    Raises:
      MoextendError: no tokenizer, one that cannot be read, or tags that are something else in its vocabulary.
    """
    model_path = Path(directory) / "tokenizer.model"
    config_path = Path(directory) / "tokenizer_config.json"
    if not model_path.is_file():
        beside = " (tokenizer.json is not read)" if model_path.with_name("tokenizer.json").is_file() else ""
        raise MoextendError(f"no tokenizer.model in {directory}{beside}: copy that of the base there")
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(model_path.read_bytes())
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        model.normalizer_spec.add_dummy_prefix = False
        pieces_no_prefix = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        legacy = json.loads(config_path.read_text()).get("legacy", True) if config_path.is_file() else True
    except Exception as error:  # protobuf, sentencepiece and json each raise their own
        raise MoextendError(f"cannot read the tokenizer in {directory}: {error}") from error
    if tags is None:
        tags = image_tags(pieces, where=directory)
    _check_tags(tags, pieces, where=directory)
    return Tokenizer(
        pieces=pieces,
        pieces_no_prefix=pieces_no_prefix,
        tags=tags,
        bos=pieces.bos_id(),
        eos=pieces.eos_id(),
        vocab_size=pieces.vocab_size(),
        legacy=legacy is not False,
    )


def image_tags(pieces: sentencepiece.SentencePieceProcessor, *, where: Path | str) -> ImageTags:
    """The byte pieces of STX, ETX and NUL: 5, 6 and 3 in Mixtral-8x7B's vocabulary; 773, 774 and 771 in
    8x22B-Instruct's, where 3, 5 and 6 are [INST] and its like."""
    ids = {name: pieces.piece_to_id(piece) for name, piece in TAG_PIECES.items()}
    if not all(pieces.is_byte(id) for id in ids.values()):
        raise MoextendError(
            f"the tokenizer in {where} has no byte pieces {', '.join(TAG_PIECES.values())} for image tags"
        )
    return ImageTags(**ids)


TAG_PIECES = {"start": "<0x02>", "end": "<0x03>", "pad": "<0x00>"}


def _check_tags(tags: ImageTags, pieces: sentencepiece.SentencePieceProcessor, *, where: Path | str) -> None:
    if len(set(tags.ids)) < len(tags.ids):
        raise MoextendError(f"image tags {', '.join(map(str, tags.ids))} must be ids of their own")
    for name, id in dataclasses.asdict(tags).items():
        if id >= pieces.vocab_size():  # a row that a checkpoint has appended: no text has it
            continue
        piece = pieces.id_to_piece(id) if id >= 0 else "no id"
        if piece not in TAG_PIECES.values() and not (id >= 0 and pieces.is_unused(id)):
            what = "a control token" if id >= 0 and pieces.is_control(id) else "what text is made of"
            would = ", ".join(f"{other} {pieces.piece_to_id(other)}" for other in TAG_PIECES.values())
            raise MoextendError(
                f"image tag {name} = {id} is {piece}, {what} in the tokenizer in {where}; there {would} would do"
            )
