"""The latest decisions, for people who ask why."""

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from services.router.looks import Look
from services.router.scheduler import Decision

__all__ = ["Decisions", "Record", "in_words"]

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
    refusal: str
    """What was said where none was chosen; else empty."""
    queue_seconds: float
    decision: Decision | None
    """None where it never came to looking at workers."""
    prompt_tokens: int = 0
    rule: str = ""
    """The policy's rule that chose the pools; empty when none did."""
    degraded: bool = False
    """Whether a smaller model was chosen than was asked for."""
    stand_in: str = ""
    """The model that answers for the one that was asked for; empty where that one does."""

    @property
    def reason(self) -> str:
        """The decision in one line."""
        return self.refusal or in_words(self.decision, self.rule, self.model, self.stand_in)

    @property
    def looked_at(self) -> Sequence[Look]:
        """Every worker that was looked at."""
        return () if self.decision is None else self.decision.looked_at


def in_words(decision: Decision | None, rule: str, model: str, stand_in: str) -> str:
    """Why a request goes where it goes, in one line; nothing where that was not decided."""
    if decision is None:
        return ""
    by_rule = f"; rule {rule}" if rule else ""
    instead = f"; {stand_in} answers for {model}" if stand_in else ""
    return f"{decision.reason}{by_rule}{instead}"


class Decisions:
    """A ring of decisions. Whoever asks for some of them looks through it: few ask, and many are added."""

    def __init__(self, *, max_candidates: int = _MOST_CANDIDATES) -> None:
        self._max_candidates = max_candidates
        self._candidates = 0
        self._records: deque[Record] = deque()
        self._sizes: deque[int] = deque()
        """Of each record, the candidates that it keeps."""

    def add(self, record: Record) -> None:
        """Keeps a decision, and forgets the oldest ones where there are too many."""
        size = 1 if record.decision is None else 1 + len(record.decision.looked_at)
        self._records.append(record)
        self._sizes.append(size)
        candidates = self._candidates + size
        while candidates > self._max_candidates:
            self._records.popleft()
            candidates -= self._sizes.popleft()
        self._candidates = candidates

    def of(self, request_id: str) -> list[Record]:
        """The decisions of a request that are still known, oldest first."""
        return [record for record in self._records if record.request_id == request_id]
