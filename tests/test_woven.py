"""Projectors on an earlier medium's: where they start, that nothing before them changes, a chain of them in a run."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_chain import groups, write_features
from test_method_runs import assert_goes_on

from moextend_jax import cli
from moextend_jax.checkpoints import store
from moextend_jax.config import MoextendError, ProjectorConfig
from moextend_jax.mesh import make_mesh, place_leaves, place_rows
from moextend_jax.models.flops import step_flops
from moextend_jax.models.projectors import make_projector
from moextend_jax.parameters import arrays_of, by_path, with_arrays
from moextend_jax.runs import results
from moextend_jax.runs.making import make
from moextend_jax.runs.models_of import leaves_of, open_model
from moextend_jax.runs.run import open_run, remember
from moextend_jax.settings import ExtensionSettings, MediumSettings, MethodSettings, ProjectorSettings, RunSettings
from moextend_jax.sharding import MESH_AXES

CONNECTOR = MethodSettings(name="connector")


def made(kind: Any, **more: Any) -> Any:
    config = ProjectorConfig(kind=kind, heads=2, queries=3, **more)
    return make_projector(config, C=6, P=5, D=8, rngs=nnx.Rngs(1), dtype="float32")


@pytest.mark.slow
def test_at_the_start_the_first_medium_goes_the_trunk_s_way():
    """Later ones go between the ways of all before, and with random maps inside, as released, elsewhere."""
    x_nPC = jax.random.normal(jax.random.key(0), (2, 5, 6))
    trunk, first = made("linear"), made("weave", trunk="image", width=6, rank=2)
    np.testing.assert_array_equal(first(x_nPC, trunk), trunk(x_nPC))
    first.first.up[...] = jax.random.normal(jax.random.key(1), first.first.up.shape)  # trained
    options = {"trunk": "image", "width": 6, "rank": 2, "past": ("first",)}
    second, released = made("weave", **options), made("weave", inner="random", **options)
    first.second.up[...] = jax.random.normal(jax.random.key(2), first.second.up.shape)
    np.testing.assert_array_equal(second.first.inner[...], np.eye(2)[None])
    assert np.abs(released(x_nPC, trunk, first) - second(x_nPC, trunk, first)).max() > 1e-3
    assert np.abs(second(x_nPC, trunk, first) - first(x_nPC, trunk)).max() > 1e-3


@pytest.mark.slow
def test_crema_starts_from_the_trunk_with_queries_of_its_own():
    x_nPC = jax.random.normal(jax.random.key(0), (2, 5, 6))
    trunk, own = made("resampler"), made("crema", trunk="image", width=6, rank=2)
    own.queries[...], own.out[...] = trunk.queries[...], trunk.out[...]
    np.testing.assert_allclose(own(x_nPC, trunk), trunk(x_nPC), atol=1e-6)
    own.value_b[...] = 10 * jax.random.normal(jax.random.key(1), own.value_b.shape)
    assert np.abs(own(x_nPC, trunk) - trunk(x_nPC)).max() > 1e-3


def medium(kind: Any = "weave", trunk: str = "image", rank: int = 2) -> MediumSettings:
    projector = ProjectorSettings(kind=kind, trunk=trunk, rank=rank)
    return MediumSettings(kind="features", width=5, patches=3, projector=projector)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    """Pictures, then two media of features, whose projectors are woven into that of the pictures; no extension."""
    folder = tmp_path_factory.mktemp("woven")
    base, llava = tiny.write_base(folder / "base"), tiny.write_llava(folder / "llava", rows=24)
    data = {name: str(write_features(folder / name, medium=name)) for name in ("touch", "smell")}
    later = {name: ExtensionSettings(medium=name, method=CONNECTOR, **groups(of)) for name, of in data.items()}
    return RunSettings(
        **groups(str(llava / "llava_v1_5_mix665k.json")), method=CONNECTOR, extensions=later,
        media={"touch": medium(), "smell": medium()}, base=str(base), vision=str(base / "vision"), dtype="float32",
        remat="none", checkpoint_every=100, log_every=1,
    )  # fmt: skip


@pytest.mark.slow
def test_a_chain_of_connectors(settings, tmp_path: Path):
    """Each trains its own; the decoder and all before it stay bit for bit; a delta of the last brings what it needs."""
    run = open_run(settings, tmp_path / "w")
    table = results.table(settings)
    stages = [name for name in table.results if not name.startswith("full")]
    assert stages == ["align", "finetune", "align:touch", "finetune:touch", "align:smell", "finetune:smell"]
    for name in stages:
        make(run, name)
    remember(run)
    models = [open_model(run, f"moextend:{name}") for name in ("image", "touch", "smell")]
    for learnt, (before, after) in zip((("image",), ("image", "touch")), itertools.pairwise(models), strict=True):
        own = ["decoder/", *(f"media/{name}/" for name in learnt)]
        kept = [path for path in before.arrays if path.startswith(tuple(own))]
        assert all(np.array_equal(before.arrays[path], after.arrays[path]) for path in kept)
        assert any("/projector/" in path for path in kept)
    config = models[-1].model.config
    assert config.media["smell"].projector.past == ("touch",) and not config.added
    moved = leaves_of(run, "finetune:smell")
    assert all(path.startswith("media/smell/projector/") for path in moved)
    assert any(np.any(leaf) for path, leaf in moved.items() if path.endswith("/up"))
    projector = config.media["smell"].projector
    fresh = make_projector(projector, C=5, P=3, D=16, rngs=nnx.Rngs(0), dtype="float32")
    assert {path.removeprefix("media/smell/projector/") for path in moved} == arrays_of(fresh).keys()
    cli.main(["export", str(tmp_path / "w"), str(tmp_path / "out"), "--layout", "delta"])
    record, leaves = store.read(tmp_path / "out")
    assert record.config.media["smell"].projector == projector
    for path, leaf in moved.items():
        assert leaves[path].ours(()).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.slow
def test_cut_off_and_gone_on_equals_uninterrupted(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert_goes_on(settings, "finetune:touch", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({"touch": medium(trunk="smell"), "smell": medium()}, "its trunk is 'smell'; there are: image linear"),
        ({"touch": medium("crema"), "smell": medium()}, "adds to a projector of kind resampler"),
        ({"touch": medium(), "smell": medium(rank=3)}, "rank = 3: touch on the same trunk have rank 2"),
    ],
)
def test_a_trunk_that_is_not_there_is_refused(media, message: str, settings, tmp_path: Path):
    changed = dataclasses.replace(settings, media=media, extensions={})
    with pytest.raises(MoextendError, match=message):
        open_run(changed, tmp_path / "w")


def test_a_trunk_must_be_trained_before(settings):
    with pytest.raises(MoextendError, match="stands on that of image, which no extension before it has trained"):
        dataclasses.replace(settings, extension="touch", medium="touch", extensions={})
    later = dict(reversed(settings.extensions.items()))  # smell before touch, but behind it in media
    with pytest.raises(MoextendError, match="projector of smell stands on that of touch, which no extension before"):
        dataclasses.replace(settings, extensions=later)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("kind", ["weave", "crema"])
def test_tokens_and_gradients_do_not_depend_on_the_mesh(kind: str):
    """A tower of another width than the trunk's; of weave one medium before, of crema the map of its fusion."""

    def build(kind: str, C: int, **more: Any) -> nnx.Module:
        config = ProjectorConfig(kind=kind, heads=2, queries=3, rank=2, **more)  # pyright: ignore[reportArgumentType]
        made = nnx.eval_shape(lambda: make_projector(config, C=C, P=5, D=16, rngs=nnx.Rngs(0), dtype="float32"))
        assert isinstance(made, nnx.Module)
        return made

    trunk = build("linear" if kind == "weave" else "resampler", 16)
    past = [build("weave", 16, trunk="image", width=16)] if kind == "weave" else []
    own = build(kind, 8, trunk="image", width=16, past=("before",) * len(past), fusion=kind == "crema")
    modules, rng = [own, trunk, *past], np.random.default_rng(0)
    arrays = [
        {path: jnp.asarray(rng.normal(0, 0.1, param.shape), jnp.float32) for path, param in
         by_path(nnx.state(module, nnx.Param)).items()} for module in modules
    ]  # fmt: skip
    x_nPC = jnp.asarray(rng.normal(size=(8, 5, 8)), jnp.float32)

    @jax.jit
    def loss(arrays, x_nPC):
        made = [with_arrays(module, leaves) for module, leaves in zip(modules, arrays, strict=True)]
        return (made[0](x_nPC, *made[1:]) ** 2).sum()

    expected, d_expected = jax.value_and_grad(loss)(arrays, x_nPC)
    mesh = make_mesh(dict(zip(MESH_AXES, (1, 2, 2, 2), strict=True)))
    with jax.set_mesh(mesh):
        placed = [place_leaves(module, leaves, mesh) for module, leaves in zip(modules, arrays, strict=True)]
        value, gradient = jax.value_and_grad(loss)(placed, place_rows(x_nPC, mesh))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradient, d_expected, strict=True):
        for path, leaf in theirs.items():
            np.testing.assert_allclose(ours[path], leaf, atol=1e-5, rtol=1e-4, err_msg=path)


