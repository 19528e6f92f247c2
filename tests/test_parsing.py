"""Dataclasses as command lines: what may be given, how, and what is said of what may not; configurations by name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Literal

import pytest

from moextend_jax import configurations
from moextend_jax.commands import GenerateOptions, RunOptions, shown_of
from moextend_jax.config import Count, MoextendError, Range
from moextend_jax.configurations import load
from moextend_jax.options import OneOf, Sets, describe
from moextend_jax.parsing import changed, parse
from moextend_jax.settings import RunSettings, from_config_dict


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a command that nobody has."""

    src: Path
    """where from"""
    text: str | None = None
    """what to say"""
    _: dataclasses.KW_ONLY
    steps_of: Count = 3
    """how often"""
    share: Annotated[float, Range(least=0, most=1)] | None = None
    """of all"""
    colour: Literal["red", "green"] = "red"
    """paint"""
    fruit: Annotated[str, OneOf(("apple", "pear"))] = "pear"
    """food"""
    names: tuple[str, ...] = ()
    """of them"""
    pair: tuple[Path, Path] | None = None
    """two"""
    loud: bool = False
    """whether"""
    sure: bool | None = None
    """whether or not"""
    least: Count | Annotated[float, Range(above=0, below=1)] = 1
    """how many, or which share"""


@dataclasses.dataclass(frozen=True)
class Several:
    base: str
    """what from"""
    parts: tuple[Path, ...]
    """what of"""
    out: Path
    """where to"""
    _: dataclasses.KW_ONLY
    share: tuple[str, ...] = ()
    """of them"""


@dataclasses.dataclass(frozen=True)
class OfRun:
    config: RunSettings
    _: dataclasses.KW_ONLY
    data: Annotated[str | None, Sets(("align.data", "full.data"))] = None
    """short for two"""


@dataclasses.dataclass(frozen=True)
class Needy:
    src: Path
    """where from"""
    _: dataclasses.KW_ONLY
    out: str
    """where to"""


def read(words: str, kind: type = Options):
    return parse(kind, words.split(), command="nobody", does="nothing")


def test_words_become_options_however_they_are_written():
    assert read("a") == Options(Path("a"))
    assert read("a b --steps-of 4 --loud") == Options(Path("a"), "b", steps_of=4, loud=True)
    assert read("--steps_of=4 --text=b --src a --no-loud") == Options(Path("a"), "b", steps_of=4)
    assert read("--text - a --loud false") == Options(Path("a"), "-")
    assert read("a --share 1 --colour green --fruit apple --names x,y --pair p q") == Options(
        Path("a"), share=1.0, colour="green", fruit="apple", names=("x", "y"), pair=(Path("p"), Path("q"))
    )
    assert read("a --steps_of 2 --steps_of 5").steps_of == 5
    assert [read(f"{word} a").sure for word in ("--sure", "--no-sure", "--sure=true", "")] == [True, False, True, None]
    assert [read(f"a --least={text}").least for text in ("2", "0.5")] == [2, 0.5]
    assert read("--share=0.5 --names=('x',) a --loud=yes") == Options(Path("a"), share=0.5, names=("x",), loud=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nobody needs --src: where from"),
        ("a b c", "'c' is no option; see `moextend nobody --help`"),
        ("a -x", "there is no option -x;"),
        ("a --stepsof=4", "there is no option --stepsof; did you mean --steps_of"),
        ("a --no_steps_of", "there is no option --no_steps_of"),
        ("a --steps_of", "--steps_of needs a value"),
        ("a --steps_of --loud", "--steps_of needs a value"),
        ("a --pair p", "--pair needs 2 values"),
        ("a --steps_of=0", "nobody: --steps_of = 0 must be at least 1 and"),
        ("a --steps_of=1.5", "--steps_of = '1.5' must be a whole number"),
        ("a --share=nan", "--share = nan must be at least 0 and at most 1"),
        ("a --colour=gren", "--colour = 'gren' is not one of red, green; did you mean green"),
        ("a --fruit=peer", "--fruit = 'peer' is not one of apple, pear; did you mean pear"),
        ("a --least=1.5", "--least = 1.5 must be more than 0 and less than 1"),
        ("a --loud=perhaps", "--loud = 'perhaps' must be true or false"),
        ("s3://bucket/a", "of URLs only gs://"),
    ],
)
def test_a_mistake_names_the_option(words: str, message: str):
    with pytest.raises(MoextendError) as error:
        read(words)
    assert message in str(error.value)


