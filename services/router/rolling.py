"""RollWorkers on the wire: which workers are meant, what they are to do, and what became of each."""

from collections.abc import Callable

from tokenloom.router.v1 import admin_pb2

from services.common.errors import MeshError, Reason
from services.common.status import status_from_error
from services.router import wire
from services.router.operations import Done, Operation
from services.router.worker import Worker

__all__ = ["meant", "operation", "told"]


def meant(request: admin_pb2.RollWorkersRequest) -> tuple[str, Callable[[Worker], bool]]:
    """The field that says which workers are meant, and whether one is.

    Raises:
        MeshError: INVALID_REQUEST, it is not said.
    """
    match request.WhichOneof("workers"):
        case "worker_id":
            return "worker_id", lambda worker: worker.worker_id == request.worker_id
        case "pool":
            return "pool", lambda worker: worker.card.pool == request.pool
        case "model":
            return "model", lambda worker: request.model in worker.card.models
        case "all" if request.all:
            return "all", lambda _: True
        case _:
            message = "workers: say which: a worker_id, a pool, a model, or all"
            raise MeshError(Reason.INVALID_REQUEST, message, field="workers")


def operation(request: admin_pb2.RollWorkersRequest) -> Operation:
    """What the workers are to do.

    Raises:
        MeshError: INVALID_REQUEST, it is not said.
    """
    chosen = request.WhichOneof("operation")
    if chosen is None:
        message = "operation: say what: sleep, wake, reload_weights, load_adapter or unload_adapter"
        raise MeshError(Reason.INVALID_REQUEST, message, field="operation")
    found: Operation = getattr(request, chosen)
    return found


def told(done: Done) -> admin_pb2.RollWorkersResponse:
    """What became of one."""
    return admin_pb2.RollWorkersResponse(
        worker_id=done.worker_id,
        duration=wire.duration(done.seconds),
        error=None if done.error is None else status_from_error(done.error),
        left_worker_ids=done.left,
        unchanged_reason=done.unchanged,
    )
