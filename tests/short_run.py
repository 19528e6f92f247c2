"""A process of a test: the command line, with only the first lines of the texts that `evaluate` reads."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import tiny
import torus

from moextend_jax import cli

if __name__ == "__main__":
    torus.asked()
    with tempfile.TemporaryDirectory() as short:
        tiny.shorten_texts(Path(short))
        cli.main(sys.argv[1:])
