"""One Generate call of the typed lane: the events of one generation, on a stream of its own."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError
from services.common.outbox import Outbox, OutboxFullError
from services.inference import convert_events
from services.inference.output import Delta, FinishReason, PromptEcho, StopCause, Timings, TokenLogprobs, Usage

__all__ = ["Call"]

# Tokens that may wait for a client that reads slowly; with log-probabilities that is two megabytes.
_MAX_WAITING_TOKENS: Final = 4096


class Call:
    """Takes what a generation produces as a sink, and gives it to a stream as events.

    While the client reads slowly, deltas are put together.
    """

    def __init__(self, model: str, *, overflowed: Callable[[], None]) -> None:
        """`overflowed` is called, from within the engine, when too much waits for the client."""
        self._model = model
        self._overflowed = overflowed
        self._outbox = Outbox(_Waiting, max_edits=_MAX_WAITING_TOKENS)
        self._completed: pb.Completed | None = None
        self._error: MeshError | None = None

    async def events(self) -> AsyncGenerator[pb.GenerateResponse]:
        """The events, the last of which is `completed`.

        Raises:
            MeshError: the generation failed.
        """
        async for waiting in self._outbox.messages():
            for event in waiting.events():
                yield event
        if self._error is not None:
            raise self._error
        yield pb.GenerateResponse(completed=self._completed)

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        """From the engine."""
        started = convert_events.started_to_proto(self._model, prompt_tokens, cached_tokens, echo)
        self._outbox.edit().started = started

    def delta(self, text: str, token_ids: Sequence[int]) -> None:
        """From the engine."""
        try:
            self._outbox.edit(max(1, len(token_ids))).add(text, token_ids, (), 0)
        except OutboxFullError:
            self._overflowed()

    def rich_delta(self, delta: Delta) -> None:
        """From the engine."""
        try:
            waiting = self._outbox.edit(max(1, len(delta.token_ids)))
        except OutboxFullError:
            self._overflowed()
            return
        if delta.reasoning or delta.tool_calls:
            waiting.add_whole(delta)
        else:
            waiting.add(delta.text, delta.token_ids, delta.logprobs, delta.choice)

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        """From the engine."""
        try:
            waiting = self._outbox.edit()
        except OutboxFullError:
            self._overflowed()
            return
        waiting.choice_ends.append(convert_events.choice_ended_to_proto(choice, reason, stop_cause))

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None:
        """From the engine."""
        self._completed = convert_events.completed_to_proto(reason, usage, timings, stop_cause)
        self._outbox.close()

    def failed(self, error: MeshError) -> None:
        """From the engine."""
        self._error = error
        self._outbox.close()


class _Waiting:
    """What waits for the client."""

    __slots__ = ("_deltas", "_open", "choice_ends", "started")

    def __init__(self) -> None:
        self.started: pb.Started | None = None
        self.choice_ends: list[pb.ChoiceEnded] = []
        self._deltas: list[_Growing | Delta] = []
        self._open: dict[int, _Growing] = {}

    def add(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], choice: int) -> None:
        """Puts text and tokens to what waits of this choice already."""
        growing = self._open.get(choice)
        if growing is None:
            growing = self._open[choice] = _Growing(choice)
            self._deltas.append(growing)
        growing.texts.append(text)
        growing.token_ids += token_ids
        growing.logprobs += logprobs

    def add_whole(self, delta: Delta) -> None:
        """Keeps a delta by itself; what follows of its choice comes after it."""
        self._open.pop(delta.choice, None)
        self._deltas.append(delta)

    def events(self) -> Iterator[pb.GenerateResponse]:
        """Them all."""
        if self.started is not None:
            yield pb.GenerateResponse(started=self.started)
        for delta in self._deltas:
            whole = delta if isinstance(delta, Delta) else delta.delta()
            yield pb.GenerateResponse(delta=convert_events.delta_to_proto(whole))
        for ended in self.choice_ends:
            yield pb.GenerateResponse(choice_ended=ended)


class _Growing:
    """Deltas that are put together."""

    __slots__ = ("choice", "logprobs", "texts", "token_ids")

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    def delta(self) -> Delta:
        """All that was added."""
        return Delta(text="".join(self.texts), token_ids=self.token_ids, logprobs=self.logprobs, choice=self.choice)
