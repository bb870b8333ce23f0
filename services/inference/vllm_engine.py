"""vLLM in this process, as the engine interface asks for it."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from services.common.errors import MeshError, Reason
from services.common.settings_worker import WorkerSettings
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import MovingMean, PrefillMeter
from services.inference.engine import (
    Capability,
    ChatMessage,
    ChatOptions,
    EngineCard,
    EngineLostError,
    FinishReason,
    Generation,
    Load,
    Sink,
)
from services.inference.pooling import check_can
from services.inference.signs import signs_of
from services.inference.vllm_adapters import Adapters
from services.inference.vllm_environment import has_cuda, prepare_environment, vllm_version
from services.inference.vllm_kv_events import KvEvents
from services.inference.vllm_nursery import Nursery, import_vllm, plant
from services.inference.vllm_params import Plan, plan
from services.inference.vllm_stats import EngineStats
from services.inference.vllm_stream import Stream
from services.inference.watchdog import Signs, Watchdog

if TYPE_CHECKING:
    from services.inference.vllm_backend import Backend
    from services.inference.vllm_pooling import VllmPooler

__all__ = ["StartTimeoutError", "VllmEngine", "prepare_process"]

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


def prepare_process(settings: WorkerSettings) -> None:
    """Has engines start fast and safely in this process, which has no second thread yet; takes seconds.

    Without it they start all the same, from a server process that has to import vLLM itself.

    Raises:
        ConfigError: there is no vLLM.
    """
    vllm_version()
    if has_cuda():
        return
    prepare_environment(settings)
    import_vllm()
    plant()


class StartTimeoutError(Exception):
    """The engine process was not ready in time."""


class VllmEngine:
    """One AsyncLLM. When its engine process dies, every generation fails and the engine is started again in place.

    When it hangs, every generation fails at once, and it is started again unless it comes back by itself.

    For use on the event loop that entered it.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._stats = EngineStats()
        self._prefill = PrefillMeter()
        self._served_seconds = MovingMean()
        self._streams: dict[str, Stream] = {}
        self._nursery = Nursery(forks=not has_cuda())
        self._start_bound = settings.start_seconds
        self.cache_journal = CacheJournal()
        self._events = KvEvents(settings.model.name, self.cache_journal)
        self._trouble = "the engine is starting"
        self._maintained = False
        self._starts = 0
        self._adapters = Adapters(settings.model)
        self._backend: Backend
        self._pooler: VllmPooler | None = None

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
            stack.push_async_callback(self._in_thread_once, self._nursery.close)
            self._nursery.open()
            await stack.enter_async_context(self._events)
            await self._start_persistently(StartTimeoutError)
            stack.push_async_callback(self._stop)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._supervisor = self._tasks.create_task(self._supervise(), name="vllm-supervisor")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fails what still runs, and stops vLLM."""
        self._trouble = "the worker is stopping"
        self._supervisor.cancel()
        for stream in list(self._streams.values()):
            stream.fail(MeshError(Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=1.0))
            stream.close()
        await self._stack.__aexit__(kind, error, trace)

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
        self._backend = await self._started_backend()
        try:
            self._backend.watch()
            async with asyncio.timeout(self._start_bound):
                await self._backend.warm_up()
                await self._adapters.open(self._backend)
                self._pooler = await self._backend.pooler(self._settings.max_queued, self._prefill)
        except BaseException as error:
            await self._stop()
            if isinstance(error, TimeoutError):
                raise StartTimeoutError("the first generation does not end") from error
            raise
        seconds = time.monotonic() - begun
        self._start_bound = max(_SHORTEST_START_BOUND_SECONDS, _START_FACTOR * seconds)
        self._stats.warming_up = False
        self._starts += 1
        self._trouble = ""
        _log.info("vLLM is ready", extra={"seconds": round(seconds, 2), "model": self.card.model})

    async def _started_backend(self) -> "Backend":
        starting = self._in_thread(_start_backend, self._settings, self._stats, self._nursery, self._events.endpoint)
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
            self._nursery.kill()
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
        self._trouble = self._trouble or "the engine starts again"
        await self._backend.stop(self._in_thread)

    async def _supervise(self) -> None:
        while True:
            watching = asyncio.ensure_future(Watchdog(_Core(self), self._settings.watchdog).run())
            try:
                await self._backend.died()
            finally:
                watching.cancel()
            await asyncio.wait([watching])
            self._trouble = _DIED
            _log.error("the vLLM engine died", extra={"running": len(self._streams)})
            await self._stop()
            self._stats.reset()
            self._events.forget()
            await self._start_persistently(Exception)

    def _lose_all(self) -> None:
        """Fails what runs, and has the engine forget it as soon as it hears of that."""
        for stream in list(self._streams.values()):
            if stream.task is not None:
                stream.fail(EngineLostError("the engine does not answer"))
                stream.close()

    @property
    def card(self) -> EngineCard:
        """What the engine is."""
        return self._backend.card

    @property
    def load(self) -> Load:
        """How it is this moment: vLLM's own numbers of its last step, within what is known to be there now."""
        if self._pooler is not None:
            return self._pooler.load(trouble=self._trouble)
        there = self._sequences
        running = min(self._stats.running, there)
        return Load(
            running=running,
            waiting=there - running,
            kv_usage=self._stats.kv_usage if there else 0.0,
            pending_prefill_tokens=sum(stream.pending_prefill_tokens for stream in self._streams.values()),
            prefill_tokens_per_second=self._prefill.tokens_per_second,
            decode_step_seconds=self._stats.decode.base_seconds,
            decode_step_seconds_per_sequence=self._stats.decode.seconds_per_sequence,
            prefix_query_tokens=self._stats.prefix_queries,
            prefix_hit_tokens=self._stats.prefix_hits,
            output_tokens_per_second=self._stats.output.per_second,
            starts=self._starts,
            trouble=self._trouble,
        )

    @property
    def adapters(self) -> Adapters | None:
        """What loads and unloads adapters; None where the settings name no folder to take them from."""
        return self._adapters if self._settings.model.adapters_dir is not None else None

    @property
    def pooler(self) -> "VllmPooler | None":
        """What embeds and scores; None where the model generates."""
        self._ready()
        return self._pooler

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None, *, special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text, or of a conversation rendered with the model's chat template."""
        backend = self._ready()
        with backend.refusals("prompt" if isinstance(prompt, str) else "messages"):
            if isinstance(prompt, str) and not special_tokens:
                return await backend.prompts.plain_tokens(prompt)
            return (await backend.prompts.rendered(prompt, chat)).tokens

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts."""
        return await self._ready().token_texts(token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize."""
        return await self._ready().prompts.text(token_ids)

    async def sleep(self, level: int) -> None:
        """See Engine.sleep."""
        with self._maintenance() as backend:
            await backend.sleep(level)

    async def wake(self) -> None:
        """See Engine.wake."""
        with self._maintenance() as backend:
            await backend.wake()

    async def reload_weights(self, path: str) -> None:
        """See Engine.reload_weights. When vLLM fails in it, the engine starts again with the weights that it had."""
        with self._maintenance() as backend:
            where = path or self._settings.model.path or ""
            backend.check_checkpoint(where)
            try:
                await backend.reload(where)
            except BaseException as error:
                # Which weights it has now, nobody knows.
                self._nursery.kill()
                if not isinstance(error, Exception):
                    raise
                _log.exception("the weights could not be replaced")
                message = "path: the engine can't use the checkpoint"
                raise MeshError(Reason.FAILED_PRECONDITION, message, field="path") from error
            model = msgspec.structs.replace(self._settings.model, path=where)
            self._settings = msgspec.structs.replace(self._settings, model=model)

    @contextmanager
    def _maintenance(self) -> "Iterator[Backend]":
        """For what may keep the engine from answering for long."""
        backend = self._ready()
        self._maintained = True
        try:
            yield backend
        finally:
            self._maintained = False

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; returns when vLLM has accepted it.

        Raises:
            MeshError: see Engine.submit; NO_READY_WORKER while the engine starts again.
        """
        check_can(self.card, Capability.GENERATE)
        self._check_room(self._ready())
        if generation.id in self._streams:
            raise MeshError(Reason.INTERNAL, "two generations have the same id")
        stream = Stream(generation, sink, self._backend.texts)
        # From here on it counts as load, and can be aborted.
        self._streams[generation.id] = stream
        try:
            todo = await self._prepare(stream)
        except BaseException:
            del self._streams[generation.id]
            raise
        if stream.closed:
            del self._streams[generation.id]
            return
        stream.pending_prefill_tokens = len(todo.tokens)
        stream.task = self._tasks.create_task(self._run(stream, todo, self._backend), name=f"vllm {generation.id}")
        # A task that is cancelled before its first turn does nothing at all.
        stream.task.add_done_callback(lambda _: self._leave(stream))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            stream.close()
            raise

    def abort(self, generation_id: str) -> None:
        """Stops a generation; its sink hears nothing more. Unknown ids are ignored."""
        if (stream := self._streams.get(generation_id)) is not None:
            stream.close()

    def _ready(self) -> "Backend":
        if self._trouble:
            raise MeshError(
                Reason.NO_READY_WORKER, "the engine is starting again", retry_after_seconds=_RESTART_SECONDS
            )
        return self._backend

    @property
    def _sequences(self) -> int:
        return sum(stream.sequences for stream in self._streams.values())

    def _check_room(self, backend: "Backend") -> None:
        there, most, queue = self._sequences, backend.card.max_running, self._settings.max_queued
        # vLLM can run fewer than it may: its KV cache is a bound too.
        waiting = min(self._stats.known_waiting, there)
        if there >= most + queue or waiting > max(0, queue - 1):
            turns = (max(waiting, there - most) + 1) / most
            seconds = min(60.0, max(0.1, turns * (self._served_seconds.value or 1.0)))
            raise MeshError(Reason.NO_CAPACITY, "the worker's queue is full", retry_after_seconds=seconds)

    async def _prepare(self, stream: Stream) -> Plan:
        backend = self._backend
        prompts, generation = backend.prompts, stream.generation
        form_field = None
        if backend.parsing is not None and (reading := backend.parsing.reading(generation)) is not None:
            form_field = None if reading.form is None else "chat.tools"
            stream.reading, stream.generation = reading, reading.apply(generation)
            generation = stream.generation
        with backend.refusals("messages" if generation.kind == "chat" else "prompt"):
            prompt = await prompts.of_generation(generation)
        if generation.structured_output is not None:
            form = generation.structured_output
            await backend.check_form(form, tenant=generation.tenant, field=form_field)
        todo = plan(generation, prompt.tokens, self._ready().limits, prompt.media)
        if not generation.echo:
            return todo
        given = generation.prompt if len(todo.prompt_token_ids) == len(prompt.tokens) else None
        text = given if isinstance(given, str) else await prompts.text(todo.prompt_token_ids)
        return replace(todo, prompt_text=text)

    async def _run(self, stream: Stream, todo: Plan, backend: "Backend") -> None:
        begun = time.monotonic()
        try:
            async with self._adapters.lease(stream.generation.model) as lora:
                await self._generate_or_release(stream, todo, backend, lora)
            self._served_seconds.observe(time.monotonic() - begun)
        except MeshError as error:
            stream.fail(error)
        except Exception as error:  # noqa: BLE001  # one request's fault must not take the others along
            if isinstance(error, backend.dead):
                # The supervisor hears of it a moment later.
                self._trouble = self._trouble or _DIED
                stream.fail(EngineLostError("the engine died"))
            else:
                _log.error("a generation failed", exc_info=error)
                stream.fail(MeshError(Reason.ENGINE_FAILED, "the engine failed"))
        finally:
            self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        """Lets go of a stream that is over; again, it does nothing."""
        if self._streams.get(stream.generation.id) is not stream:
            return
        del self._streams[stream.generation.id]
        if stream.pending_prefill_tokens:
            self._stats.leave_queue()
        stream.accept()

    async def _generate_or_release(self, stream: Stream, todo: Plan, backend: "Backend", lora: Any) -> None:
        """`lora` is vLLM's request for the adapter to use; None uses none."""
        try:
            await self._generate(stream, todo, backend, lora)
        except BaseException as error:
            # The adapter is in use as long as the engine goes on with it.
            if not isinstance(error, backend.dead):
                await backend.release(stream.generation.id)
            raise

    async def _generate(self, stream: Stream, todo: Plan, backend: "Backend", lora: Any) -> None:
        reading = stream.reading
        replay = backend.replay(todo) if reading is None else None
        stream.readers = [reading.reader(todo) for _ in range(stream.generation.choices)] if reading else ()
        resumed = stream.readers[0] if stream.readers and todo.emitted_token_ids else replay
        if resumed is not None and (resumed.stop_string or not todo.remaining_tokens):
            stream.accept()
            stream.start(todo)
            stops = resumed.stop_string or todo.ended_by_token
            cause = resumed.stop_string or todo.stop_token_id
            stream.complete(FinishReason.STOP if stops else FinishReason.LENGTH, todo, cause)
            return
        outputs = await backend.add(stream.generation, todo, detokenize=resumed is None, reading=reading, lora=lora)
        stream.accept()
        output = await outputs.get()
        self._observe_prefill(output)
        stream.start(todo, output)
        while not stream.take(output, todo, replay):
            output = outputs.get_nowait() or await outputs.get()
        if not output.finished:
            # A stop string that only the replay could see.
            await backend.release(stream.generation.id)

    def _observe_prefill(self, output: Any) -> None:
        computed = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        self._prefill.observe(computed, output.metrics.scheduled_ts, output.metrics.first_token_ts)


