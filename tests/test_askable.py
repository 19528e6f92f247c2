"""A model answers the same from its work directory and from every folder that it was exported to; what cannot be asked
is refused before it is read."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import folders
import jax
import numpy as np
import pytest
import random_run
import tiny
from tiny import few

from moextend_jax import cli
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.data.conversations import encode_conversation
from moextend_jax.evaluate import chat, speak
from moextend_jax.evaluate.forgetting import base_and
from moextend_jax.evaluate.routed import routing_of
from moextend_jax.mesh import one_device
from moextend_jax.routing.command import CollectOptions, _batches
from moextend_jax.runs import askable as askable_module
from moextend_jax.runs.askable import Askable, _once, askable, choices, evaluating, open_place
from moextend_jax.runs.place import Place
from moextend_jax.runs.run import Run, open_run
from moextend_jax.settings import MethodSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Strict, with the paper's feature layer: neither is what the released layout means by itself."""
    return random_run.random_run(tmp_path_factory.mktemp("run"), text_isolation="strict")


@pytest.fixture(scope="module")
def trained(run: Run) -> Askable:
    return askable(run, "moextend")


def with_method(run: Run, **method: Any) -> Run:
    group = dataclasses.replace(run.settings.method, **method)
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, method=group))


def test_leaves_of_another_method_are_no_model(run: Run, tmp_path: Path):
    """A share, a scale or a threshold leaves every shape as it is."""
    with pytest.raises(MoextendError, match="method.drift: 0.0 there, 0.1 now"):
        askable(with_method(run, drift=0.1), "moextend")
    lora = random_run.random_run(tmp_path, method=MethodSettings(name="lora", rank=2, alpha=4.0))
    assert askable(lora, "moextend").config.adapters
    with pytest.raises(MoextendError, match=r"adapter.alpha: 4.0 there, 8.0 now"):
        askable(with_method(lora, alpha=8.0), "moextend")


def said(opened: Askable, picture: Path | None = None) -> str:
    images = () if picture is None else (picture,)
    return "".join(speak.speak(opened, "Which is it?", items={"image": images}, max_new_tokens=6))


def exported(run: Run, layout: str, out: Path) -> Place:
    """The run's result in a folder of its own."""
    folder = out / layout
    written = "released" if layout == "imported" else layout
    cli.call(["export", str(run.workdir), str(folder), "--layout", written])
    if layout == "imported":
        folder.rename(out / "src")
        cli.call(["import", str(out / "src"), str(folder)])
    return Place(checkpoint=folder, base=Path(run.settings.base) if layout == "delta" else None)


@pytest.mark.parametrize("layout", few(["released", "delta", "imported", "hf"], "delta", "hf"))
def test_a_result_answers_the_same_from_every_folder(run: Run, trained: Askable, picture: Path, layout, tmp_path: Path):
    opened = open_place(exported(run, layout, tmp_path))
    assert opened.recipe == run.settings.recipe and opened.config.text_isolation == "strict"
    assert opened.config.vision == trained.config.vision and opened.config.extension is not None
    assert opened.config.weight_guard == trained.config.weight_guard and not opened.plain
    for path, leaf in trained.arrays.items():
        np.testing.assert_array_equal(opened.arrays[path], leaf, err_msg=path)
    assert said(opened, picture) == said(trained, picture) != ""
    assert said(opened) == said(trained) != said(trained, picture)


def test_routing_leaves_out_what_the_run_leaves_out(run: Run, trained: Askable, picture: Path, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture.read_bytes())
    (tmp_path / "b.png").write_bytes(picture.read_bytes()[:60])
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a shape"}]
    data, out = tmp_path / "own.json", tmp_path / "out.npz"
    data.write_text(json.dumps([{"image": name, "conversations": turns} for name in ("a.png", "b.png")]))
    options = CollectOptions(workdir=run.workdir, data=str(data), data_dir=str(tmp_path / "data"), length=64, out=out)
    (batch,) = _batches(options, trained)
    assert (batch.segments_BL > 0).any(axis=1).sum() == 1


