"""The latest decisions, for people who ask why."""

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from services.router.looks import Look

__all__ = ["Decisions", "Record"]

# Bounds memory whatever the size of the fleet: about 20 MB.
_MOST_CANDIDATES: Final = 65_536


class Record(NamedTuple):
    """One decision, as it is kept."""

    at: float
    """On the router's monotonic clock, in seconds."""
    request_id: str
    model: str
    worker_id: str
    """Empty when none was chosen."""
    reason: str
    queue_seconds: float
    looked_at: Sequence[Look]
    prompt_tokens: int = 0
    rule: str = ""
    """The policy's rule that chose the pools; empty when none did."""
    degraded: bool = False
    """Whether a smaller model was chosen than was asked for."""


class Decisions:
    """A ring of decisions. Whoever asks for some of them looks through it: few ask, and many are added."""

    def __init__(self, *, max_candidates: int = _MOST_CANDIDATES) -> None:
        self._max_candidates = max_candidates
        self._candidates = 0
        self._records: deque[Record] = deque()

    def add(self, record: Record) -> None:
        """Keeps a decision, and forgets the oldest ones where there are too many."""
        self._records.append(record)
        self._candidates += len(record.looked_at) + 1
        while self._candidates > self._max_candidates:
            self._candidates -= len(self._records.popleft().looked_at) + 1

    def of(self, request_id: str) -> list[Record]:
        """The decisions of a request that are still known, oldest first."""
        return [record for record in self._records if record.request_id == request_id]
