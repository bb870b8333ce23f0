"""Accounts of the typed lane: opened when the edge asks who calls, settled when it tells how the call went.

Where the edge remembers who calls it does not ask, and tells that the call has begun.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Final, TypeVar

from services.common.endpoints import endpoint_of
from services.common.ledger import LOST, UsageRow, month_of
from services.common.typed_calls import EDGE_ACCOUNT
from services.gateway.accounts import Account, Accounts, Show
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.pieces import Spent
from services.gateway.request_log import facts_of, log_request

__all__ = ["Begun", "Call", "TypedAccounts"]

_T = TypeVar("_T")
# An account that nobody has settled for so long never will be: the edge was killed.
_LOST_AFTER_SECONDS: Final = 3600.0
_SWEEP_EACH: Final = 1024
# By then a worker has the call, and whoever was asked for one meanwhile had the processor to itself.
_SOON_SECONDS: Final = 0.004
# Ends that were told before their beginnings, which are some milliseconds late, and lost where this process was killed.
_MOST_ENDED_FIRST: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A call, as the edge tells of it."""

    account_id: str
    request_id: str
    time: float
    """When it began, in seconds since the epoch."""
    path: str
    tenant: str
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Begun):
    """How a call went, as the edge tells."""

    outcome: str
    duration_seconds: float
    ttft_seconds: float | None
    spent: Spent | None
    """None: no worker was asked."""
    status: int = 0
    """Of HTTP, which is 200 for whatever gRPC answers; 0: nothing was answered."""
    trace_id: str = ""
    session: str = ""
    """What groups requests, as the client said."""


class TypedAccounts:
    """Knows which calls of the typed lane are under way."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._open: dict[str, tuple[float, Account]] = {}
        self._begun: dict[str, tuple[float, UsageRow]] = {}
        self._ended_first: dict[str, None] = {}
        self._entering: list[Account] = []

    def begin(self, identity: Identity, path: str, request_id: str, show: Show | None = None) -> Account:
        """The account of a call. It is under way once it has entered and is `keep`t."""
        endpoint = endpoint_of(path)
        identity.check_endpoint(endpoint)
        return self._accounts.begin(identity, request_id=request_id, lane="typed", endpoint=endpoint, show=show)

    def keep(self, account: Account) -> None:
        """Waits for the edge to tell how it went."""
        now = monotonic()
        self._open[account.id] = (now, account)
        if len(self._open) % _SWEEP_EACH == 0:
            self._sweep(now)

    def enter_soon(self, account: Account) -> None:
        """Lets a call in whose key has no limits, and keeps its account, a moment later and together with others.

        The edge goes on with the call meanwhile, and tells of it whatever becomes of this process.
        """
        self._entering.append(account)
        if len(self._entering) == 1:
            asyncio.get_running_loop().call_later(_SOON_SECONDS, self.enter_now)

    def enter_now(self) -> None:
        """Lets those in who were to be let in soon."""
        entering, self._entering = self._entering, []
        for account in entering:
            account.enter_now()
            self.keep(account)

    def begun(self, call: Begun) -> None:
        """The edge has let a call in itself, whose key it remembers. Its end may have been told first."""
        if call.account_id in self._ended_first:
            del self._ended_first[call.account_id]
            return
        row, now = _row(call), monotonic()
        self._accounts.journal.open(row)
        self._begun[call.account_id] = (now, row)
        if len(self._begun) % _SWEEP_EACH == 0:
            self._sweep(now)

    def settle(self, call: Call) -> None:
        """The edge has told."""
        self.enter_now()
        _measure(call, self._accounts.metrics)
        _log(call)
        _, account = self._open.pop(call.account_id, (0.0, None))
        if account is None:
            # The edge let it in itself, or another gateway, or this one before it was started again: it knows enough.
            if self._begun.pop(call.account_id, None) is None and _is_the_edges(call.account_id):
                self._note_end(call.account_id)
            spent = [] if call.spent is None else [call.spent]
            row = self._accounts.charged(
                _row(call), spent, outcome=call.outcome, duration_seconds=call.duration_seconds
            )
            self._accounts.write(row)
            self._accounts.close(row, None)
            return
        if call.spent is not None:
            account.add(call.spent, is_complete=False)
        account.settle(call.outcome)

    def _note_end(self, account_id: str) -> None:
        if len(self._ended_first) >= _MOST_ENDED_FIRST:
            del self._ended_first[next(iter(self._ended_first))]
        self._ended_first[account_id] = None

    def _sweep(self, now: float) -> None:
        for account in _overdue(self._open, now):
            account.settle(LOST)
        for row in _overdue(self._begun, now):
            self._accounts.write(row)
            self._accounts.close(row, None)


def _overdue(waiting: dict[str, tuple[float, _T]], now: float) -> Iterator[_T]:
    """Takes out those whose end nobody will tell any more; they are in the order in which they came."""
    for account_id, (since, account) in tuple(waiting.items()):
        if now - since < _LOST_AFTER_SECONDS:
            break
        del waiting[account_id]
        yield account


def _is_the_edges(account_id: str) -> bool:
    return account_id.rpartition(".")[2].startswith(EDGE_ACCOUNT)


def _measure(call: Call, metrics: GatewayMetrics) -> None:
    metrics.ended(endpoint_of(call.path), call.outcome, call.duration_seconds, lane="typed")
    spent = call.spent
    if spent is None or call.outcome != "ok":
        return
    metrics.count_tokens(spent.model, spent.prompt_tokens, spent.cached_tokens, spent.output_tokens, lane="typed")
    if spent.output_tokens and spent.ttft_seconds is not None:
        metrics.first_token(spent.ttft_seconds, spent.model, lane="typed")
    if spent.tpot_seconds is not None:
        metrics.time_per_token(spent.tpot_seconds, spent.model, lane="typed")


def _log(call: Call) -> None:
    facts: dict[str, object] = {"tenant": call.tenant}
    if call.session:
        facts["session"] = call.session
    if call.spent is not None:
        facts |= facts_of(call.spent)
    log_request(
        trace_id=call.trace_id,
        request_id=call.request_id,
        lane="typed",
        endpoint=endpoint_of(call.path),
        outcome=call.outcome,
        status=call.status,
        seconds=call.duration_seconds,
        facts=facts,
    )


def _row(call: Begun) -> UsageRow:
    return UsageRow(
        id=call.account_id,
        request_id=call.request_id,
        time=call.time,
        month=month_of(call.time),
        lane="typed",
        endpoint=endpoint_of(call.path),
        tenant=call.tenant,
        key_id=call.key_id,
    )
