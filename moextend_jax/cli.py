"""The `moextend` command: parses, calls one function, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from absl import flags
from ml_collections import config_flags

from moextend_jax.config import Amount, Count, MoextendError
from moextend_jax.folders import folder
from moextend_jax.machine import no_devices, quiet_libtpu
from moextend_jax.preemption import INTERRUPTED, Preempted, not_lost
from moextend_jax.runs.results import MODELS, RESULTS, training
from moextend_jax.settings import NotNegative, Positive, RunSettings, Share, from_config_dict
from moextend_jax.terminal import console


def _lines(*, optional: bool) -> str:
    return "\n".join(f"  {name:<10} {row.does}" for name, row in RESULTS.items() if row.optional is optional)


USAGE = f"""moextend COMMAND --config configs/X.py[:arg] [--config.field=value ...] --workdir DIR

Stages, in order:
{_lines(optional=False)}
  run        all of them, then evaluate and report
             each goes on where it stood; --resume_from FOLDER starts from another work directory's checkpoint

More:
{_lines(optional=True)}
  evaluate   accuracy and forgetting of every model in the work directory
  report     WORKDIR/report.html
  generate   --prompt TEXT [--image FILE] [--max_new_tokens N] [--temperature T] [--top_k K] [--model aligned|...]
  bench      time one step of each stage of a configuration: [--stage NAME] [--layers N] [--json FILE]
  plan       compile a stage's step for chips that are not here: --stage NAME --topology v5p:4x4x4|v5e:16x16|h100:2x8
             [--json] [--text_only] [--layers N] [--sweep [--most N] [--within GIB]]; does it fit, bytes, FLOPs,
             messages, least time
  eval       --benchmark NAME [--data FOLDER] [--split S] [--model M] [--limit N]: answers, scored by its own rule
  eval       --forgetting [--tasks LIST] [--model M]: text tasks of lm-eval, base against model
  eval score --benchmark NAME --data FOLDER --answers FILE: scores a file of answers
  data       check CONFIG [--processes N] [--json] [--data_dir DIR]: every row and image of the configuration's data
             read once, faults named; exit code 1 if one would be refused
  doctor     [--workdir DIR] [--json]: versions, devices, kernels, shared memory; what is missing and what mends it

Checkpoints and comparison with PyTorch (each has --help):
  import     SRC DST: a published checkpoint, or a dense one made a mixture of experts, as JAX arrays
  export     SRC DST: an imported checkpoint or a work directory as PyTorch files, or as a delta
  compare    --checkpoint DIR --reference REF.npz: what a PyTorch reference holds, computed here
  routing    collect | compare | plot: routing statistics of checkpoints and PyTorch dumps
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a comparison that failed, 2 a mistake of input or use (one line on standard
    error), 75 the machine was taken away and the same command goes on, 130 interrupted from the keyboard."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    quiet_libtpu()
    code = _code_of(words)
    if code and "moextend_jax.distributed" in sys.modules:
        import jax

        from moextend_jax.distributed import leave

        if argv is None or jax.distributed.is_initialized():  # not where Python calls this and goes on
            leave(code)
    if code:
        sys.exit(code)


