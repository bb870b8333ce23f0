"""A request on its way to a worker."""

from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from typing import Final

from services.common.errors import MeshError
from services.router.decisions import Record, in_words
from services.router.policy import Resolution
from services.router.pools import Choice
from services.router.request import LONGEST_MODEL_NAME, Request
from services.router.scheduler import Decision
from services.router.shares import Shares
from services.router.waiting import LaneKey
from services.router.worker import Lease

__all__ = ["Settle", "State", "Ticket"]


class State(Enum):
    """How far a request is."""

    ASKED = 0
    WAITING = 1
    GRANTED = 2
    REFUSED = 3
    OVER = 4


# Looking a member up in its class takes longer than most that is done with it.
_ASKED: Final = State.ASKED
_WAITING: Final = State.WAITING


class Ticket:
    """A request on its way to a worker.

    Attributes:
        request: what was asked for.
        tenant: whose it is.
        priority: its class, lower first.
        lease: the worker, once granted.
        error: why not, once refused.
        decision: the last decision about it; once it is granted, until whoever asked has been told.
        others: endpoints of the workers that came after the one that was granted, best first, as many as were wanted.
        ways: how the policy lets it be served, best first; none until that is known.
        way: the one of these that it was decided for.
        shares: how many requests of its model each tenant has; None for one that takes no slot.
        modest: whether its tenant had more than its share when it came, so that it waits apart from the rest.
        output_token_limit: most tokens of output that the mesh allows it; 0 where it does not limit them.
        queue_seconds: how long it waited, once answered.
    """

    __slots__ = (
        "asked_at",
        "deadline",
        "decision",
        "error",
        "lane",
        "lease",
        "modest",
        "most_others",
        "others",
        "output_token_limit",
        "priority",
        "queue_seconds",
        "request",
        "settle",
        "shares",
        "state",
        "tenant",
        "tokens",
        "unready_since",
        "way",
        "ways",
    )

    def __init__(
        self, request: Request, settle: "Settle", *, asked_at: float, deadline: float, most_others: int = 0
    ) -> None:
        self.request = request
        # Of their own, since they are looked at all the time while it waits.
        self.tenant = request.tenant
        self.priority = request.priority
        self.most_others = most_others
        self.others: Sequence[str] = ()
        self.settle = settle
        self.asked_at = asked_at
        self.deadline = deadline
        self.ways: tuple[Choice, ...] = ()
        self.way = _NO_WAY
        self.output_token_limit = 0
        self.shares: Shares | None = None
        self.modest = False
        self.lane = _NO_LANE
        self.tokens = 0.0
        self.state = _ASKED
        self.lease: Lease | None = None
        self.error: MeshError | None = None
        self.decision: Decision | None = None
        self.queue_seconds = 0.0
        self.unready_since: float | None = None

    def resolve(self, resolution: Resolution) -> None:
        """Takes in what the policy makes of it."""
        self.ways, self.way = resolution.choices, resolution.choices[0]
        self.output_token_limit = resolution.output_token_limit

    def join(self, *, by_length: bool, modest: bool) -> None:
        """Says whom it waits with. `by_length`: whether not every worker takes prompts of any length; `modest`: whether
        it waits for capacity to spare.
        """
        self.modest = modest
        self.lane = _lane(self.request, self.ways, by_length=by_length, modest=modest)

    @property
    def reason(self) -> str:
        """The latest decision about it in one line, as long as that is kept; what is kept for longer is its record."""
        return in_words(self.decision, self.way.rule, self.request.model or "", self._stand_in)

    @property
    def _stand_in(self) -> str:
        model = self.way.request.model
        return "" if model is None or model == self.request.model else model

    def record(self, *, at: float, refusal: str = "") -> Record:
        """What was decided, to be kept; `at` is on the router's monotonic clock, in seconds."""
        request, way, worker_id = self.request, self.way, "" if self.lease is None else self.lease.worker.worker_id
        model = (request.model or "")[:LONGEST_MODEL_NAME]
        return Record(
            at,
            request.request_id,
            model,
            worker_id,
            refusal,
            self.queue_seconds,
            self.decision,
            request.prompt_tokens,
            way.rule,
            bool(worker_id) and way.degraded,
            self._stand_in,
        )

    @property
    def is_waiting(self) -> bool:
        """Whether it has no answer yet."""
        return self.state is _WAITING


Settle = Callable[[Ticket], None]
_NO_WAY: Final = Choice(Request(None))
_NO_LANE: Final = LaneKey("", None)


def _lane(request: Request, ways: tuple[Choice, ...], *, by_length: bool, modest: bool) -> LaneKey:
    # Lengths within a power of two of each other fit the same workers, near enough.
    length = request.prompt_tokens.bit_length() if by_length and request.prompt_tokens > 1024 else 0
    first = ways[0].request
    if len(ways) == 1 and not request.excluded and request.subset is None:
        return _common_lane(first.model or "", first.pools, length, modest)
    models = {way.request.model or "" for way in ways} - {first.model or ""}
    to = tuple((way.request.model, way.request.pools) for way in ways)
    return LaneKey(first.model or "", (request.excluded, request.subset, length, to, modest), tuple(sorted(models)))


@lru_cache(maxsize=4096)
def _common_lane(model: str, pools: frozenset[str] | None, length: int, modest: bool) -> LaneKey:
    # Those who wait share it: a line may be long.
    return LaneKey(model, (pools, length, modest))
