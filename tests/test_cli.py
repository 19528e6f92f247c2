"""Every mistake of input or use ends in exit code 2 and one line on standard error that says what to mend."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_type_hints

import pytest
import tiny
from tiny import few

import moextend_jax
from moextend_jax import cli, machine, preemption
from moextend_jax.checkpoints import sums
from moextend_jax.chips import GIB, chip
from moextend_jax.commands import RunOptions
from moextend_jax.configurations import FOLDER
from moextend_jax.folders import folder
from moextend_jax.options import options_of
from moextend_jax.options import settings_of as settings_listed
from moextend_jax.parsing import parse
from moextend_jax.runs.results import FIRST
from moextend_jax.runs.run import left_in, settings_of
from moextend_jax.settings import fields


class Ground(NamedTuple):
    """A tiny base, data and configuration, and a work directory in which align has been run."""

    folder: Path
    base: Path
    config: Path
    aligned: Path

    def arguments(self, workdir: Path, *more: str) -> list[str]:
        return [f"--config={self.config}", f"--workdir={workdir}", *more]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    folder = tmp_path_factory.mktemp("cli")
    base = tiny.write_base(folder / "base")
    manual = tiny.write_llava(folder / "llava")
    config = tiny.write_config(
        folder, base=base, data="llava_instruct", split="train", evaluated="train", manual=manual
    )
    made = Ground(folder, base, config, folder / "aligned")
    cli.main(["align", *made.arguments(made.aligned)])
    return made


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Runs a command that must fail and returns its line."""

    def run(*argv: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in argv])
        said = capfd.readouterr().err
        assert exit.value.code == 2, said
        assert len(said.splitlines()) == 1, said
        assert said.startswith("moextend: ") and "Traceback" not in said
        return said

    return run


# --- the command line itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    cli.main(argv)
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)


def test_help_waits_for_no_library():
    program = "import sys; from moextend_jax import cli; cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ml_collections" in done.stderr and not {"jax", "numpy", "matplotlib", "rich"} & {*done.stderr.split()}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_has_all_its_options_and_all_settings(name: str, capsys):
    cli.main([*name.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    kind = next(iter(get_type_hints(cli.resolve(cli.COMMANDS[name].function)).values()))
    listed = options_of(kind) + (list(settings_listed()) if "config" in fields(kind) else [])
    assert len(listed) > 0 and not [option.name for option in listed if not option.meaning]
    for option in listed:
        (at,) = [
            n
            for n, line in enumerate(lines)
            if f"{line} ".startswith(f"  --{option.name}{'.NAME' * bool(option.names)} ")
        ]
        assert option.meaning.split()[0] in " ".join(lines[at : at + 2])


def test_help_with_a_configuration_shows_its_values(capsys):
    cli.main(["run", "demo:released", "--config.align.steps=7", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--config.align.steps Steps of the optimizer; 0: as many as `epochs` come to." in said
    assert "(whole number at least 0; default 110)" in said
    assert "(one of top_k, least_likely; default least_likely)" in said
    cli.main(["help", "run"])
    assert "Data set that the stage is trained on. (set by each configuration)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]])
def test_the_version(words: list[str], capsys):
    cli.main(words)
    assert capsys.readouterr().out == f"moextend_jax {moextend_jax.__version__}\n"


def test_python_runs_the_package():
    done = subprocess.run([sys.executable, "-m", "moextend_jax", "-V"], capture_output=True, text=True, check=True)
    assert moextend_jax.__version__ in done.stdout


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["routing"], ["help", "routing"]])
def test_a_group_of_commands_lists_them(words: list[str], capsys):
    cli.main(words)
    said = capsys.readouterr().out
    group = words[-1] if words[0] == "help" else words[0]
    assert [line.split("  ")[1] for line in said.splitlines()] == [
        name for name in cli.COMMANDS if name.startswith(group)
    ]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("alingn", "align"), ("runn --workdir w", "run"), ("rouing plot", "routing plot"),
        ("routing colect", "routing collect"), ("data chek", "data check"), ("run demo --wokdir w", "--workdir"),
        ("run demmo --workdir w", "demo"), ("run demo:relased --workdir w", "released"),
        ("run demo --workdir w --config.finetune.step=3", "--config.finetune.steps"),
        ("run demo --workdir w --config.remat=layers", "layer"),
        ("run demo --workdir w --config.mesh.fspd=2", "--config.mesh.fsdp"),
        ("generate hi --workdir w --model=moextnd", "moextend"),
        ("eval --workdir w --max-new-token 3", "--max_new_tokens"),
    ],
)  # fmt: skip
def test_a_slip_is_answered_with_what_was_meant(refused, words: str, meant: str):
    assert refused(*words.split()).endswith(f"; did you mean {meant}?\n")


