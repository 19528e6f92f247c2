"""Text to token ids and back, as the tokenizer of a Hugging Face folder does it; chat templates and image tags too.

Goes in: a folder with `tokenizer.model` or `tokenizer.json` and, where present, `tokenizer_config.json` and its like;
of a model, its vocabulary's rows and the image tags that its checkpoint names, if any. Comes out: `Tokenizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moextend_jax.config import ImageTags, ModelConfig, MoextendError
from moextend_jax.data.pieces import JsonPieces, Pieces, SentencePieces
from moextend_jax.data.templates import FAMILIES, Template, end_of, is_mixtral


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What a model's texts are made of. Ids of `tags` are reserved for images: text can never produce them, nor those
    of control tokens.

    bos: the id before every text; None: this model has none. eos: the id after every text. ends: all ids that end an
    answer, eos first. legacy: text after a control token gets a space before it, as at the beginning. prompt: the
    template that "checkpoint" means, "mixtral" or one of `templates`; None: none is known. where: the folder.
    """

    pieces: Pieces
    tags: ImageTags
    bos: int | None
    eos: int
    ends: tuple[int, ...]
    legacy: bool
    prompt: str | None
    templates: Mapping[str, Template]
    where: str

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids before every text: BOS, or nothing."""
        return () if self.bos is None else (self.bos,)

    @property
    def vocab_size(self) -> int:
        return self.pieces.size

    def encode(self, text: str) -> list[int]:
        """Ids of a text at a beginning. Where the model knows words by the space before them, one goes before it, as in
        the official Mixtral code."""
        return self._checked(self.pieces.encode(text), text)

    def encode_continued(self, text: str) -> list[int]:
        """Ids of a text that goes on after something else, e.g. an image: no space goes before it."""
        return self._checked(self.pieces.encode_continued(text), text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control tokens, image tags and ids that no piece has are left out."""
        silent = {*self.prefix, *self.ends, *self.tags.ids}
        return self.pieces.decode([int(id) for id in ids if int(id) not in silent])

    def unspeakable(self, rows: int) -> tuple[int, ...]:
        """Ids that an answer may not have, of a model with so many rows in its vocabulary: the image tags, and rows
        that no piece has (rows that only round the number)."""
        empty = (id for id in range(rows) if id not in self.tags.ids and self.pieces.id_to_piece(id) is None)
        return (*self.tags.ids, *empty)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if self._reserved.isdisjoint(ids):
            return ids
        if not set(self.tags.ids).isdisjoint(ids):
            raise MoextendError(
                f"text holds a control character that is reserved for images: {text[:60]!r}; remove NUL, STX and ETX"
            )
        spelled = self.pieces.id_to_piece(next(id for id in ids if id in self._reserved))
        raise MoextendError(f"text gives the control token {spelled}: {text[:60]!r}")

    @functools.cached_property
    def _reserved(self) -> frozenset[int]:
        control = {token.id for token in self.pieces.control.values()}
        return frozenset((control - {self.pieces.unknown}) | set(self.tags.ids))


