"""Usage on its way: from the journal to the database, each row once, whatever happens on the way."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from services.common import ledger as book
from services.common.database import Database
from services.common.ledger import UsageRow, month_of
from services.common.tables import USAGE
from services.gateway.journal import Entry, Journal, JournalInUseError, read_entries, segments_of
from services.gateway.ledger import Ledger, Spending
from tests.support.waiting import wait_until

NOW = 1_790_000_000.0


def row(number: int, **changes: Any) -> UsageRow:
    values: dict[str, Any] = {
        "id": f"row-{number}",
        "request_id": f"request-{number}",
        "time": NOW,
        "month": month_of(NOW),
        "lane": "openai",
        "endpoint": "chat",
        "tenant": "ada",
        "key_id": "key-1",
        "model": "sim",
        "worker": "worker-0",
    }
    return UsageRow(**{**values, **changes})


def ended(number: int, **changes: Any) -> UsageRow:
    return row(number, **{"prompt_tokens": 10, "output_tokens": 5, "outcome": "ok", "cost": 0.5, **changes})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "tokenloom.db"


def stored(path: Path) -> list[dict[str, Any]]:
    with Database(path) as database, database.reading() as connection:
        return [dict(found) for found in connection.execute(USAGE.select().order_by(USAGE.c.id)).mappings()]


def writes_to(path: Path) -> Callable[[], Database]:
    return lambda: Database(path)


@contextmanager
def running(folder: Path, open_database: Callable[[], Database]) -> Iterator[tuple[Journal, Ledger, Spending]]:
    journal, spending = Journal(folder), Spending(clock=lambda: NOW)
    ledger = Ledger(journal, open_database, spending, retention_days=None)
    ledger.start()
    try:
        yield journal, ledger, spending
    finally:
        ledger.stop()
        journal.stop()


def test_what_a_request_used_is_in_the_database_soon(tmp_path: Path, database: Path) -> None:
    with running(tmp_path / "journal", writes_to(database)) as (journal, ledger, spending):
        journal.open(row(1))
        journal.close_row(ended(1))
        spending.add(ended(1))
        assert spending.of("key-1") == 0.5
        wait_until(lambda: ledger.shipped == 1, within=5)
        assert spending.of("key-1") == 0.5
    assert [(found["id"], found["outcome"], found["output_tokens"]) for found in stored(database)] == [
        ("row-1", "ok", 5)
    ]


def test_a_row_that_is_said_again_is_there_once_with_its_last_word(tmp_path: Path, database: Path) -> None:
    with running(tmp_path / "journal", writes_to(database)) as (journal, ledger, _):
        journal.open(row(1))
        journal.close_row(ended(1))
        journal.close_row(ended(1, outcome="client_left"))
        wait_until(lambda: ledger.shipped == 2, within=5)
    assert [found["outcome"] for found in stored(database)] == ["client_left"]


def test_a_killed_gateway_s_requests_are_found_by_the_next_one(tmp_path: Path, database: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder)
    for number in range(3):
        journal.open(row(number))
    journal.close_row(ended(0))
    with (folder / "00000001.jsonl").open("ab") as file:
        file.write(b'["close",{"id":"row-2","requ')  # cut short by the end of the process
    journal.stop()
    with running(folder, writes_to(database)) as (_, ledger, _):
        wait_until(lambda: ledger.shipped == 3, within=5)
        wait_until(lambda: len(segments_of(folder)) == 1, within=5)
    assert [found["outcome"] for found in stored(database)] == ["ok", "lost", "lost"]


def test_what_is_replayed_twice_is_there_once(tmp_path: Path, database: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    lines = [msgspec.json.encode(Entry("close", ended(number))) for number in range(1200)]
    for _ in range(2):
        (folder / "00000001.jsonl").write_bytes(b"\n".join([*lines, b""]))
        with running(folder, writes_to(database)) as (_, ledger, _):
            wait_until(lambda ledger=ledger: ledger.shipped == 1200, within=10)  # type: ignore[misc]  # bound now
    assert len(stored(database)) == 1200


def test_a_lost_row_is_replaced_by_what_is_learnt_later_and_never_the_other_way_round(database: Path) -> None:
    with Database(database) as opened:
        for rows in ([row(1)], [ended(1)], [row(1)]):
            with opened.writing() as connection:
                book.add_rows(connection, rows)
    assert [found["outcome"] for found in stored(database)] == ["ok"]


def test_while_the_database_is_away_rows_wait_and_then_arrive(tmp_path: Path, database: Path) -> None:
    away = True

    def open_database() -> Database:
        if away:
            raise OperationalError("connect", {}, Exception("away"))
        return Database(database)

    with running(tmp_path / "journal", open_database) as (journal, ledger, _):
        wait_until(lambda: ledger.is_away, within=5)
        for number in range(50):
            journal.open(row(number))
            journal.close_row(ended(number))
        away = False
        wait_until(lambda: ledger.shipped == 50, within=5)
        wait_until(lambda: not ledger.is_away, within=5)
    assert len(stored(database)) == 50


def test_rows_that_the_database_did_not_take_are_brought_again(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "journal", writes_to(database)) as (journal, ledger, _):
        with monkeypatch.context() as broken:
            broken.setattr("services.gateway.ledger.add_rows", _refuse)
            for number in range(10):
                journal.open(row(number))
                journal.close_row(ended(number))
            wait_until(lambda: ledger.is_away, within=5)
        wait_until(lambda: ledger.shipped == 10, within=5)
    assert len(stored(database)) == 10


def _refuse(*_: object) -> None:
    raise OperationalError("insert", {}, Exception("read-only"))


def test_a_locked_file_is_waited_for(tmp_path: Path, database: Path) -> None:
    Database(database).close()
    with running(tmp_path / "journal", writes_to(database)) as (journal, ledger, _):
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            journal.open(row(1))
            journal.close_row(ended(1))
            other.execute("ROLLBACK")
        wait_until(lambda: ledger.shipped == 1, within=10)
    assert len(stored(database)) == 1


def test_a_new_file_begins_before_one_grows_large_and_old_ones_go(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.journal._SEGMENT_BYTES", 2000)
    folder = tmp_path / "journal"
    with running(folder, writes_to(database)) as (journal, ledger, _):
        journal.open(row(999))
        for number in range(100):
            journal.open(row(number))
            journal.close_row(ended(number))
        wait_until(lambda: ledger.shipped == 100 and len(segments_of(folder)) == 1, within=10)
        (_, last), *_ = segments_of(folder)
        kept = {entry.row.id for entry, _ in read_entries(last, 0) if entry.kind == "open"}
        assert "row-999" in kept
    with running(folder, writes_to(database)) as (_, ledger, _):
        wait_until(lambda: ledger.shipped >= 1, within=5)
    assert sum(found["outcome"] == "lost" for found in stored(database)) == 1


def test_a_disk_that_refuses_loses_nothing_once_it_takes_again(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "journal", writes_to(database)) as (journal, ledger, _):
        with monkeypatch.context() as broken:
            broken.setattr("services.gateway.journal.os.write", _no_space)
            journal.open(row(1))
            journal.close_row(ended(1))
        journal.open(row(2))
        journal.close_row(ended(2))
        wait_until(lambda: ledger.shipped == 2, within=5)
        assert journal.failures > 0
    assert [found["outcome"] for found in stored(database)] == ["ok", "ok"]


def _no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_two_gateways_can_t_have_one_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(JournalInUseError):
        Journal(tmp_path / "journal")
    journal.stop()
    Journal(tmp_path / "journal").stop()


def test_the_report_tells_cost_and_what_caching_saved(database: Path) -> None:
    rows = [
        ended(1, prompt_tokens=100, cached_tokens=0, output_tokens=100, gpu_seconds=2.0, prefill_seconds=1.0, cost=4.0),
        ended(2, prompt_tokens=100, cached_tokens=50, output_tokens=0, gpu_seconds=1.0, prefill_seconds=0.5, cost=2.0),
        ended(3, tenant="bob"),
    ]
    with Database(database) as opened:
        with opened.writing() as connection:
            book.add_rows(connection, rows)
        (line,) = book.report(opened, tenant="ada")
        assert len(book.report(opened)) == 2
        assert book.report(opened, month="1999-01") == []
        assert book.erase(opened, "ada", actor="boss") == 2
        assert [found["tenant"] for found in book.report(opened)] == ["bob"]
    assert line == {
        "month": month_of(NOW),
        "tenant": "ada",
        "model": "sim",
        "requests": 2,
        "prompt_tokens": 200,
        "cached_tokens": 50,
        "output_tokens": 100,
        "gpu_seconds": 3.0,
        "cost": 6.0,
        "cost_per_1000_tokens": 20.0,
        # 150 tokens were prefilled in 1.5 s: the 50 others would have taken 0.5 s, at 2 a second.
        "cache_saved_gpu_seconds": 0.5,
        "cache_saved_cost": 1.0,
    }


def test_tables_of_an_earlier_version_get_what_they_lack(database: Path) -> None:
    with Database(database) as current, current.writing() as connection:
        book.add_rows(connection, [ended(1)])
    with closing(sqlite3.connect(database)) as earlier:
        earlier.execute("DROP INDEX usage_by_request")
        earlier.execute("ALTER TABLE usage DROP COLUMN moves")
        earlier.execute("UPDATE counters SET value = 2 WHERE name = 'schema'")
        earlier.commit()
    with Database(database) as current:
        assert [found["moves"] for found in book.requests(current, limit=10, request_id="request-1")] == [[]]
    with closing(sqlite3.connect(database)) as after:
        indexes = {name for _, name, *_ in after.execute("PRAGMA index_list(usage)")}
    assert "usage_by_request" in indexes


def test_old_usage_is_deleted(database: Path) -> None:
    with Database(database) as opened, opened.writing() as connection:
        book.add_rows(connection, [ended(1, time=NOW - 100), ended(2)])
        assert book.delete_before(connection, NOW - 50) == 1
    assert [found["id"] for found in stored(database)] == ["row-2"]
