"""Which ids stand for images: a vocabulary in, three tokens out that text does not need, always the same ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from moextend_jax.config import ImageTags, MoextendError
from moextend_jax.data.pieces import Pieces

TAG_PIECES = {"start": "<0x02>", "end": "<0x03>", "pad": "<0x00>"}
"""ASCII's STX, ETX and NUL: 5, 6 and 3 in Mixtral-8x7B's vocabulary; 773, 774 and 771 in 8x22B-Instruct's, where 3, 5
and 6 are [INST] and its like."""
VISION_PIECES = {"start": "<|vision_start|>", "end": "<|vision_end|>", "pad": "<|image_pad|>"}
"""Qwen's text models have them, and no use for them."""
TAG_NAMES = {"start": "<image_start>", "end": "<image_end>", "pad": "<image>"}
"""What `moextend export --layout hf` calls tags that have no name; `<image>` is what LLaVA's processor multiplies. The
pad of another medium is called as its mark."""


def image_tags(pieces: Pieces, *, rows: int | None, busy: Collection[int], where: Path | str) -> ImageTags:
    """Three tokens that text does not need, always the same of a vocabulary: byte pieces; those made for images; tokens
    that are called unused or reserved; rows of the model beyond the tokenizer's; control tokens that nothing names, the
    last ones."""
    if bytes_of := byte_pieces(pieces):
        return ImageTags(**bytes_of)
    for made_for_images in (TAG_NAMES, VISION_PIECES):
        vision = {name: pieces.control.get(piece) for name, piece in made_for_images.items()}
        if all(vision.values()):
            return ImageTags(**{name: token.id for name, token in vision.items() if token})
    free = _free(pieces, rows=rows, busy=busy)[:3]
    if len(free) < 3:
        raise MoextendError(
            f"the tokenizer in {where} has no byte pieces {', '.join(TAG_PIECES.values())} for image tags, and only "
            f"{len(free)} of the 3 unused tokens that would do; append three rows to the vocabulary of the base"
        )
    return ImageTags(**dict(zip(TAG_PIECES, sorted(free), strict=True)))


def spare_ids(pieces: Pieces, tags: ImageTags, *, rows: int | None, busy: Collection[int]) -> tuple[int, ...]:
    """Ids beside the tags of pictures that text does not need, always the same of a vocabulary: pads of other media."""
    controls = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(0x20) if byte not in TEXT_BYTES]
    ids = [id for id in controls if id is not None and pieces.is_byte(id)] or _free(pieces, rows=rows, busy=busy)
    return tuple(id for id in ids if id not in tags.ids)


TEXT_BYTES = (0x09, 0x0A, 0x0D)
"""Tab, new line and return: control characters that texts have."""


def byte_pieces(pieces: Pieces) -> dict[str, int] | None:
    ids = {name: pieces.piece_to_id(piece) for name, piece in TAG_PIECES.items()}
    known = {name: id for name, id in ids.items() if id is not None and pieces.is_byte(id)}
    return known if len(known) == len(ids) else None


def _free(pieces: Pieces, *, rows: int | None, busy: Collection[int]) -> list[int]:
    beyond = range(pieces.size, rows or 0)
    named = (*pieces.spare(), *beyond, *pieces.idle())
    return [id for id in dict.fromkeys(named) if id not in busy]


def check_tags(tags: ImageTags, pieces: Pieces, *, busy: Collection[int], where: Path | str) -> None:
    if len(set(tags.ids)) < len(tags.ids):
        raise MoextendError(f"image tags {', '.join(map(str, tags.ids))} must be ids of their own")
    free = {*(byte_pieces(pieces) or {}).values(), *_free(pieces, rows=None, busy=busy)}
    made_for_images = (*TAG_NAMES.values(), *VISION_PIECES.values())
    free |= {pieces.control[piece].id for piece in made_for_images if piece in pieces.control}
    control = {token.id for token in pieces.control.values()}
    for name, id in dataclasses.asdict(tags).items():
        if id in free or id >= pieces.size:  # a row that a checkpoint has appended: no text has it
            continue
        piece = pieces.id_to_piece(id) or "no id"
        what = "a control token" if id in control else "what text is made of"
        own = byte_pieces(pieces)
        would = f"; there {', '.join(f'{TAG_PIECES[name]} {id}' for name, id in own.items())} would do" if own else ""
        raise MoextendError(f"image tag {name} = {id} is {piece}, {what} in the tokenizer in {where}{would}")
