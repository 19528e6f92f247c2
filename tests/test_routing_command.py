"""`moextend routing collect | compare | plot` on tiny models: counts, distances, choices, pictures, mistakes."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from moextend_jax import cli
from moextend_jax.checkpoints import huggingface, train_state
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.config import RECIPES, ModelConfig, MoextendError, Named, with_vision
from moextend_jax.data.conversations import text_batch
from moextend_jax.extension import routing
from moextend_jax.parameters import with_arrays
from moextend_jax.routing import collect, command, compare
from moextend_jax.routing import stats as statistics
from moextend_jax.runs.askable import open_place
from moextend_jax.runs.run import open_run, remember, settings_of
from moextend_jax.settings import RunSettings

TEXT = with_vision(tiny.PLAIN, None)


@functools.cache
def collected(config: ModelConfig, **options: Any) -> statistics.Stats:
    arrays = tiny.arrays(config)
    return collect.collect(tiny.structure(config), arrays, [tiny.batch(), tiny.batch(seed=1)], **options)


def moved(seed: int) -> dict[str, Any]:
    """The plain model with other routers."""
    gate = tiny.arrays(tiny.PLAIN, seed=seed)["decoder/layers/moe/gate"]
    return {**tiny.arrays(tiny.PLAIN), "decoder/layers/moe/gate": gate}


@pytest.fixture(scope="module")
def pair() -> tuple[statistics.Stats, statistics.Stats]:
    """A model before and after a change of its routers, on the same tokens."""
    model, rows = tiny.structure(tiny.PLAIN), [tiny.batch(), tiny.batch(seed=1)]
    a, b = (collect.collect(model, arrays, rows) for arrays in (tiny.arrays(tiny.PLAIN), moved(5)))
    return a, b


def run(*arguments: object) -> int:
    return cli.call(["routing", *(str(argument) for argument in arguments)])


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_counts_are_those_that_the_extender_counts(pair, recipe: str):
    rows = [tiny.batch(), tiny.batch(seed=1)]
    model = tiny.structure(tiny.PLAIN)
    expected = routing.count_all(model, tiny.arrays(tiny.PLAIN), rows, recipe=RECIPES[recipe])
    counts = statistics.counts_of(pair[0], RECIPES[recipe].counted_picks)
    for name, part in expected._asdict().items():
        np.testing.assert_array_equal(getattr(counts, name), part, err_msg=name)


def test_an_extended_model_keeps_columns_that_a_layer_lacks_empty():
    stats = collected(tiny.EXTENDED)
    assert stats.outputs_Z.tolist() == [5, 4, 5] and stats.experts == 4
    for by_kind in (stats.picks_ZO, stats.least_ZO, stats.probs_ZO):
        for array_ZO in by_kind.values():
            assert not array_ZO[1, 4].any() and array_ZO[0].sum() > 0
    for kind, tokens in stats.tokens.items():
        assert (stats.least_ZO[kind].sum(axis=1) == tokens * stats.top_k).all()
        np.testing.assert_allclose(stats.probs_ZO[kind].sum(axis=1), 1, atol=1e-5)
        assert (stats.entropy_Z[kind] < np.log(stats.outputs_Z)).all() and (stats.entropy_Z[kind] > 0).all()


def with_layers(image: tuple[int, ...], sound: tuple[int, ...]) -> ModelConfig:
    """`tiny.BOTH` with experts 4 in some layers and 5 and 6 in others."""
    one, two = tiny.BOTH.extensions.values()
    return dataclasses.replace(
        tiny.BOTH,
        extensions=Named({
            "image": dataclasses.replace(one, layers=image, sources=(1,) * len(image)),
            "sound": dataclasses.replace(two, layers=sound, sources=(0, 2) * len(sound)),
        }),
    )  # fmt: skip


APART = with_layers((0,), (1,))
"""No layer has both extensions, and the second lacks the first one."""


@pytest.mark.parametrize("config", [tiny.BOTH, APART])
@pytest.mark.parametrize("older", [False, True])
def test_experts_of_a_layer_that_lacks_an_earlier_extension_keep_their_numbers(
    config: ModelConfig, older: bool, pair, tmp_path: Path
):
    path = tmp_path / "chain.npz"
    statistics.write_stats(path, collected(config))
    if older:
        arrays: dict[str, Any] = {name: array for name, array in read_npz(path).items() if name != "has"}
        np.savez(path, **arrays)
    stats = statistics.read_stats(path)
    has = {tiny.BOTH: [[4], [5, 6], [4, 5, 6]], APART: [[4], [5, 6], []]}[config]
    assert stats.has_ZO.tolist() == [[True] * 4 + [n in new for n in (4, 5, 6)] for new in has]
    for kind in statistics.KINDS:
        share_ZO = statistics.load_of(stats, kind).share_ZO
        rows = [row for row in compare.taken(pair[0], stats) if row.kind == kind]
        assert [(row.layer, row.experts) for row in rows] == [(z, new) for z, new in enumerate(has) if new]
        for row in rows:
            np.testing.assert_array_equal(row.share_X, share_ZO[row.layer, row.experts])
            assert row.share_X[-1] > 0 or kind == "image"
    rng = np.random.default_rng(0)
    moved = {kind: np.where(stats.has_ZO, rng.permuted(of, axis=1), 0) for kind, of in stats.picks_ZO.items()}
    other = stats._replace(picks_ZO=moved, per_token=None)
    for row in compare.distances(stats, other, tie=0):
        if row.kind == "text":
            p, q = (of["text"][row.layer][stats.has_ZO[row.layer]] for of in (stats.picks_ZO, moved))
            assert row.tv_picks == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2) and row.tv_picks > 0
            assert row.shift == pytest.approx(np.std(p / p.sum() - q / q.sum(), ddof=1))


def test_as_many_experts_of_other_numbers_are_not_the_same_sizes(pair):
    swapped = collected(APART)._replace(has_ZO=collected(APART).has_ZO[:, [0, 1, 2, 3, 5, 4, 6]])
    with pytest.raises(
        MoextendError, match=r"new experts per layer \[\[4\], \[5, 6\], \[\]\] and \[\[5\], \[4, 6\], \[\]\]"
    ):
        compare.check_same_shape(collected(APART), swapped, names=("a", "b"))


def test_probabilities_are_of_the_logits_whatever_a_family_chooses_and_weighs_by():
    """As in GLM-4.5, which weighs by sigmoids, and where a bias chooses."""
    config = dataclasses.replace(TEXT, decoder=dataclasses.replace(tiny.DECODER, scores="sigmoid", selection_bias=True))
    model, arrays = tiny.structure(config), tiny.arrays(config)
    ids_BL = np.random.default_rng(0).integers(3, 61, (4, 12)).astype(np.int32)
    batch = text_batch(ids_BL, np.ones_like(ids_BL))
    stats = collect.collect(model, arrays, [batch])
    decided = jax.jit(lambda arrays, batch: with_arrays(model, arrays)(batch).routing)(arrays, batch)
    logits_ZTO = np.asarray(decided.logits_TO, np.float64)
    order_ZTO = np.argsort(logits_ZTO, axis=-1)
    assert (np.sort(decided.ids_Tk) != np.sort(order_ZTO[..., 2:])).any()
    probs_ZTO = np.exp(logits_ZTO) / np.exp(logits_ZTO).sum(-1, keepdims=True)
    np.testing.assert_allclose(stats.probs_ZO["text"], probs_ZTO.mean(1), atol=1e-5)
    np.testing.assert_allclose(stats.entropy_Z["text"], -(probs_ZTO * np.log(probs_ZTO)).sum(-1).mean(1), atol=1e-5)
    least_ZTk = np.argsort(decided.chosen_by_TO, axis=-1)[..., :2]
    least_ZO = [np.bincount(least_Tk.reshape(-1), minlength=4) for least_Tk in least_ZTk]
    np.testing.assert_array_equal(stats.least_ZO["text"], least_ZO)
    counted = routing.count_picks(decided, batch, recipe=RECIPES["released"])  # which `routing compare` tells of
    np.testing.assert_array_equal(counted.text_ZO, least_ZO)
    assert stats.per_token is not None  # these, and ties, are of what chooses
    chosen_by_ZTO = -np.sort(-np.asarray(decided.chosen_by_TO), axis=-1)
    np.testing.assert_allclose(stats.per_token.gaps_ZT, chosen_by_ZTO[..., 1] - chosen_by_ZTO[..., 2], atol=1e-6)


def test_loads_of_even_and_of_one_sided_routing(pair):
    def with_load(picks_O, probs_O):
        picks_ZO, probs_ZO = np.array([picks_O]), np.array([probs_O], float)
        nothing = np.zeros_like(picks_ZO)
        return pair[0]._replace(
            has_ZO=np.ones((1, 4), bool), tokens={"text": 8, "image": 0}, picks_ZO={"text": picks_ZO, "image": nothing},
            probs_ZO={"text": probs_ZO, "image": nothing}, entropy_Z={"text": np.zeros(1), "image": np.zeros(1)},
        )  # fmt: skip

    even = statistics.load_of(with_load([4, 4, 4, 4], [0.25] * 4), "all")
    assert even.balance_Z == even.busiest_Z == 1 and np.isclose(even.entropy_Z, np.log(4))
    single = statistics.load_of(with_load([16, 0, 0, 0], [1, 0, 0, 0]), "text")
    assert single.balance_Z == single.busiest_Z == 4 and single.entropy_Z == 0


def test_the_file_holds_everything_and_mistakes_in_it_are_named(pair, tmp_path: Path):
    path = tmp_path / "a.npz"
    statistics.write_stats(path, pair[0])
    again = statistics.read_stats(path)
    for name, part in pair[0]._asdict().items():
        np.testing.assert_equal(getattr(again, name), part, err_msg=name)
    assert again.per_token is not None and again.per_token.ids_ZTk.dtype == np.int8
    arrays = read_npz(path)
    for change, message in (
        ({"format": np.array("other")}, "no file of routing statistics"),
        ({"picks/text": None}, "lacks picks/text"),
        ({"probs/image": np.zeros((1, 2))}, r"probs/image has shape \(1, 2\)"),
        ({"picks/text": arrays["picks/text"] + 1}, "are not 2 per token"),
        ({"gaps": None}, "holds ids but lacks gaps"),
        ({"ids": arrays["ids"][:, 1:]}, "ids has shape"),
        ({"has": ~arrays["has"]}, "outputs and has must say which of 4 experts"),
        ({"experts": np.int64(5)}, "outputs and has must say which of 4 experts"),
        ({"picks/text": np.int64(3)}, r"picks/text has shape \(\)"),
        ({"ids": arrays["ids"] - 1}, "ids must be of experts 0 to 3"),
        ({"ids": arrays["ids"] + 1}, "ids must be of experts 0 to 3"),
        ({"image": ~arrays["image"]}, r"image must be true for \d+ tokens"),
    ):
        changed: dict[str, Any] = {name: array for name, array in (arrays | change).items() if array is not None}
        np.savez(path, **changed)
        with pytest.raises(MoextendError, match=message):
            statistics.read_stats(path)


def test_picks_per_token_are_kept_when_asked_or_few(monkeypatch: pytest.MonkeyPatch):
    assert collected(tiny.PLAIN, per_token=False).per_token is None
    monkeypatch.setattr(collect, "FEW", 10)
    assert collected(tiny.PLAIN, per_token=None).per_token is None
    per_token = collected(tiny.PLAIN, per_token=True).per_token
    assert per_token is not None and per_token.image_T.sum() == 4 * tiny.VISION.patches


@pytest.mark.parametrize(
    ("path", "index", "message"),
    [
        ("moe/gate", (1, 0, 2), "the router of layer 1 has weights that are no numbers .* for expert 2"),
        ("moe_norm", (1, 3), r"NaN or infinite in layers \[1, 2\], first in layer 1 for experts \[0, 1, 2, 3\]"),
    ],
)
def test_a_router_that_gives_nan_is_named_and_nothing_is_written(path: str, index, message: str, tmp_path: Path):
    """One weight that is NaN: a router's is found when the model is opened, another's when the routers answer."""
    arrays = {name: np.array(leaf) for name, leaf in tiny.arrays(TEXT).items()}
    arrays[f"decoder/layers/{path}"][index] = np.nan
    huggingface.write_parameters(tmp_path / "model", arrays, table="mixtral", config=TEXT)
    huggingface.write_decoder_config(tmp_path / "model", TEXT.decoder, dtype="float32")
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(20, 40).reshape(2, 10))
    with pytest.raises(MoextendError, match=message):
        run("collect", "--checkpoint", tmp_path / "model", "--ids", tmp_path / "ids.npz",
            "--out", tmp_path / "out" / "a.npz", "--ids_out", tmp_path / "out" / "ids.npz")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_extender_does_not_count_a_router_that_has_become_nan():
    arrays = moved(5)
    gate_ZDE = np.array(arrays["decoder/layers/moe/gate"])
    gate_ZDE[2, :, 1] = np.inf
    arrays["decoder/layers/moe/gate"] = gate_ZDE
    with pytest.raises(MoextendError, match=r"NaN or infinite in layers \[2\]"):
        routing.count_all(tiny.structure(tiny.PLAIN), arrays, [tiny.batch()], recipe=RECIPES["paper"])


def test_statistics_that_are_no_numbers_are_neither_compared_nor_drawn(pair, tmp_path: Path):
    probs_ZO = {kind: array_ZO.copy() for kind, array_ZO in pair[0].probs_ZO.items()}
    probs_ZO["image"][2, 1] = np.nan
    statistics.write_stats(tmp_path / "good.npz", pair[1])
    statistics.write_stats(tmp_path / "bad.npz", pair[0]._replace(probs_ZO=probs_ZO))
    with pytest.raises(MoextendError, match=r"bad\.npz: probs/image is NaN or infinite in layers \[2\]"):
        run("compare", tmp_path / "good.npz", tmp_path / "bad.npz")
    with pytest.raises(MoextendError, match="bad"):
        run("plot", tmp_path / "bad.npz", "--out", tmp_path / "drawn")
    gaps = np.array(pair[0].per_token.gaps_ZT)
    gaps[0, 3] = np.nan
    statistics.write_stats(tmp_path / "bad.npz", pair[0]._replace(per_token=pair[0].per_token._replace(gaps_ZT=gaps)))
    with pytest.raises(MoextendError, match=r"bad\.npz: gaps is NaN or infinite in layers \[0\]"):
        run("compare", tmp_path / "good.npz", tmp_path / "bad.npz")


@pytest.mark.parametrize("which", ["before", "after"])
def test_no_layer_is_chosen_by_a_shift_that_is_no_number(which: str):
    counts = {"before": np.full((3, 4), 5), "after": np.arange(12).reshape(3, 4)}
    counts[which][1] = 0
    pair_of_counts = [routing.Counts(total_ZO, 0 * total_ZO, 10, 0) for total_ZO in counts.values()]
    with pytest.raises(MoextendError, match=r"shift of layers \[1\] is no number"):
        routing.select(*pair_of_counts, share=0.7, recipe=RECIPES["paper"])


# --- comparing --------------------------------------------------------------------------------------------------------


def test_distances_are_zero_to_itself_and_right_to_another(pair):
    a, b = pair
    for row in compare.distances(a, a, tie=1e-5):
        assert row.agreement == 1.0
        assert (row.tv_picks, row.kl_picks, row.tv_probs, row.kl_probs, row.shift, row.shift_least) == (0,) * 6
    rows = [row for row in compare.distances(a, b, tie=0.0) if row.kind == "all"]
    assert a.per_token is not None and b.per_token is not None
    for z, row in enumerate(rows):
        p, q = (stats.picks_ZO["text"][z] + stats.picks_ZO["image"][z] for stats in pair)
        assert row.tv_picks == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2)
        same = [set(x) == set(y) for x, y in zip(a.per_token.ids_ZTk[z], b.per_token.ids_ZTk[z], strict=True)]
        assert row.agreement == pytest.approx(np.mean(same)) and row.tied == 0
        assert row.kl_picks > 0 and row.kl_probs > 0
    expected = routing.select(*(statistics.counts_of(s, "top_k") for s in pair), share=0.5, recipe=RECIPES["paper"])
    np.testing.assert_allclose([row.shift for row in rows], expected.shift_Z, rtol=1e-12)


def test_where_new_experts_took_all_picks_nothing_is_made_up(pair, grown, tmp_path: Path, capsys):
    picks_ZO = {kind: of.copy() for kind, of in grown.picks_ZO.items()}
    for of_ZO in picks_ZO.values():
        of_ZO[2] = [0, 0, 0, 0, of_ZO[2].sum()]
    statistics.write_stats(tmp_path / "before.npz", pair[0])
    statistics.write_stats(tmp_path / "after.npz", grown._replace(picks_ZO=picks_ZO))
    assert run("compare", tmp_path / "before.npz", tmp_path / "after.npz", "--json") == 0
    for row in json.loads(capsys.readouterr().out)["layers"]:
        told = [row[name] is not None for name in ("tv_picks", "shift", "source_b")]
        assert told == [row["layer"] != 2] * 3 and row["source_a"] is not None


def test_all_tokens_have_a_row_unless_they_are_of_one_kind(pair, tmp_path: Path, capsys):
    a = pair[0]
    none = {kind: {"text": sum(of.values()), "image": 0 * of["image"]}
            for kind, of in (("tokens", a.tokens), ("picks_ZO", a.picks_ZO), ("least_ZO", a.least_ZO))}  # fmt: skip
    alone = a._replace(**none, per_token=None)
    for name, stats in (("a", a), ("text", alone)):
        statistics.write_stats(tmp_path / f"{name}.npz", stats)
    for first, shown in (("a", True), ("text", False)):
        assert run("compare", tmp_path / f"{first}.npz", tmp_path / "text.npz") == 0
        assert (" all " in capsys.readouterr().out.split("d_j standard")[0]) == shown


def test_ties_are_left_out_of_the_agreement(pair):
    a = pair[0]
    assert a.per_token is not None
    other = a.per_token.ids_ZTk.copy()
    other[0, 0, 1] = next(e for e in range(4) if e not in other[0, 0])
    gaps = a.per_token.gaps_ZT.copy()
    b = a._replace(per_token=a.per_token._replace(ids_ZTk=other))
    assert 0.5 < (compare.distances(a, b, tie=1e-5)[-3].agreement or 0) < 1
    gaps[0, 0] = 1e-6
    b = b._replace(per_token=a.per_token._replace(ids_ZTk=other, gaps_ZT=gaps))
    row = compare.distances(a, b, tie=1e-5)[-3]
    assert (row.kind, row.layer, row.agreement, row.tied) == ("all", 0, 1.0, 1)


def test_choices_are_the_extender_s_under_both_recipes(pair):
    by_recipe = compare.choices(*pair, share=0.7)
    assert by_recipe is not None
    for choice in by_recipe:
        recipe = RECIPES[choice.recipe]
        counts = [statistics.counts_of(stats, recipe.counted_picks) for stats in pair]
        expected = routing.select(*counts, share=0.7, recipe=recipe)
        assert (choice.layers, choice.sources) == (expected.layers, expected.sources)
    assert compare.choices(collected(tiny.EXTENDED), collected(tiny.EXTENDED), share=0.5) is None


def test_layers_are_numbered_among_all_where_the_first_have_no_router(pair, tmp_path: Path):
    a, b = (stats._replace(layers_Z=2 + np.arange(len(stats.outputs_Z))) for stats in pair)
    statistics.write_stats(tmp_path / "a.npz", a)
    again = statistics.read_stats(tmp_path / "a.npz")
    assert again.layers == a.layers == [2 + z for z in range(len(a.outputs_Z))]
    assert {row.layer for row in compare.distances(again, b, tie=0.0)} == set(a.layers)
    (chosen, *_), (plain, *_) = (compare.choices(*both, share=0.5) or [] for both in ((again, b), pair))
    assert chosen.layers == tuple(2 + layer for layer in plain.layers)
    with pytest.raises(MoextendError, match="numbers of layers"):
        compare.check_same_shape(a, pair[1], names=("a", "b"))


def test_too_small_a_share_of_the_layers_is_named_as_the_option_is(pair):
    with pytest.raises(MoextendError, match=r"^--share = 0\.01 of \d+ layers chooses none; raise it$"):
        compare.choices(*pair, share=0.01)


def test_where_no_layer_can_be_chosen_the_distances_are_printed(pair, tmp_path: Path, capsys):
    """As of a model with one layer that routes, by the usual share of a half."""
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for file, stats in zip(files, pair, strict=True):
        statistics.write_stats(file, stats)
    assert run("compare", *files, "--share", "0.01") == 0
    printed = capsys.readouterr().out
    assert "KL picks" in printed and "no choice of layers: --share = 0.01 of 3 layers chooses none; raise it" in printed
    assert "the most picked expert of every layer is" in printed
    assert run("compare", *files, "--after", *files[::-1], "--share", "0.01", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["choices"] == {"a": None, "b": None} and "chooses none" in record["choices_missing"]
    assert record["same_choice"] is None and len(record["layers"]) == 9


def test_compare_prints_json_and_says_why_there_is_no_agreement(pair, tmp_path: Path, capsys):
    files = [tmp_path / f"{name}.npz" for name in ("a", "b", "c")]
    for file, stats in zip(files, (*pair, pair[1]._replace(inputs="other tokens")), strict=True):
        statistics.write_stats(file, stats)
    assert run("compare", *files[:2], "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["top_k_agreement_missing"] is None and record["same_choice"] is None
    assert [choice["recipe"] for choice in record["choices"]["a_to_b"]] == list(RECIPES)
    assert {row["kind"] for row in record["layers"]} == {"text", "image", "all"}
    assert run("compare", files[0], files[0], "--after", files[1], files[2], "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_choice"] == {"paper": True, "released": True}
    assert run("compare", files[0], files[2], "--share", "0.7") == 0
    printed = capsys.readouterr().out
    assert "not collected on the same tokens" in printed and "recipe released: layers" in printed


def test_a_file_of_another_model_is_held_against_that_before_it(pair, tmp_path: Path):
    for name, stats in (("a", pair[0]), ("b", pair[1]), ("other", pair[1]._replace(experts=3))):
        statistics.write_stats(tmp_path / f"{name}.npz", stats)
    after = ("--after", tmp_path / "a.npz", tmp_path / "other.npz")
    with pytest.raises(MoextendError, match=r"b\.npz and .*other\.npz"):
        run("compare", tmp_path / "a.npz", tmp_path / "b.npz", *after)


def test_after_an_error_of_the_disk_the_old_file_is_there_and_no_other(
    pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(file: Any, **arrays: Any):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    statistics.write_stats(tmp_path / "a.npz", pair[0])
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        statistics.write_stats(tmp_path / "a.npz", pair[1])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert statistics.read_stats(tmp_path / "a.npz").tokens == pair[0].tokens


def test_models_of_other_sizes_are_not_compared(pair, tmp_path: Path):
    statistics.write_stats(tmp_path / "a.npz", pair[0])
    statistics.write_stats(tmp_path / "b.npz", collected(tiny.EXTENDED))
    statistics.write_stats(tmp_path / "c.npz", pair[0]._replace(experts=3))
    for other in ("b", "c"):
        with pytest.raises(MoextendError, match="not of the same sizes: (router outputs per layer|experts)"):
            run("compare", tmp_path / f"{other}.npz", tmp_path / "a.npz")
    with pytest.raises(MoextendError, match="there is no command 'routing colect'; did you mean routing collect"):
        run("colect")


@pytest.fixture(scope="module")
def grown(pair) -> statistics.Stats:
    """The first of the pair after its extension, on the same tokens."""
    return collected(tiny.EXTENDED)


def test_before_and_after_extension_the_shared_experts_are_compared(pair, grown, tmp_path: Path, capsys):
    before = pair[0]
    assert compare.is_extension_of(before, grown) and not compare.is_extension_of(grown, before)
    for name, stats in (("aligned", before), ("moextend", grown), ("blind", grown._replace(per_token=None))):
        statistics.write_stats(tmp_path / f"{name}.npz", stats)
    assert run("compare", tmp_path / "aligned.npz", tmp_path / "moextend.npz", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    for row in record["layers"]:
        if row["kind"] == "all":
            z = row["layer"]
            p, q = (stats.picks_ZO["text"][z, :4] + stats.picks_ZO["image"][z, :4] for stats in (before, grown))
            assert row["tv_picks"] == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2)
    assert record["choices"] == {} and [row["layer"] for row in record["new_experts"]] == [0, 2, 0, 2]
    for row in record["new_experts"]:
        z, kind = row["layer"], row["kind"]
        assert row["share_X"] == [pytest.approx(grown.picks_ZO[kind][z, 4] / grown.picks_ZO[kind][z].sum())]
        lost = np.zeros(4)
        tokens = 0
        for old, new, image in zip(before.per_token.ids_ZTk[z], grown.per_token.ids_ZTk[z], grown.per_token.image_T,
                                   strict=True):  # fmt: skip
            if image == (kind == "image") and 4 in new:
                tokens += 1
                lost[[expert for expert in old if expert not in new]] += 1
        assert row["tokens"] == pytest.approx(tokens / grown.tokens[kind]) and tokens > 3
        assert row["from_E"] == pytest.approx(lost / lost.sum())
    assert run("compare", tmp_path / "aligned.npz", tmp_path / "moextend.npz") == 0
    printed = capsys.readouterr().out
    assert "the 4 experts that both have" in printed and "share of picks" in printed
    assert run("compare", tmp_path / "aligned.npz", tmp_path / "blind.npz", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert "keeps no picks per token" in record["top_k_agreement_missing"]
    assert {row["from_E"] for row in record["new_experts"]} == {None}
    with pytest.raises(MoextendError, match=r"name .*aligned\.npz, the model before it, first"):
        run("compare", tmp_path / "moextend.npz", tmp_path / "aligned.npz")


def test_a_chain_before_and_after_its_second_extension(grown, tmp_path: Path, capsys):
    both = collected(tiny.BOTH)
    assert compare.is_extension_of(grown, both) and not compare.is_extension_of(both, grown)
    assert not compare.is_extension_of(grown, collected(APART))  # whose first extension is in other layers
    for name, stats in (("image", grown), ("sound", both)):
        statistics.write_stats(tmp_path / f"{name}.npz", stats)
    assert run("compare", tmp_path / "image.npz", tmp_path / "sound.npz", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["experts"]) for row in record["new_experts"]] == [(1, [5, 6]), (2, [5, 6])] * 2
    for row in record["new_experts"]:
        assert (
            row["share_X"]
            == (both.picks_ZO[row["kind"]] / both.picks_ZO[row["kind"]].sum(-1, keepdims=True))[
                row["layer"], 5:
            ].tolist()
        )
        assert row["from_E"] is None or len(row["from_E"]) == 5
    assert any(row["from_E"] for row in record["new_experts"])
    for row in record["layers"]:
        p, q = ((of.picks_ZO["text"] + of.picks_ZO["image"])[row["layer"], :5] for of in (grown, both))
        assert row["kind"] != "all" or row["tv_picks"] == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2)
    assert run("plot", tmp_path / "image.npz", tmp_path / "sound.npz", "--out", tmp_path / "drawn") == 0


def test_an_extension_has_the_layers_that_the_model_before_it_has(pair, grown, tmp_path: Path):
    """As many layers of other numbers are another model's."""
    later = grown._replace(layers_Z=1 + np.arange(len(grown.has_ZO)))
    for name, stats in (("aligned", pair[0]), ("later", later)):
        statistics.write_stats(tmp_path / f"{name}.npz", stats)
    with pytest.raises(MoextendError, match="not of the same sizes: numbers of layers"):
        run("compare", tmp_path / "aligned.npz", tmp_path / "later.npz")