def test_a_list_by_place_takes_all_that_leave_one_for_each_other():
    for words, base, parts, out in (
        ("a b c d", "a", "b c", "d"), ("a b,1 d", "a", "b,1", "d"), ("--out d a b c", "a", "b c", "d"),
        ("b c d --base a", "a", "b c", "d"),
    ):  # fmt: skip
        options = parse(Several, [*words.split(), "--share=x=1,y=a,b (2)", "--share", "z"], command="put", does="")
        assert options == Several(base, tuple(map(Path, parts.split())), Path(out), share=("x=1", "y=a,b (2)", "z"))
    with pytest.raises(MoextendError, match="put needs --parts: what of"):
        parse(Several, ["a", "d"], command="put", does="")
    assert parse(Several, ["--help"], command="put", does="").startswith("moextend put BASE PARTS ... OUT [--OPTION")


def test_every_picture_of_a_command_is_shown_whatever_commas_are_in_its_name(tmp_path: Path):
    words = ["what?", f"--workdir={tmp_path}", "--image", "a,b.png", "--image=c.png", "--show=image=d.png"]
    options = parse(GenerateOptions, words, command="generate", does="")
    assert shown_of(options) == {"image": [Path("a,b.png"), Path("c.png"), Path("d.png")]}
    assert "A,B" not in parse(Several, ["--help"], command="put", does="").partition("--share")[0]


def test_all_that_is_lacking_is_named():
    with pytest.raises(MoextendError, match="^nobody needs --src: where from; --out: where to$"):
        read("", Needy)


def test_help_is_made_of_types_and_docstrings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert read("--steps_of 7 --help") == describe(Options, None, command="nobody", does="nothing")
    lines = read("-h").splitlines()
    assert lines[0] == "moextend nobody SRC [TEXT] [--OPTION VALUE ...]"
    assert "  --src                     where from (needed)" in lines
    assert "  --steps_of                how often (whole number at least 1; default 3)" in lines
    assert "  --share                   of all (number at least 0 and at most 1)" in lines
    assert "  --fruit                   food (one of apple, pear; default pear)" in lines
    assert "  --loud                    whether" in lines
    assert "whole number at least 1, or number more than 0 and less than 1; default 1" in " ".join(read("-h").split())
    assert max(map(len, lines)) <= 100


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["demo", "--config demo", "--config=configs/demo.py", "configs/demo.py:paper"])
def test_a_configuration_is_found_by_name_from_anywhere(config: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(config, OfRun).config == from_config_dict(load("demo"))


def test_settings_are_changed_whatever_stands_first():
    words = "--config.align.steps 7 --config.mesh.fsdp=2 demo --config.recipe.global-batch=3,4 --config.baseline true"
    settings = read(words, OfRun).config
    plain = from_config_dict(load("demo"))
    assert (settings.align.steps, settings.baseline, settings.recipe.global_batch) == (7, True, (3, 4))
    assert dict(settings.mesh) == dict(plain.mesh) | {"fsdp": 2}
    settings = read("demo --config.align.optimizer.multipliers.routers=2 --config.saved=(key,gate)", OfRun).config
    assert dict(settings.align.optimizer.multipliers) == {"calibrators": 0.02, "routers": 2.0}
    assert settings.saved == ("key", "gate") and settings.finetune == plain.finetune


def test_an_option_that_is_short_for_settings():
    settings = read("demo --data mine --config.full.data=other", OfRun).config
    assert (settings.align.data, settings.full.data, settings.extend.data) == ("mine", "other", "easy_vqa/questions")


def test_changing_settings_leaves_the_given_ones_as_they_are():
    before = {"align": {"steps": 1, "optimizer": {"b1": 0.5}}, "seed": 0}
    assert changed({"study": None}, {"study.seeds": (0,)}) == {"study": {"seeds": (0,)}}
    after = changed(before, {"align.optimizer.b1": 0.6, "seed": 1, "select.share": 0.1})
    assert after == {"align": {"steps": 1, "optimizer": {"b1": 0.6}}, "seed": 1, "select": {"share": 0.1}}
    assert before == {"align": {"steps": 1, "optimizer": {"b1": 0.5}}, "seed": 0}


WHOLE = (
    "from moextend_jax.configurations import load\nfrom moextend_jax.settings import from_config_dict, to_config_dict\n"
)


@pytest.mark.parametrize(
    "returned", ["load('demo')", "from_config_dict(load('demo'))", "to_config_dict(from_config_dict(load('demo')))"]
)
def test_a_file_of_ones_own_returns_settings_a_config_dict_or_a_mapping(tmp_path: Path, returned: str):
    (tmp_path / "mine.py").write_text(f"{WHOLE}def get_config():\n    return {returned}\n")
    assert from_config_dict(load(str(tmp_path / "mine.py"))) == from_config_dict(load("demo"))


def test_groups_of_a_mapping_may_be_classes(tmp_path: Path):
    """Also those that need not be there, which have no defaults."""
    (tmp_path / "mine.py").write_text(
        f"{WHOLE}from moextend_jax.settings import StageSettings\ndef get_config():\n"
        "    return {**load('demo'), 'mixture': StageSettings(data='d', steps=1, batch_size=2, length=9)}\n"
    )
    settings = read(f"{tmp_path}/mine.py --config.mixture.steps=4", OfRun).config
    assert settings.mixture and (settings.mixture.steps, settings.mixture.batch_size) == (4, 2)
    assert "--config.mixture.steps" in read(f"{tmp_path}/mine.py --help", OfRun)


def test_what_a_file_leaves_out_has_its_default_and_may_still_be_set(tmp_path: Path):
    stage = "dict(data='d', batch_size=2, length=9)"
    (tmp_path / "mine.py").write_text(
        f"def get_config(size='small'):\n    return dict(align={stage}, extend={stage}, finetune={stage}, "
        f"full={stage}, evaluate=dict(data=size, questions=1))\n"
    )
    steps = " ".join(f"--config.{stage}.steps=1" for stage in ("align", "extend", "finetune", "full"))
    settings = read(f"{tmp_path}/mine.py:large {steps} --config.mesh.data=4", OfRun).config
    assert settings.evaluate.data == "large" and settings.mesh == {"data": 4, "fsdp": -1, "expert": 1, "tensor": 1}
    with pytest.raises(MoextendError, match=r"config\.align: neither steps nor epochs is set"):
        read(f"{tmp_path}/mine.py", OfRun)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "mine.py: SyntaxError: "),
        ("def get_config():\n    return nope()", "mine.py, line 2: NameError: name 'nope'"),
        ("import nope", "mine.py, line 1: ModuleNotFoundError: "),
        ("x = 1", "AttributeError: "),
        ("raise SystemExit(7)", "mine.py, line 1: SystemExit: 7"),
        ("def get_config():\n    return 3", "mine.py: get_config returns no settings, but 3"),
        ("def get_config(a, b):\n    return 3", "TypeError: "),
    ],
)
def test_a_file_that_is_broken_is_one_line_with_its_place(tmp_path: Path, text: str, message: str):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(MoextendError) as error:
        load(str(tmp_path / "mine.py"))
    assert str(error.value).startswith(f"{tmp_path}/mine.py") and message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmeo", r"no configuration dmeo: no such file, and the package's are .*demo.*; did you mean demo\?"),
        (
            "configs/nope.py",
            "no configuration configs/nope.py: no such file, and the package's are bench, continual, demo",
        ),
        ("demo.py", r"no configuration demo.py: .*did you mean demo\?"),
        ("demo:relased", r"demo:relased: the arguments are paper, released; did you mean released\?"),
        ("mixtral_8x7b:full", "the arguments are paper, packed, released"),
        ("bench:small", "bench:small: this configuration takes no argument"),
    ],
)
def test_a_configuration_that_there_is_not(name: str, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoextendError, match=message):
        load(name)


