"""Envoy's external authorization: the typed lane gets the same identities and rights as the OpenAI lane."""

import base64
import json

import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.rpc import status_pb2

from services.common.errors import MeshError
from services.common.status import DETAILS_KEY, status_from_error
from services.gateway.identity import Authenticator, Identity

__all__ = ["AuthorizationServicer"]


class AuthorizationServicer(external_auth_pb2_grpc.AuthorizationServicer):
    """Tells Envoy whether a request may pass, and hands on whose it is as headers that clients can't set.

    The route says by its context extension `right` what a request needs: "admin", or any valid key.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def Check(
        self,
        request: external_auth_pb2.CheckRequest,
        context: grpc.aio.ServicerContext[external_auth_pb2.CheckRequest, external_auth_pb2.CheckResponse],  # noqa: ARG002
    ) -> external_auth_pb2.CheckResponse:
        """Answers one check."""
        http = request.attributes.request.http
        try:
            identity = self._authenticator.identify(http.headers.get("authorization"))
            if request.attributes.context_extensions.get("right") == "admin":
                identity.check_admin()
        except MeshError as error:
            is_grpc = http.headers.get("content-type", "").startswith("application/grpc")
            return _denied(error, is_grpc=is_grpc)
        return _allowed(identity)


def _allowed(identity: Identity) -> external_auth_pb2.CheckResponse:
    headers = {
        "x-tokenloom-tenant": identity.tenant,
        "x-tokenloom-key": identity.key_id,
        "x-tokenloom-priority": str(identity.priority),
    }
    if identity.models is not None:
        headers["x-tokenloom-models"] = json.dumps(sorted(identity.models))
    if identity.debug:
        headers["x-tokenloom-debug"] = "1"
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=0),
        ok_response=external_auth_pb2.OkHttpResponse(
            headers=[_header(name, value) for name, value in headers.items()],
            # Nobody behind the edge needs the key itself.
            headers_to_remove=["authorization"],
        ),
    )


def _denied(error: MeshError, *, is_grpc: bool) -> external_auth_pb2.CheckResponse:
    status = status_from_error(error)
    denied = external_auth_pb2.DeniedHttpResponse(status=http_status_pb2.HttpStatus(code=error.row.http))
    if is_grpc:
        # Envoy makes the gRPC status out of the HTTP one, and the message out of the body; the details go beside it.
        denied.body = error.message
        details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode()
        denied.headers.append(_header(DETAILS_KEY, details))
    else:
        denied.body = json.dumps(error.http_body())
        denied.headers.append(_header("content-type", "application/json"))
    return external_auth_pb2.CheckResponse(status=status, denied_response=denied)


def _header(name: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
