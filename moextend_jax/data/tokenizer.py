"""Text to token ids and back, as the tokenizer of a Hugging Face folder does it; chat templates and image tags too.

Goes in: a folder with `tokenizer.model` or `tokenizer.json` and, where present, `tokenizer_config.json` and its like;
of a model, its vocabulary's rows and the image tags that its checkpoint names, if any. Comes out: `Tokenizer`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.config import IMAGE, ImageTags, Medium, ModelConfig, MoextendError, Named
from moextend_jax.data.pieces import JsonPieces, Pieces, SentencePieces
from moextend_jax.data.tags import TAG_NAMES, byte_pieces, check_tags, image_tags, spare_ids
from moextend_jax.data.templates import FAMILIES as TEMPLATES
from moextend_jax.data.templates import Template, end_of, is_mixtral
from moextend_jax.families import FAMILIES

_ASSETS = Path(__file__).parents[1] / "assets" / "hf"
PICTURES, SOUNDS_END = _ASSETS / "pictures.jinja", _ASSETS / "sounds_end.jinja"


class Marked(NamedTuple):
    """What stands for a medium: its mark in a text, and the tags around an item in ids. tokens: of its longest item
    (P); 0: all of a conversation's items have as many as the longest of them. onto: as `Medium.onto`; then a mark
    stands for no ids."""

    mark: str
    tags: ImageTags
    tokens: int = 0
    onto: str = ""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What a model's texts are made of. Ids of `tags` are reserved for images, and those of `others` for other media:
    text can never produce them, nor those of control tokens.

    media: of every medium by name its mark in text and its tags, pictures first.
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
    others: Named[Medium] = Named()
    spare: tuple[int, ...] = ()
    """Ids that may stand for items of more media."""

    @functools.cached_property
    def media(self) -> dict[str, Marked]:
        tokens = self.others[IMAGE].tokens if IMAGE in self.others else 0
        pictures = {IMAGE: Marked(f"<{IMAGE}>", self.tags, tokens)}
        return pictures | {
            name: Marked(medium.mark, medium.tags, medium.tokens, medium.onto)
            for name, medium in self.others.items()
            if name != IMAGE
        }

    def with_fused(self, media: Collection[str]) -> frozenset[str]:
        """These media, and those that are added to their items (`Medium.onto`), which cannot be without them."""
        return frozenset(name for name, marked in self.media.items() if name in media or marked.onto in media)

    @functools.cached_property
    def tag_ids(self) -> frozenset[int]:
        """Of all media."""
        return frozenset(id for marked in self.media.values() for id in marked.tags.ids)

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

    def decode(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> str:
        """Text of the ids; control tokens, image tags and ids that no piece has are left out. after: ids whose text
        they continue: decoded alone they would lose a space at the beginning."""
        silent = {*self.prefix, *self.ends, *self.tag_ids}
        before, every = ([int(id) for id in of if int(id) not in silent] for of in (after, [*after, *ids]))
        return self.pieces.decode(every)[len(self.pieces.decode(before)) :]

    def unspeakable(self, rows: int) -> tuple[int, ...]:
        """Ids that an answer may not have, of a model with so many rows in its vocabulary: the tags, and rows that no
        piece has (rows that only round the number)."""
        empty = (id for id in range(rows) if id not in self.tag_ids and self.pieces.id_to_piece(id) is None)
        return (*self.tags.ids, *sorted(self.tag_ids - {*self.tags.ids}), *empty)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if self._reserved.isdisjoint(ids):
            return ids
        if taken := [name for name, marked in self.media.items() if not set(marked.tags.ids).isdisjoint(ids)]:
            # Media may share what stands before and behind their items.
            pictures = taken[0] == IMAGE
            what, remove = ("images", "NUL, STX and ETX") if pictures else (f"medium {taken[0]}", "it")
            raise MoextendError(
                f"text holds a control character that is reserved for {what}: {text[:60]!r}; remove {remove}"
            )
        spelled = self.pieces.id_to_piece(next(id for id in ids if id in self._reserved))
        raise MoextendError(f"text gives the control token {spelled}: {text[:60]!r}")

    @functools.cached_property
    def _reserved(self) -> frozenset[int]:
        control = {token.id for token in self.pieces.control.values()}
        return frozenset((control - {self.pieces.unknown}) | self.tag_ids)


def tokenizer_of(directory: Path | str, config: ModelConfig, *, ends: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer that a model's inputs are made with: it has the image tags that the checkpoint names, else its own.

    Args:
      ends: ids that end an answer, as the checkpoint's config.json says.

    Raises:
      MoextendError: as `load_tokenizer`, or the model has no rows for some of the tokenizer's pieces or the tags.
    """
    rows = config.decoder.vocab_size
    tags = None if config.tags == ImageTags() else config.tags
    template = FAMILIES[config.decoder.family].template
    tokenizer = load_tokenizer(directory, tags=tags, rows=rows, ends=ends, template=template)
    needed = 1 + max(tokenizer.pieces.count - 1, *tokenizer.prefix, *tokenizer.ends, *tokenizer.tags.ids)
    if needed > rows:
        raise MoextendError(
            f"the tokenizer in {directory} and the image tags need {needed} rows, but the model's vocabulary has "
            f"{rows}: it is another model's tokenizer"
        )
    return tokenizer


