"""A simulated engine: continuous batching, chunked prefill, KV and prefix cache, in real time and without a GPU.

What it says depends on the prompt and the position alone (services.inference.sim_text); when it says it depends on the
load, as with a real engine. Temperature, seed and penalties are taken and change nothing: every output is greedy.
"""

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Self

from services.common.errors import MeshError, Reason
from services.common.prefix import salt_of
from services.common.settings_worker import SimSettings, WatchdogSettings
from services.inference import sim_text
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import DecodeModel, PrefillMeter, TokenRate
from services.inference.engine import (
    Capability,
    ChatMessage,
    ChatOptions,
    Delta,
    EngineCard,
    EngineLostError,
    FinishReason,
    Generation,
    Load,
    PromptEcho,
    Sink,
    StopCause,
    Timings,
    Usage,
)
from services.inference.sim_cache import BlockPool, block_hashes, salt_hash
from services.inference.sim_choices import choice_sinks
from services.inference.sim_life import SimLife
from services.inference.sim_logprobs import prompt_logprobs, token_logprobs
from services.inference.sim_stop import StopMatcher
from services.inference.watchdog import Watchdog

__all__ = ["SimEngine"]

# Prompt tokens that one step takes at most, so that a long prompt holds up those who decode for a while only.
_CHUNK_TOKENS: Final = 512
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
        self._card = EngineCard(
            kind="sim",
            model=model_name,
            max_context_tokens=min(settings.max_model_len, settings.kv_blocks * settings.block_size),
            vocabulary_size=sim_text.VOCABULARY_SIZE,
            capabilities=frozenset({Capability.GENERATE, Capability.CHAT, Capability.LOGPROBS}),
            max_running=settings.max_num_seqs,
            kv_cache_tokens=settings.kv_blocks * settings.block_size,
            kv_block_tokens=settings.block_size,
        )
        self._tasks = asyncio.TaskGroup()
        self._stepper: asyncio.Task[None] | None = None
        self._watchdog_settings = watchdog
        self.life = SimLife(
            restart_seconds=settings.restart_seconds,
            lose_all=self._lose_all,
            longest_step_seconds=lambda: 4 * self._step_seconds(len(self._decoding), _CHUNK_TOKENS),
        )
        self.cache_journal = CacheJournal()
        self._pool = BlockPool(settings.kv_blocks, self.cache_journal)
        self._decode_model = DecodeModel()
        self._prefill_meter = PrefillMeter()
        self._output_rate = TokenRate(clock)
        self._generations: dict[str, list[_Sequence]] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._waiting: list[_Sequence] = []
        self._prefilling: dict[int, _Sequence] = {}
        self._decoding: dict[int, _Sequence] = {}
        self._arrivals = 0
        self._pending_prefill_tokens = 0
        self._query_tokens = 0
        self._hit_tokens = 0

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
        self._fail_all(MeshError(Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=_RETRY_SECONDS))
        # What ended the block goes on as it is; only the engine's own failure is added to it.
        await self._tasks.__aexit__(None, None, None)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    @property
    def load(self) -> Load:
        """How it is, this moment."""
        return Load(
            running=len(self._prefilling) + len(self._decoding),
            waiting=len(self._waiting),
            kv_usage=self._pool.usage,
            pending_prefill_tokens=self._pending_prefill_tokens,
            prefill_tokens_per_second=self._prefill_meter.tokens_per_second,
            decode_step_seconds=self._decode_model.base_seconds,
            decode_step_seconds_per_sequence=self._decode_model.seconds_per_sequence,
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
            output_tokens_per_second=self._output_rate.per_second,
            starts=self.life.starts,
            trouble=self.life.trouble,
        )

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Starts a generation; see Engine.submit."""
        if self.life.trouble:
            raise MeshError(Reason.NO_READY_WORKER, self.life.trouble, retry_after_seconds=_RETRY_SECONDS)
        if len(self._sequences) + generation.choices > self._max_requests:
            raise MeshError(
                Reason.NO_CAPACITY, "too many requests wait for this model", retry_after_seconds=_RETRY_SECONDS
            )
        self._check_possible(generation)
        tokens = self._prompt_tokens(generation)
        self._check_ids(generation, tokens)
        sequences = [
            self._sequence(generation, each, tokens, choice)
            for choice, each in enumerate(choice_sinks(sink, generation.choices))
        ]
        self._generations[generation.id] = sequences
        for sequence in sequences:
            self._sequences[sequence.id] = sequence
            self._enqueue(sequence)
        if self._stepper is None or self._stepper.done():
            self._stepper = self._tasks.create_task(self._step_while_busy())

    def _sequence(self, generation: Generation, sink: Sink, tokens: Sequence[int], choice: int) -> "_Sequence":
        seed = sim_text.output_seed(tokens, choice)
        end, reason = self._end_of(generation, tokens, seed)
        self._arrivals += 1
        size = self._settings.block_size
        sequence = _Sequence(generation, sink, tokens, seed=seed, end=end, reason=reason, block_size=size)
        sequence.id = self._arrivals
        sequence.order = (generation.priority, self._arrivals)
        sequence.arrival = self._clock()
        sequence.is_poison = self._is_poison(generation.prompt)
        return sequence

    def abort(self, generation_id: str) -> None:
        """Stops a generation; see Engine.abort."""
        for sequence in tuple(self._generations.get(generation_id, ())):
            self._remove(sequence)

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
        return self._text_tokens(prompt) if isinstance(prompt, str) else self._chat_tokens(prompt, chat)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts."""
        return [sim_text.token_text(token_id) for token_id in token_ids]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize."""
        return sim_text.detokenize(token_ids)

    async def sleep(self, level: int) -> None:  # noqa: ARG002  # it has no weights to keep
        """Forgets what is cached, as an engine without its memory does; see Engine.sleep."""
        self._forget_cache()

    async def wake(self) -> None:
        """Nothing to do; see Engine.wake."""

    async def reload_weights(self, path: str) -> None:
        """Forgets what is cached; see Engine.reload_weights."""
        if path:
            raise MeshError(Reason.FAILED_PRECONDITION, "path: the simulated engine has no checkpoints", field="path")
        self._forget_cache()

    def _prompt_tokens(self, generation: Generation) -> list[int]:
        prompt, limit = generation.prompt, generation.prompt_token_limit
        if isinstance(prompt, str):
            tokens = self._text_tokens(prompt)
        elif generation.kind == "chat":
            tokens = self._chat_tokens([part for part in prompt if isinstance(part, ChatMessage)], generation.chat)
        else:
            tokens = [part for part in prompt if isinstance(part, int)]
        return tokens if limit is None else tokens[-limit:]

    # Text that can't fit is refused before it is tokenized, which would hold everybody up.
    def _text_tokens(self, text: str) -> list[int]:
        self._check_length("prompt", len(text) // sim_text.LONGEST_TOKEN)
        return sim_text.tokenize(text)

    def _chat_tokens(self, messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> list[int]:
        self._check_length("messages", sum(len(sim_text.said(each)) for each in messages) // sim_text.LONGEST_TOKEN)
        return sim_text.render_chat(messages, options)

    def _check_possible(self, generation: Generation) -> None:
        # What it says is settled, so nothing can be kept from being said.
        impossible = {
            "sampling.bad_words": bool(generation.sampling.bad_words),
            "sampling.allowed_token_ids": bool(generation.sampling.allowed_token_ids),
            "structured_output": generation.structured_output is not None,
            "chat.tools": bool(generation.chat.tools),
            "chat.template_arguments_json": bool(generation.chat.template_arguments),
        }
        for field, asked in impossible.items():
            if asked:
                message = f"{field}: the simulated engine can't do that"
                raise MeshError(Reason.UNIMPLEMENTED, message, field=field)

    def _is_poison(self, prompt: str | Sequence[int] | Sequence[ChatMessage]) -> bool:
        poison = self._settings.poison_text
        if not poison:
            return False
        texts = (
            [prompt]
            if isinstance(prompt, str)
            else [sim_text.said(part) for part in prompt if isinstance(part, ChatMessage)]
        )
        return any(poison in text for text in texts)

    def _check_length(self, field: str, least_tokens: int) -> None:
        limit = self._card.max_context_tokens
        if least_tokens >= limit:
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"the model's context is {limit} tokens, and the prompt has at least {least_tokens}",
                field=field,
            )

    def _check_ids(self, generation: Generation, tokens: Sequence[int]) -> None:
        sampling = generation.sampling
        by_field: dict[str, Iterable[int]] = {
            "token_ids.ids": tokens,
            "emitted_token_ids": generation.emitted_token_ids,
            "sampling.stop_token_ids": sampling.stop_token_ids,
            "sampling.logit_bias": sampling.logit_bias,
        }
        for field, ids in by_field.items():
            highest = max(ids, default=0)
            if highest >= self._card.vocabulary_size:
                message = f"{field}: {highest} is not below the vocabulary's size, {self._card.vocabulary_size}"
                raise MeshError(Reason.INVALID_REQUEST, message, field=field)

    def _end_of(self, generation: Generation, tokens: Sequence[int], seed: int) -> tuple[int, FinishReason]:
        limit, sampling = self._card.max_context_tokens, generation.sampling
        room = limit - len(tokens)
        least = max(sampling.max_tokens or 1, sampling.min_tokens, len(generation.emitted_token_ids))
        if least > room:
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED,
                f"the model's context is {limit} tokens; the prompt has {len(tokens)} and the output may have {least}",
                field="messages" if generation.kind == "chat" else "prompt",
            )
        if sampling.max_tokens is not None:
            return sampling.max_tokens, FinishReason.LENGTH
        natural = max(sim_text.natural_length(seed), sampling.min_tokens)
        if sampling.ignore_eos or natural > room:
            return room, FinishReason.LENGTH
        return natural, FinishReason.STOP

    def _enqueue(self, sequence: "_Sequence") -> None:
        sequence.pending = sequence.length
        self._pending_prefill_tokens += sequence.pending
        insort(self._waiting, sequence, key=_order)

    async def _step_while_busy(self) -> None:
        begun = deadline = self._clock()
        while self._sequences:
            self._admit()
            chunk = min(_CHUNK_TOKENS, sum(sequence.pending for sequence in self._prefilling.values()))
            duration = self._step_seconds(len(self._decoding), chunk)
            # A step that was late may be made up for by the next one, but not the whole time that was lost.
            deadline = max(deadline, self._clock() - duration) + duration
            batch = len(self._decoding)
            await self._sleep_until(deadline)
            await self.life.going()
            self.life.steps += 1
            now = self._clock()
            if batch and not chunk:
                self._decode_model.observe(batch, now - begun)
            self._output_rate.observe(batch)
            self._decode(now)
            self._prefill(chunk, now)
            begun = now

    def _forget_cache(self) -> None:
        self.cache_journal.clear()
        self._pool = BlockPool(self._settings.kv_blocks, self.cache_journal)

    def _lose_all(self, message: str) -> None:
        """Fails everything, and forgets what was cached."""
        self._fail_all(EngineLostError(message))

    def _fail_all(self, error: MeshError) -> None:
        for generation_id, sequences in tuple(self._generations.items()):
            self.abort(generation_id)
            sequences[0].sink.failed(error)

    def _step_seconds(self, batch: int, chunk: int) -> float:
        settings = self._settings
        decode = settings.decode_step_ms + (batch - 1) * settings.decode_step_ms_per_sequence if batch else 0.0
        return decode / 1000 + chunk / settings.prefill_tokens_per_second

    async def _sleep_until(self, deadline: float) -> None:
        left = deadline - self._clock()
        await asyncio.sleep(left if left > _TIMER_SECONDS else 0)

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self._settings.max_num_seqs:
            sequence = self._waiting[0]
            size = self._settings.block_size
            # The last token is always computed: the first output comes from it.
            found = min(self._pool.lookup(sequence.hashes), (sequence.length - 1) // size)
            alone = min(sequence.length // size + 1, self._settings.kv_blocks) - found
            if not self._pool.admit(sequence.hashes[:found], alone):
                return
            self._waiting.pop(0)
            sequence.shared, sequence.alone = found, alone
            self._begin(sequence, found * size)

    def _begin(self, sequence: "_Sequence", cached: int) -> None:
        self._pending_prefill_tokens -= cached
        sequence.pending -= cached
        sequence.prefill_begun = self._clock()
        sequence.prefill_tokens = sequence.pending
        if sequence.scheduled is None:
            sequence.scheduled = sequence.prefill_begun
            sequence.cached = min(cached, sequence.prompt_count)
            self._query_tokens += sequence.prompt_count
            self._hit_tokens += sequence.cached
        self._prefilling[sequence.id] = sequence

    def _prefill(self, chunk: int, now: float) -> None:
        for sequence in tuple(self._prefilling.values()):
            part = min(chunk, sequence.pending)
            sequence.pending -= part
            chunk -= part
            self._pending_prefill_tokens -= part
            if sequence.pending:
                return
            if sequence.is_poison:
                self.life.die()
                self._forget_cache()
                return
            self._prefill_meter.observe(sequence.prefill_tokens, sequence.prefill_begun, now)
            self._finish_prefill(sequence, now)

    def _finish_prefill(self, sequence: "_Sequence", now: float) -> None:
        del self._prefilling[sequence.id]
        for block in sequence.hashes[sequence.shared :]:
            self._share(sequence, block)
        self._decoding[sequence.id] = sequence
        sequence.decoding = True
        if sequence.is_complete:
            if self._first(sequence, now):
                self._complete(sequence, now)
        else:
            sequence.plan_segment()

    def _share(self, sequence: "_Sequence", block: int) -> None:
        self._pool.share(block)
        sequence.shared += 1
        sequence.alone -= 1

    def _decode(self, now: float) -> None:
        # The hot path: once for each token. Whoever is called may abort any sequence.
        for sequence in tuple(self._decoding.values()):
            if not sequence.decoding:
                continue
            if sequence.first is None and not self._first(sequence, now):
                continue
            sequence.deliver(*next(sequence.steps))
            sequence.left -= 1
            if not sequence.left:
                self._end_segment(sequence, now)

    def _first(self, sequence: "_Sequence", now: float) -> bool:
        sequence.first = now
        sequence.sink.started(sequence.prompt_count, sequence.cached, sequence.echo)
        return sequence.decoding

    def _end_segment(self, sequence: "_Sequence", now: float) -> None:
        if not sequence.decoding:
            return
        if sequence.is_complete:
            self._complete(sequence, now)
            return
        self._share(sequence, sequence.fill_block())
        while not self._pool.grow():
            victim = max((*self._prefilling.values(), *self._decoding.values()), key=_order)
            self._preempt(victim)
            if victim is sequence:
                return
        sequence.alone += 1
        sequence.plan_segment()

    def _preempt(self, sequence: "_Sequence") -> None:
        # As real engines do: its blocks go to others, and it computes them again when there is room.
        self._stop_running(sequence)
        self._enqueue(sequence)

    def _complete(self, sequence: "_Sequence", now: float) -> None:
        sequence.flush()
        if not sequence.decoding:
            return
        self._remove(sequence)
        sequence.sink.completed(sequence.reason, sequence.usage, sequence.timings(now), sequence.stop_cause)

    def _remove(self, sequence: "_Sequence") -> None:
        del self._sequences[sequence.id]
        siblings = self._generations[sequence.generation_id]
        if len(siblings) == 1:
            del self._generations[sequence.generation_id]
        else:
            self._generations[sequence.generation_id] = [each for each in siblings if each is not sequence]
        if sequence.id in self._prefilling or sequence.id in self._decoding:
            self._stop_running(sequence)
        else:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
            self._pending_prefill_tokens -= sequence.pending

    def _stop_running(self, sequence: "_Sequence") -> None:
        self._prefilling.pop(sequence.id, None)
        self._decoding.pop(sequence.id, None)
        sequence.decoding = False
        self._pending_prefill_tokens -= sequence.pending
        sequence.pending = 0
        self._pool.release(sequence.hashes[: sequence.shared], sequence.alone)
        sequence.shared = sequence.alone = 0


class _Sequence:
    """One generation in the engine: where it is in its output, and what it holds."""

    __slots__ = (
        "_block_size", "_careful", "_root", "_seed", "_segment_end", "_tail", "alone", "arrival", "cached", "decoding",
        "deliver", "echo", "end", "first", "generation_id", "hashes", "id", "is_poison", "left", "order", "pending",
        "prefill_begun", "prefill_tokens", "prompt_count", "reason", "scheduled", "shared", "sink", "steps",
        "stop_cause",
    )  # fmt: skip  # one name a line would be longer than the class

    def __init__(
        self,
        generation: Generation,
        sink: Sink,
        prompt: Sequence[int],
        *,
        seed: int,
        end: int,
        reason: FinishReason,
        block_size: int,
    ) -> None:
        emitted = generation.emitted_token_ids
        tokens = [*prompt, *emitted]
        self.id = 0
        """Set once it is known, as are its order and arrival."""
        self.generation_id = generation.id
        self.sink = sink
        self.prompt_count = len(prompt)
        self.end = end
        """The position at which the output ends, for `reason`."""
        self.reason = reason
        self.stop_cause: StopCause | None = None
        self.echo = _echo(generation, prompt, seed)
        self._root = salt_hash(salt_of(generation.model, generation.salt))
        self.hashes = block_hashes(tokens, block_size, after=self._root)
        """Of every full block of prompt and output; the pool shares the first `shared` of them with this sequence."""
        self.shared = self.alone = 0
        self.cached = 0
        self.pending = 0
        """Tokens to prefill."""
        self.left = 0
        """Tokens until something happens: the end, or a full block."""
        self.decoding = False
        self.is_poison = False
        """Whether the engine dies of it, in the step that finishes its prompt."""
        self.order = (0, 0)
        self.arrival = 0.0
        self.prefill_begun = 0.0
        self.prefill_tokens = 0
        self.scheduled: float | None = None
        self.first: float | None = None
        self._block_size = block_size
        self._seed = seed
        self._segment_end = len(emitted)
        self._tail = tokens[len(self.hashes) * block_size :]
        self.steps = sim_text.output_steps(self._seed, len(emitted))
        self._careful = _Careful(generation, self, self._seed) if _needs_care(generation) else None
        self.deliver: Callable[[str, Sequence[int]], None] = self._careful.deliver if self._careful else sink.delta
        if self._careful:
            self._careful.replay(emitted)

    @property
    def position(self) -> int:
        """Tokens of output so far."""
        return self._segment_end - self.left

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return self.prompt_count + self.position

    @property
    def is_complete(self) -> bool:
        """Whether the whole output is there."""
        return self.position >= self.end

    @property
    def usage(self) -> Usage:
        """What it cost so far."""
        return Usage(prompt=self.prompt_count, cached=self.cached, output=self.position)

    def timings(self, now: float) -> Timings:
        """Where its time went, when it ended now."""
        scheduled = now if self.scheduled is None else self.scheduled
        first = now if self.first is None else self.first
        return Timings(queue=scheduled - self.arrival, prefill=first - scheduled, decode=now - first)

    def plan_segment(self) -> None:
        """Says how many tokens may come until something happens."""
        start = self.position
        self.left = min(self.end - start, self._block_size - self.length % self._block_size)
        self._segment_end = start + self.left

    def stop_here(self, cause: StopCause) -> None:
        """Ends the output with the token that is being delivered."""
        self.stop_cause = cause
        self.end = self._segment_end = self.position + 1
        self.left = 1
        self.reason = FinishReason.STOP

    def fill_block(self) -> int:
        """The hash of the block that the last token has filled."""
        since = self.position - (self._block_size - len(self._tail))
        block = self._tail + sim_text.output_tokens(self._seed, since, self.position)
        self._tail = []
        self.hashes += block_hashes(block, self._block_size, after=self.hashes[-1] if self.hashes else self._root)
        return self.hashes[-1]

    def flush(self) -> None:
        """Delivers what was held back for a stop string that didn't come."""
        if self._careful:
            self._careful.flush()


