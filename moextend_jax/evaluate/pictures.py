"""Pictures of questions: a benchmark's files or encoded bytes in, pixels as the tower expects them out; and small ones
for reports."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from PIL import Image

from moextend_jax.config import Medium, MoextendError
from moextend_jax.evaluate.benchmarks.question import Mistakes, Question, check_images, image_bytes
from moextend_jax.media.image import decode_image, prepare_image, tower_of

THREADS = 8
PIXELS = 256
"""The longest side of a picture in a report."""


def as_png(picture: Image.Image) -> str:
    """Base64 of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


class QuestionPictures:
    """Reads pictures by number; questions about the same picture share its number."""

    field = "media"

    def __init__(self, questions: Sequence[Question], *, medium: Medium, preparation: Literal["pad", "crop"]):
        self.medium, self._tower = medium, tower_of(medium)
        self._preparation: Literal["pad", "crop"] = preparation
        self._questions: list[Question] = []  # by picture number: the first that asks about it
        numbers: dict[Hashable, int] = {}
        self.numbers: list[tuple[int, ...]] = []
        """For each question the number of its picture, `()` where it has none."""
        for question in questions:
            if question.image is None:
                self.numbers.append(())
                continue
            same = hashlib.sha256(question.image).digest() if isinstance(question.image, bytes) else question.image
            if same not in numbers:
                numbers[same] = len(self._questions)
                self._questions.append(question)
            self.numbers.append((numbers[same],))

    def __len__(self) -> int:
        return len(self._questions)

    def check(self, progress: Callable[[], None] = lambda: None) -> None:
        """Decodes every picture once, so that a broken one stops a run before it begins.

        Raises:
          MoextendError: names the lines of questions whose picture is missing or cannot be read.
        """
        check_images(self._questions)
        mistakes = Mistakes()
        with ThreadPoolExecutor(THREADS) as pool:
            for question, wrong in zip(self._questions, pool.map(self._wrong, self._questions), strict=True):
                if wrong:
                    mistakes.add(question.where, wrong)
                progress()
        mistakes.check("Download these images again")

    def read(self, rows_BM: np.ndarray, /) -> np.ndarray:
        """Pixels `[B, M, h, w, c]` of pictures by number, zeros for -1."""
        size = self._tower.image_size
        images_BMhwc = np.zeros((*rows_BM.shape, size, size, 3), np.float32)
        places = list(zip(*np.nonzero(rows_BM >= 0), strict=True))
        with ThreadPoolExecutor(THREADS) as pool:
            pixels = pool.map(lambda place: self._pixels(self._questions[rows_BM[place]]), places)
            for place, image_hwc in zip(places, pixels, strict=True):
                images_BMhwc[place] = image_hwc
        return images_BMhwc

    def _pixels(self, question: Question) -> np.ndarray:
        encoded = image_bytes(question)
        assert encoded is not None
        named = "its picture" if isinstance(question.image, bytes) else f"image {question.image}"
        picture = decode_image(encoded, name=named, upright=False)  # as those who publish scores do
        tower, preparation = self._tower, self._preparation
        return prepare_image(picture, size=tower.image_size, preparation=preparation, tower=tower, id=question.where)

    def _wrong(self, question: Question) -> str:
        try:
            self._pixels(question)
        except MoextendError as error:
            return str(error)
        return ""
