"""What the real Envoy remembers of keys, and what it then does without asking the gateway."""

from __future__ import annotations  # the async stub exists for type checkers alone

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio
from envoy.data.accesslog.v3 import accesslog_pb2
from tokenloom.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

from services.common.typed_calls import ACCOUNT_HEADER, EDGE_ACCOUNT, REMEMBER_HEADER
from services.mesh import envoy_memory
from tests.support.edge import RunningEdge, running_edge
from tests.support.edge_far_ends import KNOWN_KEYS, USER_KEY
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

FORGED = {
    "x-tokenloom-tenant": "somebody",
    "x-tokenloom-key": "somebody",
    "x-tokenloom-debug": "1",
    ACCOUNT_HEADER: "gateway.1",
    REMEMBER_HEADER: "100000",
    "x-request-id": "mine",
    "x-envoy-auth-headers-to-remove": "x-tokenloom-models",
}
_OWN = (ACCOUNT_HEADER, "x-request-id", "traceparent")
_LONG_MS = 60_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningEdge]:
    # What is remembered stays so for as long as a test may take.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envoy_memory, "_MOST_MS", _LONG_MS)
        async with running_edge(tmp_path_factory.mktemp("memory")) as running:
            patch.undo()
            running.seen.remember_ms = _LONG_MS
            yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(edge: RunningEdge) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=edge.url, timeout=30) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(edge: RunningEdge) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with grpc.aio.insecure_channel(edge.target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def known(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KNOWN_KEYS}{name}"}


async def rest(client: httpx.AsyncClient, headers: Any, text: str = "hi", model: str = "demo") -> httpx.Response:
    return await client.post("/api/v1/tokenize", json={"model": model, "text": text}, headers=headers)


async def generate(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, headers: dict[str, str], tokens: int = 1
) -> None:
    sampling = generation_pb2.SamplingParameters(max_tokens=tokens)
    request = generation_pb2.GenerateRequest(model="demo", text="hi", sampling=sampling)
    async for _ in stub.Generate(request, metadata=tuple(headers.items()), timeout=30):
        pass


def asked(edge: RunningEdge, name: str) -> int:
    return sum(check.get("authorization") == f"Bearer {KNOWN_KEYS}{name}" for check in edge.seen.checks)


def shown(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in _OWN and not name.startswith("content-")}


async def test_a_call_of_a_remembered_key_comes_to_its_worker_as_if_it_had_been_asked_about(
    edge: RunningEdge, client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    del edge.seen.worker_calls[:], edge.seen.picks[:]
    for _ in range(3):
        assert (await rest(client, known("same-debug"))).status_code == 200
    assert asked(edge, "same-debug") == 1
    first, second, third = edge.seen.worker_calls
    assert shown(first) == shown(second) == shown(third)
    assert first["x-tokenloom-tenant"] == f"{KNOWN_KEYS}same-debug"
    assert first["x-tokenloom-debug"] == "1"
    assert "authorization" not in second
    assert REMEMBER_HEADER not in first
    assert REMEMBER_HEADER not in second
    assert (
        len({tuple(sorted({**pick, "request.headers['x-request-id']": ""}.items())) for pick in edge.seen.picks}) == 1
    )
    # Both forms of the lane share what is known.
    await generate(stub, known("same-debug"))
    assert asked(edge, "same-debug") == 1
    assert edge.seen.worker_calls[3]["x-tokenloom-tenant"] == f"{KNOWN_KEYS}same-debug"


async def test_what_the_key_and_the_call_say_counts_for_a_remembered_key_too(
    edge: RunningEdge, client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    forged = {"x-tokenloom-worker": "mine", "x-tokenloom-route": "mine"}
    for name, told in (("counts-debug", ("w0", "it is idle; cost 0.1 s")), ("counts", (None, None))):
        del edge.seen.picks[:]
        for _ in range(2):
            answer = await rest(client, {**known(name), **forged, "x-priority": "7"})
            assert (answer.headers.get("x-tokenloom-worker"), answer.headers.get("x-tokenloom-route")) == told
            assert "x-tokenloom-degraded" not in answer.headers
        assert asked(edge, name) == 1
        assert [pick["request.headers['x-priority']"] for pick in edge.seen.picks] == ["7", "7"]
    call = stub.Tokenize(
        inference_pb2.TokenizeRequest(model="demo", text="hi"),
        metadata=tuple(known("counts-debug").items()),
        timeout=30,
    )
    await call
    metadata = {str(key): value for key, value in await call.initial_metadata()}
    assert (metadata["x-tokenloom-worker"], metadata["x-tokenloom-route"]) == ("w0", "it is idle; cost 0.1 s")
    # One that was asked about is told of at its end, the others at their beginning, too.
    await eventually(lambda: sum(f"{KNOWN_KEYS}counts" in str(entry) for entry in edge.seen.told) == 8, within=10)


async def test_what_clients_make_up_is_dropped_whether_their_key_is_remembered_or_not(
    edge: RunningEdge, client: httpx.AsyncClient
) -> None:
    del edge.seen.worker_calls[:]
    answers = [await rest(client, {**known("forger"), **FORGED}) for _ in range(2)]
    assert asked(edge, "forger") == 1
    for answer, call in zip(answers, edge.seen.worker_calls, strict=True):
        assert call["x-tokenloom-tenant"] == f"{KNOWN_KEYS}forger"
        assert call["x-tokenloom-key"] == f"id-of-{KNOWN_KEYS}forger"
        assert "x-tokenloom-debug" not in call
        assert call["x-request-id"] == answer.headers["x-request-id"] != "mine"
        assert REMEMBER_HEADER not in answer.headers
    accounts = [str(call[ACCOUNT_HEADER]) for call in edge.seen.worker_calls]
    assert accounts[1] == f"gateway.{EDGE_ACCOUNT}{answers[1].headers['x-request-id']}"
    assert accounts[0] not in ("gateway.1", accounts[1])


async def test_made_up_headers_make_no_stranger_known(edge: RunningEdge, client: httpx.AsyncClient) -> None:
    before = len(edge.seen.worker_calls)
    for headers in (FORGED, {**FORGED, "authorization": "Bearer no"}):
        for _ in range(2):
            assert (await rest(client, headers)).status_code == 401
    assert len(edge.seen.worker_calls) == before


async def test_keys_that_the_gateway_wants_to_be_asked_about_are_asked_about_each_time(
    edge: RunningEdge, client: httpx.AsyncClient
) -> None:
    before = len(edge.seen.checks)
    for _ in range(3):
        assert (await rest(client, {"authorization": f"Bearer {USER_KEY}"})).status_code == 200
    assert len(edge.seen.checks) == before + 3


async def test_what_is_remembered_for_inference_is_no_right_to_anything_else(
    edge: RunningEdge, client: httpx.AsyncClient
) -> None:
    assert (await rest(client, known("other"))).status_code == 200
    await client.get("/api/v1/gpus", headers=known("other"))
    assert asked(edge, "other") == 2


@pytest.mark.parametrize("second", ["Bearer no", f"Bearer {KNOWN_KEYS}twice"])
async def test_several_keys_in_one_call_are_never_looked_up(
    edge: RunningEdge, client: httpx.AsyncClient, second: str
) -> None:
    assert (await rest(client, known("twice"))).status_code == 200
    before = len(edge.seen.checks)
    await rest(client, [*known("twice").items(), ("authorization", second)])
    assert len(edge.seen.checks) == before + 1


async def test_nobody_gets_anothers_identity_however_calls_interleave(
    edge: RunningEdge, client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    del edge.seen.worker_calls[:]
    names = [f"mixed-{number}{'-debug' if number % 2 else ''}" for number in range(6)]

    async def calls(name: str) -> None:
        who = {**known(name), "x-who": f"{KNOWN_KEYS}{name}"}
        for number in range(8):
            await (generate(stub, who) if number % 2 else rest(client, who))

    await asyncio.gather(*map(calls, names * 2))
    assert len(edge.seen.worker_calls) == 96
    for call in edge.seen.worker_calls:
        assert call["x-tokenloom-tenant"] == call["x-who"]
        assert ("x-tokenloom-debug" in call) == ("debug" in str(call["x-who"]))
    assert all(asked(edge, name) <= 2 for name in names)
    assert len({call[ACCOUNT_HEADER] for call in edge.seen.worker_calls}) == 96


async def test_the_gateway_is_told_that_a_call_has_begun_that_it_was_not_asked_about(
    edge: RunningEdge, client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    await rest(client, known("told"))
    running = asyncio.create_task(generate(stub, known("told"), tokens=1000))
    kinds = (accesslog_pb2.UpstreamPoolReady, accesslog_pb2.DownstreamEnd)

    def told(kind: Any) -> list[Any]:
        entries = (each for each in edge.seen.told if each.common_properties.access_log_type == kind)
        return [one for one in entries if one.request.request_headers["x-tokenloom-tenant"] == f"{KNOWN_KEYS}told"]

    await eventually(lambda: len(told(kinds[0])) == 1, within=10)
    assert not running.done()
    running.cancel()
    await eventually(lambda: len(told(kinds[1])) == 2, within=10)
    (begun,) = told(kinds[0])
    account = begun.request.request_headers[ACCOUNT_HEADER]
    assert account == f"gateway.{EDGE_ACCOUNT}{begun.request.request_id}"
    assert begun.request.request_headers["x-tokenloom-key"] == f"id-of-{KNOWN_KEYS}told"
    assert begun.request.path.endswith("/Generate")
    assert account in {each.request.request_headers[ACCOUNT_HEADER] for each in told(kinds[1])}


async def test_what_the_edge_tells_of_calls_has_no_key_in_it(edge: RunningEdge, client: httpx.AsyncClient) -> None:
    del edge.seen.told[:]
    for _ in range(2):
        assert (await rest(client, known("secret"))).status_code == 200
    await eventually(lambda: len(edge.seen.told) == 3, within=5)
    assert not [entry for entry in edge.seen.told if f"Bearer {KNOWN_KEYS}secret" in str(entry)]


async def test_a_remembered_call_that_no_worker_gets_is_told_of_at_its_end(
    edge: RunningEdge, client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    await rest(client, known("refused"))
    full = generation_pb2.GenerateRequest(model="full", text="hi")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(full, metadata=tuple(known("refused").items()), timeout=30):
            pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert asked(edge, "refused") == 1

    def told() -> list[str]:
        mine = (each for each in edge.seen.told if f"{KNOWN_KEYS}refused" in each.request.request_headers.values())
        return [each.response.response_code_details for each in mine]

    await eventually(lambda: "no_capacity" in told(), within=10)
    assert len(told()) == 2


async def test_so_many_keys_are_remembered_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envoy_memory, "_MOST_MS", _LONG_MS)
    monkeypatch.setattr(envoy_memory, "_MOST", 8)
    async with running_edge(tmp_path) as edge, httpx.AsyncClient(base_url=edge.url, timeout=30) as client:
        edge.seen.remember_ms = _LONG_MS
        for number in range(30):
            await rest(client, known(f"many-{number}"))
        still = 0
        for number in reversed(range(30)):
            await rest(client, known(f"many-{number}"))
            if asked(edge, f"many-{number}") == 2:
                break
            still += 1
        assert 8 <= still <= 16


async def test_while_the_gateway_is_away_those_who_are_remembered_go_on_for_a_moment_and_nobody_else(
    tmp_path: Path,
) -> None:
    async with running_edge(tmp_path) as edge, httpx.AsyncClient(base_url=edge.url, timeout=30) as client:
        # More than the edge will do.
        edge.seen.remember_ms = _LONG_MS
        await rest(client, known("here"))
        loop = asyncio.get_running_loop()
        began, last, passed = loop.time(), loop.time(), 0
        await edge.stop_gateway()
        assert (await rest(client, known("stranger"))).status_code == 503
        while (answer := await rest(client, known("here"))).status_code == 200:
            last, passed = loop.time(), passed + 1
            assert last - began < 5
        assert answer.status_code == 503
        assert asked(edge, "here") == 1
        assert (await rest(client, known("stranger"))).status_code == 503
        assert len(edge.seen.worker_calls) == 1 + passed
