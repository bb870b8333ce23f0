"""The life of vLLM's engine: its start, its watchdog, its death, and the next start in its place."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from services.common.errors import MeshError, Reason
from services.common.settings_worker import WorkerSettings
from services.inference.cache_journal import CacheJournal
from services.inference.engine import Load
from services.inference.signs import signs_of
from services.inference.vllm_environment import has_cuda, prepare_environment
from services.inference.vllm_kv_events import KvEvents
from services.inference.vllm_nursery import Nursery
from services.inference.vllm_stats import EngineStats
from services.inference.watchdog import Signs, Watchdog

if TYPE_CHECKING:
    # It imports vLLM.
    from services.inference.vllm_backend import Backend

__all__ = ["StartTimeoutError", "VllmLife"]

_log = logging.getLogger(__name__)

# An engine that doesn't start this often in a row won't start by itself: the process ends, for its launcher to see.
_MAX_FAILED_STARTS: Final = 3
_RESTART_SECONDS: Final = 5.0
# The first start reads the weights from wherever they are; the next ones find them in memory.
_START_FACTOR: Final = 5.0
_SHORTEST_START_BOUND_SECONDS: Final = 20.0
# How long vLLM may take to notice that the engine that it waits for was killed.
_GIVE_UP_SECONDS: Final = 20.0
_KILL_SECONDS: Final = 0.5
# Prompts are computed at an uneven speed, and others decode meanwhile.
_STEP_FACTOR: Final = 4.0
_DIED: Final = "the engine died and starts again"


class StartTimeoutError(Exception):
    """The engine process was not ready in time."""


class VllmLife:
    """One engine process after the other. As an async context manager it starts the first and stops the last of them.

    Its watchdog sees of the engine process what this is: see Watched. For use on the event loop that entered it.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        stats: EngineStats,
        journal: CacheJournal,
        *,
        opened: "Callable[[Backend], Awaitable[None]]",
        load: Callable[[], Load],
        lose_all: Callable[[], None],
    ) -> None:
        """`opened` prepares what runs for its first request, as part of its start. `lose_all` fails what runs."""
        self._settings = settings
        self._stats = stats
        self._opened = opened
        self._load = load
        self._lose_all = lose_all
        self.nursery = Nursery(forks=not has_cuda())
        self._events = KvEvents(settings.model.name, journal)
        self._start_bound = settings.start_seconds
        self._maintained = False
        self.backend: Backend
        """What runs, or ran last."""
        self.starts = 0
        """How often it was started."""
        self.trouble = "the engine is starting"
        """Why it takes nothing; empty when it does."""

    async def __aenter__(self) -> Self:
        """Starts vLLM; other tasks of the loop go on meanwhile.

        Raises:
            ConfigError: the settings name an argument that vLLM hasn't, or a value that it refuses.
        """
        async with AsyncExitStack() as stack:
            prepare_environment(self._settings)
            # A spawned engine process dies with the thread that starts it, so this one stays until the end.
            self._thread = ThreadPoolExecutor(1, "vllm-start")
            stack.callback(self._thread.shutdown, wait=False)
            stack.push_async_callback(self._in_thread_once, self.nursery.close)
            self.nursery.open()
            await stack.enter_async_context(self._events)
            await self._start_persistently(StartTimeoutError)
            stack.push_async_callback(self._stop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def end(self) -> None:
        """From now on it takes nothing."""
        self.trouble = "the worker is stopping"

    def ready(self) -> "Backend":
        """What runs. Raises MeshError (NO_READY_WORKER) while nothing does."""
        if self.trouble:
            raise MeshError(
                Reason.NO_READY_WORKER, "the engine is starting again", retry_after_seconds=_RESTART_SECONDS
            )
        return self.backend

    def note_death(self) -> None:
        """A generation has seen that it is dead, which the supervisor hears a moment later."""
        self.trouble = self.trouble or _DIED

    async def supervise(self) -> None:
        """Starts it again whenever it dies. Never returns; raises what the last of too many failed starts raised."""
        while True:
            watching = asyncio.ensure_future(Watchdog(self, self._settings.watchdog).run())
            try:
                await self.backend.died()
            finally:
                watching.cancel()
            await asyncio.wait([watching])
            self.trouble = _DIED
            load = self._load()
            _log.error("the vLLM engine died", extra={"running": load.running + load.waiting})
            await self._stop()
            self._stats.reset()
            self._events.forget()
            await self._start_persistently(Exception)

    @contextmanager
    def maintenance(self) -> "Iterator[Backend]":
        """For what may keep the engine from answering for long."""
        backend = self.ready()
        self._maintained = True
        try:
            yield backend
        finally:
            self._maintained = False

    async def reload_weights(self, path: str) -> None:
        """See Engine.reload_weights. When vLLM fails in it, the engine starts again with the weights that it had."""
        with self.maintenance() as backend:
            where = path or self._settings.model.path or ""
            backend.check_checkpoint(where)
            try:
                await backend.reload(where)
            except BaseException as error:
                # Which weights it has now, nobody knows.
                self.nursery.kill()
                if not isinstance(error, Exception):
                    raise
                _log.exception("the weights could not be replaced")
                message = "path: the engine can't use the checkpoint"
                raise MeshError(Reason.FAILED_PRECONDITION, message, field="path") from error
            model = msgspec.structs.replace(self._settings.model, path=where)
            self._settings = msgspec.structs.replace(self._settings, model=model)

    async def _start_persistently(self, *bearable: type[Exception]) -> None:
        failures = 0
        while True:
            try:
                return await self._start()
            except bearable:
                failures += 1
                _log.exception("vLLM did not start", extra={"failures": failures})
                if failures == _MAX_FAILED_STARTS:
                    raise

    async def _start(self) -> None:
        begun = time.monotonic()
        self.backend = await self._started_backend()
        try:
            self.backend.watch()
            async with asyncio.timeout(self._start_bound):
                await self.backend.warm_up()
                await self._opened(self.backend)
        except BaseException as error:
            await self._stop()
            if isinstance(error, TimeoutError):
                raise StartTimeoutError("the first generation does not end") from error
            raise
        seconds = time.monotonic() - begun
        self._start_bound = max(_SHORTEST_START_BOUND_SECONDS, _START_FACTOR * seconds)
        self._stats.warming_up = False
        self.starts += 1
        self.trouble = ""
        _log.info("vLLM is ready", extra={"seconds": round(seconds, 2), "model": self.backend.card.model})

    async def _started_backend(self) -> "Backend":
        starting = self._in_thread(_start_backend, self._settings, self._stats, self.nursery, self._events.endpoint)
        try:
            async with asyncio.timeout(self._start_bound):
                started: Backend = await asyncio.shield(starting)
        except (asyncio.CancelledError, TimeoutError) as error:
            await self._give_up(starting)
            if isinstance(error, TimeoutError):
                raise StartTimeoutError(f"not ready after {self._start_bound:.0f} s") from error
            raise
        return started

    async def _give_up(self, starting: "asyncio.Future[Backend]") -> None:
        # The start itself can't be interrupted, and must not be left behind; without its process it ends.
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while not starting.done():
            self.nursery.kill()
            await asyncio.wait([starting], timeout=_KILL_SECONDS)
            if time.monotonic() > deadline:
                _log.critical("vLLM hangs in its start, which only the end of this process ends")
                os._exit(1)
        if starting.exception() is None:
            await starting.result().stop(self._in_thread)

    def _in_thread(self, function: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _in_thread_once(self, function: Callable[[], None]) -> None:
        await self._in_thread(function)

    async def _stop(self) -> None:
        self.trouble = self.trouble or "the engine starts again"
        await self.backend.stop(self._in_thread)

    @property
    def steps(self) -> int:
        """See Watched."""
        return self._stats.steps

    @property
    def longest_step_seconds(self) -> float | None:
        """See Watched."""
        if self._maintained:
            return self._settings.start_seconds
        load = self._load()
        tokens = min(load.pending_prefill_tokens, self.backend.most_step_tokens)
        decode = (load.decode_step_seconds or 0.0) + (load.decode_step_seconds_per_sequence or 0.0) * load.running
        if not tokens:
            return _STEP_FACTOR * decode
        speed = load.prefill_tokens_per_second
        return _STEP_FACTOR * (tokens / speed + decode) if speed else None

    async def probe(self) -> None:
        """See Watched."""
        await self.backend.probe()

    def signs(self) -> Signs:
        """See Watched."""
        return signs_of(self.nursery.pids)

    def stalled(self, reason: str) -> None:
        """See Watched."""
        self.trouble = reason
        self._lose_all()

    def recovered(self) -> None:
        """See Watched."""
        self.trouble = ""

    def kill(self) -> None:
        """See Watched."""
        self.nursery.kill()


def _start_backend(settings: WorkerSettings, stats: EngineStats, nursery: Nursery, kv_events: str) -> "Backend":
    # Importing vLLM takes seconds, and reads the environment.
    from services.inference.vllm_start import start_backend  # noqa: PLC0415

    return start_backend(settings, stats, nursery, kv_events)
