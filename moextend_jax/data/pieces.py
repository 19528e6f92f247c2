"""The two kinds of vocabularies that folders bring: SentencePiece's `tokenizer.model`, and `tokenizer.json`.

Goes in: such a file. Comes out: `SentencePieces` or `JsonPieces`, which say the same: text to ids and back, and which
tokens are control tokens. Text never gives the id of a control token, however it is spelled: only templates write them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from moextend_jax.config import MoextendError
from moextend_jax.outside import said_by

MOST_GROWTH = 1000
"""How many times longer a tokenizer.json may make a text. That of XLNet, which does most of all that we know, writes up
to 33 bytes for a character, and other quotation marks."""

_CONTROL, _UNKNOWN = 3, 2  # SentencePiece's types of pieces


class Control(NamedTuple):
    """A control token. Blanks before it or after it are dropped where `left` or `right`."""

    id: int
    left: bool = False
    right: bool = False


class SentencePieces:
    """`tokenizer.model`. The library is used directly: it is what such a model was trained with, is an order of
    magnitude faster than `AutoTokenizer`, and transformers 5's conversion differs from it on leading spaces.

    Args:
      added: tokens that a tune has added behind the model's own pieces, with their ids.
      legacy: text after a control token gets a space before it, as at the beginning.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, *, added: Mapping[str, int], legacy: bool):
        proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        proto.ParseFromString(model)
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        proto.normalizer_spec.add_dummy_prefix = False
        self._pieces_no_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        if self._pieces.unk_id() < 0:
            raise ValueError("it has no piece for what is unknown")
        self.legacy, self.count = legacy, self._pieces.vocab_size()
        added = {piece: id for piece, id in added.items() if id >= self.count}
        self.size = 1 + max(self.count - 1, *added.values(), -1)
        own = {piece.piece: id for id, piece in enumerate(proto.pieces) if piece.type in (_CONTROL, _UNKNOWN)}
        self.control = {piece: Control(id) for piece, id in (own | added).items()}
        self.unknown = self._pieces.unk_id()
        self._added = {id: piece for piece, id in added.items()}

    @property
    def first(self) -> int | None:
        """The id before every text; None: there is none."""
        return self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None

    @property
    def last(self) -> int | None:
        """The id that ends a text."""
        return self._pieces.eos_id() if self._pieces.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

    def encode_continued(self, text: str) -> list[int]:
        return self._pieces_no_prefix.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode([id for id in ids if 0 <= id < self.count])

    def id_to_piece(self, id: int) -> str | None:
        return self._pieces.id_to_piece(id) if 0 <= id < self.count else self._added.get(id)

    def piece_to_id(self, piece: str) -> int | None:
        if piece in self.control:
            return self.control[piece].id
        id = self._pieces.piece_to_id(piece)
        return id if self._pieces.id_to_piece(id) == piece else None

    def is_byte(self, id: int) -> bool:
        """Whether a token is one byte of what the vocabulary has no piece for."""
        return 0 <= id < self.count and self._pieces.is_byte(id)

    def spare(self) -> list[int]:
        """Tokens that the vocabulary declares to be unused."""
        return [id for id in range(self.count) if self._pieces.is_unused(id)]

    def idle(self) -> list[int]:
        """Control tokens that may do nothing, the last first: here each has its use."""
        return []


