"""The endpoint picker over real gRPC; the test plays Envoy."""

import gzip
import json
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.message import Message
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.errors import Reason
from services.common.rpc import channel
from services.common.typed_calls import TOLD_NAMESPACE
from services.router.app import RunningRouter
from tests.support.ext_proc import BUFFERED, FULL_DUPLEX, framed, reply_headers
from tests.support.ext_proc import Envoy as AnyEnvoy
from tests.support.measured import measured
from tests.support.router import running_router as any_running_router
from tests.support.router import tracer_to, worker_link
from tests.support.waiting import eventually

TRANSPORTS = ("anybody", "edge")
"""The two servers that picks go through: gRPC's for any gateway, and the lean one of our own edge."""


@pytest.fixture(params=TRANSPORTS, autouse=True)
def transport(request: pytest.FixtureRequest) -> Iterator[None]:
    """Has Envoy speak through each of them in turn."""
    token = _transport.set(request.param)
    yield
    _transport.reset(token)


_transport: ContextVar[str] = ContextVar("transport")


@asynccontextmanager
async def running_router(**settings: Any) -> AsyncIterator[tuple[RunningRouter, grpc.aio.Channel]]:
    """A router that also serves the edge, and a channel to its gRPC port."""
    async with (
        any_running_router(picker="127.0.0.1:0", **settings) as (router, to_router),
        channel(f"127.0.0.1:{router.picker_port}") as to_picker,
    ):
        _pickers[to_router] = to_picker
        yield router, to_router


_pickers: WeakKeyDictionary[grpc.aio.Channel, grpc.aio.Channel] = WeakKeyDictionary()


def Envoy(to_router: grpc.aio.Channel, **options: Any) -> AnyEnvoy:
    """Envoy's end of one request."""
    return AnyEnvoy(_pickers.get(to_router, to_router) if _transport.get() == "edge" else to_router, **options)


HELLO = generation_pb2.GenerateRequest(model="demo", text="hello")
CHAT = generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role="user", content="hi")])


def leases(router: RunningRouter) -> int:
    """Leases that are out."""
    return sum(len(worker.leases) for worker in router.fleet.workers)


async def test_a_streamed_body_is_picked_for_and_handed_on_as_it_was() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy, body = Envoy(to_router), framed(HELLO)
        await envoy.headers()
        await envoy.body(body[:3], ended=False)
        await envoy.body(body[3:9], ended=False)
        await envoy.body(body[9:])
        assert await envoy.picked() == "127.0.0.1:5001"
        piece = (await envoy.answer()).request_body.response.body_mutation.streamed_response
        assert (piece.body, piece.end_of_stream) == (body, True)
        assert leases(router) == 1


async def test_a_streamed_body_whose_end_comes_later_is_picked_for_before_it() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy, body = Envoy(to_router), framed(HELLO)
        await envoy.headers()
        await envoy.body(body, ended=False)
        await envoy.picked()
        first = (await envoy.answer()).request_body.response.body_mutation.streamed_response
        assert (first.body, first.end_of_stream) == (body, False)
        await envoy.body(b"")
        last = (await envoy.answer()).request_body.response.body_mutation.streamed_response
        assert (last.body, last.end_of_stream) == (b"", True)


async def test_a_body_that_trailers_end_is_picked_for() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy, body = Envoy(to_router), b'{"model": "demo"}'
        await envoy.headers(path="/v1/completions")
        await envoy.body(body, ended=False)
        await envoy.send(request_trailers=ext_proc.HttpTrailers())
        await envoy.picked()
        piece = (await envoy.answer()).request_body.response.body_mutation.streamed_response
        assert (piece.body, piece.end_of_stream) == (body, False)
        assert (await envoy.answer()).WhichOneof("response") == "request_trailers"


