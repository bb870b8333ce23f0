"""Which spans leave a process, what they look like on the way, and what it costs when nobody takes them."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from services.common import trace_words
from services.common.trace_export import Outbound, SpanCounts
from services.common.trace_sampling import FAILOVER, Keeper
from services.common.trace_spans import Provider, Recorded
from services.common.trace_wire import export_request, resource_message
from services.common.tracing import context_from, traceparent_of
from tests.support.otlp import Receiver, otlp_receiver

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
SLOW_SECONDS = 0.05
RESOURCE = {"service.name": "test"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as running:
        yield running


@contextmanager
def tracing(endpoint: str, *, ratio: float = 1.0) -> Iterator[Tracer]:
    """A provider as processes have it; on leaving what it kept has arrived."""
    outbound = Outbound(endpoint, RESOURCE)
    try:
        yield Provider(ratio, Keeper(outbound.send, slow_seconds=SLOW_SECONDS).on_end, outbound.admits).get_tracer(
            "test"
        )
    finally:
        outbound.close(within=2)


def counts() -> dict[str, float]:
    return {sample.labels["outcome"]: sample.value for metric in SpanCounts().collect() for sample in metric.samples}


def lost_since(before: dict[str, float]) -> dict[str, float]:
    return {outcome: count - before[outcome] for outcome, count in counts().items()}


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
    with tracing(receiver.endpoint) as tracer:
        context = context_from(f"00-{trace_id}-00f067aa0ba902b7-00")
        with tracer.start_as_current_span("request", context=context) as span:
            assert traceparent_of(span).endswith("-00")
            with tracer.start_as_current_span("part") as part:
                what(part)
    assert {span.name for span in receiver.trace(trace_id)} == ({"request", "part"} if is_kept else set())
    assert receiver.edges(trace_id) == ({("test: request", "test: part")} if is_kept else set())


def test_what_a_client_sampled_is_kept_whatever_the_share_is(receiver: Receiver) -> None:
    with tracing(receiver.endpoint, ratio=0.0) as tracer:
        with tracer.start_as_current_span("request", context=context_from(PARENT)):
            pass
        with tracer.start_as_current_span("of nobody") as other:
            own = f"{other.get_span_context().trace_id:032x}"
    assert [span.name for span in receiver.trace(TRACE)] == ["request"]
    assert not receiver.trace(own)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_of_traces_that_begin_here_the_share_is_sampled_that_was_asked_for(ratio: float) -> None:
    tracer = Provider(ratio, lambda _: None).get_tracer("test")
    sampled = sum(tracer.start_span("root").get_span_context().trace_flags.sampled for _ in range(4000))
    assert abs(sampled / 4000 - ratio) < 0.05
    assert ratio not in (0.0, 1.0) or sampled == 4000 * ratio


def test_of_requests_that_never_end_the_oldest_are_forgotten(receiver: Receiver) -> None:
    with tracing(receiver.endpoint, ratio=0.0) as tracer:
        roots = [tracer.start_span("open") for _ in range(1100)]
        for root in roots:
            tracer.start_span("inner", context=set_span_in_context(root)).end()
        for root in (roots[0], roots[-1]):
            fail(root)
            root.end()
    names = [[span.name for span in receiver.trace(f"{root.get_span_context().trace_id:032x}")] for root in roots]
    assert (names[0], names[-1]) == (["open"], ["inner", "open"])
    assert not any(names[1:-1])


class FixedIds(IdGenerator):
    """The same ids for everybody."""

    def generate_span_id(self) -> int:
        return 0x1122334455667788

    def generate_trace_id(self) -> int:
        return 0xAB


class BrokenError(Exception):
    """What breaks a span."""


def live(tracer: Tracer) -> None:
    """The life of a span, with all that a span can have."""
    context = context_from(PARENT, "vendor=a,other=b")
    span = tracer.start_span("first", context, SpanKind.CLIENT, {"asked": True, "empty": ""}, start_time=7)
    span.set_attribute("text", "ä" * 300)
    span.set_attributes({"count": 3, "negative": -5, "large": 1 << 62, "share": 0.25, "reasons": ["a", "b"], "no": []})
    span.set_attributes({"truths": [True, False], "numbers": [1, 2], "shares": [0.5]})
    span.add_event("first token", timestamp=9)
    span.add_event("failover", {"worker": "w"}, timestamp=10)
    span.update_name("second")
    span.set_status(Status(StatusCode.ERROR, "it broke"))
    span.end(11)
    span.set_attribute("too", "late")
    span.add_event("too late")
    span.update_name("too late")
    span.end(12)


@pytest.mark.filterwarnings("ignore")  # the library warns of what comes after a span's end
def test_a_span_on_the_wire_is_what_opentelemetrys_own_library_makes_of_it() -> None:
    kept, spans = InMemorySpanExporter(), list[Recorded]()
    resource = Resource({"service.name": "test", "host": "h" * 200})
    theirs = TracerProvider(resource=resource, id_generator=FixedIds(), shutdown_on_exit=False)
    theirs.add_span_processor(SimpleSpanProcessor(kept))
    live(theirs.get_tracer("scope"))
    live(Provider(1.0, spans.append).get_tracer("scope"))
    ours = ExportTraceServiceRequest.FromString(export_request(resource_message(resource.attributes), spans))
    ours.resource_spans[0].scope_spans[0].spans[0].span_id = FixedIds().generate_span_id().to_bytes(8, "big")
    assert ours == encode_spans(kept.get_finished_spans())


def test_values_of_one_name_that_are_equal_in_python_are_told_apart_on_the_wire() -> None:
    values: list[AttributeValue] = [1, True, 1.0, "1", 0, False, 0.0, "", 255, 256, -1, ["1"], ["1", "b"], [1], [True]]
    kept, spans = InMemorySpanExporter(), list[Recorded]()
    theirs = TracerProvider(shutdown_on_exit=False)
    theirs.add_span_processor(SimpleSpanProcessor(kept))
    # Twice, since what is known is not written anew.
    for tracer in (theirs.get_tracer("scope"), Provider(1.0, spans.append).get_tracer("scope")):
        for value in values * 2:
            tracer.start_span("a", attributes={"same": value}).end()
    ours = ExportTraceServiceRequest.FromString(export_request(b"", spans))
    told = [
        [span.attributes[0].value for span in request.resource_spans[0].scope_spans[0].spans]
        for request in (ours, encode_spans(kept.get_finished_spans()))
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("\ud800 half a pair", "? half a pair"),
        (1 << 70, 0),
        ({"a": 1}, "{'a': 1}"),
        (None, "None"),
    ],
)
def test_a_value_that_the_wire_has_no_form_for_spoils_nothing(value: Any, told: Any) -> None:
    spans = list[Recorded]()
    Provider(1.0, spans.append).get_tracer("test").start_span("a", attributes={"odd": value, "fine": "yes"}).end()
    request = ExportTraceServiceRequest.FromString(export_request(resource_message(RESOURCE), spans))
    (span,) = request.resource_spans[0].scope_spans[0].spans
    pairs = {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "") for pair in span.attributes}
    assert pairs == {"odd": told, "fine": "yes"}


def test_what_is_said_together_is_on_the_wire_as_if_it_were_set_one_by_one_and_said_again_counts_once() -> None:
    def answered(model: str, tokens: int) -> bytes:
        told = trace_words.said({"model": model, "reasons": ("stop", "length"), "none": ()})
        return told + trace_words.number("tokens", tokens) + trace_words.fraction("seconds", 0.5)

    spans = list[Recorded]()
    for says in (True, False):
        span = Provider(1.0, spans.append).get_tracer("test").start_span("a", attributes={"id": "ä"})
        assert isinstance(span, Recorded)
        if says:
            span.say(answered, "before", -1)
            span.say(answered, "after", 1 << 40)
            span.say(partial(trace_words.text, "text"), "\ud800" * 200)
        else:
            span.set_attributes({"model": "after", "reasons": ("stop", "length"), "none": (), "tokens": 1 << 40})
            span.set_attributes({"seconds": 0.5, "text": "\ud800" * 200})
        span.end()
        span.say(answered, "too late", 0)
    request = ExportTraceServiceRequest.FromString(export_request(resource_message(RESOURCE), spans))
    said, one_by_one = (
        sorted((pair.key, pair.value.SerializeToString()) for pair in span.attributes)
        for span in request.resource_spans[0].scope_spans[0].spans
    )
    assert said == one_by_one
    assert len(said) == 7


def test_what_fails_in_a_span_is_told_by_it_unless_that_is_not_wanted() -> None:
    spans = list[Recorded]()
    tracer = Provider(1.0, spans.append).get_tracer("test")
    with pytest.raises(BrokenError), tracer.start_as_current_span("told"):
        raise BrokenError("why")
    quiet = tracer.start_as_current_span("quiet", record_exception=False, set_status_on_exception=False)
    with pytest.raises(BrokenError), quiet:
        raise BrokenError("why")
    told, quietly = spans
    assert told.status is not None
    assert (told.status.status_code, told.status.description) == (StatusCode.ERROR, "BrokenError: why")
    ((_, name, attributes),) = told.events
    assert (name, attributes["exception.message"]) == ("exception", "why")
    assert (quietly.status, quietly.events) == (None, ())
    assert not trace.get_current_span().is_recording()


@pytest.mark.parametrize(
    "header",
    ["", "00-abc", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"ff-{TRACE}-00f067aa0ba902b7-01", PARENT.upper(), PARENT * 9],
)
def test_a_header_that_is_none_begins_a_trace_of_its_own(header: str) -> None:
    span = Provider(1.0, lambda _: None).get_tracer("test").start_span("a", context_from(header))
    assert isinstance(span, Recorded)
    assert span.parent is None
    assert span.context.trace_id != int(TRACE, 16)


def test_a_backend_that_never_answers_costs_a_bounded_queue_and_little_time_and_what_is_lost_is_counted() -> None:
    before = counts()
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(1)
        with tracing(f"127.0.0.1:{hole.getsockname()[1]}") as tracer:
            began = time.perf_counter()
            for _ in range(20_000):
                tracer.start_span("request").end()
            took = time.perf_counter() - began
            closing = time.monotonic()
    assert time.monotonic() - closing < 3
    lost = lost_since(before)
    assert lost["dropped"] >= 20_000 - 4096 - 512
    assert lost["exported"] == 0
    assert lost["dropped"] + lost["failed"] == 20_000
    # As much as a span costs anyway.
    assert took / 20_000 < 50e-6


def test_a_span_that_could_not_be_sent_is_not_recorded_and_leaves_its_children_to_its_parent() -> None:
    spans, room = list[Recorded](), [True, False, True]
    tracer = Provider(1.0, spans.append, lambda: room.pop(0)).get_tracer("test")
    with tracer.start_as_current_span("outer"), tracer.start_as_current_span("none") as none:
        assert not none.is_recording()
        tracer.start_span("inner").end()
    inner, outer = spans
    assert inner.parent == outer.context
    assert traceparent_of(none) == traceparent_of(outer)


def test_what_ends_while_the_backend_is_away_for_a_moment_arrives_when_it_is_back() -> None:
    with otlp_receiver() as gone:
        endpoint = gone.endpoint
    with tracing(endpoint) as tracer:
        with tracer.start_as_current_span("before", context=context_from(PARENT)):
            pass
        time.sleep(0.8)  # until it was offered in vain
        with otlp_receiver(endpoint) as back:
            tracer.start_span("after", context_from(PARENT)).end()
            back.wait_for(TRACE, {"before", "after"}, within=10)


def test_what_a_backend_refuses_for_good_is_counted_and_not_offered_again() -> None:
    before = counts()
    with otlp_receiver(refuses=True) as receiver:
        with tracing(receiver.endpoint) as tracer:
            tracer.start_span("request").end()
        assert receiver.calls == 1
    assert lost_since(before) == {"exported": 0, "failed": 1, "dropped": 0}


def test_spans_that_cannot_be_written_are_counted_and_harm_nobody(receiver: Receiver) -> None:
    before, odd = counts(), {1: "no name"}
    with tracing(receiver.endpoint) as tracer:
        tracer.start_span("broken", attributes=odd).end()  # type: ignore[arg-type]
        for _ in range(63 + 10):
            tracer.start_span("request").end()
    assert lost_since(before) == {"exported": 10, "failed": 0, "dropped": 64}


def test_what_a_backend_took_is_counted(receiver: Receiver) -> None:
    before = counts()
    with tracing(receiver.endpoint) as tracer:
        for _ in range(1500):
            tracer.start_span("request").end()
    assert lost_since(before) == {"exported": 1500, "failed": 0, "dropped": 0}
