"""What requests are checked with before the engine sees them: errors that name the field and its bound."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from services.common.errors import MeshError, Reason

__all__ = [
    "Range",
    "check_count",
    "check_decimal",
    "check_integer",
    "check_text",
    "check_texts",
    "check_token_ids",
    "invalid",
    "json_object",
]

_MAX_JSON_DEPTH: Final = 64


class Range(NamedTuple):
    """Numbers from `low` to `high`."""

    low: float
    high: float
    above_low: bool = False
    """Whether `low` itself is out."""


def invalid(field: str, message: str, code: str = "invalid_value") -> MeshError:
    """INVALID_REQUEST on a field, named by its path in the proto."""
    return MeshError(Reason.INVALID_REQUEST, f"{field}: {message}", field=field, code=code)


def check_decimal(field: str, value: float, bounds: Range) -> None:
    """Raises MeshError unless `value` is a number within the bounds."""
    if math.isnan(value):
        raise invalid(field, "must be a number")
    if value < bounds.low or (bounds.above_low and value == bounds.low):
        least = f"above {bounds.low:g}" if bounds.above_low else f"at least {bounds.low:g}"
        raise invalid(field, f"must be {least}", "decimal_below_min_value")
    if value > bounds.high:
        raise invalid(field, f"must be at most {bounds.high:g}", "decimal_above_max_value")


def check_integer(field: str, value: int, *, low: int = 0, high: int) -> None:
    """Raises MeshError unless `value` is `low` to `high`."""
    if value < low:
        raise invalid(field, f"must be at least {low}", "integer_below_min_value")
    if value > high:
        raise invalid(field, f"must be at most {high}", "integer_above_max_value")


def check_count(field: str, entries: Sequence[Any], most: int, of_what: str) -> None:
    """Raises MeshError when there are more than `most` entries."""
    if len(entries) > most:
        raise invalid(field, f"at most {most} {of_what}", "array_above_max_length")


def check_text(field: str, text: str, most: int, *, least: int = 0) -> None:
    """Raises MeshError unless the text has `least` to `most` characters."""
    if len(text) < least:
        raise invalid(field, "must not be empty")
    if len(text) > most:
        raise invalid(field, f"at most {most} characters", "string_above_max_length")


def check_texts(field: str, texts: Sequence[str], *, most: int, characters: int) -> None:
    """Raises MeshError unless there are at most `most` texts, each of one to `characters` characters."""
    check_count(field, texts, most, "strings")
    for index, text in enumerate(texts):
        check_text(f"{field}[{index}]", text, characters, least=1)


def check_token_ids(field: str, token_ids: Iterable[int], vocabulary: int) -> None:
    """Raises MeshError, with the entry's index, when a token is not in the vocabulary; its size 0 is not known."""
    # Most prompts are fine, and max() doesn't run Python code for each token.
    if not vocabulary or max(token_ids, default=0) < vocabulary:
        return
    index, token_id = next((i, token) for i, token in enumerate(token_ids) if token >= vocabulary)
    raise invalid(f"{field}[{index}]", f"{token_id} is not below the vocabulary's size, {vocabulary}")


def json_object(field: str, text: str, most: int) -> dict[str, Any]:
    """The JSON object that a text of at most `most` bytes is, nested 64 deep at most; raises MeshError."""
    if len(text.encode()) > most:
        raise invalid(field, f"at most {most} bytes", "string_above_max_length")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise invalid(field, f"nested more than {_MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise invalid(field, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(field, "must be a JSON object")
    if _depth_exceeds(value, _MAX_JSON_DEPTH):
        raise invalid(field, f"nested more than {_MAX_JSON_DEPTH} deep")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
