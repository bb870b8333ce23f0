"""The strict decoding of JSON bodies: what is wrong is refused with the field's name and OpenAI's code."""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, TypeVar

import msgspec

from services.common.errors import MeshError, Reason

__all__ = ["MAX_DEPTH", "check_depth", "check_schema", "decode", "invalid", "is_given"]

MAX_DEPTH: Final = 64
"""How deep free-form JSON, a schema for example, may be nested."""

_MAX_SCHEMA_BYTES: Final = 65_536
_LONG_BYTES: Final = 65_536
T = TypeVar("T")
_PATH: Final = re.compile(r" - at `(?:key in )?\$?\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `(?P<name>[^`]*)`")
_CODES: Final = (
    (re.compile(r"^Expected `(?:int|float|decimal)` (?:>=|>|<=|<) "), "out_of_range"),
    (re.compile(r"^Expected `array` of length >= "), "empty_array"),
    (re.compile(r"^Expected `array` of length <= "), "array_above_max_length"),
    (re.compile(r"^Expected `str` of length <= "), "string_above_max_length"),
    (re.compile(r"^Expected `object` of length <= "), "object_above_max_properties"),
    (re.compile(r"^Expected (?:.* got |`[^`]*`$)"), "invalid_type"),
    (re.compile(r"^Invalid enum value"), "invalid_value"),
)
_STRINGS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def decode(body: bytes, shape: type[T]) -> T:
    """Decodes a body strictly: no unknown and no repeated keys, no NaN, no lone surrogates, UTF-8 only.

    Raises:
        MeshError: INVALID_REQUEST with the field at fault and OpenAI's code.
    """
    try:
        if len(body) < _LONG_BYTES:
            return _decoded(body, shape)
        with _collecting_no_garbage():
            return _decoded(body, shape)
    except msgspec.ValidationError as error:
        raise _translated(str(error)) from None
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise MeshError(Reason.INVALID_REQUEST, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _decoded(body: bytes, shape: type[T]) -> T:
    decoded: T = _decoder(shape).decode(body)  # type: ignore[arg-type]  # a type is hashable
    _repeated.decode(body.decode())
    return decoded


def is_given(raw: msgspec.Raw) -> bool:
    """Whether there is free-form JSON; null means that there is none."""
    return bytes(raw) not in (b"", b"null")


def check_schema(raw: msgspec.Raw, field: str) -> None:
    """Refuses a JSON Schema that is too large, too deep, or none.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    encoded = bytes(raw)
    if len(encoded) > _MAX_SCHEMA_BYTES:
        raise invalid(field, f"{field}: larger than {_MAX_SCHEMA_BYTES} bytes", "string_above_max_length")
    if not encoded.lstrip().startswith(b"{"):
        raise invalid(field, f"{field}: expected a JSON Schema, an object", "invalid_type")
    check_depth(encoded, field)


def check_depth(raw: bytes, field: str) -> None:
    """Refuses free-form JSON that is nested too deeply.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    depth = 0
    for byte in _STRINGS.sub(b"", raw):
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise invalid(field, f"{field}: nested more than {MAX_DEPTH} deep")
        elif byte in b"]}":
            depth -= 1


def invalid(field: str | None, message: str, code: str = "invalid_value") -> MeshError:
    """A refusal that names the field."""
    return MeshError(Reason.INVALID_REQUEST, message, field=field, code=code)


@cache
def _decoder(shape: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(shape)


@contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    # Each of a million empty lists is looked at again and again while the next ones are made: of the seconds for which
    # a body could hold up everybody else, nine tenths go there.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    # The values are of no interest: what is decoded here is thrown away.
    if len(pairs) > 1 and len({key for key, _ in pairs}) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise invalid(repeated[:256], f"the key {repeated[:256]!r} is there twice", "duplicate_key")


_repeated: Final = json.JSONDecoder(object_pairs_hook=_refuse_repeated)


def _translated(message: str) -> MeshError:
    at = _PATH.search(message)
    path = at["path"] if at else ""
    what = message[: at.start()] if at else message
    if missing := _MISSING.search(what):
        field = f"{path}.{missing['name']}" if path else missing["name"]
        return invalid(field, f"missing required parameter: {field}", "missing_required_parameter")
    if unknown := _UNKNOWN.search(what):
        field = f"{path}.{unknown['name']}" if path else unknown["name"]
        return invalid(field, f"unknown parameter: {field}", "unknown_parameter")
    code = next((code for pattern, code in _CODES if pattern.search(what)), "invalid_value")
    if code == "out_of_range":
        code = _range_code(what)
    return invalid(path or None, f"{path or 'the body'}: {what[0].lower()}{what[1:]}", code)


def _range_code(what: str) -> str:
    kind = "integer" if "`int`" in what else "decimal"
    return f"{kind}_below_min_value" if ">" in what else f"{kind}_above_max_value"
