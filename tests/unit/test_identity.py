"""Who calls, over a real key store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import MeshError, Reason
from services.common.keystore import KeyStore
from services.gateway.identity import Authenticator


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with KeyStore(tmp_path / "keys.db") as opened:
        yield opened


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic eDp5",
        "Bearer tl-unknown",
        "Bearer ' OR 1=1--",
        "Bearer " + "k" * 1_000_000,
        "Bearer sch\xfcssel",
        "Bearer a\x00b",
    ],
)
def test_what_is_no_key_is_refused(store: KeyStore, authorization: str | None) -> None:
    with pytest.raises(MeshError) as caught:
        Authenticator(store).identify(authorization)
    assert (caught.value.reason, caught.value.code) == (Reason.INVALID_API_KEY, "invalid_api_key")


def test_a_key_tells_whose_it_is_and_what_it_may(store: KeyStore) -> None:
    key_id, key = store.create("team", models=["a"], priority=3)
    identity = Authenticator(store).identify(f"Bearer {key}")
    assert (identity.key_id, identity.tenant, identity.priority) == (key_id, "team", 3)
    identity.check_model("a")
    with pytest.raises(MeshError) as caught:
        identity.check_model("b")
    assert caught.value.reason is Reason.PERMISSION_DENIED
    with pytest.raises(MeshError):
        identity.check_admin()


def test_a_key_made_by_another_process_works_at_once(store: KeyStore, tmp_path: Path) -> None:
    authenticator = Authenticator(store)
    with KeyStore(tmp_path / "keys.db") as elsewhere:
        _, key = elsewhere.create("new")
    assert authenticator.identify(f"Bearer {key}").tenant == "new"


def test_a_key_that_another_process_revoked_stops_within_a_second(store: KeyStore, tmp_path: Path) -> None:
    clock = Clock()
    key_id, key = store.create("old")
    authenticator = Authenticator(store, clock=clock)
    authenticator.identify(f"Bearer {key}")
    with KeyStore(tmp_path / "keys.db") as elsewhere:
        assert elsewhere.revoke(key_id)
    clock.now += 0.5
    with pytest.raises(MeshError):
        authenticator.identify(f"Bearer {key}")
