"""One generation's output on its way from a worker to a client: what has come, and who waits for it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from services.common.errors import MeshError

__all__ = ["Ending", "Stream", "TokenScore", "WorkerLostError"]


class WorkerLostError(Exception):
    """The worker of a generation is gone, or doesn't take it; the generation may go on elsewhere."""

    def __init__(self, message: str, *, refusal: MeshError | None = None) -> None:
        """`refusal` is what a worker said that is well and turned the generation away: it drains, or is full."""
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a complete generation ended, and what it cost in tokens."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """The log-probability of a token, and of the likeliest ones at its position."""

    token: str
    logprob: float
    alternatives: Sequence["TokenScore"] = ()


class Stream:
    """Collects what a generation produces until its reader takes it.

    A reader that is slow takes several deltas at once, so what waits here is bounded by the output's own length, which
    max_tokens and the model's context bound. A reader that is fast enough doesn't have to be woken for each delta: it
    leaves a `writer` here, which gets the text at once.
    """

    __slots__ = ("_error", "_waiter", "ending", "scores", "texts", "token_ids", "writer")

    def __init__(self) -> None:
        self.texts: list[str] = []
        """Deltas that were not taken yet."""
        self.scores: list[TokenScore] = []
        """Scores that were not taken yet."""
        self.token_ids: list[int] = []
        """Every token so far, taken or not: what a resume needs."""
        self.writer: Callable[[str], bool] | None = None
        """Takes a delta out of turn; False when it can't, and the delta waits for the reader."""
        self.ending: Ending | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, text: str, token_ids: Sequence[int]) -> None:
        """Adds a delta."""
        self.token_ids += token_ids
        if self.writer is not None and not self.texts and self.writer(text):
            return
        self.texts.append(text)
        self.wake()

    def push_one(self, text: str, token_id: int) -> None:
        """Adds a delta of one token, the way nearly all of them come."""
        self.token_ids.append(token_id)
        writer = self.writer
        if writer is None or self.texts or not writer(text):
            self.texts.append(text)
            self.wake()

    def end(self, ending: Ending) -> None:
        """Marks the generation complete."""
        self.ending = ending
        self.wake()

    def fail(self, error: MeshError | WorkerLostError) -> None:
        """Marks the generation failed; the reader gets the error once it has taken what came before."""
        if self.ending is None and self._error is None:
            self._error = error
            self.wake()

    def wake(self) -> None:
        """Tells the reader that there is something."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def recover(self) -> None:
        """Forgets a lost worker, before the generation goes on elsewhere."""
        self._error = None

    async def take(self) -> list[str]:
        """Waits for deltas and takes them; an empty list once the generation is complete and all is taken.

        Raises:
            MeshError: the generation failed.
            WorkerLostError: its worker is gone.
        """
        while not self.texts:
            if self.ending is not None:
                return []
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self.texts = self.texts, []
        return taken

    def take_scores(self) -> list[TokenScore]:
        """Takes the scores that came with the deltas taken."""
        taken, self.scores = self.scores, []
        return taken
