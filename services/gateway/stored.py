"""The database, for requests that can't do without it; it may be away, at the start, too."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from sqlalchemy import ColumnElement, Connection, Table, and_, false, or_, select

from services.common.database import Database, DatabaseError
from services.common.errors import MeshError, Reason

__all__ = ["LateDatabase", "behind", "while_stored"]

_log = logging.getLogger(__name__)


class LateDatabase:
    """The mesh's database, opened when it is first needed. A context manager; leaving it closes it. For any thread."""

    def __init__(self, where: str) -> None:
        """`where`: a file, or a URL."""
        self._where = where
        self._lock = threading.Lock()
        self._database: Database | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._database is not None:
            self._database.close()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read with. Raises DatabaseError."""
        with self._opened().reading() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed at the end of the block. Raises DatabaseError."""
        with self._opened().writing() as connection:
            yield connection

    def _opened(self) -> Database:
        with self._lock:
            if self._database is None:
                self._database = Database(self._where)
            return self._database


def behind(connection: Connection, table: Table, after: str, *, newest_first: bool) -> ColumnElement[bool]:
    """What comes after row `after` in a list by `created_at`, then `id`; nothing where there is no such row."""
    created_at, row_id = table.c.created_at, table.c.id
    since = connection.execute(select(created_at).where(row_id == after)).scalar()
    if since is None:
        return false()
    later = created_at < since if newest_first else created_at > since
    return or_(later, and_(created_at == since, row_id > after))


@contextmanager
def while_stored() -> Iterator[None]:
    """Turns a database that is away into an answer: try again.

    Raises:
        MeshError: NO_READY_WORKER.
    """
    try:
        yield
    except DatabaseError as error:
        _log.warning("the database is away", extra={"cause": repr(error)})
        raise MeshError(
            Reason.NO_READY_WORKER, "what is stored can't be reached at present", retry_after_seconds=5.0
        ) from error
