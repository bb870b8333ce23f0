"""The real Envoy with our configuration, and small real far ends behind it."""

from __future__ import annotations  # the async stub exists for type checkers alone

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio
from google.rpc import status_pb2
from tokenloom.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.status import DETAILS_KEY, error_from_call, error_from_status
from tests.support.edge import RunningEdge, running_edge
from tests.support.edge_far_ends import ADMIN_KEY, LIMITED_KEY, USER_KEY
from tests.support.ports import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER = {"authorization": f"Bearer {USER_KEY}"}
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
METADATA = (("authorization", f"Bearer {USER_KEY}"),)
GENERATE = "/api/v1/generate"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningEdge]:
    async with running_edge(tmp_path_factory.mktemp("edge")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(edge: RunningEdge) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=edge.url, headers=USER) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(edge: RunningEdge) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with grpc.aio.insecure_channel(edge.target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def request(text: str = "hi", *, model: str = "demo", max_tokens: int = 3) -> generation_pb2.GenerateRequest:
    sampling = generation_pb2.SamplingParameters(max_tokens=max_tokens)
    return generation_pb2.GenerateRequest(model=model, text=text, sampling=sampling)


def body(text: str = "hi", *, model: str = "demo", max_tokens: int = 3) -> dict[str, Any]:
    return {"model": model, "text": text, "sampling": {"max_tokens": max_tokens}}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, whose whole shape is checked."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/demo",
        "/v1/responses",
        "/v1/files/1/content",
        "/v1/batches",
        "/v1/tokenize",
        "/readyz",
    ],
)
async def test_openai_paths_go_to_the_gateway_as_they_are(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, content=b"x")
    assert answer.json()["path"] == path
    assert answer.json()["headers"]["authorization"] == USER["authorization"]


@pytest.mark.parametrize("path", ["/", "/console/app.js"])
async def test_the_console_needs_no_key_to_be_shown(edge: RunningEdge, path: str) -> None:
    async with httpx.AsyncClient(base_url=edge.url) as anybody:
        answer = await anybody.get(path)
    assert answer.json()["path"] == path


async def test_the_edge_itself_says_that_it_is_alive(client: httpx.AsyncClient) -> None:
    answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "path",
    ["/nope", "/console", "/v1", "/v1/modelsx", "/metrics", "/stats", "/api/v1", "/api/v1/nope", "/api/v1/workersx"],
)
@pytest.mark.parametrize("headers", [{}, USER])
async def test_any_other_path_is_404_with_or_without_a_key(
    edge: RunningEdge, path: str, headers: dict[str, str]
) -> None:
    async with httpx.AsyncClient(base_url=edge.url) as anybody:
        answer = await anybody.get(path, headers=headers)
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "unknown_url"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "method",
    [
        "/tokenloom.inference.v1.WorkerService/Session",
        "/tokenloom.router.v1.RouterService/Session",
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
        "/grpc.health.v1.Health/Check",
        "/nope.Nope/Nope",
    ],
)
async def test_inside_services_are_not_routed(edge: RunningEdge, method: str) -> None:
    async with grpc.aio.insecure_channel(edge.target) as channel:
        call: Any = channel.unary_unary(method)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", metadata=METADATA)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert error_from_call(caught.value).reason == Reason.UNIMPLEMENTED


async def test_what_a_client_says_about_itself_is_dropped(edge: RunningEdge, client: httpx.AsyncClient) -> None:
    forged = {
        "x-tokenloom-tenant": "root",
        "x-tokenloom-models": "[]",
        "x-tokenloom-right": "inference",
        "x-tokenloom-anything": "1",
        "x-gateway-destination-endpoint": "10.0.0.1:1",
        "x-gateway-destination-endpoint-subset": "10.0.0.1:1",
        "x-envoy-original-path": "/",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-request-id": "mine",
    }
    answer = await client.get("/v1/models", headers=forged)
    seen = answer.json()["headers"]
    assert not [name for name in seen if name.startswith(("x-tokenloom-", "x-gateway-"))]
    assert not {"x-envoy-original-path", "x-envoy-upstream-rq-timeout-ms", "x-envoy-internal"} & seen.keys()
    assert answer.headers["x-request-id"] == seen["x-request-id"] != "mine"
    assert not [name for name in answer.headers if name.startswith("x-envoy-")]

    await client.post(GENERATE, json=body(), headers=forged)
    pick, call = edge.seen.picks[-1], edge.seen.worker_calls[-1]
    assert pick["request.headers['x-tokenloom-tenant']"] == call["x-tokenloom-tenant"] == "ada"
    assert "request.headers['x-tokenloom-models']" not in pick
    assert not [name for name in call if name.startswith(("x-tokenloom-any", "x-gateway-"))]
    assert "authorization" not in call


