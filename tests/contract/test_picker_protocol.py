"""The endpoint picker protocol, v1.0.0, as gateways other than our own edge speak it."""

import asyncio
import json
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.errors import Reason
from services.common.policy import Policy
from services.router.app import RunningRouter
from tests.support.ext_proc import BUFFERED, DESTINATION, FULL_DUPLEX, NO_BODY, Envoy, framed
from tests.support.router import running_router, worker_link
from tests.support.waiting import eventually

HELLO = generation_pb2.GenerateRequest(model="demo", text="hello")
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
ALIASES = Policy(aliases={"chat": "demo"})


def leased(router: RunningRouter) -> list[str]:
    """The endpoints that leases are out for."""
    return [worker.endpoint for worker in router.fleet.workers for _ in worker.leases]


@pytest.mark.parametrize("name", ["", "liveness", "readiness", SERVICE])
async def test_health_is_told_under_the_names_of_the_protocol(name: str) -> None:
    async with running_router() as (_, to_router):
        answer = await health_pb2_grpc.HealthStub(to_router).Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_fallbacks_are_named_in_their_order_after_the_one_picked() -> None:
    async with (
        running_router(picker_fallbacks=1) as (router, to_router),
        worker_link(router, to_router, "worker-0", endpoint="127.0.0.1:5001") as busiest,
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002") as busy,
        worker_link(router, to_router, "worker-2", endpoint="127.0.0.1:5003"),
    ):
        await busiest.report(running_count=6, pending_prefill_token_count=50_000)
        await busy.report(running_count=3, pending_prefill_token_count=5000)
        await eventually(lambda: [worker.load.running for worker in router.fleet.workers] == [6, 3, 0], within=5)
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        assert await envoy.picked() == "127.0.0.1:5003,127.0.0.1:5002"


async def test_fallbacks_keep_to_the_subset() -> None:
    async with (
        running_router(picker_fallbacks=8) as (router, to_router),
        worker_link(router, to_router, "worker-0", endpoint="127.0.0.1:5001"),
        worker_link(router, to_router, "worker-1", endpoint="[::1]:5002"),
        worker_link(router, to_router, "worker-2", endpoint="127.0.0.1:5003"),
    ):
        envoy = Envoy(to_router)
        await envoy.headers(subset=["127.0.0.1:5001", "[::1]:5002", "10.9.9.9:1"])
        await envoy.body(framed(HELLO))
        assert sorted((await envoy.picked()).split(",")) == ["127.0.0.1:5001", "[::1]:5002"]


@pytest.mark.parametrize(("served", "holds"), [("127.0.0.1:5002", ["127.0.0.1:5002"]), ("10.9.9.9:1", [])])
async def test_the_lease_goes_to_whoever_served(served: str, holds: list[str]) -> None:
    async with (
        running_router(picker_fallbacks=1) as (router, to_router),
        worker_link(router, to_router, "worker-0", endpoint="127.0.0.1:5001"),
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002") as busy,
    ):
        await busy.report(running_count=4, pending_prefill_token_count=50_000)
        await eventually(lambda: router.fleet.workers[1].load.running == 4, within=5)
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        assert await envoy.picked() == "127.0.0.1:5001,127.0.0.1:5002"
        await envoy.answer()
        message = ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders())
        message.metadata_context.filter_metadata["envoy.lb"][f"{DESTINATION}-served"] = served
        await envoy.call.write(message)
        assert (await envoy.answer()).WhichOneof("response") == "response_headers"
        assert leased(router) == holds


@pytest.mark.parametrize(
    ("method", "message", "held"),
    [
        ("Score", inference_pb2.ScoreRequest(model="demo", query="q", texts=["a", "b"]), 1),
        ("Detokenize", inference_pb2.DetokenizeRequest(model="demo", token_ids=[1]), 0),
    ],
)
async def test_methods_beside_generate_are_understood(method: str, message: Message, held: int) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(method)
        await envoy.body(framed(message))
        assert await envoy.picked() == "127.0.0.1:5001"
        assert len(leased(router)) == held


