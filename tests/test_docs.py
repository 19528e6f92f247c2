"""The documentation: links lead somewhere, commands can be given, pages made from the code have all of it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moextend_jax import configurations, parsing
from moextend_jax.cli import COMMANDS, resolve
from moextend_jax.config import MoextendError
from moextend_jax.options import options_of, settings_of

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/**/*.md"))
    if path.name != "CHANGELOG.md"
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def hooks() -> Any:
    """docs/hooks.py, which makes pages for the site."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()
MADE = {"settings.md": HOOKS.settings_page, "commands.md": HOOKS.commands_page}
"""Pages of the site that are no files."""


def slugs(markdown: str) -> set[str]:
    """What links can name of a page, as GitHub and the site make it of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    text, wrong = page.read_text(), []
    for _, target, heading in HOOKS.LINK.findall(FENCE.sub("", text)):
        if page.parent.name == "docs" and target in MADE:
            there = MADE[target]()
        elif (file := page.parent / target).exists():
            there = file.read_text() if file.suffix == ".md" else ""
        else:
            wrong.append(target)
            continue
        if heading and heading[1:] not in slugs(there):
            wrong.append(target + heading)
    wrong += [own for own in re.findall(r"\]\(#([^)]+)\)", text) if own not in slugs(text)]
    assert not wrong


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `moextend` wherever a page shows a command, or gives one to a launcher."""
    text = page.read_text().replace("\\\n", " ")
    blocks = [block for kind, block in FENCE.findall(text) if kind in ("sh", "bash")]
    blocks += re.findall(r"^    (moextend .*)$", text, re.MULTILINE)
    blocks += [" ".join(code.split()) for code in re.findall(r"`(moextend [^`]*)`", FENCE.sub("", text))]
    for line in "\n".join(blocks).splitlines():
        for own, given in re.findall(r"(?:^|&& |\| |then )moextend (.*)|(?:launch/\w+\.py .* -- )(.*)", line.strip()):
            words = shlex.split(re.split(r" (?:\||&&|>)", own + given)[0], comments=True)
            if words and words[0] not in ("...", "COMMAND") and not words[0].startswith("-"):
                yield words


PLACEHOLDER = re.compile(r" = '([A-Z_]+|\.\.\.)' is not | needs a value$")
"""In messages: what stands for a value; an option that prose names without one."""


def check_command(words: list[str]) -> None:
    """Raises MoextendError for a command that is none, and for options that it has not or that cannot be so."""
    name = next((name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS), words[0])
    command = COMMANDS.get(name.partition(":")[0])  # finetune:NAME, of a later extension
    if command is None:
        raise MoextendError("there is no such command")
    kind = next(iter(typing.get_type_hints(resolve(command.function)).values()))
    given = [word for word in words[len(name.split()) :] if word not in ("...", "--help")]
    for option, value in parsing._options(kind, given, command=name):
        if option == "config" and not value.isupper() and not value.partition(":")[0].endswith(".py"):
            configurations._file(value.partition(":")[0])


@pytest.mark.usefixtures("bucket_names")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_given(page: Path):
    wrong = []
    for words in commands(page):
        try:
            check_command(words)
        except MoextendError as error:
            if not PLACEHOLDER.search(str(error)):
                wrong.append(f"moextend {shlex.join(words)}: {error}")
    assert not wrong


def test_commands_are_found_and_wrong_ones_refused():
    assert len([words for page in PAGES for words in commands(page)]) > 50
    for words in (
        ["rum", "demo"],
        ["run", "dmo"],
        ["run", "demo", "--config.finetune.step=3"],
        ["plan", "demo", "--to"],
    ):
        with pytest.raises(MoextendError):
            check_command(words)


def test_every_setting_is_on_its_page():
    sections = re.split(r"^## ", HOOKS.settings_page(), flags=re.MULTILINE)[1:]
    found = set()
    for section in sections:
        places = re.findall(r"`--(config\.[\w.]*)\.`", section) or ["config"]
        found |= {
            f"{place}.{name}" for place in places for name in re.findall(r"^<span [^>]*></span>`(\w+)`", section, re.M)
        }
    assert {option.name for option in settings_of()} <= found
    continual = configurations.load("continual")
    named = {re.sub(r"^config\.(extensions|media)\.\w+", r"config.\1.NAME", o.name) for o in settings_of(continual)}
    assert named <= found and any(".NAME." in name for name in named)


def test_every_command_and_option_is_on_its_page():
    sections = dict(re.findall(r"^### moextend ([\w ]+)\n(.*?)(?=^##|\Z)", HOOKS.commands_page(), re.M | re.S))
    assert sections.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        other = re.search(r"Options are those of `moextend ([\w ]+)`", sections[name])
        found = re.findall(r"^<span [^>]*></span>`--(\w+)`", sections[other[1] if other else name], re.M)
        kind = next(iter(typing.get_type_hints(resolve(command.function)).values()))
        assert [option.name for option in options_of(kind)] == found


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {path: path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert "never a ninth row" in pages[tmp_path / "site" / "architecture.html"]
    loaded = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//(?!localhost)""")
    assert not [path.name for path, text in pages.items() if loaded.search(text)]  # nothing of other hosts
