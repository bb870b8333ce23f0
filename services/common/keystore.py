"""API keys in the mesh's database: the command line changes them, the gateways read them."""

import hashlib
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, or_, select

from services.common import audit
from services.common.database import Database
from services.common.quota import NO_LIMITS, KeyLimits
from services.common.tables import COUNTERS, KEYS

__all__ = ["KEY_PREFIX", "KeyRecord", "KeyStore", "hash_of"]

KEY_PREFIX: Final = "tl-"
_COUNT: Final = select(COUNTERS.c.value).where(COUNTERS.c.name == "keys")
_LIMITS: Final = ("rpm", "tpm", "concurrency", "budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """What is known of a key; the key itself is known to its owner alone."""

    id: str
    name: str
    tenant: str
    """Whose requests these are, for fairness and accounting; the name unless told otherwise."""
    models: tuple[str, ...] | None
    """The models it may use; None: all."""
    endpoints: tuple[str, ...] | None
    """What it may ask for, by the names in services/common/endpoints.py; None: everything."""
    priority: int
    """Scheduling class of its requests, lower first."""
    allow_degrade: bool
    """Whether a smaller model may answer when the one asked for has no room."""
    admin: bool
    debug: bool
    limits: KeyLimits
    created_at: float
    """Seconds since the epoch."""
    expires_at: float | None
    """Seconds since the epoch; None: never."""


class KeyStore:
    """The keys of a mesh. Only their SHA-256 hashes are stored, which is safe for 256 random bits.

    Several processes may use one database; a change is seen by all of them at their next look. A context manager;
    leaving it closes the database.
    """

    def __init__(self, where: str | Path) -> None:
        """Opens the database, and makes it when it is a file that isn't there.

        Raises:
            DatabaseError: it can't be opened, or is something else.
        """
        self._database = Database(where)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def create(
        self,
        name: str,
        *,
        models: Iterable[str] | None = None,
        endpoints: Iterable[str] | None = None,
        priority: int = 0,
        allow_degrade: bool = False,
        admin: bool = False,
        debug: bool = False,
        tenant: str | None = None,
        limits: KeyLimits = NO_LIMITS,
        expires_at: float | None = None,
        actor: str = "local",
    ) -> tuple[str, str]:
        """Makes a key and returns its id and the key, which can't be read again."""
        key_id = f"key-{secrets.token_hex(6)}"
        key = _new_key()
        values: dict[str, Any] = {
            "id": key_id,
            "name": name,
            "tenant": tenant or name,
            "models": _listed(models),
            "endpoints": _listed(endpoints),
            "priority": priority,
            "allow_degrade": int(allow_degrade),
            "admin": int(admin),
            "debug": int(debug),
            "created_at": time.time(),
            "expires_at": expires_at,
            **{limit: getattr(limits, limit) for limit in _LIMITS},
        }
        with self._database.writing() as connection:
            connection.execute(KEYS.insert().values(hash=hash_of(key), **values))
            _changed(connection)
            audit.record(connection, actor=actor, action="keys.create", target=key_id, detail=values)
        return key_id, key

    def list(self) -> list[KeyRecord]:
        """Every key, oldest first."""
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(KEYS.select().order_by(KEYS.c.created_at, KEYS.c.id))]

    def revoke(self, key_id: str, *, actor: str = "local") -> bool:
        """Ends a key; False when there is none of this id."""
        with self._database.writing() as connection:
            if connection.execute(KEYS.delete().where(KEYS.c.id == key_id)).rowcount != 1:
                return False
            _changed(connection)
            audit.record(connection, actor=actor, action="keys.revoke", target=key_id)
        return True

    def rotate(self, key_id: str, *, grace_seconds: float = 0.0, actor: str = "local") -> str | None:
        """Gives a key a new secret and returns it; the old one works on for `grace_seconds`. None: no such key."""
        key = _new_key()
        old: dict[str, Any] = {"old_hash": None, "old_until": None}
        if grace_seconds > 0:
            old = {"old_hash": KEYS.c.hash, "old_until": time.time() + grace_seconds}
        with self._database.writing() as connection:
            changed = connection.execute(KEYS.update().where(KEYS.c.id == key_id).values(hash=hash_of(key), **old))
            if changed.rowcount != 1:
                return None
            _changed(connection)
            detail = {"grace_seconds": grace_seconds}
            audit.record(connection, actor=actor, action="keys.rotate", target=key_id, detail=detail)
        return key

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key that a client sent; None when it is not one of ours, or has expired."""
        digest, now = hash_of(key), time.time()
        is_old = (KEYS.c.old_hash == digest) & (KEYS.c.old_until > now)
        with self._database.reading() as connection:
            row = connection.execute(KEYS.select().where(or_(KEYS.c.hash == digest, is_old))).first()
        if row is None or (row.expires_at is not None and row.expires_at <= now):
            return None
        return _record(row)

    def secrets(self) -> dict[bytes, tuple[KeyRecord, float | None]]:
        """Every key by the hash of its secret, and until when that secret works (seconds since the epoch)."""
        found: dict[bytes, tuple[KeyRecord, float | None]] = {}
        with self._database.reading() as connection:
            for row in connection.execute(KEYS.select()):
                record = _record(row)
                found[bytes(row.hash)] = (record, record.expires_at)
                if row.old_hash is not None:
                    until = row.old_until if record.expires_at is None else min(row.old_until, record.expires_at)
                    found[bytes(row.old_hash)] = (record, until)
        return found

    def version(self) -> int:
        """Differs from an earlier answer when the keys have changed since."""
        with self._database.reading() as connection:
            return int(connection.execute(_COUNT).scalar_one())


def hash_of(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def _changed(connection: Connection) -> None:
    connection.execute(COUNTERS.update().where(COUNTERS.c.name == "keys").values(value=COUNTERS.c.value + 1))


def _listed(names: Iterable[str] | None) -> str | None:
    return None if names is None else json.dumps(sorted(set(names)))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(json.loads(text))


def _record(row: Any) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        models=_names(row.models),
        endpoints=_names(row.endpoints),
        priority=row.priority,
        allow_degrade=bool(row.allow_degrade),
        admin=bool(row.admin),
        debug=bool(row.debug),
        limits=KeyLimits(**{limit: getattr(row, limit) for limit in _LIMITS}),
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
