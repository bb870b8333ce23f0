"""The audit trail: who changed what, written in the transaction that changes it."""

import json
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from services.common.database import Database
from services.common.tables import AUDIT

__all__ = ["read", "record"]


def record(
    connection: Connection, *, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None
) -> None:
    """Adds an entry; `detail` never holds a secret."""
    shown = {name: value for name, value in (detail or {}).items() if value is not None}
    text = json.dumps(shown, default=str, sort_keys=True)
    connection.execute(AUDIT.insert().values(time=time.time(), actor=actor, action=action, target=target, detail=text))


def read(database: Database, *, limit: int = 1000) -> list[dict[str, Any]]:
    """The latest entries, newest first."""
    with database.reading() as connection:
        rows = connection.execute(AUDIT.select().order_by(AUDIT.c.id.desc()).limit(limit)).mappings()
        return [{**row, "detail": json.loads(row["detail"])} for row in rows]
