"""API keys in one SQLite file, shared by the command line, which changes them, and the gateways, which look them up."""

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["KEY_PREFIX", "KeyRecord", "KeyStore"]

KEY_PREFIX: Final = "tl-"
_BUSY_SECONDS: Final = 5.0
_COLUMNS: Final = "id, name, tenant, models, priority, admin, debug, created_at"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    hash BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL,
    tenant TEXT NOT NULL,
    models TEXT,
    priority INTEGER NOT NULL,
    admin INTEGER NOT NULL,
    debug INTEGER NOT NULL,
    created_at REAL NOT NULL
) STRICT
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """What is known of a key; the key itself is known to its owner alone."""

    id: str
    name: str
    tenant: str
    """Whose requests these are, for fairness and accounting; the name unless told otherwise."""
    models: tuple[str, ...] | None
    """The models it may use; None: all."""
    priority: int
    """Scheduling class of its requests, lower first."""
    admin: bool
    debug: bool
    created_at: float
    """Seconds since the epoch."""


class KeyStore:
    """The keys of a mesh. Only their SHA-256 hashes are stored, which is safe for 256 random bits.

    Several processes may use one file; a change is seen by all of them at their next look. Not for use from several
    threads. A context manager; leaving it closes the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the file, and makes it when it isn't there.

        Raises:
            sqlite3.Error: it can't be opened, or is something else.
        """
        self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_SCHEMA)
        except sqlite3.Error:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def create(
        self,
        name: str,
        *,
        models: Iterable[str] | None = None,
        priority: int = 0,
        admin: bool = False,
        debug: bool = False,
        tenant: str | None = None,
    ) -> tuple[str, str]:
        """Makes a key and returns its id and the key, which can't be read again."""
        key_id = f"key-{secrets.token_hex(6)}"
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        listed = None if models is None else json.dumps(sorted(set(models)))
        self._database.execute(
            f"INSERT INTO keys (hash, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # a constant
            (_hash(key), key_id, name, tenant or name, listed, priority, admin, debug, time.time()),
        )
        return key_id, key

    def list(self) -> list[KeyRecord]:
        """Every key, oldest first."""
        rows = self._database.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created_at, id")  # noqa: S608  # a constant
        return [_record(row) for row in rows]

    def revoke(self, key_id: str) -> bool:
        """Ends a key; False when there is none of this id."""
        return self._database.execute("DELETE FROM keys WHERE id = ?", (key_id,)).rowcount == 1

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key that a client sent; None when it is not one of ours."""
        query = f"SELECT {_COLUMNS} FROM keys WHERE hash = ?"  # noqa: S608  # a constant
        row = self._database.execute(query, (_hash(key),)).fetchone()
        return None if row is None else _record(row)

    def version(self) -> tuple[int, int]:
        """Differs from an earlier answer when any process may have changed the keys since. Costs a few µs."""
        (others,) = self._database.execute("PRAGMA data_version").fetchone()
        return others, self._database.total_changes


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _record(row: tuple[Any, ...]) -> KeyRecord:
    key_id, name, tenant, models, priority, admin, debug, created_at = row
    return KeyRecord(
        id=key_id,
        name=name,
        tenant=tenant,
        models=None if models is None else tuple(json.loads(models)),
        priority=priority,
        admin=bool(admin),
        debug=bool(debug),
        created_at=created_at,
    )
