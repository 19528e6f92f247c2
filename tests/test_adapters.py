"""Low-rank updates in the whole model: nothing changes at the start, closed tokens stay exact, meshes agree."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run
import tiny
from flax import nnx
from tiny import few

from moextend_jax.checkpoints import quantising, train_state
from moextend_jax.config import RECIPES, AdapterConfig, DecoderConfig, ModelConfig, MoextendError, Named
from moextend_jax.evaluate.composing import RULES, composed
from moextend_jax.models.flops import step_flops
from moextend_jax.models.moextend import abstract, shares, shares_of_text
from moextend_jax.models.quantised import dequantise, quantise
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.runs import results
from moextend_jax.runs.export import ExportOptions, export
from moextend_jax.runs.making import make
from moextend_jax.runs.models_of import frozen_unchanged, leaves_of, open_model
from moextend_jax.runs.run import open_run, remember
from moextend_jax.settings import Link, MethodSettings
from moextend_jax.train.loss import losses
from moextend_jax.train.stages import group

LORA = AdapterConfig(rank=3, alpha=6.0, experts="per_expert", router=True)
MOLE = AdapterConfig(method="mole", rank=2, alpha=4.0, lora_experts=3, gating="top1_prob", balance=0.1)
MORAM = AdapterConfig(method="moram", rank=4, alpha=8.0, experts="none", top_k=3, tau=0.1)
ADAPTERS = {
    "moram": MORAM,
    "lora": LORA,
    "shared": dataclasses.replace(LORA, experts="shared", router=False),
    "mole": MOLE,
    "items": dataclasses.replace(LORA, method="damc", experts="shared", router=False, tokens="items"),
    "text": dataclasses.replace(LORA, method="damc", experts="shared", router=False, tokens="text"),
}


def with_adapters(config: ModelConfig, *names: str) -> ModelConfig:
    return dataclasses.replace(config, adapters=Named({name: ADAPTERS[name] for name in names}))


@pytest.mark.parametrize("name", few(ADAPTERS, "lora"))
def test_nothing_changes_at_the_start_and_then_only_b_has_a_gradient(name: str):
    config, batch = with_adapters(tiny.PLAIN, name), tiny.batch()
    arrays = tiny.arrays(config)
    arrays = {
        path: leaf * (not (path.startswith("adapters/") and path.endswith("/b"))) for path, leaf in arrays.items()
    }
    plain = {path: leaf for path, leaf in arrays.items() if not path.startswith("adapters/")}
    before = with_arrays(abstract(tiny.PLAIN), plain)(batch)
    after = with_arrays(abstract(config), arrays)(batch)
    np.testing.assert_array_equal(after.hidden_BLD, before.hidden_BLD)
    _, gradient = tiny.loss_and_gradient(config, arrays, batch, of="adapters/")
    for path, leaf in gradient.items():
        assert bool(jnp.any(leaf)) == (path.endswith("/b") or "/choice/" in path), path


@pytest.mark.slow
def test_tokens_that_an_adapter_is_closed_to_are_as_without_it():
    """Even rows have a picture: with strict isolation hidden states of the others are as if no adapter had a share."""
    config = dataclasses.replace(with_adapters(tiny.EXTENDED, "lora", "mole", "moram"), text_isolation="strict")
    arrays, batch = tiny.arrays(config), tiny.batch()
    closed = dataclasses.replace(
        config, adapters=Named({name: dataclasses.replace(of, share=0.0) for name, of in config.adapters.items()})
    )
    with_them, without = (np.asarray(with_arrays(abstract(c), arrays)(batch).hidden_BLD) for c in (config, closed))
    pictured_BL = np.broadcast_to((batch.places_BL >= 0).any(axis=1, keepdims=True), batch.ids_BL.shape)
    assert pictured_BL.any() and not pictured_BL.all()
    np.testing.assert_array_equal(with_them[~pictured_BL], without[~pictured_BL])
    assert np.abs(with_them - without)[pictured_BL].max() > 1e-2


@pytest.mark.slow
def test_what_an_adapter_is_closed_to_is_not_balanced():
    """Conversations of text, whose tokens MoLE's router may not send anywhere under strict isolation."""
    config = dataclasses.replace(with_adapters(tiny.PLAIN, "mole"), text_isolation="strict")
    arrays, batch, name = tiny.arrays(config), tiny.batch(), "adapters/mole/block/choice/weight"
    text_B = (batch.places_BL < 0).all(axis=1)
    assert text_B.any() and not text_B.all()
    other_BL = np.where(text_B[:, None], np.roll(batch.ids_BL, 3, axis=1), batch.ids_BL)
    no_labels = batch._replace(labels_BL=np.full_like(batch.labels_BL, -100))

    @jax.jit
    @jax.grad
    def gradient_of(weight: jax.Array, ids_BL: np.ndarray) -> jax.Array:
        made, asked = with_arrays(abstract(config), {**arrays, name: weight}), no_labels._replace(ids_BL=ids_BL)
        return losses(made, asked, recipe=RECIPES["paper"], aux_coefficient=0.0, chunk=8)[0].total

    def gradient(ids_BL: np.ndarray) -> np.ndarray:
        return np.asarray(gradient_of(arrays[name], ids_BL))

    before = gradient(batch.ids_BL)
    assert np.any(before)
    np.testing.assert_array_equal(gradient(other_BL), before)