async def test_a_large_body_is_handed_on_in_pieces_that_envoy_takes() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router, context=1_000_000):
        envoy, body = Envoy(to_router), framed(generation_pb2.GenerateRequest(model="demo", text="x" * 300_000))
        await envoy.headers()
        for start in range(0, len(body), 16_384):
            await envoy.body(body[start : start + 16_384], ended=start + 16_384 >= len(body))
        await envoy.picked()
        pieces, ended = [], False
        while not ended:
            piece = (await envoy.answer()).request_body.response.body_mutation.streamed_response
            assert len(piece.body) <= 64 << 10
            pieces.append(piece.body)
            ended = piece.end_of_stream
        assert b"".join(pieces) == body


async def test_a_buffered_body_is_picked_for_in_its_own_answer() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.headers()
        answer = await envoy.answer()
        assert answer.WhichOneof("response") == "request_headers"
        assert not answer.request_headers.response.header_mutation.set_headers
        await envoy.body(framed(HELLO))
        assert await envoy.picked() == "127.0.0.1:5001"


async def test_a_body_that_comes_first_brings_what_there_is_to_know_of_the_headers() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.body_alone(
            "Generate", framed(HELLO), x_request_id="r1", x_tokenloom_tenant="acme", x_session_id="s", grpc_timeout="5S"
        )
        assert await envoy.picked() == "127.0.0.1:5001"
        (lease,) = router.fleet.workers[0].leases
        await envoy.send_response(grpc_status="0")
        await eventually(lambda: leases(router) == 0, within=5)
    request = lease.request
    assert (request.request_id, request.tenant, request.session, request.timeout_seconds) == ("r1", "acme", "s", 5)


@pytest.mark.parametrize(
    ("method", "body", "headers", "reason"),
    [
        ("Generate", framed(HELLO), {"x_tokenloom_models": '["other"]'}, Reason.PERMISSION_DENIED),
        ("Generate", b"", {}, Reason.INVALID_REQUEST),
        ("Generate", framed(generation_pb2.GenerateRequest(model="nope")), {}, Reason.MODEL_NOT_FOUND),
        ("Nonsense", framed(HELLO), {}, Reason.UNIMPLEMENTED),
    ],
)
async def test_a_body_that_comes_first_is_refused_like_any_other(
    method: str, body: bytes, headers: dict[str, str], reason: Reason
) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.body_alone(method, body, **headers)  # type: ignore[arg-type]  # of a table
        assert (await envoy.error()).reason is reason


@pytest.mark.parametrize("ended", [True, False])
async def test_a_body_that_comes_first_for_a_method_without_a_model_goes_anywhere(ended: bool) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router, max_running=1):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.body_alone("ListModels", framed(inference_pb2.ListModelsRequest()), ended=ended)
        assert await envoy.picked() == "127.0.0.1:5001"
        assert leases(router) == 0


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [(None, "3", 3), ("5", "3", 5), ("1", "3", 3), ("-1000", "-2", -2), ("1000", None, 1000)],
)
async def test_a_client_may_put_its_call_behind_its_keys_class_and_never_before_it(
    asked: str | None, own: str | None, expected: int
) -> None:
    headers = {name: value for name, value in (("x_priority", asked), ("x_tokenloom_priority", own)) if value}
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.body_alone("Generate", framed(HELLO), **headers)  # type: ignore[arg-type]  # of a table
        await envoy.picked()
        (lease,) = router.fleet.workers[0].leases
        assert lease.request.priority == expected


@pytest.mark.parametrize("asked", ["first", "", "1001", "-1001", "1,2", "1.5"])
async def test_a_class_that_there_is_none_of_is_refused_with_its_bounds(asked: str) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.body_alone("Generate", framed(HELLO), x_priority=asked)
        error = await envoy.error()
        assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "x-priority")
        assert "from -1000 to 1000" in error.message
        assert leases(router) == 0


