"""The mesh's SQL database: one SQLite file, or PostgreSQL; its tables, and how earlier ones become current."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.dialects.sqlite import REAL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

__all__ = [
    "AUDIT",
    "BATCHES",
    "BATCH_RESULTS",
    "COUNTERS",
    "FILES",
    "FILE_CHUNKS",
    "KEYS",
    "USAGE",
    "Database",
    "DatabaseError",
    "url_of",
]

DatabaseError = SQLAlchemyError
"""What any use of the database may raise."""

_VERSION: Final = 3
_BUSY_SECONDS: Final = 5
_CONNECT_SECONDS: Final = 2
_STATEMENT_MS: Final = 10_000
# Any number, as long as it is always the same one: it keeps two processes from migrating at once.
_MIGRATION_LOCK: Final = 0x746C6D
_WRITES: Final = "tokenloom_writes"

_metadata: Final = MetaData()
# SQLite's strict tables know few names of types.
_SECONDS: Final[Double[float]] = Double().with_variant(REAL(), "sqlite")
_COUNT: Final = BigInteger().with_variant(Integer(), "sqlite")

KEYS: Final = Table(
    "keys",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("hash", LargeBinary, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("models", Text),
    Column("priority", Integer, nullable=False),
    Column("admin", Integer, nullable=False),
    Column("debug", Integer, nullable=False),
    Column("created_at", _SECONDS, nullable=False),
    Column("endpoints", Text),
    Column("allow_degrade", Integer, nullable=False, server_default="0"),
    Column("rpm", _COUNT),
    Column("tpm", _COUNT),
    Column("concurrency", _COUNT),
    Column("budget", _SECONDS),
    Column("expires_at", _SECONDS),
    Column("old_hash", LargeBinary),
    Column("old_until", _SECONDS),
)
"""API keys, by the hashes of their secrets."""

USAGE: Final = Table(
    "usage",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("time", _SECONDS, nullable=False),
    Column("month", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("worker", Text, nullable=False),
    Column("prompt_tokens", _COUNT, nullable=False),
    Column("cached_tokens", _COUNT, nullable=False),
    Column("output_tokens", _COUNT, nullable=False),
    Column("ttft_seconds", _SECONDS),
    Column("tpot_seconds", _SECONDS),
    Column("queue_seconds", _SECONDS),
    Column("prefill_seconds", _SECONDS),
    Column("duration_seconds", _SECONDS),
    Column("gpu_seconds", _SECONDS, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("cost", _SECONDS, nullable=False),
    Column("moves", Text),
    Index("usage_by_key", "key_id", "month"),
    Index("usage_by_tenant", "tenant", "month"),
    Index("usage_by_time", "time"),
    Index("usage_by_request", "request_id"),
)
"""One row for each request that was let in."""

AUDIT: Final = Table(
    "audit",
    _metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time", _SECONDS, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("detail", Text, nullable=False),
)
"""Who changed what."""

COUNTERS: Final = Table(
    "counters", _metadata, Column("name", Text, primary_key=True), Column("value", _COUNT, nullable=False)
)
"""Numbers that move when something else has changed, and the version of the tables."""

FILES: Final = Table(
    "files",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", _COUNT, nullable=False),
    Column("complete", Integer, nullable=False),
    Column("created_at", _SECONDS, nullable=False),
    Column("expires_at", _SECONDS),
    Index("files_by_tenant", "tenant", "created_at"),
)
"""Files that clients sent or batches made."""

FILE_CHUNKS: Final = Table(
    "file_chunks",
    _metadata,
    Column("file_id", Text, primary_key=True),
    Column("number", _COUNT, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
"""What is in the files, in order."""

BATCHES: Final = Table(
    "batches",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("identity", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("status", Text, nullable=False),
    Column("errors", Text),
    Column("metadata", Text),
    Column("times", Text, nullable=False),
    Column("created_at", _SECONDS, nullable=False),
    Column("expires_at", _SECONDS, nullable=False),
    Column("total", _COUNT, nullable=False, server_default="0"),
    Column("owner", Text),
    Column("owned_until", _SECONDS, nullable=False, server_default="0"),
    Index("batches_by_tenant", "tenant", "created_at"),
    Index("batches_by_status", "status"),
)
"""Jobs of many requests."""

BATCH_RESULTS: Final = Table(
    "batch_results",
    _metadata,
    Column("batch_id", Text, primary_key=True),
    Column("line", _COUNT, primary_key=True),
    Column("ok", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
"""What became of each line of a batch's input."""


class Database:
    """A database with current tables. A context manager; leaving it closes its connections. For any thread."""

    def __init__(self, where: str | Path) -> None:
        """Opens it, and makes or migrates its tables. `where`: a file, or a URL (`sqlite:///…`, `postgresql://…`).

        Raises:
            DatabaseError: it can't be opened, is something else, or a later version made it.
        """
        self._engine = _engine(url_of(where))
        try:
            self._migrate()
        except BaseException:
            self._engine.dispose()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()

    @property
    def dialect(self) -> str:
        """ "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read with."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed at the end of the block. Writers of one SQLite file wait for each other."""
        with self._engine.execution_options(**{_WRITES: True}).begin() as connection:
            yield connection

    def _migrate(self) -> None:
        with self.reading() as connection:
            if _version(connection) == _VERSION:
                return
        with self.writing() as connection:
            if self.dialect == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            found = _version(connection)
            if found > _VERSION:
                raise SQLAlchemyError(
                    f"the database has tables of version {found}, made by a later tokenloom; this one knows {_VERSION}"
                )
            if found < _VERSION:
                _metadata.create_all(connection)
                _add_columns(connection)
                _set_version(connection)


def url_of(where: str | Path) -> str:
    """The URL of a database that is named by its file or by its URL."""
    return where if isinstance(where, str) and "://" in where else f"sqlite:///{Path(where).absolute()}"


def _engine(url: str) -> Engine:
    if url.startswith("sqlite:"):
        # Connections of a file are cheap, and one that is kept could be met by two threads at once.
        engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, poolclass=NullPool)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    url = url.replace("postgresql://", "postgresql+psycopg://", 1).replace("postgres://", "postgresql+psycopg://", 1)
    limits = f"-c statement_timeout={_STATEMENT_MS} -c lock_timeout={_BUSY_SECONDS * 1000}"
    arguments: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "options": limits, "tcp_user_timeout": 10_000}
    return create_engine(url, connect_args=arguments, pool_pre_ping=True, pool_size=2, max_overflow=2, pool_timeout=5)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun below: sqlite3's own way would begin them at the first change only.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _version(connection: Connection) -> int:
    if not inspect(connection).has_table(COUNTERS.name):
        return 0
    found = connection.execute(COUNTERS.select().where(COUNTERS.c.name == "schema")).first()
    return 0 if found is None else int(found.value)


def _set_version(connection: Connection) -> None:
    connection.execute(COUNTERS.delete().where(COUNTERS.c.name == "schema"))
    connection.execute(COUNTERS.insert().values(name="schema", value=_VERSION))
    if connection.execute(COUNTERS.select().where(COUNTERS.c.name == "keys")).first() is None:
        connection.execute(COUNTERS.insert().values(name="keys", value=1))


def _add_columns(connection: Connection) -> None:
    """Gives tables of earlier versions what they lack; a column that is added may be null or has a default."""
    for table in _metadata.sorted_tables:
        have = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in have:
                kind = column.type.compile(connection.dialect)
                default = getattr(column.server_default, "arg", None)
                rest = "" if column.nullable else f" NOT NULL DEFAULT {default}"
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}{rest}"))
        for index in table.indexes:
            index.create(connection, checkfirst=True)
