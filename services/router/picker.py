"""envoy.service.ext_proc.v3.ExternalProcessor over grpc.aio: the endpoint picker of any gateway that wants one."""

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Any

import grpc.aio
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from opentelemetry.trace import Tracer

from services.common.rpc import metadata_of
from services.router.admission import Admission
from services.router.exchange import Exchange
from services.router.worker import Worker

__all__ = ["Picker"]


class Picker(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Picks a worker for each HTTP request that a gateway shows."""

    def __init__(self, admission: Admission, tracer: Tracer, *, fallbacks: int) -> None:
        """`fallbacks`: how many further endpoints are named after the one that was picked."""
        self._admission = admission
        self._tracer = tracer
        self._fallbacks = fallbacks
        self._calls: dict[Exchange, asyncio.Task[Any]] = {}
        self._abandoned: set[Exchange] = set()
        self._closing = False

    def close(self) -> None:
        """Lets go of every request that has its worker, cleanly: the gateway goes on with it without the picker."""
        self._closing = True
        for exchange, call in self._calls.items():
            if exchange.is_picked:
                call.cancel()

    def abandon(self, worker: Worker, request_ids: Collection[str]) -> None:
        """Ends those requests that a worker has given up, since their clients take nothing."""
        for exchange, call in tuple(self._calls.items()):
            if exchange.abandon(worker, request_ids):
                self._abandoned.add(exchange)
                call.cancel()

    async def Process(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """One HTTP request. When the stream ends, however it ends, its lease is free."""
        # Read and written through the context, which costs less than an iterator and a generator do.
        del request_iterator
        traceparent = metadata_of(context).get("traceparent")
        answers = _Answers(context)
        exchange = Exchange(
            self._admission,
            self._tracer,
            answers.add,
            traceparent=str(traceparent) if traceparent else None,
            fallbacks=self._fallbacks,
        )
        call = asyncio.current_task()
        assert call is not None
        self._calls[exchange] = call
        context.add_done_callback(lambda _: exchange.close())
        inbox = _Inbox(context)
        try:
            await _talk(exchange, inbox, answers)
        except asyncio.CancelledError:
            # Our own call for attention, and cheaper than listening for two things all the time: the stream ends with
            # OK. An error would have Envoy break a response that is on its way.
            if not self._closing and exchange not in self._abandoned:
                raise
            call.uncancel()
            await answers.flush()
        finally:
            self._abandoned.discard(exchange)
            del self._calls[exchange]
            exchange.close()
            inbox.close()


async def _talk(exchange: Exchange, inbox: "_Inbox", answers: "_Answers") -> None:
    while not exchange.is_over and (message := await inbox.next()) is not None:
        exchange.take(message)
        while exchange.is_waiting:
            early = await inbox.next_unless(answers.come)
            if early is not None:
                exchange.take(early)
            elif exchange.is_waiting:
                return
        await answers.flush()


class _Answers:
    """What is to be said to the gateway."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._unsent: list[Any] = []
        self._come: asyncio.Future[None] | None = None

    def add(self, response: Any) -> None:
        """Says something, at the next flush."""
        self._unsent.append(response)
        if self._come is not None and not self._come.done():
            self._come.set_result(None)

    @property
    def come(self) -> "asyncio.Future[None]":
        """Is done when there is something to say."""
        if self._come is None:
            self._come = asyncio.get_running_loop().create_future()
        return self._come

    async def flush(self) -> None:
        """Sends what was said."""
        self._come = None
        unsent, self._unsent = self._unsent, []
        for response in unsent:
            await self._context.write(response)


class _Inbox:
    """The messages of a stream. A read is never abandoned, since the next one would miss what it had got."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._reading: asyncio.Task[Any] | None = None

    async def next(self) -> Any | None:
        """The next message; None at the end."""
        if self._reading is None:
            return await self._receive()
        reading, self._reading = self._reading, None
        return await reading

    async def next_unless(self, come: "asyncio.Future[None]") -> Any | None:
        """The next message; None at the end, or when there is something to say first."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._receive())
        await asyncio.wait((come, self._reading), return_when=asyncio.FIRST_COMPLETED)
        return await self.next() if self._reading.done() else None

    def close(self) -> None:
        """Stops listening; the stream is over."""
        if self._reading is not None:
            self._reading.cancel()

    async def _receive(self) -> Any | None:
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message