def has_tokenizer(directory: Path | str) -> bool:
    return any((Path(directory) / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def tokenizer_of(directory: Path | str, config: ModelConfig, *, ends: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer that a model's inputs are made with: it has the image tags that the checkpoint names, else its own.

    Args:
      ends: ids that end an answer, as the checkpoint's config.json says.

    Raises:
      MoextendError: as `load_tokenizer`, or the model has no rows for some of the tokenizer's pieces or the tags.
    """
    rows = config.decoder.vocab_size
    tags = None if config.tags == ImageTags() else config.tags
    tokenizer = load_tokenizer(directory, tags=tags, rows=rows, ends=ends)
    needed = 1 + max(tokenizer.pieces.count - 1, *tokenizer.prefix, *tokenizer.ends, *tokenizer.tags.ids)
    if needed > rows:
        raise MoextendError(
            f"the tokenizer in {directory} and the image tags need {needed} rows, but the model's vocabulary has "
            f"{rows}: it is another model's tokenizer"
        )
    return tokenizer


def load_tokenizer(
    directory: Path | str, *, tags: ImageTags | None = None, rows: int | None = None, ends: Sequence[int] = ()
) -> Tokenizer:
    """Reads a folder's tokenizer: `tokenizer.model` where it is there and `tokenizer.json`, if any, has no other pieces
    (a tune's added tokens stand there), else `tokenizer.json`.

    Args:
      tags: None: those of `image_tags`; ids beyond the tokenizer's are rows that a checkpoint has appended.
      rows: of the model's vocabulary, where one is known. Those beyond the tokenizer's may become tags.
      ends: more ids that end an answer than the folder names.

    Raises:
      MoextendError: no tokenizer, one that cannot be read, or tags that are something else in its vocabulary.
    """
    folder = Path(directory)
    if not has_tokenizer(folder):
        raise MoextendError(f"no tokenizer.model or tokenizer.json in {directory}: copy those of the base there")
    try:
        config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
        source = _chat_template(folder, config)
        roles = {name: _text_of(value) for name, value in config.items() if name.endswith("_token") and value}
        roles = {name: text for name, text in roles.items() if text is not None}
        pieces = _pieces(folder, config, roles=roles, source=source)
        for name, id in (("bos_token", pieces.first), ("eos_token", pieces.last)):
            if id is not None and (piece := pieces.id_to_piece(id)) is not None:
                roles.setdefault(name, piece)
        ends = [*ends, *ends_of(_json(folder / "generation_config.json")), *ends_of(_json(folder / "config.json"))]
        bos, eos = _bos(pieces, config, roles), _eos(pieces, roles, ends)
    except MoextendError:
        raise
    except Exception as error:  # protobuf, sentencepiece, tokenizers and json each raise their own
        raise MoextendError(f"cannot read the tokenizer in {directory}: {error}") from error
    if eos is None:
        raise MoextendError(f"the tokenizer in {directory} names no token that ends a text: give it an eos_token")
    templates = _templates(pieces, source, roles, rows, folder)
    ends = [eos, *ends]
    for template in templates.values():
        try:
            ends.append(end_of(template))
        except MoextendError:  # it is said where the template is used
            continue
    busy = _busy(pieces, roles, ends, templates)
    if tags is None:
        tags = image_tags(pieces, rows=rows, busy=busy, where=directory)
    _check_tags(tags, pieces, busy=busy, where=directory)
    return Tokenizer(
        pieces=pieces,
        tags=tags,
        bos=bos,
        eos=eos,
        ends=tuple(dict.fromkeys(ends)),
        legacy=pieces.legacy,
        prompt=_prompt(pieces, templates),
        templates=templates,
        where=str(directory),
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no object")
    return value


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _pieces(folder: Path, config: Mapping[str, Any], *, roles: Mapping[str, str], source: str | None) -> Pieces:
    described = _json(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    if model.is_file():
        added = {piece: id for piece, id in _json(folder / "added_tokens.json").items() if type(id) is int}
        decoder = config.get("added_tokens_decoder") or {}
        added |= {token["content"]: int(id) for id, token in decoder.items()}
        pieces = SentencePieces(model.read_bytes(), added=added, legacy=config.get("legacy", True) is not False)
        if not described or all(_own_piece(pieces, id) == piece for piece, id in _vocabulary(described)):
            return pieces
    added = [token["content"] for token in described["added_tokens"]]
    written = _probe(source, roles)
    families = (token for family in FAMILIES.values() for token in family.tokens)
    control = {*roles.values(), *families, *(token for token in added if token in written)}
    return JsonPieces(described, control=control)


def _own_piece(pieces: SentencePieces, id: int) -> str | None:
    return pieces.id_to_piece(id) if id < pieces.count else None


def _vocabulary(described: Mapping[str, Any]) -> list[tuple[str, int]]:
    own = described["model"]["vocab"]
    pairs = own.items() if isinstance(own, dict) else ((piece, id) for id, (piece, _) in enumerate(own))
    return [*pairs, *((token["content"], token["id"]) for token in described["added_tokens"])]


def ends_of(attributes: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer by a config.json or generation_config.json, which have one or a list."""
    ends = attributes.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and end >= 0]


def _bos(pieces: Pieces, config: Mapping[str, Any], roles: Mapping[str, str]) -> int | None:
    adds = config.get("add_bos_token")
    named = pieces.piece_to_id(roles["bos_token"]) if "bos_token" in roles else None
    return pieces.first if adds is None or (adds and named is None) else named if adds else None


def _eos(pieces: Pieces, roles: Mapping[str, str], ends: Sequence[int]) -> int | None:
    named = pieces.piece_to_id(roles["eos_token"]) if "eos_token" in roles else None
    return next((id for id in (named, pieces.last, *ends) if id is not None), None)


# --- chat templates ---------------------------------------------------------------------------------------------------


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The checkpoint's own: of chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("its chat_template is no text")
    return template


def _probe(source: str | None, roles: Mapping[str, str]) -> str:
    """What a template writes around a question, an answer and another question."""
    if source is None:
        return ""
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        return Template(source=source, where="", roles=roles, control={}).render(messages, open=True)
    except MoextendError:
        return ""


def _templates(
    pieces: Pieces, source: str | None, roles: Mapping[str, str], rows: int | None, folder: Path
) -> dict[str, Template]:
    """The checkpoint's own under "own", and the families whose tokens the vocabulary has."""
    control = {name: token for name, token in pieces.control.items() if rows is None or token.id < rows}
    written = _probe(source, roles)
    if beyond := [name for name in pieces.control if name not in control and name in written]:
        raise MoextendError(
            f"the chat template in {folder} writes {', '.join(beyond)}, but the model's vocabulary ends at row {rows}"
        )
    sources = {name: family.source for name, family in FAMILIES.items() if control.keys() >= set(family.tokens)}
    if source is not None:
        sources["own"] = source
    return {
        name: Template(
            source=text,
            where=f"the chat template in {folder}" if name == "own" else f"the template {name} for {folder}",
            roles=roles,
            control=control,
        )
        for name, text in sources.items()
    }


def _prompt(pieces: Pieces, templates: Mapping[str, Template]) -> str | None:
    """A tokenizer without a template and with pieces for bytes is of Mixtral's and Llama 2's time."""
    if "own" in templates:
        return "mixtral" if is_mixtral(templates["own"]) else "own"
    known = next((name for name in FAMILIES if name in templates), None)
    return known or ("mixtral" if _byte_pieces(pieces) else None)


# --- image tags -------------------------------------------------------------------------------------------------------

TAG_PIECES = {"start": "<0x02>", "end": "<0x03>", "pad": "<0x00>"}
"""ASCII's STX, ETX and NUL: 5, 6 and 3 in Mixtral-8x7B's vocabulary; 773, 774 and 771 in 8x22B-Instruct's, where 3, 5
and 6 are [INST] and its like."""
VISION_PIECES = {"start": "<|vision_start|>", "end": "<|vision_end|>", "pad": "<|image_pad|>"}
"""Qwen's text models have them, and no use for them."""


def image_tags(pieces: Pieces, *, rows: int | None, busy: Collection[int], where: Path | str) -> ImageTags:
    """Three tokens that text does not need, always the same of a vocabulary: byte pieces; those made for images; tokens
    that are called unused or reserved; rows of the model beyond the tokenizer's; control tokens that nothing names, the
    last ones."""
    if bytes_of := _byte_pieces(pieces):
        return ImageTags(**bytes_of)
    vision = {name: pieces.control.get(piece) for name, piece in VISION_PIECES.items()}
    if all(vision.values()):
        return ImageTags(**{name: token.id for name, token in vision.items() if token})
    free = _free(pieces, rows=rows, busy=busy)[:3]
    if len(free) < 3:
        raise MoextendError(
            f"the tokenizer in {where} has no byte pieces {', '.join(TAG_PIECES.values())} for image tags, and only "
            f"{len(free)} of the 3 unused tokens that would do; append three rows to the vocabulary of the base"
        )
    return ImageTags(**dict(zip(TAG_PIECES, sorted(free), strict=True)))


def _byte_pieces(pieces: Pieces) -> dict[str, int] | None:
    ids = {name: pieces.piece_to_id(piece) for name, piece in TAG_PIECES.items()}
    known = {name: id for name, id in ids.items() if id is not None and pieces.is_byte(id)}
    return known if len(known) == len(ids) else None


def _busy(
    pieces: Pieces, roles: Mapping[str, str], ends: Iterable[int], templates: Mapping[str, Template]
) -> frozenset[int]:
    """Control tokens that have a use: those with a role, ends of answers, and what templates name."""
    written = [template.source for template in templates.values()]
    used = {token.id for piece, token in pieces.control.items() if any(piece in source for source in written)}
    named = {pieces.piece_to_id(piece) for piece in roles.values()}
    return frozenset(id for id in (used | named | set(ends) | {pieces.first, pieces.unknown}) if id is not None)


def _free(pieces: Pieces, *, rows: int | None, busy: Collection[int]) -> list[int]:
    beyond = range(pieces.size, rows or 0)
    named = (*pieces.spare(), *beyond, *pieces.idle())
    return [id for id in dict.fromkeys(named) if id not in busy]


def _check_tags(tags: ImageTags, pieces: Pieces, *, busy: Collection[int], where: Path | str) -> None:
    if len(set(tags.ids)) < len(tags.ids):
        raise MoextendError(f"image tags {', '.join(map(str, tags.ids))} must be ids of their own")
    free = {*(_byte_pieces(pieces) or {}).values(), *_free(pieces, rows=None, busy=busy)}
    free |= {pieces.control[piece].id for piece in VISION_PIECES.values() if piece in pieces.control}
    control = {token.id for token in pieces.control.values()}
    for name, id in dataclasses.asdict(tags).items():
        if id in free or id >= pieces.size:  # a row that a checkpoint has appended: no text has it
            continue
        piece = pieces.id_to_piece(id) or "no id"
        what = "a control token" if id in control else "what text is made of"
        own = _byte_pieces(pieces)
        would = f"; there {', '.join(f'{TAG_PIECES[name]} {id}' for name, id in own.items())} would do" if own else ""
        raise MoextendError(f"image tag {name} = {id} is {piece}, {what} in the tokenizer in {where}{would}")
