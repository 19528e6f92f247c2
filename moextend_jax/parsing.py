"""Words of a command line against what a command can be given (`options.py`): its options out, checked, or its help.

Hyphens and underscores are the same, so are `--name VALUE` and `--name=VALUE`; `--no_NAME` is false. Of two values for
one option the last counts, of a list all do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from moextend_jax.config import MoextendError
from moextend_jax.configurations import load, meant
from moextend_jax.folders import folder
from moextend_jax.options import MISSING, Sets, describe, is_list, kinds_of, options_of, places, settings_of
from moextend_jax.settings import NOUNS, RunSettings, fields, from_config_dict

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse(kind: Any, words: Sequence[str], *, command: str, does: str) -> Any:
    """The options of a command as an instance of the dataclass `kind`; the help, a string, where words ask for it.

    Raises:
      MoextendError: an option that is not there or is lacking; a value it cannot have; a broken configuration.
    """
    values, settings = {}, {}
    for name, value in _options(kind, words, command=command):
        if name.startswith("config."):
            settings[name.removeprefix("config.")] = value
        else:
            short = [part for part in get_args(fields(kind).get(name)) if isinstance(part, Sets)]
            if name in values and any(part.several for part in short):
                value = f"{values[name]},{value}"
            values[name] = values.get(name, ()) + value if is_list(fields(kind).get(name)) else value
            settings |= {path: value for part in short for path in part.settings}
    config = load(values["config"]) if "config" in values else None
    if "help" in values:
        return describe(kind, config, command=command, does=does)
    lacking = [option for option in options_of(kind) if option.default is MISSING and option.name not in values]
    if lacking:
        wanted = "; ".join(f"--{option.name}: {option.meaning}" for option in lacking)
        raise MoextendError(f"{command} needs {wanted}")
    if config is not None:
        values["config"] = from_config_dict(changed(config, settings))
    elif settings:
        raise MoextendError(f"{command}: --config.{next(iter(settings))} needs --config NAME, which it changes")
    return kind(**values)


@dataclasses.dataclass(frozen=True)
class _OfRun:
    config: RunSettings


def with_words(settings: RunSettings, words: Sequence[str], *, what: str) -> RunSettings:
    """The settings with others, each `SETTING=VALUE` as on a command line without `--config.`; `what` names them in
    messages."""
    given = _options(_OfRun, [f"--config.{word}" for word in words], command=what)
    changes = {name.removeprefix("config."): value for name, value in given}
    return from_config_dict(changed(dataclasses.asdict(settings), changes))


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with others at some paths, such as `align.steps`; a group that is None is begun."""
    copy = dict(settings)
    for path, value in changes.items():
        group, _, rest = path.partition(".")
        copy[group] = changed(copy.get(group) or {}, {rest: value}) if rest else value
    return copy


