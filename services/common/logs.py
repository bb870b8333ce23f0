"""Logs as JSON lines on standard output: one object a record, with the trace it belongs to."""

import json
import logging
import sys
import time
import traceback
from functools import lru_cache
from typing import Any

import msgspec
from opentelemetry import trace

__all__ = ["JsonFormatter", "setup"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


@lru_cache(maxsize=2)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; what was passed as `extra` becomes keys of their own."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """One line, without a line break."""
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = f"{span.trace_id:032x}"
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:  # half of a surrogate pair, which only json writes, as an escape
            return json.dumps(line, default=str)


def setup(service: str, *, level: str = "info") -> None:
    """Sends every log record of this process to standard output as JSON lines."""
    # What no line tells need not be found out for each: half of what a line costs.
    logging._srcfile = None  # as the documentation of logging advises
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
