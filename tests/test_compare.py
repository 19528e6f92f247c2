"""`moextend compare` as a command, on references of text of other sizes, and on references with something wrong.

tests/parity compares whole folders with the same functions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_set
import tiny

from moextend_jax import cli
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.compare import command, forward, reference, verdict
from moextend_jax.config import MoextendError


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory) -> reference_set.Set:
    """Models, batches and images of other sizes."""
    return reference_set.Set(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def text(derived: reference_set.Set, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what PyTorch says of the extended model on text, as tools/dump_torch_routing.py writes it."""
    folder = tmp_path_factory.mktemp("text")
    save(folder / "batches.npz", {f"text/{key}": array for key, array in derived.batches["text"].items()})
    (folder / "manifest.json").write_text(json.dumps({"spec": {"coef": reference_set.COEFFICIENT}}))
    theirs = reference_set.forward(derived.models["moextend_pert"], derived.batches["text"], derived.pixels["text"])
    heads = ("logits", "router_logits", "topk_idx", "topk_weight", "loss_ce")
    theirs = {f"text/{key}": array for key, array in theirs.items() if key.split("/")[0] in heads}
    save(folder / "forward_torch.npz", theirs)
    return folder


def save(path: Path, arrays: dict[str, Any]) -> Path:
    host: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(path, **host)
    return path