class JsonPieces:
    """`tokenizer.json`, of the `tokenizers` library.

    Args:
      described: what is in the file.
      where: its folder, for messages.
      control: added tokens that are control tokens besides those that the file calls special.
    """

    kind = "tokenizer.json"

    def __init__(self, described: Mapping[str, Any], *, where: object, control: Iterable[str] = ()):
        if described["model"].get("dropout"):
            raise ValueError("its dropout would give the same text other ids each time")
        if max(_growth(described.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder")) > MOST_GROWTH:
            raise ValueError(f"it can make a text more than {MOST_GROWTH} times longer")
        self._where = f"{where}"
        named = set(control)
        added = [
            token | {"special": True} if token["special"] is False and token["content"] in named else token
            for token in described["added_tokens"]
        ]
        self._text = json.dumps({**described, "added_tokens": added, "truncation": None, "padding": None})
        self._load()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Around what the library does: it finds much of what is wrong in a file only when it has a text, and its
        panics are no `Exception`."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise MoextendError(f"the tokenizer.json in {self._where} cannot be used: {said_by(error)}") from None

    def _load(self) -> None:
        with self._asked():
            self._open(json.loads(self._text))

    def _open(self, described: dict[str, Any]) -> None:
        self._pieces = _opened(self._text)
        # For text that goes on after something else, before which no space is put.
        without = {**described, **{part: _plain(described.get(part)) for part in ("normalizer", "pre_tokenizer")}}
        self._pieces_no_prefix = self._pieces if without == described else _opened(json.dumps(without))
        tokens = self._pieces.get_added_tokens_decoder()
        self.control = {
            token.content: Control(id, token.lstrip, token.rstrip) for id, token in tokens.items() if token.special
        }
        vocabulary = self._pieces.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values())
        self.count = 1 + max(id for piece, id in vocabulary.items() if piece not in self.control)
        self._bytes = bool(described["model"].get("byte_fallback"))
        unknown = described["model"].get("unk_token")
        self.unknown = None if unknown is None else self._pieces.token_to_id(unknown)
        first = self._pieces.encode("", add_special_tokens=True).ids[:1]
        self.first: int | None = first[0] if first else None
        self.last = None  # the file does not say it
        self.legacy = self.encode("a") != self.encode_continued("a") and self._prefix_after_control()

    def _prefix_after_control(self) -> bool:
        """Whether text after a control token gets a space before it, as at the beginning."""
        if not self.control:
            return False
        self._pieces.encode_special_tokens = False
        ids = self._pieces.encode(next(iter(self.control)) + "a", add_special_tokens=False).ids
        self._pieces.encode_special_tokens = True
        return ids[1:] == self.encode("a")

    def __getstate__(self) -> dict[str, Any]:  # a pickled Tokenizer forgets what it was told
        return {"_text": self._text, "_where": self._where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._text, self._where = state["_text"], state["_where"]
        self._load()

    def encode(self, text: str) -> list[int]:
        with self._asked():
            return self._pieces.encode(text, add_special_tokens=False).ids

    def encode_continued(self, text: str) -> list[int]:
        with self._asked():
            return self._pieces_no_prefix.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        with self._asked():
            return self._pieces.decode([id for id in ids if 0 <= id < self.size], skip_special_tokens=True)

    def id_to_piece(self, id: int) -> str | None:
        return self._pieces.id_to_token(id) if 0 <= id < self.size else None

    def piece_to_id(self, piece: str) -> int | None:
        return self._pieces.token_to_id(piece)

    def is_byte(self, id: int) -> bool:
        piece = self.id_to_piece(id) if self._bytes else None
        return piece is not None and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

    def spare(self) -> list[int]:
        """Tokens whose names say that they are unused or reserved."""
        vocabulary = self._pieces.get_vocab(with_added_tokens=True)
        return sorted(id for piece, id in vocabulary.items() if _is_spare(piece))

    def idle(self) -> list[int]:
        """Control tokens that may do nothing, the last first."""
        return sorted((token.id for token in self.control.values()), reverse=True)


Pieces = SentencePieces | JsonPieces

_SPARE = ("unused", "reserved", "extra", "placeholder", "place▁holder▁no", "dummy", "special", "control")


def _is_spare(piece: str) -> bool:
    """<|reserved_special_token_7|>, <unused7>, [unused7], <|extra_7|>, <|placeholder7|>, <SPECIAL_7>, ..."""
    if piece[:1] + piece[-1:] not in ("<>", "[]"):
        return False
    name = piece[1:-1].strip("|｜").lower()
    words = name.rstrip("0123456789").rstrip("_-▁")
    return words != name and words.removesuffix("_special_token") in _SPARE


def _opened(text: str) -> tokenizers.Tokenizer:
    pieces = tokenizers.Tokenizer.from_str(text)
    pieces.encode_special_tokens = True
    return pieces


def _plain(step: Any) -> Any:
    if not isinstance(step, dict) or step.get("type") == "Prepend":
        return None
    changes: dict[str, Any] = {}
    for several in ("normalizers", "pretokenizers"):
        if several in step:
            changes[several] = [plain for inner in step[several] if (plain := _plain(inner)) is not None]
    if "prepend_scheme" in step:
        changes["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        changes["add_prefix_space"] = False
    return {**step, **changes}


def _growth(step: Any) -> float:
    """How many times longer a normalizer, a pre-tokenizer or a decoder can make a text."""
    if not isinstance(step, dict):
        return 1.0
    own, kind = 1.0, step.get("type")
    if kind == "ByteLevel":
        own = 2.0
    elif kind == "Prepend":
        own += len(step["prepend"])
    elif kind == "Replace":
        sought = step["pattern"].get("String")  # a regular expression may match nothing, between any two letters
        own = len(step["content"]) / len(sought) if sought else own + len(step["content"])
    elif kind == "Precompiled":
        table = base64.b64decode(step["precompiled_charsmap"])
        size = int.from_bytes(table[:4], "little")
        if size > len(table) - 4:
            raise ValueError("its precompiled_charsmap is cut short")
        own = max(map(len, table[4 + size :].split(b"\0")))
    inner = (step.get(several) or () for several in ("normalizers", "pretokenizers", "decoders"))
    return math.prod((_growth(one) for several in inner for one in several), start=max(1.0, own))
