"""The usage ledger: one row for each request that was let in, and what can be asked of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Dialect, Insert, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from services.common import audit
from services.common.database import Database
from services.common.tables import USAGE

__all__ = ["LOST", "UsageRow", "add_rows", "delete_before", "erase", "month_of", "report", "requests", "spent"]

LOST: Final = "lost"
"""The outcome of a request whose gateway was gone before its end: what it used is not known."""


class UsageRow(msgspec.Struct, kw_only=True, frozen=True):
    """One request."""

    id: str
    """Unique for every request that was let in, however often its row is written."""
    request_id: str
    """`x-request-id`."""
    time: float
    """When it was let in, in seconds since the epoch."""
    month: str
    """The same as YYYY-MM, in UTC."""
    lane: str
    """ "openai" or "typed"."""
    endpoint: str
    tenant: str
    key_id: str
    model: str = ""
    worker: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    output_tokens: int = 0
    ttft_seconds: float | None = None
    """From when it was let in to the first token."""
    tpot_seconds: float | None = None
    """Between tokens, on average."""
    queue_seconds: float | None = None
    """Waiting for a worker, and in its engine."""
    prefill_seconds: float | None = None
    duration_seconds: float | None = None
    gpu_seconds: float = 0.0
    """Its part of its worker's time: of a second in which n requests ran, each has 1/n."""
    outcome: str = LOST
    """ "ok", "client_left", the reason of an error, or LOST."""
    cost: float = 0.0
    """`gpu_seconds` x the price of the worker's GPUs an hour / 3600."""
    moves: str | None = None
    """The workers that it was moved away from, oldest first, as JSON: each with `worker`, `at_seconds` since its
    generation began, `emitted_tokens` by then, and `cause` in words. None: it was not moved."""


def month_of(moment: float) -> str:
    """YYYY-MM in UTC, of seconds since the epoch."""
    return _month_of_hour(int(moment // 3600))


@lru_cache(maxsize=64)
def _month_of_hour(hour: int) -> str:
    return datetime.fromtimestamp(3600 * hour, UTC).strftime("%Y-%m")


def add_rows(connection: Connection, rows: Sequence[UsageRow]) -> None:
    """Adds rows, each once, however often it comes.

    What comes later is truer; but a row that only says that its request was lost never takes another one's place.
    """
    latest = {row.id: row for row in rows}.values()
    upsert, insert = _statements(connection.dialect)
    for statement, is_lost in ((upsert, False), (insert, True)):
        wanted = [row for row in latest if (row.outcome == LOST) is is_lost]
        if wanted:
            connection.exec_driver_sql(statement.text, statement.parameters(wanted))


@dataclass(frozen=True, slots=True)
class _Statement:
    """One that is written out already: the library goes through each column of each row anew."""

    text: str
    columns: tuple[str, ...] | None
    """In the order in which the driver wants them; None: it takes them by their names."""

    def parameters(self, rows: Iterable[UsageRow]) -> list[Any]:
        """For executing it with many rows."""
        if self.columns is None:
            return [msgspec.structs.asdict(row) for row in rows]
        values = attrgetter(*self.columns)
        return [values(row) for row in rows]


@lru_cache(4)
def _statements(dialect: Dialect) -> tuple[_Statement, _Statement]:
    """What takes a row's place, and what does not."""
    insert: Any = (postgresql if dialect.name == "postgresql" else sqlite).insert(USAGE)
    columns = {column.name: insert.excluded[column.name] for column in USAGE.columns if column.name != "id"}
    upsert = insert.on_conflict_do_update(index_elements=["id"], set_=columns)
    return _written(upsert, dialect), _written(insert.on_conflict_do_nothing(index_elements=["id"]), dialect)


def _written(insert: Insert, dialect: Dialect) -> _Statement:
    compiled: Any = insert.compile(dialect=dialect)
    return _Statement(compiled.string, tuple(compiled.positiontup) if compiled.positional else None)


def spent(connection: Connection, month: str) -> dict[str, float]:
    """What each key's requests of a month cost."""
    query = select(USAGE.c.key_id, func.sum(USAGE.c.cost)).where(USAGE.c.month == month).group_by(USAGE.c.key_id)
    return {key_id: float(cost) for key_id, cost in connection.execute(query)}


def report(
    database: Database, *, tenant: str | None = None, model: str | None = None, month: str | None = None
) -> list[dict[str, Any]]:
    """Usage by month, tenant and model.

    What prefix caching saved is an estimate: the cached tokens, at the rate at which the others were prefilled, for
    what a second of the GPUs cost.
    """
    counts = [
        func.sum(USAGE.c[name]).label(name)
        for name in ("prompt_tokens", "cached_tokens", "output_tokens", "gpu_seconds", "cost", "prefill_seconds")
    ]
    groups = [USAGE.c.month, USAGE.c.tenant, USAGE.c.model]
    query = select(*groups, func.count().label("requests"), *counts).group_by(*groups).order_by(*groups)
    for column, wanted in zip(groups, (month, tenant, model), strict=True):
        if wanted is not None:
            query = query.where(column == wanted)
    with database.reading() as connection:
        return [_line(row) for row in connection.execute(query).mappings()]


def requests(database: Database, *, limit: int, **wanted: str | None) -> list[dict[str, Any]]:
    """Requests that have ended, one entry each with a UsageRow's fields, the newest first.

    `wanted`: values of the columns request_id, tenant, model, worker or outcome; None leaves a column open.
    """
    query = select(USAGE).order_by(USAGE.c.time.desc()).limit(limit)
    for name, value in wanted.items():
        if value is not None:
            query = query.where(USAGE.c[name] == value)
    with database.reading() as connection:
        rows = [dict(row) for row in connection.execute(query).mappings()]
    return [{**row, "moves": json.loads(row["moves"] or "[]")} for row in rows]


def _line(row: Any) -> dict[str, Any]:
    prompt, cached, output = int(row["prompt_tokens"]), int(row["cached_tokens"]), int(row["output_tokens"])
    cost, gpu_seconds = float(row["cost"]), float(row["gpu_seconds"])
    uncached = prompt - cached
    saved_seconds = cached * float(row["prefill_seconds"] or 0.0) / uncached if uncached > 0 else 0.0
    return {
        "month": row["month"],
        "tenant": row["tenant"],
        "model": row["model"],
        "requests": int(row["requests"]),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": output,
        "gpu_seconds": round(gpu_seconds, 3),
        "cost": round(cost, 6),
        "cost_per_1000_tokens": round(1000 * cost / (prompt + output), 6) if prompt + output else 0.0,
        "cache_saved_gpu_seconds": round(saved_seconds, 3),
        "cache_saved_cost": round(saved_seconds * cost / gpu_seconds, 6) if gpu_seconds > 0 else 0.0,
    }


def erase(database: Database, tenant: str, *, actor: str) -> int:
    """Deletes a tenant's rows, notes that in the audit trail, and returns how many there were."""
    with database.writing() as connection:
        count = connection.execute(delete(USAGE).where(USAGE.c.tenant == tenant)).rowcount
        audit.record(connection, actor=actor, action="usage.erase", target=tenant, detail={"rows": count})
    return count


def delete_before(connection: Connection, moment: float) -> int:
    """Deletes rows of requests before a moment (seconds since the epoch)."""
    return connection.execute(delete(USAGE).where(USAGE.c.time < moment)).rowcount
