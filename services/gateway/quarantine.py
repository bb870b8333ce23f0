"""Remembers the requests that were in engines that were lost, and refuses those that are known to be the reason."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError, Reason

__all__ = ["Quarantine"]

_REMEMBERED_SECONDS: Final = 900.0
_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class _Record:
    at: float
    losses: int
    fatal: bool


class Quarantine:
    """A worker finds out by itself what its engine dies of; here that is known for the workers to come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def note_loss(self, request: pb.GenerateRequest, *, fatal: bool) -> None:
        """A worker or its engine was lost with this request; `fatal`: because of it."""
        key = _fingerprint(request)
        known = self._records.pop(key, None)
        losses = known.losses if known else 0
        self._records[key] = _Record(self._clock(), losses + 1, fatal or (known is not None and known.fatal))
        while len(self._records) > _REMEMBERED:
            self._records.popitem(last=False)

    def check(self, request: pb.GenerateRequest) -> int:
        """Lets a request pass; returns how many workers and engines were lost with it within the last 15 minutes.

        Raises:
            MeshError: ENGINE_FAILED, one was lost because of it.
        """
        oldest = self._clock() - _REMEMBERED_SECONDS
        while self._records and next(iter(self._records.values())).at < oldest:
            self._records.popitem(last=False)
        # Nearly always there are none, and then a request isn't even looked at.
        record = self._records.get(_fingerprint(request)) if self._records else None
        if record is None:
            return 0
        if record.fatal:
            raise MeshError(Reason.ENGINE_FAILED, "this request makes engines fail")
        return record.losses

    def clear(self, request: pb.GenerateRequest) -> None:
        """It is complete, so nothing can be wrong with it."""
        if self._records:
            self._records.pop(_fingerprint(request), None)


def _fingerprint(request: pb.GenerateRequest) -> bytes:
    return blake2b(request.SerializeToString(deterministic=True), digest_size=16).digest()