def test_chat_says_how_a_picture_is_shown(refused):
    assert "no option --image; in the conversation /image FILE" in refused("chat", "--workdir", "w", "--image", "a.png")


NEED_CONFIG = [name for name, command in cli.COMMANDS.items() if command.function.startswith("moextend_jax.commands")
               and not name.startswith(("report", "generate", "chat", "eval", "demo"))]  # fmt: skip
NEED_CONFIG += ["evaluate", "plan"]


@pytest.mark.parametrize("command", NEED_CONFIG)
def test_a_command_without_a_configuration(refused, command: str):
    assert "needs --config: " in refused(*command.split())


@pytest.mark.parametrize("command", ["run", *FIRST.results, "evaluate", "eval", "report", "generate"])
def test_a_command_without_a_work_directory(refused, ground, command: str):
    arguments = [] if command == "report" else [f"--config={ground.config}"]
    assert "needs --workdir: " in refused(command, *arguments)


@pytest.mark.parametrize(
    "words",
    [
        "export a b", "import a b", "compose a b c", "compare --checkpoint=a --reference=b", "bench demo",
        "report --workdir={}", "chat --workdir={}", "chat --web --workdir={}",
    ],
)  # fmt: skip
def test_what_is_for_one_process_is_refused_to_several(refused, tmp_path, monkeypatch, words: str):
    """Each would write the same folder, time devices that the others use, or wait for words that it does not hear."""
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    name, *rest = words.format(tmp_path).split()
    said = refused(name, *rest)
    assert f"{name} is for one process, and JAX_NUM_PROCESSES says that there are more" in said


def test_eval_says_what_it_needs(refused, tmp_path):
    assert "--benchmark" in refused("eval", f"--workdir={tmp_path}")
    assert "is no work directory" in refused("eval", "--benchmark=easy_vqa", f"--workdir={tmp_path}")
    tasks = ["eval", "--benchmark=easy_vqa", "--tasks=piqa", f"--workdir={tmp_path}"]
    assert "--tasks goes with --forgetting" in refused(*tasks)
    assert "--split goes with --benchmark" in refused("eval", "--forgetting", "--split=x", f"--workdir={tmp_path}")


@pytest.mark.parametrize("extra", ["--nope=1", "--config.nope=1", "--config.align.nope=1", "stray"])
def test_an_option_that_does_not_exist(refused, ground, tmp_path, extra: str):
    assert extra.split("=")[0].split(".")[-1].lstrip("-") in refused("align", *ground.arguments(tmp_path, extra))


@pytest.mark.parametrize("extra", ["--config.align.steps=many", "--config.align.steps=1.5", "--config.baseline=7"])
def test_a_value_of_the_wrong_type(refused, ground, tmp_path, extra: str):
    assert extra.split("=")[1] in refused("align", *ground.arguments(tmp_path, extra))


def test_a_value_that_is_no_choice(refused, ground, tmp_path):
    said = refused("align", *ground.arguments(tmp_path, "--config.remat=everything"))
    assert "config.remat = 'everything' is not one of none, attention, layer" in said


