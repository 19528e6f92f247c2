"""Command lines from dataclasses: fields are the options, their types what is allowed, their docstrings the help.

In: a dataclass and words. Out: an instance, an error that names the option, or the help as text. Fields before
`_: KW_ONLY` may also be given by place. A field of type `RunSettings` is `--config NAME[:arg]` and, for every setting,
`--config.FIELD VALUE`. Hyphens and underscores are the same, so are `--name VALUE` and `--name=VALUE`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

from moextend_jax.config import LARGEST, MoextendError, Range
from moextend_jax.configurations import load, meant, names, with_defaults
from moextend_jax.folders import folder
from moextend_jax.settings import RunSettings, fields, from_config_dict

MISSING = dataclasses.MISSING
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


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
    """Settings that an option is short for: `base: Annotated[str | None, Sets(("base",))]`."""

    settings: tuple[str, ...]


class Option(NamedTuple):
    """One that can be given, or a table of them. default: `MISSING` where it must be given."""

    name: str
    kind: Any
    meaning: str
    default: Any


def parse(kind: type, words: Sequence[str], *, command: str, does: str) -> Any:
    """The options of a command as an instance of `kind`; the help, a string, where the words ask for it.

    Raises:
      MoextendError: an option that is not there or is lacking; a value it cannot have; a broken configuration.
    """
    values, settings = {}, {}
    for name, value in _read_words(kind, words, command=command):
        if name == "help":
            config = load(values["config"]) if "config" in values else None
            return describe(kind, config, command=command, does=does)
        if name.startswith("config."):
            settings[name.removeprefix("config.")] = value
        else:
            values[name] = value
            settings |= {path: value for path in _settings_that(kind, name)}
    for option in options_of(kind):
        if option.default is MISSING and option.name not in values:
            raise MoextendError(f"{command} needs --{option.name}: {option.meaning}")
    if settings and "config" not in values:
        raise MoextendError(f"{command}: --config.{next(iter(settings))} needs --config NAME, which it changes")
    if "config" in values:
        values["config"] = from_config_dict(changed(load(values["config"]), settings))
    return kind(**values)


def changed(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with others at some paths, such as `align.steps`."""
    for path, value in changes.items():
        *groups, name = path.split(".")
        inner = settings
        for group in groups:
            inner[group] = inner = dict(inner[group])
        inner[name] = value
    return settings


# --- words ------------------------------------------------------------------------------------------------------------