def test_the_recipe_of_a_released_checkpoint_is_the_released_code_s_unless_an_export_says_otherwise(tmp_path: Path):
    folder = folders.released(tmp_path / "released")
    assert open_place(Place(checkpoint=folder)).recipe == RECIPES["released"]
    assert open_place(Place(checkpoint=folder, recipe="paper")).recipe == RECIPES["paper"]
    attributes = json.loads((folder / "config.json").read_text())
    recorded = {"recipe": dataclasses.asdict(RECIPES["paper"])}
    (folder / "config.json").write_text(json.dumps(attributes | {"moextend": recorded}))
    assert open_place(Place(checkpoint=folder)).recipe == RECIPES["paper"]
    assert open_place(Place(checkpoint=folder, recipe="paper")).recipe == RECIPES["paper"]
    with pytest.raises(MoextendError, match="knows its recipe, which is not released: leave --recipe out"):
        open_place(Place(checkpoint=folder, recipe="released"))
    for wrong, message in (({"recipe": {"prompt": "?"}}, "prompt = '?'"), (3, "is not what an export writes"),
                           ({"text_isolation": "some"}, "text_isolation = 'some'")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(attributes | {"moextend": wrong}))
        with pytest.raises(MoextendError, match=f"config.json: moextend.*{message}"):
            open_place(Place(checkpoint=folder))


def test_a_text_model_continues_text_unless_its_tokenizer_brings_a_template(run: Run, tmp_path: Path):
    folder = shutil.copytree(run.settings.base, tmp_path / "text")
    opened = open_place(Place(checkpoint=folder))
    assert opened.plain and not opened.sees and opened.open_base is None
    assert said(opened) == said(askable(run, "base")) != ""
    with pytest.raises(MoextendError, match=r"text model cannot see: `moextend import` joins a projector \(--proj"):
        said(opened, Path("nowhere.png"))
    shutil.rmtree(folder / "vision")
    with pytest.raises(MoextendError, match=r"text model cannot see: .* joins a tower \(--vision\) and a projector"):
        said(open_place(Place(checkpoint=folder)), Path("nowhere.png"))
    read, place = open_checkpoint(folder), Place(checkpoint=folder)
    recorded = read.source.record._replace(facts={"recipe": dataclasses.asdict(RECIPES["paper"])})
    taught = read._replace(source=read.source._replace(record=recorded))  # in text alone
    assert not askable_module._of_checkpoint(taught, place, mesh=one_device(), sizes=askable_module.SIZES).plain
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert not open_place(Place(checkpoint=folder)).plain


def test_a_place_that_is_none_is_refused_before_anything_is_read(run: Run, tmp_path: Path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "needs --workdir: .* or --checkpoint"),
        ({"workdir": run.workdir, "checkpoint": run.workdir}, "not both"),
        ({"checkpoint": tmp_path / "nowhere"}, "nowhere is no work directory and no checkpoint"),
        ({"checkpoint": Path(run.settings.base), "model": "aligned"}, "leave --model aligned out"),
        ({"workdir": run.workdir, "base": tmp_path, "recipe": "paper"}, "leave --base, --recipe out"),
    ]
    for options, message in cases:
        with pytest.raises(MoextendError, match=message):
            Place(**options)
    with pytest.raises(MoextendError, match="did you mean moextend"):
        open_place(Place(workdir=run.workdir, model="moextnd"))
    with pytest.raises(MoextendError, match="is no work directory: run a stage"):
        open_place(Place(workdir=tmp_path))
    assert Place(checkpoint=run.workdir).in_workdir


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_s_answers_go_where_they_are_wanted_and_its_folder_is_left_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = exported(run, "released", tmp_path)
    before = sorted(path.name for path in place.folder.iterdir())
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--benchmark", "easy_vqa", "--limit", "4"]
    cli.call([*words, "--checkpoint", "released"])
    cli.call([*words, "--workdir", str(run.workdir)])
    texts = [
        {line["question_id"]: line["text"] for line in map(json.loads, path.read_text().splitlines())}
        for path in (tmp_path / "eval" / "easy_vqa" / "released" / "answers.jsonl",
                     run.workdir / "eval" / "easy_vqa" / "moextend" / "answers.jsonl")
    ]  # fmt: skip
    assert texts[0] == texts[1] and len(set(texts[0].values())) > 1
    assert sorted(path.name for path in place.folder.iterdir()) == before
    with evaluating(place, out=tmp_path / "other") as (opened, out):
        assert out == tmp_path / "other" and opened.name == "released"


