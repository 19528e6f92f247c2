"""A process of a test: the command line, with only the first lines of the texts that `evaluate` reads."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torus

from moextend_jax import cli
from moextend_jax.evaluate import summary

if __name__ == "__main__":
    torus.asked()
    with tempfile.TemporaryDirectory() as short:
        for path in summary.TEXTS.glob("*.txt"):
            (Path(short) / path.name).write_text("\n".join(path.read_text().split("\n")[:12]))
        summary.TEXTS = Path(short)
        cli.main(sys.argv[1:])
