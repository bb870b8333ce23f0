"""What Envoy speaks with in tests of the edge: each far end does as little as it can, and notes what it has seen."""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.protobuf.duration_pb2 import Duration
from tokenloom.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc
from tokenloom.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.rpc import metadata_of
from services.common.status import DETAILS_KEY, grpc_code, status_from_error
from services.common.typed_calls import ACCOUNT_HEADER, REMEMBER_HEADER, TOLD_NAMESPACE

__all__ = [
    "ADMIN_KEY",
    "KNOWN_KEYS",
    "LIMITED_KEY",
    "USER_KEY",
    "Accounting",
    "Admin",
    "FarEnds",
    "Gateway",
    "Lists",
    "OtherModel",
    "Picker",
    "Telemetry",
    "Worker",
]

USER_KEY: Final = "tl-user"
LIMITED_KEY = "limited"
ADMIN_KEY: Final = "tl-admin"
KNOWN_KEYS: Final = "tl-known-"
"""Keys that begin so may be remembered, and have a tenant of their own name; with "debug" in it also that right."""
_STEP_SECONDS: Final = 0.03
# Longer than the edge waits for a router that says nothing.
_WAIT_SECONDS = 1.3
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class FarEnds:
    """What the far ends were asked, and what they saw end."""

    worker_endpoint: str = ""
    gateway_requests: list[dict[str, Any]] = field(default_factory=list)
    gateway_disconnects: int = 0
    checks: list[dict[str, str]] = field(default_factory=list)
    picks: list[dict[str, str]] = field(default_factory=list)
    """The attributes that came with each body."""
    picks_ended: list[str] = field(default_factory=list)
    """How each pick's stream ended: "completed" or "cancelled"."""
    worker_calls: list[dict[str, str | bytes]] = field(default_factory=list)
    worker_cancels: int = 0
    remember_ms: int = 500
    """For how long the gateway says that keys may be remembered that may be at all."""
    told: list[accesslog_pb2.HTTPAccessLogEntry] = field(default_factory=list)
    """What the edge told of calls."""


class Gateway:
    """An HTTP server that answers with what it got, or with a slow stream when the body asks for one."""

    def __init__(self, seen: FarEnds) -> None:
        self._seen = seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI request."""
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"].startswith("/authz/"):
            await self._check(headers, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        request = {"method": scope["method"], "path": scope["path"], "headers": headers, "body": len(body)}
        self._seen.gateway_requests.append(request)
        if b"stream" in body:
            await self._stream(receive, send)
        else:
            await _send_json(send, request)

    async def _check(self, headers: dict[str, str], send: Any) -> None:
        right = headers["x-tokenloom-right"]
        self._seen.checks.append({"right": right, **headers})
        is_grpc = headers["x-tokenloom-form"] == "grpc"
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if key.startswith(KNOWN_KEYS) and "," not in key:
            await _send_known(send, key, self._seen)
            return
        models = b'["demo"]' if key == LIMITED_KEY else b""
        await _send_check(send, _check(right, headers), is_grpc=is_grpc, models=models)

    async def _stream(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.ensure_future(receive())
        for number in range(20):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.wait([gone], timeout=_STEP_SECONDS)
            if gone.done():
                self._seen.gateway_disconnects += 1
                return
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send_json(send: Any, body: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def _check(right: str, headers: dict[str, str]) -> MeshError | None:
    """Knows three keys."""
    key = headers.get("authorization", "").removeprefix("Bearer ")
    if key not in (USER_KEY, LIMITED_KEY, ADMIN_KEY):
        return MeshError(Reason.INVALID_API_KEY, "this API key is not valid")
    if right == "admin" and key != ADMIN_KEY:
        return MeshError(Reason.PERMISSION_DENIED, "this key does not have the admin right")
    return None


async def _send_check(send: Any, error: MeshError | None, *, is_grpc: bool, models: bytes) -> None:
    headers = [(b"x-tokenloom-tenant", b"ada"), (b"x-envoy-auth-headers-to-remove", b"authorization")]
    if models:
        headers.append((b"x-tokenloom-models", models))
    body = b""
    if error is not None:
        body = error.message.encode() if is_grpc else json.dumps(error.http_body()).encode()
        headers = [] if is_grpc else [(b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(body)).encode()))
    status = 200 if error is None else error.row.http
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_known(send: Any, key: str, seen: FarEnds) -> None:
    added = {
        "x-tokenloom-tenant": key,
        "x-tokenloom-key": f"id-of-{key}",
        ACCOUNT_HEADER: f"gateway.{len(seen.checks)}",
        REMEMBER_HEADER: str(seen.remember_ms),
        "x-envoy-auth-headers-to-remove": "authorization",
        "content-length": "0",
        **({"x-tokenloom-debug": "1"} if "debug" in key else {}),
    }
    headers = [(name.encode(), value.encode()) for name, value in added.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class Accounting(als_pb2_grpc.AccessLogServiceServicer):
    """The gateway's gRPC side."""

    def __init__(self, seen: FarEnds) -> None:
        self.seen = seen

    async def StreamAccessLogs(self, request_iterator: AsyncIterator[Any], context: _Context) -> Any:  # noqa: ARG002
        """Listens."""
        async for message in request_iterator:
            self.seen.told += message.http_logs.log_entry
        return als_pb2.StreamAccessLogsResponse()


