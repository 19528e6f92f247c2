"""What the commands of a run do: each takes its options, and calls one part of the package.

The fields of a command's class are its options (`options.py`); `cli.COMMANDS` names the functions. Parts are imported
where they are needed: help must not wait for JAX.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from moextend_jax import machine
from moextend_jax.config import IMAGE, Amount, Count, MediumKind, MoextendError, Range
from moextend_jax.folders import is_url, local
from moextend_jax.options import Sets
from moextend_jax.runs.place import Place
from moextend_jax.runs.results import FIRST
from moextend_jax.settings import NotNegative, RunSettings
from moextend_jax.terminal import console, lines_of_stdin

TrainingData = Sets(tuple(f"{name}.data" for name in FIRST.training()), several=True)

NEXT = """next:
  moextend generate --workdir {workdir} {image}"what is this?"
  moextend export {workdir} NEW_FOLDER --layout {layout}
  moextend run {own} --workdir NEW_WORKDIR"""
"""What to try when a run has ended."""


# --- the stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GivenOptions:
    """A configuration, and the settings that have options of their own."""

    config: RunSettings
    _: KW_ONLY
    data: Annotated[str | None, TrainingData] = None
    """own conversations for every stage: a file or a folder; again for each further one"""
    images: Annotated[str | None, Sets(("images",))] = None
    """folder of their pictures"""
    base: Annotated[str | None, Sets(("base",))] = None
    """folder of the language model to extend"""
    vision: Annotated[str | None, Sets(("vision",))] = None
    """folder of the vision tower"""


@dataclass(frozen=True, kw_only=True)
class RunOptions(GivenOptions):
    workdir: Path
    """folder of the run, made where it is not there; the same command goes on in it"""
    profile: Annotated[str | None, Sets(("profile",))] = None
    """steps to trace for xprof, FIRST:LAST, as 100:103"""
    resume_from: Path | None = None
    """a checkpoint of another work directory to start its stage from"""


def stage(options: RunOptions, name: str) -> None:
    from moextend_jax.runs.making import make
    from moextend_jax.runs.results import table
    from moextend_jax.runs.run import remember, working

    if options.resume_from and table(options.config).result(name).how != "train":
        raise MoextendError(f"{name} has no checkpoints; leave --resume_from out")
    with working(options.config, options.workdir, resume_from=options.resume_from) as run:
        make(run, name)
        remember(run, made=[name])
        _show(run, name)


def run_all(options: RunOptions) -> None:
    whole_run(options.config, options.workdir, resume_from=options.resume_from)


def whole_run(settings: RunSettings, workdir: Path, *, resume_from: Path | None = None) -> dict[str, Any]:
    """All stages, evaluation and report; what summary.json holds."""
    if settings.chains:
        if resume_from:
            raise MoextendError("--resume_from is for one chain, and config.chains names several")
        from moextend_jax.continual import run_chains

        return run_chains(settings, workdir, run=whole_run)
    from moextend_jax import distributed
    from moextend_jax.evaluate.evaluation import evaluate
    from moextend_jax.evaluate.run_questions import check
    from moextend_jax.evaluate.summary import print_table, summarise
    from moextend_jax.report.explorer import write_explorer
    from moextend_jax.report.page import write_report
    from moextend_jax.runs.making import make_all, seconds_before
    from moextend_jax.runs.run import remember, working

    screen, started = console(), time.perf_counter()
    with working(settings, workdir, resume_from=resume_from) as run:
        before = sum(seconds_before(run, name) for name in run.table.training())
        for name in make_all(run, checks=[check]):
            remember(run)
            _show(run, name)
        record = summarise(run, evaluate(run), total_seconds=before + time.perf_counter() - started)
        print_table(record, screen)
        if distributed.first():
            # PyTorch's programs know extensions for pictures or text, by new experts.
            known = all(of.medium in (IMAGE, "") and not (of.rival or of.connector) for of in settings.links)
            media = list(run.config.media)
            words = NEXT.format(
                workdir=shlex.quote(str(run.workdir)),
                image="--image FILE " if IMAGE in media else f"--show {media[-1]}=FILE " if media else "",
                layout="hf" if known else "delta",
                own=own_run({medium.kind for medium in run.config.media.values()}),
            ).splitlines()
            write_explorer(run.workdir)
            print(f"report: {write_report(run.workdir)}", *words, sep="\n")
    return record


def own_run(kinds: Collection[MediumKind]) -> str:
    """The run on own data that is likest to one with media of these kinds."""
    if not kinds:
        return "own:text --data FILE"
    return f"own{':sounds' if set(kinds) == {'audio'} else ''} --data FILE --images FOLDER"


@dataclass(frozen=True)
class StudyOptions:
    config: RunSettings
    _: KW_ONLY
    workdir: Path
    """folder of the study; the same command goes on in it"""


def study(options: StudyOptions) -> None:
    from moextend_jax.study import run_study

    run_study(options.config, options.workdir, run=run_and_start)


def run_and_start(settings: RunSettings, workdir: Path) -> dict[str, Any]:
    """A whole run, and what its extension had changed before it was trained; summary.json of both."""
    from moextend_jax.evaluate.start import start_of
    from moextend_jax.runs.run import working, write_json

    summary = whole_run(settings, workdir)
    with working(settings, workdir) as run:
        summary["start"] = start_of(run)
    write_json(workdir / "summary.json", summary)
    return summary


def evaluate(options: RunOptions) -> None:
    from moextend_jax.evaluate import evaluation
    from moextend_jax.evaluate.summary import print_table, summarise
    from moextend_jax.runs.making import check_made
    from moextend_jax.runs.run import evaluation_rows, remember, working

    if options.resume_from:
        raise MoextendError("evaluate does not train; leave --resume_from out")
    with working(options.config, options.workdir, rows=evaluation_rows(options.config)) as run:
        check_made(run)
        evaluated = evaluation.evaluate(run)
        remember(run, made=[])
        print_table(summarise(run, evaluated, total_seconds=None), console())


def _show(run: Any, name: str) -> None:
    """What there is to see of a result that has just been made."""
    from moextend_jax import distributed
    from moextend_jax.runs.models_of import selection_of

    if not name.startswith("select") or not distributed.first():
        return
    from moextend_jax.report.routing_pictures import routing_picture  # matplotlib takes a second to import

    extension = run.table.result(name).extension
    record = selection_of(run, extension)
    routing_picture(record, run.folder(name) / "routing.png", medium=run.settings.link(extension).medium)
    print(f"layers to extend: {record['chosen_layers']}, copying experts {record['sources']}")


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportOptions:
    workdir: Path
    """folder of the run"""


def report(options: ReportOptions) -> None:
    from moextend_jax.report.explorer import WITHOUT, write_explorer
    from moextend_jax.report.page import write_report

    explorer = write_explorer(options.workdir)  # first: the report links to it
    print(write_report(options.workdir), explorer or WITHOUT, sep="\n")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Place):
    config: RunSettings | None = None
    """of a run, where not its own; of a checkpoint its mesh, dtype and evaluate.batch_size count"""


@dataclass(frozen=True, kw_only=True)
class SpeakOptions(ModelOptions):
    temperature: NotNegative = 0.0
    """0 takes the likeliest token, more draws more freely"""
    top_k: Amount = 0
    """draw from the so many likeliest; 0: from all"""
    seed: Amount = 0
    """of the draw"""


@dataclass(frozen=True)
class GenerateOptions(SpeakOptions):
    prompt: str | None = None
    """what to say to the model; `-`, or none where something is piped in, takes standard input, a prompt a line"""
    _: KW_ONLY
    image: tuple[Path, ...] = ()
    """picture file to show it; again for each further one"""
    show: tuple[str, ...] = ()
    """MEDIUM=FILE of other media to show it, as audio=a.wav"""
    max_new_tokens: Count = 64
    """most tokens to say"""
    plain: bool | None = None
    """continue the prompt as it is, without the chat template; a base model does"""
    json: bool = False
    """a line {"prompt", "answer"} for each prompt"""


def generate(options: GenerateOptions) -> None:
    from moextend_jax.evaluate.speak import generate_command
    from moextend_jax.generate import Sampling
    from moextend_jax.runs.askable import open_place

    prompts = prompts_of(options.prompt)
    generate_command(
        open_place(options, settings=options.config),
        prompts,
        items=shown_of(options),
        as_json=options.json,
        plain=options.plain,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_k),
        seed=options.seed,
    )


def shown_of(options: GenerateOptions) -> dict[str, list[Path]]:
    """The files that are shown, by medium."""
    items: dict[str, list[Path]] = {"image": [*options.image]} if options.image else {}
    for text in options.show:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise MoextendError(f"--show {text!r} must be MEDIUM=FILE, as audio=a.wav")
        items.setdefault(name, []).append(Path(file))
    return items


def prompts_of(prompt: str | None) -> Iterable[str]:
    """A prompt, or those on standard input, one a line."""
    if prompt is not None and prompt != "-":
        return [prompt]
    if prompt is None and sys.stdin.isatty():
        raise MoextendError("generate needs a prompt: --prompt TEXT, or one a line on standard input")
    return (line.strip() for line in lines_of_stdin() if line.strip())


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SpeakOptions):
    elsewhere: ClassVar = dict.fromkeys(("image", "show"), "in the conversation /image FILE shows a picture, see /help")
    system: str | None = None
    """what the model is told before everything"""
    max_new_tokens: Count = 512
    """most tokens of an answer"""
    web: bool = False
    """a page in the browser instead of the terminal, which shows what the experts did (needs the extra `web`)"""
    host: str = "127.0.0.1"
    """address of the page; 0.0.0.0 lets other machines ask, and there is no password"""
    port: Annotated[int, Range(least=0, most=65535)] = 7860
    """of the page; 0 takes a free one"""


def given(options: Any) -> set[str]:
    """Names of the options that are not as they are where nobody says them."""
    return {field.name for field in fields(options) if getattr(options, field.name) != field.default}


def chat(options: ChatOptions) -> None:
    from moextend_jax.generate import Sampling

    said = {
        "system": options.system,
        "max_new_tokens": options.max_new_tokens,
        "sampling": Sampling(options.temperature, options.top_k),
        "seed": options.seed,
    }
    if options.web:
        from moextend_jax.runs.askable import choices
        from moextend_jax.web.page import Page, serve

        models = choices(options, settings=options.config)
        start = options.model or ("moextend" if "moextend" in models else next(iter(models)))
        if start not in models:
            raise MoextendError(f"the page has no model {start}: choose of {', '.join(models)}")
        serve(Page(models=models, start=start, **said), host=options.host, port=options.port)
        return
    if idle := [f"--{name}" for name in ("host", "port") if name in given(options)]:
        raise MoextendError(f"{', '.join(idle)} goes with --web")
    from moextend_jax.evaluate.chat import Conversation, chat_command
    from moextend_jax.runs.askable import open_place

    chat_command(Conversation(opened=open_place(options, settings=options.config), **said))


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    benchmark: str | None = None
    """name of a benchmark: vqav2, gqa, vizwiz, pope, easy_vqa, ... (docs/evaluation.md)"""
    data: Path | None = None
    """folder of the benchmark's official files"""
    split: str | None = None
    """of the benchmark, where not its usual one"""
    limit: Count | None = None
    """only the first so many questions"""
    max_new_tokens: Count | None = None
    """most tokens of an answer, where not the benchmark's"""
    templates: Path | None = None
    """JSON {NAME: TEMPLATE with {question}}: the benchmark in each of these wordings, and what depends on them"""
    forgetting: bool = False
    """text tasks of lm-eval, base against model, instead of a benchmark"""
    tasks: tuple[str, ...] = ()
    """of lm-eval, instead of the paper's"""
    num_fewshot: Amount | None = None
    """examples before each question"""
    max_length: Count = 4096
    """of such a task: most tokens of a question with its answer"""
    include_path: Path | None = None
    """folder of further tasks (YAML)"""
    run_code: bool = False
    """run programs that the model writes (MBPP)"""
    out: Path | None = None
    """folder for the answers, where not WORKDIR/eval, or of a checkpoint `eval` in the current directory"""


