"""One gateway's session with the worker: all its generations, in one stream."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Final

from tokenloom.inference.v1 import worker_pb2

from services.common.errors import MeshError, Reason
from services.common.outbox import Outbox, OutboxFullError
from services.common.status import status_from_error
from services.inference import convert, convert_events
from services.inference.engine import card_of
from services.inference.gate import Gate
from services.inference.generations import Generations, Run
from services.inference.output import Delta, FinishReason, PromptEcho, StopCause, Timings, Usage
from services.inference.quarantine import FatalRequestError

__all__ = ["Session"]

# About two megabytes: far more than a gateway that reads leaves here, and well below what one message may have.
_MAX_WAITING_EDITS: Final = 32_768
# Log-probabilities of one token are as large as about this many plain deltas.
_LOGPROBS_COST: Final = 8


class Session:
    """Runs what a gateway submits; when the gateway is lost, so is all that it submitted."""

    def __init__(self, gate: Gate, generations: Generations) -> None:
        self._gate = gate
        self._generations = generations
        self._outbox = Outbox(_Batch, max_edits=_MAX_WAITING_EDITS)
        self._runs: dict[int, Run] = {}
        self._overflowed = False

    async def run(
        self,
        requests: AsyncIterable[worker_pb2.SessionRequest],
        write: Callable[[worker_pb2.SessionResponse], Awaitable[None]],
    ) -> None:
        """Serves the session until the gateway ends it.

        Raises:
            MeshError: the gateway reads too slowly.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(requests, tasks))
                try:
                    await self._write(write)
                finally:
                    reader.cancel()
                    self._abort_all()
        except BaseExceptionGroup as group:
            # There is one: what ended the reader or the writer.
            raise group.exceptions[0] from None

    def close(self) -> None:
        """Ends the session once what is waiting is written."""
        self._outbox.close()

    async def _read(self, requests: AsyncIterable[worker_pb2.SessionRequest], tasks: asyncio.TaskGroup) -> None:
        async for request in requests:
            for submission in request.submissions:
                self._submit(submission, tasks)
            for handle in request.aborted_handles:
                run = self._runs.pop(handle, None)
                if run is not None:
                    run.cancel()
        self._outbox.close()

    async def _write(self, write: Callable[[worker_pb2.SessionResponse], Awaitable[None]]) -> None:
        async for batch in self._outbox.messages():
            self._generations.metrics.output(batch.token_count)
            await write(batch.message())
            if self._overflowed:
                raise MeshError(Reason.NO_CAPACITY, "the session's messages are not read in time")

    def _submit(self, submission: worker_pb2.Submission, tasks: asyncio.TaskGroup) -> None:
        if self._overflowed:
            return
        sink = _SessionSink(submission, self._outbox, ended=self._forget, overflowed=self._overflow)
        try:
            run = self._start(submission, sink)
        except MeshError as error:
            self._generations.refused(error)
            sink.failed(error)
            return
        self._runs[submission.handle] = run
        run.submit_soon(tasks)
        if submission.HasField("timeout"):
            run.expire_after(submission.timeout.ToNanoseconds() / 1e9)

    def _start(self, submission: worker_pb2.Submission, sink: "_SessionSink") -> Run:
        if submission.handle in self._runs:
            # The gateway can't tell the two apart, so neither goes on.
            self._runs[submission.handle].cancel()
            raise MeshError(Reason.INVALID_REQUEST, "handle: is in use already", field="handle")
        if submission.HasField("timeout") and submission.timeout.ToNanoseconds() <= 0:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline has passed already")
        engine = self._gate.admit()
        generation = convert.generation_from_proto(
            submission.request,
            card_of(engine, submission.request.model),
            generation_id=self._generations.new_id(submission.request_id),
            priority=submission.priority,
            traceparent=submission.traceparent,
            tenant=submission.tenant_id,
        )
        generation = replace(generation, lost_engines=submission.lost_engine_count)
        return self._generations.start(engine, generation, sink, submission.request_id)

    def _abort_all(self) -> None:
        runs, self._runs = self._runs, {}
        for run in runs.values():
            run.cancel()

    def _forget(self, handle: int) -> None:
        self._runs.pop(handle, None)

    def _overflow(self) -> None:
        if self._overflowed:
            return
        self._overflowed = True
        # Soon, since this is called from within the engine.
        asyncio.get_running_loop().call_soon(self._abort_all)