def test_answers_that_go_elsewhere_write_nothing_into_a_work_directory(run: Run, tmp_path: Path, monkeypatch):
    """Which may be somebody else's, and not to be written."""
    monkeypatch.setattr(askable_module, "working", lambda *_, **__: pytest.fail("it was locked"))
    before = sorted(path.name for path in run.workdir.iterdir())
    with evaluating(Place(workdir=run.workdir), out=tmp_path / "mine") as (opened, out):
        assert out == tmp_path / "mine" and opened.name == "moextend"
    assert sorted(path.name for path in run.workdir.iterdir()) == before


def test_a_model_of_two_names_is_found_by_both(run: Run):
    names = [[*choices(Place(workdir=run.workdir, model=name))] for name in (None, "moextend", "moextend:image")]
    assert [of[-1] for of in names] == ["moextend", "moextend", "moextend:image"] and len({*map(len, names)}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--benchmark=pop"], "there is no benchmark 'pop'"), (["--benchmark=pope", "--data=no"], "no folder no")],
)
def test_a_benchmark_that_is_not_there_is_said_before_a_model_is_opened(run, words, message, monkeypatch, capsys):
    monkeypatch.setattr("moextend_jax.runs.askable.open_run", None)
    with pytest.raises(MoextendError, match=message):
        cli.call(["eval", *words, "--workdir", str(run.workdir)])


def test_an_extended_checkpoint_is_held_against_itself_without_its_extension(run: Run, tmp_path: Path):
    base, opened = base_and(open_place(exported(run, "delta", tmp_path)))
    assert (base.name, opened.name) == ("base", "delta") and base.identity != opened.identity
    expected = askable(run, "base")
    for path, leaf in expected.arrays.items():
        np.testing.assert_array_equal(base.arrays[path], leaf)
    assert base.config.extension is None and not [path for path in base.arrays if path.startswith("extension")]
    assert [one.name for one in base_and(open_place(Place(checkpoint=Path(run.settings.base))))] == ["base"]


def test_a_checkpoint_called_base_is_not_taken_for_the_base_inside_it(run: Run, tmp_path: Path):
    place = exported(run, "delta", tmp_path)
    place = Place(checkpoint=place.folder.rename(tmp_path / "base"), base=place.base)
    opened = open_place(place)
    assert opened.name == f"{tmp_path.name}-base" and opened.config.extensions
    assert [one.name for one in base_and(opened)] == ["base", opened.name]
    assert [*choices(place)] == [opened.name, "base"]


def test_answers_to_another_template_are_those_of_another_model(run: Run, tmp_path: Path):
    base = shutil.copytree(run.settings.base, tmp_path / "base")
    first, again = (open_place(Place(checkpoint=base)).identity for _ in range(2))
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    other = open_place(Place(checkpoint=base)).identity
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert first == again and len({first, other, open_place(Place(checkpoint=base)).identity}) == 3


def test_experts_in_few_bits_stay_as_they_are_stored(tmp_path: Path):
    own = random_run.random_run(tmp_path, expert_storage="int4", expert_group=8)
    kinds = {path: leaf.dtype for path, leaf in askable(own, "moextend").arrays.items() if "/experts/w_" in path}
    cast = askable(own, "moextend", dtype="float16").arrays
    assert {path: cast[path].dtype for path in kinds} == kinds and any("int4" in str(kind) for kind in kinds.values())
    assert cast["decoder/embed"].dtype == np.float16


def test_of_several_threads_one_opens_a_model():
    opened = []

    def slow() -> Any:
        opened.append(threading.get_ident())
        time.sleep(0.05)
        return len(opened)

    once = _once(slow)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: once(), range(4))] == [1] * 4 and len(opened) == 1


def test_prompts_come_from_standard_input_and_answers_as_json(run: Run, trained: Askable, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Which is it?\n\nHi\n"))
    cli.call(["generate", "-", "--json", "--max_new_tokens=6", "--workdir", str(run.workdir)])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"prompt": "Which is it?", "answer": said(trained)} and second["prompt"] == "Hi"
    cli.call(["generate", "Which is it?", "--plain", "--max_new_tokens=6", "--workdir", str(run.workdir)])
    assert capsys.readouterr().out != f"{first['answer']}\n"


