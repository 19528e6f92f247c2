"""`transformers serve` on an exported folder: what an OpenAI client is answered is what `moextend generate` answers."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from PIL import Image
from test_export_hf import BASE, PAPER, run_of

from moextend_jax import cli

for package in ("torch", "accelerate", "fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install "moextend-jax[serve]"')

import openai  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.slow

NEW = 8
"""Tokens of an answer: a random model ends none by itself."""
QUESTIONS = [("what is it?", True), ("what is it?", False), ("And the LORD said", False), ("how many?", True)]
"""Question, and whether it has the picture."""


class Served(NamedTuple):
    """An exported folder, a picture, and a client of the server that has the folder's model."""

    folder: Path
    picture: Path
    client: Any

    def ask(self, question: str, sees: bool, **more: Any) -> Any:
        content: list[Any] = [{"type": "text", "text": question}]
        if sees:
            data = base64.b64encode(self.picture.read_bytes()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        messages = [{"role": "user", "content": content if sees else question}]
        options = {"model": str(self.folder), "max_tokens": NEW, **more}
        return self.client.chat.completions.create(messages=messages, **options)


BY_HAND = [pytest.param(name, marks=pytest.mark.long) for name in ("strict", "aligned")]


@pytest.fixture(scope="module", params=["moextend", *BY_HAND])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    isolation = "strict" if request.param == "strict" else "none"
    run = run_of(root / "run", tiny.write_base(root / "base", config=BASE), recipe=PAPER, text_isolation=isolation)
    model = "aligned" if request.param == "aligned" else "moextend"
    cli.call(["export", str(run), str(root / "out"), "--layout", "hf", "--model", model])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 57, 3), np.uint8)).save(root / "a.png")
    with server(root / "out", trust=model != "aligned", home=root) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        yield Served(root / "out", root / "a.png", client)


@contextlib.contextmanager
def server(folder: Path, *, trust: bool, home: Path) -> Iterator[str]:
    """The URL of a server, whose process knows nothing of this package and ends with the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--port", str(port), "--device", "cpu", *(["--trust-remote-code"] if trust else [])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "transformers.cli.transformers", *words]
    log = home / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=output, stderr=output)
    try:
        until, url = time.monotonic() + 180, f"http://localhost:{port}"
        while not healthy(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return answer.status == 200
    return False


@pytest.fixture
def ours(served: Served, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `moextend generate` answers, from the same folder."""
    answers = []
    for question, sees in QUESTIONS:
        picture = ["--image", str(served.picture)] if sees else []
        words = ["--checkpoint", str(served.folder), "--max_new_tokens", str(NEW), *picture]
        capsys.readouterr()
        assert cli.call(["generate", *words, "--json", question]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["answer"])
    assert answers[0] != answers[1] and len({*answers}) > 2
    return answers


def test_a_client_is_answered_what_generate_answers(served: Served, ours: list[str]):
    whole = [served.ask(question, sees) for question, sees in QUESTIONS]
    assert [answer.choices[0].message.content.strip() for answer in whole] == ours
    assert [answer.usage.completion_tokens for answer in whole] == [NEW] * len(QUESTIONS)
    streamed = [served.ask(question, sees, stream=True) for question, sees in QUESTIONS]
    pieces = [[chunk.choices[0].delta.content or "" for chunk in chunks] for chunks in streamed]
    assert ["".join(words).strip() for words in pieces] == ours
    assert any(sum(map(bool, words)) > 1 for words in pieces)  # an answer comes in pieces
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:  # with and without a picture, at once
        together = list(pool.map(lambda asked: served.ask(*asked), QUESTIONS))
    assert [answer.choices[0].message.content.strip() for answer in together] == ours


def test_the_server_has_no_other_model(served: Served):
    with pytest.raises(openai.BadRequestError):
        served.ask("what is it?", False, model=str(served.picture))
