"""TABLE of sinks: where the numbers of a training stage also go, beside the lines of `metrics.jsonl`.

In: a folder, a name ("demo/align"), the settings as a dict, and the step that the stage starts from. Out: a `Sink`,
which takes plain numbers by step. A stage that goes on continues the run that it had: its id is in FOLDER/sinks.json.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from moextend_jax.config import MoextendError
from moextend_jax.folders import extra_hint, is_url, written_whole
from moextend_jax.outside import said_by

IDS = "sinks.json"
PROJECT = "moextend"


class Sink(NamedTuple):
    """`back(step)` drops what was logged of later steps, where the tool can do that."""

    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]
    back: Callable[[int], Any] = lambda _: None


Open = Callable[[Path, str, dict[str, Any], int], Sink]


class Kind(NamedTuple):
    """`package` must be importable. `elsewhere`: it keeps the numbers outside the work directory, so training goes on
    without it where it fails; a disk that refuses the work directory's own files ends training."""

    package: str
    open: Open
    elsewhere: bool = True


def _tensorboard(folder: Path, name: str, settings: dict[str, Any], resume_step: int) -> Sink:
    """Event files in FOLDER/tensorboard, written in the caller's thread, so that errors are the caller's too."""
    with _absent("torch"):  # tensorboardX would import it if installed: two seconds, and nothing here uses it
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

    (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
    file, proto = EventsWriter(str(folder / "tensorboard" / "events")), event_pb2

    def write(step: int, **what: Any) -> None:
        file.write_event(proto.Event(wall_time=time.time(), step=step, **what))
        file.flush()

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for tag, value in numbers.items():
            write(step, summary=summary.scalar(tag, value))

    def back(step: int) -> None:  # TensorBoard then hides what earlier files say of later steps
        write(step + 1, session_log=proto.SessionLog(status=proto.SessionLog.START))

    back(resume_step)
    return Sink(log, file.close, back)


@contextlib.contextmanager
def _absent(package: str) -> Iterator[None]:
    """Inside, a package that nobody has imported yet is as if it were not installed."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType]  what Python's import statement asks for
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


def _wandb(folder: Path, name: str, settings: dict[str, Any], resume_step: int) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    run_id = _run_id(folder, "wandb", resume_step, lambda: uuid.uuid4().hex[:8])
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, group=name.partition("/")[0], dir=str(folder),
        id=run_id, resume="allow", config=settings,
    )  # fmt: skip

    def log(step: int, numbers: Mapping[str, float]) -> None:
        # W&B takes no step twice. A step that a resumed run repeats has the same numbers. After a run goes back, W&B
        # keeps the first numbers of the repeated steps, but metrics.jsonl has the later ones.
        if step >= run.step:
            run.log(dict(numbers), step=step)

    return Sink(log, run.finish)


def _trackio(folder: Path, name: str, settings: dict[str, Any], resume_step: int) -> Sink:
    import trackio  # pyright: ignore[reportMissingImports]

    run_name = _run_id(folder, "trackio", resume_step, lambda: f"{name}-{uuid.uuid4().hex[:8]}")
    run = trackio.init(
        PROJECT, name=run_name, group=name.partition("/")[0], config=settings, resume="allow", embed=False
    )
    return Sink(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


def _mlflow(folder: Path, name: str, settings: dict[str, Any], resume_step: int) -> Sink:
    """Goes to MLFLOW_TRACKING_URI, else into WORKDIR/mlflow.db."""
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute().parent}/mlflow.db")

    def create() -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(title)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(title)
        run = client.create_run(experiment_id, run_name=name)
        params = [Param(key, str(value)) for key, value in flatten_dict(settings, sep=".").items()]
        for start in range(0, len(params), 100):  # the most that MLflow takes at once
            client.log_batch(run.info.run_id, params=params[start : start + 100])
        return run.info.run_id

    run_id = _run_id(folder, "mlflow", resume_step, create)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, [Metric(key, value, now, step) for key, value in numbers.items()])

    return Sink(log, lambda: client.set_terminated(run_id))


SINKS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboardX", _tensorboard, elsewhere=False),
    "wandb": Kind("wandb", _wandb),
    "trackio": Kind("trackio", _trackio),
    "mlflow": Kind("mlflow", _mlflow),
}


def check(names: Iterable[str], workdir: Path | str) -> None:
    """Raises MoextendError where a sink's package is not installed, or its file cannot be in the work directory; call
    it before anything is prepared."""
    for name in names:
        if name == "mlflow" and is_url(workdir) and "MLFLOW_TRACKING_URI" not in os.environ:
            raise MoextendError(f"sinks: mlflow keeps no file in {workdir}: set MLFLOW_TRACKING_URI")
        if importlib.util.find_spec(SINKS[name].package) is None:
            hint = extra_hint(name if SINKS[name].elsewhere else "")
            raise MoextendError(f"sinks: {name} needs the package {SINKS[name].package}: {hint}, or leave it out")


def open_sinks(
    names: Iterable[str], folder: Path, *, name: str, settings: dict[str, Any], resume_step: int
) -> dict[str, Sink]:
    """The sinks by their names.

    Raises:
      OSError: the folder cannot be written. MoextendError: a tool does not start: no account, no server.
    """
    opened = {}
    for kind in names:
        try:
            opened[kind] = SINKS[kind].open(folder, name, settings, resume_step)
        except Exception as error:
            if not SINKS[kind].elsewhere:
                raise
            raise MoextendError(f"sinks: {kind} does not start: {said_by(error)}") from error
    return opened


def scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """What tools take: one number a name. A list, which is by layer, becomes `NAME/layer_03`; None is left out."""
    flat = {}
    for name, value in numbers.items():
        if isinstance(value, list):
            flat |= {f"{name}/layer_{z:02d}": item for z, item in enumerate(value) if item is not None}
        else:
            flat[name] = value
    return flat


def _run_id(folder: Path, kind: str, resume_step: int, create: Callable[[], str]) -> str:
    """The id of the run that a stage continues, or of a new one where it starts afresh or its file is damaged."""
    path, ids = folder / IDS, {}
    with contextlib.suppress(ValueError):  # half written, by a machine that failed
        ids = json.loads(path.read_text()) if path.exists() else {}
    if resume_step == 0 or kind not in ids:
        ids[kind] = create()
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(ids) + "\n")
    return ids[kind]
