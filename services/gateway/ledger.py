"""Brings usage from the journal into the database, in batches and on a thread of its own, exactly once."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Final

from services.common.database import Database, DatabaseError
from services.common.ledger import UsageRow, add_rows, delete_before, month_of, spent
from services.gateway.journal import CLOSES, Entry, Journal, read_entries, segments_of

__all__ = ["Ledger", "Spending"]

_log = logging.getLogger(__name__)
_PERIOD_SECONDS: Final = 0.4
_RETRY_SECONDS: Final = 1.0
_BATCH_ROWS: Final = 500
_SPENDING_SECONDS: Final = 5.0
_RETENTION_SECONDS: Final = 3600.0
_STOP_SECONDS: Final = 3.0
_DAY_SECONDS: Final = 86_400.0
_NOTHING: Final = 1e-12


class Spending:
    """What each key has spent this month: what the database knew last, and what this process has added since."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch."""
        self._clock = clock
        self._lock = threading.Lock()
        self._month = month_of(clock())
        self._known: dict[str, float] = {}
        self._pending: dict[str, tuple[str, float]] = {}
        self._added: dict[str, float] = {}

    @property
    def current_month(self) -> str:
        """YYYY-MM, in UTC."""
        return month_of(self._clock())

    def of(self, key_id: str) -> float:
        """In the currency of the prices."""
        if self.current_month != self._month:
            return 0.0
        return self._known.get(key_id, 0.0) + self._added.get(key_id, 0.0)

    def add(self, row: UsageRow) -> None:
        """A request has ended; said again, its last word counts."""
        if not row.cost:
            return
        with self._lock:
            _, before = self._pending.pop(row.id, ("", 0.0))
            self._pending[row.id] = (row.key_id, row.cost)
            self._added[row.key_id] = self._added.get(row.key_id, 0.0) + row.cost - before

    def move(self, rows: Iterable[UsageRow]) -> None:
        """The database has these."""
        with self._lock:
            for row in rows:
                key_id, cost = self._pending.pop(row.id, ("", 0.0))
                if cost:
                    self._known[key_id] = self._known.get(key_id, 0.0) + cost
                    self._added[key_id] -= cost
                    if self._added[key_id] < _NOTHING:
                        del self._added[key_id]

    def know(self, month: str, known: Mapping[str, float]) -> None:
        """The database says so."""
        with self._lock:
            if month != self._month:
                self._added.clear()
                self._pending.clear()
            self._month, self._known = month, dict(known)


class Ledger:
    """A thread between the journal and the database. That one is away is nobody's business but this one's."""

    def __init__(
        self, journal: Journal, open_database: Callable[[], Database], spending: Spending, *, retention_days: int | None
    ) -> None:
        self._journal = journal
        self._open_database = open_database
        self._spending = spending
        self._retention = retention_days
        self._database: Database | None = None
        self._offsets: dict[Path, int] = {}
        # What was there before this process has no writer any more.
        self._left_behind = [path for number, path in segments_of(journal.folder) if number < journal.current]
        self._next_spending = self._next_retention = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self.is_away = False
        """Whether the database can't be written."""
        self.shipped = 0
        """Rows that the database has taken from this process."""

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, with what the database takes within a few seconds; the rest waits in the journal."""
        self._stop.set()
        self._thread.join(timeout=_STOP_SECONDS)

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                self._work()
            except DatabaseError as error:
                self._note_away(error)
            except OSError:
                _log.exception("the journal can't be read")
            if stopping:
                break
            self._stop.wait(_RETRY_SECONDS if self.is_away else _PERIOD_SECONDS)
        if self._database is not None:
            self._database.close()

    def _work(self) -> None:
        if self._database is None:
            self._database = self._open_database()
        self._recover()
        current = self._journal.current
        for number, path in segments_of(self._journal.folder):
            while self._ship(path):
                pass
            if number < current:
                # Ended, and all of it is in the database; requests that still run are noted again in the next file.
                path.unlink()
                self._offsets.pop(path, None)
        self._look_after(self._database)
        if self.is_away:
            self.is_away = False
            _log.info("usage is written to the database again")

    def _recover(self) -> None:
        """Brings in what an earlier process left; what it did not see the end of has a row that says so."""
        if not self._left_behind:
            return
        opened: dict[str, UsageRow] = {}
        for entries in chain.from_iterable(map(_batches, self._left_behind)):
            opened.update((entry.row.id, entry.row) for entry in entries if entry.kind == "open")
            ended = [entry.row for entry in entries if entry.kind == "close"]
            self._write(ended)
            for row in ended:
                opened.pop(row.id, None)
        lost = list(opened.values())
        for start in range(0, len(lost), _BATCH_ROWS):
            self._write(lost[start : start + _BATCH_ROWS])
        for path in self._left_behind:
            path.unlink(missing_ok=True)
        self._left_behind = []
        if lost:
            _log.warning("requests were cut off with the process before this one", extra={"requests": len(lost)})

    def _ship(self, path: Path) -> bool:
        """Brings in the next rows of a file that this process writes; False when there are none."""
        offset = self._offsets.get(path, 0)
        if path.stat().st_size <= offset:
            return False
        rows: list[UsageRow] = []
        for entry, after in read_entries(path, offset, only=CLOSES):
            offset = after
            rows.append(entry.row)
            if len(rows) == _BATCH_ROWS:
                break
        self._write(rows)
        # Only now: rows that the database did not take are read again.
        self._offsets[path] = offset
        return bool(rows)

    def _write(self, rows: list[UsageRow]) -> None:
        if not rows:
            return
        assert self._database is not None
        with self._database.writing() as connection:
            add_rows(connection, rows)
        self._spending.move(rows)
        self.shipped += len(rows)

    def _look_after(self, database: Database) -> None:
        now = time.monotonic()
        if now >= self._next_spending:
            self._next_spending = now + _SPENDING_SECONDS
            month = self._spending.current_month
            with database.reading() as connection:
                self._spending.know(month, spent(connection, month))
        if self._retention is not None and now >= self._next_retention:
            self._next_retention = now + _RETENTION_SECONDS
            with database.writing() as connection:
                count = delete_before(connection, time.time() - self._retention * _DAY_SECONDS)
            if count:
                _log.info("old usage is deleted", extra={"rows": count})

    def _note_away(self, error: DatabaseError) -> None:
        if not self.is_away:
            _log.warning("usage waits in the journal", extra={"cause": type(error).__name__})
        self.is_away = True


def _batches(path: Path) -> Iterator[list[Entry]]:
    entries = (entry for entry, _ in read_entries(path, 0))
    while batch := list(islice(entries, _BATCH_ROWS)):
        yield batch
