"""Which spans leave a process, and what it costs when nobody takes them."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

from services.common.trace_export import Exporter, Outbound, SpanCounts
from services.common.trace_sampling import FAILOVER, Head, Keeper
from services.common.tracing import context_from, traceparent_of
from tests.support.otlp import Receiver, otlp_receiver

TRACE = "0af7651916cd43dd8448eb211c80319c"
SLOW_SECONDS = 0.05


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as running:
        yield running


@contextmanager
def tracing(endpoint: str, *, ratio: float = 1.0) -> Iterator[tuple[Tracer, Outbound]]:
    """A provider as processes have it; on leaving what it kept has arrived."""
    outbound = Outbound(Exporter(endpoint))
    provider = TracerProvider(resource=Resource({"service.name": "test"}), sampler=Head(ratio), shutdown_on_exit=False)
    provider.add_span_processor(Keeper(outbound, slow_seconds=SLOW_SECONDS))
    try:
        yield provider.get_tracer("test"), outbound
    finally:
        outbound.close(within=2)


def counts() -> dict[str, float]:
    return {sample.labels["outcome"]: sample.value for metric in SpanCounts().collect() for sample in metric.samples}


def fail(span: Span) -> None:
    span.set_status(Status(StatusCode.ERROR, "broken"))


@pytest.mark.parametrize(
    ("number", "what", "is_kept"),
    [
        (1, lambda _: None, False),
        (2, fail, True),
        (3, lambda span: span.add_event(FAILOVER), True),
        (4, lambda _: time.sleep(1.2 * SLOW_SECONDS), True),
    ],
    ids=["fine", "failed", "moved", "slow"],
)
def test_of_what_is_not_sampled_that_is_kept_which_failed_moved_or_was_slow(
    receiver: Receiver, number: int, what: Callable[[Span], object], is_kept: bool
) -> None:
    trace_id = f"{number:032x}"
    with tracing(receiver.endpoint) as (tracer, _):
        context = context_from(f"00-{trace_id}-00f067aa0ba902b7-00")
        with tracer.start_as_current_span("request", context=context) as span:
            assert traceparent_of(span).endswith("-00")
            with tracer.start_as_current_span("part") as part:
                what(part)
    assert {span.name for span in receiver.trace(trace_id)} == ({"request", "part"} if is_kept else set())
    assert receiver.edges(trace_id) == ({("test: request", "test: part")} if is_kept else set())


def test_what_a_client_sampled_is_kept_whatever_the_share_is(receiver: Receiver) -> None:
    with tracing(receiver.endpoint, ratio=0.0) as (tracer, _):
        with tracer.start_as_current_span("request", context=context_from(f"00-{TRACE}-00f067aa0ba902b7-01")):
            pass
        with tracer.start_as_current_span("of nobody") as other:
            own = f"{other.get_span_context().trace_id:032x}"
    assert [span.name for span in receiver.trace(TRACE)] == ["request"]
    assert not receiver.trace(own)


def test_of_requests_that_never_end_the_oldest_are_forgotten(receiver: Receiver) -> None:
    with tracing(receiver.endpoint, ratio=0.0) as (tracer, _):
        roots = [tracer.start_span("open") for _ in range(1100)]
        for root in roots:
            tracer.start_span("inner", context=set_span_in_context(root)).end()
        for root in (roots[0], roots[-1]):
            fail(root)
            root.end()
    names = [[span.name for span in receiver.trace(f"{root.get_span_context().trace_id:032x}")] for root in roots]
    assert (names[0], names[-1]) == (["open"], ["inner", "open"])
    assert not any(names[1:-1])


def test_a_backend_that_never_answers_costs_a_bounded_queue_and_little_time_and_what_is_lost_is_counted() -> None:
    before = counts()
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(1)
        with tracing(f"127.0.0.1:{hole.getsockname()[1]}") as (tracer, _):
            began = time.perf_counter()
            for _ in range(20_000):
                tracer.start_span("request").end()
            took = time.perf_counter() - began
            closing = time.monotonic()
    assert time.monotonic() - closing < 3
    lost = {outcome: count - before[outcome] for outcome, count in counts().items()}
    assert lost["dropped"] >= 20_000 - 4096 - 512
    assert lost["exported"] == 0
    # As much as a span costs anyway.
    assert took / 20_000 < 200e-6


def test_what_a_backend_took_is_counted(receiver: Receiver) -> None:
    before = counts()
    with tracing(receiver.endpoint) as (tracer, _):
        for _ in range(700):
            tracer.start_span("request").end()
    lost = {outcome: count - before[outcome] for outcome, count in counts().items()}
    assert lost == {"exported": 700, "failed": 0, "dropped": 0}
