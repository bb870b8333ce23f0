"""tokenloom keys create, list, revoke and rotate."""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from services.common.config import ConfigError
from services.common.endpoints import ENDPOINTS
from services.common.quota import KeyLimits
from services.mesh.actor import local_actor
from services.mesh.books import find_database
from services.mesh.state import State

if TYPE_CHECKING:
    from services.common.keystore import KeyRecord, KeyStore

__all__ = ["RIGHTS", "create", "list_keys", "revoke", "rotate"]

RIGHTS: Final = ("admin", "debug", "degrade")


def create(arguments: Namespace) -> int:
    """Makes a key and shows it, this once."""
    rights = _names("--rights", arguments.rights, RIGHTS) or []
    values = _values(arguments)
    with _open(arguments) as store:
        key_id, key = store.create(
            arguments.name,
            admin=arguments.admin or "admin" in rights,
            debug=arguments.debug or "debug" in rights,
            allow_degrade=arguments.allow_degrade or "degrade" in rights,
            actor=local_actor(),
            **values,
        )
    _show(arguments, key_id, key)
    return 0


def list_keys(arguments: Namespace) -> int:
    """Lists the keys; the keys themselves are known to their owners alone."""
    with _open(arguments) as store:
        records = store.list()
    if arguments.json:
        print(json.dumps([asdict(record) for record in records], indent=2))
        return 0
    for record in records:
        print(_line(record))
    return 0


def revoke(arguments: Namespace) -> int:
    """Ends a key."""
    with _open(arguments) as store:
        if not store.revoke(arguments.id, actor=local_actor()):
            print(f"there is no key {arguments.id!r}")
            return 1
    print(f"{arguments.id} is revoked")
    return 0


def rotate(arguments: Namespace) -> int:
    """Gives a key a new secret and shows it, this once."""
    with _open(arguments) as store:
        key = store.rotate(arguments.id, grace_seconds=arguments.grace or 0.0, actor=local_actor())
    if key is None:
        print(f"there is no key {arguments.id!r}")
        return 1
    _show(arguments, arguments.id, key)
    return 0


def _values(arguments: Namespace) -> dict[str, Any]:
    return {
        "models": _names("--models", arguments.models),
        "endpoints": _names("--endpoints", arguments.endpoints, ENDPOINTS),
        "priority": arguments.priority,
        "tenant": arguments.tenant,
        "limits": KeyLimits(
            rpm=arguments.rpm, tpm=arguments.tpm, concurrency=arguments.concurrency, budget=arguments.budget
        ),
        "expires_at": None if arguments.expires is None else time.time() + arguments.expires,
    }


def _open(arguments: Namespace) -> "KeyStore":
    # Importing SQLAlchemy takes longer than most commands: only those that need it do.
    from services.common.keystore import KeyStore  # noqa: PLC0415

    return KeyStore(find_database(State(arguments.state_dir)))


def _show(arguments: Namespace, key_id: str, key: str) -> None:
    if arguments.json:
        print(json.dumps({"id": key_id, "key": key}))
    else:
        print(f"{key}\n\nThis is shown once. Its id is {key_id}.")


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


def _line(record: "KeyRecord") -> str:
    rights = [
        name
        for name, has in (("admin", record.admin), ("debug", record.debug), ("degrade", record.allow_degrade))
        if has
    ]
    limits = [f"{name} {value:g}" for name, value in asdict(record.limits).items() if value is not None]
    models = "all models" if record.models is None else ",".join(record.models)
    endpoints = [] if record.endpoints is None else [",".join(record.endpoints)]
    ends = [] if record.expires_at is None else [f"until {_moment(record.expires_at)}"]
    tenant = [] if record.tenant == record.name else [f"tenant {record.tenant}"]
    parts = (record.id, record.name, *tenant, f"priority {record.priority}", models, *endpoints, *limits)
    return "  ".join((*parts, _moment(record.created_at), *ends, *rights))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
