"""tokenloom usage, its erasure, and tokenloom audit."""

import json
from argparse import Namespace
from datetime import UTC, datetime
from typing import Any, Final

from services.mesh.accounting import accounting_of
from services.mesh.table import print_table

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
    with accounting_of(arguments) as accounting:
        lines = accounting.usage(tenant=arguments.tenant, model=arguments.model, month=arguments.month)
    if arguments.json:
        print(json.dumps(lines, indent=2))
    else:
        print_table([_COLUMNS, *([_text(line[name]) for name in _COLUMNS] for line in lines)])
    return 0


def erase(arguments: Namespace) -> int:
    """Deletes a tenant's usage."""
    with accounting_of(arguments) as accounting:
        count = accounting.erase_usage(arguments.tenant)
    print(f"{count} row{' ' if count == 1 else 's '}of {arguments.tenant!r} {'is' if count == 1 else 'are'} erased")
    return 0


def audit_trail(arguments: Namespace) -> int:
    """Who changed what, newest first."""
    with accounting_of(arguments) as accounting:
        entries = accounting.audit(arguments.limit)
    if arguments.json:
        print(json.dumps(entries, indent=2))
        return 0
    for entry in entries:
        moment = datetime.fromtimestamp(entry["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        print("  ".join((moment, entry["actor"], entry["action"], entry["target"], json.dumps(entry["detail"]))))
    return 0


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
