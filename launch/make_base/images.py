"""Pictures with captions for pretraining the vision tower: drawn shapes and emoji, 64 x 64 RGB uint8.

Both are made here, nothing is downloaded but the font (Debian's fonts-noto-color-emoji, OFL) and the names (PyPI's
`emoji`, BSD, from Unicode's CLDR). The shapes are in the spirit of easy-VQA, never its images.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "orange": (255, 150, 0),
    "purple": (128, 0, 128),
    "pink": (255, 105, 180),
    "cyan": (0, 225, 255),
    "olive": (115, 115, 0),
    "navy": (0, 0, 110),
    "dark green": (0, 100, 0),
    "tan": (210, 180, 130),
    "lavender": (170, 140, 240),
}
TINTS = {
    "white": (250, 250, 250),
    "gray": (230, 230, 230),
    "pink": (252, 232, 240),
    "blue": (232, 240, 252),
    "green": (232, 250, 234),
    "yellow": (253, 250, 230),
    "violet": (242, 230, 250),
    "orange": (252, 240, 230),
}
POLYGONS = {  # corners as angles in degrees, clockwise from the top, and radii in units of the shape's own
    "star": [(36 * i, (1.0, 0.42)[i % 2]) for i in range(10)],
    "diamond": [(0, 1.0), (90, 0.7), (180, 1.0), (270, 0.7)],
    "hexagon": [(60 * i + 30, 1.0) for i in range(6)],
}
COMMON = ("circle", "rectangle", "triangle")
RARE = ("ellipse", "cross", "ring", *POLYGONS)


def draw(pen: ImageDraw.ImageDraw, kind: str, box: tuple[float, float, float, float], colour: tuple[int, ...]) -> None:
    """One shape that fills `box` = (left, top, right, bottom)."""
    left, top, right, bottom = box
    x, y, half_width, half_height = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
    if kind in ("circle", "ellipse"):
        pen.ellipse(box, fill=colour)
    elif kind == "rectangle":
        pen.rectangle(box, fill=colour)
    elif kind == "triangle":
        pen.polygon([(left, bottom), (x, top), (right, bottom)], fill=colour)
    elif kind == "ring":
        pen.ellipse(box, outline=colour, width=max(2, round(half_width * 0.45)))
    elif kind == "cross":
        arm_x, arm_y = half_width / 3, half_height / 3
        pen.rectangle((left, y - arm_y, right, y + arm_y), fill=colour)
        pen.rectangle((x - arm_x, top, x + arm_x, bottom), fill=colour)
    else:
        turned = [(np.deg2rad(angle), radius) for angle, radius in POLYGONS[kind]]
        corners = [(x + half_width * r * np.sin(a), y - half_height * r * np.cos(a)) for a, r in turned]
        pen.polygon(corners, fill=colour)


def jitter(rng: np.random.Generator, colour: tuple[int, ...], amount: int) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-amount, amount + 1, 3), 0, 255))


def background(rng: np.random.Generator) -> tuple[tuple[int, ...], str]:
    """A plain colour and what to call it: pale mostly, as in most drawings."""
    if rng.random() < 0.85:
        name = str(rng.choice(list(TINTS)))
        return jitter(rng, TINTS[name], 8), f"pale {name}" if name != "white" else "white"
    name = str(rng.choice(list(COLOURS)))
    return jitter(rng, COLOURS[name], 20), name


def place(x: float, y: float) -> str:
    row = "top" if y < SIZE / 3 else "bottom" if y > 2 * SIZE / 3 else ""
    column = "left" if x < SIZE / 3 else "right" if x > 2 * SIZE / 3 else ""
    return " ".join(filter(None, (row, column))) or "middle"


class Shape(NamedTuple):
    """One shape of a scene; `x`, `y` its centre, `width` its width, all in pixels."""

    kind: str
    colour_name: str
    colour: tuple[int, ...]
    x: float
    y: float
    width: float
    height: float


def shape_set(rng: np.random.Generator) -> list[tuple[np.ndarray, str]]:
    """Four pictures that differ in the kind of shape and hardly else, so that a caption's noun has to be seen.

    Without such sets colour, place and background tell the pictures of a batch apart, and shape is learned last.
    """
    ground, ground_name = background(rng)
    name = contrasting(rng, ground)
    colour = jitter(rng, COLOURS[name], 12 if rng.random() < 0.7 else 0)
    side = rng.uniform(7, 36)
    x, y = rng.uniform(side / 2, SIZE - side / 2, 2)
    # Half are drawn large and scaled down, so that both hard and smooth edges are seen.
    zoom = int(rng.choice([1, 4]))
    says_size, says_place, says_ground = rng.random(3) < (0.4, 0.4, 0.4)
    pairs = []
    for kind in (*COMMON, str(rng.choice(RARE))):
        width, height = side * rng.uniform(0.85, 1.1, 2) if kind == "triangle" else (side, side)
        if kind in ("rectangle", "ellipse"):
            wide = rng.uniform(0.5, 1.0) if kind == "rectangle" else rng.uniform(0.45, 0.75)
            width, height = (side, side * wide) if rng.random() < 0.5 else (side * wide, side)
        shift_x, shift_y = rng.uniform(-3, 3, 2)
        shape = Shape(kind, name, colour, x + shift_x, y + shift_y, width, height)
        caption = describe(shape, says_size=says_size, says_place=says_place)
        caption += f" on a {ground_name} background" if says_ground else ""
        pairs.append((paint([shape], ground=ground, zoom=zoom), caption))
    return pairs


def shape_pair(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A picture of two shapes side by side, so that neither hides the other."""
    ground, _ = background(rng)
    shapes = []
    for half in range(2):
        name, side = contrasting(rng, ground), rng.uniform(8, 26)
        x = rng.uniform(half * 32 + side / 2, half * 32 + 32 - side / 2)
        kind = str(rng.choice(COMMON + RARE))
        shapes.append(Shape(kind, name, COLOURS[name], x, rng.uniform(side / 2, SIZE - side / 2), side, side))
    captions = [describe(shape, says_size=False, says_place=False) for shape in shapes]
    return paint(shapes, ground=ground, zoom=4), " and ".join(captions)