def test_a_work_directory_that_is_a_file(refused, ground, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("align", *ground.arguments(tmp_path / "file"))


@pytest.mark.parametrize(
    "words",
    [
        "bench --layers=0", "plan --new_share=2", "plan --most=0", "plan --within=nan", "data check --processes=-1",
        "eval --limit=0", "eval --max_new_tokens=0", "eval --num_fewshot=-1", "generate --seed=-1",
        "generate --temperature=nan", "generate --temperature=inf", "align --config.seed=-1",
        "align --config.workers=-1", "align --config.align.optimizer.clip_norm=-1", "align --config.select.share=nan",
        "align --config.mesh.data=0",
    ],
)  # fmt: skip
def test_a_number_outside_its_range_is_named_with_the_range(refused, ground, tmp_path, words: str):
    *command, option = words.split()
    name, _, value = option.partition("=")
    message = refused(*command, f"--config={ground.config}", option, f"--workdir={tmp_path}")
    assert name.lstrip("-") in message and re.search(rf"= {value}(\.0)? must be (at least|more than) ", message)


@pytest.mark.parametrize(
    "words",
    [
        "routing compare a.npz b.npz --share 0", "routing collect --checkpoint a --out b --samples 0",
        "import a b --experts 0", "import a b --noise nan", "compare --checkpoint a --reference b --atol nan",
        "doctor --timeout 0",
    ],
)  # fmt: skip
def test_a_number_of_a_tool_outside_its_range(refused, words: str):
    *_, name, value = words.split()
    assert re.search(rf"{name} = {value}(\.0)? must be (at least|more than) \d", refused(*words.split()))


def test_a_name_that_python_cannot_read(refused, ground, tmp_path):
    name = os.fsdecode(b"caf\xe9")  # in ASCII's locale any letter beyond it is like this
    assert "caf\\udce9 is not utf-8" in refused("align", *ground.arguments(tmp_path / name))
    assert not list(tmp_path.iterdir())


# --- interrupts, and a platform that is not there ---------------------------------------------------------------------


class InTheCollector:
    """Sends a signal to this process from a callback of the garbage collector, where Python drops what it raises."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, *_: object) -> None:
        gc.callbacks.remove(self)
        signal.raise_signal(self.number)

    def wait(self, *_: object) -> None:
        gc.callbacks.append(self)
        gc.collect()
        time.sleep(5)
        raise AssertionError("the interrupt was lost")


def test_an_interrupt_in_the_garbage_collector_is_not_lost(monkeypatch, capsys):
    monkeypatch.setattr(cli, "call", InTheCollector(signal.SIGINT).wait)
    with pytest.raises(SystemExit) as exit:
        cli.main(["align"])
    assert exit.value.code == 130 and capsys.readouterr().err.startswith("moextend: interrupted;")


@pytest.mark.parametrize(
    "number", few([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP], signal.SIGTERM, signal.SIGHUP)
)
def test_every_signal_that_announces_the_end_is_taken(monkeypatch, capsys, number: int):
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    monkeypatch.setattr(preemption._Notice, "given", False)
    monkeypatch.setattr(cli, "call", InTheCollector(number).wait)
    signal.signal(number, signal.SIG_DFL)  # under nohup the tests ignore SIGHUP
    preemption.listen()
    try:
        with pytest.raises(SystemExit) as exit:
            cli.main(["align"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert exit.value.code == 75 and capsys.readouterr().err.startswith("moextend: told to stop:")


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        preemption.pass_on()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number in preemption.OTHERS:
            signal.signal(number, before if number == signal.SIGHUP else signal.SIG_DFL)


def test_a_process_that_was_interrupted_ends_at_once():
    """Python's own way out waits for threads, and crashes where they are XLA's; exit functions run on it."""
    program = (
        "import atexit, sys\nfrom moextend_jax import cli, distributed\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "cli.call = interrupted\n"
        "atexit.register(print, 'on the way out')\nsys.argv = ['moextend', 'align']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130 and not done.stdout and len(done.stderr.splitlines()) == 1


def test_a_platform_that_is_not_there(refused, monkeypatch):
    import jax

    def refuse():
        raise AssertionError  # all that JAX says of JAX_PLATFORMS=cuda without its plugin

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "local_devices", refuse)
    monkeypatch.setattr(cli, "call", lambda _: refuse())
    assert "JAX_PLATFORMS = cuda gives no devices" in refused("align")


def test_libtpu_without_a_tpu_is_told_so(monkeypatch):
    for name in machine.NO_TPU:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "accelerator", lambda: "tpu")
    machine.quiet_libtpu()
    assert not machine.NO_TPU.keys() & os.environ.keys()
    monkeypatch.setattr(machine, "accelerator", lambda: "")
    machine.quiet_libtpu()
    assert machine.NO_TPU.items() <= os.environ.items()


FAULTS = """
import resource, sys
import numpy as np
from moextend_jax import machine
if sys.argv[1] == "kept": machine.keep_memory()
np.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8): np.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_on_cpu_a_step_finds_the_memory_of_the_one_before(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    freed, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("freed", "kept")
    )
    assert kept < freed / 10


