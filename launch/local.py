"""N processes with M CPU devices each on this machine: several hosts in small, for development and tests.

    python launch/local.py --processes 2 --devices 4 -- run --config demo --workdir work/two

Process 0 has the terminal; what others say on standard error has their number in front. The first that fails ends all,
and its exit code is the launcher's. SIGTERM and Ctrl-C are passed on: the run saves and ends with exit code 75 or 130.
A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import commands

GRACE = 5.0
"""Seconds that processes have to end by themselves after one has failed."""


def main(argv: Sequence[str]) -> int:
    parser = commands.parser(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of a process")
    parser.add_argument("--script", help="run this Python file instead of moextend")
    options, moextend = commands.parse(parser, argv, needed=False)
    if not moextend and not options.script:
        parser.error("say what to run after --, e.g. -- run --config demo --workdir work/demo")
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    command = [sys.executable, *([options.script] if options.script else ["-m", "moextend_jax.cli"]), *moextend]
    # A dry run shows the port as the variable it is: the real one is known when it is free.
    port = "$PORT" if options.dry_run else str(free_port())
    environments = [
        environment(index, processes=options.processes, devices=options.devices, port=port)
        for index in range(options.processes)
    ]
    if options.dry_run:
        for variables in environments:
            print(f"env {' '.join(map(assignment, variables, variables.values()))} {shlex.join(command)} &")
        print("wait")
        return 0
    readers: list[threading.Thread] = []
    code = wait([start(command, variables, index, readers) for index, variables in enumerate(environments)])
    for reader in readers:  # what a process said last may still be on its way
        reader.join(timeout=GRACE)
    return code


def assignment(name: str, value: str) -> str:
    return f'{name}="{value}"' if value.endswith("$PORT") else shlex.quote(f"{name}={value}")


def environment(index: int, *, processes: int, devices: int, port: str) -> dict[str, str]:
    """The variables that make one process of a run: JAX reads the first four, moextend_jax/distributed.py the rest."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONPATH": os.pathsep.join([str(commands.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(
    command: Sequence[str], variables: dict[str, str], index: int, readers: list[threading.Thread]
) -> subprocess.Popen:
    piped = subprocess.PIPE if index else None
    process = subprocess.Popen(
        command, env={**os.environ, **variables}, stderr=piped, stdout=subprocess.DEVNULL if index else None,
        process_group=0,  # so that Ctrl-C comes once, from `wait`, and not from the terminal too
    )  # fmt: skip
    if index:
        readers.append(threading.Thread(target=pass_on, args=(process, index), daemon=True))
        readers[-1].start()
    return process


def pass_on(process: subprocess.Popen, index: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def wait(processes: list[subprocess.Popen]) -> int:
    # As on a machine that is taken away: all processes are told, save at one step, and end with exit code 75.
    interrupts = []

    def tell(number: int, _: object) -> None:
        if number == signal.SIGINT:
            interrupts.append(time.monotonic())
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, tell)
    failed = 0
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            # One that waits for another cannot hear; a user who says it twice need not wait.
            if len(interrupts) > 1 and time.monotonic() > interrupts[1] + GRACE:
                codes = [-signal.SIGINT]
                break
            time.sleep(0.05)
        failed = next((code for code in codes if code), 0)
        deadline = time.monotonic() + GRACE
        while failed and time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
    finally:
        for process in processes:  # not SIGTERM: JAX takes that for a notice of preemption and goes on
            if process.poll() is None:
                process.kill()
    for process in processes:
        process.wait()
    return failed if failed >= 0 else 128 - failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
