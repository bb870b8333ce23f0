"""Refusals of keys that are over a limit, at once and in the usual way: one answer, whichever way a request comes."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio

from services.common.quota import KeyLimits
from services.common.settings_worker import SimSettings
from tests.support.openai_lane import Lane, openai_lane

BODY = json.dumps({"model": "sim", "prompt": "hi", "max_tokens": 1}).encode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    async with openai_lane(tmp_path_factory.mktemp("lane"), SimSettings(decode_step_ms=1)) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """A connection on which a request goes in the pieces that it is given in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, *pieces: bytes) -> Answer:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            # The gateway reads one piece before there is another.
            await asyncio.sleep(0.05 if piece is not pieces[-1] else 0)
        return await self.answer()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> Answer:
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 10)).decode()
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(first.split()[1]), headers, body)

    def close(self) -> None:
        self._writer.close()


async def connect(lane: Lane) -> Connection:
    host, _, port = lane.base_url.removeprefix("http://").rpartition(":")
    return Connection(*await asyncio.open_connection(host, int(port)))


def head(key: str, body: bytes = BODY, /, *, path: str = "/v1/completions", **changes: str) -> bytes:
    headers = {
        "host": "gateway",
        "authorization": f"Bearer {key}",
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode()


async def used_up(lane: Lane, name: str, **options: object) -> str:
    """A key that may make no other request for a minute."""
    key = await lane.make_key(name, limits=KeyLimits(rpm=1), **options)
    connection = await connect(lane)
    assert (await connection.ask(head(key) + BODY)).status == 200
    connection.close()
    return key


async def counted(lane: Lane, wanted: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{lane.metrics_url}/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(wanted))


async def test_a_request_in_one_piece_is_refused_in_the_words_of_one_in_two(lane: Lane) -> None:
    key = await used_up(lane, "words")
    connection = await connect(lane)
    for body in (BODY, b"{", b"[" * 1000):
        answers = [
            await connection.ask(head(key, body, x_request_id="r") + body),
            await connection.ask(head(key, body, x_request_id="r"), body),
            await connection.ask(head(key, body, x_request_id="r") + body[:1], body[1:]),
        ]
        assert [answer.status for answer in answers] == [429] * 3
        assert json.loads(answers[0].body)["error"]["message"] == "this key may make 1 requests a minute"
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "0"
        assert len({answer.body for answer in answers}) == 1
        assert len({tuple(answer.headers) for answer in answers}) == 1
        # A second may pass between them.
        passing = ("retry-after", "x-ratelimit-reset-requests")
        assert len({tuple(v for k, v in answer.headers.items() if k not in passing) for answer in answers}) == 1
    connection.close()


async def test_what_else_is_wrong_is_told_first_of_a_key_that_is_over_its_limit(lane: Lane) -> None:
    key = await used_up(lane, "order", endpoints=["completions"])
    connection = await connect(lane)
    for changes, status in (
        ({"authorization": "Bearer nobody"}, 401),
        ({"path": "/v1/nothing"}, 404),
        ({"path": "/v1/chat/completions"}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_encoding": "gzip"}, 415),
        ({"x_priority": "high"}, 400),
        ({}, 429),
    ):
        assert (await connection.ask(head(key, **changes) + BODY)).status == status, changes
    # What is too large is not waited for.
    too_large = head(key, content_length=str(1 << 21))
    assert (await connection.ask(too_large)).status == 413
    connection.close()


async def test_a_connection_goes_on_after_refusals_also_with_requests_sent_ahead(lane: Lane) -> None:
    key = await used_up(lane, "ahead")
    connection = await connect(lane)
    refused, passed = head(key) + BODY, head(lane.key) + BODY
    connection.send(refused + passed + refused + refused + passed)
    assert [(await connection.answer()).status for _ in range(5)] == [429, 200, 429, 429, 200]
    connection.close()


async def test_every_refusal_is_counted_once(lane: Lane) -> None:
    key = await used_up(lane, "counted")
    limited, ended = "tokenloom_gateway_limited_total", 'tokenloom_gateway_requests_total{endpoint="/v1/completions"'
    before = [await counted(lane, wanted) for wanted in (limited, ended)]
    connection = await connect(lane)
    for _ in range(3):
        await connection.ask(head(key) + BODY)
        await connection.ask(head(key), BODY)
    connection.close()
    assert [await counted(lane, wanted) for wanted in (limited, ended)] == [number + 6 for number in before]


async def test_a_key_that_spent_its_budget_is_refused_whatever_it_sends(lane: Lane) -> None:
    key = await lane.make_key("spent", limits=KeyLimits(budget=0.0))
    connection = await connect(lane)
    for pieces in ((head(key) + BODY,), (head(key), BODY)):
        answer = await connection.ask(*pieces)
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (429, "insufficient_quota")
    connection.close()
