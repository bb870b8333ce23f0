"""tokenloom.router.v1.RouterService: the sessions of gateways and the registrations of workers."""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError
from opentelemetry.trace import Span, Tracer
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.http2_outgoing import send_from
from services.common.outbox import Outbox, OutboxFullError
from services.common.status import status_from_error
from services.router import wire
from services.router.admission import Admission
from services.router.fleet import Fleet
from services.router.http2_stream import Stream
from services.router.prefixes import Prefixes
from services.router.spans import end_span, start_span
from services.router.streams import reading
from services.router.ticket import Ticket
from services.router.worker import Worker

__all__ = ["SESSION_PATH", "RouterServicer"]

SESSION_PATH: Final = "/tokenloom.router.v1.RouterService/Session"

# A gateway that has not read so many answers is stuck.
_MOST_ANSWERS: Final = 65_536
_log = logging.getLogger(__name__)
Abandon = Callable[[Worker, Collection[str]], None]


def _nobody_hears(_worker: Worker, _request_ids: Collection[str]) -> None:
    """What is done where no picker serves."""


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """The inside door of the router."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        prefixes: Prefixes,
        tracer: Tracer,
        *,
        most_answers: int = _MOST_ANSWERS,
        abandon: Abandon | None = None,
    ) -> None:
        """A gateway that leaves more than `most_answers` unread loses its session.

        `abandon` hears which requests a worker has given up.
        """
        self._abandon = abandon or _nobody_hears
        self._fleet = fleet
        self._admission = admission
        self._prefixes = prefixes
        self._tracer = tracer
        self._most_answers = most_answers
        self._sessions: set[_Session] = set()
        self._workers: set[Worker] = set()
        self._closing = False

    async def Session(
        self, request_iterator: AsyncIterator[router_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[router_pb2.SessionResponse]:
        """One gateway. When the stream ends, however it ends, its leases are free and its requests wait no more."""
        self._refuse_when_closing()
        session = _Session(self._admission, self._tracer, self._most_answers)
        self._sessions.add(session)
        # The stream may end while its generator is parked in a write; this is called all the same, and at once.
        context.add_done_callback(lambda _: session.close())
        try:
            async with reading(request_iterator, session.take, ended=session.outbox.close) as reader:
                async for message in session.outbox.messages():
                    yield message
                if session.is_overrun:
                    raise _overrun()
                if reader.done():
                    reader.result()
        finally:
            session.close()
            self._sessions.discard(session)

    def open(self, stream: Stream, _: Mapping[bytes, bytes]) -> "_LeanSession":
        """One gateway, as `Session` has it, over the lean server."""
        session = _Session(self._admission, self._tracer, self._most_answers)
        call = _LeanSession(session, stream, self._sessions)
        try:
            self._refuse_when_closing()
        except MeshError as error:
            session.close()
            stream.give_up(error)
        else:
            self._sessions.add(session)
            send_from(session.outbox, stream, lambda message: (message.SerializeToString(),))
        return call

    async def Register(
        self, request_iterator: AsyncIterator[router_pb2.RegisterRequest], context: Any
    ) -> AsyncIterator[router_pb2.RegisterResponse]:
        """One worker. When the stream ends, it is gone."""
        self._refuse_when_closing()
        worker = self._fleet.register(await _registration(request_iterator))
        self._workers.add(worker)
        context.add_done_callback(lambda _: self._fleet.remove(worker))
        _log.info("worker registered", extra={"worker": worker.worker_id, "endpoint": worker.endpoint})
        try:
            async with reading(
                request_iterator,
                _Reports(self._fleet, self._prefixes, worker, self._abandon).take,
                ended=worker.leave,
            ) as reader:
                async for command in _commands(worker):
                    yield command
                if reader.done():
                    reader.result()
        finally:
            self._workers.discard(worker)
            self._fleet.remove(worker)
            _log.info("worker gone", extra={"worker": worker.worker_id})

    def close(self) -> None:
        """Ends every stream, and takes no new one: gateways and workers go to another router or come back."""
        self._closing = True
        for session in self._sessions:
            session.outbox.close()
        for worker in self._workers:
            worker.leave()

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise MeshError(Reason.NO_READY_WORKER, "the router stops", retry_after_seconds=1.0)


class _Session:
    """What one gateway has asked for and holds."""

    def __init__(self, admission: Admission, tracer: Tracer, most_answers: int) -> None:
        self._admission = admission
        self._tracer = tracer
        self._tickets: dict[int, tuple[Ticket, Span]] = {}
        self._closed = False
        self.is_overrun = False
        """Whether it ended because its gateway does not read."""
        self.on_overrun: Callable[[], None] | None = None
        """Is called when it does."""
        self.outbox: Outbox[router_pb2.SessionResponse] = Outbox(router_pb2.SessionResponse, max_edits=most_answers)

    def take(self, message: router_pb2.SessionRequest) -> None:
        """Takes a batch in. Releases come first: what they free may serve the batch's own acquires."""
        for release in message.releases:
            self._release(release)
        for acquire in message.acquires:
            if not self._closed:
                self._acquire(acquire)
        for release in message.releases:
            # An acquire may be given up in the batch that it came in.
            self._release(release)

    def close(self) -> None:
        """The session is over, and so is all that it holds."""
        self._closed = True
        tickets, self._tickets = self._tickets, {}
        for ticket, span in tickets.values():
            self._admission.finish(ticket)
            end_span(span, ticket, self._admission.why_slow)
        self.outbox.close()

    def _release(self, release: router_pb2.Release) -> None:
        ticket, span = self._tickets.pop(release.handle, (None, None))
        if ticket is not None and span is not None:
            self._admission.finish(
                ticket,
                wire.outcome(release.outcome),
                output_tokens=release.output_token_count,
                first_token_seconds=wire.first_token_seconds(release),
                prompt_tokens=release.prompt_token_count,
                cached_tokens=release.cached_token_count,
            )
            end_span(span, ticket, self._admission.why_slow)

    def _acquire(self, acquire: router_pb2.Acquire) -> None:
        handle = acquire.handle
        if handle in self._tickets:
            raise MeshError(Reason.INVALID_REQUEST, f"handle {handle} is in use", field="acquires.handle")
        request = wire.request(acquire)
        span = start_span(self._tracer, "schedule", acquire.traceparent, request)
        ticket = self._admission.ask(request, lambda answered: self._settle(handle, span, answered))
        if self._closed:
            # Its answer was one too many.
            self._admission.finish(ticket)
        elif ticket.error is None:
            self._tickets[handle] = (ticket, span)
        if ticket.is_waiting:
            position, seconds = self._admission.outlook(ticket)
            wait = None if seconds is None else wire.duration(seconds)
            self._edit().queued.add(handle=handle, position=position, expected_wait_duration=wait)

    def _settle(self, handle: int, span: Span, ticket: Ticket) -> None:
        end_span(span, ticket, self._admission.why_slow)
        if ticket.error is not None:
            self._tickets.pop(handle, None)
            self._edit().rejections.add(handle=handle, status=status_from_error(ticket.error))
            return
        assert ticket.lease is not None
        self._edit().grants.append(wire.grant(handle, ticket, ticket.lease))

    def _edit(self) -> router_pb2.SessionResponse:
        if self._closed:
            return router_pb2.SessionResponse()
        try:
            return self.outbox.edit()
        except OutboxFullError:
            # Whoever settled this ticket is not to blame: only this gateway, which does not read, loses its session.
            _log.warning("a gateway does not read; its session ends")
            self.is_overrun = True
            if self.on_overrun is not None:
                self.on_overrun()
            self.close()
            return router_pb2.SessionResponse()


