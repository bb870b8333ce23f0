"""Notices that an engine makes no progress, although everything around it still answers."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from services.common.settings_worker import WatchdogSettings

__all__ = ["Signs", "Watchdog", "Watched"]

_log = logging.getLogger(__name__)
# A stopped process makes no progress, however long its step would be; but it may have been stopped for a moment only.
_STOPPED_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.1
_LONGEST_LOOK_SECONDS: Final = 0.5
# An engine that got, or waited for, at least this share of a processor since it fell silent is at work on something.
_BUSY_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Signs:
    """What the operating system says of an engine's processes."""

    stopped: bool = False
    """Whether one of them is stopped, as by SIGSTOP or a debugger."""
    cpu_seconds: float = 0.0
    """What they have used so far."""
    starved_seconds: float = 0.0
    """How long their threads have waited for a processor so far."""

    @property
    def wanted_seconds(self) -> float:
        """The processor time that they have had or would have had."""
        return self.cpu_seconds + self.starved_seconds


class Watched(Protocol):
    """An engine as its watchdog sees it."""

    @property
    def steps(self) -> int:
        """Goes up with each step that it makes."""
        ...

    @property
    def longest_step_seconds(self) -> float | None:
        """A generous bound for a step with what it has to do now; None: it can't be told yet."""
        ...

    async def probe(self) -> None:
        """Returns when the engine itself has answered, which it does between two steps. May raise when it is dead."""
        ...

    def signs(self) -> Signs:
        """Read from the operating system."""
        ...

    def stalled(self, reason: str) -> None:
        """It makes no progress: fails what runs, so that it goes on elsewhere."""
        ...

    def recovered(self) -> None:
        """It makes progress again."""
        ...

    def kill(self) -> None:
        """It doesn't come back by itself."""
        ...


class Watchdog:
    """Asks an engine that makes no steps whether it is there, and draws the consequences.

    How long it may stay silent depends on what it does. A stopped process: half a second. One that uses no processor:
    `silence_seconds` beyond the longest step that its pending prompts may take. One that computes, or would if others
    left it a processor, may do what nobody could foresee, such as compile: `busy_seconds`.
    """

    def __init__(
        self, engine: Watched, settings: WatchdogSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds."""
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._stalled = False

    async def run(self) -> None:
        """Watches until it is cancelled."""
        seen = self._engine.steps
        while True:
            await asyncio.sleep(self._settings.probe_seconds)
            if seen == self._engine.steps:
                await self._ask()
            seen = self._engine.steps

    async def _ask(self) -> None:
        probe = asyncio.ensure_future(self._engine.probe())
        try:
            await self._wait_for(probe)
        finally:
            probe.cancel()

    async def _wait_for(self, probe: "asyncio.Future[None]") -> None:
        silent, seen, looked = 0.0, self._engine.steps, self._clock()
        before: Signs | None = None
        while not (await asyncio.wait([probe], timeout=_LOOK_SECONDS))[0]:
            now = self._clock()
            # Time in which this very loop was held up says nothing about the engine.
            silent += min(now - looked, _LONGEST_LOOK_SECONDS)
            looked = now
            if seen != self._engine.steps and not self._stalled:
                silent, seen, before = 0.0, self._engine.steps, None
            # Reading it costs something, and nearly every probe is answered at once.
            before = before or self._engine.signs()
            self._judge(silent, before)
            if self._stalled and silent > self._settings.restart_seconds:
                self._kill(silent)
                return
        if probe.exception() is None:
            self._answered(silent)

    def _answered(self, silent: float) -> None:
        if self._stalled:
            self._stalled = False
            _log.warning("the engine answers again", extra={"silent_seconds": round(silent, 2)})
            self._engine.recovered()

    def _judge(self, silent: float, before: Signs) -> None:
        reason = "" if self._stalled else self._reason(silent, before)
        if reason:
            self._stalled = True
            _log.error("the engine is stalled", extra={"reason": reason, "silent_seconds": round(silent, 2)})
            self._engine.stalled(reason)

    def _kill(self, silent: float) -> None:
        self._stalled = False
        _log.error("the engine stays stalled: it is killed", extra={"silent_seconds": round(silent, 2)})
        self._engine.kill()

    def _reason(self, silent: float, before: Signs) -> str:
        if silent < _STOPPED_SECONDS:
            return ""
        signs = self._engine.signs()
        if signs.stopped:
            return "the engine's process is stopped"
        if silent > self._bound(silent, before, signs):
            return "the engine makes no progress"
        return ""

    def _bound(self, silent: float, before: Signs, now: Signs) -> float:
        step = self._engine.longest_step_seconds
        if step is None or now.wanted_seconds - before.wanted_seconds > _BUSY_SHARE * silent:
            return max(self._settings.busy_seconds, step or 0.0)
        return self._settings.silence_seconds + step
