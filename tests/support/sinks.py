"""A sink for tests."""

import asyncio
import time
from collections.abc import Sequence

from services.common.errors import MeshError
from services.inference.output import Delta, FinishReason, PromptEcho, StopCause, Timings, TokenLogprobs, Usage

__all__ = ["Kept"]


class Kept:
    """A sink that keeps everything, in order."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.text = ""
        self.text_after: dict[int, str] = {}
        """The text that had come with the first so many tokens; a delta can bring several."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.deltas: list[Delta] = []
        self.times: list[float] = []
        self.echo: PromptEcho | None = None
        self.choice_ends: dict[int, tuple[FinishReason, StopCause | None]] = {}
        self.stop_cause: StopCause | None = None
        self.reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.error: MeshError | None = None
        self.ended = asyncio.Event()

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        """Keeps it."""
        assert not self.starts
        self.starts.append((prompt_tokens, cached_tokens))
        self.echo = echo

    def delta(self, text: str, token_ids: Sequence[int]) -> None:
        """Keeps it."""
        self.rich_delta(Delta(text=text, token_ids=token_ids))

    def rich_delta(self, delta: Delta) -> None:
        """Keeps it."""
        assert self.starts
        assert not self.ended.is_set()
        self.times.append(time.monotonic())
        self.deltas.append(delta)
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.text_after[len(self.token_ids)] = self.text
        self.logprobs += delta.logprobs

    def choice_ended(self, choice: int, reason: FinishReason, stop_cause: StopCause | None) -> None:
        """Keeps it."""
        self.choice_ends[choice] = (reason, stop_cause)

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None:
        """Keeps it."""
        self.reason, self.usage, self.timings, self.stop_cause = reason, usage, timings, stop_cause
        self.ended.set()

    def failed(self, error: MeshError) -> None:
        """Keeps it."""
        self.error = error
        self.ended.set()
