"""Batches and what became of their lines, in the mesh's database."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, func, select, update

from services.common.tables import BATCH_RESULTS, BATCHES
from services.gateway.stored import LateDatabase, behind

__all__ = ["ACTIVE", "BatchRecord", "BatchStore", "LineResult"]

ACTIVE: Final = ("validating", "in_progress", "finalizing", "cancelling")
"""The states in which there is something to do."""
_PAGE_LINES: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """What is known of a batch."""

    id: str
    tenant: str
    key_id: str
    identity: str
    """Whose it is, as JSON: what is needed to act for it after the process that took it is gone."""
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    status: str
    errors: Sequence[Mapping[str, Any]]
    metadata: Mapping[str, str] | None
    times: Mapping[str, float]
    """When it came to which state, in seconds since the epoch: `in_progress_at`, …"""
    created_at: float
    expires_at: float
    total: int
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LineResult:
    """What became of one line."""

    line: int
    """From 0."""
    ok: bool
    data: bytes
    """The line of the output or error file."""


class BatchStore:
    """Batches by id, each seen by its own tenant only. Every method waits for the database: call it in a thread."""

    def __init__(self, database: LateDatabase, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def create(
        self,
        *,
        tenant: str,
        key_id: str,
        identity: str,
        endpoint: str,
        input_file_id: str,
        metadata: Mapping[str, str] | None,
        seconds: float,
    ) -> BatchRecord:
        """Makes a batch that has `seconds` to complete."""
        batch_id, now = f"batch_{uuid.uuid4().hex}", self._clock()
        values = {
            "id": batch_id,
            "tenant": tenant,
            "key_id": key_id,
            "identity": identity,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "status": "validating",
            "metadata": None if metadata is None else json.dumps(metadata),
            "times": "{}",
            "created_at": now,
            "expires_at": now + seconds,
        }
        with self._database.writing() as connection:
            connection.execute(BATCHES.insert().values(values))
        found = self.find(tenant, batch_id)
        assert found is not None
        return found

    def find(self, tenant: str, batch_id: str) -> BatchRecord | None:
        """A batch; None when there is none, or it isn't this tenant's."""
        with self._database.reading() as connection:
            row = connection.execute(
                select(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.tenant == tenant)
            ).first()
            if row is None:
                return None
            counts = connection.execute(
                select(BATCH_RESULTS.c.ok, func.count())
                .where(BATCH_RESULTS.c.batch_id == batch_id)
                .group_by(BATCH_RESULTS.c.ok)
            )
            by_ok = {row[0]: row[1] for row in counts}
        return _record(row, completed=by_ok.get(1, 0), failed=by_ok.get(0, 0))

    def list(self, tenant: str, *, limit: int, after: str | None) -> Sequence[BatchRecord]:
        """The batches of a tenant, the newest first, from behind `after` on."""
        query = select(BATCHES.c.id).where(BATCHES.c.tenant == tenant)
        query = query.order_by(BATCHES.c.created_at.desc(), BATCHES.c.id)
        with self._database.reading() as connection:
            if after is not None:
                query = query.where(behind(connection, BATCHES, after, newest_first=True))
            ids = connection.execute(query.limit(limit)).scalars().all()
        return [record for record in (self.find(tenant, batch_id) for batch_id in ids) if record is not None]

    def cancel(self, tenant: str, batch_id: str) -> None:
        """Asks for a batch to be stopped, unless it is over."""
        with self._database.writing() as connection:
            row = connection.execute(
                select(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.tenant == tenant)
            ).first()
            if row is not None and row.status in ("validating", "in_progress"):
                times = json.loads(row.times) | {"cancelling_at": self._clock()}
                connection.execute(
                    update(BATCHES).where(BATCHES.c.id == batch_id).values(status="cancelling", times=json.dumps(times))
                )

    def claim(self, owner: str, seconds: float) -> BatchRecord | None:
        """Takes the oldest batch that has something to do and that nobody works on, for `seconds`."""
        now = self._clock()
        waiting = (BATCHES.c.status.in_(ACTIVE)) & (BATCHES.c.owned_until < now)
        query = select(BATCHES.c.id, BATCHES.c.tenant).where(waiting).order_by(BATCHES.c.created_at).limit(1)
        # Mostly there is nothing to do, for which nobody else who writes should have to wait.
        with self._database.reading() as connection:
            if connection.execute(query).first() is None:
                return None
        with self._database.writing() as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            mine = {"owner": owner, "owned_until": now + seconds}
            connection.execute(update(BATCHES).where(BATCHES.c.id == row.id).values(mine))
        return self.find(row.tenant, row.id)

    def renew(self, batch_id: str, owner: str, seconds: float) -> str | None:
        """Keeps a batch for `seconds` more; its state, or None when somebody else has it now."""
        with self._database.writing() as connection:
            changed = connection.execute(
                update(BATCHES)
                .where(BATCHES.c.id == batch_id, BATCHES.c.owner == owner)
                .values(owned_until=self._clock() + seconds)
            )
            if changed.rowcount == 0:
                return None
            return connection.execute(select(BATCHES.c.status).where(BATCHES.c.id == batch_id)).scalar()

    def release(self, batch_id: str, owner: str) -> None:
        """Gives a batch back, so that somebody else goes on at once."""
        with self._database.writing() as connection:
            mine = (BATCHES.c.id == batch_id) & (BATCHES.c.owner == owner)
            connection.execute(update(BATCHES).where(mine).values(owner=None, owned_until=0))

    def advance(self, batch_id: str, owner: str, since: Sequence[str], status: str, **values: Any) -> bool:
        """Moves a batch on to another state, if it is ours and in one of those; tells whether it was."""
        with self._database.writing() as connection:
            row = connection.execute(select(BATCHES).where(BATCHES.c.id == batch_id)).first()
            if row is None or row.owner != owner or row.status not in since:
                return False
            if "errors" in values:
                values["errors"] = json.dumps(values["errors"])
            times = json.loads(row.times) | {f"{status}_at": self._clock()}
            connection.execute(
                update(BATCHES).where(BATCHES.c.id == batch_id).values(status=status, times=json.dumps(times), **values)
            )
        return True

    def add_results(self, batch_id: str, results: Sequence[LineResult]) -> None:
        """Keeps what became of some lines. Of a line that was done twice the first result stays."""
        with self._database.writing() as connection:
            lines = [result.line for result in results]
            there = (BATCH_RESULTS.c.batch_id == batch_id) & BATCH_RESULTS.c.line.in_(lines)
            known = set(connection.execute(select(BATCH_RESULTS.c.line).where(there)).scalars())
            rows = [
                {"batch_id": batch_id, "line": result.line, "ok": int(result.ok), "data": result.data}
                for result in results
                if result.line not in known
            ]
            if rows:
                connection.execute(BATCH_RESULTS.insert(), rows)

    def done_lines(self, batch_id: str) -> set[int]:
        """The lines that have a result."""
        with self._database.reading() as connection:
            query = select(BATCH_RESULTS.c.line).where(BATCH_RESULTS.c.batch_id == batch_id)
            return set(connection.execute(query).scalars())

    def results(self, batch_id: str, *, ok: bool) -> Iterator[bytes]:
        """The results of one kind, by line, each with its line end."""
        last = -1
        while True:
            query = (
                select(BATCH_RESULTS.c.line, BATCH_RESULTS.c.data)
                .where(BATCH_RESULTS.c.batch_id == batch_id, BATCH_RESULTS.c.ok == int(ok), BATCH_RESULTS.c.line > last)
                .order_by(BATCH_RESULTS.c.line)
                .limit(_PAGE_LINES)
            )
            with self._database.reading() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            for row in rows:
                yield bytes(row.data) + b"\n"
            last = rows[-1].line


def _record(row: Row[Any], *, completed: int, failed: int) -> BatchRecord:
    return BatchRecord(
        id=row.id,
        tenant=row.tenant,
        key_id=row.key_id,
        identity=row.identity,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        status=row.status,
        errors=json.loads(row.errors) if row.errors else [],
        metadata=None if row.metadata is None else json.loads(row.metadata),
        times=json.loads(row.times),
        created_at=row.created_at,
        expires_at=row.expires_at,
        total=row.total,
        completed=completed,
        failed=failed,
    )
