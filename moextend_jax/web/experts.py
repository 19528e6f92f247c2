"""What a model's experts did with one text, as HTML: pictures tinted patch by patch, and every token's experts.

In: a `Routing`, and the pictures as their tower frames them. Out: markup without scripts; the browser shows the numbers
of a patch or a token while the mouse is over it. All text is escaped: it is what somebody typed, or what a model said.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from moextend_jax.evaluate.pictures import as_png
from moextend_jax.evaluate.routed import Routing

MEAN = -1
"""In place of a layer: the mean over the extended layers."""
MOST_TOKENS, MOST_FRAMES = 600, 16
"""Tokens of a text and pictures that are shown, the last of them: a browser has to lay them out."""

CSS = """
.experts{font-size:14px;line-height:1.5}
.experts .frames{display:grid;grid-template-columns:repeat(auto-fit,minmax(100px,1fr));gap:6px;max-width:340px}
.experts .frame{position:relative;border-radius:8px;overflow:hidden;line-height:0}
.experts .frame img{display:block;width:100%;filter:grayscale(.75)}
.experts .frame svg{position:absolute;inset:0;width:100%;height:100%}
.experts .frame rect{fill:#ff5a00;stroke:#8886;stroke-width:.01}
.experts .frame rect:hover{stroke:#fff;stroke-width:.06}
.experts .tokens{display:flex;flex-wrap:wrap;gap:3px;margin:10px 0}
.experts .token{border:1px solid #8885;border-radius:5px;padding:0 5px;min-width:1.6em;text-align:center}
.experts .token b{display:block;font-weight:500;white-space:pre}
.experts .token small{display:block;opacity:.75;font-size:11px;white-space:nowrap}
.experts .scale{display:inline-block;width:90px;height:.7em;border-radius:3px;margin:0 6px;
background:linear-gradient(90deg,#ff5a0000,#ff5a00)}
.experts p{margin:6px 0}
"""


class Frame(NamedTuple):
    """A picture, or a frame of a video, as the tower of `medium` takes it.

    grid: its patches along a side, 0 where they have no place in it. first: which of the medium's `Routing.patches` is
      its first.
    """

    picture: Image.Image
    grid: int
    first: int
    medium: str


class Seen(NamedTuple):
    """What is shown of one model's answer.

    base: its number of pretrained experts. first_layer: the number of the first layer that routes; extended: numbers of
      the extended ones.
    frames: the pictures of the text, in their order.
    """

    title: str
    answer: str
    routing: Routing
    base: int
    first_layer: int
    extended: tuple[int, ...]
    frames: tuple[Frame, ...] = ()


def share_of_new(seen: Seen, layer: int) -> np.ndarray:
    """The weight that each token gives to new experts, `[tokens]`: of a layer, or the mean over the extended ones."""
    routing = seen.routing
    new_ZTk = (routing.picks >= seen.base) & (routing.picks < len(routing.experts))
    share_ZT = np.where(new_ZTk, routing.weights, 0.0).sum(-1)
    rows = [z - seen.first_layer for z in seen.extended] if layer == MEAN else [layer - seen.first_layer]
    return share_ZT[rows].mean(0) if rows else np.zeros(share_ZT.shape[1])


def chosen(seen: Seen, layer: int, token: int) -> list[tuple[str, float]]:
    """The experts of a token in a layer with their weights, as the router ordered them."""
    routing, z = seen.routing, layer - seen.first_layer
    pairs = zip(routing.picks[z, token].tolist(), routing.weights[z, token].tolist(), strict=True)
    return [(routing.experts[expert], weight) for expert, weight in pairs if expert < len(routing.experts)]


def render(seen: Seen, layer: int) -> str:
    """The pictures and the tokens of an answer in a layer (`MEAN`: over the extended layers)."""
    share_T = share_of_new(seen, layer)
    of = "mean of the extended layers" if layer == MEAN else f"layer {layer}"
    parts = [f"<p><b>{escape(seen.title)}</b>: {escape(seen.answer) or '(nothing)'}</p>"]
    if seen.frames:
        frames = "".join(_frame(seen, frame, layer, share_T) for frame in seen.frames[-MOST_FRAMES:])
        parts.append(f'<div class="frames">{frames}</div>')
    if seen.extended:
        parts.append(f'<p>Weight of new experts, {of}: 0<span class="scale"></span>1</p>')
    else:
        parts.append(f"<p>This model has no new experts. Numbers: {of}.</p>")
    return f'<div class="experts">{"".join(parts)}{_tokens(seen, layer, share_T)}</div>'


def _frame(seen: Seen, frame: Frame, layer: int, share_T: np.ndarray) -> str:
    data, cells = as_png(frame.picture), []
    for token, medium in enumerate(seen.routing.media):
        patch = int(seen.routing.patches[token]) - frame.first
        if medium == frame.medium and 0 <= patch < frame.grid**2:
            y, x = divmod(patch, frame.grid)
            cells.append(
                f'<rect x="{x}" y="{y}" width="1" height="1" fill-opacity="{0.8 * share_T[token]:.2f}">'
                f"<title>{escape(_numbers(seen, layer, token, f'patch {patch}'))}</title></rect>"
            )
    return (
        f'<div class="frame"><img alt="the picture as the model sees it" src="data:image/png;base64,{data}"/>'
        f'<svg viewBox="0 0 {frame.grid} {frame.grid}" preserveAspectRatio="none">{"".join(cells)}</svg></div>'
    )


def _tokens(seen: Seen, layer: int, share_T: np.ndarray) -> str:
    """Words and marks; patches are in the pictures, where there are some."""
    drawn = {frame.medium for frame in seen.frames if frame.grid}
    shown = [t for t, medium in enumerate(seen.routing.media) if medium not in drawn]
    chips = []
    for token in shown[-MOST_TOKENS:]:
        text = seen.routing.tokens[token].replace("\n", "⏎") or " "
        under = ""
        if layer != MEAN:
            picks = " ".join(name.replace("new ", "n") for name, _ in chosen(seen, layer, token))
            under = f"<small>{escape(picks)}</small>"
        chips.append(
            f'<span class="token" style="background:rgb(255 90 0 / {0.8 * share_T[token]:.2f})" '
            f'title="{escape(_numbers(seen, layer, token, repr(seen.routing.tokens[token])))}">'
            f"<b>{escape(text)}</b>{under}</span>"
        )
    return f'<div class="tokens">{"".join(chips)}</div>'


def _numbers(seen: Seen, layer: int, token: int, what: str) -> str:
    """What the mouse is told: a line for each layer, or for the one that is shown."""
    layers = seen.extended if layer == MEAN else (layer,)
    lines = [
        f"layer {z}: " + ", ".join(f"{name} {weight:.2f}" for name, weight in chosen(seen, z, token)) for z in layers
    ]
    return "\n".join([what, *lines])
