"""One generation's output on its way from a worker to a client: what has come, and who waits for it."""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum

from services.common.errors import MeshError
from services.gateway.pieces import Ending, Piece, Prompt

__all__ = ["Loss", "Stream", "WorkerLostError"]


class Loss(Enum):
    """What was lost with a generation."""

    ENGINE = "engine"
    """Its engine, as the worker told."""
    WORKER = "worker"
    """The whole worker, which told nothing."""
    NOTHING = "nothing"
    """The worker was gone, or turned the generation away, before it ran there."""


class WorkerLostError(Exception):
    """The worker of a generation is gone, or doesn't take it; the generation may go on elsewhere."""

    def __init__(
        self, message: str, *, loss: Loss = Loss.ENGINE, refusal: MeshError | None = None, fatal: bool = False
    ) -> None:
        """`refusal` is what a worker said that is well and turned the generation away: it drains, or is full.

        `fatal`: engines die of this request, it must not go on.
        """
        super().__init__(message)
        self.loss = loss
        self.refusal = refusal
        self.fatal = fatal


class Stream:
    """Collects what a generation produces until its reader takes it.

    A reader that is slow takes several deltas at once, so what waits here is bounded by the output's own length, which
    max_tokens and the model's context bound. A reader that is fast enough doesn't have to be woken for each delta: it
    leaves a `writer` here, which gets plain text at once.
    """

    __slots__ = (
        "_error", "_keep_ids", "_waiter", "cached_tokens", "ending", "lacks_ids", "other_tokens", "pieces", "prompt",
        "prompt_tokens", "token_ids", "writer",
    )  # fmt: skip  # one name a line would be longer than the class

    def __init__(self, *, keep_ids: bool = False) -> None:
        """`keep_ids`: every delta becomes a piece with its tokens, for an answer that shows them."""
        self.pieces: list[str | Piece] = []
        """What was not taken yet, in order; plain text, as nearly all of it is, as plain strings."""
        self.token_ids: list[int] = []
        """Every token of the first choice so far, taken or not: what a resume needs."""
        self.lacks_ids = False
        """Whether output came whose tokens the worker does not know."""
        self.prompt: Prompt | None = None
        self.prompt_tokens = self.cached_tokens = 0
        """Of the prompt, known with the first output."""
        self.other_tokens = 0
        """How many tokens the choices after the first have."""
        self.writer: Callable[[str], bool] | None = None
        """Takes plain text out of turn; False when it can't, and the text waits for the reader."""
        self.ending: Ending | None = None
        self._keep_ids = keep_ids
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, text: str, token_ids: Sequence[int]) -> None:
        """Adds plain text."""
        if self._keep_ids:
            self.push_piece(Piece(text=text, token_ids=token_ids))
            return
        self.token_ids += token_ids
        # Text that was held back may come after its tokens, but none comes before them.
        if not self.token_ids:
            self.lacks_ids = True
        if self.writer is not None and not self.pieces and self.writer(text):
            return
        self.pieces.append(text)
        self.wake()

    def push_one(self, text: str, token_id: int) -> None:
        """Adds plain text of one token, the way nearly all of it comes."""
        if self._keep_ids:
            self.push_piece(Piece(text=text, token_ids=(token_id,)))
            return
        self.token_ids.append(token_id)
        writer = self.writer
        if writer is None or self.pieces or not writer(text):
            self.pieces.append(text)
            self.wake()

    def push_piece(self, piece: Piece) -> None:
        """Adds what is more than plain text."""
        if piece.choice == 0:
            self.token_ids += piece.token_ids
            if not self.token_ids and (piece.text or piece.reasoning or piece.calls):
                self.lacks_ids = True
        else:
            self.other_tokens += len(piece.token_ids)
        self.pieces.append(piece)
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

    def restart(self) -> None:
        """Forgets a lost worker and everything that came from it, before the generation begins anew elsewhere."""
        self._error = None
        self.pieces.clear()
        self.token_ids.clear()
        self.lacks_ids = False
        self.prompt = None

    async def take(self) -> list[str | Piece]:
        """Waits for output and takes it; an empty list once the generation is complete and all is taken.

        Raises:
            MeshError: the generation failed.
            WorkerLostError: its worker is gone.
        """
        while not self.pieces:
            if self.ending is not None:
                return []
            await self._next()
        taken, self.pieces = self.pieces, []
        return taken

    async def begun(self) -> None:
        """Waits for the first output. Raises as `take` does."""
        while not self.pieces and self.ending is None:
            await self._next()

    async def take_whole(self) -> list[str | Piece]:
        """Waits for the generation to complete and takes all of it. Raises as `take` does."""
        while self.ending is None:
            await self._next()
        return await self.take()

    async def _next(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
