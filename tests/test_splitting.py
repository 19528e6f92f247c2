"""Held-out data: no picture on both sides, the same choice whenever it is made, never more than asked for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from moextend_jax.config import MoextendError
from moextend_jax.data.datasets import Example, ItemRef, Source, distinct, mix
from moextend_jax.data.item_files import ItemFolder
from moextend_jax.data.items import Items
from moextend_jax.data.splitting import Mark, hold_out_pictures, marks_of, rows_of_part, without


class Rows(list):
    """Examples as the rows of a data set that was built."""

    def __getitem__(self, row):
        example = super().__getitem__(row)
        keys, numbers = [ref.key for ref in example.images], [ref.row for ref in example.images]
        return {
            "id": example.id.encode(), "conversations": json.dumps(example.conversations),
            "images": [key.encode() for key in keys], "image_rows": list(numbers),
        }  # fmt: skip

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def source(*keys_of_rows: Sequence[str], folder: str = "pictures", said: Sequence[str] = ()) -> Source:
    """Rows that show these pictures of a folder, and ask their number or what is `said`."""
    asked = said or [f"{n}{''.join(keys)}?" for n, keys in enumerate(keys_of_rows)]
    rows = Rows(
        Example(
            f"{n}{''.join(keys)}",
            [{"from": "human", "value": asked[n]}],
            tuple(ItemRef("image", key, ord(key[0])) for key in keys),
        )
        for n, keys in enumerate(keys_of_rows)
    )
    return Source(rows=rows, items={"image": Items((), folder=ItemFolder(Path(folder)))}, fingerprint="x")


def marks(rows: Source) -> set[Mark]:
    return set(itertools.chain.from_iterable(marks_of(rows)))


def split(rows: Source, part: float, seed: int = 0):
    return hold_out_pictures(rows, part=part, seed=seed, setting="evaluate.held_out")


def test_no_picture_is_on_both_sides_and_nothing_is_lost():
    rows = source(*"aabbccddee", "fg", "gh", "", "", "")
    for seed in range(20):
        held_out, rest = split(rows, 4, seed)
        assert 1 <= len(held_out) <= 4 and len(held_out) + len(rest) == len(rows)
        assert marks(held_out).isdisjoint(marks(rest)) and marks(held_out) | marks(rest) == marks(rows)
        assert [row.id for row in held_out] == sorted(
            (row.id for row in held_out), key=lambda id: int(id[:2].strip("abcdefgh"))
        )
    assert len({tuple(row.id for row in split(rows, 4, seed).held_out) for seed in range(20)}) > 5


def test_the_choice_belongs_to_the_pictures_and_not_to_the_order_or_number_of_rows():
    keys = "abcdefghijklmnopqrstuvwxyz"
    first = marks(split(source(*keys), 5).held_out)
    assert len(first) == 5 and first == marks(split(source(*reversed(keys)), 5).held_out)
    assert len(first & marks(split(source(*keys, *keys.upper()), 10).held_out)) >= 3  # of 5, whatever was added


def test_a_picture_of_several_names_is_one():
    rows = [
        source(["x.png"], ["images/x.png"], ["./x.png"], ["z/x.png"], ["images/z/x.png"], folder="a/b"),
        source(["x.png"], ["z/./x.png"], folder="a/b/images"),
        source(["b/x.png"], ["b/images/x.png"], folder="a"),
    ]
    first, second, third = ([mark.place for (mark,) in marks_of(of)] for of in rows)
    assert len({*first[:3], second[0], *third}) == 1 == len({*first[3:], second[1]})
    assert first[0] != first[3]


def test_a_picture_and_the_links_to_it_are_one(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "images/b.png", "c.array_record"):
        (tmp_path / name).touch()
    for link, to in {"l.png": "a.png", "images/m.png": "b.png", "all": ".", "r.array_record": "c.array_record"}.items():
        (tmp_path / link).symlink_to(to)
    same = [("a.png", "l.png", "all/a.png", "all/l.png"), ("b.png", "m.png", "images/m.png", "all/images/b.png")]
    rows = [f"{name}.array_record:1" for name in ("c", "r", "all/r")]
    for names in (*same, rows):
        assert len(marks(source(*[[name] for name in names], folder=str(tmp_path)))) == 1, names
    assert len(marks(source(["a.png"], ["b.png"], [rows[0]], ["c.array_record:2"], folder=str(tmp_path)))) == 4


def test_which_name_of_a_picture_comes_first_decides_nothing():
    keys = [name for letter in "abcdefgh" for name in (letter, f"images/{letter}")]
    first, second = ({row.images[0].key for row in split(source(*[[key] for key in of]), 6).held_out}
                     for of in (keys, keys[::-1]))  # fmt: skip
    assert len(first) == 6 and first == second


def test_rows_that_a_mixture_repeats_count_once():
    mixed = mix([source(*"abcdefgh"), source("x", "y", folder="others")], weights=[1, 1], names=["few", "many"])
    assert len(mixed) == 16 and len(distinct(mixed)) == 10
    held_out, rest = split(mixed, 9)
    assert len(held_out) == 9 and marks(held_out).isdisjoint(marks(rest))
    assert len(rest) in (1, 4)  # one of eight, or one of the two, which come four times
    with pytest.raises(MoextendError, match="cannot hold out 10 of 10 rows"):
        split(mixed, 10)


def test_pictures_with_more_rows_than_are_wanted():
    assert len(split(source(*"aaabbb"), 1).held_out) == 3
    with pytest.raises(MoextendError, match=r"evaluate.held_out: all 3 rows share pictures"):
        split(source("ab", "bc", "c"), 1)


def test_rows_of_text_that_say_the_same_are_on_one_side():
    said = "aabbccddeeffgg"
    for seed in range(10):
        parts = split(source(*[""] * len(said), said=said), 4, seed)
        held_out, rest = ({row.conversations[0]["value"] for row in part} for part in parts)
        assert len(held_out) == 2 and held_out.isdisjoint(rest)
    left = without(source("", "", "x", said="caa"), source("", said="a"))
    assert [row.conversations[0]["value"] for row in left] == ["c", "a"]  # the picture's row asks about another thing


def test_the_rows_of_other_data_lose_the_pictures_that_were_held_out():
    held_out, rest = split(source(*"abcdef"), 2)
    captions = source(*"fedcba", "xa", "")
    left = without(captions, held_out)
    assert marks(left).isdisjoint(marks(held_out)) and marks(rest) <= marks(left)
    others = source(*"abcdef", folder="others")
    assert len(without(others, held_out)) == 6  # pictures of these names, but others
    mixed = mix([source(*"xyz", folder="others"), source(*"abcdef")], weights=None, names=["one", "two"])
    assert len(without(mixed, held_out)) == 7


def test_pictures_in_rows_are_the_same_in_any_folder():
    """Their names are hashes of what they hold."""
    held_out, captions = source(["bytes ab"], folder="tests"), source(["bytes ab"], ["bytes cd"], ["ab.png"])
    assert [row.images[0].key for row in without(captions, held_out)] == ["bytes cd", "ab.png"]


def test_a_picture_is_one_whichever_folder_its_name_is_relative_to():
    held_out, captions = source("a", folder=str(Path("all/cats").resolve())), source(["cats/a"], ["a"], folder="all")
    assert [row.images[0].key for row in without(captions, held_out)] == ["a"]


@pytest.mark.parametrize(
    ("part", "rows", "count"),
    [(0.1, 6, 1), (0.1, 6000, 600), (1, 6, 1), (5, 6, 5), (0.9, 2, None), (6, 6, None), (0.5, 1, None)],
)  # fmt: skip
def test_parts_are_shares_or_counts(part: float, rows: int, count: int | None):
    if count is not None:
        assert rows_of_part(part, rows, setting="s") == count
        return
    with pytest.raises(MoextendError, match=rf"s = {part}: cannot hold out \d+ of {rows} rows"):
        rows_of_part(part, rows, setting="s")