def test_memory_is_left_alone_with_an_accelerator(monkeypatch):
    monkeypatch.setattr(machine, "accelerator", lambda: "gpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: pytest.fail("told"))
    machine.keep_memory()


def test_a_run_may_use_as_much_of_a_gpu_as_plans_count_on(monkeypatch):
    """JAX alone takes three quarters, so that what a plan says fits would not."""
    share, old = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for name in (share, old):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for accelerator, value in (("", None), ("tpu", None), ("gpu", "0.95")):
        monkeypatch.setattr(machine, "accelerator", lambda accelerator=accelerator: accelerator)
        machine.whole_gpu()
        assert os.environ.get(share) == value
    assert chip("h100").usable(1) == int(float(os.environ[share]) * 79.1 * GIB)
    for name, value in (("CUDA_VISIBLE_DEVICES", "0,1"), ("JAX_NUM_PROCESSES", "8")):  # NCCL needs memory of its own
        monkeypatch.delenv(share)
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            machine.whole_gpu()
        assert chip("h100").usable(8) == int(float(os.environ[share]) * 79.1 * GIB) == int(0.9 * 79.1 * GIB)
    monkeypatch.delenv(share)
    monkeypatch.setenv(old, "0.4")  # JAX refuses both
    machine.whole_gpu()
    assert share not in os.environ


# --- stages and what they need ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "needs"), [("extend", "align"), ("select", "align"), ("grow", "select"), ("finetune", "align"),
                           ("full", "align"), ("evaluate", "align")],
)  # fmt: skip
def test_a_stage_before_its_predecessor(refused, ground, tmp_path, command: str, needs: str):
    said = refused(command, *ground.arguments(tmp_path))
    assert f"{needs} has not been run" in said and f"moextend {needs}" in said


def test_select_before_extend_and_generate_before_finetune(refused, ground):
    assert "extend has not been run" in refused("select", *ground.arguments(ground.aligned))
    said = refused("generate", *ground.arguments(ground.aligned, "--prompt=hello"))
    assert "has not been run" in said


def test_a_result_that_was_cut_off_while_it_was_written_is_not_there(refused, ground, tmp_path):
    """Orbax makes the folder first."""
    shutil.copytree(ground.aligned, tmp_path / "work")
    (step,) = (path for path in (tmp_path / "work" / "align" / "result").iterdir() if path.is_dir())
    shutil.rmtree(step)
    assert "align has not been run" in refused("evaluate", *ground.arguments(tmp_path / "work"))
    assert "align until step" in left_in(tmp_path / "work")


