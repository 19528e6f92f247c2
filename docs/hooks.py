"""Pages of the documentation site that are not files of docs/: README.md and its like, settings, commands.

A hook of mkdocs (mkdocs.yml). Links are written for readers of the repository, relative to the file that they stand in;
here those to files that are pages lead to these, and those to other files of the repository become their text.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from moextend_jax.cli import COMMANDS, resolve
from moextend_jax.options import MISSING, Option, allowed, as_written, kinds_of, meanings, options_of, places
from moextend_jax.settings import RunSettings, fields

REPOSITORY = Path(__file__).parent.parent
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "launch/README.md": "launch.md",
    "moextend_jax/assets/base/MODEL_CARD.md": "model_card.md",
}
"""Files of the repository -> their pages."""
SETTINGS = """# Every setting

A run is described by a configuration (`--config demo`, a Python file) and by what the command line changes in it, as in
`--config.finetune.steps=800`. This page is made from the classes that check the settings, so it has all of them.
`moextend run demo --help` prints the same with the values of that configuration. NAME is the name that a configuration
gives to an extension or to a medium.
"""
COMMAND_LINE = """# Every command

`moextend COMMAND --help` prints the same. CONFIG is the name of a configuration of the package, or a Python file.
Commands that take one also take [every setting](settings.md), as `--config.FIELD=VALUE`.
"""
LINK = re.compile(r"\[([^][]*)\]\(([^()#:\s]+)(#[^()\s]*)?\)")

DOCUMENT = re.compile(r"docs/(\w+)\.md")
"""How docstrings name a page."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those that mkdocs found in docs/."""
    from mkdocs.structure.files import File

    pages = {
        page: (REPOSITORY / source).read_text() for source, page in COPIED.items() if (REPOSITORY / source).exists()
    }
    for name, text in {**pages, "settings.md": settings_page(), "commands.md": commands_page()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A page's text with its links as the site has them."""
    source = next((s for s, copy in COPIED.items() if copy == page.file.src_uri), f"docs/{page.file.src_uri}")
    return LINK.sub(lambda link: _link(link, source), markdown)


def _link(link: re.Match[str], source: str) -> str:
    text, target, heading = link.groups(default="")
    path = os.path.normpath(f"{os.path.dirname(source)}/{target}".lstrip("/"))
    if path in COPIED or path.startswith("docs/"):
        return f"[{text}]({COPIED.get(path, path.removeprefix('docs/'))}{heading})"
    return text if (REPOSITORY / path).exists() else link.group()


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of a run, by the class that it is a field of."""
    lines = [SETTINGS]
    for kind, paths in groups().items():
        lines += [f"## {_title(kind)}", ""]
        if paths != [""]:
            lines += [f"Under {', '.join(f'`--config.{path}.`' for path in paths)}.", ""]
        lines += [DOCUMENT.sub(r"[\1](\1.md)", " ".join((kind.__doc__ or "").split())), ""]
        for option in _settings(kind):
            lines += entry(option, name=option.name, anchor=f"{_title(kind)}.{option.name}".lower())
    return "\n".join(lines)


def groups() -> dict[type, list[str]]:
    """The classes of settings, each with where it stands in `RunSettings`; that itself is first, at ""."""
    found: dict[type, list[str]] = {}

    def walk(kind: type, path: str) -> None:
        found.setdefault(kind, []).append(path)
        for name, part in fields(kind).items():
            below = f"{path}.{name}".lstrip(".")
            if group := _group(part):
                walk(group, below if dataclasses.is_dataclass(kinds_of(part)[0]) else f"{below}.NAME")

    walk(RunSettings, "")
    return found


def _group(kind: Any) -> type | None:
    """The class of a group of settings, or of each group of a table of them."""
    (kind, *_) = kinds_of(kind)
    if get_origin(kind) is Mapping:
        kind = get_args(kind)[1]
    return cast(type, kind) if dataclasses.is_dataclass(kind) else None


def _settings(kind: type) -> Iterator[Option]:
    """A class's fields that are no groups."""
    for field in dataclasses.fields(cast(Any, kind)):
        if not _group(fields(kind)[field.name]):
            made = field.default_factory
            default = field.default if made is MISSING else made()
            yield Option(field.name, fields(kind)[field.name], meanings(kind).get(field.name, ""), default)


def _title(kind: type) -> str:
    return kind.__name__.removesuffix("Settings").removesuffix("Config")


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its options, which are shown once where several commands share them."""
    lines, group, shown = [COMMAND_LINE], "", dict[Any, str]()
    for name, command in COMMANDS.items():
        if command.group != group:
            lines += [f"## {(group := command.group)}", ""]
        function = resolve(command.function)
        kind = next(iter(get_type_hints(function).values()))
        does = " ".join((function.__doc__ or command.does).split())
        lines += [f"### moextend {name}", "", f"{does[:1].upper()}{does[1:].removesuffix('.')}.", ""]
        if command.words:
            lines += [f"`{' '.join(command.words)}` is given already.", ""]
        if kind in shown:
            lines += [f"Options are those of `moextend {shown[kind]}`.", ""]
            continue
        shown[kind] = name
        if places(kind):
            lines += [f"Without names, in this order: {', '.join(map(str.upper, places(kind)))}.", ""]
        for option in options_of(kind):
            lines += entry(option, name=f"--{option.name}", anchor=f"{name}.{option.name}".replace(" ", "-"))
    return "\n".join(lines)


def entry(option: Option, *, name: str, anchor: str) -> list[str]:
    """Lines of an option: its name, its range, its default and its meaning."""
    table = f"by name: {', '.join(option.names)}" if option.default is not MISSING and option.names else ""
    kind = get_args(option.kind)[1] if get_origin(option.kind) is Mapping else option.kind
    default = "must be given" if option.default is MISSING else f"default `{as_written(option.default)}`"
    default = "" if option.default is None else default
    facts = "; ".join(filter(None, [table, allowed(kind) or _kind(kind), default]))
    meaning = DOCUMENT.sub(r"[\1](\1.md)", option.meaning)
    return [f'<span id="{anchor}"></span>`{name}` {facts}', "", f":   {meaning or '-'}", ""]


def _kind(kind: Any) -> str:
    (kind, *_) = kinds_of(kind)
    return {bool: "true or false", Path: "path"}.get(kind, "text")
