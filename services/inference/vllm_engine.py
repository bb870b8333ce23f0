"""vLLM in this process, as the engine interface asks for it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from services.common.errors import MeshError, Reason
from services.common.settings import WorkerSettings
from services.inference.calibration import MovingMean, PrefillMeter
from services.inference.engine import (
    Capability,
    ChatMessage,
    EngineCard,
    FinishReason,
    Generation,
    Load,
    Sink,
    Timings,
)
from services.inference.pooling import check_can
from services.inference.vllm_adapters import Adapters
from services.inference.vllm_environment import prepare_environment
from services.inference.vllm_params import Plan, plan
from services.inference.vllm_stats import EngineStats
from services.inference.vllm_stream import Stream

if TYPE_CHECKING:
    from services.inference.vllm_backend import Backend
    from services.inference.vllm_pooling import VllmPooler

__all__ = ["VllmEngine"]

_log = logging.getLogger(__name__)

# An engine that doesn't start this often in a row won't start by itself: the process ends, for its launcher to see.
_MAX_FAILED_STARTS: Final = 3
_RESTART_SECONDS: Final = 5.0
_NO_TIME: Final = Timings(queue=0.0, prefill=0.0, decode=0.0)


class VllmEngine:
    """One AsyncLLM. When its engine process dies, every generation fails and the engine is started again in place.

    For use on the event loop that entered it.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._stats = EngineStats()
        self._prefill = PrefillMeter()
        self._served_seconds = MovingMean()
        self._streams: dict[str, Stream] = {}
        self._alive = False
        self._adapters = Adapters(settings.model)
        self._backend: Backend
        self._pooler: VllmPooler | None = None

    async def __aenter__(self) -> Self:
        """Starts vLLM; other tasks of the loop go on meanwhile.

        Raises:
            ConfigError: the settings name an argument that vLLM hasn't, or a value that it refuses.
        """
        async with AsyncExitStack() as stack:
            # The engine process dies with the thread that starts it, so this one stays until the end.
            self._thread = ThreadPoolExecutor(1, "vllm-start")
            stack.callback(self._thread.shutdown, wait=False)
            await self._start()
            stack.push_async_callback(self._stop)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._supervisor = self._tasks.create_task(self._supervise(), name="vllm-supervisor")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fails what still runs, and stops vLLM."""
        self._alive = False
        self._supervisor.cancel()
        for stream in list(self._streams.values()):
            stream.fail(MeshError(Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=1.0))
            stream.close()
        await self._stack.__aexit__(kind, error, trace)

    async def _start(self) -> None:
        begun = time.monotonic()
        starting = self._in_thread(_start_backend, self._settings, self._stats)
        try:
            self._backend = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It can't be interrupted, and must not be left behind.
            await asyncio.wait([starting])
            if starting.exception() is None:
                await self._in_thread(starting.result().shut_down)
            raise
        self._backend.watch()
        try:
            await self._adapters.open(self._backend)
            self._pooler = await self._backend.pooler(self._settings.max_queued, self._prefill)
        except BaseException:
            await self._stop()
            raise
        self._alive = True
        _log.info("vLLM is ready", extra={"seconds": round(time.monotonic() - begun, 2), "model": self.card.model})

    def _in_thread(self, function: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _stop(self) -> None:
        self._alive = False
        await self._backend.stop(self._in_thread)

    async def _supervise(self) -> None:
        while True:
            await self._backend.died()
            self._alive = False
            _log.error("the vLLM engine died", extra={"running": len(self._streams)})
            await self._stop()
            self._stats.reset()
            await self._start_again()

    async def _start_again(self) -> None:
        failures = 0
        while not self._alive:
            try:
                await self._start()
            except Exception:
                failures += 1
                _log.exception("vLLM did not start", extra={"failures": failures})
                if failures == _MAX_FAILED_STARTS:
                    raise

    @property
    def card(self) -> EngineCard:
        """What the engine is."""
        return self._backend.card

    @property
    def load(self) -> Load:
        """How it is this moment: vLLM's own numbers of its last step, within what is known to be there now."""
        if self._pooler is not None:
            return self._pooler.load(alive=self._alive)
        there = len(self._streams)
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
            alive=self._alive,
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

    async def tokenize(self, prompt: str | Sequence[ChatMessage], *, special_tokens: bool = True) -> list[int]:
        """The tokens of a text, or of a conversation rendered with the model's chat template."""
        backend = self._ready()
        with backend.refusals("prompt" if isinstance(prompt, str) else "messages"):
            if isinstance(prompt, str) and not special_tokens:
                return await backend.prompts.plain_tokens(prompt)
            return await backend.prompts.tokens(prompt)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts."""
        return await self._ready().token_texts(token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize."""
        return await self._ready().prompts.text(token_ids)

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; returns when vLLM has accepted it.

        Raises:
            MeshError: see Engine.submit; NO_READY_WORKER while the engine starts again.
        """
        check_can(self.card, Capability.GENERATE)
        self._check_room(self._ready())
        if generation.id in self._streams:
            raise MeshError(Reason.INTERNAL, "two generations have the same id")
        stream = Stream(generation, sink, self._backend.token_text)
        # From here on it counts as load, and can be aborted.
        self._streams[generation.id] = stream
        try:
            todo = await self._prepare(generation)
        except BaseException:
            del self._streams[generation.id]
            raise
        if stream.closed:
            del self._streams[generation.id]
            return
        stream.pending_prefill_tokens = len(todo.tokens)
        stream.task = self._tasks.create_task(self._run(stream, todo, self._backend), name=f"vllm {generation.id}")
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
        if not self._alive:
            raise MeshError(
                Reason.NO_READY_WORKER, "the engine is starting again", retry_after_seconds=_RESTART_SECONDS
            )
        return self._backend

    def _check_room(self, backend: "Backend") -> None:
        there, most, queue = len(self._streams), backend.card.max_running, self._settings.max_queued
        # vLLM can run fewer than it may: its KV cache is a bound too.
        waiting = min(self._stats.waiting, there)
        if there >= most + queue or waiting > max(0, queue - 1):
            turns = (max(waiting, there - most) + 1) / most
            seconds = min(60.0, max(0.1, turns * (self._served_seconds.value or 1.0)))
            raise MeshError(Reason.NO_CAPACITY, "the worker's queue is full", retry_after_seconds=seconds)

    async def _prepare(self, generation: Generation) -> Plan:
        backend = self._backend
        with backend.refusals("messages" if generation.kind == "chat" else "prompt"):
            prompt = await backend.prompts.tokens(generation.prompt)
        return plan(generation, prompt, self._ready().limits)

    async def _run(self, stream: Stream, todo: Plan, backend: "Backend") -> None:
        begun = time.monotonic()
        try:
            async with self._adapters.lease(stream.generation.model) as lora:
                await self._generate_or_release(stream, todo, backend, lora)
            self._served_seconds.observe(time.monotonic() - begun)
        except MeshError as error:
            stream.fail(error)
        except Exception as error:  # noqa: BLE001  # one request's fault must not take the others along
            if not isinstance(error, backend.dead):
                _log.error("a generation failed", exc_info=error)
            stream.fail(MeshError(Reason.ENGINE_FAILED, "the engine failed"))
        finally:
            del self._streams[stream.generation.id]
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
        replay = backend.replay(todo)
        if replay is not None and (replay.stopped or not todo.remaining_tokens):
            stream.accept()
            stream.start(todo, 0)
            stops = replay.stopped or todo.ended_by_token
            stream.complete(FinishReason.STOP if stops else FinishReason.LENGTH, todo, _NO_TIME)
            return
        outputs = await backend.add(stream.generation, todo, detokenize=replay is None, lora=lora)
        stream.accept()
        output = await outputs.get()
        self._observe_prefill(output)
        stream.start(todo, output.num_cached_tokens or 0)
        while not stream.take(output, todo, replay):
            output = outputs.get_nowait() or await outputs.get()
        if not output.finished:
            # A stop string that only the replay could see.
            await backend.release(stream.generation.id)

    def _observe_prefill(self, output: Any) -> None:
        computed = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        self._prefill.observe(computed, output.metrics.scheduled_ts, output.metrics.first_token_ts)


def _start_backend(settings: WorkerSettings, stats: EngineStats) -> "Backend":
    prepare_environment(settings)
    # Importing vLLM takes seconds, and reads the environment.
    from services.inference.vllm_backend import start_backend  # noqa: PLC0415

    return start_backend(settings, stats)