def load_tokenizer(
    directory: Path | str, *, tags: ImageTags | None = None, rows: int | None = None, ends: Sequence[int] = (),
    template: str = "",
) -> Tokenizer:  # fmt: skip
    """Reads a folder's tokenizer: `tokenizer.model` where it is there and `tokenizer.json`, if any, has no other pieces
    (a tune's added tokens stand there), else `tokenizer.json`.

    Args:
      tags: None: those of `image_tags`; ids beyond the tokenizer's are rows that a checkpoint has appended.
      rows: of the model's vocabulary, where one is known. Those beyond the tokenizer's may become tags.
      ends: more ids that end an answer than the folder names.
      template: which of `templates.FAMILIES` it is taught in if it brings none of its own; "": what its tokens show.

    Raises:
      MoextendError: no tokenizer, one that cannot be read, or tags that are something else in its vocabulary.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise MoextendError(f"no tokenizer.model or tokenizer.json in {directory}: copy those of the base there")
    try:
        files = _read(folder)
    except MoextendError:
        raise
    except Exception as error:  # protobuf, sentencepiece, tokenizers and json each raise their own
        words = f"no {error} in it" if isinstance(error, KeyError) else f"{str(error):.300}"
        raise MoextendError(f"cannot read the tokenizer in {directory}: {words}") from error
    pieces, named = files.pieces, [*ends, *files.ends]
    eos = next((id for id in (files.eos, *named) if id is not None), None)
    if eos is None:
        raise MoextendError(f"the tokenizer in {directory} names no token that ends a text: give it an eos_token")
    templates = _templates(files, rows=rows, folder=folder)
    every_end = tuple(dict.fromkeys((eos, *named, *_ends_of_templates(templates))))
    busy = _busy(files, every_end, templates)
    if tags is None:
        tags = image_tags(pieces, rows=rows, busy=busy, where=directory)
    # An exported model's files name its pad so, which `image_tags` leaves alone: its choice must not depend on that.
    image = pieces.piece_to_id(files.roles.get("image_token", ""))
    check_tags(tags, pieces, busy={id for id in busy if id != image}, where=directory)
    return Tokenizer(
        pieces=pieces,
        tags=tags,
        bos=files.bos,
        eos=eos,
        ends=every_end,
        legacy=pieces.legacy,
        prompt=_prompt(pieces, templates, template),
        templates=templates,
        where=str(directory),
        spare=spare_ids(pieces, tags, rows=rows, busy=busy),
    )


# --- files ------------------------------------------------------------------------------------------------------------


class _Files(NamedTuple):
    """What a folder's files say. roles: texts of the tokens that it names, as `bos_token`. template: its source."""

    pieces: Pieces
    roles: Mapping[str, str]
    template: str | None
    bos: int | None
    eos: int | None
    ends: Sequence[int]


def _read(folder: Path) -> _Files:
    config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    template = _without_pictures(_chat_template(folder, config))
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    roles = {name: text for name, text in texts.items() if text and isinstance(text, str)}
    pieces = _pieces(folder, config, roles=roles, template=template)
    for name, id in (("bos_token", pieces.first), ("eos_token", pieces.last)):
        if id is not None and (piece := pieces.id_to_piece(id)):
            roles.setdefault(name, piece)
    ends = [end for name in ("generation_config.json", "config.json") for end in ends_of(_json(folder / name))]
    eos = pieces.piece_to_id(roles["eos_token"]) if "eos_token" in roles else None
    return _Files(pieces, roles, template, _bos(pieces, config, roles), pieces.last if eos is None else eos, ends)


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no object")
    return value


