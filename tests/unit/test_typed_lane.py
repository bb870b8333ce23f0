"""Calls of the typed lane, let in a moment after the edge has its answer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.typed_calls import EDGE_ACCOUNT
from services.gateway import typed_lane
from services.gateway.identity import Identity
from services.gateway.journal import read_entries, segments_of
from services.gateway.typed_lane import Begun, Call, TypedAccounts
from tests.support.books import typed_accounts

WHO = Identity(key_id="key", tenant="team", models=None, priority=0, admin=False, debug=False)
PATH = "/tokenloom.inference.v1.InferenceService/Generate"


class Lane:
    """Accounts of calls, and what is in their journal."""

    def __init__(self, accounts: TypedAccounts, folder: Path) -> None:
        self.accounts = accounts
        self._folder = folder

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Kind and outcome of each."""
        entries = [entry for _, path in segments_of(self._folder) for entry, _ in read_entries(path, 0)]
        return [(entry.kind, entry.row.outcome) for entry in entries]

    def let_in(self) -> str:
        """A call that is let in soon; its account's id."""
        account = self.accounts.begin(WHO, PATH, "request")
        self.accounts.enter_soon(account)
        return account.id

    def hear_of(self, account_id: str) -> None:
        """The edge tells that it has let a call in itself."""
        self.accounts.begun(
            Begun(account_id=account_id, request_id="request", time=1.0, path=PATH, tenant="team", key_id="key")
        )

    def settle(self, account_id: str) -> None:
        """The edge tells its end."""
        self.accounts.settle(
            Call(
                account_id=account_id,
                request_id="request",
                time=1.0,
                path=PATH,
                tenant="team",
                key_id="key",
                outcome="ok",
                duration_seconds=0.5,
                ttft_seconds=None,
                spent=None,
            )
        )


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[Lane]:
    with typed_accounts(tmp_path) as accounts:
        yield Lane(accounts, tmp_path / "journal")


async def test_a_call_is_let_in_a_moment_after_its_answer(lane: Lane) -> None:
    lane.let_in()
    assert lane.lines == []
    async with asyncio.timeout(5):
        while not lane.lines:
            await asyncio.sleep(0.001)
    assert [kind for kind, _ in lane.lines] == ["open"]


async def test_a_call_that_is_over_before_it_was_let_in_has_one_row(lane: Lane) -> None:
    lane.settle(lane.let_in())
    await asyncio.sleep(0.05)
    assert lane.lines == [("open", "lost"), ("close", "ok")]


async def test_no_call_is_forgotten_at_the_end(lane: Lane) -> None:
    lane.let_in()
    lane.let_in()
    lane.accounts.enter_now()
    await asyncio.sleep(0.05)
    assert [kind for kind, _ in lane.lines] == ["open", "open"]


async def test_a_call_that_the_edge_let_in_itself_has_one_row(lane: Lane) -> None:
    lane.hear_of(f"gateway.{EDGE_ACCOUNT}1")
    await asyncio.sleep(0)
    assert lane.lines == [("open", "lost")]
    lane.settle(f"gateway.{EDGE_ACCOUNT}1")
    await asyncio.sleep(0)
    assert lane.lines == [("open", "lost"), ("close", "ok")]


async def test_a_call_whose_end_is_told_before_its_beginning_has_one_row_too(lane: Lane) -> None:
    lane.settle(f"gateway.{EDGE_ACCOUNT}1")
    lane.hear_of(f"gateway.{EDGE_ACCOUNT}1")
    await asyncio.sleep(0)
    assert lane.lines == [("close", "ok")]


async def test_ends_without_a_beginning_do_not_add_up(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed_lane, "_MOST_ENDED_FIRST", 3)
    for number in range(10):
        lane.settle(f"gateway.{EDGE_ACCOUNT}{number}")
    for number in range(10):
        lane.hear_of(f"gateway.{EDGE_ACCOUNT}{number}")
    await asyncio.sleep(0)
    assert lane.lines[10:] == [("open", "lost")] * 7


async def test_what_the_edge_let_in_and_tells_no_more_of_is_lost(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed_lane, "_LOST_AFTER_SECONDS", -1.0)
    monkeypatch.setattr(typed_lane, "_SWEEP_EACH", 3)
    for number in range(3):
        lane.hear_of(f"gateway.{EDGE_ACCOUNT}{number}")
    await asyncio.sleep(0)
    assert lane.lines == [("open", "lost")] * 3 + [("close", "lost")] * 3