@pytest.mark.parametrize(
    ("path", "body", "limit", "held"),
    [
        ("/v1/embeddings", {"input": "x" * 400}, 1, 1),
        ("/v1/chat/completions?x=1", {"messages": [{"content": "x" * 400}], "max_completion_tokens": 9}, 9, 1),
        ("/tokenize", {"prompt": "x"}, 0, 0),
    ],
)
async def test_openai_bodies_are_understood_by_their_path(path: str, body: Any, limit: int, held: int) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path=path)
        await envoy.body(json.dumps({"model": "demo", **body}).encode())
        await envoy.picked()
        assert len(leased(router)) == held
        for worker in router.fleet.workers:
            assert [lease.request.max_output_tokens for lease in worker.leases] == [limit] * held


@pytest.mark.parametrize(("model", "reason"), [("demo", None), ("nope", Reason.MODEL_NOT_FOUND)])
async def test_without_a_body_a_header_says_which_model(model: str, reason: Reason | None) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=NO_BODY)
        await envoy.headers(x_gateway_model_name=model)
        if reason is None:
            assert await envoy.picked() == "127.0.0.1:5001"
            assert len(leased(router)) == 1
        else:
            assert (await envoy.error()).reason is reason


async def test_a_json_answer_settles_its_lease_where_its_body_ends() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/completions")
        await envoy.body(b'{"model": "demo"}')
        await envoy.picked()
        await envoy.answer()
        await envoy.send(response_headers=ext_proc.HttpHeaders())
        await envoy.answer()
        await envoy.send(response_body=ext_proc.HttpBody(body=b"x" * 100_000, end_of_stream=False))
        await envoy.answer()
        assert len(leased(router)) == 1
        await envoy.send(response_body=ext_proc.HttpBody(body=b"", end_of_stream=True))
        await eventually(lambda: leased(router) == [], within=5)


@pytest.mark.parametrize("mode", [BUFFERED, FULL_DUPLEX])
async def test_an_alias_reaches_the_worker_as_the_models_own_name(mode: int) -> None:
    asked = generation_pb2.GenerateRequest(model="chat", text="hello")
    async with running_router(routing=ALIASES) as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=mode)
        if mode == BUFFERED:
            await envoy.body_alone("Generate", framed(asked))
            mutation = (await envoy.answer()).request_body.response.body_mutation
            assert mutation.body == framed(HELLO)
        else:
            await envoy.headers()
            await envoy.body(framed(asked))
            await envoy.picked()
            piece = (await envoy.answer()).request_body.response.body_mutation.streamed_response
            assert (piece.body, piece.end_of_stream) == (framed(HELLO), True)


async def test_an_alias_in_json_reaches_the_worker_as_the_models_own_name() -> None:
    async with running_router(routing=ALIASES) as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/completions")
        await envoy.body(b'{"prompt": "x", "model": "chat", "odd": [1.5, null]}')
        await envoy.picked()
        piece = (await envoy.answer()).request_body.response.body_mutation.streamed_response
        assert json.loads(piece.body) == {"prompt": "x", "model": "demo", "odd": [1.5, None]}


@pytest.mark.parametrize("size", [10 << 20, 5 << 20])
@pytest.mark.parametrize("transport", ["anybody", "edge"])
async def test_a_chunk_larger_than_any_body_is_413_and_the_picker_goes_on(size: int, transport: str) -> None:
    async with running_router(picker="127.0.0.1:0") as (router, to_router), worker_link(router, to_router):
        port = router.port if transport == "anybody" else router.picker_port
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as large:
            envoy = Envoy(large)
            await envoy.headers(path="/v1/completions")
            await envoy.body(bytes(size), ended=False)
            assert (await envoy.refused()).status.code == 413
            envoy = Envoy(large)
            await envoy.headers()
            await envoy.body(framed(HELLO))
            assert await envoy.picked() == "127.0.0.1:5001"


async def test_a_body_that_never_ends_holds_nothing_and_harms_nobody() -> None:
    async with running_router(picker="127.0.0.1:0") as (router, to_router), worker_link(router, to_router):
        silent = [Envoy(to_router) for _ in range(50)]
        for envoy in silent:
            await envoy.headers()
            await envoy.body(framed(HELLO)[:3], ended=False)
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        assert await envoy.picked() == "127.0.0.1:5001"
        assert len(leased(router)) == 1
        for envoy in silent:
            envoy.call.cancel()
        await asyncio.gather(*(envoy.call.code() for envoy in silent))
