"""Limits, journal, ledger and accounts, put together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.common.database import Database
from services.common.settings_gateway import GatewaySettings
from services.gateway.accounts import Accounts
from services.gateway.journal import Journal
from services.gateway.ledger import Ledger, Spending
from services.gateway.limits import LocalLimits
from services.gateway.limits_shared import SharedLimits
from services.gateway.metrics import GatewayMetrics
from services.gateway.prices import Prices

__all__ = ["Books", "bookkeeping"]

_WATCH_SECONDS: Final = 1.0


class Books:
    """What keeps account of requests."""

    def __init__(
        self, accounts: Accounts, journal: Journal, ledger: Ledger, shared: SharedLimits | None, metrics: GatewayMetrics
    ) -> None:
        self.accounts = accounts
        self._journal = journal
        self._ledger = ledger
        self._shared = shared
        self._metrics = metrics

    async def run(self) -> None:
        """Shares limits, where they are shared, and tells metrics, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._shared is not None:
                tasks.create_task(self._shared.run())
            failures = 0
            while True:
                self._metrics.journal_failures.inc(self._journal.failures - failures)
                failures = self._journal.failures
                self._metrics.usage_waiting.set(self._ledger.is_away)
                self._metrics.limits_shared.set(self._shared is not None and self._shared.is_shared)
                await asyncio.sleep(_WATCH_SECONDS)


@contextmanager
def bookkeeping(settings: GatewaySettings, metrics: GatewayMetrics) -> Iterator[Books]:
    """The books of a gateway, until the block is left; what the database has not taken by then waits in the journal.

    Raises:
        JournalInUseError, OSError: the journal can't be had.
    """
    journal = Journal(_journal_folder(settings))
    try:
        spending = Spending()
        ledger = Ledger(
            journal, lambda: Database(settings.database), spending, retention_days=settings.ledger.retention_days
        )
        shared = (
            None
            if settings.redis_url is None
            else SharedLimits(settings.redis_url, settings.name, replicas=settings.replicas)
        )
        accounts = Accounts(
            shared or LocalLimits(replicas=settings.replicas),
            journal,
            spending,
            Prices(settings.ledger),
            metrics,
            name=settings.name,
        )
        ledger.start()
        try:
            yield Books(accounts, journal, ledger, shared, metrics)
        finally:
            ledger.stop()
    finally:
        journal.stop()


def _journal_folder(settings: GatewaySettings) -> Path:
    if settings.journal is not None:
        return Path(settings.journal)
    beside = Path() if "://" in settings.database else Path(settings.database).parent
    return beside / f"journal-{settings.name}"
