"""Finds the request that engines die of among those that only ran beside it, and keeps it away from engines.

Whatever was in an engine when it was lost is a suspect, the culprit and its neighbours alike. A suspect that comes
again, here or after its gateway moved it, is let into the engine alone: nothing else is, until it has brought some
output and so proved itself. When the engine is lost with one such suspect in it, that is the culprit: it is refused
from then on. The others of that engine are told that it was not their doing, so that they go on elsewhere as often as
it takes. What completes is no suspect any more.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from services.common.errors import MeshError, Reason
from services.inference.output import EngineLostError
from services.inference.request import Generation

__all__ = ["FatalRequestError", "Quarantine", "fingerprint"]

_log = logging.getLogger(__name__)
_REMEMBERED_SECONDS: Final = 900.0
_REMEMBERED: Final = 4096
# A suspect that brings nothing for so long holds the others up no more; it stays unproven.
_TURN_SECONDS: Final = 2.0
# What is told within this time is told of the same death.
_DEATH_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 1.0


class FatalRequestError(MeshError):
    """Engines die of this request."""

    def __init__(self) -> None:
        super().__init__(Reason.ENGINE_FAILED, "this request makes engines fail")


@dataclass(slots=True)
class _Record:
    at: float
    convicted: bool = False


@dataclass(slots=True)
class _Death:
    at: float
    blamed: frozenset[str]
    """Ids of the suspects that had not proved themselves; none: everything that ran is suspect."""


class Quarantine:
    """Of one worker. Everything runs freely until an engine is lost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self._turn = asyncio.Lock()
        self._holder: str | None = None
        self._turn_ends: asyncio.TimerHandle | None = None
        self._unproven: set[str] = set()
        self._death: _Death | None = None

    async def enter(self, generation: Generation) -> bool:
        """Waits until a generation may go to the engine; true when it has to prove itself.

        Whoever entered has to leave().

        Raises:
            FatalRequestError: engines die of it.
        """
        record = self._record_of(generation)
        if record is not None and record.convicted:
            raise FatalRequestError
        suspect = record is not None or generation.lost_engines > 0
        if not suspect and not self._turn.locked():
            return False
        await self._turn.acquire()
        if not suspect:
            self._turn.release()
            return False
        self._holder = generation.id
        self._unproven.add(generation.id)
        self._turn_ends = asyncio.get_running_loop().call_later(_TURN_SECONDS, self._end_turn, generation.id)
        return True

    def prove(self, generation_id: str) -> None:
        """It has brought output: the engine survived it."""
        self._unproven.discard(generation_id)
        self._end_turn(generation_id)

    def leave(self, generation: Generation, *, completed: bool) -> None:
        """It is over."""
        self.prove(generation.id)
        if completed and self._records:
            self._records.pop(fingerprint(generation), None)

    def lost(self, generation: Generation) -> MeshError:
        """Takes in that the engine was lost with this generation in it; returns what to tell whoever asked for it."""
        death = self._current_death()
        if death.blamed and generation.id not in death.blamed:
            # It may go on elsewhere, and that counts as no strike against it.
            return MeshError(Reason.NO_READY_WORKER, "the engine starts again", retry_after_seconds=_RETRY_SECONDS)
        convicted = death.blamed == {generation.id}
        print_ = fingerprint(generation)
        self._records[print_] = _Record(self._clock(), convicted)
        self._records.move_to_end(print_)
        while len(self._records) > _REMEMBERED:
            self._records.popitem(last=False)
        if convicted:
            _log.error("engines die of a request", extra={"request": generation.id, "fingerprint": print_.hex()})
            return FatalRequestError()
        return EngineLostError("the engine failed")

    def _current_death(self) -> _Death:
        now = self._clock()
        if self._death is None or now - self._death.at > _DEATH_SECONDS:
            self._death = _Death(now, frozenset(self._unproven))
        return self._death

    def _record_of(self, generation: Generation) -> _Record | None:
        oldest = self._clock() - _REMEMBERED_SECONDS
        while self._records and next(iter(self._records.values())).at < oldest:
            self._records.popitem(last=False)
        return self._records.get(fingerprint(generation)) if self._records else None

    def _end_turn(self, generation_id: str) -> None:
        if self._holder == generation_id:
            self._holder = None
            if self._turn_ends is not None:
                self._turn_ends.cancel()
            self._turn.release()


def fingerprint(generation: Generation) -> bytes:
    """What an engine gets of a generation, whoever asks for it and how far it has come: 16 bytes."""
    asked = (
        generation.model,
        generation.kind,
        generation.prompt if isinstance(generation.prompt, str) else list(generation.prompt),
        generation.chat,
        generation.sampling,
        generation.structured_output,
        generation.choices,
    )
    return blake2b(repr(asked).encode("utf-8", "backslashreplace"), digest_size=16).digest()
