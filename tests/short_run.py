"""A process of a test: the command line, with only the first lines of the texts that `evaluate` reads, and the first
questions of easy-VQA."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torus

from moextend_jax import cli

if __name__ == "__main__":
    torus.asked()
    with tempfile.TemporaryDirectory() as short:
        tiny.shorten_texts(Path(short))
        tiny.shorten_easy_vqa(pytest.MonkeyPatch())
        cli.main(sys.argv[1:])
