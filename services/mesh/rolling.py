"""What commands have several workers do, one after the other, and what they say of it."""

from argparse import Namespace
from typing import Any

from tokenloom.router.v1 import admin_pb2

from services.common.errors import MeshError
from services.common.status import error_from_status
from services.mesh.edge_client import door_of, stream_router

__all__ = ["roll"]

_WHICH = ("pool", "model")


def roll(arguments: Namespace, done: str, **operation: Any) -> int:
    """Has the workers that the options name do it in turn; `done` says of one that it has. Returns the exit code.

    `operation` is that field of RollWorkersRequest.

    Raises:
        MeshError: one failed, and those after it are left as they are.
    """
    request = admin_pb2.RollWorkersRequest(**_meant(arguments), **operation)
    for answer in stream_router(door_of(arguments), "RollWorkers", request):
        seconds = answer.duration.ToNanoseconds() / 1e9
        if answer.HasField("error"):
            raise _failure(answer)
        if answer.unchanged_reason:
            print(f"{answer.worker_id}: nothing to do: {answer.unchanged_reason}", flush=True)
        else:
            print(f"{answer.worker_id} {done}, after {seconds:.1f} s", flush=True)
    return 0


def _meant(arguments: Namespace) -> dict[str, Any]:
    if arguments.all:
        return {"all": True}
    named = {name: value for name in _WHICH if (value := getattr(arguments, name)) is not None}
    return named or {"worker_id": arguments.worker}


def _failure(answer: admin_pb2.RollWorkersResponse) -> MeshError:
    error = error_from_status(answer.error)
    left = f"; left as they are: {', '.join(answer.left_worker_ids)}" if answer.left_worker_ids else ""
    return MeshError(error.reason, f"{answer.worker_id}: {error.message}{left}")
