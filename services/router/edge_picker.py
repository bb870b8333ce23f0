"""envoy.service.ext_proc.v3.ExternalProcessor for our own edge: the same picking, over a leaner server."""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.message import DecodeError
from opentelemetry.trace import Tracer

from services.common.errors import MeshError, Reason
from services.router.admission import Admission
from services.router.exchange import MAX_SHOWN_BYTES, Exchange
from services.router.http2 import Stream, serve_streams
from services.router.worker import Worker

__all__ = ["EdgePicker"]

_PATH: Final = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


class EdgePicker:
    """Picks a worker for each HTTP request that our edge shows."""

    def __init__(self, admission: Admission, tracer: Tracer) -> None:
        self._admission = admission
        self._tracer = tracer
        self._calls: set[_EdgeCall] = set()

    @asynccontextmanager
    async def serve(self, address: str, *, grace_seconds: float) -> AsyncIterator[int]:
        """Serves on `host:port` until the block is left; yields the port.

        Raises:
            OSError: the address is in use or not ours.
        """
        async with serve_streams(
            address, _PATH, self._open, max_message_bytes=MAX_SHOWN_BYTES, grace_seconds=grace_seconds
        ) as port:
            yield port

    def close(self) -> None:
        """Lets go of every request that has its worker, cleanly: the edge goes on with it without the picker."""
        for call in tuple(self._calls):
            call.let_go()

    def abandon(self, worker: Worker, request_ids: Collection[str]) -> None:
        """Ends those requests that a worker has given up, since their clients take nothing."""
        for call in tuple(self._calls):
            call.abandon(worker, request_ids)

    def _open(self, stream: Stream, headers: Mapping[bytes, bytes]) -> "_EdgeCall":
        traceparent = headers.get(b"traceparent")
        call = _EdgeCall(self, stream, traceparent.decode("latin-1") if traceparent else None)
        self._calls.add(call)
        return call

    def exchange(self, call: "_EdgeCall", traceparent: str | None) -> Exchange:
        """Begins an exchange whose answers a call sends."""
        return Exchange(self._admission, self._tracer, call.send, traceparent=traceparent, says_it_waits=True)

    def forget(self, call: "_EdgeCall") -> None:
        """The call is over."""
        self._calls.discard(call)


class _EdgeCall:
    """One HTTP request of the edge's."""

    def __init__(self, picker: EdgePicker, stream: Stream, traceparent: str | None) -> None:
        self._picker = picker
        self._stream = stream
        self._exchange = picker.exchange(self, traceparent)

    def take(self, message: bytes) -> None:
        """Takes in a message."""
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
