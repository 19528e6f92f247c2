"""Several processes as one run, on JAX's own runtime: start it, go in step, end it.

In: what a launcher put into the environment (a Slurm step, a TPU pod, GKE, `launch/local.py`). Out: processes that run
the same commands on one mesh; `first()` is the one that writes what is written once. In a single process nothing here
does anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from moextend_jax import compile_cache, machine, preemption
from moextend_jax.config import MoextendError

Value = TypeVar("Value")

# --- starting and ending ----------------------------------------------------------------------------------------------


def start(*, cpu_devices: int = 1) -> None:
    """Joins the other processes of the run, if there are any. Call before anything else touches JAX's devices.

    A CPU is split into `cpu_devices`, unless JAX_NUM_CPU_DEVICES says otherwise. From here on only process 0 prints.
    Ends the process with exit code 2 where the others do not come within MOEXTEND_WAIT seconds (300).

    Raises:
      MoextendError: the environment is incomplete, or the processes do not find each other.
    """
    joining = arguments()
    # Only process 0 writes JAX's compile cache. If it reads a program from there while the others still compile it, it
    # waits for them at the first collective: CPUs give up after 30 seconds. On GPUs the others wait for process 0
    # meanwhile, since all tune kernels together: a deadlock.
    if joining is None or machine.accelerator() == "tpu":
        compile_cache.enable()
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        split_cpu(cpu_devices)
    if jax.distributed.is_initialized():
        return
    if joining is None:
        # A TPU slice is one to JAX, whoever starts its hosts: they would compute together, and neither save together
        # nor hear of each other's end.
        if machine.accelerator() == "tpu" and (count := jax.process_count()) > 1:
            raise MoextendError(
                f"this is one of {count} processes, which nothing has told of each other: set MOEXTEND_PROCESSES=auto "
                "for all of them, as the launchers do"
            )
        return
    seconds = machine.number("MOEXTEND_WAIT", default=WAIT)
    try:
        with _waiting(seconds):
            jax.distributed.initialize(**joining, initialization_timeout=seconds + WAIT)
        printed = os.dup(1) if first() else os.open(os.devnull, os.O_WRONLY)
    except (RuntimeError, ValueError) as error:
        alone = f"start all of them, or go alone by `env -u {machine.several()} moextend ...`"
        raise MoextendError(f"the processes of this run do not find each other: {error}; {alone}") from error
    preemption.pass_on()
    threading.Thread(target=_end_after_another, daemon=True).start()
    # Gloo writes to the file of standard output whenever processes first talk: only Python's own prints go on there.
    # What NCCL writes there, if NCCL_DEBUG asks for it, is wanted: with the errors.
    os.dup2(os.open(os.devnull, os.O_WRONLY) if machine.only_cpu() else 2, 1)
    sys.stdout = os.fdopen(printed, "w", buffering=1)


def split_cpu(devices: int) -> None:
    """Makes that many XLA devices of a CPU. A process that has used JAX before keeps the devices it has."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def arguments() -> dict[str, Any] | None:
    """How to call `jax.distributed.initialize`, or None where this process is alone."""
    name = machine.several()
    if name != "JAX_NUM_PROCESSES":
        return None if name is None else {}
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if missing := [name for name in names if name not in os.environ]:
        raise MoextendError(f"{', '.join(names)} must all be set; there is no {', '.join(missing)}")
    # All is said: JAX need not look for a cluster, which in Kubernetes takes another package.
    return {
        "coordinator_address": os.environ[names[0]],
        "num_processes": machine.number(names[1]),
        "process_id": machine.number(names[2]),
        "cluster_detection_method": "deactivate",
    }


def check_alone(command: str, variable: str) -> None:
    """Raises for a command that each of several processes would do by itself: on the same devices, or into one folder.
    `variable` is `machine.several()`."""
    if variable == "MOEXTEND_PROCESSES":  # how many there are is known when they are together
        start()
        if jax.process_count() == 1:
            return
    raise MoextendError(
        f"{command} is for one process, and {variable} says that there are more: start it once, as "
        f"`env -u {variable} moextend {command} ...`"
    )


WAIT, QUIET = 300, 15
"""Seconds that processes wait for each other to start, and how many of these before they print what they wait for."""