def _pieces(folder: Path, config: Mapping[str, Any], *, roles: Mapping[str, str], template: str | None) -> Pieces:
    described = _json(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    if model.is_file():
        added = {piece: id for piece, id in _json(folder / "added_tokens.json").items() if type(id) is int}
        decoder = config.get("added_tokens_decoder") or {}
        added |= {token["content"]: int(id) for id, token in decoder.items()}
        pieces = SentencePieces(model.read_bytes(), added=added, legacy=config.get("legacy", True) is not False)
        ours = (*TAG_NAMES.values(), roles.get("audio_token"))
        if not described or all(
            piece in ours or (id < pieces.count and pieces.id_to_piece(id) == piece)
            for piece, id in _vocabulary(described)
        ):
            return pieces
    added = [token["content"] for token in described["added_tokens"]]
    written = _probe(template, roles)
    families = (token for family in TEMPLATES.values() for token in family.tokens)
    control = {*roles.values(), *families, *(token for token in added if token in written)}
    return JsonPieces(described, where=folder, control=control)


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


def _without_pictures(source: str | None) -> str | None:
    """Of a template that `export --layout hf` wrote (`checkpoints/chat_template.py`), the base's own: what comes
    first there puts tags into the text, which are put among the ids here."""
    _, ours, own = (source or "").partition(PICTURES.read_text(encoding="utf-8"))
    if not ours:
        return source
    own = own.removesuffix(SOUNDS_END.read_text(encoding="utf-8"))
    inner, spaced, _ = own.removeprefix("{%- set written %}").rpartition("{%- endset %}\n{{- (written | ")
    return inner if spaced else own


def _probe(source: str | None, roles: Mapping[str, str]) -> str:
    """What a template writes around a question, an answer and another question, and a system turn if it knows any."""
    if source is None:
        return ""
    template = Template(source=source, where="", roles=roles, control={})
    written, turns = "", ("user", "assistant", "user")
    for said in (turns, ("system", *turns)):
        with contextlib.suppress(MoextendError):
            written += template.render([{"role": role, "content": "x"} for role in said], open=True)
    return written


def _templates(files: _Files, *, rows: int | None, folder: Path) -> dict[str, Template]:
    """The checkpoint's own under "own", and the families whose tokens the vocabulary has."""
    every = files.pieces.control
    control = {name: token for name, token in every.items() if rows is None or token.id < rows}
    written = _probe(files.template, files.roles)
    if beyond := [name for name in every if name not in control and name in written]:
        raise MoextendError(
            f"the chat template in {folder} writes {', '.join(beyond)}, but the model's vocabulary ends at row {rows}"
        )
    sources = {name: family.source for name, family in TEMPLATES.items() if control.keys() >= set(family.tokens)}
    if files.template is not None:
        sources["own"] = files.template
    return {
        name: Template(
            source=source,
            where=f"the chat template in {folder}" if name == "own" else f"the template {name} for {folder}",
            roles=files.roles,
            control=control,
        )
        for name, source in sources.items()
    }


def _ends_of_templates(templates: Mapping[str, Template]) -> Iterator[int]:
    for template in templates.values():
        with contextlib.suppress(MoextendError):  # it is said where the template is used
            yield end_of(template)


def _prompt(pieces: Pieces, templates: Mapping[str, Template], template: str) -> str | None:
    """Its own template's name, else that of its family or of its tokens. A tokenizer that has none of these but pieces
    for bytes is of Mixtral's and Llama 2's time."""
    if "own" in templates:
        return "mixtral" if is_mixtral(templates["own"]) else "own"
    by_tokens = (name for name, family in TEMPLATES.items() if family.tokens)
    known = next((name for name in (template, *by_tokens) if name in templates), None)
    return known or ("mixtral" if byte_pieces(pieces) else None)


def _busy(files: _Files, ends: Iterable[int], templates: Mapping[str, Template]) -> frozenset[int]:
    """Control tokens that have a use: those with a role, ends of answers, and what templates name or write."""
    pieces = files.pieces
    written = "\n".join(template.source + _probe(template.source, template.roles) for template in templates.values())
    used = {token.id for piece, token in pieces.control.items() if piece in written}
    named = {pieces.piece_to_id(piece) for piece in files.roles.values()}
    return frozenset(id for id in (used | named | set(ends) | {pieces.first, pieces.unknown}) if id is not None)
