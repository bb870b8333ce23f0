"""Envoy's external authorization: the typed lane gets the same identities and rights as the OpenAI lane."""

import base64
import json
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache, partial
from typing import Any, Final

import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.rpc import status_pb2

from services.common.allowed_models import MODELS_HEADER
from services.common.errors import MeshError, Reason
from services.common.quota import NO_LIMITS
from services.common.status import DETAILS_KEY, status_from_error
from services.common.typed_calls import ACCOUNT_HEADER, REMEMBER_HEADER
from services.gateway.checks import KnownAnswer
from services.gateway.guardrails import Guardrails
from services.gateway.http import Headers, Receive, Send, error_headers
from services.gateway.identity import Authenticator, Identity
from services.gateway.request import Request
from services.gateway.typed_lane import TypedAccounts

__all__ = ["AUTHORIZATION_PATH", "AuthorizationServicer", "HttpAuthorization", "Trail"]

AUTHORIZATION_PATH: Final = "/authz/"
"""Where checks over HTTP come in; what follows is the path that the client asked for."""
_PATH: Final = AUTHORIZATION_PATH.encode()
_RIGHT: Final = b"x-tokenloom-right"
_FORM: Final = b"x-tokenloom-form"
_REQUEST_ID: Final = b"x-request-id"
_ACCOUNT: Final = ACCOUNT_HEADER.encode()
_REMOVED: Final = (b"x-envoy-auth-headers-to-remove", b"authorization")
_INFERENCE: Final = "inference"
"""The right that the routes to workers need."""
_REMEMBER_SECONDS: Final = 0.5
# A key that is revoked stops within a second: it takes a quarter of one until this process hears of it.
_REMEMBER: Final = f"{REMEMBER_HEADER}: {1000 * _REMEMBER_SECONDS:.0f}\r\n".encode()
# The edge has room for so many answers; a longer one is asked for each time.
_LONGEST_REMEMBERED: Final = 2048
_EMPTY: Final = (b"content-length", b"0")
_Headers = list[tuple[bytes, bytes]]
Trail = Callable[[str, str], Awaitable[None]]
"""Writes down who asks for what, by key id and path; raises MeshError when that can't be done."""
_READING: Final = ("List", "Watch", "Get", "Explain")
"""How the operators' RPCs begin that change nothing."""


class AuthorizationServicer(external_auth_pb2_grpc.AuthorizationServicer):
    """Tells Envoy whether a request may pass, and hands on whose it is as headers that clients can't set.

    The route says by its context extension `right` what a request needs: "admin", or any valid key.
    """

    def __init__(self, authenticator: Authenticator, guardrails: Guardrails) -> None:
        self._authenticator = authenticator
        self._guardrails = guardrails

    async def Check(
        self,
        request: external_auth_pb2.CheckRequest,
        context: grpc.aio.ServicerContext[external_auth_pb2.CheckRequest, external_auth_pb2.CheckResponse],  # noqa: ARG002
    ) -> external_auth_pb2.CheckResponse:
        """Answers one check."""
        http = request.attributes.request.http
        right = request.attributes.context_extensions.get("right", "")
        try:
            identity = await _check(self._authenticator, self._guardrails, http.headers.get("authorization"), right)
        except MeshError as error:
            is_grpc = http.headers.get("content-type", "").startswith("application/grpc")
            return _denied(error, is_grpc=is_grpc)
        return _allowed(identity)


