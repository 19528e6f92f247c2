"""What can be wrong with data: one table of kinds of faults, and what a run does about each.

Goes in: `FaultSettings` of a run, and `Fault`s, which reading data raises. Comes out: an error, or a count of what was
skipped, `counts_G`: conversations read, then those skipped by kind (G = 1 + kinds, in the table's order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from moextend_jax.config import Medium, MoextendError
from moextend_jax.settings import FaultSettings


class Kind(NamedTuple):
    """A kind of fault. file: it is an image's file (a sound's, ...), so all conversations that name the file have it;
    else it is one conversation's. means: what is wrong, for messages."""

    file: bool
    means: str


KINDS: dict[str, Kind] = {
    "missing": Kind(True, "no such file"),
    "outside": Kind(True, "path leaves the folder of images: absolute, .. or a link (keep follows it)"),
    "url": Kind(True, "a URL in place of a path"),
    "unreadable": Kind(True, "the file system refuses the file, or its data are damaged"),
    "truncated": Kind(True, "the file ends too early"),
    "empty_file": Kind(True, "zero bytes, or a sound without samples"),
    "oversized": Kind(True, "more bytes, pixels, frames or seconds than a file may have"),
    "not_image": Kind(True, "not an image file"),
    "not_finite": Kind(True, "NaN or infinite pixels, samples or features"),
    "entry": Kind(False, "not a conversation in any usual form, or more than is read"),
    "encoding": Kind(False, "text that is not UTF-8"),
    "reserved": Kind(False, "text with a control character that stands for images"),
    "turn": Kind(False, "a turn without a role or whose value is not text"),
    "roles": Kind(False, "a role that is none of system, human and gpt"),
    "order": Kind(False, "turns that do not alternate human, gpt"),
    "empty_answer": Kind(False, "an answer without text"),
    "marks": Kind(False, "marks that do not match the images, sounds, ..."),
    "too_long": Kind(False, "more tokens than a row has"),
    "too_many_images": Kind(False, "more images than a row has room for"),
    "duplicate_id": Kind(False, "the id of an earlier conversation"),
    "not_video": Kind(True, "not pictures one after another in a form that is read"),
    "not_sound": Kind(True, "not a WAV, FLAC or OGG file"),
    "not_features": Kind(True, "not one array of floating-point numbers in a .npz or .npy file"),
    "wrong_shape": Kind(True, "features of another width than the medium's, or more positions"),
    "long_sound": Kind(True, "a sound longer than its medium hears (keep takes the beginning)"),
    "unknown_medium": Kind(False, "an item of a medium that the run does not have"),
}
"""Others are added at the end: checkpoints of runs hold counts in this order."""

MOST_BYTES = 64 * 2**20
"""Of an item's file."""


def wrong_size(size: int) -> str:
    """The kind of fault of a file of `size` bytes; "" for none."""
    return ("" if size <= MOST_BYTES else "oversized") if size else "empty_file"


LEAST_READ = 1000
"""A share of skipped conversations is taken of at least so many: one bad one at the start of a run is not 100 %."""


class Fault(MoextendError):
    """An error in data with its kind; `id` names the image or the conversation, and is in the message too."""

    def __init__(self, message: str, kind: str, id: str = ""):
        assert kind in KINDS
        super().__init__(message)
        self.kind, self.id = kind, id

    def __reduce__(self):  # worker processes send it
        return type(self), (str(self), self.kind, self.id)

    def again(self) -> Fault:
        """The same to raise once more, without the traces of the last time."""
        return Fault(str(self), self.kind, self.id)


STRICT = FaultSettings(policies=cast(Any, {kind: "error" for kind in KINDS if kind != "duplicate_id"}))
"""Nothing is skipped."""


def counts(kinds: Iterable[str] = (), *, read: int = 0) -> np.ndarray:
    """counts_G of `read` conversations, of which one was skipped for each of `kinds`."""
    counts_G = np.zeros(1 + len(KINDS), np.int32)
    counts_G[0] = read
    for kind in kinds:
        counts_G[1 + list(KINDS).index(kind)] += 1
    return counts_G


def restored(saved: Sequence[int]) -> np.ndarray:
    """counts_G of a checkpoint, which may have been written before there were as many kinds."""
    return np.pad(np.asarray(saved, np.int64), (0, 1 + len(KINDS) - len(saved)))


def _by_kind(counts_G: Any) -> Counter[str]:
    """How many were skipped, of the kinds that occurred."""
    return Counter({kind: int(count) for kind, count in zip(KINDS, counts_G[1:], strict=True) if count})


def named(counts_G: Any) -> dict[str, int]:
    """What a metrics file says: `skipped`, and `skipped/KIND` of the kinds that occurred."""
    by_kind = _by_kind(counts_G)
    return {"skipped": by_kind.total(), **{f"skipped/{kind}": count for kind, count in by_kind.items()}}


def too_many(skipped: float, read: float, settings: FaultSettings) -> bool:
    """Whether more were skipped than `most_skipped` of those read, or of LEAST_READ."""
    return skipped > settings.most_skipped * max(read, LEAST_READ)


def check_share(counts_G: Any, settings: FaultSettings, *, conversations: int = 0) -> None:
    """Raises where more was skipped than `most_skipped` of the conversations read so far. Of `conversations` that are
    fewer than LEAST_READ each reading may skip as many as the first, which `moextend data check` has judged."""
    read, skipped = int(counts_G[0]), int(sum(counts_G[1:]))
    readings = max(1, -(-read // conversations)) if conversations else 1
    if too_many(skipped, max(read, readings * LEAST_READ), settings):
        raise MoextendError(
            f"{skipped} of {read} conversations were skipped ({described(counts_G)}), more than most_skipped = "
            f"{settings.most_skipped:g} allows; `moextend data check` names them, raise most_skipped to go on without"
        )


def described(counts_G: Any) -> str:
    """How many were skipped of each kind, the most frequent first: "3 missing, 1 marks"."""
    return ", ".join(f"{count} {kind}" for kind, count in _by_kind(counts_G).most_common()) or "none"


def refuse(faults: Iterable[Fault], settings: FaultSettings, *, where: str, hint: str = "") -> None:
    """Raises the faults whose policy is `error` as one that names the first few and says how many there are."""
    first: list[Fault] = []
    count = 0
    for fault in faults:
        if settings.policy(fault.kind) == "error":
            count += 1
            first = [*first, fault][:NAMED]
    if count:
        what = f"{where}: {count} faults: " if count > 1 else ""
        more = f"; and {count - NAMED} more" if count > NAMED else ""
        raise Fault(f"{what}{'; '.join(map(str, first))}{more}{hint}", first[0].kind, first[0].id)


NAMED = 3
"""Faults that the message of `refuse` names."""


def unknown_medium(id: str, marks: Iterable[str], media: Mapping[str, Medium], *, where: str = "") -> Fault | None:
    """The fault of an example, or an entry `where`, that has items of a medium which the run has not."""
    known = {medium.mark for medium in media.values()}
    unknown = next((mark for mark in marks if mark not in known), None)
    if unknown is None:
        return None
    having = f"there are {', '.join(f'{name} {medium.mark}' for name, medium in media.items()) or 'none'}"
    message = f"{where or f'example {id}'} has an item {unknown!a:.80}, and the run has no such medium; {having}"
    return Fault(f"{message}; `media` of a configuration adds one, as own:sounds has <audio>", "unknown_medium", id)