class Picker(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Sends every request to the one worker; refuses what is named "full" or "nope", lets wait what is named "busy"."""

    def __init__(self, seen: FarEnds) -> None:
        self._seen = seen

    async def Process(self, request_iterator: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:  # noqa: ARG002
        """One request."""
        ended = "cancelled"
        try:
            async for message in request_iterator:
                if message.HasField("request_body"):
                    fields = message.attributes["envoy.filters.http.ext_proc"].fields.items()
                    shown = {name: value.string_value for name, value in fields}
                    self._seen.picks.append(shown)
                    if b"busy" in message.request_body.body:
                        yield ext_proc.ProcessingResponse(override_message_timeout=Duration(seconds=5))
                        await asyncio.sleep(_WAIT_SECONDS)
                    yield self._pick(message.request_body.body, shown)
                elif message.HasField("response_trailers"):
                    ended = "completed"
                    yield ext_proc.ProcessingResponse(response_trailers=ext_proc.TrailersResponse())
        finally:
            self._seen.picks_ended.append(ended)

    def _pick(self, body: bytes, shown: dict[str, str]) -> Any:
        request = generation_pb2.GenerateRequest.FromString(body[5:])
        if request.model == "nope":
            return _refused(MeshError(Reason.MODEL_NOT_FOUND, "the model 'nope' does not exist", field="model"))
        if request.model == "full":
            return _refused(MeshError(Reason.NO_CAPACITY, "the mesh is full", retry_after_seconds=2.5))
        endpoint = "" if request.model == "unplaced" else self._seen.worker_endpoint
        answer = ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())
        answer.dynamic_metadata.get_or_create_struct("envoy.lb")["x-gateway-destination-endpoint"] = endpoint
        if shown.get("request.headers['x-tokenloom-debug']") == "1":
            told = answer.dynamic_metadata.get_or_create_struct(TOLD_NAMESPACE)
            told["worker"], told["route"] = "w0", "it is idle; cost 0.1 s"
        return answer


def _refused(error: MeshError) -> Any:
    refusal = ext_proc.ImmediateResponse(
        status=http_status_pb2.HttpStatus(code=error.row.http),
        grpc_status=ext_proc.GrpcStatus(status=grpc_code(error).value[0]),
        body=error.message.encode(),
        details=error.reason.value.lower(),
    )
    refusal.headers.set_headers.append(
        _option(DETAILS_KEY, b64encode(status_from_error(error).SerializeToString()).decode())
    )
    if error.retry_after_seconds is not None:
        refusal.headers.set_headers.append(_option("retry-after", f"{error.retry_after_seconds:.0f}"))
    return ext_proc.ProcessingResponse(immediate_response=refusal)


def _option(name: str, value: str) -> Any:
    header = base_pb2.HeaderValue(key=name, raw_value=value.encode())
    return base_pb2.HeaderValueOption(
        header=header,
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


class Worker(inference_pb2_grpc.InferenceServiceServicer):
    """Says as many words as `max_tokens` asks for; fails where the text tells it to."""

    def __init__(self, seen: FarEnds) -> None:
        self._seen = seen

    async def Generate(self, request: Any, context: _Context) -> AsyncIterator[Any]:
        """Streams."""
        self._seen.worker_calls.append(metadata_of(context))
        if request.text == "refuse":
            raise MeshError(
                Reason.CONTEXT_LENGTH_EXCEEDED, 'too long: "reason":"X", \\ é', field="text", retry_after_seconds=1.5
            )
        try:
            yield generation_pb2.GenerateResponse(
                started=generation_pb2.Started(model=request.model, prompt_token_count=3)
            )
            for number in range(request.sampling.max_tokens):
                await asyncio.sleep(_STEP_SECONDS)
                if request.text == "break" and number == 2:
                    raise MeshError(Reason.ENGINE_FAILED, "the engine broke")
                yield generation_pb2.GenerateResponse(
                    delta=generation_pb2.Delta(text=f"w{number} ", token_ids=[number])
                )
            yield generation_pb2.GenerateResponse(
                completed=generation_pb2.Completed(finish_reason=generation_pb2.FINISH_REASON_LENGTH)
            )
        except (asyncio.CancelledError, GeneratorExit):
            self._seen.worker_cancels += 1
            raise

    async def Tokenize(self, request: Any, context: _Context) -> Any:
        """Counts."""
        self._seen.worker_calls.append(metadata_of(context))
        if request.text == "refuse":
            raise MeshError(Reason.REQUEST_TOO_LARGE, "too large")
        return inference_pb2.TokenizeResponse(token_ids=[1, 2, 3], max_context_token_count=64)

    async def Embed(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Can't."""
        raise MeshError(Reason.UNIMPLEMENTED, "this model does not embed")

    async def Detokenize(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Counts back."""
        return inference_pb2.DetokenizeResponse(text=f"{len(request.token_ids)} tokens")

    async def Score(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Can't."""
        raise MeshError(Reason.UNIMPLEMENTED, "this model does not score")

    async def ListModels(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Lists."""
        return inference_pb2.ListModelsResponse(models=[inference_pb2.ModelCard(name="demo")])


class Lists(Worker):
    """The gateway's list of models: what the caller's key may use."""

    async def ListModels(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Lists."""
        allowed = str(metadata_of(context).get("x-tokenloom-models", '["all"]'))
        return inference_pb2.ListModelsResponse(
            models=[inference_pb2.ModelCard(name=name) for name in json.loads(allowed)]
        )


class OtherModel(Worker):
    """Serves none of the models that are asked for."""

    async def Generate(self, request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ARG002
        """Refuses."""
        for _ in request.model:
            raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {request.model!r} does not exist", field="model")
        yield generation_pb2.GenerateResponse()


class Telemetry(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Has one GPU."""

    async def ListGpus(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Lists."""
        return telemetry_pb2.ListGpusResponse(gpus=[telemetry_pb2.Gpu(name="L40")])

    async def WatchGpus(self, request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ARG002
        """Streams three."""
        for number in range(3):
            yield telemetry_pb2.WatchGpusResponse(gpus=[telemetry_pb2.Gpu(name=f"L40-{number}")])
            await asyncio.sleep(_STEP_SECONDS)


class Admin(admin_pb2_grpc.RouterAdminServiceServicer):
    """Knows one worker."""

    async def ListWorkers(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Lists."""
        return admin_pb2.ListWorkersResponse(workers=[admin_pb2.Worker(lease_count=1)])

    async def DrainWorker(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Drains."""
        if request.worker_id != "w0":
            raise MeshError(Reason.NOT_FOUND, f"there is no worker {request.worker_id!r}")
        return admin_pb2.DrainWorkerResponse()

    async def UndrainWorker(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Undrains."""
        return admin_pb2.UndrainWorkerResponse()

    async def WatchFleet(self, request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ARG002
        """Streams one."""
        yield admin_pb2.WatchFleetResponse(waiting_count=1)

    async def CordonWorker(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Cordons."""
        return admin_pb2.CordonWorkerResponse()

    async def SleepWorker(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Refuses one level."""
        if request.level != 1:
            raise MeshError(Reason.FAILED_PRECONDITION, f"{request.worker_id} can't")
        return admin_pb2.SleepWorkerResponse()

    async def WakeWorker(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Wakes."""
        return admin_pb2.WakeWorkerResponse()

    async def ReloadWeights(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Reloads."""
        return admin_pb2.ReloadWeightsResponse()

    async def LoadAdapter(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Says what it was asked for."""
        return admin_pb2.LoadAdapterResponse(model=inference_pb2.ModelCard(name=request.name, base_model=request.path))

    async def UnloadAdapter(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Unloads."""
        return admin_pb2.UnloadAdapterResponse()

    async def RollWorkers(self, request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ARG002
        """One that does it, one that fails."""
        yield admin_pb2.RollWorkersResponse(worker_id="w0", left_worker_ids=["w1"])
        failed = status_from_error(MeshError(Reason.FAILED_PRECONDITION, request.WhichOneof("operation")))
        yield admin_pb2.RollWorkersResponse(worker_id="w1", error=failed)

    async def GetPolicy(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Has the first one."""
        return admin_pb2.GetPolicyResponse(policy_json="{}", version=1)

    async def SetPolicy(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Takes any."""
        return admin_pb2.SetPolicyResponse(version=2)

    async def Explain(self, request: Any, context: _Context) -> Any:  # noqa: ARG002
        """Explains."""
        return admin_pb2.ExplainResponse(decisions=[admin_pb2.Decision(reason=request.request_id)])
