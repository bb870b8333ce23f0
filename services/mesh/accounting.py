"""Keys, usage and the audit trail of a mesh, for commands: in its database, or through the edge of one elsewhere."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote, urlencode

from services.common.errors import MeshError, Reason
from services.common.quota import KeyLimits
from services.mesh.actor import local_actor
from services.mesh.books import find_database
from services.mesh.edge_client import Door, ask_gateway, door_of
from services.mesh.option_parts import DEFAULT_STATE
from services.mesh.state import State

if TYPE_CHECKING:
    from services.common.database import Database
    from services.common.keystore import KeyStore

__all__ = ["Accounting", "accounting_of"]

_LIMITS: Final = ("rpm", "tpm", "concurrency", "budget")


class Accounting(Protocol):
    """What commands ask and change. Plain data, as /v1/admin has it. Everything may raise MeshError."""

    def create_key(self, asked: dict[str, Any]) -> dict[str, str]:
        """Makes a key, of what POST /v1/admin/keys takes; its `id` and the `key`."""
        ...

    def keys(self) -> list[dict[str, Any]]:
        """Every key, not its secret."""
        ...

    def revoke_key(self, key_id: str) -> None:
        """Ends a key."""
        ...

    def rotate_key(self, key_id: str, grace_seconds: float) -> dict[str, str]:
        """Gives a key a new secret; its `id` and the `key`."""
        ...

    def usage(self, **wanted: str | None) -> list[dict[str, Any]]:
        """Usage by month, tenant and model; `wanted` may name one of each."""
        ...

    def erase_usage(self, tenant: str) -> int:
        """Deletes a tenant's usage; how many rows there were."""
        ...

    def audit(self, limit: int) -> list[dict[str, Any]]:
        """The latest changes, newest first."""
        ...


@contextmanager
def accounting_of(arguments: Namespace, *, may_begin: bool = False) -> Iterator[Accounting]:
    """That of the mesh that the options name; `may_begin`: or that is yet to run in a folder that they name.

    Raises:
        MeshError: nothing says where it is, or the key for its edge is missing.
        ConfigError: see find_database().
    """
    if arguments.edge is not None:
        yield _AtEdge(door_of(arguments))
        return
    # Importing SQLAlchemy takes longer than most commands: only those that need it do.
    from services.common.database import Database  # noqa: PLC0415
    from services.common.keystore import KeyStore  # noqa: PLC0415

    where = find_database(State(arguments.state_dir), may_begin=may_begin and arguments.state_dir != DEFAULT_STATE)
    with KeyStore(where) as store, Database(where) as database:
        yield _InDatabase(store, database)


class _InDatabase:
    def __init__(self, store: "KeyStore", database: "Database") -> None:
        self._store = store
        self._database = database

    def create_key(self, asked: dict[str, Any]) -> dict[str, str]:
        values = dict(asked)
        limits = KeyLimits(**{name: values.pop(name) for name in _LIMITS})
        expires_in = values.pop("expires_in_seconds")
        expires_at = None if expires_in is None else time.time() + expires_in
        name = values.pop("name")
        key_id, key = self._store.create(name, limits=limits, expires_at=expires_at, actor=local_actor(), **values)
        return {"id": key_id, "key": key}

    def keys(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self._store.list()]

    def revoke_key(self, key_id: str) -> None:
        if not self._store.revoke(key_id, actor=local_actor()):
            raise _unknown(key_id)

    def rotate_key(self, key_id: str, grace_seconds: float) -> dict[str, str]:
        key = self._store.rotate(key_id, grace_seconds=grace_seconds, actor=local_actor())
        if key is None:
            raise _unknown(key_id)
        return {"id": key_id, "key": key}

    def usage(self, **wanted: str | None) -> list[dict[str, Any]]:
        from services.common import ledger  # noqa: PLC0415  # as above

        return ledger.report(self._database, **wanted)

    def erase_usage(self, tenant: str) -> int:
        from services.common import ledger  # noqa: PLC0415  # as above

        return ledger.erase(self._database, tenant, actor=local_actor())

    def audit(self, limit: int) -> list[dict[str, Any]]:
        from services.common import audit  # noqa: PLC0415  # as above

        return audit.read(self._database, limit=limit)


class _AtEdge:
    """Who changes something there is whose key it is."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def create_key(self, asked: dict[str, Any]) -> dict[str, str]:
        made: dict[str, str] = self._ask("/keys", body=asked)
        return made

    def keys(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self._ask("/keys")["data"]
        return listed

    def revoke_key(self, key_id: str) -> None:
        self._ask(f"/keys/{quote(key_id, safe='')}", method="DELETE")

    def rotate_key(self, key_id: str, grace_seconds: float) -> dict[str, str]:
        rotated: dict[str, str] = self._ask(
            f"/keys/{quote(key_id, safe='')}/rotate", body={"grace_seconds": grace_seconds}
        )
        return rotated

    def usage(self, **wanted: str | None) -> list[dict[str, Any]]:
        said = {name: value for name, value in wanted.items() if value is not None}
        lines: list[dict[str, Any]] = self._ask(f"/usage?{urlencode(said)}")["data"]
        return lines

    def erase_usage(self, tenant: str) -> int:
        return int(self._ask(f"/usage?{urlencode({'tenant': tenant})}", method="DELETE")["erased"])

    def audit(self, limit: int) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._ask(f"/audit?limit={limit}")["data"]
        return entries

    def _ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        return ask_gateway(self._door, f"/v1/admin{path}", body, method=method)


def _unknown(key_id: str) -> MeshError:
    return MeshError(Reason.NOT_FOUND, f"there is no key {key_id!r}", field="key_id")