def test_damc_has_one_for_items_and_another_for_text():
    """And what is generated, text, is under the second alone."""
    link = Link("own", "image", rival=MethodSettings(name="damc", rank=2, alpha=4.0).rival("image"))
    assert {name: part.tokens for name, part in link.parts.items()} == {"own": "items", "own.text": "text"}
    config, batch = dataclasses.replace(tiny.PLAIN, adapters=Named(link.parts)), tiny.batch()
    item_BL = batch.places_BL >= 0
    for isolation in ("none", "strict"):
        strict = dataclasses.replace(config, text_isolation=isolation)
        open_to = {name: np.asarray(of_BL) == 0 for name, of_BL in shares(batch, strict).items()}
        near_BL = item_BL.any(axis=1, keepdims=True) | (isolation == "none")
        decoupled = shares(batch, dataclasses.replace(strict, composition="decoupled"))
        assert {name: np.array_equal(np.asarray(of) == 0, open_to[name]) for name, of in decoupled.items()} == {
            "own": True, "own.text": True
        }  # fmt: skip
        np.testing.assert_array_equal(open_to["own"], item_BL)
        np.testing.assert_array_equal(open_to["own.text"] & (batch.segments_BL > 0),
                                      ~item_BL & near_BL & (batch.segments_BL > 0))  # fmt: skip
        assert [*shares_of_text(batch, strict)] == ["own.text"]
    half = Named({name: dataclasses.replace(part, share=0.5) for name, part in link.parts.items()})
    own_BL, text_BL = (np.asarray(of) for of in shares(batch, dataclasses.replace(config, adapters=half)).values())
    assert {*own_BL[item_BL]} == {0.0} and {*text_BL[~item_BL]} == {np.float32(np.log(0.5))}  # a share is for text
    halves = composed(config, RULES["shared 1/N"]).adapters
    assert {of.share for of in halves.values()} == {1.0}  # two parts of one extension


