import dataclasses
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from moextend_jax.config import MoextendError, VisionConfig
from moextend_jax.data import features
from moextend_jax.data.datasets import AnyItems, Items, open_dataset
from moextend_jax.data.features import FeatureStore, JoinedFeatures, cache_features
from moextend_jax.data.mixing import JoinedItems
from moextend_jax.faults import Fault
from moextend_jax.media.image import decode_image, prepare_image
from moextend_jax.settings import FaultSettings


def encoded(shade):
    import io

    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def images_of(shown: dict[str, bytes], fingerprint: str = "five") -> Items:
    return Items(
        [{"id": key.encode(), "image": image, "span": b""} for key, image in shown.items()], fingerprint=fingerprint
    )


IMAGES = images_of({f"k{n}": encoded(10 * n) for n in range(5)})


def tower(images_nhwc):
    n, h, _, _ = images_nhwc.shape
    return images_nhwc.reshape(n, 4, h * h // 4, 3)[:, :, 0]


def make(
    path, *, images: AnyItems = IMAGES, compute=tower, preparation: Any = "pad", feature_layer=-2, few=None, **more
):
    inputs = tiny.pictures(images, preparation=preparation)
    assert isinstance(inputs.medium.tower, VisionConfig)
    read = dataclasses.replace(inputs.medium.tower, feature_layer=feature_layer)
    inputs = dataclasses.replace(inputs, medium=dataclasses.replace(inputs.medium, tower=read), few=few)
    return cache_features(inputs, path=path, compute=compute, **({"tower": "t1", "batch_size": 2} | more))


def refuse(images_nhwc):
    raise AssertionError("the cache should have been used")


def test_features_are_those_of_the_key(tmp_path):
    shapes = []
    store = make(tmp_path / "c", compute=lambda x: shapes.append(x.shape) or tower(x))
    assert set(shapes) == {(2, 8, 8, 3)}  # one shape, so one compilation
    for image in IMAGES:
        wanted = tower(prepare_image(decode_image(image.encoded), size=8, preparation="pad")[None])[0]
        np.testing.assert_array_equal(store[image.key], wanted)
        np.testing.assert_array_equal(FeatureStore.open(tmp_path / "c")[image.key], wanted)
    with pytest.raises(MoextendError, match="image k9 is not in"):
        store["k9"]


def test_beside_an_accelerator_several_items_are_prepared_at_once(tmp_path, monkeypatch):
    alone, together, prepare = make(tmp_path / "c"), threading.Barrier(2, timeout=30), features._prepare
    monkeypatch.setattr(features.machine, "only_cpu", lambda: False)
    monkeypatch.setattr(features.machine, "cores", lambda: 2)
    monkeypatch.setattr(features, "_prepare", lambda inputs, row: together.wait() and None or prepare(inputs, row))
    store = make(tmp_path / "d", few=(0, 1, 2, 3))
    assert list(store.rows) == ["k0", "k1", "k2", "k3"]
    np.testing.assert_array_equal(store.features_nPC, alone.features_nPC[:4])


def test_a_fitting_cache_is_used_again_and_a_stale_one_is_not(tmp_path):
    first = make(tmp_path / "c")
    make(tmp_path / "c", compute=refuse)
    changes: tuple[dict[str, Any], ...] = (
        {"tower": "t2"},
        {"feature_layer": -1},
        {"preparation": "crop"},
        {"images": dataclasses.replace(IMAGES, fingerprint="others")},
    )
    for change in changes:
        with pytest.raises(AssertionError):
            make(tmp_path / "c", compute=refuse, **change)
    assert first.fingerprint == {  # as caches of before have it
        "tower": "t1", "dtype": "float32", "images": "five", "feature_layer": -2, "size": 8, "preparation": "pad"
    }  # fmt: skip


def test_pictures_of_another_folder_are_other_pictures(tmp_path):
    """As many, of the same names, sizes and answers."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a thing"}]
    stores = []
    for folder, shade in ((tmp_path / "cats", 10), (tmp_path / "dogs", 250)):
        folder.mkdir()
        (folder / "1.png").write_bytes(encoded(shade))
        entry = {"id": "1", "image": "1.png", "conversations": talk}
        (folder / "llava_v1_5_mix665k.json").write_text(json.dumps([entry]))
        source = open_dataset("llava_instruct", data_dir=tmp_path / "built", manual_dir=folder)
        stores.append(make(tmp_path / "c", images=source.images)["1.png"].copy())
        make(tmp_path / "c", images=source.images, compute=refuse)
    assert (stores[0] != stores[1]).any()


def test_a_data_set_with_the_same_items_finds_their_cache(tmp_path):
    made = make(tmp_path / "captions")
    found = make(tmp_path / "questions", compute=refuse)
    assert found.path == made.path and not (tmp_path / "questions").exists()
    with pytest.raises(AssertionError):
        make(tmp_path / "questions", compute=refuse, tower="t2")


def test_who_wants_a_cache_that_is_being_made_waits_for_it(tmp_path):
    begun, others = threading.Event(), []

    def slow(x):
        if not begun.is_set():
            begun.set()
            time.sleep(0.3)  # in which the other one would begin too
        return tower(x)

    def other():
        begun.wait()
        others.append(make(tmp_path / "c", compute=refuse))

    thread = threading.Thread(target=other)
    thread.start()
    store = make(tmp_path / "c", compute=slow)
    thread.join()
    np.testing.assert_array_equal(others[0].features_nPC, store.features_nPC)


def test_features_of_several_data_sets_are_one_after_another(tmp_path):
    """One has no pictures, and one a picture that cannot be read."""
    others = images_of({"a": encoded(90), "broken": b"no picture", "b": encoded(95)}, fingerprint="others")
    items = JoinedItems([IMAGES, images_of({}), others])
    skipping = FaultSettings(policies={"not_image": "skip"}, most_skipped=1.0)
    first, last = make(tmp_path / "five"), make(tmp_path / "three", images=others, faults=skipping)
    store = JoinedFeatures(stores=(first, None, last), joined=items.joined)
    assert [store.row(key) for key in ("0/k0", "0/k4", "2/a", "2/b")] == [0, 4, 5, 7]
    rows = np.array([[7, 0], [5, 4]])
    expected = np.stack([[last["b"], first["k0"]], [last["a"], first["k4"]]])
    np.testing.assert_array_equal(store.read(rows), expected)
    with pytest.raises(Fault) as fault:
        store.row("2/broken")
    assert fault.value.id == "2/broken"


def test_some_items_are_cached_as_if_there_were_no_others(tmp_path):
    store, whole = make(tmp_path / "two", few=(1, 3)), make(tmp_path / "five")
    assert store.rows == {"k1": 0, "k3": 1} and len(store.features_nPC) == 2
    np.testing.assert_array_equal(store["k3"], whole["k3"])
    others = make(tmp_path / "others", few=(1, 2))
    assert len({cache.fingerprint["images"] for cache in (store, whole, others)}) == 3
    with pytest.raises(MoextendError, match="image k0 is not in"):
        store["k0"]


def test_a_run_that_dies_leaves_no_cache(tmp_path):
    def dies(images_nhwc):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        make(tmp_path / "c", compute=dies)
    assert [path.name for path in tmp_path.iterdir()] == ["c.lock"]
    with pytest.raises(MoextendError, match="no feature cache"):
        FeatureStore.open(tmp_path / "c")


def test_what_killed_runs_left_goes_whoever_comes_next(tmp_path):
    for name in ("c.unfinished-1", "c.unfinished-2", "other.unfinished-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features.npy").touch()
    make(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.lock", "other.unfinished-1"]
    (tmp_path / "c.unfinished-1").mkdir()
    make(tmp_path / "c", compute=refuse)
    assert not (tmp_path / "c.unfinished-1").exists()


def test_a_full_disk_is_an_error_and_no_bus_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=239))
    message = "features take 240 bytes, and .* has room for 239: make room there, or set cache_features = false"
    with pytest.raises(MoextendError, match=message):
        make(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c.lock"]


def test_a_damaged_cache_is_made_again(tmp_path):
    make(tmp_path / "c")
    (tmp_path / "c" / "cache.json").write_text("{")
    assert len(make(tmp_path / "c").rows) == 5
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["keys"] == [image.key for image in IMAGES]


def test_no_images_and_broken_images_are_errors(tmp_path):
    with pytest.raises(MoextendError, match="no items"):
        make(tmp_path / "c", images=images_of({}))
    with pytest.raises(MoextendError, match="cannot read image bad"):
        make(tmp_path / "c", images=images_of({"bad": b"x"}))
