"""Accounts of the typed lane: opened when the edge asks who calls, settled when it tells how the call went."""

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import Final

from services.common.endpoints import endpoint_of
from services.common.ledger import UsageRow, month_of
from services.gateway.accounts import Account, Accounts, Show
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.pieces import Spent

__all__ = ["ACCOUNT_HEADER", "Call", "TypedAccounts"]

ACCOUNT_HEADER: Final = "x-tokenloom-account"
# An account that nobody has settled for so long never will be: the edge was killed.
_LOST_AFTER_SECONDS: Final = 3600.0
_SWEEP_EACH: Final = 1024
# By then a worker has the call, and whoever was asked for one meanwhile had the processor to itself.
_SOON_SECONDS: Final = 0.004


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How a call went, as the edge tells."""

    account_id: str
    request_id: str
    time: float
    """When it began, in seconds since the epoch."""
    path: str
    tenant: str
    key_id: str
    outcome: str
    duration_seconds: float
    ttft_seconds: float | None
    spent: Spent | None
    """None: no worker was asked."""


class TypedAccounts:
    """Knows which calls of the typed lane are under way."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._open: dict[str, tuple[float, Account]] = {}
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

    def settle(self, call: Call) -> None:
        """The edge has told."""
        self.enter_now()
        _, account = self._open.pop(call.account_id, (0.0, None))
        _measure(call, self._accounts.metrics)
        if account is None:
            # Another gateway let it in, or this one before it was started again; the edge knows enough for its row.
            row = _row(call, self._accounts)
            self._accounts.write(row)
            self._accounts.close(row, None)
            return
        if call.spent is not None:
            account.add(call.spent, is_complete=False)
        account.settle(call.outcome)

    def _sweep(self, now: float) -> None:
        for account_id, (since, account) in tuple(self._open.items()):
            if now - since < _LOST_AFTER_SECONDS:
                # In the order in which they came.
                break
            del self._open[account_id]
            account.settle("lost")


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


def _row(call: Call, accounts: Accounts) -> UsageRow:
    row = UsageRow(
        id=call.account_id,
        request_id=call.request_id,
        time=call.time,
        month=month_of(call.time),
        lane="typed",
        endpoint=endpoint_of(call.path),
        tenant=call.tenant,
        key_id=call.key_id,
        duration_seconds=call.duration_seconds,
        outcome=call.outcome,
    )
    return (
        row
        if call.spent is None
        else accounts.charged(row, [call.spent], outcome=row.outcome, duration_seconds=row.duration_seconds)
    )