def test_prompts_of_several_processes_are_those_of_the_first(trained: Askable, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(speak.distributed, "from_first", lambda _: ["of the first"])
    monkeypatch.setattr(speak, "speak", lambda opened, prompt, **_: [prompt.upper()])
    speak.generate_command(trained, iter(()), items={})
    assert capsys.readouterr().out == "OF THE FIRST\n"


def test_routing_of_a_work_directory_reads_its_own_data(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = {}

    def open_dataset(name: str, **options):
        asked.update(options)
        raise MoextendError(f"no {name}")

    monkeypatch.setattr("moextend_jax.runs.data_of.open_dataset", open_dataset)
    words = ["routing", "collect", "--data", "easy_vqa/questions", "--out", str(tmp_path / "a.npz")]
    with pytest.raises(MoextendError, match="no easy_vqa/questions"):
        cli.call([*words, "--checkpoint", str(run.workdir)])
    assert asked["data_dir"] == run.workdir / "data"
    with pytest.raises(MoextendError, match="needs --data_dir"):
        cli.call([*words, "--checkpoint", run.settings.base])


@pytest.mark.usefixtures("eight_devices")
def test_all_devices_share_a_checkpoint(run: Run, trained: Askable, picture: Path, tmp_path: Path):
    opened = open_place(exported(run, "released", tmp_path))
    assert opened.mesh.shape["fsdp"] == 8 and len(opened.arrays["decoder/embed"].sharding.device_set) == 8
    assert said(opened, picture) == said(trained, picture)


# --- bases ------------------------------------------------------------------------------------------------------------


def test_a_run_takes_an_imported_folder_with_its_own_tower_as_base(run: Run, tmp_path: Path):
    cli.call(["import", run.settings.base, str(tmp_path / "imported")])
    for vision in ("", "embedded"):
        settings = dataclasses.replace(run.settings, base=str(tmp_path / "imported"), vision=vision)
        opened = open_run(settings, str(tmp_path / "work"))
        assert opened.base_hash == run.base_hash and opened.config == run.config
        for path, leaf in run.pretrained.items():
            np.testing.assert_array_equal(opened.pretrained[path], leaf)
    text = tiny.write_base(tmp_path / "text")
    shutil.rmtree(text / "vision")
    settings = dataclasses.replace(run.settings, base=str(text), vision="")
    with pytest.raises(MoextendError, match='text has no vision tower of its own, which config.vision = ""'):
        open_run(settings, tmp_path / "work")


def test_what_a_notebook_prints_is_short(run: Run, trained: Askable):
    assert repr(run).startswith("Run(") and "made: align, grow, finetune" in repr(run) and len(repr(run)) < 400
    assert "1 new in 2 of them, sees 4 patches" in repr(trained) and len(repr(trained)) < 200


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The model answers "so 1", "so 2", ...; what it was asked is kept as text."""
    asked: list[str] = []

    def answering(opened, turns, *, items, **options):
        spans = {name: [1] * len(files) for name, files in items.items()}
        speak.encoded(opened, turns, spans=spans, plain=options["plain"])
        asked.append(f"{len(items.get('image', ()))}: " + " | ".join(turn["value"] for turn in turns))
        yield from ("so ", f"{len(asked)}")

    monkeypatch.setattr(chat, "speak", answering)
    yield asked


def talk(opened: Askable, *lines: str, **options) -> str:
    shown: list[str] = []
    chat.chat(chat.Conversation(opened=opened, **options), lines, show=shown.append)
    return "".join(shown)


def test_a_chat_remembers_what_was_said_and_shown_until_it_is_reset(trained: Askable, picture: Path, heard: list[str]):
    text = talk(
        trained, "Hello", "", f"/image {picture}", "What is it?", "/image nowhere.png", "And now?", "/help", "/reset",
        "Again", "/quit", "never", system="Be short.",
    )  # fmt: skip
    assert heard == [
        "0: Be short. | Hello",
        "1: Be short. | Hello | so 1 | <image>\nWhat is it?",
        "1: Be short. | Hello | so 1 | <image>\nWhat is it? | so 2 | And now?",
        "0: Be short. | Again",
    ]
    assert "image nowhere.png cannot be read" in text and "/reset forgets" in text
    assert [line for line in text.splitlines() if line.startswith("so")] == ["so 1", "so 2", "so 3", "so 4"]


def test_a_mistake_ends_the_answer_and_not_the_chat(trained: Askable, run: Run, heard: list[str], tmp_path: Path):
    text = talk(trained, "<image> which?", "Hello")
    assert "1 <image> marks in the questions but 0 images" in text and heard == ["0: Hello"]
    assert "cannot see: choose another --model of the run" in talk(askable(run, "base"), "/image some.png")
    blind = open_run(dataclasses.replace(run.settings, vision="none", medium="", text_isolation="none"), tmp_path)
    assert "cannot see: no model of this run has learnt pictures" in talk(askable(blind, "base"), "/image some.png")
    assert talk(trained, "/image", "/show", "/show image ") == 3 * f"{chat.HELP}\n"


def test_an_answer_that_spells_a_mark_is_remembered_without_it(trained: Askable, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def answering(opened, turns, *, items, **options):
        speak.encoded(opened, turns, spans={}, plain=options["plain"])
        asked.append([turn["value"] for turn in turns])
        yield from ("an <image>", "\nof it")

    monkeypatch.setattr(chat, "speak", answering)
    shown = talk(trained, "Hello", "And now?")
    assert asked[1] == ["Hello", "an of it", "And now?"] and shown.count("an <image>\nof it") == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_question_stands_where_training_has_it(trained: Askable, recipe: str):
    opened = dataclasses.replace(trained, recipe=RECIPES[recipe])
    turns = [
        speak.question(opened, "Hi", {}),
        {"from": "gpt", "value": "yes?"},
        speak.question(opened, "What is it?", {"image": [1]}),
    ]
    asked = speak.encoded(opened, turns, spans=opened.config.spans({"image": 1}), plain=None)
    whole = encode_conversation(
        [*turns, {"from": "gpt", "value": "a ring"}], example_id="", items={"image": [opened.patches]},
        tokenizer=opened.tokenizer, recipe=dataclasses.replace(opened.recipe, turns="all"),
    )  # fmt: skip
    count = len(asked.ids_L)
    np.testing.assert_array_equal(asked.ids_L, whole.ids_L[:count])
    np.testing.assert_array_equal(asked.places_L, whole.places_L[:count])
    assert whole.labels_L[count] == whole.ids_L[count] and whole.labels_L[count - 1] != whole.ids_L[count - 1]


def test_routing_is_of_all_that_was_said_also_where_training_takes_first_questions_alone(trained: Askable):
    opened = dataclasses.replace(trained, recipe=RECIPES["released"])
    turns = [speak.question(opened, "Hi", {}), {"from": "gpt", "value": "yes?"}, speak.question(opened, "And now?", {})]
    asked, answered = (routing_of(opened, turns, items={}, answer=answer) for answer in (None, "a ring"))
    np.testing.assert_array_equal(answered.ids[: len(asked.ids)], asked.ids)
    assert "And now?" in "".join(answered.tokens) and "a ring" in "".join(answered.tokens[len(asked.ids) :])


def test_chat_answers_as_generate_does_and_a_base_is_not_chatted_with(run, trained, picture, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", iter([f"/image {picture}\n", "Which is it?\n"]), raising=False)
    monkeypatch.setattr(chat, "_typed", lambda: __import__("sys").stdin)
    chat.chat_command(chat.Conversation(opened=trained, max_new_tokens=6))
    assert capsys.readouterr().out == f"{said(trained, picture)}\n"
    with pytest.raises(MoextendError, match="the base model continues text"):
        chat.chat_command(chat.Conversation(opened=askable(run, "base")))


def test_models_of_one_structure_share_what_is_compiled(run: Run, trained: Askable):
    other = dataclasses.replace(trained, arrays=jax.tree.map(lambda leaf: leaf + 0, trained.arrays), name="other")
    assert speak.generator_of(other) is speak.generator_of(trained)
    assert speak.generator_of(askable(run, "base")) is not speak.generator_of(trained)
