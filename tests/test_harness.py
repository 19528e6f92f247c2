"""lm-eval on our models: its log-likelihoods are those of the whole model, its tasks run unchanged."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokens
from local_tasks import write_tasks

from moextend_jax.config import IGNORE, Batch, MoextendError
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.evaluate.asking import asker_of
from moextend_jax.evaluate.forgetting import average_drop, base_and, figure, forgetting, read_tasks
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.askable import Askable, askable
from moextend_jax.runs.run import open_run
from moextend_jax.settings import EvaluateSettings, RunSettings, StageSettings

QUESTIONS = [
    ("In the beginning God created the", ["heaven and the earth", "green", "a of the", "seven"], 0),
    ("Which of these is a shape?", ["blue", "a circle", "to eat"], 1),
    ("The Lord is my", ["shepherd", "of the and it came to pass", "table"], 0),
]
CONTEXTS = ["In the beginning", "a person who ", "And the LORD said unto Moses,\n"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Askable:
    """The embedded base, a real small language model."""
    stage = StageSettings(data="easy_vqa/questions", steps=1, batch_size=4, length=48)
    settings = RunSettings(
        align=stage, extend=stage, finetune=stage, full=stage,
        evaluate=EvaluateSettings(data="easy_vqa/questions", questions=4, batch_size=16, length=64),
        dtype="float32", remat="none",
    )  # fmt: skip
    return askable(open_run(settings, tmp_path_factory.mktemp("work")), "base")


@pytest.fixture(scope="module")
def model(run):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from moextend_jax.evaluate.harness import HarnessModel

    return HarnessModel(asker_of(run), tokenizer=run.tokenizer, max_length=40)


@pytest.fixture(scope="module")
def direct(run):
    """Log-probabilities `[L, V]` of what follows each of some ids: one pass of the whole model, no cache, no batch."""

    @jax.jit
    def nats(arrays, ids_BL, segments_BL):
        positions_BL = jnp.arange(ids_BL.shape[1])[None]
        whole = with_arrays(run.model, arrays)
        nothing_BL = jnp.full_like(ids_BL, IGNORE)
        hidden_BLD = whole(Batch(ids_BL, nothing_BL, positions_BL, segments_BL, jnp.full_like(ids_BL, -1))).hidden_BLD
        return jax.nn.log_softmax(whole.decoder.logits(hidden_BLD), axis=-1)[0]

    def of(ids: list[int]) -> np.ndarray:
        ids_BL = np.zeros((1, 64), np.int32)
        ids_BL[0, : len(ids)] = ids
        segments_BL = (np.arange(64) < len(ids)).astype(np.int32)[None]
        return np.asarray(nats(run.arrays, ids_BL, segments_BL), np.float64)[: len(ids)]

    return of


def test_texts_of_a_model_without_bos_begin_with_nothing(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from moextend_jax.evaluate.harness import HarnessModel

    tokenizer = load_tokenizer(tiny_tokens.write_byte_level(tmp_path))
    asking: Any = None
    model = HarnessModel(asking, tokenizer=tokenizer, max_length=40)
    assert model.tok_encode("a the") == model.tok_encode("a the", add_special_tokens=False) == tokenizer.encode("a the")
    # What goes before a text that has no context, as lm-eval's own models do.
    assert model.prefix_token_id == model.eot_token_id == tokenizer.eos
    assert model.tokenizer_name == "tokenizer.json"


def request(*arguments):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0, metadata=("", 0, 1))


@pytest.mark.slow
def test_loglikelihoods_are_those_of_the_whole_model(run, model, direct):
    requests = [request(context, f" {choice}") for context, choices, _ in QUESTIONS for choice in choices]
    requests.append(request("", "And it came to pass"))
    requests.append(request("A space goes over ", "to the answer"))
    asked: list[Any] = [one.args for one in requests]
    for (context, continuation), (nats, greedy) in zip(asked, model.loglikelihood(requests), strict=True):
        context = context.rstrip()
        before = [run.tokenizer.bos, *(run.tokenizer.encode(context) if context else [])]
        text = f"{context} {continuation.strip()}" if context else continuation
        ids = [run.tokenizer.bos, *run.tokenizer.encode(text)]
        assert ids[: len(before)] == before
        nats_LV = direct(ids)
        said = [nats_LV[n - 1, ids[n]] for n in range(len(before), len(ids))]
        np.testing.assert_allclose(nats, sum(said), atol=1e-4, rtol=0)
        assert greedy == all(nats_LV[n - 1].argmax() == ids[n] for n in range(len(before), len(ids)))


def test_what_the_model_says_is_greedy_to_the_harness(run, model, direct):
    ids = [run.tokenizer.bos, *run.tokenizer.encode("And the LORD")]
    best = int(direct(ids)[-1].argmax())
    (_, greedy), (_, not_greedy) = model._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best + 1])])
    assert greedy and not not_greedy


@pytest.mark.slow
def test_rolling_scores_each_token_once(run, model, direct):
    """A text of more than two windows of 40 tokens: the first sees BOS, later ones the 40 tokens before each end."""
    text = " ".join("And God said, Let there be light: and there was light." for _ in range(7))
    ids = run.tokenizer.encode(text)
    assert 80 < len(ids) < 120
    wanted = 0.0
    for start in range(0, len(ids), 40):
        some = ids[start : start + 40]
        full = len(some) == 40
        before = [run.tokenizer.bos if start == 0 else ids[start - 1]] if full else ids[-41 : -len(some)]
        nats_LV = direct(before + some)
        wanted += sum(nats_LV[len(before) + n - 1, some[n]] for n in range(len(some)))
    (found,) = model.loglikelihood_rolling([request(text)])
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_greedy_text_until_a_stop(run, model, direct):
    options = {"until": ["\n", " the"], "max_gen_toks": 12}
    said = model.generate_until([request(context, dict(options)) for context in CONTEXTS])
    for context, text in zip(CONTEXTS, said, strict=True):
        ids = [run.tokenizer.bos, *run.tokenizer.encode(context)]
        start = len(ids)
        for _ in range(12):
            nats_V = direct(ids)[-1].copy()
            nats_V[[run.tokenizer.tags.start, run.tokenizer.tags.end, run.tokenizer.tags.pad]] = -np.inf
            ids.append(int(nats_V.argmax()))
            if ids[-1] == run.tokenizer.eos:
                break
        whole = run.tokenizer.decode(ids)[len(run.tokenizer.decode(ids[:start])) :]
        assert text == whole.split("\n")[0].split(" the")[0]
    assert any(said)


def test_sampling_is_refused(model):
    with pytest.raises(MoextendError, match="greedily"):
        model.generate_until([request("a", {"until": [], "do_sample": True, "temperature": 0.7})])


@pytest.mark.slow
@pytest.mark.parametrize("with_its_own", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_task_runs_unchanged_and_makes_the_table(
    run, model, direct, tmp_path, monkeypatch, capsys, with_its_own: bool
):
    """Tasks of a folder, beside the 14,000 files of lm-eval's own (nine seconds to list) or alone."""
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=with_its_own)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    lines = [{"question": context, "choices": choices, "answer": n} for context, choices, n in QUESTIONS]
    tasks = write_tasks(tmp_path, lines)
    known = read_tasks(tasks, include_path=tmp_path)
    record = forgetting(base_and(run), known, out=tmp_path / "eval", max_length=64)
    right = 0
    for context, choices, answer in QUESTIONS:
        before = len(run.tokenizer.encode(context)) + 1
        nats = []
        for choice in choices:
            ids = [run.tokenizer.bos, *run.tokenizer.encode(f"{context} {choice}")]
            nats_LV = direct(ids)
            nats.append(sum(nats_LV[n - 1, ids[n]] for n in range(before, len(ids))))
        right += int(np.argmax(nats)) == answer
    assert record["tasks"]["local_choice"]["base"]["value"] == pytest.approx(100 * right / len(QUESTIONS))
    assert record["tasks"]["local_words"]["base"]["higher_is_better"] is False
    assert record["average_drop"] == {} and record["models"] == {"base": run.identity}
    again = forgetting([run, dataclasses.replace(run, name="again")], known, out=tmp_path / "eval", max_length=64)
    assert again["average_drop"] == {"again": 0.0}
    assert json.loads((tmp_path / "eval" / "forgetting.json").read_text())["models"] == again["models"]
    said = capsys.readouterr().out
    assert "average drop" in said and "local_choice" in said
    with pytest.raises(MoextendError, match="no task no_such_task"):
        read_tasks(["no_such_task"])


