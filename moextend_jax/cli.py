"""The `moextend` command: finds the function of a command, and turns a user's mistake into one line and exit code 2.

In: words. Out: an exit code: 0 done, 1 a comparison that failed, 2 a mistake of input or use, 75 the machine was taken
away and the same command goes on, 130 interrupted from the keyboard.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

from moextend_jax import __version__
from moextend_jax.config import MoextendError
from moextend_jax.configurations import meant, names
from moextend_jax.machine import keep_memory, no_devices, quiet_libtpu, several, whole_gpu
from moextend_jax.options import row
from moextend_jax.parsing import parse
from moextend_jax.preemption import INTERRUPTED, Preempted, not_lost
from moextend_jax.runs.results import FIRST


class Command(NamedTuple):
    """function: MODULE:NAME, whose first parameter is a dataclass of options. arguments: those after it.
    words: options that stand before the user's. alone: for one process, not for several that are one run."""

    group: str
    function: str
    does: str
    arguments: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    alone: bool = False


RUN = "moextend_jax.commands"
RUNS, STAGES, ASK = "A whole run", "Stages of a run, in order", "What came out"
BEFORE, FILES = "Before a run", "Checkpoints and PyTorch"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        RUNS, f"{RUN}:run_all", "the method on a small real model: minutes on two CPU cores",
        words=("--config=demo", "--workdir=work/demo"),
    ),
    "run": Command(RUNS, f"{RUN}:run_all", "all stages, then evaluate and report; goes on where it stood"),
    "study": Command(RUNS, f"{RUN}:study", "the same run with other settings and seeds, in one table; goes on, too"),
    **{name: Command(STAGES, f"{RUN}:stage", result.does, arguments=(name,)) for name, result in FIRST.results.items()},
    "mixture": Command(
        STAGES, f"{RUN}:stage", "train what all extensions have together, where the settings say so",
        arguments=("mixture",),
    ),
    "evaluate": Command(STAGES, f"{RUN}:evaluate", "accuracy and forgetting of every model in the work directory"),
    "report": Command(STAGES, f"{RUN}:report", "WORKDIR/report.html, and the routing explorer beside it", alone=True),
    "generate": Command(ASK, f"{RUN}:generate", "answer a prompt, or those on standard input, about a picture or not"),
    "chat": Command(
        ASK, f"{RUN}:chat", "a conversation at the terminal; /image PATH shows a picture, /reset, /quit", alone=True
    ),
    "eval": Command(ASK, f"{RUN}:eval_command", "a benchmark's questions answered and scored; or text forgetting"),
    "eval score": Command(ASK, "moextend_jax.evaluate.benchmarks.command:score", "the scores of a file of answers"),
    "doctor": Command(BEFORE, "moextend_jax.doctor:doctor", "what is installed, what would be used, what is missing"),
    "data check": Command(BEFORE, f"{RUN}:check_data", "every row and image of a configuration's data read once"),
    "plan": Command(
        BEFORE, "moextend_jax.plan.command:plan_command",
        "a stage's step compiled for chips that are not here: memory, FLOPs, messages, time",
    ),
    "bench": Command(BEFORE, f"{RUN}:bench_command", "time one step of each stage"),
    "import": Command(
        FILES, "moextend_jax.checkpoints.convert:import_checkpoint",
        "a published checkpoint, or a dense one made a mixture of experts, as JAX arrays", alone=True,
    ),
    "compose": Command(
        FILES, "moextend_jax.checkpoints.compose:compose", "a base and deltas that were trained apart as one model",
        alone=True,
    ),
    "export": Command(
        FILES, "moextend_jax.runs.export:export", "a run or an imported checkpoint as PyTorch's files, or as a delta",
        alone=True,
    ),
    "compare": Command(
        FILES, "moextend_jax.compare.command:compare_command", "what a PyTorch reference holds, computed here",
        alone=True,
    ),
    "routing collect": Command(FILES, "moextend_jax.routing.command:collect_command", "routing statistics of a model"),
    "routing compare": Command(FILES, "moextend_jax.routing.command:compare_command", "two files of them side by side"),
    "routing plot": Command(FILES, "moextend_jax.routing.command:plot_command", "as a picture and a page"),
}  # fmt: skip