async def test_the_rest_bridge_streams_events_as_they_come(client: httpx.AsyncClient) -> None:
    arrivals, events = [], []
    async with client.stream("POST", GENERATE, json=body(max_tokens=5)) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert "grpc-status" not in answer.headers
        async for line in answer.aiter_lines():
            if line:
                arrivals.append(time.monotonic())
                events.append(json.loads(line.removeprefix("data: ")))
    assert [next(iter(event)) for event in events] == ["started", *["delta"] * 5, "completed"]
    assert events[1]["delta"] == {"text": "w0 ", "token_ids": [0]}
    assert events[-1]["completed"]["finish_reason"] == "FINISH_REASON_LENGTH"
    # Five steps of 30 ms: they were not collected on the way.
    assert arrivals[-1] - arrivals[0] > 0.1


async def test_unary_methods_answer_json_without_grpc_headers(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/v1/tokenize", json={"model": "demo", "text": "x"})
    assert answer.json() == {"token_ids": [1, 2, 3], "max_context_token_count": 64}
    assert not [name for name in answer.headers if name.startswith("grpc-")]


@pytest.mark.parametrize(("key", "listed"), [(USER_KEY, "all"), (LIMITED_KEY, "demo")])
async def test_models_are_listed_by_the_gateway_which_hears_what_the_key_may_use(
    client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceServiceAsyncStub, key: str, listed: str
) -> None:
    own = {"authorization": f"Bearer {key}"}
    assert (await client.get("/api/v1/models", headers=own)).json() == {"models": [{"name": listed}]}
    answer = await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=tuple(own.items()))
    assert [model.name for model in answer.models] == [listed]
    assert (await client.post("/api/v1/models", headers=own)).headers["allow"] == "GET"


