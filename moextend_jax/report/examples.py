"""Sample images with question, answers and the patches that new experts took.

In: examples.json; its texts come from a data set, so all are escaped, and its images are decoded and written anew.
Out: HTML; "" where there are no examples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from moextend_jax.evaluate.benchmarks.scores import are_right
from moextend_jax.report.markup import how
from moextend_jax.report.results_pictures import title_of
from moextend_jax.report.workdir import malformed

MOST_EXAMPLES = 24
IMAGE_PIXELS = 256
"""Examples shown, and the longest side of their images: what keeps the file small."""


def cards(examples: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None = None) -> str:
    """One card per example, the first MOST_EXAMPLES of them; MoextendError if one is malformed or its image is none."""
    if not examples:
        return ""
    shown = examples[:MOST_EXAMPLES]
    with malformed("examples.json"):
        shares = [np.asarray(example["new_expert_share"], float) for example in shown if "new_expert_share" in example]
        top = max((share.max() for share in shares if share.size), default=0.0) or 1.0
        drawn = "".join(_card(example, top=top, summary=summary) for example in shown)
    return f'<div class="cards">{drawn}</div>' + how(
        "Left the image as the model sees it, right the same in grey with each patch tinted by how many of the "
        f'extended layers sent it to a new expert: 0%<span class="scale"></span>{top:.0%}.'
    )


def _card(example: Mapping[str, Any], *, top: float, summary: Mapping[str, Any] | None) -> str:
    image = small_image(str(example["image_png"]))
    frames = f'<div class="frame">{image}</div>'
    if "new_expert_share" in example:
        frames += f'<div class="frame grey">{image}{_overlay(example["new_expert_share"], top=top)}</div>'
    answer, lines = str(example["answer"]), []
    for model, said in example["predictions"].items():
        (right,) = are_right([answer], [str(said)])
        mark = '<i class="good">✓</i>' if right else '<i class="bad">✗</i>'
        name = title_of(model, summary)
        lines.append(f"<li><span>{escape(name)}</span><span>{escape(str(said))} {mark}</span></li>")
    return (
        f'<div class="card"><div class="pair">{frames}</div><p><b>{escape(str(example["question"]))}</b></p>'
        f"<ul><li><span>Right answer</span><span>{escape(answer)}</span></li>{''.join(lines)}</ul></div>"
    )


def small_image(encoded: str) -> str:
    """The markup of a base64 image, its content `image_data`."""
    data, small = image_data(encoded)
    look = ' class="drawing"' if small else ""
    return f'<img{look} alt="" src="{data}">'


def image_data(encoded: str) -> tuple[str, bool]:
    """A data URL, and whether it is a drawing of a few pixels. Decoded and written anew: what is no image cannot reach
    the page, and a photograph cannot swell it."""
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
        image = image.convert("RGB")
    image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    # Drawings of a few pixels keep their edges; photographs are a tenth of the size as JPEG.
    small, file = max(image.size) <= 128, io.BytesIO()
    image.save(file, "PNG" if small else "JPEG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/{'png' if small else 'jpeg'};base64,{data}", small


def _overlay(share: Any, *, top: float) -> str:
    share_gg = np.asarray(share, float)
    if share_gg.ndim != 2:
        raise ValueError(f"new_expert_share has {share_gg.ndim} axes, not 2")
    rows, columns = share_gg.shape
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1" height="1" opacity="{0.85 * value / top:.2f}"/>'
        for (y, x), value in np.ndenumerate(share_gg)
        if value > 0
    )
    return f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">{cells}</svg>'
