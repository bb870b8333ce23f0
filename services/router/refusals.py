"""What a request is told that gets no worker, and how long one may and would have to wait for one."""

from typing import Final

from services.common.errors import MeshError, Reason
from services.common.policy import STANDARD
from services.router.memory import PromptLengths
from services.router.request import LONGEST_MODEL_NAME, Request
from services.router.scheduler import Capacity, Scheduler, Verdict
from services.router.ticket import Ticket
from services.router.waiting import WaitingLine

__all__ = ["Refusals", "check"]

_UNKNOWN_RETRY_SECONDS: Final = 5.0
_LONGEST_RETRY_SECONDS: Final = 60.0


class Refusals:
    """Words and waits, from how long the line is and how fast it moves. Times are seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        line: WaitingLine[Ticket],
        *,
        max_waiting: int,
        max_wait_seconds: float,
        ready_grace_seconds: float,
    ) -> None:
        self._scheduler = scheduler
        self._line = line
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._ready_grace_seconds = ready_grace_seconds
        self._prompts = PromptLengths()

    def expected_wait(self, ticket: Ticket, before: int) -> float | None:
        """How long a request waits that has so many before it; None where that is not known."""
        request = ticket.ways[0].request
        capacity = self._scheduler.capacity(request)
        if capacity.requests_per_second <= 0:
            return None
        turn = before + 1
        # Looking at each worker takes longer than most of the rest, and one that is free was full a moment ago.
        free = self._scheduler.free_slots(request) if capacity.free_slots else 0
        slot = (turn - free) / capacity.requests_per_second
        if ticket.modest:
            slot = max(slot, self._own_wait(ticket, capacity))
        if not free:
            return slot
        # Where slots are free it is prefill that holds it up, of the prompts before it and of its own.
        tokens = before * self._prompts.expected(request) + request.prompt_tokens
        return max(slot, tokens / capacity.prefill_tokens_per_second)

    def _own_wait(self, ticket: Ticket, capacity: Capacity) -> float:
        """How long it takes at least until one of its tenant's own requests is over, for one that leaves room for
        others; 0 where none of them runs.
        """
        running = ticket.shares.running(ticket.tenant) if ticket.shares is not None else 0
        return capacity.slots / (running * capacity.requests_per_second) if running else 0.0

    def note(self, request: Request) -> None:
        """Learns how long prompts are of requests that wait."""
        self._prompts.note(request)

    def allowed_wait(self, ticket: Ticket, now: float) -> float:
        """How long it may still wait."""
        most = (ticket.ways[0].request.slo or STANDARD).max_wait_seconds
        left = ticket.deadline - now
        return left if most is None else min(left, most)

    def is_clients_deadline(self, ticket: Ticket) -> bool:
        """Whether it is its client who waits no longer, and not the mesh."""
        allowed = ticket.request.timeout_seconds
        return allowed is not None and allowed <= self._max_wait_seconds

    def too_late(self, ticket: Ticket) -> MeshError:
        """For one whose time is over, or would be before its turn comes."""
        if self.is_clients_deadline(ticket):
            message, after = "no worker is free before the request's deadline", self._retry_after(ticket)
            return MeshError(Reason.DEADLINE_EXCEEDED, message, retry_after_seconds=after)
        return self.no_capacity(ticket)

    def no_capacity(self, ticket: Ticket) -> MeshError:
        """For one that may not wait, or has no place in the line."""
        after = self._retry_after(ticket)
        message = f"every worker is busy; try again in {after:.0f} s"
        return MeshError(Reason.NO_CAPACITY, message, retry_after_seconds=after)

    def _retry_after(self, ticket: Ticket) -> float:
        """When the line will have become short enough for a request that is refused now."""
        wait = self.expected_wait(ticket, self._line.before(ticket))
        if wait is None:
            return _UNKNOWN_RETRY_SECONDS
        most = (ticket.ways[0].request.slo or STANDARD).max_wait_seconds
        if most is not None and len(self._line) < self._max_waiting:
            wait -= most
        return min(_LONGEST_RETRY_SECONDS, max(1.0, wait))

    def because(self, verdict: Verdict, ticket: Ticket) -> MeshError:
        """For one that no worker will take."""
        model = ticket.request.model or ""
        if verdict is Verdict.UNKNOWN_MODEL:
            return MeshError(Reason.MODEL_NOT_FOUND, f"the model {model!r} does not exist", field="model")
        if verdict is Verdict.TOO_LONG:
            tokens = ticket.request.prompt_tokens
            message = f"the prompt has {tokens} tokens, more than the model {model!r} takes"
            return MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, message)
        if verdict is Verdict.UNABLE:
            needs = ", ".join(sorted(ticket.request.needs))
            message = f"no worker's model {model!r} is able to do all that this needs: {needs}"
            return MeshError(Reason.UNIMPLEMENTED, message, field="model")
        message = "no worker is ready for this request"
        return MeshError(Reason.NO_READY_WORKER, message, retry_after_seconds=max(1.0, self._ready_grace_seconds))


def check(request: Request) -> None:
    """Refuses what can't be asked for.

    Raises:
        MeshError: DEADLINE_EXCEEDED, INVALID_REQUEST.
    """
    if request.timeout_seconds is not None and request.timeout_seconds <= 0:
        raise MeshError(Reason.DEADLINE_EXCEEDED, "the request's deadline has passed")
    if request.model == "":
        message = "model is required"
        raise MeshError(Reason.INVALID_REQUEST, message, field="model", code="missing_required_parameter")
    if request.model is not None and len(request.model) > LONGEST_MODEL_NAME:
        message = f"model has more than {LONGEST_MODEL_NAME} characters"
        raise MeshError(Reason.INVALID_REQUEST, message, field="model", code="string_above_max_length")
