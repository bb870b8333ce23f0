"""The gateway's HTTP side: an ASGI application with the OpenAI-compatible API."""

import logging
from collections.abc import Callable, MutableMapping
from importlib.metadata import version
from time import monotonic
from typing import Any, Final

from opentelemetry.trace import Span, Status, StatusCode

from services.common.endpoints import endpoint_of
from services.common.errors import MeshError, Reason
from services.common.ids import random_hex
from services.common.priority import PRIORITY_HEADER, priority_of
from services.gateway.accounts import Account, Accounts
from services.gateway.authz import AUTHORIZATION_PATH, HttpAuthorization
from services.gateway.caller import LONGEST_SESSION, Caller
from services.gateway.console import Console
from services.gateway.guardrails import Guard, Guardrails
from services.gateway.http import ABORT, ENDS_WHEN_NOTED, WRITE, ClientLeftError, Receive, Send
from services.gateway.identity import Authenticator
from services.gateway.metrics import GatewayMetrics
from services.gateway.openapi import document
from services.gateway.recording import request_ended, request_span
from services.gateway.request import Request
from services.gateway.response import Response, error_response
from services.gateway.router_client import OnQueued
from services.gateway.routes import Routes
from services.gateway.timers import Timers

__all__ = ["App"]

_log = logging.getLogger(__name__)
_LONGEST_CLASS: Final = 64
_PRIORITY: Final = PRIORITY_HEADER.encode()


class App:
    """Dispatches requests to handlers; owns identity, request ids, errors, the request's span, log line and metrics."""

    def __init__(
        self,
        *,
        routes: Routes,
        authenticator: Authenticator,
        accounts: Accounts,
        guardrails: Guardrails,
        authorization: HttpAuthorization,
        metrics: GatewayMetrics,
        is_ready: Callable[[], bool],
        client_seconds: float = 30.0,
    ) -> None:
        """`is_ready` tells whether /readyz should say so. `client_seconds`: how long a client may stand still."""
        self._client_seconds = client_seconds
        self._routes = routes
        self._authenticator = authenticator
        self._accounts = accounts
        self._guardrails = guardrails
        self._authorization = authorization
        self._metrics = metrics
        self._is_ready = is_ready
        self._timers = Timers()
        self._console = Console()
        self._openapi = document(routes.all, version=version("tokenloom"))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI connection. Only HTTP is served."""
        if scope["type"] != "http":
            raise ValueError(f"unexpected ASGI scope {scope['type']!r}")
        if scope["path"].startswith(AUTHORIZATION_PATH):
            await self._authorization(scope, receive, send)
            return
        request = Request(scope, receive, client_seconds=self._client_seconds)
        request_id = request.header(b"x-request-id") or random_hex(32)
        extensions = scope.get("extensions", {})
        response = Response(
            send,
            request_id,
            client_seconds=self._client_seconds,
            abort=extensions.get(ABORT),
            write=extensions.get(WRITE),
            timers=self._timers,
            before_end=None if ENDS_WHEN_NOTED in extensions else self._accounts.journal.flush,
        )
        if request.path in ("/healthz", "/readyz"):
            await self._probe(request, response)
            return
        if request.path == "/openapi.json" and request.method == "GET":
            await response.send_json(200, self._openapi)
            return
        if self._console.has(request.path):
            await self._show(request, response)
            return
        endpoint = self._routes.label(request.path)
        parent = request.header(b"traceparent"), request.header(b"tracestate")
        with request_span(request.method, endpoint, request_id, *parent) as span:
            await self._answer(request, response, endpoint, span)

    async def _probe(self, request: Request, response: Response) -> None:
        ok = request.path == "/healthz" or self._is_ready()
        await response.send_json(200 if ok else 503, {"status": "ok" if ok else "not ready"})

    async def _show(self, request: Request, response: Response) -> None:
        try:
            await self._console.answer(request, response)
        except MeshError as error:
            await error_response(response, error)

    async def _answer(self, request: Request, response: Response, endpoint: str, span: Span) -> None:
        began = monotonic()
        outcome = "ok"
        self._metrics.open_requests += 1
        try:
            await self._dispatch(request, response, span)
        except ClientLeftError:
            outcome = "client_left"
            span.set_attribute("error.type", "client_left")
        except Exception as error:  # noqa: BLE001  # the last line of defence: whatever it is becomes an error body
            outcome = await _answer_error(response, error, span)
        finally:
            self._metrics.open_requests -= 1
            request_ended(
                self._metrics,
                span,
                request_id=response.request_id,
                endpoint=endpoint,
                outcome=outcome,
                status=response.status,
                seconds=monotonic() - began,
                facts=response.facts,
            )

    async def _dispatch(self, request: Request, response: Response, span: Span) -> None:
        identity = await self._authenticator.identify(request.header(b"authorization"))
        route = self._routes.find(request, response)
        if (endpoint := endpoint_of(request.path)) != "models":
            # Anybody may know what there is: clients ask before anything else.
            identity.check_endpoint(endpoint)
        response.facts["tenant"] = identity.tenant
        with self._accounts.begin(
            identity, request_id=response.request_id, lane="openai", endpoint=endpoint, show=response.add_header
        ) as account:
            guard = self._guardrails.of(identity.tenant)
            caller = _caller(request, account, span, guard, response.note_queue)
            if caller.session_id:
                response.facts["session"] = caller.session_id
            await route.handler(request, response, identity, caller)


def _caller(request: Request, account: Account, span: Span, guard: Guard | None, on_queued: OnQueued) -> Caller:
    identity = account.identity
    return Caller(
        request_id=account.request_id,
        tenant=identity.tenant,
        priority=priority_of(request.header(_PRIORITY), identity.priority),
        account=account,
        session_id=(request.header(b"x-session-id") or "")[:LONGEST_SESSION],
        span=span,
        slo_class=(request.header(b"x-slo-class") or "")[:_LONGEST_CLASS],
        allow_degrade=identity.allow_degrade,
        guard=guard,
        on_queued=on_queued,
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
