"""envoy.service.ext_proc.v3.ExternalProcessor: the endpoint picker of the typed lane, and of any gateway that has one.

Envoy shows a request's headers and body, and is told where it goes. The stream stays open until the response is over or
the client is gone, and so does the lease.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
import msgspec
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from opentelemetry.trace import INVALID_SPAN, Span, Tracer

from services.common.errors import MeshError, Reason
from services.common.rpc import MAX_MESSAGE_BYTES, metadata_of
from services.router import extproc
from services.router.admission import Admission, Ticket
from services.router.prompt import GrpcBody, JsonBody, Wanted
from services.router.request import Request
from services.router.spans import end_span, start_span
from services.router.worker import Outcome

__all__ = ["Picker"]

_MODES: Final = processing_mode_pb2.ProcessingMode
_FULL_DUPLEX: Final = _MODES.FULL_DUPLEX_STREAMED
_BUFFERED: Final = (_MODES.BUFFERED, _MODES.BUFFERED_PARTIAL)
# While a request waits, its stream is listened to; so many messages are kept for later.
_MOST_EARLY: Final = 256
_TIMEOUT_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MOST_TIMEOUT_DIGITS: Final = 8
_PRIORITIES: Final = (-(2**31), 2**31 - 1)
# What a worker answers when the request is at fault: it says nothing about the worker.
_REFUSED_STATUSES: Final = frozenset({"3", "5", "7", "8", "11", "12", "16"})
_CANCELLED_STATUSES: Final = frozenset({"1", "4"})
_log = logging.getLogger(__name__)


class Picker(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Picks a worker for each HTTP request that Envoy shows."""

    def __init__(self, admission: Admission, tracer: Tracer) -> None:
        self._admission = admission
        self._tracer = tracer
        self._calls: dict[_Exchange, asyncio.Task[Any]] = {}
        self._closing = False

    def close(self) -> None:
        """Lets go of every request that has its worker, cleanly: Envoy goes on with it without the picker."""
        self._closing = True
        for exchange, call in self._calls.items():
            if exchange.is_picked:
                call.cancel()

    async def Process(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """One HTTP request. When the stream ends, however it ends, its lease is free."""
        # Read and written through the context, which costs less than an iterator and a generator do.
        del request_iterator
        inbox = _Inbox(context)
        exchange = _Exchange(self._admission, self._tracer, inbox, context)
        call = asyncio.current_task()
        assert call is not None
        self._calls[exchange] = call
        context.add_done_callback(lambda _: exchange.close())
        try:
            while not exchange.is_over and (message := await inbox.next()) is not None:
                for response in await exchange.take(message):
                    await context.write(response)
        except asyncio.CancelledError:
            # Our own call for attention, and cheaper than listening for two things all the time: the stream ends with
            # OK. An error would have Envoy break a response that is on its way.
            if not self._closing:
                raise
            call.uncancel()
        finally:
            del self._calls[exchange]
            exchange.close()
            inbox.close()


class _Inbox:
    """The messages of a stream. A read is never abandoned, since the next one would miss what it had got."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._reading: asyncio.Task[Any] | None = None
        self._early: list[Any] = []

    async def next(self) -> Any | None:
        """The next message; None at the end."""
        if self._early:
            return self._early.pop(0)
        if self._reading is None:
            return await self._receive()
        reading, self._reading = self._reading, None
        return await reading

    async def listen_until(self, answered: "asyncio.Future[None]") -> bool:
        """Waits for an answer; False when the stream ended before it came."""
        while not answered.done():
            if self._reading is None:
                self._reading = asyncio.create_task(self._receive())
            await asyncio.wait((answered, self._reading), return_when=asyncio.FIRST_COMPLETED)
            if self._reading.done() and not self._keep_early(self._reading.result()):
                return answered.done()
        return True

    def close(self) -> None:
        """Stops listening; the stream is over."""
        if self._reading is not None:
            self._reading.cancel()

    def _keep_early(self, message: Any | None) -> bool:
        self._reading = None
        if message is None:
            return False
        if len(self._early) >= _MOST_EARLY:
            raise MeshError(Reason.REQUEST_TOO_LARGE, "too much follows a request that waits")
        self._early.append(message)
        return True

    async def _receive(self) -> Any | None:
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message


class _Exchange:
    """One HTTP request on its way through the picker."""

    def __init__(self, admission: Admission, tracer: Tracer, inbox: _Inbox, context: Any) -> None:
        self._admission = admission
        self._tracer = tracer
        self._inbox = inbox
        self._context = context
        self._headers: dict[str, str] | None = None
        self._subset: frozenset[str] | None = None
        self._reader: GrpcBody | JsonBody | None = None
        self._mode = _FULL_DUPLEX
        self._response_mode = _MODES.NONE
        self._body = bytearray()
        self._ticket: Ticket | None = None
        self._span: Span = INVALID_SPAN
        self.is_over = False
        """Whether nothing more is to be answered."""

    @property
    def is_picked(self) -> bool:
        """Whether the request has its worker."""
        return self._ticket is not None and self._ticket.lease is not None

    async def take(self, message: Any) -> list[Any]:
        """The answers to a message of Envoy's."""
        kind = message.WhichOneof("request")
        try:
            if kind == "request_headers":
                return await self._on_headers(message)
            if kind == "request_body":
                if self._headers is None:
                    self._start_with_body(message)
                return await self._on_body(message.request_body)
            if kind == "request_trailers":
                return [*await self._on_end(), extproc.CONTINUE_TRAILERS]
            return self._on_response(kind, message)
        except MeshError as error:
            self.is_over = True
            return [extproc.refusal(error, to_grpc=self._is_grpc)]
        except _GoneError:
            self.is_over = True
            return []

    def close(self, outcome: Outcome = Outcome.CANCELLED, *, output_tokens: int = 0) -> None:
        """The request is over; its lease is free."""
        if self._ticket is not None:
            self._admission.finish(self._ticket, outcome, output_tokens=output_tokens)
            end_span(self._span, self._ticket)

    @property
    def _is_grpc(self) -> bool:
        return (self._headers or {}).get("content-type", "").startswith("application/grpc")

    async def _on_headers(self, message: Any) -> list[Any]:
        if self._headers is not None:
            raise _out_of_order()
        self._start(message, extproc.headers_of(message.request_headers.headers))
        if not message.request_headers.end_of_stream:
            self._reader = self._reader or JsonBody()
        if self._reader is None or not self._reader.needed:
            return [extproc.picked_in_headers(await self._pick(Wanted(model=None, occupies_slot=False)))]
        if message.request_headers.end_of_stream:
            raise MeshError(Reason.INVALID_REQUEST, "the request has no body")
        return self._wait_for_body()

    def _start_with_body(self, message: Any) -> None:
        # What a gateway that sends no headers shows of them.
        self._mode = _MODES.BUFFERED
        headers = extproc.attributes_of(message)
        if ":path" not in headers:
            raise _out_of_order()
        self._start(message, headers)
        self._reader = self._reader or JsonBody()
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

    def _wait_for_body(self) -> list[Any]:
        if self._mode == _FULL_DUPLEX:
            return []
        if self._mode in _BUFFERED:
            return [extproc.CONTINUE_HEADERS]
        _log.error("ext_proc must send request bodies as FULL_DUPLEX_STREAMED or BUFFERED")
        raise MeshError(Reason.INTERNAL, "internal error")

    async def _on_body(self, chunk: Any) -> list[Any]:
        if self._headers is None:
            raise _out_of_order()
        if self.is_picked:
            return self._hand_on(chunk.body, ended=chunk.end_of_stream)
        if self._reader is None:
            raise _out_of_order()
        if len(self._body) + len(chunk.body) > MAX_MESSAGE_BYTES + 1024:
            raise MeshError(Reason.REQUEST_TOO_LARGE, f"the body has more than {MAX_MESSAGE_BYTES} bytes")
        self._body += chunk.body
        return await self._pick_if_complete(ended=chunk.end_of_stream or self._mode in _BUFFERED)

    async def _pick_if_complete(self, *, ended: bool) -> list[Any]:
        assert self._reader is not None
        wanted = self._reader.wanted(self._body, ended=ended)
        if wanted is None:
            return []
        endpoint = await self._pick(wanted)
        if self._mode in _BUFFERED:
            return [extproc.picked_in_body(endpoint)]
        body, self._body = bytes(self._body), bytearray()
        return [extproc.picked_in_headers(endpoint), *extproc.body_pieces(body, ended=ended)]

    def _hand_on(self, body: bytes, *, ended: bool) -> list[Any]:
        return extproc.body_pieces(body, ended=ended) if self._mode == _FULL_DUPLEX else [extproc.CONTINUE_BODY]

    async def _on_end(self) -> list[Any]:
        if self._headers is None:
            raise _out_of_order()
        if self.is_picked or self._reader is None:
            return []
        # The trailers end the body, and what came of it is handed on without an end of its own.
        wanted = self._reader.wanted(self._body, ended=True)
        assert wanted is not None
        endpoint = await self._pick(wanted)
        return [extproc.picked_in_headers(endpoint), *extproc.body_pieces(bytes(self._body), ended=False)]

    def _on_response(self, kind: str | None, message: Any) -> list[Any]:
        if kind == "response_headers":
            headers = extproc.headers_of(message.response_headers.headers)
            # An error may be all in the headers.
            if "grpc-status" in headers or message.response_headers.end_of_stream:
                self._settle(headers)
            return [extproc.CONTINUE_RESPONSE_HEADERS]
        if kind == "response_body":
            chunk = message.response_body
            if self._response_mode == _FULL_DUPLEX:
                return [extproc.response_body_piece(chunk.body, ended=chunk.end_of_stream)]
            return [extproc.CONTINUE_RESPONSE_BODY]
        if kind == "response_trailers":
            self._settle(extproc.headers_of(message.response_trailers.trailers))
            self.is_over = True
            return [extproc.CONTINUE_RESPONSE_TRAILERS]
        raise _out_of_order()

    def _settle(self, trailers: dict[str, str]) -> None:
        tokens = trailers.get("x-tokenloom-usage-output-tokens", "")
        self.close(_outcome(trailers.get("grpc-status", "0")), output_tokens=int(tokens) if tokens.isdecimal() else 0)

    async def _pick(self, wanted: Wanted) -> str:
        headers = self._headers or {}
        _check_model(wanted.model, headers.get("x-tokenloom-models"))
        request = _request(wanted, headers, self._subset)
        traceparent = metadata_of(self._context).get("traceparent") or headers.get("traceparent")
        span = self._span = start_span(self._tracer, "pick", str(traceparent) if traceparent else None, request)
        answered: asyncio.Future[None] | None = None

        def settle(ticket: Ticket) -> None:
            end_span(span, ticket)
            if answered is not None and not answered.done():
                answered.set_result(None)

        ticket = self._ticket = self._admission.ask(request, settle)
        if ticket.is_waiting:
            answered = asyncio.get_running_loop().create_future()
            if not await self._inbox.listen_until(answered):
                raise _GoneError
        if ticket.error is not None:
            raise ticket.error
        assert ticket.lease is not None
        return ticket.lease.worker.endpoint


class _GoneError(Exception):
    """Nobody waits for the answer any more."""


def _check_model(model: str | None, allowed: str | None) -> None:
    # Who calls was found out before us; what they want is known here first.
    if model is not None and allowed is not None and model not in msgspec.json.decode(allowed, type=list[str]):
        raise MeshError(Reason.PERMISSION_DENIED, f"this key may not use the model {model!r}", field="model")


def _out_of_order() -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, "the messages of the external processor are out of order")


