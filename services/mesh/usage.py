"""tokenloom usage, its erasure, and tokenloom audit."""

import json
from argparse import Namespace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from services.mesh.actor import local_actor
from services.mesh.books import find_database
from services.mesh.state import State
from services.mesh.table import print_table

if TYPE_CHECKING:
    from services.common.database import Database

__all__ = ["audit_trail", "erase", "show"]

_COLUMNS: Final = (
    "month",
    "tenant",
    "model",
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "cost",
    "cost_per_1000_tokens",
    "cache_saved_cost",
)


def show(arguments: Namespace) -> int:
    """Usage by month, tenant and model."""
    # Importing SQLAlchemy takes longer than most commands: only those that need it do.
    from services.common import ledger  # noqa: PLC0415

    with _open(arguments) as database:
        lines = ledger.report(database, tenant=arguments.tenant, model=arguments.model, month=arguments.month)
    if arguments.json:
        print(json.dumps(lines, indent=2))
    else:
        print_table([_COLUMNS, *([_text(line[name]) for name in _COLUMNS] for line in lines)])
    return 0


def erase(arguments: Namespace) -> int:
    """Deletes a tenant's usage."""
    from services.common import ledger  # noqa: PLC0415  # as above

    with _open(arguments) as database:
        count = ledger.erase(database, arguments.tenant, actor=local_actor())
    print(f"{count} row{' ' if count == 1 else 's '}of {arguments.tenant!r} {'is' if count == 1 else 'are'} erased")
    return 0


def audit_trail(arguments: Namespace) -> int:
    """Who changed what, newest first."""
    from services.common import audit  # noqa: PLC0415  # as above

    with _open(arguments) as database:
        entries = audit.read(database, limit=arguments.limit)
    if arguments.json:
        print(json.dumps(entries, indent=2))
        return 0
    for entry in entries:
        moment = datetime.fromtimestamp(entry["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        print("  ".join((moment, entry["actor"], entry["action"], entry["target"], json.dumps(entry["detail"]))))
    return 0


def _open(arguments: Namespace) -> "Database":
    from services.common.database import Database  # noqa: PLC0415  # as above

    return Database(find_database(State(arguments.state_dir)))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
