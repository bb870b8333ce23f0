"""What operators change through the edge, written down before it happens."""

import asyncio

from services.common import audit
from services.gateway.stored import LateDatabase, while_stored

__all__ = ["AuditTrail"]


class AuditTrail:
    """Adds entries to the audit trail. While the database is away nothing is changed: nobody could say by whom."""

    def __init__(self, database: LateDatabase) -> None:
        self._database = database

    async def __call__(self, key_id: str, path: str) -> None:
        """Writes down that a key asks for a path.

        Raises:
            MeshError: NO_READY_WORKER: the database is away.
        """
        with while_stored():
            await asyncio.to_thread(self._write, key_id, path)

    def _write(self, key_id: str, path: str) -> None:
        with self._database.writing() as connection:
            audit.record(connection, actor=key_id, action="call", target=path[:512])