@pytest.mark.slow
def test_sets_of_atoms_compete_and_the_threshold_is_for_answering():
    """Two sets are one of both their atoms; a set that is closed is as if it were not there."""
    two = Named(first=MORAM, second=dataclasses.replace(MORAM, trains=True))
    config = dataclasses.replace(tiny.PLAIN, adapters=two)
    arrays, batch = tiny.arrays(config), tiny.batch()

    def hidden(config, arrays):
        own = {
            p: leaf for p, leaf in arrays.items() if p.split("/")[0] != "adapters" or p.split("/")[1] in config.adapters
        }
        return np.asarray(with_arrays(abstract(config), own)(batch).hidden_BLD)

    joined = {
        path.replace("adapters/first", "adapters/both"): leaf for path, leaf in arrays.items() if "/second/" not in path
    }
    for path in [path for path in joined if "/both/" in path]:
        parts = [arrays[path.replace("both", name)] for name in two]
        joined[path] = jnp.concatenate(parts, axis=-1 if path.endswith("/a") else 1)
    wide = dataclasses.replace(MORAM, rank=8, alpha=16.0, trains=True)
    both = dataclasses.replace(config, adapters=Named(both=wide))
    np.testing.assert_allclose(hidden(config, arrays), hidden(both, joined), atol=1e-5)
    closed = dataclasses.replace(
        config,
        adapters=Named(first=dataclasses.replace(MORAM, trains=True), second=dataclasses.replace(MORAM, share=0.0)),
    )
    alone = dataclasses.replace(config, adapters=Named(first=dataclasses.replace(MORAM, trains=True)))
    np.testing.assert_array_equal(hidden(closed, arrays), hidden(alone, arrays))
    answering = dataclasses.replace(config, adapters=Named(first=MORAM, second=MORAM))
    assert np.abs(hidden(answering, arrays) - hidden(config, arrays)).max() > 1e-3


