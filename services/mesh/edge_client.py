"""The running mesh as an operator reaches it: through its edge, with its admin key."""

import http.client
import json
import os
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from tokenloom.router.v1 import admin_pb2_grpc

from services.common.errors import TABLE, MeshError, Reason
from services.common.status import error_from_call
from services.mesh.state import State

__all__ = ["KEY_VARIABLE", "Door", "ask_gateway", "ask_router", "door_of", "stream_router"]

KEY_VARIABLE: Final = "TOKENLOOM_API_KEY"
"""Where the key of a mesh that runs elsewhere is found: an option would show it to everybody on the machine."""
_TIMEOUT_SECONDS: Final = 10.0
# Workers that do something in turn have bounds of their own, which the router keeps.
_STREAM_SECONDS: Final = 24 * 3600.0
_MAX_MESSAGE: Final = [("grpc.max_receive_message_length", 16 << 20)]


@dataclass(frozen=True, slots=True)
class Door:
    """Where a mesh is reached."""

    url: str
    key: str = field(repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a gRPC call carries."""
        return (("authorization", f"Bearer {self.key}"),)

    @property
    def headers(self) -> dict[str, str]:
        """What an HTTP request carries."""
        return {"authorization": f"Bearer {self.key}"}

    def channel(self) -> grpc.Channel:
        """A channel to the edge."""
        if self.url.startswith("https://"):
            return grpc.secure_channel(self._target, _credentials(), options=_MAX_MESSAGE)
        return grpc.insecure_channel(self._target, options=_MAX_MESSAGE)

    def async_channel(self, number: int = 0) -> grpc.aio.Channel:
        """The same for asyncio. An async context manager. Each `number` has a connection of its own."""
        options = [*_MAX_MESSAGE, ("tokenloom.connection", number)]
        if self.url.startswith("https://"):
            return grpc.aio.secure_channel(self._target, _credentials(), options=options)
        return grpc.aio.insecure_channel(self._target, options=options)

    @property
    def _target(self) -> str:
        scheme, _, rest = self.url.partition("://")
        host = rest.partition("/")[0]
        return host if ":" in host.rpartition("]")[2] else f"{host}:{443 if scheme == 'https' else 80}"


def door_of(arguments: Namespace) -> Door:
    """The mesh that the options name: by `--edge`, or the one that runs in the state folder.

    Raises:
        MeshError: no mesh runs in the folder, or the key is missing.
    """
    if (url := getattr(arguments, "edge", None)) is not None:
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise MeshError(Reason.INVALID_API_KEY, f"--edge: put an admin key of that mesh into {KEY_VARIABLE}")
        return Door(url.rstrip("/"), key)
    return _door(State(arguments.state_dir))


def ask_router(door: Door, method: str, request: Any) -> Any:
    """The answer of RouterAdminService to a unary call.

    Raises:
        MeshError: it refused, or can't be reached.
    """
    with door.channel() as channel:
        stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
        try:
            return getattr(stub, method)(request, metadata=door.metadata, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise error_from_call(error) from error  # type: ignore[arg-type]  # it has what that reads


def stream_router(door: Door, method: str, request: Any) -> Iterator[Any]:
    """The messages that RouterAdminService streams, as they come.

    Raises:
        MeshError: it refused, or was lost.
    """
    with door.channel() as channel:
        stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
        try:
            yield from getattr(stub, method)(request, metadata=door.metadata, timeout=_STREAM_SECONDS)
        except grpc.RpcError as error:
            raise error_from_call(error) from error  # type: ignore[arg-type]  # it has what that reads


def ask_gateway(
    door: Door,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    method: str | None = None,
    timeout: float = _TIMEOUT_SECONDS,
) -> Any:
    """The JSON that a path of the edge answers; with a body it is posted, unless another method is named.

    Raises:
        MeshError: it refused, or can't be reached.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {**door.headers, **({} if data is None else {"content-type": "application/json"})}
    url = f"{door.url}{path}"
    request = urllib.request.Request(url, data=data, headers=headers, method=method)  # noqa: S310  # an operator's URL
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310  # as above
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise _error_of(error.code, error.read()) from error
    except (OSError, http.client.HTTPException) as error:
        raise MeshError(
            Reason.NO_READY_WORKER, f"the mesh can't be reached: {getattr(error, 'reason', error)}"
        ) from error
    except ValueError as error:
        raise MeshError(Reason.INTERNAL, f"{door.url}{path} answers no JSON") from error


def _credentials() -> grpc.ChannelCredentials:
    # gRPC has roots of its own; HTTP clients take those of SSL_CERT_FILE, and so shall it.
    roots = os.environ.get("SSL_CERT_FILE")
    return grpc.ssl_channel_credentials(None if roots is None else Path(roots).read_bytes())


def _error_of(status: int, body: bytes) -> MeshError:
    try:
        said: dict[str, Any] = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        said = {"message": f"HTTP status {status}"}
    reason = next((reason for reason, row in TABLE.items() if row.http == status), Reason.INTERNAL)
    return MeshError(reason, str(said.get("message")), code=said.get("code"))


def _door(state: State) -> Door:
    mesh, runs = state.read_mesh(), state.running_pid() is not None
    if mesh is None or not runs:
        said = f"the mesh in {state.folder} is starting or stopping" if runs else f"no mesh runs in {state.folder}"
        raise MeshError(Reason.NO_READY_WORKER, said)
    return Door(str(mesh["operators"]), str(mesh["admin_key"]))
