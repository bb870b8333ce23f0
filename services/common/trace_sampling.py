"""Which traces are kept: what was sampled, and of the others what failed, moved or was slow."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from opentelemetry.trace import StatusCode

from services.common.trace_spans import Recorded

__all__ = ["FAILOVER", "Keeper"]

FAILOVER: Final = "failover"
"""The event of a span whose request moved to another worker."""
_MOST_TRACES: Final = 1024
_MOST_SPANS: Final = 64


class Keeper:
    """Sends sampled spans on at once. Of other traces it holds the spans until this process's part of the request is
    over, and sends them on if anything in it failed or moved, or it was slow.

    Each process judges by what it sees itself: of a request that only one of them found notable, the others keep
    nothing.
    """

    def __init__(self, send: Callable[[Recorded], object], *, slow_seconds: float) -> None:
        """`send` gets what is kept; `slow_seconds`: a request that took as long is."""
        self._send = send
        self._slow_ns = slow_seconds * 1e9
        self._held: OrderedDict[bytes, list[Recorded]] = OrderedDict()
        self._lock = threading.Lock()

    def on_end(self, span: Recorded) -> None:
        """A span is over."""
        if span.trace.is_sampled:
            self._send(span)
            return
        is_last = not span.parent_id or span.parent_is_remote
        for kept in self._judged(span.trace.id, span, is_last=is_last):
            self._send(kept)

    def _judged(self, trace_id: bytes, span: Recorded, *, is_last: bool) -> Iterable[Recorded]:
        with self._lock:
            if not is_last:
                held = self._held.setdefault(trace_id, [])
                if len(held) < _MOST_SPANS:
                    held.append(span)
                if len(self._held) > _MOST_TRACES:
                    self._held.popitem(last=False)
                return ()
            spans = [*self._held.pop(trace_id, ()), span]
        return spans if self._is_slow(span) or any(map(_is_notable, spans)) else ()

    def _is_slow(self, span: Recorded) -> bool:
        return span.end_time - span.start_time >= self._slow_ns


def _is_notable(span: Recorded) -> bool:
    failed = span.status is not None and span.status.status_code is StatusCode.ERROR
    return failed or any(name == FAILOVER for _, name, _ in span.events)