OF_BENCHMARKS = ("data", "split", "max_new_tokens", "templates")
OF_TEXT_TASKS = ("tasks", "num_fewshot", "max_length", "include_path", "run_code")
"""Options of `eval` that mean nothing to the other kind of evaluation."""


def eval_command(options: EvalOptions) -> None:
    if bool(options.benchmark) == options.forgetting:
        raise MoextendError("eval: say --benchmark NAME or --forgetting (or `moextend eval score`)")
    others = OF_TEXT_TASKS if options.benchmark else OF_BENCHMARKS
    if idle := [f"--{name}" for name in others if name in given(options)]:
        raise MoextendError(f"{', '.join(idle)} goes with {'--forgetting' if options.benchmark else '--benchmark'}")
    from moextend_jax.evaluate.benchmark import benchmark, read_exam
    from moextend_jax.evaluate.forgetting import TASKS, base_and, forgetting, read_tasks
    from moextend_jax.runs.askable import evaluating

    if options.benchmark:
        from moextend_jax.evaluate.wordings import ask_wordings, read_templates

        templates = read_templates(options.templates) if options.templates else {}
        of = options.folder if options.in_workdir else Path()
        local(options.out or of / "eval", what="answers (--out FOLDER)")  # now, in all processes
        exam = read_exam(options.benchmark, data=options.data, split=options.split, limit=options.limit)
        with evaluating(options, settings=options.config, out=options.out) as (opened, out):
            if templates:
                ask_wordings(opened, exam, templates, out=out, max_new_tokens=options.max_new_tokens)
            else:
                benchmark(opened, exam, out=out, max_new_tokens=options.max_new_tokens)
        return
    tasks = read_tasks(options.tasks or TASKS, include_path=options.include_path)
    with evaluating(options, settings=options.config, out=options.out) as (opened, out):
        forgetting(
            base_and(opened), tasks, out=out, limit=options.limit, num_fewshot=options.num_fewshot,
            max_length=options.max_length, run_code=options.run_code,
        )  # fmt: skip


