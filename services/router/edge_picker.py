"""envoy.service.ext_proc.v3.ExternalProcessor for our own edge: the same picking, over a leaner server.

The edge gives up a router that says nothing for a quarter of a second (services/mesh/envoy_filters.py), and asks all
the time whether it is there. So that it is only given up when it hangs, and not when many come at once, whoever can't
be picked for at once is told to wait, and its turn comes between two looks at what else has come.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from opentelemetry.trace import Tracer

from services.common.errors import MeshError, Reason
from services.common.status import grpc_code
from services.router.admission import Admission
from services.router.exchange import MAX_SHOWN_BYTES, Exchange
from services.router.http2 import Open, Stream, serve_streams
from services.router.worker import Worker

__all__ = ["EdgePicker"]

_PATH: Final = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
_HEALTH_PATH: Final = "/grpc.health.v1.Health/Check"
_SERVING: Final = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()
_NOT_SERVING: Final = health_pb2.HealthCheckResponse(
    status=health_pb2.HealthCheckResponse.NOT_SERVING
).SerializeToString()
# So much of its own time messages take before it is looked what else has come: a machine that is busy makes no crowd.
_TURN_SECONDS: Final = 0.005


class EdgePicker:
    """Picks a worker for each HTTP request that our edge shows."""

    def __init__(self, admission: Admission, tracer: Tracer) -> None:
        self._admission = admission
        self._tracer = tracer
        self._calls: set[_EdgeCall] = set()
        self._turns = _Turns()
        self._is_closing = False

    @asynccontextmanager
    async def serve(
        self, address: str, *, grace_seconds: float, beside: Mapping[str, Open] | None = None
    ) -> AsyncIterator[int]:
        """Serves on `host:port` until the block is left, other methods beside it; yields the port.

        Raises:
            OSError: the address is in use or not ours.
        """
        methods: dict[str, Open] = {_PATH: self._open, _HEALTH_PATH: self._check, **(beside or {})}
        async with serve_streams(
            address, methods, max_message_bytes=MAX_SHOWN_BYTES, grace_seconds=grace_seconds
        ) as port:
            yield port

    def close(self) -> None:
        """Lets go of every request that has its worker, cleanly: the edge goes on with it without the picker."""
        self._is_closing = True
        for call in tuple(self._calls):
            call.let_go()

    def abandon(self, worker: Worker, request_ids: Collection[str]) -> None:
        """Ends those requests that a worker has given up, since their clients take nothing."""
        for call in tuple(self._calls):
            call.abandon(worker, request_ids)

    def _open(self, stream: Stream, headers: Mapping[bytes, bytes]) -> "_EdgeCall":
        traceparent = headers.get(b"traceparent")
        call = _EdgeCall(self, self._turns, stream, traceparent.decode("latin-1") if traceparent else None)
        self._calls.add(call)
        return call

    def _check(self, stream: Stream, headers: Mapping[bytes, bytes]) -> "_HealthCall":
        del headers
        return _HealthCall(stream, _NOT_SERVING if self._is_closing else _SERVING)

    def exchange(self, call: "_EdgeCall", traceparent: str | None) -> Exchange:
        """Begins an exchange whose answers a call sends."""
        return Exchange(self._admission, self._tracer, call.send, traceparent=traceparent, says_it_waits=True)

    def forget(self, call: "_EdgeCall") -> None:
        """The call is over."""
        self._calls.discard(call)


class _EdgeCall:
    """One HTTP request of the edge's."""

    def __init__(self, picker: EdgePicker, turns: "_Turns", stream: Stream, traceparent: str | None) -> None:
        self._picker = picker
        self._turns = turns
        self._is_closed = False
        self._stream = stream
        self._exchange = picker.exchange(self, traceparent)

    def take(self, message: bytes) -> None:
        """Takes in a message, now or when its turn comes."""
        if not self._turns.take(self._take, message):
            self._exchange.ask_for_patience()

    def _take(self, message: bytes) -> None:
        if self._is_closed:
            # The client left before its turn came.
            return
        try:
            request = ext_proc.ProcessingRequest.FromString(message)
        except DecodeError:
            self.fail(MeshError(Reason.INVALID_REQUEST, "a message of the external processor can't be decoded"))
        else:
            self._exchange.take(request)

    def fail(self, error: MeshError) -> None:
        """Refuses the request."""
        self._exchange.refuse(error)

    def close(self) -> None:
        """The request is over; its lease is free."""
        self._is_closed = True
        self._picker.forget(self)
        self._exchange.close()

    def abandon(self, worker: Worker, request_ids: Collection[str]) -> None:
        """Ends the request, if it is one that the worker has given up."""
        self._exchange.abandon(worker, request_ids)

    def let_go(self) -> None:
        """Ends the call, if the request has its worker."""
        if self._exchange.is_picked:
            self._stream.end()

    def send(self, response: Any) -> None:
        """Says something to the edge; it may be the last."""
        self._stream.send(response.SerializeToString())
        if self._exchange.is_over:
            self._stream.end()


class _Turns:
    """Messages in their order: some at once, the rest a few milliseconds' worth at a time."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[bytes], None], bytes]] = deque()
        self._until: float | None = None
        """When the turn is over that has begun, by the clock of this thread's CPU time."""

    def take(self, act: Callable[[bytes], None], message: bytes) -> bool:
        """Acts on a message; False: it will be done soon, after those before it."""
        if self._until is None:
            self._until = time.thread_time() + _TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._next)
        if self._waiting or time.thread_time() >= self._until:
            self._waiting.append((act, message))
            return False
        act(message)
        return True

    def _next(self) -> None:
        """A new turn: in between, everything that had come was read."""
        self._until = None
        if not self._waiting:
            return
        self._until = time.thread_time() + _TURN_SECONDS
        asyncio.get_running_loop().call_soon(self._next)
        while self._waiting and time.thread_time() < self._until:
            act, message = self._waiting.popleft()
            act(message)


class _HealthCall:
    """One call of grpc.health.v1.Health/Check: it is answered between messages, however many there are."""

    def __init__(self, stream: Stream, answer: bytes) -> None:
        self._stream = stream
        self._answer = answer

    def take(self, message: bytes) -> None:
        """Answers; every service is as well as the others."""
        del message
        self._stream.send(self._answer)
        self._stream.end()

    def fail(self, error: MeshError) -> None:
        """Ends the call: what came is no question."""
        self._stream.end(grpc_code(error))

    def close(self) -> None:
        """Nothing is kept."""
