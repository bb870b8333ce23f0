"""Logs as JSON lines on standard output: one object a record, with the trace it belongs to."""

import asyncio
import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Final, TextIO

import msgspec
from opentelemetry import trace

from services.common.trace_spans import Recorded

__all__ = ["JsonFormatter", "setup", "trace_id_of"]

_LATER_SECONDS: Final = 0.05
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def trace_id_of(span: trace.Span) -> str:
    """As lines have it; empty where there is none."""
    if span is trace.INVALID_SPAN:
        return ""
    if type(span) is Recorded:
        return span.trace.id_text
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


@lru_cache(maxsize=2)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


# What others' formatters may ask for, and no line of ours tells.
_UNTOLD: Final = {
    **dict.fromkeys(("pathname", "filename", "module", "funcName"), ""),
    **dict.fromkeys(("exc_text", "stack_info", "thread", "threadName", "process", "processName", "taskName")),
    "relativeCreated": 0.0,
    "lineno": 0,
}


class _Record(logging.LogRecord):
    """A record that looks for nothing which lines do not tell: half of what a line costs."""

    def __init__(  # noqa: PLR0917  # the signature is the base class's
        self,
        name: str,
        level: int,
        pathname: str,  # noqa: ARG002
        lineno: int,  # noqa: ARG002
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,  # noqa: ARG002
        sinfo: str | None = None,
        **_: object,
    ) -> None:
        vars(self).update(_UNTOLD)
        self.name = name
        self.levelno, self.levelname = level, logging.getLevelName(level)
        self.msg, self.exc_info, self.stack_info = msg, exc_info, sinfo
        # As the base class has it, for messages with names in them.
        self.args = args[0] if args and len(args) == 1 and args[0] and isinstance(args[0], Mapping) else args
        self.created = time.time()
        self.msecs = self.created % 1 * 1000


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; what was passed as `extra` becomes keys of their own.

    Its trace is what `extra` has as `trace_id`, where it is there; empty: none.
    """

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
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if "trace_id" not in line:
            line["trace_id"] = trace_id_of(trace.get_current_span())
        if not line["trace_id"]:
            del line["trace_id"]
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:  # half of a surrogate pair, which only json writes, as an escape
            return json.dumps(line, default=str)


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines; those of the event loop's, unless they are warnings, a moment later and many at once.

    Each write is a system call, for which the loop would give everything else up.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._is_due = False

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record."""
        try:
            self._lines.append(self.format(record))
        except Exception:  # noqa: BLE001  # as logging's own handlers do
            self.handleError(record)
        if record.levelno > logging.INFO or not self._comes_soon():
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        with self.lock or nullcontext():
            self._is_due = False
            lines, self._lines = self._lines, []
            if lines:
                try:
                    self.stream.write("\n".join(lines) + "\n")
                    self.stream.flush()
                except Exception:  # noqa: BLE001  # as logging's own handlers do
                    self.handleError(logging.makeLogRecord({}))

    def _comes_soon(self) -> bool:
        if self._is_due:
            return True
        try:
            asyncio.get_running_loop().call_later(_LATER_SECONDS, self.flush)
        except RuntimeError:
            return False
        self._is_due = True
        return True


def setup(service: str, *, level: str = "info") -> None:
    """Sends every log record of this process to standard output as JSON lines."""
    # What no line tells need not be found out for each.
    logging._srcfile = None  # as the documentation of logging advises
    logging.setLogRecordFactory(_Record)
    handler = _LineHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # It tells of every request; workers before other servers ask these twice a second how they are.
    logging.getLogger("httpx").setLevel(max(root.level, logging.WARNING))