class _Core:
    """The engine process as its watchdog sees it."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._backend = engine._backend  # the two classes are one unit

    @property
    def steps(self) -> int:
        return self._engine._stats.steps

    @property
    def longest_step_seconds(self) -> float | None:
        if self._engine._maintained:
            return self._engine._settings.start_seconds
        load = self._engine.load
        tokens = min(load.pending_prefill_tokens, self._backend.most_step_tokens)
        decode = (load.decode_step_seconds or 0.0) + (load.decode_step_seconds_per_sequence or 0.0) * load.running
        if not tokens:
            return _STEP_FACTOR * decode
        speed = load.prefill_tokens_per_second
        return _STEP_FACTOR * (tokens / speed + decode) if speed else None

    async def probe(self) -> None:
        await self._backend.probe()

    def signs(self) -> Signs:
        return signs_of(self._engine._nursery.pids)

    def stalled(self, reason: str) -> None:
        self._engine._trouble = reason
        self._engine._lose_all()

    def recovered(self) -> None:
        self._engine._trouble = ""

    def kill(self) -> None:
        self._engine._nursery.kill()


def _start_backend(settings: WorkerSettings, stats: EngineStats, nursery: Nursery, kv_events: str) -> "Backend":
    # Importing vLLM takes seconds, and reads the environment.
    from services.inference.vllm_start import start_backend  # noqa: PLC0415

    return start_backend(settings, stats, nursery, kv_events)
