"""Configurations by name or file: `demo`, `demo:released`, `configs/demo.py`, `mine.py:small`.

In: what `--config` was given. Out: all settings as a mapping, those that the file leaves out at their defaults and
unchecked; `settings.from_config_dict` checks them. Those of the repository's configs/ are inside the package.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import traceback
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

from moextend_jax.config import MoextendError
from moextend_jax.folders import folder
from moextend_jax.settings import RunSettings, as_mapping, fields

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """The configurations of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def load(text: str) -> dict[str, Any]:
    """All settings of the configuration NAME[:argument].

    Raises:
      MoextendError: there is none, it does not take that argument, or it raises anything: it is a program.
    """
    name, given, argument = text.partition(":")
    path = _file(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
        _check_argument(get_config, [argument] if given else [], what=text)
        config = as_mapping(get_config(argument) if given else get_config())
        if not isinstance(config, Mapping):
            raise MoextendError(f"{path}: get_config returns no settings, but {config!r:.80}")
        return with_defaults(RunSettings, config)
    except MoextendError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else f"{path}"
        raise MoextendError(f"{where}: {type(error).__name__}: {error}") from error


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no known name is like it."""
    close = get_close_matches(name, [str(other) for other in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def with_defaults(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings and, of this class and the groups in it, those that have a default."""
    filled = dict(values)
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            filled.setdefault(field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            filled.setdefault(field.name, field.default_factory())
        if dataclasses.is_dataclass(part := fields(kind)[field.name]):
            group = filled.get(field.name, {})
            group = dataclasses.asdict(cast(Any, group)) if dataclasses.is_dataclass(group) else group
            filled[field.name] = with_defaults(part, group) if isinstance(group, Mapping) else group
    return filled


def _file(name: str) -> Path:
    """A file that is there, or one of the package's: `demo` and `configs/demo.py`, wherever one is."""
    path = folder(name)
    if path.suffix == ".py" and path.is_file():
        return path
    inside = FOLDER / f"{path.stem}.py"
    if name in (path.stem, f"configs/{path.name}") and inside.is_file():
        return inside
    raise MoextendError(
        f"there is no configuration {name}: no such file, and the package's are {', '.join(names())}"
        + meant(path.stem, names())
    )


def _check_argument(get_config: Any, arguments: list[str], *, what: str) -> None:
    """Holds it against a parameter that is written as `arg: Literal["paper", "released"]`."""
    parameters = list(inspect.signature(get_config).parameters)
    if arguments and not parameters:
        raise MoextendError(f"{what}: this configuration takes no argument")
    choices = get_args(typing.get_type_hints(get_config).get(parameters[0])) if arguments else ()
    if choices and arguments[0] not in choices:
        raise MoextendError(f"{what}: the arguments are {', '.join(choices)}{meant(arguments[0], choices)}")
