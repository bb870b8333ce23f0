"""Prometheus metrics of a process, on a port of their own that the edge never routes; pushed as well where wanted."""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from selectors import EVENT_READ, DefaultSelector
from socket import socket, socketpair
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from opentelemetry import trace
from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from services.common.metrics_push import pushed
from services.common.settings import ProcessSettings
from services.common.trace_export import SpanCounts
from services.common.trace_spans import Recorded

__all__ = [
    "OTHER",
    "QUEUE_SECONDS",
    "REQUEST_SECONDS",
    "TIME_PER_TOKEN_SECONDS",
    "TIME_TO_FIRST_TOKEN_SECONDS",
    "BoundedLabel",
    "Spread",
    "Tally",
    "exemplar_of",
    "serve_metrics",
]

# Upper bounds of histograms, made for language models. OpenTelemetry's GenAI conventions name the same ones, but for
# the ends: small models answer faster, and prompts wait in queues.
TIME_TO_FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)  # fmt: skip
TIME_PER_TOKEN_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
REQUEST_SECONDS: Final = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12),
    *(10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36),
)
QUEUE_SECONDS: Final = (0.0005, 0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)

OTHER: Final = "other"
"""The value of a label that has had too many different ones already."""

# When a series began is a series of its own, and nobody asks for it.
disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped upstream


class BoundedLabel:
    """Values of a label that come from outside: the first ones are told by name, what comes after them is "other"."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        """The label for a value."""
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value


class Tally(Collector):
    """A counter of what comes with every request: plain numbers until somebody asks for them, which take a tenth of the
    library's. Only one thread counts.
    """

    def __init__(self, name: str, meaning: str, *labels: str, registry: CollectorRegistry) -> None:
        self._name, self._meaning, self._labels = name, meaning, labels
        self._counts: dict[tuple[str, ...], float] = {}
        self._exemplars: dict[tuple[str, ...], Exemplar] = {}
        registry.register(self)

    def add(self, amount: float, *labels: str) -> None:
        """Counts for one series, which is there from then on."""
        self._counts[labels] = self._counts.get(labels, 0.0) + amount

    def mark(self, exemplar: dict[str, str], *labels: str) -> None:
        """Says of a series what leads to the last one that was counted."""
        self._exemplars[labels] = Exemplar(exemplar, 1.0, time.time())

    def collect(self) -> Iterable[Metric]:
        """One counter."""
        counter = CounterMetricFamily(self._name, self._meaning, labels=self._labels)
        for labels, count in self._counts.copy().items():
            counter.add_metric(labels, count, exemplar=self._exemplars.get(labels))
        yield counter


class _Series:
    """One series of a histogram."""

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.exemplars: list[tuple[dict[str, str], float, float] | None] = [None] * buckets
        self.total = 0.0


class Spread(Collector):
    """A histogram, as a Tally is a counter."""

    def __init__(
        self, name: str, meaning: str, buckets: Sequence[float], *labels: str, registry: CollectorRegistry
    ) -> None:
        """`buckets`: their upper bounds, in order; whatever is larger has one more."""
        self._name, self._meaning, self._labels = name, meaning, labels
        self._bounds = tuple(buckets)
        self._names = [*(repr(float(bound)) for bound in buckets), "+Inf"]
        # The only one of a histogram without labels is there from the beginning, as the library has it.
        self._series: dict[tuple[str, ...], _Series] = {} if labels else {(): _Series(len(self._names))}
        registry.register(self)

    def observe(self, value: float, exemplar: dict[str, str] | None, *labels: str) -> None:
        """Counts a value for one series; `exemplar` leads to where it was measured."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._names))
        bucket = bisect_left(self._bounds, value)
        series.counts[bucket] += 1
        series.total += value
        if exemplar is not None:
            series.exemplars[bucket] = (exemplar, value, time.time())

    def collect(self) -> Iterable[Metric]:
        """One histogram."""
        histogram = HistogramMetricFamily(self._name, self._meaning, labels=self._labels)
        for labels, series in self._series.copy().items():
            told = zip(self._names, accumulate(series.counts[:]), series.exemplars[:], strict=True)
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = [
                (name, count, Exemplar(*last)) if last else (name, count) for name, count, last in told
            ]
            histogram.add_metric(labels, buckets, series.total)
        yield histogram


def exemplar_of(span: Span | None = None) -> dict[str, str] | None:
    """What leads from a measurement to its trace, for `observe` and `inc`; None where that is not kept.

    Without a `span` it is the current one.
    """
    span = trace.get_current_span() if span is None else span
    if span is trace.INVALID_SPAN:
        return None
    if type(span) is Recorded:
        return span.trace.exemplar
    context = span.get_span_context()
    return {"trace_id": f"{context.trace_id:032x}"} if context.trace_flags.sampled else None


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is the base class's
        """Scrapes are not worth a line."""


@contextmanager
def serve_metrics(service: str, settings: ProcessSettings, registry: CollectorRegistry) -> Iterator[int]:
    """Serves `registry` and what the process takes of the machine at http://ADDRESS/metrics, also as OpenMetrics; and
    pushes it, if the settings say where to.

    Yields the port (useful when the settings ask for port 0).
    """
    ProcessCollector(registry=registry)
    registry.register(SpanCounts())
    host, _, port = settings.metrics.rpartition(":")
    with ExitStack() as stack:
        server = stack.enter_context(make_server(host, int(port), make_wsgi_app(registry), _Server, _SilentHandler))
        stack.enter_context(_serving(server))
        stack.enter_context(pushed(service, settings.name, settings.metrics_push, registry))
        yield server.server_port


@contextmanager
def _serving(server: WSGIServer) -> Iterator[None]:
    """Serves on a thread of its own, which sleeps until somebody asks: the standard library's looks up now and then."""
    stays, leaves = socketpair()
    thread = threading.Thread(target=_serve, args=(server, stays), name="metrics", daemon=True)
    thread.start()
    with stays:
        with leaves:
            yield
        thread.join(timeout=2)


def _serve(server: WSGIServer, until: socket) -> None:
    # Whoever asked may be gone again.
    server.timeout = 0
    with DefaultSelector() as selector:
        selector.register(server, EVENT_READ)
        selector.register(until, EVENT_READ)
        while all(key.fileobj is not until for key, _ in selector.select()):
            server.handle_request()