def contrasting(rng: np.random.Generator, ground: tuple[int, ...]) -> str:
    return str(rng.choice([name for name in COLOURS if np.abs(np.subtract(COLOURS[name], ground)).sum() > 120]))


def describe(shape: Shape, *, says_size: bool, says_place: bool) -> str:
    extent = max(shape.width, shape.height)
    size = "small " if extent < 14 else "large " if extent > 25 else ""
    words = f"a {size if says_size else ''}{shape.colour_name} {shape.kind}"
    return words + (f" at the {place(shape.x, shape.y)}" if says_place else "")


def paint(shapes: list[Shape], *, ground: tuple[int, ...], zoom: int) -> np.ndarray:
    image = Image.new("RGB", (SIZE * zoom, SIZE * zoom), ground)
    pen = ImageDraw.Draw(image)
    for s in shapes:
        left, top, right, bottom = s.x - s.width / 2, s.y - s.height / 2, s.x + s.width / 2, s.y + s.height / 2
        draw(pen, s.kind, (left * zoom, top * zoom, right * zoom, bottom * zoom), s.colour)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def render_emoji(font: Path) -> list[tuple[Image.Image, str]]:
    """Every emoji the font can draw in one glyph, less the skin-tone variants, with its name."""
    import emoji  # pyright: ignore[reportMissingImports] - only this script needs it

    face = ImageFont.truetype(str(font), 109)  # the only size of this bitmap font
    pictures = []
    for symbol, data in sorted(emoji.EMOJI_DATA.items()):
        name = data["en"].strip(":").replace("_", " ").lower()
        if data["status"] != emoji.STATUS["fully_qualified"] or "skin tone" in name or face.getlength(symbol) > 140:
            continue
        image = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(image).text((0, 4), symbol, font=face, embedded_color=True)
        if image.getbbox():
            pictures.append((image, name))
    return pictures


def emoji_picture(rng: np.random.Generator, pictures: list[tuple[Image.Image, str]]) -> tuple[np.ndarray, str]:
    """An emoji of varied size somewhere on a plain background, captioned with its name."""
    symbol, name = pictures[rng.integers(len(pictures))]
    ground, ground_name = background(rng)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    side = int(rng.integers(30, SIZE + 1))
    symbol = symbol.resize((side, side), Image.Resampling.BILINEAR)
    x, y = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
    image.paste(symbol, (x, y), symbol)
    return np.asarray(image), name + (f" on a {ground_name} background" if rng.random() < 0.2 else "")