def _order(sequence: _Sequence) -> tuple[int, int]:
    return sequence.order


def _needs_care(generation: Generation) -> bool:
    sampling = generation.sampling
    return bool(sampling.stop or sampling.stop_token_ids) or sampling.logprob_count is not None


class _Careful:
    """Delivers the tokens of a sequence that has stops or wants log-probabilities."""

    def __init__(self, generation: Generation, sequence: _Sequence, seed: int) -> None:
        sampling = generation.sampling
        self._sequence = sequence
        self._seed = seed
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._logprob_count = sampling.logprob_count
        self._matcher = StopMatcher(sampling.stop, include=sampling.include_stop_string)

    def replay(self, emitted: Sequence[int]) -> None:
        """Takes in what the client has already, without delivering it."""
        detokenizer = sim_text.Detokenizer()
        for position, token_id in enumerate(emitted):
            _, cause = self._match(position, detokenizer.push(token_id), token_id)
            if cause is not None:
                self._sequence.stop_cause = cause
                self._sequence.end = self._sequence.position
                self._sequence.reason = FinishReason.STOP
                return

    def deliver(self, text: str, token_ids: Sequence[int]) -> None:
        position = self._sequence.position
        text, cause = self._match(position, text, token_ids[0])
        if cause is not None:
            self._sequence.stop_here(cause)
        count = self._logprob_count
        if count is None:
            self._sequence.sink.delta(text, token_ids)
            return
        logprobs = (token_logprobs(self._seed, position, token_ids[0], count),)
        self._sequence.sink.rich_delta(Delta(text=text, token_ids=token_ids, logprobs=logprobs))

    def flush(self) -> None:
        if held := self._matcher.flush():
            self._sequence.sink.delta(held, ())

    def _match(self, position: int, text: str, token_id: int) -> tuple[str, StopCause | None]:
        if position < self._min_tokens:
            return text, None
        text, stop = self._matcher.push(text)
        if token_id in self._stop_ids and stop is None:
            return text + self._matcher.flush(), token_id
        return text, stop


def _echo(generation: Generation, prompt: Sequence[int], seed: int) -> PromptEcho | None:
    count = generation.sampling.prompt_logprob_count
    if not generation.echo and count is None:
        return None
    logprobs = () if count is None else prompt_logprobs(seed, prompt, count)
    if not generation.echo:
        return PromptEcho(logprobs=logprobs)
    return PromptEcho(token_ids=prompt, text=sim_text.detokenize(prompt), logprobs=logprobs)