@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED])
async def test_who_answers_is_told_for_keys_that_may_debug_and_for_no_other(mode: int) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        for debug in (True, False):
            envoy = Envoy(to_router, mode=mode)
            if mode == BUFFERED:
                await envoy.body_alone("Generate", framed(HELLO), **({"x_tokenloom_debug": "1"} if debug else {}))  # type: ignore[arg-type]  # a header
            else:
                await envoy.headers(**({"x_tokenloom_debug": "1"} if debug else {}))  # type: ignore[arg-type]  # a header
                await envoy.body(framed(HELLO))
            answer = await envoy.answer()
            assert answer.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"] == "127.0.0.1:5001"
            said = dict(answer.dynamic_metadata[TOLD_NAMESPACE]) if debug else {}
            assert set(answer.dynamic_metadata) == ({"envoy.lb", TOLD_NAMESPACE} if debug else {"envoy.lb"})
            assert said.keys() == ({"worker", "route"} if debug else set())
            if debug:
                assert said["worker"] == router.fleet.workers[0].worker_id
                assert "first token" in str(said["route"])


async def test_a_streamed_body_cannot_come_first() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=FULL_DUPLEX)
        await envoy.body_alone("Generate", framed(HELLO))
        assert (await envoy.error()).reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED])
async def test_a_method_without_a_model_goes_anywhere_without_its_body(mode: int) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router, max_running=1):
        envoy = Envoy(to_router, mode=mode)
        await envoy.headers("ListModels")
        assert await envoy.picked() == "127.0.0.1:5001"
        assert leases(router) == 0
        await envoy.body(framed(inference_pb2.ListModelsRequest()))
        assert (await envoy.answer()).WhichOneof("response") == "request_body"


async def test_a_request_without_a_body_goes_anywhere() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/models", ended=True)
        assert await envoy.picked() == "127.0.0.1:5001"


@pytest.mark.parametrize(
    ("method", "message", "held"),
    [
        ("Embed", inference_pb2.EmbedRequest(model="demo", texts=["a", "b"]), 1),
        ("Tokenize", inference_pb2.TokenizeRequest(model="demo", text="hello"), 0),
        ("Generate", generation_pb2.GenerateRequest(model="demo", token_ids=generation_pb2.TokenIds(ids=[1, 2, 3])), 1),
        ("Generate", generation_pb2.GenerateRequest(model="demo", chat=CHAT), 1),
    ],
)
async def test_every_method_is_understood(method: str, message: Message, held: int) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(method)
        await envoy.body(framed(message))
        assert await envoy.picked() == "127.0.0.1:5001"
        assert leases(router) == held


async def test_what_the_request_says_reaches_the_scheduler() -> None:
    message = generation_pb2.GenerateRequest(
        model="demo",
        token_ids=generation_pb2.TokenIds(ids=range(300)),
        emitted_token_ids=range(20),
        sampling=generation_pb2.SamplingParameters(max_tokens=50),
    )
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(
            x_request_id="r1", x_tokenloom_tenant="acme", x_tokenloom_priority="-3", x_session_id="s", grpc_timeout="5S"
        )
        await envoy.body(framed(message))
        await envoy.picked()
        (lease,) = router.fleet.workers[0].leases
    request = lease.request
    assert (request.request_id, request.tenant, request.priority, request.session) == ("r1", "acme", -3, "s")
    assert (request.prompt_tokens, request.exact, request.max_output_tokens) == (320, True, 30)
    assert request.timeout_seconds == 5


async def test_openai_json_is_understood() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, mode=BUFFERED)
        await envoy.headers(path="/v1/chat/completions")
        await envoy.answer()
        body = {"model": "demo", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 7, "stream": True}
        await envoy.body(json.dumps(body).encode())
        await envoy.picked()
        (lease,) = router.fleet.workers[0].leases
        assert 100 < lease.request.prompt_tokens < 120
        assert lease.request.max_output_tokens == 7


async def test_a_compressed_message_is_understood() -> None:
    data = gzip.compress(HELLO.SerializeToString())
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(grpc_encoding="gzip")
        await envoy.body(b"\1" + len(data).to_bytes(4, "big") + data)
        assert await envoy.picked() == "127.0.0.1:5001"