# --- without lm-eval --------------------------------------------------------------------------------------------------


def test_without_lm_eval_it_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "moextend_jax.evaluate.harness", raising=False)
    with pytest.raises(MoextendError, match=r"lm-eval .*\[eval\]"):
        read_tasks(["arc_easy"])


def results(**figures: dict[str, float]) -> dict:
    better = {task: {name.split(",")[0]: name != "perplexity,none" for name in of} for task, of in figures.items()}
    return {"results": figures, "higher_is_better": better}


def test_the_average_drop_is_in_points_and_of_shares_alone():
    base = results(a={"acc_norm,none": 0.9, "acc,none": 0.5, "acc_stderr,none": 0.1}, b={"exact_match,strict": 0.25},
                   c={"perplexity,none": 10.0})  # fmt: skip
    other = results(a={"acc_norm,none": 0.1, "acc,none": 0.48, "acc_stderr,none": 0.1}, b={"exact_match,strict": 0.26},
                    c={"perplexity,none": 90.0})  # fmt: skip
    assert figure(base, "a") == ("acc,none", 50.0, True)
    assert figure(base, "c") == ("perplexity,none", 10.0, False)
    assert average_drop(base, other, ["a", "b", "c"]) == pytest.approx((2 - 1) / 2)
    assert average_drop(base, other, ["c"]) is None