class HttpAuthorization:
    """The same checks over HTTP, for an Envoy that asks with `http_service`: a quarter of what gRPC costs here.

    Envoy says in headers of its own what it asks for: `x-tokenloom-right`, and `x-tokenloom-form` ("grpc" or "rest"),
    which the refusal has.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        guardrails: Guardrails,
        accounts: TypedAccounts | None = None,
        *,
        trail: Trail | None = None,
    ) -> None:
        """`accounts`: calls are held to their keys' limits, and kept account of; None: they are not.

        `trail` writes down what operators change, before they may.
        """
        self._trail = trail
        self._authenticator = authenticator
        self._guardrails = guardrails
        self._accounts = accounts

    def known_answer(self, method: bytes, url: bytes, headers: Headers) -> KnownAnswer | None:
        """The whole HTTP answer to a check that passes and needs no waiting, and what is to be done right after it.

        None: ask in the usual way. A check has the `method` of the request that it is about.
        """
        del method
        if not url.startswith(_PATH):
            return None
        keys = [value for name, value in headers if name == b"authorization"]
        rights = [value for name, value in headers if name == _RIGHT]
        if len(keys) != 1 or len(rights) != 1:
            return None
        key = keys[0].decode("latin-1")
        identity = self._authenticator.known(key)
        if identity is None:
            return None
        if rights[0] == b"admin":
            # What operators do is written down first.
            return None
        if rights[0] != _INFERENCE.encode():
            return _passed_bytes(identity), _nothing
        return self._entered_at_once(key, identity, url, headers)

    def _entered_at_once(self, key: str, identity: Identity, url: bytes, headers: Headers) -> KnownAnswer | None:
        """Also lets the edge remember the answer for a moment: it is the same for whatever such a key asks for."""
        if _is_filtered(self._guardrails, identity) or identity.limits != NO_LIMITS or identity.endpoints is not None:
            return None
        if self._accounts is None:
            return _passed_bytes(identity), _nothing
        ids = [value for name, value in headers if name == _REQUEST_ID]
        path, request_id = url.decode("latin-1"), ids[0].decode("latin-1") if ids else ""
        account = self._accounts.begin(identity, path, request_id)
        passed = _passed_bytes(identity)[:-2]
        stays = len(passed) <= _LONGEST_REMEMBERED and self._authenticator.stays(key, _REMEMBER_SECONDS)
        remember = _REMEMBER if stays else b""
        answer = b"%s%s%s: %s\r\n\r\n" % (passed, remember, _ACCOUNT, account.id.encode())
        return answer, partial(self._accounts.enter_soon, account)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one check: 200 with the headers to add, or the refusal that the client is to get."""
        asked = Request(scope, receive)
        shown: list[tuple[str, str]] = []
        try:
            # Who does not say what it is for gets nothing that a stranger might have asked for.
            right = asked.header(_RIGHT) or "admin"
            identity = await _check(self._authenticator, self._guardrails, asked.header(b"authorization"), right)
            entered = await self._enter(identity, asked, shown) if right == _INFERENCE else []
            if right == "admin" and self._trail is not None and _changes(asked):
                await self._trail(identity.key_id, asked.path.removeprefix(AUTHORIZATION_PATH))
        except MeshError as error:
            is_grpc = asked.header(_FORM) == "grpc"
            status, headers, body = _refusal(error, is_grpc=is_grpc)
        else:
            status, headers, body = 200, [*_passed(identity), *entered], b""
        headers = [*headers, *((name.encode(), value.encode()) for name, value in shown)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _enter(self, identity: Identity, asked: Request, shown: list[tuple[str, str]]) -> _Headers:
        if self._accounts is None:
            return []
        account = self._accounts.begin(
            identity, asked.path, asked.header(_REQUEST_ID) or "", lambda *header: shown.append(header)
        )
        await account.enter()
        self._accounts.keep(account)
        return [(_ACCOUNT, account.id.encode())]


def _nothing() -> None:
    """Nothing is to be done after the answer."""


async def _check(
    authenticator: Authenticator, guardrails: Guardrails, authorization: str | None, right: str
) -> Identity:
    identity = await authenticator.identify(authorization)
    if right == "admin":
        identity.check_admin()
    elif right == _INFERENCE and _is_filtered(guardrails, identity):
        message = "what this tenant sends and gets is filtered, which only the OpenAI API does"
        raise MeshError(Reason.PERMISSION_DENIED, message)
    return identity


def _changes(asked: Request) -> bool:
    if asked.header(_FORM) == "grpc":
        return not asked.path.rpartition("/")[2].startswith(_READING)
    return asked.method != "GET"


def _is_filtered(guardrails: Guardrails, identity: Identity) -> bool:
    guard = guardrails.of(identity.tenant)
    return guard is not None and guard.filters


@lru_cache(maxsize=1024)
def _passed(identity: Identity) -> _Headers:
    return [_EMPTY, _REMOVED, *((name.encode(), value.encode()) for name, value in _headers(identity).items())]


@lru_cache(maxsize=1024)
def _passed_bytes(identity: Identity) -> bytes:
    lines = (b"%s: %s\r\n" % header for header in _passed(identity))
    return b"HTTP/1.1 200 OK\r\n%s\r\n" % b"".join(lines)


def _refusal(error: MeshError, *, is_grpc: bool) -> tuple[int, _Headers, bytes]:
    body = error.message.encode() if is_grpc else json.dumps(error.http_body()).encode()
    extra = (DETAILS_KEY.encode(), _details(error).encode()) if is_grpc else (b"content-type", b"application/json")
    headers = [(b"content-length", str(len(body)).encode()), extra, *error_headers(error)]
    return error.row.http, headers, body


@lru_cache(maxsize=1024)
def _allowed(identity: Identity) -> external_auth_pb2.CheckResponse:
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=0),
        ok_response=external_auth_pb2.OkHttpResponse(
            headers=[_header(name, value) for name, value in _headers(identity).items()],
            # Nobody behind the edge needs the key itself.
            headers_to_remove=["authorization"],
        ),
    )


def _headers(identity: Identity) -> dict[str, str]:
    headers = {
        "x-tokenloom-tenant": identity.tenant,
        "x-tokenloom-key": identity.key_id,
        "x-tokenloom-priority": str(identity.priority),
    }
    if identity.models is not None:
        headers[MODELS_HEADER] = json.dumps(sorted(identity.models))
    if identity.allow_degrade:
        headers["x-tokenloom-degrade"] = "1"
    if identity.debug:
        headers["x-tokenloom-debug"] = "1"
    return headers


def _denied(error: MeshError, *, is_grpc: bool) -> external_auth_pb2.CheckResponse:
    status = status_from_error(error)
    denied = external_auth_pb2.DeniedHttpResponse(status=http_status_pb2.HttpStatus(code=error.row.http))
    if is_grpc:
        # Envoy makes the gRPC status out of the HTTP one, and the message out of the body; the details go beside it.
        denied.body = error.message
        denied.headers.append(_header(DETAILS_KEY, _details(error)))
    else:
        denied.body = json.dumps(error.http_body())
        denied.headers.append(_header("content-type", "application/json"))
    return external_auth_pb2.CheckResponse(status=status, denied_response=denied)


def _details(error: MeshError) -> str:
    # Binary metadata travels as base64 without padding.
    return base64.b64encode(status_from_error(error).SerializeToString()).rstrip(b"=").decode()


def _header(name: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
