"""A process's options as a TOML file: reading one, and writing the one that is in force.

A file is flat, `max-queue = 64`, with the names of the flags. What is misspelt or of the wrong type is
refused: an option that silently does nothing is found too late.
"""

from __future__ import annotations

import difflib
import json
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file, and the line if that is what is wrong."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def read_config_file(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Values by key; `kinds` are the keys there are and the types of their values."""
    values = load_toml(path)
    for key, value in values.items():
        check_key(key, kinds, str(path))
        values[key] = checked_value(value, kinds[key], f"{path}: {key}")
    return values


def check_key(key: str, known: Iterable[str], where: str) -> None:
    """Raises ConfigError naming the nearest known key, unless `key` is one."""
    known = list(known)
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ConfigError(f"{where}: there is no option {key!r}; {hint}")


def as_toml(values: Iterable[tuple[str, Any]]) -> str:
    """One line a key. What is not set has no form in TOML and becomes a comment."""
    lines = []
    for key, value in values:
        lines.append(f"# {key}: not set" if value is None else f"{key} = {_written(value)}")
    return "\n".join(lines) + "\n"


def checked_value(value: Any, kind: Any, where: str) -> Any:
    """`value` as the command line would have it. A size or a number may be meant where a text is taken."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{where} must be a list of texts")
        return value
    if isinstance(value, bool) != (kind is bool):
        fits = False
    elif kind is str:
        fits = isinstance(value, (str, int))
    elif kind is float:
        fits = isinstance(value, (int, float))
    else:
        fits = isinstance(value, str if kind is Path else kind)
    if not fits:
        raise ConfigError(f"{where} must be {_NAMES[kind]}, not {value!r}")
    return kind(value)


_NAMES = {str: "a text", Path: "a path", bool: "true or false", int: "a whole number", float: "a number"}


def _written(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    # A JSON string, without its escapes for what is not ASCII, is a basic string of TOML.
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(item) for item in value)}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