def _code_of(words: list[str]) -> int:
    """The exit code of a command; what went wrong is a line on standard error."""
    try:
        with not_lost():
            return _call(words)
    except MoextendError as error:
        line = " ".join(str(error).split())  # which may quote a file that is not to be trusted
        print("moextend:", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
        return 2
    except Preempted as notice:
        print(f"moextend: {notice.why}: {notice}; the same command goes on from there", file=sys.stderr)
        return notice.code
    except OSError as error:  # a folder that is a file, no permission, a full disk: the message names the path
        print(f"moextend: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        # A command that writes says what it keeps; the others have nothing to keep.
        left = "; ".join(map(str, interrupt.args)) or "nothing was being trained"
        print(f"moextend: interrupted; {left}", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        if "jax" in sys.modules and (line := no_devices()):
            print(f"moextend: {line}; ask `moextend doctor`", file=sys.stderr)
            return 2
        if "moextend_jax.distributed" not in sys.modules:
            raise
        # a bug in one of several processes must not leave the others waiting
        traceback.print_exc()
        return 1


def _call(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    _check_names([*words, os.getcwd()])
    command, arguments = words[0], words[1:]
    if words[:2] == ["eval", "score"]:
        command, arguments = "eval score", words[2:]
    if command in TOOLS:
        module, function = TOOLS[command]
        return getattr(importlib.import_module(module), function)(arguments)
    if command not in COMMANDS:
        raise MoextendError(f"there is no command {command!r}; there are {', '.join((*COMMANDS, *TOOLS))}")
    COMMANDS[command](*_parse(command, arguments))
    return 0


def _check_names(names: list[str]) -> None:
    """Names that Python cannot read are surrogates to it, on which C++ libraries fail one by one."""
    for name in names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            encoding = sys.getfilesystemencoding()
            mend = "export PYTHONUTF8=1" if encoding != "utf-8" else "rename it"
            raise MoextendError(f"{name} is no {encoding}, which Python takes names for here; {mend}")


def _options(command: str, values: flags.FlagValues) -> str:
    lines = [f"moextend {command} [options]; `moextend --help` says what it does", ""]
    for name in sorted(set(values) - {"config"}):
        flag = values[name]
        default = "" if flag.default in (None, False) else f" (default {flag.default_as_str or flag.default})"
        lines.append(f"  --{name:<16} {flag.help}{default}")
    lines.append("  --config           configs/X.py[:arg], and --config.FIELD=VALUE for any of its settings")
    return "\n".join(lines)


def _parse(command: str, arguments: list[str]) -> tuple[RunSettings | None, flags.FlagValues]:
    values = flags.FlagValues()
    if command == "data":
        if arguments[:1] != ["check"]:
            raise MoextendError("data: say `moextend data check CONFIG`")
        arguments = arguments[1:]
        if arguments and not arguments[0].startswith("-"):
            arguments = ["--config", *arguments]
    # Which overrides there are is read from the arguments, which are not sys.argv when Python calls `main`.
    config_flags.DEFINE_config_file(
        "config", None, "configs/X.py[:arg]", flag_values=values, sys_argv=["moextend", *arguments]
    )
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    if command in (*training(), "run"):
        flags.DEFINE_string("resume_from", None, "checkpoint of another folder to start from", flag_values=values)
    if command == "generate":
        flags.DEFINE_string("prompt", None, "what to say to the model", flag_values=values)
        flags.DEFINE_string("image", None, "picture file to show it", flag_values=values)
        flags.DEFINE_integer("max_new_tokens", 64, "most tokens to say", flag_values=values)
        flags.DEFINE_float("temperature", 0.0, "0 is greedy", flag_values=values)
        flags.DEFINE_integer("top_k", 0, "draw from the k most likely, 0: from all", flag_values=values)
        flags.DEFINE_integer("seed", 0, "of the draw", flag_values=values)
        flags.DEFINE_enum("model", "moextend", list(MODELS), "which one", flag_values=values)
    if command == "bench":
        flags.DEFINE_enum("stage", None, training(optional=False), "time only this one", flag_values=values)
        flags.DEFINE_string("json", None, "file to write all figures to", flag_values=values)
        flags.DEFINE_integer("layers", None, "decoder layers to keep of the base", flag_values=values)
    if command == "plan":
        flags.DEFINE_enum("stage", None, training(), "what trains", flag_values=values)
        flags.DEFINE_string("topology", None, "CHIP:SHAPE", flag_values=values)
        flags.DEFINE_bool("json", False, "JSON instead of tables", flag_values=values)
        flags.DEFINE_bool("text_only", False, "leave tower, projector and images out", flag_values=values)
        flags.DEFINE_float("new_share", None, "share of picks that new experts get (balanced)", flag_values=values)
        flags.DEFINE_integer("layers", None, "decoder layers to keep of the base", flag_values=values)
        flags.DEFINE_bool("sweep", False, "try meshes, micro-batches and what is saved", flag_values=values)
        flags.DEFINE_integer("most", 8, "programs a sweep compiles at most", flag_values=values)
        flags.DEFINE_float("within", None, "GiB per chip that a sweep may use", flag_values=values)
    if command == "eval":
        flags.DEFINE_string("benchmark", None, "name of a benchmark; docs/evaluation.md has them", flag_values=values)
        flags.DEFINE_string("data", None, "folder of the benchmark's official files", flag_values=values)
        flags.DEFINE_string("split", None, "of the benchmark", flag_values=values)
        flags.DEFINE_enum("model", "moextend", list(MODELS), "which one answers", flag_values=values)
        flags.DEFINE_integer("max_new_tokens", None, "most tokens of an answer", flag_values=values)
        flags.DEFINE_integer("limit", None, "only the first so many questions", flag_values=values)
        flags.DEFINE_bool("forgetting", False, "text tasks of lm-eval, base against model", flag_values=values)
        flags.DEFINE_list("tasks", None, "of lm-eval, instead of the paper's", flag_values=values)
        flags.DEFINE_integer("num_fewshot", None, "examples before each question", flag_values=values)
        flags.DEFINE_string("include_path", None, "folder of further tasks (YAML)", flag_values=values)
        flags.DEFINE_bool("run_code", False, "run programs that the model writes (MBPP)", flag_values=values)
    if command == "data":
        flags.DEFINE_string("data_dir", None, "folder of prepared data sets", flag_values=values)
        flags.DEFINE_integer("processes", os.cpu_count() or 1, "that read and decode; 0: this one", flag_values=values)
        flags.DEFINE_bool("json", False, "JSON instead of tables", flag_values=values)
    if command == "report" and arguments and not arguments[0].startswith("-"):
        arguments = ["--workdir", *arguments]
    if {"-h", "--help"} & set(arguments):
        print(_options(command, values))
        sys.exit(0)
    arguments = [re.sub("^--resume-from", "--resume_from", argument) for argument in arguments]
    try:
        rest = values(["moextend", *arguments])[1:]
    except Exception as error:  # a configuration file is a program: it can raise anything
        message = str(error) if isinstance(error, flags.Error) else f"{type(error).__name__}: {error}"
        raise MoextendError(f"{command}: {message}") from error
    for name, kind in NUMBERS.items():
        if name in values and (number := getattr(values, name)) is not None:
            get_args(kind)[1].check(number, what=f"{command}: --{name}")
    if rest:
        raise MoextendError(f"{command}: {rest[0]!r} is no option; see `moextend --help`")
    # Grain's workers look at absl's global flags, which nobody else parses here.
    flags.FLAGS(["moextend"], known_only=True)
    if values.workdir is None and command not in ("bench", "plan", "data"):
        raise MoextendError(f"{command} needs --workdir DIR")
    config = values.config
    if config is None and command in ("generate", "eval"):
        return None, values
    if config is None and command != "report":
        raise MoextendError(f"{command} needs --config configs/X.py")
    return (from_config_dict(config) if config is not None else None), values


def _stage(name: str) -> Callable:
    def command(settings: RunSettings, values: flags.FlagValues) -> None:
        from moextend_jax.runs.making import make
        from moextend_jax.runs.run import remember, working

        with working(settings, folder(values.workdir), resume_from=_resume_from(values)) as run:
            make(run, name)
            remember(run)
            _show(run, name)

    return command


def _show(run: Any, name: str) -> None:
    """What there is to see of a result that has just been made."""
    from moextend_jax import distributed
    from moextend_jax.runs.models_of import read_selection

    if name != "select" or not distributed.first():
        return
    from moextend_jax.report.routing_pictures import routing_picture  # matplotlib takes a second to import

    record = read_selection(run)
    routing_picture(record, run.workdir / name / "routing.png")
    print(f"layers to extend: {record['chosen_layers']}, copying experts {record['sources']}")


def _resume_from(values: flags.FlagValues) -> Path | None:
    given = getattr(values, "resume_from", None)  # select and grow have no checkpoints
    return folder(given) if given else None


def _run(settings: RunSettings, values: flags.FlagValues) -> None:
    from moextend_jax import distributed
    from moextend_jax.evaluate import summary
    from moextend_jax.report.page import write_report
    from moextend_jax.runs.making import make_all
    from moextend_jax.runs.run import remember, working

    screen, started = console(), time.perf_counter()
    with working(settings, folder(values.workdir), resume_from=_resume_from(values)) as run:
        for name in make_all(run):
            remember(run)
            _show(run, name)
        record = summary.summarise(run, summary.evaluate(run), total_seconds=time.perf_counter() - started)
        summary.print_table(record, screen)
        if distributed.first():
            screen.print(f"report: {write_report(run.workdir)}")


def _evaluate(settings: RunSettings, values: flags.FlagValues) -> None:
    from moextend_jax.evaluate import summary
    from moextend_jax.runs.run import evaluation_rows, remember, working

    with working(settings, folder(values.workdir), rows=evaluation_rows(settings)) as run:
        summary.print_table(summary.summarise(run, summary.evaluate(run), total_seconds=None), console())
        remember(run)


def _report(settings: RunSettings | None, values: flags.FlagValues) -> None:
    from moextend_jax.report.page import write_report

    print(write_report(folder(values.workdir)))


def _generate(settings: RunSettings | None, values: flags.FlagValues) -> None:
    from moextend_jax.evaluate.speak import speak
    from moextend_jax.generate import Sampling
    from moextend_jax.runs.run import open_run

    if not values.prompt:
        raise MoextendError("generate needs --prompt TEXT")
    workdir = folder(values.workdir)
    run = open_run(settings or _remembered(workdir), workdir)
    pieces = speak(
        run,
        which=values.model,
        prompt=values.prompt,
        image=Path(values.image) if values.image else None,
        max_new_tokens=values.max_new_tokens,
        sampling=Sampling(values.temperature, values.top_k),
        seed=values.seed,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _eval(settings: RunSettings | None, values: flags.FlagValues) -> None:
    if bool(values.benchmark) == values.forgetting:
        raise MoextendError("eval: say --benchmark NAME or --forgetting (or `moextend eval score`)")
    from moextend_jax.evaluate.benchmark import benchmark
    from moextend_jax.evaluate.forgetting import TASKS, forgetting
    from moextend_jax.runs.run import working

    workdir = folder(values.workdir)
    with working(settings or _remembered(workdir), workdir, rows=()) as run:  # whose batches are made to divide
        if values.benchmark:
            benchmark(
                run,
                values.benchmark,
                data=Path(values.data) if values.data else None,
                split=values.split,
                model=values.model,
                limit=values.limit,
                max_new_tokens=values.max_new_tokens,
            )
        else:
            forgetting(
                run,
                tasks=values.tasks or TASKS,
                models=(values.model,),
                limit=values.limit,
                num_fewshot=values.num_fewshot,
                include_path=Path(values.include_path) if values.include_path else None,
                run_code=values.run_code,
            )


def _remembered(workdir: Path) -> RunSettings:
    """The settings that the work directory's stages were run with."""
    from moextend_jax.runs.run import settings_of

    settings = settings_of(workdir)
    if settings is None:
        raise MoextendError(f"{workdir} is no work directory: run a stage with this --workdir first")
    return settings


def _bench(settings: RunSettings, values: flags.FlagValues) -> None:
    from moextend_jax.bench import bench

    figures = bench(settings, console(), only=values.stage, layers=values.layers)
    if values.json:
        Path(values.json).write_text(json.dumps(figures, indent=1) + "\n")


def _plan(settings: RunSettings, values: flags.FlagValues) -> None:
    import jax

    from moextend_jax.plan.command import plan_command

    jax.config.update("jax_platforms", "cpu")  # the chips of a plan are not here, and those that are stay free
    plan_command(
        settings,
        stage=values.stage,
        topology=values.topology,
        without_images=values.text_only,
        new_share=values.new_share,
        layers=values.layers,
        most=values.most if values.sweep else 0,
        within=values.within,
        as_json=values.json,
    )


def _data(settings: RunSettings, values: flags.FlagValues) -> None:
    from moextend_jax.check_data import check_command
    from moextend_jax.folders import local

    chosen = values.data_dir or settings.data_dir or (f"{values.workdir}/data" if values.workdir else None)
    code = check_command(
        settings,
        data_dir=local(folder(chosen), what="data_dir") if chosen else None,
        processes=values.processes,
        as_json=values.json,
        console=console(stderr=values.json),
    )
    sys.exit(code)


COMMANDS: dict[str, Callable[[Any, flags.FlagValues], None]] = {
    **{name: _stage(name) for name in RESULTS},
    "run": _run,
    "evaluate": _evaluate,
    "report": _report,
    "generate": _generate,
    "bench": _bench,
    "plan": _plan,
    "data": _data,
    "eval": _eval,
}
NUMBERS = {
    "max_new_tokens": Count, "temperature": NotNegative, "top_k": Amount, "seed": Amount, "layers": Count,
    "new_share": Share, "most": Count, "within": Positive, "limit": Count, "num_fewshot": Amount, "processes": Amount,
}  # fmt: skip
"""What numbers may be that are options of any command; settings have their ranges beside their types."""
TOOLS = {
    "doctor": ("moextend_jax.doctor", "main"),
    "import": ("moextend_jax.checkpoints.convert", "import_main"),
    "export": ("moextend_jax.runs.export", "export_main"),
    "compare": ("moextend_jax.compare.command", "main"),
    "routing": ("moextend_jax.routing.command", "main"),
    "eval score": ("moextend_jax.evaluate.benchmarks.command", "score_main"),
}
"""Commands without a configuration, which parse their own arguments and return an exit code."""


if __name__ == "__main__":
    main()
