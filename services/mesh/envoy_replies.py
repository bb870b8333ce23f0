"""Errors at the edge, as the mesh's error table has them: Envoy's own, and those of gRPC behind the REST bridge.

Three hands make them, and none touches what another one made. The gateway's and the router's refusals come as they are
to be sent. What Envoy says itself ("no healthy upstream") is worded anew by `local_replies`. On the REST bridge,
`error_body_script` gives a body to statuses, which the transcoder prints as google.rpc.Status, and to the router's
refusals, which are gRPC's.
"""

import json
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from services.common.errors import TABLE, MeshError, Reason
from services.common.status import DETAILS_KEY, REASON_OF_CODE, grpc_code, status_from_error
from services.mesh.envoy_types import any_of

__all__ = ["error_body_script", "local_replies"]

_SCRIPT: Final = Path(__file__).with_name("error_body.lua")
_RETRY_SECONDS: Final = 1
_REASON_HEADER: Final = "x-tokenloom-reason"
# The router gives its reason as the details of its refusals.
_BY_ROUTER: Final = f"response.code_details in {json.dumps([reason.lower() for reason in Reason])}"
_BY_GATEWAY: Final = 'response.code_details.startsWith("ext_authz_denied")'
_IS_TRANSCODED: Final = '"x-envoy-original-path" in request.headers'
_IS_GRPC: Final = (
    '"content-type" in request.headers && request.headers["content-type"].startsWith("application/grpc") && '
    f"!({_IS_TRANSCODED})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """One of Envoy's own errors, worded anew."""

    status: int
    error: MeshError
    grpc_error: MeshError | None = None
    """What gRPC clients are told, where that differs."""
    only: str = "true"
    """What else must be the case, in CEL."""
    answered: int | None = None
    """The status that clients get, where Envoy's own would tell them that the fault is not theirs."""
    adds_reason: bool = False
    """Whether Envoy's own words follow."""


def _reply(status: int, reason: Reason, message: str, *, code: str | None = None, retry: bool = False) -> _Reply:
    return _Reply(
        status=status,
        error=MeshError(reason, message, code=code, retry_after_seconds=_RETRY_SECONDS if retry else None),
    )


_NO_METHOD: Final = MeshError(Reason.UNIMPLEMENTED, "there is no such method here")
_NOT_READY: Final = "this part of the mesh is not ready: try again"
# Only a body is picked for: without one no worker was named.
_NO_BODY: Final = 'response.code_details == "no_healthy_upstream" && request.size == 0 && ' + _IS_GRPC
_MALFORMED: Final = MeshError(Reason.INVALID_REQUEST, "malformed request")
_REPLIES: Final = (
    _Reply(status=503, only=_NO_BODY, error=MeshError(Reason.INVALID_REQUEST, "the request has no body")),
    _Reply(status=400, error=_MALFORMED, adds_reason=True),
    _Reply(
        status=404,
        error=MeshError(Reason.NOT_FOUND, "there is no such path here", code="unknown_url"),
        grpc_error=_NO_METHOD,
    ),
    _reply(405, Reason.METHOD_NOT_ALLOWED, "this path takes another method: see the allow header"),
    _reply(408, Reason.REQUEST_TIMEOUT, "the request did not arrive in time"),
    _reply(413, Reason.REQUEST_TOO_LARGE, "the request is larger than 4 MiB"),
    _reply(415, Reason.UNSUPPORTED_MEDIA_TYPE, "this path speaks gRPC: send content-type application/grpc"),
    _reply(431, Reason.INVALID_REQUEST, "the request's headers are too large", code="headers_too_large"),
    # A transfer coding or an HTTP version that nobody has heard of.
    *(_Reply(status=status, answered=400, error=_MALFORMED, adds_reason=True) for status in (426, 501)),
    _reply(502, Reason.NO_READY_WORKER, _NOT_READY, retry=True),
    _reply(503, Reason.NO_READY_WORKER, _NOT_READY, retry=True),
    _reply(504, Reason.DEADLINE_EXCEEDED, "the deadline passed"),
    _reply(500, Reason.INTERNAL, "internal error"),
)


def local_replies() -> dict[str, Any]:
    """How Envoy words its own errors."""
    mappers: list[dict[str, Any]] = [
        {
            "filter": _cel(f"{_BY_ROUTER} && {_IS_TRANSCODED}"),
            "headers_to_add": [_header(_REASON_HEADER, "%RESPONSE_CODE_DETAILS%")],
        },
        {
            # Envoy would make UNAVAILABLE of it.
            "filter": _cel(f"response.code == 429 && {_BY_GATEWAY} && {_IS_GRPC}"),
            "headers_to_add": [_header("grpc-status", str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]))],
        },
        {"filter": _cel(f"{_BY_ROUTER} || {_BY_GATEWAY}")},
    ]
    for reply in _REPLIES:
        mappers += [_for_grpc(reply), _for_http(reply)]
    return {"mappers": mappers}


def _for_grpc(reply: _Reply) -> dict[str, Any]:
    error = reply.grpc_error or reply.error
    details = b64encode(status_from_error(error).SerializeToString()).rstrip(b"=").decode()
    return {
        "filter": _cel(f"response.code == {reply.status} && {reply.only} && {_IS_GRPC}"),
        "body": {"inline_string": error.message},
        "headers_to_add": [
            _header("grpc-status", str(grpc_code(error).value[0])),
            _header(DETAILS_KEY, details),
        ],
    }


def _for_http(reply: _Reply) -> dict[str, Any]:
    body = reply.error.http_body()
    if reply.adds_reason:
        body["error"]["message"] = f"{reply.error.message}: %LOCAL_REPLY_BODY%"
    retry = reply.error.retry_after_seconds
    return {
        "filter": _cel(f"response.code == {reply.status} && {reply.only}"),
        "body_format_override": {"json_format": body},
        **({} if reply.answered is None else {"status_code": reply.answered}),
        "headers_to_add": [] if retry is None else [_header("retry-after", f"{retry:g}")],
    }


def _header(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _cel(expression: str) -> dict[str, Any]:
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": any_of(
                "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", expression=expression
            ),
        }
    }


def error_body_script() -> str:
    """The Lua that gives the REST bridge's errors their body, with the error table before it."""
    reasons = [
        f'  {reason} = {{http = {row.http}, type = "{row.type}", code = "{row.code}"}},'
        for reason, row in TABLE.items()
    ]
    codes = [f'  [{grpc.StatusCode[name].value[0]}] = "{reason}",' for name, reason in REASON_OF_CODE.items()]
    tables = (("REASONS", reasons), ("REASON_OF_CODE", codes))
    lines = [line for name, rows in tables for line in (f"local {name} = {{", *rows, "}")]
    return "\n".join([f'local REASON_HEADER = "{_REASON_HEADER}"', *lines, _SCRIPT.read_text(encoding="utf-8")])