class _SessionSink:
    """Writes what one generation produces into the session's next message."""

    __slots__ = ("_edit", "_ended", "_handle", "_model", "_overflowed", "_rich")

    def __init__(
        self,
        submission: worker_pb2.Submission,
        outbox: "Outbox[_Batch]",
        *,
        ended: Callable[[int], None],
        overflowed: Callable[[], None],
    ) -> None:
        self._edit = outbox.edit
        self._ended = ended
        self._overflowed = overflowed
        self._handle = submission.handle
        self._model = submission.request.model
        self._rich = False

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        started = convert_events.started_to_proto(self._model, prompt_tokens, cached_tokens, echo)
        cost = 1 if echo is None else 1 + _LOGPROBS_COST * len(echo.logprobs)
        try:
            self._edit(cost).starts.append(worker_pb2.StartedGeneration(handle=self._handle, started=started))
        except OutboxFullError:
            self._overflowed()

    def delta(self, text: str, token_ids: Sequence[int]) -> None:
        if self._rich:
            self.rich_delta(Delta(text=text, token_ids=token_ids))
            return
        try:
            self._edit().rows.append((self._handle, text, token_ids))
        except OutboxFullError:
            self._overflowed()

    def rich_delta(self, delta: Delta) -> None:
        # Rows are applied before deltas, so there are no more rows from here on.
        self._rich = True
        rich = worker_pb2.GenerationDelta(handle=self._handle, delta=convert_events.delta_to_proto(delta))
        try:
            self._edit(1 + _LOGPROBS_COST * len(delta.logprobs)).deltas.append(rich)
        except OutboxFullError:
            self._overflowed()

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        ended = convert_events.choice_ended_to_proto(choice, reason, stop_cause)
        try:
            self._edit().choice_ends.append(worker_pb2.EndedChoice(handle=self._handle, ended=ended))
        except OutboxFullError:
            self._overflowed()

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None:
        completed = convert_events.completed_to_proto(reason, usage, timings, stop_cause)
        self._end(worker_pb2.EndedGeneration(handle=self._handle, completed=completed))

    def failed(self, error: MeshError) -> None:
        fatal = isinstance(error, FatalRequestError)
        self._end(worker_pb2.EndedGeneration(handle=self._handle, failed=status_from_error(error), fatal=fatal))

    def _end(self, end: worker_pb2.EndedGeneration) -> None:
        self._ended(self._handle)
        try:
            self._edit().ends.append(end)
        except OutboxFullError:
            self._overflowed()


class _Batch:
    """What goes into one message, in columns only when it goes out: that is cheaper than row by row."""

    __slots__ = ("choice_ends", "deltas", "ends", "rows", "starts")

    def __init__(self) -> None:
        self.starts: list[worker_pb2.StartedGeneration] = []
        self.rows: list[tuple[int, str, Sequence[int]]] = []
        self.deltas: list[worker_pb2.GenerationDelta] = []
        self.ends: list[worker_pb2.EndedGeneration] = []
        self.choice_ends: list[worker_pb2.EndedChoice] = []

    @property
    def token_count(self) -> int:
        """Tokens of output in it."""
        return sum(len(row[2]) for row in self.rows) + sum(len(rich.delta.token_ids) for rich in self.deltas)

    def message(self) -> worker_pb2.SessionResponse:
        """The message."""
        message = worker_pb2.SessionResponse(
            starts=self.starts, deltas=self.deltas, ends=self.ends, choice_ends=self.choice_ends
        )
        if self.rows:
            handles, texts, token_ids = zip(*self.rows, strict=True)
            message.handles.extend(handles)
            message.texts.extend(texts)
            message.token_counts.extend(map(len, token_ids))
            message.token_ids.extend(chain.from_iterable(token_ids))
        return message
