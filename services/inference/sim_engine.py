"""A simulated engine: continuous batching, chunked prefill, KV and prefix cache, in real time and without a GPU.

What it says depends on the prompt and the position alone (services.inference.sim_text); when it says it depends on the
load, as with a real engine. Temperature, seed and penalties are taken and change nothing: every output is greedy.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings, WatchdogSettings
from services.inference import sim_text
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import DecodeModel, TokenRate
from services.inference.engine import Capability, EngineCard, Load
from services.inference.output import EngineLostError, Sink
from services.inference.request import ChatMessage, ChatOptions, Generation
from services.inference.sim_choices import choice_sinks
from services.inference.sim_life import SimLife
from services.inference.sim_plan import Planner
from services.inference.sim_scheduler import SimScheduler
from services.inference.sim_sequence import SimSequence
from services.inference.sim_tokenizer import SimTokenizer
from services.inference.watchdog import Watchdog

__all__ = ["SimEngine"]

# Below this a timer of the event loop says nothing, so a step that is due so soon begins at once.
_TIMER_SECONDS: Final = 0.001
_RETRY_SECONDS: Final = 1.0


class SimEngine:
    """An engine that computes nothing. Use it as an async context manager; one event loop owns it."""

    def __init__(
        self,
        settings: SimSettings,
        model_name: str,
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        watchdog: WatchdogSettings = WatchdogSettings(),  # noqa: B008  # it is frozen
    ) -> None:
        """`max_queued` requests may wait beyond the `max_num_seqs` that run; `clock` gives seconds."""
        self._settings = settings
        self._max_requests = settings.max_num_seqs + max_queued
        self._clock = clock
        self._card = _card(settings, model_name)
        self._tokenizer = SimTokenizer(self._card, output_tokens=1)
        self._planner = Planner(self._card, self._tokenizer, poison_text=settings.poison_text)
        self.cache_journal = CacheJournal()
        self._scheduler = SimScheduler(settings, clock, self.cache_journal, die=self._die)
        self._decode_model = DecodeModel()
        self._output_rate = TokenRate(clock)
        self._tasks = asyncio.TaskGroup()
        self._stepper: asyncio.Task[None] | None = None
        self._watchdog_settings = watchdog
        self.life = SimLife(
            restart_seconds=settings.restart_seconds,
            lose_all=self._lose_all,
            longest_step_seconds=lambda: 4 * self._scheduler.step_seconds(),
        )

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._watching = self._tasks.create_task(Watchdog(self.life, self._watchdog_settings).run())
        self.life.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.life.stop()
        self._watching.cancel()
        if self._stepper is not None:
            self._stepper.cancel()
        self._scheduler.fail_all(
            MeshError(Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=_RETRY_SECONDS)
        )
        # What ended the block goes on as it is; only the engine's own failure is added to it.
        await self._tasks.__aexit__(None, None, None)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    @property
    def load(self) -> Load:
        """How it is, this moment."""
        scheduler = self._scheduler
        return Load(
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_usage=scheduler.kv_usage,
            pending_prefill_tokens=scheduler.pending_prefill_tokens,
            prefill_tokens_per_second=scheduler.prefill_meter.tokens_per_second,
            decode_step_seconds=self._decode_model.base_seconds,
            decode_step_seconds_per_sequence=self._decode_model.seconds_per_sequence,
            prefix_query_tokens=scheduler.query_tokens,
            prefix_hit_tokens=scheduler.hit_tokens,
            output_tokens_per_second=self._output_rate.per_second,
            starts=self.life.starts,
            trouble=self.life.trouble,
        )

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; see Engine.submit."""
        if self.life.trouble:
            raise MeshError(Reason.NO_READY_WORKER, self.life.trouble, retry_after_seconds=_RETRY_SECONDS)
        if len(self._scheduler) + generation.choices > self._max_requests:
            raise MeshError(
                Reason.NO_CAPACITY, "too many requests wait for this model", retry_after_seconds=_RETRY_SECONDS
            )
        self._scheduler.add(generation.id, self._sequences(generation, sink))
        if self._stepper is None or self._stepper.done():
            self._stepper = self._tasks.create_task(self._step_while_busy())

    def abort(self, generation_id: str) -> None:
        """Stops a generation; see Engine.abort."""
        self._scheduler.abort(generation_id)

    @property
    def adapters(self) -> None:
        """None: there are no weights to adapt."""
        return

    @property
    def pooler(self) -> None:
        """None: it generates. See SimPooler."""
        return

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None, *, special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text or a conversation; see Engine.tokenize. There are no special tokens to leave out."""
        del special_tokens
        return self._tokenizer.tokenize(prompt, chat)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts."""
        return self._tokenizer.token_texts(token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize."""
        return self._tokenizer.detokenize(token_ids)

    async def sleep(self, level: int) -> None:  # noqa: ARG002  # it has no weights to keep
        """Forgets what is cached, as an engine without its memory does; see Engine.sleep."""
        self._scheduler.forget_cache()

    async def wake(self) -> None:
        """Nothing to do; see Engine.wake."""

    async def reload_weights(self, path: str) -> None:
        """Forgets what is cached; see Engine.reload_weights."""
        if path:
            raise MeshError(Reason.FAILED_PRECONDITION, "path: the simulated engine has no checkpoints", field="path")
        self._scheduler.forget_cache()

    def _sequences(self, generation: Generation, sink: Sink) -> list[SimSequence]:
        tokens = self._planner.prompt_tokens(generation)
        is_poison = self._planner.is_poison(generation.prompt)
        return [
            SimSequence(
                generation,
                each,
                tokens,
                self._planner.output(generation, tokens, choice),
                block_size=self._settings.block_size,
                is_poison=is_poison,
            )
            for choice, each in enumerate(choice_sinks(sink, generation.choices))
        ]

    async def _step_while_busy(self) -> None:
        scheduler = self._scheduler
        begun = deadline = self._clock()
        while len(scheduler):
            scheduler.admit()
            chunk, batch = scheduler.chunk, scheduler.decoding
            duration = scheduler.step_seconds(chunk)
            # A step that was late may be made up for by the next one, but not the whole time that was lost.
            deadline = max(deadline, self._clock() - duration) + duration
            await self._sleep_until(deadline)
            await self.life.going()
            self.life.steps += 1
            now = self._clock()
            if batch and not chunk:
                self._decode_model.observe(batch, now - begun)
            self._output_rate.observe(batch)
            scheduler.decode(now)
            scheduler.prefill(chunk, now)
            begun = now

    def _die(self) -> None:
        self.life.die()
        self._scheduler.forget_cache()

    def _lose_all(self, message: str) -> None:
        self._scheduler.fail_all(EngineLostError(message))

    async def _sleep_until(self, deadline: float) -> None:
        left = deadline - self._clock()
        await asyncio.sleep(left if left > _TIMER_SECONDS else 0)


def _card(settings: SimSettings, model_name: str) -> EngineCard:
    return EngineCard(
        kind="sim",
        model=model_name,
        max_context_tokens=min(settings.max_model_len, settings.kv_blocks * settings.block_size),
        vocabulary_size=sim_text.VOCABULARY_SIZE,
        capabilities=frozenset({Capability.GENERATE, Capability.CHAT, Capability.LOGPROBS}),
        max_running=settings.max_num_seqs,
        kv_cache_tokens=settings.kv_blocks * settings.block_size,
        kv_block_tokens=settings.block_size,
    )