async def test_a_stub_streams(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    events = [event.WhichOneof("event") async for event in stub.Generate(request(), metadata=METADATA)]
    assert events == ["started", "delta", "delta", "delta", "completed"]


async def test_grpc_web_works_for_browsers(client: httpx.AsyncClient) -> None:
    message = request().SerializeToString()
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    path = "/tokenloom.inference.v1.InferenceService/Generate"
    answer = await client.post(path, content=framed, headers=headers)
    assert answer.headers["content-type"] == "application/grpc-web+proto"
    assert b"w2 " in answer.content
    assert b"grpc-status:0" in answer.content
    refused = await client.post(path, content=framed, headers={**headers, "authorization": "Bearer no"})
    assert refused.headers["grpc-status"] == str(grpc.StatusCode.UNAUTHENTICATED.value[0])


async def test_the_picker_is_told_of_the_end(
    edge: RunningEdge, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    ended = len(edge.seen.picks_ended)
    assert [event async for event in stub.Generate(request(), metadata=METADATA)]
    await eventually(lambda: edge.seen.picks_ended[ended:] == ["completed"], within=2)


@pytest.mark.parametrize(
    ("path", "right"),
    [(GENERATE, "inference"), ("/api/v1/gpus", "telemetry"), ("/api/v1/workers", "admin")],
)
async def test_each_route_asks_for_its_right(
    edge: RunningEdge, client: httpx.AsyncClient, path: str, right: str
) -> None:
    method = "POST" if path == GENERATE else "GET"
    assert (await client.request(method, path, json=body(), headers=ADMIN)).status_code == 200
    assert edge.seen.checks[-1]["right"] == right
    refused = await client.request(method, path, headers={"authorization": "Bearer no"})
    assert refused.status_code == 401
    assert error_of(refused)["code"] == "invalid_api_key"


async def test_admin_routes_are_for_admin_keys(client: httpx.AsyncClient) -> None:
    refused = await client.get("/api/v1/workers")
    assert (refused.status_code, error_of(refused)["code"]) == (403, "permission_denied")
    assert (await client.get("/api/v1/workers", headers=ADMIN)).json() == {"workers": [{"lease_count": 1}]}
    assert (await client.post("/api/v1/workers/w0:drain", headers=ADMIN)).json() == {}
    unknown = await client.post("/api/v1/workers/w1:drain", headers=ADMIN)
    assert (unknown.status_code, error_of(unknown)["message"]) == (404, "there is no worker 'w1'")
    explained = await client.get("/api/v1/decisions/abc-1", headers=ADMIN)
    assert explained.json() == {"decisions": [{"reason": "abc-1"}]}


async def test_workers_are_put_to_sleep_and_given_adapters_and_weights_over_rest(client: httpx.AsyncClient) -> None:
    sleep = "/api/v1/workers/w0:sleep"
    assert (await client.post(sleep, json={"level": 1})).status_code == 403
    assert (await client.post(sleep, json={"level": 1}, headers=ADMIN)).json() == {}
    refused = await client.post(sleep, json={"level": 2}, headers=ADMIN)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "failed_precondition")
    for operation in ("wake", "reload", "unloadAdapter"):
        answer = await client.post(f"/api/v1/workers/w0:{operation}", json={}, headers=ADMIN)
        assert (answer.status_code, answer.json()) == (200, {})
    loaded = await client.post("/api/v1/workers/w0:loadAdapter", json={"name": "poet", "path": "poet-1"}, headers=ADMIN)
    assert loaded.json() == {"model": {"name": "poet", "base_model": "poet-1"}}
    rolled = await client.post("/api/v1/workers:roll", json={"all": True, "wake": {}}, headers=ADMIN)
    assert rolled.status_code == 200
    events = [json.loads(line.removeprefix("data:")) for line in rolled.text.splitlines() if line]
    assert [event["worker_id"] for event in events] == ["w0", "w1"]
    assert events[0]["left_worker_ids"] == ["w1"]
    assert events[1]["error"]["message"] == "wake"


async def test_gpus_are_listed_and_watched(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/gpus")).json() == {"gpus": [{"name": "L40"}]}
    watched = await client.get("/api/v1/gpus:watch")
    assert watched.text.split("\n\n")[0] == 'data: {"gpus":[{"name":"L40-0"}]}'


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"content": b"{"}, 400, "invalid_value"),
        ({"json": {"model": 5.5, "sampling": []}}, 400, "invalid_value"),
        ({"json": body("refuse")}, 400, "context_length_exceeded"),
        ({"json": body(model="nope")}, 404, "model_not_found"),
        ({"json": body(model="full")}, 429, "no_capacity"),
        ({"json": body(model="unplaced")}, 503, "no_ready_worker"),
        ({"content": b'{"text":"' + b"x" * (5 << 20) + b'"}'}, 413, "request_too_large"),
    ],
)
async def test_every_error_of_the_rest_bridge_has_the_one_body(
    client: httpx.AsyncClient, sent: dict[str, Any], status: int, code: str
) -> None:
    answer = await client.post(GENERATE, **sent)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert answer.headers["x-request-id"]
    assert not [name for name in answer.headers if name.startswith("grpc-")]
    assert ("retry-after" in answer.headers) == (status in (429, 503) or code == "context_length_exceeded")


async def test_an_error_of_a_worker_keeps_its_words_its_field_and_its_wait(client: httpx.AsyncClient) -> None:
    answer = await client.post(GENERATE, json=body("refuse"))
    # The message looks like a piece of the JSON that carries it.
    assert error_of(answer)["message"] == 'too long: "reason":"X", \\ é'
    assert error_of(answer)["param"] == "text"
    assert answer.headers["retry-after"] == "2"


