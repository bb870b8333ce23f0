"""What a request may take and has taken: limits before it begins, and its row in the usage ledger at its end."""

import asyncio
import time
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import Final, Literal, Self

import msgspec

from services.common.errors import MeshError, Reason
from services.common.ids import random_hex
from services.common.ledger import UsageRow, month_of
from services.common.quota import NO_LIMITS, KeyLimits
from services.gateway.http import ClientLeftError
from services.gateway.identity import Identity
from services.gateway.journal import Journal
from services.gateway.ledger import Spending
from services.gateway.limit_words import limit_headers, over_budget, over_limit
from services.gateway.limits import Decision, Limiter, Reservation
from services.gateway.metrics import GatewayMetrics
from services.gateway.pieces import Spent
from services.gateway.prices import Prices

__all__ = ["Account", "Accounts", "Lane", "Show"]

Lane = Literal["openai", "typed"]
Show = Callable[[str, str], None]
"""Takes a header of the answer, by name and value."""

# What an answer takes when nobody says: at first, and how slowly the guess follows what a key's answers took.
_FIRST_GUESS: Final = 256.0
_GUESS_WEIGHT: Final = 0.1
_MAX_GUESSES: Final = 10_000


class Account:
    """One request: nothing at first, then let in, then settled."""

    def __init__(
        self,
        accounts: "Accounts",
        identity: Identity,
        *,
        request_id: str,
        lane: Lane,
        endpoint: str,
        show: Show | None = None,
    ) -> None:
        self._accounts = accounts
        self.identity = identity
        self.id = accounts.new_id()
        """The id of its row."""
        self.request_id = request_id
        """The mesh's id of the request."""
        self._lane = lane
        self._endpoint = endpoint
        self._show = show
        self._time = time.time()
        self._began = monotonic()
        self._row: UsageRow | None = None
        self._is_open = False
        self._written: UsageRow | None = None
        self._reservation: Reservation | None = None
        self._spent: list[Spent] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settles it as what ended it."""
        self.settle(_outcome(error))

    async def enter(self, *, model: str = "", prompt_tokens: int = 0, output_tokens: int | None = None) -> None:
        """Lets the request in, once, if the key's limits allow it.

        `prompt_tokens` may be an estimate; `output_tokens`: the most that is wanted, None where nobody says.

        Raises:
            MeshError: RATE_LIMIT_EXCEEDED.
        """
        if self._is_open:
            return
        self._reservation = await self._accounts.admit(self.identity, prompt_tokens, output_tokens, self._show)
        self._enter(model)

    def refuse_early(self) -> None:
        """Refuses the request if it would be refused whatever it is about; does nothing where that is not known yet.

        Raises:
            MeshError: RATE_LIMIT_EXCEEDED.
        """
        if not self._is_open:
            self._accounts.refuse_early(self.identity, self._show)

    def enter_now(self) -> bool:
        """Lets a request in whose key has no limits; False, and nothing happens, where it has."""
        if self.identity.limits != NO_LIMITS:
            return False
        self._enter()
        return True

    def _enter(self, model: str = "") -> None:
        self._is_open = True
        self._row = UsageRow(
            id=self.id,
            request_id=self.request_id,
            time=self._time,
            month=month_of(self._time),
            lane=self._lane,
            endpoint=self._endpoint,
            tenant=self.identity.tenant,
            key_id=self.identity.key_id,
            model=model,
        )
        self._accounts.journal.open(self._row)

    def add(self, spent: Spent, *, is_complete: bool) -> None:
        """Counts what a generation took; of a complete one, before its client sees that it is."""
        self._spent.append(spent)
        if is_complete and self._is_open:
            self._write("ok")

    def settle(self, outcome: str) -> None:
        """Writes its row, unless that is done, and gives back what it did not use; nothing if it never entered."""
        if not self._is_open:
            return
        self._is_open = False
        if self._written is None or self._written.outcome != outcome:
            self._write(outcome)
        assert self._written is not None
        self._accounts.close(self._written, self._reservation)

    def _write(self, outcome: str) -> None:
        assert self._row is not None
        took = monotonic() - self._began
        self._written = self._accounts.charged(self._row, self._spent, outcome=outcome, duration_seconds=took)
        self._accounts.write(self._written)


class Accounts:
    """Lets requests in, within their keys' limits, and keeps account of them."""

    def __init__(
        self,
        limiter: Limiter,
        journal: Journal,
        spending: Spending,
        prices: Prices,
        metrics: GatewayMetrics,
        *,
        name: str,
    ) -> None:
        """`name` of this gateway: ids of accounts begin with it, and the edge tells by that whom to tell the end."""
        self._name = name
        self._prices = prices
        self.journal = journal
        self._limiter = limiter
        self._spending = spending
        self.metrics = metrics
        self._guesses: dict[str, float] = {}

    def new_id(self) -> str:
        """An id that no other account has."""
        return f"{self._name}.{random_hex(24)}"

    def begin(
        self, identity: Identity, *, request_id: str, lane: Lane, endpoint: str, show: Show | None = None
    ) -> Account:
        """The account of a request; nothing is taken or written before it enters.

        `show` gets the headers about limits, whether the request is let in or not.
        """
        return Account(self, identity, request_id=request_id, lane=lane, endpoint=endpoint, show=show)

    async def admit(
        self, identity: Identity, prompt_tokens: int, output_tokens: int | None, show: Show | None
    ) -> Reservation | None:
        """Takes what a request needs from its key's limits. Raises as Account.enter does."""
        key_id, limits = identity.key_id, identity.limits
        self._check_budget(identity)
        if limits.rpm is None and limits.tpm is None and limits.concurrency is None:
            return None
        expected = self._guesses.get(key_id, _FIRST_GUESS) if output_tokens is None else output_tokens
        decision, reservation = await self._limiter.admit(key_id, limits, prompt_tokens + expected)
        self._tell(decision, limits, show)
        return reservation

    def refuse_early(self, identity: Identity, show: Show | None) -> None:
        """Refuses a request that would be refused whatever it is about; does nothing where that is not known yet.

        Raises as Account.enter does.
        """
        limits = identity.limits
        if limits == NO_LIMITS:
            return
        self._check_budget(identity)
        decision = self._limiter.refusal(identity.key_id, limits)
        if decision is not None:
            self._tell(decision, limits, show)

    def _tell(self, decision: Decision, limits: KeyLimits, show: Show | None) -> None:
        if show is not None:
            for name, value in limit_headers(decision):
                show(name, value)
        if not decision.allowed:
            self.metrics.limited(decision.which)
            raise over_limit(decision, limits)

    def _check_budget(self, identity: Identity) -> None:
        budget = identity.limits.budget
        if budget is not None and self._spending.of(identity.key_id) >= budget:
            self.metrics.limited("budget")
            raise over_budget(budget)

    def charged(
        self, row: UsageRow, spent: Sequence[Spent], *, outcome: str, duration_seconds: float | None
    ) -> UsageRow:
        """A row with how its request ended, what its generations took, and what that costs."""
        if not spent:
            return msgspec.structs.replace(row, outcome=outcome, duration_seconds=duration_seconds)
        prompt = cached = output = 0
        prefill = gpu = cost = 0.0
        for each in spent:
            prompt += each.prompt_tokens
            cached += each.cached_tokens
            output += each.output_tokens
            prefill += each.prefill_seconds
            seconds = self._prices.gpu_seconds(each)
            gpu += seconds
            cost += self._prices.cost(each.worker, seconds)
        first = spent[0]
        return msgspec.structs.replace(
            row,
            outcome=outcome,
            duration_seconds=duration_seconds,
            model=first.model or row.model,
            worker=first.worker,
            prompt_tokens=prompt,
            cached_tokens=cached,
            output_tokens=output,
            ttft_seconds=first.ttft_seconds,
            tpot_seconds=first.tpot_seconds,
            queue_seconds=first.queue_seconds,
            prefill_seconds=prefill,
            gpu_seconds=gpu,
            moves=_moves(spent),
            cost=cost,
        )

    def write(self, row: UsageRow) -> None:
        """Notes what a request took."""
        self.journal.close_row(row)
        self._spending.add(row)

    def close(self, row: UsageRow, reservation: Reservation | None) -> None:
        """Counts what a request took, and gives back what it did not use."""
        self.metrics.charge(row)
        if reservation is not None:
            self._limiter.settle(reservation, row.prompt_tokens + row.output_tokens)
            if row.output_tokens:
                self._learn(row)

    def _learn(self, row: UsageRow) -> None:
        # On the typed lane nothing is known before the end, so the guess is of prompt and output.
        tokens = row.output_tokens + (row.prompt_tokens if row.lane == "typed" else 0)
        if len(self._guesses) >= _MAX_GUESSES:
            self._guesses.clear()
        before = self._guesses.get(row.key_id, _FIRST_GUESS)
        self._guesses[row.key_id] = before + _GUESS_WEIGHT * (tokens - before)


def _moves(spent: Sequence[Spent]) -> str | None:
    moves = [move for each in spent for move in each.moves]
    return msgspec.json.encode(moves).decode() if moves else None


def _outcome(error: BaseException | None) -> str:
    match error:
        case None:
            return "ok"
        case ClientLeftError():
            return "client_left"
        case MeshError():
            return error.reason.value.lower()
        case asyncio.CancelledError():
            return "cancelled"
        case _:
            return Reason.INTERNAL.value.lower()
