"""A module of this package in a process of its own: settings on its standard input, a line of JSON from it out.

What is measured or compiled there leaves nothing behind here: no memory, no devices, no compiled programs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.settings import RunSettings


def apart(module: str, *words: str, settings: RunSettings, on_cpu: bool = False) -> Any:
    """What `python -m module WORDS` prints last.

    Raises:
      MoextendError: it failed; holds the last line that it said.
    """
    # JAX's note on what it leaves out of a stack would hide the error in the last line.
    environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off", **({"JAX_PLATFORMS": "cpu"} if on_cpu else {})}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        input=json.dumps(dataclasses.asdict(settings)), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise MoextendError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])
