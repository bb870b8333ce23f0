"""A server with OpenAI's API, as the engine interface asks for it: `vllm serve`, llama.cpp's server, and others."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self

from services.common.errors import MeshError, Reason
from services.common.settings_worker import UpstreamSettings, WorkerSettings
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import PrefillMeter
from services.inference.engine import Capability, EngineCard, Load
from services.inference.openai_flavours import flavour_of
from services.inference.openai_health import Health
from services.inference.openai_pooling import UpstreamPooler
from services.inference.openai_request import Call, check_possible, request_of
from services.inference.openai_resume import resumption
from services.inference.openai_stream import Meters, Stream, usage_of
from services.inference.openai_tokens import Tokens, estimate
from services.inference.openai_upstream import Upstream, UpstreamLostError, key_of
from services.inference.openai_watch import Pending, ServerWatch
from services.inference.output import EngineLostError, Sink
from services.inference.pooling import check_can
from services.inference.request import ChatMessage, ChatOptions, Generation
from services.inference.serving_time import ServingTime
from services.inference.streams import Streams

__all__ = ["OpenAIEngine"]

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1.0
# Of a server that costs nobody anything.
_CANARY_SECONDS: Final = 0.75
# For what is asked beside generations.
_FURTHER_CONNECTIONS: Final = 8
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class OpenAIEngine:
    """One server that somebody else runs. Use it as an async context manager; one event loop owns it."""

    def __init__(self, settings: WorkerSettings, environment: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError: the environment has not the server's key."""
        assert settings.upstream is not None
        self._settings = settings
        self._upstream_settings: UpstreamSettings = settings.upstream
        self._flavour = flavour_of(self._upstream_settings)
        self._model = self._upstream_settings.model or settings.model.name
        most = self._upstream_settings.max_running + settings.max_queued + _FURTHER_CONNECTIONS
        self._upstream = Upstream(
            self._upstream_settings, key_of(self._upstream_settings, environment), connections=most
        )
        self.cache_journal = CacheJournal()
        """Empty: the server tells nothing of its cache."""
        self._tokens = Tokens(self._upstream, self._flavour, self._model)
        self._health = Health(self._upstream, self._flavour, settings, lose_silent=self._lose_silent)
        self._health.own = lambda: self._own
        self._meters = Meters()
        self._prefill = PrefillMeter()
        self._serving_time = ServingTime()
        self._streams: Streams[Stream] = Streams()
        self._watching: list[asyncio.Task[None]] = []
        self._tasks = asyncio.TaskGroup()
        self._pooler: UpstreamPooler | None = None
        self._told_of_estimates = False
        self._card: EngineCard

    async def __aenter__(self) -> Self:
        """Waits until the server answers and has generated a token.

        Raises:
            ConfigError: it refuses the key, has not the model, or does not say what must be known of it.
            TimeoutError: it does not answer in time.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._upstream.close)
            async with asyncio.timeout(self._settings.start_seconds):
                self._card = await self._health.start()
            if Capability.EMBED in self._card.capabilities:
                self._pooler = UpstreamPooler(self._upstream, self._card, self._model, self._settings.max_queued)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._watching = [
                self._tasks.create_task(self._health.watch(), name="upstream health"),
                self._tasks.create_task(self._watch().run(self._settings.watchdog), name="upstream watchdog"),
            ]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fails what still runs."""
        for task in self._watching:
            task.cancel()
        stopping = MeshError(Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=_RETRY_SECONDS)
        self._streams.fail_all(stopping)
        await self._stack.__aexit__(None, None, None)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    @property
    def load(self) -> Load:
        """How it is: what this worker has there, and what the server says of others."""
        seen = self._health.seen
        there = self._own + seen.others
        running = min(there, self._card.max_running)
        return Load(
            running=running,
            waiting=there - running,
            kv_usage=seen.kv_usage,
            pending_prefill_tokens=sum(stream.pending for stream in self._streams),
            prefill_tokens_per_second=self._prefill.tokens_per_second,
            decode_step_seconds=self._meters.decode.base_seconds,
            decode_step_seconds_per_sequence=self._meters.decode.seconds_per_sequence,
            prefix_query_tokens=seen.prefix_queries,
            prefix_hit_tokens=seen.prefix_hits,
            output_tokens_per_second=self._meters.output.per_second,
            starts=self._health.starts,
            trouble=self._health.trouble,
        )

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; returns when the server has accepted it. See Engine.submit."""
        check_can(self._card, Capability.CHAT if generation.kind == "chat" else Capability.GENERATE)
        self._check_room()
        check_possible(generation, self._flavour)
        self._streams.check_new(generation)
        stream = Stream(generation, sink, self._meters, prompt_estimate=estimate(generation))
        self._streams.add(stream)
        task = self._tasks.create_task(self._run(stream), name=f"upstream {generation.id}")
        await self._streams.accepted(stream, task, self._leave)

    def abort(self, generation_id: str) -> None:
        """Stops a generation, by hanging up; its sink hears nothing more. Unknown ids are ignored."""
        self._streams.abort(generation_id)

    @property
    def adapters(self) -> None:
        """None: what the server serves is its own affair."""
        return

    @property
    def pooler(self) -> UpstreamPooler | None:
        """What embeds; None where the model generates."""
        return self._pooler

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None, *, special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text or a conversation; see Engine.tokenize. Raises MeshError (UNIMPLEMENTED), too."""
        self._check_alive()
        return await self._tokens.of(prompt, special_tokens=special_tokens, options=chat or ChatOptions())

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts. Raises MeshError (UNIMPLEMENTED), too."""
        self._check_alive()
        return await self._tokens.texts(token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize. Raises MeshError (UNIMPLEMENTED), too."""
        self._check_alive()
        return await self._tokens.text(token_ids)

    async def sleep(self, level: int) -> None:  # noqa: ARG002  # the interface's
        """Never: raises MeshError (FAILED_PRECONDITION)."""
        raise _not_ours()

    async def wake(self) -> None:
        """Nothing to do; see Engine.wake."""

    async def reload_weights(self, path: str) -> None:  # noqa: ARG002  # the interface's
        """Never: raises MeshError (FAILED_PRECONDITION)."""
        raise _not_ours()

    @property
    def _own(self) -> int:
        """What this worker has there: outputs and jobs."""
        jobs = self._pooler.count if self._pooler is not None else 0
        return jobs + self._streams.sequences

    def _watch(self) -> ServerWatch:
        told = self._upstream_settings.canary_seconds
        idle_seconds = _CANARY_SECONDS if told is None and self._flavour.is_free else told
        step_tokens = self._flavour.step_tokens
        return ServerWatch(self._health, self._todo, idle_seconds=idle_seconds, step_tokens=step_tokens)

    def _todo(self) -> Pending:
        return Pending(
            requests=self._own,
            tokens=sum(stream.pending for stream in self._streams),
            tokens_per_second=self._prefill.tokens_per_second,
            batches=self._meters.batches,
            jobs=self._pooler.count if self._pooler is not None else 0,
        )

    def _check_alive(self) -> None:
        if self._health.trouble:
            raise MeshError(Reason.NO_READY_WORKER, self._health.trouble, retry_after_seconds=_RETRY_SECONDS)

    def _check_room(self) -> None:
        self._check_alive()
        there = self._own
        most, queue = self._card.max_running, self._settings.max_queued
        if there >= most + queue:
            raise self._serving_time.queue_full(waiting=there - most, max_running=most)

    def _lose_silent(self, since: float) -> None:
        """The server does not answer since then: fails what has heard nothing either."""
        for stream in self._streams:
            if stream.last_at <= since:
                stream.fail(EngineLostError("the server behind this worker does not answer"))
                stream.close()

    async def _run(self, stream: Stream) -> None:
        try:
            await self._generate(stream)
            self._serving_time.observe(time.monotonic() - stream.begun_at)
        except UpstreamLostError as error:
            self._health.check_soon()
            stream.fail(error)
        except MeshError as error:
            stream.fail(error)
        except Exception:  # noqa: BLE001  # one request's fault must not take the others along
            _log.exception("a generation failed")
            stream.fail(MeshError(Reason.ENGINE_FAILED, "the engine failed"))
        finally:
            self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        """Lets go of a stream that is over; again, it does nothing."""
        if self._streams.remove(stream):
            stream.accept()

    async def _generate(self, stream: Stream) -> None:
        generation = stream.generation
        await self._prepare_echo(stream)
        call = request_of(generation, self._flavour, self._model)
        if generation.emitted_token_ids:
            resumed = await resumption(generation, self._tokens, self._upstream, self._flavour, self._card)
            stream.prompt_tokens, stream.repeated = resumed.prompt_tokens, list(resumed.repeated)
            if resumed.end is not None:
                stream.accept()
                stream.end_at_once(*resumed.end)
                return
            call = resumed.call
        await self._read(stream, call)
        if not stream.is_complete:
            raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker gave no reason for the end")
        usage = usage_of(stream, counted=await self._counted(stream))
        if stream.first_at is not None:
            self._prefill.observe(usage.prompt - usage.cached, stream.begun_at, stream.first_at)
        stream.complete(usage)

    async def _read(self, stream: Stream, call: Call) -> None:
        seconds = self._upstream_settings.timeout_seconds
        traceparent = stream.generation.traceparent
        headers = {"traceparent": traceparent} if _TRACEPARENT.fullmatch(traceparent) else {}
        loop = asyncio.get_running_loop()
        try:
            # What keeps a connection alive is no sign of an engine.
            async with asyncio.timeout(seconds) as silence:
                async with self._upstream.stream(call.path, call.body, headers) as batches:
                    stream.accept()
                    async for events in batches:
                        silence.reschedule(loop.time() + seconds)
                        stream.take(events)
        except TimeoutError as error:
            raise UpstreamLostError from error
        except UpstreamLostError:
            # Some servers just end after the last piece.
            if not stream.is_complete:
                raise

    async def _prepare_echo(self, stream: Stream) -> None:
        generation = stream.generation
        if generation.echo:
            prompt = generation.prompt
            ids = [part for part in prompt if isinstance(part, int)]
            stream.echo_text = prompt if isinstance(prompt, str) else await self._tokens.text(ids)

    async def _counted(self, stream: Stream) -> tuple[int, int]:
        """Tokens of prompt and output, where the server's stream does not tell."""
        told, generation = stream.told, stream.generation
        if told.prompt is not None and told.output is not None:
            return 0, 0
        prompt, output = await self._tokens.count(generation, stream.said, told)
        if not self._told_of_estimates and not self._flavour.counter:
            self._told_of_estimates = True
            _log.warning("the server does not tell what generations take; it is estimated from now on")
        return prompt, output


def _not_ours() -> MeshError:
    return MeshError(Reason.FAILED_PRECONDITION, "the engine is a server that this worker doesn't run")
