"""The gateway's HTTP side: an ASGI application with the OpenAI-compatible API."""

import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any, Final

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from services.common.endpoints import endpoint_of
from services.common.errors import MeshError, Reason
from services.common.tracing import context_from, traceparent_of, tracer
from services.gateway.authz import AUTHORIZATION_PATH, HttpAuthorization
from services.gateway.fleet import FleetWatch, Model
from services.gateway.generation import Caller
from services.gateway.http import ClientLeftError, Receive, Request, Response, Send, error_response
from services.gateway.identity import Authenticator, Identity
from services.gateway.metrics import GatewayMetrics

__all__ = ["App", "Handler"]

_log = logging.getLogger(__name__)
_MODEL_PREFIX: Final = "/v1/models/"

Handler = Callable[[Request, Response, Identity, Caller], Awaitable[None]]


class App:
    """Dispatches requests to handlers; owns identity, request ids, errors, the request's span, log line and metrics."""

    def __init__(
        self,
        *,
        handlers: dict[str, Handler],
        authenticator: Authenticator,
        authorization: HttpAuthorization,
        fleet: FleetWatch,
        metrics: GatewayMetrics,
        is_ready: Callable[[], bool],
    ) -> None:
        """`handlers` answer POST requests, by path. `is_ready` tells whether /readyz should say so."""
        self._handlers = handlers
        self._authenticator = authenticator
        self._authorization = authorization
        self._fleet = fleet
        self._metrics = metrics
        self._is_ready = is_ready

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI connection. Only HTTP is served."""
        if scope["type"] != "http":
            raise ValueError(f"unexpected ASGI scope {scope['type']!r}")
        if scope["path"].startswith(AUTHORIZATION_PATH):
            await self._authorization(scope, receive, send)
            return
        request = Request(scope, receive)
        request_id = request.header(b"x-request-id") or uuid.uuid4().hex
        response = Response(send, request_id)
        if request.path in ("/healthz", "/readyz"):
            await self._probe(request, response)
            return
        with tracer().start_as_current_span(
            f"{request.method} {request.path if request.path in self._handlers else '/v1/models'}",
            context=context_from(request.header(b"traceparent"), request.header(b"tracestate")),
            kind=SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
            attributes={"tokenloom.request_id": request_id},
        ) as span:
            await self._answer(request, response, request_id, span)

    async def _probe(self, request: Request, response: Response) -> None:
        ok = request.path == "/healthz" or self._is_ready()
        await response.send_json(200 if ok else 503, {"status": "ok" if ok else "not ready"})

    async def _answer(self, request: Request, response: Response, request_id: str, span: Span) -> None:
        endpoint = self._endpoint_label(request.path)
        began = monotonic()
        outcome = "ok"
        self._metrics.open_requests.inc()
        try:
            await self._dispatch(request, response, request_id, span)
        except ClientLeftError:
            outcome = "client_left"
            span.set_attribute("error.type", "client_left")
        except Exception as error:  # noqa: BLE001  # the last line of defence: whatever it is becomes an error body
            outcome = await _answer_error(response, error, span)
        finally:
            seconds = monotonic() - began
            self._metrics.open_requests.dec()
            self._metrics.requests.labels(endpoint, outcome).inc()
            self._metrics.request_seconds.labels(endpoint).observe(seconds)
            _log.info(
                "request",
                extra={
                    "request": request_id,
                    "endpoint": endpoint,
                    "outcome": outcome,
                    "status": response.status or 499,
                    "duration_ms": round(seconds * 1000, 1),
                    **response.facts,
                },
            )

    async def _dispatch(self, request: Request, response: Response, request_id: str, span: Span) -> None:
        identity = await self._authenticator.identify(request.header(b"authorization"))
        handler = self._handlers.get(request.path)
        if handler is not None:
            _require_method(request, response, "POST")
            identity.check_endpoint(endpoint_of(request.path))
            response.facts["tenant"] = identity.tenant
            await handler(request, response, identity, _caller(request, request_id, identity, span))
        elif request.path == "/v1/models" or request.path.startswith(_MODEL_PREFIX):
            _require_method(request, response, "GET")
            await self._models(request, response)
        else:
            raise MeshError(Reason.NOT_FOUND, f"there is no {request.path[:200]}", code="unknown_url")

    async def _models(self, request: Request, response: Response) -> None:
        if request.path == "/v1/models":
            body: dict[str, Any] = {"object": "list", "data": [_model_body(model) for model in self._fleet.models]}
        else:
            name = request.path.removeprefix(_MODEL_PREFIX)
            model = self._fleet.model(name)
            if model is None:
                raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {name[:256]!r} does not exist", field="model")
            body = _model_body(model)
        await response.send_json(200, body)

    def _endpoint_label(self, path: str) -> str:
        # Bounded: what clients make up must not become labels.
        if path in self._handlers:
            return path
        return "/v1/models" if path.startswith("/v1/models") else "other"


def _caller(request: Request, request_id: str, identity: Identity, span: Span) -> Caller:
    return Caller(
        request_id=request_id,
        tenant=identity.tenant,
        priority=identity.priority,
        session_id=(request.header(b"x-session-id") or "")[:256],
        traceparent=traceparent_of(span),
    )


async def _answer_error(response: Response, error: Exception, span: Span) -> str:
    if not isinstance(error, MeshError):
        _log.error("a request failed", exc_info=error)
        error = MeshError(Reason.INTERNAL, "internal error")
    span.set_attribute("error.type", error.reason.value)
    if error.row.http >= 500:
        span.set_status(Status(StatusCode.ERROR, error.message))
    await error_response(response, error)
    return error.reason.value.lower()


def _require_method(request: Request, response: Response, method: str) -> None:
    if request.method != method:
        response.add_header("allow", method)
        raise MeshError(Reason.METHOD_NOT_ALLOWED, f"use {method} for {request.path}")


def _model_body(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "tokenloom",
        "max_model_len": model.max_context_tokens,
    }