def test_a_home_that_no_shell_has_put_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder("~/run") == tmp_path / "run" and folder("a~b") == Path("a~b")
    shutil.copy(FOLDER / "demo.py", tmp_path / "mine.py")
    options = parse(RunOptions, ["--config=~/mine.py", "--workdir=~/run"], command="run", does="")
    assert options.workdir == tmp_path / "run"


def test_a_port_that_there_is_not(refused, ground):
    assert "--port" in refused("chat", "--web", f"--workdir={ground.aligned}", "--port=70000")


def test_standard_input_that_is_no_text(refused, ground, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"hello\ncaf\xe9\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    assert "text that is not UTF-8" in refused("generate", *ground.arguments(ground.aligned, "--model=aligned"))


def test_a_grown_model_is_not_finetuned_before_grow(refused, ground, tmp_path):
    shutil.copytree(ground.aligned, tmp_path / "work")
    (tmp_path / "work" / "select").mkdir()
    base = json.loads((ground.aligned / "config.json").read_text())["base_hash"]
    record = {"chosen_layers": [1], "sources": [0], "base": base}
    (tmp_path / "work" / "select" / "routing.json").write_text(json.dumps(record))
    assert "grow has not been run" in refused("finetune", *ground.arguments(tmp_path / "work"))


def test_a_base_without_a_tokenizer(refused, ground, tmp_path):
    shutil.copytree(ground.base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").unlink()
    said = refused("align", *ground.arguments(tmp_path / "work", f"--config.base={tmp_path / 'base'}"))
    assert "tokenizer.model" in said


def test_a_checkpoint_of_another_model(refused, ground, tmp_path):
    tiny.write_base(tmp_path / "other", seed=1)
    said = refused("extend", *ground.arguments(ground.aligned, f"--config.base={tmp_path / 'other'}"))
    assert "another run" in said and "base" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mixture", "there is no stage 'mixture'"),
        ("extend --config.recipe.turns=first", "belongs to another run (recipe.turns: "),
        ("align --config.align.batch_size=2", "batch_size: 4 there, 2 now"),
        ("extend --config.select.held_out=5000", "24"),
        ("evaluate --config.evaluate.questions=5000", "evaluate.questions"),
    ],
)
def test_what_cannot_follow_on_align(refused, ground, words: str, said: str):
    command, *options = words.split()
    assert said in refused(command, *ground.arguments(ground.aligned, *options))


@pytest.mark.slow
def test_a_work_directory_of_before_weights_were_guarded(refused, ground, tmp_path):
    """It goes on as it began: without the guard, which is the old setting that a refusal asks for."""
    workdir = tmp_path / "old"
    shutil.copytree(ground.aligned, workdir)
    (facts,) = (workdir / "align" / "result").glob("*/facts/metadata")
    for path in (workdir / "config.json", facts):
        record = json.loads(path.read_text())
        del (record if path == facts else record["settings"])["recipe"]["weight_guard"]
        path.write_text(json.dumps(record))
    sums.write_sums(facts.parents[1])
    said = refused("extend", *ground.arguments(workdir))
    assert "recipe.weight_guard: 'none' there, 'bounded' now" in said
    cli.main(["extend", *ground.arguments(workdir, "--config.recipe.weight_guard=none", "--config.extend.steps=1")])
    cli.main(["generate", f"--workdir={workdir}", "--model=aligned", "--prompt=What?", "--max_new_tokens=1"])
    settings = settings_of(workdir)
    assert settings is not None and settings.recipe.weight_guard == "none"


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--config.align.length=10", "do not fit a row of 10"),
        ("--config.align.data=coco", "'coco'"),
        ("--config.align.split=dev", "'dev'"),
        ("--config.manual_dir=none", "none"),
        ("--config.base=nothing", "nothing"),
        ("--config.vision=nothing", "nothing"),
    ],
)
def test_what_align_cannot_begin_with(refused, ground, tmp_path, option: str, said: str):
    assert said in refused("align", *ground.arguments(tmp_path, option))


