"""What a command can be given, from a dataclass: fields are its options, types what they take, docstrings their help.

In: the dataclass of a command, and perhaps a configuration. Out: its options and all settings of a run, one by one or
as the text of `--help`. Fields before `_: KW_ONLY` may be given by place; a field `config: RunSettings` is
`--config NAME[:arg]` and, for every setting, `--config.FIELD VALUE`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

from moextend_jax.config import LARGEST, MoextendError, Range
from moextend_jax.configurations import meant, names, with_defaults
from moextend_jax.settings import RunSettings, fields

MISSING = dataclasses.MISSING


class OneOf(NamedTuple):
    """The names of a table, where `Literal` would repeat them: `model: Annotated[str, OneOf(tuple(MODELS))]`."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"

    def check(self, value: str, *, what: str) -> None:
        """Raises MoextendError for another name."""
        if value not in self.names:
            raise MoextendError(f"{what} = {value!r} is not {self}{meant(value, self.names)}")


class Sets(NamedTuple):
    """Settings that an option is short for: `base: Annotated[str | None, Sets(("base",))]`. several: given again, it
    adds to what it sets, behind a comma; else the last counts."""

    settings: tuple[str, ...]
    several: bool = False


class Option(NamedTuple):
    """An option, a setting, or a table of settings. default: `MISSING` where it must be given."""

    name: str
    kind: Any
    meaning: str
    default: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Those of a table; none where this is no table."""
        if get_origin(self.kind) is not Mapping:
            return ()
        return get_args(get_args(self.kind)[0]) or tuple(self.default)


def options_of(kind: Any) -> list[Option]:
    """Those of a command, in order, without settings."""
    about = meanings(kind) | {"config": f"configuration, as demo or demo:released: {', '.join(names())}, or a file"}
    return [
        Option(field.name, fields(kind)[field.name], about.get(field.name, ""), field.default)
        for field in dataclasses.fields(kind)
    ]


def places(kind: Any) -> list[str]:
    """Options that may be given without their names."""
    return [field.name for field in dataclasses.fields(kind) if not field.kw_only]


def settings_of(
    values: Mapping[str, Any] | None = None, *, kind: Any = RunSettings, prefix="config"
) -> Iterator[Option]:
    """Every setting, in order, with its default or its value in a configuration."""
    values = with_defaults(kind, {}) if values is None else values
    for name, part in fields(kind).items():
        part = kinds_of(part)[0]
        if dataclasses.is_dataclass(part):
            if values.get(name) is not None:
                yield from settings_of(values[name], kind=part, prefix=f"{prefix}.{name}")
        elif get_origin(part) is Mapping and dataclasses.is_dataclass(of := get_args(part)[1]):
            for key, group in values.get(name, {}).items():
                yield from settings_of(group, kind=of, prefix=f"{prefix}.{name}.{key}")
        else:
            yield Option(f"{prefix}.{name}", part, meanings(kind).get(name, ""), values.get(name, MISSING))


@functools.cache
def meanings(kind: type) -> dict[str, str]:
    """The docstrings of a class's fields and of those it inherits, which Python does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    inherited = {name: text for base in kind.__bases__ if base is not object for name, text in meanings(base).items()}
    return inherited | {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(cast(ast.ClassDef, tree).body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def kinds_of(kind: Any) -> list[Any]:
    """X and Y of `X | Y | None`; any other type alone."""
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind]
    return [part for part in get_args(kind) if part is not types.NoneType]


# --- help -------------------------------------------------------------------------------------------------------------


def is_list(kind: Any) -> bool:
    """Whether an option takes any number of values."""
    return get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis


def describe(kind: Any, settings: Mapping[str, Any] | None, *, command: str, does: str) -> str:
    """The help of a command: each option, and each setting (of a configuration), with meaning, default and range."""
    options = options_of(kind)
    placed = [option for option in options if option.name in places(kind)]
    usage = [option.name.upper() + (" ..." if is_list(option.kind) else "") for option in placed]
    usage = [name if option.default is MISSING else f"[{name}]" for name, option in zip(usage, placed, strict=True)]
    lines = [
        " ".join(["moextend", command, *usage, "[--OPTION VALUE ...]"]),
        "",
        *row("", " ".join(does.split()), indent=0),
        "",
    ]
    for option in options:
        nothing = any(option.default is value for value in (None, False, ()))
        lines += _rows(option, needed="needed", default="" if nothing else f"default {as_written(option.default)}")
    if any(option.name == "config" for option in options):
        whose = "the defaults are this configuration's" if settings else "--config NAME --help shows its own"
        lines += ["", f"Settings, any of which may be given too ({whose}):", ""]
        for option in settings_of(settings):
            lines += _rows(
                option, needed="set by each configuration", default=f"default {as_written(option.default)}", indent=8
            )
    return "\n".join(lines)


def row(name: str, text: str, *, indent: int = 28) -> list[str]:
    """Lines of a name and, beside it, a text as wide as the terminal allows."""
    width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns))
    beside = f"  {name}".ljust(indent) if name and len(name) < indent - 3 else " " * indent
    above = [f"  {name}"] if name and not beside.strip() else []
    return above + textwrap.wrap(
        text, width, initial_indent=beside, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _rows(option: Option, *, needed: str, default: str, indent: int = 28) -> list[str]:
    table = f"NAME: {', '.join(option.names)}" if option.names else ""
    kind = get_args(option.kind)[1] if table else option.kind
    facts = filter(None, [table, allowed(kind), needed if option.default is MISSING else default])
    name = f"--{option.name}.NAME" if table else f"--{option.name}"
    return row(name, f"{option.meaning} ({'; '.join(facts)})".removesuffix(" ()"), indent=indent)


def allowed(kind: Any) -> str:
    """The range or the choices of a type in words; nothing where any text will do."""
    if len(kinds := kinds_of(kind)) > 1:
        return ", or ".join(map(allowed, kinds))
    (kind,) = kinds
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [part._replace(most=None) if isinstance(part, Range) and part.most == LARGEST else part
                  for part in arguments[1:] if not isinstance(part, Sets)]  # fmt: skip
        return " ".join(filter(None, [allowed(arguments[0]), *map(str, ranges)]))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments != (Path, ...):
        each = allowed(arguments[0])
        return f"A,B,... {each}".rstrip() if arguments[-1] is Ellipsis else f"{len(arguments)} values"
    return {int: "whole number", float: "number"}.get(kind, "")


def as_written(value: Any) -> str:
    """A default as one would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'
