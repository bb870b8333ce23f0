"""API keys: what is stored, what is found, and what other processes see of it."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from services.common import audit
from services.common.database import Database, DatabaseError
from services.common.keystore import KeyStore, hash_of
from services.common.quota import NO_LIMITS, KeyLimits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    with KeyStore(path) as opened:
        yield opened


def test_a_key_is_found_with_what_it_was_made_with(store: KeyStore) -> None:
    key_id, key = store.create("ada", models=["b", "a"], priority=-2, admin=True, debug=True, tenant="research")
    record = store.find(key)
    assert record is not None
    assert (record.id, record.name, record.tenant) == (key_id, "ada", "research")
    assert (record.models, record.priority, record.admin, record.debug) == (("a", "b"), -2, True, True)


def test_a_plain_key_may_use_every_model_and_nothing_else(store: KeyStore) -> None:
    _, key = store.create("bob")
    record = store.find(key)
    assert record is not None
    assert (record.tenant, record.models, record.priority, record.admin, record.debug) == ("bob", None, 0, False, False)


def test_a_key_is_tl_and_43_url_safe_characters(store: KeyStore) -> None:
    _, key = store.create("ada")
    assert len(key) == 46
    assert key.startswith("tl-")
    assert set(key[3:]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


@pytest.mark.parametrize("wrong", ["", "tl-", "tl-nope", "x" * 10_000, "tl-é"])
def test_what_is_no_key_is_not_found(store: KeyStore, wrong: str) -> None:
    store.create("ada")
    assert store.find(wrong) is None


def test_the_key_itself_is_nowhere_in_the_files(store: KeyStore, path: Path) -> None:
    _, key = store.create("ada")
    assert all(key.encode() not in file.read_bytes() for file in path.parent.iterdir())


def test_a_revoked_key_is_gone(store: KeyStore) -> None:
    key_id, key = store.create("ada")
    assert store.revoke(key_id)
    assert store.find(key) is None
    assert not store.revoke(key_id)


def test_keys_are_listed_oldest_first(store: KeyStore) -> None:
    made = [store.create(name)[0] for name in ("c", "a", "b")]
    assert [record.id for record in store.list()] == made


def test_the_version_stands_still_while_nothing_changes(store: KeyStore) -> None:
    before = store.version()
    store.find("tl-nope")
    store.list()
    assert store.version() == before


def test_the_version_moves_with_a_change_of_its_own_and_of_another_process(store: KeyStore, path: Path) -> None:
    first = store.version()
    store.create("ada")
    second = store.version()
    assert second != first
    code = f"from services.common.keystore import KeyStore; print(KeyStore({str(path)!r}).create('bob')[1])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert store.version() != second
    record = store.find(made.stdout.strip())
    assert record is not None
    assert record.name == "bob"


def test_processes_that_write_at_the_same_time_wait_for_each_other(path: Path) -> None:
    code = (
        "from services.common.keystore import KeyStore\n"
        f"with KeyStore({str(path)!r}) as store:\n"
        "    for turn in range(25): store.create(str(turn))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [writer.wait(timeout=30) for writer in writers] == [0, 0, 0, 0]
    with KeyStore(path) as store:
        assert len(store.list()) == 100


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, certainly not one" * 100)
    with pytest.raises(DatabaseError):
        KeyStore(path)


_FIRST_TABLES = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, name TEXT NOT NULL, tenant TEXT NOT NULL, models TEXT,
    priority INTEGER NOT NULL, admin INTEGER NOT NULL, debug INTEGER NOT NULL, created_at REAL NOT NULL
) STRICT
"""


def test_a_file_of_the_first_version_keeps_its_keys_and_takes_new_ones(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(_FIRST_TABLES)
        values = ("key-old", hash_of("tl-old"), "ada", "ada", None, 0, 1, 0, 1.0)
        database.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    with KeyStore(path) as store:
        record = store.find("tl-old")
        assert record is not None
        assert (record.id, record.admin, record.limits, record.allow_degrade) == ("key-old", True, NO_LIMITS, False)
        _, key = store.create("new", limits=KeyLimits(rpm=3, tpm=4, concurrency=5, budget=6.5))
    with KeyStore(path) as store:
        found = store.find(key)
        assert found is not None
        assert found.limits == KeyLimits(rpm=3, tpm=4, concurrency=5, budget=6.5)


def test_a_file_of_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    KeyStore(path).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE counters SET value = 99 WHERE name = 'schema'")
    with pytest.raises(DatabaseError, match="later tokenloom"):
        KeyStore(path)


def test_an_expired_key_is_not_found(store: KeyStore) -> None:
    _, key = store.create("ada", expires_at=1.0)
    assert store.find(key) is None


def test_every_change_is_in_the_audit_trail_and_no_secret_is(store: KeyStore, path: Path) -> None:
    key_id, key = store.create("ada", actor="ops")
    rotated = store.rotate(key_id, actor="ops")
    store.revoke(key_id, actor="boss")
    with Database(path) as database:
        entries = audit.read(database)
    assert [(entry["actor"], entry["action"], entry["target"]) for entry in entries] == [
        ("boss", "keys.revoke", key_id),
        ("ops", "keys.rotate", key_id),
        ("ops", "keys.create", key_id),
    ]
    assert key not in str(entries)
    assert str(rotated) not in str(entries)
