"""Keys in a real PostgreSQL."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.common import audit
from services.common.database import Database
from services.common.keystore import KeyStore
from services.common.quota import KeyLimits
from tests.support.postgres import PostgresServer, postgres_server


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def test_processes_that_come_first_at_the_same_time_make_the_tables_once(postgres: PostgresServer) -> None:
    code = f"from services.common.keystore import KeyStore; KeyStore({postgres.url!r}).create('first')"
    makers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [maker.wait(timeout=30) for maker in makers] == [0, 0, 0]
    with KeyStore(postgres.url) as store:
        assert len(store.list()) == 3


def test_a_key_lives_in_postgres_as_it_does_in_a_file(postgres: PostgresServer) -> None:
    with KeyStore(postgres.url) as store:
        before = store.version()
        limits = KeyLimits(rpm=3, tpm=10**10, concurrency=5, budget=6.5)
        key_id, key = store.create("ada", models=["b", "a"], limits=limits, allow_degrade=True, expires_at=4e9)
        record = store.find(key)
        assert record is not None
        assert (record.id, record.models, record.limits, record.allow_degrade, record.expires_at) == (
            key_id,
            ("a", "b"),
            limits,
            True,
            4e9,
        )
        assert store.version() != before
        new = store.rotate(key_id, grace_seconds=60)
        assert new is not None
        assert store.find(key) is not None
        assert sum(found.id == key_id for found, _ in store.secrets().values()) == 2
        assert store.revoke(key_id)
        assert store.find(new) is None
    with Database(postgres.url) as database:
        actions = [entry["action"] for entry in audit.read(database) if entry["target"] == key_id]
    assert actions == ["keys.revoke", "keys.rotate", "keys.create"]
