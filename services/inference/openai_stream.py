"""One generation on its way from a server with OpenAI's API to whoever asked for it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import msgspec

from services.common.errors import MeshError, Reason
from services.inference.calibration import DecodeModel, TokenRate
from services.inference.openai_answer import Chunk, ChunkChoice, Told, decode_chunk, delta_of, finish_of
from services.inference.openai_upstream import error_of
from services.inference.output import Delta, FinishReason, PromptEcho, Sink, StopCause, Timings, Usage
from services.inference.request import Generation

__all__ = ["Meters", "Stream", "usage_of"]

_SERVER_ERROR: Final = 500


class Meters:
    """What streams measure of the server together."""

    def __init__(self) -> None:
        self.decode = DecodeModel()
        self.output = TokenRate()
        self.decoding = 0
        """Sequences that bring output."""
        self.batches = 0
        """How often any stream brought something."""


class Stream:
    """What a generation's stream brings goes to its sink, until it is complete or closed."""

    def __init__(self, generation: Generation, sink: Sink, meters: Meters, *, prompt_estimate: int = 0) -> None:
        """`prompt_estimate`: about how many tokens the prompt has."""
        self.generation = generation
        self.told = Told()
        self.echo_text = ""
        """The prompt, where the client wants it back."""
        self.prompt_tokens: int | None = None
        """Tokens of the prompt, where they are known beforehand."""
        self.repeated: list[int] = []
        """Tokens that the client has, and that the server says again."""
        self.task: asyncio.Task[None] | None = None
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False
        self.begun_at = self.last_at = time.monotonic()
        self.first_at: float | None = None
        self._sink = sink
        self._meters = meters
        self._count = generation.sampling.logprob_count or 0
        self._pending = prompt_estimate
        self._texts: list[str] = []
        self._decoding = False
        self._ends: dict[int, tuple[FinishReason, StopCause | None]] = {}

    @property
    def sequences(self) -> int:
        """How many outputs it has."""
        return self.generation.choices

    @property
    def pending(self) -> int:
        """About how many tokens of the prompt are not computed yet."""
        return 0 if self.first_at is not None else self._pending

    @property
    def said(self) -> str:
        """All output so far, where the server tells no tokens."""
        return "".join(self._texts)

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return len(self._ends) == self.sequences

    def accept(self) -> None:
        """The server has taken it, or it is over."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def close(self) -> None:
        """Its sink hears nothing more, and the server is told to stop."""
        self.closed = True
        self._stop_decoding()
        if self.task is not None:
            self.task.cancel()
        self.accept()

    def fail(self, error: MeshError) -> None:
        """Tells its sink, or whoever submits it still."""
        if self.closed:
            return
        self.closed = True
        self._stop_decoding()
        if self.accepted.done():
            self._sink.failed(error)
        else:
            self.accepted.set_exception(error)

    def take(self, events: Sequence[bytes]) -> None:
        """Takes the events that came together.

        Raises:
            MeshError: the server tells of an error, or makes no sense.
        """
        tokens, now = 0, time.monotonic()
        self._meters.batches += 1
        was_decoding = self.first_at is not None
        for event in events:
            chunk = self._decoded(event)
            self.told.take(chunk)
            for choice in chunk.choices:
                tokens += self._take_choice(choice, now)
        if tokens and was_decoding:
            steps = tokens / self.sequences
            self._meters.decode.observe(max(1, self._meters.decoding), (now - self.last_at) / steps)
        if tokens:
            self._meters.output.observe(tokens)
        self.last_at = now

    def end_at_once(self, reason: FinishReason, cause: StopCause | None) -> None:
        """What was emitted elsewhere was the whole output."""
        self._ends[0] = (reason, cause)
        emitted = len(self.generation.emitted_token_ids)
        self.complete(Usage(prompt=self.prompt_tokens or 0, cached=0, output=emitted))

    def complete(self, usage: Usage) -> None:
        """Every choice has ended, and this is what they took."""
        if self.closed:
            return
        now = time.monotonic()
        self._start(now)
        self.closed = True
        self._stop_decoding()
        reason, cause = self._ends[max(self._ends)]
        first_at = self.first_at or now
        timings = Timings(queue=0.0, prefill=first_at - self.begun_at, decode=now - first_at)
        self._sink.completed(reason, usage, timings, cause)

    def _decoded(self, event: bytes) -> Chunk:
        try:
            chunk = decode_chunk(event)
        except msgspec.DecodeError as error:
            message = "the server behind this worker sends what is no piece of an answer"
            raise MeshError(Reason.ENGINE_FAILED, message) from error
        if chunk.error is not None:
            code = chunk.error.code
            raise error_of(code if isinstance(code, int) else _SERVER_ERROR, chunk.error)
        return chunk

    def _take_choice(self, choice: ChunkChoice, now: float) -> int:
        """How many tokens it brings, as far as that is told."""
        delta = delta_of(choice, self._count)
        brings = bool(delta.text or delta.token_ids or delta.reasoning or delta.tool_calls or delta.logprobs)
        if not 0 <= delta.choice < self.sequences or (brings and delta.choice in self._ends):
            raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker sends output that wasn't asked for")
        count = 0
        if brings:
            delta = self._without_repeated(delta)
            self._start(now)
            self.told.add(delta)
            if not delta.token_ids:
                calls = (call.name + call.arguments_json for call in delta.tool_calls)
                self._texts += (delta.reasoning, delta.text, *calls)
            self._deliver(delta)
            count = len(delta.token_ids) or 1
        if choice.finish_reason is not None and delta.choice not in self._ends:
            self._end(choice, now)
        return count

    def _without_repeated(self, delta: Delta) -> Delta:
        if not self.repeated:
            return delta
        count = min(len(self.repeated), len(delta.token_ids))
        if list(delta.token_ids[:count]) != self.repeated[:count]:
            raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker would have said something else")
        del self.repeated[:count]
        return replace(delta, token_ids=delta.token_ids[count:], logprobs=delta.logprobs[count:])

    def _deliver(self, delta: Delta) -> None:
        if self.closed:
            return
        if delta.logprobs or delta.reasoning or delta.tool_calls or self.sequences > 1:
            self._sink.rich_delta(delta)
        else:
            self._sink.delta(delta.text, delta.token_ids)

    def _end(self, choice: ChunkChoice, now: float) -> None:
        end = finish_of(choice)
        if end is None:
            raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker gave the output up")
        self._start(now)
        self._ends[choice.index] = end
        if self.sequences > 1 and not self.closed:
            self._sink.choice_ended(choice.index, *end)

    def _start(self, now: float) -> None:
        if self.first_at is not None:
            return
        self.first_at = now
        self._decoding = True
        self._meters.decoding += self.sequences
        if not self.closed:
            self._sink.started(self._prompt_count(), self.told.cached, self._echo())

    def _prompt_count(self) -> int:
        """0 where it is told at the end only."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return self.told.prompt or 0

    def _echo(self) -> PromptEcho | None:
        if not self.generation.echo:
            return None
        return PromptEcho(text=self.echo_text, token_ids=self.told.prompt_token_ids[: self._prompt_count()])

    def _stop_decoding(self) -> None:
        if self._decoding:
            self._decoding = False
            self._meters.decoding -= self.sequences


def usage_of(stream: Stream, *, counted: tuple[int, int]) -> Usage:
    """What a generation took; `counted` are prompt and output where the server has told nothing of them."""
    told = stream.told
    prompt = counted[0] if told.prompt is None else told.prompt
    output = counted[1] if told.output is None else told.output
    if stream.prompt_tokens is not None:
        # What the server took for the prompt's end was output, most of which the client has.
        prompt, output = stream.prompt_tokens, prompt + output - stream.prompt_tokens
    return Usage(prompt=prompt, cached=min(told.cached, prompt), output=output, reasoning=told.reasoning)