async def test_the_error_table_wins_over_the_transcoders_own_statuses(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/v1/tokenize", json={"model": "demo", "text": "refuse"})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")
    answer = await client.post("/api/v1/embed", json={"model": "demo"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "unimplemented")


async def test_a_wrong_method_a_wrong_type_and_an_odd_header_are_told(client: httpx.AsyncClient) -> None:
    wrong = await client.get(GENERATE)
    assert (wrong.status_code, error_of(wrong)["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    typed = await client.post("/tokenloom.inference.v1.InferenceService/Generate", json={})
    assert (typed.status_code, error_of(typed)["code"]) == (415, "unsupported_media_type")
    odd = await client.get("/v1/models", headers={"x_y": "1"})
    assert (odd.status_code, error_of(odd)["code"]) == (400, "invalid_value")
    large = await client.get("/v1/models", headers={"x": "y" * 70_000})
    assert (large.status_code, error_of(large)["code"]) == (431, "headers_too_large")
    escaped = await client.get("/v1/models%2f..%2fnope")
    assert (escaped.status_code, error_of(escaped)["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (request("refuse"), grpc.StatusCode.INVALID_ARGUMENT, Reason.CONTEXT_LENGTH_EXCEEDED),
        (request("break"), grpc.StatusCode.INTERNAL, Reason.ENGINE_FAILED),
        (request(model="nope"), grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND),
        (request(model="full"), grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.NO_CAPACITY),
        (request(model="unplaced"), grpc.StatusCode.UNAVAILABLE, Reason.NO_READY_WORKER),
        (request("x" * (5 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.REQUEST_TOO_LARGE),
    ],
)
async def test_every_error_of_the_typed_lane_tells_its_reason(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    sent: generation_pb2.GenerateRequest,
    code: grpc.StatusCode,
    reason: Reason,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        assert [event async for event in stub.Generate(sent, metadata=METADATA)]
    assert caught.value.code() == code
    assert rich(caught.value).reason == reason


def rich(error: grpc.aio.AioRpcError) -> MeshError:
    found = next(value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY)
    assert isinstance(found, bytes)
    return error_from_status(status_pb2.Status.FromString(found))


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_a_call_without_a_message_is_the_clients_fault(client: httpx.AsyncClient, method: str) -> None:
    path = f"/tokenloom.inference.v1.InferenceService/{method}"
    answer = await client.post(path, headers={"content-type": "application/grpc"})
    assert answer.headers["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
    assert answer.headers["grpc-message"] == "the request has no body"


@pytest.mark.parametrize("name", ["x-session-id", "grpc-timeout", "x-priority"])
async def test_a_header_that_the_picker_is_shown_has_to_be_text(client: httpx.AsyncClient, name: str) -> None:
    odd = await client.post(GENERATE, json=body(), headers=[(name.encode(), b"\xff\xfe")])
    assert (odd.status_code, error_of(odd)["code"]) == (400, "invalid_value")
    well = await client.post(GENERATE, json=body(), headers=[(b"x-session-id", "zoë".encode())])
    assert well.status_code == 200


async def test_a_deadline_is_kept(stub: inference_pb2_grpc.InferenceServiceAsyncStub, edge: RunningEdge) -> None:
    cancelled = edge.seen.worker_cancels
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        assert [event async for event in stub.Generate(request(max_tokens=500), metadata=METADATA, timeout=0.2)]
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: edge.seen.worker_cancels == cancelled + 1, within=2)


async def test_a_client_that_leaves_a_typed_stream_ends_it_at_the_worker_and_at_the_picker(
    edge: RunningEdge, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    cancelled, ended = edge.seen.worker_cancels, len(edge.seen.picks_ended)
    call = stub.Generate(request(max_tokens=500), metadata=METADATA)
    await call.read()
    call.cancel()
    await eventually(lambda: edge.seen.worker_cancels == cancelled + 1, within=1)
    await eventually(lambda: edge.seen.picks_ended[ended:] == ["cancelled"], within=1)


@pytest.mark.parametrize("path", [GENERATE, "/v1/completions"])
async def test_a_client_that_leaves_an_http_stream_ends_it(edge: RunningEdge, path: str) -> None:
    def count() -> int:
        return edge.seen.worker_cancels + edge.seen.gateway_disconnects

    before = count()
    async with httpx.AsyncClient(base_url=edge.url, headers=USER) as leaving:
        sent = body("stream", max_tokens=500)
        async with leaving.stream("POST", path, json=sent) as answer:
            async for _ in answer.aiter_raw():
                break
    await eventually(lambda: count() == before + 1, within=1)


async def test_the_gateways_stream_arrives_as_it_is_sent(client: httpx.AsyncClient) -> None:
    async with client.stream("POST", "/v1/completions", json={"stream": True}) as answer:
        arrivals = [time.monotonic() async for line in answer.aiter_lines() if line]
    assert len(arrivals) == 21
    assert arrivals[-1] - arrivals[0] > 0.4


async def test_every_request_is_a_line_of_the_access_log(edge: RunningEdge, client: httpx.AsyncClient) -> None:
    answer = await client.post(GENERATE, json=body(model="nope"))
    mine = answer.headers["x-request-id"]
    await eventually(lambda: any(line["request"] == mine for line in edge.log_lines()), within=3)
    line = next(line for line in edge.log_lines() if line["request"] == mine)
    assert (line["path"], line["status"], line["service"], line["details"]) == (
        GENERATE,
        404,
        "envoy",
        "model_not_found",
    )


async def test_many_streams_share_one_connection(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    async def count() -> int:
        return len([event async for event in stub.Generate(request(max_tokens=5), metadata=METADATA)])

    assert await asyncio.gather(*(count() for _ in range(40))) == [7] * 40


async def test_without_a_router_the_typed_lane_says_not_ready_and_streams_go_on(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with (
        running_edge(tmp_path_factory.mktemp("routerless")) as edge,
        grpc.aio.insecure_channel(edge.target) as channel,
        httpx.AsyncClient(base_url=edge.url, headers=USER) as client,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call: Any = stub.Generate(request(max_tokens=20), metadata=METADATA)
        events = aiter(call)
        assert (await anext(events)).HasField("started")
        await edge.stop_router()
        rest = await client.post(GENERATE, json=body())
        assert (rest.status_code, error_of(rest)["code"]) == (503, "no_ready_worker")
        assert rest.headers["retry-after"] == "1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            assert [event async for event in stub.Generate(request(), metadata=METADATA)]
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        # Picked before the router was gone.
        assert [event.WhichOneof("event") async for event in events] == [*["delta"] * 20, "completed"]


async def test_while_the_router_is_away_the_typed_lane_asks_any_worker(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with (
        running_edge(tmp_path_factory.mktemp("fallback"), fallback=True) as edge,
        grpc.aio.insecure_channel(edge.target) as channel,
        httpx.AsyncClient(base_url=edge.url, headers=USER) as client,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call: Any = stub.Generate(request(max_tokens=20), metadata=METADATA)
        events = aiter(call)
        assert (await anext(events)).HasField("started")
        await edge.stop_router()
        for _ in range(4):
            # Whichever worker is tried first: one that has another model is not the last.
            rest = await client.post(GENERATE, json=body())
            assert (rest.status_code, rest.text.count("delta")) == (200, 3)
            assert len([event async for event in stub.Generate(request(), metadata=METADATA)]) == 5
        # What that key may use the worker compares with the body, since nobody has.
        limited = await client.post(GENERATE, json=body(), headers={"authorization": f"Bearer {LIMITED_KEY}"})
        assert limited.status_code == 200
        told = edge.seen.worker_calls[-1]
        assert (told["x-tokenloom-models"], told["x-tokenloom-unrouted"]) == ('["demo"]', "1")
        assert [event.WhichOneof("event") async for event in events] == [*["delta"] * 20, "completed"]


async def test_a_router_that_says_that_a_request_waits_is_given_time(
    edge: RunningEdge, client: httpx.AsyncClient
) -> None:
    before = len(edge.seen.picks)
    answer = await client.post(GENERATE, json=body(model="busy"))
    assert (answer.status_code, answer.text.count("delta")) == (200, 3)
    assert len(edge.seen.picks) == before + 1


async def test_without_a_gateway_both_lanes_say_not_ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("gatewayless")
    async with (
        running_edge(folder, gateway=nowhere) as edge,
        httpx.AsyncClient(base_url=edge.url, headers=USER) as client,
        grpc.aio.insecure_channel(edge.target) as channel,
    ):
        for path in ("/v1/completions", GENERATE):
            answer = await client.post(path, json=body())
            assert (answer.status_code, error_of(answer)["code"]) == (503, "no_ready_worker")
            assert answer.headers["retry-after"] == "1"
        calls: Any = (
            (inference_pb2_grpc.InferenceServiceStub(channel).Tokenize, inference_pb2.TokenizeRequest()),
            (admin_pb2_grpc.RouterAdminServiceStub(channel).ListWorkers, admin_pb2.ListWorkersRequest()),
        )
        for call, sent in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(sent, metadata=METADATA)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert rich(caught.value).retry_after_seconds == 1
        # The edge itself is alive all the same.
        assert (await client.get("/healthz")).status_code == 200


async def test_details_of_an_error_are_the_same_bytes_in_base64_for_grpc_web(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    answer = await client.post("/nope.Nope/Nope", content=b"\0\0\0\0\0", headers=headers)
    encoded = answer.headers[DETAILS_KEY]
    details = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
    assert error_from_status(status_pb2.Status.FromString(details)).reason == Reason.UNIMPLEMENTED