USAGE = f"""moextend COMMAND [CONFIG] [--OPTION VALUE ...] [--config.FIELD VALUE ...]

CONFIG is {", ".join(names())}, or a file; `moextend COMMAND --help` has all options, and all settings of a run."""


def main(argv: list[str] | None = None) -> None:
    """Entry point; `argv` are the words after `moextend`."""
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
            whole_gpu()
            return call(words)
    except MoextendError as error:
        line = " ".join(str(error).split())  # which may quote a file that is not to be trusted
        print("moextend:", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
        return 2
    except Preempted as notice:
        print(f"moextend: {notice.why}: {notice}; the same command goes on from there", file=sys.stderr)
        if "moextend_jax.distributed" in sys.modules:
            from moextend_jax.distributed import end_together

            end_together()
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


def call(words: list[str]) -> int:
    """Runs a command and returns its exit code; mistakes are raised."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        return _tell(usage())
    if words[0] in ("-V", "--version", "version"):
        return _tell(f"moextend_jax {__version__}")
    _check_names([*words, os.getcwd()])
    named = command_of(words)
    if named is None:
        return _no_command(words)
    name, command = named
    if command.group in (RUNS, STAGES):
        keep_memory()
    options = options_in(words, name, command)
    if isinstance(options, str):
        return _tell(options)
    if command.alone and (variable := several()):
        from moextend_jax.distributed import check_alone

        check_alone(name, variable)
    return resolve(command.function)(options, *command.arguments) or 0


def command_of(words: list[str]) -> tuple[str, Command] | None:
    """The command that they begin with, and its name as they spell it."""
    stage, _, extension = words[0].partition(":")
    if extension and stage in FIRST.results:  # of a later extension
        return words[0], COMMANDS[stage]._replace(arguments=(words[0],))
    name = next((name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS), None)
    return None if name is None else (name, COMMANDS[name])


def options_in(words: list[str], name: str, command: Command) -> Any:
    """What its function is called with; its help, a text, where they ask for it."""
    function = resolve(command.function)
    kind = next(iter(get_type_hints(function).values()))
    words = [*command.words, *words[len(name.split()) :]]
    return parse(kind, words, command=name, does=(function.__doc__ or command.does))


def check(words: list[str]) -> None:
    """Raises what `call` would raise of these words before it does anything."""
    named = command_of(words)
    if named is None:
        _no_command(words)
    else:
        options_in(words, *named)


def _tell(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `moextend run --help | head`: Python would complain when it closes the pipe, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def resolve(function: str) -> Callable[..., Any]:
    """The function MODULE:NAME, imported now."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def usage(prefix: str = "") -> str:
    """All commands, or those whose names begin so."""
    lines, group = ([] if prefix else [USAGE]), ""
    for name, command in COMMANDS.items():
        if name.startswith(prefix):
            if command.group != group and not prefix:
                group = command.group
                lines += ["", f"{group}:"]
            lines += row(name, command.does, indent=19)
    return "\n".join(lines)


def _no_command(words: list[str]) -> int:
    """The commands of a group, such as `routing`; otherwise a mistake."""
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        return _tell(usage(f"{words[0]} "))
    name = " ".join(word for word in words[:2] if not word.startswith("-"))
    hint = meant(name, COMMANDS) or meant(words[0], {name.split()[0] for name in COMMANDS})
    raise MoextendError(f"there is no command {name!r}" + (hint or f"; there are {', '.join(group or COMMANDS)}"))


def _check_names(words: list[str]) -> None:
    """Names that Python cannot read are surrogates to it, on which C++ libraries fail one by one."""
    for name in words:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            encoding = sys.getfilesystemencoding()
            mend = "export PYTHONUTF8=1" if encoding != "utf-8" else "rename it"
            raise MoextendError(f"{name} is not {encoding}, in which Python reads names here; {mend}")


if __name__ == "__main__":
    main()