def changed(text: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The reference of `text` in another folder, with other arrays in it; None leaves one out."""
    for name in ("batches.npz", "manifest.json"):
        shutil.copy(text / name, folder / name)
    arrays = read_npz(text / "forward_torch.npz") | changes
    return save(folder / "forward_torch.npz", {name: array for name, array in arrays.items() if array is not None})


def arguments(checkpoint: Path, file: Path) -> list[str]:
    """The model and, as its config.json does not say them, the sizes of its tower."""
    return ["--checkpoint", str(checkpoint), "--vision", str(checkpoint.parent / "clip"), "--reference", str(file)]


def compare(capsys, checkpoint: Path, file: Path) -> tuple[int, dict[str, Any]]:
    code = cli.call(["compare", *arguments(checkpoint, file), "--json"])
    return code, json.loads(capsys.readouterr().out)


def by_name(record: dict[str, Any], *verdicts: str) -> dict[str, dict[str, Any]]:
    name = "{batch}/{quantity}".format_map
    return {name(row): row for row in record["rows"] if not verdicts or row["verdict"] in verdicts}


def test_every_array_of_the_file_has_a_line_and_all_are_equal(derived, text: Path, capsys):
    code, record = compare(capsys, derived.folder / "moextend_pert", text / "forward_torch.npz")
    assert code == 0 and record["ok"] and record["not_compared"] == 0 and not record["notes"]
    with np.load(text / "forward_torch.npz") as file:
        assert set(by_name(record, "ok")) == set(file.files)
    for layer in range(reference_set.Z):
        assert by_name(record)[f"text/topk_idx/{layer}"]["agreement"] == 1.0


def test_ties_of_new_columns_with_their_sources_are_found_and_named(derived, text: Path, tmp_path: Path, capsys):
    theirs = reference_set.forward(derived.models["moextend_init"], derived.batches["text"], derived.pixels["text"])
    arrays = {name: None for name in read_npz(text / "forward_torch.npz")}
    arrays |= {f"text/{name}": theirs[name] for name in ("logits", "topk_idx/1", "topk_idx/3")}
    code, record = compare(capsys, derived.folder / "moextend_init", changed(text, tmp_path, arrays))
    assert code == 0
    assert [note[:37] for note in record["notes"]] == [f"layer {z}: router columns 2 and 6 are e" for z in (0, 3, 4)]
    rows = by_name(record)
    assert "tokens tied: picks not compared" in rows["text/topk_idx/3"]["note"]
    assert "tied" not in rows["text/topk_idx/1"]["note"]  # a plain layer
    assert rows["text/logits"]["verdict"] == "ok"  # whoever computes them


def test_equal_columns_of_several_extensions_have_the_numbers_of_their_experts():
    arrays = {path: np.array(leaf) for path, leaf in tiny.arrays(tiny.BOTH).items()}
    gate_ZDE, new_YDX = (arrays[f"{of}gate"] for of in ("decoder/layers/moe/", "extensions/sound/router/new_"))
    new_YDX[0, :, 1] = gate_ZDE[1, :, 3]  # in layer 1, which lacks expert 4
    new_YDX[1, :, 0] = arrays["extensions/image/router/new_gate"][1, :, 0]
    held: dict[str, Any] = arrays
    assert forward.equal_columns(held, tiny.BOTH) == [(1, 3, 6), (2, 4, 5)]


@pytest.mark.slow
def test_embeddings_of_a_model_that_sees_went_through_a_tower(derived, text: Path, tmp_path: Path, capsys):
    """So they are held to the tolerance of what went through layers; the demo's own model failed otherwise."""
    name = "text/hidden_states/0"
    theirs = reference_set.forward(derived.models["moextend_pert"], derived.batches["text"], derived.pixels["text"])
    changes = {name: theirs["hidden_states/0"] + 5e-5}
    _, record = compare(capsys, derived.folder / "moextend_pert", changed(text, tmp_path, changes))
    assert by_name(record)[name]["verdict"] == "ok" and by_name(record)[name]["tolerance"] == 1e-4


# --- what must not pass -----------------------------------------------------------------------------------------------


def test_one_number_beyond_tolerance_is_exit_code_1(derived, text: Path, tmp_path: Path, capsys):
    arrays = read_npz(text / "forward_torch.npz")
    logits_BLV, picks_Tk = arrays["text/logits"].copy(), arrays["text/topk_idx/2"].copy()
    logits_BLV[1, 2, 3] += 3e-4
    picks_Tk[0] = picks_Tk[0, ::-1]
    changes: dict[str, Any] = {"text/logits": logits_BLV, "text/topk_idx/2": picks_Tk, "text/surprise": np.zeros(3)}
    changes["text/router_logits/4"] = np.full_like(arrays["text/router_logits/4"], np.nan)
    file = changed(text, tmp_path, changes)
    code, record = compare(capsys, derived.folder / "moextend_pert", file)
    assert code == 1 and not record["ok"]
    differing = by_name(record, "differs")
    assert set(differing) == {"text/logits", "text/topk_idx/2", "text/router_logits/4"}
    assert 2e-4 < differing["text/logits"]["max_abs"] < 4e-4
    assert differing["text/router_logits/4"]["max_abs"] is None  # JSON has no NaN
    assert 0.9 < differing["text/topk_idx/2"]["agreement"] < 1
    assert set(by_name(record, "not compared")) == {"text/surprise"}
    file = changed(text, tmp_path, changes | {"text/topk_idx/2": None, "text/router_logits/4": None})
    assert cli.call(["compare", *arguments(derived.folder / "moextend_pert", file), "--atol", "1e-3"]) == 0
    table = capsys.readouterr().out
    assert "surprise" in table and "1.0e-03" in table


def test_another_checkpoint_is_named_as_the_mistake(derived, text: Path, capsys):
    with pytest.raises(MoextendError, match=r"shape.*the checkpoint is not the one"):
        compare(capsys, derived.folder / "vision", text / "forward_torch.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": {}}, "holds none of the arrays of a forward pass"),
        (
            {"arrays": {"grad/model.norm.weight": np.zeros(3), "steps": np.zeros((3, 4))}},
            "none of the arrays of a forw",
        ),
        ({"arrays": {"format": np.array("moextend-routing/1")}}, "moextend routing compare"),
        ({"arrays": {"nowhere/logits": np.zeros((1, 2, 3))}}, "is of the batches nowhere"),
        ({"arrays": {"text/logits": np.array(["pickled", None], object)}}, "not a readable npz file of plain arrays"),
        ({"manifest": "{"}, "manifest.json is not JSON"),
        ({"images": {}}, "does not say which"),
        ({"images": {"train0/image_index": np.array([0, 1, 2, 99])}}, "names image 99"),
        ({"images": {"train0/image_index": np.array([0, 1])}}, "4 image start tags but 2 images"),
        ({"batches": {"train0/labels": np.zeros((1, 2), int)}}, r"must be \[B, L\] alike"),
        ({"spec": {"image_start_id": 101}}, "no image end tag"),
        (
            {
                "spec": {"image_start_id": 2},
                "arrays": {"train0/logits": np.zeros(1), "train0/pixel_values": np.zeros(1)},
            },
            "has pixel_values, but no image start tag says where they stand; its id is 2",
        ),
    ],
)
def test_a_broken_reference_is_an_error_that_says_what(derived, tmp_path: Path, change: dict[str, Any], message: str):
    for name in ("batches.npz", "images.npz", "manifest.json"):
        shutil.copy(derived.folder / name, tmp_path / name)
    arrays = change.get("arrays", {"train0/logits": np.zeros((4, 32, reference_set.V), np.float32)})
    save(tmp_path / "forward.npz", arrays)
    if "batches" in change:
        save(tmp_path / "batches.npz", {**read_npz(derived.folder / "batches.npz"), **change["batches"]})
    if "images" in change:
        pixels = {"pixel_values": read_npz(derived.folder / "images.npz")["pixel_values"]}
        save(tmp_path / "images.npz", pixels | change["images"] if change["images"] else {})
    if "manifest" in change or "spec" in change:
        facts = change.get("manifest") or json.dumps({"spec": {"coef": 0.1, **change["spec"]}})
        (tmp_path / "manifest.json").write_text(facts)
    with pytest.raises(MoextendError, match=message):
        cli.call(["compare", *arguments(derived.folder / "vision", tmp_path / "forward.npz")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare needs --checkpoint: .*; --reference: "),
        (["--reference", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--reference", "x.npz", "--stage", "align"], "compare: there is no option --stage;"),
        (["--reference", "x.npz", "--atol", "-1"], "--atol = -1.0 must be at least 0"),
        (["--reference", "x.npz", "--feature_layer", "0"], "--feature_layer = 0 must be at most -1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words: list[str], message: str):
    with pytest.raises(MoextendError, match=message):
        cli.call(["compare", *([*words, "--checkpoint", "x"] if words else [])])


def test_a_folder_is_no_file_and_its_files_are_listed(derived):
    with pytest.raises(MoextendError, match=r"is a folder; name one of its files \(.*batches\.npz"):
        cli.call(["compare", "--checkpoint", "x", "--reference", str(derived.folder)])


def test_a_file_of_unknown_arrays_alone_has_nothing_to_compare(derived, text: Path, tmp_path: Path):
    arrays = {name: None for name in read_npz(text / "forward_torch.npz")}
    file = changed(text, tmp_path, arrays | {"nowhere/logits": np.zeros(3), "text/surprise": np.zeros(3)})
    with pytest.raises(MoextendError, match="nothing in .* could be compared: logits: .* no batch 'nowhere'"):
        cli.call(["compare", *arguments(derived.folder / "moextend_pert", file)])


def test_what_a_file_calls_its_batches_is_printed_as_it_is(capsys):
    rows = [verdict.Row("[/x]", "\x1b[2Jlogits", "not compared", note="[/y]")]
    command._print(reference.Reference(Path("x.npz"), {}, {}, {}), rows, ["[/z]"], seconds=0.0)
    printed = capsys.readouterr().out
    assert all(said in printed for said in ("[/x]", r"\x1b[2Jlogits", "[/y]", "[/z]"))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_hole_is_seen_by_nobody_and_positions_count_across_it():
    ids_BL = np.array([[1, 7, 100, 102, 102, 101, 9, 9]], np.int32)
    mask_BL = np.array([[1, 1, 1, 0, 1, 1, 0, 1]], np.int32)
    rows = reference.Rows(ids_BL, np.full_like(ids_BL, -100), mask_BL, (0,), np.ones((1, 2, 2, 3), np.float32))
    batch = reference.to_batch(rows, start=100, patches=2, room=2)
    assert batch.segments_BL.tolist() == mask_BL.tolist()
    assert batch.positions_BL.tolist() == [list(range(8))]
    assert batch.places_BL.tolist() == [[-1, -1, -1, 0, 1, -1, -1, -1]]  # the image is there, mask or not
    assert batch.media["image"].shape == (1, 2, 2, 2, 3) and not batch.media["image"][0, 1].any()


def test_what_left_padding_leaves_undefined():
    labels_BL = np.array([[-100, -100, 5, 5], [5, 5, -100, -100]], np.int32)
    ids_BL = np.zeros_like(labels_BL)
    rows = reference.Rows(ids_BL, labels_BL, np.array([[0, 1, 0, 1], [1, 1, 1, 0]], np.int32), (), None)
    where_BL, ce_defined = forward.defined(rows)
    assert where_BL.tolist() == [[False, True, False, True], [True] * 4]
    assert not ce_defined  # row 0 predicts its last label from a place that nothing defines
    assert forward.defined(rows._replace(mask_BL=np.ones_like(ids_BL)))[1]


def test_ties_are_gaps_below_noise_at_the_boundary_or_within_the_picks():
    logits_TO = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 2.0 + 1e-7], [3.0, 3.0 + 1e-7, 1.0], [3.0, 2.0, 2.0 + 1e-3]])
    ties = forward.ties(logits_TO, top_k=2, noise=1e-5)
    assert ties.tolist() == [False, True, True, False]
    assert not forward.ties(logits_TO[:, :2], top_k=2, noise=1e-5)[1]  # all are picked


def test_verdicts():
    assert verdict.close("", "x", [1.0, 2.0], [1.0, 2.0 + 5e-6], atol=1e-5).verdict == "ok"
    assert verdict.close("", "x", [1.0, np.nan], [1.0, np.nan], atol=1.0).verdict == "differs"
    assert verdict.close("", "x", np.zeros((0, 3)), np.zeros((0, 3)), atol=0).verdict == "ok"
    row = verdict.close("", "x", [[1.0], [9.0]], [[1.5], [0.0]], atol=1, where=[True, False])
    assert (row.max_abs, row.max_rel) == (0.5, 0.5 / 1.5)
    rows = [row._replace(quantity=f"a/{n}", max_abs=float(n), verdict="ok") for n in range(3)]
    rows.append(rows[0]._replace(verdict="differs"))
    brought = verdict.summarised(rows)
    assert [(row.quantity, row.verdict) for row in brought] == [("a/* (3)", "ok"), ("a/0", "differs")]
    assert brought[0].max_abs == 2.0 and brought[0].note.startswith("worst 2")
