"""tokenloom keys create, list, revoke and rotate."""

import json
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from services.common.config import ConfigError
from services.common.endpoints import ENDPOINTS
from services.mesh.accounting import accounting_of

__all__ = ["RIGHTS", "create", "list_keys", "revoke", "rotate"]

RIGHTS: Final = ("admin", "debug", "degrade")


def create(arguments: Namespace) -> int:
    """Makes a key and shows it, this once."""
    asked = _asked(arguments)
    with accounting_of(arguments, may_begin=True) as accounting:
        _show(arguments, accounting.create_key(asked))
    return 0


def list_keys(arguments: Namespace) -> int:
    """Lists the keys; the keys themselves are known to their owners alone."""
    with accounting_of(arguments) as accounting:
        records = accounting.keys()
    if arguments.json:
        print(json.dumps(records, indent=2))
        return 0
    for record in records:
        print(_line(record))
    return 0


def revoke(arguments: Namespace) -> int:
    """Ends a key."""
    with accounting_of(arguments) as accounting:
        accounting.revoke_key(arguments.id)
    print(f"{arguments.id} is revoked")
    return 0


def rotate(arguments: Namespace) -> int:
    """Gives a key a new secret and shows it, this once."""
    with accounting_of(arguments) as accounting:
        _show(arguments, accounting.rotate_key(arguments.id, arguments.grace or 0.0))
    return 0


def _asked(arguments: Namespace) -> dict[str, Any]:
    rights = _names("--rights", arguments.rights, RIGHTS) or []
    return {
        "name": arguments.name,
        "tenant": arguments.tenant,
        "models": _names("--models", arguments.models),
        "endpoints": _names("--endpoints", arguments.endpoints, ENDPOINTS),
        "priority": arguments.priority,
        "allow_degrade": arguments.allow_degrade or "degrade" in rights,
        "admin": arguments.admin or "admin" in rights,
        "debug": arguments.debug or "debug" in rights,
        "rpm": arguments.rpm,
        "tpm": arguments.tpm,
        "concurrency": arguments.concurrency,
        "budget": arguments.budget,
        "expires_in_seconds": arguments.expires,
    }


def _show(arguments: Namespace, made: dict[str, str]) -> None:
    if arguments.json:
        print(json.dumps({"id": made["id"], "key": made["key"]}))
    else:
        print(f"{made['key']}\n\nThis is shown once. Its id is {made['id']}.")


def _names(option: str, text: str | None, known: Sequence[str] | None = None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"{option}: expected names with commas between them, got the value {text!r}")
    for name in names:
        if known is not None and name not in known:
            raise ConfigError(f"{option}: expected some of {', '.join(known)}, got the value {name!r}")
    return names


def _line(record: dict[str, Any]) -> str:
    rights = [
        name for name, field in (("admin", "admin"), ("debug", "debug"), ("degrade", "allow_degrade")) if record[field]
    ]
    limits = [f"{name} {value:g}" for name, value in record["limits"].items() if value is not None]
    models = "all models" if record["models"] is None else ",".join(record["models"])
    endpoints = [] if record["endpoints"] is None else [",".join(record["endpoints"])]
    ends = [] if record["expires_at"] is None else [f"until {_moment(record['expires_at'])}"]
    tenant = [] if record["tenant"] == record["name"] else [f"tenant {record['tenant']}"]
    parts = (record["id"], record["name"], *tenant, f"priority {record['priority']}", models, *endpoints, *limits)
    return "  ".join((*parts, _moment(record["created_at"]), *ends, *rights))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
