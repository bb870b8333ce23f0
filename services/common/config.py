"""Reads a configuration file once, at the edge of a process, and says which key is wrong."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

__all__ = ["ConfigError", "convert", "load", "read"]

T = TypeVar("T")
_PATH_IN_MESSAGE = re.compile(r" - at `(?P<path>[^`]*)`$")


class ConfigError(ValueError):
    """A configuration can't be used. The message names the key, the value and what was expected."""


def load(path: Path, shape: type[T], *, over: Sequence[str] = ()) -> T:
    """Reads a YAML or JSON file into a msgspec Struct.

    `over`: texts that are known only where the process runs, such as its address, as `KEY=TEXT`.

    Raises:
        ConfigError: the file can't be read, isn't YAML, or doesn't have the shape.
    """
    raw = read(path)
    if over and isinstance(raw, dict):
        raw = {**raw, **dict(map(_setting, over))}
    return convert(raw, shape, where=str(path))


def _setting(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set: expected KEY=TEXT, got the value {text!r}")
    return key, value


def read(path: Path) -> Any:
    """What a YAML or JSON file says, as plain data; an empty file says {}.

    Raises:
        ConfigError: the file can't be read, or isn't YAML.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    return raw if raw is not None else {}


def convert(raw: object, shape: type[T], *, where: str) -> T:
    """Gives plain data a shape; `where` begins the message when it doesn't fit."""
    try:
        return msgspec.convert(raw, shape)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error), raw)}") from error


def _explain(message: str, raw: object) -> str:
    found = _PATH_IN_MESSAGE.search(message)
    if found is None:
        return f"{message}{_value_note('', raw)}"
    path = found["path"]
    what = message[: found.start()]
    return f"{path.removeprefix('$.').removeprefix('$') or 'the file'}: {what}{_value_note(path, raw)}"


def _value_note(path: str, raw: object) -> str:
    value: Any = raw
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return ""
    return "" if isinstance(value, dict | list) else f", got the value {value!r}"
