"""TABLE of the kinds of media: encoded files of images, videos, sounds and features to what a medium's tower takes.

A row is a file of this package. `KINDS[medium.kind]` says, of a `config.Medium`:

    field          the key that names items of the kind in data: `{"audio": "a.wav"}`
    noun           what messages call one
    decode         (encoded, *, name, id, medium, upright, cut) -> item
                   encoded: the bytes of a file; name: for messages; id: of the `Fault` that is raised for a file that
                   is damaged, none of the kind, too large, or not finite (`faults.py`).
                   upright: pictures are turned as their EXIF orientation says. cut: of a sound that is longer than the
                   medium's, its first seconds; else that is a fault (`long_sound`).
    prepare        (item, *, medium, preparation, id) -> float32 of `input_shape(medium)`: the tower's input
    positions      (item, medium) -> how many of the tower's positions mean something
    input_shape    (medium) -> image [h, w, c]; video [t, h, w, c]; audio [b, l] for Whisper, [h, w, c] for a picture
                   tower; features [P, C]
    span_of_file   (encoded, *, name, id, medium, cut) -> `positions` of what `decode` would give, from headers: data
                   are laid out before they are decoded
    suffixes       of files that are taken for one where nothing but their name says what they are
    towers         classes of sizes of the towers that may read it

Nothing here trusts a file: how much memory it takes is known before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.config import IMAGE, Medium, MediumKind, Named
from moextend_jax.media import audio, features, image, video


class Kind(NamedTuple):
    """A row; the module's docstring says what each is."""

    field: MediumKind
    noun: str
    decode: Callable[..., Any]
    prepare: Callable[..., np.ndarray]
    positions: Callable[[Any, Medium], int]
    input_shape: Callable[[Medium], tuple[int, ...]]
    span_of_file: Callable[..., int]
    suffixes: tuple[str, ...]
    towers: tuple[type, ...]


def _row(field: MediumKind, noun: str, module: Any) -> Kind:
    return Kind(
        field, noun, module.decode, module.prepare, module.positions, module.input_shape, module.span_of_file,
        module.SUFFIXES, module.TOWERS,
    )  # fmt: skip


KINDS: dict[MediumKind, Kind] = {
    "image": _row("image", "image", image),
    "video": _row("video", "video", video),
    "audio": _row("audio", "sound", audio),
    "features": _row("features", "features", features),
}


KIND_OF_SUFFIX: dict[str, MediumKind] = {suffix: kind for kind in reversed(KINDS) for suffix in KINDS[kind].suffixes}
"""If several kinds have a suffix, the first of them."""
SOUNDS_UNREAD = ("mp3", "m4a", "aac", "wma")


def kind_of_file(name: Any) -> MediumKind:
    """By its suffix; a picture where that says nothing else, and so is what is not a name."""
    suffix = name.rpartition(".")[2].lower() if isinstance(name, str) else ""
    return "audio" if suffix in SOUNDS_UNREAD else KIND_OF_SUFFIX.get(suffix, "image")


def plurals(kind: MediumKind) -> tuple[str, ...]:
    """What one item and several are called in data: `image`, `images`."""
    return (kind,) if kind.endswith("s") else (kind, f"{kind}s")


def mark_of(name: str, kind: MediumKind) -> str:
    """What stands for an item in text: `<audio>` where the medium is called as its kind, else `<audio:speech>`."""
    return f"<{kind}>" if name == kind else f"<{kind}:{name}>"


IMAGE_MARK = mark_of(IMAGE, "image")
PICTURE = Medium()
IMAGES_ALONE: Named[Medium] = Named({IMAGE: PICTURE})
"""The media of a run that says nothing else."""