async def test_of_two_workers_the_idle_one_is_picked() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, "worker-0", endpoint="127.0.0.1:5001") as busy,
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002"),
    ):
        await busy.report(running_count=4, pending_prefill_token_count=5000)
        await eventually(lambda: router.fleet.workers[0].load.running == 4, within=5)
        for _ in range(3):
            envoy = Envoy(to_router)
            await envoy.headers()
            await envoy.body(framed(HELLO))
            assert await envoy.picked() == "127.0.0.1:5002"
            envoy.call.cancel()
            await eventually(lambda: leases(router) == 0, within=5)


@pytest.mark.parametrize("subset", [["127.0.0.1:5002"], "127.0.0.1:5002, 127.0.0.1:5003"])
async def test_a_subset_hint_is_kept_to(subset: Any) -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router, "worker-0", endpoint="127.0.0.1:5001"),
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002"),
    ):
        envoy = Envoy(to_router)
        await envoy.headers(subset=subset)
        await envoy.body(framed(HELLO))
        assert await envoy.picked() == "127.0.0.1:5002"


@pytest.mark.parametrize("subset", [[], ["10.0.0.9:1"]])
async def test_a_subset_of_which_nobody_is_ready_is_503_at_once(subset: list[str]) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/completions", subset=subset)
        await envoy.body(b'{"model": "demo"}')
        response = await envoy.refused()
        assert response.status.code == 503
        assert int(reply_headers(response)["retry-after"]) >= 1


async def test_the_lease_is_held_until_the_trailers_of_the_answer() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        await envoy.picked()
        await envoy.answer()
        await envoy.send_response(grpc_status="0", x_tokenloom_usage_output_tokens="12")
        assert (await envoy.answer()).WhichOneof("response") == "response_headers"
        assert (await envoy.answer()).WhichOneof("response") == "response_trailers"
        assert leases(router) == 0
        await envoy.call.done_writing()
        assert await envoy.call.read() is grpc.aio.EOF
        assert await envoy.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("how", ["cancel", "half-close"])
@measured
async def test_a_client_that_leaves_frees_its_lease(how: str) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        await envoy.picked()
        assert leases(router) == 1
        left = time.monotonic()
        if how == "cancel":
            envoy.call.cancel()
        else:
            await envoy.call.done_writing()
        await eventually(lambda: leases(router) == 0, within=5)
        assert time.monotonic() - left < 0.05


async def test_a_request_that_its_worker_has_given_up_ends_and_no_other() -> None:
    async with (
        running_router() as (router, to_router),
        worker_link(router, to_router) as link,
        worker_link(router, to_router, "worker-1", endpoint="127.0.0.1:5002", models=("other",)) as other,
    ):
        envoys = {name: Envoy(to_router) for name in ("stuck", "well")}
        for name, envoy in envoys.items():
            await envoy.headers(x_request_id=name)
            await envoy.body(framed(HELLO))
            await envoy.picked()
            await envoy.answer()
        # A worker has nothing to say about the requests of another one.
        await other.report(abandoned_request_ids=["stuck", "well"])
        await link.report(abandoned_request_ids=["stuck", "unknown"])
        assert (await envoys["stuck"].refused()).status.code == 429
        assert await envoys["stuck"].call.read() is grpc.aio.EOF
        assert leases(router) == 1
        await link.report(abandoned_request_ids=["stuck"])
        await envoys["well"].send_response(grpc_status="0")
        assert (await envoys["well"].answer()).WhichOneof("response") == "response_headers"


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_a_client_that_leaves_while_it_waits_leaves_the_line(how: str) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        await full(router, link)
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        await eventually(lambda: router.admission.waiting_count == 1, within=5)
        if how == "cancel":
            envoy.call.cancel()
        else:
            await envoy.call.done_writing()
        await eventually(lambda: router.admission.waiting_count == 0, within=5)


