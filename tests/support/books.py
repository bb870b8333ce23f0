"""What a gateway keeps of calls, without the gateway: its ledger and journal are in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.common.settings_gateway import GatewaySettings
from services.gateway.bookkeeping import bookkeeping
from services.gateway.metrics import GatewayMetrics
from services.gateway.typed_lane import TypedAccounts

__all__ = ["typed_accounts"]


@contextmanager
def typed_accounts(folder: Path) -> Iterator[TypedAccounts]:
    """Accounts of typed calls; their journal is `folder / "journal"`."""
    settings = GatewaySettings(
        name="gateway",
        metrics="127.0.0.1:0",
        listen="127.0.0.1:0",
        http="127.0.0.1:0",
        routers=["127.0.0.1:1"],
        database=str(folder / "mesh.db"),
        journal=str(folder / "journal"),
    )
    with bookkeeping(settings, GatewayMetrics(CollectorRegistry())) as books:
        yield TypedAccounts(books.accounts)
