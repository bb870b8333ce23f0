"""Log records as JSON lines."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from services.common.logs import JsonFormatter, setup


def line_of(message: str, *values: object, **more: Any) -> dict[str, Any]:
    record = logging.getLogger("test").makeRecord("test", logging.WARNING, "", 0, message, values, **more)
    record.created, record.msecs = 1_700_000_000.25, 250.0
    text = JsonFormatter("router").format(record)
    assert "\n" not in text
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def test_a_record_is_one_object() -> None:
    assert line_of("%s of %d", "two", 3, exc_info=None) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "service": "router",
        "logger": "test",
        "message": "two of 3",
    }


def test_what_is_passed_as_extra_becomes_keys() -> None:
    line = line_of("it", exc_info=None, extra={"worker": "w-0", "seconds": 1.5, "odd": Path("a")})

    assert (line["worker"], line["seconds"], line["odd"]) == ("w-0", 1.5, "a")


def test_an_exception_is_told_in_the_same_line() -> None:
    error = ValueError("not\nthis")

    line = line_of("it", exc_info=(ValueError, error, None))

    assert "ValueError: not\nthis" in line["exception"]


def test_line_breaks_and_other_alphabets_stay_in_one_line() -> None:
    assert line_of("a\nb\r日本", exc_info=None)["message"] == "a\nb\r日本"


def test_half_a_surrogate_pair_is_no_reason_to_lose_a_line() -> None:
    assert line_of("\ud83d", exc_info=None)["message"] == "\ud83d"


def test_a_record_inside_a_span_carries_its_trace() -> None:
    context = SpanContext(0x1234, 0x56, is_remote=False, trace_flags=TraceFlags(1))

    with trace.use_span(NonRecordingSpan(context)):
        line = line_of("it", exc_info=None)

    assert line["trace_id"] == f"{0x1234:032x}"
    assert "trace_id" not in line_of("it", exc_info=None)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    monkeypatch.setattr(logging, "_srcfile", logging._srcfile)
    root = logging.getLogger()
    handlers, level, factory = root.handlers[:], root.level, logging.getLogRecordFactory()
    yield root
    logging.setLogRecordFactory(factory)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_setup_sends_records_from_its_level_on_to_standard_output(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup("gateway", level="warning")

    root.info("no")
    logging.getLogger("deep.inside").warning("yes")

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["service"], line["logger"], line["message"]) for line in lines] == [("gateway", "deep.inside", "yes")]


def test_formatters_of_others_find_what_they_ask_records_for(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = vars(logging.makeLogRecord({})).keys()
    setup("gateway")
    (handler,) = root.handlers
    handler.setFormatter(logging.Formatter("|".join(f"%({field})s" for field in fields) + "|%(message)s"))

    logging.getLogger("somebody.else").warning("%s of %s", 1, 2)

    assert capsys.readouterr().out.endswith("|1 of 2\n")