async def test_a_request_waits_for_room_and_loses_nothing_that_comes_meanwhile() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        await full(router, link)
        envoy, body = Envoy(to_router), framed(HELLO)
        await envoy.headers()
        await envoy.body(body, ended=False)
        await eventually(lambda: router.admission.waiting_count == 1, within=5)
        await envoy.body(b"")
        await link.report(running_count=0)
        await envoy.picked()
        pieces = [(await envoy.answer()).request_body.response.body_mutation.streamed_response for _ in range(2)]
        assert [(piece.body, piece.end_of_stream) for piece in pieces] == [(body, False), (b"", True)]
        envoy.call.cancel()
        await eventually(lambda: leases(router) == 0, within=5)


async def full(router: RunningRouter, link: Any) -> None:
    """The one worker reports that it has no room."""
    await link.report(running_count=20)
    await eventually(lambda: router.fleet.workers[0].full, within=5)


async def test_the_deadline_of_the_call_bounds_the_wait() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router) as link:
        await full(router, link)
        envoy = Envoy(to_router)
        await envoy.headers(grpc_timeout="100m")
        await envoy.body(framed(HELLO))
        assert (await envoy.error()).reason is Reason.DEADLINE_EXCEEDED


async def test_a_typed_client_gets_the_rich_error() -> None:
    async with running_router(max_waiting=0) as (router, to_router), worker_link(router, to_router) as link:
        await full(router, link)
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        response = await envoy.refused()
        assert response.grpc_status.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert response.body.startswith(b"every worker is busy; try again in ")
        assert int(reply_headers(response)["retry-after"]) >= 1


async def test_an_http_client_gets_openais_error() -> None:
    async with running_router(ready_grace_seconds=0) as (_, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/completions")
        await envoy.body(b'{"model": "demo"}')
        response = await envoy.refused()
        assert response.status.code == 503
        assert not response.HasField("grpc_status")
        assert reply_headers(response)["content-type"] == "application/json"
        assert json.loads(response.body)["error"] == {
            "message": "no worker is ready for this request",
            "type": "server_error",
            "param": None,
            "code": "no_ready_worker",
        }


async def test_an_unknown_model_is_not_found() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(generation_pb2.GenerateRequest(model="nonsense", text="x")))
        error = await envoy.error()
        assert (error.reason, error.field) == (Reason.MODEL_NOT_FOUND, "model")


@pytest.mark.parametrize(("models", "allowed"), [('["demo", "other"]', True), ('["other"]', False), ("[]", False)])
async def test_a_key_gets_its_models_only(models: str, allowed: bool) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(x_tokenloom_models=models)
        await envoy.body(framed(HELLO))
        if allowed:
            assert await envoy.picked() == "127.0.0.1:5001"
        else:
            error = await envoy.error()
            assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "model")


async def test_token_ids_that_no_context_takes_are_refused() -> None:
    message = generation_pb2.GenerateRequest(model="demo", token_ids=generation_pb2.TokenIds(ids=range(200)))
    async with running_router() as (router, to_router), worker_link(router, to_router, context=100):
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(message))
        assert (await envoy.error()).reason is Reason.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize(
    ("headers", "body", "reason"),
    [
        ({}, b"", Reason.INVALID_REQUEST),
        ({}, b"\0\0", Reason.INVALID_REQUEST),
        ({}, b"\0\0\0\0\x09abc", Reason.INVALID_REQUEST),
        ({}, b"\0\0\0\0\x03\xff\xff\xff", Reason.INVALID_REQUEST),
        ({}, b"\0\xff\xff\xff\xff", Reason.REQUEST_TOO_LARGE),
        ({}, b"\1\0\0\0\x03abc", Reason.UNIMPLEMENTED),
        ({"grpc_encoding": "gzip"}, b"\1\0\0\0\x03abc", Reason.INVALID_REQUEST),
        ({"grpc_encoding": "snappy"}, b"\1\0\0\0\x03abc", Reason.UNIMPLEMENTED),
        ({"grpc_encoding": "gzip"}, b"\7\0\0\0\x03abc", Reason.UNIMPLEMENTED),
        ({}, framed(generation_pb2.GenerateRequest(text="no model")), Reason.INVALID_REQUEST),
        ({"method": "Nonsense"}, b"\0\0\0\0\0", Reason.UNIMPLEMENTED),
    ],
)
async def test_a_malformed_grpc_body_is_refused(headers: dict[str, str], body: bytes, reason: Reason) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(**headers)  # type: ignore[arg-type]  # of a table
        if "method" not in headers:
            await envoy.body(body)
        assert (await envoy.error()).reason is reason


