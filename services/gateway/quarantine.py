"""Remembers the requests that were in engines that were lost, and refuses those that are known to be the reason."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError, Reason

__all__ = ["Losses", "Quarantine"]

_REMEMBERED_SECONDS: Final = 900.0
_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class Losses:
    """What was lost with a request in it."""

    engines: int = 0
    workers: int = 0
    """Whole workers, of which nobody knows why."""

    @property
    def suspicion(self) -> int:
        """How many of them may be its doing: machines fail and are taken away, so one lost worker tells nothing."""
        return self.engines + max(0, self.workers - 1)

    def __add__(self, other: "Losses") -> "Losses":
        """Both together."""
        return Losses(self.engines + other.engines, self.workers + other.workers)


@dataclass(frozen=True, slots=True)
class _Record:
    at: float
    losses: Losses
    fatal: bool


class Quarantine:
    """A worker finds out by itself what its engine dies of; here that is known for the workers to come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def note(self, request: pb.GenerateRequest, losses: Losses, *, fatal: bool) -> None:
        """So much was lost with this request; `fatal`: because of it."""
        key = _fingerprint(request)
        known = self._records.pop(key, None)
        before = known.losses if known else Losses()
        self._records[key] = _Record(self._clock(), before + losses, fatal or (known is not None and known.fatal))
        while len(self._records) > _REMEMBERED:
            self._records.popitem(last=False)

    def check(self, request: pb.GenerateRequest) -> Losses:
        """Lets a request pass; returns what was lost with it within the last 15 minutes.

        Raises:
            MeshError: ENGINE_FAILED, one was lost because of it.
        """
        oldest = self._clock() - _REMEMBERED_SECONDS
        while self._records and next(iter(self._records.values())).at < oldest:
            self._records.popitem(last=False)
        # Nearly always there are none, and then a request isn't even looked at.
        record = self._records.get(_fingerprint(request)) if self._records else None
        if record is None:
            return Losses()
        if record.fatal:
            raise MeshError(Reason.ENGINE_FAILED, "this request makes engines fail")
        return record.losses

    def clear(self, request: pb.GenerateRequest) -> None:
        """It is complete, so nothing can be wrong with it."""
        if self._records:
            self._records.pop(_fingerprint(request), None)


def _fingerprint(request: pb.GenerateRequest) -> bytes:
    return blake2b(request.SerializeToString(deterministic=True), digest_size=16).digest()
