"""Requests that the mesh makes of itself, for a batch: through the same handlers as a client's."""

import asyncio
import logging
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import msgspec

from services.common.endpoints import endpoint_of
from services.common.errors import MeshError, Reason
from services.gateway.accounts import Accounts
from services.gateway.caller import Caller
from services.gateway.guardrails import Guardrails
from services.gateway.identity import Identity
from services.gateway.request import Request
from services.gateway.response import Response, error_response
from services.gateway.routes import Routes

__all__ = ["InnerAnswer", "InnerCalls"]

_log = logging.getLogger(__name__)


class InnerAnswer(msgspec.Struct, kw_only=True):
    """The answer to one of them."""

    status: int
    body: bytes
    retry_after: float | None = None
    """Seconds after which another try may help."""


class InnerCalls:
    """Calls handlers with bodies that came another way than over HTTP."""

    def __init__(self, routes: Routes, accounts: Accounts, guardrails: Guardrails) -> None:
        self._routes = routes
        self._accounts = accounts
        self._guardrails = guardrails

    async def post(self, path: str, body: bytes, identity: Identity, caller: Caller) -> InnerAnswer:
        """The answer to one request; errors are answers, too."""
        sent: list[MutableMapping[str, Any]] = []
        received = False

        async def receive() -> MutableMapping[str, Any]:
            nonlocal received
            if received:
                # Nobody can leave: the answer is waited for.
                await _never()
            received = True
            return {"type": "http.request", "body": body}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        scope = {"method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
        request, response = Request(scope, receive), Response(send, caller.request_id)
        retry_after: float | None = None
        try:
            route, endpoint = self._routes.find(request, response), endpoint_of(path)
            identity.check_endpoint(endpoint)
            with self._accounts.begin(
                identity, request_id=caller.request_id, lane="openai", endpoint=endpoint
            ) as account:
                caller = replace(caller, account=account, guard=self._guardrails.of(identity.tenant))
                await route.handler(request, response, identity, caller)
        except MeshError as error:
            if error.reason in (Reason.NO_CAPACITY, Reason.NO_READY_WORKER, Reason.RATE_LIMIT_EXCEEDED):
                retry_after = error.retry_after_seconds or 1.0
            await error_response(response, error)
        except Exception:  # noqa: BLE001  # as for a client's request: whatever it is becomes an error body
            _log.exception("a request of a batch failed")
            await error_response(response, MeshError(Reason.INTERNAL, "internal error"))
        content = b"".join(message.get("body", b"") for message in sent)
        return InnerAnswer(status=response.status, body=content, retry_after=retry_after)


async def _never() -> None:
    await asyncio.get_running_loop().create_future()
