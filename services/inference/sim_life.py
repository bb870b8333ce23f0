"""Whether the simulated engine lives: frozen and thawed as by SIGSTOP and SIGCONT, dead and started again."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.inference.watchdog import Signs

__all__ = ["SimLife"]


class SimLife:
    """The life of the process that a real engine would have, as its watchdog sees it."""

    def __init__(
        self,
        *,
        restart_seconds: float,
        lose_all: Callable[[str], None],
        longest_step_seconds: Callable[[], float],
    ) -> None:
        """`lose_all` fails what runs; its argument says why."""
        self._restart_seconds = restart_seconds
        self._lose_all = lose_all
        self._longest_step_seconds = longest_step_seconds
        self._going = asyncio.Event()
        self._going.set()
        self._restart: asyncio.TimerHandle | None = None
        self.steps = 0
        """Steps that it has made."""
        self.starts = 0
        """How often it was started."""
        self.trouble = "the engine is starting"
        """Why it takes nothing; empty when it does."""

    def start(self) -> None:
        """It is up."""
        self._restart = None
        self.starts += 1
        self.trouble = ""
        self._going.set()

    def stop(self) -> None:
        """It ends for good."""
        self.trouble = "the worker is stopping"
        if self._restart is not None:
            self._restart.cancel()

    def die(self) -> None:
        """Its process dies with all that it has, and is up again a while later."""
        self.trouble = "the engine died and starts again"
        self._lose_all("the engine died")
        if self._restart is None:
            self._restart = asyncio.get_running_loop().call_later(self._restart_seconds, self.start)

    def freeze(self) -> None:
        """It makes no step until it is thawed."""
        self._going.clear()

    def thaw(self) -> None:
        """It goes on where it was."""
        self._going.set()

    async def going(self) -> None:
        """Returns when it isn't frozen."""
        await self._going.wait()

    @contextmanager
    def obeying_signals(self) -> Iterator[None]:
        """Has SIGUSR1 to this process freeze it and SIGUSR2 thaw it, for as long as the block."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.freeze)
        loop.add_signal_handler(signal.SIGUSR2, self.thaw)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)
            loop.remove_signal_handler(signal.SIGUSR2)

    @property
    def longest_step_seconds(self) -> float:
        """See Watched."""
        return self._longest_step_seconds()

    async def probe(self) -> None:
        """See Watched."""
        await self.going()

    def signs(self) -> Signs:
        """See Watched: it has no process of its own."""
        return Signs()

    def stalled(self, reason: str) -> None:
        """See Watched."""
        self.trouble = self.trouble or reason
        self._lose_all("the engine does not answer")

    def recovered(self) -> None:
        """See Watched."""
        if self._restart is None:
            self.trouble = ""

    def kill(self) -> None:
        """See Watched."""
        self.die()