@pytest.mark.slow
def test_before_and_after_extension_are_drawn(pair, grown, tmp_path: Path):
    statistics.write_stats(tmp_path / "aligned.npz", pair[0])
    statistics.write_stats(tmp_path / "moextend.npz", grown)
    assert run("plot", tmp_path / "aligned.npz", tmp_path / "moextend.npz", "--out", tmp_path / "both") == 0
    page = (tmp_path / "both.html").read_text()
    assert page.count("<svg") == 2 * 6 + 3 + 4 and "New experts" in page and "expert that lost them" in page
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_plot_writes_a_picture_and_a_page_that_needs_nothing_else(pair, tmp_path: Path):
    for folder, stats in zip(("one", "two"), pair, strict=True):
        (tmp_path / folder).mkdir()
        statistics.write_stats(tmp_path / folder / "stats.npz", stats)
    files = [tmp_path / folder / "stats.npz" for folder in ("one", "two")]
    assert run("plot", *files, "--out", tmp_path / "drawn" / "both") == 0
    assert (tmp_path / "drawn" / "both.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "drawn" / "both.html").read_text()
    assert page.count("<svg") == 2 * 6 + 4 and "image tokens" in page  # two kinds of two heatmaps and a difference
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert run("plot", files[0], "--out", tmp_path / "one") == 0
    assert (tmp_path / "one.html").read_text().count("<svg") == 2 * 2 + 4


# --- collecting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"))


def test_collect_counts_given_token_ids_whatever_the_batching(tmp_path: Path, capsys):
    huggingface.write_parameters(tmp_path / "m", tiny.arrays(TEXT), table="mixtral", config=TEXT)
    huggingface.write_decoder_config(tmp_path / "m", TEXT.decoder, dtype="float32")
    rng = np.random.default_rng(0)
    mask = np.ones((5, 9), np.int8)
    mask[1, 6:] = mask[2, 2:4] = 0
    np.savez(tmp_path / "ids.npz", input_ids=rng.integers(0, 61, (5, 9)), attention_mask=mask)
    for size in (2, 5):
        assert run("collect", "--checkpoint", tmp_path / "m", "--ids", tmp_path / "ids.npz",
                   "--batch_size", size, "--out", tmp_path / f"{size}.npz") == 0  # fmt: skip
    a, b = (statistics.read_stats(tmp_path / f"{size}.npz") for size in (2, 5))
    assert a.tokens == {"text": int(mask.sum()), "image": 0} and a.inputs == b.inputs
    assert all(row.agreement == 1 and row.tv_picks == 0 for row in compare.distances(a, b, tie=1e-5))
    assert "balance" in capsys.readouterr().out
    np.savez(tmp_path / "ids.npz", input_ids=rng.integers(0, 90, (5, 9)))
    with pytest.raises(MoextendError, match="but the vocabulary has 61"):
        run("collect", "--checkpoint", tmp_path / "m", "--ids", tmp_path / "ids.npz", "--out", tmp_path / "x.npz")
    np.savez(tmp_path / "ids.npz", ids=mask)
    with pytest.raises(MoextendError, match="holds no input_ids; it holds ids"):
        run("collect", "--checkpoint", tmp_path / "m", "--ids", tmp_path / "ids.npz", "--out", tmp_path / "x.npz")
    with pytest.raises(MoextendError, match="needs one of --data NAME, --text FILE and --ids"):
        run("collect", "--checkpoint", tmp_path / "m", "--out", tmp_path / "x.npz")


def test_collect_reads_passages_and_writes_their_ids_for_others(base: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("A badger digs.\nThe sett is old.\nIt sleeps.\n")
    common = ("collect", "--checkpoint", base, "--length", 16, "--batch_size", 2)
    assert run(*common, "--text", tmp_path / "text.txt", "--out", tmp_path / "a.npz", "--ids_out",
               tmp_path / "ids.npz") == 0  # fmt: skip
    assert run(*common, "--ids", tmp_path / "ids.npz", "--out", tmp_path / "b.npz") == 0
    a, b = (statistics.read_stats(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert a.inputs == b.inputs and a.tokens == b.tokens and a.tokens["text"] > 10
    assert all(row.agreement == 1 and row.tv_probs < 1e-6 for row in compare.distances(a, b, tie=1e-5))


@pytest.mark.parametrize("samples", [4, 5, 7])
def test_samples_of_a_mixture_are_each_counted_once(base: Path, tmp_path: Path, samples: int):
    """An epoch of it has the one row of b.json four times."""
    for name, rows in (("a", 4), ("b", 1)):
        talks = [[{"from": "human", "value": f"{name} {n}?"}, {"from": "gpt", "value": "yes"}] for n in range(rows)]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": 0, "conversations": talk} for talk in talks]))
    options = command.CollectOptions(
        checkpoint=base, data=f"{tmp_path}/a.json:0.5,{tmp_path}/b.json:0.5", data_dir=str(tmp_path / "built"),
        samples=samples, length=32, out=tmp_path / "a.npz",
    )  # fmt: skip
    batches = list(command._batches(options, open_place(options)))
    rows = [tuple(row) for batch in batches for row in np.asarray(batch.ids_BL) if row.any()]
    assert len(rows) == len(set(rows)) == min(samples, 5)


def test_a_file_of_ids_without_rows_has_no_batches(tmp_path: Path):
    size = tiny.VISION.image_size
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((0, 9), int), pixel_values=np.zeros((0, 3, size, size), "f4"))
    assert not list(command._id_batches(tmp_path / "ids.npz", tiny.PLAIN, pad=lambda: 3, batch_size=2))


def test_ids_do_not_replace_the_statistics(tmp_path: Path):
    with pytest.raises(MoextendError, match="--out and --ids_out are one file"):
        run("collect", "--checkpoint", tmp_path, "--text", "a.txt", "--out", tmp_path / "a.npz", "--ids_out",
            tmp_path / ".." / tmp_path.name / "a.npz")  # fmt: skip


def test_pictures_are_not_left_out_in_silence_by_a_model_that_sees_none(tmp_path: Path):
    np.savez(tmp_path / "ids.npz", input_ids=np.full((1, 9), 3), pixel_values=np.zeros((1, 3, 8, 8), "f4"))
    with pytest.raises(MoextendError, match=r"ids\.npz holds pixel_values, but the model sees no pictures"):
        next(command._id_batches(tmp_path / "ids.npz", TEXT, pad=lambda: 3, batch_size=2))


@pytest.mark.slow
def test_collect_runs_a_data_set_of_pictures_through_a_model_that_sees(base: Path, tmp_path: Path):
    config = tiny.BASE_CONFIG
    seeing = tmp_path / "seeing"  # the released layout: decoder, projector and tower in one
    huggingface.write_parameters(seeing, tiny.arrays(config, std=0.1), table="released", config=config)
    shutil.copytree(base, seeing, ignore=shutil.ignore_patterns("*.safetensors", "vision"), dirs_exist_ok=True)
    tiny.write_llava(tmp_path / "llava")
    common = ("--data", "llava_instruct", "--data_dir", tmp_path / "data", "--manual_dir", tmp_path / "llava")
    common = ("collect", *common, "--length", 48, "--batch_size", 4, "--samples", 6)
    assert run(*common, "--checkpoint", seeing, "--vision", base / "vision", "--out", tmp_path / "a.npz") == 0
    stats = statistics.read_stats(tmp_path / "a.npz")
    assert config.vision is not None and stats.tokens["image"] == 6 * config.vision.patches
    assert stats.tokens["text"] > 60
    # Ids and pictures, written down, are the same rows again.
    given = ("--checkpoint", seeing, "--vision", base / "vision", "--out", tmp_path / "c.npz")
    assert run(*common, *given, "--ids_out", tmp_path / "ids.npz") == 0
    arrays = read_npz(tmp_path / "ids.npz")
    assert arrays["pixel_values"].shape == (6, 3, 32, 32) and arrays["attention_mask"].any(axis=0).all()
    assert run("collect", *given, "--ids", tmp_path / "ids.npz", "--batch_size", 4) == 0
    again = statistics.read_stats(tmp_path / "c.npz")
    assert again.inputs == stats.inputs and again.tokens == stats.tokens
    assert all(row.agreement == 1 and row.tv_probs < 1e-6 for row in compare.distances(stats, again, tie=1e-5))
    few: dict[str, Any] = arrays | {"pixel_values": arrays["pixel_values"][1:]}
    np.savez(tmp_path / "few.npz", **few)
    with pytest.raises(MoextendError, match=r"few\.npz: pixel_values \[5, 3, 32, 32\] are not one picture"):
        run("collect", *given, "--ids", tmp_path / "few.npz")
    assert run(*common, "--checkpoint", base, "--out", tmp_path / "b.npz") == 0  # a model without a projector is blind
    assert statistics.read_stats(tmp_path / "b.npz").tokens["image"] == 0


@pytest.mark.slow
def test_collect_opens_the_models_of_a_work_directory(base: Path, tmp_path: Path):
    from moextend_jax.cli import main

    tiny.write_llava(tmp_path / "llava")
    config = tiny.write_config(
        tmp_path, base=base, data="llava_instruct", split="train[:16]", evaluated="train[16:]",
        manual=tmp_path / "llava",
    )  # fmt: skip
    workdir = tmp_path / "workdir"
    main(["align", "--config", str(config), "--workdir", str(workdir)])
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(20, 40).reshape(2, 10))
    common = ("collect", "--checkpoint", workdir, "--ids", tmp_path / "ids.npz", "--out", tmp_path / "a.npz")
    assert run(*common, "--model", "aligned") == 0
    aligned = statistics.read_stats(tmp_path / "a.npz")
    assert run(*common, "--model", "base") == 0
    np.testing.assert_array_equal(statistics.read_stats(tmp_path / "a.npz").picks_ZO["text"], aligned.picks_ZO["text"])
    with pytest.raises(MoextendError, match="extend has not been run"):
        run(*common, "--model", "probed")
    opened = open_run(pipeline_settings(workdir), workdir)
    routers = {"decoder/layers/moe/gate": -opened.pretrained["decoder/layers/moe/gate"]}
    train_state.save_leaves(workdir / "extend" / "result", routers, facts=opened.facts)
    assert run(*common, "--model", "probed", "--dtype", "float32") == 0
    assert compare.distances(aligned, statistics.read_stats(tmp_path / "a.npz"), tie=0)[0].tv_picks > 0.1


def pipeline_settings(workdir: Path) -> RunSettings:
    settings = settings_of(workdir)
    assert settings is not None
    return settings


@pytest.mark.usefixtures("eight_devices")
def test_collect_opens_the_probed_model_of_a_run_on_several_devices(base: Path, tmp_path: Path):
    settings = tiny.run_settings(dtype="float32", base=str(base), vision=str(base / "vision"))
    opened = open_run(settings, tmp_path)
    trained = tiny.arrays(tiny.BASE_CONFIG, seed=1, std=0.1)
    for name, prefix in (("align", "media/image/projector/"), ("extend", "decoder/layers/moe/gate")):
        result = {path: leaf for path, leaf in trained.items() if path.startswith(prefix)}
        train_state.save_leaves(tmp_path / name / "result", result, facts=opened.facts)
    remember(opened)
    ids_BL = np.arange(20, 180, dtype=np.int32).reshape(8, 20)
    np.savez(tmp_path / "ids.npz", input_ids=ids_BL)
    assert run("collect", "--checkpoint", tmp_path, "--model", "probed", "--ids", tmp_path / "ids.npz",
               "--out", tmp_path / "a.npz") == 0  # fmt: skip

    arrays = tiny.arrays(tiny.BASE_CONFIG, std=0.1) | {"decoder/layers/moe/gate": trained["decoder/layers/moe/gate"]}
    rows = text_batch(ids_BL, np.ones_like(ids_BL))
    expected = collect.collect(tiny.structure(tiny.BASE_CONFIG), arrays, [rows], per_token=True)
    got = statistics.read_stats(tmp_path / "a.npz")
    assert all(row.agreement == 1.0 for row in compare.distances(got, expected, tie=1e-5))
