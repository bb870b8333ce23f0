"""Who of those that wait gets a worker that has room: whose turn it is, or whoever has waited for too long."""

import math
from collections import deque
from collections.abc import Callable, Collection
from typing import Final, Protocol

from services.router.fleet import Clock
from services.router.promises import Promises
from services.router.scheduler import Decision
from services.router.ticket import Ticket
from services.router.waiting import LaneKey, WaitingLine
from services.router.worker import Worker

__all__ = ["Turns"]

# Lanes whose turn came although no worker takes them now; after so many the rest waits for the next event.
_MOST_SKIPS: Final = 16
# One turn in ten is for whoever has waited so long behind higher classes.
_AGED_EVERY: Final = 10
_AGED_SECONDS: Final = 2.0


class _Pick(Protocol):
    def __call__(self, ticket: Ticket, /, *, spare: bool) -> Decision: ...


class Turns:
    """Fills workers with those that wait in a line, fairly."""

    def __init__(
        self,
        line: WaitingLine[Ticket],
        promises: Promises[Ticket],
        *,
        left: Callable[[Ticket, float], float],
        pick: _Pick,
        serve: Callable[[Ticket, Decision], None],
        clock: Clock,
    ) -> None:
        """`left` says how many more requests a ticket's tenant may have run, at a time; `pick` picks for a ticket, with
        `spare` only a worker that has capacity to spare; `serve` takes a ticket out of the line and grants it a worker.
        """
        self._line = line
        self._promises = promises
        self._left = left
        self._pick = pick
        self._serve = serve
        self._clock = clock
        self._roomy: deque[Worker] = deque()
        self._serving = False
        self._turns = 1

    def fill(self, worker: Worker) -> None:
        """A worker has changed: where it has room now, those whose turn it is get it."""
        if worker.full or not self._line or not worker.has_room(self._clock()):
            return
        self._roomy.append(worker)
        if self._serving:
            # Whoever is served changes workers, too.
            return
        self._serving = True
        try:
            while self._roomy:
                self._fill(self._roomy.popleft(), self._clock())
        finally:
            self._serving = False

    def _fill(self, worker: Worker, now: float) -> None:
        skipped: set[LaneKey] = set()
        unpromised: set[LaneKey] = set()
        models, tries = (*worker.card.models, ""), 0
        if worker.has_spare:
            self._line.put_back_all()
        else:
            self._line.put_back_due(now)
        while worker.has_room(now) and tries < _MOST_SKIPS:
            if self._turns % _AGED_EVERY == 0 and self._serve_aged(models, now):
                continue
            turn = self._line.first(models, skip=skipped)
            if turn is None:
                return
            lane, ticket = turn
            # Taking turns alone, tenants that come again and again would keep one that was served much lately waiting:
            # whoever has waited for as long as it may, though the line was short enough, goes first in its class.
            late = self._promises.overdue(models, ticket.priority, now, skip=unpromised)
            if late is not None:
                lane, ticket = late.lane, late
            left = self._left(ticket, now) if ticket.modest else math.inf
            if left <= 0 and not worker.has_spare:
                tries += 1
                if late is not None:
                    unpromised.add(lane)
                else:
                    self._line.park(ticket, now=now)
                continue
            decision = self._pick(ticket, spare=left <= 0)
            if decision.worker is None:
                tries += 1
                skipped.add(lane)
                unpromised.add(lane)
                continue
            if late is None and left <= 1:
                # Its tenant's next one is to leave room again.
                self._line.park(ticket, now=now)
            self._turns += 1
            self._serve(ticket, decision)

    def _serve_aged(self, models: Collection[str], now: float) -> bool:
        """Serves a request of a low class that has waited for long, so that higher classes don't starve it."""
        ticket = self._line.crowd.oldest_of_lower_classes()
        if ticket is None or now - ticket.asked_at < _AGED_SECONDS or ticket.lane.model not in models:
            return False
        decision = self._pick(ticket, spare=ticket.modest and self._left(ticket, now) <= 0)
        if decision.worker is None:
            return False
        self._turns += 1
        self._serve(ticket, decision)
        return True