@contextlib.contextmanager
def _waiting(seconds: int) -> Iterator[None]:
    """Inside, a thread says what is waited for, and ends the process after `seconds`: JAX's client, which gives no
    signal a chance meanwhile, would abort it with a stack."""
    name = machine.several() or ""
    value = os.environ.get(name, "")
    others = f"{int(value) - 1} more of {value} processes" if value.isdecimal() else "the other processes"
    mend = f"({name} = {value}): start all of them, or go alone by `env -u {name} moextend ...`"
    together = threading.Event()

    def watch() -> None:
        if together.wait(min(QUIET, seconds / 2)):
            return
        print(f"moextend: waits at most {seconds} s for {others} {mend}", file=sys.stderr, flush=True)
        if not together.wait(seconds - min(QUIET, seconds / 2)):
            print(f"moextend: {others} did not come within {seconds} s {mend}", file=sys.stderr, flush=True)
            os._exit(2)

    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        together.set()
        signal.signal(signal.SIGINT, interrupt)


def end_together() -> None:
    """Returns when all processes that were told to stop are here. Otherwise process 0, in which JAX's service runs,
    could end while another closes its files, and JAX would end that one with 134, which no launcher puts back."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def leave(code: int) -> NoReturn:
    """Ends a process that has failed: JAX's threads may still compute, on which Python's own way out crashes. The other
    processes, which may be waiting for this one, are told, and end with the same code."""
    sys.stdout.flush()
    sys.stderr.flush()
    _leaving.acquire()  # the first of this process's threads
    if (client := _service()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first; a process does not answer
            client.key_value_set(FAILED, str(code))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier(FAILED, 1000 * TOLD)
        if jax_distributed.global_state.process_id == 0:  # in which the service runs: the others leave before it
            time.sleep(1)
    os._exit(code)


def _end_after_another() -> None:
    """Ends this process when another has failed, wherever it stands. JAX would do so only after about 100 seconds, or
    when process 0 is gone, and with exit code 134, after which some launchers start a run again that cannot succeed."""
    while (client := _service()) is not None:
        try:
            leave(int(client.key_value_try_get(FAILED)))
        except jax.errors.JaxRuntimeError:  # none has failed yet, or the service is gone
            time.sleep(1)


def _service() -> Any:
    """JAX's client of the service in process 0 that all processes talk to; None where there is none, or no more. It has
    no public name; Orbax uses the same."""
    return jax_distributed.global_state.client


_leaving = threading.Lock()
FAILED, TOLD = "moextend/failed", 10
"""Under what the service holds the exit code of the first process that fails, and how many seconds a process that ends
waits for the others to know it."""


# --- in step ----------------------------------------------------------------------------------------------------------


def first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Process 0 does it before the others, which then find done what is done once (files that are prepared)."""
    if not first():
        barrier(name)
    try:
        yield
    finally:  # also after an error: the others then make the same one, and nobody waits for ever
        if first():
            barrier(name)


def any_process(here: bool) -> bool:
    """Whether it is so in any process; all get the same answer."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def from_first(compute: Callable[[], Value]) -> Value:
    """What process 0 computes, in all processes: a value of JSON, whose tuples may come as lists. A mistake that it
    finds there is raised in all of them."""
    if jax.process_count() == 1:
        return compute()
    outcome = {}
    if first():
        try:
            outcome = {"value": compute()}
        except MoextendError as error:
            outcome = {"error": str(error)}
    encoded = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    encoded = np.asarray(multihost_utils.broadcast_one_to_all(np.resize(encoded, length)))
    outcome = json.loads(encoded.tobytes())
    if "error" in outcome:
        raise MoextendError(outcome["error"])
    return outcome["value"]


def check_same(found: Mapping[str, Any], message: str) -> None:
    """Raises `message` in all processes where one of them has found something else than process 0; each names what it
    has otherwise. Values are of JSON."""
    of_first = from_first(lambda: {**found})
    wrong = sorted(name for name in {**of_first, **found} if found.get(name, ...) != of_first.get(name, ...))
    if any_process(bool(wrong)):
        raise MoextendError(f"{message}{'; here otherwise than in process 0: ' if wrong else ''}{', '.join(wrong)}")


def check_shared(folder: Path) -> None:
    """Refuses a work directory that is another one on every host."""
    if jax.process_count() == 1:
        return
    mark = folder / ".seen-by-all-processes"
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
    barrier(f"marked {folder}")
    # On NFS a host that has looked for it too early believes for a minute that there is none, but asks when it is to
    # make it.
    folder.mkdir(parents=True, exist_ok=True)
    missing = any_process(not mark.exists())
    if first():
        mark.unlink()
    if missing:
        raise MoextendError(f"{folder} is not the same folder in all processes: use a file system that they share")
