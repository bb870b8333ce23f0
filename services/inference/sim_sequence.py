"""One sequence in the simulated engine: where it is in its output, what it holds, and how its tokens are told."""

from collections.abc import Callable, Sequence

from services.common.prefix import salt_of
from services.inference import sim_text
from services.inference.output import Delta, FinishReason, PromptEcho, Sink, StopCause, Timings, Usage
from services.inference.request import Generation
from services.inference.sim_cache import block_hashes, salt_hash
from services.inference.sim_logprobs import prompt_logprobs, token_logprobs
from services.inference.sim_plan import Output
from services.inference.sim_stop import StopMatcher

__all__ = ["SimSequence"]


class SimSequence:
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
        output: Output,
        *,
        block_size: int,
        is_poison: bool,
    ) -> None:
        emitted = generation.emitted_token_ids
        tokens = [*prompt, *emitted]
        self.id = 0
        """Set by arrive(), as are its order and arrival."""
        self.generation_id = generation.id
        self.sink = sink
        self.prompt_count = len(prompt)
        self.end = output.end
        """The position at which the output ends, for `reason`."""
        self.reason = output.reason
        self.stop_cause: StopCause | None = None
        self.echo = _echo(generation, prompt, output.seed)
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
        self.is_poison = is_poison
        """Whether the engine dies of it, in the step that finishes its prompt."""
        self.order = (generation.priority, 0)
        """Who goes first: the lower one, by priority and arrival."""
        self.arrival = 0.0
        self.prefill_begun = 0.0
        self.prefill_tokens = 0
        self.scheduled: float | None = None
        self.first: float | None = None
        self._block_size = block_size
        self._seed = output.seed
        self._segment_end = len(emitted)
        self._tail = tokens[len(self.hashes) * block_size :]
        self.steps = sim_text.output_steps(self._seed, len(emitted))
        self._careful = _Careful(generation, self, self._seed) if _needs_care(generation) else None
        self.deliver: Callable[[str, Sequence[int]], None] = self._careful.deliver if self._careful else sink.delta
        if self._careful:
            self._careful.replay(emitted)

    def arrive(self, number: int, now: float) -> None:
        """It is the engine's from here on, and the `number`th that is."""
        self.id = number
        self.order = (self.order[0], number)
        self.arrival = now

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


def _needs_care(generation: Generation) -> bool:
    sampling = generation.sampling
    return bool(sampling.stop or sampling.stop_token_ids) or sampling.logprob_count is not None


class _Careful:
    """Delivers the tokens of a sequence that has stops or wants log-probabilities."""

    def __init__(self, generation: Generation, sequence: SimSequence, seed: int) -> None:
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
