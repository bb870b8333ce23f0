"""A server with OpenAI's API as its watchdog sees it: whether its engine works, whatever its front says of itself."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from services.common.errors import MeshError, Reason
from services.common.settings_worker import WatchdogSettings
from services.inference.openai_health import Health
from services.inference.watchdog import Signs, Watchdog

__all__ = ["Pending", "ServerWatch"]

_STALLED: Final = "the server behind this worker makes no progress"
_LOOK_SECONDS: Final = 0.25
_RETRY_SECONDS: Final = 0.2
# How long it took to answer, and what prompts cost, is known from the past only.
_FACTOR: Final = 4.0
# A slow answer is remembered over so many others.
_KEPT: Final = 0.95
_FIRST_ANSWER_SECONDS: Final = 0.05
_MOST_LEARNT_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Pending:
    """What a server has to do for this worker."""

    requests: int
    tokens: int
    """Of prompts that are not computed yet, about; 0: none is."""
    tokens_per_second: float | None
    """How fast it computes them; None: not known."""
    batches: int
    """How often it has brought output, ever."""
    jobs: int = 0
    """Requests whose answers come in one piece."""


class ServerWatch:
    """Asks the engine behind a server something when nothing else shows that it works.

    It works when any stream brings something, when the counters of its metrics move, or when it answers. While nothing
    runs there it is asked from time to time only, unless that would cost money.
    """

    def __init__(
        self, health: Health, pending: Callable[[], Pending], *, idle_seconds: float | None, step_tokens: int | None
    ) -> None:
        """`idle_seconds`: how often it is asked while it has nothing to do for this worker; None: never.

        `step_tokens`: how much of prompts it computes at most before it answers; None: all of them.
        """
        self._health = health
        self._pending = pending
        self._step_tokens = step_tokens
        self._idle_seconds = idle_seconds
        self._every = idle_seconds or 1.0
        self._asked_at = time.monotonic()
        self._longest = _FIRST_ANSWER_SECONDS

    async def run(self, settings: WatchdogSettings) -> None:
        """Watches until it is cancelled."""
        often = msgspec.structs.replace(settings, probe_seconds=min(settings.probe_seconds, _LOOK_SECONDS))
        await Watchdog(self, often).run()

    @property
    def steps(self) -> int:
        """See Watched."""
        return self._pending().batches + self._health.progress

    @property
    def longest_step_seconds(self) -> float | None:
        """See Watched: as long as what it has to compute may take, and what it has lately taken to answer."""
        pending = self._pending()
        if pending.jobs:
            return None
        if not pending.tokens:
            return _FACTOR * self._longest
        tokens, speed = pending.tokens, pending.tokens_per_second
        if self._step_tokens is not None:
            tokens = min(tokens, self._step_tokens)
        return _FACTOR * (self._longest + tokens / speed) if speed else None

    async def probe(self) -> None:
        """Returns when the engine has answered; at once when it needn't be asked."""
        if not self._is_due():
            return
        begun = self._asked_at = time.monotonic()
        while True:
            try:
                await self._health.ask_engine()
                break
            except MeshError as error:
                if error.reason is Reason.NO_CAPACITY:
                    break
            # What refuses at once has not answered; but it may be about to.
            await asyncio.sleep(_RETRY_SECONDS)
        now = self._asked_at = time.monotonic()
        # An answer after a stall may have come late for any reason.
        took = min(now - begun, _MOST_LEARNT_SECONDS) if self._health.stalled else now - begun
        self._longest = max(took, self._longest * _KEPT)
        self._health.answered()

    def _is_due(self) -> bool:
        if self._health.stalled:
            return True
        every = self._every if self._pending().requests else self._idle_seconds
        return not self._health.away and every is not None and time.monotonic() - self._asked_at >= every

    def signs(self) -> Signs:
        """None: it runs elsewhere."""
        return Signs()

    def stalled(self, reason: str) -> None:  # noqa: ARG002  # what it says is told of engines of our own
        """See Watched."""
        self._health.stall(_STALLED)

    def recovered(self) -> None:
        """probe() has told already."""

    def kill(self) -> None:
        """It is not ours to kill: it is asked anew."""
