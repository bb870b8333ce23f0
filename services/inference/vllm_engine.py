"""vLLM in this process, as the engine interface asks for it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from services.common.errors import MeshError, Reason
from services.common.settings_worker import WorkerSettings
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import PrefillMeter
from services.inference.engine import Capability, EngineCard, Load
from services.inference.output import EngineLostError, FinishReason, Sink
from services.inference.pooling import check_can
from services.inference.request import ChatMessage, ChatOptions, Generation
from services.inference.serving_time import ServingTime
from services.inference.streams import Streams
from services.inference.vllm_adapters import Adapters
from services.inference.vllm_life import VllmLife
from services.inference.vllm_params import Plan, plan
from services.inference.vllm_stats import EngineStats
from services.inference.vllm_stream import Stream

if TYPE_CHECKING:
    from services.inference.vllm_backend import Backend
    from services.inference.vllm_pooling import VllmPooler

__all__ = ["VllmEngine"]

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1.0


class VllmEngine:
    """One AsyncLLM. When its engine process dies, every generation fails and the engine is started again in place.

    When it hangs, every generation fails at once, and it is started again unless it comes back by itself.

    For use on the event loop that entered it.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._stats = EngineStats()
        self._prefill = PrefillMeter()
        self._serving_time = ServingTime()
        self._streams: Streams[Stream] = Streams()
        self.cache_journal = CacheJournal()
        self._adapters = Adapters(settings.model)
        self._pooler: VllmPooler | None = None
        self._life = VllmLife(
            settings,
            self._stats,
            self.cache_journal,
            opened=self._opened,
            load=lambda: self.load,
            lose_all=self._lose_all,
        )

    async def __aenter__(self) -> Self:
        """Starts vLLM; other tasks of the loop go on meanwhile.

        Raises:
            ConfigError: the settings name an argument that vLLM hasn't, or a value that it refuses.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._life)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._supervisor = self._tasks.create_task(self._life.supervise(), name="vllm-supervisor")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fails what still runs, and stops vLLM."""
        self._life.end()
        self._supervisor.cancel()
        self._streams.fail_all(
            MeshError(Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=_RETRY_SECONDS)
        )
        await self._stack.__aexit__(kind, error, trace)

    async def _opened(self, backend: "Backend") -> None:
        await self._adapters.open(backend)
        self._pooler = await backend.pooler(self._settings.max_queued, self._prefill)

    def _lose_all(self) -> None:
        """Fails what runs, and has the engine forget it as soon as it hears of that."""
        for stream in self._streams:
            if stream.task is not None:
                stream.fail(EngineLostError("the engine does not answer"))
                stream.close()

    @property
    def card(self) -> EngineCard:
        """What the engine is."""
        return self._life.backend.card

    @property
    def load(self) -> Load:
        """How it is this moment: vLLM's own numbers of its last step, within what is known to be there now."""
        if self._pooler is not None:
            return self._pooler.load(trouble=self._life.trouble)
        there = self._streams.sequences
        running = min(self._stats.running, there)
        return Load(
            running=running,
            waiting=there - running,
            kv_usage=self._stats.kv_usage if there else 0.0,
            pending_prefill_tokens=sum(stream.pending_prefill_tokens for stream in self._streams),
            prefill_tokens_per_second=self._prefill.tokens_per_second,
            decode_step_seconds=self._stats.decode.base_seconds,
            decode_step_seconds_per_sequence=self._stats.decode.seconds_per_sequence,
            prefix_query_tokens=self._stats.prefix_queries,
            prefix_hit_tokens=self._stats.prefix_hits,
            output_tokens_per_second=self._stats.output.per_second,
            starts=self._life.starts,
            trouble=self._life.trouble,
        )

    @property
    def adapters(self) -> Adapters | None:
        """What loads and unloads adapters; None where the settings name no folder to take them from."""
        return self._adapters if self._settings.model.adapters_dir is not None else None

    @property
    def pooler(self) -> "VllmPooler | None":
        """What embeds and scores; None where the model generates."""
        self._life.ready()
        return self._pooler

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None, *, special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text, or of a conversation rendered with the model's chat template."""
        backend = self._life.ready()
        with backend.refusals("prompt" if isinstance(prompt, str) else "messages"):
            if isinstance(prompt, str) and not special_tokens:
                return await backend.prompts.plain_tokens(prompt)
            return (await backend.prompts.rendered(prompt, chat)).tokens

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts."""
        return await self._life.ready().token_texts(token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize."""
        return await self._life.ready().prompts.text(token_ids)

    async def sleep(self, level: int) -> None:
        """See Engine.sleep."""
        with self._life.maintenance() as backend:
            await backend.sleep(level)

    async def wake(self) -> None:
        """See Engine.wake."""
        with self._life.maintenance() as backend:
            await backend.wake()

    async def reload_weights(self, path: str) -> None:
        """See Engine.reload_weights. When vLLM fails in it, the engine starts again with the weights that it had."""
        await self._life.reload_weights(path)

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; returns when vLLM has accepted it.

        Raises:
            MeshError: see Engine.submit; NO_READY_WORKER while the engine starts again.
        """
        check_can(self.card, Capability.GENERATE)
        self._check_room(self._life.ready())
        self._streams.check_new(generation)
        stream = Stream(generation, sink, self._life.backend.texts)
        self._streams.add(stream)
        try:
            todo = await self._prepare(stream)
        except BaseException:
            self._streams.remove(stream)
            raise
        if stream.closed:
            self._streams.remove(stream)
            return
        stream.pending_prefill_tokens = len(todo.tokens)
        task = self._tasks.create_task(self._run(stream, todo, self._life.backend), name=f"vllm {generation.id}")
        await self._streams.accepted(stream, task, self._leave)

    def abort(self, generation_id: str) -> None:
        """Stops a generation; its sink hears nothing more. Unknown ids are ignored."""
        self._streams.abort(generation_id)

    def _check_room(self, backend: "Backend") -> None:
        there, most, queue = self._streams.sequences, backend.card.max_running, self._settings.max_queued
        # vLLM can run fewer than it may: its KV cache is a bound too.
        waiting = min(self._stats.known_waiting, there)
        if there >= most + queue or waiting > max(0, queue - 1):
            raise self._serving_time.queue_full(waiting=max(waiting, there - most), max_running=most)

    async def _prepare(self, stream: Stream) -> Plan:
        backend = self._life.backend
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
        todo = plan(generation, prompt.tokens, self._life.ready().limits, prompt.media)
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
            self._serving_time.observe(time.monotonic() - begun)
        except MeshError as error:
            stream.fail(error)
        except Exception as error:  # noqa: BLE001  # one request's fault must not take the others along
            if isinstance(error, backend.dead):
                self._life.note_death()
                stream.fail(EngineLostError("the engine died"))
            else:
                _log.error("a generation failed", exc_info=error)
                stream.fail(MeshError(Reason.ENGINE_FAILED, "the engine failed"))
        finally:
            self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        """Lets go of a stream that is over; again, it does nothing."""
        if not self._streams.remove(stream):
            return
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
