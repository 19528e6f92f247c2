"""Media that are left out of conversations: as often as asked, by row and medium alone, and the rest untouched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moextend_jax.config import Batch, FeaturesConfig, ImageTags, Medium, MoextendError, Named, Recipe
from moextend_jax.data.batches import Share, batches
from moextend_jax.data.missing import media_left_out, without_media
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer
from moextend_jax.settings import StageSettings

pytestmark = pytest.mark.smoke

MARKS = {"image": "<image>", "sound": "<audio:sound>", "speech": "<audio:speech>"}
TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\n<audio:speech>\nAnd <audio:sound> <image>?"},
    {"from": "gpt", "value": "A dog."},
]
ITEMS = {"image": ["a.png", "b.png"], "sound": ["s.wav"], "speech": ["q.wav"]}


def drawn(missing, *, rows=2000, seed=0, epoch=0):
    return [media_left_out(missing, seed=seed, epoch=epoch, row=row) for row in range(rows)]


def test_each_medium_is_missing_as_often_as_asked():
    lacking = drawn({"image": 0.25, "sound": 0.5})
    # three standard deviations of 2000 draws: 0.029 and 0.034
    assert sum("image" in out for out in lacking) / 2000 == pytest.approx(0.25, abs=0.029)
    assert sum("sound" in out for out in lacking) / 2000 == pytest.approx(0.5, abs=0.034)
    assert sum({"image", "sound"} <= out for out in lacking) / 2000 == pytest.approx(0.125, abs=0.023)


def test_never_and_always():
    assert drawn({"image": 0.0, "sound": 1.0}, rows=200) == [frozenset({"sound"})] * 200


def test_the_draw_depends_on_seed_epoch_row_and_medium_alone():
    rows = drawn({"image": 0.3, "sound": 0.3})
    assert rows[1500:] == [
        media_left_out({"sound": 0.3, "image": 0.3}, seed=0, epoch=0, row=n) for n in range(1500, 2000)
    ]
    assert [out & {"image"} for out in rows] == drawn({"image": 0.3})  # another medium's probability changes nothing
    assert rows != drawn({"image": 0.3, "sound": 0.3}, epoch=1)
    assert rows != drawn({"image": 0.3, "sound": 0.3}, seed=1)
    assert [("image" in out) for out in rows] != [("sound" in out) for out in rows]


def test_marks_and_items_of_the_media_go_and_nothing_else():
    before = [dict(turn) for turn in TURNS]
    turns, items = without_media(TURNS, ITEMS, marks=MARKS, out={"image"})
    assert turns == [TURNS[0], {"from": "human", "value": "<audio:speech>\nAnd <audio:sound> ?"}, TURNS[2]]
    assert items == {"sound": ["s.wav"], "speech": ["q.wav"]}
    turns, items = without_media(TURNS, ITEMS, marks=MARKS, out={"sound", "speech", "absent"})
    assert turns[1]["value"] == "<image>\nAnd  <image>?" and items == {"image": ["a.png", "b.png"]}
    assert without_media(TURNS, ITEMS, marks=MARKS, out=()) == (TURNS, ITEMS)
    assert before == TURNS


def test_what_is_no_turn_is_left_for_encoding_to_refuse():
    odd = [None, {"from": "human"}, {"value": 3}]
    assert without_media(odd, {}, marks=MARKS, out={"image"}) == (odd, {})


# --- in the pipeline --------------------------------------------------------------------------------------------------

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"
ROWS = 40


class Talk(NamedTuple):
    """What the pipeline reads of an `Example`."""

    id: str
    conversations: list[dict[str, str]]
    by_medium: dict[str, tuple[int, ...]]
    fault: None = None


class Numbers(NamedTuple):
    """Reads items of so many tokens, whose features are their own number and one more."""

    tokens: int
    field: str = "features"

    @property
    def medium(self) -> Medium:
        return Medium(kind="features", tower=FeaturesConfig(width=2, patches=self.tokens))

    def row(self, ref: int) -> int:
        return ref

    def span(self, row: int) -> int:
        return self.tokens

    def read(self, rows_BM: np.ndarray, on_fault: object = None) -> np.ndarray:
        return np.broadcast_to((rows_BM + 1.0)[..., None, None], (*rows_BM.shape, self.tokens, 2))


SOURCE: Any = [
    Talk(
        str(row),
        [{"from": "human", "value": "<image>\n<audio:sound>\nwhat?"}, {"from": "gpt", "value": "a dog"}],
        {"image": (row,), "sound": (row,)},
    )
    for row in range(ROWS)
]
READERS: Any = {"image": Numbers(2), "sound": Numbers(3)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    sound = Medium(
        kind="audio",
        mark="<audio:sound>",
        tags=ImageTags(start=8, end=9, pad=7),
        tower=FeaturesConfig(width=2, patches=3),
    )
    return dataclasses.replace(load_tokenizer(BASE), others=Named({"sound": sound}))


def fed(
    tokenizer: Tokenizer, *, missing: dict[str, float], seed: int | None = 3, share: Share = Share(),  # noqa: B008
    items: dict[str, int] = {"sound": 1},  # noqa: B006
):  # fmt: skip
    stage = StageSettings(
        data="none", steps=1, batch_size=8, length=32, items_per_row=items, missing=missing
    )  # fmt: skip
    return batches(
        SOURCE, stage=stage, tokenizer=tokenizer, recipe=Recipe(), readers=READERS, seed=seed, epochs=2, share=share
    )


def sounds(batch: Batch) -> list[tuple[int, int]]:
    """Of every row the number of its image, and of its sound, -1 where it has none."""
    assert [int(count) for count in (np.asarray(batch.places_BL) >= 0).sum(axis=1)] == [
        5 if sound else 2 for sound in batch.features["sound"][:, 0, 0, 0]
    ]
    return [
        (int(image) - 1, int(sound) - 1)
        for image, sound in zip(batch.features["image"][:, 0, 0, 0], batch.features["sound"][:, 0, 0, 0], strict=True)
    ]


def test_conversations_go_without_a_medium_and_another_epoch_draws_anew(tokenizer: Tokenizer):
    rows = [row for batch in fed(tokenizer, missing={"sound": 0.5}) for row in sounds(batch)]
    assert sorted(image for image, _ in rows) == sorted([*range(ROWS), *range(ROWS)])
    lacking = [sorted(image for image, sound in rows if sound < 0)]
    drawn = [
        row for epoch in range(2) for row in range(ROWS) if media_left_out({"sound": 0.5}, seed=3, epoch=epoch, row=row)
    ]
    assert lacking == [sorted(drawn)] and 20 < len(drawn) < 60
    assert all(sound in (image, -1) for image, sound in rows)


def test_neither_resuming_nor_the_number_of_processes_changes_who_goes_without(tokenizer: Tokenizer):
    iterator = iter(fed(tokenizer, missing={"sound": 0.5}))
    first, states = [], []
    for batch in iterator:
        first.append(sounds(batch))
        states.append(iterator.get_state())
    again = iter(fed(tokenizer, missing={"sound": 0.5}))
    again.set_state(states[5])
    assert [sounds(batch) for batch in again] == first[6:]
    halves = [fed(tokenizer, missing={"sound": 0.5}, share=Share((part,), 2)) for part in range(2)]
    assert [sounds(one) + sounds(other) for one, other in zip(*halves, strict=True)] == first


def test_without_the_setting_and_without_a_seed_nothing_is_missing(tokenizer: Tokenizer):
    for missing, seed in (({}, 3), ({"sound": 0.0}, 3), ({"sound": 1.0}, None)):
        rows = (row for batch in fed(tokenizer, missing=missing, seed=seed) for row in sounds(batch))
        assert all(image == sound for image, sound in rows)
    assert all(sound < 0 for batch in fed(tokenizer, missing={"sound": 1.0}) for _, sound in sounds(batch))


def test_a_medium_that_is_none_is_refused(tokenizer: Tokenizer):
    with pytest.raises(MoextendError, match=r"missing\.smell: no such medium; there are image, sound"):
        fed(tokenizer, missing={"smell": 0.5})
    with pytest.raises(MoextendError, match=r"missing.*at most 1"):
        fed(tokenizer, missing={"sound": 1.5})
    with pytest.raises(MoextendError, match=r"items_per_row\.image: of pictures it is images_per_row"):
        fed(tokenizer, missing={}, items={"image": 2})