def test_flops_of_what_a_medium_adds():
    """One item of 3 positions, by hand: its map to the trunk's width, its adapters, the trunk's two maps."""
    woven = ProjectorConfig(kind="weave", trunk="image", width=12, rank=2, past=("touch",))
    smell = dataclasses.replace(tiny.SOUND, projector=woven)
    config = dataclasses.replace(tiny.PLAIN, media=tiny.PLAIN.media.replacing("smell", smell))
    parts = step_flops(config, trains=("media/smell/projector/*",), rows=1, length=8, items={"smell": 1}).parts
    P, C, c, D = smell.tower.patches, smell.tower.sizes()["C"], 12, config.decoder.width
    own = {name.rpartition("/")[2]: of["forward"] for name, of in parts.items() if name.startswith("media/smell/")}
    assert own == {
        "first": 2 * P * c * D, "second": 2 * P * D * D, "input": 2 * P * C * c,
        "adapters": 2 * P * 2 * 2 * (c + 3 * D),
    }  # fmt: skip
    trained = {name for name, of in parts.items() if of["weight_gradients"]}
    assert trained == {"media/smell/projector/input", "media/smell/projector/adapters"}  # the trunk is frozen
    same = dataclasses.replace(smell, tower=dataclasses.replace(smell.tower, width=c))  # nothing trains below the trunk
    config = dataclasses.replace(config, media=config.media.replacing("smell", same))
    parts = step_flops(config, trains=("media/smell/projector/*",), rows=1, length=8, items={"smell": 1}).parts
    back = {name: parts[f"media/smell/projector/{name}"]["activation_backward"] for name in ("first", "second")}
    assert back == {"first": 0, "second": 2 * P * D * D}
