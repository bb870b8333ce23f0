"""One HTTP request on its way through the endpoint picker, whatever carries its messages.

Envoy shows a request's headers and body, and is told where it goes. The exchange lasts until the response is over or
the client is gone, and so does the lease.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any, Final

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from opentelemetry.trace import INVALID_SPAN, Span, Tracer

from services.common.allowed_models import MODELS_HEADER, check_model
from services.common.errors import MeshError, Reason
from services.common.priority import PRIORITY_HEADER, priority_of
from services.common.rpc import MAX_MESSAGE_BYTES, timeout_seconds
from services.router import extproc
from services.router.admission import Admission
from services.router.prompt import GrpcBody, JsonBody, Wanted
from services.router.request import Request
from services.router.spans import end_span, start_span
from services.router.ticket import Ticket
from services.router.worker import Outcome, Worker

__all__ = ["MAX_SHOWN_BYTES", "Exchange"]

MAX_SHOWN_BYTES: Final = 4 * MAX_MESSAGE_BYTES
"""Largest message from Envoy: more than any body that is taken, so that a larger one is told what is wrong with it."""

_MODES: Final = processing_mode_pb2.ProcessingMode
_FULL_DUPLEX: Final = _MODES.FULL_DUPLEX_STREAMED
_BUFFERED: Final = (_MODES.BUFFERED, _MODES.BUFFERED_PARTIAL)
# What comes while a request waits is kept for later: so many messages, with so much of a body in them.
_MOST_EARLY: Final = 256
_MOST_EARLY_BYTES: Final = MAX_MESSAGE_BYTES
_LONGEST_CLASS: Final = 64
_PRIORITIES: Final = (-(2**31), 2**31 - 1)
_USAGE: Final = ("output_tokens", "prompt_tokens", "cached_tokens")
# What a worker answers when the request is at fault: it says nothing about the worker.
_REFUSED_STATUSES: Final = frozenset({"3", "5", "7", "8", "11", "12", "16"})
_CANCELLED_STATUSES: Final = frozenset({"1", "4"})
_log = logging.getLogger(__name__)

Send = Callable[[Any], None]
"""Takes a ProcessingResponse on its way to Envoy."""


class Exchange:
    """One HTTP request on its way through the picker.

    It never waits: what it has to say it says through `send`, at once or, for a request that has to wait, later.
    """

    def __init__(
        self,
        admission: Admission,
        tracer: Tracer,
        send: Send,
        *,
        traceparent: str | None,
        fallbacks: int = 0,
        says_it_waits: bool = False,
    ) -> None:
        """`traceparent`: W3C trace context of Envoy's call; None: the request's own headers may have one.

        `fallbacks`: how many further endpoints are named after the one that was picked, best first. `says_it_waits`:
        whether Envoy is told when a request waits; it must be configured to take that.
        """
        self._admission = admission
        self._tracer = tracer
        self._send = send
        self._traceparent = traceparent
        self._fallbacks = fallbacks
        self._says_it_waits = says_it_waits
        self._headers: dict[str, str] | None = None
        self._subset: frozenset[str] | None = None
        self._reader: GrpcBody | JsonBody | None = None
        self._mode = _FULL_DUPLEX
        self._response_mode = _MODES.NONE
        self._body = bytearray()
        self._is_rewritten = False
        self._picked: Callable[[str], list[Any]] | None = None
        self._early: list[Any] = []
        self._early_bytes = 0
        self._ticket: Ticket | None = None
        self._span: Span = INVALID_SPAN
        self._told: dict[str, str] = {}
        """What the client may know of who answers."""
        self._status = ""
        self._patience_asked_for: bool | None = None
        """For the request (False) or for its response (True)."""
        self.is_over = False
        """Whether nothing more is to be said."""

    @property
    def is_picked(self) -> bool:
        """Whether the request has its worker."""
        return self._ticket is not None and self._ticket.lease is not None

    @property
    def is_waiting(self) -> bool:
        """Whether the request waits for a worker."""
        return self._picked is not None

    def take(self, message: Any) -> None:
        """Takes in a message of Envoy's; nothing that it says makes this fail."""
        if not self.is_over:
            self._guard(self._keep_early if self.is_waiting else self._take, message)

    def ask_for_patience(self) -> None:
        """Tells Envoy, where it takes that, that its latest message is not answered at once."""
        # Once for the request, and once for the end of its response: Envoy takes it no oftener.
        if self._says_it_waits and not self.is_over and self._patience_asked_for is not self.is_picked:
            self._patience_asked_for = self.is_picked
            self._send(extproc.WAIT)

    def refuse(self, error: MeshError) -> None:
        """Ends the request with an error, unless it is over."""
        if self.is_over:
            return
        self.is_over, self._picked = True, None
        self._send(extproc.refusal(error, to_grpc=self._is_grpc))

    def abandon(self, worker: Worker, request_ids: Collection[str]) -> bool:
        """Ends the request if it is one that its worker has given up, since its client takes nothing; tells whether.

        The lease is free at once; Envoy, whose answer is under way, can but reset it.
        """
        ticket = self._ticket
        if self.is_over or ticket is None or ticket.lease is None or ticket.lease.worker is not worker:
            return False
        if ticket.request.request_id not in request_ids:
            return False
        self.close()
        self.refuse(MeshError(Reason.NO_CAPACITY, "the output is not read in time"))
        return True

    def close(self, outcome: Outcome = Outcome.CANCELLED, **usage: int) -> None:
        """The request is over, with that usage if it is known; its lease is free."""
        self._picked = None
        if self._ticket is not None:
            self._admission.finish(self._ticket, outcome, **usage)
            end_span(self._span, self._ticket, self._admission.why_slow)

    @property
    def _is_grpc(self) -> bool:
        return (self._headers or {}).get("content-type", "").startswith("application/grpc")

    def _guard(self, act: Callable[[Any], None], given: Any) -> None:
        try:
            act(given)
        except MeshError as error:
            self.refuse(error)
        except Exception:  # noqa: BLE001  # the last line of defence: one request fails, and the picker goes on
            _log.exception("the picker failed")
            self.refuse(MeshError(Reason.INTERNAL, "internal error"))

    def _take(self, message: Any) -> None:
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            self._on_headers(message)
        elif kind == "request_body":
            if self._headers is None:
                self._start_with_body(message)
            self._on_body(message.request_body)
        elif kind == "request_trailers":
            self._on_end()
        else:
            self._on_response(kind, message)

    def _keep_early(self, message: Any) -> None:
        self._early_bytes += len(message.request_body.body)
        if len(self._early) >= _MOST_EARLY or self._early_bytes > _MOST_EARLY_BYTES:
            raise MeshError(Reason.REQUEST_TOO_LARGE, "too much follows a request that waits")
        self._early.append(message)

    def _on_headers(self, message: Any) -> None:
        if self._headers is not None:
            raise _out_of_order()
        headers = extproc.headers_of(message.request_headers.headers)
        self._start(message, headers)
        if self._mode == _MODES.NONE:
            # The body is never shown: what it asks for may be told by a header.
            self._pick(Wanted(model=headers.get(extproc.MODEL_NAME)), _in_headers)
            return
        if not message.request_headers.end_of_stream:
            self._reader = self._reader or JsonBody(headers.get(":path", ""))
        if self._reader is None or not self._reader.needed:
            self._pick(Wanted(model=None, occupies_slot=False), _in_headers)
        elif message.request_headers.end_of_stream:
            raise MeshError(Reason.INVALID_REQUEST, "the request has no body")
        else:
            self._wait_for_body()

    def _start_with_body(self, message: Any) -> None:
        # What a gateway that sends no headers shows of them.
        self._mode = _MODES.BUFFERED
        headers = extproc.attributes_of(message)
        if ":path" not in headers:
            raise _out_of_order()
        self._start(message, headers)
        self._reader = self._reader or JsonBody(headers[":path"])
        if self._mode not in _BUFFERED:
            raise _out_of_order()

    def _start(self, message: Any, headers: dict[str, str]) -> None:
        self._headers = headers
        self._subset = extproc.subset_of(message)
        if message.HasField("protocol_config"):
            self._mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        if self._is_grpc:
            path = headers.get(":path", "").partition("?")[0]
            self._reader = GrpcBody(path, headers.get("grpc-encoding", "identity"))

    def _wait_for_body(self) -> None:
        if self._mode in _BUFFERED:
            self._send(extproc.CONTINUE_HEADERS)
        elif self._mode != _FULL_DUPLEX:
            _log.error("ext_proc must send request bodies as FULL_DUPLEX_STREAMED, BUFFERED or NONE")
            raise MeshError(Reason.INTERNAL, "internal error")

    def _on_body(self, chunk: Any) -> None:
        if self.is_picked:
            self._hand_on(chunk.body, ended=chunk.end_of_stream)
            return
        if self._reader is None:
            raise _out_of_order()
        if len(self._body) + len(chunk.body) > MAX_MESSAGE_BYTES + 1024:
            raise MeshError(Reason.REQUEST_TOO_LARGE, f"the body has more than {MAX_MESSAGE_BYTES} bytes")
        self._body += chunk.body
        ended = chunk.end_of_stream or self._mode in _BUFFERED
        wanted = self._reader.wanted(self._body, ended=ended)
        if wanted is not None:
            buffered = self._mode in _BUFFERED
            self._pick(wanted, self._buffered if buffered else lambda endpoint: self._streamed(endpoint, ended=ended))

    def _buffered(self, endpoint: str) -> list[Any]:
        body, self._body = self._body, bytearray()
        return [
            extproc.picked_in_body(endpoint) if not self._is_rewritten else extproc.rewritten(endpoint, bytes(body))
        ]

    def _streamed(self, endpoint: str, *, ended: bool) -> list[Any]:
        body, self._body = bytes(self._body), bytearray()
        return [*_in_headers(endpoint), *extproc.body_pieces(body, ended=ended)]

    def _hand_on(self, body: bytes, *, ended: bool) -> None:
        if self._mode == _FULL_DUPLEX:
            self._send_all(extproc.body_pieces(body, ended=ended))
        else:
            self._send(extproc.CONTINUE_BODY)

    def _on_end(self) -> None:
        if self._headers is None:
            raise _out_of_order()
        if self.is_picked or self._reader is None:
            self._send(extproc.CONTINUE_TRAILERS)
            return
        # The trailers end the body, and what came of it is handed on without an end of its own.
        wanted = self._reader.wanted(self._body, ended=True)
        assert wanted is not None
        self._pick(wanted, lambda endpoint: [*self._streamed(endpoint, ended=False), extproc.CONTINUE_TRAILERS])

    def _on_response(self, kind: str | None, message: Any) -> None:
        if kind == "response_headers":
            self._on_response_headers(message)
        elif kind == "response_body":
            chunk = message.response_body
            if self._response_mode == _FULL_DUPLEX:
                self._send_all(extproc.response_body_pieces(chunk.body, ended=chunk.end_of_stream))
            else:
                self._send(extproc.CONTINUE_RESPONSE_BODY)
            if chunk.end_of_stream:
                self._settle({})
        elif kind == "response_trailers":
            # Before the answer: whoever hears of the end may ask for the lease at once.
            self._settle(extproc.headers_of(message.response_trailers.trailers))
            self.is_over = True
            self._send(extproc.CONTINUE_RESPONSE_TRAILERS)
        else:
            raise _out_of_order()

    def _on_response_headers(self, message: Any) -> None:
        headers = extproc.headers_of(message.response_headers.headers)
        self._status = headers.get(":status", "")
        served = extproc.served_of(message)
        if served is not None and self._ticket is not None:
            self._admission.served(self._ticket, served)
        # An error may be all in the headers.
        if "grpc-status" in headers or message.response_headers.end_of_stream:
            self._settle(headers)
        self._send(extproc.CONTINUE_RESPONSE_HEADERS)

    def _settle(self, trailers: dict[str, str]) -> None:
        status = trailers.get("grpc-status")
        outcome = _outcome_of_http(self._status) if status is None else _outcome(status)
        counts = {name: trailers.get(f"x-tokenloom-usage-{name.replace('_', '-')}", "") for name in _USAGE}
        self.close(outcome, **{name: int(count) for name, count in counts.items() if count.isdecimal()})

    def _pick(self, wanted: Wanted, answers: Callable[[str], list[Any]]) -> None:
        """Asks for a worker; `answers` makes what is said to Envoy out of its endpoint, now or later."""
        headers = self._headers or {}
        # Who calls was found out before us; what they want is known here first.
        check_model(wanted.model, headers.get(MODELS_HEADER))
        request = _request(wanted, headers, self._subset)
        traceparent = self._traceparent or headers.get("traceparent")
        self._span = start_span(self._tracer, "pick", traceparent, request)
        ticket = self._ticket = self._admission.ask(request, self._on_settled, most_others=self._fallbacks)
        if ticket.is_waiting:
            self._picked = answers
            self.ask_for_patience()
        else:
            self._answer(ticket, answers)

    def _on_settled(self, ticket: Ticket) -> None:
        end_span(self._span, ticket, self._admission.why_slow)
        self._note_told(ticket)
        answers, self._picked = self._picked, None
        if answers is not None:
            self._guard(lambda answers: self._go_on(ticket, answers), answers)

    def _go_on(self, ticket: Ticket, answers: Callable[[str], list[Any]]) -> None:
        self._answer(ticket, answers)
        early, self._early = self._early, []
        for message in early:
            self._take(message)

    def _answer(self, ticket: Ticket, answers: Callable[[str], list[Any]]) -> None:
        if ticket.error is not None:
            raise ticket.error
        assert ticket.lease is not None
        self._rewrite(ticket)
        first, *others = answers(",".join((ticket.lease.worker.endpoint, *ticket.others)))
        if self._told:
            first = extproc.telling(first, self._told)
        self._send_all([first, *others])

    def _note_told(self, ticket: Ticket) -> None:
        if ticket.lease is None:
            return
        if ticket.way.degraded:
            self._told["degraded"] = ticket.way.request.model or ""
        if (self._headers or {}).get("x-tokenloom-debug") == "1":
            self._told["worker"] = ticket.lease.worker.worker_id
            self._told["route"] = ticket.reason

    def _rewrite(self, ticket: Ticket) -> None:
        # An alias, a version or a smaller model: the worker knows its model by the model's own name.
        chosen, limit = ticket.way.request.model, ticket.output_token_limit
        if chosen is None or self._reader is None or not self._body:
            return
        asked = ticket.request
        shortens = asked.occupies_slot and limit and not 0 < asked.max_output_tokens <= limit
        if chosen != asked.model or shortens:
            self._body = bytearray(self._reader.rewritten(self._body, chosen, limit))
            self._is_rewritten = True

    def _send_all(self, responses: list[Any]) -> None:
        for response in responses:
            self._send(response)


