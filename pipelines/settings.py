"""A configuration read from TOML and `--set`, validated with pydantic, and written back.

A file overrides the defaults or the file that it names as its `base`, `--set key=value` overrides the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from manifold_defense.hardening import OBJECTIVES
from pipelines.config import Config, HardenConfig


class ConfigError(Exception):
    """One line that names the file or option, the key, and what was expected."""


def load_config(file: Path | None = None, settings: Iterable[str] = (), run: str | None = None) -> Config:
    """Defaults, overridden by a TOML file, by `key=value` settings and by the run's name.

    Raises ConfigError for anything unknown, mistyped or out of range.
    """
    values = {} if file is None else _read(file)
    values.setdefault("harden", [{"name": HardenConfig.name}])  # settings may call the default by its name
    fault: ConfigError | None = None
    for setting in settings:
        _apply(values, setting)
        try:
            _validate(values, f"--set {setting}")
            fault = None
        except ConfigError as error:
            fault = fault or error  # a later setting may be what this one lacks
    if fault is not None:
        raise fault
    if run is not None:
        values["run"] = run
    return _validate(values, f"--run {run}" if run is not None else "defaults")


def is_given(key: str, file: Path | None, settings: Iterable[str]) -> bool:
    """Whether such a file, what it is built on, or one of these settings names the dotted `key`."""
    values: Any = {} if file is None else _read(file)
    for setting in settings:
        _apply(values, setting)
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values is not None


def _read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a file over those of its `base`, a file named as seen from its own folder."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    base = values.pop("base", "")
    if not isinstance(base, str):
        raise ConfigError(f"{file}: base: expected text in quotes, got {base!r}")
    if base:
        above = (*above, file.resolve())
        if (file.parent / base).resolve() in above:
            raise ConfigError(f"{file}: base: expected a file that is not built on this one, got {base}")
        values = _over(_read(file.parent / base, above), values)
    _validate(values, str(file))
    return values


def _over(below: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key; an array of tables, and a table with a name, replace what is below whole."""
    merged = dict(below)
    for key, value in values.items():
        under = below.get(key)
        if isinstance(value, dict) and isinstance(under, dict) and "name" not in value:
            value = _over(under, value)
        merged[key] = value
    return merged


def _tables(path: str) -> Any:
    """What settings of the dotted `path.` change where nothing is given: the tables of a default array."""
    value: Any = Config()
    for part in path.split(".")[:-1]:
        value = getattr(value, part, None)
    arrays = isinstance(value, tuple) and value and all(dataclasses.is_dataclass(entry) for entry in value)
    return [dataclasses.asdict(entry) for entry in value] if arrays else {}


