"""Works on batches: one gateway at a time on each, going on where a lost one stopped."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

from services.common.database import DatabaseError
from services.gateway.batch_lines import Line, check_lines, error_line, line_of, result_line
from services.gateway.batch_store import BatchRecord, BatchStore, LineResult
from services.gateway.caller import Caller
from services.gateway.file_store import FileStore
from services.gateway.identity import Identity
from services.gateway.inner_calls import InnerCalls

__all__ = ["BatchRunner"]

_log = logging.getLogger(__name__)
_IDLE_SECONDS: Final = 1.0
_OWNED_SECONDS: Final = 30.0
_RENEW_SECONDS: Final = 1.0
_SWEEP_SECONDS: Final = 600.0
_SAVE_SECONDS: Final = 0.25
_MAX_RETRY_SECONDS: Final = 30.0
_BATCH_PRIORITY: Final = 100
"""Behind everybody who waits for an answer."""


class BatchRunner:
    """Finds batches that have something to do and does it, at low priority, a few requests at a time."""

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        calls: InnerCalls,
        *,
        identity_of: Callable[[BatchRecord], Identity | None],
        concurrency: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`identity_of`: whose a batch is, or None when that key may no longer be used."""
        self._batches = batches
        self._files = files
        self._calls = calls
        self._identity_of = identity_of
        self._concurrency = concurrency
        self._clock = clock
        self._owner = uuid.uuid4().hex

    async def run(self) -> None:
        """Works until cancelled."""
        swept_at = 0.0
        while True:
            try:
                if self._clock() - swept_at > _SWEEP_SECONDS:
                    swept_at = self._clock()
                    await asyncio.to_thread(self._files.sweep)
                batch = await asyncio.to_thread(self._batches.claim, self._owner, _OWNED_SECONDS)
                if batch is not None:
                    await self._work(batch)
            except* DatabaseError as errors:
                _log.warning("batches wait for the database", extra={"cause": repr(errors.exceptions[0])})
            await asyncio.sleep(_IDLE_SECONDS)

    async def _work(self, batch: BatchRecord) -> None:
        _log.info("batch taken", extra={"batch": batch.id, "status": batch.status})
        try:
            async with self._kept(batch) as stopped:
                if batch.status == "validating" and not await self._validate(batch):
                    return
                if batch.status in ("validating", "in_progress"):
                    await self._process(batch, stopped)
                await self._finalize(batch)
        finally:
            await asyncio.shield(asyncio.to_thread(self._batches.release, batch.id, self._owner))

    @asynccontextmanager
    async def _kept(self, batch: BatchRecord) -> AsyncIterator[asyncio.Event]:
        """Keeps a batch ours during the block; the event tells that it is to be stopped or isn't ours any more."""
        stopped = asyncio.Event()

        async def renew() -> None:
            while True:
                await asyncio.sleep(_RENEW_SECONDS)
                try:
                    status = await asyncio.to_thread(self._batches.renew, batch.id, self._owner, _OWNED_SECONDS)
                except DatabaseError as error:
                    _log.warning("a batch could not be renewed", extra={"batch": batch.id, "cause": repr(error)})
                    continue
                if status in (None, "cancelling"):
                    stopped.set()

        renewing = asyncio.create_task(renew())
        try:
            yield stopped
        finally:
            renewing.cancel()

    async def _validate(self, batch: BatchRecord) -> bool:
        total, errors = await asyncio.to_thread(check_lines, self._files.lines(batch.input_file_id), batch.endpoint)
        if errors:
            await asyncio.to_thread(
                self._batches.advance, batch.id, self._owner, ["validating"], "failed", errors=errors, total=total
            )
            return False
        return await asyncio.to_thread(
            self._batches.advance, batch.id, self._owner, ["validating"], "in_progress", total=total
        )

    async def _process(self, batch: BatchRecord, stopped: asyncio.Event) -> None:
        done = await asyncio.to_thread(self._batches.done_lines, batch.id)
        todo = _Todo(self._files.lines(batch.input_file_id), done)
        results: asyncio.Queue[LineResult] = asyncio.Queue(maxsize=4 * self._concurrency)
        async with asyncio.TaskGroup() as group:
            saving = group.create_task(self._save(batch, results))
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._concurrency):
                    workers.create_task(self._work_lines(batch, todo, results, stopped))
            await results.join()
            saving.cancel()

    async def _work_lines(
        self, batch: BatchRecord, todo: "_Todo", results: asyncio.Queue[LineResult], stopped: asyncio.Event
    ) -> None:
        while not stopped.is_set():
            taken = await todo.take()
            if taken is None:
                return
            result = await _unless(stopped, self._answer(batch, *taken))
            if result is not None:
                await results.put(result)

    async def _save(self, batch: BatchRecord, results: asyncio.Queue[LineResult]) -> None:
        while True:
            together = [await results.get()]
            await asyncio.sleep(_SAVE_SECONDS)
            while not results.empty():
                together.append(results.get_nowait())
            while True:
                try:
                    await asyncio.to_thread(self._batches.add_results, batch.id, together)
                    break
                except DatabaseError as error:
                    _log.warning("results wait for the database", extra={"batch": batch.id, "cause": repr(error)})
                    await asyncio.sleep(_IDLE_SECONDS)
            for _ in together:
                results.task_done()

    async def _answer(self, batch: BatchRecord, number: int, line: Line) -> LineResult:
        """Asks until there is an answer that another try would not change."""
        wait = 1.0
        while True:
            left = batch.expires_at - self._clock()
            if left <= 0:
                return LineResult(line=number, ok=False, data=error_line(line, "batch_expired", "the batch expired"))
            identity = self._identity_of(batch)
            if identity is None:
                message = "the key of this batch may no longer be used"
                return LineResult(line=number, ok=False, data=error_line(line, "invalid_api_key", message))
            request_id = uuid.uuid4().hex
            caller = Caller(
                request_id=request_id,
                tenant=identity.tenant,
                priority=max(identity.priority, _BATCH_PRIORITY),
                session_id=batch.id,
            )
            answer = await self._calls.post(batch.endpoint, bytes(line.body), identity, caller)
            if answer.retry_after is None:
                data = result_line(line, answer.status, request_id, answer.body)
                return LineResult(line=number, ok=answer.status == 200, data=data)
            wait = min(max(wait * 2, answer.retry_after), _MAX_RETRY_SECONDS)
            await asyncio.sleep(min(wait, left))

    async def _finalize(self, batch: BatchRecord) -> None:
        current = await asyncio.to_thread(self._batches.find, batch.tenant, batch.id)
        if current is None or current.status not in ("in_progress", "finalizing", "cancelling"):
            return
        if current.status == "in_progress" and current.completed + current.failed < current.total:
            # Stopped, and not because it is done: it isn't ours any more.
            return
        end = _end_of(current, self._clock())
        if current.status == "in_progress":
            await asyncio.to_thread(self._batches.advance, batch.id, self._owner, ["in_progress"], "finalizing")
        files: dict[str, Any] = {}
        for ok, column in ((True, "output_file_id"), (False, "error_file_id")):
            count = current.completed if ok else current.failed
            if count:
                name = f"{batch.id}_{'output' if ok else 'error'}.jsonl"
                parts = self._batches.results(batch.id, ok=ok)
                file = await asyncio.to_thread(self._files.write, batch.tenant, name, "batch_output", parts)
                files[column] = file.id
        moved = await asyncio.to_thread(
            self._batches.advance, batch.id, self._owner, ["finalizing", "cancelling"], end, **files
        )
        if not moved:
            for file_id in files.values():
                await asyncio.to_thread(self._files.delete, file_id)
        _log.info("batch ended", extra={"batch": batch.id, "status": end})


class _Todo:
    """The lines that are still to be done, read as they are needed."""

    def __init__(self, lines: Iterator[bytes], done: set[int]) -> None:
        self._lines = enumerate(line for line in lines if line.strip())
        self._done = done
        self._turn = asyncio.Lock()

    async def take(self) -> tuple[int, Line] | None:
        """The next one; None when there is none."""
        async with self._turn:
            return await asyncio.to_thread(self._next)

    def _next(self) -> tuple[int, Line] | None:
        for number, raw in self._lines:
            if number not in self._done:
                return number, line_of(raw)
        return None


def _end_of(batch: BatchRecord, now: float) -> str:
    if batch.status == "cancelling":
        return "cancelled"
    return "expired" if now >= batch.expires_at else "completed"


async def _unless(stopped: asyncio.Event, work: Any) -> LineResult | None:
    """The result of `work`, or None when the event comes first, which ends the work."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
