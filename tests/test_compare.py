"""`moextend compare` on reference folders: ours of other sizes, ../shared/oracle, and folders with something wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import reference_set

from moextend_jax.compare import command, forward, reference, training, verdict
from moextend_jax.config import MoextendError

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> reference_set.Set:
    """Reference numbers of other sizes."""
    return reference_set.Set(tmp_path_factory.mktemp("reference"))


def compare(capsys, checkpoint: Path | str, file: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = command.main(["--checkpoint", str(checkpoint), "--reference", str(file), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def rows_of(record: dict[str, Any], *verdicts: str) -> dict[str, dict[str, Any]]:
    name = "{batch}/{quantity}".format_map
    return {name(row).lstrip("/"): row for row in record["rows"] if not verdicts or row["verdict"] in verdicts}


# --- other sizes ------------------------------------------------------------------------------------------------------


def test_a_forward_pass_of_other_sizes_with_holes_and_none_to_two_images_per_row(other, capsys):
    file = other.forward("grown")
    code, record = compare(capsys, other.folder / "grown", file)
    assert code == 0 and record["ok"]
    with np.load(file) as held:
        assert set(rows_of(record)) == set(held.files)  # nothing is left out of the table
    assert set(rows_of(record, "not compared")) == {"left/loss_ce", "left/loss_total"}
    rows = rows_of(record)
    assert rows["train0/hidden_states/3"]["note"] == ""  # holes and padding on the right are compared like any place
    padded = int((~other.batches["left"]["attention_mask"] & ~other.batches["left"]["attention_mask"][:, :1]).sum())
    assert rows["left/logits"]["note"].startswith(f"{padded} of ")
    for key, row in rows.items():
        if "/topk_idx/" in key:
            assert row["agreement"] == 1.0, key


def test_ties_of_new_columns_with_their_sources_are_found_and_said(other, capsys):
    code, record = compare(capsys, other.folder / "twin", other.forward("twin"))
    assert code == 0
    assert [note[:37] for note in record["notes"]] == [f"layer {z}: router columns 2 and 6 are e" for z in (0, 3, 4)]
    rows = rows_of(record)
    assert "tokens tied: picks not compared" in rows["train0/topk_idx/3"]["note"]
    assert "tied" not in rows["train0/topk_idx/1"]["note"]  # a plain layer
    assert rows["train0/logits"]["verdict"] == rows["train0/loss_aux"]["verdict"] == "ok"  # whoever computes them


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        pytest.param("align_plain", "plain", marks=slow),
        ("extend_plain", "plain"),
        pytest.param("finetune_grown", "grown", marks=slow),
    ],
)
def test_gradients_and_steps_of_other_sizes(other, capsys, stage: str, model: str):
    file = other.stage(stage)
    code, record = compare(capsys, other.folder / model, file)
    assert code == 0 and not rows_of(record, "differs", "not compared")
    with np.load(file) as held:
        assert set(held.files) - {"steps"} == {key for key in rows_of(record) if not key.startswith("steps/")}
    assert [key for key in rows_of(record) if key.startswith("steps/3")] == [
        f"steps/3/{name}" for name in ("loss", "ce", "aux", "grad_norm")
    ]


def test_selection_of_other_sizes_finds_its_two_models_beside_it(other, capsys):
    file = other.selection()
    code, record = compare(capsys, other.folder / "probed", file)  # either of the two may be named
    assert code == 0, record["rows"]
    assert len(rows_of(record, "ok")) == 16
    assert set(rows_of(record, "not compared")) == {"input_ids", "lengths"}


def test_the_tower_alone_and_inside_a_model(other, capsys):
    file = other.clip()
    for checkpoint in ("clip", "grown"):
        code, record = compare(capsys, other.folder / checkpoint, file)
        assert code == 0 and len(rows_of(record, "ok")) == reference_set.U + 1 + 3


# --- what must not pass -----------------------------------------------------------------------------------------------


def test_one_number_beyond_tolerance_is_exit_code_1(other, capsys, tmp_path: Path):
    file = other.clip()
    arrays = dict(np.load(file))
    arrays["patch_m1"] = arrays["patch_m1"] + 2e-5 * (np.arange(arrays["patch_m1"].size).reshape(-1, 9, 16) == 5)
    arrays["hidden_states/1"] = np.full_like(arrays["hidden_states/1"], np.nan)
    arrays["surprise"] = np.zeros(3)
    np.savez(tmp_path / "clip.npz", **arrays)
    code, record = compare(capsys, other.folder / "clip", tmp_path / "clip.npz")
    assert code == 1 and not record["ok"]
    assert set(rows_of(record, "differs")) == {"patch_m1", "hidden_states/1"}
    assert 1e-5 < rows_of(record)["patch_m1"]["max_abs"] < 3e-5
    assert rows_of(record)["hidden_states/1"]["max_abs"] is None  # JSON has no NaN
    assert rows_of(record)["surprise"]["verdict"] == "not compared"
    arrays.pop("hidden_states/1")
    np.savez(tmp_path / "clip.npz", **arrays)
    wider = ["--checkpoint", str(other.folder / "clip"), "--reference", str(tmp_path / "clip.npz"), "--atol", "1e-4"]
    assert command.main(wider) == 0
    table = capsys.readouterr().out
    assert "surprise" in table and "1.0e-04" in table


def test_another_checkpoint_is_named_as_the_mistake(other, capsys):
    with pytest.raises(MoextendError, match=r"shape.*the checkpoint is not the one"):
        compare(capsys, other.folder / "plain", other.forward("grown"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arrays": {}}, "holds none of the arrays"),
        ({"arrays": {"nowhere/logits": np.zeros((1, 2, 3))}}, "is of the batches nowhere"),
        ({"arrays": {"text/logits": np.array(["pickled", None], object)}}, "not a readable npz file of plain arrays"),
        ({"manifest": "{"}, "manifest.json is not JSON"),
        ({"images": {}}, "does not say which"),
        ({"images": {"train0/image_index": np.array([0, 1, 2, 99])}}, "names image 99"),
        ({"images": {"train0/image_index": np.array([0, 1])}}, "4 image start tags but 2 images"),
        ({"batches": {"train0/labels": np.zeros((1, 2), int)}}, r"must be \[B, L\] alike"),
        ({"spec": {"image_start_id": 101}}, "no image end tag"),
    ],
)
def test_a_broken_reference_is_an_error_that_says_what(other, tmp_path: Path, change: dict[str, Any], said: str):
    for name in ("batches.npz", "images.npz", "manifest.json"):
        shutil.copy(other.folder / name, tmp_path / name)
    arrays = change.get("arrays", {"train0/logits": np.zeros((4, 32, reference_set.V), np.float32)})
    np.savez(tmp_path / "forward.npz", **arrays)
    if "batches" in change:
        np.savez(tmp_path / "batches.npz", **{**np.load(other.folder / "batches.npz"), **change["batches"]})
    if "images" in change:
        kept = {"pixel_values": np.load(other.folder / "images.npz")["pixel_values"]}
        np.savez(tmp_path / "images.npz", **(kept | change["images"] if change["images"] else {}))
    if "manifest" in change or "spec" in change:
        text = change.get("manifest") or json.dumps({"spec": {"coef": 0.1, **change["spec"]}})
        (tmp_path / "manifest.json").write_text(text)
    arguments = ["--vision", str(other.folder / "clip"), "--checkpoint", str(other.folder / "plain")]
    with pytest.raises(MoextendError, match=said):
        command.main([*arguments, "--reference", str(tmp_path / "forward.npz")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "compare: the following arguments are required: --reference"),
        (["--reference", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--reference", "x.npz", "--stages", "align"], "unrecognized arguments: --stages align"),
        (["--reference", "x.npz", "--atol", "-1"], "--atol: -1 must be at least 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], said: str):
    with pytest.raises(MoextendError, match=said):
        command.main(arguments)


def test_a_folder_is_no_file_and_its_files_are_listed(other):
    with pytest.raises(MoextendError, match=r"is a folder; name one of its files \(.*batches\.npz"):
        command.main(["--checkpoint", "x", "--reference", str(other.folder)])


def test_the_parameters_of_a_stage_must_be_a_recipe_s(other, tmp_path: Path):
    names = [f"grad/{name}" for name in other.models["grown"] if "gate_vision" in name or "weight_scale" in name]
    zeros: dict[str, Any] = {name: np.zeros(1) for name in names}
    np.savez(tmp_path / "stage_finetune_x.npz", **zeros)
    read = reference.read_reference(tmp_path / "stage_finetune_x.npz")
    config = command.open_checkpoint(other.folder / "grown", vision=other.folder / "clip").config
    with pytest.raises(MoextendError, match=r"those of no stage \(finetune, .*\); nearest is finetune\. Missing: .*w1"):
        training.stage_of(read, config, stage="finetune")
    with pytest.raises(MoextendError, match="unknown; there are align"):
        training.stage_of(read, config, stage="finetunes")
    extension = [name for name in other.models["grown"] if name not in other.models["plain"]]
    projector = [name for name in other.models["grown"] if "mm_projector" in name]
    for more, expected in (([], "finetune"), (projector, "finetune_with_projector")):
        arrays = {f"grad/{name}": np.zeros(1) for name in extension + more}
        assert training.stage_of(read._replace(arrays=arrays), config, stage=None) == expected


def test_a_stage_whose_batches_are_not_there_has_nothing_to_compare(other, tmp_path: Path):
    for name in ("images.npz", "manifest.json"):
        shutil.copy(other.folder / name, tmp_path / name)
    batches: dict[str, Any] = {"text/input_ids": np.zeros((1, 2), int)}
    np.savez(tmp_path / "batches.npz", **batches)
    names = [name for name in other.models["plain"] if "mm_projector" in name]
    arrays: dict[str, Any] = {"steps": np.zeros((3, 4)), **{f"param3/{name}": np.zeros(1) for name in names}}
    np.savez(tmp_path / "stage_align_x.npz", **arrays)
    folders = ["--checkpoint", str(other.folder / "plain"), "--vision", str(other.folder / "clip")]
    with pytest.raises(MoextendError, match="nothing in .* could be compared: steps/1/loss: .* no 'train0'"):
        command.main([*folders, "--reference", str(tmp_path / "stage_align_x.npz")])


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_hole_is_seen_by_nobody_and_positions_count_across_it():
    ids_BL = np.array([[1, 7, 100, 102, 102, 101, 9, 9]], np.int32)
    mask_BL = np.array([[1, 1, 1, 0, 1, 1, 0, 1]], np.int32)
    rows = reference.Rows(ids_BL, np.full_like(ids_BL, -100), mask_BL, (0,), np.ones((1, 2, 2, 3), np.float32))
    batch = reference.to_batch(rows, start=100, patches=2, room=2)
    assert batch.segments_BL.tolist() == mask_BL.tolist()
    assert batch.positions_BL.tolist() == [list(range(8))]
    assert batch.patches_BL.tolist() == [[-1, -1, -1, 0, 1, -1, -1, -1]]  # the image is there, mask or not
    assert batch.images_BMhwc.shape == (1, 2, 2, 2, 3) and not batch.images_BMhwc[0, 1].any()


def test_what_left_padding_leaves_undefined():
    labels_BL = np.array([[-100, -100, 5, 5], [5, 5, -100, -100]], np.int32)
    ids_BL = np.zeros_like(labels_BL)
    rows = reference.Rows(ids_BL, labels_BL, np.array([[0, 1, 0, 1], [1, 1, 1, 0]], np.int32), (), None)
    where = forward.defined(rows)
    assert where.where_BL.tolist() == [[False, True, False, True], [True] * 4]
    assert not where.ce  # row 0 predicts its last label from a place that nothing defines
    assert forward.defined(rows._replace(mask_BL=np.ones_like(ids_BL))).ce


def test_ties_are_gaps_below_noise_at_the_boundary_or_within_the_picks():
    logits_TO = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 2.0 + 1e-7], [3.0, 3.0 + 1e-7, 1.0], [3.0, 2.0, 2.0 + 1e-3]])
    found = forward.ties(logits_TO, top_k=2, noise=1e-5)
    assert found.boundary_T.tolist() == [False, True, False, False]
    assert found.any_T.tolist() == [False, True, True, False]
    assert not forward.ties(logits_TO[:, :2], top_k=2, noise=1e-5).boundary_T.any()  # all are picked


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


# --- the released code ------------------------------------------------------------------------------------------------


@oracle.needs_oracle
@pytest.mark.parametrize(
    ("checkpoint", "file", "left_out"),
    [
        ("moextend_pert", "forward_moextend_pert", 3),
        pytest.param("moextend_init", "forward_moextend_init", 1, marks=slow),
        pytest.param("vision", "forward_vision", 2, marks=slow),
        pytest.param("vision_gate", "forward_vision_gate", 0, marks=slow),
        ("vision", "hf_mixtral_text", 0),
        ("vision", "selection", 2),
        ("clip", "clip", 2),
        ("moextend_pert", "generate", 1),
        pytest.param("vision", "stage_align_vision", 0, marks=slow),
        pytest.param("vision", "stage_extend_vision", 0, marks=slow),
        pytest.param("moextend_pert", "stage_finetune_pert", 0, marks=slow),
    ],
)
def test_every_file_of_the_released_code(capsys, checkpoint: str, file: str, left_out: int):
    code, record = compare(capsys, oracle.FOLDER / checkpoint, oracle.FOLDER / f"{file}.npz")
    assert code == 0
    assert len(rows_of(record, "not compared")) == left_out
    assert record["compared"] == len(rows_of(record, "ok"))


@oracle.needs_oracle
def test_gradients_of_the_released_start_are_said_to_be_tied(capsys):
    code, record = compare(capsys, oracle.FOLDER / "moextend_init", oracle.FOLDER / "stage_finetune_init.npz")
    assert code == 0
    assert set(rows_of(record, "ok")) == {"steps/1/loss", "steps/1/ce", "steps/1/aux"}
    tied = rows_of(record, "tied: not compared")
    assert len(tied) == 3 * 16 + 9 and "tokens of train0 tie" in tied["steps/1/grad_norm"]["note"]