@pytest.mark.slow
def test_over_a_base_in_few_bits():
    """QLoRA: loss and gradients are those over the weights that the integers stand for."""
    config = with_adapters(tiny.PLAIN, "lora")
    arrays, batch = tiny.arrays(config), tiny.batch()
    few_bits, stands_for = dict(arrays), dict(arrays)
    for path in quantising.MATRICES:
        matrices = np.asarray(arrays[path])
        made = [[quantise(w_IO, "int4", 4) for w_IO in of_layer] for of_layer in matrices]
        values, scale = (jnp.asarray(np.array([[pair[n] for pair in row] for row in made])) for n in range(2))
        few_bits |= {path: values, f"{path}_scale": scale}
        stands_for[path] = dequantise(values, scale, jnp.float32)
    stored = dataclasses.replace(config, expert_storage="int4", expert_group=4)
    models = ((config, stands_for), (stored, few_bits), (config, arrays))
    (expected, d_expected), (got, gradient), (otherwise, _) = (
        tiny.loss_and_gradient(*model, batch, of="adapters/") for model in models
    )
    np.testing.assert_allclose(got.total, expected.total, atol=1e-5)
    for path, leaf in d_expected.items():
        np.testing.assert_allclose(gradient[path], leaf, atol=1e-5, err_msg=path)
    assert abs(got.total - otherwise.total) > 1e-4


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    ("shape", "dispatch", "names"),
    [
        pytest.param((1, 2, 2, 2), "gather", ("lora", "mole"), marks=pytest.mark.long),
        pytest.param((1, 2, 2, 2), "exchange", ("lora", "mole"), marks=pytest.mark.long),
        pytest.param((1, 1, 4, 2), "gather", ("shared", "mole"), marks=pytest.mark.slow),
        ((1, 1, 4, 2), "exchange", ("lora", "moram")),
        pytest.param((1, 1, 4, 2), "gather", ("moram", "items", "text"), marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), "exchange", ("items", "text"), marks=pytest.mark.slow),
    ],
)
def test_sharded_is_unsharded(shape: tuple[int, ...], dispatch, names: tuple[str, ...]):
    config = dataclasses.replace(with_adapters(tiny.EXTENDED, *names), dispatch=dispatch)
    tiny.check_sharded_is_unsharded(config, of="adapters/", shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mole", pytest.param("damc", marks=pytest.mark.slow)])
def test_a_run_of_low_rank_updates(name, tmp_path, monkeypatch):
    """align, grow and finetune; nothing is probed or selected; B is all that has moved beside A and the router over
    LoRA experts, and the base is what it was."""
    tiny.shorten_easy_vqa(monkeypatch)
    method = MethodSettings(name=name, rank=2, alpha=4.0, gating="top1_prob")
    settings = random_run.settings(tiny.write_base(tmp_path / "base"), method=method)
    stage = dataclasses.replace(settings.finetune, steps=3)  # in the first the rate is still zero
    run = open_run(dataclasses.replace(settings, finetune=stage), tmp_path / "work")
    assert [*results.table(run.settings).results] == ["align", "grow", "finetune", "full"]
    for stage in ("align", "grow", "finetune"):
        make(run, stage)
    remember(run)
    grown, tuned = (leaves_of(run, stage) for stage in ("grow", "finetune"))
    assert grown.keys() == tuned.keys()
    parts = {"image", "image.text"} if name == "damc" else {"image"}
    assert {tuple(path.split("/")[:2]) for path in grown} == {("adapters", part) for part in parts}
    assert all(not jnp.any(leaf) for path, leaf in grown.items() if path.endswith("/b"))
    assert all(jnp.any(leaf) for path, leaf in tuned.items() if path.endswith("/b"))
    assert frozen_unchanged(run)
    model = open_model(run, "moextend").model.config
    assert model.adapters["image"] == method.rival("image") and not model.extensions
    with pytest.raises(MoextendError, match=r"this model has adapters image.*: export it with --layout delta"):
        export(ExportOptions(src=run.workdir, dst=tmp_path / "out", layout="released"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(MoextendError, match="no stage 'select'"):
        make(run, "select")


def test_records_from_before_there_were_two_updates_still_count():
    now = {"adapter": dataclasses.asdict(LORA)}
    before = {"adapter": {name: value for name, value in now["adapter"].items() if name != "tokens"}}
    train_state.check_facts(before, now, where=Path("grow"))
    with pytest.raises(MoextendError, match="adapter.tokens"):
        train_state.check_facts(before, {"adapter": now["adapter"] | {"tokens": "items"}}, where=Path("grow"))


@pytest.mark.parametrize(
    "wrong", [{"name": "mole", "experts": "none"}, {"name": "lora", "experts": "none", "attention": False}]
)
def test_methods_without_anything_to_adapt_are_refused(wrong):
    with pytest.raises(MoextendError, match="method"):
        MethodSettings(**wrong)


COUNTS = {
    "lora, every expert": (AdapterConfig(experts="per_expert"), 1_920_991_232, 4.4),
    "and the router": (AdapterConfig(experts="per_expert", router=True), 1_937_801_216, 4.5),
    "attention": (AdapterConfig(experts="none"), 109_051_904, 0.9),
    "as many as new experts": (AdapterConfig(rank=186, experts="per_expert"), 2_791_440_384, 6.4),
    "shared": (AdapterConfig(), 335_544_320, 4.4),
    "qlora": (AdapterConfig(rank=64, alpha=16.0, experts="per_expert"), 960_495_616, 2.2),
    "moram": (AdapterConfig(method="moram", rank=8, experts="none"), 6_815_744, 0.05),
    "mole": (AdapterConfig(method="mole", rank=32, alpha=64.0, lora_experts=3), 197_525_600, 2.9),
    "mole, every expert": (
        AdapterConfig(method="mole", rank=32, alpha=64.0, lora_experts=3, experts="per_expert"),
        1_386_610_784,
        2.9,
    ),
}
"""At Mixtral-8x7B's sizes: parameters, and what a token's forward pass costs more, in per cent."""


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_flops_of_the_full_size(name: str):
    adapter, parameters, more = COUNTS[name]
    config = ModelConfig(decoder=DecoderConfig(), adapters=Named(a=dataclasses.replace(adapter, medium="")))
    shapes = {p: leaf.shape for p, leaf in by_path(nnx.state(abstract(config))).items() if p.startswith("adapters/")}
    assert sum(map(math.prod, shapes.values())) == parameters
    assert {group(path) for path in shapes} == {"adapters"}
    flops = step_flops(config, trains=("adapters/*",), rows=1, length=2, items={})
    forward = {part: phases["forward"] for part, phases in flops.parts.items() if "scores" not in part}
    added = sum(flops for part, flops in forward.items() if part.startswith("adapters/"))
    assert 100 * added / (sum(forward.values()) - added) == pytest.approx(more, abs=0.05)