def test_a_setting_that_holds_values_by_name_is_set_one_by_one():
    words = ["demo", "--workdir", "w", "--config.evaluate.sets.more=easy_vqa", "--config.evaluate.sets={}"]
    options = parse(RunOptions, words, command="run", does="")
    assert isinstance(options, RunOptions) and options.config is not None and options.config.evaluate.sets == {}
    with pytest.raises(MoextendError, match=r"sets holds values by name: .*, --config.evaluate.sets.NAME=VALUE, or"):
        parse(RunOptions, ["demo", "--workdir", "w", "--config.evaluate.sets=x"], command="run", does="")


def test_a_file_here_goes_before_one_of_the_package(tmp_path: Path, monkeypatch):
    (tmp_path / "configs").mkdir()
    shutil.copy(configurations.FOLDER / "bench.py", tmp_path / "configs" / "demo.py")
    monkeypatch.chdir(tmp_path)
    assert load("configs/demo.py")["evaluate"]["data"] == "none" != load("demo")["evaluate"]["data"]


def test_short_options_of_a_run_set_its_settings():
    words = ["demo", "--workdir", "w", "--data", "own.jsonl", "--images", "pictures", "--profile", "100:103"]
    settings = parse(RunOptions, words, command="run", does="").config
    assert {settings.align.data, settings.extend.data, settings.finetune.data, settings.full.data} == {"own.jsonl"}
    assert (settings.images, settings.profile) == ("pictures", "100:103")
    more = parse(RunOptions, [*words, "--data=b.jsonl:0.5", "--images", "c"], command="run", does="").config
    assert (more.finetune.data, more.images) == ("own.jsonl,b.jsonl:0.5", "c")
    with pytest.raises(MoextendError, match="profile = .* must be FIRST:LAST"):
        parse(RunOptions, [*words[:3], "--profile", "103:100"], command="run", does="")
