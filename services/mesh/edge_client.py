"""The running mesh as an operator reaches it: through its edge, with its admin key."""

from typing import Any, Final

import grpc
from tokenloom.router.v1 import admin_pb2_grpc

from services.common.errors import MeshError, Reason
from services.common.status import error_from_call
from services.mesh.state import State

__all__ = ["ask_router"]

_TIMEOUT_SECONDS: Final = 10.0


def ask_router(state: State, method: str, request: Any) -> Any:
    """The answer of RouterAdminService to a unary call.

    Raises:
        MeshError: no mesh runs in the folder, or it refused.
    """
    mesh = state.read_mesh()
    if mesh is None:
        raise MeshError(Reason.NO_READY_WORKER, f"no mesh runs in {state.folder}")
    metadata = (("authorization", f"Bearer {mesh['admin_key']}"),)
    with grpc.insecure_channel(str(mesh["edge"]).partition("://")[2]) as channel:
        stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
        try:
            return getattr(stub, method)(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise error_from_call(error) from error  # type: ignore[arg-type]  # it has what that reads
