"""One Generate call of the typed lane: the events of one generation, on a stream of its own."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError
from services.common.outbox import Outbox, OutboxFullError
from services.inference import convert
from services.inference.engine import FinishReason, Timings, TokenLogprobs, Usage

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
        self._outbox = Outbox(_Deltas, max_edits=_MAX_WAITING_TOKENS)
        self._completed: pb.Completed | None = None
        self._error: MeshError | None = None

    async def events(self) -> AsyncGenerator[pb.GenerateResponse]:
        """The events, the last of which is `completed`.

        Raises:
            MeshError: the generation failed.
        """
        async for deltas in self._outbox.messages():
            for event in deltas.events():
                yield event
        if self._error is not None:
            raise self._error
        yield pb.GenerateResponse(completed=self._completed)

    def started(self, prompt_tokens: int, cached_tokens: int) -> None:
        """From the engine."""
        self._outbox.edit().started = convert.started_to_proto(self._model, prompt_tokens, cached_tokens)

    def delta(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """From the engine."""
        try:
            deltas = self._outbox.edit(max(1, len(token_ids)))
        except OutboxFullError:
            self._overflowed()
            return
        deltas.texts.append(text)
        deltas.token_ids += token_ids
        deltas.logprobs += logprobs

    def completed(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """From the engine."""
        self._completed = convert.completed_to_proto(reason, usage, timings)
        self._outbox.close()

    def failed(self, error: MeshError) -> None:
        """From the engine."""
        self._error = error
        self._outbox.close()


class _Deltas:
    """What waits for the client."""

    __slots__ = ("logprobs", "started", "texts", "token_ids")

    def __init__(self) -> None:
        self.started: pb.Started | None = None
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    def events(self) -> Iterator[pb.GenerateResponse]:
        """At most two events."""
        if self.started is not None:
            yield pb.GenerateResponse(started=self.started)
        if self.texts:
            delta = convert.delta_to_proto("".join(self.texts), self.token_ids, self.logprobs)
            yield pb.GenerateResponse(delta=delta)
