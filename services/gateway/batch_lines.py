"""The lines of a batch's files: what they must be, and what is answered."""

import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from services.common.errors import MeshError
from services.gateway.decoding import decode, invalid

__all__ = ["MAX_LINES", "MAX_LINE_BYTES", "Line", "check_lines", "error_line", "line_of", "result_line"]

MAX_LINES: Final = 50_000
MAX_LINE_BYTES: Final = 4 << 20
_MAX_ERRORS: Final = 20


class Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One request of a batch."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Peek(msgspec.Struct):
    stream: bool | None = None


def line_of(raw: bytes) -> Line:
    """Decodes a line. Raises MeshError."""
    return decode(raw, Line)


def check_lines(lines: Iterator[bytes], endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """Checks a whole file; returns how many requests there are, and what is wrong, 20 errors at most."""
    seen: set[str] = set()
    errors: list[dict[str, Any]] = []
    total = 0
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        total += 1
        try:
            if total > MAX_LINES:
                raise invalid(None, f"more than {MAX_LINES} requests", "too_many_requests")
            _check_line(raw, endpoint, seen)
        except MeshError as error:
            errors.append({"code": error.code, "line": number, "message": error.message, "param": error.field})
            if len(errors) >= _MAX_ERRORS or total > MAX_LINES:
                break
    if total == 0:
        errors.append({"code": "empty_file", "line": None, "message": "the file has no requests", "param": None})
    return total, errors


def _check_line(raw: bytes, endpoint: str, seen: set[str]) -> None:
    if len(raw) > MAX_LINE_BYTES:
        raise invalid(None, f"the line is larger than {MAX_LINE_BYTES} bytes", "line_too_large")
    line = line_of(raw)
    if line.url != endpoint:
        raise invalid("url", f"url: expected {endpoint}, as the batch says", "mismatched_endpoint")
    if line.custom_id in seen:
        raise invalid("custom_id", f"custom_id: {line.custom_id[:64]!r} is there twice", "duplicate_custom_id")
    seen.add(line.custom_id)
    if decode(bytes(line.body), _Peek).stream:
        raise invalid("body.stream", "body.stream: a batch does not stream")


def result_line(line: Line, status: int, request_id: str, body: bytes) -> bytes:
    """What was answered to a line."""
    return _encode(line, {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}, None)


def error_line(line: Line, code: str, message: str) -> bytes:
    """Why a line was not asked."""
    return _encode(line, None, {"code": code, "message": message})


def _encode(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    name = f"batch_req_{uuid.uuid4().hex}"
    return msgspec.json.encode({"id": name, "custom_id": line.custom_id, "response": response, "error": error})
