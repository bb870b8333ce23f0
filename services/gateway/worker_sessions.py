"""The gateway's sessions with workers: one bidirectional stream a worker, shared by all its generations."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import grpc.aio
from tokenloom.inference.v1 import worker_pb2

from services.common.errors import MeshError, Reason
from services.common.http2_client import calling
from services.common.http2_outgoing import send_from
from services.common.outbox import Outbox, OutboxFullError
from services.common.rpc import MAX_MESSAGE_BYTES
from services.common.status import error_from_status
from services.gateway import convert_output
from services.gateway.stream import Loss, Stream, WorkerLostError

__all__ = ["WorkerSessions"]

_log = logging.getLogger(__name__)
_PATH: Final = "/tokenloom.inference.v1.WorkerService/Session"
_MAX_WAITING_EDITS: Final = 10_000
_CONNECT_SECONDS: Final = 2.0
# A worker that stands still, whatever of it does, is given up within three seconds, and its streams go on elsewhere.
_SILENT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 2.0
_TURNED_AWAY: Final = (Reason.NO_READY_WORKER, Reason.NO_CAPACITY)


class _Session:
    """One session with one worker."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._outbox = Outbox(worker_pb2.SessionRequest, max_edits=_MAX_WAITING_EDITS)
        self._streams: dict[int, Stream] = {}
        self._next_handle = 1
        self._connected = False
        self.lost = False

    async def run(self) -> None:
        """Talks to the worker until either side ends it; then every stream on it has lost its worker."""
        try:
            # Given up at the first refusal: a worker that is picked listens, so one that doesn't is gone.
            async with calling(
                self._endpoint,
                _PATH,
                self._take,
                connect_seconds=_CONNECT_SECONDS,
                silent_seconds=_SILENT_SECONDS,
                answer_seconds=_ANSWER_SECONDS,
            ) as call:
                self._connected = True
                send_from(self._outbox, call, _encoded)
                await call.ended()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            _log.warning("worker session lost", extra={"worker": self._endpoint, "cause": _cause(error)})
        finally:
            self._lose()

    def submit(self, submission: worker_pb2.Submission, stream: Stream) -> int:
        """Starts a generation whose output goes to `stream`; returns its handle in this session."""
        handle = self._next_handle
        submission.handle = handle
        try:
            self._outbox.edit().submissions.append(submission)
        except OutboxFullError as error:
            raise WorkerLostError(f"{self._endpoint} does not read", loss=Loss.NOTHING) from error
        self._next_handle += 1
        self._streams[handle] = stream
        return handle

    def abort(self, handle: int) -> None:
        """Stops a generation, unless it is over."""
        if self._streams.pop(handle, None) is not None and not self.lost:
            self._outbox.edit().aborted_handles.append(handle)

    def close(self) -> None:
        """Ends the session once what is in the outbox is out."""
        self._outbox.close()

    def _lose(self) -> None:
        self.lost = True
        self._outbox.close()
        streams, self._streams = self._streams, {}
        if self._connected:
            lost = WorkerLostError(f"the session with {self._endpoint} ended", loss=Loss.WORKER)
        else:
            lost = WorkerLostError(f"{self._endpoint} can't be reached", loss=Loss.NOTHING)
        for stream in streams.values():
            stream.fail(lost)

    def _take(self, encoded: bytes) -> None:
        message = worker_pb2.SessionResponse.FromString(encoded)
        for start in message.starts:
            stream = self._streams.get(start.handle)
            if stream is not None:
                stream.prompt = convert_output.prompt(start.started)
                stream.prompt_tokens = start.started.prompt_token_count
                stream.cached_tokens = start.started.cached_token_count
        if message.handles:
            self._push_rows(message)
        for rich in message.deltas:
            self._push_rich(rich)
        for choice_end in message.choice_ends:
            stream = self._streams.get(choice_end.handle)
            if stream is not None:
                stream.push_piece(convert_output.finished_choice(choice_end.ended))
        for end in message.ends:
            self._end(end)

    def _push_rows(self, message: worker_pb2.SessionResponse) -> None:
        find = self._streams.get
        counts, token_ids = list(message.token_counts), list(message.token_ids)
        if counts.count(1) == len(counts):
            # One token a row is what nearly every step is.
            for handle, text, token_id in zip(message.handles, message.texts, token_ids, strict=True):
                stream = find(handle)
                if stream is not None:
                    stream.push_one(text, token_id)
            return
        position = 0
        for handle, text, count in zip(message.handles, message.texts, counts, strict=True):
            stream = find(handle)
            if stream is not None:
                stream.push(text, token_ids[position : position + count])
            position += count

    def _push_rich(self, rich: worker_pb2.GenerationDelta) -> None:
        stream = self._streams.get(rich.handle)
        if stream is not None:
            stream.push_piece(convert_output.piece(rich.delta))

    def _end(self, end: worker_pb2.EndedGeneration) -> None:
        stream = self._streams.pop(end.handle, None)
        if stream is None:
            return
        if end.HasField("failed"):
            stream.fail(_failure(error_from_status(end.failed), fatal=end.fatal))
        else:
            stream.end(convert_output.ending(end.completed))


class WorkerSessions:
    """Sessions by worker address, opened when first needed and opened anew when lost."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._sessions: dict[str, _Session] = {}

    def submit(self, endpoint: str, submission: worker_pb2.Submission, stream: Stream) -> Callable[[], None]:
        """Starts a generation on a worker; what is returned ends it, if it isn't over by then.

        Raises:
            WorkerLostError: the worker doesn't read what it is sent.
        """
        session = self.open(endpoint)
        return partial(session.abort, session.submit(submission, stream))

    def open(self, endpoint: str) -> _Session:
        """The session with a worker, opened if it is not."""
        session = self._sessions.get(endpoint)
        if session is None or session.lost:
            session = self._sessions[endpoint] = _Session(endpoint)
            self._tasks.create_task(session.run(), name=f"worker session {endpoint}")
        return session

    def keep(self, endpoints: set[str]) -> None:
        """Opens sessions with these workers ahead of need, and closes those with others once they are idle."""
        for endpoint in endpoints - self._sessions.keys():
            self.open(endpoint)
        for endpoint in self._sessions.keys() - endpoints:
            session = self._sessions[endpoint]
            if not session._streams:  # the two classes are one unit
                session.close()
                del self._sessions[endpoint]

    def close(self) -> None:
        """Ends every session."""
        for session in self._sessions.values():
            session.close()


def _encoded(request: worker_pb2.SessionRequest) -> Iterator[bytes]:
    """What was in the outbox, in messages that the worker takes: one too large would end the session for all."""
    encoded = request.SerializeToString()
    if len(encoded) <= MAX_MESSAGE_BYTES:
        yield encoded
        return
    for submission in request.submissions:
        yield worker_pb2.SessionRequest(submissions=[submission]).SerializeToString()
    yield worker_pb2.SessionRequest(aborted_handles=request.aborted_handles).SerializeToString()


def _cause(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else "no connection"


def _failure(error: MeshError, *, fatal: bool) -> MeshError | WorkerLostError:
    if error.reason in _TURNED_AWAY:
        return WorkerLostError(error.message, loss=Loss.NOTHING, refusal=error)
    if error.reason is Reason.ENGINE_FAILED:
        return WorkerLostError(error.message, fatal=fatal)
    return error