def _in_headers(endpoint: str) -> list[Any]:
    return [extproc.picked_in_headers(endpoint)]


def _out_of_order() -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, "the messages of the external processor are out of order")


def _outcome(status: str) -> Outcome:
    if status == "0":
        return Outcome.COMPLETED
    if status in _REFUSED_STATUSES:
        return Outcome.REFUSED
    return Outcome.CANCELLED if status in _CANCELLED_STATUSES else Outcome.FAILED


def _outcome_of_http(status: str) -> Outcome:
    if status.startswith("4"):
        return Outcome.REFUSED
    return Outcome.FAILED if status.startswith("5") else Outcome.COMPLETED


def _request(wanted: Wanted, headers: dict[str, str], subset: frozenset[str] | None) -> Request:
    return Request(
        model=wanted.model,
        request_id=headers.get("x-request-id", ""),
        prompt_tokens=wanted.prompt_tokens,
        exact=wanted.exact,
        max_output_tokens=wanted.max_output_tokens,
        tenant=headers.get("x-tokenloom-tenant") or headers.get(extproc.FAIRNESS_ID, ""),
        priority=priority_of(headers.get(PRIORITY_HEADER), _priority(headers.get("x-tokenloom-priority", ""))),
        session=headers.get("x-session-id", ""),
        subset=subset,
        timeout_seconds=timeout_seconds(headers.get("grpc-timeout", "")),
        prompt_token_ids=wanted.prompt_token_ids,
        prefix_hashes=wanted.prefix_hashes,
        needs=wanted.needs,
        occupies_slot=wanted.occupies_slot,
        task=_task(wanted),
        slo_class=headers.get("x-slo-class", "")[:_LONGEST_CLASS],
        allow_degrade=headers.get("x-tokenloom-degrade") == "1",
    )


def _task(wanted: Wanted) -> str:
    if not wanted.occupies_slot:
        return "tokenize"
    return next((task for task in ("embed", "score") if task in wanted.needs), "generate")


def _priority(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > 11:
        return 0
    return min(max(int(text), _PRIORITIES[0]), _PRIORITIES[1])