class _LeanSession:
    """A session's call on the lean server."""

    def __init__(self, session: _Session, stream: Stream, sessions: set[_Session]) -> None:
        self._session = session
        self._stream = stream
        self._sessions = sessions
        session.on_overrun = lambda: stream.give_up(_overrun())

    def take(self, message: bytes) -> None:
        """Takes in what the gateway asks for."""
        try:
            self._session.take(router_pb2.SessionRequest.FromString(message))
        except DecodeError:
            self.fail(MeshError(Reason.INVALID_REQUEST, "a message of the session can't be decoded"))
        except Exception as error:  # noqa: BLE001  # the last line of defence: whatever it is becomes a status
            self._stream.give_up(error)

    def fail(self, error: MeshError) -> None:
        """Ends the session."""
        self._stream.give_up(error)

    def close(self) -> None:
        """The gateway is gone."""
        self._session.close()
        self._sessions.discard(self._session)


def _overrun() -> MeshError:
    return MeshError(Reason.NO_CAPACITY, "the gateway does not read its answers")


class _Reports:
    """What one worker reports."""

    def __init__(self, fleet: Fleet, prefixes: Prefixes, worker: Worker, abandon: Abandon) -> None:
        self._fleet = fleet
        self._prefixes = prefixes
        self._worker = worker
        self._abandon = abandon

    def take(self, message: router_pb2.RegisterRequest) -> None:
        match message.WhichOneof("message"):
            case "load":
                self._fleet.report(self._worker, wire.load(message.load, self._worker.card))
                if message.load.abandoned_request_ids:
                    self._abandon(self._worker, frozenset(message.load.abandoned_request_ids))
            case "kv_cache_events":
                events = message.kv_cache_events
                self._prefixes.tell(
                    self._worker,
                    events.sequence_number,
                    cleared=events.cleared,
                    stored=events.stored_hashes,
                    removed=events.removed_hashes,
                )
            case _:
                what = "only the first message registers; the next ones report load or what is cached"
                raise MeshError(Reason.INVALID_REQUEST, what)


async def _registration(stream: AsyncIterator[router_pb2.RegisterRequest]) -> Any:
    first = await anext(stream, None)
    if first is None or first.WhichOneof("message") != "registration":
        raise MeshError(Reason.INVALID_REQUEST, "the first message must be a registration", field="registration")
    return wire.card(first.registration)


async def _commands(worker: Worker) -> AsyncIterator[router_pb2.RegisterResponse]:
    yield router_pb2.RegisterResponse(registered=router_pb2.Registered())
    told_drained = False
    while not worker.gone:
        if worker.drained != told_drained:
            told_drained = worker.drained
            yield _DRAIN if told_drained else _UNDRAIN
            continue
        worker.news.clear()
        await worker.news.wait()


_DRAIN: Final = router_pb2.RegisterResponse(drain=router_pb2.DrainCommand())
_UNDRAIN: Final = router_pb2.RegisterResponse(undrain=router_pb2.UndrainCommand())
