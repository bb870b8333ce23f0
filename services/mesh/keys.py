"""tokenloom keys create, list and revoke."""

import json
from argparse import Namespace
from dataclasses import asdict
from datetime import UTC, datetime

from services.common.config import ConfigError
from services.common.keystore import KeyRecord, KeyStore
from services.mesh.state import State

__all__ = ["create", "list_keys", "revoke"]


def create(arguments: Namespace) -> int:
    """Makes a key and shows it, this once."""
    models = _models(arguments.models)
    with _open(arguments) as store:
        key_id, key = store.create(
            arguments.name, models=models, priority=arguments.priority, admin=arguments.admin, debug=arguments.debug
        )
    if arguments.json:
        print(json.dumps({"id": key_id, "key": key}))
    else:
        print(f"{key}\n\nThis is shown once. Its id is {key_id}.")
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
        if not store.revoke(arguments.id):
            print(f"there is no key {arguments.id!r}")
            return 1
    print(f"{arguments.id} is revoked")
    return 0


def _open(arguments: Namespace) -> KeyStore:
    state = State(arguments.state_dir)
    state.make()
    return KeyStore(state.keys)


def _models(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--models: expected names with commas between them, got the value {text!r}")
    return names


def _line(record: KeyRecord) -> str:
    rights = [name for name, has in (("admin", record.admin), ("debug", record.debug)) if has]
    models = "all models" if record.models is None else ",".join(record.models)
    created = datetime.fromtimestamp(record.created_at, UTC).strftime("%Y-%m-%d %H:%M")
    return "  ".join((record.id, record.name, f"priority {record.priority}", models, created, *rights))