# --- before a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchOptions:
    config: RunSettings
    _: KW_ONLY
    stage: str | None = None
    """time only this one"""
    layers: Count | None = None
    """decoder layers to keep of the base"""
    json: Path | None = None
    """file to write all figures to"""


def bench_command(options: BenchOptions) -> None:
    from moextend_jax import distributed
    from moextend_jax.bench import bench

    # Stages run in processes of their own, which find each other on TPUs alone.
    if (variable := machine.several()) in ("JAX_NUM_PROCESSES", "SLURM_NTASKS"):
        distributed.check_alone("bench", variable)
    if options.json and not is_url(options.json):  # now: what cannot be made is said before all is timed
        options.json.parent.mkdir(parents=True, exist_ok=True)
    figures = bench(options.config, console(), only=options.stage, layers=options.layers)
    if options.json and distributed.first():
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class DataOptions(GivenOptions):
    workdir: Path | None = None
    """folder of the run, for its data"""
    data_dir: Path | None = None
    """folder of prepared data sets"""
    processes: Amount = machine.cores()
    """that read and decode; 0: this one"""
    json: bool = False
    """JSON instead of tables"""


def check_data(options: DataOptions) -> int:
    from moextend_jax.check_data import check_command
    from moextend_jax.runs.data_of import data_dir_of

    data_dir = local(options.data_dir, what="data_dir") if options.data_dir else None
    if not data_dir and (options.workdir or options.config.data_dir):
        data_dir = data_dir_of(options.config, options.workdir or Path())
    return check_command(
        options.config,
        data_dir=data_dir,
        processes=options.processes,
        as_json=options.json,
        console=console(stderr=options.json),
    )