def _outcome(status: str) -> Outcome:
    if status == "0":
        return Outcome.COMPLETED
    if status in _REFUSED_STATUSES:
        return Outcome.REFUSED
    return Outcome.CANCELLED if status in _CANCELLED_STATUSES else Outcome.FAILED


def _request(wanted: Wanted, headers: dict[str, str], subset: frozenset[str] | None) -> Request:
    return Request(
        model=wanted.model,
        request_id=headers.get("x-request-id", ""),
        prompt_tokens=wanted.prompt_tokens,
        exact=wanted.exact,
        max_output_tokens=wanted.max_output_tokens,
        tenant=headers.get("x-tokenloom-tenant", ""),
        priority=_priority(headers.get("x-tokenloom-priority", "")),
        session=headers.get("x-session-id", ""),
        subset=subset,
        timeout_seconds=_timeout_seconds(headers.get("grpc-timeout", "")),
        occupies_slot=wanted.occupies_slot,
    )


def _priority(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > 11:
        return 0
    return min(max(int(text), _PRIORITIES[0]), _PRIORITIES[1])


def _timeout_seconds(text: str) -> float | None:
    digits, unit = text[:-1], text[-1:]
    if not digits.isdecimal() or len(digits) > _MOST_TIMEOUT_DIGITS or unit not in _TIMEOUT_UNITS:
        return None
    return int(digits) * _TIMEOUT_UNITS[unit]