def _apply(values: dict[str, Any], setting: str) -> None:
    """Write `a.b=value` into nested tables; the value is TOML, or a bare string."""
    key, equals, text = setting.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as gan.images=200_000")
    *tables, last = key.strip().split(".")
    path = ""
    while tables:
        table = tables.pop(0)
        path += f"{table}."
        inner = values.setdefault(table, _tables(path) if tables else {})
        if isinstance(inner, list) and all(isinstance(entry, dict) for entry in inner):
            # One table of an array goes by its name, or by its number; an only one need not be named.
            chosen = [e for i, e in enumerate(inner) if tables and tables[0] in (e.get("name"), str(i))]
            names = ", ".join(str(entry.get("name", i)) for i, entry in enumerate(inner))
            if chosen:
                tables.pop(0)
            elif len(inner) != 1:
                raise ConfigError(f"--set {setting}: {table} has several tables; expected one of {names}")
            elif tables and not _is_key(path, tables[0]):
                raise ConfigError(
                    f"--set {setting}: {table} has neither table nor key {tables[0]}; its table is {names}"
                )
            inner = (chosen or inner)[0]
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting}: {table} is not a table")
        values = inner
    try:
        values[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.lstrip().startswith(("[", "{")):
            raise ConfigError(f"--set {setting}: not TOML: {error}") from None
        values[last] = text


def _is_key(path: str, name: str) -> bool:
    """Whether tables at `path`, which ends with a dot, have such a key; True if none of theirs is known."""
    known = {key.removeprefix(path).split(".")[0] for key in known_keys() if key.startswith(path)}
    return not known or name in known


# What pydantic's words for a value of another kind mean to who writes TOML.
_SHAPES = {
    "string_type": "text in quotes",
    "path_type": "text in quotes",
    "tuple_type": "a list, [...]",
    "dataclass_type": "a table, {...}",
}


@cache
def _schema() -> TypeAdapter[Config]:
    """Built when first asked for: it takes longer than all that it then validates."""
    return TypeAdapter(Config)


def _validate(values: dict[str, Any], source: str) -> Config:
    try:
        config = _schema().validate_python(_filled(values, Config()))
    except ValidationError as error:
        # All problems of a file at once would be several lines; the first one is where to begin.
        raise ConfigError(f"{source}: {_explain(error.errors()[0])}") from None
    for key, kind, got in _truths(values, config):
        raise ConfigError(f"{source}: {key}: expected {kind}, got {got}")
    return config


def _filled(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """A table with what it does not say, as the default configuration has it: a key set changes that key.

    Arrays of tables and tables with a name, which may be of another kind, are those of their own.
    """
    known = {item.name: getattr(default, item.name) for item in dataclasses.fields(default)}
    filled = dict(values)
    for name, value in known.items():
        given = values.get(name, value)
        if isinstance(given, dict) and dataclasses.is_dataclass(value) and "name" not in given:
            filled[name] = _filled(given, value)
        else:
            filled[name] = given
    return filled


def _truths(given: Any, read: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Where true or false stands for a number, or a number for them, and what kind of value is expected."""
    if isinstance(given, bool | int | float) and isinstance(given, bool) != isinstance(read, bool):
        if isinstance(read, bool):
            yield key, "true or false", repr(given)
        else:
            yield key, type(read).__name__, "a truth value"
    elif isinstance(given, dict) and dataclasses.is_dataclass(read):
        for name, value in given.items():
            yield from _truths(value, getattr(read, name), f"{key}.{name}".lstrip("."))
    elif isinstance(given, list) and isinstance(read, tuple):
        for i, (value, entry) in enumerate(zip(given, read, strict=True)):
            yield from _truths(value, entry, f"{key}.{i}")
    elif isinstance(given, dict) and isinstance(read, tuple):  # a table that stands for an array of one
        yield from _truths(given, read[0], key)


def _explain(problem: Any) -> str:
    # Neither the number of a table nor which of several kinds it was read as is part of a key.
    kinds = [kind.name for kind in OBJECTIVES]
    loc = problem["loc"]
    key = ".".join(
        str(part)
        for before, part in zip(("", *loc), loc, strict=False)
        if before != "objective" or part not in kinds
    )
    if problem["type"] == "unexpected_keyword_argument":
        plain = ".".join(part for part in key.split(".") if not part.isdigit())
        close = difflib.get_close_matches(plain, known_keys(), n=1)
        return f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else "")
    if problem["type"] in _SHAPES:
        return f"{key}: expected {_SHAPES[problem['type']]}, got {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def known_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Dotted names of all keys, tables included."""
    instance = kind() if isinstance(kind, type) else kind
    keys = []
    for item in dataclasses.fields(instance):
        name = f"{prefix}{item.name}"
        keys.append(name)
        value = getattr(instance, item.name)
        if isinstance(value, tuple) and value:
            value = value[0]
        if dataclasses.is_dataclass(value):
            keys += known_keys(value, f"{name}.")
    return keys


def to_toml(config: Any, table: str = "", *, explain: bool = False) -> str:
    """A resolved configuration as TOML that `load_config` reads back to the same value.

    With `explain` a comment says what each key means; of an array of tables, in the first.
    """
    scalars, tables = [], []
    known = meanings(type(config)) if explain else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{table}.{item.name}" if table else item.name
        comment = "".join(f"# {line}\n" for line in known.get(item.name, ()))
        if dataclasses.is_dataclass(value):
            tables.append(f"\n{comment}[{name}]\n{to_toml(value, name, explain=explain)}")
        elif value is None:
            continue
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, entry in enumerate(value):
                entries = to_toml(entry, name, explain=explain and i == 0)
                tables.append(f"\n{'' if i else comment}[[{name}]]\n{entries}")
        else:
            scalars.append(f"{comment}{item.name} = {_toml_value(value)}\n")
    return "".join(scalars + tables)


def meanings(kind: type) -> dict[str, list[str]]:
    """What the docstrings of a dataclass say of its fields, a field's lines under its name."""
    fields = {item.name for item in dataclasses.fields(kind)}
    found: dict[str, list[str]] = {}
    for owner in reversed(kind.__mro__):
        lines: list[str] | None = None
        for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
            name, gap, text = line.partition("  ")
            if name in fields and gap:
                lines = found[name] = [text.strip()]
            elif lines is not None and line.startswith("   "):
                lines.append(line.strip())
            else:
                lines = None
    return found


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
    return in_quotes(str(value))


def in_quotes(text: str) -> str:
    """Text as a value of TOML, which is escaped as in JSON, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