def _options(kind: Any, words: Sequence[str], *, command: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of every option and setting that is given, in order."""
    kinds = _kinds(kind)
    rest, seen, placed = list(words), set(), []
    while rest:
        word = rest.pop(0)
        name, equals, text = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        of, positive = _kind_of(name, kinds), name.removeprefix("no_")
        if word in ("-h", "--help"):
            yield "help", True
            continue
        if not word.startswith("-") or word == "-":
            placed.append(word)
            continue
        if of is None and kinds_of(_kind_of(positive, kinds)) == [bool] and not equals:
            name, of, texts = positive, _kind_of(positive, kinds), ["false"]
        elif not word.startswith("--") or of is None:
            elsewhere = getattr(kind, "elsewhere", {}).get(name)
            hint = f"; {elsewhere}" if elsewhere else meant(f"--{name}", [f"--{known}" for known in kinds])
            hint = hint or f"; see `moextend {command} --help`"
            raise MoextendError(f"{command}: there is no option {word.partition('=')[0]}{hint}")
        elif equals:
            texts = [text]
        elif kinds_of(of) == [bool]:
            texts = [rest.pop(0)] if rest and rest[0].lower() in ("true", "false") else ["true"]
        else:
            count = _words(of)
            texts, rest = rest[:count], rest[count:]
            if len(texts) < count or any(text.startswith("--") for text in texts):
                raise MoextendError(f"{command}: --{name} needs {'a value' if count == 1 else f'{count} values'}")
        seen.add(name)
        yield name, read(of, texts, what=f"{command}: --{name}")
    free = [place for place in places(kind) if place not in seen]
    for name, texts in _by_place(free, placed, kinds).items():
        if not name:
            raise MoextendError(f"{command}: {texts[0]!r} is no option; see `moextend {command} --help`")
        one = get_args(kinds[name])[0] if is_list(kinds[name]) else kinds[name]
        values = [read(one, [text], what=f"{command}: --{name}") for text in texts]
        yield name, tuple(values) if is_list(kinds[name]) else values[0]


def _by_place(names: Sequence[str], words: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, list[str]]:
    """Words by the names of the places in which they stand: one each, and of a list all that leave one for each other;
    words that no place is left for are under ""."""
    lists = [number for number, name in enumerate(names) if is_list(kinds[name])]
    before = lists[0] if lists else len(names)
    after = len(names) - before - 1 if lists else 0
    middle = max(before, len(words) - after) if lists else len(words)
    by_name = {name: [word] for name, word in zip(names, words[:before], strict=False)}
    if lists and words[before:middle]:
        by_name[names[before]] = list(words[before:middle])
    by_name |= {name: [word] for name, word in zip(names[before + 1 :], words[middle:], strict=False)}
    return by_name if lists or len(words) <= len(names) else by_name | {"": list(words[len(names) :])}


def _kinds(kind: Any) -> dict[str, Any]:
    """The type of every name that may be given."""
    kinds = {option.name: option.kind for option in options_of(kind)}
    for option in settings_of() if "config" in kinds else ():
        below = {f"{option.name}.{name}": get_args(option.kind)[1] for name in option.names}
        kinds |= below or {option.name: option.kind}
    return kinds


def _kind_of(name: str, kinds: Mapping[str, Any]) -> Any:
    """The type of an option or a setting, also inside a table whose names a configuration chooses, as
    `config.extensions.NAME.finetune.steps`; None where there is none of that name."""
    if name in kinds or not name.startswith("config.") or "config" not in kinds:
        return kinds.get(name)
    kind, path = RunSettings, "config"
    for part in name.split(".")[1:]:
        # A table that has names by default has no others.
        if get_origin(kind) is Mapping and not any(known.startswith(f"{path}.") for known in kinds):
            kind = get_args(kind)[1]
        elif dataclasses.is_dataclass(kind) and part in fields(cast(type, kind)):
            kind = kinds_of(fields(cast(type, kind))[part])[0]
        else:
            return None
        path = f"{path}.{part}"
    return None if dataclasses.is_dataclass(kind) or get_origin(kind) is Mapping else kind


def _words(kind: Any) -> int:
    """Words that follow an option: one for each of a pair, one for anything else."""
    kind = kinds_of(kind)[0]
    if get_origin(kind) is Annotated:
        return _words(get_args(kind)[0])
    return len(get_args(kind)) if get_origin(kind) is tuple and get_args(kind)[-1] is not Ellipsis else 1


def _parts(text: str) -> list[str]:
    """Those of a,b or ("a", "b"); in NAME=VALUE a comma begins a new part only before another NAME=."""
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    parts = re.split(r",(?=[^,=]*=)" if "=" in inner else ",", inner)
    return [part.strip(" '\"") for part in parts if part.strip()]


def read(kind: Any, texts: Sequence[str], *, what: str) -> Any:
    """The value of a type that texts stand for: several those of a tuple, which may be one text with commas, too.

    Raises:
      MoextendError: there is none, or it is outside the type's range.
    """
    *others, kind = kinds_of(kind)
    for other in others:
        with contextlib.suppress(MoextendError):  # what is none of them is said to be none of the last
            return read(other, texts, what=what)
    origin, arguments, text = get_origin(kind), get_args(kind), " ".join(texts)
    if origin is Annotated:
        value = read(arguments[0], texts, what=what)
        for bounds in arguments[1:]:
            if not isinstance(bounds, Sets):
                bounds.check(value, what=what)
        return value
    if origin is Literal:
        choices = {str(choice): choice for choice in arguments}
        if text not in choices:
            raise MoextendError(f"{what} = {text!r} is not one of {', '.join(choices)}{meant(text, choices)}")
        return choices[text]
    if origin is tuple:
        if len(texts) == 1 and arguments != (Path, ...):  # names of files may have commas
            texts = _parts(text.strip())
        parts = arguments[:1] * len(texts) if arguments[-1] is Ellipsis else arguments
        if len(parts) != len(texts):
            raise MoextendError(f"{what} = {text!r} must be {len(parts)} values")
        return tuple(read(part, [text], what=what) for part, text in zip(parts, texts, strict=True))
    if origin is Mapping:
        if text.strip() == "{}":
            return {}
        option = what.rpartition(" ")[2]
        raise MoextendError(f"{what} holds values by name: set them one by one, {option}.NAME=VALUE, or {option}={{}}")
    if kind is RunSettings:  # which is loaded when all that changes it is known
        return text
    if kind is Path:
        return folder(text)
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise MoextendError(f"{what} = {text!r} must be {NOUNS.get(kind, kind.__name__)}") from None
