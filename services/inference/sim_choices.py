"""Several sequences of the simulated engine that are one generation: its choices."""

from collections.abc import Sequence
from dataclasses import replace

from services.common.errors import MeshError
from services.inference.output import Delta, FinishReason, PromptEcho, Sink, StopCause, Timings, Usage

__all__ = ["choice_sinks"]


def choice_sinks(sink: Sink, count: int) -> list[Sink]:
    """A sink for each of `count` choices, that together speak to `sink`; a single choice speaks to it itself."""
    if count == 1:
        return [sink]
    together = _Together(sink, count)
    return [_ChoiceSink(together, choice) for choice in range(count)]


class _Together:
    def __init__(self, sink: Sink, count: int) -> None:
        self.sink = sink
        self.open = count
        self.output_tokens = 0
        self.cached_tokens: int | None = None


class _ChoiceSink:
    """Tells of one choice."""

    def __init__(self, together: _Together, choice: int) -> None:
        self._together = together
        self._choice = choice

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        if self._together.cached_tokens is None:
            self._together.cached_tokens = cached_tokens
            self._together.sink.started(prompt_tokens, cached_tokens, echo)

    def delta(self, text: str, token_ids: Sequence[int]) -> None:
        self.rich_delta(Delta(text=text, token_ids=token_ids))

    def rich_delta(self, delta: Delta) -> None:
        self._together.sink.rich_delta(replace(delta, choice=self._choice))

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        self._together.sink.choice_ended(choice, reason, stop_cause)

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None:
        together = self._together
        together.open -= 1
        together.output_tokens += usage.output
        together.sink.choice_ended(self._choice, reason, stop_cause)
        if not together.open:
            whole = Usage(prompt=usage.prompt, cached=together.cached_tokens or 0, output=together.output_tokens)
            together.sink.completed(reason, whole, timings, stop_cause)

    def failed(self, error: MeshError) -> None:
        self._together.sink.failed(error)
