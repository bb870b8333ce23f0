"""The mesh's SQL database: one SQLite file, or PostgreSQL; and how the tables of earlier versions become current."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from services.common.tables import COUNTERS, METADATA, VERSION

__all__ = [
    "Database",
    "DatabaseError",
    "url_of",
]

DatabaseError = SQLAlchemyError
"""What any use of the database may raise."""

_BUSY_SECONDS: Final = 5
_CONNECT_SECONDS: Final = 2
_RECYCLE_SECONDS: Final = 30
_STATEMENT_MS: Final = 10_000
# Any number, as long as it is always the same one: it keeps two processes from migrating at once.
_MIGRATION_LOCK: Final = 0x746C6D
_WRITES: Final = "tokenloom_writes"


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
            if _version(connection) == VERSION:
                return
        with self.writing() as connection:
            if self.dialect == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            found = _version(connection)
            if found > VERSION:
                raise SQLAlchemyError(
                    f"the database has tables of version {found}, made by a later tokenloom; this one knows {VERSION}"
                )
            if found < VERSION:
                METADATA.create_all(connection)
                _add_columns(connection)
                _set_version(connection)


def url_of(where: str | Path) -> str:
    """The URL of a database that is named by its file or by its URL."""
    return where if isinstance(where, str) and "://" in where else f"sqlite:///{Path(where).absolute()}"


def _engine(url: str) -> Engine:
    if url.startswith("sqlite:"):
        # Whoever opens a file reads all of its schema, and whoever closes it last writes its log back: far more than
        # most have to do there. Anew now and then, lest somebody has put another file in its place.
        engine = create_engine(
            url, connect_args={"timeout": _BUSY_SECONDS}, pool_size=2, max_overflow=-1, pool_recycle=_RECYCLE_SECONDS
        )
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
    connection.execute(COUNTERS.insert().values(name="schema", value=VERSION))
    if connection.execute(COUNTERS.select().where(COUNTERS.c.name == "keys")).first() is None:
        connection.execute(COUNTERS.insert().values(name="keys", value=1))


def _add_columns(connection: Connection) -> None:
    """Gives tables of earlier versions what they lack; a column that is added may be null or has a default."""
    for table in METADATA.sorted_tables:
        have = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in have:
                kind = column.type.compile(connection.dialect)
                default = getattr(column.server_default, "arg", None)
                rest = "" if column.nullable else f" NOT NULL DEFAULT {default}"
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}{rest}"))
        for index in table.indexes:
            index.create(connection, checkfirst=True)