def test_an_empty_data_set(refused, ground, tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "llava_v1_5_mix665k.json").write_text("[]")
    extra = [f"--config.manual_dir={tmp_path / 'llava'}", f"--config.data_dir={tmp_path / 'data'}"]
    refused("align", *ground.arguments(tmp_path / "work", *extra))


# --- generate and report ----------------------------------------------------------------------------------------------


def test_generate_without_a_prompt_or_with_a_picture_that_cannot_be_read(refused, ground, tmp_path, monkeypatch):
    aligned = ground.arguments(ground.aligned, "--model=aligned")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "--prompt" in refused("generate", *aligned)
    assert "nope.png" in refused("generate", *aligned, "--prompt=hi", "--image=nope.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in refused("generate", *aligned, "--prompt=hi", f"--image={tmp_path / 'text.png'}")
    assert "--image" in refused(
        "generate", *ground.arguments(ground.aligned, "--model=base"), "--prompt=hi", "--image=nope.png"
    )


@pytest.mark.parametrize(
    "extra", ["--max_new_tokens=0", "--max_new_tokens=x", "--model=gpt", "--temperature=-1", "--top_k=-2"]
)
def test_generate_with_an_impossible_number(refused, ground, extra: str):
    refused("generate", *ground.arguments(ground.aligned, "--model=aligned", "--prompt=hi", extra))


def test_generate_in_a_folder_that_was_never_used(refused, tmp_path):
    assert str(tmp_path) in refused("generate", f"--workdir={tmp_path}", "--prompt=hi")


def test_a_report_on_an_empty_folder(refused, tmp_path):
    assert str(tmp_path) in refused("report", str(tmp_path))
    assert "nowhere" in refused("report", str(tmp_path / "nowhere"))


# --- and what works ---------------------------------------------------------------------------------------------------


def test_generate_remembers_the_settings_and_streams(ground, capsys):
    for model in ("aligned", "base"):
        cli.main(
            ["generate", f"--workdir={ground.aligned}", "--prompt=hello", f"--model={model}", "--max_new_tokens=3"]
        )
        assert capsys.readouterr().out.strip()


def test_generate_answers_prompts_from_standard_input(ground, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nWhich?\n"))
    cli.main(["generate", "-", f"--workdir={ground.aligned}", "--model=aligned", "--max-new-tokens", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_generate_looks_at_a_picture(ground, capsys):
    arguments = ground.arguments(ground.aligned, "--prompt=Which?", "--model=aligned", "--max_new_tokens=2")
    cli.main(["generate", *arguments, f"--image={ground.folder / 'llava' / '3.png'}"])
    assert capsys.readouterr().out.endswith("\n")


def test_a_finished_stage_run_again_keeps_its_result(ground):
    before = (ground.aligned / "align" / "metrics.jsonl").read_text()
    cli.main(["align", *ground.arguments(ground.aligned)])
    assert (ground.aligned / "align" / "metrics.jsonl").read_text() == before
    assert json.loads((ground.aligned / "align" / "stage.json").read_text())["frozen_unchanged"] is True


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["import", "nowhere", "made"], "nowhere"),
        (["import", "nowhere"], "dst"),
        (["import", "dense.gguf", "made"], "dense.gguf"),
        (["import", "nowhere", "made", "--top_k", "2"], "--experts"),
        (["export", "nowhere", "made"], "nowhere"),
        (["compare", "--checkpoint", "nowhere", "--reference", "missing.npz"], "missing.npz"),
        (["routing", "compare", "a.npz", "b.npz"], "a.npz"),
        (["routing", "sing"], "sing"),
    ],
)
def test_mistakes_of_the_checkpoint_commands(argv: list[str], said: str, refused, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*argv)
    assert not list(tmp_path.iterdir())