async def test_a_compressed_bomb_is_refused() -> None:
    data = gzip.compress(bytes(64 << 20))
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(grpc_encoding="gzip")
        await envoy.body(b"\1" + len(data).to_bytes(4, "big") + data)
        assert (await envoy.error()).reason is Reason.REQUEST_TOO_LARGE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"model": 5}',
        b'{"model": ""}',
        b"[" * 200_000,
        b'{"model": "demo", "prompt": ' + b"[" * 100_000,
    ],
)
async def test_a_malformed_json_body_is_400(body: bytes) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/completions")
        await envoy.body(body)
        response = await envoy.refused()
        assert response.status.code == 400
        assert json.loads(response.body)["error"]["type"] == "invalid_request_error"


async def test_a_body_without_an_end_is_refused_once_it_is_too_large() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers(path="/v1/completions")
        for _ in range(3):
            await envoy.body(b" " * (2 << 20), ended=False)
        assert (await envoy.refused()).status.code == 413


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"request_body": ext_proc.HttpBody(body=b"x")},
        {"request_trailers": ext_proc.HttpTrailers()},
    ],
)
async def test_messages_out_of_order_are_refused(message: dict[str, Any]) -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.send(**message)
        assert (await envoy.refused()).status.code == 400


async def test_headers_that_come_twice_are_refused() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.headers()
        assert (await envoy.error()).reason is Reason.INVALID_REQUEST


async def test_a_router_that_stops_lets_go_of_running_requests_cleanly() -> None:
    async with AsyncExitStack() as after, AsyncExitStack() as router_lives:
        router, worker_channel = await router_lives.enter_async_context(running_router())
        to_router = await after.enter_async_context(channel(f"127.0.0.1:{router.port}"))
        await router_lives.enter_async_context(worker_link(router, worker_channel))
        envoy = Envoy(to_router)
        await envoy.headers()
        await envoy.body(framed(HELLO))
        await envoy.picked()
        await envoy.answer()
        started = time.monotonic()
        await router_lives.aclose()
        assert time.monotonic() - started < 0.5
        # With OK, Envoy goes on without the picker; an error would break the response.
        assert await envoy.call.read() is grpc.aio.EOF
        assert await envoy.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("where", ["metadata", "header"])
async def test_the_pick_span_is_a_child_of_envoys(where: str) -> None:
    spans, parent = InMemorySpanExporter(), f"00-{'a' * 32}-{'b' * 16}-01"
    async with running_router(tracer=tracer_to(spans)) as (router, to_router), worker_link(router, to_router):
        envoy = Envoy(to_router, metadata=(("traceparent", parent),) if where == "metadata" else ())
        await envoy.headers(traceparent=parent if where == "header" else f"00-{'c' * 32}-{'d' * 16}-01")
        await envoy.body(framed(HELLO))
        await envoy.picked()
        (span,) = spans.get_finished_spans()
    assert span.name == "pick"
    assert span.parent is not None
    assert span.parent.span_id == int("b" * 16, 16)
    assert dict(span.attributes or {})["tokenloom.worker"] == "worker-0"


@measured
async def test_a_pick_is_fast() -> None:
    async with running_router() as (router, to_router), worker_link(router, to_router, max_running=1000):
        seconds = []
        for _ in range(100):
            envoy = Envoy(to_router)
            started = time.perf_counter()
            await envoy.headers()
            await envoy.body(framed(HELLO))
            await envoy.picked()
            seconds.append(time.perf_counter() - started)
            envoy.call.cancel()
    # Both ends run in this process; by far the most of it is gRPC's own.
    assert statistics.median(seconds) < 0.005
    print(f"pick p50 {1e3 * statistics.median(seconds):.2f} ms")  # noqa: T201  # shown with -s
