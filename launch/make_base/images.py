"""Pictures with captions for pretraining the vision tower: drawn shapes and emoji, 64 x 64 RGB uint8.

Both are made here, nothing is downloaded but the font (Debian's fonts-noto-color-emoji, OFL) and the names (PyPI's
`emoji`, BSD, from Unicode's CLDR). The shapes are in the spirit of easy-VQA, never its images.
"""

from __future__ import annotations

from pathlib import Path

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
    "pentagon": [(72 * i, 1.0) for i in range(5)],
    "hexagon": [(60 * i + 30, 1.0) for i in range(6)],
    "star": [(36 * i, (1.0, 0.42)[i % 2]) for i in range(10)],
    "diamond": [(0, 1.0), (90, 0.7), (180, 1.0), (270, 0.7)],
}
SHAPES = ("circle", "circle", "rectangle", "rectangle", "square", "triangle", "triangle", "ellipse", "cross", "ring")
KINDS = (*SHAPES, *POLYGONS)


def draw(pen: ImageDraw.ImageDraw, kind: str, box: tuple[float, float, float, float], colour: tuple[int, ...]) -> None:
    """One shape that fills `box` = (left, top, right, bottom)."""
    left, top, right, bottom = box
    x, y, half_width, half_height = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
    if kind in ("circle", "ellipse"):
        pen.ellipse(box, fill=colour)
    elif kind in ("rectangle", "square"):
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


def shape_picture(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One or two shapes on a plain background; all that varies is named in the caption, or left out at random."""
    ground, ground_name = background(rng)
    # Half are drawn large and scaled down, so that both hard and smooth edges are seen.
    zoom = int(rng.choice([1, 4]))
    image = Image.new("RGB", (SIZE * zoom, SIZE * zoom), ground)
    pen = ImageDraw.Draw(image)
    two = rng.random() < 0.15
    parts = []
    for half in range(1 + two):
        kind = str(rng.choice(KINDS))
        name = str(rng.choice([c for c in COLOURS if np.abs(np.subtract(COLOURS[c], ground)).sum() > 120]))
        width = rng.uniform(7, 28 if two else 36)
        height = width
        if kind in ("rectangle", "ellipse"):
            height = width * rng.choice([rng.uniform(0.45, 0.8), rng.uniform(1.25, 2.0)])
            width, height = np.array([width, height]) * min(1, 36 / height)
        # Two shapes stand side by side, so that neither hides the other.
        low, high = (half * SIZE / 2, (half + 1) * SIZE / 2) if two else (0, SIZE)
        x = rng.uniform(low + width / 2, max(high - width / 2, low + width / 2))
        y = rng.uniform(height / 2, SIZE - height / 2)
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        colour = jitter(rng, COLOURS[name], 12 if rng.random() < 0.7 else 0)
        draw(pen, kind, (left * zoom, top * zoom, right * zoom, bottom * zoom), colour)
        extent = max(width, height)
        size = "small " if extent < 14 else "large " if extent > 25 else ""
        words = f"a {size if rng.random() < 0.8 else ''}{name} {kind}"
        parts.append(words + (f" at the {place(x, y)}" if rng.random() < 0.7 else ""))
    caption = " and ".join(parts)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))
    return pixels, caption + (f" on a {ground_name} background" if rng.random() < 0.6 else "")


def render_emoji(font: Path) -> list[tuple[Image.Image, str]]:
    """Every emoji the font can draw in one glyph, less the skin-tone variants, with its name."""
    import emoji

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