def _read_words(kind: type, words: Sequence[str], *, command: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of every option that is given, in order, `help` last."""
    kinds = _kinds(kind)
    places = [field.name for field in dataclasses.fields(kind) if not field.kw_only]
    rest, seen, wants_help = list(words), set(), False
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            place = next((place for place in places if place not in seen), None)
            if place is None or (word.startswith("-") and word != "-"):
                raise MoextendError(f"{command}: {word!r} is no option; see `moextend {command} --help`")
            name, texts = place, [word]
        elif kinds.get(name.removeprefix("no_")) is bool and name not in kinds and not equals:
            name, texts = name.removeprefix("no_"), ["false"]
        elif name not in kinds:
            raise MoextendError(f"{command}: there is no option --{name}" + (
                meant(f"--{name}", [f"--{known}" for known in kinds]) or f"; see `moextend {command} --help`"
            ))  # fmt: skip
        elif equals:
            texts = _parts(text) if _is_tuple(kinds[name]) else [text]
        elif kinds[name] is bool:
            texts = [rest.pop(0)] if rest and rest[0].lower() in ("true", "false") else ["true"]
        else:
            count = _words_of(kinds[name])
            texts, rest = rest[:count], rest[count:]
            if len(texts) < count or any(text.startswith("--") for text in texts):
                raise MoextendError(f"{command}: --{name} needs {'a value' if count == 1 else f'{count} values'}")
            if _is_tuple(kinds[name]) and count == 1:
                texts = _parts(texts[0])
        seen.add(name)
        yield name, read(kinds[name], texts, what=f"{command}: --{name}")
    if wants_help:
        yield "help", True


def read(kind: Any, texts: Sequence[str], *, what: str) -> Any:
    """The value of a type that texts (one, but for a tuple) stand for.

    Raises:
      MoextendError: none, or one outside the type's range.
    """
    origin, arguments, text = get_origin(kind), get_args(kind), " ".join(texts)
    if origin is Annotated:
        value = read(arguments[0], texts, what=what)
        for bounds in arguments[1:]:
            if not isinstance(bounds, Sets):
                bounds.check(value, what=what)
        return value
    if origin in (Union, types.UnionType):
        return read(next(part for part in arguments if part is not types.NoneType), texts, what=what)
    if origin is Literal:
        by_text = {str(choice): choice for choice in arguments}
        if text not in by_text:
            raise MoextendError(
                f"{what} = {text!r} is not one of {', '.join(map(repr, arguments))}{meant(text, by_text)}"
            )
        return by_text[text]
    if origin is tuple:
        parts = arguments[:1] * len(texts) if arguments[-1] is Ellipsis else arguments
        if len(parts) != len(texts):
            raise MoextendError(f"{what} = {text!r} must be {len(parts)} values")
        return tuple(read(part, [text], what=what) for part, text in zip(parts, texts, strict=True))
    if kind is RunSettings:  # it is loaded when all that changes it is known
        return text
    if kind is Path:
        return folder(text)
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise MoextendError(f"{what} = {text!r} is not of type {kind.__name__}") from None


def _is_tuple(kind: Any) -> bool:
    return get_origin(_plain(kind)) is tuple


def _words_of(kind: Any) -> int:
    """Words that follow an option: one for each of a pair, one with commas for a list."""
    arguments = get_args(_plain(kind)) if _is_tuple(kind) else ()
    return len(arguments) if arguments and arguments[-1] is not Ellipsis else 1


def _parts(text: str) -> list[str]:
    """The values of `a,b` and of `("a", "b")`."""
    return [part.strip(" '\"") for part in text.strip("()[] ").split(",") if part.strip()]


def _plain(kind: Any) -> Any:
    """A type without its range and without `| None`."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(kind) if part is not types.NoneType))
    return kind


# --- what can be given ------------------------------------------------------------------------------------------------


def options_of(kind: Any) -> list[Option]:
    """Those of a command, in order, without settings."""
    about = meanings(kind) | {"config": f"configuration, as demo or demo:released: {', '.join(names())}, or a file"}
    return [
        Option(field.name, fields(kind)[field.name], about.get(field.name, ""), field.default)
        for field in dataclasses.fields(kind)
    ]


def settings_of(kind: Any, values: Mapping[str, Any], *, prefix: str = "config") -> Iterator[Option]:
    """Every setting, in order; a table of them (`mesh`, `multipliers`) once."""
    for name, part in fields(kind).items():
        if dataclasses.is_dataclass(part):
            yield from settings_of(part, values[name], prefix=f"{prefix}.{name}")
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


def table_names(option: Option) -> tuple[str, ...]:
    """Of a table of settings; none where the option is a single one."""
    if get_origin(option.kind) is not Mapping:
        return ()
    return get_args(get_args(option.kind)[0]) or tuple(option.default)


def _kinds(kind: type) -> dict[str, Any]:
    """The type of every name that may be given."""
    kinds = {option.name: option.kind for option in options_of(kind)}
    if "config" in kinds:
        for option in settings_of(RunSettings, with_defaults(RunSettings, {})):
            below = {f"{option.name}.{name}": get_args(option.kind)[1] for name in table_names(option)}
            kinds |= below or {option.name: option.kind}
    return kinds


def _settings_that(kind: type, name: str) -> tuple[str, ...]:
    """An option sets, beside what it is itself."""
    return next((part.settings for part in get_args(fields(kind)[name]) if isinstance(part, Sets)), ())


# --- help -------------------------------------------------------------------------------------------------------------


def describe(kind: Any, settings: Mapping[str, Any] | None, *, command: str, does: str) -> str:
    """The help of a command: each option, and each setting (of a configuration), with meaning, default and range."""
    options = options_of(kind)
    places = {field.name for field in dataclasses.fields(kind) if not field.kw_only}
    usage = [option.name.upper() if option.default is MISSING else f"[{option.name.upper()}]"
             for option in options if option.name in places]  # fmt: skip
    lines = [" ".join(["moextend", command, *usage, "[--OPTION VALUE ...]"]), "", *row("", does, indent=0), ""]
    for option in options:
        lines += _rows(option, needed="needed" if option.default is MISSING else "", unsaid=(None, False, "", ()))
    if any(option.name == "config" for option in options):
        defaults = "the defaults are this configuration's" if settings else "--config NAME --help shows its own"
        lines += ["", f"Settings, any of which may be given too ({defaults}):", ""]
        for option in settings_of(RunSettings, settings or with_defaults(RunSettings, {})):
            lines += _rows(option, needed="set by each configuration", unsaid=(), indent=8)
    return "\n".join(lines)


def row(name: str, text: str, *, indent: int = 28) -> list[str]:
    """Lines of a name and, beside it, a text as wide as the terminal allows."""
    width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns))
    head = f"  {name}" if name else ""
    above = [head] if len(head) > indent - 2 and head else []
    first = "" if above else head
    return above + textwrap.wrap(
        text, width, initial_indent=first.ljust(indent), subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _rows(option: Option, *, needed: str, unsaid: tuple[Any, ...], indent: int = 28) -> list[str]:
    names = table_names(option)
    kind = get_args(option.kind)[1] if names else option.kind
    default = "" if option.default in unsaid else f"default {shown(option.default)}"
    facts = [f"NAME: {', '.join(names)}" if names else "", allowed(kind), needed if option.default is MISSING else default]
    text = "; ".join(fact for fact in facts if fact)
    name = f"--{option.name}.NAME" if names else f"--{option.name}"
    return row(name, f"{option.meaning} ({text})" if text else option.meaning, indent=indent)


def allowed(kind: Any) -> str:
    """The range or the choices of a type in words; nothing where it says itself what it takes."""
    if get_origin(kind) is Annotated:
        bounds = [part._replace(most=None) if isinstance(part, Range) and part.most == LARGEST else part
                  for part in get_args(kind)[1:] if not isinstance(part, Sets)]  # fmt: skip
        return "; ".join(filter(None, [allowed(get_args(kind)[0]), *map(str, bounds)]))
    if get_origin(kind) in (Union, types.UnionType):
        return allowed(next(part for part in get_args(kind) if part is not types.NoneType))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        return f"A,B,... {allowed(first)}".rstrip() if others == [Ellipsis] else f"{1 + len(others)} values"
    return {int: "whole number", float: "number"}.get(kind, "")


def shown(value: Any) -> str:
    """A default as one would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value}" or '""'
