"""A TOML file -> a frozen dataclass of frozen dataclasses, by their type hints."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """The configuration cannot be run; the message says what to type."""


def read(cls: Any, path: Path) -> Any:
    """The file as an instance of the dataclass ``cls``; keys that it lacks keep their defaults.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a wrong type or a missing key.
    """
    if not path.is_file():
        raise ConfigError(f"config: expected a TOML file, got {str(path)!r}, which does not exist.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    return _build(cls, data, where=str(path), prefix="")


def _build(cls: Any, data: dict[str, Any], *, where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5) or sorted(hints)
            hint = (
                f"Did you mean {prefix}{near[0]}?"
                if len(near) == 1
                else f"Valid: {', '.join(near)}."
            )
            raise ConfigError(f"{where}: unknown key {prefix}{key}. {hint}")
    values = {
        key: _convert(hints[key], value, where=where, name=f"{prefix}{key}")
        for key, value in data.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{where}: {prefix}{missing[0]} is missing. Add {missing[0]} = ... to the table."
        )
    return cls(**values)


def _convert(hint: Any, value: Any, *, where: str, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        lists = [arg for arg in args if typing.get_origin(arg) is tuple]
        chosen = lists[0] if lists and isinstance(value, list) else args[0]
        return _convert(chosen, value, where=where, name=name)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, where=where, prefix=f"{name}.")
    elif origin is tuple:
        if isinstance(value, list) and (args[-1] is Ellipsis or len(value) == len(args)):
            return tuple(
                _convert(args[0], item, where=where, name=f"{name}[{i}]")
                for i, item in enumerate(value)
            )
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    kind = {tuple: "a list"}.get(origin) or (
        "a table" if dataclasses.is_dataclass(hint) else hint.__name__
    )
    raise ConfigError(f"{where}: {name}: expected {kind}, got {value!r} ({type(value).__name__}).")
